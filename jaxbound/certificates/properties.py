"""Properties of a network's outputs and inputs: what a counterexample satisfies.

One convention, that of VNN-LIB: a `Property` describes its own *violations*. It is a disjunction of clauses, each a
conjunction of rows, linear in the flat outputs y and the flat inputs x:

    violated at x   iff   some clause has   outputs @ y + inputs @ x <= offsets   in every row

(and lower <= x <= upper, where the clause has a box). Equality counts as a violation, as a tie of logits does. So the
property is *verified* over a region if for every x of the region every clause has a row whose left side is greater than
its offset, and it is *falsified* by one x at which all rows of a clause hold. A property without clauses is always
verified; a clause without rows is violated everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound.regions import Box


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Clause:
    """Rows that all hold at a counterexample: `outputs @ y + inputs @ x <= offsets`, within the box if there is one.

    Args:
        outputs: float64, shape (rows, outputs).
        offsets: float64, shape (rows,).
        inputs: float64, shape (rows, inputs), or None for rows of outputs alone.
        box: None, or the ends `(lower, upper)`, each float64 of shape (inputs,), of the box in which the clause counts.

    >>> Clause(np.array([[1.0, -1.0]]), np.zeros(1)).holds(x=[0.0], y=[2.0, 3.0])
    True
    """

    outputs: np.ndarray
    offsets: np.ndarray
    inputs: np.ndarray | None = None
    box: tuple[np.ndarray, np.ndarray] | None = None

    def holds(self, x: ArrayLike | Sequence[float], y: ArrayLike | Sequence[float]) -> bool:
        """Whether every row holds at flat arrays x and y, in exact arithmetic."""
        x, y = np.ravel(np.asarray(x, np.float64)), np.ravel(np.asarray(y, np.float64))
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return False
        if self.box is not None and not (np.all(self.box[0] <= x) and np.all(x <= self.box[1])):
            return False
        for row, offset in enumerate(self.offsets):
            left = _exact(self.outputs[row], y)
            if self.inputs is not None:
                left += _exact(self.inputs[row], x)
            if left > (Fraction(float(offset)) if np.isfinite(offset) else offset):
                return False
        return True


def _exact(coefficients: np.ndarray, values: np.ndarray) -> Fraction:
    chosen = np.flatnonzero(coefficients)
    return sum((Fraction(float(coefficients[i])) * Fraction(float(values[i])) for i in chosen), Fraction(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """What a counterexample satisfies: any of the clauses, and of that clause all rows `a @ y + c @ x <= b`.

    Verified over a region: for every x in it, every clause has a row with `a @ y + c @ x > b`. Falsified by an x at
    which all rows of some clause hold; equality counts as a violation.

    Args:
        clauses: `Clause`s; `Property.robust` and `Property.of` write them.

    Reference: the VNN-LIB standard 1.0, whose files state the same set.

    >>> keeps_label = Property.robust(label=0, classes=3)
    >>> keeps_label.violated(x=[0.5], y=[2.0, 1.0, -1.0]), keeps_label.violated(x=[0.5], y=[2.0, 2.0, -1.0])
    (False, True)
    """

    clauses: tuple[Clause, ...]

    @classmethod
    def robust(cls, label: int, classes: int) -> Property:
        """The label's logit is the largest: violated where some other logit is as large.

        Args:
            label: the class, 0 <= label < classes.
            classes: the number of logits.

        Raises:
            ArgumentError: the label is not a class.
        """
        if not 0 <= label < classes:
            raise errors.argument("label", f"is {label}", f"pass a class from 0 to {classes - 1}")
        unit = np.eye(classes)
        others = [other for other in range(classes) if other != label]
        return cls(tuple(Clause((unit[label] - unit[other])[None], np.zeros(1)) for other in others))

    @classmethod
    def of(cls, *clauses: Iterable[Sequence]) -> Property:
        """The property that is violated where all rows of any clause hold.

        Args:
            clauses: lists of rows `(a, b)` or `(a, b, c)`, each `a @ y <= b` or `a @ y + c @ x <= b`.

        Raises:
            ArgumentError: a row is no such pair or triple, or rows differ in length, or a number is not finite.

        >>> Property.of([([1.0, -1.0], 0.0)], [([0.0, 1.0], -3.0)]).violated(x=[0.0], y=[1.0, -4.0])
        True
        """
        return cls(tuple(_clause(number, list(rows)) for number, rows in enumerate(clauses)))

    def violated(self, x: ArrayLike, y: ArrayLike) -> bool:
        """Whether y is a counterexample at x: exact for the float64 values of both; False at NaN and infinities.

        Args:
            x: one example, of any shape.
            y: the network's outputs at x, of any shape.

        Raises:
            ArgumentError: x or y has not the size that the property speaks of.
        """
        for name, given, size in (("x", np.size(x), self.sizes[0]), ("y", np.size(y), self.sizes[1])):
            if size is not None and given != size:
                raise errors.argument(name, f"has {given} numbers, but the property speaks of {size}")
        return any(clause.holds(x, y) for clause in self.clauses)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """How many numbers x and y have; None where the property does not say."""
        y = [clause.outputs.shape[1] for clause in self.clauses]
        x = [clause.inputs.shape[1] for clause in self.clauses if clause.inputs is not None]
        x += [clause.box[0].size for clause in self.clauses if clause.box is not None]
        return (x[0] if x else None), (y[0] if y else None)

    def margin(self, x: ArrayLike, y: ArrayLike) -> jax.Array:
        """How far from a violation y is at x: positive if and only if it is none, up to rounding; boxes are left out.

        Shape (): the least over clauses of the largest `a @ y + c @ x - b` over rows. May be differentiated.
        """
        flat_x, flat_y = jnp.ravel(jnp.asarray(x)), jnp.ravel(jnp.asarray(y))
        least = jnp.asarray(jnp.inf, flat_y.dtype)
        for clause in self.clauses:
            left = clause.outputs @ flat_y - clause.offsets
            if clause.inputs is not None:
                left = left + clause.inputs @ flat_x
            least = jnp.minimum(least, jnp.max(left, initial=-jnp.inf))
        return least

    def parts(self, region: Box) -> list[tuple[Box, Property]]:
        """The regions and properties without boxes that together say the same over a region.

        Clauses with equal boxes share a part, which is the region cut by their box; parts with no point are left out.

        Args:
            region: of any shape, with concrete float64 or float32 ends.
        """
        groups: dict[object, tuple[Box, list[Clause]]] = {}
        for clause in self.clauses:
            key, part = _cut(region, clause.box)
            if part is not None:
                groups.setdefault(key, (part, []))[1].append(dataclasses.replace(clause, box=None))
        return [(box, Property(tuple(clauses))) for box, clauses in groups.values()]


def _cut(region: Box, box: tuple[np.ndarray, np.ndarray] | None) -> tuple[object, Box | None]:
    """The part of a region within a box, with a key for equal parts; None where there is no point."""
    if box is None:
        return "whole", region
    lower, upper = np.asarray(region.lower), np.asarray(region.upper)
    low, high = np.maximum(lower, box[0].reshape(lower.shape)), np.minimum(upper, box[1].reshape(upper.shape))
    if np.array_equal(low, lower) and np.array_equal(high, upper):
        return "whole", region
    return (low.tobytes(), high.tobytes()), Box(low, high) if np.all(low <= high) else None


def _clause(number: int, rows: list[Sequence]) -> Clause:
    try:
        pairs = [(row[0], row[1], row[2] if len(row) == 3 else None) for row in rows]
        outputs = np.asarray([row[0] for row in pairs], np.float64).reshape(len(pairs), -1)
        offsets = np.asarray([row[1] for row in pairs], np.float64).reshape(len(pairs))
        linear = [row[2] for row in pairs if row[2] is not None]
        inputs = None
        if linear:
            nothing = np.zeros(np.size(linear[0]))
            inputs = np.asarray([nothing if row[2] is None else row[2] for row in pairs], np.float64)
            inputs = inputs.reshape(len(pairs), -1)
    except (TypeError, ValueError, IndexError) as fault:
        raise errors.argument(
            "clauses", f"has rows at place {number} that do not fit ({fault})", "pass lists of (a, b) or (a, b, c)"
        ) from fault
    for array in (outputs, offsets, *([] if inputs is None else [inputs])):
        if not np.isfinite(array).all():
            raise errors.argument("clauses", f"has a number at place {number} that is not finite")
    return Clause(outputs, offsets, inputs)
