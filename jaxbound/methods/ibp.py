"""Interval bound propagation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from jaxbound.driver import Run
from jaxbound.graph import Graph
from jaxbound.methods.base import Bounded, Ends, Method, Request, of_ends, output_nodes, targets, where_finite
from jaxbound.methods.passes import bound_by_pass, tighten_prefix
from jaxbound.relaxations.planes import Planes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IBP(Method):
    """Interval bound propagation: `lower <= fn(x) <= upper`, one interval per value.

    An affine image of the region is bounded exactly (by the dual norm for l_p balls), and an output that is an affine
    image of the last nonlinear values, such as margins of the last layer, exactly as a function of their intervals.

    Reference: Gowal et al., "On the effectiveness of interval bound propagation", 2018, section 3.

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> jb.bound(jnp.tanh, jb.IBP())(jb.Box(jnp.zeros(1), jnp.zeros(1))).lower.shape
    (1,)
    """

    @property
    def charges_constants(self) -> bool:
        """It does."""
        return True

    @property
    def charges_execution(self) -> bool:
        """It does."""
        return True

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every node."""
        run = Run.over(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        return dict(run.together(_propagate, request.max_rows)[0].ends)

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        run = Run.over(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        return run.together(_bounded, request)[1]


def _propagate(run: Run, max_rows: int) -> tuple[Run, None]:
    """Bounds of every node; those before nonlinear ones as soon as they are there, so that all that follows gains."""
    run, graph = replace(run, max_rows=max_rows), run.graph
    read = set(targets(graph))
    for number in sorted(read & set(range(graph.structure.num_inputs))):
        run = tighten_prefix(run, number)
    for block in graph.blocks:
        run = run.propagate(block)
        for number in sorted(read & set(range(block.start, block.stop))):
            run = tighten_prefix(run, number)
    return run, None


def _bounded(before: Run, request: Request) -> tuple[Run, list[Bounded]]:
    """Bounds of the outputs, and nothing else."""
    run, graph = _propagate(before, request.max_rows)[0], before.graph
    run = run.learn(planes={number: Planes.constant(*run.ends[number]) for number in graph.structure.nonlinear})
    results = []
    for number in output_nodes(graph):
        node = graph.nodes[number]
        known = node.op.kind != "affine" or run.exact(number) or (
            not node.affine_in_region and graph.structure.exact_on_boxes[number] and not request.rounding
        )  # fmt: skip
        intervals = of_ends(run.known(number), request)
        # an infinite constant, as a mask has it, is infinite in intervals and looks like an overflow to a pass
        results.append(intervals if known else where_finite(bound_by_pass(run, number, request), intervals))
    return before, results
