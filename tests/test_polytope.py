"""The convex polytope: exact it is Fast-Lin, projected it estimates Fast-Lin, and an estimate never passes for a bound."""

from __future__ import annotations

import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import errors

KEY = jax.random.key(7)
NORMS = [1, 2, jnp.inf]
SIZES = (6, 9, 8, 4)  # the same in most tests, which then share compiled steps
RADII = {1: 0.4, 2: 0.2, jnp.inf: 0.05}


def layers(sizes, seed=3):
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=pair) * np.sqrt(2 / pair[0]), jnp.float32),
            jnp.asarray(rng.normal(size=pair[1]) / 8, jnp.float32),
        )
        for pair in itertools.pairwise(sizes)
    ]


def images(count, features, seed=0):
    return np.random.default_rng(seed).uniform(size=(count, features)).astype(np.float32)


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found.lower, expected.lower, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.upper, expected.upper, rtol=tolerance, atol=tolerance)


# --- exact ------------------------------------------------------------------------------------------------------------


def dual_bounds(net, low, high):
    """Wong and Kolter's theorem 1 for one box, in NumPy's float64: every layer by dual rows, and by intervals."""
    net = [(np.asarray(kernel, np.float64), np.asarray(bias, np.float64)) for kernel, bias in net]
    ends, box = [], (low, high)
    for depth, (kernel, bias) in enumerate(net):
        middle, reach = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
        interval = middle @ kernel + bias - reach @ np.abs(kernel), middle @ kernel + bias + reach @ np.abs(kernel)
        sides = []
        for sign in (1, -1):
            rows, total = sign * np.eye(len(bias)), 0.0
            for number in range(depth, -1, -1):
                total = total + rows @ net[number][1]
                rows = rows @ net[number][0].T
                if number:
                    least, most = ends[number - 1]
                    open_ = (least < 0) & (most > 0)
                    slope = np.where(open_, most / np.where(open_, most - least, 1), least >= 0)
                    total = total + np.minimum(rows, 0) @ np.where(open_, -slope * least, 0)
                    rows = rows * slope
            sides.append(sign * (total + np.minimum(rows * low, rows * high).sum(axis=1)))
        ends.append((np.maximum(sides[0], interval[0]), np.minimum(sides[1], interval[1])))
        box = tuple(np.maximum(end, 0) for end in interval)
    return ends


def test_without_projections_it_is_the_dual_of_wong_and_kolter():
    net, x = layers(SIZES), images(3, 6)
    found = jb.cap(net, x, 0.07, activation="relu")
    for k, point in enumerate(np.float64(x)):
        low, high = dual_bounds(net, point - np.float32(0.07), point + np.float32(0.07))[-1]
        np.testing.assert_allclose(found.lower[k], low, atol=1e-5)
        np.testing.assert_allclose(found.upper[k], high, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_without_projections_it_is_fast_lin(norm):
    net, x = layers(SIZES), images(3, 6)
    found, expected = (
        jb.cap(net, x, RADII[norm], norm=norm, activation="relu"),
        jb.fastlin(net, x, RADII[norm], norm=norm, activation="relu"),
    )
    assert isinstance(found, jb.Interval)
    np.testing.assert_array_equal(found.lower, expected.lower)
    np.testing.assert_array_equal(found.upper, expected.upper)


def test_without_projections_it_answers_everything_as_fast_lin_does():
    ball = jb.LpBall(jnp.array([0.3, -0.2]), 0.2, 2)

    def function(x):
        return jnp.tanh(jax.nn.relu(3 * x[::-1] - x) * x)

    for transform in (jb.pre_activation_bounds, jb.linear_bounds):
        found, expected = (jax.tree.leaves(transform(function, m)(ball)) for m in (jb.ConvexPolytope(), jb.FastLin()))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_without_projections_it_certifies():
    net, x = layers(SIZES), images(3, 6)
    labels = np.asarray(jb.ibp(net, x, 0.0, activation="relu").lower).argmax(-1)
    method = jb.Best(jb.ConvexPolytope(), jb.Crown(pre_activation=jb.ConvexPolytope()))
    assert method.guarantee == jb.ConvexPolytope().guarantee == "certified"
    assert jb.certify(net, x, labels, 1e-3, method=method, activation="relu").verified.any()


# --- the forward sweep ------------------------------------------------------------------------------------------------
# With at least as many projections as a value has entries, each entry's deviation is pushed forward by itself: the
# estimate is then exact, and has to agree with backward passes that share no code with it.


class Residual(nn.Module):
    """Convolutions, a skip and pooling by means."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3))(x))
        x = x + nn.relu(nn.Conv(3, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


@pytest.mark.parametrize("norm", [1, 2])
def test_pushed_entries_agree_with_backward_passes_on_chains(norm):
    net, x = layers(SIZES), images(3, 6)
    found = jb.cap(net, x, RADII[norm], norm=norm, projections=9, key=KEY, activation="relu")
    close(found, jb.fastlin(net, x, RADII[norm], norm=norm, activation="relu"))


def test_pushed_entries_agree_with_backward_passes_on_residual_networks():
    x = images(2, 25).reshape(2, 5, 5, 1)
    model = Residual()
    params = model.init(jax.random.key(0), x)
    found = jb.cap(params, x, 0.05, apply_fn=model.apply, projections=75, key=KEY)
    close(found, jb.fastlin(params, x, 0.05, apply_fn=model.apply))


def test_pushed_entries_agree_where_the_input_skips_and_two_arguments_are_regions():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)

    def function(x, y):
        z = jax.nn.relu(weight @ x + y)
        return jax.nn.relu(weight.T @ z - x) + y[::-1]

    regions = jb.Box(jnp.full(5, -0.3), jnp.full(5, 0.4)), jb.LpBall(jnp.linspace(-1, 1, 5), 0.3, 2)
    found = jb.pre_activation_bounds(function, jb.ConvexPolytope(8, KEY))(*regions)
    expected = jb.pre_activation_bounds(function, jb.FastLin())(*regions)
    for name in expected:
        close(found[name], expected[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.tanh(3 * x) - 2 * x,
        lambda x: jnp.tanh(x) * x[::-1] + jnp.cumsum(x),
        lambda x: jnp.max(x.reshape(2, 3), axis=1) - 0.7 * jnp.sum(x.reshape(2, 3), axis=1),
        lambda x: jnp.sort(x) - jnp.exp(x) + jnp.where(x[::-1] > 0.1, x, -x),
    ],
    ids=["tanh", "product", "maximum", "choices"],
)
@pytest.mark.parametrize("norm", [jnp.inf, pytest.param(2, marks=pytest.mark.slow)])
def test_planes_that_are_not_parallel_are_sound(function, norm):
    """Pushed entries are exact, so that these estimates must contain everything that is attained."""
    ball = jb.LpBall(jnp.array([0.3, -0.2, 0.1, -0.4, 0.25, 0.0]), 0.3, norm, clip=(-0.5, 0.5))

    def mixed(x):
        value = function(x)
        return (jnp.eye(value.size) - 0.2) @ value

    estimated = jax.jit(jb.pre_activation_bounds(lambda x: jax.nn.relu(mixed(x)), jb.ConvexPolytope(100, KEY)))
    found = list(estimated(ball).values())[-1]
    points = [jb.regions.sample(ball, jax.random.key(1), (4000,), extremes=extremes) for extremes in (True, False)]
    values = jax.vmap(mixed)(jnp.concatenate(points))
    assert (values >= found.lower - 1e-5).all() and (values <= found.upper + 1e-5).all()


# --- estimates --------------------------------------------------------------------------------------------------------


def reaches(net, point, norm, k, seeds=6):
    """Half widths of the last pre-activations, one row per seed."""

    def single(key):
        ball = jb.LpBall(point, RADII[norm], norm)
        found = jb.pre_activation_bounds(lambda v: network(net, v), jb.ConvexPolytope(k, key))(ball)
        return list(found.values())[-1].width / 2

    return np.asarray(jax.jit(jax.vmap(single))(jax.random.split(jax.random.key(5), seeds)))


def network(net, value):
    for number, (kernel, bias) in enumerate(net):
        value = value @ kernel + bias
        value = jax.nn.relu(value) if number < len(net) - 1 else value
    return value


@pytest.mark.parametrize("k", [10, 90])
def test_the_normal_estimator(k):
    """Of k squares with mean 1: the root of their mean has a standard deviation of 1 / sqrt(2k)."""
    net = layers((300, 200, 3))
    exact = RADII[2] * np.linalg.norm(np.asarray(net[0][0], np.float64), axis=0)
    ratios = reaches(net, images(1, 300)[0], 2, k) / exact
    assert ratios.std() == pytest.approx(1 / math.sqrt(2 * k), rel=0.15)
    assert abs(ratios.mean() - 1) < 0.02 + 1 / (4 * k)


def test_the_cauchy_estimator():
    """The median of k |Cauchy| has a standard deviation of pi / (2 sqrt(k)): its density at its median, 1, is 1 / pi."""
    (first, second, last), k = layers((150, 160, 170, 3)), 99
    net = [(first[0], first[1] + 50), second, last]  # every neuron is active: one source deviates
    exact = RADII[jnp.inf] * np.abs(np.asarray(first[0], np.float64) @ np.asarray(second[0], np.float64)).sum(axis=0)
    ratios = reaches(net, images(1, 150)[0], jnp.inf, k) / exact
    assert ratios.std() == pytest.approx(math.pi / 2 / math.sqrt(k), rel=0.25)
    assert abs(ratios.mean() - 1) < 0.08 + 1 / k
    assert (ratios < 0.9).any()  # too narrow: why estimates are refused as certificates


@pytest.mark.slow
@pytest.mark.parametrize("norm", [jnp.inf, 2])
def test_estimates_converge_with_the_number_of_projections(norm):
    net, point = layers((100, 100, 100, 3)), images(1, 100)[0]
    ball = jb.LpBall(point, RADII[norm], norm)
    exact = list(jb.pre_activation_bounds(lambda v: network(net, v), jb.FastLin())(ball).values())[-1].width / 2
    worst = [np.median(np.abs(reaches(net, point, norm, k) / exact - 1)) for k in (5, 50)]
    assert worst[1] < 0.5 * worst[0] and worst[1] < 0.15, worst
    np.testing.assert_allclose(reaches(net, point, norm, 100, 1)[0], exact, rtol=1e-4)


def test_outputs_are_bounded_by_an_exact_pass_over_the_estimates():
    net, x = layers(SIZES), images(3, 6)
    method, box = jb.ConvexPolytope(3, KEY), jb.Box(x[0] - 0.05, x[0] + 0.05)
    ends = list(jb.pre_activation_bounds(lambda v: network(net, v), method)(box).values())
    rows, total = np.eye(4), 0.0
    for number in (2, 1, 0):
        kernel, bias = (np.asarray(part, np.float64) for part in net[number])
        total, rows = total + rows @ bias, rows @ kernel.T
        if number:
            low, high = (np.asarray(end, np.float64) for end in (ends[number - 1].lower, ends[number - 1].upper))
            open_ = (low < 0) & (high > 0)
            slope = np.where(open_, high / np.where(open_, high - low, 1), low >= 0)
            total = total + np.minimum(rows, 0) @ np.where(open_, -slope * low, 0)
            rows = rows * slope
    lower = total + np.minimum(rows * np.asarray(box.lower), rows * np.asarray(box.upper)).sum(axis=1)
    found = jb.cap(net, x, 0.05, projections=3, key=KEY, activation="relu")
    assert (np.asarray(found.lower[0]) >= lower - 1e-4).all()  # equal, but for what intervals alone know better
    assert (np.abs(np.asarray(found.lower[0]) - lower) < 1e-4).any()


def test_estimates_never_pass_what_intervals_know():
    net, x = layers(SIZES), images(3, 6)
    found, known = (
        jb.cap(net, x, 0.3, projections=3, key=jax.random.key(2), activation="relu"),
        jb.ibp(net, x, 0.3, activation="relu"),
    )
    assert (found.lower >= known.lower - 1e-4).all() and (found.upper <= known.upper + 1e-4).all()


def test_the_key_alone_decides():
    net, x = layers(SIZES), images(3, 6)

    def lower(x, key):
        return np.asarray(jb.cap(net, x, 0.05, projections=3, key=key, activation="relu").lower)

    first = lower(x, jax.random.key(0))
    np.testing.assert_array_equal(first, lower(x, jax.random.key(0)))
    np.testing.assert_array_equal(first, lower(x, jax.random.PRNGKey(0)))
    assert (first != lower(x, jax.random.key(1))).any()
    np.testing.assert_allclose(lower(x[[2, 0, 1]], jax.random.key(0))[1], first[0], atol=1e-5)


@pytest.mark.slow
def test_memory_is_a_fraction_of_what_a_row_per_neuron_takes():
    def bytes_needed(method):
        net, x = layers((32, 256, 256, 3)), images(2, 32)
        lower = jax.jit(lambda x: jb.margins(net, x, jnp.zeros(2, int), 0.05, method=method, activation="relu"))
        return lower.lower(x).compile().memory_analysis().temp_size_in_bytes

    projected, exact = bytes_needed(jb.ConvexPolytope(8, KEY)), bytes_needed(jb.FastLin())
    assert 10 * projected < exact, (projected, exact)


# --- what an estimate is and is not -----------------------------------------------------------------------------------


def test_estimates_come_back_as_such():
    net, x = layers(SIZES), images(3, 6)
    box, method = jb.Box(x[0] - 0.1, x[0] + 0.1), jb.ConvexPolytope(3, KEY)
    found = [
        jb.cap(net, x, 0.1, projections=3, key=KEY, activation="relu"),
        jb.bound(lambda v: network(net, v), method)(box),
        jb.bound(lambda v: jnp.ones(2), method)(box),
        *jb.pre_activation_bounds(lambda v: network(net, v), method)(box).values(),
    ]
    for estimate in found:
        assert isinstance(estimate, jb.Estimate) and not isinstance(estimate, jb.Interval)
        assert (estimate.lower <= estimate.upper).all() and (estimate.width >= 0).all()
    assert isinstance(jax.tree.map(lambda leaf: leaf, found[0]), jb.Estimate)
    lower = jb.cap(net, x, 0.1, projections=3, key=KEY, sides="lower", activation="relu")
    assert isinstance(lower, jb.Estimate) and lower.upper is None


def test_estimates_are_refused_where_a_certificate_would_rest_on_them():
    net, x, labels = layers(SIZES), images(3, 6), np.zeros(3, int)
    method, function = jb.ConvexPolytope(3, KEY), lambda v: network(net, v)
    box = jb.Box(x[0] - 0.1, x[0] + 0.1)
    assert method.guarantee == "estimate"
    refused = [
        lambda: jb.certify(net, x, labels, 0.1, method=method, activation="relu"),
        lambda: jb.certified_radius(net, x, labels, method=method, activation="relu"),
        lambda: jb.Best(jb.IBP(), method),
        lambda: jb.bound(function, jb.Crown(pre_activation=method))(box),
        lambda: jb.bound(function, jb.CrownIBP(pre_activation=method))(box),
    ]
    for call in refused:
        with pytest.raises(errors.ArgumentError, match="ConvexPolytope gives an estimate"):
            call()
    with pytest.raises(errors.UnsupportedError, match="ConvexPolytope with projections has no certified linear bounds"):
        jb.linear_bounds(function, method)(box)


def test_malformed_projections_are_refused():
    net, x = layers(SIZES), images(3, 6)
    with pytest.raises(errors.ArgumentError, match="key is None; pass a PRNG key"):
        jb.cap(net, x, 0.1, projections=3, activation="relu")
    for projections in (0, -1, 2.5, "many"):
        with pytest.raises(errors.ArgumentError, match=r"projections is .*; pass None for exact bounds, or 1 or more"):
            jb.cap(net, x, 0.1, projections=projections, key=KEY, activation="relu")
    for norm in (1, 3):
        with pytest.raises(errors.UnsupportedError, match=f"has no projections of l{norm} balls; use norm 2 or inf"):
            jb.cap(net, x, 0.1, norm=norm, projections=3, key=KEY, activation="relu")
    assert np.isfinite(
        jb.cap(net, x, 0.1, norm=3, projections=6, key=KEY, activation="relu").lower
    ).all()  # 6 entries by themselves
    balls = jb.LpBall(x, 0.1, 2, batch_ndim=1)
    with pytest.raises(errors.UnsupportedError, match="has no projections of several balls in one leaf"):
        jb.bound(lambda v: network(net, v), jb.ConvexPolytope(3, KEY))(balls)


def test_estimates_under_transformations():
    net, x = layers(SIZES), images(3, 6)

    @chex.assert_max_traces(n=1)  # another key is another value of the same program
    def single(method, row):
        return jb.bound(lambda v: network(net, v), method)(jb.Box(row - 0.05, row + 0.05))

    compiled = jax.jit(jax.vmap(single, in_axes=(None, 0)))
    found = compiled(jb.ConvexPolytope(3, KEY), x)
    assert isinstance(found, jb.Estimate)
    close(found, jb.cap(net, x, 0.05, projections=3, key=KEY, activation="relu"), 1e-4)
    compiled(jb.ConvexPolytope(3, jax.random.key(1)), x)


@pytest.mark.slow
def test_estimates_can_be_trained_on():
    net, x = layers(SIZES), images(3, 6)

    @jax.jit
    @jax.value_and_grad
    def loss(net):
        return -jb.margins(net, x, np.zeros(3, int), 0.05, method=jb.ConvexPolytope(3, KEY), activation="relu").sum()

    _, slopes = loss(net)
    rng, step = np.random.default_rng(0), 1e-4
    way = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), net)
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(way), strict=True))
    ahead, behind = (loss(jax.tree.map(lambda a, b, s=s: a + s * b, net, way))[0] for s in (step, -step))
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=0.05)


@pytest.mark.x64
@pytest.mark.slow
def test_estimates_in_float64():
    net = [tuple(part.astype(jnp.float64) for part in layer) for layer in layers(SIZES)]
    x = images(3, 6).astype(np.float64)
    found = jb.cap(net, x, 0.05, projections=9, key=KEY, activation="relu")
    assert found.lower.dtype == jnp.float64
    close(found, jb.fastlin(net, x, 0.05, activation="relu"), 1e-12)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("projections", "norm"), [(3, jnp.inf), (3, 2), (9, 2)])
def test_estimates_over_abnormal_regions(projections, norm):
    net, x = layers(SIZES), images(3, 6)
    method = jb.ConvexPolytope(projections, KEY)
    lower = jax.jit(
        lambda radius: jb.margins(net, x, jnp.zeros(3, int), radius, method=method, norm=norm, activation="relu")
    )
    logits = jax.vmap(lambda v: network(net, v))(x)
    np.testing.assert_allclose(lower(0.0), logits[:, :1] - logits[:, 1:], atol=1e-4)
    for radius in (jnp.inf, jnp.nan, -1.0):
        assert (np.asarray(lower(radius)) == -np.inf).all()
