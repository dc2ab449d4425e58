"""What an adversary writes: infinite literals, broken promises, numbers that were folded, rules that are not their own.

Each case gave bounds that did not hold, or an error that was not jaxbound's, before the kind was mended.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import regions
from jaxbound.jacobian import norms

pytestmark = pytest.mark.fast

LOW, HIGH = np.array([-2.0, -1, -0.5, -3], np.float32), np.array([1.0, 2, 0.5, 3], np.float32)
BOX = jb.Box(jnp.asarray(LOW), jnp.asarray(HIGH))
POSITIVE = jb.Box(jnp.full(4, 1.0), jnp.full(4, 2.0))


def _bounds(function, method=None, box=BOX, rounding: bool | str = True):
    return jb.bound(function, method or jb.IBP(), rounding=rounding)(box)


# --- infinite literals ------------------------------------------------------------------------------------------------


def _masked(x):
    return jnp.where(x > 0, x, -jnp.inf)


UNDEFINED = {
    "0 * inf": lambda x: jnp.tanh(x * jnp.inf),
    "inf - inf": lambda x: jnp.tanh((x + jnp.inf) - jnp.inf),
    "masks that meet": lambda x: jnp.tanh(_masked(x) - _masked(x)[::-1]),
    "masked entries times weights": lambda x: jnp.tanh(_masked(x) @ jnp.array([1.0, 0, -1, 2])),
    "a difference of sorted masks": lambda x: jnp.tanh(jnp.diff(jnp.sort(_masked(x)))),
    "a softmax of masks alone": lambda x: jax.nn.softmax(_masked(x)),
    "NaN as a case": lambda x: jnp.tanh(jnp.where(x[::-1] > 0, x, jnp.nan)),
    "an undefined shift of a softmax": lambda x: (lambda e: e / e.sum())(jnp.exp(x - jnp.log(x[0]))),
    "an undefined shift put back": lambda x: jnp.log(jnp.sum(jnp.exp(x - jnp.log(x[0])))) + jnp.log(x[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_infinite_numbers_make_undefined_is_unbounded(name):
    found = _bounds(UNDEFINED[name])
    assert not np.isfinite(found.lower).any() and not np.isfinite(found.upper).any()


@pytest.mark.parametrize("fn", [jnp.divide, jnp.mod, jnp.floor_divide, jax.lax.rem, lambda x, y: jnp.divmod(x, y)[1]])
def test_a_divisor_of_zero_leaves_no_bounds(fn):
    """Neither a bounded function of a quotient nor a remainder, which lies below the divisor, has a value there."""
    divisors = jnp.array([0.0, 1.0, 1.0, 1.0])
    for method in (jb.IBP(), jb.Crown()):
        found = [
            jb.bound(lambda x, y: jnp.tanh(fn(x, y)), method, rounding=True)(BOX, divisors),
            _bounds(lambda x: jnp.tanh(fn(x, divisors)), method),
        ]
        for ends in found:
            assert not np.isfinite(ends.lower[0]) and not np.isfinite(ends.upper[0])


def test_a_divisor_of_zero_among_parameters_of_a_batch():
    assert not np.isfinite(_bounds(lambda x: jnp.tanh(x / 0.0)).lower).any()
    divisors, x = jnp.array([0.0, 1.0, 1.0, 1.0]), jnp.zeros((2, 4))
    shared = jb.ibp({"d": divisors}, x, 0.1, apply_fn=lambda p, x: jnp.tanh(x / p["d"]))
    own = jax.vmap(lambda y: jb.bound(lambda x, y: jnp.tanh(x / y), jb.IBP())(BOX, y))(jnp.stack([divisors, divisors]))
    for found in (shared, own):
        assert not np.isfinite(found.lower[:, 0]).any() and np.isfinite(found.lower[:, 1:]).all()


REFUSED = {
    "is_finite of a mask": lambda x: jnp.where(jnp.isfinite(_masked(x)), 1.0, 2.0),
    "a mask compared with infinity": lambda x: jnp.where(jnp.where(x[::-1] > 0, x, -jnp.inf) == -jnp.inf, 1.0, 2.0),
    "the sine of a mask": lambda x: jnp.sin(_masked(x)),
    "an index that depends on the region": lambda x: jnp.take(jnp.arange(3.0), (x > 0).astype(jnp.int32)),
    "sorted by taking": lambda x: jnp.take_along_axis(x[None], jnp.argsort(x[None], 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name):
    with pytest.raises(jb.UnsupportedError):
        _bounds(REFUSED[name])


HALF = jnp.array([True, True, False, False])
OF_MASKS = {
    "0 * log(0)": lambda z: 0 * jnp.log(jnp.exp(z)),
    "inf - inf of quotients": lambda z: 1 / jnp.exp(z) - 1 / jnp.exp(2 * z),
    "0 / 0": lambda z: jnp.exp(z) / jnp.exp(2 * z),
    "inf * 0": lambda z: jnp.exp(z) ** -1 * jnp.exp(2 * z),
    "0 * a quotient of rsqrt": lambda z: 0.0 * (1 / jax.lax.rsqrt(-z)),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_MASKS)
def test_a_limit_at_infinity_is_no_real_number(name):
    """`exp(-inf)` is 0, though exp is positive for all real numbers."""

    def fn(x):
        return jnp.tanh(OF_MASKS[name](jnp.where(HALF, -1 - x * x, -jnp.inf)))

    assert np.isnan(fn(jnp.ones(4)))[2:].all()
    try:
        found = _bounds(fn)
    except jb.UnsupportedError:
        return
    assert not np.isfinite(found.lower[2:]).any() and not np.isfinite(found.upper[2:]).any()


BEYOND = {
    "1 / rsqrt": lambda z: 1 / jax.lax.rsqrt(z),
    "1 / exp of a log": lambda z: 1 / jnp.exp(-jnp.log(z) / 4),
    "log of exp": lambda z: -jnp.log(2 * jnp.exp(z - z * z * z)),
}


@pytest.mark.parametrize("name", BEYOND)
def test_values_beyond_what_is_proved_to_be_defined_count(name):
    """A function's proof ends where its parts overflow or underflow in float64; its values do not."""
    large = jnp.full((1, 1), 1e30)
    for method in (jb.IBP(), jb.Crown()):
        found = jb.bound(lambda x: BEYOND[name](jnp.maximum((x @ large) @ large, 1.0)), method)(
            jb.Box(np.ones(1, np.float32), np.full(1, 2, np.float32))
        )
        assert found.upper == np.inf


DEFINED = {
    "a softmax with some masked": lambda x: jax.nn.softmax(jnp.where(jnp.arange(4) < 3, x, -jnp.inf)),
    "a running maximum": lambda x: jax.lax.scan(lambda m, a: (jnp.maximum(m, a), m), jnp.array(-jnp.inf), x)[0],
    "exp of a mask": lambda x: jnp.exp(_masked(x)),
    "no domain left": lambda x: jax.nn.softmax(jnp.log(x + 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINED)
def test_masks_that_harm_nothing_stay_bounded(name):
    found = _bounds(DEFINED[name])
    assert np.isfinite(found.lower).all() and np.isfinite(found.upper).all()


def test_regions_without_real_numbers_are_empty():
    for end in (jnp.inf, -jnp.inf):
        ends = jnp.full(4, end)
        assert bool(jax.jit(regions.is_empty)(jb.Box(ends, ends)))
        with pytest.raises(jb.ArgumentError, match="no real number"):
            _bounds(jnp.tanh, box=jb.Box(ends, ends))


# --- promises, numbers and windows ------------------------------------------------------------------------------------


def test_promised_indices_are_cut_as_they_run():
    """`x[index]` promises; XLA cuts indices of gathers and drops those of scatters, and JAX's transposes do neither."""
    index = jnp.array([5, -7])

    def function(x):
        spread = jnp.zeros(4).at[jnp.array([1, 7])].add(x[:2], mode="promise_in_bounds")
        return jnp.concatenate([x[index], spread])

    found = _bounds(function, jb.Crown(intersect=False))
    for x in (LOW, HIGH, (LOW + HIGH) / 2):
        assert np.all(found.lower <= function(jnp.asarray(x))) and np.all(function(jnp.asarray(x)) <= found.upper)


def test_a_rounded_mean_is_no_mean():
    """With f = fl(1/3) on 1e4 and its neighbours, f E[x^2] - (f E[x])^2 is -2.3, and the variance 0.67."""
    third, x = np.float32(1 / 3), np.array([9999.0, 10000, 10001], np.float32)
    found = _bounds(lambda x: jnp.sum(x * x) * third - (jnp.sum(x) * third) ** 2, box=jb.Box(x, x))
    exact = np.sum(x.astype(float) ** 2) * float(third) - (np.sum(x.astype(float)) * float(third)) ** 2
    assert found.lower <= exact <= found.upper


def test_folded_numbers_carry_their_rounding():
    """(1e8 + 1) - 1e8 is 1, and 0 in single precision; exp(100) overflows; a root within GELU still fuses."""
    found = _bounds(lambda x: x + ((jnp.float32(1e8) + 1) - jnp.float32(1e8)))
    assert np.all(found.lower <= LOW + 1) and np.all(found.upper >= HIGH + 1)
    found = _bounds(lambda x: x / jnp.exp(jnp.float32(100)))
    assert np.all(found.lower < 0) and np.all(found.upper > 0)
    gelu = lambda x: 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    assert len(jb.explain(gelu, jb.IBP())(BOX).rows) == 2
    exact = _bounds(lambda x: x * (jnp.float32(3) * 2))  # no rounding, so no constant
    assert np.allclose(exact.lower, 6 * LOW, rtol=1e-6)


def test_comparisons_of_subnormal_parameters_are_in_doubt():
    function = lambda p, x: jnp.where(p > 1e-39, x, -x)  # noqa: E731
    found = jb.bound(function, jb.IBP(), rounding=True)(jnp.full(4, 2e-39, jnp.float32), POSITIVE)
    assert np.all(found.upper >= 2)


def test_windows_with_negative_padding():
    pads = ((-1, 1), (0, -1))
    function = lambda x: jax.lax.reduce_window(x.reshape(2, 2), -jnp.inf, jax.lax.max, (1, 1), (1, 1), pads)  # noqa: E731
    found = _bounds(function)
    assert np.allclose(found.upper[0], HIGH[2]) and np.all(found.lower[1] == -np.inf)  # a window of padding alone
    cut = lambda x: jax.lax.reduce_window(x.reshape(2, 2), -jnp.inf, jax.lax.max, (1, 1), (1, 1), ((-1, 0), (0, 0)))  # noqa: E731
    assert np.array_equal(_bounds(cut).upper, HIGH[None, 2:])


def test_curved_functions_in_half_precision():
    found = _bounds(jnp.tanh, jb.Crown(), jb.Box(*(jnp.asarray(end, jnp.bfloat16) for end in (LOW, HIGH))))
    low, high = np.asarray(found.lower, np.float64), np.asarray(found.upper, np.float64)
    assert np.all(low <= np.tanh(LOW.astype(float))) and np.all(np.tanh(HIGH.astype(float)) <= high)


def test_a_number_beside_an_unproved_function_has_its_shape():
    assert np.all(np.isinf(_bounds(lambda x: jnp.maximum(x, jnp.inf), rounding=False).upper))


# --- derivatives ------------------------------------------------------------------------------------------------------

PARAMS, POINT = {"a": jnp.ones(1)}, jnp.full((1, 1), 0.5)


def test_rules_put_on_functions_of_jax_are_not_trusted():
    fake = jax.custom_jvp(jax.nn.relu)
    fake.defjvps(lambda tangent, result, x: 0 * tangent)
    found = jb.lipschitz(PARAMS, POINT, 0.1, apply_fn=lambda p, x: fake(3 * x) * p["a"], method=jb.Crown())
    assert 3 <= found[0, 0] <= 3.001


CHAINS = {
    "weights": ([1e-20], [1e-20], [1e38]),
    "the other way": ([1e38], [1e-20], [1e-20]),
    "stored": ([3e-39], [3e38]),
    "all": ([1e-23], [1e-22]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_underflow_in_products_of_jacobians(name):
    weights = [np.float32(w[0]) for w in CHAINS[name]]
    layers = [(jnp.full((1, 1), w), jnp.zeros(1)) for w in weights]
    exact = np.prod([float(w) for w in weights])
    found = [
        jb.lipschitz(layers, POINT, 0.25, activation="relu", method=jb.RecurJac()),
        jb.lipschitz(layers, POINT, 0.25, activation="relu", method=jb.FastLip(), norm=2),
        *(jb.spectral_lipschitz(layers, POINT, activation="relu", norm=p) for p in (1, 2)),
    ]
    assert all(float(constant.max()) >= exact for constant in found)


def test_constants_that_a_chain_computes_are_charged():
    """a b is 1e4 * 1 - 1e4 * (1 - 2^-24), which cancels to 0 where it is summed in single precision."""
    params = {"c": jnp.full((1, 1), 1e8), "d": jnp.ones((1, 1))}
    apply = lambda p, x: jax.nn.relu(x) @ ((p["c"] + p["d"]) - p["c"])  # noqa: E731
    for method in (jb.RecurJac(), jb.FastLip()):
        assert float(jb.lipschitz(params, POINT, 0.1, apply_fn=apply, method=method).max()) >= 1
    assert float(jb.spectral_lipschitz(params, POINT, apply_fn=apply).max()) >= 1


def test_norms_of_what_counts_as_zero():
    values = jnp.full(4, 1e-40, jnp.float32)
    for p in (1, 2, 3, np.inf):
        assert float(norms.vector_norm(values, p)) >= 4e-40
    assert float(norms.spectral_norm(jnp.full((2, 2), 1e-40, jnp.float32))) >= 2e-40
    assert float(norms.product([jnp.float32(1e-30), jnp.float32(1e-30)], jnp.float32)) >= 1e-60


# --- what a function is now -------------------------------------------------------------------------------------------


def test_what_was_trained_since_is_seen_by_verify_and_lipschitz():
    held = [jnp.eye(2)]
    region, prop = jb.Box(jnp.ones(2), jnp.ones(2)), jb.Property.of([([1.0, 0.0], 0.0)])
    fn, apply = (lambda x: x @ held[0]), (lambda p, x: x @ held[0] * p["a"])
    constants = [jb.lipschitz(PARAMS, jnp.ones((1, 2)), 0.1, apply_fn=apply)]
    verdicts = [jb.verify(fn, region, prop, progress=False).status]
    held[0] = -2 * jnp.eye(2)
    constants.append(jb.lipschitz(PARAMS, jnp.ones((1, 2)), 0.1, apply_fn=apply))
    verdicts.append(jb.verify(fn, region, prop, progress=False).status)
    assert verdicts == ["verified", "falsified"] and float(constants[1].max()) >= 2


def test_a_radius_is_held_against_the_values_of_a_batch():
    apply = lambda p, x: x * (1.0 if x.shape[0] == 1 else -1.0) * p["a"]  # noqa: E731
    with pytest.raises(jb.SoundnessError):
        jb.certified_radius(PARAMS, np.array([[1.0, 0.0], [2.0, 0.0]], np.float32), np.zeros(2, int), apply_fn=apply)


def test_a_constant_that_xla_moves_out_of_a_sum():
    """x / 4 + y / 4 runs as (x + y) / 4 and overflows: compiled, it is infinite."""
    box = jb.Box(jnp.full(2, 3e38, jnp.float32), jnp.full(2, 3e38, jnp.float32))
    found = _bounds(lambda x: x * 0.25 + x[::-1] * 0.25, box=box, rounding="execution")
    assert not np.isfinite(found.upper).any()


# --- two precisions ---------------------------------------------------------------------------------------------------


TWO_PRECISIONS = {
    "a step": lambda x, wide: (x > 0).astype(wide) * wide(0.1) * wide(0.3),
    "a choice": lambda x, wide: jnp.where(x > 0, wide(0.1), wide(0.2)) * wide(0.3),
    "curved before": lambda x, wide: jnp.tanh(x).astype(wide) * wide(0.3),
    "curved after": lambda x, wide: jnp.tanh(x.astype(wide) * wide(0.3)),
    "a choice of values": lambda x, wide: jnp.where(x > 0, x.astype(wide), wide(0.1)) * wide(0.3),
}


@pytest.mark.parametrize("name", TWO_PRECISIONS)
def test_a_function_of_two_precisions_is_taken_apart(name):
    """A step of float32 numbers is a number of float64; as one function its rounding was that of neither."""
    fn = TWO_PRECISIONS[name]
    for method in (jb.IBP(), jb.Crown(), jb.Frown(steps=2)):
        with jax.enable_x64(True):
            found = _bounds(lambda x: fn(x, jnp.float64), method)
            for x in np.stack([LOW, HIGH, LOW / 3, np.zeros(4, np.float32)]):
                value = np.asarray(fn(jnp.asarray(x, jnp.float64), jnp.float64))
                assert np.all((found.lower <= value + 1e-15) & (value - 1e-15 <= found.upper))
    with pytest.raises(jb.UnsupportedError, match="use one precision throughout"):
        _bounds(lambda x: fn(x, jnp.float16))


def test_subnormal_parameters_that_are_only_moved_or_chosen_may_come_out_as_zero():
    """Nothing is computed of them, so nothing was charged."""
    number, x = np.array([-1.3e-39], np.float32), np.array([1.6], np.float32)
    for fn in (lambda p, x: jnp.concatenate([x, p])[1:], lambda p, x: jnp.where(x < -0.5, x, p)):
        found = jb.bound(fn, jb.IBP(), rounding=True)(number, jb.Box(x, x))
        assert float(found.lower[0]) <= -1.3e-39 <= float(found.upper[0])
        same = jb.bound(fn, jb.IBP(), rounding=True)(0 * number + 1, jb.Box(x, x))
        assert same.lower == same.upper == 1
