"""FROWN: CROWN with slopes tuned by gradient steps (Lyu et al. 2020, "Fastened CROWN").

Every slope of every relaxation is sound, with its exact intercept, so the lower bound of a row is a function of slopes
that may be maximised (`ascent`), over the range in which slopes can gain anything: for ReLU the lower slope from 0 to
1, for S-shaped functions from one end's tangent of the hull to the other's. (Every valid line contains the hull, so
lines with slopes outside are implied by these.) Every row keeps the best bound that it has seen, CROWN's included.

Each row (one side of one neuron) may have slopes of its own at every node before it, or neighbours share them. The
inputs of nonlinearities are tuned in the same way, one after the other, each within what is known of it; tighter inputs
make tighter lines, which is the only way past the linear program of fixed inputs (Salman et al. 2019).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbound import errors
from jaxbound.driver import Rows, Run, sweep, walks
from jaxbound.graph import Block, Graph
from jaxbound.methods import ascent
from jaxbound.methods.base import Bounded, Ends, Method, Request, better, output_nodes, targets
from jaxbound.methods.crown import Crown
from jaxbound.methods.optimizers import default_optimizer
from jaxbound.relaxations import interval
from jaxbound.relaxations.slopes import Given

_COPIES = 10
"""Arrays of the size of all slopes that one tuning step holds: shares, moments, gradients, lines."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Frown(Method):
    """FROWN: CROWN with slopes tuned by optax, never looser than CROWN.

    `lower <= fn(x) <= upper`; every bound is at least as tight as that of `Crown` with the same pre-activation bounds
    (of `Crown()` where they are tuned too). Examples of a batch are tuned independently.

    Args:
        steps: how many gradient steps each bound gets; another number compiles nothing. Static.
        optimizer: any optax transformation, on shares in [0, 1] of the slopes' ranges; None for `default_optimizer`.
            Rows are independent if it works entry by entry. Static: pass the same object, or all compiles again.
        groups: how many neighbouring rows share slopes: "neuron" for none, a number, or "layer" for all rows on one
            side. Sharing is cheaper and looser. Static.
        pre_activation: "tuned" (or None) to tune the inputs of nonlinearities too, or the method that bounds them.
        early_stop: stop tuning an example once its rows together gained less than this part of all that they gained,
            in 5 steps one after the other; None for never. Static.
        budget: which rows to tune under `jit`; see `Crown`. Static.

    Reference: Lyu et al., "Fastened CROWN: tightened neural network robustness certificates", 2020, section 4.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> fn, box = lambda x: jax.nn.relu(x).sum() - jax.nn.relu(x - 1).sum(), jb.Box(-jnp.ones(2), 2 * jnp.ones(2))
    >>> bool(jb.bound(fn, jb.Frown(steps=5))(box).lower >= jb.bound(fn, jb.Crown())(box).lower)
    True
    """

    steps: int = 20
    optimizer: optax.GradientTransformation | None = None
    groups: str | int = "neuron"
    pre_activation: Method | str | None = "tuned"
    early_stop: float | None = None
    budget: float | None = None

    def tree_flatten(self):
        """A pre-activation method is a child; "tuned" is no array."""
        given = isinstance(self.pre_activation, Method)
        tuned = None if given else self.pre_activation
        fixed = self.steps, self.optimizer, self.groups, tuned, self.early_stop, self.budget
        return (self.pre_activation if given else None,), fixed

    @classmethod
    def tree_unflatten(cls, static: Any, children: Sequence):
        """The reverse."""
        steps, optimizer, groups, tuned, *options = static
        return cls(steps, optimizer, groups, tuned if children[0] is None else children[0], *options)

    @property
    def charges_constants(self) -> bool:
        """It does, if the method that bounds the inputs of nonlinearities does."""
        given = self.pre_activation
        return not isinstance(given, Method) or given.charges_constants

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        plain = self._plain()
        known = plain.relax(graph, leaves, request, skip_exact=False)
        run = self._tighten(graph, leaves, request, known, skip_exact=False)
        return {number: run.ends[number] for number in targets(graph)}

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        run, untuned = self.prepared(graph, leaves, request)
        return [
            best_of(run, first, *self.bound_node(run, number, sides=request.sides))
            for number, first in zip(output_nodes(graph), untuned, strict=True)
        ]

    def prepared(self, graph: Graph, leaves: Sequence, request: Request) -> tuple[Run, list[Bounded]]:
        """Bounds of all nodes, those before nonlinearities tuned, and what CROWN says of the outputs."""
        plain = self._plain()
        known = plain.relax(graph, leaves, request)
        return self._tighten(graph, leaves, request, known, skip_exact=True), plain.outputs(known, request)

    def bound_node(self, run: Run, number: int, *, chosen: Any = None, sides: str = "both"):
        """What `Run.bound_node` returns, tuned."""
        one = lambda index: self.tuned_rows(run, number, index, sides)[0]  # noqa: E731
        return run.in_chunks(one, number, chosen=chosen, sides=sides)

    def tuned_rows(self, run: Run, number: int, index: jax.Array, sides: str = "both") -> tuple[Rows, ascent.Slopes]:
        """What `Run.bound_rows` returns, tuned, and the slopes."""
        shared = self.groups if isinstance(self.groups, int) else {"neuron": 1, "layer": None}[self.groups]
        optimizer = default_optimizer() if self.optimizer is None else self.optimizer
        graph, settings = run.graph, ascent.Settings(optimizer, shared, self.early_stop, sides, bool(run.outward))
        constants = (*graph.constants, jnp.asarray(self.steps)), None if graph.axes is None else (*graph.axes, None)
        reached = _reached(graph, number)
        ends = {k: run.ends[k] for k in _asked_for(graph, reached)}
        tables = {k: table for k, table in run.tables.items() if k in reached}
        static = graph.structure, number, settings
        slopes, best = run.call(ascent.tuned, static, constants, run.regions, ends, tables, index)
        return run.together(_by_slopes, (number, sides), slopes, best, index)[1], slopes

    def _plain(self) -> Crown:
        """CROWN, which this never falls behind."""
        self._check()
        fixed = self.pre_activation if isinstance(self.pre_activation, Method) else None
        return Crown(pre_activation=fixed, budget=self.budget)

    def _check(self) -> None:
        if not isinstance(self.pre_activation, Method) and self.pre_activation not in ("tuned", None):
            raise errors.unknown_option("pre_activation", self.pre_activation, ("tuned", "a method object"))
        whole = isinstance(self.groups, int) and not isinstance(self.groups, bool) and self.groups >= 1
        if not whole and self.groups not in ("neuron", "layer"):
            raise errors.unknown_option("groups", self.groups, ("neuron", "layer", "a number of rows, 1 or more"))
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise errors.argument("steps", f"is {self.steps!r}", "pass how many gradient steps to take, 0 or more")
        if self.early_stop is not None and not self.early_stop >= 0:
            raise errors.argument("early_stop", f"is {self.early_stop!r}", "pass a number of 0 or more, or None")

    def _tighten(self, graph: Graph, leaves: Sequence, request: Request, plain: Run, *, skip_exact: bool) -> Run:
        """The bounds of every node, with those of the inputs of nonlinearities tuned."""
        tuned = not isinstance(self.pre_activation, Method)
        max_rows = _rows_that_fit(graph, request)
        run = Run.over(graph, leaves, outward=request.rounding, max_rows=max_rows, budget=self.budget)

        def bound(run: Run, source: int) -> Run:
            run = run.learn(ends={source: run.call(_met, None, ((), ()), run.ends[source], plain.ends[source])})
            settled = not tuned or run.exact(source) or graph.nodes[source].affine_in_region
            return run if settled else self._tighten_node(run, source, skip_exact)

        def relaxed(run: Run, start: int, stop: int) -> Run:
            run, tables = run.together(_relaxed, (start, stop))
            return replace(run, tables={**run.tables, **tables})

        start = 0
        for position, block in enumerate(graph.blocks):
            if sources := walks.to_bound(run, block):
                run, start = relaxed(run, start, position), position
            for source in sources:
                run = walks.visited(bound(run, source), source)
        return relaxed(run, start, len(graph.blocks))

    def _tighten_node(self, run: Run, number: int, skip_exact: bool) -> Run:
        """Tune what still matters of a node's bounds."""
        needed = run.unstable_entries(number) if skip_exact else None
        found = run.bound_needed(number, needed, functools.partial(self.bound_node, run))
        if found is None:
            return run
        widened = run.call(_widened, None, ((), ()), *found)
        return run.learn(ends={number: run.call(_met, None, ((), ()), run.ends[number], widened)})


def _relaxed(run: Run, part: tuple[int, int]) -> tuple[Run, dict]:
    """Bounds of the nodes of some blocks, and tables of the nonlinear ones."""
    tables = {}

    def tabulate(run: Run, block: Block) -> Run:
        inputs, node = [run.ends[k] for k in run.graph.nodes[block.start].inputs], block.template.nodes[0]
        tables[block.start] = run.call(ascent.table_of, node, run.constants(block), inputs)
        return run

    return sweep(run, lambda run, _: run, tabulate, blocks=run.graph.blocks[slice(*part)]), tables


def _by_slopes(run: Run, static: tuple[int, str], slopes: ascent.Slopes, best: Rows, index: jax.Array):
    """The bounds of some rows by tuned slopes with their exact intercepts, or the best that tuning saw."""
    (number, sides), own = static, run
    for block in run.graph.blocks:
        if block.start in slopes:
            own = own.enclose_rows(block, Given(*slopes[block.start]), sides, index.shape[-1])
    return run, run.call(ascent.better, None, ((), ()), own.bound_rows(number, index, sides), best)


def best_of(run: Run, untuned: Bounded, ends: Ends, rounding: Ends) -> Bounded:
    """The better of what CROWN says of a node and tuned bounds of it."""
    upper = None if untuned.upper is None else ends[1]
    return run.call(_better, None, ((), ()), untuned, Bounded(ends[0], upper, *rounding))


def _reached(graph: Graph, number: int) -> set[int]:
    """The nodes that a pass from a node may meet."""
    found, stack = {number}, [number]
    while stack:
        new = set(graph.nodes[stack.pop()].inputs) - found
        found |= new
        stack.extend(new)
    return found


def _asked_for(graph: Graph, reached: set[int]) -> list[int]:
    """The nodes whose bounds a pass may ask for: all in and around a block of which it meets any node."""
    found = set(reached)
    for block in graph.blocks:
        inside = range(block.start, block.stop)
        if not reached.isdisjoint(inside):
            found.update(inside, block.outer)
    return sorted(found)


def _rows_that_fit(graph: Graph, request: Request) -> int:
    """How many rows one tuning may carry, where a pass may carry `max_rows`: each has slopes everywhere."""
    sizes = [node.op.size for node in graph.nodes]
    slopes = sum(sizes[source] for k in graph.structure.nonlinear for source in graph.nodes[k].inputs)
    return max(2, request.max_rows * 3 * max(sizes) // max(1, _COPIES * slopes))


def _met(_static: Any, _constants: Sequence, first: Ends, second: Ends) -> Ends:
    return interval.intersect(first, second)


def _widened(_static: Any, _constants: Sequence, ends: Ends, rounding: Ends) -> Ends:
    return ends[0] - rounding[0], ends[1] + rounding[1]


def _better(_static: Any, _constants: Sequence, first: Bounded, second: Bounded) -> Bounded:
    return better(first, second)
