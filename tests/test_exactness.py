"""Where theory says what a bound is: values derived by hand, linear and integer programs, orderings and invariances."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import oracles
import pytest

import jaxbound as jb

pytestmark = pytest.mark.x64

METHODS = {
    "IBP": jb.IBP(),
    "Forward": jb.Forward(),
    "CrownIBP": jb.CrownIBP(),
    "Crown": jb.Crown(),
    "FastLin": jb.FastLin(),
    "Best": jb.Best(jb.IBP(), jb.Forward()),
}


def _close(interval, lower, upper, tolerance=1e-9):
    assert np.allclose(interval.lower, lower, rtol=tolerance, atol=tolerance), (interval.lower, lower)
    assert np.allclose(interval.upper, upper, rtol=tolerance, atol=tolerance), (interval.upper, upper)


def _same(first, second, tolerance=1e-9):
    _close(first, second.lower, second.upper, tolerance)


# --- by hand ------------------------------------------------------------------------------------------------------------

_BOX = -np.ones(2), np.ones(2)


def _tent(x):
    """y = relu(x1 + x2) - relu(x1 - x2)."""
    z = jnp.array([[1.0, 1.0], [1.0, -1.0]]) @ x
    return jax.nn.relu(z) @ jnp.array([1.0, -1.0])


def test_tent_by_hand():
    box = jb.Box(*map(jnp.asarray, _BOX))
    # both z in [-2, 2], both relus in [0, 2]: [0, 2] - [0, 2]
    _close(jb.bound(_tent, jb.IBP())(box), -2, 2)
    # Upper line of each relu: the chord z/2 + 1. Parallel lower line: z/2.
    # y <= (z1/2 + 1) - z2/2 = x2 + 1 <= 2; y >= z1/2 - (z2/2 + 1) = x2 - 1 >= -2.
    _close(jb.bound(_tent, jb.FastLin())(box), -2, 2)
    # "zero": y <= (z1/2 + 1) - 0 = (x1 + x2)/2 + 1 <= 2; y >= 0 - (z2/2 + 1) = -(x1 - x2)/2 - 1 >= -2.
    planes = jb.linear_bounds(_tent, jb.Crown(lower_slope="zero"))(box)
    assert np.allclose(planes.upper_slope[0], [0.5, 0.5])
    assert np.allclose(planes.upper_intercept, 1)
    assert np.allclose(planes.lower_slope[0], [-0.5, 0.5])
    assert np.allclose(planes.lower_intercept, -1)
    # "one": y <= (z1/2 + 1) - z2 = -x1/2 + 3 x2/2 + 1 <= 3, which the interval [-2, 2] then cuts.
    planes = jb.linear_bounds(_tent, jb.Crown(lower_slope="one"))(box)
    assert np.allclose(planes.upper_slope[0], [-0.5, 1.5])
    _close(jb.bound(_tent, jb.Crown(lower_slope="one", intersect=False))(box), -3, 3)
    _close(jb.bound(_tent, jb.Crown(lower_slope="one"))(box), -2, 2)


def _stairs(x):
    """h1 = relu(2 x - 1), h2 = relu(h1 - x), y = h2 - h1 / 2, on one number; arrays, as literals would be fused."""
    first = jax.nn.relu(jnp.array([2.0]) * x - jnp.array([1.0]))
    return jax.nn.relu(first - x) - first / 2


def test_stairs_by_hand():
    box = jb.Box(jnp.zeros(1), jnp.full(1, 2.0))
    # IBP: 2x - 1 in [-1, 3], h1 in [0, 3], h1 - x in [-2, 3], h2 in [0, 3], y in [0 - 3/2, 3 - 0].
    _close(jb.bound(_stairs, jb.IBP())(box), [-1.5], [3.0])
    # CROWN: h1 >= 2x - 1 (as 3 > 1) and h1 <= 3/4 (2x - 1) + 3/4 = 3x/2.
    # t = h1 - x: t >= x - 1 >= -1; t <= x/2 <= 1. (Exact: the true range is [-1/2, 1].)
    found = list(jb.pre_activation_bounds(_stairs, jb.Crown(intersect=False))(box).values())
    _close(found[0], [-1.0], [3.0])
    _close(found[1], [-1.0], [1.0])
    # h2: u = -l, so the lower slope may be 0 or 1; above: t/2 + 1/2.
    # y <= (h1 - x)/2 + 1/2 - h1/2 = 1/2 - x/2 <= 1/2: the two h1 cancel.
    upper = jb.bound(_stairs, jb.Crown(intersect=False))(box).upper
    assert np.allclose(upper, 0.5)
    # "zero": y >= 0 - h1/2 >= -3x/4 >= -3/2.
    # lower slope "zero" also takes h1 >= 0, so t >= -x >= -2 and h2 <= (t + 2)/3; y <= h1/3 - x/3 + 2/3 - h1/2
    # = -h1/6 - x/3 + 2/3 <= 2/3.
    found = jb.bound(_stairs, jb.Crown(lower_slope="zero", intersect=False))(box)
    _close(found, [-1.5], [2 / 3])


def test_forward_by_hand():
    """Forward bounds do not see that h1 cancels: each value keeps a pair of functions of x.

    h1 in [2x - 1, 3x/2]; t = h1 - x in [x - 1, x/2] with interval [-1, 1]; h2 <= t/2 + 1/2 <= x/4 + 1/2;
    y = h2 - h1/2 <= x/4 + 1/2 - (2x - 1)/2 = 1 - 3x/4 <= 1.
    """
    planes = jb.linear_bounds(_stairs, jb.Forward())(jb.Box(jnp.zeros(1), jnp.full(1, 2.0)))
    assert np.allclose(planes.upper_slope[0], -0.75)
    assert np.allclose(planes.upper_intercept, 1.0)


@pytest.mark.parametrize(
    ("norm", "reach"), [(1, 3.0), (2, np.sqrt(14.0)), (np.inf, 6.0), (3, (1 + 2**1.5 + 3**1.5) ** (2 / 3))]
)
@pytest.mark.parametrize("method", METHODS)
def test_affine_functions_are_exact_in_every_norm(method, norm, reach):
    # 2 + x1 - 2 x2 + 3 x3 around (1, 1, 1) with radius 1/2: 4 +- the dual norm of (1, -2, 3) halved
    function = lambda x: jnp.array([[1.0, -2.0, 3.0]]) @ x + 2  # noqa: E731
    found = jb.bound(function, METHODS[method])(jb.LpBall(jnp.ones(3), 0.5, norm))
    _close(found, [4 - reach / 2], [4 + reach / 2])


@pytest.mark.parametrize("method", METHODS)
def test_affine_chains_and_skips_are_exact(method):
    network = networks.NETWORKS["affine"]
    weights = np.asarray(network.params["w"], float)
    matrix, center = 3.5 * weights - 1 / 7, np.array([0.5, -1.0, 2.0, 0.25])
    for norm, dual in ((1, np.inf), (2, 2), (np.inf, 1)):
        arguments = network.arguments([jb.LpBall(jnp.asarray(center), 0.75, norm)], jnp.float64)
        reach = 0.75 * np.linalg.norm(matrix, dual, axis=1)
        _close(
            jb.bound(network.function, METHODS[method])(*arguments), matrix @ center - reach, matrix @ center + reach
        )


# --- programs -------------------------------------------------------------------------------------------------------------


def _layers(seed: int, *widths: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(a, b)), rng.normal(size=b) * 0.5) for a, b in itertools.pairwise(widths)]


def _network(layers, x):
    for number, (kernel, bias) in enumerate(layers):
        x = (jax.nn.relu(x) if number else x) @ kernel + bias
    return x


def _lines(low: np.ndarray, high: np.ndarray) -> tuple:
    """CROWN's lines of ReLU: below with slope 1 where u > -l, else 0; above the chord."""
    stable, dead = low >= 0, high <= 0
    open_ = ~stable & ~dead
    below = np.where(stable, 1.0, np.where(open_ & (high > -low), 1.0, 0.0))
    chord = high / np.where(open_, high - low, 1)
    above = np.where(stable, 1.0, np.where(dead, 0.0, chord))
    return below, np.zeros_like(low), above, np.where(open_, -chord * low, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_crown_equals_the_linear_program_of_its_lines(seed):
    layers = _layers(seed, 3, 5, 4, 2)
    low, high = -0.6 * np.ones(3), 0.4 * np.ones(3)
    method, box = jb.Crown(intersect=False), jb.Box(jnp.asarray(low), jnp.asarray(high))
    found = list(jb.pre_activation_bounds(_network, method)(layers, box).values())
    lines = []
    for k, interval in enumerate(found):
        # each layer's own bounds are the program's optimum over the layers before it
        _close(interval, *oracles.relu_linear_program(layers[: k + 1], low, high, lines), tolerance=1e-7)
        lines.append(_lines(np.asarray(interval.lower), np.asarray(interval.upper)))
    expected = oracles.relu_linear_program(layers, low, high, lines)
    _close(jb.bound(_network, method)(layers, box), *expected, tolerance=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_every_bound_contains_the_exact_range_and_is_near_it_on_small_boxes(seed):
    layers = _layers(10 + seed, 3, 6, 5, 2)
    for radius in (1.0, 0.02):
        low, high = 0.3 - radius * np.ones(3), 0.3 + radius * np.ones(3)
        least, most = oracles.relu_exact(layers, low, high)
        points = np.random.default_rng(0).uniform(low, high, (4000, 3))
        values = oracles.relu_value(layers, points)
        assert np.all(least <= values.min(axis=0) + 1e-6)
        assert np.all(most >= values.max(axis=0) - 1e-6)
        assert np.all(values.max(axis=0) - values.min(axis=0) >= 0.5 * (most - least))
        for name, method in METHODS.items():
            found = jb.bound(_network, method)(layers, jb.Box(jnp.asarray(low), jnp.asarray(high)))
            assert np.all(found.lower <= least + 1e-6), name
            assert np.all(found.upper >= most - 1e-6), name
            if radius < 0.1 and name in ("Crown", "CrownIBP", "FastLin"):
                assert np.all(np.asarray(found.width) <= 1.5 * (most - least) + 1e-6), name


def test_one_layer_of_relus_in_one_dimension_is_the_convex_hull():
    """For a single ReLU, upper lines are its hull: max over the interval of the chord is the exact maximum."""
    layers = [(np.array([[2.0]]), np.array([-1.0])), (np.array([[3.0]]), np.array([0.5]))]
    box = jb.Box(jnp.array([-1.0]), jnp.array([2.0]))
    least, most = oracles.relu_exact(layers, np.array([-1.0]), np.array([2.0]))
    _close(jb.bound(_network, jb.Crown())(layers, box), least, most, tolerance=1e-6)


# --- limits and orderings -------------------------------------------------------------------------------------------------

POINTWISE = [
    "mlp_relu",
    "mlp_mixed",
    "prelu",
    "max_min",
    "softmax",
    "residual_batchnorm",
    "max_pool_overlap",
    "split_min",
]


@functools.cache
def _at_a_point(name: str):
    network = networks.NETWORKS[name]
    rng = np.random.default_rng(5)
    leaves = [jnp.asarray(rng.normal(size=shape)) for shape in network.shapes]
    arguments = network.arguments(leaves, jnp.float64)
    return network, leaves, jax.tree.leaves(network.function(*arguments))


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=pytest.mark.slow if (turn + k) % 2 else [])
        for turn, name in enumerate(POINTWISE)
        for k, method in enumerate(("IBP", "Crown"))
    ],
)
def test_radius_zero_gives_the_value(name, method):
    network, leaves, values = _at_a_point(name)
    found = jb.bound(network.function, METHODS[method])(*network.arguments([jb.Box(x, x) for x in leaves], jnp.float64))
    intervals = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, jb.Interval))
    for interval, value in zip(intervals, values, strict=True):
        _close(interval, value, value)


def test_small_radii_give_first_order_widths():
    """As the radius falls, the width of CROWN's bound over it tends to twice the dual norm of the gradient."""
    network, (x,), _ = _at_a_point("mlp_mixed")
    params, _ = network.arguments([x], jnp.float64)
    slopes = np.abs(jax.jacrev(lambda z: network.function(params, z))(x)).sum(axis=1)
    width = jb.bound(network.function, jb.Crown())(params, jb.LpBall(x, 1e-5, jnp.inf)).width
    assert np.allclose(width, 2e-5 * slopes, rtol=1e-3)


@pytest.mark.parametrize("name", ["mlp_mixed", "softmax", "max_pool_overlap", "layer_norm"])
def test_interval_bounds_grow_with_the_region(name):
    """True of interval propagation only: adaptive slopes may gain from a larger region."""
    network, leaves, _ = _at_a_point(name)
    bounded = jb.bound(network.function, jb.IBP())
    before = None
    for radius in (0.0, 0.01, 0.1, 0.5, 2.0):
        regions = [jb.Box(x - radius, x + radius) for x in leaves]
        found = bounded(*network.arguments(regions, jnp.float64))
        if before is not None:
            assert np.all(found.lower <= before.lower + 1e-12)
            assert np.all(found.upper >= before.upper - 1e-12)
        before = found


def test_a_margin_is_bounded_as_one_specification():
    """Composed with the last layer, a difference of logits is tighter than the difference of their bounds."""
    layers = _layers(20, 4, 6, 3)
    spec = jnp.array([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
    box = jb.Box(-0.2 * jnp.ones(4), 0.3 * jnp.ones(4))
    merged = jb.bound(lambda layers, x: spec @ _network(layers, x), jb.IBP())(layers, box)
    logits = jb.bound(_network, jb.IBP())(layers, box)
    apart = logits.lower[0] - logits.upper[1:], logits.upper[0] - logits.lower[1:]
    assert np.all(merged.lower >= apart[0] - 1e-12)
    assert np.all(merged.upper <= apart[1] + 1e-12)
    assert np.any(merged.lower > apart[0] + 1e-2)
    # exactly the interval of the last hidden layer through the composed matrix
    kernel, bias = layers[0]
    low = np.maximum(kernel, 0).T @ box.lower + np.minimum(kernel, 0).T @ box.upper + bias
    high = np.maximum(kernel, 0).T @ box.upper + np.minimum(kernel, 0).T @ box.lower + bias
    low, high = np.maximum(low, 0), np.maximum(high, 0)
    matrix, shift = np.asarray(spec) @ layers[1][0].T, np.asarray(spec) @ layers[1][1]
    positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
    _close(merged, positive @ low + negative @ high + shift, positive @ high + negative @ low + shift)


@pytest.mark.parametrize("name", ["mlp_relu", "mlp_mixed"])
def test_crown_over_interval_bounds_is_crown_ibp(name):
    network, leaves, _ = _at_a_point(name)
    arguments = network.arguments([jb.LpBall(leaves[0], 0.3, 2)], jnp.float64)
    first = jb.bound(network.function, jb.Crown(pre_activation=jb.IBP()))(*arguments)
    _same(first, jb.bound(network.function, jb.CrownIBP())(*arguments), 0)


def test_given_slopes_reproduce_and_change_the_bounds():
    layers = _layers(30, 3, 5, 2)
    box = jb.Box(-jnp.ones(3), jnp.ones(3))
    (name,), (interval,) = zip(*jb.pre_activation_bounds(_network, jb.Crown())(layers, box).items(), strict=True)
    below, _, above, _ = _lines(np.asarray(interval.lower), np.asarray(interval.upper))
    same = jb.Crown(slopes={name: (jnp.asarray(below), jnp.asarray(above))})
    _same(jb.bound(_network, same)(layers, box), jb.bound(_network, jb.Crown())(layers, box))
    zeros = jb.Crown(slopes={name: (jnp.zeros(5), jnp.asarray(above))}, intersect=False)
    expected = oracles.relu_linear_program(
        layers, -np.ones(3), np.ones(3), [(np.zeros(5), np.zeros(5), above, _lines(interval.lower, interval.upper)[3])]
    )
    _close(jb.bound(_network, zeros)(layers, box), *expected, tolerance=1e-7)


# --- invariances ------------------------------------------------------------------------------------------------------------

INVARIANT = {"IBP": jb.IBP(), "Forward": jb.Forward(), "Crown": jb.Crown(), "FastLin": jb.FastLin()}


def _reference(method):
    layers = _layers(40, 3, 5, 4, 2)
    box = jb.Box(jnp.array([-0.5, 0.1, -1.0]), jnp.array([0.5, 0.9, -0.2]))
    return layers, box, jb.bound(_network, INVARIANT[method])(layers, box)


@pytest.mark.parametrize("method", INVARIANT)
def test_permuting_neurons_changes_nothing(method):
    layers, box, expected = _reference(method)
    order = np.array([3, 0, 4, 1, 2])
    (w1, b1), (w2, b2), last = layers
    _same(jb.bound(_network, INVARIANT[method])([(w1[:, order], b1[order]), (w2[order], b2), last], box), expected)


@pytest.mark.parametrize("method", INVARIANT)
def test_rescaling_through_relu_changes_nothing(method):
    layers, box, expected = _reference(method)
    scale = np.array([0.5, 2.0, 8.0, 1.0, 0.3])
    (w1, b1), (w2, b2), last = layers
    _same(
        jb.bound(_network, INVARIANT[method])([(w1 * scale, b1 * scale), (w2 / scale[:, None], b2), last], box),
        expected,
    )


@pytest.mark.parametrize("method", INVARIANT)
def test_reshapes_and_jit_inside_change_nothing(method):
    layers, box, expected = _reference(method)

    def reshaped(layers, x):
        (w1, b1), *rest = layers
        hidden = jax.jit(lambda v: (v.reshape(3, 1).T @ w1 + b1).reshape(5, 1, 1))(x)
        hidden = jnp.squeeze(hidden.transpose(1, 0, 2), (0, 2))
        return jax.checkpoint(lambda v: _network([(np.eye(5), np.zeros(5)), *rest], v))(hidden)

    _same(jb.bound(reshaped, INVARIANT[method])(layers, box), expected)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("method", "name"), [*((method, "layers") for method in INVARIANT), ("Crown", "mlp_mixed")])
def test_jit_outside_changes_nothing(method, name):
    """The eager driver skips rows whose relaxation is exact; under `jit` it cannot."""
    if name == "layers":
        layers, box, expected = _reference(method)
        bounded = jb.bound(_network, INVARIANT[method])
        arguments = (layers, box)
    else:
        network, leaves, _ = _at_a_point(name)
        arguments = network.arguments([jb.Box(leaves[0] - 0.25, leaves[0] + 0.5)], jnp.float64)
        bounded = jb.bound(network.function, INVARIANT[method])
        expected = bounded(*arguments)
    _same(jax.jit(bounded)(*arguments), expected)


def test_batches_are_loops():
    """`vmap` over examples, constants that differ per example included, is a loop."""
    layers = _layers(50, 3, 4, 2)
    rng = np.random.default_rng(1)
    centers, scales = rng.normal(size=(3, 3)), rng.uniform(0.5, 2, 3)

    def one(center, scale):
        scaled = [(kernel * scale, bias) for kernel, bias in layers]
        return jb.bound(_network, jb.Crown())(scaled, jb.LpBall(center, 0.2, 2))

    together = jax.vmap(one)(jnp.asarray(centers), jnp.asarray(scales))
    for k in range(3):
        alone = one(jnp.asarray(centers[k]), jnp.asarray(scales[k]))
        _close(alone, together.lower[k], together.upper[k])


def test_flax_level_batches_are_loops():
    layers = _layers(51, 3, 4, 2)
    params = [{"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)} for kernel, bias in layers]
    x, eps = np.random.default_rng(2).normal(size=(3, 3)), np.array([0.1, 0.0, 0.4])
    spec = np.random.default_rng(3).normal(size=(3, 2, 2))
    for norm in (1, 2, np.inf):
        found = jb.crown(params, jnp.asarray(x), jnp.asarray(eps), norm=norm, spec=jnp.asarray(spec), activation="relu")
        for k in range(3):
            alone = jb.bound(lambda layers, x, s=spec[k]: s @ _network(layers, x), jb.Crown())(
                layers, jb.LpBall(jnp.asarray(x[k]), eps[k], norm)
            )
            _close(alone, found.lower[k], found.upper[k])


def test_row_chunks_change_nothing():
    """A small memory limit cuts a pass into chunks of rows."""
    layers = _layers(52, 3, 24, 12, 4)
    params = [{"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)} for kernel, bias in layers]
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3)))
    expected = jb.crown(params, x, 0.3, activation="relu")
    _same(jb.crown(params, x, 0.3, memory_limit=1, activation="relu"), expected)
    _same(
        jax.jit(lambda x: jb.crown_ibp(params, x, 0.3, memory_limit=1, activation="relu"))(x),
        jb.crown_ibp(params, x, 0.3, activation="relu"),
    )


def test_lower_sides_are_the_lower_bounds():
    layers = _layers(53, 3, 6, 4)
    params = [{"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)} for kernel, bias in layers]
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3)))
    for function in (jb.ibp, jb.forward, jb.crown):
        both, lower = (
            function(params, x, 0.3, activation="relu"),
            function(params, x, 0.3, sides="lower", activation="relu"),
        )
        assert lower.upper is None
        assert np.allclose(lower.lower, both.lower, atol=1e-12), function.__name__
