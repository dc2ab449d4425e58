"""Coefficients: every representation gives the numbers of the array, and windows are right at every border.

Affine functions have one matrix, their Jacobian: rows pulled through the whole function from an identity are its rows,
whatever represents them on the way. Weights are small integers, so equality is exact.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.driver import steps
from jaxbound.graph import tracing
from jaxbound.relaxations import backward, coefficients, convolutions, matrices, windows
from jaxbound.relaxations.coefficients import Dense, Identity
from jaxbound.relaxations.windows import Windowed

pytestmark = pytest.mark.usefixtures("x64")

_LETTERS = "NDHWC"


def _kernel(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float64)


def _conv(x, seed: int, features: int, size, strides=1, padding="VALID", dilation=1, groups: int = 1):
    """A convolution of (batch, *space, channels) with integer weights."""
    rank = x.ndim - 2
    several = lambda value: (value,) * rank if isinstance(value, int) else tuple(value)  # noqa: E731
    names = _LETTERS[0] + _LETTERS[4 - rank : 4] + "C"
    kernel = _kernel(seed, *several(size), x.shape[-1] // groups, features)
    return jax.lax.conv_general_dilated(
        x, kernel, several(strides), padding, rhs_dilation=several(dilation), feature_group_count=groups,
        dimension_numbers=(names, names[1:-1] + "IO", names),
    )  # fmt: skip


def _residual(x):
    y = _conv(x, 1, 3, 3, 2, ((1, 1), (1, 1)))
    return _conv(y, 2, 3, 3, padding="SAME") * _kernel(3, 3) + _conv(x, 4, 3, 1, 2) - y


def _far_apart(x):
    """Two windows on one value, of other strides and of other places."""
    return _conv(x, 1, 2, 1, 2)[:, :3, :3] + _conv(x, 2, 2, 2)[:, 1:4, 3:6] + x[:, 2:5, :3, :2]


def _cut_and_padded(x):
    x = jnp.pad(x[:, 1:, 1:-1:2], ((0, 0), (2, 1), (0, 3), (1, 0)), constant_values=2.0)
    return _conv(jnp.where(np.arange(x.shape[2])[:, None] % 2 == 0, x, -x), 1, 2, (2, 3)).transpose(0, 2, 1, 3)


def _channels_first(x):
    y = jax.lax.conv_general_dilated(x.transpose(0, 3, 1, 2), _kernel(1, 4, 2, 3, 2), (2, 1), ((1, 2), (0, 1)))
    return jnp.squeeze(y, 0)


def _gathered(x):
    """Channels and rows of several values side by side."""
    wide = jnp.concatenate([_conv(x, 1, 2, 3, padding="SAME"), x, _conv(x, 2, 1, 1)], axis=-1)
    return _conv(jnp.concatenate([wide[:, ::2], wide[:, :3]], axis=1), 3, 2, 2)


class Case(NamedTuple):
    """An affine function of one array, and what its rows are on the way in."""

    function: Callable
    shape: tuple[int, ...]
    kind: type = Windowed


CASES = {
    "valid": Case(lambda x: _conv(_conv(x, 1, 3, 3), 2, 4, (2, 3)), (1, 9, 8, 2)),
    "same": Case(lambda x: _conv(_conv(x, 1, 3, 3, padding="SAME"), 2, 2, 2, padding="SAME"), (1, 8, 7, 2)),
    "strides": Case(lambda x: _conv(_conv(x, 1, 3, 3, (2, 1)), 2, 2, 2, (1, 3)), (1, 13, 11, 1)),
    "strides_same": Case(lambda x: _conv(_conv(x, 1, 2, 3, 2, "SAME"), 2, 2, 3, 2, "SAME"), (1, 17, 18, 1)),
    "lopsided": Case(lambda x: _conv(x, 1, 3, (2, 3), (1, 2), ((3, 0), (0, 4))), (1, 6, 7, 2)),
    "negative_padding": Case(lambda x: _conv(x, 1, 3, 2, 1, ((-1, 2), (1, -2))), (1, 7, 8, 2)),
    "dilation": Case(lambda x: _conv(_conv(x, 1, 2, 3, 1, "SAME", (2, 3)), 2, 2, 2, dilation=2), (1, 11, 12, 1)),
    "groups": Case(lambda x: _conv(_conv(x, 1, 4, 3, padding="SAME", groups=2), 2, 4, 2, groups=4), (1, 6, 7, 4)),
    "one_dimension": Case(lambda x: _conv(_conv(x[None], 1, 3, 3, 2, ((1, 2),)), 2, 2, 2)[0], (12, 2)),
    "three_dimensions": Case(lambda x: _conv(x, 1, 2, (2, 1, 3), (2, 1, 1), "SAME"), (1, 5, 4, 6, 2)),
    "several_images": Case(lambda x: _conv(_conv(x, 1, 2, 2), 2, 2, 2), (3, 6, 6, 2)),
    "window_of_everything": Case(lambda x: _conv(x, 1, 2, 7, padding=((5, 5), (6, 4))), (1, 4, 5, 1), Dense),
    "tall_window": Case(lambda x: _conv(_conv(x, 1, 2, (6, 2)), 2, 2, 2), (1, 7, 20, 1)),
    "average_pool": Case(lambda x: nn.avg_pool(_conv(x, 1, 2, 2), (2, 4), (2, 1), ((1, 0), (2, 2))), (1, 9, 10, 2)),
    "pool_first": Case(lambda x: _conv(nn.avg_pool(x, (2, 2), (2, 2)), 1, 2, 2, padding="SAME"), (1, 10, 12, 2)),
    "residual": Case(_residual, (1, 16, 17, 3)),
    "far_apart": Case(_far_apart, (1, 9, 9, 2), Dense),
    "cut_and_padded": Case(_cut_and_padded, (1, 9, 12, 2)),
    "channels_first": Case(_channels_first, (1, 9, 8, 2)),
    "gathered": Case(_gathered, (1, 9, 8, 2)),
    "twice": Case(lambda x: x * _kernel(1, 4, 5) - x / 4 + (x + x), (4, 5), Identity),
    "flattened": Case(lambda x: _conv(x, 1, 2, 2).reshape(-1) @ _kernel(2, 24, 5), (1, 4, 5, 1), Dense),
}
"""Every kind of operation that keeps windows, and some that do not."""


def _pulled(case: Case, index, weight):
    """Rows from entries of the function's value, on its argument."""
    structure = tracing.build(case.function, [jax.ShapeDtypeStruct(case.shape, jnp.float64)], [True])
    ((_, last),) = structure.outputs
    (block,) = structure.blocks
    constants = structure.constants({})
    start = Identity(index, weight, structure.nodes[last].op.shape)
    incoming = [start if number == last else None for number in range(block.start, block.stop)]
    carry = backward.start(len(index), jnp.float64, False)
    read = [constants[k] for k in block.constants]
    (rows,), _, carry = backward.pull(block.template, read, incoming, carry, None, None)
    return rows, carry.intercept


@pytest.mark.quick(10)
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_jacobian(name):
    case = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    zeros = jnp.zeros(case.shape)
    size = int(np.prod(jax.eval_shape(case.function, zeros).shape))
    index = np.concatenate([np.arange(size), rng.integers(0, size, 5)])
    weight = np.concatenate([rng.choice([-1.0, 1.0, 2.0], size), [0.0, 0.0, 1.0, -1.0, 3.0]])
    matrix = np.asarray(jax.jacrev(case.function)(zeros)).reshape(size, *case.shape)
    offset = np.asarray(case.function(zeros)).reshape(size)

    def everything(index, weight):
        rows, intercept = _pulled(case, index, weight)
        return rows, coefficients.dense(rows), intercept

    rows, values, intercept = jax.jit(everything)(index, weight)
    assert isinstance(rows, case.kind)
    expand = weight.reshape(-1, *[1] * len(case.shape))
    assert np.array_equal(values, expand * matrix[index])
    assert np.array_equal(intercept, weight * offset[index])


# --- what is done with rows -------------------------------------------------------------------------------------------


def _identity(rng, _shape):
    index = rng.integers(0, 40, 12)
    return Identity(jnp.asarray(index), jnp.asarray(rng.integers(-2, 3, 12) * 1.0), (1, 5, 4, 2))


def _windows(rng, _shape):
    index = rng.integers(0, 36, 12)
    rows = windows.of_entries(jnp.asarray(index), jnp.asarray(rng.integers(-2, 3, 12) * 1.0), (1, 6, 3, 2))
    case = Case(lambda x: _conv(x, 1, 2, (2, 3), padding=((1, 1), (1, 1))), (1, 5, 3, 2))
    rows, _ = _pulled(Case(case.function, (1, 5, 3, 2)), rows.index, rows.values.reshape(-1))
    return rows


def _array(rng, shape):
    return Dense(jnp.asarray(rng.integers(-2, 3, (12, *shape)) * 1.0))


KINDS = {"identity": (_identity, (1, 5, 4, 2)), "windows": (_windows, (1, 5, 3, 2)), "array": (_array, (2, 3))}


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_array(kind):
    """Products with values that all rows share or that belong to rows; zeros ignore infinite values."""
    make, shape = KINDS[kind]
    rng = np.random.default_rng(7)
    rows = make(rng, shape)
    array = np.asarray(coefficients.dense(rows))
    box = jb.Box(*(jnp.asarray(v) for v in np.sort(rng.integers(-4, 5, (2, *shape)) * 1.0, axis=0)))
    ball = jb.LpBall(box.lower, 0.5, 2)
    for own in (False, True):
        low, high = rng.integers(-4, 5, (2, *([12] if own else []), *shape)) * 1.0
        scaled = np.where(array > 0, array * low, array * high)

        def products(low, high, rows=rows):
            return (
                coefficients.dense(coefficients.scale(rows, low, high)),
                coefficients.total(rows, low, high),
                coefficients.size(rows, high),
                coefficients.dense(coefficients.add(rows, coefficients.scale(rows, low, low))),
            )

        found = jax.jit(products)(low, high)
        sums = [values.reshape(12, -1).sum(axis=1) for values in (scaled, np.abs(array) * high)]
        for value, expected in zip(found, (scaled, *sums, array + array * low), strict=True):
            assert np.array_equal(value, expected)
    unread = np.all(array == 0, axis=0)
    values = jnp.where(unread, jnp.inf, 1.0)
    assert np.array_equal(coefficients.total(rows, values, values), array.reshape(12, -1).sum(axis=1))
    for region in (box, ball, jb.LpBall(box.lower, 0.25, np.inf, clip=(-1.0, 3.0))):
        expected = jb.regions.minimum(region, jnp.asarray(array))
        assert np.allclose(coefficients.minimum(rows, region), expected, rtol=1e-14, atol=1e-14)


def test_windows_are_few_numbers():
    """A row of two convolutions holds 5 x 5 pixels of the image, and the whole of it where that is little more."""
    for side, window in ((16, (1, 5, 5, 3)), (6, (1, 6, 6, 3))):
        case = Case(lambda x: _conv(_conv(x, 1, 4, 3), 2, 2, 3), (1, side, side, 3))
        rows, _ = _pulled(case, jnp.arange(4), jnp.ones(4))
        assert coefficients._held(rows).shape[1:] == window


# --- whole methods ----------------------------------------------------------------------------------------------------


def _residual_net(seed: int) -> Callable:
    """Convolutions of several shapes, a residual sum, pooling and a product, ReLU between; random real weights."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))  # noqa: E731
    conv = lambda x, k, s, p: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, s, p, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    first, second, skip = draw(3, 2, 2, 3), draw(3, 3, 3, 4), draw(1, 1, 2, 4)
    scale, last = draw(3, 4) + 1, draw(2, 3, 4, 2)

    def function(x):
        x = x[None]
        y = jax.nn.relu(conv(x, first, (2, 1), "SAME") + 0.1)
        y = conv(y, second, (1, 2), ((1, 1), (2, 0))) * scale[0] + conv(x, skip, (2, 2), "VALID")
        y = nn.avg_pool(jnp.tanh(y), (2, 2), (1, 1))
        y = jax.nn.relu(conv(jnp.pad(y, ((0, 0), (1, 0), (0, 1), (0, 0))), last, (1, 1), "VALID"))
        return (y * y).sum((0, 1, 2))

    return function


def _bounds(function, box, method, rounding: bool):
    """Bounds with everything a pass collects, compiled as one program and as the driver's steps."""
    eager = jb.bound(function, method, rounding=rounding)(box)
    traced = jax.jit(lambda low, high: jb.bound(function, method, rounding=rounding)(jb.Box(low, high)))
    return eager, traced(box.lower, box.upper)


def _unwindowed(monkeypatch):
    monkeypatch.setattr(windows, "LARGEST_SHARE", 0.0)
    steps.compiled.cache_clear()


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 8))])
@pytest.mark.parametrize(
    "method", [jb.Crown(), pytest.param(jb.FastLin(), marks=pytest.mark.slow)], ids=["crown", "fastlin"]
)
def test_windows_change_no_bound(monkeypatch, seed, method):
    function, rng = _residual_net(seed), np.random.default_rng(seed)
    center = rng.normal(size=(8, 8, 2))
    box = jb.Box(jnp.asarray(center - 0.05), jnp.asarray(center + 0.05))
    found = jb.bound(function, method)(box)
    points = center + rng.uniform(-0.05, 0.05, (300, *center.shape))
    values = np.asarray(jax.vmap(function)(points))
    assert (found.lower <= values.min(axis=0) + 1e-9).all()
    assert (values.max(axis=0) - 1e-9 <= found.upper).all()
    _unwindowed(monkeypatch)
    expected = jb.bound(function, method)(box)
    assert np.allclose(found.lower, expected.lower, rtol=1e-12, atol=1e-12)
    assert np.allclose(found.upper, expected.upper, rtol=1e-12, atol=1e-12)
    steps.compiled.cache_clear()


@pytest.mark.parametrize("stride", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_transposed_convolutions_have_the_derivatives_of_transposed_convolutions(stride):
    rows, kernel = _kernel(0, 3, 4, 5, 6), _kernel(1, 3, 2, 2, 6)
    image = jax.ShapeDtypeStruct((1, 3 + 3 * stride, 2 + 4 * stride, 2), jnp.float64)
    names = ("NHWC", "HWIO", "NHWC")
    numbers = jax.lax.conv_dimension_numbers(image.shape, kernel.shape, names)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (stride, stride), "VALID", dimension_numbers=names)

    def expected(rows, kernel):
        transpose = jax.linear_transpose(lambda x: convolve(x, kernel), image)
        return jax.vmap(lambda row: transpose(row)[0])(rows[:, None])

    params = {
        "window_strides": (stride, stride), "padding": ((0, 0), (0, 0)), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1),
        "dimension_numbers": numbers, "feature_group_count": 1, "batch_group_count": 1,
    }  # fmt: skip

    def found(rows, kernel):
        return convolutions.transpose((image.shape, kernel.shape), params, rows[:, None], kernel)

    _same_derivatives(found, expected, rows, kernel)


def _same_derivatives(found, expected, rows, kernel):
    """By the rows alone, by the kernel, and by both; forward, reverse and twice; and of a batch."""
    steps = _kernel(2, *rows.shape), _kernel(3, *kernel.shape)
    for moving in ((0,), (1,), (0, 1)):
        # only what moves has a tangent
        def along(function, moving=moving):
            parts = list(zip((rows, kernel), steps, strict=True))
            args = lambda t: [a + t * d if k in moving else a for k, (a, d) in enumerate(parts)]  # noqa: E731
            return lambda t: function(*args(t)) ** 2

        for differentiate in (
            jax.jacfwd,
            jax.jacrev,
            lambda f: jax.jacfwd(jax.jacrev(f)),
            lambda f: jax.jacrev(jax.jacfwd(f)),
        ):
            np.testing.assert_array_equal(differentiate(along(found))(1.0), differentiate(along(expected))(1.0))

    def loss(function, batch, kernel):
        return (jax.vmap(function, (0, None))(batch, kernel) ** 2).sum()

    batch = np.stack([rows, steps[0]])
    gradients = [jax.grad(functools.partial(loss, function), (0, 1))(batch, kernel) for function in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(6,), (1, 6), pytest.param((3, 6), marks=pytest.mark.slow)])
def test_transposed_products_have_the_derivatives_of_transposed_products(shape):
    kernel = _kernel(1, 6, 4)
    rows = _kernel(0, 3, *shape[:-1], 4)
    numbers = ((len(shape) - 1,), (0,)), ((), ())

    def expected(rows, kernel):
        transpose = jax.linear_transpose(lambda x: x @ kernel, jax.ShapeDtypeStruct(shape, rows.dtype))
        return jax.vmap(lambda row: transpose(row)[0])(rows)

    def found(rows, kernel):
        return matrices.transpose((shape, kernel.shape), {"dimension_numbers": numbers}, rows, kernel)

    np.testing.assert_array_equal(found(rows, kernel), expected(rows, kernel))
    _same_derivatives(found, expected, rows, kernel)


def test_other_products_are_left_to_jax():
    for contracting, batching, shape in ((((0,), (0,)), ((), ()), (6, 2)), (((1,), (1,)), ((), ()), (2, 4))):
        params = {"dimension_numbers": (contracting, batching)}
        assert matrices.transpose((shape, (6, 4)), params, jnp.ones((3, *shape)), jnp.ones((6, 4))) is None
    params = {"dimension_numbers": (((2,), (1,)), ((0,), (0,)))}
    assert matrices.transpose(((2, 3, 6), (2, 6, 4)), params, jnp.ones((3, 2, 3, 4)), jnp.ones((2, 6, 4))) is None


@pytest.mark.fast
def test_lines_are_chosen_by_sign():
    """At a coefficient of 0 the value is 0, whatever the lines, and the derivative is that of their mean."""
    held = jnp.array([[-2.0, 0.0, 3.0, 0.0]])
    low, high = jnp.array([1.0, -jnp.inf, 2.0, 4.0]), jnp.array([5.0, jnp.inf, 7.0, 6.0])
    total = lambda held, low, high: coefficients.total(coefficients.Dense(held), low, high)[0]  # noqa: E731
    assert total(held, low, high) == -2 * 5 + 3 * 2
    of_held, of_low, of_high = jax.grad(total, (0, 1, 2))(held, low, high)
    assert of_held.tolist() == [[5.0, 0.0, 2.0, 5.0]]
    assert of_low.tolist() == [0.0, 0.0, 3.0, 0.0] and of_high.tolist() == [-2.0, 0.0, 0.0, 0.0]
    scaled = coefficients.scale(
        coefficients.Dense(held), jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([5.0, 6.0, 7.0, 8.0])
    )
    assert coefficients.dense(scaled).tolist() == [[-10.0, 0.0, 9.0, 0.0]]
