"""Elementary functions on intervals: value, first and second derivative by formulas with stated relative errors.

Every formula is monotone between its turning points, so that its range on an interval is the hull of its values at both
ends and at the turning points between, widened by its error. A range is rounded outward in relative terms; a formula
must therefore get the sign bit of its result right, zeros included, and give what is exactly zero exactly.

`erf_inv` comes without a library function: Newton's method proposes a value, and `erf` at both ends of its error
interval proves it. What is not proved is not a number, whose range is the whole line.

Reference: Winitzki 2008, "A handy approximation for the error function and its inverse", for the first guess.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxbound.curvature.intervals import WHOLE, Array, Interval, outward, stack, where

_UNIT = 2.0**-53
FINE, ROUGH, COARSE = 16 * _UNIT, 48 * _UNIT, 1e-13
"""Relative errors of formulas, see `Elementary`."""

Formula = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Elementary:
    """A function by formulas for value, first and second derivative, which must get their sign bits right.

    `turning[k]` are the points where formula k turns; the function is defined between the two ends of its `domain`,
    and there if `closed`; `floor` and `ceiling` bound its values. `errors` bound the relative errors of the formulas:
    fine with square roots, exp, log and C's functions (1 unit in the last place each), rough with NumPy's others (4),
    coarse for odd powers.
    """

    formulas: tuple[Formula, Formula, Formula]
    turning: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = ((), (), ())
    domain: tuple[float, float] = (-math.inf, math.inf)
    closed: bool = False
    floor: float = -math.inf
    ceiling: float = math.inf
    errors: tuple[float, float, float] = (FINE, FINE, FINE)

    def orders(self, argument: Interval) -> Interval:
        """Value and derivatives, three rows; the whole line where the argument leaves the domain."""
        rows = zip(self.formulas, self.turning, self.errors, strict=True)
        orders = stack(*(range_of(argument, *row) for row in rows))
        orders.lower[0] = np.maximum(orders.lower[0], self.floor)
        orders.upper[0] = np.minimum(orders.upper[0], self.ceiling)
        return where(self.leaves(argument), WHOLE, orders)

    def leaves(self, argument: Interval) -> Array:
        """Whether the argument has numbers outside of the domain."""
        return (argument.lower < self.domain[0]) | (argument.upper > self.domain[1])

    def touches(self, argument: Interval) -> Array:
        """Whether the argument reaches a finite end of the domain, where the function is not smooth."""
        left, right = (argument.lower == self.domain[0]), (argument.upper == self.domain[1])
        return left & (self.domain[0] > -math.inf) | right & (self.domain[1] < math.inf)


def range_of(argument: Interval, formula: Formula, turning: tuple[float, ...], error: float) -> Interval:
    """The range of a formula with this relative error, on intervals within its domain."""
    low, high = argument.lower + 0.0, argument.upper + 0.0
    points = np.stack([low, high, *(np.clip(point, low, high) for point in turning)])
    return outward(values := formula(points), (points != 0) | (values != 0), error)


def from_math(function: Callable[[float], float]) -> Formula:
    """A formula by a function of one number."""
    return lambda x: np.array([function(value) for value in x.ravel().tolist()]).reshape(x.shape)


def sine_range(argument: Interval, quarter: int) -> Interval:
    """The range of `sin(x + quarter * pi / 2)`; all of [-1, 1] where x is far from 0."""
    function, sign = (math.cos if quarter % 2 else math.sin), (-1.0 if quarter % 4 > 1 else 1.0)
    far = ~(np.maximum(np.abs(argument.lower), np.abs(argument.upper)) < 1e6)
    ends = np.stack([np.where(far, 0.0, argument.lower), np.where(far, 0.0, argument.upper)])
    values = sign * from_math(function)(ends)
    lower, upper = outward(values, (ends != 0) | (values != 0), FINE)
    turns = ends / (2.0 * math.pi) + 0.25 * quarter  # maxima at 1/4 plus a whole number, minima at 3/4
    peak, trough = ((np.floor(turns[1] - c + 1e-9) > np.floor(turns[0] - c - 1e-9)) for c in (0.25, 0.75))
    lower, upper = np.where(trough, -1.0, np.maximum(lower, -1.0)), np.where(peak, 1.0, np.minimum(upper, 1.0))
    return Interval(np.where(far, -1.0, lower), np.where(far, 1.0, upper))


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


def _arc_slope(x: Array) -> Array:
    """`1 / sqrt(1 - x^2)`."""
    return 1.0 / np.sqrt((1.0 - x) * (1.0 + x))


def _arc_bend(x: Array) -> Array:
    return x * _arc_slope(x) ** 3


def _acosh_slope(x: Array) -> Array:
    """`1 / sqrt(x^2 - 1)`, which does not overflow."""
    return 1.0 / (np.sqrt(x - 1.0) * np.sqrt(x + 1.0))


def _acosh_bend(x: Array) -> Array:
    slope = _acosh_slope(x)
    return -np.where(np.isinf(x), 1.0, x * slope) * slope * slope


def _atanh_slope(x: Array) -> Array:
    return 1.0 / ((1.0 - x) * (1.0 + x))


def _inverse_erf(x: float) -> float:
    """`erf_inv(x)` up to `_inverse_erf_error`; not a number where `erf` does not prove it."""
    size = abs(x)
    if size < 2.0**-30:  # the next term of the series, pi / 12 x^2, is below half a unit
        return _HALF_ROOT_PI * x
    if size >= 1.0:
        return math.copysign(math.inf, x) if size == 1.0 else math.nan
    rest = 1.0 - size  # exact in the tail, where it is used
    tail = size >= 0.5
    bend = math.log1p(-size * size)
    middle = 2.0 / (0.147 * math.pi) + 0.5 * bend
    y = math.sqrt(-bend / 0.147 / (math.sqrt(middle * middle - bend / 0.147) + middle))
    for _ in range(3):  # of third order, by Halley
        excess = rest - math.erfc(y) if tail else math.erf(y) - size
        step = _HALF_ROOT_PI * math.exp(y * y) * excess
        y -= step / (1.0 + y * step)
    margin = _inverse_erf_error(y) * y
    low, high = y - margin, y + margin
    if tail:
        proved = math.erfc(high) * (1.0 + FINE) <= rest <= math.erfc(low) * (1.0 - FINE)
    else:
        proved = math.erf(low) * (1.0 + FINE) <= size <= math.erf(high) * (1.0 - FINE)
    return math.copysign(y, x) if proved else math.nan


def _inverse_erf_error(y: float) -> float:
    """Relative, and below `ROUGH`: less in the tails, where `exp(y^2)` multiplies it by `2 y^2 < 70`."""
    return max(6.0 * _UNIT, 40.0 * _UNIT / (1.0 + 2.0 * y * y))


def _inverse_erf_slope(x: Array) -> Array:
    return _HALF_ROOT_PI * np.exp(_INVERSE_ERF(x) ** 2)


def _inverse_erf_bend(x: Array) -> Array:
    y = _INVERSE_ERF(x)
    return 2.0 * y * (_HALF_ROOT_PI * np.exp(y * y)) ** 2


_HALF_ROOT_PI = 0.5 * math.sqrt(math.pi)
_INVERSE_ERF = from_math(_inverse_erf)


def _x_log_x(x: Array) -> Array:
    return np.where(x == 0, 0.0, x * np.log(x))


def _log_of_e_times(x: Array) -> Array:
    """`1 + log(x)`, exactly signed where it is small: the number `1 / e` is the sum of these two."""
    return np.where(x < 0.2, 1.0 + np.log(x), np.log1p(math.e * ((x - _INVERSE_E) + 1.2428753672788363e-17)))


_INVERSE_E = 0.36787944117144233


def power(exponent: float) -> Elementary:
    """`x ** exponent`: on the whole line for a whole number of at least 2, on `x >= 0` otherwise."""

    def formula(order: int, coefficient: float) -> Formula:
        return lambda x: coefficient * np.power(x, exponent - order)

    formulas = formula(0, 1.0), formula(1, exponent), formula(2, exponent * (exponent - 1.0))
    errors = _ALL_ROUGH if exponent == int(exponent) else (COARSE, COARSE, COARSE)
    if exponent >= 2 and exponent == int(exponent):
        return Elementary(formulas, ((0.0,), (0.0,), (0.0,)), errors=errors)
    return Elementary(formulas, domain=_POSITIVE, closed=exponent > 0, errors=errors)


_POSITIVE, _BETWEEN = (0.0, math.inf), (-1.0, 1.0)
_LN2, _ALL_ROUGH = math.log(2.0), (ROUGH, ROUGH, ROUGH)
_VALUE_ROUGH, _SLOPE_FINE = (ROUGH, FINE, FINE), (ROUGH, FINE, ROUGH)
_TANH, _LOGISTIC, _BELL, _ATAN = (
    ((), (0.0,), (-bend, bend)) for bend in (0.6584789484624084, 1.3169578969248166, math.sqrt(1 / 2), math.sqrt(1 / 3))
)

# fmt: off
ELEMENTARY = {
    "exp": Elementary((np.exp, np.exp, np.exp)),
    "exp2": Elementary((np.exp2, lambda x: _LN2 * np.exp2(x), lambda x: _LN2**2 * np.exp2(x)), errors=_ALL_ROUGH),
    "expm1": Elementary((np.expm1, np.exp, np.exp), floor=-1.0, errors=_VALUE_ROUGH),
    "log": Elementary((np.log, lambda x: 1.0 / x, lambda x: -1.0 / x / x), domain=_POSITIVE),
    "log1p": Elementary(
        (np.log1p, lambda x: 1.0 / (1.0 + x), lambda x: -1.0 / (1.0 + x) ** 2), domain=(-1.0, math.inf),
        errors=_VALUE_ROUGH),
    "tanh": Elementary(
        (np.tanh, _sech_squared, _tanh_bend), _TANH, floor=-1.0, ceiling=1.0, errors=_SLOPE_FINE),
    "logistic": Elementary(
        (_sigmoid, lambda x: 0.25 * _sech_squared(0.5 * x), lambda x: 0.125 * _tanh_bend(0.5 * x)),
        _LOGISTIC, ceiling=1.0, errors=(FINE, FINE, ROUGH)),
    "erf": Elementary((from_math(math.erf), _bell, _bell_slope), _BELL, floor=-1.0, ceiling=1.0),
    "erfc": Elementary((from_math(math.erfc), lambda x: -_bell(x), lambda x: -_bell_slope(x)), _BELL, ceiling=2.0),
    "atan": Elementary(
        (np.arctan, lambda x: _inverse_length(x) ** 2, lambda x: -2.0 * _cosine_of_angle(x) * _inverse_length(x) ** 3),
        _ATAN, errors=_ALL_ROUGH),
    "asinh": Elementary(
        (np.arcsinh, _inverse_length, lambda x: -_cosine_of_angle(x) * _inverse_length(x) ** 2),
        _BELL, errors=_ALL_ROUGH),
    "asin": Elementary(
        (np.arcsin, _arc_slope, _arc_bend), ((), (0.0,), ()), _BETWEEN, closed=True, errors=_SLOPE_FINE),
    "acos": Elementary(
        (np.arccos, lambda x: -_arc_slope(x), lambda x: -_arc_bend(x)), ((), (0.0,), ()), _BETWEEN, closed=True,
        errors=_SLOPE_FINE),
    "atanh": Elementary(
        (np.arctanh, _atanh_slope, lambda x: 2.0 * x * _atanh_slope(x) ** 2), ((), (0.0,), ()), _BETWEEN,
        errors=_VALUE_ROUGH),
    "acosh": Elementary(
        (np.arccosh, _acosh_slope, _acosh_bend), domain=(1.0, math.inf), closed=True, errors=_SLOPE_FINE),
    "erf_inv": Elementary(
        (_INVERSE_ERF, _inverse_erf_slope, _inverse_erf_bend), ((), (0.0,), ()), _BETWEEN,
        errors=(ROUGH, COARSE, 2.0 * COARSE)),
    "sinh": Elementary((np.sinh, np.cosh, np.sinh), ((), (0.0,), ()), errors=_ALL_ROUGH),
    "cosh": Elementary((np.cosh, np.sinh, np.cosh), ((0.0,), (), (0.0,)), errors=_ALL_ROUGH),
    "rsqrt": Elementary(
        (lambda x: 1.0 / np.sqrt(x), lambda x: -0.5 / (x * np.sqrt(x)), lambda x: 0.75 / (x * x * np.sqrt(x))),
        domain=_POSITIVE),
}
ROOT = Elementary(
    (np.sqrt, lambda x: 0.5 / np.sqrt(x), lambda x: -0.25 / (x * np.sqrt(x))), domain=_POSITIVE, closed=True)
X_LOG_X = Elementary(
    (_x_log_x, _log_of_e_times, lambda x: 1.0 / x), ((_INVERSE_E,), (), ()), _POSITIVE, closed=True, errors=_ALL_ROUGH)
CUBE_ROOT = Elementary(  # of what is not negative
    (np.cbrt, lambda x: 1.0 / (3.0 * np.cbrt(x) ** 2), lambda x: -2.0 / (9.0 * np.cbrt(x) ** 2 * x)),
    domain=_POSITIVE, closed=True, errors=_ALL_ROUGH)
# fmt: on
