"""Bounds of one domain as one small program: what a search runs on thousands of domains at once, by `vmap`.

The mathematics is that of `relaxations.backward`; planes around single nodes are in `lines`. What differs is how it is
carried out: rows of coefficients are plain arrays, ReLUs are relaxed in closed form, and rounding costs nothing per
row. `backward` charges rounding on the coefficients of every value v that a pass meets, <|C_v|, e_v> with e_v made of
magnitudes alone. A pulled row obeys
|C_w| <= |L|' |C_v| for an affine v = L w + b, and |C_w| <= |C_v| s for a plane of slopes of at most s, so a charge on
w is at most one on v:

    <|C_w|, e_w>  <=  <|C_v|, |L| e_w>,        <|C_w|, e_w>  <=  <|C_v|, s e_w>.

So charges move forward, once per domain, as an error radius r of every value, up to the next nonlinear node, where they
widen its planes: the lower one by r below, the upper one by r above, which is what <|C|, r> says. A pass then computes
its bound from the widened planes, less the radius of the value at which it begins. Every radius is enlarged by 1/64
for its own rounding; room for underflow (see `affine`), h times all charges, is taken off at the end.

Split neurons. Where z lies on one side of a point on a domain, sign * (z - point) >= 0, so that for every beta >= 0

    row  >=  <C, z> + c   implies   row  >=  <C - beta sign, z> + c + beta sign point,

a lower bound that holds for every multiplier (Wang et al. 2021, "Beta-CROWN"). ReLUs are split at 0; what other points
add to the intercept is the caller's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound._compat import eager_jit, is_tracer
from jaxbound.backend.caches import kept
from jaxbound.backend.tracing import inlined
from jaxbound.driver import steps
from jaxbound.graph import Block
from jaxbound.relaxations import affine, enclosures, interval
from jaxbound.relaxations.planes import Planes
from jaxbound.search import lines
from jaxbound.search.lines import SPARE
from jaxbound.search.rectifiers import is_rectifier
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray
Ends = tuple[jax.Array, jax.Array]


class Found(NamedTuple):
    """What a pass found for its rows."""

    lower: jax.Array
    """Lower bounds, (rows,), rounding taken off where that was asked for."""
    inputs: jax.Array
    """Coefficients of the region leaf, (rows, *leaf)."""
    met: dict[int, jax.Array]
    """Coefficients of the nonlinear nodes, (rows, *node)."""


class Domain:
    """What is known of one domain, or of a batch of them: bounds, planes and error radii, made block by block.

    Concrete arrays have a leading axis of domains, and every block is one compiled program, which equal layers share.
    Traced ones have none, and everything becomes part of one program.

    Args:
        skeleton: the network.
        constants: its constants.
        box: the domains' ends.
        outward: whether to count rounding.
        once: whether to compile for a single run.
    """

    def __init__(self, skeleton: Skeleton, constants: Sequence, box: Ends, *, outward: bool, once: bool = False):
        self.skeleton, self.constants, self.outward, self.once = skeleton, constants, outward, once
        self.eager = not is_tracer(box[0])
        self.ends: dict[int, Ends] = {0: box}
        self.planes: dict[int, Planes] = {}
        self.radii: dict[int, jax.Array] = {}
        self.terms = len(skeleton.nodes) + 4
        self.room: jax.Array | None = None
        """What underflow may cost a row, for all nodes so far."""
        if outward:
            self.radii[0], self.room = self._call(lines.input_radius, (self.terms, self._readers(0)), box)

    def _call(self, step: Callable, static: Hashable, *state: Any, constants: Sequence = ()):
        program = _compiled(step, static, self.once) if self.eager else functools.partial(step, static)
        return program(tuple(constants), *state)

    def _readers(self, number: int) -> int:
        return len(self.skeleton.structure.consumers[number])

    def add(
        self, block: Block, known: dict[int, Ends] | None = None, slopes: tuple | None = None, *, relax: bool = True
    ) -> None:
        """Bound a block's nodes by interval arithmetic and by what is known of them; relax the first, if it is bent.

        Args:
            block: the next one.
            known: bounds of some nodes that hold on the domain too.
            slopes: of planes around the first: the lower one of a ReLU, in [0, 1]; the lower and the upper one of
                another function of one number; None for CROWN's.
            relax: False if planes are found elsewhere.
        """
        inside = range(block.start, block.stop)
        readers = tuple(map(self._readers, inside))
        outer = [self.ends[k] for k in block.outer], [self.radii.get(k) for k in block.outer]
        given = [(known or {}).get(k) for k in inside]
        relax = relax and block.template.nodes[0][0].kind not in ("input", "affine")
        static = block.template, self.outward, self.terms, readers, relax
        planes, ends, radii, room = self._call(
            _add, static, *outer, given, slopes, self.room, constants=[self.constants[k] for k in block.constants]
        )
        if relax:
            self.planes[block.start] = planes
        self.ends.update(zip(inside, ends, strict=True))
        if self.outward:
            self.radii.update(zip(inside, radii, strict=True))
            self.room = room

    def learn(self, planes: Mapping[int, Planes], ends: Mapping[int, Ends] = MappingProxyType({})) -> None:
        """Take planes, and bounds, that were found elsewhere."""
        self.planes.update(planes)
        self.ends.update(ends)

    def table(self, block: Block) -> tuple[Planes, tuple[jax.Array, jax.Array]]:
        """Lines around the function of one number that a block begins with, and the places of CROWN's among them."""
        op, inputs, used = block.template.nodes[0]
        read = [self.ends[block.outer[k]] for _, k in inputs]
        return self._call(lines.table, op, read, constants=[self.constants[block.constants[k]] for k in used])

    def tighten(self, number: int, lower: jax.Array | None = None) -> None:
        """Bound a node by backward passes from all its entries.

        Args:
            number: the node.
            lower: what passes found: lower bounds of all entries, then of their negatives; None for new passes.
        """
        if lower is None:
            begun = self._call(_begin_entries, None, self.radii.get(number), self.room, self.ends[number])
            lower = self._down({number: None}, begun).lower
        self.ends[number] = self._call(_met, None, self.ends[number], lower)

    def needed(self, number: int) -> jax.Array:
        """Which entries of a node backward passes may help: those that some reader does not relax exactly."""
        return self._call(steps.unstable, steps.readers_of(self.skeleton.structure, number), self.ends[number])

    def bound_entries(self, number: int, entries: Array, signs: Array) -> Found:
        """A pass from some entries of a node times signs, 0 for empty rows; a node's rows begin in one program."""
        op = self.skeleton.nodes[number].op
        rows, lower = self._call(_begin_some, (op.shape, op.dtype), entries, signs, self.radii.get(number), self.room)
        return self._down({number: rows}, lower)

    def bound(
        self,
        start: dict[int, jax.Array],
        intercept: jax.Array,
        multipliers: Mapping[int, jax.Array] = MappingProxyType({}),
        *,
        watch: bool = False,
    ) -> Found:
        """A backward pass from rows on some nodes (and on the region leaf) to numbers.

        Args:
            start: per node, coefficients (rows, *node).
            intercept: what the rows begin with, (rows,).
            multipliers: per node, what split neurons add to the coefficients there, -beta * sign.
            watch: whether to return the coefficients of nonlinear nodes.
        """
        if self.outward:
            parts = [(part, self.radii[number]) for number, part in (*start.items(), *multipliers.items())]
            intercept = self._call(_begin, self.terms, intercept, parts, self.room)
        return self._down(dict(start), intercept, multipliers, watch=watch)

    def _down(
        self,
        rows: dict[int, Any],
        lower: jax.Array,
        multipliers: Mapping = MappingProxyType({}),
        *,
        watch: bool = False,
    ) -> Found:
        met = {}
        for block in reversed(self.skeleton.structure.blocks):
            inside = range(block.start, block.stop)
            if rows.keys().isdisjoint(inside):
                continue
            entries = tuple(k in rows and rows[k] is None for k in inside)
            incoming = [self._with(rows.pop(k, None), multipliers.get(k)) for k in inside]
            state = incoming, lower, self.planes.get(block.start)
            outgoing, lower, own = self._call(
                _pull, (block.template, entries, watch), *state, constants=[self.constants[k] for k in block.constants]
            )
            if own is not None:
                met[block.start] = own
            for k, part in zip(block.outer, outgoing, strict=True):
                if part is not None:
                    rows[k] = self._with(part, rows.get(k))
        inputs = self._with(rows.get(0), multipliers.get(0))
        lower, inputs = self._call(_finish, None, self.ends[0], inputs, lower)
        return Found(lower, inputs, met)

    def _with(self, rows: jax.Array | None, other: jax.Array | None):
        return rows if rows is None or other is None else self._call(_sum, None, rows, other)


# --- the steps, each for one domain -----------------------------------------------------------------------------------


@kept(1024)
def _compiled(step: Callable, static: Hashable, once: bool) -> Callable:
    def batched(constants: Sequence, *state: Any):
        return jax.vmap(functools.partial(step, static, constants))(*state)

    return eager_jit(inlined(batched), level=0 if once else 1)


def _add(
    static: Any,
    constants: Sequence,
    outer: Sequence[Ends],
    outer_radii: Sequence,
    known: Sequence,
    slopes: tuple | None,
    room: jax.Array | None,
):
    """Planes around the first node of a block, bounds of its nodes, radii, and room for underflow."""
    template, outward, terms, readers, relax = static
    planes = None
    if relax:
        op, inputs, used = template.nodes[0]
        read, behind = ([part[k] for _, k in inputs] for part in (outer, outer_radii))
        own = [constants[k] for k in used]
        planes, room = lines.relax((op, outward, terms), own, read, behind, slopes, room)
    ends: list[Ends] = []
    radii: list[jax.Array] = []
    for position, (op, inputs, used) in enumerate(template.nodes):
        read = [outer[k] if where == "outer" else ends[k] for where, k in inputs]
        behind = [outer_radii[k] if where == "outer" else radii[k] for where, k in inputs] if outward else []
        own = [constants[k] for k in used]
        if is_rectifier(op):
            found = jnp.maximum(read[0][0], 0), jnp.maximum(read[0][1], 0)
        else:
            found = interval.node(op, read, own, outward=outward)
        found = found if known[position] is None else interval.intersect(found, known[position])
        ends.append(found)
        if outward:
            affine_ = op.kind == "affine"
            charge = lines.charge_of_affine(op, own, read, terms) if affine_ else jnp.zeros(op.shape, op.dtype)
            behind = affine.absolute(op, behind, own) if affine_ else 0.0
            radius, room = lines.with_sums(charge, behind, found, readers[position], room)
            radii.append(radius)
    return planes, ends, radii, room


def _begin_entries(_static: None, _constants: Sequence, radius: jax.Array | None, room: jax.Array | None, ends: Ends):
    """What a pass from all entries of a node, then all their negatives, begins with."""
    radius = jnp.zeros_like(ends[0]) if radius is None else radius
    return -jnp.tile(radius.reshape(-1), 2) - (0 if room is None else room)


def _begin_some(static: Any, _constants: Sequence, entries: jax.Array, signs: jax.Array, radius: Any, room: Any):
    """Rows on some entries of a node, and what a pass from them begins with."""
    shape, dtype = static
    places = jnp.arange(math.prod(shape), dtype=entries.dtype)
    rows = jnp.where(entries[:, None] == places, signs[:, None], jnp.zeros((), dtype)).reshape(-1, *shape)
    lower = jnp.zeros(len(entries), dtype)
    return rows, lower if radius is None else lower - jnp.take(jnp.ravel(radius), entries) - room


def _begin(terms: int, _constants: Sequence, intercept: jax.Array, parts: Sequence, room: jax.Array):
    """An intercept less the rounding of everything behind the rows."""
    lost = affine.gamma(terms, intercept.dtype) * jnp.abs(intercept) + room
    return intercept - SPARE * (lost + sum(_dot(jnp.abs(part), radius) for part, radius in parts))


def _pull(static: Any, constants: Sequence, incoming: Sequence, lower: jax.Array, planes: Any):
    """Rows on the values that a block reads, what they have collected, and the coefficients of its nonlinear node."""
    template, entries, watch = static
    inner = list(incoming)
    outer: list = [None] * len(template.outer_shapes)
    met = None
    for position in reversed(range(len(template.nodes))):
        op, inputs, used = template.nodes[position]
        rows = inner[position]
        if entries[position]:
            unit = jnp.eye(op.size, dtype=op.dtype)
            rows = jnp.concatenate([unit, -unit]).reshape(-1, *op.shape)
        if rows is None:
            continue
        own = [constants[k] for k in used]
        if op.kind == "affine":
            shift = affine.offset(op, own)
            lower = lower if shift is None else lower + _dot(rows, shift)
            pulled = affine.pull(op, rows, own)
        else:
            met = rows if watch else None
            lower = lower + _dot(rows, jnp.where(rows > 0, planes.lower_intercept, planes.upper_intercept))
            axes = enclosures.reduced_axes(op)
            rows = jnp.expand_dims(rows, [axis - len(op.shape) - len(axes) for axis in axes])
            pairs = zip(planes.lower_slopes, planes.upper_slopes, strict=True)
            pulled = [rows * jnp.where(rows > 0, low, high) for low, high in pairs]
        for (where, k), part in zip(inputs, pulled, strict=False):
            held = outer if where == "outer" else inner
            held[k] = part if held[k] is None else held[k] + part
    return outer, lower, met


def _finish(_static: None, _constants: Sequence, box: Ends, inputs: jax.Array | None, lower: jax.Array):
    low, high = box
    rows = jnp.zeros((*lower.shape, *low.shape), lower.dtype) if inputs is None else inputs
    lower = lower + regions.minimum(regions.Box(low, high), rows)
    return jnp.where(lower < jnp.inf, lower, -jnp.inf), rows


def _met(_static: None, _constants: Sequence, ends: Ends, lower: jax.Array):
    low, negative = (part.reshape(ends[0].shape) for part in jnp.split(lower, 2))
    return interval.intersect(ends, (low, -negative))


def _sum(_static: None, _constants: Sequence, first: jax.Array, second: jax.Array):
    return first + second


def _dot(rows: jax.Array, values: jax.Array) -> jax.Array:
    """Per row, the sum of products with values of the node's shape, which may have rows of their own."""
    return jnp.sum(rows * values, axis=tuple(range(1, rows.ndim)))


def adaptive_slopes(domain: Domain) -> np.ndarray:
    """The lower slopes, 0 or 1, that CROWN chooses for all ReLUs, flat: (domains, neurons)."""
    ends = [map(np.asarray, domain.ends[z]) for z in domain.skeleton.rectified_inputs]
    chosen = [(high > -low).reshape(len(low), -1) for low, high in ends]
    return np.concatenate(chosen, axis=1) if chosen else np.zeros((len(domain.ends[0][0]), 0), bool)


def started(skeleton: Skeleton, goal: Sequence) -> tuple[dict[int, jax.Array], jax.Array]:
    """Where a pass for the rows of a goal begins."""
    outputs, inputs, offsets = goal
    axes = outputs.shape[:-1]
    start = {skeleton.output: outputs.reshape(*axes, *skeleton.nodes[skeleton.output].op.shape)}
    if inputs is not None:
        start[0] = inputs.reshape(*axes, *skeleton.nodes[0].op.shape)
    return start, -offsets
