"""Forward linear bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxbound import regions
from jaxbound.driver import Run
from jaxbound.graph import Graph
from jaxbound.methods.base import Bounded, Ends, Method, Request, output_nodes, targets
from jaxbound.methods.passes import bound_by_pass, linear_functions
from jaxbound.relaxations import forward
from jaxbound.relaxations.slopes import SlopeRule, rule_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward(Method):
    """Forward linear bounds: linear functions of the input below and above every value.

    `lower <= fn(x) <= upper`. Each value also keeps its interval where that is tighter.

    Reference: Xu et al., "Automatic perturbation analysis for scalable certified robustness and beyond", 2020, app. A.
    """

    lower_slope: str | SlopeRule = field(default="adaptive", metadata={"static": True})

    @property
    def charges_constants(self) -> bool:
        """It does."""
        return True

    def _run(self, graph: Graph, leaves: Sequence, request: Request) -> Run:
        run = Run.over(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        pairs = run.call(_forward_start, None, ((), ()), run.regions)
        known = {k: (pair, run.ends[k]) for k, pair in enumerate(pairs)}
        for block in graph.blocks:
            static = block.template, rule_of(self.lower_slope), request.rounding
            outer = [known[k] for k in block.outer]
            found = run.call(_forward_block, static, run.constants(block), outer, run.regions)
            known.update(zip(range(block.start, block.stop), found, strict=True))
        return run.learn(
            ends={number: ends for number, (_, ends) in known.items()},
            pairs={number: known[number][0] for number in graph.structure.nonlinear},
        )

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        run = self._run(graph, leaves, request)
        return {number: run.ends[number] for number in targets(graph)}

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        run = self._run(graph, leaves, request)
        return [bound_by_pass(run, k, request, known=True) for k in output_nodes(graph)]

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """The pair of linear functions of each output."""
        run = self._run(graph, leaves, request)
        return [linear_functions(run, number) for number in output_nodes(graph)]


def _forward_start(_static: Any, _constants: Sequence, leaves: Sequence[regions.Region]):
    return forward.start(leaves)


def _forward_block(static: Any, constants: Sequence, outer: Sequence, leaves: Sequence[regions.Region]):
    template, rule, outward = static
    return forward.propagate(template, constants, outer, leaves, rule, outward=outward)
