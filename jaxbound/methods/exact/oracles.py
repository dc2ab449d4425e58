"""The methods `LP` and `MILP`: programs built node by node, and solved once for every entry and side.

Both walk the graph as the other methods do: before a nonlinear node is relaxed, its inputs are bounded over the program
so far, or by another method. Affine images of the region need no program; their bounds are exact already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbound import _compat, errors, regions
from jaxbound.driver import Run, sweep
from jaxbound.graph import NONLINEAR, Block, Graph, Node
from jaxbound.methods.base import Bounded, Ends, Method, Request, check_method, output_nodes
from jaxbound.methods.exact import encoding, families, solvers
from jaxbound.methods.exact.encoding import Encoding
from jaxbound.methods.exact.program import Array, Program, lower_bound
from jaxbound.methods.exact.tree import Tree
from jaxbound.relaxations import interval
from jaxbound.relaxations.enclosures import scalar

Sides = tuple[Array, Array]

_LINES = 3
"""Lines for each side of a curved function, besides CROWN's own."""


class _Oracle(Method):
    """A method that builds a program of the graph and solves it."""

    def _build(self, graph: Graph, leaves: Sequence, request: Request, *, skip_exact: bool) -> _Build:
        raise NotImplementedError

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        return self._build(graph, leaves, request, skip_exact=False).targets()

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        return self._build(graph, leaves, request, skip_exact=True).outputs()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LP(_Oracle):
    """The linear program of all values between their planes; over l_2 balls a cone program.

    `lower <= fn(x) <= upper` in exact arithmetic, whatever the solver did: what is reported is the Lagrangian at the
    multipliers that it proposes. A host loop, one program per example and one objective per entry and side.

    Args:
        pre_activation: the method that bounds the inputs of nonlinearities; None for the program itself, at every one.
        lines: 1 for CROWN's own line on each side; more for the convex hull of piecewise linear functions, and for
            others so many lines besides, from one end of the hull's slopes to the other. Static.
        intersect: whether the program holds the interval of every value. Static. (Off, with one line, and the same
            pre-activation bounds, it equals `Crown(intersect=False)`.)

    Reference: Salman et al., "A convex relaxation barrier to tight robustness verification of neural networks", 2019;
    Neumaier and Shcherbina, "Safe bounds in linear and mixed-integer linear programming", 2004.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> from jaxbound.methods.exact import LP
    >>> tent = lambda x: jax.nn.relu(x[0] + x[1]) + jax.nn.relu(x[0] - x[1])
    >>> float(jb.bound(tent, LP())(jb.Box(-jnp.ones(2), jnp.ones(2))).upper.round(3))
    3.0
    """

    pre_activation: Method | None = None
    lines: int = field(default=_LINES, metadata={"static": True})
    intersect: bool = field(default=True, metadata={"static": True})

    def _build(self, graph: Graph, leaves: Sequence, request: Request, *, skip_exact: bool) -> _Build:
        _check_host("LP", "Frown() or Crown()")
        if self.lines < 1:
            raise errors.argument("lines", f"is {self.lines}", "pass 1 or more lines for each side")
        way_out = "use Crown(), or the enclosing Box"
        _refuse_norms("LP", leaves, (1, 2, np.inf), way_out)
        given = _given(self.pre_activation, graph, leaves, request)
        build = _Build(graph, leaves, request, _relaxed, self.lines, self.intersect)
        build.walk(given, skip_exact=skip_exact)
        return build


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MILP(_Oracle):
    """The exact range of piecewise linear networks, by branch and bound.

    `lower <= fn(x) <= upper` in exact arithmetic like `LP`, whatever the solver did, and with equality up to its
    tolerances where the search finishes. A host loop.

    Args:
        pre_activation: the method that bounds the inputs of nonlinearities, `LP()` by default; None for the program
            itself. The answer is the same; tighter bounds leave less to branch on.
        time_limit: seconds for each objective; None for no limit. What was proved by then is reported. Static.

    Raises:
        UnsupportedError: a nonlinearity is not piecewise linear.
        ArgumentError: a region is a ball of another norm than 1 or infinity.

    Rounding: as `LP`; a bound is the least of the leaves' Lagrangians (`exact.tree`).

    Reference: Tjeng et al., "Evaluating robustness of neural networks with mixed integer programming", 2019.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> from jaxbound.methods.exact import MILP
    >>> tent = lambda x: jax.nn.relu(x[0] + x[1]) + jax.nn.relu(x[0] - x[1])
    >>> float(jb.bound(tent, MILP())(jb.Box(-jnp.ones(2), jnp.ones(2))).upper.round(3))
    2.0
    """

    pre_activation: Method | None = field(default_factory=LP)
    time_limit: float | None = field(default=None, metadata={"static": True})

    def _build(self, graph: Graph, leaves: Sequence, request: Request, *, skip_exact: bool) -> _Build:
        _check_host("MILP", "Frown() or Crown()")
        _refuse_norms("MILP", leaves, (1, np.inf), "use LP(), or the enclosing Box")
        _refuse_curved(graph)
        given = _given(self.pre_activation, graph, leaves, request)
        solve = functools.partial(_branched, time_limit=self.time_limit)
        build = _Build(graph, leaves, request, solve, _LINES, True, split=True)
        build.walk(given, skip_exact=skip_exact)
        return build


# --- one call ---------------------------------------------------------------------------------------------------------


class _Build:
    """The encodings of all examples (those whose region is not empty), node by node."""

    def __init__(
        self,
        graph: Graph,
        leaves: Sequence[regions.Region],
        request: Request,
        solve: Callable,
        lines: int,
        intersect: bool,
        *,
        split: bool = False,
    ):
        self.run = Run.over(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        self.sides, self.solve, self.lines, self.intersect, self.split = request.sides, solve, lines, intersect, split
        void = np.asarray(self.run.void).reshape(-1)
        self.encodings = {k: Encoding(stated=intersect) for k in map(int, np.flatnonzero(~void))}
        for number, region in enumerate(self.run.regions):
            for k, own in self.encodings.items():
                own.add_region(
                    number, jax.tree.map(lambda leaf, k=k: self.of(k, leaf), region), self.ends(self.run, k, number)
                )

    def of(self, k: int, array: ArrayLike) -> Array:
        """One example's part of an array with a batch axis, if there is one."""
        return np.asarray(array) if self.run.batch is None else np.asarray(array)[k]

    def ends(self, run: Run, k: int, number: int) -> Sides:
        """What is known of a node, for one example."""
        low, high = run.ends[number]
        return self.of(k, low), self.of(k, high)

    def walk(self, given: dict[int, Ends] | None, *, skip_exact: bool) -> None:
        """Bound the inputs of every nonlinear node, and add all nodes."""

        def bound(run: Run, source: int) -> Run:
            if given is not None:
                run = run.learn(ends={source: given[source]})
            elif run.graph.nodes[source].affine_in_region:
                run = self.tighten_prefix(run, source)
            elif not run.exact(source):
                needed = np.asarray(run.unstable_entries(source)) if skip_exact and self.intersect else None
                run = run.learn(ends={source: self.bounded(run, source, needed, "both")})
            for k, own in self.encodings.items():
                own.builder.tighten(own.columns[source], *self.ends(run, k, source))
            return run

        def add(run: Run, block: Block) -> None:
            for number in range(block.start, block.stop):
                self.add(run, number)

        self.run = sweep(self.run, bound, after=add)

    def tighten_prefix(self, run: Run, number: int) -> Run:
        """An affine image of the region is bounded exactly without a program."""
        return run if run.exact(number) else run.tighten(number, skip_exact=False, intersect=self.intersect)

    def add(self, run: Run, number: int) -> None:
        """Add a node to every example's program."""
        node = run.graph.nodes[number]
        if node.op.kind == "affine":
            self.add_affine(run, number, node)
            return
        planes, split = families.family(run, number, self.lines), None
        if self.split and node.op.kind == "scalar" and scalar.curvature_of(node.op).is_piecewise_linear:
            split = families.pieces(run, number)
        for k, own in self.encodings.items():
            own.add_node(number, self.ends(run, k, number))
            if node.op.kind == "meet" and self.lines > 1:
                own.add_equal(number, node)
                continue
            mine = jax.tree.map(lambda leaf, k=k: self.of(k, leaf), planes)
            inputs = self.ends(run, k, node.inputs[0])
            keep = families.facets(mine, inputs) if node.op.kind == "scalar" else None
            for line in range(len(mine.lower_intercept)):
                one = jax.tree.map(lambda leaf, line=line: leaf[line], mine)
                own.add_planes(number, node, one, None if keep is None else (keep[0][line], keep[1][line]))
            if split is not None:
                parts, left, right = jax.tree.map(lambda leaf, k=k: self.of(k, leaf), split)
                own.add_pieces(number, node, parts, left, right)
            elif self.split and node.op.kind == "maximum":
                own.add_choice(number, node, inputs)

    def add_affine(self, run: Run, number: int, node: Node) -> None:
        """Equations; examples share them where they share the constants."""
        graph, shared = run.graph, None
        varying = graph.axes is not None and any(graph.axes[c] is not None for c in node.constants)
        for k, own in self.encodings.items():
            if shared is None or varying:
                read = [
                    graph.constants[c] if graph.axes is None or graph.axes[c] is None else graph.constants[c][k]
                    for c in node.constants
                ]
                shared = encoding.equations(node.op, read)
            own.add_affine(number, node, shared, self.ends(run, k, number))

    def bounded(self, run: Run, number: int, needed: Array | None, sides: str) -> Ends:
        """Bounds of a node over the programs so far; entries that are not needed keep what was known."""
        op, known = run.graph.nodes[number].op, [np.array(end) for end in run.ends[number]]
        for k, own in self.encodings.items():
            chosen = np.arange(op.size) if needed is None else np.flatnonzero(self.of(k, needed))
            if not len(chosen):
                continue
            program, columns = own.builder.program(), own.columns[number]
            solve = self.solve(program)
            for side, sign in enumerate((1, -1) if sides == "both" else (1,)):
                end = self.of(k, known[side]).reshape(-1)  # a view
                for entry in chosen:
                    found = sign * solve(int(columns[entry]), float(sign))
                    if self.intersect:
                        found = max(found, end[entry]) if sign > 0 else min(found, end[entry])
                    if np.isfinite(found):
                        end[entry] = _outward(found, end.dtype, sign)
        low, high = map(jnp.asarray, known)
        return interval.intersect((low, high), run.ends[number]) if self.intersect else interval.hull((low, high))

    def targets(self) -> dict[int, Ends]:
        """Bounds of the inputs of nonlinear nodes."""
        return {source: self.run.ends[source] for source in sorted(self.run.visited)}

    def outputs(self) -> list[Bounded]:
        """Bounds of the function's outputs."""
        results, run = [], self.run
        for number in output_nodes(run.graph):
            if run.graph.nodes[number].affine_in_region:
                run = self.tighten_prefix(run, number)
            else:
                run = run.learn(ends={number: self.bounded(run, number, None, self.sides)})
            low, high = run.known(number)
            zeros = jnp.zeros_like(low)
            results.append(Bounded(low, high if self.sides == "both" else None, zeros, zeros))
        return results


def _relaxed(program: Program) -> Callable[[int, float], float]:
    """A bound by the multipliers of a solver."""
    solver = solvers.solver_of(program)
    return lambda column, sign: lower_bound(program, column, sign, solver.multipliers(column, sign))


def _branched(program: Program, time_limit: float | None) -> Callable[[int, float], float]:
    """A bound by branch and bound where something is to branch on."""
    return Tree(program, time_limit).lower_bound if program.splits else _relaxed(program)


def _outward(value: float, dtype: DTypeLike, sign: int):
    """A number in a dtype, rounded down (+1: a lower bound) or up (-1); subnormal numbers count as 0."""
    narrow, limits = np.asarray(value).astype(dtype), jnp.finfo(dtype)
    if sign * (float(narrow) - value) > 0:
        narrow = np.nextafter(narrow, np.asarray(-sign * np.inf, dtype))
    if 0 < abs(float(narrow)) < float(limits.tiny):
        narrow = np.asarray(min(sign * float(narrow), 0) and -sign * limits.tiny, dtype)
    return narrow


def _given(method: Method | None, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends] | None:
    """Pre-activation bounds by another method."""
    if method is None:
        return None
    check_method("pre_activation", method)
    if method.guarantee != "certified":
        raise errors.estimate_refused(type(method).__name__)
    return method.pre_activations(graph, leaves, request._replace(sides="both"))


def _check_host(name: str, alternative: str) -> None:
    if _compat.is_tracing():
        raise errors.host_loop(name, alternative)


def _refuse_curved(graph: Graph) -> None:
    """Refuse outputs that depend on a nonlinearity which no exact encoding knows.

    One exact expression of a meet makes it exact.
    """
    wrong: list[int | None] = []
    for number, node in enumerate(graph.nodes):
        before = [wrong[source] for source in node.inputs]
        first = next((source for source in before if source is not None), None)
        if node.op.kind == "meet":
            first = None if None in before else first
        elif node.op.kind in NONLINEAR and not _is_exact(node) and first is None:
            first = number
        wrong.append(first)
    for number in output_nodes(graph):
        culprit = wrong[number]
        if culprit is not None:
            node = graph.nodes[culprit]
            raise errors.unsupported(
                node.name, node.op.input_shapes, node.source, "it is not piecewise linear", method="MILP",
                way_out="use LP(), which bounds it",
            )  # fmt: skip


def _is_exact(node: Node) -> bool:
    if node.op.kind == "scalar":
        return scalar.curvature_of(node.op).is_piecewise_linear
    return node.op.kind == "maximum"


def _refuse_norms(name: str, leaves: Sequence[regions.Region], norms: tuple[float, ...], way_out: str) -> None:
    """Refuse regions that a program cannot state."""
    for leaf in leaves:
        if isinstance(leaf, regions.LpBall) and leaf.norm not in norms:
            stated = ", ".join(f"{norm:g}" for norm in norms)
            raise errors.argument("norm", f"is {leaf.norm:g}, and {name} states only {stated}", way_out)
