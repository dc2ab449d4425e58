"""`verify`: a property of a function over a region, proved, refuted by a counterexample, or left open."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors, regions
from jaxbound.methods import IBP, Crown, Request
from jaxbound.model import Model
from jaxbound.properties import Property
from jaxbound.regions import Box, Region
from jaxbound.search.goals import goal_of
from jaxbound.search.inputs import InputSplits
from jaxbound.search.passes import Domain, Skeleton
from jaxbound.search.points import Search, inward
from jaxbound.search.relus import ReluSplits
from jaxbound.transform import Problem, prepare

PROVED = "real arithmetic on the given parameters, rounding counted"
EXECUTED = "as executed: the function itself violates the property at this point"
NEAREST = "; the region has no such float, and the point is the nearest one"
NOTHING = "nothing is claimed"
_FEW = 20
"""Inputs that are not fixed, up to which a search splits inputs."""
_WIDE = 1024
"""Values wider than this are bounded by a method that chooses rows."""


@dataclass(frozen=True)
class BranchAndBound:
    """How `verify` searches."""

    split: str = "auto"
    steps: int = 20
    batch: int | None = None
    timeout: float | None = None
    max_nodes: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What is known of a property over a region.

    Args:
        status: "verified", "falsified" or "unknown".
        counterexample: a point of the region that violates the property, in the function's dtype; None if there is none.
        outputs: the function's outputs there.
        lower: a lower bound of the property's margin over the region (see `Property.margin`): positive if verified.
        nodes: how many domains were bounded.
        seconds: how long it took, compiling included.
        guarantee: what the verdict holds for.

    >>> Verdict("unknown", None, None, -0.5, 3, 0.1, "nothing is claimed").status
    'unknown'
    """

    status: str
    counterexample: np.ndarray | None
    outputs: np.ndarray | None
    lower: float
    nodes: int
    seconds: float
    guarantee: str
    margin: Any = dataclasses.field(default=None, repr=False, compare=False)


class Clock:
    """Until when a search may go on."""

    def __init__(self, timeout: float | None):
        self.start = time.monotonic()
        self.deadline = None if timeout is None else self.start + timeout

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


def verify(
    fn: Callable,
    region: Region | Sequence[Region],
    prop: Property,
    *,
    method: BranchAndBound = BranchAndBound(),  # noqa: B008
    timeout: float | None = None,
    key: jax.Array | None = None,
    attack: bool = True,
    certificate: object = None,
    progress: bool = True,
    rounding: bool = True,
) -> Verdict:
    """Decide whether a property holds over a region."""
    if certificate is not None:
        raise errors.UnsupportedError("verify writes no certificates yet; leave certificate out")
    timeout = method.timeout if timeout is None else timeout
    clock = Clock(timeout)
    parts = [part for one in _regions(region) for part in _checked(prop).parts(_as_box(one))]
    key = jax.random.key(0) if key is None else key
    nodes, lower, status = 0, np.inf, "verified"
    for box, own in parts:
        part = _Part(fn, box, own, method, clock, key, attack, rounding)
        found = part.run()
        nodes, lower = nodes + part.nodes, min(lower, part.lower)
        if found is not None:
            guarantee = EXECUTED + ("" if part.ends.inside else NEAREST)
            return Verdict("falsified", *found, lower, nodes, clock.seconds, guarantee)
        if not part.lower > 0:
            status = "unknown"
    return Verdict(status, None, None, lower, nodes, clock.seconds, PROVED if status == "verified" else NOTHING)


def _checked(prop: Property) -> Property:
    if not isinstance(prop, Property):
        raise errors.argument_type("prop", f"is {prop!r}", "pass a jaxbound.Property, such as Property.robust(0, 10)")
    if not prop.clauses or any(len(clause.offsets) == 0 for clause in prop.clauses):
        raise errors.argument("prop", "has no clauses, or a clause without rows", "say what a counterexample satisfies")
    return prop


def _regions(region) -> list[Region]:
    found = list(region) if isinstance(region, list | tuple) else [region]
    if not found:
        raise errors.argument("region", "is an empty list", "pass a jaxbound.Box, or several")
    return found


def _as_box(region: Region) -> Box:
    """The ends of a box in float64, and refusals."""
    regions.validate(region, "region")
    if isinstance(region, Box):
        return Box(np.asarray(region.lower, np.float64), np.asarray(region.upper, np.float64))
    if not regions.is_box(region):
        raise errors.argument("region", f"is a ball of norm {region.norm}", "pass a Box, or a ball with norm=jnp.inf")
    low, high = regions.enclosing_box(region)
    return Box(np.asarray(low, np.float64), np.asarray(high, np.float64))


class _Part:
    """One box with the clauses that count there."""

    def __init__(self, fn, box: Box, prop: Property, method, clock: Clock, key, attack: bool, rounding: bool):
        self.clock, self.key, self.method, self.attacked = clock, key, method, attack
        dtype = jnp.result_type(float)
        self.ends = inward(np.asarray(box.lower), np.asarray(box.upper), dtype)
        problem = _problem(fn, Box(np.asarray(box.lower), np.asarray(box.upper)), dtype)
        self.problem = problem
        graph = problem.graph
        self.skeleton, self.constants = Skeleton(graph.structure), graph.constants
        self.box = tuple(np.asarray(end) for end in regions.enclosing_box(problem.leaves[0]))
        sizes = self.box[0].size, self.skeleton.nodes[self.skeleton.output].op.size
        _check_sizes(prop, sizes)
        self.goal = goal_of(prop, dtype, sizes, self._reach(prop, dtype))
        shape = self.box[0].shape
        self.points = Search(fn, prop, self.goal, self.ends, shape, self.skeleton, self.constants)
        self.splits: InputSplits | ReluSplits | None = None
        self.found = None

    @property
    def nodes(self) -> int:
        return 0 if self.splits is None else self.splits.nodes

    @property
    def lower(self) -> float:
        if self.splits is None or self.splits.stuck:
            return -np.inf
        return self.splits.lower

    def _reach(self, prop: Property, dtype):
        exact = all(np.array_equal(a, a.astype(dtype)) for c in prop.clauses for a in (c.outputs, c.inputs) if a is not None)
        inputs = np.maximum(*map(np.abs, self.box)).ravel().astype(np.float64)
        if exact:
            return inputs, np.zeros(self.skeleton.nodes[self.skeleton.output].op.size)
        (found,) = IBP().bound(self.problem.graph, self.problem.leaves, Request(rounding=True))
        ends = [np.asarray(found.lower - found.lower_rounding), np.asarray(found.upper + found.upper_rounding)]
        return inputs, np.maximum(*map(np.abs, ends)).ravel().astype(np.float64) * (1 + 1e-6)

    def run(self):
        """Search until the property is proved, refuted, or the time is up; a counterexample or None."""
        done = threading.Event()
        stop = lambda: done.is_set() or self.clock.over()  # noqa: E731
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._attack, stop) if self.attacked else None
            try:
                return self._search(future, stop)
            finally:
                done.set()

    def _attack(self, stop):
        keys = jax.random.split(self.key, 3)
        for key, steps, starts in zip(keys, (20, 60, 120), (64, 128, 256), strict=True):
            found = None if stop() else self.points.attack(key, steps, starts, stop)
            if found is not None:
                return found
        return None

    def _search(self, future, stop):
        self.splits = self._started()
        while self.splits.left and not self.clock.over():
            if future is not None and future.done() and future.result() is not None:
                return future.result()
            if self.method.max_nodes is not None and self.nodes >= self.method.max_nodes:
                break
            points = self.splits.step(stop)
            if len(points) and self.attacked and not stop():
                found = self.points.among(points)
                if found is not None:
                    return found
        if not self.splits.left and not self.splits.stuck:
            return None
        return None if future is None else future.result()

    def _started(self):
        free = int((self.box[1] > self.box[0]).sum())
        split = self.method.split
        if split == "auto":
            split = "input" if free <= _FEW or not self.skeleton.rectifiers else "relu"
        if split == "input":
            return InputSplits(self.skeleton, self.constants, self.goal, self.box, {}, self.method.batch)
        known = self._known()
        return ReluSplits(
            self.skeleton, self.constants, self.goal, self.box, known, self.method.steps, self.method.batch
        )

    def _known(self) -> dict:
        """Bounds of everything over the whole region."""
        largest = max((self.skeleton.nodes[k].op.size for k in self.skeleton.loose), default=0)
        box = tuple(jnp.asarray(end)[None] for end in self.box)
        domain = Domain(self.skeleton, self.constants, box, outward=True)
        given = {}
        if largest > _WIDE:
            found = Crown().pre_activations(self.problem.graph, self.problem.leaves, Request(rounding=True))
            given = {k: tuple(end[None] for end in ends) for k, ends in found.items()}
        for block in self.skeleton.structure.blocks:
            domain.add(block, given)
            if not given:
                for number in sorted(set(self.skeleton.loose) & set(range(block.start, block.stop))):
                    domain.tighten(number)
        return {k: (low[0], high[0]) for k, (low, high) in domain.ends.items() if k > 0}


def _problem(fn, box: Box, dtype) -> Problem:
    if isinstance(fn, Model):
        return prepare(fn.fn, (fn.params, _cast(box, dtype)))
    return prepare(fn, (_cast(box, dtype),))


def _cast(box: Box, dtype) -> Box:
    return Box(*regions.enclosing_box(box, dtype))


def _check_sizes(prop: Property, sizes: tuple[int, int]) -> None:
    for name, given, wanted in zip(("inputs", "outputs"), prop.sizes, sizes, strict=True):
        if given is not None and given != wanted:
            raise errors.argument("prop", f"speaks of {given} {name}", f"the function has {wanted} {name}")
