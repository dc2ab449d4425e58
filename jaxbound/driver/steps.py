"""The compiled steps of a run: what one node, one block of nodes or one pass computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.backend.tracing import inlined
from jaxbound.graph import NONLINEAR, Op, Structure
from jaxbound.relaxations import backward, coefficients, enclosures, forward, interval
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Planes, spread
from jaxbound.relaxations.slopes import Given, SlopeRule

Ends = tuple[jax.Array, jax.Array]


@kept(1024)
def compiled(step: Callable, static: Hashable, axes: Any) -> Callable:
    """The step for a batch, compiled; the same one for equal static facts."""
    return eager_jit(inlined(mapped(step, static, axes)), level=0 if step in (begin, joined, unless_void) else 1)


def mapped(step: Callable, static: Hashable, axes: Any) -> Callable:
    """The step over the batch axis, where there is one."""

    @functools.wraps(step)
    def single(constants: Sequence, *state: Any):
        return step(static, constants, *state)

    @functools.wraps(step)
    def batched(constants: Sequence, *state: Any):
        return jax.vmap(single, in_axes=(axes, *(0 for _ in state)))(constants, *state)

    return single if axes is None else batched


def boxes(_static: None, constants: Sequence, leaves: Sequence[regions.Region]):
    """The enclosing boxes of the regions; whether nothing can be bounded (an empty region, an infinite constant); and
    the regions, boxes in one form, so that later steps are the same for all of them."""
    undefined = [jnp.any(~jnp.isfinite(constant)) for constant in jax.tree.leaves(constants)]
    void = functools.reduce(jnp.logical_or, [*map(regions.is_empty, leaves), *undefined])
    boxes = [regions.enclosing_box(leaf) for leaf in leaves]
    plain = [regions.Box(*box) if regions.is_box(leaf) else leaf for box, leaf in zip(boxes, leaves, strict=True)]
    return [(jnp.where(void, -jnp.inf, low), jnp.where(void, jnp.inf, high)) for low, high in boxes], void, plain


def unless_void(_static: None, _constants: Sequence, ends: Ends, void: jax.Array):
    """The ends, infinite where nothing can be bounded."""
    return jnp.where(void, -jnp.inf, ends[0]), jnp.where(void, jnp.inf, ends[1])


def propagate(static: Any, constants: Sequence, ends: Sequence[Ends], base: Sequence[Ends] | None):
    """Intervals of a block's nodes from `base` (None: from the best ends); its first one's from the best ends, or None
    if these are no others."""
    template, outward = static
    found = interval.propagate(template, ends if base is None else base, constants, outward=outward)
    op, inputs, used = template.nodes[0]
    if op.kind == "affine" or base is None:
        return None, found
    return interval.node(op, [ends[k] for _, k in inputs], [constants[k] for k in used], outward=outward), found


def enclose(node: tuple, constants: Sequence, inputs: Sequence[Ends], rule: SlopeRule):
    """The planes of a nonlinear node, by a rule."""
    op, _, used = node
    return enclosures.of(op).planes(op, inputs, [constants[k] for k in used], rule)


def enclose_rows(static: Any, constants: Sequence, inputs: Sequence[Ends], rules: Given):
    """The planes of a nonlinear node, by rules for groups of rows."""
    (op, _, used), sides, count = static
    own = [constants[k] for k in used]
    made = jax.vmap(lambda rule: enclosures.of(op).planes(op, inputs, own, rule))(rules)
    return jax.tree.map(lambda leaf: spread(leaf, sides, count), made)


def readers_of(structure: Structure, number: int) -> tuple[tuple[Op, int], ...]:
    """The nonlinear readers of a node, and as which input they read it; none where one reads such a reader's bounds."""
    nodes, consumers = structure.nodes, structure.consumers
    readers = [k for k in consumers[number] if nodes[k].op.kind in NONLINEAR]
    if any(nodes[k].op.kind in NONLINEAR for reader in readers for k in consumers[reader]):
        return ()
    return tuple((nodes[i].op, k) for i in readers for k, source in enumerate(nodes[i].inputs) if source == number)


def unstable(readers: tuple, _constants: Sequence, ends: Ends):
    """Which entries some reader does not relax exactly as they are known."""
    exact = [enclosures.of(op).is_exact(op, position, ends) for op, position in readers]
    return ~functools.reduce(jnp.logical_and, exact) if exact else jnp.ones(ends[0].shape, bool)


def merge(intersect: bool, _constants: Sequence, known: Ends, found: Any, errors: Ends, needed: jax.Array | None):
    """What is known of the entries of a node, with what a pass found."""
    widened = found[0] - errors[0], found[1] + errors[1]
    merged = interval.intersect(known, widened) if intersect else interval.hull(widened)
    return merged if needed is None else tuple(jnp.where(needed, *pair) for pair in zip(merged, known, strict=True))


def begin(static: Any, _constants: Sequence, index: jax.Array):
    """The rows that start at some entries of a node."""
    shape, dtype, sides, outward = static
    sign = (index >= 0).astype(dtype)
    if sides == "both":
        index, sign = jnp.concatenate([index, index]), jnp.concatenate([sign, -sign])
    return coefficients.Identity(jnp.maximum(index, 0), sign, shape), backward.start(index.shape[0], dtype, outward)


def pull(
    static: Any,
    constants: Sequence,
    incoming: Sequence[Coefficients | None],
    carry: backward.Carry,
    planes: Planes | None,
    ends: Any,
):
    """Rows pulled through a block."""
    template, executed = static
    return backward.pull(template, constants, incoming, carry, planes, ends, executed=executed)


def densify(_static: None, _constants: Sequence, rows: Coefficients):
    """Rows with a coefficient for every entry."""
    return coefficients.Dense(coefficients.dense(rows))


def substitute(
    _static: None,
    _constants: Sequence,
    rows: Coefficients,
    pair: forward.Pair,
    carry: backward.Carry,
    leaves: Sequence[regions.Region],
):
    """A node's own linear functions in the place of the node."""
    return forward.substitute(rows, pair, carry, leaves)


def add(
    _static: None,
    _constants: Sequence,
    first: Coefficients,
    second: Coefficients,
    carry: backward.Carry,
    ends: Ends | None,
):
    """Rows that reach one node on two ways."""
    return backward.add(first, second, carry, None if ends is None else interval.magnitude(ends))


def concretize(
    _static: None,
    _constants: Sequence,
    leaves: Sequence[regions.Region],
    incoming: Sequence[Coefficients | None],
    carry: backward.Carry,
    void: jax.Array,
):
    """Rows at the regions, as numbers."""
    return backward.concretize(leaves, incoming, carry, void)


def nothing(size: int, dtype: jnp.dtype, batch: int | None) -> np.ndarray:
    """Where `collect` begins: four rows, lower bounds of both signs, and their rounding, of entries and one more."""
    found = np.zeros((*(() if batch is None else (batch,)), 4, size + 1), dtype)
    found[..., :2, :] = -np.inf
    return found


def collect(static: Any, _constants: Sequence, found: Any, index: jax.Array, part: Any):
    """Put the bounds of some entries among those found."""
    size, sides = static
    where = jnp.where(index < 0, size, index)
    kinds = slice(0, 2 if sides == "both" else 1), slice(2, 4 if sides == "both" else 3)
    for kind, values in zip(kinds, part, strict=True):
        if values is not None:
            found = found.at[kind, where].set(values.reshape(-1, index.shape[0]))
    return found


def put(found: np.ndarray, size: int, index: np.ndarray, part: Any) -> None:
    """The same on the host, in place."""
    where = np.where(index < 0, size, index)
    for kind, values in enumerate(part):
        if values is not None:
            for side, ends in enumerate(np.split(np.asarray(values), values.shape[-1] // index.shape[-1], axis=-1)):
                np.put_along_axis(found[..., 2 * kind + side, :], where, ends, axis=-1)


def joined(static: Any, _constants: Sequence, parts: Sequence):
    """What `collect` and `by_side` make of the bounds of all entries, in order."""
    shape, sides = static
    found = []
    for values, missing in zip(zip(*parts, strict=True), (-jnp.inf, 0.0), strict=True):
        rows = [part.reshape(2 if sides == "both" else 1, -1) for part in values if part is not None]
        whole = jnp.concatenate(rows, axis=1) if rows else jnp.zeros((2, *found[0].shape), found[0].dtype)
        found += [whole[0], whole[1] if sides == "both" else jnp.full_like(whole[0], missing)]
    return by_side(shape, jnp.stack(found))


def by_side(shape: tuple[int, ...], found: Any) -> Any:
    """Lower and upper bounds, and the rounding of each, of rows that hold both sides; on the host, too."""
    size, batch = math.prod(shape), found.shape[:-2]
    low, negative, *errors = (found[..., k, :size].reshape((*batch, *shape)) for k in range(4))
    return (low, -negative), (errors[0], errors[1])
