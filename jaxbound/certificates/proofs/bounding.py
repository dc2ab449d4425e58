r"""Bounds of a network's values in float64 with an a-priori error, or in rational numbers with none.

A backward pass has rows C on a value v and goes to rows on what v is made of, to the input at last. For an affine layer
v = L w + b the computed rows differ from C L by at most gamma |C| |L|, entry by entry, and what they add from C b by
gamma |C| |b|. So whatever w is in the domain, with |w| <= m there, a pass is wrong by at most

    unit * <|C|, reach(v)>,     reach(v) = |L| m + |b|,      unit = 4 gamma_N,

with N the length of all sums of a pass together (Higham 2002, section 3.1). The same holds for a ReLU, whose slopes are
at most 1, with reach = 4 m, for the sums of rows from several readers, and for the input at the end. These are taken
off for every value that rows meet: no error is estimated, and none is left out. With fractions the unit is 0.

A ReLU on [l, u] with l < 0 < u lies above `slope * z`, for a slope in [0, 1] that the certificate gives, and below its
chord. A split neuron has sign * z >= 0, so that for every multiplier beta >= 0

    <C, z>  >=  <C, z> - beta sign z.

Where two bounds of one value leave no number between them, the domain is empty: both hold.

All arrays have a first axis of domains, 1 where they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxbound.certificates.proofs.layers import Array, Dense, Layer, Relu
from jaxbound.certificates.proofs.reading import Layers

Ends = tuple[Array, Array]

_SLACK = 1 + 2.0**-20
"""For the rounding of error bounds themselves."""
_TINY = 2.0**-1000
"""More than what underflow may cost a sum."""
_HELD = 1 << 22
"""Coefficients that a pass may hold on one value."""


class Found(NamedTuple):
    """Lower bounds of rows, (domains, rows), and the linear functions that they are the least values of."""

    lower: Array
    inputs: Array
    """(domains, rows, inputs)."""


class Domains:
    """What is proved of every value on each of some domains.

    Args:
        network: the layers.
        box: the ends of the inputs, (domains, inputs).
        slopes: the lower slopes of all ReLUs, (domains, neurons), in [0, 1].
        root: what was proved on one domain with the same box; what no split changes is taken over.
        known: what was proved of some values on larger domains, (domains, size) each.
        signs: +1 or -1 for neurons that are split, 0 for others, (domains, neurons).
        tighten: which inputs of ReLUs are bounded by backward passes: "none", "open" (those whose sign intervals leave
            open) or "all".
    """

    def __init__(
        self,
        network: Layers,
        box: Ends,
        slopes: Array,
        *,
        root: Domains | None = None,
        known: Mapping[int, Ends] = MappingProxyType({}),
        signs: np.ndarray | None = None,
        tighten: str = "none",
    ):
        self.network, self.unit = network, _unit(network)
        self.ends: list[Ends] = []
        self.charges: list[Array] = []
        self.planes: dict[int, tuple[Array, Array, Array]] = {}
        self.empty = np.zeros(len(slopes), bool)
        """Which domains are proved to be empty."""
        starts = np.cumsum([0, *network.sizes])
        place = {source: slice(starts[k], starts[k + 1]) for k, source in enumerate(network.rectified)}
        same: list[bool] = []
        for number, layer in enumerate(network.layers):
            split = signs is not None and number in place and bool(np.any(signs[:, place[number]]))
            shared = root is not None and all(same[k] for k in layer.sources)
            same.append(shared and not split)
            before = known.get(number) if root is None else root.ends[number]
            if root is not None and shared:
                low, high = root.ends[number]
                self.charges.append(root.charges[number])
            else:
                low, high = box if number == 0 else self._interval(layer)
                if before is not None:
                    low, high = np.maximum(low, before[0]), np.minimum(high, before[1])
                self.charges.append(self._charge(layer, (low, high)))
            if split and signs is not None:
                own = signs[:, place[number]]
                low, high = np.where(own > 0, np.maximum(low, 0), low), np.where(own < 0, np.minimum(high, 0), high)
            self.ends.append((low, high))
            mixed = sum(isinstance(before, Dense) for before in network.layers[: number + 1])
            if number in place and tighten != "none" and mixed > 1:  # intervals are exact before
                self._tighten(number, tighten)
            self.empty |= np.any(self.ends[number][0] > self.ends[number][1], axis=1)
            if isinstance(layer, Relu):
                self._relax(number, layer, slopes[:, place[layer.sources[0]]])

    def _interval(self, layer: Layer) -> Ends:
        low, high = layer.interval(*(self.ends[k] for k in layer.sources))
        if isinstance(layer, Relu):
            return low, high
        if layer.shift is not None:
            low, high = low + layer.shift, high + layer.shift
        if self.unit:
            error = self.unit * _SLACK * self._reach(layer) + _TINY
            low, high = low - error, high + error
            low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
        return low, high

    def _reach(self, layer: Layer) -> Array:
        found = layer.reach(*(_size(self.ends[k]) for k in layer.sources))
        return found if layer.shift is None else found + np.abs(layer.shift)

    def _charge(self, layer: Layer, ends: Ends) -> Array:
        """What a unit of coefficient on a value may cost."""
        if isinstance(layer, Relu):
            return self.unit * 4 * _size(self.ends[layer.sources[0]])
        return self.unit * (np.maximum(self._reach(layer), _size(ends)) if layer.sources else _size(ends))

    def _relax(self, number: int, layer: Layer, slope: Array) -> None:
        """Lower slopes, chords and their heights."""
        low, high = self.ends[layer.sources[0]]
        open_, one = (low < 0) & (high > 0), np.array(1.0 if self.unit else Fraction(1))
        bottom, top = np.where(open_, low, -1) * one, np.where(open_, high, 1) * one
        chord = top / (top - bottom)
        height = np.maximum(-chord * bottom, top - chord * top)
        if self.unit:
            height = height + 2.0**-48 * (top - bottom) + _TINY
        fixed = np.where(low >= 0, one, one * 0)
        self.planes[number] = np.where(open_, slope, fixed), np.where(open_, chord, fixed), np.where(open_, height, 0)

    def _tighten(self, number: int, which: str) -> None:
        """Bound entries of a value by backward passes; every domain as many as the one with the most."""
        low, high = (end.copy() for end in self.ends[number])
        needed = np.ones(low.shape, bool) if which == "all" else (low < 0) & (high > 0)
        order = np.argsort(~needed, axis=1, kind="stable")[:, : needed.sum(axis=1).max(initial=0)]
        most = max(layer.size for layer in self.network.layers[: number + 1])
        step, domain = max(1, _HELD // (2 * most * len(low))), np.arange(len(low))[:, None]
        for first in range(0, order.shape[1], step):
            entry = order[:, first : first + step]
            count = np.arange(entry.shape[1])
            rows = np.zeros((len(low), 2 * len(count), low.shape[1]), low.dtype)
            rows[domain, count, entry], rows[domain, len(count) + count, entry] = 1, -1
            found = self.lower({number: rows}, np.zeros(rows.shape[:2], low.dtype)).lower
            low[domain, entry] = np.maximum(low[domain, entry], found[:, : len(count)])
            high[domain, entry] = np.minimum(high[domain, entry], -found[:, len(count) :])
        self.ends[number] = low, high

    def lower(self, rows: dict[int, Array], intercept: Array, added: dict[int, Array] | None = None) -> Found:
        """Lower bounds of `<rows, values> + intercept` over each domain.

        Args:
            rows: per value, coefficients (domains, rows, size).
            intercept: (domains, rows).
            added: per value, what split neurons add to all rows' coefficients there, -beta * sign, (domains, size).
        """
        rows, added = dict(rows), added or {}
        lost = self.unit * np.abs(intercept)
        for number in reversed(range(1, max(rows) + 1)):
            own = rows.pop(number, None)
            if own is None:
                continue
            if number in added:
                own = own + added[number][:, None]
            lost = lost + _dot(np.abs(own), self.charges[number]) if self.unit else lost
            layer = self.network.layers[number]
            if isinstance(layer, Relu):
                slope, chord, height = self.planes[number]
                above, below = np.maximum(own, 0), np.minimum(own, 0)
                intercept = intercept + _dot(below, height)
                pulled = [above * slope[:, None] + below * chord[:, None]]
            else:
                intercept = intercept if layer.shift is None else intercept + own @ layer.shift
                pulled = layer.pull(own)
            for source, part in zip(layer.sources, pulled, strict=True):
                rows[source] = rows[source] + part if source in rows else part
        low, high = self.ends[0]
        inputs = rows[0]
        lower = intercept + _dot(np.maximum(inputs, 0), low) + _dot(np.minimum(inputs, 0), high)
        if self.unit:
            lost = lost + _dot(np.abs(inputs), self.charges[0])
            room = _TINY * (1 + sum(float(np.sum(charge)) for charge in self.charges) / self.unit)
            lower = lower - _SLACK * lost - room
            lower = np.where(np.isfinite(lower) & np.isfinite(lost), lower, -np.inf)
        return Found(lower, inputs)


def _unit(network: Layers) -> float:
    """Four times Higham's gamma for the sums of a whole pass."""
    if network.rational:
        return 0
    lengths = sum(
        layer.size + max(layer.matrix.shape if isinstance(layer, Dense) else (0,)) for layer in network.layers
    )
    small = (lengths + 64) * 2.0**-53
    return 4 * small / (1 - small)


def _dot(rows: Array, values: Array) -> Array:
    """Per domain and row the sum of products with the domain's values."""
    return (rows @ values[..., None])[..., 0]


def _size(ends: Ends) -> Array:
    return np.maximum(np.abs(ends[0]), np.abs(ends[1]))
