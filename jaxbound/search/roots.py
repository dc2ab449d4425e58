"""A network over a whole box: what all searches there share, and what CROWN says of every value.

Passes carry one fixed number of rows, so that however many values are bounded, every block has one program: a value's
rows begin in one of its own, and the rest are empty. Only entries that some reader does not relax exactly are bounded.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound.certificates.properties import Property
from jaxbound.graph import Graph
from jaxbound.methods import IBP, Crown, Request
from jaxbound.regions import Region
from jaxbound.relaxations import affine
from jaxbound.search.goals import Goal
from jaxbound.search.passes import Domain, started
from jaxbound.search.points import Ends
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_HELD, _FEWEST, _MOST = 1 << 21, 16, 256
"""Numbers that the rows of a pass hold on a value, and how many rows it carries."""
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
        if _work(self.skeleton) > _WORK:
            found = Crown().relax(self.graph, self.leaves, Request(rounding=True)).ends
            given, loose = {k: (found[k][0][None], found[k][1][None]) for k in self.skeleton.targets}, set()
        low, high = (jnp.asarray(end)[None] for end in self.box)
        domain = Domain(self.skeleton, self.constants, (low, high), outward=True, once=True)
        for block in self.skeleton.structure.blocks:
            domain.add(block, given)
            for number in sorted(loose & set(range(block.start, block.stop))):
                self._tighten(domain, number)
        return domain

    def _tighten(self, domain: Domain, number: int) -> None:
        """Bound the entries of a value that some reader does not relax exactly by backward passes."""
        size = self.skeleton.nodes[number].op.size
        needed = np.flatnonzero(np.asarray(domain.needed(number)))
        if not len(needed):
            return
        found = np.full((1, 2 * size), -np.inf, self.dtype)
        for first in range(0, 2 * len(needed), self.rows):
            place = np.arange(first, first + self.rows)
            entry = needed[np.minimum(place, 2 * len(needed) - 1) // 2]
            sign = np.where(place < 2 * len(needed), 1 - 2 * (place % 2), 0)
            lower = np.asarray(domain.bound_entries(number, entry[None], sign[None].astype(self.dtype)))
            used = sign != 0
            found[0, (entry + size * (sign < 0))[used]] = lower[0, used]
        domain.tighten(number, jnp.asarray(found))

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


def _work(skeleton: Skeleton) -> float:
    """How many products passes from all entries of all loose values take."""
    behind, total = 0.0, 0.0
    for number, node in enumerate(skeleton.nodes):
        behind += node.op.size * (affine.terms(node.op) if node.op.kind == "affine" else 1)
        total += 2 * node.op.size * behind * (number in skeleton.loose)
    return total
