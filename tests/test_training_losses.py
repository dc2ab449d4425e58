"""Losses: upper bounds of the cross-entropy over the ball, mixtures by hand, regularisers, BatchNorm, fusion."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_problems
from training_problems import CLIP, Problem, worst_sampled

import jaxbound as jb
from jaxbound.training import losses
from jaxbound.training.fusion import FusedLoss
from jaxbound.training.losses import AdversarialLoss, MarginLoss, Objective, TradesLoss

METHODS = [jb.IBP(), jb.CrownIBP(), jb.Crown(), jb.FastLin()]


@pytest.fixture(scope="module")
def small():
    return training_problems.small()


@pytest.fixture(scope="module")
def residual():
    return training_problems.residual()


# --- per example ------------------------------------------------------------------------------------------------------


def test_robust_loss_is_the_cross_entropy_of_ten_columns():
    """Scattered to all classes with 0 at the label, negated: what the original computes."""
    bounds = jax.random.normal(jax.random.key(0), (7, 9)) * 5
    labels = jnp.array([0, 9, 3, 4, 5, 1, 2])
    spec = jb.margin_spec(labels, 10)
    wide = jnp.zeros((7, 10)).at[jnp.arange(7)[:, None], jnp.argmin(spec, axis=2)].set(bounds)
    expected = optax.softmax_cross_entropy_with_integer_labels(-wide, labels)
    np.testing.assert_allclose(losses.robust(bounds), expected, rtol=1e-6)


def test_robust_loss_of_extreme_bounds_is_finite():
    bounds = jnp.array([[1e4, 1e4], [-1e4, 1e4], [0.0, 0.0]])
    np.testing.assert_allclose(losses.robust(bounds), [0, 1e4, np.log(3)], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda b: losses.robust(b).sum())(bounds)).all()


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(("norm", "eps"), [(np.inf, 0.1), pytest.param(2, 0.2, marks=pytest.mark.slow)])
def test_robust_loss_bounds_the_cross_entropy(small, method, norm, eps):
    hard = MarginLoss(method, norm, CLIP)(small.clean(), eps, 1.0)
    assert np.all(hard.loss >= worst_sampled(small, eps, norm) - 1e-4)
    assert np.all(hard.holds == np.all(small.margins(eps, method, norm=norm) > 0, axis=1))


def test_robust_loss_at_radius_zero_is_natural(small):
    for method in METHODS:
        hard = MarginLoss(method)(small.clean(), 0.0, 0.5)
        np.testing.assert_allclose(hard.loss, losses.natural(small.clean().logits, small.labels), rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_margins_mix_inside_the_loss(small, beta):
    tight, loose = small.margins(0.1, jb.CrownIBP()), small.margins(0.1, jb.IBP())
    assert float(jnp.max(tight - loose)) > 0.01, "the two methods must differ here"
    found = MarginLoss(jb.CrownIBP())(small.clean(), 0.1, beta).loss
    np.testing.assert_allclose(found, losses.robust(beta * tight + (1 - beta) * loose), rtol=1e-4)
    assert np.all(found >= worst_sampled(small, 0.1) - 1e-4)


def test_mixture_of_infinite_bounds_at_either_end(small):
    """0 · inf must not become NaN: at beta = 1 IBP has no say."""
    found = losses.mixed_margins(
        small.variables, small.x, small.labels, jnp.inf, 1.0, method=jb.CrownIBP(), apply_fn=small.model.apply
    )
    assert not np.isnan(found).any()


@dataclass(frozen=True)
class Guess(jb.Method):
    """A method that only estimates: IBP's bounds, called an estimate."""

    guarantee: ClassVar[str] = "estimate"

    def bound(self, graph, leaves, request):
        return jb.IBP().bound(graph, leaves, request)


def test_estimates_make_a_loss(small):
    found = MarginLoss(Guess())(small.clean(), 0.1, 1.0).loss
    np.testing.assert_allclose(found, MarginLoss(jb.IBP())(small.clean(), 0.1, 1.0).loss, rtol=1e-6)


@dataclass(frozen=True)
class Drawn(Guess):
    """An estimate that depends on a key, as random projections do."""

    key: jax.Array | None = None

    def bound(self, graph, leaves, request):
        (found,) = super().bound(graph, leaves, request)
        shape = found.lower.shape[1:]
        return [found._replace(lower=found.lower + jax.random.normal(self.key, shape))]


def test_random_methods_draw_anew_in_every_step(small):
    clean, term = small.clean(), MarginLoss(Drawn(jax.random.key(0)))
    own, one, other = (term(clean._replace(key=k), 0.1, 1.0).loss for k in (None, jax.random.key(1), jax.random.key(2)))
    assert np.all(own != one) and np.all(one != other)
    np.testing.assert_array_equal(own, term(clean._replace(key=jax.random.key(0)), 0.1, 1.0).loss)


def test_divergence():
    one = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    other = jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1]]))
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0]
    np.testing.assert_allclose(losses.divergence(one, other), expected, atol=1e-6)


# --- adversarial terms ------------------------------------------------------------------------------------------------


def test_adversarial_loss_lies_between_natural_and_robust(small):
    clean = small.clean()
    found = jax.jit(lambda eps: AdversarialLoss(steps=10)(clean, eps, 1.0))(0.1)
    assert np.all(found.loss >= losses.natural(clean.logits, small.labels) - 0.05)
    assert np.all(found.loss <= MarginLoss(jb.Crown())(clean, 0.1, 1.0).loss + 1e-4)
    assert float(jnp.mean(found.loss - losses.natural(clean.logits, small.labels))) > 0.01, "the attack found something"


@pytest.mark.slow
def test_adversarial_gradient_is_that_of_fixed_points(small):
    attack = AdversarialLoss(steps=3)

    def loss(params):
        clean = small.clean()._replace(variables={"params": params})
        return attack(clean, 0.1, 1.0).loss.sum()

    clean = small.clean()
    points = jb.pgd(small.variables, small.x, small.labels, 0.1, key=clean.keys, steps=3, restarts=2,
                    apply_fn=small.model.apply, clip=CLIP).x  # fmt: skip

    def at_points(params):
        return losses.natural(small.model.apply({"params": params}, points), small.labels).sum()

    params = small.variables["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 jax.grad(loss)(params), jax.grad(at_points)(params))  # fmt: skip


def test_trades_is_natural_plus_divergence(small):
    clean, attack = small.clean(), AdversarialLoss(steps=5)
    logits, _ = attack.attacked(clean, 0.1)
    found = TradesLoss(2.0, attack)(clean, 0.1, 1.0).loss
    expected = losses.natural(clean.logits, small.labels) + 2 * losses.divergence(clean.logits, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(
        TradesLoss(2.0, attack)(clean, 0.0, 1.0).loss, losses.natural(clean.logits, small.labels), rtol=1e-4
    )


# --- regularisers and the objective -----------------------------------------------------------------------------------


def test_l1_leaves_biases_out(small):
    params = small.variables["params"]
    expected = sum(np.abs(params[name]["kernel"]).sum() for name in params)
    assert float(losses.l1(params)) == pytest.approx(expected, rel=1e-5)


def test_activity_by_hand(small):
    params = jax.tree.map(np.asarray, small.variables["params"])
    low, high = np.clip(small.x - 0.1, 0, 1), np.clip(small.x + 0.1, 0, 1)
    expected = 0
    for name in ("Dense_0", "Dense_1"):
        middle, radius = (low + high) / 2, (high - low) / 2
        middle = middle @ params[name]["kernel"] + params[name]["bias"]
        radius = radius @ np.abs(params[name]["kernel"])
        low, high = middle - radius, middle + radius
        expected = expected + np.maximum(np.minimum(high, -low), 0).sum(axis=1)
        low, high = np.maximum(low, 0), np.maximum(high, 0)
    activity = jax.jit(
        lambda eps: losses.activity(small.variables, small.x, eps, apply_fn=small.model.apply, clip=CLIP)
    )
    np.testing.assert_allclose(activity(0.1), expected, rtol=1e-4)
    assert np.all(activity(0.0) < 1e-4)


@pytest.mark.parametrize("kappa", [0.25, *(pytest.param(k, marks=pytest.mark.slow) for k in (0.0, 1.0))])
def test_objective_adds_up(small, kappa):
    objective = Objective(small.model.apply, MarginLoss(jb.CrownIBP()), l1_weight=1e-3, activity_weight=1e-2)
    clean = small.clean()
    found = jax.jit(objective)(small.variables, small.x, small.labels, 0.1, kappa, 0.5, clean.keys)
    hard = MarginLoss(jb.CrownIBP())(clean, 0.1, 0.5)
    plain = losses.natural(clean.logits, small.labels)
    moving = losses.activity(small.variables, small.x, 0.1, apply_fn=small.model.apply, clip=CLIP)
    expected = (1 - kappa) * hard.loss + kappa * plain + 1e-3 * losses.l1(small.variables["params"]) + 1e-2 * moving
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4)
    np.testing.assert_array_equal(found.unverified, ~hard.holds)
    np.testing.assert_array_equal(found.wrong, np.argmax(clean.logits, 1) != small.labels)


def test_ties_and_nan_are_wrong():
    logits = jnp.array([[1.0, 1.0], [2.0, 1.0], [jnp.nan, 1.0], [1.0, 2.0]])
    assert losses._is_correct(logits, jnp.zeros(4, int)).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "term",
    [
        pytest.param(MarginLoss(jb.IBP()), marks=pytest.mark.slow),
        pytest.param(MarginLoss(jb.CrownIBP()), marks=pytest.mark.slow),
        FusedLoss(),  # of both bounds, in its two halves
    ],
    ids=["IBP", "CROWN-IBP", "fused"],
)
def test_gradients_against_finite_differences(term, small):
    with jax.enable_x64(True):
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (small.variables, small.x))
        keys = jax.random.split(jax.random.key(9), len(small.x))
        objective = Objective(small.model.apply, term)

        @jax.jit
        @jax.value_and_grad
        def loss(variables):
            return objective(variables, given[1], small.labels, 0.07, 0.3, 0.6, keys).loss.mean()

        direction = jax.tree.map(
            lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype), given[0]
        )
        slope = sum(
            jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(loss(given[0])[1]), jax.tree.leaves(direction), strict=True)
        )
        ahead, behind = (jax.tree.map(lambda a, b, s=s: a + s * 1e-6 * b, given[0], direction) for s in (1, -1))
        assert float(slope) == pytest.approx(float(loss(ahead)[0] - loss(behind)[0]) / 2e-6, rel=1e-5)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [jb.IBP(), pytest.param(jb.CrownIBP(), marks=pytest.mark.slow)], ids=repr)
def test_bounds_freeze_the_clean_statistics(residual, method):
    """The bound is one of the network in eval mode with the batch's own statistics, and holds for it."""
    keys = jax.random.split(jax.random.key(9), len(residual.x))
    objective = jax.jit(Objective(residual.model.apply, MarginLoss(method)))
    found = objective(residual.variables, residual.x, residual.labels, 0.02, 0.0, 1.0, keys)
    apply = jax.jit(functools.partial(residual.model.apply, train=True, mutable=["batch_stats"]))
    logits, moved = apply(residual.variables, residual.x)
    frozen = Problem(residual.model, {**residual.variables, **moved}, residual.x, residual.labels)
    np.testing.assert_allclose(found.natural, losses.natural(logits, residual.labels), rtol=1e-4)
    np.testing.assert_allclose(found.robust, losses.robust(frozen.margins(0.02, method)), rtol=1e-4)
    assert np.all(found.robust >= worst_sampled(frozen, 0.02, count=50) - 1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found.statistics, moved["batch_stats"])
    zero = objective(residual.variables, residual.x, residual.labels, 0.0, 0.0, 1.0, keys)
    np.testing.assert_allclose(zero.robust, found.natural, rtol=1e-3, atol=1e-4)
