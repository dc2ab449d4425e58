"""How the slopes of relaxations are chosen: one object, read by CROWN, tuning, the polytope and the linear program.

A relaxation is sound whatever its slopes are, because intercepts follow from them, so methods differ in the choice
alone. An enclosure says what there is to choose from, a *rule* answers with a pair, below and above:

* around a function of one number (`Lines`) the pair is two slopes;
* around any other nonlinear node (`Places`) it is two places among the planes that the enclosure knows.

Rules are "adaptive", "parallel", "zero" and "one" (`RULES`), `Given` slopes, which may have been tuned, and whatever a
user writes (docs/extending.md). For tuning and linear programs an enclosure tabulates what may be chosen (`Freedom`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound.relaxations.planes import cut

Pair = tuple[jax.Array, jax.Array]
Range = tuple[float, float]


@dataclass(frozen=True)
class Lines:
    """What there is to choose around a scalar function on [lower, upper]: every slope is sound, few are tight."""

    lower: jax.Array
    upper: jax.Array
    at_middle: Callable[[], Pair]
    at_ends: Callable[[], Pair]

    @functools.cached_property
    def hull(self) -> Pair:
        """The slopes, at the midpoint, of the graph's hull below and above: the smallest gaps there."""
        return self.at_middle()

    @functools.cached_property
    def range(self) -> Pair:
        """The flattest and the steepest slope below that can gain anything: the hull's at both ends."""
        return self.at_ends()


@dataclass(frozen=True)
class Places:
    """What there is to choose around another node: the enclosure's own places, and the ranges from which others may be.

    What a place says depends on the kind of node: which of a family of planes it is.
    """

    default: Callable[[], Pair]
    ranges: tuple[Range, Range]

    @classmethod
    def within(cls, least: float, most: float, default: Callable[[], Pair]) -> Places:
        """The same range on both sides."""
        return cls(default, ((least, most), (least, most)))

    def chosen(self, rule: SlopeRule) -> Pair:
        """The enclosure's own places, or those of a rule, cut to the ranges: outside planes do not hold."""
        places = rule.places(self)
        if places is None:
            return self.default()
        return cut(places[0], *self.ranges[0]), cut(places[1], *self.ranges[1])


class SlopeRule:
    """How slopes are chosen. A rule is a frozen dataclass whose fields can be hashed: compiled programs depend on them.

    Whatever finite slopes it returns, bounds hold.

    >>> rule_of("zero")
    Nearest(slope=0.0)
    """

    def __init_subclass__(cls, *, arrays: bool = False) -> None:
        """Make it a pytree: without leaves, unless it holds arrays and is registered by itself."""
        super().__init_subclass__()
        if not arrays:
            jax.tree_util.register_static(cls)

    def lines(self, choice: Lines) -> Pair:
        """The slopes around a scalar function, below and above."""
        return choice.hull

    def places(self, choice: Places) -> Pair | None:
        """The places around a node of another kind, below and above; None for the enclosure's own."""
        return None


@dataclass(frozen=True)
class Adaptive(SlopeRule):
    """The slopes with the smallest gap at the midpoint, and in total; for ReLU 1 if u > -l else 0 below."""


@dataclass(frozen=True)
class Parallel(SlopeRule):
    """The lower slope is the upper one."""

    def lines(self, choice: Lines) -> Pair:
        """Both from above."""
        return choice.hull[1], choice.hull[1]


@dataclass(frozen=True)
class Nearest(SlopeRule):
    """The lower slope as near to a number as the hull of the graph allows."""

    slope: float

    def lines(self, choice: Lines) -> Pair:
        """The number, cut to the range."""
        above = choice.hull[1]
        return jnp.clip(self.slope, *choice.range).astype(jnp.result_type(choice.lower)), above


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given(SlopeRule, arrays=True):
    """Slopes, or places, that were chosen before."""

    below: jax.Array
    above: jax.Array

    def lines(self, choice: Lines) -> Pair:
        """As they are: every slope is sound."""
        return self.below, self.above

    def places(self, choice: Places) -> Pair:
        """As they are, too."""
        return self.below, self.above


ADAPTIVE, PARALLEL = Adaptive(), Parallel()
RULES: dict[str, SlopeRule] = {
    "adaptive": ADAPTIVE,
    "parallel": PARALLEL,
    "zero": Nearest(0.0),
    "one": Nearest(1.0),
}
"""The names of the public API."""


def rule_of(lower_slope: str | SlopeRule) -> SlopeRule:
    """The rule of a name; a rule is its own.

    Raises:
        ArgumentError: there is none of that name.
    """
    if isinstance(lower_slope, SlopeRule):
        return lower_slope
    if not isinstance(lower_slope, str) or lower_slope not in RULES:
        raise errors.unknown_option("lower_slope", lower_slope, (*RULES, "a SlopeRule"))
    return RULES[lower_slope]


class Freedom(NamedTuple):
    """What a rule may choose, as tables: slopes (or places) below and above, first axis, in a sensible order.

    A share in [0, 1] is a position between the first entry and the last one; `shares` is where the default is. On a
    side without a choice the table has one entry and the share is None, which is no leaf of a pytree: nothing is tuned.
    """

    slopes: Pair
    shares: tuple[jax.Array | None, jax.Array | None]

    @classmethod
    def linear(cls, first: jax.Array, last: jax.Array, default: Pair, count: int = 2) -> Freedom:
        """Evenly spaced slopes, the same below and above."""
        steps = jnp.linspace(0, 1, count, dtype=first.dtype).reshape(-1, *[1] * first.ndim)
        table, spread = first + steps * (last - first), jnp.where(last > first, last - first, 1)
        return cls((table, table), ((default[0] - first) / spread, (default[1] - first) / spread))
