"""Intervals of float64 numbers, arrays of them, with arithmetic that contains every real result.

For x in X and y in Y the real number `x op y` lies in `X op Y`. Sums and products are error-free transformations
(Knuth 1969, section 4.2.2; Dekker 1971), rounded outward only where they are inexact, so that what is exactly zero
stays exactly zero.

Infinite ends mean unbounded, not infinite values: `0 * (unknown but finite) = 0`. Results are rounded outward by the
next number and by more than any underflow, so that it does not matter whether subnormal numbers are flushed to zero.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray

LARGEST = float(np.finfo(np.float64).max)
TINY = 2.0**-1021
"""Absorbs every underflow, flushed to zero or not."""
_SPLIT = 134217729.0  # 2**27 + 1


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
        upper = np.where(inexact[1], up(total[1]), total[1])
        return Interval(np.where(np.isnan(lower), -np.inf, lower), np.where(np.isnan(upper), np.inf, upper))

    def __sub__(self, other: "Interval") -> "Interval":
        return self + -other

    def __mul__(self, other: "Interval") -> "Interval":
        x, y = np.broadcast_arrays(np.stack([*self]), np.stack([*other]))
        a, b = x[:, None], y[None]
        product = np.where((a == 0) | (b == 0), 0.0, a * b)
        inexact = _inexact_product(a, b, product)
        return outward(product.reshape(4, *x.shape[1:]), inexact.reshape(4, *x.shape[1:]))

    def __truediv__(self, other: "Interval") -> "Interval":
        """The quotients on the part of `other` that is not 0; the whole line where it has 0 inside, or is 0."""
        (low, high), (y_low, y_high) = np.broadcast_arrays(np.stack([*self]), np.stack([*other]))
        y_low, y_high = y_low + 0.0, np.where(y_high == 0, -0.0, y_high)  # a zero end is approached from inside
        a, b = np.stack([low, low, high, high]), np.stack([y_low, y_high, y_low, y_high])
        quotient = np.where((a == 0) | np.isinf(b), np.copysign(0.0, a) * np.sign(b), a / b)
        inexact = ((quotient * b != a) | _inexact_product(quotient, b, a)) & (a != 0)
        whole = ((y_low < 0) & (y_high > 0)) | ((y_low == 0) & (y_high == 0))
        return where(whole, WHOLE, outward(quotient, inexact))

    def over(self, number: float) -> "Interval":
        """`x / number`."""
        return self / Interval(np.full(1, number), np.full(1, number))

    def twice(self) -> "Interval":
        """`2 x`."""
        return self + self

    def squared(self) -> "Interval":
        """`x^2`, not negative."""
        far = np.maximum(np.abs(self.lower), np.abs(self.upper))
        near = np.minimum(np.abs(self.lower), np.abs(self.upper))
        ends = np.stack([np.where((self.lower <= 0) & (self.upper >= 0), 0.0, near), far])
        return outward(ends * ends, _inexact_product(ends, ends, ends * ends))


WHOLE, ONE = Interval(np.array(-np.inf), np.array(np.inf)), Interval(np.ones(1), np.ones(1))


def _down(x: Array) -> Array:
    return np.nextafter(x - TINY, -np.inf)


def up(x: Array) -> Array:
    """A number above every real number that rounds to x."""
    return np.nextafter(x + TINY, np.inf)


def _inexact_product(x: Array, y: Array, product: Array) -> Array:
    """Dekker's test: where `product` is not proved to be exactly `x * y`."""
    x_high, y_high = _SPLIT * x - (_SPLIT * x - x), _SPLIT * y - (_SPLIT * y - y)
    x_low, y_low = x - x_high, y - y_high
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return ~((error == 0) & (np.abs(product) > 1e-270)) & (x != 0) & (y != 0)


def outward(candidates: Array, inexact: Array, relative: float = 0.0) -> Interval:
    """The hull over axis 0 of candidates whose sign bits are right and whose inexact members are rounded outward."""
    negative, finite = np.signbit(candidates), np.clip(candidates, -LARGEST, LARGEST)
    margin = relative * np.abs(finite)
    low = np.where(inexact & (candidates > -np.inf), _down(finite - margin), candidates)
    high = np.where(inexact & (candidates < np.inf), up(finite + margin), candidates)
    low = np.where(negative, low, np.maximum(low, 0.0))
    high = np.where(negative, np.minimum(high, 0.0), high)
    return Interval(np.where(np.isnan(low), -np.inf, low).min(0), np.where(np.isnan(high), np.inf, high).max(0))


def where(condition: Array, x: Interval, y: Interval) -> Interval:
    """x where the condition holds, y elsewhere."""
    return Interval(np.where(condition, x.lower, y.lower), np.where(condition, x.upper, y.upper))


def stack(*rows: Interval) -> Interval:
    """Intervals as the rows of one array of them."""
    return Interval(np.stack([row.lower for row in rows]), np.stack([row.upper for row in rows]))
