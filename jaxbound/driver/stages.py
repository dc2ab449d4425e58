"""Parts of an eager run as one program each.

Between two choices of rows by their values a run takes many steps, one after the other. Where nearly all layers differ
no step serves two of them, and then what happens between the passes is traced and compiled together: fewer programs and
calls. Networks that compute the same share programs, whoever wrote them.

Passes stay steps. As one program XLA for CPU fuses what a step hands over into each of its readers, and computes the
rearranged result of a strided convolution's transpose three times: CROWN of `cnn_medium` takes 1.7 times as long.
(`optimization_barrier` does not hold it back.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.graph import Graph

REPEATS = 8
"""Blocks that equal earlier ones up to which one program for all of them compiles sooner than one for each kind."""


class Knowledge(NamedTuple):
    """What a run knows, by node: see `Run`."""

    ends: dict[int, Any]
    base: dict[int, Any]
    planes: dict[int, Any]
    pairs: dict[int, Any]
    void: jax.Array

    def beyond(self, before: Knowledge) -> list[dict[int, Any]]:
        """What is new; a base that is the ends themselves is None, since a program would copy it."""
        new = [
            {number: what for number, what in mine.items() if old.get(number) is not what}
            for mine, old in zip(self[:-1], before[:-1], strict=True)
        ]
        new[1] = self._apart(new[1])
        return new

    def learn(self, new: list[dict[int, Any]]) -> None:
        """Add what `beyond` gave."""
        for mine, what in zip(self[:-1], new, strict=True):
            mine.update(what)
        self.base.update({number: self.ends[number] for number, what in new[1].items() if what is None})

    def packed(self) -> Knowledge:
        """To be given to a program, which does not see that two arguments are one: such a base is None, too."""
        return self._replace(base=self._apart(self.base))

    def unpacked(self) -> Knowledge:
        """What was packed."""
        return self._replace(base={k: self.ends[k] if what is None else what for k, what in self.base.items()})

    def _apart(self, base: dict[int, Any]) -> dict[int, Any]:
        return {number: None if what is self.ends[number] else what for number, what in base.items()}


@kept(1024)
def program(make: Callable, outward: bool | str, work: Callable, static: Hashable) -> Callable:
    """What `work(run, static, *args)` returns and what the run learns by it, as one program; `make` makes the run."""

    @eager_jit
    def part(graph: Graph, leaves, known: Knowledge, *args):
        known = known.unpacked()
        run = make(graph, leaves, outward=outward, known=known)
        found = work(run, static, *args)
        return found, run.known_now.beyond(known)

    return part
