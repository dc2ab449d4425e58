"""Every rewrite equals what it replaces, at ties and jumps too, and what only looks like a pattern keeps its value."""

from __future__ import annotations

import flax.linen as nn
import graph_values
import jax
import jax.numpy as jnp
import numpy as np
import numpy_rules  # noqa: F401
import oracles
import pytest
from jax import lax

import jaxbound as jb
from jaxbound.graph import tracing

_POINTS = np.concatenate([
    np.random.default_rng(0).normal(size=(30, 12)), np.random.default_rng(1).integers(-1, 2, (60, 12)),
    np.random.default_rng(2).integers(-3, 4, (10, 12)) / 2, np.zeros((1, 12)), np.ones((1, 12)),
])  # fmt: skip
"""Many with ties, and many at 0."""


def _check(function, size: int = 12, points=_POINTS, tolerance: float = 1e-10) -> None:
    """The graph computes the function at every point."""
    points = jnp.asarray(points[:, :size])
    structure = tracing.build(function, [jax.ShapeDtypeStruct((size,), points.dtype)], [True])
    found, apart = jax.vmap(lambda x: graph_values.run(structure, [x]))(points)
    for own, expected in zip(found, jax.tree.leaves(jax.vmap(function)(points)), strict=True):
        assert np.array_equal(np.isnan(own), np.isnan(expected))
        wrong = ~np.isclose(own, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert not wrong.any(), (points[np.argwhere(wrong)[0][0]], own[wrong][:3], expected[wrong][:3])
    assert np.nanmax(apart) < tolerance


def _kinds(function, size: int = 12) -> list[str]:
    structure = tracing.build(function, [jax.ShapeDtypeStruct((size,), np.float64)], [True])
    return [node.op.kind for node in structure.nodes if node.op.kind not in ("input", "affine")]


# --- single primitives ------------------------------------------------------------------------------------------------

_PLACES = np.array([[1, 0], [3, 2], [1, 0], [9, 9], [0, 2]])  # one twice, one outside
_MATRIX = np.random.default_rng(3).normal(size=(4, 3))


def _convolution(numbers, shapes, **more):
    """A convolution of two parts of x."""

    def function(x):
        left = int(np.prod(shapes[0]))
        arrays = [
            jnp.concatenate([x, x[::-1]])[:left].reshape(shapes[0]),
            jnp.concatenate([x[3:], x, 2 * x])[: int(np.prod(shapes[1]))].reshape(shapes[1]),
        ]
        return lax.conv_general_dilated(*arrays, dimension_numbers=numbers, **more)

    return function


def _scatter(method: str, mode: str):
    return lambda x: getattr(jnp.arange(12.0).reshape(4, 3).at[_PLACES[:, 0], _PLACES[:, 1]], method)(x[:5], mode=mode)


def _pool_gradient(window, strides, padding, shape=(3, 4)):
    def pooled(x):
        return jnp.sum(lax.reduce_window(x.reshape(shape), -jnp.inf, lax.max, window, strides, padding) ** 2)

    return jax.grad(pooled)


_PRIMITIVES = {
    "scatter, dropped outside": _scatter("set", "drop"),
    "scatter, clipped": _scatter("set", "clip"),
    "scatter of rows": lambda x: jnp.zeros((4, 3)).at[np.array([2, 0, 2])].set(x[:9].reshape(3, 3)),
    "scatter into what is bounded": lambda x: x.at[np.array([2, 0, 2])].set(x[:3] * 2),
    "scatter of a constant": lambda x: x.at[np.array([2, 0])].set(5.0),
    "scatter of a slice": lambda x: x.reshape(4, 3).at[1:3, 1].set(x[:2]),
    "scatter-mul": lambda x: x.reshape(4, 3).at[_PLACES[:, 0], _PLACES[:, 1]].multiply(np.arange(1.0, 6), mode="drop"),
    "scatter-add": _scatter("add", "drop"),
    "convolution": _convolution(("NHWC", "HWIO", "NHWC"), ((1, 3, 3, 2), (2, 2, 2, 3)), window_strides=(1, 1), padding="SAME"),
    "convolution, dilated": _convolution(("NHWC", "HWIO", "NHWC"), ((2, 3, 2, 1), (2, 2, 1, 2)), window_strides=(2, 1), padding=((1, 0), (2, 1)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)),
    "convolution, grouped": _convolution(("NCHW", "OIHW", "NCHW"), ((1, 4, 2, 2), (4, 2, 2, 1)), window_strides=(1, 1), padding="VALID", feature_group_count=2),
    "convolution, one axis": _convolution(("NCH", "OIH", "NHC"), ((2, 2, 5), (3, 2, 2)), window_strides=(1,), padding="VALID"),
    "convolve": lambda x: jnp.convolve(x[:4], x[4:9]),
    "cummax": lambda x: lax.cummax(x.reshape(4, 3), 0),
    "cummin, reversed": lambda x: lax.cummin(x.reshape(4, 3), 1, reverse=True),
    "cumprod": lambda x: jnp.cumprod(x.reshape(4, 3), 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x.reshape(4, 3), 0, reverse=True),
    "cumulative of one": lambda x: lax.cummax(x[:1]),
    "sort": lambda x: jnp.sort(x.reshape(4, 3), 0),
    "sorted with others": lambda x: lax.sort((x, x), num_keys=1)[0],
    "top_k": lambda x: lax.top_k(x.reshape(3, 4), 2)[0],
    "median": jnp.median,
    "quantile": lambda x: jnp.quantile(x, 0.3),
    "reduce_prod": lambda x: jnp.prod(x.reshape(3, 4), (0,)),
    "reduce_prod over all": jnp.prod,
    "reduce_prod of nothing": lambda x: jnp.prod(x[:0]) + x,
    "reduce_prod of an odd number": lambda x: jnp.prod(x[:7]),
    "reduce_min": lambda x: jnp.min(x.reshape(3, 4), 1),
    "padded with a bounded value": lambda x: lax.pad(x[:6].reshape(2, 3), x[7], ((1, -1, 1), (0, 2, 0))),
    "filled": lambda x: jnp.take(x.reshape(4, 3), np.array([0, 9, -1, 2]), axis=0, mode="fill", fill_value=3.0),
    "filled with NaN nowhere": lambda x: jnp.take(x, np.array([0, 3])),
    "repeated twice": lambda x: lax.broadcast_in_dim(lax.broadcast_in_dim(x, (12, 1), (0,)), (2, 12, 3), (1, 2)),
    "repeated, a new axis first": lambda x: lax.broadcast_in_dim(x.reshape(3, 4)[None], (2, 3, 4), (0, 1, 2)),
    "split": lambda x: jnp.split(x.reshape(4, 3), [1, 1, 3]),
    "unstack": lambda x: jax.vjp(lambda *rows: jnp.stack(rows, 1), *x.reshape(4, 3))[1](x.reshape(3, 4)),
    "scan": lambda x: lax.scan(lambda c, r: (c * r + 1, (c, r)), x[0], x.reshape(4, 3)[:, 0]),
    "scan, reversed": lambda x: lax.scan(lambda c, r: (jnp.tanh(c - r), c), x[:3], x.reshape(4, 3), reverse=True),
    "scan of length 0": lambda x: lax.scan(lambda c, r: (c + r, jnp.stack([c, r])), x[0], x[:0]),
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c) + i, x),
    "switch": lambda x: lax.switch(2, [jnp.sin, jnp.cos, lambda z: z * z], x),
    "switch out of range": lambda x: lax.switch(jnp.asarray(7), [jnp.sin, jnp.cos], x),
    "batched product": lambda x: jnp.einsum("bij,bkj->bki", x.reshape(2, 3, 2), x[::-1].reshape(2, 3, 2)),
    "clamp": lambda x: lax.clamp(x[:4] - 0.5, x[4:8], x[:4] + 0.5),
    "maximum": lambda x: jnp.maximum(x[:6], x[6:]) - jnp.minimum(x[:6], x[3:9]),
    "quotient": lambda x: x[:6] / (2 + x[6:] ** 2),
    "pool gradient": _pool_gradient((2, 2), (1, 1), "VALID"),
    "pool gradient, strided": _pool_gradient((2, 2), (1, 2), "SAME"),
    "pool gradient, padded": _pool_gradient((3, 2), (2, 2), ((1, 1), (0, 1))),
}  # fmt: skip


def _generic(points):
    """Points without ties."""
    return points[:30]


@pytest.mark.quick(16)
@pytest.mark.x64
@pytest.mark.parametrize("name", _PRIMITIVES)
def test_rewrites_equal_what_they_replace(name):
    _check(_PRIMITIVES[name], points=_generic(_POINTS) if "gradient" in name else _POINTS)


@pytest.mark.x64
def test_the_stacked_results_of_a_scan_of_length_0_are_empty():
    found = jb.bound(lambda x: lax.scan(lambda c, r: (c + r, jnp.stack([c, r])), x[0], x[:0]), jb.Crown())(
        jb.Box(jnp.zeros(2), jnp.ones(2))
    )
    assert found[1].lower.shape == (0, 2)
    assert np.array_equal([found[0].lower, found[0].upper], [0, 1])
    used = jb.bound(lambda x: jnp.sum(lax.scan(lambda c, r: (c, c * r), x[0], x[:0])[1]) + x, jb.Crown())
    found = used(jb.Box(jnp.zeros(2), jnp.ones(2)))
    assert np.array_equal([found.lower, found.upper], [[0, 0], [1, 1]])


def test_arrays_without_entries_are_constants():
    """No method need hear of them: neither an empty value nor an empty region."""
    box, empty = jb.Box(-jnp.ones(2), jnp.ones(2)), jb.Box(jnp.zeros((0, 2)), jnp.zeros((0, 2)))
    for method in (jb.IBP(), jb.Forward(), jb.Crown()):
        for transform in (lambda f: f, jax.jit):
            bound = transform(jb.bound(lambda x, y: (jnp.tanh(x[:0]), jnp.sum(jnp.sin(y), 0) + x, y @ x), method))
            none, total, product = bound(box, empty)
            assert none.lower.shape == product.upper.shape == (0,)
            assert np.array_equal([total.lower, total.upper], [[-1, -1], [1, 1]])


def test_a_random_key_may_be_closed_over():
    key = jax.random.key(3)
    noise = jax.random.uniform(key, (2,))
    found = jb.bound(lambda x: x * jax.random.uniform(key, (2,)), jb.Crown())(jb.Box(-jnp.ones(2), jnp.ones(2)))
    assert np.allclose([found.lower, found.upper], [-noise, noise], rtol=1e-5)


# --- booleans as numbers ------------------------------------------------------------------------------------------------

_A, _B = slice(0, 4), slice(4, 8)

_BOOLEANS = {
    "comparisons": lambda x: [c(x[_A], x[_B]).astype(float) for c in (jnp.greater, jnp.greater_equal, jnp.less, jnp.less_equal, jnp.equal, jnp.not_equal)],
    "comparisons with an array": lambda x: [c(x[_A], np.arange(4.0) - 1).astype(float) for c in (jnp.greater, jnp.less_equal, jnp.equal)],
    "and, or, xor, not": lambda x: [((x[_A] > 0) & (x[_B] > 0)) * 1.0, ((x[_A] > 0) | (x[_B] >= 0)) * 1.0, ((x[_A] > 0) ^ (x[_B] > 0)) * 1.0, (~(x[_A] > x[_B])) * 1.0],
    "with a constant": lambda x: ((x[_A] > 0) & np.array([True, False, True, False])).astype(float),
    "any and all": lambda x: [jnp.any(x.reshape(3, 4) > 0, 1) * 1.0, jnp.all(x.reshape(3, 4) > 0, 0) * 1.0, 1.0 * jnp.any(x > x[::-1])],
    "structure": lambda x: jnp.concatenate([x[_A] > 0, x[_B] > x[_A]])[::-1].reshape(2, 4).T.astype(float),
    "counts": lambda x: [jnp.sum(x > 0) * 1.0, jnp.sum((x > 0).reshape(3, 4) * np.arange(4), 1).astype(float)],
    "parts of a truth": lambda x: (x > x[::-1])[jnp.array([0, 5, 5])].astype(float),
    "in a narrower type": lambda x: (x[_A] > x[_B]).astype(np.float16).astype(float),
    "functions of choices": lambda x: (lambda w: [jnp.where(w, 2.0, 3.0) * 0.5 + jnp.sqrt(jnp.where(w, 4.0, 9.0)), jnp.where(w, 3.0, 1.0) ** jnp.where(w, 0.5, 2.0)])(x[_A] > x[_B]),
    "functions of choices between arrays": lambda x: (lambda w, a, b: jnp.where(w, a, b) + 0.1 * jnp.where(w, b, 0))(x[_A] > x[_B], np.arange(4.0), _MATRIX[:, 0]),
    "choices by two booleans": lambda x: jnp.where(x[_A] > x[_B], 2.0, 3.0) * jnp.where(x[_A] > 0, 2.0, 3.0),
    "a product with a choice": lambda x: [jnp.where(x[_A] > x[_B], -0.3, 0.7) * x[_B], jnp.where(x[:1] > x[1:2], -0.3, 0.7) * x[_B] * x[_A]],
    "chosen": lambda x: jnp.where(x > x[::-1], x, 2 * x[::-1]),
    "chosen constants": lambda x: jnp.where(x > x[::-1], 3.0, -1.0),
    "chosen constants, arrays": lambda x: jnp.where(x[_A] > x[_B], np.arange(4.0), 1.0),
    "chosen by one": lambda x: jnp.where(jnp.sum(x) > 0, x, x * x),
    "chosen by a conjunction": lambda x: jnp.where((x > 0) & (x[::-1] < 1), jnp.sin(x), x),
    "one chosen within another": lambda x: jnp.where(x > 0, jnp.where(x[::-1] > 0, x, 0.0), 0.0),
    "NaN asked for": lambda x: jnp.where(x != x, 7.0, jnp.where(jnp.isfinite(x * x[::-1]), x, 2.0)),
    "times a truth": lambda x: (x[::-1] > 0) * x + x * (x > x[::-1]),
    "which is largest": lambda x: (x[:5] == jnp.max(x[:5])).astype(float),
    "which is least, over an axis": lambda x: (x.reshape(3, 4) == jnp.min(x.reshape(3, 4), 1, keepdims=True)).astype(float),
    "equals the larger": lambda x: [(x[_A] == jnp.maximum(x[_A], x[_B])) * 1.0, (x[_B] == jnp.minimum(x[_A], x[_B])) * 1.0],
    "sign of a difference": lambda x: jnp.sign(x[_A] - x[_B]),
    "nan_to_num": lambda x: jnp.nan_to_num(x[_A] * x[_B]),
    "trunc": lambda x: jnp.trunc(1.5 * x),
    "roundings": lambda x: [jnp.floor(x), jnp.ceil(2 * x), jnp.round(x)],
}  # fmt: skip


@pytest.mark.quick(8)
@pytest.mark.x64
@pytest.mark.parametrize("name", _BOOLEANS)
def test_booleans_as_numbers_keep_their_values(name):
    _check(_BOOLEANS[name])


# --- regrouped factors ----------------------------------------------------------------------------------------------------


def _wide(x):
    return jnp.exp(x[:8]) @ np.random.default_rng(4).normal(size=(8, 4))


_FACTORS = {
    "product": lambda x: _wide(x) * jnp.tanh(x[_A]) * jax.nn.sigmoid(x[_A]),
    "product, factors on both sides": lambda x: (jnp.tanh(x[_A]) * _wide(x)) * (jnp.cos(x[_A]) * 3.0),
    "quotient": lambda x: (lambda g: (g / (2 + x[_A] ** 2)) * jnp.tanh(x[_A]))(_wide(x)),
    "sum": lambda x: (lambda g: g * jnp.tanh(x[_A]) + jnp.sin(x[_A]) * g)(_wide(x)),
    "difference": lambda x: (lambda g: g * jnp.tanh(x[_A]) - g)(_wide(x)),
    "negated": lambda x: (lambda g: -(g * jnp.tanh(x[_A])) - (-g) * jnp.cos(x[_A]))(_wide(x)),
    "literals": lambda x: (lambda g: 0.1 * g * jnp.tanh(x[_A]) + 0.2 * g * jnp.tanh(x[_A]) * 0.3)(_wide(x)),
    "unlike factors": lambda x: (lambda g: g * jnp.tanh(x[_A]) + g[::-1] * jnp.tanh(x[_A]))(_wide(x)),
    "a factor twice": lambda x: (lambda g: g * g * jnp.tanh(x[_A]) + g * jnp.sin(x[_A]))(_wide(x)),
    "a factor more": lambda x: (lambda g: g * g * jnp.tanh(x[_A]) - g * g * jnp.sin(x[_A]))(_wide(x)),
    "choice": lambda x: (lambda g: jnp.where(x[_A] > 0, g * jnp.tanh(x[_A]), g * x[_A]))(_wide(x)),
    "choice of multiples": lambda x: (lambda g, t: jnp.where(x[_A] > 0, 0.1 * g * t, 0.7 * g * t))(_wide(x), jnp.tanh(x[_B] @ _MATRIX[:, :1])),
    "choice of a negative multiple": lambda x: (lambda g, t: jnp.where(x[_A] > 0, -0.1 * g * t, g * t))(_wide(x), jnp.tanh(x[_B] @ _MATRIX[:, :1])),
    "choice of a multiple by another": lambda x: (lambda g: jnp.where(x[_B] > x[_A], 0.1 * g, g))(_wide(x)),
    "choice, zero unless": lambda x: (lambda g: jnp.where(x[_A] > 0, g, 0) + jnp.where(x[_A] > 0, 0, 2 * g))(_wide(x)),
    "before a repetition": lambda x: jnp.tanh(jnp.broadcast_to(x[_A], (3, 4))) * 2 - 1,
    "before repetitions that differ": lambda x: jnp.broadcast_to(x[_A][:, None], (4, 4)) * jnp.broadcast_to(x[_A], (4, 4)),
    "before a repetition of two": lambda x: jnp.broadcast_to(x[_A], (3, 4)) * jnp.broadcast_to(_wide(x), (3, 4)),
    "a quotient of numbers": lambda x: (lambda g: g * (1 / (1 + x[_A] ** 2)) - 3.0 / (1 + x[_A] ** 2) * g)(_wide(x)),
}  # fmt: skip


@pytest.mark.x64
@pytest.mark.parametrize("name", _FACTORS)
def test_regrouped_factors_keep_their_values(name):
    _check(_FACTORS[name])


@pytest.mark.x64
def test_what_shares_a_root_becomes_one_scalar_function():
    for name, products in (("product", 1), ("sum", 1), ("difference", 1), ("literals", 1)):
        assert _kinds(_FACTORS[name]).count("product") == products, name


_EXACT = {
    "sum of multiples": lambda x: 0.1 * x + 0.2 * x + 0.3 * x[::-1],
    "choice of multiples": lambda x: (lambda g, t: jnp.where(x[:3] > 0, 0.1 * g * t, 0.7 * g * t))(x[3:6] * x[6:9], x[9:] * x[9:]),
    "product of numbers": lambda x: (lambda g: (0.1 * g * jnp.square(x[:3])) * (x[:3] * 0.7))(x[3:6] * x[6:9]),
    "sum of products": lambda x: (lambda g: 0.1 * g * x[:3] - 0.7 * g * x[:3])(x[3:6] * x[6:9]),
    "quotient": lambda x: (x[:3] / 3.0) * x[3:6] / 7.0,
}  # fmt: skip


@pytest.mark.parametrize("name", _EXACT)
def test_numbers_are_not_rounded_into_each_other(name):
    """In exact arithmetic the float32 graph is the float32 function: no literal became another."""
    function = _EXACT[name]
    structure = tracing.build(function, [jax.ShapeDtypeStruct((12,), np.float32)], [True])
    for x in _POINTS[:40].astype(np.float32):
        expected = oracles.exactly(function, x)
        found = oracles.exactly(lambda x: graph_values.run(structure, [x])[0], x)
        for own, value in zip(found, expected, strict=True):
            assert np.allclose(own, value, rtol=1e-14, atol=1e-15)


# --- derivatives ------------------------------------------------------------------------------------------------------------

_M = np.random.default_rng(5).normal(size=(4, 12))

_DERIVATIVES = {
    "max": jax.grad(jnp.max),
    "max over an axis": jax.jacrev(lambda x: jnp.max(x.reshape(3, 4), 1) ** 2),
    "min over the first": jax.jacrev(lambda x: jnp.min(x.reshape(3, 4), 0)),
    "max, forward": lambda x: jax.jvp(lambda x: jnp.max(jnp.sin(x).reshape(3, 4), 0), (x,), (jnp.arange(12.0),))[1],
    "max, jacfwd": jax.jacfwd(lambda x: jnp.max(x.reshape(3, 4), 1)),
    "max of an affine image": jax.grad(lambda x: jnp.max(_M @ x)),
    "pooled maximum, forward": jax.jacfwd(lambda x: nn.max_pool(x.reshape(1, 3, 4, 1), (2, 2), (1, 2), "SAME")),
    "pooled maximum": jax.jacrev(lambda x: nn.max_pool(x.reshape(1, 3, 4, 1), (2, 3), (1, 1), "SAME")),
    "leaky_relu": jax.grad(lambda x: jnp.sum(_M @ jax.nn.leaky_relu(x, 0.3))),
    "maximum": jax.jacrev(lambda x: jnp.maximum(x[:6], x[6:])),
    "maximum, forward": lambda x: jax.jvp(lambda x: jnp.minimum(x[:6], x[6:]), (x,), (jnp.arange(12.0),))[1],
    "relu": jax.jacrev(lambda x: _M[:, :4] @ jax.nn.relu(_M @ x)),
    "two layers": jax.jacrev(lambda x: _M[:, :4] @ jax.nn.relu(_M[:, :4] @ jax.nn.leaky_relu(_M @ x))),
    "clip": jax.jacrev(lambda x: jnp.clip(_M @ x, -1, 1)),
    "gelu": jax.jacrev(lambda x: _M[:, :4] @ jax.nn.gelu(_M @ x)),
    "softmax": jax.jacrev(lambda x: jax.nn.softmax(_M @ x)),
    "log_softmax": jax.jacrev(lambda x: jax.nn.log_softmax(x.reshape(3, 4))),
    "logsumexp": jax.grad(lambda x: jax.nn.logsumexp(_M @ x)),
    "where": jax.jacrev(lambda x: jnp.where(x > 0, x * x, jnp.sin(x))),
    "norm": jax.grad(lambda x: jnp.linalg.norm(x)),
    "prod": jax.grad(lambda x: jnp.prod(x[:5])),
    "layer norm": jax.jacrev(lambda x: nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x)),
    "hessian": jax.hessian(lambda x: jnp.sum(jnp.tanh(_M @ x))),
    "cumulative": jax.jacrev(lambda x: jnp.cumsum(jnp.tanh(x))),
}


@pytest.mark.quick(6)
@pytest.mark.x64
@pytest.mark.parametrize("name", _DERIVATIVES)
def test_derivatives_are_theirs_where_nothing_is_tied(name):
    _check(_DERIVATIVES[name], points=_generic(_POINTS), tolerance=1e-8)


@pytest.mark.x64
@pytest.mark.parametrize("weights", [1.0, 2.0, np.array([-1.0, 2.0, 0.5])], ids=["sum", "twice", "array"])
@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()], ids=["IBP", "Crown"])
def test_slopes_of_functions_made_of_two_lines_are_exact(weights, method):
    """Both cases are chosen by one boolean: never one's slope with the other's absence."""
    box = jb.Box(jnp.array([-1.0, -0.5, 0.2]), jnp.array([1.0, 0.75, 0.3]))
    for function, below in ((lambda x: jax.nn.leaky_relu(x, 0.1), 0.1), (lambda x: jnp.where(x > 0, x, -2 * x), -2.0)):
        found = jb.bound(jax.grad(lambda x, f=function: jnp.sum(weights * f(x))), method)(box)
        slopes = np.array([[below, below, 1.0], [1.0, 1.0, 1.0]]) * weights
        assert np.allclose([found.lower, found.upper], [slopes.min(0), slopes.max(0)], atol=1e-12)


@pytest.mark.slow
@pytest.mark.x64
def test_derivatives_of_a_tied_pool_contain_the_one_that_jax_takes():
    """At a point where all entries are equal, nothing is decided."""
    point, pool = jnp.zeros((1, 3, 3, 1)), lambda x: nn.max_pool(x, (2, 2), (1, 1))
    for function in (jax.jacrev(pool), jax.jacfwd(pool)):
        found = jb.bound(function, jb.IBP())(jb.Box(point, point))
        assert np.all(found.lower <= function(point))
        assert np.all(function(point) <= found.upper)


def test_a_jacobian_of_a_maximum_is_finite():
    for function in (jax.jacfwd(jnp.max), jax.jacrev(jnp.max)):
        found = jb.bound(function, jb.IBP())(jb.Box(-jnp.ones(3), jnp.ones(3)))
        assert np.allclose([found.lower, found.upper], [[0] * 3, [1] * 3], atol=1e-5)


_TIED = {
    "a sum over the number of ties": lambda x: jnp.sum(x) / jnp.sum((x == x.max()).astype(x.dtype)),
    "another's ties": lambda x: (x[:6] == x[:6].max()) * (x[6:] / jnp.sum((x[6:] == x[6:].max()) * 1.0)),
    "ties of the least": lambda x: (x == x.max()) * (x / jnp.sum((x == x.min()) * 1.0)),
    "ties over another axis": lambda x: (lambda y: (y == y.max(0)) * (y / jnp.sum((y == y.max(0)) * 1.0, 1)))(x.reshape(1, 12)),
    "ties of other rows": lambda x: (lambda y: (y == y.max(1, keepdims=True)) * (y / jnp.sum((y == y.max(1, keepdims=True)) * 1.0, 1)[::-1, None]))(x[:9].reshape(3, 3)),
    "ties, transposed": lambda x: (lambda y: (y == y.max(1, keepdims=True)) * (y / jnp.sum((y == y.max(1, keepdims=True)) * 1.0, 1)[None, :]))(x[:9].reshape(3, 3)),
    "one more than the ties": lambda x: (x == x.max()) * (x / (1 + jnp.sum((x == x.max()) * 1.0))),
    "ties of the absolute values": lambda x: (x == x.max()) * (x / jnp.sum((abs(x) == abs(x).max()) * 1.0)),
    "sums of ties, over others": lambda x: jnp.sum((x[:6] == x[:6].max()) * x[:6]) / jnp.sum((x[6:] == x[6:].max()) * 1.0),
    "a sum of a part": lambda x: jnp.sum(((x == x.max()) * x)[:3]) / jnp.sum((x == x.max()) * 1.0),
    "a sum over another axis": lambda x: (lambda y: jnp.sum((y == y.max(0)) * y, 1) / jnp.sum((y == y.max(0)) * 1.0, 0))(x[:9].reshape(3, 3)),
    "equals the larger of others": lambda x: (x[:4] == jnp.maximum(x[4:8], x[8:])) * 1.0,
    "equals the larger, of one alone": lambda x: (x == jnp.maximum(x, x)) * 2.0,
    "equals a fixed number": lambda x: (x == 1.0) * x[::-1],
}  # fmt: skip


@pytest.mark.quick(5)
@pytest.mark.x64
@pytest.mark.parametrize("name", _TIED)
def test_near_misses_of_a_maximums_derivative_keep_their_values(name):
    _check(_TIED[name])


@pytest.mark.quick(3)
@pytest.mark.x64
@pytest.mark.parametrize("name", _TIED)
def test_near_misses_of_a_maximums_derivative_are_bounded_at_ties(name):
    """A degenerate box at a tie, and one that has a tie at an end."""
    function = lambda x: jnp.ravel(_TIED[name](x))  # noqa: E731
    tie = jnp.array([1.0, 1.0, 0.5, 1.0, -1.0, -1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0])
    with jax.disable_jit():
        for low, high in (
            (tie, tie),
            (tie, tie + 0.25 * (jnp.arange(12) % 3)),
            (tie - 0.5 * (jnp.arange(12) % 2), tie),
        ):
            found = jb.bound(function, jb.IBP())(jb.Box(low, high))
            for value in map(function, (low, high, tie)):
                assert np.all((found.lower <= value + 1e-9) | np.isnan(value))
                assert np.all((value - 1e-9 <= found.upper) | np.isnan(value))


# --- constants that are not finite ------------------------------------------------------------------------------------------


@pytest.mark.quick(6)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, c: jnp.where(x > x[::-1], x, c), lambda x, c: jnp.maximum(x, c), lambda x, c: x * (x > 0) * c,
        lambda x, c: jax.nn.softmax(x + c), lambda x, c: jax.nn.logsumexp(x * c), lambda x, c: jnp.sort(x + c),
        lambda x, c: jnp.floor(x * c), lambda x, c: jnp.prod(x + c), lambda x, c: x.at[0].set(c[0]) * x,
    ],
    ids=["where", "maximum", "gated", "softmax", "logsumexp", "sort", "floor", "prod", "scatter"],
)  # fmt: skip
def test_nothing_is_certified_where_a_constant_is_not_finite(function, bad):
    """Bounds are infinite, or refuse: never finite where the function is NaN or infinite somewhere in the box."""
    box, constant = jb.Box(jnp.array([-1.0, 0.5]), jnp.array([1.0, 2.0])), jnp.array([bad, 1.0])
    points = jnp.array([[-1.0, 0.5], [1.0, 2.0], [0.0, 1.0], [1.0, 0.5]])
    values = np.asarray(jax.vmap(lambda x: jnp.ravel(function(x, constant)))(points))
    with jax.disable_jit():
        for method in (jb.IBP(), jb.Crown()):
            found = jb.bound(lambda x, c: jnp.ravel(function(x, c)), method)(box, constant)
            assert not np.isnan([found.lower, found.upper]).any()
            undefined = np.isnan(values).any(axis=0)
            assert np.all(~undefined | (found.lower == -np.inf))
            assert np.all(~undefined | (found.upper == np.inf))
            assert np.all((found.lower <= values) | np.isnan(values))
            assert np.all((values <= found.upper) | np.isnan(values))


# --- what is defined --------------------------------------------------------------------------------------------------

_ASKS = {
    "isnan": lambda x: jnp.where(jnp.isnan(jnp.sqrt(x)), 5.0, 1.0),
    "isfinite": lambda x: jnp.where(jnp.isfinite(jnp.log(x)), 1.0, 5.0),
    "isnan, moved": lambda x: jnp.where(jnp.isnan(jnp.sqrt(x)[::-1]), 5.0, 1.0),
    "isfinite, moved": lambda x: jnp.where(jnp.isfinite(jnp.arccos(3 * x)[::-1]), 1.0, 5.0),
    "equal to itself": lambda x: jnp.where((lambda y: y == y)(jnp.log1p(2 * x)[::-1]), 1.0, 5.0),
    "below infinity": lambda x: jnp.where(jnp.sqrt(x)[::-1] < jnp.inf, 1.0, 5.0),
    "of a quotient": lambda x: jnp.where(jnp.isnan(x[:1] / (x[1:] - x[1:])), 5.0, 1.0),
    "defined": lambda x: jnp.where(jnp.isnan(jax.lax.rsqrt(jnp.mean(x * x) + 1) * x[::-1]), 5.0, x),
}
_ANSWERED = {"isnan", "isfinite", "defined"}


@pytest.mark.quick(3)
@pytest.mark.x64
@pytest.mark.parametrize("name", _ASKS)
def test_whether_a_value_is_defined_is_bounded_or_refused(name):
    box = jb.Box(jnp.array([-1.0, -0.5]), jnp.array([1.0, 0.75]))
    points = np.random.default_rng(0).uniform(box.lower, box.upper, (500, 2))
    values = np.asarray(jax.vmap(_ASKS[name])(points))
    bound = jb.bound(_ASKS[name], jb.IBP())
    if name not in _ANSWERED:
        with pytest.raises(jb.errors.UnsupportedError, match="`is_defined`"):
            bound(box)
        return
    found = bound(box)
    assert np.all(found.lower <= values.min(axis=0))
    assert np.all(values.max(axis=0) <= found.upper)
