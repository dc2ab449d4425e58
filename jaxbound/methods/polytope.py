r"""The convex adversarial polytope (Wong and Kolter 2018), and its random projections (Wong et al. 2018).

Exact, it is CROWN with parallel lines: every nonlinearity y = s z + m + t with |t| <= r, around its two lines of slope
s. A value of the network is then linear in the deviations of everything that can deviate, the region's and each t:

    v  =  center  +  sum over sources i of <A_i, t_i>,        |v - center|  <=  sum_i ||diag(r_i) A_i||_q,

with q = 1 for boxes and for nonlinearities, and the dual exponent for an l_p ball. Backward, that costs one row for
every neuron of a layer, pulled back through all layers before it. The projections need no A_i: with k random vectors R
on a source, the images of diag(r_i) R, pushed *forward* by the same linear maps, are products of every row of A_i with
R at once, and their size estimates its norm:

    q = 1:  median over the k of |A_i diag(r_i) R|,  R standard Cauchy (1-stable; the median of |Cauchy| is 1),
    q = 2:  root of the mean over the k of (A_i diag(r_i) R)^2,  R standard normal.

A source of no more than k entries is pushed as it is, one row per entry, which costs no more and is exact. So bounding
all pre-activations takes k rows per source in one forward sweep, linear in the width of the layers where exact bounds
are quadratic. The outputs, few, are bounded by one exact backward pass over what that gives. An estimate may be too
narrow, so nothing that follows from it is certified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbound import errors, regions
from jaxbound.driver import Run, sweep
from jaxbound.graph import Block, Graph, Op
from jaxbound.methods.base import Bounded, Ends, Method, Request, targets
from jaxbound.methods.crown import FastLin
from jaxbound.regions import balls
from jaxbound.relaxations import affine, enclosures, interval
from jaxbound.relaxations.planes import Planes, times
from jaxbound.relaxations.slopes import PARALLEL


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvexPolytope(Method):
    """The convex adversarial polytope: Fast-Lin's bounds, or estimates of them by random projections.

    `lower <= fn(x) <= upper` without projections: exactly the bounds of `FastLin()`. With k projections the bounds of
    pre-activations are estimates, within a relative error of some pi / (2 sqrt(k)) per source, and what rests on them
    comes back as an `Estimate`: good for a loss; refused by `certify`, `certified_radius`, `Best` and as
    `pre_activation`.

    Args:
        projections: None for exact bounds, or k >= 1 random projections: Cauchy where deviations add up (boxes,
            nonlinearities), normal for l_2 balls. Static.
        key: a PRNG key, typed or raw; needed with projections. Every example meets the same projections.

    Raises:
        ArgumentError: projections without a key, or fewer than one.
        UnsupportedError: projections of an l_p ball for other p than 2 and infinity with more than k entries, or of
            several balls in one leaf; linear bounds from projections.

    Reference: Wong and Kolter, "Provable defenses against adversarial examples via the convex outer adversarial
    polytope", 2018, theorem 1; Wong et al., "Scaling provable adversarial defenses", 2018, section 3.2.

    >>> import jax, jax.numpy as jnp
    >>> ConvexPolytope().guarantee, ConvexPolytope(projections=50, key=jax.random.key(0)).guarantee
    ('certified', 'estimate')
    """

    projections: int | None = field(default=None, metadata={"static": True})
    key: jax.Array | None = None

    @property
    def guarantee(self) -> str:
        """ "certified" without projections, "estimate" with them."""
        return "certified" if self.projections is None else "estimate"

    @property
    def charges_constants(self) -> bool:
        """It does without projections."""
        return self.projections is None

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds, or estimates, of every input of a nonlinear node."""
        if self.projections is None:
            return FastLin().pre_activations(graph, leaves, request)
        run = self._relax(graph, leaves, request)
        return {number: run.ends[number] for number in targets(graph)}

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region, over bounds or estimates of the pre-activations."""
        if self.projections is None:
            return FastLin().bound(graph, leaves, request)
        return FastLin().outputs(self._relax(graph, leaves, request), request)

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """The linear functions of each output; none from projections, which would not bound it."""
        if self.projections is None:
            return FastLin().planes(graph, leaves, request)
        raise errors.no_such_answer("ConvexPolytope with projections", "certified linear bounds")

    def _relax(self, graph: Graph, leaves: Sequence, request: Request) -> Run:
        """Estimate the inputs of every nonlinear node, and relax it, in one forward sweep."""
        projections, key = self._checked()
        run = Run.over(graph, leaves, outward=request.rounding, max_rows=request.max_rows)
        values = dict(enumerate(run.call(_start, projections, ((key,), (None,)), run.regions)))

        def estimate(run: Run, source: int) -> Run:
            if run.exact(source):
                return run
            found = {source: run.call(_estimate, None, ((), ()), values[source], run.ends[source], run.void)}
            return run.learn(ends=found, base=found if graph.nodes[source].affine_in_region else {})  # as `Run.keep`

        def push(run: Run, block: Block) -> None:
            if block is graph.blocks[-1]:
                return
            planes = run.planes.get(block.start)
            ends = [] if planes is None else [run.ends[k] for k in graph.nodes[block.start].inputs]
            arrays, axes = run.constants(block)
            constants = (*arrays, key), (*(axes or ()), None)
            static = block.template, block.start, projections
            pushed = run.call(_push, static, constants, [values[k] for k in block.outer], planes, ends)
            values.update(zip(range(block.start, block.stop), pushed, strict=True))
            readers = graph.structure.consumers  # what no later block reads is let go
            for k in [k for k in values if all(reader < block.stop for reader in readers[k])]:
                del values[k]

        return sweep(run, estimate, lambda run, block: run.enclose(block, PARALLEL), push)

    def _checked(self) -> tuple[int, jax.Array]:
        if not isinstance(self.projections, int) or self.projections < 1:
            raise errors.argument("projections", f"is {self.projections!r}", "pass None for exact bounds, or 1 or more")
        if self.key is None:
            raise errors.argument("key", "is None", "pass a PRNG key for the projections, such as jax.random.key(0)")
        return self.projections, self.key


# --- what is pushed forward -------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Something that can deviate: a region leaf or a nonlinear node, and how the size of its deviations is told."""

    number: int
    kind: str
    """"entries" (exact, one row per entry), "cauchy" or "normal"."""
    exponent: float
    """The q of the norm."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Value:
    """A value of the network: its center, and rows per source, (rows, *value shape), that tell how far it deviates."""

    center: jax.Array
    rows: dict[Source, jax.Array]


def _source(number: int, size: int, exponent: float, projections: int) -> Source:
    if size <= projections:
        return Source(number, "entries", exponent)
    kinds = {1.0: "cauchy", 2.0: "normal"}
    if exponent not in kinds:
        norm = 1 if exponent == math.inf else exponent / (exponent - 1)
        raise errors.no_such_answer(
            "ConvexPolytope", f"projections of l{norm:g} balls", "use norm 2 or inf, no projections, or another method"
        )
    return Source(number, kinds[exponent], exponent)


def _rows(source: Source, reach: jax.Array, key: jax.Array, projections: int) -> jax.Array:
    """The deviations themselves, or random combinations of them; `reach` is how far each entry deviates."""
    if source.kind == "entries":
        return (jnp.eye(reach.size, dtype=reach.dtype) * reach.reshape(-1)).reshape(-1, *reach.shape)
    draw = jax.random.cauchy if source.kind == "cauchy" else jax.random.normal
    return reach * draw(jax.random.fold_in(key, source.number), (projections, *reach.shape), reach.dtype)


def _start(projections: int, constants: Sequence, leaves: Sequence[regions.Region]) -> list[Value]:
    """Every region leaf deviates from its center; a clip box cuts a box, but enters balls by intervals only."""
    values = []
    for number, region in enumerate(leaves):
        if regions.is_box(region):
            low, high = regions.enclosing_box(region)
            center, reach, exponent = low / 2 + high / 2, high / 2 - low / 2, 1.0
        elif not isinstance(region, regions.LpBall):
            raise errors.no_such_answer("ConvexPolytope", f"deviations of a {type(region).__name__}")
        else:
            if region.batch_ndim:
                raise errors.no_such_answer("ConvexPolytope", "projections of several balls in one leaf")
            exponent = balls.dual_exponent(region.norm)
            center = jnp.asarray(region.center)
            reach = jnp.broadcast_to(region.radius, center.shape)
        source = _source(number, center.size, exponent, projections)
        values.append(Value(center, {source: _rows(source, reach, constants[0], projections)}))
    return values


def _push(
    static: Any, constants: Sequence, outer: Sequence[Value], planes: Planes | None, ends: Sequence[Ends]
) -> list[Value]:
    """The values of a block's nodes; `planes` and `ends` of its inputs belong to the nonlinear node that begins it."""
    template, start, projections = static
    *constants, key = constants
    values: list[Value] = []
    for position, (op, inputs, used) in enumerate(template.nodes):
        read = [outer[k] if where == "outer" else values[k] for where, k in inputs]
        if planes is None or position > 0:
            values.append(_affine_node(op, read, [constants[k] for k in used]))
            continue
        value, reach = _nonlinear_node(op, read, planes, ends)
        source = _source(start, reach.size, 1.0, projections)
        values.append(Value(value.center, {**value.rows, source: _rows(source, reach, key, projections)}))
    return values


def _affine_node(op: Op, inputs: Sequence[Value], constants: Sequence) -> Value:
    center = affine.apply(op, [value.center for value in inputs], constants)
    counts = {source: rows.shape[0] for value in inputs for source, rows in value.rows.items()}
    columns = []
    for value in inputs:
        missing = {source: jnp.zeros((count, *value.center.shape), op.dtype) for source, count in counts.items()}
        columns.append(jnp.concatenate([(missing | value.rows)[source] for source in counts]))
    rows = jax.vmap(lambda *each: affine.linear(op, each, constants))(*columns)
    ends = [sum(list(counts.values())[: k + 1]) for k in range(len(counts))]
    return Value(center, dict(zip(counts, jnp.split(rows, ends[:-1]), strict=True)))


def _nonlinear_node(op: Op, inputs: Sequence[Value], planes: Planes, ends: Sequence[Ends]) -> tuple[Value, jax.Array]:
    """The plane midway between the two, and how far the node may be from it.

    Planes of slopes s - d and s + d part by 2 <d, x> at x: half of the most of that over the inputs' intervals counts.
    """
    axes = tuple(axis - len(op.input_shapes[0]) for axis in enclosures.reduced_axes(op))
    center = planes.lower_intercept / 2 + planes.upper_intercept / 2
    reach = planes.upper_intercept / 2 - planes.lower_intercept / 2
    rows: dict[Source, jax.Array] = {}
    for value, below, above, (low, high) in zip(inputs, planes.lower_slopes, planes.upper_slopes, ends, strict=False):
        slope, half = below / 2 + above / 2, above / 2 - below / 2
        reach = reach + jnp.sum(jnp.maximum(times(half, low), times(half, high)), axis=axes)
        center = center + jnp.sum(times(slope, value.center), axis=axes)
        for source, part in value.rows.items():
            rows[source] = rows.get(source, 0) + jnp.sum(times(slope, part), axis=axes)
    return Value(center, rows), reach


def _estimate(_static: Any, _constants: Sequence, value: Value, known: Ends, void: jax.Array) -> Ends:
    """The interval that the center and the sizes of the deviations give, within what interval arithmetic says."""
    reach = jnp.where(void, jnp.inf, 0)
    for source, rows in value.rows.items():
        if source.kind == "cauchy":
            reach = reach + jnp.median(jnp.abs(rows), axis=0)
        else:
            size = balls.vector_norm(jnp.moveaxis(rows, 0, -1), source.exponent)
            reach = reach + (size if source.kind == "entries" else size / math.sqrt(rows.shape[0]))
    return interval.intersect(known, interval.certain(value.center - reach, value.center + reach))
