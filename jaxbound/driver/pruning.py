"""Passes without the neurons that are proved inactive: each example's own smaller Dense layers.

A ReLU that is inactive over the whole region is zero, and so are its row of the kernel that reads it and its column of
the kernel that makes it. In trained networks that is more than half of them, others in each example. What is left is
gathered once for each layer and example, when the layer is relaxed; every later pass multiplies the smaller kernels: a
quarter of the products where half of the neurons are left on both sides. A half or a quarter of a layer is left, so
that few shapes of programs are needed (three quarters were no faster: a product of each example's own kernel is slower
than one of all examples with the same).

This serves eager runs, between Dense layers whose values nothing else reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.backend.caches import kept
from jaxbound.driver.run import Run
from jaxbound.graph import Block, Op, Template
from jaxbound.graph.values import Inexact
from jaxbound.relaxations import affine, backward, coefficients, execution
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Planes

_FEWEST = 128
"""Neurons of a layer from which on less of it is worth programs of its own."""
_PARTS = (1 / 4, 1 / 2)


class _Layer(NamedTuple):
    """The nodes of a block that are a function of single entries or none, a Dense layer, and its bias or none."""

    function: Op | None
    product: Op
    shift: Op | None
    places: tuple[int, ...]
    """Where they stand among the block's nodes."""
    used: tuple[int, ...]
    """The block's constants that they read."""


@dataclass(frozen=True)
class Pruned:
    """A block as a segment of a pass: its rows arrive on all entries of its last node, or on those that are left."""

    block: Block
    left: tuple[np.ndarray | None, np.ndarray | None]
    """Which entries are left of what it reads, and of what it makes; None for all."""
    whole: tuple | None
    """Template, constants, planes and bounds, for rows on all entries of its last node; None for those of the block."""
    part: tuple | None
    """The same for rows on those that are left, if some are not."""

    def pull(self, run: Run, rows: dict[int, Coefficients], carry: backward.Carry):
        """Move rows back over the block."""
        entry, (read,) = self.block.stop - 1, self.block.outer
        if entry not in rows:
            return rows, carry
        incoming = rows[entry]
        made, arrives_left = self.left[1], False
        if made is not None and isinstance(incoming, coefficients.Dense):
            arrives_left = incoming.values.shape[made.ndim :] == made.shape[-1:]
        own = self.part if arrives_left else self.whole
        if own is None:
            return run.pull(self.block, rows, carry)
        template, constants, planes, known = own
        shape = run.graph.nodes[read].op.shape if self.left[0] is None else template.outer_shapes[0]
        state = incoming, carry, planes, known if run.outward else None
        axes = None if run.batch is None else (0,) * len(constants)
        moved, carry = run.call(_pull, (template, shape), (constants, axes), *state)
        rows = {number: part for number, part in rows.items() if number != entry}
        return rows, run.deliver(rows, read, moved, carry)


def pruned(run: Run) -> Run:
    """The run whose passes leave out what its relaxations prove to be zero."""
    if not run.eager or run.outward == execution.MODE:
        return run
    blocks = run.graph.blocks
    layers = [None if _is_computed(run, block) else _layer(block.template) for block in blocks]
    old = {segment.block.start: segment for segment in run.segments if isinstance(segment, Pruned)}
    left: dict[int, np.ndarray] = {}
    for before, block, maker, layer in zip(blocks, blocks[1:], layers, layers[1:], strict=False):
        made = before.stop - 1
        alone = block.outer == (made,) and run.graph.structure.consumers[made] == (block.start,)
        if maker is None or layer is None or layer.function is None or not alone or block.start not in run.planes:
            continue
        known = old[block.start].left[0] if block.start in old else None
        found = _left(run, block) if known is None else known
        if found is not None:
            left[made] = found
    segments = []
    for block, layer in zip(blocks, layers, strict=True):
        sides = (left.get(block.outer[0]) if block.outer else None), left.get(block.stop - 1)
        if layer is None or all(side is None for side in sides):
            segments.append(block)
        elif block.start in old and all(a is b for a, b in zip(old[block.start].left, sides, strict=True)):
            segments.append(old[block.start])
        else:
            segments.append(_pruned(run, block, layer, sides))
    return replace(run, segments=tuple(segments))


def _is_computed(run: Run, block: Block) -> bool:
    """Whether constants of a block are not exact."""
    return any(isinstance(constant, Inexact) for constant in run.constants(block)[0])


def _left(run: Run, block: Block) -> np.ndarray | None:
    """The entries, per example, of a function that is not proved to be zero, and some more; None if they are most."""
    size = run.graph.nodes[block.start].op.size
    if size < _FEWEST:
        return None
    batch = () if run.batch is None else (run.batch,)
    low, high = (np.asarray(end).reshape(*batch, size) for end in run.ends[block.start])
    zero = (low == 0) & (high == 0)
    most = size - int(zero.sum(axis=-1).min())
    count = next((int(part * size) for part in _PARTS if most <= int(part * size)), None)
    return None if count is None else np.argsort(zero, kind="stable")[..., :count].astype(np.int32)


def _pruned(run: Run, block: Block, layer: _Layer, left: tuple) -> Pruned:
    read, numbers = block.outer[0], [block.start + place for place in layer.places]
    known = (run.ends[read], *(run.ends[number] for number in numbers)) if run.outward else None
    state = run.planes.get(block.start), known

    def gathered(*sides: np.ndarray | None) -> tuple:
        found = run.call(_gather, layer, run.constants(block), *state, *sides)
        return _template(layer, *(None if side is None else side.shape[-1] for side in sides)), *found

    whole = None if left[0] is None else gathered(left[0], None)
    return Pruned(block, left, whole, None if left[1] is None else gathered(*left))


# --- what a block is --------------------------------------------------------------------------------------------------


@kept(1024)
def _layer(template: Template) -> _Layer | None:
    """The Dense layer that a block is, if it is one and no more."""
    function, product, shift, places, used = None, None, None, [], []
    for place, (op, inputs, constants) in enumerate(template.nodes):
        if inputs != ((("outer", 0),) if place == 0 else (("node", place - 1),)):
            return None
        adds = op.kind == "affine" and affine.adds(op)
        if op.kind == "affine" and op.keeps_order and not adds:
            continue
        if op.kind == "scalar" and place == 0 and not constants:
            function = op
        elif op.kind == "affine" and product is None and coefficients.is_dense_layer(op):
            product = op
        elif product is not None and shift is None and op.name == "add" and _adds_array(op):
            shift = op
        else:
            return None
        places.append(place)
        used.extend(constants)
    return None if product is None else _Layer(function, product, shift, tuple(places), tuple(used))


def _adds_array(op: Op) -> bool:
    """Whether a sum is of one value and an array of its size."""
    arrays = [shape for shape, operand in zip(op.input_shapes, op.operands, strict=True) if operand[0] == "constant"]
    return len(arrays) == 1 and len(op.operands) == 2 and int(np.prod(arrays[0])) == op.size


def _template(layer: _Layer, read: int | None, made: int | None) -> Template:
    """The nodes of a layer with so many entries left of what it reads and makes."""
    count, size = read or layer.product.input_shapes[1][0], made or layer.product.input_shapes[1][1]
    params = {**dict(layer.product.params), "dimension_numbers": (((0,), (0,)), ((), ()))}
    product = replace(
        layer.product, shape=(size,), input_shapes=((count,), (count, size)), params=tuple(sorted(params.items())),
        operands=(("input", 0), ("constant", 0)),
    )  # fmt: skip
    nodes: list[tuple[Op, tuple, tuple[int, ...]]] = []
    if layer.function is not None:
        nodes.append((replace(layer.function, shape=(count,), input_shapes=((count,),)), (("outer", 0),), ()))
    nodes.append((product, (("node", 0) if nodes else ("outer", 0),), (0,)))
    if layer.shift is not None:
        shift = replace(layer.shift, shape=(size,), input_shapes=((size,), (size,)))
        nodes.append((shift, (("node", len(nodes) - 1),), (1,)))
    return Template(tuple(nodes), ((count,),))


# --- steps ------------------------------------------------------------------------------------------------------------


def _gather(layer: _Layer, constants: Sequence, planes: Planes | None, known: Any, read: Any, made: Any):
    """Kernel and bias, planes, and bounds of what is read and of the layer's nodes, for the entries that are left."""

    def cut(array: jax.Array, index: jax.Array | None):
        return array.reshape(-1) if index is None else jnp.take(array.reshape(-1), index, mode="clip")

    kernel, *bias = (constants[k] for k in layer.used)
    kernel = kernel if read is None else jnp.take(kernel, read, axis=0, mode="clip")
    kernel = kernel if made is None else jnp.take(kernel, made, axis=1, mode="clip")
    own = kernel, *(cut(array, made) for array in bias)
    if planes is not None:
        shape = layer.function.shape if layer.function else ()
        planes = jax.tree.map(lambda leaf: cut(jnp.broadcast_to(leaf, shape), read), planes)
    if known is not None:
        count = 1 + (layer.function is not None)
        known = [tuple(cut(end, read if k < count else made) for end in ends) for k, ends in enumerate(known)]
        known = known[:1], known[1:]
    return own, planes, known


def _pull(static: Any, constants: Sequence, rows: Coefficients, carry: backward.Carry, planes: Any, known: Any):
    """Rows pulled through a layer; they leave in this shape."""
    template, shape = static
    last = template.nodes[-1][0]
    if isinstance(rows, coefficients.Identity):
        rows = replace(rows, shape=last.shape)
    else:
        values = coefficients.dense(rows)
        rows = coefficients.Dense(values.reshape(values.shape[0], *last.shape))
    incoming = [*(None for _ in template.nodes[1:]), rows]
    (found,), _, carry = backward.pull(template, constants, incoming, carry, planes, known)
    assert found is not None
    values = coefficients.dense(found)
    return coefficients.Dense(values.reshape(values.shape[0], *shape)), carry
