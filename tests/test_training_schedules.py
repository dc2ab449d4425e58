"""Schedules against their definitions, worked out in rational arithmetic, at every step."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbound import errors
from jaxbound.training.schedules import Epsilon, Weight, halved_after, milestones, progress

STEPS = np.arange(0, 140)


def smoothed(t: Fraction, middle=Fraction(1, 4), power=4) -> Fraction:
    """The smoothed ramp, exactly: a power up to the middle, then its tangent."""
    scale = 1 / (middle**power + power * middle ** (power - 1) * (1 - middle))
    if t <= middle:
        return scale * t**power
    return scale * (middle**power + power * middle ** (power - 1) * (t - middle))


def fraction(step: int, start: int, length: int) -> Fraction:
    if length == 0:
        return Fraction(int(step >= start))
    return min(max(Fraction(int(step) - start, length), Fraction(0)), Fraction(1))


@pytest.mark.parametrize(("start", "length"), [(0, 100), (10, 100), (0, 0), (7, 1), (13, 0), (139, 50)])
@pytest.mark.parametrize("shape", ["linear", "smoothed"])
@pytest.mark.parametrize("initial", [0.0, 0.125])
def test_epsilon_at_every_step(start, length, shape, initial):
    schedule = Epsilon(0.5, start, length, initial=initial, shape=shape)
    found = np.asarray([schedule(step) for step in STEPS])
    ramp = smoothed if shape == "smoothed" else lambda t: t
    exact = [float(Fraction(initial) + Fraction(0.5 - initial) * ramp(fraction(s, start, length))) for s in STEPS]
    np.testing.assert_allclose(found, exact, rtol=3e-6, atol=1e-8)
    assert found[start > STEPS].tolist() == [initial] * int((start > STEPS).sum())
    assert np.all(found[schedule.end :] == np.float32(0.5)), "the final radius is reached exactly"
    assert np.all(np.diff(found) >= 0)


def test_smoothed_ramp_has_no_corner_at_its_middle():
    ramp = jax.grad(lambda t: Epsilon(1.0, 0, 1000, shape="smoothed")(t))
    assert float(ramp(249.0)) == pytest.approx(float(ramp(251.0)), rel=0.02)
    assert float(ramp(251.0)) == pytest.approx(float(ramp(900.0)), rel=1e-5), "the rest is straight"
    assert float(ramp(1.0)) < 1e-6 < float(ramp(900.0)), "it begins flat"


def test_smoothed_ramp_whose_power_never_ends_is_a_power():
    schedule = Epsilon(1.0, 0, 100, shape="smoothed", middle=1.0, power=3.0)
    np.testing.assert_allclose([schedule(s) for s in (0, 50, 80, 100)], [0, 0.125, 0.512, 1], rtol=1e-6)


@pytest.mark.x64
def test_schedules_in_float64():
    schedule = Epsilon(0.3, 1, 3)
    assert schedule(2).dtype == jnp.float64 and float(schedule(2)) == pytest.approx(0.1, rel=1e-15)
    assert Weight(1.0, 0.0, schedule)(2).dtype == jnp.float64
    assert milestones(0.1, [3])(5).dtype == halved_after(0.1, 1, 2)(3).dtype == jnp.float64


@pytest.mark.parametrize("schedule", [
    Epsilon(0.5, 10, 100), Epsilon(0.5, 10, 100, shape="smoothed"), Weight(1.0, 0.5, Epsilon(0.3, 5, 20)),
    Weight(0.5, 0.0, Epsilon(0.3, 5, 20), clock="step"), halved_after(1e-3, 30, 10), milestones(1e-3, [20, 90]),
])  # fmt: skip
def test_jit_and_vmap_agree_with_the_loop(schedule):
    # Up to rounding: XLA replaces the division by a constant with a product inside a program.
    looped = np.asarray([schedule(step) for step in STEPS])
    np.testing.assert_allclose(np.asarray([jax.jit(schedule)(step) for step in STEPS]), looped, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.asarray(jax.vmap(schedule)(jnp.asarray(STEPS))), looped, rtol=1e-6, atol=1e-9)
    assert looped.dtype == np.float32


def test_weights_by_radius_follow_the_released_formula():
    """kappa = (eps_max - eps (1 - kappa_final)) / eps_max, which starts at 1; likewise beta."""
    schedule = Epsilon(0.3, 10, 60, shape="smoothed")
    for final in (0.0, 0.5, 1.0):
        weight = Weight(1.0, final, schedule)
        for step in (0, 10, 22, 31, 70, 100):
            eps = float(schedule(step))
            assert float(weight(step)) == pytest.approx((0.3 - eps * (1 - final)) / 0.3, abs=2e-6)


def test_weights_by_step_do_not_know_the_shape():
    weight = Weight(0.8, 0.2, Epsilon(0.3, 10, 60, shape="smoothed"), clock="step")
    np.testing.assert_allclose([weight(s) for s in (0, 10, 40, 70, 99)], [0.8, 0.8, 0.5, 0.2, 0.2], rtol=1e-6)
    by_radius = Weight(0.8, 0.2, Epsilon(0.3, 10, 60, shape="smoothed"))
    assert float(by_radius(25)) > 0.75, "the smoothed radius has hardly begun to grow"


def test_paper_settings_of_kappa():
    schedule = Epsilon(0.3, 0, 10)
    for start, final in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5)):
        weight = Weight(start, final, schedule)
        assert (float(weight(0)), float(weight(10))) == (start, final)


def test_weights_for_radius_zero_go_by_step():
    weight = Weight(1.0, 0.0, Epsilon(0.0, 0, 10))
    assert [float(weight(step)) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_halving_begins_after_the_ramp():
    rate = halved_after(5e-4, start=60, every=10)
    np.testing.assert_allclose(
        [rate(s) for s in (0, 60, 69, 70, 79, 80, 100)], 5e-4 * np.array([1, 1, 1, 0.5, 0.5, 0.25, 0.0625]), rtol=1e-6
    )


def test_milestones_hold_at_their_step_in_any_order_and_count_twice_if_given_twice():
    np.testing.assert_allclose([milestones(1.0, [6, 3])(s) for s in (2, 3, 5, 6)], [1, 0.1, 0.1, 0.01], rtol=1e-6)
    assert float(milestones(1.0, [3, 3])(3)) == pytest.approx(0.01)
    assert float(milestones(0.5, [])(99)) == 0.5


def test_progress_of_an_empty_ramp_is_a_jump():
    assert [float(progress(step, 3, 0)) for step in (2, 3, 4)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("build", "text"), [
    (lambda: Epsilon(0.1, 0, 1, shape="smooth"), "did you mean 'smoothed'"),
    (lambda: Epsilon(-0.1, 0, 1), "final is -0.1"),
    (lambda: Epsilon(float("nan"), 0, 1), "final is nan"),
    (lambda: Epsilon(0.1, 0, -1), "length is -1"),
    (lambda: Epsilon(0.1, 0, 1, shape="smoothed", middle=0.0), "0 < middle"),
    (lambda: Weight(1.0, 1.5, Epsilon(0.1, 0, 1)), "final is 1.5"),
    (lambda: Weight(1.0, 0.5, Epsilon(0.1, 0, 1), clock="epoch"), "the choices are 'eps', 'step'"),
    (lambda: halved_after(1.0, 0, 0), "every is 0"),
])  # fmt: skip
def test_refusals(build, text):
    with pytest.raises(errors.ArgumentError, match=text):
        build()
