"""Parts of an eager run as one program each.

Between two choices of rows by their values a run takes many steps, one after the other. Where nearly all layers differ
no step serves two of them, and then what happens between the passes is traced and compiled together: fewer programs and
calls. Networks that compute the same share programs, whoever wrote them.

Passes stay steps where there are convolutions. As one program XLA for CPU fuses what a step hands over into each of its
readers, and computes the rearranged result of a strided convolution's transpose three times: CROWN of `cnn_medium`
takes 1.7 times as long, and CROWN-IBP 1.3 times if its one pass is a program.
(`optimization_barrier` does not hold it back.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.backend.tracing import inlined
from jaxbound.graph import Graph

REPEATS = 8
"""Blocks that equal earlier ones up to which one program for all of them compiles sooner than one for each kind."""


class Knowledge(NamedTuple):
    """What a run knows, by node: an immutable record, which steps return anew."""

    ends: Mapping[int, Any]
    """The best bounds of nodes."""
    base: Mapping[int, Any]
    """What interval arithmetic alone says of them."""
    planes: Mapping[int, Any]
    """The relaxations of nonlinear nodes."""
    pairs: Mapping[int, Any]
    """Linear functions of the region around nodes, at which a pass may stop."""
    void: Any
    """Whether nothing can be certified."""

    def with_(self, *new: Mapping[int, Any]) -> Knowledge:
        """The record with new facts of each kind, in order."""
        facts = [{**mine, **what} if what else mine for mine, what in zip(self[:-1], new, strict=True)]
        return Knowledge._make((*facts, self.void))

    def beyond(self, before: Knowledge) -> list[dict[int, Any]]:
        """What is new; a base that is the ends themselves is None, since a program would copy it."""
        new = [
            {number: what for number, what in mine.items() if old.get(number) is not what}
            for mine, old in zip(self[:-1], before[:-1], strict=True)
        ]
        new[1] = self._apart(new[1])
        return new

    def after(self, new: list[dict[int, Any]]) -> Knowledge:
        """The record with what `beyond` gave."""
        ends = {**self.ends, **new[0]}
        base = {number: ends[number] if what is None else what for number, what in new[1].items()}
        return self.with_(new[0], base, *new[2:])

    def packed(self) -> Knowledge:
        """To be given to a program, which does not see that two arguments are one: such a base is None, too."""
        return self._replace(base=self._apart(self.base))

    def unpacked(self) -> Knowledge:
        """What was packed."""
        return self._replace(base={k: self.ends[k] if what is None else what for k, what in self.base.items()})

    def _apart(self, base: Mapping[int, Any]) -> dict[int, Any]:
        return {number: None if what is self.ends[number] else what for number, what in base.items()}


@kept(1024)
def program(make: Callable, outward: bool | str, work: Callable, static: Hashable) -> Callable:
    """What `work(run, static, *args)` answers and what its run has learned, as one program; `make` makes the run."""

    @eager_jit
    @inlined
    def part(graph: Graph, leaves: Sequence, known: Knowledge, *args: Any):
        known = known.unpacked()
        run, found = work(make(graph, leaves, outward=outward, known=known), static, *args)
        return found, run.knowledge.beyond(known)

    return part
