"""Schedules of certified training: pure, jittable functions of the step number.

The radius grows from `initial` to `final` over `length` steps that begin at step `start`. With the progress

    t = clip((step - start) / length, 0, 1)

a linear ramp is initial + (final - initial) t. A smoothed one begins as a power, a t^p up to t = m, and goes on along
its own tangent, so that it is continuously differentiable and ends at 1:

    r(t) = a t^p                              for t <= m,
    r(t) = a m^p + a p m^(p - 1) (t - m)      for t > m,    a = 1 / (m^p + p m^(p - 1) (1 - m)).

The weights kappa (of the natural loss) and beta (of the backward bounds) go from a start to a final value, linearly in
the radius (clock="eps"), eps / eps_max, or linearly in the step (clock="step"), t. Both clocks agree on a linear ramp
from 0; on a smoothed one, or for eps_max = 0, they do not.

Lengths are in steps. The released code of the CROWN-IBP paper counts in epochs and calls `schedule_length` the number
of the epoch after the last one of the ramp, less `schedule_start`, plus 1: its "1 / 61" is a ramp of 60 epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxbound import errors

Schedule = Callable[[ArrayLike], jax.Array]

SHAPES = ("linear", "smoothed")
CLOCKS = ("eps", "step")


@dataclass(frozen=True)
class Epsilon:
    """The radius as a function of the step: `schedule(step)`.

    `initial <= schedule(step) <= final` for `initial <= final`; `initial` up to `start`, `final` from `start + length`.

    Args:
        final: the radius after the ramp.
        start: the first step of the ramp.
        length: how many steps the ramp takes; 0 for a jump at `start`.
        initial: the radius before the ramp.
        shape: "linear" or "smoothed".
        middle: where a smoothed ramp becomes linear, as a fraction of its length, in (0, 1].
        power: the exponent of its beginning, at least 1.

    Raises:
        ArgumentError: a negative radius or length, or an unknown shape.

    Rounding: that of the default floating dtype.

    Reference: Zhang et al. 2020, appendix C and D; Gowal et al. 2018, section 4.

    >>> [float(Epsilon(0.5, start=10, length=100)(step)) for step in (0, 60, 200)]
    [0.0, 0.25, 0.5]
    """

    final: float
    start: int
    length: int
    initial: float = 0.0
    shape: str = "linear"
    middle: float = 0.25
    power: float = 4.0

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise errors.unknown_option("shape", self.shape, SHAPES)
        for name in ("final", "initial", "start", "length"):
            if not 0 <= getattr(self, name) < math.inf:
                raise errors.argument(name, f"is {getattr(self, name)}", "pass a finite number, at least 0")
        if not (0 < self.middle <= 1 and self.power >= 1):
            raise errors.argument(
                "middle and power", f"are {self.middle} and {self.power}", "pass 0 < middle <= 1 <= power"
            )

    @property
    def end(self) -> int:
        """The first step with the final radius."""
        return self.start + self.length

    def __call__(self, step: ArrayLike) -> jax.Array:
        """The radius at a step, of the default floating dtype."""
        done = progress(step, self.start, self.length)
        return self.initial + (self.final - self.initial) * (self._smoothed(done) if self.shape == "smoothed" else done)

    def _smoothed(self, done: jax.Array) -> jax.Array:
        steepness = self.power * self.middle ** (self.power - 1)
        scale = 1 / (self.middle**self.power + steepness * (1 - self.middle))
        start = jnp.minimum(done, self.middle) ** self.power
        rest = scale * (start + steepness * jnp.maximum(done - self.middle, 0))
        return jnp.where(done >= 1, 1, rest)


def progress(step: ArrayLike, start: int, length: int) -> jax.Array:
    """How much of a ramp is done: 0 before it, 1 from its end on, linear between.

    >>> float(progress(15, 10, 20))
    0.25
    """
    done = (jnp.asarray(step, float) - start) / max(length, 1)
    return jnp.clip(done, 0, 1) if length else (jnp.asarray(step) >= start).astype(done.dtype)


@dataclass(frozen=True)
class Weight:
    """A weight between 0 and 1 that goes with the radius, such as kappa or beta: `schedule(step)`.

    start + (final - start) · eps(step) / eps.final    with clock="eps",
    start + (final - start) · progress(step)           with clock="step".

    Args:
        start: the weight at radius 0 (or before the ramp).
        final: the weight at the final radius (or after the ramp).
        epsilon: the schedule of the radius.
        clock: "eps" or "step".

    Raises:
        ArgumentError: a weight outside [0, 1], or an unknown clock.

    Reference: Zhang et al. 2020, section 4 and appendix C (kappa and beta schedules).

    >>> kappa = Weight(1.0, 0.5, Epsilon(0.3, start=0, length=10))
    >>> float(kappa(0)), float(kappa(5)), float(kappa(10))
    (1.0, 0.75, 0.5)
    """

    start: float
    final: float
    epsilon: Epsilon
    clock: str = "eps"

    def __post_init__(self):
        if self.clock not in CLOCKS:
            raise errors.unknown_option("clock", self.clock, CLOCKS)
        for name in ("start", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise errors.argument(name, f"is {getattr(self, name)}", "pass a weight between 0 and 1")

    def __call__(self, step: ArrayLike) -> jax.Array:
        """The weight at a step."""
        if self.clock == "eps" and self.epsilon.final > 0:
            share = self.epsilon(step) / self.epsilon.final
        else:
            share = progress(step, self.epsilon.start, self.epsilon.length)
        return jnp.clip(self.start + (self.final - self.start) * share, 0, 1)


def halved_after(initial: float, start: int, every: int, factor: float = 0.5) -> optax.Schedule:
    """A learning rate that is constant up to a step, then multiplied by a factor every so many steps.

    The paper halves it every 10 epochs after the ramp: the first time 10 epochs after its end.

    Args:
        initial: the learning rate up to `start`.
        start: the step at which the ramp ends.
        every: steps between two changes.
        factor: what it is multiplied by.

    Returns:
        An optax schedule.

    Reference: Zhang et al. 2020, appendix D.

    >>> rate = halved_after(1.0, start=10, every=5)
    >>> [float(rate(step)) for step in (14, 15, 20)]
    [1.0, 0.5, 0.25]
    """
    if every < 1:
        raise errors.argument("every", f"is {every}", "pass at least 1 step")

    def rate(step: ArrayLike):
        times = jnp.maximum(jnp.asarray(step) - start, 0) // every
        return jnp.asarray(initial * jnp.asarray(factor, float) ** times, float)

    return rate


def milestones(initial: float, steps: Sequence[int], factor: float = 0.1) -> optax.Schedule:
    """A learning rate that is multiplied by a factor at each of the given steps.

    Args:
        initial: the learning rate before the first.
        steps: the steps, in any order; at each of them the new rate already holds.
        factor: what it is multiplied by.

    Returns:
        An optax schedule.

    Reference: Zhang et al. 2020, appendix C.

    >>> [round(float(milestones(1.0, [3, 6])(step)), 4) for step in (2, 3, 6)]
    [1.0, 0.1, 0.01]
    """
    boundaries = [int(step) for step in steps]

    def rate(step: ArrayLike):
        passed = sum((jnp.asarray(step) >= boundary).astype(int) for boundary in boundaries)
        return jnp.asarray(initial * jnp.asarray(factor, float) ** passed, float)

    return rate
