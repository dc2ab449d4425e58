"""Scanned passes: equal stretches of blocks as loops, for when the driver is traced.

Full CROWN is a loop over target layers and, for each, over the layers before it. Unrolled under `jit` that is a program
of quadratic size. Where super-blocks (one block, or a few) repeat, each reading only one value of the one before, the
outer loop becomes a `lax.scan` over targets that fills buffers of planes, and the inner one a `lax.scan` over the
super-blocks before the target, each under a `lax.cond` that skips those not reached yet. The predicate depends on loop
counters only, so it stays a branch under `vmap`, and both loops can be differentiated in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxbound.backend.tracing import rolled
from jaxbound.driver.run import Run
from jaxbound.graph import NONLINEAR, Block, Graph, Structure
from jaxbound.relaxations import backward, coefficients
from jaxbound.relaxations.coefficients import Coefficients

LONGEST_PERIOD = 8
FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Stretch:
    """`repeats` super-blocks of equal templates; node numbers are those of the first one."""

    blocks: tuple[tuple[Block, ...], ...]
    """Per super-block, its blocks."""
    read: int
    """The one value that the first super-block reads."""
    made: int
    """The value of the first super-block that the second one reads."""

    @property
    def span(self) -> int:
        """Nodes per super-block."""
        return self.blocks[1][0].start - self.blocks[0][0].start

    @property
    def last_made(self) -> int:
        """The value that the last super-block makes for what follows."""
        return self.made + self.span * (len(self.blocks) - 1)


def plan(graph: Graph) -> list[Block | Stretch]:
    """The blocks of a graph, with repeated ones gathered."""
    blocks, segments, first = graph.blocks, [], 0
    while first < len(blocks):
        found = [stretch for period in range(1, LONGEST_PERIOD + 1) if (stretch := _stretch(graph, first, period))]
        if not found:
            segments.append(blocks[first])
            first += 1
            continue
        best = max(found, key=lambda stretch: len(stretch.blocks) * len(stretch.blocks[0]))
        segments.append(best)
        first += len(best.blocks) * len(best.blocks[0])
    return segments


def relax(run: Run, stretch: Stretch, relax_block: Callable[[Run, Block], Run]) -> Run:
    """Bound and relax every super-block of a stretch; the run has one scanned segment more.

    `relax_block(run, block)` tightens and relaxes the node that begins a block, and bounds the block's nodes.
    """
    first = stretch.blocks[0]
    numbers = range(first[0].start, first[-1].stop)
    constants = [_stacked(run, [group[p] for group in stretch.blocks]) for p in range(len(first))]
    axes = [run.constants(block)[1] for block in first]
    read = stretch.read

    def one(known: Any, index: Any, buffers: Any, arrays: Any):
        pairs = zip(first, zip(arrays, axes, strict=True), strict=True)
        inner = run.with_constants({block.start: pair for block, pair in pairs})
        inner = replace(inner.learn(ends={read: known[0]}, base={read: known[1]}), visited=frozenset())
        if buffers is not None:
            before = Scanned(stretch, constants, axes, *buffers, entry=read, count=index)
            inner = replace(inner, segments=(*inner.segments, before))
        for block in first:
            inner = relax_block(inner, block)
            inner = replace(inner, segments=(*inner.segments, block))
        planes = tuple(inner.planes[block.start] for block in first)
        ends = tuple(inner.ends[number] for number in numbers)
        return (planes, ends), (inner.ends[stretch.made], inner.base[stretch.made])

    def step(state: Any, scanned: Any):
        known, buffers = state
        index, arrays = scanned
        made, known = one(known, index, buffers, arrays)
        buffers = jax.tree.map(lambda buffer, new: buffer.at[index].set(new), buffers, made)
        return (known, buffers), None

    count, known = len(stretch.blocks), (run.ends[read], run.base[read])
    shapes, _ = jax.eval_shape(lambda known, arrays: one(known, 0, None, arrays), known, _at(constants, 0))
    empty = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)
    scanned = jnp.arange(count), tuple(constants)
    (known, buffers), _ = rolled(jax.lax.scan)(step, (known, empty), scanned)
    found = {
        numbers.start + repeat * stretch.span + offset: ends
        for repeat in range(count)
        for offset, ends in enumerate(_at(buffers[1], repeat))
    }
    last = stretch.last_made
    run = run.learn(ends={**found, last: known[0]}, base={last: known[1]})
    return replace(run, segments=(*run.segments, Scanned(stretch, constants, axes, *buffers, entry=last, count=None)))


@dataclass(frozen=True)
class Scanned:
    """A relaxed stretch as one segment of a pass."""

    stretch: Stretch
    constants: list
    axes: list
    planes: tuple
    ends: tuple
    entry: int
    """The node on which rows arrive."""
    count: jax.Array | None
    """How many super-blocks, from the first, are behind the rows; None for all."""

    def pull(self, run: Run, rows: dict[int, Coefficients], carry: backward.Carry):
        """Move rows on the entry back over the stretch."""
        if self.entry not in rows:
            return rows, carry
        rows = dict(rows)
        first = self.stretch.blocks[0]
        numbers = range(first[0].start, first[-1].stop)

        def back(state: Any, arrays: Any, planes: Any, ends: Any):
            pairs = zip(first, zip(arrays, self.axes, strict=True), strict=True)
            inner = run.with_constants({block.start: pair for block, pair in pairs}).learn(
                ends=dict(zip(numbers, ends, strict=True)),
                planes=dict(zip((block.start for block in first), planes, strict=True)),
            )
            pulled: dict[int, Coefficients] = {self.stretch.made: coefficients.Dense(state[0])}
            carry = state[1]
            for block in reversed(first):
                pulled, carry = inner.pull(block, pulled, carry)
            return run.dense(pulled[self.stretch.read]).values, carry

        def step(state: Any, scanned: Any):
            index, *parts = scanned
            if self.count is None:
                return back(state, *parts), None
            return jax.lax.cond(index < self.count, back, lambda state, *_: state, state, *parts), None

        start = run.dense(rows.pop(self.entry)).values, carry
        scanned = jnp.arange(len(self.stretch.blocks)), tuple(self.constants), self.planes, self.ends
        (values, carry), _ = rolled(jax.lax.scan)(step, start, scanned, reverse=True)
        return rows, run.deliver(rows, self.stretch.read, coefficients.Dense(values), carry)


# --- finding stretches ------------------------------------------------------------------------------------------------


def _stretch(graph: Graph, first: int, period: int) -> Stretch | None:
    """The longest stretch of this period from this block, or None."""
    structure, blocks = graph.structure, graph.blocks
    groups: list[tuple[Block, ...]] = []
    reads: list[int] = []
    while (start := first + period * len(groups)) + period <= len(blocks):
        group = blocks[start : start + period]
        outside = {k for block in group for k in block.outer if k < group[0].start}
        if len(outside) != 1 or (groups and _described(graph, group) != _described(graph, groups[0])):
            break
        (read,) = outside
        if graph.nodes[read].op.kind in NONLINEAR or (not groups and graph.nodes[read].affine_in_region):
            break  # bounded without a pass, unlike (perhaps) the values that take its place
        if not groups and any(graph.nodes[k].op.kind in NONLINEAR for k in _readers_outside(structure, read, group)):
            break  # their relaxations take part in the choice of its rows
        inside = bool(groups) and groups[-1][0].start <= read
        if groups and not (inside and (len(groups) == 1 or read - group[0].start == reads[1] - groups[1][0].start)):
            break
        groups.append(group)
        reads.append(read)
    while len(groups) >= FEWEST_REPEATS and not _closed(structure, groups, reads):
        groups.pop()
        reads.pop()
    return Stretch(tuple(groups), reads[0], reads[1]) if len(groups) >= FEWEST_REPEATS else None


def _readers_outside(structure: Structure, number: int, group: tuple[Block, ...]) -> list[int]:
    return [k for k in structure.consumers[number] if not group[0].start <= k < group[-1].stop]


def _described(graph: Graph, group: tuple[Block, ...]) -> list:
    """What must agree between super-blocks: templates, reads by position, batch axes of constants."""
    start = group[0].start
    axes = graph.axes or (None,) * len(graph.constants)
    return [
        (block.template, tuple(max(k - start, -1) for k in block.outer), tuple(axes[k] for k in block.constants))
        for block in group
    ]


def _closed(structure: Structure, groups: list, reads: list[int]) -> bool:
    """Whether no value of a super-block but the one that it makes is read outside it."""
    outputs = {number for kind, number in structure.outputs if kind == "node"}
    offset = reads[1] - groups[0][0].start
    for position, group in enumerate(groups):
        inside = range(group[0].start, group[-1].stop)
        last = position == len(groups) - 1
        following = range(0) if last else range(groups[position + 1][0].start, groups[position + 1][-1].stop)
        for number in inside:
            made = number == inside.start + offset
            readers = [k for k in structure.consumers[number] if k not in inside]
            allowed = made and (last or all(k in following for k in readers))
            if (readers and not allowed) or (number in outputs and not (made and last)):
                return False
    return True


def _stacked(run: Run, blocks: list[Block]) -> tuple[jax.Array, ...]:
    arrays = [run.constants(block)[0] for block in blocks]
    return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for parts in zip(*arrays, strict=True))


def _at(tree: Any, index: int):
    return jax.tree.map(lambda leaf: leaf[index], tree)
