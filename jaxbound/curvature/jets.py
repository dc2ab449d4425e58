"""Interval jets: proved enclosures of a scalar function and its first two derivatives on many cells at once.

A *cell* is an interval [a, b] of the real variable z. For every instruction of a program its *jet* is a set of
intervals that contain value, first and second derivative of that intermediate function, in real arithmetic:

    track 0    at every point of the open cell (a, b);
    track 1    the limit as z falls to a;        track 2    the limit as z rises to b.

The arithmetic is that of `intervals.py`: what is exactly zero stays exactly zero, so that "linear" is a proof.
Elementary functions come from the table in `elementary.py`, with infinite slopes at the ends of their domains.

Cancellation is fought with the mean value theorem: on a cell of width w, `f(z)` lies in `f(a) + [0, w] f'` and in
`f(b) - [0, w] f'` (`tighten`); quotients go through the Wronskian `x'y - xy'`, square roots through `2uu'' - u'^2`,
which is constant where u is a quadratic.

Comparisons are decided by the sign of the difference on the open cell; a difference that reaches 0 only at an end of
the cell is decided if it is strictly monotone. An undecided maximum is continuous with an unknown second derivative; an
undecided choice may jump. `0 * (unknown but finite) = 0`, which is what lets a learned slope stay linear.

Beside its intervals a jet says on which cells it is certainly *defined*: has a real value, with real values in all that
it is made of. What a decided choice throws away does not count; limits say nothing of it.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from jaxbound.curvature.elementary import (
    CUBE_ROOT,
    ELEMENTARY,
    FINE,
    ROOT,
    X_LOG_X,
    Elementary,
    power,
    range_of,
    sine_range,
)
from jaxbound.curvature.intervals import LARGEST, ONE, TINY, WHOLE, Array, Interval, stack, up, where


class UnsupportedError(Exception):
    """An instruction has no rule here; the caller must relax the program's parts one by one."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """A batch of cells `[left, right]`, and the decisions taken on them so far.

    `within`: values on an open cell are those of its points where they are defined; else unknown if there are others.
    """

    left: Array
    right: Array
    within: bool = False
    decisions: list[Array] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def tracks(self) -> int:
        """Three, or one where all cells are points."""
        return 3 if (self.left < self.right).any() else 1

    @functools.cached_property
    def at_end(self) -> Array:
        """Which entries are limits: there a pole leaves nothing to say, in the open cell it does."""
        return np.arange(self.tracks * self.left.size) >= (self.left.size if self.tracks == 3 else 0)

    def variable(self) -> "Jet":
        """The jet of z itself; a limit at infinity is only known to lie in its cell."""
        lower, upper = [self.left], [self.right]
        if self.tracks == 3:
            lower += [self.left, np.where(np.isinf(self.right), self.left, self.right)]
            upper += [np.where(np.isinf(self.left), self.right, self.left), self.right]
        orders = Interval(np.concatenate(lower), np.concatenate(upper))
        yes = np.ones(orders.lower.shape, bool)
        one, zero = Interval(1.0 * yes, 1.0 * yes), Interval(0.0 * yes, 0.0 * yes)
        return Jet(self, stack(orders, one, zero), yes, yes, np.ones(self.left.shape, bool))

    def constant(self, lower: float, upper: float) -> "Jet":
        """The jet of a constant known to lie in `[lower, upper]`."""
        zeros = np.zeros(self.tracks * self.left.size)
        finite = np.full(zeros.shape, bool(lower < math.inf and upper > -math.inf))
        orders = stack(Interval(zeros + lower, zeros + upper), Interval(zeros, zeros), Interval(zeros, zeros))
        return Jet(self, orders, finite, finite, np.ones(self.left.shape, bool))

    def tighten(self, orders: Interval, valid: Array) -> Interval:
        """Cut every order on the cell track by the mean value theorem from both ends, in place.

        `valid[k]` says that order k is continuous on the closed cell with order k + 1 as its derivative.
        """
        if self.tracks == 1:
            return orders
        count = self.left.size
        body, left, right = orders[:, :count], orders[:-1, count : 2 * count], orders[:-1, 2 * count :]
        step = Interval(np.zeros_like(self.left), up(self.right - self.left))[None] * body[1:]
        cut = body[:-1] & where(valid[:, :count], (left + step) & (right - step), WHOLE)
        orders.lower[:-1, :count], orders.upper[:-1, :count] = cut
        return orders


@dataclasses.dataclass(frozen=True)
class Jet:
    """Enclosures of value, first and second derivative: `orders` has shape (3, tracks * cells), track after track.

    `continuous`: defined, finite and continuous on the closed cell. `smooth`: twice differentiable on the closed cell.
    `defined`, per cell: everywhere in the open cell, or at the point.
    """

    cells: Cells
    orders: Interval
    continuous: Array
    smooth: Array
    defined: Array

    def derive(
        self, orders: Interval, continuous: Array | bool = True, smooth: Array | bool = True,
        defined: Array | bool = True,
    ) -> "Jet":  # fmt: skip
        """A function of this one, tightened; it may lose continuity and smoothness."""
        continuous, smooth = self.continuous & continuous, self.smooth & smooth
        orders = self.cells.tighten(orders, np.stack([continuous, smooth]))
        return Jet(self.cells, orders, continuous, smooth, self.defined & defined)

    def inside(self, low: float, high: float) -> Array:
        """Per cell, whether the value lies strictly between two ends; a limit that it runs to is not reached."""
        (least, slope), (most, steep) = (end[:2, : self.cells.left.size] for end in self.orders)
        runs = self.continuous[: self.cells.left.size] & ((slope > 0) | (steep < 0))
        runs &= self.cells.left < self.cells.right
        above = (low == -math.inf) | (least > low) | (least == low) & runs
        return above & ((high == math.inf) | (most < high) | (most == high) & runs)

    def __neg__(self) -> "Jet":
        return dataclasses.replace(self, orders=-self.orders)

    def __add__(self, other: "Jet") -> "Jet":
        return self.derive(self.orders + other.orders, other.continuous, other.smooth, other.defined)

    def __sub__(self, other: "Jet") -> "Jet":
        return self + -other

    def __mul__(self, other: "Jet") -> "Jet":
        terms = self.orders[[0, 1, 0, 2, 1, 0]] * other.orders[[0, 0, 1, 0, 1, 2]]
        orders = stack(terms[0], terms[1] + terms[2], terms[3] + terms[4].twice() + terms[5])
        return self.derive(orders, other.continuous, other.smooth, other.defined)

    def squared(self) -> "Jet":
        """`x^2`."""
        squares, products = self.orders[:2].squared(), self.orders[[0, 0]] * self.orders[1:]
        return self.derive(stack(squares[0], products[0].twice(), (squares[1] + products[1]).twice()))

    def __truediv__(self, other: "Jet") -> "Jet":
        """`q' = W / y^2`, `q'' = W' / y^2 - 2 W y' / y^3` with the Wronskian `W = x'y - xy'`, `W' = x''y - xy''`."""
        x, y = self.orders, other.orders
        zero = (y.lower[0] <= 0) & (y.upper[0] >= 0)
        continuous, smooth = other.continuous & ~zero, other.smooth & ~zero
        defined = other.defined & (other.inside(0.0, math.inf) | other.inside(-math.inf, 0.0))
        if not (y.lower[1:].any() or y.upper[1:].any()):
            return self.derive(x / y[:1], continuous, smooth, defined)
        products = x[[1, 2, 0, 0]] * y[[0, 0, 1, 2]]
        wronskian = self.cells.tighten(products[:2] - products[2:], (self.smooth & smooth)[None])
        inverse = ONE[None] / y[:1]
        slopes = wronskian * inverse.squared()
        orders = stack(x[0] / y[0], slopes[0], slopes[1] - (slopes[0] * y[1] * inverse[0]).twice())
        return self.derive(where(zero & self.cells.at_end, WHOLE, orders), continuous, smooth, defined)

    def compose(self, outer: Interval, continuous: Array | bool = True, singular: Array | bool = False) -> "Jet":
        """The chain rule; `outer` encloses value and derivatives of a function, not smooth where `singular`."""
        x = self.orders
        terms = outer[[1, 2, 1]] * stack(x[1], x[1].squared(), x[2])
        slopes = where(singular & self.cells.at_end, WHOLE, stack(terms[0], terms[1] + terms[2]))
        return self.derive(stack(outer[0], slopes[0], slopes[1]), continuous, np.logical_not(singular))


class Truth(NamedTuple):
    """A boolean on every open cell: can it be true, can it be false, and is what it compares defined?"""

    true: Array
    false: Array
    defined: Array

    def __invert__(self) -> "Truth":
        return Truth(self.false, self.true, self.defined)

    def __and__(self, other: "Truth") -> "Truth":
        return Truth(self.true & other.true, self.false | other.false, self.defined & other.defined)

    def __or__(self, other: "Truth") -> "Truth":
        return Truth(self.true | other.true, self.false & other.false, self.defined & other.defined)


def elementary(function: Elementary, x: Jet) -> Jet:
    """The jet of an elementary function of x."""
    argument = x.orders[0]
    outside, singular = function.leaves(argument), function.touches(argument)
    jet = x.compose(function.orders(argument), ~outside & (~singular | function.closed), singular | outside)
    count, (low, high) = x.cells.left.size, function.domain
    defined = ~outside[:count] if function.closed else x.inside(low, high)
    orders = where(outside, WHOLE, jet.orders)
    if x.cells.within:
        values = function.orders(Interval(*(np.clip(end, low, high) for end in argument)))[0]
        orders = stack(where(outside, values, orders[0]), orders[1], orders[2])
    return dataclasses.replace(jet, orders=orders, defined=x.defined & defined)


def sine(x: Jet, quarter: int) -> Jet:
    """The jet of `sin(x + quarter * pi / 2)`."""
    return x.compose(stack(*(sine_range(x.orders[0], quarter + k) for k in range(3))))


def square_root(x: Jet) -> Jet:
    """`s'' = (2uu'' - u'^2) / (4 u^(3/2))`, whose numerator is constant on a cell where u'' is."""
    root, count, value, second = elementary(ROOT, x), x.cells.left.size, x.orders[0], x.orders[2]
    numerator = (value * second).twice() - x.orders[1].squared()
    quadratic = (second.lower == second.upper)[:count] & x.smooth[:count]
    limits = numerator[(x.cells.tracks - 2) * count :][:count] & numerator[-count:]
    numerator = numerator[:count] & where(quadratic, limits, WHOLE)
    positive = value.lower[:count] > 0  # where it is not, the root may have a kink that no derivative shows
    bend = numerator * -range_of(where(positive, value[:count], ONE), ROOT.formulas[2], (), FINE)
    root.orders.lower[2, :count], root.orders.upper[2, :count] = root.orders[2, :count] & where(positive, bend, WHOLE)
    return root.derive(root.orders)


def _difference(x: Jet, y: Jet) -> Jet:
    """`x - y`, where an infinite literal counts as beyond every real number and x equals itself unless undefined."""
    if x is y:
        zero = x.cells.constant(0.0, 0.0)
        return dataclasses.replace(zero, orders=where(x.continuous, zero.orders, WHOLE), defined=x.defined)
    difference = x - y
    (least, most), (low, high), (lower, upper) = x.orders[0], y.orders[0], difference.orders[0]
    above = ((least == np.inf) & (low < np.inf)) | ((high == -np.inf) & (most > -np.inf))
    below = ((low == np.inf) & (least < np.inf)) | ((most == -np.inf) & (high > -np.inf))
    lower[:], upper[:] = np.where(above, LARGEST, lower), np.where(below, -LARGEST, upper)
    return difference


def compare(x: Jet, y: Jet) -> tuple[Truth, Truth]:
    """Whether x is greater than y, and whether they are equal, on the open cells."""
    difference = _difference(x, y)
    lower, upper = difference.orders[0, : x.cells.left.size]
    above, below = difference.inside(0.0, np.inf), difference.inside(-np.inf, 0.0)
    greater = Truth(~(below | (upper <= 0)), ~above, difference.defined)
    return greater, Truth(~(above | below), (lower != 0) | (upper != 0), difference.defined)


def _choose(yes: Array, no: Array, x: Jet, y: Jet, *, jumps: bool) -> Jet:
    """x where it is decided by yes, y where by no, else their hull: its derivative holds almost everywhere."""
    defined = (x.defined | (no & ~yes)) & (y.defined | yes)
    cells, hull = x.cells, x.orders | y.orders
    cells.decisions.append(np.where(yes, 1, np.where(no, 2, 0)).astype(np.int8))
    yes, no = np.tile(yes, cells.tracks), np.tile(no & ~yes, cells.tracks)
    hull.lower[2], hull.upper[2] = -np.inf, np.inf
    orders = where(yes, x.orders, where(no, y.orders, hull))
    continuous = np.where(yes, x.continuous, y.continuous & (no | (x.continuous & (not jumps))))
    return Jet(cells, orders, continuous, np.where(yes, x.smooth, no & y.smooth), defined)


def select(predicate: Any, on_false: Any, on_true: Any) -> Any:
    """A choice between two jets, or two booleans; where it is not decided a jet may jump."""
    if isinstance(on_true, Truth):
        return ~predicate & on_false | predicate & on_true
    jet = _choose(~predicate.false, ~predicate.true, on_true, on_false, jumps=True)
    return dataclasses.replace(jet, defined=jet.defined & predicate.defined)


def maximum(x: Jet, y: Jet) -> Jet:
    """The larger of two; at least as large as both where it is not decided which."""
    orders = _difference(x, y).orders[0, : x.cells.left.size]
    jet = _choose(orders.lower >= 0, orders.upper <= 0, x, y, jumps=False)
    jet.orders.lower[0] = np.maximum(jet.orders.lower[0], np.maximum(x.orders.lower[0], y.orders.lower[0]))
    return dataclasses.replace(jet, defined=x.defined & y.defined)


def absolute(x: Jet) -> Jet:
    """The larger of x and -x."""
    jet = maximum(x, -x)
    jet.orders.lower[0] = np.maximum(jet.orders.lower[0], 0.0)
    return jet


def sign(x: Jet) -> Jet:
    """-1, 0 or 1."""
    zero, one = x.cells.constant(0.0, 0.0), x.cells.constant(1.0, 1.0)
    return select(compare(x, zero)[0], select(compare(zero, x)[0], zero, -one), one)


def convert(cells: Cells, x: Jet | Truth, new_dtype: object) -> Jet | Truth:
    """The identity from real to floating point; a boolean becomes 0 or 1."""
    kind = getattr(new_dtype, "__name__", None) or str(new_dtype)
    if isinstance(x, Truth):
        return x if kind == "bool" else select(x, cells.constant(0.0, 0.0), cells.constant(1.0, 1.0))
    if not kind.startswith(("float", "bfloat")):
        raise UnsupportedError(f"convert_element_type to {kind}")
    return x


def raised_to(x: Jet, y: float) -> Jet:
    """`x ** y` for a literal y."""
    if y in (-1, 0, 1, 2):
        one = x.cells.constant(1.0, 1.0)
        return one / x if y == -1 else (one, x, x.squared())[int(y)]
    if y < 0 and y == int(y):
        if y % 2 == 0:
            return elementary(power(y), absolute(x))
        return sign(x) * elementary(power(y), absolute(x))
    return square_root(x) if y == 0.5 else elementary(power(y), x)


def general_power(x: Jet, y: Jet) -> Jet:
    """`x ** y`, one of them a literal."""
    literal = [(np.ptp([*u.orders], axis=(0, 2)) == 0).all() and not u.orders.lower[1:].any() for u in (x, y)]
    base, exponent = (float(u.orders.lower[0, 0]) for u in (x, y))
    if literal[1] and math.isfinite(exponent):
        return raised_to(x, exponent)
    if not (literal[0] and 0 < base < math.inf):
        raise UnsupportedError("pow of two variables")
    margin = abs(math.log(base)) * FINE + TINY
    rate = y.cells.constant(math.log(base) - margin, math.log(base) + margin)
    return elementary(ELEMENTARY["exp"], y * rate)


def cube_root(x: Jet) -> Jet:
    """By that of the absolute value."""
    return sign(x) * elementary(CUBE_ROOT, absolute(x))


def times_its_logarithm(x: Jet) -> Jet:
    """`x log x` for x > 0, with the limit 0 at 0."""
    jet = elementary(X_LOG_X, x)
    return dataclasses.replace(jet, defined=x.defined & x.inside(0.0, math.inf))


def sine_over(x: Jet) -> Jet:
    """`sin(x) / x` with the limit 1 at 0, of which more is known there than of a quotient.

    By `sinc^(k)(x) = integral over t in [0, 1] of t^k cos(t x + k pi / 2)`, and Taylor's bounds of the cosine.
    """
    quotient, size = sine(x, 0) / x, x.orders[0]
    square, zero = size.squared(), np.zeros(size.lower.shape)
    third, one = ONE.over(3.0), Interval(zero + 1.0, zero + 1.0)
    value = Interval((one - square.over(6.0)).lower, zero + 1.0)
    slope = -size.over(3.0) | ((size * square).over(30.0) - size.over(3.0))
    bend = Interval(zero - third.upper, (square.over(10.0) - third).upper)
    known = stack(value, slope, bend)
    jet = x.compose(where(np.isfinite(size.lower) & np.isfinite(size.upper), known, WHOLE))
    return dataclasses.replace(jet, orders=jet.orders & quotient.orders, defined=quotient.defined)
