"""The compositions: where pre-activation bounds come from, how slopes are chosen, how the output is bounded.

Length: six methods whose code is short and whose documentation is not.

A method is a frozen dataclass and a pytree. It answers two questions about a graph over regions,

    pre_activations(graph, leaves, request) -> {node: (lower, upper)} for every input of a nonlinear node (or every
        node), and
    bound(graph, leaves, request) -> for each output that depends on a region, a `Bounded`,

and, where the method has linear functions to show, `planes`. `guarantee` says whether the result is certified or an
estimate. To add a method: a class with these functions, here or in a file of its own (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbound import errors, regions
from jaxbound.driver import stretches
from jaxbound.regions.bounds import Estimate, Interval
from jaxbound.driver import ROWS, Run
from jaxbound.graph import NONLINEAR, Block, Graph
from jaxbound.relaxations import coefficients, enclosures, forward, interval
from jaxbound.relaxations.planes import Planes

Ends = tuple[jax.Array, jax.Array]


class Request(NamedTuple):
    """How an answer is wanted: static, the same for every method."""

    sides: str = "both"
    """"both", or "lower" for lower bounds only."""
    rounding: bool | str = False
    """Bounds that hold in exact arithmetic, up to a rounding error that is returned; "execution" for those of the
    network as it runs (`relaxations.execution`)."""
    max_rows: int = ROWS
    """The most rows that one step may carry."""


def rounding_mode(value: bool | str | None) -> bool | str:
    """What a user's `rounding` asks for: False, True (real arithmetic) or "execution".

    Raises:
        ArgumentError: anything else.
    """
    modes = {None: False, False: False, True: True, "outward": True, "exact": True, "execution": "execution"}
    if not isinstance(value, bool | str | None) or value not in modes:
        raise errors.argument("rounding", f"is {value!r}", 'pass "exact", "execution" or None')
    return modes[value]


class Bounded(NamedTuple):
    """Bounds of one output, and how much of each may be rounding (zeros where that was not asked for)."""

    lower: jax.Array
    upper: jax.Array | None
    lower_rounding: jax.Array
    upper_rounding: jax.Array


class Method:
    """What every bounding method is; see the module's head.

    >>> issubclass(Crown, Method), Crown().guarantee
    (True, 'certified')
    """

    @property
    def guarantee(self) -> str:
        """ "certified", or "estimate" where bounds may be on the wrong side of the true value."""
        return "certified"

    @property
    def result(self) -> type[Interval] | type[Estimate]:
        """What its bounds come back as."""
        return Interval if self.guarantee == "certified" else Estimate

    @property
    def charges_constants(self) -> bool:
        """Whether it counts, with rounding, the errors of constants that the function computes (`values.Inexact`)."""
        return False

    @property
    def charges_execution(self) -> bool:
        """Whether it bounds the network as it is executed, too (`relaxations.execution`)."""
        return False

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        raise errors.no_such_answer(type(self).__name__, "pre-activation bounds")

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region, in order."""
        raise errors.no_such_answer(type(self).__name__, "bounds")

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """Per output: lower slopes (by leaf) and intercept, upper slopes and intercept."""
        raise errors.no_such_answer(type(self).__name__, "linear bounds")


def targets(graph: Graph) -> list[int]:
    """The nodes whose values nonlinear nodes read, in order."""
    return sorted({source for i in graph.structure.nonlinear for source in graph.nodes[i].inputs})


def output_nodes(graph: Graph) -> list[int]:
    """The nodes that are outputs, in order."""
    return [number for kind, number in graph.structure.outputs if kind == "node"]


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

    def _run(self, graph: Graph, leaves: Sequence, request: Request) -> Run:
        run = Run(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        read = set(targets(graph))
        for number in sorted(read & set(range(graph.structure.num_inputs))):
            _tighten_prefix(run, number)
        for block in graph.blocks:
            run.propagate(block)
            for number in sorted(read & set(range(block.start, block.stop))):
                _tighten_prefix(run, number)
        return run

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every node."""
        return self._run(graph, leaves, request).ends

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        run = self._run(graph, leaves, request)
        for number in graph.structure.nonlinear:
            run.planes[number] = Planes.constant(*run.ends[number])
        results = []
        for number in output_nodes(graph):
            node = graph.nodes[number]
            known = node.op.kind != "affine" or run.exact(number) or (
                not node.affine_in_region and graph.structure.exact_on_boxes[number] and not request.rounding
            )  # fmt: skip
            results.append(_of_ends(run.known(number), request) if known else _pass(run, number, request))
        return results


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward(Method):
    """Forward linear bounds: linear functions of the input below and above every value.

    `lower <= fn(x) <= upper`. Each value also keeps its interval where that is tighter.

    Reference: Xu et al., "Automatic perturbation analysis for scalable certified robustness and beyond", 2020, app. A.
    """

    lower_slope: str = field(default="adaptive", metadata={"static": True})

    @property
    def charges_constants(self) -> bool:
        """It does."""
        return True

    def _run(self, graph: Graph, leaves: Sequence, request: Request) -> Run:
        run = Run(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        pairs = run.call(_forward_start, None, ((), ()), run.regions)
        known = {k: (pair, run.ends[k]) for k, pair in enumerate(pairs)}
        for block in graph.blocks:
            static = block.template, _checked(self.lower_slope), request.rounding
            outer = [known[k] for k in block.outer]
            found = run.call(_forward_block, static, run.constants(block), outer, run.regions)
            known.update(zip(range(block.start, block.stop), found, strict=True))
        run.ends = {number: ends for number, (_, ends) in known.items()}
        run.pairs = {number: known[number][0] for number in graph.structure.nonlinear}
        return run

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        run = self._run(graph, leaves, request)
        return {number: run.ends[number] for number in targets(graph)}

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        run = self._run(graph, leaves, request)
        return [_pass(run, k, request, run.known(k)) for k in output_nodes(graph)]

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """The pair of linear functions of each output."""
        run = self._run(graph, leaves, request)
        return [_linear(run, number) for number in output_nodes(graph)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Crown(Method):
    """CROWN: backward linear bounds with relaxations chosen per nonlinearity.

    `lower <= fn(x) <= upper`, from linear functions of the input below and above every output.

    Args:
        pre_activation: the method that bounds the inputs of nonlinearities; None for CROWN itself, at every one.
        lower_slope: "adaptive" (the slope with the smallest gap; for ReLU 1 if u > -l else 0), "parallel" (the upper
            line's slope), "zero" or "one" (as near as the graph's convex hull allows). Static.
        slopes: `{node name: (lower, upper)}` to use given slopes instead; every slope is sound. With the node's shape,
            they hold for every bound; with a first axis more, as `tune` returns them (a list for several outputs),
            they belong to groups of the result's rows, and inputs of nonlinearities are bounded with CROWN's own.
        intersect: whether a value also keeps what interval arithmetic says of it. Static. (Off, with one line per side
            everywhere, ReLU bounds equal the linear program of the same triangles' lines.)
        budget: under `jit`, which cannot choose rows by their values, the part of each layer's entries (0 to 1) that is
            bounded where no example has more of them open; where one has, all are, so the numbers are the same. Both
            programs are compiled; under an outer `vmap` both run. None to bound all entries. Static.

    Reference: Zhang et al., "Efficient neural network robustness certification with general activation functions",
    2018, theorem 3.2 and corollary 3.3.

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> bounds = jb.bound(lambda x: jnp.maximum(x, 0).sum(), jb.Crown())(jb.Box(-jnp.ones(2), jnp.ones(2)))
    >>> float(bounds.upper)
    2.0
    """

    pre_activation: Method | None = None
    lower_slope: str = field(default="adaptive", metadata={"static": True})
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
        _checked(self.lower_slope)
        if self.pre_activation is not None:
            check_certified("pre_activation", self.pre_activation)
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise errors.argument("budget", f"is {self.budget!r}", "pass a part of each layer, from 0 to 1, or None")
        run = Run(graph, leaves, outward=request.rounding, max_rows=request.max_rows, budget=self.budget)
        given = None
        if self.pre_activation is not None:
            given = self.pre_activation.pre_activations(graph, leaves, request)
        known = given or {}
        if whole := len(known) == len(graph.nodes):  # then there is nothing to propagate
            run.ends.update(known)

        def relax_block(run: Run, block: Block) -> None:
            node = graph.nodes[block.start]
            if node.op.kind != "affine":
                for source in sorted(set(node.inputs) - run.tightened):
                    if given is not None:
                        run.ends[source] = given[source]
                    elif not run.exact(source):
                        run.tighten(source, skip_exact=skip_exact and self.intersect, intersect=self.intersect)
                    run.tightened.add(source)
                run.enclose(block, _checked(self.lower_slope), self._given(run, block, 0, grouped=False))
            if not whole:
                run.propagate(block)

        scan = not run.eager and given is None and self.slopes is None
        plan = stretches.plan(graph) if scan else graph.blocks
        run.segments = []
        for segment in plan:
            if isinstance(segment, Block):
                relax_block(run, segment)
                run.segments.append(segment)
            else:
                stretches.relax(run, segment, relax_block)
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
            known = run.known(number) if self.intersect else None
            results.append(_pass(self._for_rows(run, position, request), number, request, known))
        return results

    def _for_rows(self, run: Run, position: int, request: Request) -> Run:
        """The relaxations for one output, where slopes are given by groups of its rows."""
        rows, sides = run.graph.nodes[output_nodes(run.graph)[position]].op.size, 2 if request.sides == "both" else 1
        blocks = [block for block in run.graph.blocks if run.graph.nodes[block.start].op.kind in NONLINEAR]
        given = {block: self._given(run, block, position, grouped=True) for block in blocks}
        if all(slopes is None for slopes in given.values()):
            return run
        run = run.fork({})
        run.max_rows = sides * rows
        for block, slopes in given.items():
            if slopes is not None:  # those of lower bounds are the first half
                groups = slopes[0].shape[run.batch is not None] * sides // 2
                own = jax.tree.map(lambda leaf, n=groups: leaf[:n] if run.batch is None else leaf[:, :n], slopes)
                run.enclose_rows(block, own, request.sides, rows)
        return run

    def _given(self, run: Run, block: Block, position: int, *, grouped: bool) -> tuple | None:
        """The slopes given for a node and an output, if they are (or are not) by groups."""
        if self.slopes is None:
            return None
        node = run.graph.nodes[block.start]
        slopes = (self.slopes if isinstance(self.slopes, dict) else self.slopes[position]).get(node.name)
        ndim = len(node.op.shape) + (run.batch is not None)
        return None if slopes is None or grouped != (jnp.ndim(slopes[0]) > ndim) else slopes

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """The linear functions of each output."""
        run = self.relax(graph, leaves, request)
        numbers = enumerate(output_nodes(graph))
        return [_linear(self._for_rows(run, position, request), number) for position, number in numbers]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FastLin(Crown):
    """Fast-Lin: CROWN with parallel lines, the lower slope equal to the upper one.

    Reference: Weng et al., "Towards fast computation of certified robustness for ReLU networks", 2018, section 3.3.
    """

    lower_slope: str = field(default="parallel", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrownIBP(Crown):
    """CROWN-IBP: one backward pass over pre-activation bounds from interval propagation.

    Reference: Zhang et al., "Towards stable and efficient training of verifiably robust neural networks", 2020,
    section 3.2.
    """

    pre_activation: Method | None = field(default_factory=IBP)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, init=False)
class Best(Method):
    """The elementwise best of several certified methods.

    >>> import jaxbound as jb
    >>> jb.Best(jb.IBP(), jb.Forward())
    Best(methods=(IBP(), Forward(lower_slope='adaptive')))
    """

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method):
        if not methods:
            raise errors.argument(
                "Best", "has no method to choose from", "pass one or more, such as Best(IBP(), Crown())"
            )
        for method in methods:
            check_certified("a method of Best", method)
        object.__setattr__(self, "methods", methods)

    def tree_flatten(self):
        """The methods are the children."""
        return self.methods, None

    @classmethod
    def tree_unflatten(cls, _aux, methods):
        """Rebuild without checks."""
        best = object.__new__(cls)
        object.__setattr__(best, "methods", tuple(methods))
        return best

    @property
    def charges_constants(self) -> bool:
        """It does, if all its methods do."""
        return all(method.charges_constants for method in self.methods)

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """The intersection of what each method says."""
        first, *others = [method.pre_activations(graph, leaves, request) for method in self.methods]
        for other in others:
            first = {number: interval.intersect(first[number], other[number]) for number in first if number in other}
        return first

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """For each entry the best lower and the best upper bound."""
        first, *others = [method.bound(graph, leaves, request) for method in self.methods]
        for other in others:
            first = [better(a, b) for a, b in zip(first, other, strict=True)]
        return first


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _checked(lower_slope: str) -> str:
    if lower_slope not in enclosures.LOWER_SLOPES:
        raise errors.unknown_option("lower_slope", lower_slope, enclosures.LOWER_SLOPES)
    return lower_slope


def check_method(name: str, method: object) -> None:
    """Refuse what is not a method object, and say what to pass.

    Raises:
        ArgumentTypeError: a name, a class or anything else.
    """
    if not isinstance(method, Method):
        hint = f"{method.__name__}()" if isinstance(method, type) else "jaxbound.Crown()"
        raise errors.argument_type(name, f"is {method!r}", f"pass a method object such as {hint}")


def check_certified(name: str, method: object) -> None:
    """Refuse what is not a method object, and a method that only estimates.

    Raises:
        ArgumentTypeError: a name, a class or anything else.
        ArgumentError: a method whose guarantee is "estimate".
    """
    check_method(name, method)
    if getattr(method, "guarantee", "certified") != "certified":
        raise errors.estimate_refused(type(method).__name__)


def _tighten_prefix(run: Run, number: int) -> None:
    if run.graph.nodes[number].affine_in_region and not run.exact(number):
        run.tighten(number, skip_exact=False)


def _of_ends(ends: Ends, request: Request) -> Bounded:
    zeros = jnp.zeros_like(ends[0])
    return Bounded(ends[0], ends[1] if request.sides == "both" else None, zeros, zeros)


def _pass(run: Run, number: int, request: Request, known: Ends | None = None) -> Bounded:
    """A backward pass from one node, and the better of this and what is known."""
    found, rounding = run.bound_node(number, sides=request.sides)
    return run.call(_finish, request, ((), ()), found, rounding, known)


def _finish(request, _constants, found, rounding, known) -> Bounded:
    """Ends that rounding put in the wrong order are swapped."""
    (low, high), (low_error, high_error) = found, rounding
    result = Bounded(low, None, low_error, high_error)
    if request.sides == "both":
        swapped = low > high
        result = Bounded(
            jnp.where(swapped, high, low), jnp.where(swapped, low, high),
            jnp.where(swapped, high_error, low_error), jnp.where(swapped, low_error, high_error),
        )  # fmt: skip
    return result if known is None else better(result, _of_ends(known, request))


def better(first: Bounded, second: Bounded) -> Bounded:
    """The better bound entry by entry, judged with its rounding."""
    low = first.lower - first.lower_rounding >= second.lower - second.lower_rounding
    lower = jnp.where(low, first.lower, second.lower), jnp.where(low, first.lower_rounding, second.lower_rounding)
    if first.upper is None or second.upper is None:
        return Bounded(lower[0], None, lower[1], lower[1])
    one, two = first.upper, second.upper
    high = one + first.upper_rounding <= two + second.upper_rounding
    upper = jnp.where(high, one, two), jnp.where(high, first.upper_rounding, second.upper_rounding)
    return Bounded(lower[0], upper[0], lower[1], upper[1])


def _linear(run: Run, number: int) -> tuple:
    """The linear functions of one node: a pass that stops at the region."""
    op = run.graph.nodes[number].op
    static = op.shape, tuple(regions.leaf_struct(leaf).shape for leaf in run.regions)
    rows, carry = run.pull_to_inputs(*run.start(number))
    return run.call(_split_sides, static, ((), ()), rows, carry.intercept)


def _split_sides(static, _constants, rows, intercept):
    shape, leaf_shapes = static
    half = intercept.shape[0] // 2
    low, high = [], []
    for part, leaf in zip(rows, leaf_shapes, strict=True):
        values = jnp.zeros((2 * half, *leaf), intercept.dtype) if part is None else coefficients.dense(part)
        low.append(values[:half].reshape(*shape, *leaf))
        high.append(-values[half:].reshape(*shape, *leaf))
    return tuple(low), intercept[:half].reshape(shape), tuple(high), -intercept[half:].reshape(shape)


def _forward_start(_static, _constants, leaves):
    return forward.start(leaves)


def _forward_block(static, constants, outer, leaves):
    template, lower_slope, outward = static
    return forward.propagate(template, constants, outer, leaves, lower_slope, outward=outward)
