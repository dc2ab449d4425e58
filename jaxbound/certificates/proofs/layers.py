"""What a checked network is made of: functions of flat arrays, each with its transpose and the size of its sums.

Every value is one row of numbers. `Move` puts numbers elsewhere, which transposes, slices, broadcasts, padding and the
windows of convolutions and pooling are; `Dense` multiplies by a matrix; `Scale`, `Shift` and `Add` are what they say;
`Relu` is the one nonlinearity. So a convolution is a `Move` to windows and a `Dense` matrix.

For an affine layer, `reach(sizes)` bounds the sum of the magnitudes of all that is added up in an entry, from bounds of
the magnitudes of what it reads. `pull(rows)` takes rows of coefficients on its value to rows on what it reads, and
`shift` is what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any
"""A NumPy array of float64 numbers, or of `fractions.Fraction` objects."""


@dataclass(eq=False)
class Layer:
    """One value; `sources` are the numbers of those that it reads."""

    sources: tuple[int, ...]
    size: int
    shift: Array = field(default=None, kw_only=True)

    def apply(self, *values: Array) -> Array:
        """The value, (..., size), without the shift."""
        raise NotImplementedError

    def interval(self, *ends: tuple[Array, Array]) -> tuple[Array, Array]:
        """Its least and largest values, without the shift, up to rounding."""
        return self.apply(*(low for low, _ in ends)), self.apply(*(high for _, high in ends))

    def reach(self, *sizes: Array) -> Array:
        """See the module's head; without the shift."""
        return self.apply(*sizes)

    def pull(self, rows: Array) -> list[Array]:
        """Rows on each of the sources, from rows (..., size) on the value."""
        raise NotImplementedError


@dataclass(eq=False)
class Move(Layer):
    """Entry k is entry `take[k]` of the source, or 0 where that is -1."""

    take: np.ndarray
    given: int
    """The size of the source."""

    def __post_init__(self):
        # the k-th readers of all entries form a group, in which no entry is read twice: `pull` is a sum over groups
        order = np.argsort(self.take, kind="stable")
        order = order[self.take[order] >= 0]
        _, first, counts = np.unique(self.take[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(first, counts)
        self.groups = [order[rank == k] for k in range(int(rank.max(initial=-1)) + 1)]

    def apply(self, *values: Array) -> Array:
        """Entries of the source."""
        (value,) = values
        nothing = np.zeros((*value.shape[:-1], 1), value.dtype)
        return np.concatenate([value, nothing], axis=-1)[..., self.take]

    def pull(self, rows: Array) -> list[Array]:
        """The sums over all readers of an entry."""
        found = np.zeros((*rows.shape[:-1], self.given), rows.dtype)
        for group in self.groups:
            found[..., self.take[group]] += rows[..., group]
        return [found]


@dataclass(eq=False)
class Dense(Layer):
    """Stretches of `matrix.shape[0]` numbers, each times the matrix."""

    matrix: Array

    def __post_init__(self):
        self.up, self.down = np.maximum(self.matrix, 0), np.minimum(self.matrix, 0)
        self.absolute = np.abs(self.matrix)

    def _times(self, value: Array, matrix: Array) -> Array:
        parts = value.reshape(*value.shape[:-1], -1, len(matrix)) @ matrix
        return parts.reshape(*value.shape[:-1], -1)

    def apply(self, *values: Array) -> Array:
        """Times the matrix."""
        return self._times(values[0], self.matrix)

    def interval(self, *ends: tuple[Array, Array]) -> tuple[Array, Array]:
        """Positive weights times one end, negative ones times the other."""
        ((low, high),) = ends
        return (
            self._times(low, self.up) + self._times(high, self.down),
            self._times(high, self.up) + self._times(low, self.down),
        )

    def reach(self, *sizes: Array) -> Array:
        """Magnitudes times those of the weights."""
        return self._times(sizes[0], self.absolute)

    def pull(self, rows: Array) -> list[Array]:
        """Times the transpose."""
        return [self._times(rows, self.matrix.T)]


@dataclass(eq=False)
class Scale(Layer):
    """Entry by entry times a factor."""

    factor: Array

    def apply(self, *values: Array) -> Array:
        """Times the factor."""
        return values[0] * self.factor

    def interval(self, *ends: tuple[Array, Array]) -> tuple[Array, Array]:
        """Exchanged where the factor is negative."""
        products = ends[0][0] * self.factor, ends[0][1] * self.factor
        return np.minimum(*products), np.maximum(*products)

    def reach(self, *sizes: Array) -> Array:
        """Magnitudes times those of the factors."""
        return sizes[0] * np.abs(self.factor)

    def pull(self, rows: Array) -> list[Array]:
        """Times the factor again."""
        return [rows * self.factor]


@dataclass(eq=False)
class Add(Layer):
    """The sum of its sources, one or several."""

    def apply(self, *values: Array) -> Array:
        """Their sum."""
        return sum(values[1:], values[0])

    def pull(self, rows: Array) -> list[Array]:
        """The same for each."""
        return [rows for _ in self.sources]


@dataclass(eq=False)
class Relu(Layer):
    """max(z, 0), entry by entry."""

    def apply(self, *values: Array) -> Array:
        """The larger one."""
        return np.maximum(values[0], 0)
