"""FROWN: what may be tuned is sound everywhere, tuned bounds are never looser than CROWN's, rows and images are apart."""

from __future__ import annotations

import functools
import itertools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import ACTIVATIONS, NETWORKS

import jaxbound as jb
from jaxbound import errors
from jaxbound.driver import steps
from jaxbound.graph import operations
from jaxbound.methods import ascent
from jaxbound.relaxations import enclosures
from jaxbound.relaxations.planes import between, spread, times
from jaxbound.relaxations.slopes import Given

COUNT, SAMPLES = 200, 200


# --- the tables from which slopes are chosen --------------------------------------------------------------------------


def _nodes(dtype) -> dict:
    """One node of every kind: op, its function in NumPy, its inputs."""
    rng = np.random.default_rng(0)
    kinds = {
        "product": (lambda x, y: x * y, [(COUNT,)] * 2, lambda x, y: x * y),
        "maximum": (lambda x: jnp.max(x, axis=1), [(COUNT, 3)], lambda x: x.max(axis=2)),
        "logsumexp": (
            lambda x: jax.nn.logsumexp(x, axis=1), [(COUNT, 3)], lambda x: np.logaddexp.reduce(x, axis=2),
        ),
        "sort": (lambda x: jnp.sort(x, axis=1), [(COUNT, 3)], lambda x: np.sort(x, axis=2)),
        "staircase": (jnp.floor, [(COUNT,)], np.floor),
    }  # fmt: skip
    made = {}
    for kind, (function, shapes, reference) in kinds.items():
        inputs = [dense.boxes(rng, shape, dtype) for shape in shapes]
        made[kind] = dense.node(function, shapes, dtype, kind), reference, inputs
    cases = [dense.boxes(rng, (COUNT,), dtype) for _ in range(2)]
    share = tuple(np.sort(rng.choice([0.0, 0.0, 1.0, 0.5], (2, COUNT)), axis=0).astype(dtype))
    choice = lambda s, a, b: (1 - s) * a + s * b  # noqa: E731
    made["select"] = dense.node(operations.select, [(COUNT,)] * 3, dtype, "select"), choice, [share, *cases]
    for name in ("relu", "leaky_relu_negative", "hard_tanh", "sigmoid", "gelu", "softplus", "sin", "square"):
        scalar, (low, high) = ACTIVATIONS[name], dense.boxes(rng, (COUNT,), dtype)
        ends = np.clip(low, scalar.low, scalar.high), np.clip(high, scalar.low, scalar.high)
        made[name] = dense.node(scalar.function, [(COUNT,)], dtype, "scalar"), scalar.reference, [ends]
    return made


@pytest.mark.quick(6)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)])
@pytest.mark.parametrize("kind", [*_nodes(np.float32)])
def test_every_place_in_a_table_is_sound(kind, dtype):
    """Averages of neighbours, as tuning uses them, and planes with the slopes that it returns."""
    rng = np.random.default_rng(1)
    op, function, inputs = _nodes(dtype)[kind]
    inputs = [tuple(map(jnp.asarray, ends)) for ends in inputs]
    at = [dense.points(rng, tuple(map(np.asarray, ends)), SAMPLES) for ends in inputs]
    node = op, (), ()
    table, freedom = jax.jit(lambda inputs: ascent.table_of(node, (), inputs))(inputs)
    values = function(*at)
    size = 1 + np.abs(values) + sum(np.abs(x).reshape(*values.shape, -1).max(-1) ** len(at) for x in at)
    allowed = {np.float32: 1e-6, np.float64: 1e-14}[dtype] * size
    exact = jax.jit(lambda inputs, given: enclosures.of(op).planes(op, inputs, (), Given(*given)))
    for share in (0.0, 1.0, 0.5, None, None):
        shares = tuple(
            None if own is None
            else jnp.asarray(rng.random(op.shape) if share is None else np.full(op.shape, share), dtype)
            for own in freedom.shares
        )  # fmt: skip
        given = tuple(between(side, share) for side, share in zip(freedom.slopes, shares, strict=True))
        for planes in (ascent.mixed(op, table, shares), exact(inputs, given)):
            assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(planes))
            below, above = dense.heights(op, planes, at)
            assert np.all(below <= values + allowed), float((below - values - allowed).max())
            assert np.all(above >= values - allowed), float((values - above - allowed).max())


@pytest.mark.quick(4)
@pytest.mark.x64
@pytest.mark.parametrize("kind", [*_nodes(np.float32)])
def test_the_default_is_in_its_table(kind):
    """Scalars: up to where between two lines of the table their average lies."""
    op, _, inputs = _nodes(np.float64)[kind]
    inputs = [tuple(map(jnp.asarray, ends)) for ends in inputs]
    own = jax.jit(lambda inputs: enclosures.of(op).planes(op, inputs, ()))(inputs)
    table, freedom = jax.jit(lambda inputs: ascent.table_of((op, (), ()), (), inputs))(inputs)
    shares = jax.tree.leaves(freedom.shares)
    assert all(np.all((share >= -1e-12) & (share <= 1 + 1e-12)) for share in shares)
    assert len(shares) == {"sort": 0, "relu": 1, "leaky_relu_negative": 1, "softplus": 1, "square": 1}.get(kind, 2)
    found = jax.jit(lambda table, shares: ascent.mixed(op, table, shares))(table, freedom.shares)
    for ours, theirs in zip(found.lower_slopes, own.lower_slopes, strict=True):
        steepest = jnp.max(jnp.abs(jnp.asarray(table.lower_slopes)))
        assert np.allclose(ours, theirs, atol=1e-9 if len(table.lower_intercept) < 4 else 0.02 * steepest)
    if op.kind not in ("scalar", "logsumexp"):
        for ours, theirs in zip(found.upper_slopes, own.upper_slopes, strict=True):
            assert np.allclose(ours, theirs, atol=1e-9)


def test_between_averages_neighbours():
    table = jnp.array([[0.0], [1.0], [4.0]])
    found = [float(between(table, jnp.array([share]))[0]) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == [0.0, 0.5, 1.0, 2.5, 4.0]
    assert between(jnp.array([[3.0]]), jnp.array([0.7])) == between(jnp.array([3.0]), None) == 3.0


def test_groups_share_on_each_side():
    assert spread(jnp.arange(4), 2, 5).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert spread(jnp.arange(2), 1, 2).tolist() == [0, 1]


def test_a_slope_of_zero_has_a_derivative():
    """What is behind a line of slope 0 is multiplied by 0, and yet its bound moves with the slope."""
    assert jax.grad(times)(0.0, 3.0) == 3.0
    for value in (np.inf, -np.inf, np.nan):
        assert times(0.0, jnp.asarray(value)) == 0 and jax.grad(times)(0.0, value) == 0


# --- bounds -----------------------------------------------------------------------------------------------------------


def _regions(network, dtype, norm, radius=0.2):
    rng = np.random.default_rng(5)
    centers = [jnp.asarray(rng.normal(size=shape) * 0.5, dtype) for shape in network.shapes]
    if norm is None:
        return [jb.Box(c - radius, c + radius) for c in centers]
    return [jb.LpBall(c, radius * (1 if norm == np.inf else 2), norm) for c in centers]


TUNED = [name for name, network in NETWORKS.items() if not network.slow]


@pytest.mark.x64
@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, 1, 2])
@pytest.mark.parametrize("name", [*NETWORKS])
def test_never_looser_than_crown_and_sound(name, norm):
    _check_network(name, norm)


@pytest.mark.quick(3)
@pytest.mark.x64
@pytest.mark.parametrize(
    ("name", "norm"), [*[(name, [None, 1, 2][k % 3]) for k, name in enumerate(TUNED)][::16], ("prelu", None)]
)
def test_some_networks_are_never_looser_than_crown_and_sound(name, norm):
    _check_network(name, norm)


def _check_network(name, norm):
    network = NETWORKS[name]
    leaves = _regions(network, jnp.float64, norm)
    arguments = network.arguments(leaves, jnp.float64)
    plain = jb.bound(network.function, jb.Crown())(*arguments)
    tuned = jb.bound(network.function, jb.Frown(steps=4))(*arguments)
    rng = np.random.default_rng(0)
    for ours, theirs in zip(jax.tree.leaves(tuned), jax.tree.leaves(plain), strict=True):
        assert ours.shape == theirs.shape
    is_interval = lambda leaf: isinstance(leaf, jb.Interval)  # noqa: E731
    pairs = zip(jax.tree.leaves(tuned, is_leaf=is_interval), jax.tree.leaves(plain, is_leaf=is_interval), strict=True)
    for ours, theirs in pairs:
        assert np.all(ours.lower >= theirs.lower)
        assert np.all(ours.upper <= theirs.upper)
    evaluate = jax.jit(lambda *points: network.function(*network.arguments(points, jnp.float64)))
    for _ in range(200):
        points = []
        for leaf in leaves:
            step = rng.normal(size=np.shape(leaf.lower if norm is None else leaf.center))
            if norm is None:
                points.append(
                    jnp.clip(
                        leaf.lower + (leaf.upper - leaf.lower) * rng.random(step.shape).round(1), leaf.lower, leaf.upper
                    )
                )
            else:
                points.append(leaf.center + leaf.radius * step / np.linalg.norm(step.ravel(), norm))
        values = jax.tree.leaves(evaluate(*points))
        for value, found in zip(values, jax.tree.leaves(tuned, is_leaf=is_interval), strict=True):
            slack = 1e-9 * (1 + np.abs(value))
            assert np.all((found.lower <= value + slack) & (value <= found.upper + slack))


def _mlp(dtype=jnp.float32, widths=(6, 12, 10, 5), activations=(jnp.tanh, jax.nn.relu)):
    """A small network, and a box off the origin."""
    rng = np.random.default_rng(3)
    shapes = itertools.pairwise(widths)
    weights = [jnp.asarray(rng.normal(size=shape) * 1.5 / np.sqrt(shape[0]), dtype) for shape in shapes]

    def function(x):
        for weight, activation in zip(weights, (*activations, lambda x: x), strict=True):
            x = activation(x @ weight)
        return x

    center = jnp.asarray(rng.normal(size=widths[0]), dtype)
    return function, jb.Box(center - 0.4, center + 0.4)


@pytest.mark.slow
def test_tuning_gains_and_more_so_with_tuned_inputs():
    function, box = _mlp()
    widths = [
        float(jb.bound(function, method)(box).width.mean())
        for method in (jb.Frown(), jb.Frown(pre_activation=jb.Crown()), jb.Crown())
    ]
    assert widths[0] < 0.97 * widths[1] < 0.97**2 * widths[2]


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["relu", "product"])
def test_rows_tune_the_windows_that_they_read(kind, monkeypatch):
    """Shares of windows find what shares of whole values find."""
    rng = np.random.default_rng(3)
    shapes = (2, 1, 3, 3), (2, 1, 3, 3), (2, 2, 2, 2), (2, 2, 3, 3)
    kernels = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def convolved(x, kernel, stride):
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME")

    def fn(x):
        first = convolved(x, kernels[0], 2)
        if kind == "relu":
            return convolved(jax.nn.relu(first), kernels[3], 2)
        second = convolved(jnp.tanh(first) * jax.nn.sigmoid(convolved(x, kernels[1], 2)), kernels[2], 1)
        return convolved(jax.nn.relu(second), kernels[3], 2)

    x = jnp.asarray(rng.random((1, 1, 14, 14)), jnp.float32)
    found, box = [], jb.Box(x - 0.1, x + 0.1)
    windows = ascent._Problem._windows

    def counted(problem, tables):
        found.append(windows(problem, tables))
        return found[-1]

    def tuned():
        return jax.jit(jb.tune(fn, jb.Frown(steps=4, pre_activation=jb.IBP())))(box)

    monkeypatch.setattr(ascent._Problem, "_windows", counted)
    bounds, slopes = tuned()
    assert max(map(len, found)) == {"relu": 1, "product": 4}[kind]
    monkeypatch.setattr(ascent._Problem, "_windows", lambda problem, tables: {})
    wanted, wanted_slopes = tuned()
    np.testing.assert_allclose(bounds.lower, wanted.lower, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bounds.upper, wanted.upper, rtol=1e-4, atol=1e-4)
    same = jax.tree.map(lambda one, other: np.mean(np.abs(one - other) < 1e-3), slopes, wanted_slopes)
    assert min(jax.tree.leaves(same)) > 0.99


@pytest.mark.x64
def test_more_steps_never_lose():
    """Every row keeps its best; with a constant rate a longer run passes the same places."""
    function, box = _mlp(jnp.float64, widths=(3, 6, 2), activations=(jax.nn.relu,))
    optimizer = optax.adam(0.1)
    method = functools.partial(jb.Frown, optimizer=optimizer, pre_activation=jb.IBP())
    found = [jb.bound(function, method(steps=steps))(box) for steps in (0, 2, 8)]
    for short, long in itertools.pairwise(found):
        assert np.all(long.lower >= short.lower - 1e-12)
        assert np.all(long.upper <= short.upper + 1e-12)
    assert jnp.mean(found[2].width) < jnp.mean(found[0].width)


@pytest.mark.slow
@pytest.mark.x64
def test_sharing_slopes_trades_tightness():
    function, box = _mlp(jnp.float64, activations=(jax.nn.relu, jax.nn.relu))
    widths = []
    for groups in ("neuron", 2, "layer"):
        method = jb.Frown(steps=30, groups=groups, pre_activation=jb.Crown())
        bounds, slopes = jb.tune(function, method)(box)
        widths.append(float(bounds.width.mean()))
        count = {"neuron": 10, 2: 6, "layer": 2}[groups]
        assert {name: lower.shape for name, (lower, _) in slopes.items()} == {
            "002/relu": (count, 12), "004/relu": (count, 10),
        }  # fmt: skip
        again = jb.bound(function, jb.Crown(slopes=slopes))(box)
        if count == 10:  # shared slopes give the best bound that each row has seen, not always at the last slopes
            assert np.allclose(again.lower, bounds.lower, atol=0.02)
    assert widths[0] < widths[1] < widths[2]


def test_slopes_of_several_outputs_are_a_list():
    function, box = _mlp(widths=(3, 6, 5), activations=(jax.nn.relu,))
    both = lambda x: (function(x), function(x)[0] - function(x)[1])  # noqa: E731
    bounds, slopes = jb.tune(both, jb.Frown(steps=2, pre_activation=jb.IBP()))(box)
    assert [next(iter(part.values()))[0].shape[0] for part in slopes] == [10, 2]
    again = jb.bound(both, jb.Crown(slopes=slopes, pre_activation=jb.IBP()))(box)
    assert np.allclose(again[1].lower, bounds[1].lower, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("groups", [1, 3])
def test_slopes_of_half_the_sides_are_refused(groups):
    """Groups of rows come for lower and for upper bounds; one for both was a crash in the compiled step."""
    slopes = {"001/max": (jnp.zeros((groups, 2)), jnp.ones((groups, 2)))}
    with pytest.raises(errors.ArgumentError, match="as many of upper bounds"):
        jb.bound(lambda x: jnp.maximum(x, 0).sum(), jb.Crown(slopes=slopes))(jb.Box(-jnp.ones(2), jnp.ones(2)))


def test_images_are_tuned_independently():
    """A batch gives what its images give alone, with early stopping too, which counts for each image apart."""
    rng = np.random.default_rng(0)
    layers = [(jnp.asarray(rng.normal(size=shape) / 3, jnp.float32), None) for shape in ((6, 12), (12, 4))]
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    method = functools.partial(jb.frown, layers, eps=0.2, steps=40, early_stop=0.05, activation="relu")
    together = method(x)
    for k in range(3):
        alone = method(x[k : k + 1])
        assert np.allclose(together.lower[k], alone.lower[0], atol=1e-5)
        assert np.allclose(together.upper[k], alone.upper[0], atol=1e-5)


def test_under_transformations():
    function, box = _mlp(widths=(3, 5, 2), activations=(jax.nn.relu,))
    method = jb.Frown(steps=3, pre_activation=jb.IBP())
    eager = jb.bound(function, method)(box)

    def lower(radius):
        middle = (box.lower + box.upper) / 2
        return jb.bound(function, method)(jb.Box(middle - radius, middle + radius)).lower.sum()

    many, slopes = jax.jit(jax.vmap(jax.value_and_grad(lower)))(jnp.array([0.2, 0.4]))
    assert np.allclose(many[1], eager.lower.sum(), atol=1e-5)
    assert many[0] > many[1] and np.all(slopes < 0)


@pytest.mark.slow
def test_tuned_inputs_under_transformations():
    function, box = _mlp()
    method = jb.Frown(steps=3)
    eager, jitted = jb.bound(function, method)(box), jax.jit(jb.bound(function, method))(box)
    assert np.allclose(eager.lower, jitted.lower, atol=1e-5)
    assert np.allclose(eager.upper, jitted.upper, atol=1e-5)
    lower = lambda radius: jb.bound(function, method)(jb.Box(box.lower - radius, box.upper + radius)).lower  # noqa: E731
    slope = jax.jacrev(lower)(0.1)
    assert np.allclose(slope, jax.jacfwd(lower)(0.1), rtol=1e-3)
    assert np.all(slope < 0)


def test_an_empty_region_is_not_tuned():
    function, box = _mlp(widths=(3, 5, 2), activations=(jax.nn.relu,))
    found = jax.jit(jb.bound(function, jb.Frown(steps=2)))(jb.Box(box.upper, box.lower))
    assert np.all(found.lower == -np.inf) and np.all(found.upper == np.inf)


def test_rounding_is_counted():
    function, box = _mlp()
    widened = jb.bound(function, jb.Frown(steps=3), rounding=True)(box)
    plain = jb.bound(function, jb.Crown(), rounding=True)(box)
    assert np.all(widened.lower >= plain.lower) and np.all(widened.upper <= plain.upper)
    corners = np.random.default_rng(0).choice([0.0, 1.0], (500, 6))
    points = np.asarray(box.lower) + corners * (np.asarray(box.upper) - np.asarray(box.lower))
    with jax.enable_x64(True):
        values = np.asarray(jax.vmap(_mlp(jnp.float64)[0])(jnp.asarray(points, jnp.float64)))
    assert np.all(np.asarray(widened.lower) <= values.min(0)) and np.all(values.max(0) <= np.asarray(widened.upper))


@pytest.mark.slow
def test_chunks_of_rows_change_nothing():
    rng = np.random.default_rng(0)
    layers = [(jnp.asarray(rng.normal(size=shape) / 3, jnp.float32), None) for shape in ((6, 40), (40, 40), (40, 4))]
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    whole, parts = (
        jb.frown(layers, x, 0.2, steps=3, memory_limit=limit, activation="relu") for limit in (None, 1 << 12)
    )
    assert np.allclose(whole.lower, parts.lower, atol=1e-5)


@pytest.mark.x64
def test_single_precision_is_tuned_where_double_is_enabled():
    function, box = _mlp(jnp.float32, widths=(3, 5, 2), activations=(jax.nn.relu,))
    bounds = jb.bound(function, jb.Frown(steps=2, pre_activation=jb.IBP()))(box)
    assert bounds.lower.dtype == bounds.upper.dtype == jnp.float32


def test_equal_methods_compile_once():
    function, box = _mlp()
    jb.bound(function, jb.Frown(steps=2))(box)
    before = steps.compiled.cache_info().misses
    jb.bound(function, jb.Frown(steps=2))(box)
    jb.bound(function, jb.Frown(steps=3))(box)
    assert steps.compiled.cache_info().misses == before
    leaves, tree = jax.tree.flatten(jb.Frown(pre_activation=jb.IBP()))
    assert jax.tree.unflatten(tree, leaves) == jb.Frown(pre_activation=jb.IBP())
    assert not jax.tree.leaves(jb.Frown())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"groups": 0}, "groups"),
        ({"groups": "all"}, "groups"),
        ({"pre_activation": "crown"}, "pre_activation"),
        ({"early_stop": -1.0}, "early_stop"),
    ],
)
def test_what_is_refused(options, part):
    function, box = _mlp()
    with pytest.raises(jb.JaxboundError, match=part):
        jb.bound(function, jb.Frown(**options))(box)


def test_tune_takes_frown_alone():
    function, box = _mlp()
    with pytest.raises(jb.ArgumentTypeError, match="Frown"):
        jb.tune(function, jb.Crown())(box)


@pytest.mark.quick(1)
@pytest.mark.x64
@pytest.mark.parametrize("norm", [np.inf, 1])
def test_most_of_the_gap_to_the_linear_program_is_closed(norm):
    """99 % of it with inputs fixed, per-row slopes and 100 steps; with tuned inputs the program is passed."""
    function, box = _mlp(jnp.float64, (4, 10, 10, 4), (jax.nn.relu, jax.nn.relu))
    region = jb.LpBall((box.lower + box.upper) / 2, 0.4 if norm == np.inf else 1.0, norm)
    crown = jb.bound(function, jb.Crown())(region)
    fixed = jb.bound(function, jb.Frown(steps=100, pre_activation=jb.Crown()))(region)
    best = jb.bound(function, jb.LP(pre_activation=jb.Crown()))(region)
    gap, left = float(jnp.sum(crown.width - best.width)), float(jnp.sum(fixed.width - best.width))
    assert gap > 0.01
    assert -1e-6 <= left <= 0.01 * gap
    joint = jb.bound(function, jb.Frown(steps=100))(region)
    assert float(joint.width.mean()) < float(best.width.mean())


def test_a_block_of_which_the_target_reaches_a_part_is_tuned():
    rng = np.random.default_rng(0)
    first, left, right = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4), (4, 4), (4, 4)))

    def gated(x):
        hidden = jax.nn.relu(x @ first)
        return ((hidden @ left) * jax.nn.sigmoid(hidden @ right)).sum()

    box = jb.Box(jnp.full(3, 0.9), jnp.full(3, 1.1))
    plain, tuned = (jb.bound(gated, method)(box) for method in (jb.Crown(), jb.Frown(steps=2)))
    assert plain.lower <= tuned.lower and tuned.upper <= plain.upper
