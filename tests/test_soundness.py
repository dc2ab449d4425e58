"""Every bound holds at every point tried: networks x methods x regions x points, in float64 and in float32 with rounding.

A check is one point of one region of one network, evaluated in float64 and compared with the bounds of every method that
bounded that region. Methods and families of regions take turns over the networks: one turn for each network in the
quick run, three in `make soundness`, so that every method meets every family on several networks.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import networks
import numpy as np
import oracles
import pytest
from networks import ACTIVATIONS, NETWORKS, REGIONS

import jaxbound as jb

METHODS = {
    "IBP": jb.IBP(),
    "Forward": jb.Forward(),
    "CrownIBP": jb.CrownIBP(),
    "Crown": jb.Crown(),
    "Crown zero": jb.Crown(lower_slope="zero"),
    "Crown one": jb.Crown(lower_slope="one"),
    "FastLin": jb.FastLin(),
    "Crown alone": jb.Crown(intersect=False),
    "Best": jb.Best(jb.IBP(), jb.Forward(), jb.Crown(pre_activation=jb.Best(jb.IBP(), jb.Forward()))),
}
LINEAR = tuple(name for name in METHODS if name not in ("IBP", "Best"))

STRUCTURED = [name for name in NETWORKS if name not in ACTIVATIONS]
QUICK = [name for name in STRUCTURED if not NETWORKS[name].slow]
QUICK_POINTS, LONG_POINTS, TURNS = 1000, 11_000, 3
ATTACK_STEPS = 3

_tally: Counter = Counter()


@pytest.fixture(scope="module", autouse=True)
def _summary(pytestconfig):
    """What this process checked, on the terminal even under xdist (which passes stderr through)."""
    yield
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        counts = f"{_tally['points']:,} points of {_tally['regions']:,} regions, {_tally['comparisons']:,} comparisons"
        print(f"\nsoundness: {counts}, {_tally['violations']:,} violations", file=sys.__stderr__, flush=True)


# --- evaluating and attacking -----------------------------------------------------------------------------------------


class _Evaluator:
    """A network's flat outputs, and their derivatives, at batches of points in float64."""

    def __init__(self, name: str):
        network = NETWORKS[name]

        def flat(params, *leaves):
            results = jax.tree.leaves(network.function(params, *network.pack(list(leaves))))
            return jnp.concatenate([jnp.ravel(result) for result in results])

        with jax.enable_x64(True):
            self.params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), network.params)
            axes = (None, *(0 for _ in network.shapes))
            self._values = jax.jit(jax.vmap(flat, axes))
            positions = tuple(range(1, len(network.shapes) + 1))
            self._slopes = jax.jit(jax.vmap(jax.jacrev(flat, positions), axes))

    def values(self, points: list) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(self._values(self.params, *points))

    def attack(self, regions: list, points: list, values: np.ndarray) -> list:
        """Frank-Wolfe steps down and up every output, from its best points; they never leave a convex region."""
        outputs = np.arange(values.shape[1])
        best = np.concatenate([np.argmin(values, axis=0), np.argmax(values, axis=0)])
        sign = np.repeat([-1.0, 1.0], len(outputs))
        at, seen = [leaf[best] for leaf in points], []
        for step in range(ATTACK_STEPS):
            with jax.enable_x64(True):
                slopes = [np.asarray(s) for s in self._slopes(self.params, *at)]
            rows = np.arange(len(sign)), np.tile(outputs, 2)
            moved = []
            for region, leaf, slope in zip(regions, at, slopes, strict=True):
                direction = np.nan_to_num(sign.reshape(-1, *(1,) * (leaf.ndim - 1)) * slope[rows])
                moved.append(oracles.between(region, leaf, oracles.vertex(region, direction), 1 / (1 + step)))
            seen.append(moved)
            at = moved
        return [np.concatenate([part[k] for part in seen]) for k in range(len(at))]


def _points(name: str, evaluator: _Evaluator, family: str, count: int) -> dict[str, tuple[list, np.ndarray]]:
    """For each region of a family, points of its leaves and the network's values there."""
    found = {}
    for label, leaves in networks.regions(name, family).items():
        rng = np.random.default_rng(7)
        points = [oracles.points(leaf, rng, count) for leaf in leaves]
        values = evaluator.values(points)
        attacked = evaluator.attack(leaves, points, values)
        points = [np.concatenate(parts) for parts in zip(points, attacked, strict=True)]
        assert all(oracles.contains(leaf, part).all() for leaf, part in zip(leaves, points, strict=True))
        found[label] = points, np.concatenate([values, evaluator.values(attacked)])
    return found


# --- bounding ---------------------------------------------------------------------------------------------------------


def _flat_bounds(bounds) -> tuple[jax.Array, jax.Array]:
    leaves = jax.tree.leaves(bounds, is_leaf=lambda leaf: isinstance(leaf, jb.Interval))
    ends = [(jnp.ravel(leaf.lower), jnp.ravel(leaf.upper)) for leaf in leaves]
    return jnp.concatenate([low for low, _ in ends]), jnp.concatenate([high for _, high in ends])


def _bounds_at_once(name: str, method, family: str, dtype) -> dict[str, tuple]:
    """Bounds over a family's regions by one compiled program: how bounds behave under `jit` and `vmap`."""
    network, regions = NETWORKS[name], networks.regions(name, family)
    stacked = networks.cast(jax.tree.map(lambda *parts: np.stack(parts), *regions.values()), dtype)

    def one(*leaves):
        return _flat_bounds(jb.bound(network.function, method)(*network.arguments(leaves, dtype)))

    # a quarter of the time to compile, and the same mathematics
    program = jax.jit(jax.vmap(one)).lower(*stacked).compile({"xla_backend_optimization_level": 0})
    lower, upper = map(np.asarray, program(*stacked))
    return {label: (lower[k], upper[k]) for k, label in enumerate(regions)}


def _bounds_one_by_one(name: str, method, family: str, dtype, *, rounding: bool = False) -> dict[str, tuple]:
    """Bounds over a family's regions by the eager driver, which selects rows by value."""
    network = NETWORKS[name]
    bounded = jb.bound(network.function, method, rounding=rounding)
    found = {}
    for label, leaves in networks.regions(name, family).items():
        lower, upper = _flat_bounds(bounded(*network.arguments(networks.cast(leaves, dtype), dtype)))
        found[label] = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    return found


def _check(what: str, bounds: dict[str, tuple], points: dict[str, tuple], tolerance: float) -> None:
    """Compare bounds with values; `tolerance` is relative to the largest finite bound or value."""
    for label, (lower, upper) in bounds.items():
        values = points[label][1]
        ends, finite = [np.where(np.isfinite(part), part, 0) for part in (np.stack([lower, upper]), values)]
        scale = np.maximum(1, np.maximum(np.abs(ends).max(axis=0), np.abs(finite).max(axis=0)))
        with np.errstate(invalid="ignore"):
            wrong = ~((lower - tolerance * scale <= values) & (values <= upper + tolerance * scale))
            wrong &= ~(np.isnan(values) & np.isneginf(lower) & np.isposinf(upper))  # the value itself overflows
        _tally["comparisons"] += values.shape[0]
        _tally["violations"] += int(wrong.any(axis=1).sum())
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise AssertionError(
                f"{what}, region {label}: output {column} is {values[row, column]!r} at "
                f"{[leaf[row].tolist() for leaf in points[label][0]]}, outside [{lower[column]!r}, {upper[column]!r}]; "
                f"{int(wrong.sum())} of {wrong.size} values are outside"
            )


def _count(points: dict[str, tuple]) -> None:
    _tally["regions"] += len(points)
    _tally["points"] += sum(len(values) for _, values in points.values())


# --- float64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick(12)
@pytest.mark.x64
@pytest.mark.parametrize("name", QUICK)
def test_bounds_hold(name):
    turn = QUICK.index(name)
    family = "box" if turn % 2 else list(REGIONS)[1 + turn % (len(REGIONS) - 1)]
    method = "IBP" if turn % 5 == 4 else LINEAR[turn % len(LINEAR)]
    points = _points(name, _Evaluator(name), family, QUICK_POINTS)
    _count(points)
    bounds = _bounds_at_once(name, METHODS[method], family, jnp.float64)
    _check(f"{name}, {method}, {family}", bounds, points, 1e-11)


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_hold_everywhere(name):
    evaluator = _Evaluator(name)
    for family, label in _turns(name):
        points = _points(name, evaluator, family, LONG_POINTS)
        _count(points)
        bounds = _bounds_one_by_one(name, METHODS[label], family, jnp.float64)
        _check(f"{name}, {label}, {family}", bounds, points, 1e-11)


def _turns(name: str) -> list[tuple[str, str]]:
    """Families of regions and methods for one network: all pairs come in turn as the networks go by."""
    first = TURNS * list(NETWORKS).index(name)
    turns = range(first, first + TURNS)
    return [(list(REGIONS)[k % len(REGIONS)], list(METHODS)[(k + k // len(REGIONS)) % len(METHODS)]) for k in turns]


def test_the_long_run_makes_ten_million_checks():
    turns = [turn for name in NETWORKS for turn in _turns(name)]
    assert sum(len(REGIONS[family]) for family, _ in turns) * LONG_POINTS >= 10**7
    assert {method for _, method in turns} == set(METHODS)
    assert {family for family, _ in turns} == set(REGIONS)
    assert len(set(turns)) >= 0.9 * len(METHODS) * len(REGIONS)
    assert len(QUICK) * min(map(len, REGIONS.values())) * QUICK_POINTS >= 10**5


# --- float32 with rounding ----------------------------------------------------------------------------------------------

ROUNDED = (
    "affine",
    "mlp_relu",
    "conv_lax",
    "average_pool",
    "max_pool_overlap",
    "softmax",
    "product",
    "prelu",
    "input_skip",
)


def _exact_values(name: str, points: dict[str, tuple]) -> dict[str, tuple]:
    """Values of the float32 function, its numbers as given, in exact arithmetic (NumPy float64)."""
    network = NETWORKS[name]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network.params)

    def flat(params, *leaves):
        return network.function(params, *network.pack(list(leaves)))

    function = jax.vmap(flat, (None, *(0 for _ in network.shapes)))
    found = {}
    for label, (leaves, _) in points.items():
        results = oracles.exactly(function, params, *leaves)
        found[label] = leaves, np.concatenate([r.reshape(len(leaves[0]), -1) for r in results], axis=1)
    return found


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", ROUNDED)
def test_float32_bounds_with_rounding_hold_in_exact_arithmetic(name):
    family = ("box", "l2", "linf_clip")[ROUNDED.index(name) % 3]
    points = _exact_values(name, _points(name, _Evaluator(name), family, QUICK_POINTS // 2))
    method = ("IBP", *LINEAR)[ROUNDED.index(name) % (1 + len(LINEAR))]
    bounds = _bounds_one_by_one(name, METHODS[method], family, jnp.float32, rounding=True)
    _check(f"{name}, {method}, {family}, float32", bounds, points, 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_bounds_with_rounding_hold_everywhere(name):
    evaluator = _Evaluator(name)
    for family, label in _turns(name)[:2]:
        points = _exact_values(name, _points(name, evaluator, family, LONG_POINTS // 5))
        _count(points)
        bounds = _bounds_one_by_one(name, METHODS[label], family, jnp.float32, rounding=True)
        _check(f"{name}, {label}, {family}, float32", bounds, points, 1e-14)


# --- pre-activation bounds and planes -----------------------------------------------------------------------------------


def _layered(params, x):
    """A network whose pre-activations are outputs too."""
    first = params["w"] @ x + params["b"]
    second = params["v"] @ jnp.tanh(first)
    return first, second, jax.nn.relu(second).sum()


_LAYERED = {"w": networks._normal("l", 5, 4), "b": networks._normal("m", 5), "v": networks._normal("n", 3, 5)}


@pytest.mark.quick(3)
@pytest.mark.x64
@pytest.mark.parametrize("method", ["IBP", "Forward", "CrownIBP", "Crown", "FastLin", "Best"])
def test_pre_activation_bounds_hold(method):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), _LAYERED)
    families = (("box", "box"), ("box", "wide")) if method == "Best" else (("l2", "ball"), ("l2", "large"))
    for family, label in families:
        region = REGIONS[family][label](np.random.default_rng(3), (4,))
        points = oracles.points(region, np.random.default_rng(4), 2000)
        first, second, _ = jax.vmap(_layered, (None, 0))(params, points)
        found = jb.pre_activation_bounds(_layered, METHODS[method])(params, networks.cast(region, jnp.float64))
        assert [name.split("/")[-1] for name in found] == ["tanh", "relu"]
        for interval, values in zip(found.values(), (first, second), strict=True):
            assert np.all(interval.lower - 1e-11 <= values)
            assert np.all(values <= interval.upper + 1e-11)


@pytest.mark.x64
@pytest.mark.parametrize(
    ("name", "method", "family"),
    [
        ("input_skip", "Forward", "l2"), ("dictionary", "Crown", "l1"), ("constant", "FastLin", "box"),
        pytest.param("mlp_relu", "Crown", "box", marks=pytest.mark.slow),
        pytest.param("clip", "FastLin", "linf_clip", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_planes_hold_pointwise_and_give_no_more_than_the_bounds(name, method, family):
    network = NETWORKS[name]
    points = _points(name, _Evaluator(name), family, 300)
    for label, leaves in networks.regions(name, family).items():
        arguments = network.arguments(networks.cast(leaves, jnp.float64), jnp.float64)
        planes = jb.linear_bounds(network.function, METHODS[method])(*arguments)
        bounds = jb.bound(network.function, METHODS[method])(*arguments)
        is_planes = lambda leaf: isinstance(leaf, jb.LinearBounds)  # noqa: E731
        where, values = points[label]
        low, high = [], []
        for part in jax.tree.leaves(planes, is_leaf=is_planes):
            for slopes, intercept, side in (
                (part.lower_slope, part.lower_intercept, low), (part.upper_slope, part.upper_intercept, high)
            ):  # fmt: skip
                columns = jax.tree.leaves(slopes)
                total = np.broadcast_to(np.ravel(intercept), (len(values), np.size(intercept)))
                for column, leaf in zip(columns, where, strict=True):
                    column = np.reshape(column, (np.size(intercept), -1))
                    total = total + leaf.reshape(len(leaf), -1) @ column.T
                side.append(total)
        scale = 1e-11 * (1 + np.abs(values).max())
        assert np.all(np.concatenate(low, axis=1) <= values + scale), label
        assert np.all(np.concatenate(high, axis=1) >= values - scale), label
        concrete = [part.concretize(*arguments) for part in jax.tree.leaves(planes, is_leaf=is_planes)]
        lower, upper = _flat_bounds(concrete)
        best_lower, best_upper = _flat_bounds(bounds)
        assert np.all(lower <= best_lower + scale), label
        assert np.all(upper >= best_upper - scale), label


# --- what cannot be bounded -----------------------------------------------------------------------------------------------

ABNORMAL = {
    "IBP": METHODS["IBP"],
    "Forward": METHODS["Forward"],
    "Crown": METHODS["Crown"],
    "alone": METHODS["Crown alone"],
}


def _small(p, x):
    return p["w"] @ jax.nn.relu(p["w"] @ x + p["b"])


@pytest.fixture
def without_compiling():
    """One operation at a time: what is compiled for one case serves the others."""
    with jax.disable_jit():
        yield


def _bound_traced(method, make, numbers):
    """Bounds where the region's values are tracers, so that nothing can be refused."""
    params = {"w": jnp.eye(2), "b": jnp.ones(2)}
    stacked = [jnp.asarray(number, jnp.float32)[None] for number in numbers]
    return jax.vmap(lambda *n: jb.bound(_small, method)(params, make(*n)))(*stacked)


@pytest.mark.quick(12)
@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("method", ABNORMAL)
@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        pytest.param(jb.Box, ([1.0, 0.0], [0.0, 1.0]), id="lower above upper"),
        pytest.param(jb.Box, ([np.nan, 0.0], [1.0, 1.0]), id="NaN"),
        pytest.param(lambda c, r: jb.LpBall(c, r, 2), ([0.0, 0.0], -1.0), id="negative radius"),
        pytest.param(lambda c, r: jb.LpBall(c, r, np.inf), ([0.0, 0.0], -1.0), id="negative radius, box"),
        pytest.param(lambda c, r: jb.LpBall(c, r, 2), ([0.0, 0.0], np.nan), id="radius NaN"),
        pytest.param(lambda c, r: jb.LpBall(c, r, 2), ([np.nan, 0.0], 1.0), id="center NaN"),
        pytest.param(lambda c, r: jb.LpBall(c, r, 2, clip=(0.0, 1.0)), ([3.0, 3.0], 0.5), id="misses its clip box"),
        pytest.param(lambda c, r: jb.LpBall(c, r, 1, clip=(0.0, 1.0)), ([3.0, 3.0], 0.5), id="misses it, norm 1"),
        pytest.param(lambda c, r: jb.LpBall(c, r, np.inf, clip=(0.0, 1.0)), ([3.0, 3.0], 0.5), id="misses it, box"),
    ],
)
def test_an_empty_region_is_never_verified(method, make, numbers):
    bounds = _bound_traced(ABNORMAL[method], make, numbers)
    assert np.all(bounds.lower == -np.inf)
    assert np.all(bounds.upper == np.inf)


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("method", ABNORMAL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("where", ["w", "b"])
def test_abnormal_parameters_never_give_wrong_finite_bounds(method, bad, where):
    params = {"w": jnp.array([[1.0, 2.0], [1.0, 1.0]]), "b": jnp.ones(2)}
    params[where] = params[where].at[..., 0].set(bad)
    region = jb.Box(jnp.array([-1.0, 0.5]), jnp.array([1.0, 2.0]))
    bounds = jb.bound(_small, ABNORMAL[method])(params, region)
    points = np.random.default_rng(0).uniform(region.lower, region.upper, (200, 2)).astype(np.float32)
    values = np.asarray(jax.vmap(_small, (None, 0))(params, points))
    undefined = np.isnan(values).any(axis=0)
    assert not np.isnan([bounds.lower, bounds.upper]).any()
    assert np.all(~undefined | (bounds.lower == -np.inf))
    assert np.all(~undefined | (bounds.upper == np.inf))
    assert np.all((values >= bounds.lower) | np.isnan(values))
    assert np.all((values <= bounds.upper) | np.isnan(values))


@pytest.mark.quick(4)
@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("method", ABNORMAL)
@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_an_infinite_radius_is_bounded_only_where_the_function_is(method, norm):
    function = lambda x: (jax.nn.sigmoid(2 * x), jax.nn.relu(x), x[0] * 0 + jnp.tanh(x[1]))  # noqa: E731
    sigmoid, relu, tanh = jb.bound(function, ABNORMAL[method])(jb.LpBall(jnp.zeros(2), jnp.inf, norm))
    assert np.all(sigmoid.lower <= 0)
    assert np.all(sigmoid.upper >= 1)
    assert np.all(relu.lower <= 0)
    assert np.all(relu.upper == np.inf)
    assert tanh.lower <= -1
    assert tanh.upper >= 1


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("method", ["IBP", "Crown"])
def test_bounded_functions_stay_bounded_where_nothing_is_known_of_their_input(method):
    for reach in (1e4, 1e30, np.inf):
        region = jb.Box(jnp.full(2, -reach), jnp.full(2, reach))
        sigmoid, relu = jb.bound(lambda x: (jax.nn.sigmoid(x), jax.nn.relu(x)), METHODS[method])(region)
        assert np.all(relu.lower > -0.01), reach
        assert np.all(sigmoid.lower > -0.01), reach
        assert np.all(sigmoid.upper < 1.01), reach


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("method", ABNORMAL)
def test_overflow_widens(method):
    region = jb.Box(jnp.array([80.0, 1e20]), jnp.array([100.0, 1e30]))
    function = lambda x: (jnp.exp(x[0]), x[1] * x[1], 1e20 * x[1])  # noqa: E731
    for interval in jb.bound(function, ABNORMAL[method])(region):
        assert interval.upper == np.inf
        assert interval.lower <= 1e36
        assert not np.isnan(interval.lower)


@pytest.mark.quick(4)
@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("method", ABNORMAL)
def test_a_sum_that_overflows_on_its_way_is_not_bounded_by_infinity(method, rounding):
    """Its real value is 3e37, though every partial sum in float32 is infinite: no lower bound of +inf, and no NaN."""
    weights = jnp.array([[1.0], [1.0], [-1.9]])
    point = jnp.full(3, 3e38)
    found = jb.bound(lambda x: jax.nn.relu(x @ weights) * 0.5, ABNORMAL[method], rounding=rounding)(
        jb.Box(point, point)
    )
    assert found.lower <= 1.5e37 <= found.upper
    planes = jb.LinearBounds((weights.T,), jnp.zeros(1), (weights.T,), jnp.zeros(1)).concretize(jb.Box(point, point))
    assert planes.lower <= 3e37 <= planes.upper


def test_the_attack_and_the_points_reach_known_extremes():
    """The tests above can only fail if points come near the extremes: on an affine network they must reach them."""
    evaluator = _Evaluator("affine")
    weights = np.asarray(NETWORKS["affine"].params["w"], float)
    matrix = 3.5 * weights - 1 / 7
    for family, dual in (("l1", np.inf), ("l2", 2.0), ("linf", 1.0)):
        points = _points("affine", evaluator, family, 100)
        for label, leaves in networks.regions("affine", family).items():
            reach = float(leaves[0].radius) * np.linalg.norm(matrix, dual, axis=1)
            center = matrix @ np.asarray(leaves[0].center, float)
            values = points[label][1]
            assert np.allclose(values.max(axis=0), center + reach, rtol=1e-6), (family, label)
            assert np.allclose(values.min(axis=0), center - reach, rtol=1e-6), (family, label)


def test_every_kind_of_region_occurs():
    norms = {
        leaf.norm
        for family in REGIONS
        for (leaf,) in networks.regions("affine", family).values()
        if hasattr(leaf, "norm")
    }
    assert norms == {1.0, 2.0, 3.0, math.inf}
    assert len(list(itertools.chain.from_iterable(REGIONS.values()))) >= 39
