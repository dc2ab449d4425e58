"""Planted faults: each changes one function of the core, and a fast deterministic check must fail.

Sampling whole networks misses most of these (docs: four faults, caught in 0 of 20 networks each), so the checks are the
sharp ones: equality with linear programs and closed forms, dense lines, values at points. Without a fault all pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxbound as jb
from jaxbound import balls, driver, graph, network, patterns, primitives, regions, tracing, transform
from jaxbound.relaxations import affine, backward, coefficients, forward, interval
from jaxbound.relaxations.enclosures import maximum, product, scalar, search

# --- the checks -----------------------------------------------------------------------------------------------------------

_W1 = np.array([[1.0, -2.0, 0.5], [0.75, 1.0, -1.5]])
_B1 = np.array([0.25, -0.5, 0.125])
_W2 = np.array([[1.0, -1.0], [-2.0, 0.5], [0.5, 1.5]])
_B2 = np.array([-0.375, 0.625])
_LOW, _HIGH = np.array([-1.0, -0.5]), np.array([0.5, 1.0])


def _box():
    return jb.Box(jnp.asarray(_LOW), jnp.asarray(_HIGH))


def _equal(interval_, lower, upper, tolerance=1e-9):
    assert np.allclose(interval_.lower, lower, rtol=tolerance, atol=tolerance)
    assert np.allclose(interval_.upper, upper, rtol=tolerance, atol=tolerance)


def _range(matrix, low, high, offset):
    positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
    return positive @ low + negative @ high + offset, positive @ high + negative @ low + offset


def check_affine_intervals():
    """Chains of affine operations against the matrix that they are."""
    function = lambda x: jnp.concatenate([3 - (x @ _W1).T, x @ _W1 + _B1, x[::-1] - 2 * x])  # noqa: E731
    matrix = np.concatenate([-_W1.T, _W1.T, np.array([[-2.0, 1.0], [1.0, -2.0]])])
    offset = np.concatenate([np.full(3, 3.0), _B1, np.zeros(2)])
    for method in (jb.IBP(), jb.Crown()):
        _equal(jb.bound(function, method)(_box()), *_range(matrix, _LOW, _HIGH, offset))
    image = np.arange(6.0).reshape(2, 3)
    turned = jb.bound(lambda x: x.T.reshape(6) * jnp.arange(6.0), jb.Crown())(jb.Box(image - 1, image + 1))
    _equal(turned, (image.T.ravel() - 1) * np.arange(6), (image.T.ravel() + 1) * np.arange(6))
    twice = jb.bound(lambda x: (x @ _W1) @ _W2, jb.IBP())(_box())
    _equal(twice, *_range((_W1 @ _W2).T, _LOW, _HIGH, 0))


def _relu_net(params, x):
    w1, b1, w2, b2 = params
    return jax.nn.relu(x @ w1 + b1) @ w2 + b2


def check_crown_program():
    """CROWN against the linear program of its lines, planes against their definition."""
    params = (_W1, _B1, _W2, _B2)
    low, high = _range(_W1.T, _LOW, _HIGH, _B1)
    chord = high / (high - low)
    below = np.where(high > -low, 1.0, 0.0)
    lines = below, np.zeros(3), chord, -chord * low
    expected = oracles.relu_linear_program([(_W1, _B1), (_W2, _B2)], _LOW, _HIGH, [lines])
    _equal(jb.bound(_relu_net, jb.Crown(intersect=False))(params, _box()), *expected, 1e-7)
    planes = jb.linear_bounds(_relu_net, jb.Crown())(params, _box())
    points = np.random.default_rng(0).uniform(_LOW, _HIGH, (200, 2))
    values = oracles.relu_value([(_W1, _B1), (_W2, _B2)], points)
    assert np.all(points @ planes.lower_slope[1].T + planes.lower_intercept <= values + 1e-9)
    assert np.all(points @ planes.upper_slope[1].T + planes.upper_intercept >= values - 1e-9)
    _equal(planes.concretize(params, _box()), *expected, 1e-7)


def check_interval_program():
    """Interval bounds of a network, and of a specification composed with its last layer."""
    low, high = (np.maximum(end, 0) for end in _range(_W1.T, _LOW, _HIGH, _B1))
    params = (_W1, _B1, _W2, _B2)
    _equal(jb.bound(_relu_net, jb.IBP())(params, _box()), *_range(_W2.T, low, high, _B2))
    spec = np.array([[1.0, -1.0], [2.0, 1.0]])
    found = jb.ibp([(_W1, _B1), (_W2, _B2)], jb.Box(jnp.asarray(_LOW)[None], jnp.asarray(_HIGH)[None]), spec=spec)
    _equal(found, *(end[None] for end in _range(spec @ _W2.T, low, high, spec @ _B2)))


def check_sound_everywhere():
    """Small networks with skips and several readers: all methods contain all values."""

    def skip(x):
        z = x @ _W1 + _B1
        y = jnp.tanh(z) - jax.nn.relu(z - 0.25 * _B1)
        return y @ _W2 + jnp.abs(x) - x * _B2

    points = np.random.default_rng(1).uniform(_LOW, _HIGH, (2000, 2))
    values = np.asarray(jax.vmap(skip)(points))
    for method in (jb.IBP(), jb.Forward(), jb.Crown()):
        found = jb.bound(skip, method)(_box())
        assert np.all(found.lower <= values.min(axis=0) + 1e-12)
        assert np.all(found.upper >= values.max(axis=0) - 1e-12)


def check_forward():
    """Forward bounds of one hidden layer are CROWN's; of several leaves, sound and exact where affine."""
    params = (_W1, _B1, _W2, _B2)
    planes = [jb.linear_bounds(_relu_net, m)(params, _box()) for m in (jb.Forward(), jb.Crown())]
    for first, second in zip(*map(jax.tree.leaves, planes), strict=True):
        assert np.allclose(first, second, atol=1e-9)
    deep = lambda x: jax.nn.relu(_relu_net(params, x) @ _W1 - _B1) @ _W2  # noqa: E731
    points = np.random.default_rng(5).uniform(_LOW, _HIGH, (2000, 2))
    linear, values = jb.linear_bounds(deep, jb.Forward())(_box()), np.asarray(jax.vmap(deep)(points))
    assert np.all(points @ linear.lower_slope[0].T + linear.lower_intercept <= values + 1e-9)
    assert np.all(points @ linear.upper_slope[0].T + linear.upper_intercept >= values - 1e-9)
    boxes = _box(), jb.Box(jnp.array([1.0]), jnp.array([3.0]))
    found = jb.bound(lambda x, y: x[0] - 2 * x[1] + 3 * y[0], jb.Forward())(*boxes)
    _equal(found, -1 - 2 + 3, 0.5 + 1 + 9)


def check_scalar_lines():
    """Given slopes and the hull's: on their side, touching, and as near at the midpoint as the hull."""
    references = {
        "leaky": (lambda x: jax.nn.leaky_relu(x, -0.5), lambda z: np.where(z > 0, z, -0.5 * z)),
        "clip": (lambda x: jnp.clip(x, -1.0, 0.5), lambda z: np.clip(z, -1, 0.5)),
        "tanh": (jnp.tanh, np.tanh),
        "square": (jnp.square, np.square),
    }
    low, high = np.array([-2.0, -0.7, -3.0, 0.2, -1.5]), np.array([1.0, 2.5, -0.5, 1.1, 1.5])
    slopes = np.array([0.25, 0.9, -0.3, 0.1, 0.5])
    share = np.linspace(0, 1, 4001)[:, None]
    z = np.sort(np.concatenate([low + (high - low) * share, np.clip([[-1.0], [0.0], [0.5]], low, high)]), axis=0)
    for function, reference in references.values():
        op = tracing.build(function, [jax.ShapeDtypeStruct((5,), jnp.float64)], [True]).nodes[1].op
        values, ends = reference(z), [(jnp.asarray(low), jnp.asarray(high))]
        least, most = scalar.interval(op, ends, [])
        given = scalar.planes(op, ends, [], "adaptive", (jnp.asarray(slopes), jnp.asarray(slopes)))
        own = scalar.planes(op, ends, [], "adaptive")
        for planes in (given, own):
            below = values - planes.lower_slopes[0] * z - planes.lower_intercept
            above = planes.upper_slopes[0] * z + planes.upper_intercept - values
            assert np.all(below >= -1e-12)
            assert np.all(above >= -1e-12)
            assert np.all(below.min(axis=0) < 1e-6)
            assert np.all(above.min(axis=0) < 1e-6)
        assert np.all(np.abs(least - values.min(axis=0)) < 1e-6)
        assert np.all(np.abs(most - values.max(axis=0)) < 1e-6)
        middle = len(z) // 2
        assert np.all(below[middle] <= (values - given.lower_slopes[0] * z - given.lower_intercept)[middle] + 1e-3)
        assert np.all(above[middle] <= (given.upper_slopes[0] * z + given.upper_intercept - values)[middle] + 1e-3)


def check_products():
    ends = [
        (jnp.array([-1.0, 0.5, -3.0]), jnp.array([2.0, 1.5, -1.0])),
        (jnp.array([-2.0, -1.0, 1.0]), jnp.array([1.0, 3.0, 2.0])),
    ]
    structure = tracing.build(lambda x, y: x * y, [jax.ShapeDtypeStruct((3,), jnp.float64)] * 2, [True] * 2)
    op = structure.nodes[-1].op
    assert op.kind == "product"
    share = np.stack(np.meshgrid(np.linspace(0, 1, 21), np.linspace(0, 1, 21))).reshape(2, -1, 1)
    x, y = (
        np.asarray(low) + (np.asarray(high) - np.asarray(low)) * s for (low, high), s in zip(ends, share, strict=True)
    )
    least, most = product.interval(op, ends, [])
    assert np.allclose(least, (x * y).min(axis=0))
    assert np.allclose(most, (x * y).max(axis=0))
    for given in (None, (jnp.array([0.5, -1.0, 1.0]), jnp.array([-0.5, 1.0, 0.25]))):
        planes = product.planes(op, ends, [], "adaptive", given)
        below = x * y - planes.lower_slopes[0] * x - planes.lower_slopes[1] * y - planes.lower_intercept
        above = planes.upper_slopes[0] * x + planes.upper_slopes[1] * y + planes.upper_intercept - x * y
        for gap in (below, above):
            assert np.all(gap >= -1e-9)
            assert np.all(gap.min(axis=0) < 1e-9)
    _equal(jb.bound(lambda x: x[:1] * x[1:], jb.IBP())(_box()), [-1.0], [0.5], 1e-6)


def check_maxima():
    low = jnp.array([[-1.0, 0.0, 0.5], [2.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    high = jnp.array([[1.0, 2.0, 0.75], [3.0, 1.0, 1.5], [1.0, 1.0, 3.0]])
    op = tracing.build(lambda x: x.max(1), [jax.ShapeDtypeStruct((3, 3), jnp.float64)], [True]).nodes[-1].op
    rng = np.random.default_rng(2)
    share = np.where(rng.random((3000, 3, 3)) < 0.6, rng.integers(0, 2, (3000, 3, 3)), rng.random((3000, 3, 3)))
    x = np.asarray(low) + (np.asarray(high) - np.asarray(low)) * share
    planes = maximum.planes(op, [(low, high)], [], "adaptive")
    below = x.max(2) - (planes.lower_slopes[0] * x).sum(2) - planes.lower_intercept
    above = (planes.upper_slopes[0] * x).sum(2) + planes.upper_intercept - x.max(2)
    assert np.all(below >= -1e-12)
    assert np.all(above >= -1e-12)
    assert np.all(above.min(axis=0) < 1e-6)
    assert np.all(np.stack([below, above])[:, :, 1] < 1e-9)  # the entry that dominates
    _equal(jb.bound(lambda x: x.max(1), jb.IBP())(jb.Box(low, high)), [0.5, 2, 0], [2, 3, 3])


def check_regions():
    """Support functions against closed forms and brute force, enclosing boxes against exact arithmetic."""
    slope, center = jnp.array([[3.0, -4.0]]), jnp.array([0.5, -0.25])
    middle = 3 * 0.5 + 4 * 0.25
    for norm, reach in ((1, 4.0), (2, 5.0), (np.inf, 7.0), (3, (3**1.5 + 4**1.5) ** (2 / 3))):
        assert np.allclose(regions.minimum(jb.LpBall(center, 0.5, norm), slope), middle - 0.5 * reach)
    angle = np.linspace(0, 2 * np.pi, 20001)
    circle = (
        np.asarray(center)[:, None]
        + 0.5 * np.stack([np.cos(angle), np.sin(angle)]) * np.linspace(0, 1, 101)[:, None, None]
    )
    inside = np.all((circle >= -0.5) & (circle <= 0.75), axis=1)
    for sign in (1, -1):
        expected = np.where(inside, sign * (3 * circle[:, 0] - 4 * circle[:, 1]), np.inf).min()
        assert abs(regions.minimum(jb.LpBall(center, 0.5, 2, clip=(-0.5, 0.75)), sign * slope)[0] - expected) < 3e-2
    assert np.allclose(regions.minimum(jb.Box(-jnp.ones(2), 2 * jnp.ones(2)), slope), -3 - 8)
    lower, upper = regions.enclosing_box(jb.LpBall(jnp.float32([0.1, 0.7]), jnp.float32(0.3), 2, clip=(0.0, 0.9)))
    exact = np.float32([0.1, 0.7]).astype(float), float(np.float32(0.3))
    assert np.all(np.asarray(lower, float) <= np.maximum(exact[0] - exact[1], 0))
    assert np.all(np.asarray(upper, float) >= np.minimum(exact[0] + exact[1], 0.9))
    assert upper[1] < 0.95
    odd = jnp.float32([16777215.0, 0.3])
    lower, upper = regions.enclosing_box(jb.LpBall(odd, jnp.float32(0.7), np.inf))
    assert np.all(np.asarray(lower, float) <= np.asarray(odd, float) - float(np.float32(0.7)))
    assert np.all(np.asarray(upper, float) >= np.asarray(odd, float) + float(np.float32(0.7)))


def check_rounding():
    """float32 with rounding: a box of one point whose sum cancels, evaluated exactly."""
    rng = np.random.default_rng(3)
    x, w = rng.uniform(-3000, 0, 300).astype(np.float32), -np.abs(rng.normal(size=(300, 2))).astype(np.float32)
    function = lambda p, x: jax.nn.relu(x @ p) * 2.0  # noqa: E731
    (exact,) = oracles.exactly(function, jnp.asarray(w), jnp.asarray(x))
    # whatever the order of the sums: gamma_n of the sizes on both sides
    widest = 2 * 300 * np.finfo(np.float32).eps * (np.abs(x).astype(float) @ np.abs(w))
    for method in (jb.IBP(), jb.Crown(intersect=False)):
        found = jb.bound(function, method, rounding=True)(jnp.asarray(w), jb.Box(jnp.asarray(x), jnp.asarray(x)))
        assert np.all(np.asarray(found.lower, float) <= exact)
        assert np.all(np.asarray(found.upper, float) >= exact)
        assert np.all(np.asarray(found.upper, float) - np.asarray(found.lower, float) > 0.9 * widest)
    op = tracing.build(jnp.tanh, [jax.ShapeDtypeStruct((200,), jnp.float32)], [True]).nodes[1].op
    low = jnp.asarray(rng.uniform(-3, 2, 200), jnp.float32)
    planes = scalar.planes(op, [(low, low + 1)], [], "adaptive")
    z = np.asarray(low, float) + np.linspace(0, 1, 301)[:, None]
    z = np.minimum(z, np.asarray(low + 1, float))
    assert np.all(
        np.asarray(planes.lower_slopes[0], float) * z + np.asarray(planes.lower_intercept, float) <= np.tanh(z)
    )
    assert np.all(
        np.asarray(planes.upper_slopes[0], float) * z + np.asarray(planes.upper_intercept, float) >= np.tanh(z)
    )


def _at_points(function, *shapes):
    rng = np.random.default_rng(4)
    x = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    found, value = jb.bound(function, jb.IBP())(*(jb.Box(v, v) for v in x)), function(*x)
    _equal(found, value, value, 1e-8)


def check_patterns():
    """What looks like a softmax or a variance, maxima of two, pools: bounds over points are values."""
    _at_points(lambda x: jax.nn.softmax(x, axis=1), (3, 3))
    _at_points(lambda x: (lambda e: e / e.sum(0)[:, None])(jnp.exp(x)), (3, 3))
    _at_points(lambda x: (lambda e: e / e.sum(1, keepdims=True))(jnp.exp(x - x.max(0, keepdims=True))), (3, 3))
    _at_points(lambda x: jnp.mean(x * x, 1) - jnp.mean(x, 1) ** 2, (3, 3))
    _at_points(lambda x: jnp.sum(x * x, 1) / 4 - (jnp.sum(x, 1) / 4) ** 2, (3, 3))
    _at_points(lambda x, y: jnp.maximum(x, y) - 2 * jnp.minimum(x, y), (3, 3), (3, 3))
    _at_points(lambda x, y: x / (3 + y * y), (3, 3), (3, 3))
    _at_points(lambda x: jnp.min(x, 1) - jnp.split(x, [1])[1].sum(0), (3, 3))
    _at_points(lambda x: nn.max_pool(x - 5, (1, 2), (1, 1), "SAME"), (1, 2, 3, 1))


def check_batches():
    """Every example of a batch is bounded over its own ball, by its own specification."""
    x, eps = np.array([[0.5, -1.0], [0.0, 0.25], [4.0, 2.0]]), np.array([0.25, 0.5, 0.0])
    spec = np.array([[[1.0, -1.0]], [[0.5, 2.0]], [[-1.0, 0.5]]])
    found = jb.crown([(_W1, _B1), (_W2, _B2)], jnp.asarray(x), jnp.asarray(eps), spec=jnp.asarray(spec))
    assert found.lower.shape == (3, 1)
    for k in range(3):
        points = x[k] + eps[k] * np.random.default_rng(6).uniform(-1, 1, (500, 2))
        values = oracles.relu_value([(_W1, _B1), (_W2, _B2)], points) @ spec[k, 0]
        assert found.lower[k, 0] <= values.min() + 1e-9
        assert values.max() - 1e-9 <= found.upper[k, 0]
        assert found.upper[k, 0] - found.lower[k, 0] <= 2 * (values.max() - values.min()) + 1e-9


def check_chunks():
    """Passes of few rows give what one pass gives."""
    layers = [(jnp.asarray(_W1), jnp.asarray(_B1)), (jnp.asarray(np.tile(_W2, (1, 5))), jnp.asarray(np.arange(10.0)))]
    x = jnp.array([[0.5, -1.0]])
    expected = jb.crown(layers, x, 0.25)
    _equal(jb.crown(layers, x, 0.25, memory_limit=1), expected.lower, expected.upper)


def check_row_selection():
    """No neuron of this network is stable: no row may be skipped, with concrete values or without."""
    layers = [(_W1, np.zeros(3)), (_W2, np.zeros(2)), (np.array([[1.0], [-1.0]]), np.zeros(1))]

    def deep(x):
        for number, (kernel, bias) in enumerate(layers):
            x = (jax.nn.relu(x) if number else x) @ kernel + bias
        return x

    box = jb.Box(-jnp.ones(2), jnp.ones(2))
    eager = jb.bound(deep, jb.Crown())(box)
    traced = jax.vmap(lambda low, high: jb.bound(deep, jb.Crown())(jb.Box(low, high)))(box.lower[None], box.upper[None])
    _equal(eager, traced.lower[0], traced.upper[0])
    _equal(eager, *jax.tree.leaves(jb.bound(deep, jb.Crown(pre_activation=jb.Crown()))(box)))


def check_evaluations():
    """Intervals of single points contain the function's value, which float32 misses."""
    z = np.linspace(-3, 3, 2001, dtype=np.float32)
    found = jb.bound(jnp.tanh, jb.IBP())(jb.Box(jnp.asarray(z), jnp.asarray(z)))
    assert np.all(
        (np.asarray(found.lower, float) <= np.tanh(z.astype(float))) & (np.tanh(z.astype(float)) <= found.upper)
    )


def check_switches():
    """The lower line of a convex function that its program switches at the midpoint is the tangent there."""
    planes = jb.linear_bounds(jax.nn.softplus, jb.Crown())(jb.Box(-jnp.ones(1), jnp.ones(1)))
    assert abs(planes.lower_slope[0][0, 0] - 0.5) < 1e-6
    assert abs(planes.lower_intercept[0] - np.log(2)) < 1e-6


def check_abnormal():
    """Empty regions and infinite ends."""
    function = lambda x: jax.nn.relu(x @ _W1 + _B1) @ _W2  # noqa: E731
    for make, numbers in (
        (lambda c, r: jb.LpBall(c, r, 2, clip=(0.0, 1.0)), (jnp.full((1, 2), 3.0), jnp.full(1, 0.5))),
        (jb.Box, (jnp.ones((1, 2)), jnp.zeros((1, 2)))),
    ):
        for method in (jb.IBP(), jb.Crown(intersect=False)):
            found = jax.vmap(lambda *n, m=method, f=make: jb.bound(function, m)(f(*n)))(*numbers)
            assert np.all(found.lower == -np.inf)
            assert np.all(found.upper == np.inf)
    endless = jb.Box(jnp.array([-np.inf, 0.0]), jnp.array([0.0, 1.0]))
    found = jb.bound(lambda x: x @ jnp.array([[1.0, 0.0, -1.0], [2.0, 3.0, 0.0]]), jb.IBP())(endless)
    assert found.lower[0] == -np.inf
    assert found.upper[2] == np.inf
    assert not np.isnan([found.lower, found.upper]).any()


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}

# --- the faults -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`change(original)` takes the place of `owner.name` (or `owner[name]`); `check` must fail."""

    check: str
    owner: object
    name: str
    change: Callable


def _swapped_pairs(original):
    def mutant(op, inputs, planes, sizes):
        turned = [
            dataclasses.replace(
                pair, slopes=tuple(ends[::-1] for ends in pair.slopes), intercepts=pair.intercepts[::-1]
            )
            for pair in inputs
        ]
        return original(op, turned, planes, sizes)

    return mutant


def _kinds_exchanged(original):
    kinds = {"convex": "concave", "concave": "convex", "linear": "linear"}

    def mutant(op):
        curvature = original(op)
        pieces = tuple(dataclasses.replace(piece, kind=kinds[piece.kind]) for piece in curvature.pieces)
        return dataclasses.replace(curvature, pieces=pieces)

    return mutant


def _facts(**changes) -> Callable:
    return lambda facts: dataclasses.replace(facts, **changes)


def _after(change: Callable) -> Callable:
    """A fault in what a function returns."""
    return lambda original: functools.wraps(original)(lambda *a, **k: change(original(*a, **k)))


def _always(value) -> Callable:
    return lambda original: lambda *a, **k: value


def _another_column(original):
    def mutant(op, rows, constants):
        if isinstance(rows, coefficients.Identity) and op.name == "dot_general":
            rows = dataclasses.replace(rows, index=jnp.roll(rows.index, 1))
        return original(op, rows, constants)

    return mutant


def _padded_with_zeros(original):
    def mutant(params, operands):
        _, arguments = original(params, operands)
        plain = original({**params, "padding": tuple((0, 0) for _ in params["padding"])}, operands)[0]
        return lambda x: plain(jnp.pad(x, params["padding"])), arguments

    return mutant


_upper_as_lower = _after(
    lambda p: dataclasses.replace(p, upper_slopes=p.lower_slopes, upper_intercept=p.lower_intercept)
)

MUTANTS: dict[str, Mutant] = {
    # the affine rule
    "radius without absolute values": Mutant("affine_intervals", affine, "absolute", lambda _: affine.linear),
    "constant dropped": Mutant("crown_program", affine, "offset", _always(None)),
    "ends chosen without signs": Mutant("affine_intervals", affine, "_ends", lambda _: lambda op, inputs, side: [e[side] for e in inputs]),
    "offset doubled": Mutant("crown_program", affine, "offset", _after(lambda b: None if b is None else 2 * b)),
    "transpose with the sign flipped": Mutant("crown_program", affine, "pull", lambda original: lambda op, rows, c: [-part if op.facts.scales else part for part in original(op, rows, c)]),
    "no rounding of products": Mutant("rounding", affine, "gamma", _always(0.0)),
    "rounding of one term": Mutant("rounding", affine, "gamma", lambda original: lambda terms, dtype: original(1, dtype)),
    "NaN kept": Mutant("abnormal", affine, "_finish", lambda _: lambda low, high: (low, high)),
    "infinite ends as a middle": Mutant("abnormal", affine, "_middle_radius", lambda _: lambda ends: (jnp.nan_to_num(ends[0] / 2 + ends[1] / 2), jnp.nan_to_num(ends[1] - ends[0], posinf=1.0) / 2)),
    # facts
    "subtraction increases": Mutant("affine_intervals", primitives.AFFINE, "sub", _facts(signs=(1, 1))),
    "transposition keeps the order": Mutant("affine_intervals", primitives.AFFINE, "transpose", _facts(order_preserving=True)),
    "reversal keeps the order": Mutant("affine_intervals", primitives.AFFINE, "rev", _facts(order_preserving=True)),
    "products of two values are affine": Mutant("products", primitives.AFFINE, "mul", _facts(alone=False)),
    "sums are exact for anything": Mutant("affine_intervals", graph.Op, "repeats", lambda _: property(lambda self: False)),
    # coefficients
    "positive and negative parts exchanged": Mutant("crown_program", coefficients, "split", _after(lambda parts: parts[::-1])),
    "second reader forgotten": Mutant("sound_everywhere", coefficients, "add", lambda _: lambda first, second: first),
    "columns of another neuron": Mutant("crown_program", coefficients, "pull", _another_column),
    # backward
    "intercept dropped": Mutant("crown_program", backward._Tally, "_shift", _always(None)),
    "lower planes on both sides": Mutant("crown_program", scalar, "planes", _upper_as_lower),
    "rows not negated": Mutant("crown_program", driver, "_begin", _after(lambda r: (dataclasses.replace(r[0], sign=jnp.abs(r[0].sign)), r[1]))),
    "rows mixed up": Mutant("crown_program", driver, "_collect", _after(lambda r: ((jnp.roll(r[0][0], 1), r[0][1]), r[1]))),
    "last rows forgotten": Mutant("chunks", driver.Run, "_chunks", lambda original: lambda *a: iter(list(original(*a))[:1])),
    "merged with the wrong end": Mutant("sound_everywhere", interval, "intersect", lambda _: lambda a, b: (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[0] / 2 + b[1] / 2))),
    "magnitude of the upper end": Mutant("rounding", interval, "magnitude", lambda _: lambda ends: jnp.abs(ends[1]) * 1e-3),
    "stable where it is not": Mutant("row_selection", scalar, "is_exact", _after(jnp.ones_like)),
    # forward
    "lower and upper functions exchanged": Mutant("forward", forward, "nonlinear_node", _swapped_pairs),
    "every leaf is the first": Mutant("forward", forward, "start", _after(lambda pairs: [dataclasses.replace(p, slopes=pairs[0].slopes) if p.slopes[0][0].shape == pairs[0].slopes[0][0].shape else dataclasses.replace(p, slopes=tuple((a + 1, b + 1) for a, b in p.slopes)) for p in pairs])),
    "lower function for negative rows": Mutant("forward", forward, "substitute", lambda original: lambda rows, pair, carry, leaves: original(rows, dataclasses.replace(pair, slopes=tuple((a, a) for a, _ in pair.slopes)), carry, leaves)),
    # scalar functions
    "kinks ignored": Mutant("scalar_lines", scalar, "_borders", _always(())),
    "searched bound too high": Mutant("scalar_lines", search, "minimize", _after(lambda found: (found[0], found[1] + 0.01))),
    "searched bound too low": Mutant("scalar_lines", search, "minimize", _after(lambda found: (found[0], found[1] - 0.01))),
    "intercepts exchanged": Mutant("scalar_lines", scalar, "intercepts", _after(lambda ends: ends[::-1])),
    "hull slopes exchanged": Mutant("scalar_lines", scalar, "hull_slopes", _after(lambda slopes: slopes[::-1])),
    "convex and concave exchanged": Mutant("scalar_lines", scalar, "curvature_of", _kinds_exchanged),
    "monotone where it is not": Mutant("scalar_lines", scalar, "curvature_of", _after(lambda c: dataclasses.replace(c, is_monotone=1))),
    "no rounding of evaluations": Mutant("evaluations", scalar, "_error", _after(jnp.zeros_like)),
    "derivatives trusted at switches": Mutant("switches", scalar, "_flattest", lambda _: scalar._derivative),
    # products and maxima
    "corners forgotten": Mutant("products", product, "_extreme", lambda original: lambda boxes, slopes, choose: jnp.stack([x * y - slopes[0] * x - slopes[1] * y for x, y in zip(*boxes, strict=True)]).mean(axis=0)),
    "corners of equal signs only": Mutant("products", product, "interval", lambda _: lambda op, inputs, c: (inputs[0][0] * inputs[1][0], inputs[0][1] * inputs[1][1])),
    "any entry taken for the largest": Mutant("maxima", maximum, "_first_largest", _after(lambda mask: jnp.roll(mask, 1, axis=-1))),
    "largest of the lower ends only": Mutant("maxima", maximum, "interval", _after(lambda ends: (ends[0], ends[0]))),
    # regions
    "norm taken for its dual": Mutant("regions", balls, "dual_exponent", lambda _: lambda norm: norm),
    "clip box ignored": Mutant("regions", regions, "minimum", lambda original: lambda region, slope: original(dataclasses.replace(region, clip=None) if isinstance(region, jb.LpBall) else region, slope)),
    "ends of boxes exchanged": Mutant("regions", regions, "_box_end", lambda original: lambda low, high, slope: original(high, low, slope)),
    "no outward rounding of boxes": Mutant("regions", regions, "_next", lambda _: lambda value, direction: value),
    "nothing is empty": Mutant("abnormal", regions, "is_empty", _always(jnp.array(False))),
    # patterns
    "any sum is the denominator": Mutant("patterns", patterns, "_same_axes", _always(True)),
    "any shift is harmless": Mutant("patterns", patterns, "_without_shift", lambda _: lambda value, axes: value.operands[0] if value.name == "sub" else value),
    "any factor makes a mean": Mutant("patterns", patterns, "_mean_of", lambda _: lambda operand: (operand.operands[0].operands[0], tuple(operand.operands[0].params["axes"])) if getattr(operand, "name", "") in ("div", "mul") and getattr(operand.operands[0], "name", "") == "reduce_sum" else None),
    "maximum as minimum": Mutant("patterns", patterns._PARTS, "max", lambda _: lambda x, y: x - jax.nn.relu(x - y)),
    "quotient as product": Mutant("patterns", patterns._PARTS, "div", lambda _: lambda x, y: x * y),
    "pools padded with zeros": Mutant("patterns", patterns._MATCHES, "reduce_window_max", _padded_with_zeros),
    "minimum without a sign": Mutant("patterns", patterns._MATCHES, "reduce_min", lambda _: lambda params, operands: (lambda x: jnp.max(x, axis=params["axes"]), operands)),
    # batches and specifications
    "examples in another order": Mutant("batches", regions, "per_example", _after(lambda region: jax.tree.map(lambda a: jnp.flip(a, 0), region))),
    "specification of the wrong sign": Mutant("interval_program", network.Specified, "__call__", lambda original: lambda self, v, x, spec: -original(self, v, x, spec)),
}  # fmt: skip


@pytest.fixture
def _fresh():
    """No graph or program of before, and nothing compiled that a fault could hide behind."""

    def clear():
        transform._STRUCTURES.entries.clear()
        transform._compiled.cache_clear()
        driver._compiled.cache_clear()
        graph._shared.cache_clear()

    clear()
    with jax.enable_x64(True), jax.disable_jit():
        yield
    clear()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_without_a_fault(name):
    CHECKS[name]()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", MUTANTS)
def test_faults_are_found(name, monkeypatch):
    mutant = MUTANTS[name]
    if isinstance(mutant.owner, dict):
        monkeypatch.setitem(mutant.owner, mutant.name, mutant.change(mutant.owner[mutant.name]))
    else:
        monkeypatch.setattr(mutant.owner, mutant.name, mutant.change(getattr(mutant.owner, mutant.name)))
    with pytest.raises(AssertionError):
        CHECKS[mutant.check]()


def test_there_are_enough_faults_and_every_check_finds_some():
    assert len(MUTANTS) >= 30
    assert {mutant.check for mutant in MUTANTS.values()} == set(CHECKS)
