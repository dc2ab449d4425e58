"""What a run is: a call, and what is known of its nodes so far. Methods of a run that learn return another one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import jax

from jaxbound import regions
from jaxbound._compat import check_backend, is_tracer
from jaxbound.driver import stages, steps
from jaxbound.driver.chunks import ROWS
from jaxbound.driver.stages import Knowledge
from jaxbound.graph import Block, Constants, Graph
from jaxbound.relaxations import forward
from jaxbound.relaxations.planes import Planes
from jaxbound.relaxations.slopes import Freedom

Ends = tuple[jax.Array, jax.Array]

NOTHING: Mapping = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class State:
    """What a run is. What is learned makes a new one; none ever changes."""

    graph: Graph
    regions: tuple[regions.Region, ...]
    knowledge: Knowledge
    outward: bool | str = False
    """Asks for intervals that hold in exact arithmetic and for the rounding of each pass; "execution" for the same of
    the network as it runs."""
    max_rows: int = ROWS
    budget: float | None = None
    eager: bool = True
    """Whether values are concrete, so that rows can be chosen by them."""
    batch: int | None = None
    tables: Mapping[int, tuple[Planes, Freedom]] = field(default_factory=dict)
    """By nonlinear node, planes to choose from."""
    visited: frozenset[int] = frozenset()
    """The inputs of nonlinear nodes that a sweep has bounded."""
    segments: tuple[Any, ...] = ()
    """What passes walk back over: blocks, and scanned stretches of them."""
    given: Mapping[int, Constants] = field(default_factory=dict)
    """Constants that take the place of the graph's, by the first node of their block."""

    @classmethod
    def over(
        cls,
        graph: Graph,
        leaves: Sequence[regions.Region],
        *,
        outward: bool | str = False,
        max_rows: int = ROWS,
        budget: float | None = None,
        known: Knowledge | None = None,
    ) -> Self:
        """A run that knows its regions, or what is given, and nothing else."""
        check_backend()
        eager = not any(map(is_tracer, jax.tree.leaves((graph.constants, tuple(leaves)))))
        arrays = leaves if known is None else known.void
        batch = None if graph.axes is None else jax.tree.leaves(arrays)[0].shape[0]
        nothing = Knowledge({}, {}, {}, {}, None) if known is None else known
        run = cls(graph, tuple(leaves), nothing, outward, max_rows, budget, eager, batch, segments=tuple(graph.blocks))
        if known is not None:
            return run
        boxes, void, plain = run.call(steps.boxes, None, graph.doubtful, run.regions)
        ends = dict(enumerate(boxes))
        return replace(run, regions=tuple(plain), knowledge=Knowledge(ends, ends, {}, {}, void))

    @property
    def ends(self) -> Mapping[int, Ends]:
        """The best known bounds of nodes."""
        return self.knowledge.ends

    @property
    def base(self) -> Mapping[int, Ends]:
        """What interval arithmetic alone says of nodes."""
        return self.knowledge.base

    @property
    def planes(self) -> Mapping[int, Planes]:
        """The relaxations of nonlinear nodes."""
        return self.knowledge.planes

    @property
    def void(self) -> jax.Array:
        """Whether a region is empty, malformed or NaN, or a constant not finite: then nothing is certified."""
        return self.knowledge.void

    def learn(
        self,
        *,
        ends: Mapping[int, Ends] = NOTHING,
        base: Mapping[int, Ends] = NOTHING,
        planes: Mapping[int, Planes] = NOTHING,
        pairs: Mapping[int, forward.Pair] = NOTHING,
    ) -> Self:
        """The run that knows this, too."""
        return replace(self, knowledge=self.knowledge.with_(ends, base, planes, pairs))

    def with_constants(self, constants: Mapping[int, Constants]) -> Self:
        """The same call with other constants for some blocks (by their first node)."""
        return replace(self, given={**self.given, **constants})

    def call(self, step: Callable, static: Hashable, constants: Constants, *state: Any):
        """Run `step(static, constants, *state)`: per example if there is a batch, compiled if eager."""
        arrays, axes = constants
        return (steps.compiled if self.eager else steps.mapped)(step, static, None if self.batch is None else axes)(
            arrays, *state
        )

    def together(self, work: Callable, static: Hashable, *args: Any, over: Sequence | None = None) -> tuple[Self, Any]:
        """`work(self, static, *args)`, a run and an answer; eagerly as one program where few blocks equal others.

        `work` is a function of a module, not made for the call; `static` is all that is no array. `over` is () for work
        that looks at no region, which those of all kinds then share.
        """
        if not self.eager or self.graph.structure.repeats > stages.REPEATS:
            return work(self, static, *args)
        graph = Graph(self.graph.constants, self.graph.structure.shared, self.graph.axes)
        part = stages.program(type(self).over, self.outward, work, static)
        found, learned = part(graph, self.regions if over is None else over, self.knowledge.packed(), *args)
        return replace(self, knowledge=self.knowledge.after(learned)), found

    def constants(self, block: Block) -> Constants:
        """A block's constants and their batch axes."""
        if block.start in self.given:
            return self.given[block.start]
        axes = self.graph.axes
        arrays = tuple(self.graph.constants[k] for k in block.constants)
        return arrays, None if axes is None else tuple(axes[k] for k in block.constants)

    def known(self, number: int) -> Ends:
        """What is known of a node; nothing if a region is empty."""
        return self.call(steps.unless_void, None, ((), ()), self.ends[number], self.void)
