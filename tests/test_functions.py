"""Functions that are bounded by what they equal or by what they never exceed: where that holds, and where it only seems to."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.graph import tracing

METHOD = jb.Crown()


def _reach(function, *shape) -> float:
    """The largest size that is known of a product, of those of which one is known."""
    structure = tracing.build(function, [jax.ShapeDtypeStruct(shape, jnp.float32)], [True])
    found = [node.op.reach for node in structure.nodes if node.op.kind == "product"]
    return min(found, default=np.inf)


def _root(x, axis=-1, **more):
    return jnp.sqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-6, **more)


def _norm(layer: nn.Module, shape):
    parameters = layer.init(jax.random.key(0), jnp.zeros(shape))
    return lambda x: layer.apply(parameters, x)


# --- divided by a norm ------------------------------------------------------------------------------------------------

_REACHES = {
    "norm": (lambda x: x / _root(x), 1.0),
    "numerator of numbers": (lambda x: 3 * x / _root(x), 3.0),
    "half the norm": (lambda x: x / (0.5 * _root(x)), 2.0),
    "another axis, transposed": (lambda x: (x.T / _root(x.T)).T, 1.0),
    "larger of norm and number": (lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9), 1.0),
    "reciprocal root": (lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2), 1e-12)), 1.0),
    "of a hidden value": (lambda x: (lambda h: h / _root(h))(jnp.tanh(x)), 1.0),
    "mean of squares": (lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6), 2.0),
    "RMSNorm": (_norm(nn.RMSNorm(), (3, 4)), 2.0),
    "LayerNorm": (_norm(nn.LayerNorm(), (3, 4)), np.sqrt(3)),
    "LayerNorm, slow variance": (_norm(nn.LayerNorm(use_fast_variance=False), (3, 4)), np.sqrt(3)),
    "GroupNorm": (lambda x: _norm(nn.GroupNorm(2), (1, 3, 4))(x[None]), np.sqrt(5)),
    "standardize": (jax.nn.standardize, np.sqrt(3)),
    "deviation and number": (lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-6), np.sqrt(3)),
}
_NO_REACHES = {
    "another row": lambda x: x / _root(x)[::-1],
    "another axis": lambda x: x / jnp.sqrt(jnp.sum(x**2, 0) + 1e-6)[::-1],
    "another value": lambda x: x / _root(x + 0.1),
    "a part": lambda x: x / _root(x[:, :3]),
    "no squares": lambda x: x / jnp.sqrt(jnp.sum(x * x[:, ::-1], -1, keepdims=True) + 9),
    "something subtracted": lambda x: x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) - 1e-6 * jnp.sum(x)),
    "the smaller one": lambda x: x / jnp.minimum(_root(x), 1.0),
    "the fourth power": lambda x: x / jnp.sqrt(jnp.sum(x**4, -1, keepdims=True) + 1e-6),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", _REACHES)
def test_what_is_divided_by_its_norm_has_a_reach(name):
    function, expected = _REACHES[name]
    assert expected <= _reach(function, 3, 4) <= expected * (1 + 1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("name", _NO_REACHES)
def test_what_only_looks_like_it_has_none(name):
    assert _reach(_NO_REACHES[name], 3, 4) == np.inf


@pytest.mark.fast
def test_another_mean_leaves_the_whole_root():
    def function(x):  # centered by the mean over rows, which the sum of squares has, too, but over columns
        h = x - x.mean(0, keepdims=True)
        return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)

    assert 2 <= _reach(function, 3, 4) <= 2.001


def test_a_norm_around_zero_and_away_from_it():
    function = lambda x: x / jnp.maximum(jnp.linalg.norm(x), 1e-6)  # noqa: E731
    bounds = jb.bound(function, METHOD)
    around = bounds(jb.Box(jnp.full(4, -0.2), jnp.full(4, 0.3)))
    assert np.all(np.abs(np.stack([around.lower, around.upper])) <= 1 + 1e-5) and np.all(around.upper >= 1)
    away = bounds(jb.Box(jnp.full(4, 0.5), jnp.full(4, 0.52)))
    assert np.all(away.width < 0.05)
    bare = jb.bound(lambda x: x / jnp.linalg.norm(x), jb.IBP())(jb.Box(jnp.full(4, -0.2), jnp.full(4, 0.3)))
    assert np.all(np.isinf(bare.lower)) and np.all(np.isinf(bare.upper))


# --- look-ups ---------------------------------------------------------------------------------------------------------


def test_knots_that_are_arguments_count_if_they_are_in_order():
    bounds = jb.bound(jnp.interp, jb.IBP(), rounding=True)
    box, values = jb.Box(jnp.array([-1.5, 0.25]), jnp.array([1.5, 0.5])), jnp.array([0.5, 1.0, -0.5])
    found = bounds(box, jnp.array([-1.0, 0.0, 1.0]), values)
    assert np.allclose(found.lower, [-0.5, 0.25], atol=0.3) and np.allclose(found.upper, [1.0, 0.625], atol=0.3)
    assert found.lower[0] <= -0.5 and found.upper[0] >= 1 and found.lower[1] <= 0.25 and found.upper[1] >= 0.625
    disordered = bounds(box, jnp.array([-1.0, 1.0, 0.0]), values)
    assert np.all(np.isinf(disordered.lower)) and np.all(np.isinf(disordered.upper))


@pytest.mark.fast
def test_a_function_of_the_same_name_is_itself():
    @jax.jit
    def _interp(x, xp, fp):
        return x * xp[0] + fp[0]

    found = jb.bound(lambda x: _interp(x, jnp.array([2.0, 3.0]), jnp.ones(2)), jb.IBP())(
        jb.Box(jnp.zeros(2), jnp.ones(2))
    )
    assert np.allclose(found.upper, 3)


@pytest.mark.fast
@pytest.mark.parametrize("sides", [{"left": 2.0, "right": "extrapolate"}, {"left": "extrapolate"}])
def test_what_lies_beyond_the_knots(sides):
    function = lambda x: jnp.interp(x, np.array([0.0, 1, 2], np.float32), np.array([0, 1, 4], np.float32), **sides)  # noqa: E731
    for point in (-0.5, 0.5, 2.5):
        x = jnp.full(2, point)
        found = jb.bound(function, jb.IBP())(jb.Box(x, x))
        assert np.allclose(found.lower, function(x), atol=1e-5) and np.allclose(found.upper, function(x), atol=1e-5)


# --- casts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32])
def test_casts_are_bounded_where_the_number_fits(dtype):
    function = lambda x: x.astype(dtype).astype(x.dtype)  # noqa: E731
    low = 0.0 if jnp.issubdtype(dtype, jnp.unsignedinteger) else -3.75
    bounds = jb.bound(function, jb.IBP())
    found = bounds(jb.Box(jnp.array([low, 1.5]), jnp.array([3.75, 1.75])))
    assert np.array_equal(found.lower, [np.trunc(low), 1]) and np.array_equal(found.upper, [3, 1])
    far = float(np.iinfo(dtype).max) * 1.5
    beyond = bounds(jb.Box(jnp.array([low, far]), jnp.array([far, far])))
    assert np.all(np.isinf(beyond.lower)) and np.all(np.isinf(beyond.upper))


@pytest.mark.parametrize("ends", [(2e30, 3e30), (-3e30, -2e30), (1e19, 2e19), (1e-30, 2e-30), (1e-40, 2e-40), (-1, 1)])
def test_a_length_whose_squares_overflow_or_underflow(ends):
    """`jnp.hypot` itself does neither."""
    low, high = np.full(2, ends[0], np.float32), np.full(2, ends[1], np.float32)
    sizes = np.sort(np.abs(np.array(ends, np.float32).astype(np.float64)))
    least, most = (0 if ends == (-1, 1) else sizes[0] * 2**0.5), sizes[1] * 2**0.5
    for method in (jb.IBP(), jb.Crown()):
        found = jb.bound(lambda x: jnp.hypot(x[0], x[1]), method, rounding=True)(jb.Box(low, high))
        assert found.lower <= least and most <= found.upper


# --- logarithms of probabilities --------------------------------------------------------------------------------------

_OF_PROBABILITIES = {
    "log(1 - p)": lambda x: jnp.log(1 - jax.nn.sigmoid(x)),
    "log1p(-p)": lambda x: jnp.log1p(-jax.nn.sigmoid(x)),
    "odds": lambda x: jax.nn.sigmoid(x) / (1 - jax.nn.sigmoid(x)),
    "logit": lambda x: jax.scipy.special.logit(jax.nn.sigmoid(x)),
    "cross-entropy": lambda x: -0.3 * jnp.log(jax.nn.sigmoid(x)) - 0.7 * jnp.log(1 - jax.nn.sigmoid(x)),
    "binary entropy": lambda x: (lambda p: -p * jnp.log(p) - (1 - p) * jnp.log(1 - p))(jax.nn.sigmoid(x)),
    "guarded x log x": lambda x: jnp.where(x > 0, x * jnp.log(x), 0.0),
    "xlogy": lambda x: jax.scipy.special.xlogy(jax.nn.relu(x), jax.nn.relu(x)),
    "sinc": jnp.sinc,
    "logsumexp with weights": lambda x: jax.scipy.special.logsumexp(
        0.1 * x, b=jnp.array([1.0, -0.1, 0.5]), keepdims=True
    ),
    "entropy": lambda x: -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x), keepdims=True),
    "entropy of p": lambda x: (lambda p: -jnp.sum(p * jnp.log(p), keepdims=True))(jax.nn.softmax(x)),
    "entr": lambda x: jnp.sum(jax.scipy.special.entr(jax.nn.softmax(x)), keepdims=True),
}


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()], ids=str)
@pytest.mark.parametrize("name", _OF_PROBABILITIES)
def test_logarithms_of_probabilities_are_bounded(name, method):
    """Close to their range; entropies by n / e, and sums with the loss of their shift; around 0, where they have a limit."""
    function = _OF_PROBABILITIES[name]
    low, high = jnp.array([-0.8, -1.3, 0.0]), jnp.array([1.2, 0.0, 0.5])
    found = jb.bound(function, method, rounding=True)(jb.Box(low, high))
    share = np.random.default_rng(0).uniform(size=(4000, 3)).round(3)
    values = np.asarray(jax.vmap(function)(low + share.astype(np.float32) * (high - low)))
    lower, upper = np.asarray(found.lower), np.asarray(found.upper)
    assert np.all((lower <= values) & (values <= upper))
    loss = 0.4 if name in ("entropy", "entropy of p", "entr", "logsumexp with weights") else 0.02
    assert np.all(values.min(0) - lower < loss) and np.all(upper - values.max(0) < loss)


_UNDEFINED = {
    "sin(x) / x at 0": (lambda x: jnp.sin(x) / x, -1, 1),
    "x log x at 0": (lambda x: x * jnp.log(x), 0, 1),
    "x log x below 0": (lambda x: jnp.log(x) * x, -1, 1),
    "a far pole": (jnp.tan, 100, 101),
    "a far pole on the other side": (jnp.tan, -101, -100),
    "farther than is analysed": (jnp.tan, 1e30, 2e30),
    "what float64 cannot tell from 0": (lambda x: jnp.log(1 - jax.nn.sigmoid(x)), 30, 40),
}


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()], ids=str)
@pytest.mark.parametrize("name", _UNDEFINED)
def test_a_limit_or_a_gap_far_away_defines_nothing(name, method):
    function, low, high = _UNDEFINED[name]
    found = jb.bound(function, method)(jb.Box(jnp.full(1, low, jnp.float32), jnp.full(1, high, jnp.float32)))
    assert np.isinf(found.lower) and np.isinf(found.upper)


def test_a_call_of_two_shapes_that_compares_is_no_logaddexp():
    """JAX's percentile is one: it was traced with these shapes as if it were logaddexp."""
    x = jnp.arange(6.0)
    found = jb.bound(lambda x: jnp.percentile(x, jnp.array([25.0, 75.0])), jb.IBP())(jb.Box(x, x))
    assert np.allclose(found.lower, [1.25, 3.75], atol=1e-5) and np.allclose(found.upper, [1.25, 3.75], atol=1e-5)
