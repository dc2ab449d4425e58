"""Loss fusion: an upper bound by sampling and against the unfused loss, finite everywhere, one row for any classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_problems
from training_problems import CLIP, Problem, problem, worst_sampled

import jaxbound as jb
from jaxbound.training import losses, models
from jaxbound.training.fusion import FusedLoss, _mean_of_exponential, fused
from jaxbound.training.losses import Clean, MarginLoss


@pytest.fixture(scope="module")
def small():
    return training_problems.small()


def fused_of(given: Problem, eps, beta=1.0, **options):
    return fused(given.variables, given.x, given.labels, eps, beta, apply_fn=given.model.apply,
                 **{"method": jb.CrownIBP(), "classes": 10, "clip": CLIP, **options})  # fmt: skip


@pytest.fixture(scope="module")
def compiled(small):
    """The fused loss of the small network around l_inf balls, as one program."""
    return jax.jit(lambda eps, beta: fused_of(small, eps, beta))


@pytest.mark.quick(1)
@pytest.mark.parametrize(("norm", "eps"), [(np.inf, 0.02), (np.inf, 0.1), (np.inf, 1.0), (2, 0.2)])
@pytest.mark.parametrize(
    "beta", [0.5, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_fused_loss_bounds_the_cross_entropy(small, compiled, norm, eps, beta):
    found, _ = compiled(eps, beta) if norm == np.inf else fused_of(small, eps, beta, norm=norm)
    assert np.all(found >= worst_sampled(small, eps, norm) - 1e-4)


@pytest.mark.slow
def test_fused_loss_on_the_residual_network():
    residual = training_problems.residual()
    assert np.all(fused_of(residual, 0.05)[0] >= worst_sampled(residual, 0.05, count=50) - 1e-4)


def test_fused_loss_is_close_to_the_unfused_one(small, compiled):
    """Never looser than IBP's; about as tight as that of CROWN-IBP's margins where the ball is small."""
    for eps in (0.001, 0.05, 0.3):
        found, bounds = compiled(eps, 1.0)
        loose = losses.robust(small.margins(eps, jb.IBP()))
        np.testing.assert_allclose(bounds, small.margins(eps, jb.IBP()), rtol=1e-4, atol=1e-4)
        assert np.all(found <= loose + 1e-4)
    tight = losses.robust(small.margins(0.001, jb.CrownIBP()))
    np.testing.assert_allclose(compiled(0.001, 1.0)[0], tight, rtol=1e-3)


def test_fused_loss_mixes_losses(small, compiled):
    one, _ = compiled(0.1, 1.0)
    loose = losses.robust(small.margins(0.1, jb.IBP()))
    np.testing.assert_allclose(compiled(0.1, 0.25)[0], 0.25 * one + 0.75 * loose, rtol=1e-4)


def test_fused_loss_of_large_logits_is_finite():
    """Without the shift exp overflows beyond 88."""
    given = problem(models.MLP((12,)), (5,), scale=30.0)
    assert float(jnp.max(jnp.abs(given.clean().logits))) > 200

    def total(eps):
        each, _ = fused_of(given, eps)
        return each.sum(), each

    (value, each), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(0.1)
    assert np.isfinite(value) and np.isfinite(slope)
    assert np.all(each >= worst_sampled(given, 0.1) - 1e-3 * value)


@pytest.mark.slow
def test_fused_loss_at_radius_zero_is_natural_with_a_finite_gradient(small):
    def loss(variables):
        each, _ = fused(variables, small.x, small.labels, 0.0, method=jb.CrownIBP(), apply_fn=small.model.apply,
                        classes=10)  # fmt: skip
        return each.sum(), each

    def plain(variables):
        return losses.natural(small.model.apply(variables, small.x), small.labels).sum()

    slope, each = jax.jit(jax.grad(loss, has_aux=True))(small.variables)
    np.testing.assert_allclose(each, losses.natural(small.clean().logits, small.labels), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3),
                 slope, jax.grad(plain)(small.variables))  # fmt: skip


def test_chord_of_the_exponential_and_its_derivative():
    widths = np.concatenate([np.logspace(-12, 2, 200), [0.0, 0.1, np.nextafter(np.float32(0.1), np.float32(0))]])
    exact = np.where(widths > 1e-8, -np.expm1(-widths) / np.maximum(widths, 1e-30), 1)
    found = _mean_of_exponential(jnp.asarray(widths, jnp.float32))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    small = widths < 1e-3
    w = np.maximum(widths, 1e-30)
    slope = np.where(small, -0.5 + widths / 3, ((w + 1) * np.exp(-w) - 1) / np.where(small, 1, w) ** 2)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(_mean_of_exponential))(jnp.asarray(widths, jnp.float32)), slope, rtol=2e-4
    )


@pytest.mark.slow
def test_fused_cost_does_not_grow_with_the_classes():
    """Floating-point operations, as XLA counts them; the network's own last layer grows, the backward pass does not."""

    def operations(classes: int, term) -> float:
        model = models.ConvNet(((8, 3, 1), (8, 3, 1)), (16,), classes=classes)
        given = problem(model, (12, 12, 1), count=2, classes=classes)

        def loss(variables, x):
            clean = Clean(model.apply, variables, x, given.labels, jnp.zeros((2, classes)), None)
            return term(clean, 0.1, 1.0).loss.sum()

        return jax.jit(loss).lower(given.variables, given.x).cost_analysis()["flops"]

    one, many = (operations(classes, FusedLoss()) for classes in (5, 40))
    separate = [operations(classes, MarginLoss(jb.CrownIBP())) for classes in (5, 40)]
    assert many < 1.3 * one
    assert separate[1] > 3 * separate[0] and many < separate[1] / 3
