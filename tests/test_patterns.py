"""The rewrites: each equals what it replaces, is found where libraries write it, and not in what only looks like it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax import lax

import jaxbound as jb
from jaxbound.graph import tracing

METHOD = jb.IBP()


def _kinds(function, *shapes, dtype=jnp.float32) -> list[str]:
    """The operations of the nodes, inputs left out."""
    structure = tracing.build(function, [jax.ShapeDtypeStruct(s, dtype) for s in shapes], [True] * len(shapes))
    return [node.op.name for node in structure.nodes if node.op.kind != "input"]


def _nonlinear(function, *shapes) -> list[tuple[str, str]]:
    structure = tracing.build(function, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], [True] * len(shapes))
    return [(node.op.kind, node.op.name) for node in structure.nodes if node.op.kind not in ("input", "affine")]


def _check_values(function, *shapes, seed=0, scale=1.0) -> None:
    """Bounds over points are the values: the graph computes the function."""
    rng = np.random.default_rng(seed)
    for _ in range(3):
        x = [jnp.asarray(rng.normal(size=shape) * scale) for shape in shapes]
        intervals = jax.tree.leaves(
            jb.bound(function, METHOD)(*(jb.Box(v, v) for v in x)), is_leaf=lambda leaf: isinstance(leaf, jb.Interval)
        )
        for interval, value in zip(intervals, jax.tree.leaves(function(*x)), strict=True):
            assert np.allclose(interval.lower, value, rtol=1e-9, atol=1e-9)
            assert np.allclose(interval.upper, value, rtol=1e-9, atol=1e-9)


# --- softmax and its kin ----------------------------------------------------------------------------------------------

_SOFTMAX = {
    "jax.nn": lambda x: jax.nn.softmax(x),
    "axis 0": lambda x: jax.nn.softmax(x, axis=0),
    "two axes": lambda x: jax.nn.softmax(x, axis=(0, 1)),
    "flax": lambda x: nn.softmax(x),
    "by hand": lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
    "shifted by hand": lambda x: (lambda e: e / jnp.sum(e, axis=1)[:, None])(jnp.exp(x - x.max(1, keepdims=True))),
    "shifted by another": lambda x: (lambda e: e / e.sum(1, keepdims=True))(jnp.exp(x - x[:, :1])),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", [name for name in _SOFTMAX if name != "by hand"])
def test_softmax_is_found(name):
    ratios, exponential = (
        [("scalar", "exp"), ("scalar", "integer_pow")],
        [("logsumexp", "logsumexp"), ("scalar", "exp")],
    )
    assert _nonlinear(_SOFTMAX[name], (3, 4)) == [*ratios, *exponential, ("meet", "meet")]
    _check_values(_SOFTMAX[name], (3, 4), scale=3)


@pytest.mark.x64
@pytest.mark.parametrize("name", _SOFTMAX)
def test_softmax_is_bounded_soundly_and_within_the_simplex(name):
    rng = np.random.default_rng(1)
    center, radius = rng.normal(size=(3, 4)), 0.3
    found = jb.bound(_SOFTMAX[name], METHOD)(jb.Box(jnp.asarray(center - radius), jnp.asarray(center + radius)))
    points = center + rng.choice([-1, 1, 0.5], (3000, 3, 4)) * radius
    values = jax.vmap(_SOFTMAX[name])(points)
    assert np.all(found.lower <= values.min(axis=0) + 1e-12)
    assert np.all(found.upper >= values.max(axis=0) - 1e-12)
    if name != "by hand":
        assert np.all(found.lower > 0)
        assert np.all(found.upper < 1)


@pytest.mark.x64
def test_interval_softmax_is_exact():
    """softmax_i increases in x_i and decreases in every other: its extremes are at corners."""
    low, high = np.array([-1.0, 0.2, 0.0]), np.array([0.5, 0.4, 2.0])
    found = jb.bound(jax.nn.softmax, METHOD)(jb.Box(jnp.asarray(low), jnp.asarray(high)))
    for i in range(3):
        own = np.arange(3) == i
        assert np.isclose(found.lower[i], jax.nn.softmax(jnp.where(own, low, high))[i], rtol=1e-12)
        assert np.isclose(found.upper[i], jax.nn.softmax(jnp.where(own, high, low))[i], rtol=1e-12)


@pytest.mark.quick(2)
@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0, 0.0], [0.0, 90.0, 0.0, 0.0]])
@pytest.mark.parametrize("radius", [1.0, 8.0, 50.0])
def test_softmax_of_wide_scores_keeps_its_range_and_a_gradient(scores, radius):
    """In float32 exponentials overflow, and the rounding of their sum may exceed its smallest term."""

    def bounds(radius):
        z = jnp.array(scores)
        return jb.bound(jax.nn.softmax, METHOD)(jb.Box(z - radius, z + radius))

    found = bounds(radius)
    assert np.all(found.lower >= -1e-6)
    assert np.all(found.upper <= 1 + 1e-6)
    assert np.isfinite(jax.grad(lambda r: bounds(r).upper.sum())(radius))


@pytest.mark.quick(2)
@pytest.mark.parametrize("least", [-1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("method", [METHOD, jb.Forward(), jb.Crown()])
def test_scores_that_mask_count_for_nothing(least, method):
    """In float32, where `exp` of the difference overflows, and where an error in units of the score would drown all."""
    mask, values = np.array([True, True, False, True]), jnp.arange(4.0)

    def mixed(z):
        return jnp.where(mask, z, least)

    z = jnp.array([0.1, 0.2, -0.3, 0.5])
    box, own = jb.Box(z - 0.1, z + 0.1), jb.Box(z[mask] - 0.1, z[mask] + 0.1)
    for function in (lambda z, v: jax.nn.softmax(z) @ v, lambda z, v: jax.nn.logsumexp(z) + v[0]):
        found = jb.bound(lambda z, f=function: f(mixed(z), values), method)(box)
        expected = jb.bound(lambda z, f=function: f(z, values[mask]), method)(own)
        assert np.allclose([found.lower, found.upper], [expected.lower, expected.upper], rtol=1e-4)
    weights = jb.bound(lambda z: jax.nn.softmax(mixed(z)), method)(box)
    assert -1e-30 <= weights.lower[2] <= weights.upper[2] <= 1e-30


@pytest.mark.x64
@pytest.mark.parametrize("function", [jax.nn.log_softmax, nn.log_softmax, lambda x: jax.nn.log_softmax(x, axis=0)])
def test_log_softmax_is_found_and_exact_on_intervals(function):
    ratios = [("scalar", "exp"), ("scalar", "neg")]
    assert _nonlinear(function, (3, 3)) == [*ratios, ("logsumexp", "logsumexp"), ("meet", "meet")]
    _check_values(function, (3, 3), scale=3)
    low = np.array([[-1.0, 0.2, 0.0]] * 3)
    high = low + np.array([1.5, 0.2, 2.0])
    found = jb.bound(jax.nn.log_softmax, METHOD)(jb.Box(jnp.asarray(low), jnp.asarray(high)))
    own = np.arange(3) == 1
    assert np.allclose(found.lower[:, 1], jax.nn.log_softmax(jnp.where(own, low, high))[:, 1], rtol=1e-12)
    assert np.allclose(found.upper[:, 1], jax.nn.log_softmax(jnp.where(own, high, low))[:, 1], rtol=1e-12)


_LOGSUMEXP = {
    "jax.nn": lambda x: jax.nn.logsumexp(x, axis=-1),
    "scipy": lambda x: jax.scipy.special.logsumexp(x, axis=-1),
    "keepdims": lambda x: jax.nn.logsumexp(x, axis=0, keepdims=True),
    "unshifted": lambda x: jnp.log(jnp.sum(jnp.exp(x), axis=-1)),
    "shifted by hand": lambda x: jnp.log(jnp.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", _LOGSUMEXP)
def test_logsumexp_is_monotone_so_its_interval_is_exact(name):
    composed = [("scalar", "log"), ("scalar", "mul")]
    assert sorted(_nonlinear(_LOGSUMEXP[name], (2, 3))) == [("logsumexp", "logsumexp"), ("meet", "meet"), *composed]
    low, high = jnp.array([[-1.0, 0.2, 0.0], [3.0, 1.0, -2.0]]), jnp.array([[0.5, 0.4, 2.0], [3.5, 4.0, 2.0]])
    found = jb.bound(_LOGSUMEXP[name], METHOD)(jb.Box(low, high))
    assert np.allclose(found.lower, _LOGSUMEXP[name](low), rtol=1e-9)
    assert np.allclose(found.upper, _LOGSUMEXP[name](high), rtol=1e-9)


_NOT_SOFTMAX = {
    "sum over another axis": lambda x: (lambda e: e / e.sum(0))(jnp.exp(x)),
    "sum over another axis, square": lambda x: (lambda e: e / e.sum(0)[:, None])(jnp.exp(x)),
    "transposed sum": lambda x: (lambda e: e / e.sum(1)[None, :])(jnp.exp(x)),
    "sum over all, of one axis's": lambda x: (lambda e: e / e.sum())(jnp.exp(x)),
    "denominator of another": lambda x: jnp.exp(x) / jnp.exp(2 * x).sum(1, keepdims=True),
    "denominator plus one": lambda x: (lambda e: e / (1 + e.sum(1, keepdims=True)))(jnp.exp(x)),
    "denominator of a part": lambda x: (lambda e: e / e[:, :2].sum(1, keepdims=True))(jnp.exp(x)),
    "a shift that varies along the axis": lambda x: (lambda e: e / e.sum(1, keepdims=True))(jnp.exp(x - x.max(0, keepdims=True))),
    "a shift of its own": lambda x: (lambda e: e / e.sum(1, keepdims=True))(jnp.exp(x - 0.5 * x)),
    "unequal shifts": lambda x: jnp.exp(x - x.max(1, keepdims=True)) / jnp.exp(x - x[:, :1]).sum(1, keepdims=True),
    "masked": lambda x: jax.nn.softmax(x, where=jnp.arange(3) < 2, axis=1),
    "reversed": lambda x: (lambda e: e / e.sum(1)[::-1, None])(jnp.exp(x)),
    "reshaped sum": lambda x: (lambda e: e / e.sum(1).reshape(1, 3))(jnp.exp(x)),
    "not quite log-softmax": lambda x: x - jnp.log(jnp.exp(2 * x).sum(1, keepdims=True)),
    "log-softmax over another axis": lambda x: x - jnp.log(jnp.exp(x).sum(0)),
    "log-softmax put back elsewhere": lambda x: x - jnp.log(jnp.exp(x).sum(1))[None, :],
    "log-softmax, one more": lambda x: x - jnp.log1p(jnp.exp(x).sum(1, keepdims=True)),
    "twice the logarithm": lambda x: 2 * x - jnp.log(jnp.exp(x).sum(1, keepdims=True)),
}  # fmt: skip


@pytest.mark.quick(6)
@pytest.mark.x64
@pytest.mark.parametrize("name", _NOT_SOFTMAX)
def test_near_misses_of_softmax_keep_their_values(name):
    """Over points, bounds are the values; a rewrite that is not valid would give others."""
    function = _NOT_SOFTMAX[name]
    _check_values(function, (3, 3))
    rng = np.random.default_rng(2)
    center = rng.normal(size=(3, 3))
    found = jb.bound(function, METHOD)(jb.Box(jnp.asarray(center - 0.1), jnp.asarray(center + 0.1)))
    values = jax.vmap(function)(center + rng.choice([-0.1, 0.1, 0.03], (2000, 3, 3)))
    assert np.all(found.lower <= values.min(axis=0) + 1e-12)
    assert np.all(found.upper >= values.max(axis=0) - 1e-12)


def test_a_rounded_denominator_is_not_a_softmax():
    """Through bfloat16 the sum is another number; a rewrite would hide that."""

    def function(x):
        e = jnp.exp(x)
        return e / jnp.sum(e, axis=-1, keepdims=True).astype(jnp.bfloat16).astype(jnp.float32)

    with pytest.raises(jb.errors.UnsupportedError, match="convert_element_type"):
        jb.bound(function, METHOD)(jb.Box(jnp.zeros(3), jnp.ones(3)))


# --- variance -------------------------------------------------------------------------------------------------------------


def _layer_norm(x):
    return nn.LayerNorm(epsilon=1e-3, use_bias=False, use_scale=False).apply({}, x)


_NNX = nnx.LayerNorm(4, epsilon=1e-3, rngs=nnx.Rngs(0))

_VARIANCE = {
    "by hand": lambda x: jnp.mean(x * x, 1) - jnp.mean(x, 1) ** 2,
    "squares": lambda x: jnp.mean(jnp.square(x), 0) - jnp.square(jnp.mean(x, 0)),
    "products": lambda x: jnp.mean(x * x, 1) - jnp.mean(x, 1) * jnp.mean(x, 1),
    "all axes": lambda x: jnp.mean(x**2) - jnp.mean(x) ** 2,
    "scaled sums": lambda x: jnp.sum(x * x, 1) * 0.25 - jnp.square(jnp.sum(x, 1) * 0.25),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", [name for name in _VARIANCE if name != "products"])
def test_the_fast_variance_is_found_and_not_negative(name):
    low = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)))
    found = jb.bound(_VARIANCE[name], METHOD)(jb.Box(low, low + 1.0))
    assert np.all(found.lower >= -1e-12)
    _check_values(_VARIANCE[name], (3, 4))


@pytest.mark.x64
@pytest.mark.parametrize("function", [_layer_norm, lambda x: _NNX(x)], ids=["linen", "nnx"])
def test_layer_norm_is_found(function):
    ops = _kinds(function, (2, 4), dtype=jnp.float64 if function is _layer_norm else jnp.float32)
    assert ops.count("mul") >= 1
    rng = np.random.default_rng(4)
    center = rng.normal(size=(2, 4)).astype(np.float32)
    found = jb.bound(function, METHOD)(jb.Box(jnp.asarray(center - 0.25), jnp.asarray(center + 0.25)))
    assert np.isfinite(found.upper).all()
    assert np.all(np.asarray(found.width) < 30)  # with a negative variance it would be of the size of epsilon ** -0.5
    values = jax.vmap(function)(center + rng.choice([-0.25, 0.25, 0.1], (2000, 2, 4)).astype(np.float32))
    assert np.all(found.lower <= values.min(axis=0) + 1e-5)
    assert np.all(found.upper >= values.max(axis=0) - 1e-5)


_NOT_VARIANCE = {
    "other axes": lambda x: jnp.mean(x * x, 0) - jnp.mean(x, 1) ** 2,
    "another count": lambda x: jnp.sum(x * x, 1) / 3 - jnp.mean(x, 1) ** 2,
    "both by another count": lambda x: jnp.sum(x * x, 1) / 3 - (jnp.sum(x, 1) / 3) ** 2,
    "a count that is nearly right": lambda x: jnp.sum(x * x, 1) * 0.24999999 - (jnp.sum(x, 1) * 0.25) ** 2,
    "another mean": lambda x: jnp.mean(x * x, 1) - jnp.mean(x[::-1], 1) ** 2,
    "another square": lambda x: jnp.mean(x * x[::-1], 1) - jnp.mean(x, 1) ** 2,
    "a cube": lambda x: jnp.mean(x**3, 1) - jnp.mean(x, 1) ** 2,
    "the other way round": lambda x: jnp.mean(x, 1) ** 2 - jnp.mean(x * x, 1),
    "reduced twice": lambda x: jnp.mean(x * x, (0, 1)) - jnp.mean(jnp.mean(x, 1)) ** 2 * 0.5,
}  # fmt: skip


@pytest.mark.x64
@pytest.mark.parametrize("name", _NOT_VARIANCE)
def test_near_misses_of_the_variance_keep_their_values(name):
    function = _NOT_VARIANCE[name]
    shape = (4, 4)
    x = jnp.asarray(np.random.default_rng(5).normal(size=shape) + 30)
    found, value = jb.bound(function, METHOD)(jb.Box(x, x)), function(x)
    assert np.allclose(found.lower, value, rtol=1e-12)
    assert np.allclose(found.upper, value, rtol=1e-12)


# --- primitives with odd parameters ---------------------------------------------------------------------------------------

_REWRITTEN = {
    "split": lambda x: jnp.split(x, [1, 3], axis=1),
    "reduce_min": lambda x: x.min(axis=1),
    "integer_pow": lambda x: x**2,
    "max of two": lambda x: jnp.maximum(x[:2], x[1:]),
    "min of two": lambda x: jnp.minimum(x[:2], x[1:]),
    "quotient": lambda x: x[:2] / (3 + jnp.tanh(x[1:])),
    "clamp": lambda x: lax.clamp(x[0] - 1, x[1], x[0] + 1),
    "product": lambda x: x @ x.T,
    "batched product": lambda x: jnp.einsum("bij,bkj->bik", x.reshape(2, 3, 2), x.reshape(2, 3, 2)[::-1]),
    "dilated window": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "VALID", window_dilation=(2, 1)),
}


@pytest.mark.quick(5)
@pytest.mark.x64
@pytest.mark.parametrize("name", _REWRITTEN)
def test_rewrites_equal_what_they_replace(name):
    _check_values(_REWRITTEN[name], (3, 4))


_POOLS = {
    "valid": ((2, 2), (2, 2), "VALID"),
    "overlapping": ((3, 2), (1, 1), "VALID"),
    "same": ((3, 3), (2, 2), "SAME"),
    "explicit": ((2, 3), (2, 1), ((1, 0), (1, 1))),
    "gaps": ((1, 2), (2, 3), "VALID"),
    "wide": ((4, 5), (1, 2), "SAME"),
    "padding alone": ((2, 2), (1, 2), ((2, 0), (0, 3))),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", _POOLS)
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pools_equal_what_they_replace(kind, name):
    pool = {"max": nn.max_pool, "avg": nn.avg_pool}[kind]
    function = lambda x: jnp.maximum(pool(x[None, :, :, None], *_POOLS[name])[0, :, :, 0], -9)  # noqa: E731
    _check_values(function, (4, 5))
    low = np.random.default_rng(6).normal(size=(4, 5))
    high = low + np.random.default_rng(7).uniform(0, 1, (4, 5))
    found = jb.bound(function, METHOD)(jb.Box(jnp.asarray(low), jnp.asarray(high)))
    (exact_low,), (exact_high,) = oracles.exactly(function, low), oracles.exactly(function, high)
    assert np.allclose(found.lower, exact_low, atol=1e-12)
    assert np.allclose(found.upper, exact_high, atol=1e-12)


def test_pools_that_are_not_known_are_refused():
    """Dilated windows; windows that see padding alone are minus infinity."""
    for window, strides, padding, more in (
        ((2, 2), (1, 1), ((0, 0), (0, 0)), {"window_dilation": (2, 1)}),
        ((2, 2), (1, 1), ((2, 0), (0, 0)), {}),
    ):
        function = lambda x, a=(window, strides, padding), m=more: lax.reduce_window(x, -jnp.inf, lax.max, *a, **m)  # noqa: E731
        try:
            found = jb.bound(function, METHOD)(jb.Box(jnp.zeros((4, 4)), jnp.ones((4, 4))))
        except jb.errors.UnsupportedError:
            continue
        value = function(jnp.full((4, 4), 0.5))
        assert np.all((found.lower <= value) & (value <= found.upper))


# --- names and order --------------------------------------------------------------------------------------------------------


class _Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(3, name="first")(x))
        x = nn.silu(nn.Dense(3, name="second")(x))
        return nn.softmax(nn.Dense(2, name="third")(x))


def test_names_say_order_module_and_function():
    module = _Named()
    params = module.init(jax.random.key(0), jnp.zeros((1, 4)))
    structure = tracing.build(
        lambda x: module.apply(params, x[None])[0], [jax.ShapeDtypeStruct((4,), jnp.float32)], [True]
    )
    names = [node.name for node in structure.nodes]
    assert names == sorted(names)
    assert [int(name.split("/")[0]) for name in names] == list(range(len(names)))
    assert len({len(name.split("/")[0]) for name in names}) == 1
    nonlinear = [structure.nodes[k].name.split("/", 1)[1] for k in structure.nonlinear]
    assert nonlinear[:2] == ["_Named/relu", "_Named/silu"]
    assert any("second" in name for name in names)
    assert all("test_patterns.py" in node.source for node in structure.nodes[1:] if node.op.name == "dot_general")


def test_nodes_stand_in_the_order_of_evaluation():
    def function(x):
        a, b = jnp.tanh(x @ jnp.eye(3)), jax.nn.relu(x - jnp.arange(3.0))
        return jax.nn.softmax(a * b), jnp.abs(b)

    structure = tracing.build(function, [jax.ShapeDtypeStruct((3,), jnp.float32)], [True])
    for number, node in enumerate(structure.nodes):
        assert all(source < number for source in node.inputs)
    labels = [structure.nodes[k].op.name for k in structure.nonlinear]
    assert labels.index("tanh") < labels.index("mul") < labels.index("exp")
    assert list(jb.pre_activation_bounds(function, METHOD)(jb.Box(jnp.zeros(3), jnp.ones(3)))) == sorted(
        jb.pre_activation_bounds(function, METHOD)(jb.Box(jnp.zeros(3), jnp.ones(3)))
    )


@pytest.mark.x64
def test_a_shift_put_back_along_another_axis_does_not_cancel():
    def function(x):
        shift = jnp.tanh(x[:, 0, 0])
        return jnp.log(jnp.sum(jnp.exp(x - shift[:, None, None]), -1)) + shift[None, :]

    _check_values(function, (2, 2, 2))


MASK, OTHER = np.array([True, False, True, True]), np.array([True, True, False, True])
MASKED = {
    "softmax": lambda x: jax.nn.softmax(x, where=MASK),
    "of tokens": lambda x: jax.nn.softmax(jnp.stack([x, 2 * x]), axis=0, where=np.array([MASK, OTHER])),
    "log-softmax": lambda x: jax.nn.log_softmax(x, where=MASK)[np.flatnonzero(MASK)],
    "logsumexp": lambda x: jax.nn.logsumexp(x, where=MASK),
    "logsumexp of all axes": lambda x: jax.nn.logsumexp(jnp.stack([x, 2 * x]), where=np.array([MASK, OTHER])),
    "two masks": lambda x: jnp.sum(jnp.where(MASK, jnp.exp(x - jnp.max(jnp.where(OTHER, x, -jnp.inf))), 0)),
    "another operand": lambda x: jnp.sum(jnp.where(MASK, jnp.exp(2 * x - jnp.max(jnp.where(MASK, x, -jnp.inf))), 0)),
    "another number": lambda x: jnp.sum(jnp.where(MASK, jnp.exp(x - jnp.max(jnp.where(MASK, x, 0.0))), 0)),
    "kept elsewhere": lambda x: jnp.sum(jnp.where(MASK, jnp.exp(x - jnp.max(jnp.where(MASK, x, -jnp.inf))), 1)),
    "the mask turned": lambda x: jnp.sum(jnp.where(MASK, 0, jnp.exp(x - jnp.max(jnp.where(MASK, x, -jnp.inf))))),
    "of scores that were put together": lambda x: jax.nn.softmax(jnp.where(MASK, jnp.stack([x, x * x]), -jnp.inf)),
    "of a sum": lambda x: jax.nn.softmax(jnp.where(OTHER, -jnp.inf, x + x[::-1])),
    "of all axes": lambda x: jax.nn.softmax(jnp.where(MASK, jnp.stack([x, x * x]), -jnp.inf), axis=(0, 1)),
    "log-softmax by infinity": lambda x: jax.nn.log_softmax(jnp.where(MASK, x, -jnp.inf))[np.flatnonzero(MASK)],
    "one of three": lambda x: jax.lax.select_n(np.array([0, 1, 2, 1], np.int32), 0 * x, x, jnp.exp(x - jnp.max(x))),
    "a mask made on the way": lambda x: jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((4, 4))) > 0, x, -jnp.inf)),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", MASKED)
def test_masks_of_sums_and_scores(name):
    """`where=` masks both; what only looks like it stays another function."""
    _check_values(MASKED[name], (4,))


@pytest.mark.parametrize(
    ("method", "use"),
    [
        (jb.IBP(), "closed over"), (jb.IBP(), "an argument"), (jb.IBP(), "mapped"),
        (jb.Crown(), "an argument"), (jb.Forward(), "closed over"),
    ],
)  # fmt: skip
def test_a_mask_is_as_good_as_a_score_far_below(method, use):
    """Minus infinity is no number for a linear function to meet."""
    rng = np.random.default_rng(0)
    keys, causal = rng.normal(size=(3, 3)), np.tril(np.ones((4, 4), bool))

    def attention(mask, x, masked=-jnp.inf):
        return jax.nn.softmax(jnp.where(mask, x @ keys @ x.T, masked)) @ x

    box = jb.Box.around(rng.normal(size=(4, 3)), 0.05)
    if use == "mapped":
        found = jax.vmap(jb.bound(attention, method), in_axes=(0, None))(causal[None], box)
    elif use == "an argument":
        found = jb.bound(attention, method)(causal, box)
    else:
        found = jb.bound(lambda x: attention(causal, x), method)(box)
    expected = jb.bound(lambda x: attention(causal, x, -1e4), method)(box)
    assert np.allclose(found.lower, expected.lower, atol=1e-4)
    assert np.allclose(found.upper, expected.upper, atol=1e-4)


BIASES = {
    "an array": lambda x: x + np.where(CAUSAL, 0, -np.inf).astype(np.float32),
    "with distances": lambda x: np.where(CAUSAL, -abs(np.subtract.outer(range(4), range(4))), -np.inf) + x,
    "chosen on the way": lambda x: x + jnp.where(CAUSAL, 0, -jnp.inf),
    "taken away": lambda x: x - jnp.where(CAUSAL, 0, jnp.inf),
    "a triangle": lambda x: x + jnp.triu(jnp.full((4, 4), -jnp.inf), 1),
    "a logarithm": lambda x: x + jnp.log(jnp.tril(jnp.ones((4, 4)))),
    "of more axes": lambda x: (x[None] + jnp.where(CAUSAL, 0, -jnp.inf)[None])[0],
    "in another order": lambda x: (
        (x.T + jnp.where(CAUSAL.T, 0, -jnp.inf)).T.reshape(2, 8)[::-1, ::-1].reshape(4, 4)[::-1, ::-1]
    ),
    "the least number": lambda x: x + jnp.where(CAUSAL, 0, jnp.finfo(jnp.float32).min),
}
CAUSAL = np.tril(np.ones((4, 4), bool))


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, jb.IBP()) for name in BIASES), ("chosen on the way", jb.Crown()), ("the least number", jb.Crown())],
)
def test_a_mask_may_be_added(name, method):
    """As minus infinity, or as the least number of float32, past which a sum may come to lie."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(3, 3)).astype(np.float32)
    box = jb.Box.around(rng.normal(size=(4, 3)).astype(np.float32), 0.05)

    def attention(x, masked):
        return jax.nn.softmax(masked(x @ keys @ x.T)) @ x

    distances = abs(np.subtract.outer(range(4), range(4))) if name == "with distances" else 0
    found = jb.bound(lambda x: attention(x, BIASES[name]), method, rounding=True)(box)
    expected = jb.bound(lambda x: attention(x, lambda s: jnp.where(CAUSAL, s - distances, -1e4)), method)(box)
    assert np.allclose(found.lower, expected.lower, atol=1e-4)
    assert np.allclose(found.upper, expected.upper, atol=1e-4)


def test_only_minus_infinity_masks():
    """Added infinity leaves nothing, and what is not a number even less."""
    for odd in (np.inf, np.nan):
        found = jb.bound(lambda x: jax.nn.softmax(x + np.array([0, odd, -np.inf], np.float32)), jb.IBP())  # noqa: B023
        assert np.all(found(jb.Box(-np.ones(3, np.float32), np.ones(3, np.float32))).upper == np.inf)


@pytest.mark.parametrize("given", ["where", "-inf"])
@pytest.mark.parametrize("as_argument", [False, True])
def test_where_a_mask_leaves_nothing(given, as_argument):
    """A softmax of no scores is undefined, and so are entries that are masked; `where=` makes them 0."""
    mask = np.array([[True, False, True], [False, False, False]])

    def function(mask, x):
        if given == "where":
            return jax.nn.softmax(x, where=mask)
        return jax.nn.softmax(jnp.where(mask, x, -jnp.inf))

    box = jb.Box(-np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    for method in (jb.IBP(), jb.Crown(), jb.Forward()):
        if as_argument:
            found = jb.bound(function, method, rounding=True)(mask, box)
        else:
            found = jb.bound(lambda x: function(mask, x), method, rounding=True)(box)
        lower, upper = np.asarray(found.lower), np.asarray(found.upper)
        assert np.all(lower[0] >= -1e-6) and np.all(upper[0] <= 1 + 1e-6) and 0 <= upper[0, 1] <= 1e-6
        if given == "where":
            assert np.allclose(lower[1], 0, atol=1e-6) and np.allclose(upper[1], 0, atol=1e-6)
        else:
            assert np.all(lower[1] == -np.inf) and np.all(upper[1] == np.inf)


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()])
def test_masks_within_masks(method):
    """What one leaves the other may take."""
    box = jb.Box(-np.ones(3, np.float32), np.ones(3, np.float32))

    def function(first, second, x):
        return jax.nn.softmax(jnp.where(second, jnp.where(first, x, -jnp.inf), -jnp.inf))

    first, second, third = (np.array(mask) for mask in ([True, False, True], [True, True, False], [False, True, False]))
    for found in (
        jb.bound(function, method)(first, second, box), jb.bound(lambda x: function(first, second, x), method)(box)
    ):  # fmt: skip
        assert np.array_equal(found.upper[1:], [0, 0]) and 0.999 < found.lower[0] <= found.upper[0] <= 1
    for found in (
        jb.bound(function, method)(first, third, box), jb.bound(lambda x: function(first, third, x), method)(box)
    ):  # fmt: skip
        assert np.all(found.lower == -np.inf) and np.all(found.upper == np.inf)
    scaled = jb.bound(lambda x: jax.nn.softmax(jnp.where(third, 2 * jnp.where(first, x, -jnp.inf), -jnp.inf)), method)
    assert np.all(scaled(box).upper == np.inf)


def test_scores_of_any_size_beside_a_mask():
    """What stands for a masked score must be below every other one."""
    mask = np.array([True, False, True])
    for middle in (-3e38, -1e37, 1e37, 3e38):
        box = jb.Box(np.full(3, middle, np.float32), np.full(3, middle * 0.99, np.float32)[::-1])
        box = jb.Box(np.minimum(box.lower, box.upper), np.maximum(box.lower, box.upper))
        for method in (jb.IBP(), jb.Crown(), jb.Forward()):
            found = jb.bound(lambda x: jax.nn.logsumexp(x, where=mask), method, rounding=True)(box)
            values = np.array([np.float64(box.lower[0]), np.float64(box.upper[0])])
            assert np.all((found.lower <= values) & (values <= found.upper)), (method, found)
