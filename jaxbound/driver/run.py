"""The one driver: runs the interpreters' steps block by block, eagerly or under a trace.

Eagerly each step is compiled once per template (equal layers share it) with the regions' batch axis vmapped inside, so
compiling grows with the number of different layers, not with the square of the depth, and rows can be chosen from
concrete values: a neuron whose relaxation is already exact is not bounded again. Where few layers are equal, what
happens between passes is one program (`stages`). Under a trace (`jit`, `grad`, `vmap`,
`pmap`) the same loops unroll, and equal stretches of blocks are scanned (`stretches`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound.backend.tracing import rolled
from jaxbound.driver import chunks, steps
from jaxbound.driver.state import NOTHING, State
from jaxbound.graph import Block
from jaxbound.relaxations import backward, coefficients, execution
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Planes
from jaxbound.relaxations.slopes import Given, SlopeRule

Ends = tuple[jax.Array, jax.Array]


class Rows(NamedTuple):
    """Lower bounds of rows, and bounds on the rounding error that they may contain (None if not asked for)."""

    lower: jax.Array
    rounding: jax.Array | None


class Run(State):
    """What a run can do: bound nodes by intervals and by passes, and relax them."""

    # --- intervals and planes ---------------------------------------------------------------------------------------

    def propagate(self, block: Block) -> Run:
        """Bound a block's nodes by interval arithmetic, a nonlinear one also from the best known of its inputs."""
        best = [self.ends[k] for k in block.outer]
        base = [self.base[k] for k in block.outer]
        known = best, None if all(map(operator.is_, best, base)) else base
        first, found = self.call(steps.propagate, (block.template, self.outward), self.constants(block), *known)
        inside = range(block.start, block.stop)
        of_block = dict(zip(inside, found, strict=True))
        return self.learn(ends=of_block if first is None else {**of_block, block.start: first}, base=of_block)

    def enclose(self, block: Block, rule: SlopeRule) -> Run:
        """Relax the nonlinear node that begins a block, from the bounds of its inputs."""
        inputs, node = [self.ends[k] for k in self.graph.nodes[block.start].inputs], block.template.nodes[0]
        return self.learn(planes={block.start: self.call(steps.enclose, node, self.constants(block), inputs, rule)})

    def enclose_rows(self, block: Block, rules: Given, sides: str, count: int) -> Run:
        """The same for `count` rows on every side, from slopes with an axis of groups of rows before their own."""
        inputs = [self.ends[k] for k in self.graph.nodes[block.start].inputs]
        static = block.template.nodes[0], 2 if sides == "both" else 1, count
        found = self.call(steps.enclose_rows, static, self.constants(block), inputs, rules)
        return self.learn(planes={block.start: found})

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

    def tighten(self, number: int, *, skip_exact: bool = True, intersect: bool = True) -> Run:
        """Bound a node by a backward pass, and keep the better of this and what interval arithmetic says.

        Entries whose relaxation is exact already keep what was known; with concrete values they cost nothing. An affine
        image of the region is bounded by the region itself, not by its enclosing box, also for interval arithmetic.
        """
        needed = self.needed_entries(number, skip_exact=skip_exact)
        return self.keep(number, self.bound_needed(number, needed, self.bound_node), needed, intersect=intersect)

    def needed_entries(self, number: int, *, skip_exact: bool) -> jax.Array | None:
        """The entries of a node that a backward pass is to bound; None for all."""
        prefix = self.graph.nodes[number].affine_in_region
        return self.unstable_entries(number) if skip_exact and not prefix else None

    def keep(self, number: int, found: tuple[Ends, Ends] | None, needed: jax.Array | None, *, intersect: bool) -> Run:
        """Keep what passes found of the needed entries of a node, if they found anything."""
        if found is None:
            return self
        ends = {number: self.call(steps.merge, intersect, ((), ()), self.ends[number], *found, needed)}
        return self.learn(ends=ends, base=ends if self.graph.nodes[number].affine_in_region else NOTHING)

    def unstable_entries(self, number: int) -> jax.Array:
        """The unstable entries of a node: those for which some reader's relaxation could still gain.

        All of them where a nonlinear node reads such a reader's own bounds.
        """
        return self.call(steps.unstable, steps.readers_of(self.graph.structure, number), ((), ()), self.ends[number])

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

    def _chosen(self, flat: jax.Array | np.ndarray, most: int):
        """The first `most` entries of each mask, concrete or traced; -1 where there are fewer."""
        xp: Any = np if self.eager else jnp
        order = xp.argsort(~flat, axis=1, stable=True)[:, :most]
        chosen = xp.where(xp.take_along_axis(flat, order, axis=1), order, -1).astype(np.int32)
        return chosen if self.batch is not None else chosen[0]

    def bound_node(self, number: int, *, chosen: Any = None, sides: str = "both") -> tuple[Ends, Ends]:
        """Bounds of a node by backward passes from its entries: `(lower, upper)`, not widened, and their rounding.

        Args:
            number: the node.
            chosen: which entries to bound, int32 of shape ([batch,] count), -1 for none; the others are unbounded.
                None for all.
            sides: "both", or "lower" for infinite upper bounds at half the cost.
        """
        most = None
        if chosen is not None:  # a compiled program knows their number; eagerly every number runs the same ones
            size = self.graph.nodes[number].op.size
            most = chunks.at_once(size, self.batch or 1) if self.eager else chosen.shape[-1]
        one = lambda index: self.bound_rows(number, index, sides)  # noqa: E731
        return self.in_chunks(one, number, chosen=chosen, sides=sides, most=most)

    def bound_rows(self, number: int, index: jax.Array, sides: str) -> Rows:
        """One backward pass from some entries of a node; an index of -1 makes an empty row."""
        rows, carry = self.pull_to_inputs(*self.start(number, index, sides))
        return Rows(*self.call(steps.concretize, None, ((), ()), self.regions, rows, carry, self.void))

    def in_chunks(
        self,
        one: Callable,
        number: int,
        *,
        chosen: Any = None,
        sides: str = "both",
        most: int | None = None,
    ) -> tuple[Ends, Ends]:
        """What `bound_node` returns, with `one` instead of a backward pass.

        No chunk has more than `max_rows` rows, nor more than `most` entries.
        """
        op = self.graph.nodes[number].op
        entries = self._entries(number) if chosen is None else chosen
        pieces = chunks.cut(entries, op.size, max(1, self.max_rows // (2 if sides == "both" else 1)), most)
        if self.eager and chosen is not None:
            parts = list(map(one, pieces))
            found = steps.nothing(op.size, op.dtype, self.batch)
            for index, part in zip(pieces, parts, strict=True):
                steps.put(found, op.size, index, part)
            return steps.by_side(op.shape, found)
        if self.eager or len(pieces) == 1:
            parts = list(map(one, pieces))
        else:
            stacked = rolled(jax.lax.map)(one, jnp.stack(pieces))
            parts = [jax.tree.map(lambda leaf, k=k: leaf[k], stacked) for k in range(len(pieces))]
        if chosen is None:
            return self.call(steps.joined, (op.shape, sides), ((), ()), parts)
        found = jnp.asarray(steps.nothing(op.size, op.dtype, self.batch))
        for index, part in zip(pieces, parts, strict=True):
            found = self.call(steps.collect, (op.size, sides), ((), ()), found, index, part)
        return steps.by_side(op.shape, found)

    def dense(self, rows: Coefficients) -> coefficients.Dense:
        """Rows as an array."""
        return self.call(steps.densify, None, ((), ()), rows)

    def start(
        self, number: int, index: Any = None, sides: str = "both"
    ) -> tuple[dict[int, Coefficients], backward.Carry]:
        """Rows for some entries of a node, or for all; where a pass begins."""
        op = self.graph.nodes[number].op
        index = self._entries(number) if index is None else index
        identity, carry = self.call(steps.begin, (op.shape, op.dtype, sides, bool(self.outward)), ((), ()), index)
        return {number: identity}, carry

    def _entries(self, number: int) -> np.ndarray:
        """All entries of a node, for every example."""
        index = np.arange(self.graph.nodes[number].op.size, dtype=np.int32)
        return index if self.batch is None else np.broadcast_to(index, (self.batch, len(index)))

    def pull_to_inputs(self, rows: dict[int, Coefficients], carry: backward.Carry):
        """Coefficients of the region leaves, and what the pass collected."""
        rows, carry = self.walk_back(rows, carry)
        leaves = range(self.graph.structure.num_inputs)
        for number in [number for number in rows if number not in leaves]:
            state = rows.pop(number), self.knowledge.pairs[number], carry, self.regions
            parts, carry = self.call(steps.substitute, None, ((), ()), *state)
            for leaf, part in zip(leaves, parts, strict=True):
                carry = self.deliver(rows, leaf, part, carry)
        return tuple(rows.get(leaf) for leaf in leaves), carry

    def walk_back(
        self,
        rows: dict[int, Coefficients],
        carry: backward.Carry,
        relax: Callable[[Block, Coefficients], Planes | None] = lambda block, rows: None,
    ) -> tuple[dict[int, Coefficients], backward.Carry]:
        """Move rows back over all segments. On a nonlinear node without planes they stop, unless `relax` makes some."""
        for segment in reversed(self.segments):
            rows, carry = self.pull(segment, rows, carry)
            if isinstance(segment, Block) and segment.start in rows and segment.start not in self.planes:
                planes = relax(segment, rows[segment.start])
                if planes is not None:
                    rows, carry = self.learn(planes={segment.start: planes}).pull(segment, rows, carry)
        return rows, carry

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
