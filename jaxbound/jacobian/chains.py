"""Chains: functions whose graph is affine, scalar nonlinearity, affine, ..., affine.

    z_1 = W_1 x + b_1,    z_{l+1} = W_{l+1} sigma_l(z_l) + b_{l+1},    f(x) = z_H

so that the Jacobian is `W_H S_{H-1} W_{H-1} ... S_1 W_1` with diagonal matrices `S_l` of derivatives. Each W is
whatever affine nodes lie between two scalar nodes of the graph: Dense layers, convolutions, average pooling, a
specification. It is kept both ways: as a linear map of flat vectors, cheap to apply, and as a dense matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound._compat import eager_jit
from jaxbound.driver import Run
from jaxbound.graph import Block, Constants, Graph, Node, Op, Template
from jaxbound.graph.values import Inexact, plain
from jaxbound.jacobian import slopes
from jaxbound.relaxations import affine

MOST = 1 << 33
"""The most bytes that the matrix of one layer may take."""
_WAY_OUT = "use method=Crown(), which bounds jax.jacrev of any network"


@dataclass(frozen=True)
class Segment:
    """The linear part of the affine nodes between two values, from one flat vector to another; static.

    `source` and `target` are references as in `Template`; `transposed` turns the map around.
    """

    template: Template | None
    """None where nothing lies between."""
    source: tuple[str, int]
    target: tuple[str, int]
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    dtype: str
    transposed: bool = False

    @property
    def flipped(self) -> Segment:
        """The transposed map."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Segment(**{**values, "transposed": not self.transposed})

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """How many numbers go in and come out."""
        sizes = tuple(
            functools.reduce(lambda n, m: n * m, shape, 1) for shape in (self.source_shape, self.target_shape)
        )
        return (sizes[1], sizes[0]) if self.transposed else (sizes[0], sizes[1])

    @functools.cached_property
    def terms(self) -> int:
        """A bound on how many rounded operations in a row make one number of the result, either way."""
        return sum(max(_counts(op)) + 3 for op, _, _ in self._nodes)

    def is_exact(self, constants: Sequence[jax.Array]) -> bool:
        """Whether the matrix is made without rounding."""
        return not self._nodes or (self.kernel(constants) is not None and self.is_stored(constants))

    def is_stored(self, constants: Sequence[jax.Array]) -> bool:
        """Whether no constant that the matrix is made of was computed."""
        return not any(isinstance(constants[k], Inexact) for _, _, used in self._nodes for k in used)

    @property
    def _nodes(self) -> Sequence[tuple[Op, tuple, tuple[int, ...]]]:
        if self.template is None or self.target == self.source:
            return ()
        first = 0 if self.source[0] == "outer" else 1
        return self.template.nodes[first : self.target[1] + 1]

    def linear(self, constants: Sequence[jax.Array], vector: jax.Array) -> jax.Array:
        """The map applied to a flat vector."""
        return self._apply(affine.linear, constants, vector)

    def absolute(self, constants: Sequence[jax.Array], vector: jax.Array) -> jax.Array:
        """The absolute values of each node's map, applied one after the other to a vector that is not negative."""
        return self._apply(affine.absolute, constants, vector)

    def matrix(self, constants: Sequence[jax.Array]) -> jax.Array:
        """Row k is the map's value at the k-th unit vector: the transposed matrix."""
        kernel = self.kernel(constants)
        return self._at_units(affine.linear, constants) if kernel is None else kernel

    def widened(self, constants: Sequence[jax.Array], vector: jax.Array) -> jax.Array:
        """The same with factors enlarged (see `affine`)."""
        return self._apply(affine.widened, constants, vector)

    def magnitude(self, constants: Sequence[jax.Array]) -> jax.Array:
        """The same for `widened`: what the rounding of a matrix, underflow included, is charged on."""
        if self._nodes and self.is_exact(constants):
            return affine.enlarged(self.matrix(constants))
        return self._at_units(affine.widened, constants)

    def _at_units(self, rule: Callable, constants: Sequence[jax.Array]) -> jax.Array:
        incoming, outgoing = self.sizes
        if incoming <= outgoing:
            units = jnp.eye(incoming, dtype=self.dtype)
            return jax.vmap(lambda unit: self._apply(rule, constants, unit))(units)
        units = jnp.eye(outgoing, dtype=self.dtype)
        return jax.vmap(lambda unit: self.flipped._apply(rule, constants, unit))(units).T

    def _apply(self, rule: Callable, constants: Sequence[jax.Array], vector: jax.Array) -> jax.Array:
        def forward(flat: jax.Array):
            values = {self.source: flat.reshape(self.source_shape)}
            for position, (op, inputs, used) in enumerate(self._nodes, int(self.source[0] == "node")):
                read = [values[reference] for reference in inputs]
                values["node", position] = _moved(rule, op, read, [constants[k] for k in used])
            return values[self.target].reshape(-1)

        if not self.transposed:
            return forward(vector)
        aval = jax.ShapeDtypeStruct((self.sizes[1],), self.dtype)
        return jax.linear_transpose(forward, aval)(vector.astype(self.dtype))[0]

    def kernel(self, constants: Sequence[jax.Array]) -> jax.Array | None:
        """The matrix of a segment that is one product with a matrix: without multiplying by the identity."""
        mixing = [node for node in self._nodes if not node[0].facts.order_preserving]
        if len(mixing) != 1 or any(len(inputs) > 1 for _, inputs, _ in self._nodes):
            return None
        ((op, _, used),) = mixing
        if op.name != "dot_general" or [role for role, *_ in op.operands] not in _PRODUCTS:
            return None
        side = 1 if op.operands[0][0] == "input" else 0
        contracting, batching = dict(op.params)["dimension_numbers"]
        array = plain(constants[used[0]])
        if self.transposed or batching[0] or array.ndim != 2 or len(contracting[side]) != 1:
            return None
        axis = contracting[side][0]
        return (array if axis == 0 else array.T) if array.shape[axis] == self.sizes[0] else None


_PRODUCTS = (["input", "constant"], ["constant", "input"])


def _moved(rule: Callable, op: Op, read: Sequence[jax.Array], constants: Sequence[jax.Array]) -> jax.Array:
    if op.facts.order_preserving and len(read) == 1:
        return read[0].reshape(op.shape)
    return rule(op, read, constants)


def _counts(op: Op) -> tuple[int, int]:
    params = dict(op.params)
    return op.facts.terms(op.input_shapes, op.shape, params), op.facts.adjoint_terms(op.input_shapes, op.shape, params)


class Layer(NamedTuple):
    """One W of a chain: its map, what the map reads, and its transposed matrix."""

    segment: Segment
    constants: Constants
    matrix: Constants
    """An array of shape (inputs, outputs)."""
    magnitude: Constants
    """Above `|W|` as `Segment.absolute` is, likewise; left out where it is `|matrix|`, and both where not asked for."""

    @property
    def flipped(self) -> Layer:
        """The layer of the transposed chain."""
        return Layer(self.segment.flipped, self.constants, *map(_swapped, (self.matrix, self.magnitude)))


def _swapped(constants: Constants) -> Constants:
    return tuple(jnp.swapaxes(array, -1, -2) for array in constants[0]), constants[1]


class Scalar(NamedTuple):
    """One sigma of a chain."""

    op: Op
    used: tuple[int, ...]
    """Which of its block's constants it reads."""
    constants: Constants
    number: int
    """The node that it reads."""


class Chain(NamedTuple):
    """The layers W_1 ... W_H and the scalars between them."""

    layers: tuple[Layer, ...]
    scalars: tuple[Scalar, ...]

    @property
    def flipped(self) -> Chain:
        """The chain of the transposed Jacobian."""
        return Chain(tuple(layer.flipped for layer in self.layers[::-1]), self.scalars[::-1])


def chain_of(run: Run, method: str, *, dense: bool = True) -> Chain | None:
    """Read a chain off a graph; None where no region reaches the output.

    Args:
        run: the graph over its regions.
        method: its name, for messages.
        dense: whether to make the layers' matrices.

    Raises:
        UnsupportedError: the graph is no chain, or a scalar function may jump.
    """
    graph = run.graph
    if len(graph.structure.outputs) != 1 or graph.structure.num_inputs != 1:
        raise errors.UnsupportedError(
            f"{method} bounds the Jacobian of one output with respect to one input; bound others one at a time"
        )
    ((kind, output),) = graph.structure.outputs
    if kind != "node":
        return None
    pieces = _pieces(graph, output, method)
    layers = tuple(_layer(run, block, segment, dense) for block, segment in pieces)
    scalars = []
    for block, _ in pieces[1:]:
        assert block is not None
        node = graph.nodes[block.start]
        slopes.check(node, method)
        if any(isinstance(graph.constants[k], Inexact) for k in node.constants):
            raise errors.inexact_constants(method)
        scalars.append(Scalar(node.op, block.template.nodes[0][2], run.constants(block), node.inputs[0]))
    return Chain(layers, tuple(scalars))


def _pieces(graph: Graph, output: int, method: str) -> list[tuple[Block | None, Segment]]:
    """Per layer the block that it is made of and its map."""
    for node in graph.nodes:
        _check_kind(graph, node, method)
    blocks = list(graph.blocks)
    first: Block | None = None
    if blocks and graph.nodes[blocks[0].start].op.kind == "affine":
        first = blocks.pop(0)
    starts = [(first, 0 if first is None else first.start), *((block, block.start) for block in blocks)]
    targets = [*(graph.nodes[block.start].inputs[0] for block in blocks), output]
    pieces = []
    for position, ((block, start), target) in enumerate(zip(starts, targets, strict=True)):
        inside = position > 0
        own = () if block is None else block.template.nodes[int(inside) :]
        read = {reference for _, inputs, _ in own for reference in inputs}
        source = ("node", 0) if inside else ("outer", 0)
        beyond = any(where == "outer" for where, _ in read) if inside else len(block.outer if block else ()) > 1
        if beyond or (target < start and (inside or target != 0)):
            node = graph.nodes[target if target >= start else start]
            reason = "it is read across another nonlinearity (a residual connection or a branch)"
            raise errors.unsupported(
                node.op.name, [node.op.shape], node.source, reason, method=method, way_out=_WAY_OUT
            )
        begin = graph.nodes[start if inside else 0].op
        reference = source if block is None or target < start else ("node", target - start)
        template = None if block is None else block.template
        pieces.append(
            (block, Segment(template, source, reference, begin.shape, graph.nodes[target].op.shape, str(begin.dtype)))
        )
    return pieces


def _check_kind(graph: Graph, node: Node, method: str) -> None:
    reason = None
    if node.op.kind not in ("input", "affine", "scalar"):
        reason = f"a node of kind {node.op.kind} is not a function of one value"
    elif node.op.name == "stop_gradient":
        reason = "it hides a part of the derivative"
    elif node.op.dtype != graph.nodes[0].op.dtype:
        reason = "its precision differs from the input's"
    if reason:
        raise errors.unsupported(node.op.name, [node.op.shape], node.source, reason, method=method, way_out=_WAY_OUT)


def _layer(run: Run, block: Block | None, segment: Segment, dense: bool) -> Layer:
    constants = ((), () if run.batch is not None else None) if block is None else run.constants(block)
    nothing = ((), None if run.batch is None else ())
    if not dense:
        return Layer(segment, constants, nothing, nothing)
    arrays, axes = constants
    shared = all(axis is None for axis in axes or ())
    _check_size(run, segment, shared)

    def given(array: jax.Array) -> Constants:
        return (array,), None if run.batch is None else (None if shared else 0,)

    kernel = segment.kernel(arrays) if shared and segment.is_stored(arrays) else None
    if kernel is not None:
        return Layer(segment, constants, given(kernel), nothing)

    def made(step: Callable) -> Constants:
        return given(_once(step, segment, tuple(arrays)) if shared else run.call(step, segment, constants))

    return Layer(segment, constants, made(_matrix), made(_magnitude) if run.outward else nothing)


def _check_size(run: Run, segment: Segment, shared: bool) -> None:
    size = math.prod(segment.sizes) * jnp.dtype(segment.dtype).itemsize * (1 if shared else run.batch or 1)
    if size > MOST:
        raise errors.UnsupportedError(
            f"the matrix of one layer would take {size / 2**30:.3g} GiB, which is too much for RecurJac and FastLip: "
            f"{_WAY_OUT}"
        )


def _matrix(segment: Segment, constants: Sequence[jax.Array]) -> jax.Array:
    return segment.matrix(constants)


def _magnitude(segment: Segment, constants: Sequence[jax.Array]) -> jax.Array:
    return segment.magnitude(constants)


_once = eager_jit(lambda step, segment, arrays: step(segment, arrays), static_argnums=(0, 1))
