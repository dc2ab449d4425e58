"""Bounds of a function's outputs by search: what `BranchAndBound` answers as a method.

Every entry and side is a row c, bounded below: first by CROWN, then by a search for a proof of `<c, y> > target`. Its
least bound over the domains that are left, plus the target, is a lower bound of `<c, y>` at any time, and at least the
target once none is left. The target is just below the least value that was found, and the search begins again where it
finds a lower one, so a finished search has closed the gap; or it is given (0 in `certify`), and then one search proves
all rows, and stops at a point that violates one. A search may say no more than that its target is passed, so it aims
at two normal numbers above the given one: what it proves is then above that also in the output's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound import errors, regions
from jaxbound.certificates.properties import Clause, Property
from jaxbound.graph import Graph
from jaxbound.methods import Bounded, Crown, Request, output_nodes
from jaxbound.regions import Region
from jaxbound.search.parts import Clock, Part
from jaxbound.search.points import exact_ends, inward
from jaxbound.search.race import decide
from jaxbound.search.roots import Root

Array = np.ndarray

_GAP = 1e-3
"""The part of CROWN's gap at which a search ends."""
_STEPS, _STARTS = 150, 64
"""Of the attack that finds where targets are."""


def bounded(method: Any, graph: Graph, leaves: Sequence[Region], request: Request) -> list[Bounded]:
    """Bounds of every output, for every example."""
    if len(leaves) != 1 or not regions.is_box(leaves[0]):
        raise errors.UnsupportedError("BranchAndBound searches over one box: pass a Box, or a ball with norm=jnp.inf")
    found = Crown().bound(graph, leaves, request)
    results = []
    for known, number in zip(found, output_nodes(graph), strict=True):
        own = Graph(graph.constants, graph.structure.ending_in((number,)), graph.axes)
        low = np.array(known.lower - known.lower_rounding)
        high = None if known.upper is None else np.array(known.upper + known.upper_rounding)
        points = np.full((*low.shape[: low.ndim - len(graph.nodes[number].op.shape)], *_shape(graph)), np.nan)
        if not graph.nodes[number].affine_in_region:  # there CROWN is exact
            for k in range(1 if graph.axes is None else len(low)):
                at = (...,) if graph.axes is None else (k, ...)
                ends = low[at], None if high is None else high[at]
                _improve(method, *_example(own, leaves[0], k), ends, points[at], request)
        zeros = jnp.zeros(low.shape, low.dtype)
        high = None if high is None else jnp.asarray(high)
        points = jnp.asarray(points, low.dtype)
        results.append(Bounded(jnp.asarray(low), high, zeros, zeros, points))
    return results


def _shape(graph: Graph) -> tuple[int, ...]:
    return graph.nodes[0].op.shape


def _example(graph: Graph, region: Region, k: int) -> tuple[Graph, Region]:
    """One example's part of a batch."""
    if graph.axes is None:
        return graph, region
    take = lambda leaf: leaf[k]  # noqa: E731
    pairs = zip(graph.constants, graph.axes, strict=True)
    constants = tuple(part if axis is None else jax.tree.map(take, part) for part, axis in pairs)
    return Graph(constants, graph.structure), jax.tree.map(take, region)


def _improve(
    method: Any, graph: Graph, region: Region, ends: tuple[Array, Array | None], point: Array, request: Request
):
    """Move the ends of one example's output inward, in place; where there is a target, also a point that misses it."""
    dtype = ends[0].dtype
    exact = exact_ends(region)
    if not (np.isfinite(exact[0]).all() and np.isfinite(exact[1]).all() and np.all(exact[0] <= exact[1])):
        return
    clock = Clock(method.timeout)
    root = Root(graph, (region,), inward(*exact, dtype))
    parts = [end.reshape(-1) for end in ends if end is not None]  # views
    unit = np.eye(parts[0].size)
    rows = np.concatenate([unit, -unit][: len(parts)])
    known = np.concatenate([parts[0], *(-part for part in parts[1:])]).astype(np.float64)
    outward = bool(request.rounding)

    def part_of(chosen: Array, targets: Array, clock: Clock) -> Part:
        clauses = [Clause(rows[j][None], np.array([t])) for j, t in zip(chosen, targets, strict=True)]
        return Part(lambda: root, None, Property(tuple(clauses)), method, clock, outward=outward)

    best = known.copy()
    if request.target is not None:
        chosen = np.flatnonzero(~(known > request.target))
        if len(chosen):
            aim = request.target + 2 * float(max(np.finfo(dtype).tiny, np.spacing(dtype.type(abs(request.target)))))
            part = part_of(chosen, np.full(len(chosen), aim), clock)
            decide(part, jax.random.key(0), clock, progress=False)
            best[chosen] = np.maximum(known[chosen], part.lower + aim)
            if part.found is not None:
                point[...] = part.found[0]
    else:
        order = np.arange(len(rows))
        part = part_of(order, np.zeros(len(rows)), clock)
        part.prepare()
        assert part.attack is not None
        least = part.attack.least(jax.random.key(0), _STEPS, _STARTS, clock.over)
        for j in order:
            own = Clock(None if clock.left is None else clock.left / (len(order) - j))
            while not (own.over() or clock.stopped) and best[j] < (target := _below(least[j], known[j])):
                part = part_of(order[j : j + 1], np.array([target]), own)
                decide(part, jax.random.key(1), own, progress=False)
                best[j] = max(best[j], part.lower + target)
                if own.stopped:
                    clock.stop()
                if part.found is None:
                    break
                least[j] = rows[j] @ part.found[1].ravel()
    count = parts[0].size
    for end, sign, own in zip(parts, (1, -1), (best[:count], best[count:]), strict=False):
        end[...] = sign * np.maximum(sign * end, _down(own, dtype))


def _below(least: float, known: float) -> float:
    """Just below the least value that was found, by a part of the gap to what is known."""
    return least - (_GAP * abs(least - known) if np.isfinite(known) else 0) - 1e-6 * abs(least)


def _down(values: Array, dtype: DTypeLike) -> Array:
    """Bounds, sums of two floats, rounded down."""
    values = np.nextafter(values, -np.inf)
    near = values.astype(dtype)
    return np.where(near > values, np.nextafter(near, np.array(-np.inf, dtype)), near)
