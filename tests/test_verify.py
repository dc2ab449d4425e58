"""Verdicts against exact answers: enumeration of activation patterns, corners and samples of small ReLU networks."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import jaxbound as jb
from jaxbound.search import clipping, goals, inputs, parts, passes, points, roots
from jaxbound.search.inputs import InputSplits
from jaxbound.search.skeletons import Skeleton
from jaxbound.transforms.problems import prepare

BOX = jb.Box(-np.ones(3, np.float32), np.ones(3, np.float32))
SHAPES = (3, 4, 3, 2)
METHOD = jb.BranchAndBound(batch=16, max_nodes=4000)


def network(params, x):
    for number, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias
        x = jax.nn.relu(x) if number < len(params) - 1 else x
    return x


def make(seed: int) -> list:
    draw = np.random.default_rng(seed)
    pairs = itertools.pairwise(SHAPES)
    return [(draw.normal(size=(m, n)).astype(np.float32), draw.normal(size=n).astype(np.float32)) for m, n in pairs]


def model(seed: int) -> jb.Model:
    return jb.Model(network, jax.tree.map(jnp.asarray, make(seed)), (3,), (2,))


def least(params, row) -> float:
    """The exact least value of `row @ network` over the box: one linear program for every pattern of activations."""
    values = []
    widths = [bias.size for _, bias in params[:-1]]
    for flat in itertools.product((0, 1), repeat=sum(widths)):
        patterns = np.split(np.array(flat), np.cumsum(widths)[:-1])
        matrix, shift, above, beyond = np.eye(3), np.zeros(3), [], []
        for (kernel, bias), pattern in zip(params[:-1], patterns, strict=True):
            matrix, shift = kernel.T.astype(float) @ matrix, kernel.T.astype(float) @ shift + bias
            sign = np.where(pattern, -1.0, 1.0)
            above.append(sign[:, None] * matrix)
            beyond.append(-sign * shift)
            matrix, shift = matrix * pattern[:, None], shift * pattern
        kernel, bias = params[-1]
        objective, constant = row @ kernel.T @ matrix, row @ (kernel.T @ shift + bias)
        found = linprog(objective, np.concatenate(above), np.concatenate(beyond), bounds=[(-1, 1)] * 3)
        if found.status == 0:
            values.append(found.fun + constant)
    return min(values)


@pytest.fixture(scope="module")
def exact() -> list[float]:
    """The least difference of the two outputs for two networks."""
    return [least(make(seed), np.array([1.0, -1.0])) for seed in (1, 2)]


@pytest.mark.parametrize("split", ["input", "relu"])
@pytest.mark.parametrize("seed", [1, 2])
def test_verdicts_are_exact_around_the_least_value(split, seed, exact):
    """Just below the least value there is no counterexample, at it there is; neither is ever said of the other."""
    value, method = exact[seed - 1], jb.BranchAndBound(split=split, batch=16, max_nodes=4000)
    below = jb.Property.of([([1.0, -1.0], value - 0.05)])
    above = jb.Property.of([([1.0, -1.0], value + 0.05)])
    proved = jb.verify(model(seed), BOX, below, method=method, progress=False)
    refuted = jb.verify(model(seed), BOX, above, method=method, progress=False)
    assert proved.status == "verified" and 0 < proved.lower <= 0.05 + 1e-4
    assert refuted.status == "falsified"
    point, outputs = refuted.counterexample, refuted.outputs
    assert point is not None and outputs is not None
    assert above.violated(point, outputs) and np.all(np.abs(point) <= 1)
    np.testing.assert_array_equal(outputs, model(seed)(point))


@pytest.mark.parametrize("split", ["input", "relu"])
def test_without_attack_a_violated_property_is_never_verified(split, exact):
    prop = jb.Property.of([([1.0, -1.0], exact[0])], [([1.0, -1.0], exact[0] - 10)])
    method = jb.BranchAndBound(split=split, batch=16, max_nodes=600)
    found = jb.verify(model(1), BOX, prop, method=method, attack=False, progress=False)
    assert found.status == "unknown" and found.lower <= 1e-5


def test_conjunctions_inputs_and_several_boxes(exact):
    """Rows on inputs cut the box where counterexamples may be; a property over parts holds over the whole."""
    method, value = jb.BranchAndBound(batch=16, max_nodes=4000), exact[0]
    half = [([1.0, -1.0], value + 1.0), ([0.0, 0.0], -2.0, [1.0, 0.0, 0.0])]  # x_0 <= -2 is outside
    assert jb.verify(model(1), BOX, jb.Property.of(half), method=method, progress=False).status == "verified"
    halves = [jb.Box(BOX.lower, np.array([0, 1, 1.0])), jb.Box(np.array([0, -1, -1.0]), BOX.upper)]
    prop = jb.Property.of([([1.0, -1.0], value - 0.05)])
    found = jb.verify(model(1), halves, prop, method=method, progress=False)
    assert found.status == "verified" and found.nodes >= 2


def test_bounds_hold_in_exact_arithmetic_and_share_programs():
    """Widened planes leave float64 values above the bounds, on boxes as small as rounding; two networks, one program."""
    draw, programs = np.random.default_rng(0), passes._compiled.cache_info
    for seed, width in ((3, 1.0), (4, 1e-3), (3, 1e-6), (4, 0.0)):
        params = make(seed)
        problem = prepare(network, (params, BOX))
        skeleton = Skeleton(problem.graph.structure)
        before = programs().misses
        low = draw.uniform(-1, 1, (16, 3)).astype(np.float32)
        high = low + np.float32(width)
        rows = np.broadcast_to(np.array([[1, -1], [-1, 1], [3, 2]], np.float32), (16, 3, 2))
        goal = jnp.asarray(rows), None, jnp.zeros((16, 3))
        box = jnp.asarray(low), jnp.asarray(high)
        lower = inputs.bound_boxes(skeleton, problem.graph.constants, box, goal, outward=True)[0].lower
        points = np.clip(low + draw.uniform(size=(200, 16, 3)) * (high - low), low, high).astype(np.float64)
        values = points
        for number, (kernel, bias) in enumerate(params):
            values = values @ kernel.astype(np.float64) + bias
            values = np.maximum(values, 0) if number < len(params) - 1 else values
        assert np.all(np.asarray(lower, np.float64) <= np.einsum("bro,sbo->sbr", rows.astype(float), values))
        assert np.all(np.asarray(lower)[:, 0] > -np.inf)
        if seed == 4 or width < 1:
            assert programs().misses == before


@pytest.mark.parametrize("rows", [3, 64])
def test_values_of_a_root_are_bounded_piece_by_piece(rows):
    """As by passes from all entries; pieces of all values share the programs of blocks."""
    problem = prepare(network, (make(1), BOX))
    ends = np.asarray(BOX.lower), np.asarray(BOX.upper)
    root = roots.Root(problem.graph, problem.leaves, points.inward(*ends, np.float32))
    root.__dict__["rows"] = rows
    whole = passes.Domain(root.skeleton, root.constants, tuple(jnp.asarray(end)[None] for end in ends), outward=True)
    for block in root.skeleton.structure.blocks:
        whole.add(block)
        for number in set(root.skeleton.loose) & set(range(block.start, block.stop)):
            assert bool((whole.ends[number][0] < 0).any())
            whole.tighten(number)
    for number in root.skeleton.targets:
        (low, high), (own_low, own_high) = whole.ends[number], root.domain.ends[number]
        open_ = (own_low < 0) & (own_high > 0)
        assert np.array_equal(open_, (low < 0) & (high > 0))
        np.testing.assert_allclose(np.where(open_, own_low, 0), np.where(open_, low, 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.where(open_, own_high, 0), np.where(open_, high, 0), rtol=1e-5, atol=1e-6)
    goal = goals.goal_of(jb.Property.robust(0, 2), np.float32, root.sizes, root.reach(jb.Property.robust(0, 2)))
    expected = whole.bound(*passes.started(root.skeleton, [jnp.asarray(goal.outputs)[None], None, jnp.zeros((1, 1))]))
    np.testing.assert_allclose(root.lower(goal), np.asarray(expected.lower)[0], rtol=1e-5, atol=1e-6)
    before = passes._compiled.cache_info().misses
    other = prepare(network, (make(2), BOX))
    another = roots.Root(other.graph, other.leaves, root.ends)
    another.__dict__["rows"] = rows
    another.lower(goal)
    assert passes._compiled.cache_info().misses == before


def least_where(objective, row, offset, low, high) -> Fraction:
    """The exact least value of an objective over a box where `row @ x <= offset`: the cheapest coordinates move."""
    objective, row, low, high = ([Fraction(float(v)) for v in part] for part in (objective, row, low, high))
    ends = [(a, b) if c > 0 else (b, a) for a, b, c in zip(low, high, objective, strict=True)]
    value = sum(c * near for c, (near, _) in zip(objective, ends, strict=True))
    over = sum(r * near for r, (near, _) in zip(row, ends, strict=True)) - Fraction(offset)
    moves = [
        (c * (far - near), r * (near - far))
        for c, r, (near, far) in zip(objective, row, ends, strict=True)
        if r * (near - far) > 0
    ]
    for cost, gain in sorted(moves, key=lambda move: move[0] / move[1]):
        part = min(1, max(0, over / gain))
        value, over = value + part * cost, over - part * gain
    return value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1.0, 1e-6])
def test_clipped_neurons_hold_every_counterexample(dtype, width):
    """Ends are the linear programs' but for a few per cent, and no further in than exact arithmetic allows."""
    draw = np.random.default_rng(5)
    with jax.enable_x64(dtype == np.float64):
        low = draw.normal(size=6).astype(dtype)
        high = (low + width * np.array([1, 2, 1, 0, 1, 3])).astype(dtype)
        free = np.flatnonzero(low < high)
        matrix, row = draw.normal(size=(5, 6)).astype(dtype), draw.normal(size=(3, 6)).astype(dtype)
        corner = np.where(np.stack([matrix, -matrix]) > 0, low, high).astype(np.float64)
        lower = np.einsum("sni,sni->sn", np.stack([matrix, -matrix]).astype(np.float64), corner)
        down = np.nextafter(lower.astype(dtype), np.array(-np.inf, dtype))
        functions = clipping.functions_of(free, np.stack([matrix, -matrix])[..., free], down, (low, high))
        spread = np.abs(row.astype(np.float64)) @ (high.astype(np.float64) - low)
        least = (-np.array([0.3, 0.02, 0.6]) * spread).astype(dtype)  # so much of it is negative
        found = clipping.clipped_by_rows(functions, jnp.asarray(least), jnp.asarray(row))
        ends = np.asarray(found[0], np.float64), np.asarray(found[1], np.float64)
        index = np.array([0, 6, 1])  # z_0 <= end, -z_1 <= end, no cut
        cut = np.array([lower[0, 0] + 0.1 * width, lower[1, 1] + 0.1 * width, np.inf]).astype(dtype)
        by_cut = [np.asarray(end, np.float64) for end in clipping.clipped_by_cuts(functions, index, cut)]
    whole = np.stack([lower[0], -lower[1]])
    signs = np.array([[1.0], [-1.0]])
    cuts = signs[[0, 1, 0]] * matrix[[0, 1, 1]].astype(float)
    corners = np.where(row > 0, low, high).tolist()
    at_most = [
        sum(Fraction(a) * Fraction(b) for a, b in zip(one, corner, strict=True)) - Fraction(float(negative))
        for one, corner, negative in zip(row.tolist(), corners, least, strict=True)
    ]
    for rows, offsets, (above, below) in ((row, at_most, ends), (cuts, cut.tolist(), by_cut)):
        for k, (one, offset) in enumerate(zip(rows, offsets, strict=True)):
            if offset == np.inf:
                assert np.all(above[k] == -np.inf) and np.all(below[k] == np.inf)
                continue
            for n in range(5):
                exact = [s * least_where(s * matrix[n], one, offset, low, high) for s in (1, -1)]
                room = 0.05 * (whole[1, n] - whole[0, n])
                assert above[k, n] <= exact[0] and below[k, n] >= exact[1]
                if width == 1:
                    assert max(above[k, n], whole[0, n]) >= exact[0] - room
                    assert min(below[k, n], whole[1, n]) <= exact[1] + room


def test_clipping_saves_domains(monkeypatch):
    """One hidden layer, where every function is exact: verdicts are the same, in less than half of the domains."""
    draw = np.random.default_rng(1)
    first, second = draw.normal(size=(12, 40)).astype(np.float32), draw.normal(size=40).astype(np.float32)
    fn, box = lambda x: (jax.nn.relu(x @ first) @ second)[None], jb.Box(-np.ones(12) / 4, np.ones(12) / 4)
    method = jb.BranchAndBound(split="relu", batch=64, max_nodes=6000)
    points = jax.random.uniform(jax.random.key(0), (2000, 12), minval=-0.25, maxval=0.25)
    for _ in range(40):
        points = jnp.clip(points - 0.05 * jnp.sign(jax.vmap(jax.grad(lambda x: fn(x)[0]))(points)), -0.25, 0.25)
    prop = jb.Property.of([([1.0], float(jax.vmap(fn)(points).min()) - 0.5)])
    clipped = jb.verify(fn, box, prop, method=method, progress=False)
    monkeypatch.setattr(roots.Root, "functions", lambda *_: None)
    plain = jb.verify(fn, box, prop, method=method, progress=False)
    assert clipped.status == plain.status == "verified" and 2 * clipped.nodes <= plain.nodes, (clipped, plain)


def test_dear_networks_are_split_at_neurons(monkeypatch, exact):
    """Three free inputs, but bounding every part counts for too much: no box is bisected."""
    prop = jb.Property.of([([1.0, -1.0], exact[0] - 0.05)])
    monkeypatch.setattr(parts, "_DEAR", 0)
    monkeypatch.setattr(parts, "InputSplits", type("Unused", (), {}))
    method = dataclasses.replace(METHOD, split="auto")
    assert jb.verify(model(1), BOX, prop, method=method, attack=False, progress=False).status == "verified"


@pytest.mark.parametrize("begun", [False, True])
def test_hard_attacks_wait_for_the_search(begun):
    """The first attack runs at once, the others where the root is bounded."""
    calls: list = []
    prop = jb.Property.of([([1.0, -1.0], 0.0)])
    part = parts.Part(lambda: None, None, prop, METHOD, parts.Clock(0.3), outward=True)
    part.attack = SimpleNamespace(descend=lambda *given: calls.append(given))
    part.splits = SimpleNamespace(left=1, lower=-1.0) if begun else None
    part.descend(jax.random.key(0))
    assert len(calls) == (3 if begun else 1)


def test_children_cover_their_parents():
    """Every point of the region lies in some domain that is left, until something is proved."""
    problem = prepare(network, (make(1), BOX))
    prop = jb.Property.of([([1.0, -1.0], 1e6)])  # violated everywhere
    goal = goals.goal_of(prop, np.float32, (3, 2), (np.ones(3), np.ones(2)))
    skeleton = Skeleton(problem.graph.structure)
    search = InputSplits(
        skeleton, problem.graph.constants, goal, (np.asarray(BOX.lower), np.asarray(BOX.upper)), batch=16
    )
    points = np.random.default_rng(0).uniform(-1, 1, (500, 3)).astype(np.float32)
    for _ in range(4):
        search.step(lambda: False)
        inside = (search.low <= points[:, None]) & (points[:, None] <= search.high)
        assert np.all(np.any(np.all(inside, axis=2), axis=1))
    assert search.left > 16


def test_offsets_and_coefficients_are_rounded_to_the_safe_side():
    prop = jb.Property.of([([0.1, -1.0], 0.1)])
    goal = goals.goal_of(prop, np.float32, (3, 2), (np.ones(3), np.array([5.0, 7.0])))
    assert float(goal.offsets[0]) >= 0.1 + abs(0.1 - float(np.float32(0.1))) * 5
    exact = goals.goal_of(jb.Property.robust(0, 2), np.float32, (3, 2), (np.ones(3), np.zeros(2)))
    assert exact.offsets.tolist() == [0.0]


def test_ties_and_points_without_floats():
    """Equality is a violation; a box between two floats gives its nearest one, and the guarantee says so."""
    tie = jb.verify(lambda x: x, jb.Box(np.zeros(1), np.zeros(1)), jb.Property.of([([1.0], 0.0)]), progress=False)
    assert tie.status == "falsified" and "at this point" in tie.guarantee
    thin = jb.Box(np.array([0.1]), np.array([0.1 + 1e-12]))
    found = jb.verify(lambda x: x, thin, jb.Property.of([([1.0], 1.0)]), progress=False)
    assert found.status == "falsified" and "nearest" in found.guarantee


def test_time_is_kept_and_errors_name_the_way_out():
    prop = jb.Property.of([([1.0, -1.0], 0.0)])
    late = jb.verify(model(1), BOX, prop, timeout=0.0, attack=False, progress=False)
    assert late.status == "unknown" and late.seconds < 2
    with pytest.raises(jb.ArgumentError, match="no clauses"):
        jb.verify(model(1), BOX, jb.Property(()))
    with pytest.raises(jb.ArgumentError, match="speaks of 3 outputs"):
        jb.verify(model(1), BOX, jb.Property.robust(0, 3), progress=False)
    with pytest.raises(jb.ArgumentError, match="lower > upper"):
        jb.verify(model(1), jb.Box(np.ones(3), -np.ones(3)), prop)
    with pytest.raises(jb.ArgumentError, match="norm"):
        jb.verify(model(1), jb.LpBall(np.zeros(3), 1.0, 2), prop)
    with pytest.raises(jb.ArgumentError, match="split"):
        jb.verify(model(1), BOX, prop, method=jb.BranchAndBound(split="both"))
    with pytest.raises(jb.ArgumentTypeError, match="method"):
        jb.verify(model(1), BOX, prop, method=jb.Crown())  # pyright: ignore[reportArgumentType]
    with pytest.raises(jb.HostLoopError, match="verify"):
        jax.jit(lambda x: jb.verify(model(1), BOX, prop) and x)(1.0)


def test_bounds_by_search_are_the_exact_ones(exact):
    """Far nearer to the true extremes than CROWN's, and never beyond them."""
    difference = jb.bound(lambda x: network(make(1), x) @ np.array([1.0, -1.0], np.float32), METHOD, rounding=True)(BOX)
    most = -least(make(1), np.array([-1.0, 1.0]))
    crown = jb.bound(lambda x: network(make(1), x) @ np.array([1.0, -1.0], np.float32), jb.Crown(), rounding=True)(BOX)
    for found, true, loose in ((-difference.lower, -exact[0], -crown.lower), (difference.upper, most, crown.upper)):
        assert true <= float(found) <= true + 0.03 * abs(true - float(loose))
    with pytest.raises(jb.HostLoopError, match="BranchAndBound"):
        jax.jit(lambda x: jb.bound(lambda x: x, METHOD)(jb.Box(x, x)).lower)(jnp.zeros(3))
    with pytest.raises(jb.UnsupportedError, match="one box"):
        jb.bound(lambda x: x, METHOD)(jb.LpBall(jnp.zeros(3), 1.0, 2))


def test_the_margin_counts_what_is_clipped():
    """The parts of a box that are cut off have positive margins, but perhaps smaller ones than what is left."""
    for seed, row in itertools.product((1, 2, 3), ([1.0, -1.0], [0.0, 1.0])):
        value = least(make(seed), np.array(row))
        for shift in (0.02, 0.2):
            prop = jb.Property.of([(row, value - shift)])
            verdict = jb.verify(model(seed), BOX, prop, method=METHOD, attack=False, progress=False)
            assert verdict.lower <= shift + 1e-4, (seed, row)


def test_certify_decides_and_radii_grow(tmp_path):
    """Each example is verified or has a counterexample that the network gets wrong; so do results on disk."""
    layers, draw = make(1), np.random.default_rng(0)
    x = draw.uniform(-1, 1, (5, 3)).astype(np.float32)
    logits = np.asarray(jax.vmap(lambda one: network(layers, one))(x))
    labels = np.argmax(logits, axis=1)
    given = {"method": METHOD, "activation": "relu", "results": tmp_path / "results"}
    report = jb.certify(layers, x, labels, 0.3, **given)
    assert set(report.status) == {"verified", "falsified"} and "falsified" in str(report)
    wrong = report.status == "falsified"
    points = report.counterexamples
    assert points is not None and np.isnan(points[~wrong]).all()
    assert np.all(np.abs(points[wrong].astype(float) - x[wrong]) <= np.float32(0.3))
    there = np.asarray(jax.vmap(lambda one: network(layers, one))(points[wrong]))
    assert np.all(np.argmax(there, axis=1) != labels[wrong])
    again = jb.certify(layers, x, labels, 0.3, **given)
    np.testing.assert_array_equal(again.counterexamples, points)
    radii = jb.certified_radius(layers, x, labels, method=METHOD, activation="relu", steps=8)
    assert np.all((np.asarray(radii) >= 0.3) >= report.verified) and np.all(np.asarray(radii)[wrong] < 0.3)


def test_what_clips_prove_is_verified_in_single_precision():
    """Such a search says no more than that margins are positive: above 1e-308, which float32 takes for 0."""
    x, method = np.full((1, 3), 0.05, np.float32), jb.BranchAndBound(split="input")
    report = jb.certify(make(1), x, np.array([0]), 0.3, method=method, activation="relu")
    assert report.verified.all() and 0 < report.margins.min() < 0.01


NEURONS = {
    "a curve": jnp.tanh,
    "two functions of one value": lambda z: jax.nn.relu(z) - jnp.tanh(z),
    "kinks": lambda z: jnp.clip(z, -1, 1),
    "no turn": jax.nn.softplus,
}


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_of_any_function_are_cut(name):
    """Below the least value that is found the property is proved, where CROWN does not; above it never is."""
    keys = jax.random.split(jax.random.key(0), 2)
    inner, outer = 2 * jax.random.normal(keys[0], (3, 4)), jax.random.normal(keys[1], (4, 1))
    fn = lambda x: NEURONS[name](x @ inner) @ outer  # noqa: E731
    x = np.random.default_rng(0).uniform(-1, 1, (20000, 3)).astype(np.float32)
    least = float(fn(np.concatenate([x, np.sign(x[:100])])).min())
    crown = float(jb.bound(fn, jb.Crown())(BOX).lower[0])
    method = jb.BranchAndBound(split="neuron", max_nodes=2000)
    goal = crown + 0.6 * (least - crown)
    proved = jb.verify(fn, BOX, jb.Property.of([([1.0], goal)]), method=method, progress=False)
    assert proved.status == "verified" and 0 < proved.lower <= least - goal + 1e-5 and proved.nodes > 1
    above = jb.Property.of([([1.0], least + 0.01)])
    never = jb.verify(fn, BOX, above, method=dataclasses.replace(method, max_nodes=100), attack=False, progress=False)
    assert never.status == "unknown" and never.lower <= -0.01 + 1e-5


def test_lines_around_curves_are_tuned():
    """Without a step of tuning 3,000 domains do not suffice; no value is refuted."""
    rng = np.random.default_rng(0)
    first, second, last = (
        rng.normal(size=(a, b)).astype(np.float32) * 1.5 / a**0.5 for a, b in ((6, 8), (8, 8), (8, 1))
    )
    fn = lambda x: jnp.tanh(jnp.tanh(x @ first) @ second) @ last  # noqa: E731
    box = jb.Box(jnp.full(6, -0.5), jnp.full(6, 0.5))
    x = rng.uniform(-0.5, 0.5, (20000, 6)).astype(np.float32)
    least = float(fn(np.concatenate([x, 0.5 * np.sign(x[:5000])])).min())
    crown = float(jb.bound(fn, jb.Crown())(box).lower[0])
    goal = crown + 0.4 * (least - crown)
    how = {"method": jb.BranchAndBound(split="neuron", max_nodes=1000), "attack": False, "progress": False}
    proved = jb.verify(fn, box, jb.Property.of([([1.0], goal)]), **how)
    assert proved.status == "verified" and 0 < proved.lower <= least - goal + 1e-5
    never = jb.verify(fn, box, jb.Property.of([([1.0], least + 0.01)]), **how)
    assert never.status == "unknown" and never.lower <= -0.01 + 1e-5


def test_smooth_functions_are_decided_by_input_splits():
    prop = jb.Property.of([([1.0], -1.1)])
    found = jb.verify(lambda x: jnp.tanh(x[:1]) * 1.0, BOX, prop, method=jb.BranchAndBound(batch=16), progress=False)
    assert found.status == "verified"
