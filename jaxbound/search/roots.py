"""A network over a whole box: what all searches there share, and what CROWN says of every value.

Passes carry one fixed number of rows, so that however many values are bounded, every block has one program: a value's
rows begin in one of its own, and the rest are empty. Only entries that some reader does not relax exactly are bounded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound.certificates.properties import Property
from jaxbound.graph import Graph
from jaxbound.methods import IBP, Crown, Request
from jaxbound.regions import Region
from jaxbound.search.clipping import Functions, functions_of
from jaxbound.search.goals import Goal
from jaxbound.search.passes import Domain, Found, started
from jaxbound.search.points import Ends
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_HELD, _FEWEST, _MOST = 1 << 21, 16, 256
"""Numbers that the rows of a pass hold on a value, and how many rows it carries."""
_KEPT = 1 << 18
"""Coefficients of neurons in what is free of the input, up to which they are clipped."""
_WORK = 4e12
"""Products of passes from all entries, above which `Crown` bounds a network: its rows know windows."""


class Root:
    """A network of one region and one output over a whole box: what all searches there share."""

    def __init__(self, graph: Graph, leaves: tuple[Region, ...], ends: Ends):
        self.graph, self.leaves, self.ends = graph, leaves, ends
        self.dtype = ends.lower.dtype
        self.skeleton, self.constants = Skeleton(graph.structure), graph.constants
        low, high = regions.enclosing_box(leaves[0], self.dtype)
        self.box = np.asarray(low), np.asarray(high)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many inputs and outputs there are."""
        return self.box[0].size, self.skeleton.nodes[self.skeleton.output].op.size

    @functools.cached_property
    def rows(self) -> int:
        """How many rows a pass carries."""
        widest = max(node.op.size for node in self.skeleton.nodes)
        return int(np.clip(_HELD // widest, _FEWEST, _MOST))

    @functools.cached_property
    def domain(self) -> Domain:
        """What CROWN says of every value over the box, rounding counted."""
        loose, given = set(self.skeleton.loose), {}
        if self.skeleton.work > _WORK:
            found = Crown().relax(self.graph, self.leaves, Request(rounding=True)).ends
            given, loose = {k: (found[k][0][None], found[k][1][None]) for k in self.skeleton.targets}, set()
        low, high = (jnp.asarray(end)[None] for end in self.box)
        domain = Domain(self.skeleton, self.constants, (low, high), outward=True, once=True)
        for block in self.skeleton.structure.blocks:
            domain.add(block, given)
            for number in sorted(loose & set(range(block.start, block.stop))):
                self._tighten(domain, number)
        return domain

    def _needed(self, domain: Domain, number: int) -> Array:
        """The entries of a value that some reader does not relax exactly."""
        return np.flatnonzero(np.asarray(domain.needed(number)))

    def _tighten(self, domain: Domain, number: int) -> None:
        """Bound the needed entries of a value by backward passes."""
        needed = self._needed(domain, number)
        if len(needed):
            lower = np.zeros(2 * len(needed), self.dtype)
            for own, found in self._entries(domain, number, needed):
                lower[own] = np.asarray(found.lower)[0, : own.stop - own.start]
            whole = np.full((2, self.skeleton.nodes[number].op.size), -np.inf, self.dtype)
            whole[:, needed] = lower.reshape(2, -1)
            domain.tighten(number, jnp.asarray(whole.reshape(1, -1)))

    def _entries(self, domain: Domain, number: int, needed: Array) -> Iterator[tuple[slice, Found]]:
        """Passes from entries of a value, then from their negatives, and which of these each bounds."""
        entry, sign = np.tile(needed, 2), np.repeat(np.array([1, -1], self.dtype), len(needed))
        for first in range(0, len(entry), self.rows):
            own = slice(first, min(first + self.rows, len(entry)))
            rows = (np.pad(part[own], (0, self.rows - len(part[own])))[None] for part in (entry, sign))
            yield own, domain.bound_entries(number, *rows)

    def functions(self, numbers: tuple[int, ...]) -> Functions | None:
        """Linear functions below the entries of values, and below their negatives; None if too many."""
        sizes = [self.skeleton.nodes[number].op.size for number in numbers]
        low, high = map(np.ravel, self.box)
        free = np.flatnonzero(low < high)
        if sum(sizes) * len(free) > _KEPT:
            return None
        lower = np.full((2, sum(sizes)), -np.inf, self.dtype)
        slopes = np.zeros((*lower.shape, len(free)), self.dtype)
        for number, first in zip(numbers, np.cumsum([0, *sizes]), strict=False):
            needed = self._needed(self.domain, number)
            side, place = np.repeat([0, 1], len(needed)), first + np.tile(needed, 2)
            for own, found in self._entries(self.domain, number, needed):
                count = own.stop - own.start
                lower[side[own], place[own]] = np.asarray(found.lower)[0, :count]
                slopes[side[own], place[own]] = np.asarray(found.inputs)[0, :count].reshape(count, -1)[:, free]
        return functions_of(free, slopes, lower, self.box)

    def lower(self, goal: Goal) -> Array:
        """What CROWN says of a goal's rows, (rows,)."""
        count, parts = len(goal.offsets), []
        for first in range(0, count, self.rows):
            own = np.minimum(np.arange(first, first + self.rows), count - 1)
            rows = [None if part is None else jnp.asarray(part[own])[None] for part in goal[:3]]
            parts.append(np.asarray(self.domain.bound(*started(self.skeleton, rows)).lower)[0])
        return np.concatenate(parts)[:count]

    def reach(self, prop: Property) -> tuple[Array, Array]:
        """The largest magnitudes of inputs, and of outputs where a coefficient of a property has to be rounded."""
        arrays = [array for clause in prop.clauses for array in (clause.outputs, clause.inputs)]
        inputs = np.maximum(*map(np.abs, self.box)).ravel().astype(np.float64)
        if all(array is None or np.array_equal(array, array.astype(self.dtype)) for array in arrays):
            return inputs, np.zeros(self.sizes[1])
        (found,) = IBP().bound(self.graph, self.leaves, Request(rounding=True))
        assert found.upper is not None
        ends = [np.abs(np.asarray(end, np.float64)) for end in (found.lower, found.upper)]
        error = np.maximum(found.lower_rounding, found.upper_rounding)
        return inputs, np.ravel(np.maximum(*ends) + np.asarray(error, np.float64))
