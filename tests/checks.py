"""Fast deterministic checks that a planted fault must fail (`test_mutations`): all pass without a fault.

Equality with linear programs and closed forms, dense lines, values at points.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles

import jaxbound as jb
from jaxbound import regions
from jaxbound.graph import tracing
from jaxbound.relaxations.enclosures import maximum, product, scalar
from jaxbound.relaxations.slopes import ADAPTIVE, Given

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
    found = jb.ibp(
        [(_W1, _B1), (_W2, _B2)],
        jb.Box(jnp.asarray(_LOW)[None], jnp.asarray(_HIGH)[None]),
        spec=spec,
        activation="relu",
    )
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
        given = scalar.planes(op, ends, [], Given(jnp.asarray(slopes), jnp.asarray(slopes)))
        own = scalar.planes(op, ends, [])
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
        planes = product.planes(op, ends, [], Given(*given) if given else ADAPTIVE)
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
    planes = maximum.planes(op, [(low, high)], [])
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
    planes = scalar.planes(op, [(low, low + 1)], [])
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


def check_windows():
    """Convolutions with strides, padding and two ways through, against their matrix."""
    rng = np.random.default_rng(5)
    first, second, skip = (rng.integers(-3, 4, shape) * 1.0 for shape in ((3, 2, 3), (3, 3, 2), (1, 2, 2)))
    scale = rng.integers(1, 4, (20, 2)) * 1.0

    def conv(x, kernel, stride, padding):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,), (padding,), dimension_numbers=("NWC", "WIO", "NWC"), precision="highest"
        )

    def function(x):
        return conv(conv(x * scale, first, 2, (1, 1)), second, 1, (1, 1)) + conv(x, skip, 2, (0, 0))

    x = jnp.zeros((1, 20, 2))
    planes = jb.linear_bounds(function, jb.Crown())(jb.Box(x - 1, x + 1))
    expected = jax.jacobian(function)(x)
    assert np.allclose(jax.tree.leaves(planes.lower_slope)[0], expected)
    assert np.allclose(jax.tree.leaves(planes.upper_slope)[0], expected)


def check_batches():
    """Every example of a batch is bounded over its own ball, by its own specification."""
    x, eps = np.array([[0.5, -1.0], [0.0, 0.25], [4.0, 2.0]]), np.array([0.25, 0.5, 0.0])
    spec = np.array([[[1.0, -1.0]], [[0.5, 2.0]], [[-1.0, 0.5]]])
    found = jb.crown(
        [(_W1, _B1), (_W2, _B2)], jnp.asarray(x), jnp.asarray(eps), spec=jnp.asarray(spec), activation="relu"
    )
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
    expected = jb.crown(layers, x, 0.25, activation="relu")
    _equal(jb.crown(layers, x, 0.25, memory_limit=1, activation="relu"), expected.lower, expected.upper)


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
    point, weights = jnp.full(3, 1.7e308), jnp.array([1.0, 1.0, -1.9])
    overflown = jb.bound(lambda x: x @ weights, jb.IBP())(jb.Box(point, point))
    assert overflown.lower <= 1.7e307 <= overflown.upper
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


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}
