"""Regions: support functions against independent solvers, points that stay inside, outward rounding, refusals."""

import dataclasses
from fractions import Fraction
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jaxbound.regions import (
    Box,
    LpBall,
    enclosing_box,
    is_box,
    is_empty,
    is_region,
    leaf_struct,
    magnitude,
    minimizer,
    minimum,
    per_example,
    project,
    sample,
    validate,
)

UNIT = (0.0, 1.0)

# Compiled once per norm, clip and dtype: every test below calls these with slopes or points of shape (20, 6).
fast_minimum, fast_minimizer, fast_project = jax.jit(minimum), jax.jit(minimizer), jax.jit(project)
fast_sample = jax.jit(sample, static_argnames=("shape", "extremes"))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def problem(rng, norm, dtype=np.float64):
    """A center that may lie outside [0, 1], a radius that reaches the clip box, and slopes of many sizes."""
    center = rng.uniform(-0.4, 1.4, 6).astype(dtype)
    gap = np.linalg.norm((center - np.clip(center, 0, 1)).astype(np.float64), norm)
    radius = dtype(gap + 10 ** rng.uniform(-2, 0.7))
    slope = (rng.normal(size=(20, 6)) * 10 ** rng.uniform(-3, 1, 6)).astype(dtype)
    slope[0, :2] = 0
    return center, radius, slope


def assert_inside(ball, points, slack):
    points, center = np.asarray(points, np.float64), np.asarray(ball.center, np.float64)
    distance = np.linalg.norm(points - center, ball.norm, axis=-1)
    assert np.all(distance <= np.asarray(ball.radius, np.float64) * (1 + slack))
    if ball.clip is not None:
        assert np.all(points >= ball.clip[0]) and np.all(points <= ball.clip[1])


# --- pytrees -------------------------------------------------------------------------------------------------------


def test_regions_are_pytrees_that_survive_any_leaf():
    ball = LpBall(jnp.zeros(3), jnp.ones(()), 2, clip=(jnp.zeros(3), jnp.ones(3)))
    assert jax.tree.structure(ball) == jax.tree.structure(LpBall(ball.center, 1.0, 2.0, clip=ball.clip))
    assert jax.tree.map(lambda leaf: leaf.shape, ball).clip == ((3,), (3,))
    assert jax.tree.map(lambda _: object(), ball).norm == 2.0
    assert jax.eval_shape(lambda region: region, ball).center == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert jax.tree.map(lambda _: 0, ball).clip == (0, 0) and len(jax.tree.leaves(jax.tree.map(lambda _: 0, ball))) == 4
    assert is_region(ball) and is_region(Box(0.0, 1.0)) and not is_region(jnp.zeros(3))
    assert is_box(Box(0.0, 1.0)) and is_box(LpBall(0.0, 1.0, "inf")) and not is_box(ball)


def test_equal_norms_do_not_retrace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(region):
        return minimum(region, jnp.ones(3))

    run(LpBall(jnp.zeros(3), 1.0, 2, clip=UNIT))
    run(LpBall(jnp.ones(3), 2.0, 2.0, clip=[0.0, 1.0]))


def test_numeric_clip_crosses_vmap_and_array_clip_takes_axes():
    norm, rng = 2, np.random.default_rng(0)
    centers, radii, slope = rng.uniform(0, 1, (4, 3)).astype("f"), rng.uniform(0.1, 1, 4).astype("f"), jnp.ones(3)
    loop = [fast_minimum(LpBall(c, r, norm, clip=UNIT), slope) for c, r in zip(centers, radii, strict=True)]
    inside = jax.vmap(lambda c, r: minimum(LpBall(c, r, norm, clip=UNIT), slope))(centers, radii)
    through = jax.vmap(lambda ball: minimum(ball, slope))(LpBall(centers, radii, norm, clip=UNIT))
    low, high = jnp.zeros((4, 3)), jnp.ones(3)
    axes = LpBall(0, 0, norm, clip=(0, None))
    arrays = jax.vmap(lambda ball: minimum(ball, slope), (axes,))(LpBall(centers, radii, norm, clip=(low, high)))
    prefix = jax.vmap(lambda ball: minimum(ball, slope), (LpBall(0, None, norm),))
    shared = prefix(LpBall(centers, radii[0], norm, clip=UNIT))
    for result in (inside, through, arrays):
        np.testing.assert_allclose(result, loop, rtol=1e-6)
    np.testing.assert_allclose(shared[0], loop[0], rtol=1e-6)


def test_leaf_struct_is_that_of_the_center():
    assert leaf_struct(LpBall(np.zeros((2, 3), "f"), 0.1, 2, clip=UNIT)) == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert leaf_struct(Box(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert leaf_struct(LpBall(np.zeros(3, "f"), 0.1, 2, clip=(0, 1))).dtype == jnp.float32
        assert leaf_struct(LpBall(np.zeros(3, "f"), np.float64(0.1), 2)).dtype == jnp.float32


# --- enclosing boxes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [2, np.inf])
def test_enclosing_box_is_outward_in_exact_arithmetic(norm):
    rng = np.random.default_rng(1)
    scale = 10.0 ** rng.integers(-36, 30, 400)
    center = (rng.normal(size=400) * scale).astype("f")
    radius = (np.abs(center) * 10.0 ** rng.uniform(-9, 3, 400)).astype("f")
    radius = np.maximum(radius, np.finfo("f").tiny)  # subnormal numbers count as 0
    center[:3], radius[:3] = (
        np.float32(1e-37),
        np.float32([1e-37, 1.1e-37, 9e-38]),
    )  # but a subnormal difference does not
    lower, upper = jax.vmap(lambda c, r: enclosing_box(LpBall(c, r, norm)))(center, radius)
    tiny = float(np.finfo("f").tiny)
    for c, r, low, high in zip(center, radius, np.asarray(lower), np.asarray(upper), strict=True):
        exact_low, exact_high = Fraction(float(c)) - Fraction(float(r)), Fraction(float(c)) + Fraction(float(r))
        assert Fraction(float(low)) <= exact_low and exact_high <= Fraction(float(high))
        assert float(low) >= float(exact_low) - 2.1 * max(np.spacing(np.float32(abs(exact_low))), tiny)
        assert float(high) <= float(exact_high) + 2.1 * max(np.spacing(np.float32(abs(exact_high))), tiny)


def test_enclosing_box_casts_outward():
    lower, upper = np.array([0.1, -0.1, 0.3, 1e300, -1e-60]), np.array([0.1, -0.1, 0.7, np.inf, 1e-60])

    def check(low, high):
        assert low.dtype == high.dtype == jnp.float32
        assert np.all(np.asarray(low, float) <= lower) and np.all(np.asarray(high, float) >= upper)
        np.testing.assert_allclose(low[:3], lower[:3], rtol=2e-7)

    check(*jax.jit(lambda: enclosing_box(Box(lower, upper)))())
    split = per_example(Box(lower, upper))
    check(split.lower, split.upper)
    with jax.enable_x64(True):
        assert jax.eval_shape(enclosing_box, Box(lower, upper))[0].dtype == jnp.float64
        check(*jax.jit(partial(enclosing_box, dtype=jnp.float32))(Box(lower, upper)))
        low, high = jax.jit(partial(enclosing_box, dtype=jnp.float32))(LpBall(np.full(3, 0.3), 1e-12, np.inf))
        assert np.all(np.asarray(low, float) <= 0.3 - 1e-12) and np.all(np.asarray(high, float) >= 0.3 + 1e-12)
    assert float(enclosing_box(LpBall(jnp.zeros(1), 0.7, np.inf))[1][0]) >= 0.7  # float32(0.7) is below 0.7


def test_casts_outward_survive_compilers():
    """XLA for GPU takes a cast to float32 and back for nothing, and then nothing would be rounded outward."""
    with jax.enable_x64(True):
        values = jnp.asarray(np.random.default_rng(0).normal(size=500) * 10.0 ** np.arange(-50, 50).repeat(5))
        narrow = partial(enclosing_box, dtype=jnp.float32)
        casts = str(jax.make_jaxpr(narrow)(Box(values, values)))
        assert casts.count("reduce_precision[") == 2 and "new_dtype=float64" not in casts
        for run in (narrow, jax.jit(narrow)):
            low, high = (np.asarray(end, np.float64) for end in run(Box(values, values)))
            assert np.all(low <= values) and np.all(high >= values)


def test_enclosing_box_of_zero_infinite_and_per_feature_radius():
    center = jnp.array([0.1, 0.5, 0.9])
    for norm in (2, np.inf):
        np.testing.assert_array_equal(enclosing_box(LpBall(center, 0.0, norm)), [center, center])
        np.testing.assert_array_equal(enclosing_box(LpBall(center, jnp.inf, norm)), [[-np.inf] * 3, [np.inf] * 3])
        np.testing.assert_array_equal(enclosing_box(LpBall(center, jnp.inf, norm, clip=UNIT)), [[0] * 3, [1] * 3])
    lower, upper = enclosing_box(LpBall(center, jnp.array([0.0, 0.2, 0.0]), np.inf))
    np.testing.assert_allclose([lower, upper], [[0.1, 0.3, 0.9], [0.1, 0.7, 0.9]], rtol=1e-6)
    assert lower[0] == upper[0] == center[0]
    lower, upper = enclosing_box(LpBall(jnp.zeros((2, 3)), jnp.array([1.0, 2.0]), np.inf, batch_ndim=1))
    np.testing.assert_allclose(upper, [[1] * 3, [2] * 3], rtol=1e-6)
    np.testing.assert_allclose(magnitude(Box(jnp.array([-3.0, 1.0]), jnp.array([2.0, 2.0]))), [3, 2])


def test_enclosing_box_is_differentiable(double):
    gradient = jax.jit(jax.grad(lambda c, r: enclosing_box(LpBall(c, r, np.inf))[0].sum(), (0, 1)))(jnp.ones(3), 0.5)
    np.testing.assert_array_equal(gradient[0], np.ones(3))
    assert gradient[1] == -3


# --- the support function ------------------------------------------------------------------------------------------


def test_minimum_by_hand():
    # Leaving the clip box's far side costs radius first: 0.2 (p = 1) and 0.3 (p = 2) of it are spent on x0.
    first, second = jnp.array([1.2, 0.6]), jnp.array([1.3, 0.8])
    slope = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(fast_minimum(LpBall(first, 0.4, 1, clip=UNIT), slope), 0.4, rtol=1e-5)
    np.testing.assert_allclose(fast_minimum(LpBall(second, 0.5, 2, clip=UNIT), slope), 0.4, rtol=1e-5)
    np.testing.assert_allclose(minimum(LpBall(first, 0.4, np.inf, clip=UNIT), slope), 0.2, rtol=1e-5)
    # 100.3 - 100 is above 0.3 in float32: not empty but for rounding, and only x0 = 100, x1 = 50 is left.
    barely = LpBall(jnp.array([100.3, 50.0]), 0.3, 2, clip=(0.0, 100.0))
    assert not is_empty(barely)
    np.testing.assert_allclose(fast_minimum(barely, slope), 50, rtol=1e-5)
    # ||(3, 4)||_q: 4 for p = 1, 5 for p = 2, 7 for p = inf.
    for norm, dual in [(1, 4), (2, 5), (np.inf, 7)]:
        value = fast_minimum(LpBall(jnp.ones(2), 2.0, norm), jnp.array([3.0, 4.0]))
        np.testing.assert_allclose(value, 7 - 2 * dual, rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "clip"), [(1, UNIT), (1.5, UNIT), (2, UNIT), (3, UNIT), (40, UNIT), (np.inf, UNIT), (1.001, None)]
)
def test_minimum_equals_a_point_of_the_region(double, norm, clip):
    """A lower bound that a point of the region attains is the minimum: exactness without any solver."""
    rng = np.random.default_rng(2)
    for _ in range(40):
        center, radius, slope = problem(rng, norm)
        ball = LpBall(center, radius, norm, clip=clip)
        value, point = fast_minimum(ball, slope), fast_minimizer(ball, slope)
        assert_inside(ball, point, 1e-14)
        np.testing.assert_allclose(
            value, np.sum(slope * point, axis=-1), atol=1e-12 * np.abs(slope).max() * (radius + 1)
        )


@pytest.mark.parametrize(("norm", "clip"), [(1, None), (1, UNIT), (np.inf, UNIT)])
def test_minimum_equals_linear_programming(double, norm, clip):
    rng = np.random.default_rng(3)
    # |x - center| <= t, with sum t <= radius (p = 1) or t <= radius (p = inf).
    eye, zero = np.eye(6), np.zeros(6)
    rows = np.vstack([np.hstack([eye, -eye]), np.hstack([-eye, -eye]), np.r_[zero, np.ones(6)]])
    for _ in range(10):
        center, radius, slope = problem(rng, norm)
        ends = np.r_[center, -center, radius if norm == 1 else np.inf]
        bounds = [clip or (None, None)] * 6 + [(0, None if norm == 1 else radius)] * 6
        value = fast_minimum(LpBall(center, radius, norm, clip=clip), slope)
        for row in range(3):
            exact = linprog(np.r_[slope[row], zero], rows[: 12 + (norm == 1)], ends[: 12 + (norm == 1)], bounds=bounds)
            np.testing.assert_allclose(value[row], exact.fun, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("norm", [2, 3])
def test_minimum_equals_conic_programming(double, norm):
    cvxpy = pytest.importorskip("cvxpy")
    rng = np.random.default_rng(4)
    for _ in range(6):
        center, radius, slope = problem(rng, norm)
        x = cvxpy.Variable(6)
        inside = [x >= 0, x <= 1, cvxpy.pnorm(x - center, norm) <= radius]
        exact = cvxpy.Problem(cvxpy.Minimize(slope[1] @ x), inside).solve(solver=cvxpy.CLARABEL)
        value = fast_minimum(LpBall(center, radius, norm, clip=UNIT), slope)
        np.testing.assert_allclose(value[1], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_float32_minimum_is_below_every_point_of_the_region(norm):
    rng = np.random.default_rng(5)
    for _ in range(20):
        center, radius, slope = problem(rng, norm, np.float32)
        ball = LpBall(center, radius, norm, clip=UNIT)
        around = (center + rng.normal(size=(20, 6)) * 10 ** rng.uniform(-2, 1, (20, 1))).astype("f")
        points = np.vstack([fast_project(ball, around), fast_minimizer(ball, slope)]).astype(np.float64)
        slack = 20 * np.finfo("f").eps * np.abs(slope).sum(-1) * (np.abs(center).max() + radius)
        assert np.all(np.asarray(fast_minimum(ball, slope), np.float64) <= points @ slope.T.astype(np.float64) + slack)


@pytest.mark.parametrize("norm", [1, 2])
def test_float32_minimum_is_below_the_float64_one_where_ball_and_clip_box_barely_meet(norm):
    rng = np.random.default_rng(6)
    for _ in range(20):
        center, _, slope = problem(rng, norm, np.float32)
        gap = np.linalg.norm((center - np.clip(center, 0, 1)).astype(np.float64), norm)
        radius = np.float32(gap * (1 + 10 ** rng.uniform(-6.5, -3)))
        single = np.asarray(fast_minimum(LpBall(center, radius, norm, clip=UNIT), slope), np.float64)
        with jax.enable_x64(True):
            ball = LpBall(center.astype(np.float64), np.float64(radius), norm, clip=UNIT)
            exact = np.asarray(fast_minimum(ball, slope.astype(np.float64)))
        # The slope's own sum rounds too: a few units of |slope||x|.
        assert np.all(single <= exact + 3e-7 * np.abs(slope) @ np.maximum(np.abs(center), 1))


def test_minimum_of_boxes_and_batches(double):
    rng = np.random.default_rng(7)
    lower, width, slope = rng.normal(size=(2, 3)), rng.uniform(0, 1, (2, 3)), rng.normal(size=(4, 5, 2, 3))
    ends = np.where(slope > 0, lower, lower + width)
    exact = np.sum(slope * ends, (-1, -2))
    np.testing.assert_allclose(fast_minimum(Box(lower, lower + width), slope), exact, rtol=1e-12, atol=1e-14)

    @jax.jit
    def together_and_apart(ball, slope):
        return minimum(ball, slope), jax.vmap(minimum, (0, -2), -1)(per_example(ball), slope).sum(-1)

    for norm, clip in [(1, None), (2, (np.zeros((2, 3)), np.ones(3))), (np.inf, UNIT)]:
        ball = LpBall(np.full((2, 3), 0.5), np.array([0.3, 0.8]), norm, clip=clip, batch_ndim=1)
        np.testing.assert_allclose(*together_and_apart(ball, slope), rtol=1e-9, atol=1e-12)
    one, flat = (LpBall(np.full(shape, 0.5), 0.3, 3) for shape in [(2, 3), (6,)])
    np.testing.assert_allclose(fast_minimum(one, slope), fast_minimum(flat, slope.reshape(4, 5, 6)), rtol=1e-12)
    scalar = LpBall(np.float64(2.0), 0.5, 2)
    np.testing.assert_allclose(fast_minimum(scalar, np.array([3.0, -1.0])), [4.5, -2.5])
    with pytest.raises(ValueError, match="does not end in"):
        minimum(LpBall(np.zeros(3), 0.5, 2), np.ones(4))


def test_vmap_equals_loop():
    rng = np.random.default_rng(8)
    centers, slopes = rng.uniform(-0.1, 1.1, (3, 4)).astype("f"), rng.normal(size=(3, 2, 4)).astype("f")

    def run(center, slope):
        ball = LpBall(center, 0.7, 1.5, clip=UNIT)
        return minimum(ball, slope), minimizer(ball, slope), project(ball, slope)

    mapped, alone = jax.jit(jax.vmap(run))(centers, slopes), jax.jit(run)
    for index in range(3):
        for one, many in zip(alone(centers[index], slopes[index]), mapped, strict=True):
            np.testing.assert_allclose(many[index], one, rtol=1e-5, atol=1e-6)


# --- what is unbounded, undefined or extreme -----------------------------------------------------------------------


def test_zero_coefficients_ignore_what_is_unbounded():
    box = Box(jnp.array([-jnp.inf, 0.0, 2.0]), jnp.array([jnp.inf, 1.0, jnp.inf]))
    slopes = jnp.array([[0, -1, 1], [0, 1, -1], [1, 0, 0], [0, 0, 0], [jnp.nan, 0, 0], [0, jnp.inf, 0]], jnp.float32)
    np.testing.assert_array_equal(fast_minimum(box, slopes), [1, -np.inf, -np.inf, 0, -np.inf, -np.inf])
    gradient = jax.jit(jax.jacrev(lambda slope: minimum(box, slope)))(slopes[:4])
    assert np.all(np.isfinite(gradient))
    assert gradient[3, 3, 2] == 2  # a supergradient at 0 is a point of the interval
    for norm in (1, 2, np.inf):
        expected = [-np.inf, -np.inf, -np.inf, 0, -np.inf, -np.inf]
        np.testing.assert_array_equal(fast_minimum(LpBall(jnp.ones(3), jnp.inf, norm), slopes), expected)
        clipped = LpBall(jnp.ones(3), jnp.inf, norm, clip=(jnp.array(0.0), jnp.array(2.0)))
        np.testing.assert_allclose(fast_minimum(clipped, slopes)[:4], [-2, -2, 0, 0], rtol=1e-6)
        half = dataclasses.replace(clipped, clip=(jnp.array(0.0), jnp.array(jnp.inf)))
        np.testing.assert_array_equal(fast_minimum(half, slopes)[:4], [-np.inf, -np.inf, 0, 0])
        if norm != np.inf:
            for undefined in (jnp.nan, -1.0):
                ball = dataclasses.replace(clipped, radius=jnp.array(undefined))
                np.testing.assert_array_equal(fast_minimum(ball, slopes), [-np.inf] * 6)


@pytest.mark.parametrize("norm", [1, 1.5])
def test_gradients_are_finite_at_zero_and_right_elsewhere(double, norm):
    center, radius, slope = problem(np.random.default_rng(9), norm)

    @jax.jit
    def value(center, radius, low, high, slope):
        cut, whole = (LpBall(center, radius, norm, clip=clip) for clip in ((low, high), None))
        return minimum(cut, slope).sum() + minimum(whole, slope).sum()

    gradient = jax.jit(jax.grad(value, range(5)))
    for size in (0.0, 1e-200, radius):
        for part in gradient(np.clip(center, 0, 1), size, np.zeros(6), np.ones(6), np.zeros((20, 6))):
            assert np.all(np.isfinite(part))
    slope[0] = slope[1]  # at a coefficient of exactly 0 the minimum has a kink
    where = [center, np.array(radius), np.zeros(6), np.ones(6), slope]
    found = gradient(*where)
    # Danskin: the derivative in the slope is the minimiser, here those of both balls.
    points = sum(fast_minimizer(LpBall(center, radius, norm, clip=clip), slope) for clip in (UNIT, None))
    np.testing.assert_allclose(found[4], points, atol=1e-6)
    for number in range(5):
        ends = [[*where[:number], where[number] + step, *where[number + 1 :]] for step in (-1e-6, 1e-6)]
        numeric = (value(*ends[1]) - value(*ends[0])) / 2e-6
        np.testing.assert_allclose(np.sum(found[number]), numeric, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [1.5, 2])
def test_dual_norms_neither_overflow_nor_underflow(norm):
    count = 4 ** (1 - 1 / norm)  # the dual norm of four ones
    whole = LpBall(jnp.zeros(4), jnp.array(0.5), norm)
    cut = dataclasses.replace(whole, clip=(-1.0, 1.0))
    for size in (1e-30, 1e30):
        for ball in (whole, cut):
            value = fast_minimum(ball, jnp.full(4, size, jnp.float32))
            np.testing.assert_allclose(value, -0.5 * size * count, rtol=1e-5)
    small, large = (dataclasses.replace(cut, radius=jnp.array(radius, jnp.float32)) for radius in (1e-30, 1e30))
    np.testing.assert_allclose(fast_minimum(small, jnp.ones(4)), -1e-30 * count, rtol=1e-5)
    np.testing.assert_allclose(fast_minimum(large, jnp.ones(4)), -4, rtol=1e-5)
    assert fast_minimum(dataclasses.replace(whole, radius=large.radius), jnp.full(4, 1e30)) == -np.inf


# --- points --------------------------------------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("norm", "clip", "dtype"),
    [
        (1, UNIT, np.float32),
        (2, None, np.float32),
        (2, UNIT, np.float32),
        (3, UNIT, np.float32),
        (1, None, np.float64),
        (1.5, UNIT, np.float64),
        (2, UNIT, np.float64),
    ],
)
def test_projection_is_inside_idempotent_and_nearest(norm, clip, dtype):
    rng = np.random.default_rng(10)
    eps = np.finfo(dtype).eps
    with jax.enable_x64(dtype == np.float64):
        for _ in range(10):
            center, radius, _ = problem(rng, norm, dtype)
            ball = LpBall(center, radius, norm, clip=clip)
            x = (center + rng.normal(size=(20, 6)) * 10 ** rng.uniform(-2, 2, (20, 1))).astype(dtype)
            y = fast_project(ball, x)
            assert_inside(ball, y, 8 * eps)
            np.testing.assert_array_equal(fast_project(ball, y), y)
            if norm in (1, 2):  # the nearest point y is where <x - y, z> is largest over the region
                away, y = np.asarray(x - y, np.float64), np.asarray(y, np.float64)
                largest = -np.asarray(fast_minimum(ball, (y - x).astype(dtype)), np.float64)
                size = np.linalg.norm(away, axis=-1) * (radius + np.abs(center).max())
                assert np.all(largest - np.sum(away * y, axis=-1) <= 500 * eps * size)
        ball = LpBall(np.full(6, 0.5, dtype), dtype(0.0), norm, clip=clip)
        np.testing.assert_array_equal(fast_project(ball, x), 0.5)


def test_projection_onto_boxes():
    x = jnp.array([[-1.0, 0.5, 3.0]])
    np.testing.assert_array_equal(project(Box(jnp.zeros(3), jnp.ones(3)), x), [[0, 0.5, 1]])
    ball = LpBall(jnp.full(3, 0.5), 0.25, np.inf, clip=(0.3, 1.0))
    np.testing.assert_allclose(project(ball, x), [[0.3, 0.5, 0.75]], rtol=1e-6)


def test_projection_has_finite_gradients():
    center = jnp.full(3, 0.5)
    gradient = jax.jit(jax.grad(lambda r, x: project(LpBall(center, r, 2, clip=UNIT), x).sum(), (0, 1)))
    for radius in (0.0, 0.5):
        for x in (center, center + 1):
            assert all(np.all(np.isfinite(part)) for part in gradient(radius, x))


@pytest.mark.optimised
@pytest.mark.parametrize("norm", [2, np.inf])
def test_samples_are_inside_and_extreme(norm):
    key = jax.random.PRNGKey(0)  # a raw key
    ball = LpBall(jnp.full((2, 3), 0.5), jnp.array([0.2, 0.3]), norm, clip=(0.375, 1.0), batch_ndim=1)
    for extremes in (False, True):
        points = fast_sample(ball, key, (50, 2), extremes=extremes)
        assert points.shape == (50, 2, 2, 3)
        distance = np.linalg.norm(np.asarray(points, np.float64) - 0.5, norm, axis=-1)
        assert np.all(distance <= np.array([0.2, 0.3]) * (1 + 1e-6)) and np.all(points >= 0.375)
        assert np.std(distance[..., 0]) > 1e-3 or extremes
    plain = fast_sample(LpBall(jnp.zeros(3), 2.0, norm), key, (200,), extremes=True)
    if norm == np.inf:
        assert np.any(np.all(np.abs(plain) == 2, axis=-1))  # corners
    else:
        np.testing.assert_allclose(np.linalg.norm(plain, norm, axis=-1), 2, rtol=1e-5)
        assert np.any(np.sum(np.abs(plain) > 1.9, axis=-1) == 1)  # poles


def test_samples_of_regions_without_end_are_finite():
    for endless in (LpBall(jnp.zeros(3), jnp.inf, np.inf), Box(jnp.zeros(3), jnp.full(3, jnp.inf))):
        for extremes in (False, True):
            points = fast_sample(endless, jax.random.key(0), (20,), extremes=extremes)
            assert np.all(np.isfinite(points)) and np.abs(points).max() > 10


# --- emptiness and refusals ----------------------------------------------------------------------------------------


def test_is_empty():
    nan = jnp.array([0.0, jnp.nan])
    two = jnp.array([2.0, 0.5])
    empty = [Box(jnp.ones(2), jnp.zeros(2)), Box(nan, jnp.ones(2)), Box(jnp.zeros(2), nan)]
    full = [Box(jnp.ones(2), jnp.ones(2)), Box(jnp.full(2, -jnp.inf), jnp.full(2, jnp.inf))]
    for norm in (1, 2, np.inf):
        empty += [LpBall(two, -0.1, norm), LpBall(two, jnp.nan, norm), LpBall(nan, 1.0, norm)]
        empty += [LpBall(two, 0.99, norm, clip=UNIT), LpBall(two, 5.0, norm, clip=(1.0, 0.0))]
        empty += [LpBall(two, 5.0, norm, clip=(0.0, jnp.nan))]
        full += [LpBall(two, 0.0, norm), LpBall(two, 1.0, norm, clip=UNIT), LpBall(two, jnp.inf, norm, clip=UNIT)]
        # 1.1 - 1 is above 0.1 in float32: rounding is no reason to call a region empty.
        full += [LpBall(jnp.array([1.1]), 0.1, norm, clip=UNIT), LpBall(jnp.array([-0.1]), 0.1, norm, clip=UNIT)]
        empty += [LpBall(jnp.stack([two, two]), jnp.array([2.0, 0.5]), norm, clip=UNIT, batch_ndim=1)]
    corner = jnp.array([2.0, 2.0])  # distance to the clip box: 2 (p = 1), sqrt 2 (p = 2), 1 (p = inf)
    empty += [LpBall(corner, 1.99, 1, clip=UNIT), LpBall(corner, 1.41, 2, clip=UNIT)]
    full += [
        LpBall(corner, 2.0, 1, clip=UNIT),
        LpBall(corner, 1.42, 2, clip=UNIT),
        LpBall(corner, 1.0, np.inf, clip=UNIT),
    ]
    for region in empty:
        assert is_empty(region), region
    for region in full:
        assert not is_empty(region), region
    assert not jax.jit(is_empty)(full[-1])


@pytest.mark.parametrize(
    ("error", "text", "region"),
    [
        (TypeError, "divide by 255", Box(np.zeros(2, np.uint8), np.ones(2, np.uint8))),
        (TypeError, "center is int32.*divide by 255", LpBall(np.zeros(2, np.int32), 0.1, 2)),
        (TypeError, "lower is bool", Box(np.zeros(2, bool), np.ones(2, bool))),
        (TypeError, "imaginary", LpBall(np.zeros(2, np.complex64), 0.1, 2)),
        (ValueError, "lower has shape.*broadcast", Box(np.zeros(2), np.ones(3))),
        (ValueError, "radius of shape.*batch_ndim=1", LpBall(np.zeros((2, 3)), np.ones(2), 2)),
        (ValueError, "per feature", LpBall(np.zeros((2, 3)), np.ones(3), 2)),
        (ValueError, "batch_ndim=3", LpBall(np.zeros((2, 3)), 0.1, 2, batch_ndim=3)),
        (ValueError, "does not broadcast", LpBall(np.zeros((2, 3)), 0.1, 2, clip=(0.0, np.ones(2)))),
        (ValueError, "does not broadcast", LpBall(np.zeros(3), 0.1, 2, clip=(np.zeros((1, 3)), 1.0))),
        (ValueError, "pair", LpBall(np.zeros(3), 0.1, 2, clip=(0.0, 0.5, 1.0))),
        (ValueError, "p >= 1", LpBall(np.zeros(3), 0.1, 0.5)),
        (ValueError, "p >= 1", LpBall(np.zeros(3), 0.1, np.nan)),
        (ValueError, "NaN", Box(np.array([np.nan]), np.ones(1))),
        (ValueError, "radius is negative", LpBall(np.zeros(3), -0.1, 2)),
        (ValueError, "lower > upper", Box(np.ones(2), np.zeros(2))),
        (ValueError, "does not meet its clip box", LpBall(np.full(3, 3.0), 0.1, 2, clip=UNIT)),
    ],
)
def test_refusals(error, text, region):
    with pytest.raises(error, match=text):
        validate(region)


def test_validate_checks_values_only_where_they_are_concrete():
    validate(LpBall(np.zeros((2, 3)), np.ones((2, 3)), np.inf, clip=(0, np.ones(3))))
    validate(LpBall(jnp.zeros((2, 3)), jnp.ones(2), 2, batch_ndim=1))
    validate(jax.eval_shape(lambda: LpBall(jnp.zeros(3), jnp.ones(()), 2)))

    def inside(center, radius):
        validate(LpBall(center, 0.1, 2, clip=(jnp.zeros(3), jnp.ones(3))))
        validate(Box(center, center - radius))
        with pytest.raises(ValueError, match="negative"):
            validate(LpBall(center, -0.1, 2))
        with pytest.raises(ValueError, match="lower > upper"):
            validate(Box(np.ones(2), np.zeros(2)))
        with pytest.raises(ValueError, match="broadcast"):
            validate(Box(center, jnp.zeros(4)))
        return center

    jax.jit(inside)(jnp.full(3, 9.0), 1.0)


def test_per_example_needs_separate_balls():
    with pytest.raises(ValueError, match="batch_ndim=1"):
        per_example(LpBall(jnp.zeros((2, 3)), 0.1, 2))
    radius = jnp.array([[0.1, 0.0], [0.2, 0.0]])
    ball = per_example(LpBall(jnp.zeros((2, 2)), radius, np.inf, batch_ndim=1))
    np.testing.assert_array_equal(ball.radius, radius)


@pytest.mark.parametrize("norm", [1, 2, 3])
@pytest.mark.parametrize("radius", [1e30, 3e38])
def test_a_ball_of_any_finite_radius_holds_all_of_its_clip_box(norm, radius):
    ball = LpBall(jnp.full(3, 0.5), np.float32(radius), norm, clip=(0.0, 1.0))
    slopes = jnp.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1e-3, -1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(minimum(ball, slopes), [0, -3, -1, 0], atol=1e-6)
    far = dataclasses.replace(ball, clip=(0.0, jnp.array([1.0, 3e38, 3e38])))
    assert minimum(far, jnp.array([1.0, 0.0, 0.0])) <= 0
