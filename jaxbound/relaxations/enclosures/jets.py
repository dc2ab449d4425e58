"""Interval jets: proved enclosures of a scalar function and its first two derivatives on many cells at once.

A *cell* is an interval [a, b] of the real variable z. For every instruction of a program its *jet* is a set of
intervals that contain value, first and second derivative of that intermediate function, in real arithmetic:

    track 0    at every point of the open cell (a, b);
    track 1    the limit as z falls to a;        track 2    the limit as z rises to b.

Sums and products are error-free transformations (Knuth, Dekker), rounded outward only where they are inexact, so that
what is exactly zero stays exactly zero: "linear" is then a proof. Elementary functions are evaluated at both ends of
their argument and at the turning points between, and widened by a stated error.

Cancellation is fought with the mean value theorem: on a cell of width w, `f(z)` lies in `f(a) + [0, w] f'` and in
`f(b) - [0, w] f'` (`_tighten`); quotients go through the Wronskian `x'y - xy'`, square roots through `2uu'' - u'^2`,
which is constant where u is a quadratic.

Comparisons are decided by the sign of the difference on the open cell; a difference that reaches 0 only at an end of
the cell is decided if it is strictly monotone. An undecided maximum is continuous with an unknown second derivative; an
undecided choice may jump. `0 * (unknown but finite) = 0`, which is what lets a learned slope stay linear.

Length: intervals, jets and the table of primitives are one chain of trust, with one caller, `curvature.py`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

_TINY = 2.0**-1021  # absorbs every underflow, flushed to zero or not
_LARGEST = float(np.finfo(np.float64).max)
_UNIT = 2.0**-53
_FINE, _ROUGH, _COARSE = 16 * _UNIT, 48 * _UNIT, 1e-13  # relative errors of formulas, see `Elementary`
_SPLIT = 134217729.0  # 2**27 + 1


class UnsupportedError(Exception):
    """An instruction has no rule here; the caller must relax the program's parts one by one."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The closed intervals `[lower, upper]`, elementwise; infinite ends mean unbounded, not infinite values."""

    lower: Array
    upper: Array

    def __iter__(self) -> Iterator[Array]:
        return iter((self.lower, self.upper))

    def __getitem__(self, index: Any) -> "Interval":
        return Interval(self.lower[index], self.upper[index])

    def __neg__(self) -> "Interval":
        return Interval(-self.upper, -self.lower)

    def __and__(self, other: "Interval") -> "Interval":
        return Interval(np.maximum(self.lower, other.lower), np.minimum(self.upper, other.upper))

    def __or__(self, other: "Interval") -> "Interval":
        return Interval(np.minimum(self.lower, other.lower), np.maximum(self.upper, other.upper))

    def __add__(self, other: "Interval") -> "Interval":
        a, b = np.stack([*self]), np.stack([*other])
        total = a + b
        part = total - a
        inexact = ((a - (total - part)) + (b - part) != 0) & np.isfinite(a) & np.isfinite(b)
        lower = np.where(inexact[0], _down(total[0]), total[0])
        upper = np.where(inexact[1], _up(total[1]), total[1])
        return Interval(np.where(np.isnan(lower), -np.inf, lower), np.where(np.isnan(upper), np.inf, upper))

    def __sub__(self, other: "Interval") -> "Interval":
        return self + -other

    def __mul__(self, other: "Interval") -> "Interval":
        x, y = np.broadcast_arrays(np.stack([*self]), np.stack([*other]))
        a, b = x[:, None], y[None]
        product = np.where((a == 0) | (b == 0), 0.0, a * b)
        inexact = _inexact_product(a, b, product)
        return _outward(product.reshape(4, *x.shape[1:]), inexact.reshape(4, *x.shape[1:]))

    def __truediv__(self, other: "Interval") -> "Interval":
        """The quotients on the part of `other` that is not 0; the whole line where it has 0 inside, or is 0."""
        (low, high), (y_low, y_high) = np.broadcast_arrays(np.stack([*self]), np.stack([*other]))
        y_low, y_high = y_low + 0.0, np.where(y_high == 0, -0.0, y_high)  # a zero end is approached from inside
        a, b = np.stack([low, low, high, high]), np.stack([y_low, y_high, y_low, y_high])
        quotient = np.where((a == 0) | np.isinf(b), np.copysign(0.0, a) * np.sign(b), a / b)
        inexact = ((quotient * b != a) | _inexact_product(quotient, b, a)) & (a != 0)
        whole = ((y_low < 0) & (y_high > 0)) | ((y_low == 0) & (y_high == 0))
        return _where(whole, _WHOLE, _outward(quotient, inexact))

    def twice(self) -> "Interval":
        """`2 x`."""
        return self + self

    def squared(self) -> "Interval":
        """`x^2`, not negative."""
        far = np.maximum(np.abs(self.lower), np.abs(self.upper))
        near = np.minimum(np.abs(self.lower), np.abs(self.upper))
        ends = np.stack([np.where((self.lower <= 0) & (self.upper >= 0), 0.0, near), far])
        return _outward(ends * ends, _inexact_product(ends, ends, ends * ends))


_WHOLE, _ONE = Interval(np.array(-np.inf), np.array(np.inf)), Interval(np.ones(1), np.ones(1))


def _down(x: Array) -> Array:
    return np.nextafter(x - _TINY, -np.inf)


def _up(x: Array) -> Array:
    return np.nextafter(x + _TINY, np.inf)


def _inexact_product(x: Array, y: Array, product: Array) -> Array:
    """Dekker's test: where `product` is not proved to be exactly `x * y`."""
    x_high, y_high = _SPLIT * x - (_SPLIT * x - x), _SPLIT * y - (_SPLIT * y - y)
    x_low, y_low = x - x_high, y - y_high
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return ~((error == 0) & (np.abs(product) > 1e-270)) & (x != 0) & (y != 0)


def _outward(candidates: Array, inexact: Array, relative: float = 0.0) -> Interval:
    """The hull over axis 0 of candidates whose sign bits are right and whose inexact members are rounded outward."""
    negative, finite = np.signbit(candidates), np.clip(candidates, -_LARGEST, _LARGEST)
    margin = relative * np.abs(finite)
    low = np.where(inexact & (candidates > -np.inf), _down(finite - margin), candidates)
    high = np.where(inexact & (candidates < np.inf), _up(finite + margin), candidates)
    low = np.where(negative, low, np.maximum(low, 0.0))
    high = np.where(negative, np.minimum(high, 0.0), high)
    return Interval(np.where(np.isnan(low), -np.inf, low).min(0), np.where(np.isnan(high), np.inf, high).max(0))


def _where(condition: Array, x: Interval, y: Interval) -> Interval:
    return Interval(np.where(condition, x.lower, y.lower), np.where(condition, x.upper, y.upper))


def _stack(*rows: Interval) -> Interval:
    return Interval(np.stack([row.lower for row in rows]), np.stack([row.upper for row in rows]))


@dataclasses.dataclass(frozen=True)
class Cells:
    """A batch of cells `[left, right]`, and the decisions taken on them so far."""

    left: Array
    right: Array
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
        return Jet(self, _stack(orders, Interval(1.0 * yes, 1.0 * yes), Interval(0.0 * yes, 0.0 * yes)), yes, yes)

    def constant(self, lower: float, upper: float) -> "Jet":
        """The jet of a constant known to lie in `[lower, upper]`."""
        zeros = np.zeros(self.tracks * self.left.size)
        finite = np.full(zeros.shape, bool(lower < math.inf and upper > -math.inf))
        orders = _stack(Interval(zeros + lower, zeros + upper), Interval(zeros, zeros), Interval(zeros, zeros))
        return Jet(self, orders, finite, finite)

    def tighten(self, orders: Interval, valid: Array) -> Interval:
        """Cut every order on the cell track by the mean value theorem from both ends, in place.

        `valid[k]` says that order k is continuous on the closed cell with order k + 1 as its derivative.
        """
        if self.tracks == 1:
            return orders
        count = self.left.size
        body, left, right = orders[:, :count], orders[:-1, count : 2 * count], orders[:-1, 2 * count :]
        step = Interval(np.zeros_like(self.left), _up(self.right - self.left))[None] * body[1:]
        cut = body[:-1] & _where(valid[:, :count], (left + step) & (right - step), _WHOLE)
        orders.lower[:-1, :count], orders.upper[:-1, :count] = cut
        return orders


@dataclasses.dataclass(frozen=True)
class Jet:
    """Enclosures of value, first and second derivative: `orders` has shape (3, tracks * cells), track after track.

    `continuous`: defined, finite and continuous on the closed cell. `smooth`: twice differentiable on the closed cell.
    """

    cells: Cells
    orders: Interval
    continuous: Array
    smooth: Array

    def derive(self, orders: Interval, continuous: Array | bool = True, smooth: Array | bool = True) -> "Jet":
        """A function of this one, tightened; it may lose continuity and smoothness."""
        continuous, smooth = self.continuous & continuous, self.smooth & smooth
        return Jet(self.cells, self.cells.tighten(orders, np.stack([continuous, smooth])), continuous, smooth)

    def __neg__(self) -> "Jet":
        return dataclasses.replace(self, orders=-self.orders)

    def __add__(self, other: "Jet") -> "Jet":
        return self.derive(self.orders + other.orders, other.continuous, other.smooth)

    def __sub__(self, other: "Jet") -> "Jet":
        return self + -other

    def __mul__(self, other: "Jet") -> "Jet":
        terms = self.orders[[0, 1, 0, 2, 1, 0]] * other.orders[[0, 0, 1, 0, 1, 2]]
        orders = _stack(terms[0], terms[1] + terms[2], terms[3] + terms[4].twice() + terms[5])
        return self.derive(orders, other.continuous, other.smooth)

    def squared(self) -> "Jet":
        """`x^2`."""
        squares, products = self.orders[:2].squared(), self.orders[[0, 0]] * self.orders[1:]
        return self.derive(_stack(squares[0], products[0].twice(), (squares[1] + products[1]).twice()))

    def __truediv__(self, other: "Jet") -> "Jet":
        """`q' = W / y^2`, `q'' = W' / y^2 - 2 W y' / y^3` with the Wronskian `W = x'y - xy'`, `W' = x''y - xy''`."""
        x, y = self.orders, other.orders
        zero = (y.lower[0] <= 0) & (y.upper[0] >= 0)
        continuous, smooth = other.continuous & ~zero, other.smooth & ~zero
        if not (y.lower[1:].any() or y.upper[1:].any()):
            return self.derive(x / y[:1], continuous, smooth)
        products = x[[1, 2, 0, 0]] * y[[0, 0, 1, 2]]
        wronskian = self.cells.tighten(products[:2] - products[2:], (self.smooth & smooth)[None])
        inverse = _ONE[None] / y[:1]
        slopes = wronskian * inverse.squared()
        orders = _stack(x[0] / y[0], slopes[0], slopes[1] - (slopes[0] * y[1] * inverse[0]).twice())
        return self.derive(_where(zero & self.cells.at_end, _WHOLE, orders), continuous, smooth)

    def compose(self, outer: Interval, continuous: Array | bool = True, singular: Array | bool = False) -> "Jet":
        """The chain rule; `outer` encloses value and derivatives of a function, not smooth where `singular`."""
        x = self.orders
        terms = outer[[1, 2, 1]] * _stack(x[1], x[1].squared(), x[2])
        slopes = _where(singular & self.cells.at_end, _WHOLE, _stack(terms[0], terms[1] + terms[2]))
        return self.derive(_stack(outer[0], slopes[0], slopes[1]), continuous, np.logical_not(singular))


class Truth(NamedTuple):
    """A boolean on every open cell: can it be true, can it be false?"""

    true: Array
    false: Array

    def __invert__(self) -> "Truth":
        return Truth(self.false, self.true)

    def __and__(self, other: "Truth") -> "Truth":
        return Truth(self.true & other.true, self.false | other.false)

    def __or__(self, other: "Truth") -> "Truth":
        return Truth(self.true | other.true, self.false & other.false)


Formula = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Elementary:
    """A function by formulas for value, first and second derivative, which must get their sign bits right.

    `turning[k]` are the points where formula k turns; `domain` is where the function begins, there `closed` or not;
    `floor` and `ceiling` bound its values. `errors` bound the relative errors of the formulas: fine with square roots,
    exp, log and C's functions (1 unit in the last place each), rough with NumPy's others (4), coarse for odd powers.
    """

    formulas: tuple[Formula, Formula, Formula]
    turning: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = ((), (), ())
    domain: float = -math.inf
    closed: bool = False
    floor: float = -math.inf
    ceiling: float = math.inf
    errors: tuple[float, float, float] = (_FINE, _FINE, _FINE)

    def __call__(self, x: Jet) -> Jet:
        """The jet of this function of x."""
        argument = x.orders[0]
        outside, singular = argument.lower < self.domain, (argument.lower == self.domain) & (self.domain > -math.inf)
        rows = zip(self.formulas, self.turning, self.errors, strict=True)
        outer = _stack(*(_range(argument, *row) for row in rows))
        outer.lower[0] = np.maximum(outer.lower[0], self.floor)
        outer.upper[0] = np.minimum(outer.upper[0], self.ceiling)
        jet = x.compose(_where(outside, _WHOLE, outer), ~outside & (~singular | self.closed), singular | outside)
        return dataclasses.replace(jet, orders=_where(outside, _WHOLE, jet.orders))


def _range(argument: Interval, formula: Formula, turning: tuple[float, ...], error: float) -> Interval:
    low, high = argument.lower + 0.0, argument.upper + 0.0
    points = np.stack([low, high, *(np.clip(point, low, high) for point in turning)])
    return _outward(values := formula(points), (points != 0) | (values != 0), error)


def _from_math(function: Callable[[float], float]) -> Formula:
    return lambda x: np.array([function(value) for value in x.ravel().tolist()]).reshape(x.shape)


def _bell(x: Array) -> Array:
    """`2 / sqrt(pi) * exp(-x^2)`, with the square split so that its rounding does not grow with x; zero beyond 40."""
    x = np.clip(x, -40.0, 40.0)
    high = x.astype(np.float32).astype(np.float64)
    return 2.0 / math.sqrt(math.pi) * np.exp(-high * high) * np.exp(-(x - high) * (x + high))


def _bell_slope(x: Array) -> Array:
    return -2.0 * np.clip(x, -40.0, 40.0) * _bell(x)


def _sech_squared(x: Array) -> Array:
    return 4.0 * np.exp(-2.0 * np.abs(x)) / (1.0 + np.exp(-2.0 * np.abs(x))) ** 2


def _tanh_bend(x: Array) -> Array:
    return -2.0 * np.tanh(x) * _sech_squared(x)


def _sigmoid(x: Array) -> Array:
    decay = np.exp(-np.abs(x))
    return np.where(x < 0, decay, 1.0) / (1.0 + decay)


def _inverse_length(x: Array) -> Array:
    return 1.0 / np.hypot(1.0, x)


def _cosine_of_angle(x: Array) -> Array:
    """`x / sqrt(1 + x^2)`."""
    return np.where(np.isinf(x), np.sign(x), x / np.hypot(1.0, x))


def _power(exponent: float) -> Elementary:
    """`x ** exponent`: on the whole line for a whole number of at least 2, on `x >= 0` otherwise."""

    def formula(order: int, coefficient: float) -> Formula:
        return lambda x: coefficient * np.power(x, exponent - order)

    formulas = formula(0, 1.0), formula(1, exponent), formula(2, exponent * (exponent - 1.0))
    errors = _ALL_ROUGH if exponent == int(exponent) else (_COARSE, _COARSE, _COARSE)
    if exponent >= 2 and exponent == int(exponent):
        return Elementary(formulas, ((0.0,), (0.0,), (0.0,)), errors=errors)
    return Elementary(formulas, domain=0.0, closed=exponent > 0, errors=errors)


_ALL_ROUGH, _VALUE_ROUGH, _LN2 = (_ROUGH, _ROUGH, _ROUGH), (_ROUGH, _FINE, _FINE), math.log(2.0)
_TANH, _LOGISTIC, _BELL, _ATAN = (
    ((), (0.0,), (-bend, bend)) for bend in (0.6584789484624084, 1.3169578969248166, math.sqrt(1 / 2), math.sqrt(1 / 3))
)

# fmt: off
_ELEMENTARY = {
    "exp": Elementary((np.exp, np.exp, np.exp)),
    "exp2": Elementary((np.exp2, lambda x: _LN2 * np.exp2(x), lambda x: _LN2**2 * np.exp2(x)), errors=_ALL_ROUGH),
    "expm1": Elementary((np.expm1, np.exp, np.exp), floor=-1.0, errors=_VALUE_ROUGH),
    "log": Elementary((np.log, lambda x: 1.0 / x, lambda x: -1.0 / x / x), domain=0.0),
    "log1p": Elementary(
        (np.log1p, lambda x: 1.0 / (1.0 + x), lambda x: -1.0 / (1.0 + x) ** 2), domain=-1.0, errors=_VALUE_ROUGH),
    "tanh": Elementary(
        (np.tanh, _sech_squared, _tanh_bend), _TANH, floor=-1.0, ceiling=1.0, errors=(_ROUGH, _FINE, _ROUGH)),
    "logistic": Elementary(
        (_sigmoid, lambda x: 0.25 * _sech_squared(0.5 * x), lambda x: 0.125 * _tanh_bend(0.5 * x)),
        _LOGISTIC, ceiling=1.0, errors=(_FINE, _FINE, _ROUGH)),
    "erf": Elementary((_from_math(math.erf), _bell, _bell_slope), _BELL, floor=-1.0, ceiling=1.0),
    "erfc": Elementary((_from_math(math.erfc), lambda x: -_bell(x), lambda x: -_bell_slope(x)), _BELL, ceiling=2.0),
    "atan": Elementary(
        (np.arctan, lambda x: _inverse_length(x) ** 2, lambda x: -2.0 * _cosine_of_angle(x) * _inverse_length(x) ** 3),
        _ATAN, errors=_ALL_ROUGH),
    "asinh": Elementary(
        (np.arcsinh, _inverse_length, lambda x: -_cosine_of_angle(x) * _inverse_length(x) ** 2),
        _BELL, errors=_ALL_ROUGH),
    "sinh": Elementary((np.sinh, np.cosh, np.sinh), ((), (0.0,), ()), errors=_ALL_ROUGH),
    "cosh": Elementary((np.cosh, np.sinh, np.cosh), ((0.0,), (), (0.0,)), errors=_ALL_ROUGH),
    "rsqrt": Elementary(
        (lambda x: 1.0 / np.sqrt(x), lambda x: -0.5 / (x * np.sqrt(x)), lambda x: 0.75 / (x * x * np.sqrt(x))),
        domain=0.0),
}
_ROOT = Elementary(
    (np.sqrt, lambda x: 0.5 / np.sqrt(x), lambda x: -0.25 / (x * np.sqrt(x))), domain=0.0, closed=True)
# fmt: on


def _sine(x: Jet, quarter: int) -> Jet:
    """The jet of `sin(x + quarter * pi / 2)`."""
    return x.compose(_stack(*(_sine_range(x.orders[0], quarter + k) for k in range(3))))


def _sine_range(argument: Interval, quarter: int) -> Interval:
    function, sign = (math.cos if quarter % 2 else math.sin), (-1.0 if quarter % 4 > 1 else 1.0)
    far = ~(np.maximum(np.abs(argument.lower), np.abs(argument.upper)) < 1e6)
    ends = np.stack([np.where(far, 0.0, argument.lower), np.where(far, 0.0, argument.upper)])
    values = sign * _from_math(function)(ends)
    lower, upper = _outward(values, (ends != 0) | (values != 0), _FINE)
    turns = ends / (2.0 * math.pi) + 0.25 * quarter  # maxima at 1/4 plus a whole number, minima at 3/4
    peak, trough = ((np.floor(turns[1] - c + 1e-9) > np.floor(turns[0] - c - 1e-9)) for c in (0.25, 0.75))
    lower, upper = np.where(trough, -1.0, np.maximum(lower, -1.0)), np.where(peak, 1.0, np.minimum(upper, 1.0))
    return Interval(np.where(far, -1.0, lower), np.where(far, 1.0, upper))


def _square_root(x: Jet) -> Jet:
    """`s'' = (2uu'' - u'^2) / (4 u^(3/2))`, whose numerator is constant on a cell where u'' is."""
    root, count, value, second = _ROOT(x), x.cells.left.size, x.orders[0], x.orders[2]
    numerator = (value * second).twice() - x.orders[1].squared()
    quadratic = (second.lower == second.upper)[:count] & x.smooth[:count]
    limits = numerator[(x.cells.tracks - 2) * count :][:count] & numerator[-count:]
    numerator = numerator[:count] & _where(quadratic, limits, _WHOLE)
    positive = value.lower[:count] > 0  # where it is not, the root may have a kink that no derivative shows
    bend = numerator * -_range(_where(positive, value[:count], _ONE), _ROOT.formulas[2], (), _FINE)
    root.orders.lower[2, :count], root.orders.upper[2, :count] = root.orders[2, :count] & _where(positive, bend, _WHOLE)
    return root.derive(root.orders)


def _difference(x: Jet, y: Jet) -> Jet:
    """`x - y`, where an infinite literal counts as beyond every real number and x equals itself unless undefined."""
    if x is y:
        zero = x.cells.constant(0.0, 0.0)
        return dataclasses.replace(zero, orders=_where(x.continuous, zero.orders, _WHOLE))
    difference = x - y
    (least, most), (low, high), (lower, upper) = x.orders[0], y.orders[0], difference.orders[0]
    above = ((least == np.inf) & (low < np.inf)) | ((high == -np.inf) & (most > -np.inf))
    below = ((low == np.inf) & (least < np.inf)) | ((most == -np.inf) & (high > -np.inf))
    lower[:], upper[:] = np.where(above, _LARGEST, lower), np.where(below, -_LARGEST, upper)
    return difference


def _compare(x: Jet, y: Jet) -> tuple[Truth, Truth]:
    """Whether x is greater than y, and whether they are equal, on the open cells."""
    difference, cells, count = _difference(x, y), x.cells, x.cells.left.size
    (lower, slope), (upper, steep) = (end[:2, :count] for end in difference.orders)
    monotone = difference.continuous[:count] & ((slope > 0) | (steep < 0)) & (cells.left < cells.right)
    above, below = (lower > 0) | (lower == 0) & monotone, (upper < 0) | (upper == 0) & monotone
    greater = Truth(~(below | (upper <= 0)), ~above)
    return greater, Truth(~(above | below), (lower != 0) | (upper != 0))


def _choose(yes: Array, no: Array, x: Jet, y: Jet, *, jumps: bool) -> Jet:
    """x where it is decided by yes, y where by no, else their hull: its derivative holds almost everywhere."""
    cells, hull = x.cells, x.orders | y.orders
    cells.decisions.append(np.where(yes, 1, np.where(no, 2, 0)).astype(np.int8))
    yes, no = np.tile(yes, cells.tracks), np.tile(no & ~yes, cells.tracks)
    hull.lower[2], hull.upper[2] = -np.inf, np.inf
    orders = _where(yes, x.orders, _where(no, y.orders, hull))
    continuous = np.where(yes, x.continuous, y.continuous & (no | (x.continuous & (not jumps))))
    return Jet(cells, orders, continuous, np.where(yes, x.smooth, no & y.smooth))


def _select(predicate: Any, on_false: Any, on_true: Any) -> Any:
    if isinstance(on_true, Truth):
        return ~predicate & on_false | predicate & on_true
    return _choose(~predicate.false, ~predicate.true, on_true, on_false, jumps=True)


def _maximum(x: Jet, y: Jet) -> Jet:
    orders = _difference(x, y).orders[0, : x.cells.left.size]
    jet = _choose(orders.lower >= 0, orders.upper <= 0, x, y, jumps=False)
    jet.orders.lower[0] = np.maximum(jet.orders.lower[0], np.maximum(x.orders.lower[0], y.orders.lower[0]))
    return jet


def _absolute(x: Jet) -> Jet:
    jet = _maximum(x, -x)
    jet.orders.lower[0] = np.maximum(jet.orders.lower[0], 0.0)
    return jet


def _sign(x: Jet) -> Jet:
    zero, one = x.cells.constant(0.0, 0.0), x.cells.constant(1.0, 1.0)
    return _select(_compare(x, zero)[0], _select(_compare(zero, x)[0], zero, -one), one)


def _convert(cells: Cells, x: Jet | Truth, new_dtype: object) -> Jet | Truth:
    """The identity from real to floating point; a boolean becomes 0 or 1."""
    kind = getattr(new_dtype, "__name__", None) or str(new_dtype)
    if isinstance(x, Truth):
        return x if kind == "bool" else _select(x, cells.constant(0.0, 0.0), cells.constant(1.0, 1.0))
    if not kind.startswith(("float", "bfloat")):
        raise UnsupportedError(f"convert_element_type to {kind}")
    return x


def _raise_to(x: Jet, y: float) -> Jet:
    """`x ** y` for a literal y."""
    if y in (-1, 0, 1, 2):
        one = x.cells.constant(1.0, 1.0)
        return one / x if y == -1 else (one, x, x.squared())[int(y)]
    if y < 0 and y == int(y):
        return _power(y)(_absolute(x)) if y % 2 == 0 else _sign(x) * _power(y)(_absolute(x))
    return _square_root(x) if y == 0.5 else _power(y)(x)


def _general_power(x: Jet, y: Jet) -> Jet:
    literal = [(np.ptp([*u.orders], axis=(0, 2)) == 0).all() and not u.orders.lower[1:].any() for u in (x, y)]
    base, exponent = (float(u.orders.lower[0, 0]) for u in (x, y))
    if literal[1] and math.isfinite(exponent):
        return _raise_to(x, exponent)
    if not (literal[0] and 0 < base < math.inf):
        raise UnsupportedError("pow of two variables")
    margin = abs(math.log(base)) * _FINE + _TINY
    return _ELEMENTARY["exp"](y * y.cells.constant(math.log(base) - margin, math.log(base) + margin))


def _cube_root(x: Jet) -> Jet:
    slopes = (lambda u: 1.0 / (3.0 * np.cbrt(u) ** 2)), (lambda u: -2.0 / (9.0 * np.cbrt(u) ** 2 * u))
    return _sign(x) * Elementary((np.cbrt, *slopes), domain=0.0, closed=True, errors=_ALL_ROUGH)(_absolute(x))


# fmt: off
_REAL: dict[str, Callable] = _ELEMENTARY | {
    "add": operator.add, "add_any": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "neg": operator.neg, "abs": _absolute, "sign": _sign, "copy": lambda x: x,
    "max": _maximum, "min": lambda x, y: -_maximum(-x, -y),
    "clamp": lambda lower, x, upper: -_maximum(-_maximum(x, lower), -upper),
    "square": Jet.squared, "sqrt": _square_root, "cbrt": _cube_root, "pow": _general_power, "integer_pow": _raise_to,
    "one_minus_square": lambda x: x.cells.constant(1.0, 1.0) - x.squared(),
    "sin": lambda x: _sine(x, 0), "cos": lambda x: _sine(x, 1), "tan": lambda x: _sine(x, 0) / _sine(x, 1),
    "gt": lambda x, y: _compare(x, y)[0], "le": lambda x, y: ~_compare(x, y)[0],
    "lt": lambda x, y: _compare(y, x)[0], "ge": lambda x, y: ~_compare(y, x)[0],
    "eq": lambda x, y: _compare(x, y)[1], "ne": lambda x, y: ~_compare(x, y)[1],
    "is_finite": lambda x: _compare(x, x)[1],
}
_LOGICAL: dict[str, Callable] = {"and": operator.and_, "or": operator.or_, "not": operator.invert, "copy": lambda x: x}
# fmt: on


def _apply(cells: Cells, name: str, params: dict, operands: list[Jet | Truth]) -> Jet | Truth:
    real = tuple(isinstance(operand, Jet) for operand in operands)
    if name == "convert_element_type":
        return _convert(cells, operands[0], params["new_dtype"])
    rule = (_REAL if all(real) else _LOGICAL if not any(real) else {}).get(name)
    if name == "select_n" and real in ((False, True, True), (False, False, False)):
        rule = _select
    if rule is None:
        raise UnsupportedError(name)
    return rule(*operands, **({"y": params["y"]} if name == "integer_pow" else {}))


class Enclosure(NamedTuple):
    """What is proved on n cells: `orders` (3 orders, 3 tracks, n), or 1 track for points; the rest is per cell."""

    orders: Interval
    continuous: Array
    smooth: Array
    decisions: Array


def enclose(instructions: tuple, left: Array, right: Array) -> Enclosure:
    """Value, first and second derivative of a program on the cells `[left, right]`.

    For every z in the open cell `orders.lower[k, 0] <= sigma^(k)(z) <= orders.upper[k, 0]`, and the one-sided limits
    at the ends lie in `orders[k, 1]` and `orders[k, 2]`; k = 1 holds almost everywhere where a decision is open.

    Args:
        instructions: `(name, params, operands)` in order; the last one is the result.
        left, right: (n,) float64; infinite ends are allowed, `left == right` encloses a point.

    Raises:
        UnsupportedError: an instruction has no rule here.

    Rounding: outward, in float64 on the host.

    >>> enclose((("mul", (), (("z",), ("z",))),), np.array([1.0]), np.array([2.0])).orders.upper[:, 0, 0].tolist()
    [4.0, 4.0, 2.0]
    """
    cells = Cells(left, right)
    variable, results = cells.variable(), []

    def read(kind: str, number: Any = None) -> Jet | Truth:
        if kind != "lit":
            return (
                results[number] if kind == "var" else variable if kind == "z" else cells.constant(-math.inf, math.inf)
            )
        if isinstance(number, (bool, np.bool_)):
            return Truth(np.full(left.shape, bool(number)), np.full(left.shape, not number))
        if float(number) != number:
            raise UnsupportedError("a literal that is not a number, or a whole number beyond float64")
        return cells.constant(float(number), float(number))

    with np.errstate(all="ignore"):
        for name, params, operands in instructions:
            results.append(_apply(cells, name, dict(params), [read(*operand) for operand in operands]))
    result, count = results[-1], left.size
    if isinstance(result, Truth):
        raise UnsupportedError("a boolean result")
    tracks = Interval(*(end.reshape(3, cells.tracks, count) for end in result.orders))
    tracks &= tracks[:, :1]  # limits of what is between
    decisions = np.stack(cells.decisions) if cells.decisions else np.zeros((0, count), np.int8)
    return Enclosure(tracks, result.continuous[:count], result.smooth[:count], decisions)
