"""Backward linear bounds: the steps of a pass from rows on some values to numbers (Zhang et al. 2018, theorem 3.2).

A pass carries, for R rows, a linear function of the values that are still to come,

    row_r  >=  sum over values v of <C_v[r], v> + intercept[r],

and only ever lower bounds: an upper bound of a row is minus the lower bound of its negative. `pull` moves it back over
one block: an affine node's coefficients go through the transposed map and its constant into the intercept, a nonlinear
node's positive coefficients take its lower plane and its negative ones the upper plane. `concretize` ends the pass at
the region.

With `outward`, a bound on the rounding error of the pass itself is summed beside the intercept: for every product
`gamma_n |C| |L| |x|`, from the magnitudes of the values (Higham 2002, section 3.5), each factor with room for underflow
(see `affine`); for the network as it runs, its own errors, too (see `execution`). A coefficient that underflows is
charged where it is made, times the magnitude of its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbound import regions
from jaxbound.graph import Op, Template
from jaxbound.relaxations import affine, coefficients, enclosures, execution, interval
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Planes, times

Ends = tuple[jax.Array, jax.Array]


class Carry(NamedTuple):
    """What a pass has collected so far, one entry per row."""

    intercept: jax.Array
    rounding: jax.Array | None


def start(rows: int, dtype: DTypeLike, outward: bool) -> Carry:
    """Nothing collected yet."""
    zeros = jnp.zeros(rows, dtype)
    return Carry(zeros, zeros if outward else None)


def pull(
    template: Template,
    constants: Sequence,
    incoming: Sequence,
    carry: Carry,
    planes: Planes | None,
    ends: tuple[Sequence[Ends], Sequence[Ends]] | None,
    *,
    executed: bool = False,
) -> tuple[list[Coefficients | None], Coefficients | None, Carry]:
    """Move a pass back over one block.

    Args:
        template: the block.
        constants: its constants.
        incoming: coefficients of the block's nodes that the rows reach, by position.
        carry: what was collected after the block.
        planes: of the nonlinear node that begins the block; without them the rows stop there.
        ends: bounds of the values that the block reads and of its nodes; only used to bound rounding.
        executed: whether the errors of the executed network are charged as well (see `execution`).

    Returns:
        Coefficients of the values that the block reads, those that stopped at its first node (None if it has planes or
        is affine), and what is collected with the block.
    """
    tally = _Tally(template, carry, incoming, ends)
    for position in reversed(range(len(template.nodes))):
        rows = tally.inner[position]
        if rows is None:
            continue
        op, inputs, used = template.nodes[position]
        if op.kind == "affine":
            read = [constants[k] for k in used]
            parts = coefficients.pull(op, rows, read)
            tally.add_affine(op, rows, read, [tally.magnitude(source) for source in inputs])
            if executed:
                tally.add_execution(op, rows, read, inputs)
        elif planes is None:
            return tally.outer, rows, Carry(tally.intercept, tally.rounding)
        else:
            if executed:
                tally.add_execution(op, rows, [constants[k] for k in used], inputs)
            parts = tally.add_planes(op, rows, planes, inputs)
        for source, part in zip(inputs, parts, strict=False):
            tally.deliver(source, part)
    return tally.outer, None, Carry(tally.intercept, tally.rounding)


def add(
    first: Coefficients, second: Coefficients, carry: Carry, magnitude: jax.Array | None
) -> tuple[Coefficients, Carry]:
    """The sum of rows on one value, and the rounding of it."""
    found = coefficients.add(first, second)
    if carry.rounding is None:
        return found, carry
    assert magnitude is not None
    size = coefficients.charge(first, magnitude) + coefficients.charge(second, magnitude)
    return found, carry._replace(rounding=carry.rounding + affine.gamma(1, carry.rounding.dtype) * size)


class _Tally:
    """Coefficients, intercept and rounding while a block is walked."""

    def __init__(
        self,
        template: Template,
        carry: Carry,
        incoming: Sequence,
        ends: tuple[Sequence[Ends], Sequence[Ends]] | None,
    ):
        self.intercept, self.rounding = carry
        self.inner = list(incoming)
        self.outer: list[Coefficients | None] = [None] * len(template.outer_shapes)
        self.ends = ends

    def magnitude(self, source: tuple[str, int]):
        """The magnitude of a value; None where rounding is not asked for."""
        return None if self.rounding is None else interval.magnitude(self.bounds(source))

    def bounds(self, source: tuple[str, int]) -> Ends:
        """The bounds of a value."""
        where, k = source
        return self.ends[0 if where == "outer" else 1][k]  # pyright: ignore[reportOptionalSubscript]

    def deliver(self, source: tuple[str, int], part: Coefficients) -> None:
        where, k = source
        held: list = self.outer if where == "outer" else self.inner
        if held[k] is None:
            held[k] = part
            return
        carry = Carry(self.intercept, self.rounding)
        held[k], carry = add(held[k], part, carry, self.magnitude(source))
        self.rounding = carry.rounding

    def add_affine(self, op: Op, rows: Coefficients, constants: Sequence, magnitudes: Sequence) -> None:
        shift = affine.offset(op, constants)
        if shift is not None:
            self._shift(coefficients.dot(rows, shift), jnp.abs(shift), rows, op)
        error = affine.pull_error(op)
        if self.rounding is not None and error > 0:
            self.rounding += error * coefficients.charge(rows, affine.reach(op, magnitudes, constants))
        carried = None if self.rounding is None else affine.inexactness(op, magnitudes, constants)
        if self.rounding is not None and carried is not None:
            self.rounding += coefficients.charge(rows, carried)

    def add_execution(self, op: Op, rows: Coefficients, constants: Sequence, sources: Sequence) -> None:
        if self.rounding is not None:
            size = execution.error(op, [self.bounds(source) for source in sources], constants)
            self.rounding += 1.01 * coefficients.charge(rows, size)

    def add_planes(self, op: Op, rows: Coefficients, planes: Planes, sources: Sequence) -> list[Coefficients]:
        shift = coefficients.total(rows, planes.lower_intercept, planes.upper_intercept)
        size = jnp.maximum(jnp.abs(planes.lower_intercept), jnp.abs(planes.upper_intercept))
        self._shift(shift, size, rows, op)
        reduced = [axis - len(op.shape) - len(enclosures.reduced_axes(op)) for axis in enclosures.reduced_axes(op)]
        rows = coefficients.expand(rows, reduced)
        parts = []
        for low, high, source in zip(planes.lower_slopes, planes.upper_slopes, sources, strict=False):
            parts.append(coefficients.scale(rows, low, high))
            magnitude = self.magnitude(source)
            if self.rounding is not None and magnitude is not None:
                steepest = affine.enlarged(jnp.maximum(jnp.abs(low), jnp.abs(high)))
                size = coefficients.charge(rows, times(steepest, magnitude))
                self.rounding += affine.gamma(1, op.dtype) * size
        return parts

    def _shift(self, shift: jax.Array, size: jax.Array, rows: Coefficients, op: Op) -> None:
        self.intercept += shift
        if self.rounding is not None:
            room = affine.enlargement(op.dtype)
            self.rounding += affine.gamma(op.size + 2, op.dtype) * coefficients.charge(rows, size + room)
            self.rounding += affine.gamma(1, op.dtype) * (jnp.abs(self.intercept) + room)


def concretize(
    region_leaves: Sequence[regions.Region],
    incoming: Sequence,
    carry: Carry,
    void: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Lower bounds of the rows over the region, and bounds on their rounding error.

    What is undefined or overflowed, and `void` (nothing may be certified), give minus infinity.
    """
    lower, rounding = carry
    for region, rows in zip(region_leaves, incoming, strict=True):
        if rows is None:
            continue
        lower = lower + coefficients.minimum(rows, region)
        if rounding is not None:
            terms = regions.terms(region)
            room = affine.enlargement(lower.dtype)
            size = coefficients.charge(rows, regions.magnitude(region) + room)
            rounding = rounding + affine.gamma(terms, lower.dtype) * size
            rounding = rounding + affine.gamma(1, lower.dtype) * (jnp.abs(lower) + room)
    rounding = None if rounding is None else jnp.where(jnp.isnan(rounding), jnp.inf, rounding)
    return jnp.where((lower < jnp.inf) & ~void, lower, -jnp.inf), rounding
