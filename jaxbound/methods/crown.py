"""Backward linear bounds: CROWN, and the two methods that are CROWN with one choice made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound.driver import Run, stretches, sweep, walks
from jaxbound.driver.pruning import pruned
from jaxbound.graph import NONLINEAR, Block, Graph
from jaxbound.methods.base import (
    Bounded,
    Ends,
    Method,
    Request,
    check_certified,
    output_nodes,
    targets,
)
from jaxbound.methods.ibp import IBP
from jaxbound.methods.passes import bound_by_pass, linear_functions
from jaxbound.relaxations.slopes import Given, SlopeRule, rule_of


class _Part(NamedTuple):
    """What happens between two choices of rows: the blocks `start <= position < stop`, and the nodes at both ends."""

    rule: SlopeRule
    intersect: bool
    start: int = 0
    stop: int = 0
    bounded: int | None = None
    """The node that passes have bounded."""
    following: int | None = None
    """The node that passes are to bound next."""
    skip_exact: bool = True
    propagate: bool = True


def _go_on(
    run: Run, part: _Part, rules: dict[int, SlopeRule], given: dict[int, Ends], found: Any = None, needed: Any = None
) -> tuple[Run, jax.Array | None]:
    """Keep what was found and relax blocks; the entries of the node that follows to be bound, None for all."""
    if part.bounded is not None:
        run = run.keep(part.bounded, found, needed, intersect=part.intersect)
    run = sweep(
        run,
        lambda run, source: run.learn(ends={source: given[source]}) if source in given else run,
        lambda run, block: run.enclose(block, rules.get(block.start, part.rule)),
        blocks=run.graph.blocks[part.start : part.stop],
        propagate=part.propagate,
    )
    following = None if part.following is None else run.needed_entries(part.following, skip_exact=part.skip_exact)
    return run, following


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Crown(Method):
    """CROWN: backward linear bounds with relaxations chosen per nonlinearity.

    `lower <= fn(x) <= upper`, from linear functions of the input below and above every output.

    Args:
        pre_activation: the method that bounds the inputs of nonlinearities; None for CROWN itself, at every one.
        lower_slope: "adaptive" (the slope with the smallest gap; for ReLU 1 if u > -l else 0), "parallel" (the upper
            line's slope), "zero" or "one" (as near as the graph's convex hull allows), or a rule of your own
            (`relaxations.slopes`). Static.
        slopes: `{node name: (lower, upper)}` to use given slopes instead; every slope is sound. With the node's shape,
            they hold for every bound; with a first axis more, as `tune` returns them (a list for several outputs),
            they belong to groups of the result's rows, and inputs of nonlinearities are bounded with CROWN's own.
        intersect: whether a value also keeps what interval arithmetic says of it. Static. (Off, with one line per side
            everywhere, ReLU bounds equal the linear program of the same triangles' lines.)
        budget: under `jit`, which cannot choose rows by their values, the part of each layer's entries (0 to 1) that is
            bounded where no example has more unstable ones; where one has, all are, so the numbers are the same. Both
            programs are compiled; under an outer `vmap` both run. None to bound all entries. Static.

    Reference: Zhang et al., "Efficient neural network robustness certification with general activation functions",
    2018, theorem 3.2 and corollary 3.3.

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> bounds = jb.bound(lambda x: jnp.maximum(x, 0).sum(), jb.Crown())(jb.Box(-jnp.ones(2), jnp.ones(2)))
    >>> float(bounds.upper)
    2.0
    """

    pre_activation: Method | None = None
    lower_slope: str | SlopeRule = field(default="adaptive", metadata={"static": True})
    slopes: dict[str, tuple] | list[dict[str, tuple]] | None = None
    intersect: bool = field(default=True, metadata={"static": True})
    budget: float | None = field(default=None, metadata={"static": True})

    @property
    def charges_constants(self) -> bool:
        """It does, if the method that bounds the inputs of nonlinearities does."""
        return self.pre_activation is None or self.pre_activation.charges_constants

    @property
    def charges_execution(self) -> bool:
        """It does, with one interval per value, from a method that does."""
        return self.intersect and (self.pre_activation is None or self.pre_activation.charges_execution)

    def relax(self, graph: Graph, leaves: Sequence, request: Request, *, skip_exact: bool = True) -> Run:
        """Bound the inputs of every nonlinear node and relax it."""
        rule = rule_of(self.lower_slope)
        if self.pre_activation is not None:
            check_certified("pre_activation", self.pre_activation)
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise errors.argument("budget", f"is {self.budget!r}", "pass a part of each layer, from 0 to 1, or None")
        run = Run.over(graph, leaves, outward=request.rounding, max_rows=request.max_rows, budget=self.budget)
        skip_exact, given = skip_exact and self.intersect, None
        if self.pre_activation is not None:
            given = self.pre_activation.pre_activations(graph, leaves, request)
        part = _Part(rule, self.intersect)
        if given is not None:
            if whole := len(given) == len(graph.nodes):  # then there is nothing to propagate
                run = run.learn(ends=given)
            return self._go_on(run, part._replace(stop=len(graph.blocks), propagate=not whole), given)[0]
        return self._relax_in_parts(run, part._replace(skip_exact=skip_exact)) if run.eager else (
            self._relax_traced(run, part, skip_exact)
        )  # fmt: skip

    def _go_on(self, run: Run, part: _Part, given: dict[int, Ends], *found: Any) -> tuple[Run, jax.Array | None]:
        rules = {block.start: self._given(run, block, 0, grouped=False) for block in run.graph.blocks}
        chosen = {start: rule for start, rule in rules.items() if rule is not None}
        return run.together(_go_on, part, chosen, given, *found, over=())

    def _relax_in_parts(self, run: Run, part: _Part) -> Run:
        """By the values of bounds: between two choices of rows is a part of the blocks."""
        found = needed = None
        for position, block in enumerate(run.graph.blocks):
            sources = walks.to_bound(run, block)
            for source in filterfalse(run.exact, sources):
                part = part._replace(stop=position, following=source)
                run, needed = self._go_on(run, part, {}, found, needed)
                run = pruned(run)
                found = run.bound_needed(source, needed, run.bound_node)
                part = part._replace(start=position, bounded=source)
            run = walks.visited(run, *sources)
        last = part._replace(stop=len(run.graph.blocks), following=None)
        run = replace(run, segments=tuple(run.graph.blocks))  # for passes with other relaxations
        return self._go_on(run, last, {}, found, needed)[0]

    def _relax_traced(self, run: Run, part: _Part, skip_exact: bool) -> Run:
        """Without knowing values; equal blocks in loops."""

        def tighten(run: Run, source: int) -> Run:
            exact = run.exact(source)
            return run if exact else run.tighten(source, skip_exact=skip_exact, intersect=self.intersect)

        def enclose(run: Run, block: Block) -> Run:
            return run.enclose(block, self._given(run, block, 0, grouped=False) or part.rule)

        def relax_block(run: Run, block: Block) -> Run:
            return sweep(run, tighten, enclose, blocks=[block])

        run = replace(run, segments=())
        for segment in stretches.plan(run.graph) if self.slopes is None else run.graph.blocks:
            if isinstance(segment, Block):
                run = relax_block(run, segment)
                run = replace(run, segments=(*run.segments, segment))
            else:
                run = stretches.relax(run, segment, relax_block)
        return run

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        run = self.relax(graph, leaves, request, skip_exact=False)
        return {number: run.ends[number] for number in targets(graph)}

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        return self.outputs(self.relax(graph, leaves, request), request)

    def outputs(self, run: Run, request: Request) -> list[Bounded]:
        """Bounds of the outputs, once everything before them is relaxed."""
        results = []
        for position, number in enumerate(output_nodes(run.graph)):
            own = self._for_rows(run, position, request)
            results.append(bound_by_pass(own, number, request, known=self.intersect))
        return results

    def _for_rows(self, run: Run, position: int, request: Request) -> Run:
        """The relaxations for one output, where slopes are given by groups of its rows."""
        rows, sides = run.graph.nodes[output_nodes(run.graph)[position]].op.size, 2 if request.sides == "both" else 1
        blocks = [block for block in run.graph.blocks if run.graph.nodes[block.start].op.kind in NONLINEAR]
        given = {block: self._given(run, block, position, grouped=True) for block in blocks}
        if all(rule is None for rule in given.values()):
            return run
        run = replace(run, max_rows=sides * rows)
        for block, rule in given.items():
            if rule is not None:  # those of lower bounds are the first half
                axis = 0 if run.batch is None else 1
                given_groups = rule.below.shape[axis]
                if given_groups % 2:
                    name = run.graph.nodes[block.start].name
                    problem = f"has {given_groups} groups of rows for {name!r}"
                    raise errors.argument("slopes", problem, "pass those of lower bounds, then as many of upper bounds")
                groups = given_groups * sides // 2
                own = jax.tree.map(lambda leaf, cut=(slice(None),) * axis + (slice(groups),): leaf[cut], rule)
                run = run.enclose_rows(block, own, request.sides, rows)
        return run

    def _given(self, run: Run, block: Block, position: int, *, grouped: bool) -> Given | None:
        """The slopes given for a node and an output, if they are (or are not) by groups."""
        if self.slopes is None:
            return None
        node = run.graph.nodes[block.start]
        slopes = (self.slopes if isinstance(self.slopes, dict) else self.slopes[position]).get(node.name)
        ndim = len(node.op.shape) + (run.batch is not None)
        return None if slopes is None or grouped != (jnp.ndim(slopes[0]) > ndim) else Given(*slopes)

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """The linear functions of each output."""
        run = self.relax(graph, leaves, request)
        numbers = enumerate(output_nodes(graph))
        return [linear_functions(self._for_rows(run, position, request), number) for position, number in numbers]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FastLin(Crown):
    """Fast-Lin: CROWN with parallel lines, the lower slope equal to the upper one.

    Reference: Weng et al., "Towards fast computation of certified robustness for ReLU networks", 2018, section 3.3.
    """

    lower_slope: str | SlopeRule = field(default="parallel", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrownIBP(Crown):
    """CROWN-IBP: one backward pass over pre-activation bounds from interval propagation.

    Reference: Zhang et al., "Towards stable and efficient training of verifiably robust neural networks", 2020,
    section 3.2.
    """

    pre_activation: Method | None = field(default_factory=IBP)
