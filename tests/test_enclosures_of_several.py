"""Dense checks of the enclosures of choices, meets, logsumexp, sorted entries and roundings: float32 and float64."""

from __future__ import annotations

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as special

import jaxbound as jb
from jaxbound.graph import operations
from jaxbound.relaxations import enclosures
from jaxbound.relaxations.enclosures import logsumexp, meet, product, select, sort, staircase
from jaxbound.relaxations.planes import least_of
from jaxbound.relaxations.slopes import ADAPTIVE, Given

BOTH = pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)])
COUNT, SAMPLES = 600, 400
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def _indicators(rng: np.random.Generator, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Decided, undecided, and somewhere between."""
    low = rng.choice([0.0, 0.0, 1.0, 0.25, -1e-7], COUNT)
    high = np.where(
        low == 1, 1.0, np.where(low == 0, rng.choice([0.0, 1.0, 1.0], COUNT), rng.choice([0.75, 1.0], COUNT))
    )
    return low.astype(dtype), high.astype(dtype)


# --- select ------------------------------------------------------------------------------------------------------------


def _choice(s, a, b):
    return np.where(s == 0, a, np.where(s == 1, b, (1 - s) * a + s * b))


@BOTH
@pytest.mark.parametrize("seed", [0, 1])
def test_planes_around_choices(dtype, seed):
    rng = np.random.default_rng(seed)
    op = dense.node(operations.select, [(COUNT,)] * 3, dtype, "select")
    share, a, b = _indicators(rng, dtype), dense.boxes(rng, (COUNT,), dtype), dense.boxes(rng, (COUNT,), dtype)
    s = np.clip(dense.points(rng, share, SAMPLES), 0, 1)
    at = [s, *(dense.points(rng, ends, SAMPLES) for ends in (a, b))]
    given = [jnp.asarray(rng.choice([0.0, 1.0, 0.5, rng.random()], COUNT), dtype) for _ in range(2)]
    for slopes in (None, given):
        dense.check(op, _choice, [share, a, b], at, slopes=slopes, slack=4)


@BOTH
@pytest.mark.parametrize("constant", [1, 2])
def test_planes_around_choices_of_a_constant(dtype, constant):
    rng = np.random.default_rng(constant)
    bounded = [True, constant != 1, constant != 2]
    op = dense.node(operations.select, [(COUNT,)] * 3, dtype, "select", bounded)
    share, ends = _indicators(rng, dtype), dense.boxes(rng, (COUNT,), dtype)
    fixed = (rng.normal(size=COUNT) * rng.choice([0.0, 1.0, 30.0], COUNT)).astype(dtype)
    at = [np.clip(dense.points(rng, share, SAMPLES), 0, 1), dense.points(rng, ends, SAMPLES)]
    wide = fixed.astype(np.float64)
    value = (lambda s, b: _choice(s, wide, b)) if constant == 1 else (lambda s, a: _choice(s, a, wide))
    dense.check(op, value, [share, ends], at, constants=[jnp.asarray(fixed)], slack=4)


@pytest.mark.x64
def test_a_step_times_a_value_lies_between_chords():
    """u (y - l) / (u - l) above and l (u - y) / (u - l) below, for l < 0 < u; 0 and the value itself otherwise."""
    op = dense.node(lambda s, y: operations.select(s, jnp.zeros_like(y), y), [(5,)] * 2, np.float64, "select")
    low, high = np.array([-1.0, -3.0, -0.5, 0.5, -2.0]), np.array([2.0, 1.0, 0.5, 2.0, -0.5])
    share = np.zeros(5), np.ones(5)
    planes = select.planes(op, [tuple(map(jnp.asarray, ends)) for ends in (share, (low, high))], [])
    l, u = low[:3], high[:3]  # noqa: E741
    assert np.allclose(planes.upper_slopes[1][:3], u / (u - l), rtol=1e-14)
    assert np.allclose(planes.upper_intercept[:3], -u * l / (u - l), rtol=1e-13)
    assert np.allclose(planes.lower_slopes[1][:3], -l / (u - l), rtol=1e-14)
    assert np.allclose(planes.lower_intercept[:3], l * u / (u - l), rtol=1e-13)
    assert not np.any(planes.lower_slopes[0])
    assert not np.any(planes.upper_slopes[0])
    # y > 0: between 0 and y; y < 0: between y and 0
    assert np.allclose(planes.lower_slopes[1][3:], [0, 1])
    assert np.allclose(planes.upper_slopes[1][3:], [1, 0])
    assert np.allclose(planes.lower_intercept[3:], 0, atol=1e-13)
    assert np.allclose(planes.upper_intercept[3:], 0, atol=1e-13)


@pytest.mark.x64
def test_decided_choices_are_exact():
    op = dense.node(operations.select, [(2,)] * 3, np.float64, "select")
    share = jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0])
    a, b = (jnp.array([-1.0, -2.0]), jnp.array([1.0, 3.0])), (jnp.array([5.0, 6.0]), jnp.array([7.0, jnp.inf]))
    low, high = select.interval(op, [share, a, b], [])
    assert np.array_equal(low, [-1.0, 6.0])
    assert np.array_equal(high, [1.0, np.inf])
    planes = select.planes(op, [share, a, b], [])
    for slopes in (planes.lower_slopes, planes.upper_slopes):
        assert np.array_equal(slopes[1], [1.0, 0.0])
        assert np.array_equal(slopes[2], [0.0, 1.0])
    assert not np.any([planes.lower_intercept, planes.upper_intercept])
    assert select.is_exact(op, 0, share).all()
    assert not select.is_exact(op, 1, a).any()


# --- meet --------------------------------------------------------------------------------------------------------------


@BOTH
def test_planes_of_a_meet_hold_for_every_expression(dtype):
    """Two expressions of one value: x from the interval of each, always in both."""
    rng = np.random.default_rng(3)
    op = dense.node(lambda x, y: operations.meet(x, y), [(COUNT,)] * 2, dtype, "meet")
    first = dense.boxes(rng, (COUNT,), dtype)
    at = dense.points(rng, first, SAMPLES)
    slack = np.abs(rng.normal(size=(2, COUNT))).astype(dtype) * rng.choice([0.0, 1.0], (2, COUNT)).astype(dtype)
    second = (
        np.nextafter(at.min(0).astype(dtype), -np.inf) - slack[0],
        np.nextafter(at.max(0).astype(dtype), np.inf) + slack[1],
    )
    places = [jnp.asarray(rng.random(COUNT), dtype) for _ in range(2)]
    for slopes in (None, places):
        planes = meet.planes(
            op, [tuple(map(jnp.asarray, ends)) for ends in (first, second)], [], Given(*slopes) if slopes else ADAPTIVE
        )
        below, above = dense.heights(op, planes, [at, at])
        assert np.all(below <= at + 1e-6 * np.abs(at))
        assert np.all(above >= at - 1e-6 * np.abs(at))
    low, high = meet.interval(op, [tuple(map(jnp.asarray, ends)) for ends in (first, second)], [])
    assert np.all(low <= at) and np.all(at <= high)
    assert np.array_equal(low, np.maximum(first[0], second[0]))
    assert np.array_equal(high, np.minimum(first[1], second[1]))


def test_expressions_that_miss_each_other_give_their_hull():
    op = dense.node(lambda x, y: operations.meet(x, y), [(3,)] * 2, np.float32, "meet")
    first, second = (
        (jnp.array([0.0, 2.0, -jnp.inf]), jnp.array([1.0, 3.0, jnp.inf])),
        (jnp.array([1.5, 0.0, 0.0]), jnp.array([2.0, 1.0, 1.0])),
    )
    low, high = meet.interval(op, [first, second], [])
    assert np.array_equal(low, [0.0, 0.0, 0.0])
    assert np.array_equal(high, [2.0, 3.0, 1.0])


# --- logsumexp -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick(3)
@BOTH
@pytest.mark.parametrize(
    ("shape", "axes"), [((200, 4), (1,)), ((3, 100), (0,)), ((2, 50, 3), (0, 2)), ((100, 1), (1,))]
)
def test_planes_around_logsumexp(dtype, shape, axes):
    rng = np.random.default_rng(4)
    op = dense.node(lambda x: operations.logsumexp(x, axes), [shape], dtype, "logsumexp")
    ends = dense.boxes(rng, shape, dtype)
    at = dense.points(rng, ends, SAMPLES)
    value = lambda x: special.logsumexp(x, axis=tuple(axis + 1 for axis in axes))  # noqa: E731
    planes = dense.check(op, value, [ends], [at], slack=8)
    low, high = logsumexp.interval(op, [tuple(map(jnp.asarray, ends))], [])
    size = 1 + np.abs(ends).max(axis=(0, *(axis + 1 for axis in axes)))
    assert np.all(value(ends[0][None].astype(float))[0] - low < 1e3 * np.finfo(dtype).eps * size)
    assert np.all(high - value(ends[1][None].astype(float))[0] < 1e3 * np.finfo(dtype).eps * size)
    # the tangent plane touches at the middle
    middle = (ends[0].astype(float) + ends[1]) / 2
    below, _ = dense.heights(op, planes, [middle[None]])
    assert np.all(value(middle[None]) - below < 1e3 * np.finfo(dtype).eps * size)


@BOTH
@pytest.mark.parametrize("width", [0.0, 1e-12, 1e-4, 9e-4, 1.1e-3, 1.0, 80.0, 700.0, 1e5])
def test_logsumexp_of_all_widths(dtype, width):
    rng = np.random.default_rng(5)
    op = dense.node(lambda x: operations.logsumexp(x, (1,)), [(50, 3)], dtype, "logsumexp")
    center = rng.normal(size=(50, 3)) * rng.choice([0.0, 1.0, 100.0], (50, 1))
    ends = (center - width / 2).astype(dtype), (center + width / 2).astype(dtype)
    at = dense.points(rng, ends, SAMPLES)
    dense.check(op, lambda x: special.logsumexp(x, axis=2), [ends], [at], slack=8)


@BOTH
def test_logsumexp_of_infinite_ends(dtype):
    op = dense.node(lambda x: operations.logsumexp(x, (1,)), [(4, 2)], dtype, "logsumexp")
    low = np.array([[-np.inf, 0], [-1, -2], [-np.inf, -np.inf], [-np.inf, -np.inf]], dtype)
    high = np.array([[1, 1], [np.inf, 1], [np.inf, 0], [-2, 3]], dtype)
    at = dense.points(np.random.default_rng(6), (low, high), SAMPLES)
    dense.check(op, lambda x: special.logsumexp(x, axis=2), [(low, high)], [at], slack=8)


# --- sorted entries ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("axis", [0, 1])
def test_sorted_entries(dtype, axis):
    rng = np.random.default_rng(7)
    op = dense.node(lambda x: jnp.sort(x, axis=axis), [(30, 5)], dtype, "sort")
    ends = dense.boxes(rng, (30, 5), dtype)
    at = dense.points(rng, ends, SAMPLES)
    dense.check(op, lambda x: np.sort(x, axis=axis + 1), [ends], [at])
    low, high = sort.interval(op, [tuple(map(jnp.asarray, ends))], [])
    assert np.array_equal(low, np.sort(ends[0], axis))
    assert np.array_equal(high, np.sort(ends[1], axis))


# --- roundings -----------------------------------------------------------------------------------------------------------

_ROUNDED = {"floor": np.floor, "ceil": np.ceil, "round": np.round}


@BOTH
@pytest.mark.parametrize("name", _ROUNDED)
def test_lines_around_roundings(dtype, name):
    rng = np.random.default_rng(8)
    op = dense.node(getattr(jnp, name), [(COUNT,)], dtype, "staircase")
    low, high = dense.boxes(rng, (COUNT,), dtype)
    special_ = [(0, 0), (-0.5, 0.5), (0.5, 0.5), (0.5, 1.5), (-1.5, 2.5), (1, 2), (-1, 0), (-0.0, 1), (2.0**24, 2.0**24 + 2),
                (-(2.0**30), 2.0**30), (0.499999, 0.500001), (-np.inf, 0.3), (-0.3, np.inf), (-np.inf, np.inf), (1e30, 2e30)]  # fmt: skip
    for k, (a, b) in enumerate(special_):
        low[k], high[k] = a, b
    low, high = (np.where(rng.random(COUNT) < 0.3, np.round(2 * end) / 2, end).astype(dtype) for end in (low, high))
    low, high = np.minimum(low, high), np.maximum(low, high)
    at = dense.points(rng, (low, high), SAMPLES)
    # near every step, on both of its sides
    near = np.clip(np.round(2 * at) / 2 + rng.choice([0, 1e-9, -1e-9], at.shape), at.min(0), at.max(0))
    for slopes in (
        None,
        (jnp.ones(COUNT, dtype), jnp.ones(COUNT, dtype)),
        (jnp.zeros(COUNT, dtype), jnp.zeros(COUNT, dtype)),
    ):
        dense.check(op, _ROUNDED[name], [(low, high)], [np.concatenate([at, near])], slopes=slopes)


@pytest.mark.x64
def test_roundings_choose_the_closer_line():
    op = dense.node(jnp.floor, [(3,)], np.float64, "staircase")
    ends = jnp.array([0.25, 0.5, -5.0]), jnp.array([0.75, 1.25, 5.0])
    planes = staircase.planes(op, [ends], [])
    assert np.array_equal(planes.lower_slopes[0], [0, 0, 1])
    assert np.array_equal(planes.upper_slopes[0], [0, 1, 1])
    assert np.array_equal(planes.lower_intercept, [0, 0, -1])
    assert np.array_equal(planes.upper_intercept, [0, 0, 0])
    assert staircase.is_exact(op, 0, ends).tolist() == [True, False, False]


# --- all of them -----------------------------------------------------------------------------------------------------------


@pytest.mark.x64
def test_derivatives_are_finite_at_single_points_and_ties():
    """Training meets radius 0; one NaN ruins the step."""
    made = {
        "select": (operations.select, 3), "meet": (lambda x, y: operations.meet(x, y), 2),
        "logsumexp": (lambda x: operations.logsumexp(x, (0,)), 1), "sort": (jnp.sort, 1), "staircase": (jnp.floor, 1),
        "maximum": (lambda x: jnp.max(x, 0), 1),
    }  # fmt: skip
    for kind, (function, count) in made.items():
        op = dense.node(function, [(3,)] * count, np.float64, kind)

        def total(lower, upper, op=op, count=count):
            ends = [(lower, upper)] * count
            planes = enclosures.of(op).planes(op, ends, [])
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((planes, enclosures.of(op).interval(op, ends, []))))

        low, high = jnp.array([0.0, 0.0, 1.0]), jnp.array([0.0, 0.0, 1.0])
        for part in jax.jit(jax.grad(total, (0, 1))).lower(low, high).compile(FAST_COMPILE)(low, high):
            assert np.isfinite(part).all(), kind


@pytest.mark.quick(1)
@pytest.mark.x64
@pytest.mark.parametrize("method", [jb.IBP(), jb.Forward(), jb.Crown()], ids=["IBP", "Forward", "Crown"])
def test_they_batch_and_compile(method):
    def function(x):
        y = jnp.where(x > x[::-1], x, jnp.floor(3 * x))
        return jnp.sort(y), jax.nn.logsumexp(y), jnp.maximum(y, x)

    rng = np.random.default_rng(9)
    center = jnp.asarray(rng.normal(size=(2, 3)))
    one = lambda c: jb.bound(function, method)(jb.Box(c - 0.25, c + 0.25))  # noqa: E731
    both = jax.jit(jax.vmap(one)).lower(center).compile(FAST_COMPILE)(center)
    with jax.disable_jit():
        alone = [one(row) for row in center]
    for k in range(2):
        for batched, single in zip(jax.tree.leaves(both), jax.tree.leaves(alone[k]), strict=True):
            assert np.allclose(batched[k], single, rtol=1e-12, atol=1e-12)


def test_corners_of_products_that_overflow_are_not_forgotten():
    """x y - s x - t y may be inf - inf in some corners: then nothing is known, whichever corner comes first."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice([-3e38, -2e38, -1e19, -1, 0, 1, 2, 1e19, 2e38, 3e38], (400, 2, 2)), axis=2)
    low, high = (jnp.asarray(ends[..., k], jnp.float32) for k in (0, 1))
    found = jax.jit(jax.vmap(jb.bound(lambda x: x[0] * x[1], jb.CrownIBP())))(jb.Box(low, high))
    corners = np.stack([ends[:, 0, i] * ends[:, 1, k] for i in (0, 1) for k in (0, 1)])
    least, most, slack = corners.min(0), corners.max(0), 1e-6 * np.abs(corners).max(0)
    assert np.all(np.asarray(found.lower, np.float64) <= least + slack)
    assert np.all(np.asarray(found.upper, np.float64) >= most - slack)
    big, one, none = jnp.float32(3e38), jnp.float32(1), jnp.float32(0)
    for box, slope in (((one, big), big), ((-big, one), -big)):  # the corner that is not a number comes last, and first
        assert np.isnan(product._extreme([box, box], (slope, none), jnp.less))


_NARROW = {
    "relu": lambda x: jax.nn.relu(x[0]),
    "gelu": lambda x: jax.nn.gelu(x[0]),
    "tanh": lambda x: jnp.tanh(x[0]),
    "max": jnp.max,
    "maximum": lambda x: jnp.maximum(x[0], x[1]),
    "select": lambda x: jnp.where(x[0] > 0, x[1], -x[2]),
    "product": lambda x: x[0] * x[1],
    "logsumexp": jax.nn.logsumexp,
    "sort": lambda x: jnp.sort(x)[0],
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", _NARROW)
def test_bounds_on_the_narrowest_intervals_have_finite_derivatives(name):
    """A chord over a width w has a derivative of order 1 / w^2, which overflows long before w is 0."""
    found = lambda low, high: jb.bound(_NARROW[name], jb.CrownIBP(intersect=False))(jb.Box(low, high))  # noqa: E731
    widths = jnp.asarray([0, 1e-38, 1e-37, 1e-30, 1e-21, 1e-19, 1e-18, 1e-10], jnp.float32)[:, None]
    share = jnp.asarray([0.5, 0.25, 0.75], jnp.float32)
    for gradient in (
        jax.grad(lambda *ends: found(*ends).lower, (0, 1)),
        jax.grad(lambda *ends: found(*ends).upper, (0, 1)),
    ):
        assert np.isfinite(jax.jit(jax.vmap(gradient))(-share * widths, (1 - share) * widths)).all()


def test_the_least_of_several_is_that_of_numpy_and_ties_share_the_derivative():
    odd = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, 1.0, 2.0, -3e38, 3e38, 1e-30], np.float32)
    triples = jnp.asarray(np.stack(np.meshgrid(odd, odd, odd)).reshape(3, -1))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(least_of(triples), np.min(triples, axis=0))
    gradient = jax.jit(jax.grad(lambda values: least_of(values).sum()))
    np.testing.assert_array_equal(gradient(jnp.array([[1.0, 2.0], [1.0, 1.0]])), [[0.5, 0], [0.5, 1]])


# --- given slopes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(5.0, -3.0), (-3.0, 5.0), (np.nan, np.nan)])
@pytest.mark.parametrize(
    "function", [jnp.max, jax.nn.logsumexp, lambda x: x[0] * x[1], lambda x: jnp.floor(x).sum(), lambda x: x[0] * (x[1] > 0)]
)  # fmt: skip
def test_slopes_out_of_range_are_cut_to_it(function, places):
    box = jb.Box(-jnp.ones(3), jnp.array([1.0, 2.0, 1.5]))
    _, made = jb.tune(function, jb.Frown(steps=0))(box)
    slopes = {
        name: tuple(jnp.full_like(s, p) for s, p in zip(pair, places, strict=True)) for name, pair in made.items()
    }
    assert slopes
    found = jb.bound(function, jb.Crown(intersect=False, slopes=slopes))(box)
    values = jax.vmap(function)(jb.regions.sample(box, jax.random.key(0), (200,), extremes=True))
    assert np.all(found.lower <= values + 1e-5) and np.all(found.upper >= values - 1e-5)
