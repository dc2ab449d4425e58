"""The oracles: programs against independent statements and enumeration, bounds against exact arithmetic and sampling."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import networks
import numpy as np
import oracles
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.graph import tracing
from jaxbound.methods import Method
from jaxbound.methods.exact import LP, MILP, encoding, families, solvers
from jaxbound.methods.exact.program import Ball, Builder, Multipliers, Program, lower_bound
from jaxbound.network.bounding import bound_network

pytest.importorskip("highspy")
pytest.importorskip("clarabel")
optimize = pytest.importorskip("scipy.optimize")

pytestmark = pytest.mark.x64

_LAYERS = {
    "deep": [(4, 5), (5, 5), (5, 2)],
    "tiny": [(2, 3), (3, 3), (3, 2)],
}


def _layers(name: str, scale: float = 1.5) -> list:
    rng = np.random.default_rng(len(name))
    return [(scale * rng.normal(size=s) / np.sqrt(s[0]), 0.5 * rng.normal(size=s[1])) for s in _LAYERS[name]]


def _net(layers, activation=jax.nn.relu):
    def function(x):
        for number, (kernel, bias) in enumerate(layers):
            x = (activation(x) if number else x) @ kernel + bias
        return x

    return function


def _regions(size: int) -> dict:
    center = jnp.linspace(-0.3, 0.4, size)
    return {
        "box": jb.Box(center - 0.7, center + jnp.linspace(0.2, 0.9, size)),
        "linf_clip": jb.LpBall(center, 0.9, np.inf, clip=(-0.5, 0.75)),
        "l1": jb.LpBall(center, 1.25, 1),
        "l1_clip": jb.LpBall(center, 1.25, 1, clip=(-0.5, 0.6)),
        "l2": jb.LpBall(center, 0.9, 2),
        "l2_clip": jb.LpBall(center, 0.9, 2, clip=(-0.4, 0.6)),
    }


REGIONS = tuple(_regions(2))
LINEAR = ("box", "linf_clip", "l1", "l1_clip")


def _ends(found) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(found.lower, float), np.asarray(found.upper, float)


def _inside(outer, inner, tolerance: float = 1e-9) -> None:
    (low, high), (below, above) = _ends(outer), _ends(inner)
    assert np.all(low <= below + tolerance), (low, below)
    assert np.all(high >= above - tolerance), (high, above)


def _close(found, low, high, tolerance: float) -> None:
    assert np.allclose(found.lower, low, rtol=0, atol=tolerance), (found.lower, low)
    assert np.allclose(found.upper, high, rtol=0, atol=tolerance), (found.upper, high)


# --- the bound of a program -------------------------------------------------------------------------------------------


def _random_program(rng: np.random.Generator, balls: bool) -> Program:
    builder, columns = Builder(), 6
    low = rng.normal(size=columns) - 1
    width = 2 * rng.exponential(size=columns)
    index = builder.add_columns(low, low + width)
    middle = low + 0.5 * width
    matrix = rng.normal(size=(4, columns)) * 10.0 ** rng.integers(-3, 4, (4, columns))
    matrix[rng.random(matrix.shape) < 0.3] = 0
    value = matrix @ middle
    row, column = np.nonzero(matrix)
    lower = np.where(rng.random(4) < 0.3, -np.inf, value - rng.exponential(size=4))
    upper = np.where((rng.random(4) < 0.3) & (lower > -np.inf), np.inf, value + rng.exponential(size=4))
    builder.add_rows([(row, column, matrix[row, column])], lower, upper)
    if balls:
        builder.add_ball(index[:3], middle[:3], 0.6)
    return builder.program()


def _lagrangian(program: Program, column: int, sign: float, found: Multipliers) -> Fraction:
    """The bound in exact arithmetic (a ball's norm up to 1e-60), with multipliers of the wrong sign dropped."""
    rows, exact = program.rows, lambda a: [Fraction(float(v)) for v in a]
    y = [
        Fraction(0) if (v > 0 and low == -np.inf) or (v < 0 and high == np.inf) else Fraction(float(v))
        for v, low, high in zip(found.rows, rows.lower, rows.upper, strict=True)
    ]
    total = sum(
        (v * Fraction(float(rows.lower[i] if v > 0 else rows.upper[i])) for i, v in enumerate(y) if v), Fraction(0)
    )
    reduced = [Fraction(0)] * len(program.lower)
    reduced[column] += Fraction(sign)
    for i, j, a in zip(rows.row, rows.column, exact(rows.value), strict=True):
        reduced[j] -= a * y[i]
    for ball, w in zip(program.balls, found.balls, strict=True):
        total += sum(a * b for a, b in zip(exact(w), exact(ball.center), strict=True))
        square = sum(a * a for a in exact(w)) * 10**120
        total -= Fraction(float(ball.radius)) * Fraction(math.isqrt(math.ceil(square)) + 1, 10**60)
        for j, a in zip(ball.columns, exact(w), strict=True):
            reduced[j] -= a
    ends = zip(reduced, exact(program.lower), exact(program.upper), strict=True)
    return total + sum(min(d * low, d * high) for d, low, high in ends)


@pytest.mark.parametrize("balls", [False, True])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_a_bound_is_the_exact_lagrangian_rounded_down(balls, size):
    rng = np.random.default_rng(int(balls))
    for _ in range(40):
        program = _random_program(rng, balls)
        column, sign = int(rng.integers(6)), float(rng.choice([-1, 1]))
        found = Multipliers(size * rng.normal(size=4), (size * rng.normal(size=3),) if balls else ())
        exact, bound = _lagrangian(program, column, sign, found), lower_bound(program, column, sign, found)
        assert Fraction(bound) <= exact
        assert float(exact - Fraction(bound)) <= 1e-10 * (1 + abs(float(exact)) + size * 1e4)


@pytest.mark.parametrize("balls", [False, True])
def test_solvers_reach_the_optimum_and_no_multipliers_pass_it(balls):
    """The optimum by SciPy; over a ball by points of it (from above) and by the bound itself (from below)."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        program = _random_program(rng, balls)
        solver = solvers.solver_of(program)
        dense = np.zeros((4, 6))
        np.add.at(dense, (program.rows.row, program.rows.column), program.rows.value)
        for column, sign in itertools.product(range(6), (1.0, -1.0)):
            cost = sign * np.eye(6)[column]
            best = _optimum(program, dense, cost)
            found = solver.multipliers(column, sign)
            bound = lower_bound(program, column, sign, found)
            assert best - 1e-6 <= bound <= best + 1e-7
            for noise in (1e-6, 1e-2, 1.0, 100.0):
                rows = found.rows + noise * rng.normal(size=4)
                moved = Multipliers(rows, tuple(w + noise * rng.normal(size=len(w)) for w in found.balls))
                assert lower_bound(program, column, sign, moved) <= best + 1e-7


def _optimum(program: Program, dense: np.ndarray, cost: np.ndarray) -> float:
    rows = program.rows
    if not program.balls:
        sides = [(dense, rows.upper), (-dense, -rows.lower)]
        matrix = np.concatenate([m[np.isfinite(ends)] for m, ends in sides])
        ends = np.concatenate([ends[np.isfinite(ends)] for _, ends in sides])
        boxes = list(zip(program.lower, program.upper, strict=True))
        return optimize.linprog(cost, A_ub=matrix, b_ub=ends, bounds=boxes, method="highs").fun
    cvxpy = pytest.importorskip("cvxpy")
    v, (ball,) = cvxpy.Variable(6), program.balls
    limits = [v >= program.lower, v <= program.upper, cvxpy.norm(v[ball.columns] - ball.center, 2) <= ball.radius]
    for row, low, high in zip(dense, rows.lower, rows.upper, strict=True):
        limits += [row @ v >= low] if np.isfinite(low) else []
        limits += [row @ v <= high] if np.isfinite(high) else []
    return float(cvxpy.Problem(cvxpy.Minimize(cost @ v), limits).solve(solver="CLARABEL"))


def test_infinite_ends_bound_nothing_unless_they_are_not_needed():
    builder = Builder()
    index = builder.add_columns(np.array([-np.inf, 0.0]), np.array([np.inf, 1.0]))
    rows = np.zeros(2, int), index, np.array([1.0, -1.0])
    builder.add_rows([rows], np.array([0.0]), np.array([np.inf]))  # v0 >= v1
    program = builder.program()
    assert lower_bound(program, 0, 1.0, Multipliers(np.array([1.0]), ())) <= 0  # d is 0 but for rounding, unbounded
    assert lower_bound(program, 0, 1.0, Multipliers(np.array([0.5]), ())) == -np.inf
    assert lower_bound(program, 0, 1.0, Multipliers(np.array([-1.0]), ())) == -np.inf
    assert lower_bound(program, 1, 1.0) == 0
    assert lower_bound(program, 1, -1.0) == -1
    overflow = Multipliers(np.array([1e308]), ())
    assert lower_bound(program, 1, -1.0, overflow) == -np.inf


# --- rows -------------------------------------------------------------------------------------------------------------

_AFFINE = {
    "dense": lambda x: x.reshape(2, 12) @ jnp.arange(36.0).reshape(12, 3),
    "conv": lambda x: jax.lax.conv_general_dilated(
        x.reshape(1, 4, 3, 2), jnp.arange(16.0).reshape(2, 2, 2, 2) / 7, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "quotient": lambda x: x / jnp.arange(3.0, 27.0),
    "sums": lambda x: jnp.cumsum(x.reshape(4, 6), 1) + x.reshape(6, 4).T,
    "itself twice": lambda x: x + x,
    "window": lambda x: jax.lax.reduce_window(x.reshape(4, 6), 0.0, jax.lax.add, (2, 3), (1, 2), "VALID"),
    "moves": lambda x: jnp.concatenate([x[::2], jnp.ones(3), jnp.take(x, jnp.array([1, 1, 5]))]),
    "scatter": lambda x: x.at[jnp.array([1, 1, 5])].add(jnp.array([0.1, 0.7, 3.0])),
    "masks": lambda x: jnp.where(jnp.arange(24) % 3 == 0, x, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", _AFFINE)
def test_matrices_are_the_functions(name):
    function = _AFFINE[name]
    structure = tracing.build(function, [jax.ShapeDtypeStruct((24,), jnp.float64)], [True])
    constants = structure.constants({})
    own = encoding.Encoding(stated=True)
    own.add_region(0, jb.Box(jnp.zeros(24), jnp.ones(24)), (np.zeros(24), np.ones(24)))
    values = [np.linspace(-1, 1, 24) ** 3]
    for number, node in enumerate(structure.nodes[1:], 1):
        read = [constants[k] for k in node.constants]
        found = encoding.equations(node.op, read)
        value = np.array(found.shift)
        for source, (row, column, entry) in zip(node.inputs, found.matrices, strict=True):
            np.add.at(value, row, entry * values[source][column])
        values.append(value / found.divisor)
        own.add_affine(number, node, found, (values[-1], values[-1]))
    assert np.allclose(values[-1], np.asarray(function(jnp.asarray(values[0]))).ravel(), rtol=0, atol=1e-12)
    program, whole = own.builder.program(), np.concatenate(values)
    attained = np.bincount(program.rows.row, program.rows.value * whole[program.rows.column])
    assert np.allclose(attained, program.rows.lower, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_triangle_has_three_lines_and_a_stable_neuron_two():
    ends = jnp.array([-1.0, 0.5, -3.0, -1.0]), jnp.array([2.0, 1.5, -1.0, 0.0])
    counts = _lines_kept(jax.nn.relu, ends)
    assert np.array_equal(counts[0], [2, 1, 1, 1])
    assert np.array_equal(counts[1], [1, 1, 1, 1])
    counts = _lines_kept(jax.nn.hard_tanh, (jnp.array([-2.0]), jnp.array([3.0])))
    assert counts[0][0] >= 2  # the hull of a clip over both kinks has two edges on each side
    assert counts[1][0] >= 2


def _lines_kept(function, ends) -> tuple[np.ndarray, np.ndarray]:
    op = tracing.build(function, [jax.ShapeDtypeStruct(ends[0].shape, jnp.float64)], [True]).nodes[1].op
    planes = families._family(((op, (), ()), 3), (), [ends])
    low, high = (np.asarray(end) for end in ends)
    z = low + (high - low) * np.linspace(0, 1, 501)[:, None]
    values, keep = np.asarray(function(jnp.asarray(z))), families.facets(planes, ends)
    for side, sign, slopes, intercepts in (
        (0, 1, planes.lower_slopes[0], planes.lower_intercept), (1, -1, planes.upper_slopes[0], planes.upper_intercept),
    ):  # fmt: skip
        heights = sign * (np.asarray(slopes)[:, None] * z + np.asarray(intercepts)[:, None])
        assert np.all(heights <= sign * values + 1e-9)
        kept = np.where(keep[side][:, None], heights, -np.inf).max(axis=0)
        assert np.allclose(kept, heights.max(axis=0), rtol=0, atol=1e-9)  # what is dropped was not needed
    return keep[0].sum(axis=0), keep[1].sum(axis=0)


# --- linear programs against independent statements -------------------------------------------------------------------


def _triangle(layers, region, pre: dict) -> tuple[np.ndarray, np.ndarray]:
    """The triangle program of a ReLU network in cvxpy, from pre-activation bounds."""
    cvxpy = pytest.importorskip("cvxpy")
    x = cvxpy.Variable(len(layers[0][0]))
    if isinstance(region, jb.Box):
        limits = [x >= np.asarray(region.lower), x <= np.asarray(region.upper)]
    else:
        limits = [cvxpy.norm(x - np.asarray(region.center), region.norm) <= float(region.radius)]
        limits += [] if region.clip is None else [x >= region.clip[0], x <= region.clip[1]]
    value = x
    for (kernel, bias), ends in zip(layers[:-1], pre.values(), strict=True):
        z, y = value @ kernel + bias, cvxpy.Variable(len(bias))
        low, high = _ends(ends)
        chord = np.where(low >= 0, 1, np.where(high <= 0, 0, high / np.maximum(high - low, 1e-300)))
        start = np.where((low < 0) & (high > 0), -chord * low, 0)
        limits += [y >= 0, y >= z, y <= cvxpy.multiply(chord, z) + start]
        value = y
    out = value @ layers[-1][0] + layers[-1][1]
    solve = lambda goal: float(cvxpy.Problem(goal, limits).solve(solver="CLARABEL"))  # noqa: E731
    count = len(layers[-1][1])
    return (
        np.array([solve(cvxpy.Minimize(out[k])) for k in range(count)]),
        np.array([solve(cvxpy.Maximize(out[k])) for k in range(count)]),
    )


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("given", [jb.IBP(), pytest.param(jb.Crown(), marks=pytest.mark.slow)], ids=["ibp", "crown"])
def test_the_program_of_triangles(name, given):
    layers, region = _layers("deep"), _regions(4)[name]
    pre = jb.pre_activation_bounds(_net(layers), given)(region)
    _close(jb.bound(_net(layers), LP(pre_activation=given))(region), *_triangle(layers, region, pre), 1e-6)


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.relu,
        pytest.param(jnp.tanh, marks=pytest.mark.slow),
        pytest.param(jax.nn.hard_tanh, marks=pytest.mark.slow),
    ],
    ids=["relu", "tanh", "hard_tanh"],
)
def test_one_line_per_side_and_no_intervals_is_crown(name, activation):
    """Correction 3 of the theory: at every layer, also where the program bounds its own pre-activations."""
    function, region = _net(_layers("deep"), activation), _regions(4)[name]
    one, crown = LP(lines=1, intersect=False), jb.Crown(intersect=False)
    _close(jb.bound(function, one)(region), *_ends(jb.bound(function, crown)(region)), 1e-6)
    mine, theirs = (jb.pre_activation_bounds(function, method)(region) for method in (one, crown))
    assert list(mine) == list(theirs)
    for node in mine:
        _close(mine[node], *_ends(theirs[node]), 1e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ["conv_same", "residual_batchnorm", "fixed_where", "weights_too"])
def test_one_line_per_side_on_other_networks(network):
    function, region = _case(network, "box")
    one, crown = LP(lines=1, intersect=False), jb.Crown(intersect=False)
    found, expected = jb.bound(function, one)(*region), jb.bound(function, crown)(*region)
    _close(found, *_ends(expected), 1e-7)


def _case(network: str, family: str, which: int = 0, dtype=np.float64):
    """A network of the shared table with its parameters closed over, and a region of the family."""
    case = networks.NETWORKS[network]
    leaves = list(networks.regions(network, family).values())[which]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), case.params)
    return lambda *args: case.function(params, *args), [networks.cast(leaf, dtype) for leaf in leaves]


@pytest.mark.slow
def test_more_lines_are_tighter():
    function, region = _net(_layers("deep"), jax.nn.sigmoid), _regions(4)["box"]
    found = [jb.bound(function, LP(pre_activation=jb.Crown(), lines=count))(region) for count in (1, 3, 9)]
    for looser, tighter in itertools.pairwise(found):
        _inside(looser, tighter, 1e-9)
    assert np.all(found[0].width - found[-1].width > 1e-4)


# --- exact answers ----------------------------------------------------------------------------------------------------


def _enumerated(layers, region) -> tuple[np.ndarray, np.ndarray]:
    """The exact range of a ReLU network: one linear program per pattern of active neurons."""
    size, hidden = len(layers[0][0]), [len(bias) for _, bias in layers[:-1]]
    low, high = (np.asarray(end, float) for end in jb.regions.enclosing_box(region))
    count = len(layers[-1][1])
    best = np.full((2, count), np.inf)
    for pattern in itertools.product((0.0, 1.0), repeat=sum(hidden)):
        matrix, shift, rows, ends, first = np.eye(size), np.zeros(size), [], [], 0
        for kernel, bias in layers[:-1]:
            matrix, shift = kernel.T @ matrix, kernel.T @ shift + bias
            active = np.array(pattern[first : first + len(bias)])
            first += len(bias)
            rows.append(np.where(active[:, None] > 0, -matrix, matrix))
            ends.append(np.where(active > 0, shift, -shift))
            matrix, shift = active[:, None] * matrix, active * shift
        rows, ends = np.concatenate([np.zeros((0, size)), *rows]), np.concatenate([np.zeros(0), *ends])
        boxes = list(zip(low, high, strict=True))
        if isinstance(region, jb.LpBall) and region.norm == 1:  # |x - c| <= t, sum t <= radius
            center, eye = np.asarray(region.center), np.eye(size)
            extra = np.block([[eye, -eye], [-eye, -eye], [np.zeros((1, size)), np.ones((1, size))]])
            rows = np.concatenate([np.pad(rows, ((0, 0), (0, size))), extra])
            ends = np.concatenate([ends, center, -center, [float(region.radius)]])
            boxes += [(0, None)] * size
        kernel, bias = layers[-1]
        matrix, shift = kernel.T @ matrix, kernel.T @ shift + bias
        for k, (side, sign) in itertools.product(range(count), enumerate((1, -1))):
            cost = np.pad(sign * matrix[k], (0, len(boxes) - size))
            solved = optimize.linprog(cost, A_ub=rows, b_ub=ends, bounds=boxes, method="highs")
            if solved.status == 0:
                best[side, k] = min(best[side, k], solved.fun + sign * shift[k])
    return best[0], -best[1]


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", LINEAR)
def test_milp_is_enumeration(name):
    layers, region = _layers("tiny"), _regions(2)[name]
    low, high = _enumerated(layers, region)
    for method in (MILP(), MILP(pre_activation=jb.IBP()), MILP(pre_activation=None)):
        found = jb.bound(_net(layers), method)(region)
        _close(found, low, high, 1e-6)
        assert np.all(found.lower <= low + 1e-12)
        assert np.all(found.upper >= high - 1e-12)


def test_milp_by_itself_bounds_every_layer_exactly():
    layers, region = _layers("tiny"), _regions(2)["box"]
    found = jb.pre_activation_bounds(_net(layers), MILP(pre_activation=None))(region)
    for depth, ends in enumerate(found.values(), 1):
        _close(ends, *_enumerated(layers[:depth], region), 1e-6)


def _hat(x):
    return jnp.maximum(0.0, 1 - jnp.abs(x)) - jax.nn.relu6(3 * x) / 4


_PIECEWISE = {
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.25),
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "abs": jnp.abs,
    "hat": _hat,
    "max_pool": lambda x: jnp.max(x.reshape(2, 2), axis=0),
    "maximum": lambda x: jnp.maximum(x[:2], x[2:]),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", _PIECEWISE)
def test_milp_is_the_range_on_a_fine_grid(name):
    """Two inputs: the grid is 1/200 of the box wide, so its range is short of the exact one by little."""
    middle, region = _PIECEWISE[name], _regions(2)["box"]
    rng = np.random.default_rng(5)
    first, b, second = 2 * rng.normal(size=(2, 4)), rng.normal(size=4), rng.normal(size=4)
    function = lambda x: (v := middle(x @ first + b)) @ second[: v.shape[0]] - x[0] / 2  # noqa: E731
    sides = [np.linspace(*pair, 401) for pair in zip(region.lower, region.upper, strict=True)]
    points = np.stack(np.meshgrid(*sides), -1).reshape(-1, 2)
    values = np.asarray(jax.vmap(function)(points))
    found = jb.bound(function, MILP())(region)
    assert values.min() - 0.05 <= found.lower <= values.min() + 1e-12
    assert values.max() - 1e-12 <= found.upper <= values.max() + 0.05
    relaxed = jb.bound(function, LP())(region)
    _inside(relaxed, found, 1e-7)


def test_a_time_limit_keeps_what_was_proved():
    layers, region = _layers("deep"), _regions(4)["box"]
    exact, found = (jb.bound(_net(layers), MILP(time_limit=limit))(region) for limit in (None, 0.0))
    _inside(found, exact, 1e-7)
    assert np.all(np.isfinite(found.width))


# --- soundness and orderings ------------------------------------------------------------------------------------------

_SOUND = [
    ("mlp_relu", "l1"), ("conv_same", "l2_clip"), ("residual_batchnorm", "box"),
    ("max_pool_overlap", "l1_clip"), ("product", "box"), ("logsumexp", "l2"), ("split_min", "linf_clip"),
    ("clamp", "box"), ("sigmoid", "l2_clip"), ("input_skip", "l1"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("network", "family"), _SOUND)
def test_sound_and_tighter_than_crown(network, family):
    """Every attained value lies inside; equal pre-activation bounds order the methods."""
    given = jb.Crown()
    for which in range(2):
        function, leaves = _case(network, family, which)
        crown, relaxed = (
            jb.bound(function, m)(*leaves) for m in (jb.Crown(pre_activation=given), LP(pre_activation=given))
        )
        own = jb.bound(function, LP())(*leaves)
        rng = np.random.default_rng(which)
        points = [oracles.points(leaf, rng, 2000) for leaf in leaves]
        values = jax.vmap(function)(*map(jnp.asarray, points))
        is_interval = lambda node: isinstance(node, jb.Interval)  # noqa: E731
        for looser, tighter, tightest, value in zip(
            *(jax.tree.leaves(tree, is_leaf=is_interval) for tree in (crown, relaxed, own)),
            jax.tree.leaves(values), strict=True,
        ):  # fmt: skip
            scale = 1 + float(jnp.max(jnp.abs(value)))
            _inside(looser, tighter, 1e-6 * scale)
            for found in (tighter, tightest):
                assert np.all(found.lower <= value.min(axis=0) + 1e-12 * scale)
                assert np.all(found.upper >= value.max(axis=0) - 1e-12 * scale)


@pytest.mark.parametrize("name", LINEAR)
def test_every_method_is_inside_the_looser_one(name):
    function, region = _net(_layers("deep")), _regions(4)[name]
    given = jb.IBP()
    methods = given, jb.CrownIBP(), LP(pre_activation=given), LP(), MILP(pre_activation=given)
    ibp, crown, relaxed, own, exact = (jb.bound(function, method)(region) for method in methods)
    for looser, tighter in ((ibp, relaxed), (crown, relaxed), (relaxed, own), (own, exact)):
        _inside(looser, tighter, 1e-7)
    assert np.all(relaxed.width - exact.width > 1e-3)


def _float32_case():
    layers = [(jnp.asarray(k, jnp.float32), jnp.asarray(b, jnp.float32)) for k, b in _layers("deep")]
    region = networks.cast(_regions(4)["l1"], np.float32)
    exact = [(np.asarray(k, float), np.asarray(b, float)) for k, b in layers]
    wide = jb.LpBall(jnp.asarray(region.center, float), float(region.radius), 1)
    return _net(layers), region, _net(exact), wide


def test_float32_rounds_outward():
    """With rounding=True a float32 result contains what float64 proves of the same numbers."""
    function, region, exact, wide = _float32_case()
    for method in (LP(), MILP()):
        found = jb.bound(function, method, rounding=True)(region)
        assert found.lower.dtype == jnp.float32
        narrow = jb.bound(exact, MILP())(wide)
        _inside(found, narrow, 1e-7 if isinstance(method, MILP) else 0)


@pytest.mark.parametrize("value", [0.1, -0.1, 1e-40, -1e-40, 0.0, 3.0])
def test_numbers_leave_outward(value):
    from jaxbound.methods.exact.oracles import _outward

    down, up = float(_outward(value, np.float32, 1)), float(_outward(value, np.float32, -1))
    assert down <= value <= up
    assert up - down <= 1e-7 * abs(value) + 1.2e-38
    assert all(x == 0 or abs(x) >= float(jnp.finfo(np.float32).tiny) for x in (down, up))


# --- whatever the solver does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["box", "l2"])
@pytest.mark.parametrize("fault", ["noise", "huge", "random", "nothing", "swapped"])
def test_a_wrong_dual_solution_loosens_and_never_breaks(monkeypatch, name, fault):
    rng = np.random.default_rng(0)
    layers, region = _layers("deep"), _regions(4)[name]
    right = jb.bound(_net(layers), LP(pre_activation=jb.Crown()))(region)
    for solver in (solvers.Linear, solvers.Cones):
        honest = solver.multipliers

        def wrong(self, column, sign, honest=honest):
            found = honest(self, column, -sign if fault == "swapped" else sign)
            parts = [found.rows, *found.balls]
            size = {"noise": 1e-3, "huge": 1e5, "random": 1.0, "swapped": 0.0}.get(fault)
            if size is None:
                return None
            keep = 0 if fault == "random" else 1
            moved = [keep * part + size * rng.normal(size=part.shape) for part in parts]
            return Multipliers(moved[0], tuple(moved[1:]))

        monkeypatch.setattr(solver, "multipliers", wrong)
    found = jb.bound(_net(layers), LP(pre_activation=jb.Crown()))(region)
    _inside(found, right, 1e-7)
    assert np.all(np.isfinite(found.width))
    free = jb.bound(_net(layers), LP(pre_activation=jb.Crown(), intersect=False))(region)
    _inside(free, right, 1e-7)


# --- batches, sides, regions ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_are_examples_one_by_one():
    layers, x = _layers("tiny"), jnp.array([[0.5, -1.0], [0.0, 0.25], [4.0, 2.0]])
    eps = jnp.array([0.5, 0.75, 0.0])
    for method in (LP(), MILP()):
        whole = bound_network(method, layers, x, eps, norm=1, activation="relu")
        assert whole.lower.shape == (3, 2)
        for k in range(3):
            one = jb.bound(_net(layers), method)(jb.LpBall(x[k], eps[k], 1))
            _close(one, whole.lower[k], whole.upper[k], 1e-9)
        assert float(whole.width[2, 0]) < 1e-6
        lower = bound_network(method, layers, x, eps, norm=1, sides="lower", activation="relu")
        assert lower.upper is None
        assert np.allclose(lower.lower, whole.lower)


def test_every_example_has_its_own_specification():
    layers, x = _layers("tiny"), jnp.array([[0.5, -1.0], [0.0, 0.25], [4.0, 2.0]])
    spec = np.array([[[1.0, -1.0]], [[0.5, 2.0]], [[-1.0, 0.5]]])
    found = bound_network(LP(), layers, x, 0.5, spec=jnp.asarray(spec), activation="relu")
    points = np.asarray(x)[:, None] + np.random.default_rng(6).uniform(-0.5, 0.5, (3, 2000, 2))
    for k in range(3):
        values = oracles.relu_value(layers, points[k]) @ spec[k, 0]
        assert found.lower[k, 0] <= values.min() + 1e-12
        assert values.max() - 1e-12 <= found.upper[k, 0]
        assert found.width[k, 0] <= 2 * np.ptp(values)


@pytest.mark.quick(1)
def test_an_empty_region_is_never_verified():
    layers, x = _layers("tiny"), np.array([[0.5, -0.5], [3.0, 3.0]])
    labels = np.argmax(np.asarray(jax.vmap(_net(layers))(jnp.asarray(x))), axis=1)
    for method in (LP(), MILP()):
        report = jb.certify(layers, x, labels, 1e-6, method=method, clip=(-1.0, 1.0), activation="relu")
        assert np.array_equal(report.verified, [True, False])
        assert np.all(report.margins[1] == -np.inf)
        assert np.all(report.rounding == 0)


def test_endless_and_point_regions():
    function = lambda x: jax.nn.relu(x @ jnp.array([[1.0, 0.0, -1.0], [2.0, 3.0, 0.0]])) @ jnp.eye(3)[:, :2]  # noqa: E731
    found = jb.bound(function, LP())(jb.Box(jnp.array([-np.inf, 0.0]), jnp.array([0.0, 1.0])))
    assert np.all((np.asarray(found.lower) <= 1e-12) & (np.asarray(found.upper) >= [2 - 1e-12, 3 - 1e-12]))
    assert not np.isnan([found.lower, found.upper]).any()
    point = jnp.array([0.3, -0.8])
    for region in (jb.Box(point, point), jb.LpBall(point, 0.0, 2), jb.LpBall(point, 0.0, 1)):
        for method in (LP(), *([] if getattr(region, "norm", 1) == 2 else [MILP()])):
            _close(jb.bound(function, method)(region), function(point), function(point), 1e-6)
    infinite = jb.bound(function, LP())(jb.LpBall(point, jnp.inf, 2, clip=(-1.0, 1.0)))
    _inside(infinite, jb.bound(function, LP())(jb.Box(-jnp.ones(2), jnp.ones(2))), 1e-9)


def test_separate_balls_of_one_leaf():
    """With batch_ndim=1 every row is a ball of its own: sums over rows reach the sum of both norms."""
    function = lambda x: jax.nn.relu(jnp.sum(x * jnp.array([[3.0, 4.0], [-6.0, 8.0]])) + 100.0) * jnp.ones(1)  # noqa: E731
    for norm, reach in ((2, 0.5 * 5 + 2 * 10), (1, 0.5 * 4 + 2 * 8)):
        region = jb.LpBall(jnp.zeros((2, 2)), jnp.array([0.5, 2.0]), norm, batch_ndim=1)
        _close(jb.bound(function, LP())(region), [100 - reach], [100 + reach], 1e-6)


def test_they_compose():
    function, region = _net(_layers("deep")), _regions(4)["box"]
    best = jb.bound(function, jb.Best(jb.IBP(), LP()))(region)
    _inside(best, jb.bound(function, MILP())(region), 1e-7)
    crown = jb.bound(function, jb.Crown(pre_activation=LP()))(region)
    _inside(crown, jb.bound(function, LP())(region), 1e-7)
    affine = jb.bound(lambda x: 2 * x[:2] - 1, LP())(region)
    _close(affine, 2 * region.lower[:2] - 1, 2 * region.upper[:2] - 1, 1e-12)
    assert jb.explain(function, LP())(region).supported


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LP(), MILP()], ids=["LP", "MILP"])
def test_a_trace_is_refused(method):
    function, name = _net(_layers("tiny")), type(method).__name__
    bounded = lambda c: jb.bound(function, method)(jb.Box(c - 1, c + 1)).lower  # noqa: E731
    for transformed, shape in ((jax.jit(bounded), (2,)), (jax.vmap(bounded), (3, 2)), (jax.jacobian(bounded), (2,))):
        with pytest.raises(errors.HostLoopError, match=rf"{name} loops on the host.*use Frown\(\) or Crown\(\) there"):
            transformed(jnp.zeros(shape))


def test_refusals_say_what_to_do():
    function, region = _net(_layers("tiny")), _regions(2)
    with pytest.raises(errors.ArgumentError, match=r"norm is 2, and MILP states only 1, inf; use LP\(\)"):
        jb.bound(function, MILP())(region["l2"])
    with pytest.raises(errors.ArgumentError, match=r"norm is 3, and LP states only 1, 2, inf; use Crown\(\)"):
        jb.bound(function, LP())(jb.LpBall(jnp.zeros(2), 1.0, 3))
    with pytest.raises(errors.UnsupportedError, match=r"MILP cannot bound `.*tanh`.*not piecewise linear; use LP\(\)"):
        jb.bound(_net(_layers("tiny"), jnp.tanh), MILP())(region["box"])
    with pytest.raises(errors.ArgumentError, match="lines is 0; pass 1 or more"):
        jb.bound(function, LP(lines=0))(region["box"])
    with pytest.raises(errors.ArgumentTypeError, match=r"pre_activation is .*pass a method object"):
        jb.bound(function, LP(pre_activation=jb.IBP))(region["box"])  # pyright: ignore[reportArgumentType]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Guess(Method):
    guarantee = "estimate"


def test_an_estimate_is_refused():
    with pytest.raises(errors.ArgumentError, match="_Guess gives an estimate"):
        jb.bound(_net(_layers("tiny")), LP(pre_activation=_Guess()))(_regions(2)["box"])


def test_a_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(solvers.importlib, "import_module", missing)
    with pytest.raises(errors.UnsupportedError, match=r"need the package highspy.*pip install 'jaxbound\[exact\]'"):
        jb.bound(_net(_layers("tiny")), LP())(_regions(2)["box"])


def test_methods_are_pytrees():
    for method in (LP(pre_activation=jb.Crown(), lines=2), MILP(time_limit=3.0)):
        leaves, tree = jax.tree.flatten(method)
        assert jax.tree.unflatten(tree, leaves) == method
        assert hash(tree) == hash(jax.tree.flatten(type(method)(**vars(method)))[1])
    assert LP() == LP()
    assert Ball(np.zeros(1, int), np.zeros(1), 1.0).radius == 1


CHOICES = {
    "of an array": lambda x, c: jnp.where(x @ c > 0.1, x, c[0]),
    "of a number": lambda x, c: jnp.where(x @ c > 0, 2.0, x),
    "the other way": lambda x, c: jnp.where(x > 0.2, c[1], x @ c),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_with_a_constant_stand_in_the_program(name):
    """The planes of a choice have slopes of what it reads alone, not of its constant case: this crashed."""
    draw = np.random.default_rng(0)
    c = jnp.asarray(draw.normal(size=(3, 3)), jnp.float32)
    function, box = lambda x: CHOICES[name](x, c) @ c, jb.Box(-0.7 * jnp.ones(3), 0.7 * jnp.ones(3))
    found, crown = jb.bound(function, LP())(box), jb.bound(function, jb.Crown())(box)
    values = np.asarray(jax.vmap(function)(draw.uniform(-0.7, 0.7, (2000, 3)).astype(np.float32)))
    assert np.all(found.lower <= values.min(axis=0)) and np.all(values.max(axis=0) <= found.upper)
    assert np.mean(found.upper - found.lower) <= np.mean(crown.upper - crown.lower) * 1.0001
