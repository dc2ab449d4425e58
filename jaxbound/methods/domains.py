"""Whether what is bounded is defined: what may not be, anywhere in a region, is bounded by nothing.

In real arithmetic the logarithm of a negative number, a quotient by 0 and their kin have no value (in floating point:
NaN, or an infinity that becomes one), and so has all that is made of them, a bounded function of them included. An
interpreter does not see that: `tanh` maps the whole line into [-1, 1]. So it is decided apart from the methods, here:

* `Structure.partial` lists the nodes whose function is not proved to be defined on the whole line, neither by the proof
  of the function (`Curvature.undefined`: what a decided choice throws away does not count) nor by the signs of what it
  reads (`definedness`). Most networks have none, and then nothing is done;
* their inputs are bounded, by interval arithmetic and, where that does not do, by the method that bounds the outputs;
* what may leave its domain marks its entries, and all entries that are computed from them, however small the weights
  are; marked entries of a result become infinite.

`bound`, `planes` and `pre_activations` are what a caller uses in the place of the method's own functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors, regions
from jaxbound._compat import is_tracer
from jaxbound.backend.caches import once_per_array
from jaxbound.graph import Graph, Node
from jaxbound.graph.values import Inexact, plain
from jaxbound.methods import executed
from jaxbound.methods.base import Bounded, Ends, Method, Request, output_nodes
from jaxbound.methods.ibp import IBP
from jaxbound.relaxations import affine, enclosures, execution, interval
from jaxbound.relaxations.enclosures import evaluation, scalar


def bound(method: Method, graph: Graph, leaves: Sequence[regions.Region], request: Request) -> list[Bounded]:
    """`method.bound`, infinite where an output may be undefined.

    Raises:
        UnsupportedError: constants are not exact, and the method does not count that.
    """
    _check_constants(method, graph, request)
    if request.rounding == execution.MODE:
        executed.check(method, graph)
    found, marks = method.bound(graph, leaves, request), undefined(method, graph, leaves, request)
    if request.rounding:
        found = [_beside_subnormal(graph, result) for result in found]
    return [_opened(result, marks.get(number)) for result, number in zip(found, output_nodes(graph), strict=True)]


def _beside_subnormal(graph: Graph, found: Bounded) -> Bounded:
    """Subnormal numbers that are only moved or chosen may count as 0 where they come out.

    Arithmetic on them has its charge, but what just reaches a result does not.
    """
    tiny = jnp.finfo(found.lower.dtype).tiny
    arrays = [plain(constant) for constant in graph.constants]
    doubtful = [_holds_subnormal(array) for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
    if not graph.structure.has_subnormal and all(mark is False for mark in doubtful):
        return found
    marks = [jnp.asarray(mark) for mark in (graph.structure.has_subnormal, *doubtful)]
    lost = 2 * tiny * functools.reduce(jnp.logical_or, marks)
    return found._replace(lower_rounding=found.lower_rounding + lost, upper_rounding=found.upper_rounding + lost)


def _holds_subnormal(array: jax.Array) -> jax.Array | bool:
    """Whether an array holds subnormal numbers; on the host where it is there already."""
    if is_tracer(array) or not array.is_fully_addressable or any(d.platform != "cpu" for d in array.devices()):
        return jnp.any(evaluation.is_subnormal(array))
    return _on_host(array)


@once_per_array
def _on_host(array: jax.Array) -> bool:
    size = np.abs(np.asarray(array))
    return bool(np.any((size > 0) & (size < float(jnp.finfo(array.dtype).tiny))))


def _check_constants(method: Method, graph: Graph, request: Request) -> None:
    inexact = any(isinstance(constant, Inexact) for constant in graph.constants)
    if request.rounding and inexact and not method.charges_constants:
        raise errors.inexact_constants(type(method).__name__)


def planes(method: Method, graph: Graph, leaves: Sequence[regions.Region], request: Request) -> list[tuple]:
    """`method.planes`, with infinite intercepts where an output may be undefined."""
    found, marks = method.planes(graph, leaves, request), undefined(method, graph, leaves, request)
    results = []
    for (low, below, high, above), number in zip(found, output_nodes(graph), strict=True):
        below, above = _whole((below, above), marks.get(number))
        results.append((low, below, high, above))
    return results


def pre_activations(
    method: Method, graph: Graph, leaves: Sequence[regions.Region], request: Request
) -> dict[int, Ends]:
    """`method.pre_activations`, infinite where a value may be undefined."""
    _check_constants(method, graph, request)
    found, marks = method.pre_activations(graph, leaves, request), undefined(method, graph, leaves, request)
    return {number: _whole(ends, marks.get(number)) for number, ends in found.items()}


def undefined(method: Method, graph: Graph, leaves: Sequence[regions.Region], request: Request) -> dict[int, jax.Array]:
    """The nodes with entries that may be undefined, and which: bool, of the node's shape."""
    partial = graph.structure.partial
    if not partial:
        return {}
    inputs = sorted({source for number in partial for source in graph.nodes[number].inputs})
    ends = _bounds(IBP(), graph, leaves, request, inputs)
    leaving = {number: _leaves_domain(graph, number, ends) for number in partial}
    decided = not any(map(is_tracer, leaving.values()))
    if not isinstance(method, IBP) and not (decided and not any(map(np.any, leaving.values()))):
        better = _bounds(method, graph, leaves, request, inputs)
        ends = {number: interval.intersect(ends[number], better[number]) for number in inputs}
        leaving = {number: _leaves_domain(graph, number, ends) for number in partial}
    if not any(map(is_tracer, leaving.values())):
        leaving = {number: mask for number, mask in leaving.items() if np.any(mask)}
    marks: dict[int, jax.Array] = {}
    for number, node in enumerate(graph.nodes):
        read = [marks.get(source) for source in node.inputs]
        spread = None if all(mask is None for mask in read) else _spread(graph, node, read)
        found = [mask for mask in (leaving.get(number), spread) if mask is not None]
        if found:
            marks[number] = functools.reduce(jnp.logical_or, found)
    return marks


def _bounds(
    method: Method, graph: Graph, leaves: Sequence[regions.Region], request: Request, numbers: Sequence[int]
) -> dict[int, Ends]:
    """Bounds of some nodes; with rounding, widened by it."""
    inner = [number for number in numbers if number >= graph.structure.num_inputs]
    boxes = {k: regions.enclosing_box(leaf) for k, leaf in enumerate(leaves)} if graph.axes is None else {
        k: jax.vmap(regions.enclosing_box)(leaf) for k, leaf in enumerate(leaves)
    }  # fmt: skip
    ends: dict[int, Ends] = {number: boxes[number] for number in numbers if number in boxes}
    if inner:
        probe = dataclasses.replace(graph, structure=graph.structure.ending_in(tuple(inner)))
        for number, found in zip(inner, method.bound(probe, leaves, request._replace(sides="both")), strict=True):
            assert found.upper is not None
            ends[number] = found.lower - found.lower_rounding, found.upper + found.upper_rounding
    return ends


def _leaves_domain(graph: Graph, number: int, ends: dict[int, Ends]) -> jax.Array:
    """Where a partial node may be undefined at what it reads.

    A scalar function outside of its domain; a choice where it may fall on NaN; a sum of exponentials of which all may
    be 0; a quotient by a constant that is 0; anything else that infinite numbers may make undefined where what it reads
    is not known to be finite.
    """
    node = graph.nodes[number]
    op, read = node.op, [ends[source] for source in node.inputs]
    if op.kind == "scalar":
        return scalar.leaves_domain(op, *read)
    if op.kind == "logsumexp":
        axes = tuple(axis - len(op.input_shapes[0]) for axis in enclosures.reduced_axes(op))
        ((low, high),) = read
        return ~jnp.any(low > -jnp.inf, axes) | jnp.any(~(high < jnp.inf), axes)
    numbers = [operand[1] if operand[0] == "literal" else 0.0 for operand in op.operands]
    by_zero = _divides_by_zero(graph, node, read) if op.kind == "affine" and op.name == "div" else False
    if op.kind == "select":
        least, most = read[0] if op.operands[0][0] == "input" else (0, 1)
        return (np.isnan(numbers[1]) & ~(least >= 1)) | (np.isnan(numbers[2]) & ~(most <= 0))
    marks = [~(jnp.isfinite(low) & jnp.isfinite(high)) for low, high in read]
    if not np.all(np.isfinite(numbers)):
        marks = [jnp.ones_like(mask) for mask in marks]
    return _spread(graph, node, marks) | by_zero


def _divides_by_zero(graph: Graph, node: Node, read: Sequence[Ends]) -> jax.Array:
    """Where the divisor of a quotient by a constant is 0, or may be."""
    (low, _), *_ = read
    kind, number, *_ = node.op.operands[1]
    if kind == "literal":
        return jnp.full(low.shape, number == 0)
    slot = node.constants[number]
    divisor, batched = graph.constants[slot], graph.axes is not None and graph.axes[slot] == 0
    zero = jnp.abs(divisor.value) <= divisor.error if isinstance(divisor, Inexact) else divisor == 0
    if batched:
        zero = zero.reshape(zero.shape[0], *(1,) * (low.ndim - zero.ndim), *zero.shape[1:])
    return jnp.broadcast_to(zero, low.shape)


def _spread(graph: Graph, node: Node, marks: Sequence[jax.Array | None]) -> jax.Array:
    """The entries of a node that are made of marked ones."""
    op, given = node.op, [mask for mask in marks if mask is not None]

    def single(constants: Sequence, given: Sequence[jax.Array]):
        known = iter(given)
        full = [
            jnp.zeros(shape, bool) if mask is None else next(known)
            for mask, shape in zip(marks, (graph.nodes[k].op.shape for k in node.inputs), strict=True)
        ]
        if op.kind == "affine":
            return affine.reads(op, full, constants)
        if enclosures.is_elementwise(op):
            return jnp.any(jnp.stack([jnp.broadcast_to(mask, op.shape) for mask in full]), axis=0)
        axes = enclosures.reduced_axes(op)
        return jnp.any(full[0], axis=axes) if axes else jnp.broadcast_to(jnp.any(jnp.stack(full)), op.shape)

    constants = [graph.constants[k] for k in node.constants]
    if graph.axes is None:
        return single(constants, given)
    axes = [graph.axes[k] for k in node.constants]
    return jax.vmap(single, in_axes=(axes, 0))(constants, given)


def _opened(found: Bounded, mark: jax.Array | None) -> Bounded:
    if mark is None:
        return found
    lower = jnp.where(mark, -jnp.inf, found.lower)
    upper = None if found.upper is None else jnp.where(mark, jnp.inf, found.upper)
    return found._replace(lower=lower, upper=upper)


def _whole(ends: Ends, mark: jax.Array | None) -> Ends:
    return ends if mark is None else (jnp.where(mark, -jnp.inf, ends[0]), jnp.where(mark, jnp.inf, ends[1]))
