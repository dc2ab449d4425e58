"""The domains of a search that are left, worst first: what input splits and splits of neurons keep alike."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


class Queue:
    """Bounds of the domains that are left, and of those that are done with."""

    level: Array
    """A lower bound of the property's margin on every domain that is left; (domains, ...)."""
    batch: int
    """How many domains are bounded at once."""

    def __init__(self):
        self.nodes = 0
        self.proved = np.inf
        self.given_up = np.inf
        """The least bound of a domain that is not proved and cannot be split any more."""

    @property
    def lower(self) -> float:
        """A lower bound of the property's margin over the whole region: that of the worst domain left."""
        return float(min(self.level.min(initial=np.inf), self.proved, self.given_up))

    @property
    def left(self) -> int:
        """How many domains are not proved yet."""
        return len(self.level)

    def worst(self) -> tuple[Array, Array]:
        """The numbers of the worst domains, at most a batch of them, and of the rest."""
        count = min(self.batch, self.left)
        order = np.argpartition(self.level, count - 1) if count < self.left else np.arange(count)
        return order[:count], order[count:]
