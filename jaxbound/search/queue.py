"""The domains of a search that are left, worst first: what input splits and splits of neurons keep alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxbound.search.logs import Log

Array = np.ndarray


class Queue:
    """Bounds of the domains that are left, and of those that are done with."""

    log: Log | None
    """What was done, where a certificate asks for it."""

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
    def parts(self) -> tuple[Array, ...]:
        """All arrays over the domains that are left."""
        raise NotImplementedError

    @parts.setter
    def parts(self, parts: Sequence[Array]) -> None:
        raise NotImplementedError

    @property
    def state(self) -> dict[str, Array]:
        """All that `restore` needs to go on, by name."""
        own = {f"part{k}": part for k, part in enumerate(self.parts)}
        logged = {} if self.log is None else {f"log_{name}": array for name, array in self.log.state.items()}
        return {"counts": np.array([self.nodes, self.proved, self.given_up], np.float64), **own, **logged}

    def restore(self, state: dict[str, Array]) -> None:
        """Go on where another process was."""
        nodes, self.proved, self.given_up = map(float, state["counts"])
        self.nodes = int(nodes)
        self.parts = [state[f"part{k}"] for k in range(len(self.parts))]
        if self.log is not None:
            self.log.restore({name.removeprefix("log_"): array for name, array in state.items()})

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
