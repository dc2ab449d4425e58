"""The one driver: runs the interpreters' steps block by block, eagerly or under a trace.

Eagerly each step is compiled once per template (equal layers share it) with the regions' batch axis vmapped inside, so
compiling grows with the number of different layers, not with the square of the depth, and rows can be chosen from
concrete values: a neuron whose relaxation is already exact is not bounded again. Under a trace (`jit`, `grad`, `vmap`,
`pmap`) the same loops unroll, and equal stretches of blocks are scanned (`stretches`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound._compat import check_backend, is_tracer
from jaxbound.driver import steps
from jaxbound.graph import NONLINEAR, Block, Constants, Graph
from jaxbound.relaxations import backward, coefficients, execution, forward
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Freedom, Planes

Ends = tuple[jax.Array, jax.Array]


ROWS = 1024
"""The most rows that one step carries where no memory limit says otherwise."""
_PIECES, _FEWEST, _EXAMPLES, _CACHED = 16, 64, 8, 1 << 20
"""Chosen entries of a node are bounded by sixteenths of it, and not fewer than 64 at once: all by one program. Of more
than 8 examples each has as many fewer, down to where the coefficients of all are 2**20 numbers on a side: what a pass
holds stays in the processor's caches."""
_PER_PASS = 16
"""What a pass costs beside its rows, in rows."""


class Rows(NamedTuple):
    """Lower bounds of rows, and bounds on the rounding error that they may contain (None if not asked for)."""

    lower: jax.Array
    rounding: jax.Array | None


class Run:
    """One call: a graph, its regions, and what is known so far.

    `ends[i]` bounds node i, `base[i]` is what interval arithmetic alone says of it, `planes[i]` relaxes it, `tables[i]`
    holds planes to choose from, and `pairs[i]` are linear functions of the region around it, at which a pass may stop
    instead. `outward` asks for intervals that hold in exact arithmetic and for the rounding of each pass; "execution"
    for the same of the network as it runs.
    `void` says whether a region is empty, malformed or NaN, or a constant is not finite: then nothing is certified.
    """

    def __init__(
        self,
        graph: Graph,
        leaves: Sequence[regions.Region],
        *,
        outward: bool | str = False,
        max_rows: int = ROWS,
        budget: float | None = None,
    ):
        check_backend()
        self.graph = graph
        self.regions = tuple(leaves)
        self.outward = outward
        self.max_rows = max_rows
        self.budget = budget
        arrays = jax.tree.leaves((graph.constants, self.regions))
        self.eager = not any(map(is_tracer, arrays))
        self.batch = None if graph.axes is None else jax.tree.leaves(self.regions)[0].shape[0]
        boxes, self.void = self.call(steps.boxes, None, graph.doubtful, self.regions)
        self.ends: dict[int, Ends] = dict(enumerate(boxes))
        self.base: dict[int, Ends] = dict(self.ends)
        self.planes: dict[int, Planes] = {}
        self.tables: dict[int, tuple[Planes, Freedom]] = {}
        self.pairs: dict[int, forward.Pair] = {}
        self.tightened: set[int] = set()
        self.segments: list = list(graph.blocks)
        self._given: dict[int, Constants] = {}

    def fork(self, constants: dict[int, Constants]) -> Run:
        """The same call with other constants for some blocks (by their first node), apart from this one."""
        other = copy.copy(self)
        other.ends, other.base, other.planes = dict(self.ends), dict(self.base), dict(self.planes)
        other.segments = list(self.segments)
        other.tightened = set()
        other._given = {**self._given, **constants}
        return other

    def call(self, step: Callable, static: Hashable, constants: Constants, *state):
        """Run `step(static, constants, *state)`: per example if there is a batch, compiled if eager."""
        arrays, axes = constants
        return (steps.compiled if self.eager else steps.mapped)(step, static, None if self.batch is None else axes)(
            arrays, *state
        )

    def constants(self, block: Block) -> Constants:
        """A block's constants and their batch axes."""
        if block.start in self._given:
            return self._given[block.start]
        axes = self.graph.axes
        arrays = tuple(self.graph.constants[k] for k in block.constants)
        return arrays, None if axes is None else tuple(axes[k] for k in block.constants)

    def known(self, number: int) -> Ends:
        """What is known of a node; nothing if a region is empty."""
        return self.call(steps.unless_void, None, ((), ()), self.ends[number], self.void)

    # --- intervals and planes ---------------------------------------------------------------------------------------

    def propagate(self, block: Block) -> None:
        """Bound a block's nodes by interval arithmetic, a nonlinear one also from the best known of its inputs."""
        known = [self.ends[k] for k in block.outer], [self.base[k] for k in block.outer]
        first, found = self.call(steps.propagate, (block.template, self.outward), self.constants(block), *known)
        self.base.update(zip(range(block.start, block.stop), found, strict=True))
        self.ends.update(zip(range(block.start, block.stop), [first, *found[1:]], strict=True))

    def enclose(self, block: Block, lower_slope: str, slopes=None) -> None:
        """Relax the nonlinear node that begins a block, from the bounds of its inputs."""
        inputs = [self.ends[k] for k in self.graph.nodes[block.start].inputs]
        static = block.template.nodes[0], lower_slope
        self.planes[block.start] = self.call(steps.enclose, static, self.constants(block), inputs, slopes)

    def enclose_rows(self, block: Block, slopes, sides: str, count: int) -> None:
        """The same for `count` rows on every side, from slopes with an axis of groups of rows before their own."""
        inputs = [self.ends[k] for k in self.graph.nodes[block.start].inputs]
        static = block.template.nodes[0], 2 if sides == "both" else 1, count
        self.planes[block.start] = self.call(steps.enclose_rows, static, self.constants(block), inputs, slopes)

    def exact(self, number: int) -> bool:
        """Whether a backward pass cannot improve on interval arithmetic.

        It cannot for a scalar function, since its lines pass no better end than the function's own range; nor for an
        affine image of boxes that mixes nothing twice.
        """
        node = self.graph.nodes[number]
        if node.op.kind == "scalar":
            return True
        boxes = all(regions.is_box(self.regions[leaf]) for leaf in node.leaves)
        return node.affine_in_region and boxes and self.graph.structure.exact_on_boxes[number]

    def tighten(self, number: int, *, skip_exact: bool = True, intersect: bool = True) -> None:
        """Bound a node by a backward pass, and keep the better of this and what interval arithmetic says.

        Entries whose relaxation is exact already keep what was known; with concrete values they cost nothing. An affine
        image of the region is bounded by the region itself, not by its enclosing box, also for interval arithmetic.
        """
        prefix = self.graph.nodes[number].affine_in_region
        needed = self.open_entries(number) if skip_exact and not prefix else None
        found = self.bound_needed(number, needed, self.bound_node)
        if found is None:
            return
        self.ends[number] = self.call(steps.merge, intersect, ((), ()), self.ends[number], *found, needed)
        if prefix:
            self.base[number] = self.ends[number]

    def open_entries(self, number: int) -> jax.Array:
        """Entries of a node for which some reader's relaxation could still gain.

        All of them where a nonlinear node reads such a reader's own bounds.
        """
        kinds, consumers = [node.op.kind for node in self.graph.nodes], self.graph.structure.consumers
        readers = [k for k in consumers[number] if kinds[k] in NONLINEAR]
        deep = any(kinds[k] in NONLINEAR for reader in readers for k in consumers[reader])
        nodes = () if deep else [self.graph.nodes[k] for k in readers]
        uses = tuple((node.op, k) for node in nodes for k, source in enumerate(node.inputs) if source == number)
        return self.call(steps.unstable, uses, ((), ()), self.ends[number])

    # --- backward passes --------------------------------------------------------------------------------------------

    def bound_needed(self, number: int, needed: jax.Array | None, bound: Callable) -> tuple[Ends, Ends] | None:
        """What `bound(number, chosen=...)` finds for the entries in a mask, and maybe for others; None if it has none.

        Concrete masks are followed exactly. A traced one is if a budget is set and no example has more entries; else
        all entries are bounded.
        """
        if needed is None:
            return bound(number)
        size = self.graph.nodes[number].op.size
        if self.eager:
            flat = np.asarray(needed).reshape(-1, size)
            most = int(flat.sum(axis=1).max())
            return bound(number, chosen=self._chosen(flat, most)) if most else None
        if self.budget is None:
            return bound(number)
        flat, most = needed.reshape(-1, size), max(1, math.ceil(self.budget * size))
        within = jnp.all(jnp.sum(flat, axis=1) <= most)
        return jax.lax.cond(within, lambda: bound(number, chosen=self._chosen(flat, most)), lambda: bound(number))

    def _chosen(self, flat, most: int):
        """The first `most` entries of each mask, concrete or traced; -1 where there are fewer."""
        xp: Any = np if self.eager else jnp
        order = xp.argsort(~flat, axis=1, stable=True)[:, :most]
        chosen = xp.where(xp.take_along_axis(flat, order, axis=1), order, -1).astype(np.int32)
        return chosen if self.batch is not None else chosen[0]

    def bound_node(self, number: int, *, chosen=None, sides: str = "both") -> tuple[Ends, Ends]:
        """Bounds of a node by backward passes from its entries: `(lower, upper)`, not widened, and their rounding.

        Args:
            number: the node.
            chosen: which entries to bound, int32 of shape ([batch,] count), -1 for none; the others are unbounded.
                None for all.
            sides: "both", or "lower" for infinite upper bounds at half the cost.
        """
        one = lambda index: self.bound_rows(number, index, sides)  # noqa: E731
        most = None
        if chosen is not None:  # a compiled program knows their number; eagerly every number runs the same ones
            most = self._at_once(self.graph.nodes[number].op.size) if self.eager else chosen.shape[-1]
        return self.in_chunks(one, number, chosen=chosen, sides=sides, most=most)

    def _at_once(self, size: int) -> int:
        """How many chosen entries of a node are bounded at once."""
        most, examples = max(-(-size // _PIECES), _FEWEST), self.batch or 1
        return max(1, min(most, max(most * _EXAMPLES // examples, _CACHED // (examples * size))))

    def bound_rows(self, number: int, index: jax.Array, sides: str) -> Rows:
        """One backward pass from some entries of a node; an index of -1 makes an empty row."""
        rows, carry = self.pull_to_inputs(*self.start(number, index, sides))
        return Rows(*self.call(steps.concretize, None, ((), ()), self.regions, rows, carry, self.void))

    def in_chunks(
        self,
        one: Callable,
        number: int,
        *,
        chosen=None,
        sides: str = "both",
        most: int | None = None,
    ) -> tuple[Ends, Ends]:
        """What `bound_node` returns, with `one` instead of a backward pass.

        No chunk has more than `max_rows` rows, nor more than `most` entries.
        """
        op = self.graph.nodes[number].op
        chunks = list(self._chunks(op.size, chosen, 2 if sides == "both" else 1, most))
        if self.eager or len(chunks) == 1:
            parts = [one(index) for index in chunks]
        else:
            stacked = jax.lax.map(one, jnp.stack(chunks))
            parts = [jax.tree.map(lambda leaf, k=k: leaf[k], stacked) for k in range(len(chunks))]
        if chosen is None:
            return self.call(steps.joined, (op.shape, sides), ((), ()), parts)
        found = None
        for index, part in zip(chunks, parts, strict=True):
            found = self.call(steps.collect, (op.size, sides), ((), ()), found, index, part)
        return self.call(steps.by_side, op.shape, ((), ()), found)

    def _chunks(self, size: int, chosen, sides: int, most: int | None) -> Iterator[jax.Array]:
        """Which entries each pass bounds: equal sizes, so that steps are shared; -1 makes an empty row."""
        if chosen is None:
            chosen = np.arange(size, dtype=np.int32)
            chosen = chosen if self.batch is None else np.broadcast_to(chosen, (self.batch, size))
        xp = jnp if is_tracer(chosen) else np
        total, largest = chosen.shape[-1], max(1, self.max_rows // sides)
        width = _width(total, size, largest) if most is None else min(most, size, largest)
        if total % width:
            padding = [(0, 0)] * (chosen.ndim - 1) + [(0, -total % width)]
            chosen = xp.pad(chosen, padding, constant_values=-1)
        for first in range(0, total, width):
            yield jnp.asarray(chosen[..., first : first + width])

    def dense(self, rows: Coefficients) -> coefficients.Dense:
        """Rows as an array."""
        return self.call(steps.densify, None, ((), ()), rows)

    def start(self, number: int, index=None, sides: str = "both") -> tuple[dict[int, Coefficients], backward.Carry]:
        """Rows for some entries of a node, or for all; where a pass begins."""
        op = self.graph.nodes[number].op
        if index is None:
            index = np.arange(op.size, dtype=np.int32)
            index = jnp.asarray(index if self.batch is None else np.broadcast_to(index, (self.batch, op.size)))
        identity, carry = self.call(steps.begin, (op.shape, op.dtype, sides, bool(self.outward)), ((), ()), index)
        return {number: identity}, carry

    def pull_to_inputs(self, rows: dict[int, Coefficients], carry: backward.Carry):
        """Coefficients of the region leaves, and what the pass collected."""
        for segment in reversed(self.segments):
            rows, carry = self.pull(segment, rows, carry)
        leaves = range(self.graph.structure.num_inputs)
        for number in [number for number in rows if number not in leaves]:
            state = rows.pop(number), self.pairs[number], carry, self.regions
            parts, carry = self.call(steps.substitute, None, ((), ()), *state)
            for leaf, part in zip(leaves, parts, strict=True):
                carry = self.deliver(rows, leaf, part, carry)
        return tuple(rows.get(leaf) for leaf in leaves), carry

    def pull(self, block: Any, rows: dict[int, Coefficients], carry: backward.Carry):
        """Move rows back over one segment: a block, or a scanned stretch of them."""
        if not isinstance(block, Block):
            return block.pull(self, rows, carry)
        inside = range(block.start, block.stop)
        incoming = tuple(rows.get(k) for k in inside)
        if all(part is None for part in incoming):
            return rows, carry
        known = None
        if self.outward:
            known = tuple(self.ends[k] for k in block.outer), tuple(self.ends[k] for k in inside)
        state = incoming, carry, self.planes.get(block.start), known
        static = block.template, self.outward == execution.MODE
        outgoing, stopped, carry = self.call(steps.pull, static, self.constants(block), *state)
        rows = {k: part for k, part in rows.items() if k not in inside}
        for k, part in zip((*block.outer, block.start), (*outgoing, stopped), strict=True):
            if part is not None:
                carry = self.deliver(rows, k, part, carry)
        return rows, carry

    def deliver(self, rows: dict[int, Coefficients], number: int, part: Coefficients, carry: backward.Carry):
        """Add rows on a node to those that are there; what is collected, with the rounding of the sum."""
        if number in rows:
            ends = self.ends[number] if self.outward else None
            part, carry = self.call(steps.add, None, ((), ()), rows[number], part, carry, ends)
        rows[number] = part
        return carry


def _width(count: int, size: int, largest: int) -> int:
    """How many of `count` entries at once: a node's whole size or a half, quarter, ... of it, whichever costs least.

    There are few widths, so that not every count of rows compiles anew.
    """
    widths = [size]
    while widths[-1] >= _FEWEST:
        widths.append(-(-widths[-1] // 2))
    widths = [width for width in widths if width <= largest] or [largest]
    return min(widths, key=lambda width: -(-count // width) * (width + _PER_PASS))


# --- the steps --------------------------------------------------------------------------------------------------------
