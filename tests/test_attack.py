"""PGD: reaches the minimum of linear margins, never leaves the region, keeps the best point, ignores batch size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbound.certificates.attack import pgd, pgd_on_function
from jaxbound.regions import Box, LpBall, minimum, per_example

KEY = jax.random.key(0)
WEIGHTS = np.random.default_rng(0).normal(size=(3, 6)).astype("f")
X = np.random.default_rng(1).uniform(0.2, 0.8, (4, 6)).astype("f")
LABELS = np.array([0, 2, 1, 1])

attack = jax.jit(partial(pgd_on_function), static_argnames=("function", "steps", "restarts"))


def linear(x):
    return WEIGHTS @ x.reshape(-1)


def wavy(x):
    return jnp.stack([jnp.sin(7 * x).sum(), jnp.cos(5 * x).sum(), jnp.tanh(x).sum()])


def margin(function, x, label):
    logits = np.asarray(function(x), np.float64)
    return logits[label] - np.delete(logits, label).max()


def exact(region):
    """The least margin of the linear network: over the region, margin against each class is linear."""
    least = []
    for label, slope in zip(LABELS, WEIGHTS[LABELS], strict=True):
        rows = jnp.asarray(np.delete(slope - WEIGHTS, label, axis=0))
        least.append(rows)
    rows = jnp.stack(least).reshape(4, 2, *np.shape(jax.tree.leaves(region)[0])[1:])
    return jnp.min(jax.vmap(minimum)(per_example(region), rows), axis=-1)


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    "region",
    [
        LpBall(X, 0.1, np.inf, batch_ndim=1),
        LpBall(X, 0.3, np.inf, clip=(0.0, 1.0), batch_ndim=1),
        LpBall(X, np.array([0.1, 0.2, 0.3, 0.4], "f"), 2, batch_ndim=1),
        LpBall(X, 0.5, 2, clip=(0.0, 1.0), batch_ndim=1),
        LpBall(X, 0.5, 3, clip=(0.0, 1.0), batch_ndim=1),
        LpBall(X, 0.5, 1, clip=(0.0, 1.0), batch_ndim=1),
        LpBall(X.reshape(4, 2, 3), 0.3, 2, batch_ndim=2),
        Box(X - 0.1 * np.arange(6, dtype="f"), X + 0.2),
    ],
    ids=lambda region: type(region).__name__ + str(getattr(region, "norm", "")),
)
def test_linear_margins_are_minimised(region):
    x = X.reshape(np.shape(jax.tree.leaves(region)[0]))
    found = attack(linear, x, region, LABELS, key=KEY, steps=100)
    best = exact(region)
    start = np.array([margin(linear, x, label) for x, label in zip(X, LABELS, strict=True)])
    assert np.all(found.margin >= best - 1e-5)  # a point below the exact minimum would lie outside the region
    assert np.all(found.margin <= best + 0.02 * (start - best))
    np.testing.assert_array_equal(found.success, found.margin <= 0)
    for point, value, label in zip(found.x, found.margin, LABELS, strict=True):
        np.testing.assert_allclose(margin(linear, point, label), value, atol=1e-5)


def test_points_stay_inside_and_the_best_is_kept():
    region = LpBall(X, 0.4, 1.5, clip=(0.125, 0.875), batch_ndim=1)
    start = np.array([margin(wavy, x, label) for x, label in zip(X, LABELS, strict=True)])
    near = attack(wavy, X, region, LABELS, key=KEY, steps=5, step_size=0.2)
    far = attack(wavy, X, region, LABELS, key=KEY, steps=5, step_size=100.0)  # overshoots, but never loses x itself
    many = attack(wavy, X, region, LABELS, key=KEY, steps=5, step_size=0.2, restarts=4)
    for found in (near, far, many):
        distance = np.linalg.norm(np.asarray(found.x, np.float64) - X, 1.5, axis=-1)
        assert np.all(distance <= 0.4 * (1 + 1e-6)) and np.all((found.x >= 0.125) & (found.x <= 0.875))
        assert np.all(found.margin <= start + 1e-5)
    assert np.all(near.margin < start)
    assert np.all(many.margin <= near.margin + 1e-5)


def test_restarts_leave_a_flat_start():
    x, region = np.zeros((2, 3), "f"), Box(-np.ones((2, 3), "f"), np.ones((2, 3), "f"))

    def flat(x):
        return jnp.stack([1 - jnp.sum(x**2), 0.0])

    alone = attack(flat, x, region, np.zeros(2, int), key=KEY, steps=20)
    np.testing.assert_array_equal(alone.margin, 1)
    assert not np.any(alone.success)
    again = attack(flat, x, region, np.zeros(2, int), key=KEY, steps=20, restarts=2)
    np.testing.assert_allclose(again.margin, -2, atol=1e-5)


def test_results_do_not_depend_on_the_batch():
    region = LpBall(X, 0.2, np.inf, batch_ndim=1)
    some = LpBall(X[:2], 0.2, np.inf, batch_ndim=1)
    run = partial(attack, wavy, steps=0, restarts=3)
    whole, part = run(X, region, LABELS, key=KEY), run(X[:2], some, LABELS[:2], key=KEY)
    np.testing.assert_allclose(part.x, whole.x[:2], rtol=1e-5)
    keys = jax.random.split(jax.random.key(1), 4)
    turned = LpBall(X[::-1], 0.2, np.inf, batch_ndim=1)
    forth, back = run(X, region, LABELS, key=keys), run(X[::-1], turned, LABELS[::-1], key=keys[::-1])
    np.testing.assert_allclose(back.x[::-1], forth.x, rtol=1e-5)
    assert not np.allclose(forth.x, whole.x)
    raw = run(X, region, LABELS, key=jax.random.PRNGKey(0))  # typed and raw keys are the same numbers
    np.testing.assert_allclose(raw.x, whole.x, rtol=1e-5)
    np.testing.assert_allclose(run(X, region, LABELS, key=jax.random.key_data(keys)).x, forth.x, rtol=1e-5)
    with pytest.raises(ValueError, match="3 keys for 4 examples"):
        pgd_on_function(wavy, X, region, LABELS, key=keys[:3])


def test_nan_and_ties_are_successes():
    x, labels = np.array([[0.5], [0.5]], "f"), np.array([0, 0])
    region = Box(np.zeros((2, 1), "f"), np.ones((2, 1), "f"))

    def hole(x):  # undefined below 0.2, where the margin falls to
        return jnp.stack([jnp.where(x[0] < 0.2, jnp.nan, 1 + x[0]), 0.0])

    found = attack(hole, x, region, labels, key=KEY, steps=20)
    assert np.all(np.isnan(found.margin)) and np.all(found.success) and np.all(found.x < 0.2)
    tie = attack(lambda x: jnp.stack([x[0], x[0]]), x, region, labels, key=KEY, steps=2)
    assert np.all(tie.margin == 0) and np.all(tie.success)
    cliff = attack(lambda x: jnp.stack([jnp.sqrt(x[0]) + 1, 0.0]), x, region, labels, key=KEY, steps=10)
    np.testing.assert_array_equal(cliff.x, 0)  # the infinite slope at 0 does not spoil the point
    assert np.all(cliff.margin == 1) and not np.any(cliff.success)


def test_an_undefined_gradient_spoils_no_point():
    x = np.full((1, 2), 0.5, "f")

    def kink(x):  # the derivative in x0 is NaN at the start, the margin is not
        return jnp.stack([jnp.where(x[0] > 0.5, jnp.sqrt(x[0] - 0.5), 0) + 1 + x[1], 0.0])

    found = attack(kink, x, Box(x - 0.5, x + 0.5), np.array([0]), key=KEY, steps=10)
    np.testing.assert_array_equal(found.x, [[0.5, 0.0]])
    assert found.margin[0] == 1 and not found.success[0]


def test_start_outside_and_zero_radius():
    region = LpBall(X, 0.1, 2, batch_ndim=1)
    found = attack(wavy, X + 5, region, LABELS, key=KEY, steps=0)
    assert np.all(np.linalg.norm(np.asarray(found.x, np.float64) - X, axis=-1) <= 0.1 * (1 + 1e-6))
    still = attack(wavy, X, LpBall(X, 0.0, 1, batch_ndim=1), LABELS, key=KEY, steps=3)
    np.testing.assert_array_equal(still.x, X)
    endless = attack(linear, X, LpBall(X, np.inf, 2, batch_ndim=1), LABELS, key=KEY, steps=5)
    assert np.all(np.isfinite(endless.x)) and np.all(endless.success)


def test_scalar_examples():
    x = np.array([0.5, 0.6], "f")
    for norm in (1, 2):
        region = LpBall(x, 0.25, norm, batch_ndim=1)
        found = attack(lambda x: jnp.stack([x, 0.0]), x, region, np.zeros(2, int), key=KEY, steps=10)
        np.testing.assert_allclose(found.x, x - 0.25, rtol=1e-5)


def test_refusals():
    region = LpBall(X, 0.1, 2, batch_ndim=1)
    run = partial(pgd_on_function, linear, key=KEY, steps=1)
    for labels in (np.array([0, 1, 2, 3]), np.array([-1, 0, 0, 0])):
        with pytest.raises(ValueError, match="not one of the network's 3 classes"):
            run(X, region, labels)
    with pytest.raises(TypeError, match="class indices"):
        run(X, region, np.zeros(4, "f"))
    with pytest.raises(ValueError, match="labels have shape"):
        run(X, region, np.zeros(3, int))
    with pytest.raises(ValueError, match="x has shape"):
        run(X[:3], region, LABELS)
    with pytest.raises(ValueError, match="batch_ndim=1"):
        run(X, LpBall(X, 0.1, 2), LABELS)
    with pytest.raises(ValueError, match="restarts=0"):
        run(X, region, LABELS, restarts=0)
    with pytest.raises(ValueError, match="vector of logits"):
        pgd_on_function(lambda x: x.sum(), X, region, LABELS, key=KEY)
    traced = attack(linear, X, region, np.array([0, 1, 3, -1]), key=KEY, steps=1)
    np.testing.assert_array_equal(np.isnan(traced.margin), [False, False, True, True])
    assert np.all(traced.success[2:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_follows_the_region(dtype):
    with jax.enable_x64(dtype == np.float64):
        region = LpBall(X.astype(dtype), dtype(0.2), np.inf, batch_ndim=1)
        found = pgd_on_function(wavy, X, region, LABELS, key=jax.random.key(0), steps=2, restarts=2)
        assert found.x.dtype == found.margin.dtype == dtype


def test_pgd_on_a_dense_chain():
    chain = [{"kernel": WEIGHTS.T, "bias": np.zeros(3, "f")}]
    found = jax.jit(partial(pgd, chain, key=KEY, steps=50, activation="relu"))(X, LABELS, 0.1)
    np.testing.assert_allclose(found.margin, exact(LpBall(X, 0.1, np.inf, batch_ndim=1)), atol=1e-4)
    region = pgd(chain, Box(X - 0.1, X + 0.1), LABELS, key=KEY, steps=50, activation="relu")
    np.testing.assert_allclose(region.margin, found.margin, atol=1e-4)
    single = pgd(chain, X[0], LABELS[0], 0.1, key=KEY, steps=0, activation="relu")
    np.testing.assert_array_equal(single.x, X[0])
    with pytest.raises(ValueError, match="eps"):
        pgd(chain, X, LABELS, key=KEY, activation="relu")


def test_a_step_of_undefined_length_leaves_no_ball():
    found = attack(linear, X, LpBall(X, 0.1, np.inf, batch_ndim=1), LABELS, key=KEY, steps=3, step_size=np.nan)
    np.testing.assert_array_equal(found.x, X)
    assert np.all(np.isfinite(found.margin))
