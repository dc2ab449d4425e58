"""The flat graph: what every interpreter walks.

A traced function becomes a list of nodes, each with one value that depends on a region. The first nodes are the region
leaves themselves (kind `input`); the others are affine or nonlinear in earlier values:

    kind         value                                             inputs
    input        a region leaf                                     -
    affine       a primitive, affine in its inputs                 any number
    scalar       sigma(z), a fused chain of elementwise operations 1
    product      x * y, entry by entry                             2
    maximum      the maximum over some axes                        1
    logsumexp    log(sum(exp(x))) over some axes                   1
    sort         the entries along an axis, in order               1
    staircase    x rounded to whole numbers                        1
    select       one of two values, chosen by an indicator         1 to 3
    meet         several expressions of one value                  any number

Everything that no region reaches is a constant: an array that is evaluated once per call. `Structure` is the static
part, shared by all calls with the same shapes; `Graph` adds the constants and is a pytree.

For the linear interpreters the nodes are cut into **blocks**: each begins with a nonlinear node (the first with the
inputs) and runs to the next one. A block's `template` says what it computes without saying where in the network it
stands, so equal layers share one compiled program and, under an outer trace, one loop body.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive
from jaxbound.backend.caches import kept
from jaxbound.graph import primitives
from jaxbound.graph.values import ConstantProgram, plain

NONLINEAR = frozenset({"scalar", *primitives.NONLINEAR.values()})


@dataclass(frozen=True)
class Program:
    """A function of one scalar: a straight line of elementwise primitives on one value `z`.

    `instructions[i] = (primitive name, parameters, operands)` with operands `("z",)`, `("var", i)`, `("lit", number)`
    or `("const", k)`, the k-th array constant. The last instruction is the result. Applied entry by entry.
    """

    instructions: tuple
    primitives: tuple[Primitive, ...] = field(compare=False)
    dtypes: tuple = ()

    def __call__(self, z: jax.Array, *constants: Any):
        """The value at `z`, entry by entry; constants broadcast to z's shape."""
        results = []

        def read(operand: tuple):
            if operand[0] == "z":
                return z
            if operand[0] == "var":
                return results[operand[1]]
            value = operand[1] if operand[0] == "lit" else plain(constants[operand[1]])
            return jnp.broadcast_to(value, jnp.shape(z))

        for (_, params, operands), primitive in zip(self.instructions, self.primitives, strict=True):
            results.append(primitive.bind(*map(read, operands), **dict(params)))
        return results[-1]


@dataclass(frozen=True)
class Op:
    """What a node computes from its inputs and constants; static, and equal for equal layers."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    input_shapes: tuple[tuple[int, ...], ...] = ()
    """Per operand of the primitive, constants among them."""
    params: tuple = ()
    operands: tuple = ()
    """Per operand of the primitive: ("input", k), ("constant", k) or ("literal", value)."""
    primitive: Any = field(default=None, compare=False)
    """The JAX primitive of an affine node."""
    program: Program = Program((), ())
    """The function of a scalar node."""
    nonnegative: bool = False
    """Whether the signs of what it is made of prove, in real arithmetic, that no entry is negative."""
    reach: float = math.inf
    """What proves, in real arithmetic, that no entry is larger in size than this."""
    partial: bool = False
    """Whether it may be undefined at what it reads, as far as signs and infinite literals tell."""

    @cached_property
    def facts(self) -> primitives.Affine:
        """What the primitive table knows of an affine node."""
        return primitives.AFFINE[self.name]

    @cached_property
    def keeps_order(self) -> bool:
        """Whether entry k of the flattened value is entry k of each flattened input, plus a constant."""
        unrepeated = self.name == "broadcast_in_dim" and self.size == int(np.prod(self.input_shapes[0]))
        return self.facts.order_preserving or unrepeated

    @cached_property
    def read_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the inputs, without those of constants."""
        if not self.operands:
            return self.input_shapes
        pairs = zip(self.input_shapes, self.operands, strict=True)
        return tuple(shape for shape, operand in pairs if operand[0] == "input")

    @cached_property
    def size(self) -> int:
        """How many entries the value has."""
        return int(np.prod(self.shape))

    @cached_property
    def mixes(self) -> bool:
        """Whether an entry of an affine node's value may depend on several entries of its inputs."""
        roles = [operand[0] for operand in self.operands]
        return self.facts.terms(self.input_shapes, self.shape, dict(self.params)) > 1 or roles.count("input") > 1

    @cached_property
    def repeats(self) -> bool:
        """Whether several entries of an affine node's value may depend on one entry of its inputs."""
        return self.mixes or self.facts.adjoint_terms(self.input_shapes, self.shape, dict(self.params)) > 1


@dataclass(frozen=True)
class Node:
    """One value that depends on a region."""

    op: Op
    inputs: tuple[int, ...]
    """Numbers of earlier nodes."""
    constants: tuple[int, ...]
    """Numbers of the graph's constants."""
    name: str
    """Zero-padded order, module path and kind: `003/Dense_0/relu`."""
    leaves: frozenset[int]
    """The region leaves that it depends on."""
    affine_in_region: bool
    """No nonlinear node lies between the region and this value."""
    source: str
    """Where the user's function computes it, as far as JAX knows."""


@dataclass(frozen=True)
class Template:
    """What a block computes, without its place in the network.

    `nodes[i] = (op, inputs, constants)`: inputs are `("node", j)` within the block or `("outer", k)`, the block's k-th
    external value; constants number the block's own constants.
    """

    nodes: tuple[tuple[Op, tuple, tuple[int, ...]], ...]
    outer_shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.outer_shapes))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Block:
    """A stretch `start <= number < stop` of nodes; see the module's head."""

    template: Template
    start: int
    stop: int
    outer: tuple[int, ...]
    """The earlier nodes that the block reads, in the order of the template."""
    constants: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """The static part of a graph; compared by identity, made once per function and shapes."""

    nodes: tuple[Node, ...]
    num_inputs: int
    outputs: tuple
    """Per output leaf of the function: ("node", i) or ("constant", k)."""
    out_tree: Any
    constants: ConstantProgram = field(repr=False)
    """Evaluates the graph's constants."""
    rewritten: tuple[str, ...] = ()
    """The primitives of the function that are evaluated in another way here: equal as real numbers alone."""

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in order; together they hold every node that is not a region leaf."""
        starts = sorted({self.num_inputs, *self.nonlinear} - {len(self.nodes)})
        stops = [*starts[1:], len(self.nodes)][: len(starts)]
        return tuple(_block(self.nodes, start, stop) for start, stop in zip(starts, stops, strict=True))

    @cached_property
    def shared(self) -> Structure:
        """What it computes, without names and constants: one object for equal ones, which share programs."""
        nodes = tuple(dataclasses.replace(node, name="", source="") for node in self.nodes)
        return _plain(nodes, self.num_inputs, self.outputs)

    @cached_property
    def repeats(self) -> int:
        """How many blocks compute what an earlier one does: programs that steps of their own would share."""
        return len(self.blocks) - len({block.template for block in self.blocks})

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """The numbers of the nonlinear nodes."""
        return tuple(i for i, node in enumerate(self.nodes) if node.op.kind in NONLINEAR)

    @cached_property
    def partial(self) -> tuple[int, ...]:
        """The nodes that may be undefined at what they read; `methods.domains` looks at the bounds of that."""
        return tuple(i for i, node in enumerate(self.nodes) if node.op.partial)

    @cached_property
    def has_subnormal(self) -> bool:
        """Whether the function writes down a subnormal number."""
        operands = [o for node in self.nodes for o in node.op.operands]
        operands += [o for node in self.nodes for _, _, read in node.op.program.instructions for o in read]
        numbers = [np.asarray(o[1]) for o in operands if o[0] in ("lit", "literal")]
        return any(0 < abs(n) < np.finfo(n.dtype).tiny for n in numbers if np.issubdtype(n.dtype, np.floating))

    def ending_in(self, outputs: tuple[int, ...]) -> Structure:
        """The structure of some nodes as outputs; the same object for the same nodes."""
        if outputs not in self._endings:
            made = dataclasses.replace(
                self, nodes=self.nodes[: outputs[-1] + 1], outputs=tuple(("node", i) for i in outputs),
                out_tree=jax.tree.structure(list(outputs)),
            )  # fmt: skip
            self._endings[outputs] = made
        return self._endings[outputs]

    @cached_property
    def _endings(self) -> dict[tuple[int, ...], Structure]:
        return {}

    @cached_property
    def exact_on_boxes(self) -> tuple[bool, ...]:
        """Per node: interval arithmetic is exact for it, as a function of the last nonlinear values before it.

        It is while no two entries that share an origin are mixed: one layer of products, and structure around it.
        """
        origins: list[frozenset[int]] = []
        entangled: list[bool] = []
        exact: list[bool] = []
        for i, node in enumerate(self.nodes):
            if node.op.kind != "affine":
                origins.append(frozenset({i}))
                entangled.append(False)
                exact.append(True)
                continue
            read = [origins[k] for k in node.inputs]
            disjoint = sum(map(len, read)) == len(frozenset().union(*read))
            distinct = disjoint and not any(entangled[k] for k in node.inputs)
            apart = distinct or not node.op.mixes or (disjoint and not node.op.facts.scales and len(read) > 1)
            origins.append(frozenset().union(*read))
            entangled.append(any(entangled[k] for k in node.inputs) or node.op.repeats or not disjoint)
            exact.append(apart and all(exact[k] for k in node.inputs))
        return tuple(exact)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the nodes that read it."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for source in node.inputs:
                readers[source].append(i)
        return tuple(map(tuple, readers))


@kept(1024)
def _plain(nodes: tuple[Node, ...], num_inputs: int, outputs: tuple) -> Structure:
    return Structure(nodes, num_inputs, outputs, None, ConstantProgram())


@kept(4096)
def _shared(template: Template) -> Template:
    """One object for equal templates, so that comparing them is free."""
    return template


def _block(nodes: tuple[Node, ...], start: int, stop: int) -> Block:
    outer: list[int] = []
    constants: list[int] = []
    described = []
    for node in nodes[start:stop]:
        references = []
        for source in node.inputs:
            if source >= start:
                references.append(("node", source - start))
                continue
            if source not in outer:
                outer.append(source)
            references.append(("outer", outer.index(source)))
        first = len(constants)
        constants.extend(node.constants)
        described.append((node.op, tuple(references), tuple(range(first, len(constants)))))
    template = _shared(Template(tuple(described), tuple(nodes[i].op.shape for i in outer)))
    return Block(template, start, stop, tuple(outer), tuple(constants))


Constants = tuple[tuple[Any, ...], tuple[int | None, ...] | None]
"""Some of a graph's constants, and their batch axes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Graph:
    """A structure with the values of its constants.

    `axes` is None for one example. Otherwise the regions carry a leading batch axis, examples are independent, and
    `axes[k]` is 0 where constant k differs from example to example and None where all share it.
    """

    constants: tuple[Any, ...]
    """Arrays, or `values.Inexact` where rounding counts."""
    structure: Structure = field(metadata={"static": True})
    axes: tuple[int | None, ...] | None = field(default=None, metadata={"static": True})
    finite: frozenset[int] = field(default=frozenset(), metadata={"static": True})
    """The numbers of constants that are known to be finite."""

    @property
    def doubtful(self) -> Constants:
        """The constants that may not be finite."""
        chosen = [k for k in range(len(self.constants)) if k not in self.finite]
        axes = None if self.axes is None else tuple(self.axes[k] for k in chosen)
        return tuple(self.constants[k] for k in chosen), axes

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The structure's nodes."""
        return self.structure.nodes

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The structure's blocks."""
        return self.structure.blocks
