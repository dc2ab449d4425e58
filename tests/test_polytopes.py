"""Balls with a radius per feature, boxes cut by half-spaces and zonotopes: never tighter than a linear program allows."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import jaxbound as jb
from jaxbound.regions import (
    Box,
    LpBall,
    Polytope,
    Zonotope,
    canonical,
    enclosing_box,
    inside,
    is_empty,
    minimizer,
    minimum,
    sample,
    validate,
)

fast_minimum, fast_box, fast_empty = jax.jit(minimum), jax.jit(enclosing_box), jax.jit(is_empty)
SIZE, ROWS = 6, 3


def least(polytope, slope):
    """The least value by linear programming in float64; infinite where there is no point."""
    ends = zip(np.asarray(polytope.box.lower, float), np.asarray(polytope.box.upper, float), strict=True)
    found = linprog(
        np.asarray(slope, float), np.asarray(polytope.A, float), np.asarray(polytope.b, float), bounds=[*ends]
    )
    return found.fun if found.status == 0 else np.inf


def a_polytope(rng, depth=0.3, rows=ROWS, box=None):
    low = rng.normal(size=SIZE).astype("f")
    high = (low + rng.exponential(size=SIZE)).astype("f")
    matrix = rng.normal(size=(rows, SIZE)).astype("f")
    offsets = (matrix @ rng.uniform(low, high) + depth * rng.exponential(size=rows)).astype("f")
    return Polytope(matrix, offsets, box or Box(low, high))


# --- polytopes --------------------------------------------------------------------------------------------------------


def test_a_polytope_is_bounded_as_by_the_linear_program():
    rng, gaps = np.random.default_rng(0), []
    for _ in range(8):
        polytope, slopes = a_polytope(rng), rng.normal(size=(5, SIZE)).astype("f")
        alone = fast_minimum(polytope.box, slopes)
        lower, upper = fast_box(polytope)
        assert np.all(lower >= polytope.box.lower) and np.all(upper <= polytope.box.upper)
        for slope, found, box in zip(slopes, fast_minimum(polytope, slopes), alone, strict=True):
            exact = least(polytope, slope)
            assert found <= exact + 1e-5 and found >= box - 1e-5
            gaps.append((exact - found) / max(exact - box, 1e-2))
        for index, sign in itertools.product(range(SIZE), (1, -1)):
            exact = sign * least(polytope, sign * np.eye(SIZE)[index])
            assert lower[index] <= exact + 1e-6 and upper[index] >= exact - 1e-6
        assert not fast_empty(polytope)
    assert np.mean(gaps) < 0.03


def test_one_row_is_exact():
    rng = np.random.default_rng(1)
    for _ in range(5):
        polytope, slopes = a_polytope(rng, depth=0.01, rows=1), rng.normal(size=(5, SIZE)).astype("f")
        exact = [least(polytope, slope) for slope in slopes]
        np.testing.assert_allclose(fast_minimum(polytope, slopes), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("matrix", "offsets", "empty"),
    [
        ([[0, 0], [0, 0]], [0, 1], False),  # rows of zeros that say nothing
        ([[0, 0], [0, 0]], [-1e-3, 1], True),
        ([[1, 1], [-1, -1]], [1, -1.01], True),  # contradictory
        ([[1, 1], [-1, -1]], [1, -1], False),  # a line
        ([[1, 1], [1, 1]], [-0.01, 5], True),
        ([[1, -1], [-1, 1]], [-0.3, 0.2], True),
        ([[1, 1], [2, 2]], [np.inf, np.inf], False),
        ([[1, 1], [2, 2]], [-np.inf, 1], True),
        ([[1, 1], [2, 2]], [np.nan, 1], True),
        ([[np.inf, 1], [2, 2]], [1, 1], True),
    ],
)
def test_empty_polytopes(matrix, offsets, empty):
    polytope = Polytope(jnp.array(matrix, jnp.float32), jnp.array(offsets, jnp.float32), Box(jnp.zeros(2), jnp.ones(2)))
    assert bool(fast_empty(polytope)) == empty
    if not empty:
        validate(polytope)
        found = jb.bound(jnp.tanh, jb.Crown(), rounding=True)(polytope)
        assert np.all(found.lower <= 1e-6) and np.all(np.isfinite(found.lower))
        return
    with pytest.raises(jb.ArgumentError, match=r"no point of the box|NaN"):
        validate(polytope)
    found = jax.jit(jb.bound(jnp.tanh, jb.Crown()))(polytope)
    assert np.all(np.isneginf(found.lower)) and np.all(np.isposinf(found.upper))


def test_a_polytope_in_half_infinite_boxes():
    simplex = Polytope(jnp.ones((1, 3)), jnp.array([1.0]), Box(jnp.zeros(3), jnp.full(3, jnp.inf)))
    np.testing.assert_allclose(enclosing_box(simplex)[1], 1, rtol=1e-5)
    np.testing.assert_allclose(minimum(simplex, -jnp.array([1.0, 2.0, 3.0])), -3, rtol=1e-4)
    endless = Polytope(jnp.ones((1, 3)), jnp.array([1.0]), Box(jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf)))
    assert minimum(endless, jnp.ones(3)) == -np.inf and not is_empty(endless)


def test_rows_of_float64_and_of_subnormal_numbers_are_rounded_outward():
    box = Box(np.full(2, 1.0, "f"), np.full(2, 2.0, "f"))
    third = Polytope(np.full((1, 2), 1 / 3), np.array([2 / 3 + 1e-12]), box)  # only (1, 1) and a little more
    own = canonical(third)
    assert own.A.dtype == own.b.dtype == jnp.float32
    assert np.all(np.asarray(own.A, float) @ np.array([1 + 1e-12, 1.0]) <= np.asarray(own.b, float))
    small = Polytope(np.full((1, 2), 1e-40, "f"), np.array([2e-40], "f"), box)  # the same point
    assert not is_empty(small) and minimum(small, -np.ones(2, "f")) <= -2


def test_the_gradient_of_a_polytopes_least_value():
    polytope = a_polytope(np.random.default_rng(2), depth=0.05, rows=1)
    slope = np.random.default_rng(3).normal(size=SIZE).astype("f")
    value = lambda offsets, slope: minimum(Polytope(polytope.A, offsets, polytope.box), slope)  # noqa: E731
    by_offset, by_slope = jax.jit(jax.grad(value, (0, 1)))(polytope.b, slope)
    step = np.float32(1e-2)
    numeric = (least(Polytope(polytope.A, polytope.b + step, polytope.box), slope) - least(polytope, slope)) / step
    np.testing.assert_allclose(by_offset[0], numeric, rtol=0.2, atol=1e-3)
    assert np.all(np.isfinite(by_slope))


# --- zonotopes and weighted balls -------------------------------------------------------------------------------------

CENTER = np.array([0.25, -1.0, 2.0], "f")
RADIUS = np.array([0.5, 0.0, 1e-3], "f")
GENERATORS = np.random.default_rng(4).normal(size=(4, 3)).astype("f")


def test_a_zonotope_is_the_image_of_a_box():
    slopes = np.random.default_rng(5).normal(size=(7, 3)).astype("f")
    zonotope, cube = Zonotope(CENTER, GENERATORS), Box(-np.ones(4, "f"), np.ones(4, "f"))
    expected = slopes @ CENTER + fast_minimum(cube, slopes @ GENERATORS.T)
    np.testing.assert_allclose(fast_minimum(zonotope, slopes), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.sum(slopes * minimizer(zonotope, slopes), 1), expected, rtol=1e-5, atol=1e-5)
    corners = CENTER + np.array([*itertools.product((-1, 1), repeat=4)], float) @ GENERATORS.astype(float)
    lower, upper = enclosing_box(zonotope)
    assert np.all(lower <= corners.min(0)) and np.all(upper >= corners.max(0))
    np.testing.assert_allclose(lower, corners.min(0), rtol=1e-5)
    points = np.asarray(sample(zonotope, jax.random.key(0), (50,)))
    assert np.all(slopes @ points.T >= np.asarray(expected)[:, None] - 1e-5)
    point = Zonotope(CENTER, np.zeros((2, 3), "f"))
    np.testing.assert_array_equal(enclosing_box(point), [CENTER, CENTER])
    assert is_empty(Zonotope(CENTER, np.full((1, 3), np.nan)))


@pytest.mark.parametrize("norm", [1, 2, 3, np.inf])
@pytest.mark.parametrize("clip", [None, (CENTER - np.float32(0.25), CENTER + np.float32(1.0))])
def test_a_ball_with_a_radius_per_feature(norm, clip):
    ball = LpBall(CENTER, RADIUS, norm, clip=clip)
    slopes = np.random.default_rng(6).normal(size=(5, 3)).astype("f")
    found = np.asarray(fast_minimum(ball, slopes))
    units = np.random.default_rng(7).normal(size=(20000, 3))
    units /= np.maximum(np.linalg.norm(units, norm, axis=1, keepdims=True), 1e-9)
    points = CENTER + RADIUS.astype(float) * units
    if clip is not None:
        points = points[np.all((points >= clip[0]) & (points <= clip[1]), axis=1)]
    reached = (slopes.astype(float) @ points.T).min(axis=1)
    assert np.all(found <= reached + 1e-6) and np.all(found >= reached - 2e-2)
    np.testing.assert_allclose(np.sum(slopes * minimizer(ball, slopes), 1), found, rtol=1e-5, atol=1e-5)
    for extremes in (False, True):
        drawn = np.asarray(sample(ball, jax.random.key(0), (20,), extremes=extremes), float)
        offset = np.abs(drawn - CENTER)
        assert np.all(offset[:, 1] == 0)
        size = np.linalg.norm(offset[:, ::2] / RADIUS[::2].astype(float), norm, axis=1)
        assert np.all(size <= 1 + 3e-3)  # the center itself is rounded
    assert not is_empty(ball)
    assert is_empty(LpBall(CENTER, RADIUS, norm, clip=(CENTER + np.array([0, 1e-3, 0], "f"), 9.0)))


def test_weighted_balls_at_the_ends_of_numbers():
    slope = jnp.ones(3)
    for norm in (1, 2):
        assert minimum(LpBall(CENTER, np.array([0.5, np.inf, 0.1], "f"), norm), slope) == -np.inf
        assert minimum(LpBall(CENTER, np.array([0.5, np.nan, 0.1], "f"), norm), slope) == -np.inf
        flat = LpBall(CENTER, np.zeros(3, "f"), norm)
        np.testing.assert_allclose(minimum(flat, slope), CENTER.sum(), rtol=1e-6)
        wide = LpBall(np.zeros(3, "f"), np.array([1e10, 1e-20, 1.0], "f"), norm)
        np.testing.assert_allclose(
            minimum(wide, jnp.array([0.0, 1e20, 1.0])), -2 if norm == 1 else -np.sqrt(2), rtol=0.5
        )
        assert np.isfinite(
            jax.grad(lambda r, norm=norm: minimum(LpBall(CENTER, r, norm), slope))(np.zeros(3, "f"))
        ).all()
        moved = canonical(LpBall(np.array([1e-40, 0.0, 1.0], "f"), np.array([0.0, 1.0, 1.0], "f"), norm))
        reach = np.linalg.norm([1e-40 / float(moved.radius[0]), 1 / float(moved.radius[1])], norm)
        assert moved.center[0] == 0 and reach <= 1


# --- methods over them ------------------------------------------------------------------------------------------------

KERNEL = np.random.default_rng(8).normal(size=(3, 5)).astype("f")
LAST = np.random.default_rng(9).normal(size=(5, 2)).astype("f")


def network(x):
    return jax.nn.relu(x @ KERNEL + 0.1) @ LAST


def points_of(region, count=2000):
    if not isinstance(region, Polytope):
        drawn = [sample(region, jax.random.key(k), (count,), extremes=bool(k)) for k in range(2)]
        return np.concatenate(drawn)
    drawn = np.random.default_rng(0).uniform(region.box.lower, region.box.upper, (20 * count, 3)).astype("f")
    return drawn[np.all(drawn @ region.A.T <= region.b, axis=1)][:count]


REGIONS = {
    "l1 weighted": LpBall(CENTER, RADIUS, 1),
    "l2 weighted": LpBall(CENTER, RADIUS, 2, clip=(CENTER - np.float32(0.25), CENTER + np.float32(1.0))),
    "zonotope": Zonotope(CENTER, GENERATORS / 4),
    "polytope": Polytope(np.eye(3, dtype="f")[:2] + 1, np.array([1.0, 0.2], "f"), Box(CENTER - 1, CENTER + 1)),
}


@pytest.mark.parametrize("name", REGIONS)
def test_methods_hold_over_them(name):
    region, found = REGIONS[name], {}
    values = jax.vmap(network)(points_of(region))
    for method in (jb.IBP(), jb.Crown(), jb.LP(), *((jb.Forward(),) if name == "zonotope" else ())):
        bounds = jb.bound(network, method, rounding=True)(region)
        assert np.all(bounds.lower <= values.min(0)) and np.all(bounds.upper >= values.max(0)), method
        found[type(method).__name__] = float(bounds.width.sum())
    assert found["LP"] <= found["Crown"] * 1.001 <= found["IBP"] * 1.001
    planes = jb.linear_bounds(network, jb.Crown())(region)
    np.testing.assert_allclose(planes.concretize(region).width.sum(), found["Crown"], rtol=0.02)


def test_what_cannot_use_a_region_says_so():
    for region in (REGIONS["zonotope"], REGIONS["polytope"]):
        kind = type(region).__name__
        with pytest.raises(jb.ArgumentError, match=kind):
            jb.verify(network, region, jb.Property.robust(0, 2))
        with pytest.raises(jb.JaxboundError, match="one box"):
            jb.bound(network, jb.BranchAndBound())(region)
        with pytest.raises(jb.ArgumentError, match="l_2 ball"):
            jb.bound(network, jb.Quadratic())(region)
        with pytest.raises(jb.ArgumentError, match=f"{kind}, which pgd"):
            jb.pgd([(KERNEL, np.zeros(5))], region, np.zeros(1, int), key=jax.random.key(0), activation="relu")
    with pytest.raises(jb.ArgumentError, match="l_2 ball"):
        jb.bound(network, jb.Quadratic())(REGIONS["l2 weighted"])
    with pytest.raises(jb.ArgumentError, match="no points are found"):
        sample(REGIONS["polytope"], jax.random.key(0))


@pytest.mark.parametrize(
    ("text", "region"),
    [
        (r"A has shape \(2, 2\); pass shape \(rows, 3\)", Polytope(np.ones((2, 2)), np.ones(2), Box(np.zeros(3), np.ones(3)))),
        (r"b has shape \(3,\); pass shape \(2,\)", Polytope(np.ones((2, 3)), np.ones(3), Box(np.zeros(3), np.ones(3)))),
        (r"b has shape \(\); pass shape \(2,\)", Polytope(np.ones((2, 3)), 1.0, Box(np.zeros(3), np.ones(3)))),
        ("box is a LpBall; pass a jaxbound.Box", Polytope(np.ones((2, 3)), np.ones(2), LpBall(np.zeros(3), 1.0, 2))),
        (r"batch_ndim is 2", Polytope(np.ones((2, 3)), np.ones(2), Box(np.zeros(3), np.ones(3)), batch_ndim=2)),
        (r"generators have shape \(3,\); pass shape \(count, 3\)", Zonotope(np.zeros(3), np.ones(3))),
        (r"generators have shape \(2, 3\); pass shape \(2, count, 3\)", Zonotope(np.zeros((2, 3)), np.ones((2, 3)), batch_ndim=1)),
        ("center is int", Zonotope(np.zeros(3, int), np.ones((1, 3)))),
    ],
)  # fmt: skip
def test_refusals(text, region):
    with pytest.raises(jb.JaxboundError, match=text):
        validate(region)


def test_batches_of_regions():
    rng, count = np.random.default_rng(10), 3
    center = rng.normal(size=(count, 3)).astype("f")
    layers = [(KERNEL, np.zeros(5, "f")), (LAST, np.zeros(2, "f"))]
    zonotopes = Zonotope(center, rng.normal(size=(count, 2, 3)).astype("f") / 9, batch_ndim=1)
    rows = rng.normal(size=(count, 2, 3)).astype("f")
    offsets = np.einsum("bmn,bn->bm", rows, center) + np.float32(0.05)
    polytopes = Polytope(rows, offsets, Box(center - np.float32(0.2), center + np.float32(0.2)), batch_ndim=1)
    plain = lambda x: jax.nn.relu(x @ KERNEL) @ LAST  # noqa: E731
    for batch in (zonotopes, polytopes):
        found = jb.crown(layers, batch, activation="relu")
        one = jax.tree.map(lambda leaf: leaf[1], batch)
        alone = jb.bound(plain, jb.Crown())(dataclasses.replace(one, batch_ndim=0))
        np.testing.assert_allclose(found.lower[1], alone.lower, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(inside(batch), center, atol=1e-6)
    labels = np.asarray(jax.vmap(plain)(center)).argmax(1)
    report = jb.certify(layers, zonotopes, labels, method=jb.Crown(), activation="relu", batch_size=2)
    margins = jb.margins(layers, zonotopes, labels, method=jb.Crown(), activation="relu")
    np.testing.assert_allclose(report.margins, margins, rtol=1e-4, atol=1e-5)
    empty = Polytope(rows, offsets - np.float32(9), polytopes.box, batch_ndim=1)
    report = jb.certify(layers, empty, labels, method=jb.IBP(), activation="relu", batch_size=3)
    assert not report.verified.any() and "3 of 3" in report.remarks[0]


def test_polytopes_in_float64():
    with jax.enable_x64(True):
        polytope = Polytope(np.array([[1.0, 1.0]]), np.array([1.0]), Box(np.zeros(2), np.ones(2)))
        np.testing.assert_allclose(minimum(polytope, np.array([-1.0, -2.0])), -2, rtol=1e-12)
        zonotope = Zonotope(np.zeros(2), np.eye(2))
        np.testing.assert_allclose(minimum(zonotope, np.array([1.0, 2.0])), -3, rtol=1e-14)
