"""The walk of every method that relaxes node by node: bound what a nonlinearity reads, relax it, propagate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxbound.driver.run import Run
from jaxbound.graph import NONLINEAR, Block


def to_bound(run: Run, block: Block) -> list[int]:
    """What the nonlinear node of a block reads and no sweep has bounded yet."""
    node = run.graph.nodes[block.start]
    return sorted(set(node.inputs) - run.visited) if node.op.kind in NONLINEAR else []


def visited(run: Run, *numbers: int) -> Run:
    """The run in which these nodes count as bounded."""
    return replace(run, visited=run.visited | set(numbers))


def sweep(
    run: Run,
    bound: Callable[[Run, int], Run],
    relax: Callable[[Run, Block], Run] = lambda run, block: run,
    after: Callable[[Run, Block], None] = lambda run, block: None,
    *,
    blocks: Sequence[Block] | None = None,
    propagate: bool = True,
) -> Run:
    """Walk over the blocks of a graph; every step returns the run that knows more.

    Args:
        run: what is known before.
        bound: for every value that a nonlinear node reads, once, before it is relaxed.
        relax: for every block that begins with a nonlinear node.
        after: for every block whose nodes are bounded, for what a method keeps beside the run.
        blocks: some of them, in order; None for all.
        propagate: whether nodes are bounded by interval arithmetic.
    """
    for block in run.graph.blocks if blocks is None else blocks:
        for source in to_bound(run, block):
            run = visited(bound(run, source), source)
        if run.graph.nodes[block.start].op.kind in NONLINEAR:
            run = relax(run, block)
        if propagate:
            run = run.propagate(block)
        after(run, block)
    return run
