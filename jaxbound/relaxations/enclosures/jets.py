"""Interval jets: proved enclosures of a scalar function and its first two derivatives on many cells at once.

A *cell* is an interval [a, b] of the real variable z. For every instruction of a program its *jet* is a set of
intervals that contain value, first and second derivative of that intermediate function, in real arithmetic, on *tracks*:

    track 0    at every point of the open cell (a, b);
    track 1    the limit as z falls to a;        track 2    the limit as z rises to b.

Sums and products are error-free transformations (Knuth, Dekker), rounded outward only where they are inexact, so that
what is exactly zero stays exactly zero: "linear" is then a proof. Elementary functions are evaluated at both ends of
their argument and at the turning points between, and widened by `_ULPS`.

Cancellation is fought with the mean value theorem: on a cell of width w, `f(z)` lies in `f(a) + [0, w] f'` and in
`f(b) - [0, w] f'` (`_tighten`); quotients go through the Wronskian `x'y - xy'`, square roots through `2uu'' - u'^2`,
which is constant where u is a quadratic.

Comparisons are decided by the sign of the difference on the open cell; a difference that reaches 0 only at an end of
the cell is decided if it is strictly monotone. An undecided maximum is continuous with an unknown second derivative; an
undecided choice may jump. `0 * (unknown but finite) = 0`, which is what lets a learned slope stay linear.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

_TINY = 2.0**-1021  # absorbs every underflow, flushed to zero or not
_LARGEST = float(np.finfo(np.float64).max)
_ULPS = 16 * 2.0**-52  # relative error allowed to formulas in the host's elementary functions, of 4 units each at most
_SPLIT = 134217729.0  # 2**27 + 1


class UnsupportedError(Exception):
    """The program holds an instruction that has no rule here; the caller must relax its parts one by one."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The closed intervals `[lower, upper]`, elementwise; infinite ends mean unbounded, not infinite values."""

    lower: Array
    upper: Array

    def __iter__(self) -> Iterator[Array]:
        return iter((self.lower, self.upper))

    def __getitem__(self, index: Any) -> "Interval":
        return Interval(self.lower[index], self.upper[index])


class Jet(NamedTuple):
    """Enclosures of value, first and second derivative: `orders` has shape (3, 3 * cells), tracks one after another.

    `continuous`: defined, finite and continuous on the closed cell. `smooth`: twice differentiable on the closed cell.
    """

    orders: Interval
    continuous: Array
    smooth: Array


class Truth(NamedTuple):
    """A boolean on every open cell: whether it can be true, and whether it can be false."""

    true: Array
    false: Array


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

    def variable(self) -> Jet:
        """The jet of z itself; a limit at infinity is only known to lie in its cell."""
        lower, upper = [self.left], [self.right]
        if self.tracks == 3:
            lower += [self.left, np.where(np.isinf(self.right), self.left, self.right)]
            upper += [np.where(np.isinf(self.left), self.right, self.left), self.right]
        lower, upper = np.concatenate(lower), np.concatenate(upper)
        ones, zeros, yes = np.ones_like(lower), np.zeros_like(lower), np.ones(lower.shape, bool)
        return Jet(Interval(np.stack([lower, ones, zeros]), np.stack([upper, ones, zeros])), yes, yes)

    def constant(self, lower: float, upper: float) -> Jet:
        """The jet of a constant known to lie in `[lower, upper]`."""
        size = self.tracks * self.left.size
        zeros, finite = np.zeros(size), np.full(size, bool(lower < math.inf and upper > -math.inf))
        orders = Interval(np.stack([zeros + lower, zeros, zeros]), np.stack([zeros + upper, zeros, zeros]))
        return Jet(orders, finite, finite)

    def decide(self, yes: Array, no: Array) -> Array:
        """Record one decision per cell (1 yes, 2 no, 0 open) and return it for all three tracks."""
        self.decisions.append(np.where(yes, 1, np.where(no, 2, 0)).astype(np.int8))
        return np.tile(self.decisions[-1], self.tracks)


# Intervals ------------------------------------------------------------------------------------------------------------


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


def _sum(x: Interval, y: Interval) -> Interval:
    a, b = np.stack([*x]), np.stack([*y])
    total = a + b
    part = total - a
    inexact = ((a - (total - part)) + (b - part) != 0) & np.isfinite(a) & np.isfinite(b)
    lower = np.where(inexact[0], _down(total[0]), total[0])
    upper = np.where(inexact[1], _up(total[1]), total[1])
    return Interval(np.where(np.isnan(lower), -np.inf, lower), np.where(np.isnan(upper), np.inf, upper))


def _minus(x: Interval) -> Interval:
    return Interval(-x.upper, -x.lower)


def _aligned(x: Interval, y: Interval) -> tuple[Interval, Interval]:
    shape = np.broadcast_shapes(x.lower.shape, y.lower.shape)
    return Interval(*(np.broadcast_to(end, shape) for end in x)), Interval(*(np.broadcast_to(end, shape) for end in y))


def _product(x: Interval, y: Interval) -> Interval:
    x, y = _aligned(x, y)
    a, b = np.stack([*x])[:, None], np.stack([*y])[None]
    product = np.where((a == 0) | (b == 0), 0.0, a * b)
    inexact = _inexact_product(a, b, product)
    return _outward(product.reshape(4, *x.lower.shape), inexact.reshape(4, *x.lower.shape))


def _square(x: Interval) -> Interval:
    far = np.maximum(np.abs(x.lower), np.abs(x.upper))
    near = np.where((x.lower <= 0) & (x.upper >= 0), 0.0, np.minimum(np.abs(x.lower), np.abs(x.upper)))
    ends = np.stack([near, far])
    return _outward(ends * ends, _inexact_product(ends, ends, ends * ends))


def _quotient(x: Interval, y: Interval) -> Interval:
    """`x / y` on the part of y that is not 0; the whole line where y has 0 inside, or is 0."""
    x, y = _aligned(x, y)
    low, high = y.lower + 0.0, np.where(y.upper == 0, -0.0, y.upper)  # a zero end is approached from inside
    a, b = np.stack([x.lower, x.lower, x.upper, x.upper]), np.stack([low, high, low, high])
    quotient = np.where((a == 0) | np.isinf(b), np.copysign(0.0, a) * np.sign(b), a / b)
    inexact = ((quotient * b != a) | _inexact_product(quotient, b, a)) & (a != 0)
    whole = (y.lower < 0) & (y.upper > 0) | (y.lower == 0) & (y.upper == 0)
    return _where(whole, _WHOLE, _outward(quotient, inexact))


def _where(condition: Array, x: Interval, y: Interval) -> Interval:
    return Interval(np.where(condition, x.lower, y.lower), np.where(condition, x.upper, y.upper))


def _hull(x: Interval, y: Interval) -> Interval:
    return Interval(np.minimum(x.lower, y.lower), np.maximum(x.upper, y.upper))


def _intersection(x: Interval, y: Interval) -> Interval:
    return Interval(np.maximum(x.lower, y.lower), np.minimum(x.upper, y.upper))


def _stack(*rows: Interval) -> Interval:
    return Interval(np.stack([row.lower for row in rows]), np.stack([row.upper for row in rows]))


_WHOLE = Interval(np.array(-np.inf), np.array(np.inf))

# Jets -----------------------------------------------------------------------------------------------------------------


def _tighten(cells: Cells, orders: Interval, valid: Array) -> Interval:
    """Cut every order on the cell track by the mean value theorem from both ends, where the next order allows it.

    `valid[k]` says that order k is continuous on the closed cell with order k + 1 as its derivative.
    """
    if cells.tracks == 1:
        return orders
    count = cells.left.size
    body, left, right = orders[:, :count], orders[:-1, count : 2 * count], orders[:-1, 2 * count :]
    step = _product(Interval(np.zeros_like(cells.left), _up(cells.right - cells.left)), body[1:])
    cut = _intersection(_sum(left, step), _sum(right, _minus(step)))
    cut = _intersection(body[:-1], _where(valid[:, :count], cut, _WHOLE))
    orders.lower[:-1, :count], orders.upper[:-1, :count] = cut
    return orders


def _jet(cells: Cells, orders: Interval, continuous: Array, smooth: Array) -> Jet:
    return Jet(_tighten(cells, orders, np.stack([continuous, smooth])), continuous, smooth)


def _negative(cells: Cells, x: Jet) -> Jet:
    return x._replace(orders=_minus(x.orders))


def _add(cells: Cells, x: Jet, y: Jet) -> Jet:
    return _jet(cells, _sum(x.orders, y.orders), x.continuous & y.continuous, x.smooth & y.smooth)


def _subtract(cells: Cells, x: Jet, y: Jet) -> Jet:
    return _add(cells, x, _negative(cells, y))


def _multiply(cells: Cells, x: Jet, y: Jet) -> Jet:
    terms = _product(x.orders[[0, 1, 0, 2, 1, 0]], y.orders[[0, 0, 1, 0, 1, 2]])
    twice = Interval(2.0 * terms.lower[4], 2.0 * terms.upper[4])
    first, second = _sum(terms[1], terms[2]), _sum(_sum(terms[3], twice), terms[5])
    return _jet(cells, _stack(terms[0], first, second), x.continuous & y.continuous, x.smooth & y.smooth)


def _power_two(cells: Cells, x: Jet) -> Jet:
    squares, products = _square(x.orders[:2]), _product(x.orders[[0, 0]], x.orders[1:])
    second = _sum(squares[1], products[1])
    second = Interval(2.0 * second.lower, 2.0 * second.upper)
    first = Interval(2.0 * products.lower[0], 2.0 * products.upper[0])
    return _jet(cells, _stack(squares[0], first, second), x.continuous, x.smooth)


def _divide(cells: Cells, x: Jet, y: Jet) -> Jet:
    """`q' = W / y^2` and `q'' = W' / y^2 - 2 W y' / y^3` with the Wronskian `W = x'y - xy'`, `W' = x''y - xy''`."""
    zero = (y.orders.lower[0] <= 0) & (y.orders.upper[0] >= 0)
    continuous, smooth = x.continuous & y.continuous & ~zero, x.smooth & y.smooth & ~zero
    if not (y.orders.lower[1:].any() or y.orders.upper[1:].any()):
        return _jet(cells, _quotient(x.orders, y.orders[0]), continuous, smooth)
    products = _product(x.orders[[1, 2, 0, 0]], y.orders[[0, 0, 1, 2]])
    wronskian = _tighten(cells, _sum(products[:2], _minus(products[2:])), smooth[None])
    inverse = _quotient(Interval(np.ones(zero.shape), np.ones(zero.shape)), y.orders[0])
    squared = _square(inverse)
    first, second = _product(wronskian, squared)[0], _product(wronskian, squared)[1]
    turn = _product(_product(first, y.orders[1]), inverse)
    second = _sum(second, Interval(-2.0 * turn.upper, -2.0 * turn.lower))
    orders = _stack(_quotient(x.orders[0], y.orders[0]), first, second)
    return _jet(cells, _where(zero & _ends(cells), _WHOLE, orders), continuous, smooth)


def _ends(cells: Cells) -> Array:
    """Which entries are limits at an end of a cell: there a pole leaves nothing to say, in the open cell it does."""
    return np.arange(cells.tracks * cells.left.size) >= (cells.left.size if cells.tracks == 3 else 0)


def _compose(cells: Cells, x: Jet, outer: Interval, continuous: Array, smooth: Array, singular: Array) -> Jet:
    """The chain rule for an outer function with enclosures `outer` of its value and derivatives on the range of x."""
    first, second = x.orders[1], x.orders[2]
    terms = _product(outer[[1, 2, 1]], _stack(first, _square(first), second))
    derivatives = _where(singular & _ends(cells), _WHOLE, _stack(terms[0], _sum(terms[1], terms[2])))
    return _jet(cells, _stack(outer[0], derivatives[0], derivatives[1]), continuous, smooth)


# Elementary functions -------------------------------------------------------------------------------------------------

Formula = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Elementary:
    """A function by formulas for value, first and second derivative, which must get their sign bits right.

    `turning[k]` are the points where formula k turns; `domain` is where the function begins, there `closed` or not;
    `floor` and `ceiling` bound its values; `error` is the relative error of the formulas.
    """

    formulas: tuple[Formula, Formula, Formula]
    turning: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = ((), (), ())
    domain: float = -math.inf
    closed: bool = False
    floor: float = -math.inf
    ceiling: float = math.inf
    error: float = _ULPS

    def __call__(self, cells: Cells, x: Jet) -> Jet:
        """The jet of this function of x."""
        argument = x.orders[0]
        outside, touching = argument.lower < self.domain, argument.lower == self.domain
        singular = touching & np.isfinite(self.domain)
        rows = zip(self.formulas, self.turning, strict=True)
        outer = _stack(*(_range(formula, turning, argument, self.error) for formula, turning in rows))
        outer.lower[0] = np.maximum(outer.lower[0], self.floor)
        outer.upper[0] = np.minimum(outer.upper[0], self.ceiling)
        outer = _where(outside, _WHOLE, outer)
        continuous = x.continuous & ~outside & (~singular | self.closed)
        jet = _compose(cells, x, outer, continuous, x.smooth & ~outside & ~singular, singular)
        return jet._replace(orders=_where(outside, _WHOLE, jet.orders))


def _range(formula: Formula, turning: tuple[float, ...], argument: Interval, error: float = _ULPS) -> Interval:
    low, high = argument.lower + 0.0, argument.upper + 0.0
    points = np.stack([low, high, *(np.clip(point, low, high) for point in turning)])
    values = formula(points)
    return _outward(values, (points != 0) | (values != 0), error)


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
    decay = np.exp(-2.0 * np.abs(x))
    return 4.0 * decay / (1.0 + decay) ** 2


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
    if exponent >= 2 and exponent == int(exponent):
        return Elementary(formulas, ((0.0,), (0.0,), (0.0,)))
    exact = all((exponent - order) + order == exponent for order in (1, 2))  # else the exponents are rounded
    return Elementary(formulas, domain=0.0, closed=exponent > 0, error=_ULPS if exact else 1e-13)


_EVEN, _LN2 = ((), (0.0,), ()), math.log(2.0)
_SLOPE_AT_ZERO = {bend: ((), (0.0,), (-bend, bend)) for bend in (0.6584789484624084, 1.3169578969248166)}
_BELL_TURNING, _ATAN_TURNING = (((), (0.0,), (-math.sqrt(c), math.sqrt(c))) for c in (1 / 2, 1 / 3))

# fmt: off
_ELEMENTARY = {
    "exp": Elementary((np.exp, np.exp, np.exp)),
    "exp2": Elementary((np.exp2, lambda x: _LN2 * np.exp2(x), lambda x: _LN2**2 * np.exp2(x))),
    "expm1": Elementary((np.expm1, np.exp, np.exp), floor=-1.0),
    "log": Elementary((np.log, lambda x: 1.0 / x, lambda x: -1.0 / x / x), domain=0.0),
    "log1p": Elementary((np.log1p, lambda x: 1.0 / (1.0 + x), lambda x: -1.0 / (1.0 + x) / (1.0 + x)), domain=-1.0),
    "tanh": Elementary((np.tanh, _sech_squared, _tanh_bend), _SLOPE_AT_ZERO[0.6584789484624084], floor=-1.0, ceiling=1.0),
    "logistic": Elementary(
        (_sigmoid, lambda x: 0.25 * _sech_squared(0.5 * x), lambda x: 0.125 * _tanh_bend(0.5 * x)),
        _SLOPE_AT_ZERO[1.3169578969248166], ceiling=1.0),
    "erf": Elementary((_from_math(math.erf), _bell, _bell_slope), _BELL_TURNING, floor=-1.0, ceiling=1.0),
    "erfc": Elementary(
        (_from_math(math.erfc), lambda x: -_bell(x), lambda x: -_bell_slope(x)), _BELL_TURNING, ceiling=2.0),
    "atan": Elementary(
        (np.arctan, lambda x: _inverse_length(x) ** 2, lambda x: -2.0 * _cosine_of_angle(x) * _inverse_length(x) ** 3),
        _ATAN_TURNING),
    "asinh": Elementary(
        (np.arcsinh, _inverse_length, lambda x: -_cosine_of_angle(x) * _inverse_length(x) ** 2), _BELL_TURNING),
    "sinh": Elementary((np.sinh, np.cosh, np.sinh), _EVEN),
    "cosh": Elementary((np.cosh, np.sinh, np.cosh), ((0.0,), (), (0.0,))),
    "rsqrt": _power(-0.5),
}
# fmt: on


def _sine(cells: Cells, x: Jet, quarter: int) -> Jet:
    """The jet of `sin(x + quarter * pi / 2)`."""
    outer = _stack(*(_sine_range(x.orders[0], quarter + k) for k in range(3)))
    return _compose(cells, x, outer, x.continuous, x.smooth, np.zeros_like(x.smooth))


def _sine_range(argument: Interval, quarter: int) -> Interval:
    function, sign = (math.cos if quarter % 2 else math.sin), (-1.0 if quarter % 4 > 1 else 1.0)
    far = ~(np.maximum(np.abs(argument.lower), np.abs(argument.upper)) < 1e6)
    ends = np.stack([np.where(far, 0.0, argument.lower), np.where(far, 0.0, argument.upper)])
    values = sign * _from_math(function)(ends)
    lower, upper = _outward(values, (ends != 0) | (values != 0), _ULPS)
    turns = ends / (2.0 * math.pi) + 0.25 * quarter  # maxima at 1/4 plus a whole number, minima at 3/4
    peak, trough = ((np.floor(turns[1] - c + 1e-9) > np.floor(turns[0] - c - 1e-9)) for c in (0.25, 0.75))
    lower, upper = np.where(trough, -1.0, np.maximum(lower, -1.0)), np.where(peak, 1.0, np.minimum(upper, 1.0))
    return Interval(np.where(far, -1.0, lower), np.where(far, 1.0, upper))


def _square_root(cells: Cells, x: Jet) -> Jet:
    """`s'' = (2uu'' - u'^2) / (4 u^(3/2))`, whose numerator is constant on a cell where u'' is."""
    root, count = _power(0.5)(cells, x), cells.left.size
    value, second = x.orders[0], x.orders[2]
    product = _product(value, second)
    numerator = _sum(Interval(2.0 * product.lower, 2.0 * product.upper), _minus(_square(x.orders[1])))
    limits = _intersection(numerator[(cells.tracks - 2) * count :][:count], numerator[-count:])
    quadratic = (second.lower == second.upper)[:count] & x.smooth[:count]
    body = _intersection(numerator[:count], _where(quadratic, limits, _WHOLE))
    positive = value.lower[:count] > 0  # where it is not, the root may have a kink that no derivative shows
    safe = _where(positive, value[:count], Interval(np.ones(count), np.ones(count)))
    bend = _product(body, _range(lambda u: 0.25 / (u * np.sqrt(u)), (), safe))
    cut = _intersection(root.orders[2, :count], _where(positive, bend, _WHOLE))
    root.orders.lower[2, :count], root.orders.upper[2, :count] = cut
    return _jet(cells, *root)


# Choices --------------------------------------------------------------------------------------------------------------


def _signs(cells: Cells, difference: Jet) -> tuple[Array, Array]:
    """On which open cells the difference is proved positive, and on which negative."""
    count = cells.left.size
    lower, upper = difference.orders.lower[:, :count], difference.orders.upper[:, :count]
    monotone = difference.continuous[:count] & ((lower[1] > 0) | (upper[1] < 0)) & (cells.left < cells.right)
    return (lower[0] > 0) | (lower[0] == 0) & monotone, (upper[0] < 0) | (upper[0] == 0) & monotone


def _difference(cells: Cells, x: Jet, y: Jet) -> Jet:
    """`x - y`, where an infinite literal counts as beyond every real number and x equals itself unless undefined."""
    if x is y:
        zero = cells.constant(0.0, 0.0)
        return zero._replace(orders=_where(x.continuous, zero.orders, _WHOLE))
    difference = _subtract(cells, x, y)
    lower, upper = difference.orders[0]
    difference.orders.lower[0] = np.where(_beyond(x, y), _LARGEST, lower)
    difference.orders.upper[0] = np.where(_beyond(y, x), -_LARGEST, upper)
    return difference


def _beyond(x: Jet, y: Jet) -> Array:
    """Where x is an infinite literal above y, or y one below x."""
    above = (x.orders.lower[0] == np.inf) & (y.orders.lower[0] < np.inf)
    return above | (y.orders.upper[0] == -np.inf) & (x.orders.upper[0] > -np.inf)


def _greater(cells: Cells, x: Jet, y: Jet) -> Truth:
    difference = _difference(cells, x, y)
    above, below = _signs(cells, difference)
    return Truth(~(below | (difference.orders.upper[0, : above.size] <= 0)), ~above)


def _equal(cells: Cells, x: Jet, y: Jet) -> Truth:
    difference = _difference(cells, x, y)
    above, below = _signs(cells, difference)
    orders = difference.orders[0, : above.size]
    return Truth(~(above | below), (orders.lower != 0) | (orders.upper != 0))


def _not(cells: Cells, x: Truth) -> Truth:
    return Truth(x.false, x.true)


def _and(cells: Cells, x: Truth, y: Truth) -> Truth:
    return Truth(x.true & y.true, x.false | y.false)


def _or(cells: Cells, x: Truth, y: Truth) -> Truth:
    return Truth(x.true | y.true, x.false & y.false)


def _select(cells: Cells, predicate: Truth, on_false: Jet, on_true: Jet) -> Jet:
    code = cells.decide(~predicate.false, ~predicate.true)
    return _choose(cells, code, on_true, on_false, jumps=True)


def _choose(cells: Cells, code: Array, x: Jet, y: Jet, *, jumps: bool) -> Jet:
    """x where the code is 1, y where it is 2, else their hull: its derivative holds almost everywhere."""
    hull, open_cell = _hull(x.orders, y.orders), code == 0
    hull.lower[2], hull.upper[2] = -np.inf, np.inf
    orders = _where(code == 1, x.orders, _where(code == 2, y.orders, hull))
    both = np.where(code == 1, x.continuous, np.where(code == 2, y.continuous, x.continuous & y.continuous))
    smooth = np.where(code == 1, x.smooth, y.smooth) & ~open_cell
    return Jet(orders, both & ~(open_cell & jumps), smooth)


def _maximum(cells: Cells, x: Jet, y: Jet) -> Jet:
    orders = _difference(cells, x, y).orders[0, : cells.left.size]
    code = cells.decide(orders.lower >= 0, orders.upper <= 0)
    jet = _choose(cells, code, x, y, jumps=False)
    floor = np.where(code == 0, np.maximum(x.orders.lower[0], y.orders.lower[0]), -np.inf)
    jet.orders.lower[0] = np.maximum(jet.orders.lower[0], floor)
    return jet


def _minimum(cells: Cells, x: Jet, y: Jet) -> Jet:
    return _negative(cells, _maximum(cells, _negative(cells, x), _negative(cells, y)))


def _absolute(cells: Cells, x: Jet) -> Jet:
    jet = _maximum(cells, x, _negative(cells, x))
    jet.orders.lower[0] = np.maximum(jet.orders.lower[0], 0.0)
    return jet


def _sign(cells: Cells, x: Jet) -> Jet:
    zero, one = cells.constant(0.0, 0.0), cells.constant(1.0, 1.0)
    below = _select(cells, _greater(cells, zero, x), zero, _negative(cells, one))
    return _select(cells, _greater(cells, x, zero), below, one)


def _finite(cells: Cells, x: Jet) -> Truth:
    """True where x is a real number; where that is open both answers are possible."""
    return Truth(np.ones(cells.left.shape, bool), ~x.continuous[: cells.left.size])


def _convert(cells: Cells, x: Jet | Truth, new_dtype: object) -> Jet | Truth:
    """The identity from real to floating point; a boolean becomes 0 or 1."""
    kind = getattr(new_dtype, "name", None) or getattr(new_dtype, "__name__", None) or str(new_dtype)
    if isinstance(x, Truth):
        return x if kind == "bool" else _select(cells, x, cells.constant(0.0, 0.0), cells.constant(1.0, 1.0))
    if not kind.startswith(("float", "bfloat")):
        raise UnsupportedError(f"convert_element_type to {kind}")
    return x


# Programs -------------------------------------------------------------------------------------------------------------


def _literal(x: Jet) -> float | None:
    lower, upper = x.orders
    return float(lower[0, 0]) if (lower == upper).all() and not lower[1:].any() and np.ptp(lower[0]) == 0 else None


def _raise_to(cells: Cells, x: Jet, y: float) -> Jet:
    """`x ** y` for a literal y."""
    if y == 0 or y == 1:
        return cells.constant(1.0, 1.0) if y == 0 else x
    if y == 2:
        return _power_two(cells, x)
    if y < 0 and y == int(y):
        return _divide(cells, cells.constant(1.0, 1.0), _raise_to(cells, x, -y))
    return _square_root(cells, x) if y == 0.5 else _power(y)(cells, x)


def _general_power(cells: Cells, x: Jet, y: Jet) -> Jet:
    exponent, base = _literal(y), _literal(x)
    if exponent is not None and math.isfinite(exponent):
        return _raise_to(cells, x, exponent)
    if base is None or not 0 < base < math.inf:
        raise UnsupportedError("pow of two variables")
    logarithm = math.log(base)
    margin = abs(logarithm) * _ULPS + _TINY
    return _ELEMENTARY["exp"](cells, _multiply(cells, y, cells.constant(logarithm - margin, logarithm + margin)))


def _cube_root(cells: Cells, x: Jet) -> Jet:
    slopes = (lambda u: 1.0 / (3.0 * np.cbrt(u) ** 2)), (lambda u: -2.0 / (9.0 * np.cbrt(u) ** 2 * u))
    root = Elementary((np.cbrt, *slopes), domain=0.0, closed=True)
    return _multiply(cells, _sign(cells, x), root(cells, _absolute(cells, x)))


# fmt: off
_REAL: dict[str, Callable] = _ELEMENTARY | {
    "add": _add, "add_any": _add, "sub": _subtract, "mul": _multiply, "div": _divide, "neg": _negative,
    "max": _maximum, "min": _minimum, "abs": _absolute, "sign": _sign, "copy": lambda cells, x: x,
    "clamp": lambda cells, lower, x, upper: _minimum(cells, _maximum(cells, x, lower), upper),
    "square": _power_two, "sqrt": _square_root, "cbrt": _cube_root, "pow": _general_power,
    "one_minus_square": lambda cells, x: _subtract(cells, cells.constant(1.0, 1.0), _power_two(cells, x)),
    "integer_pow": lambda cells, x, *, y: _raise_to(cells, x, y),
    "sin": lambda cells, x: _sine(cells, x, 0),
    "cos": lambda cells, x: _sine(cells, x, 1),
    "tan": lambda cells, x: _divide(cells, _sine(cells, x, 0), _sine(cells, x, 1)),
    "gt": _greater,
    "lt": lambda cells, x, y: _greater(cells, y, x),
    "ge": lambda cells, x, y: _not(cells, _greater(cells, y, x)),
    "le": lambda cells, x, y: _not(cells, _greater(cells, x, y)),
    "eq": _equal,
    "ne": lambda cells, x, y: _not(cells, _equal(cells, x, y)),
    "is_finite": _finite,
}
_LOGICAL: dict[str, Callable] = {"and": _and, "or": _or, "not": _not, "copy": lambda cells, x: x}
_CHOICES: dict[tuple, Callable] = {  # by which operands are real
    (False, True, True): _select,
    (False, False, False): lambda cells, p, x, y: _or(cells, _and(cells, _not(cells, p), x), _and(cells, p, y)),
}
# fmt: on


def _apply(cells: Cells, name: str, params: dict, operands: list[Jet | Truth]) -> Jet | Truth:
    real = tuple(isinstance(operand, Jet) for operand in operands)
    if name == "convert_element_type":
        return _convert(cells, operands[0], params["new_dtype"])
    rule = (_REAL if all(real) else _LOGICAL if not any(real) else {}).get(name)
    rule = _CHOICES.get(real) if name == "select_n" else rule
    if rule is None:
        raise UnsupportedError(name)
    return rule(cells, *operands, **({"y": params["y"]} if name == "integer_pow" else {}))


class Enclosure(NamedTuple):
    """What is proved of a program on n cells: `orders` (3 orders, 3 tracks or 1, n), flags (n,), `decisions` (any, n)."""

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

    Returns:
        The `Enclosure`.

    Raises:
        UnsupportedError: an instruction has no rule here.

    Rounding: outward, in float64 on the host.

    >>> enclose((("mul", (), (("z",), ("z",))),), np.array([1.0]), np.array([2.0])).orders.upper[:, 0, 0].tolist()
    [4.0, 4.0, 2.0]
    """
    cells = Cells(left, right)
    variable, results = cells.variable(), []

    def read(operand: tuple) -> Jet | Truth:
        if operand[0] == "var":
            return results[operand[1]]
        if operand[0] != "lit":
            return variable if operand[0] == "z" else cells.constant(-math.inf, math.inf)
        if isinstance(operand[1], (bool, np.bool_)):
            true = np.full(left.shape, bool(operand[1]))
            return Truth(true, ~true)
        if float(operand[1]) != operand[1]:
            raise UnsupportedError("a literal that is not a number, or a whole number beyond float64")
        return cells.constant(float(operand[1]), float(operand[1]))

    with np.errstate(all="ignore"):
        for name, params, operands in instructions:
            results.append(_apply(cells, name, dict(params), [read(operand) for operand in operands]))
    if not isinstance(results[-1], Jet):
        raise UnsupportedError("a boolean result")
    orders, continuous, smooth = results[-1]
    shape, count = (3, cells.tracks, left.size), left.size
    lower, upper = orders.lower.reshape(shape), orders.upper.reshape(shape)
    lower, upper = np.maximum(lower, lower[:, :1]), np.minimum(upper, upper[:, :1])  # limits of what is between
    decisions = np.stack(cells.decisions) if cells.decisions else np.zeros((0, count), np.int8)
    tracks = Interval(lower, upper)
    return Enclosure(tracks, continuous[:count], smooth[:count], decisions)
