"""One box with the clauses that count there: its network, its attack and its domains."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors, regions
from jaxbound.certificates.properties import Property
from jaxbound.methods import IBP, Crown, CrownIBP, Request, domains
from jaxbound.network.model import Model
from jaxbound.regions import Box
from jaxbound.search.goals import Goal, goal_of
from jaxbound.search.inputs import InputSplits
from jaxbound.search.passes import Domain, started
from jaxbound.search.points import Attack, Counterexample, inward
from jaxbound.search.relus import ReluSplits
from jaxbound.search.skeletons import Skeleton
from jaxbound.transforms.problems import forget_stale, prepare

Array = np.ndarray

_FEW = 20
"""Inputs that are not fixed, up to which a search splits inputs."""
_WIDE = 1024
"""Networks with wider values are bounded over the whole region by `Crown`, which chooses rows and knows windows."""
_ATTACKS = ((20, 64), (60, 128), (120, 256))
"""Steps and starts of one attack after the other."""


class Clock:
    """Until when a search may go on."""

    def __init__(self, timeout: float | None):
        self.start = time.monotonic()
        self.deadline = None if timeout is None else self.start + timeout
        self.stopped = False

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, if there is one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def over(self) -> bool:
        """Whether the time is up, or the search was stopped."""
        return self.stopped or self.left == 0


class Part:
    """A search over one box. Threads may read `nodes`, `lower` and `found` at any time."""

    def __init__(self, fn: Callable, box: Box, prop: Property, method, clock: Clock, *, outward: bool):
        self.fn, self.given, self.prop, self.method, self.clock, self.outward = fn, box, prop, method, clock, outward
        self.dtype = np.dtype(jnp.result_type(float))
        self.ends = inward(np.asarray(box.lower), np.asarray(box.upper), self.dtype)
        self.splits: InputSplits | ReluSplits | None = None
        self.attack: Attack | None = None
        self.found: Counterexample | None = None
        self.attacked = False
        self._before = 0

    @property
    def nodes(self) -> int:
        """How many domains were bounded."""
        return self._before + (0 if self.splits is None else self.splits.nodes)

    @property
    def lower(self) -> float:
        """A lower bound of the property's margin over the box."""
        return -np.inf if self.splits is None else self.splits.lower

    @property
    def decided(self) -> bool:
        """Whether there is nothing left to do."""
        return self.found is not None or (self.splits is not None and self.splits.left == 0 and self.lower > 0)

    def prepare(self) -> None:
        """Trace the network."""
        box = Box(*regions.enclosing_box(self.given, self.dtype))
        arguments = (self.fn.params, box) if isinstance(self.fn, Model) else (box,)
        fn = self.fn.fn if isinstance(self.fn, Model) else self.fn
        forget_stale(fn, *arguments[:-1], jax.ShapeDtypeStruct(np.shape(box.lower), self.dtype))
        problem = prepare(fn, arguments, rounding=self.outward)
        self.graph, self.leaves = problem.graph, problem.leaves
        outputs = self.graph.structure.outputs
        if len(outputs) != 1 or outputs[0][0] != "node":
            raise errors.argument("fn", "does not return one array that depends on its input", "pass one that does")
        marks = domains.undefined(CrownIBP(), self.graph, self.leaves, Request(rounding=True))
        if np.any(marks.get(outputs[0][1], False)):
            raise errors.argument("fn", "may be undefined (NaN) in the region", "verify it where it is defined")
        self.skeleton, self.constants = Skeleton(self.graph.structure), self.graph.constants
        low, high = regions.enclosing_box(self.leaves[0])
        self.box = np.asarray(low), np.asarray(high)
        sizes = self.box[0].size, self.skeleton.nodes[self.skeleton.output].op.size
        for name, given, wanted in zip(("inputs", "outputs"), self.prop.sizes, sizes, strict=True):
            if given is not None and given != wanted:
                raise errors.argument("prop", f"speaks of {given} {name}", f"the function has {wanted}")
        self.goal: Goal = goal_of(self.prop, self.dtype, sizes, self._reach())
        shape = self.box[0].shape
        self.attack = Attack(self.fn, self.prop, self.goal, self.ends, shape, self.skeleton, self.constants)

    def run(self) -> None:
        """Split domains until the property is proved, refuted, or the time is up."""
        assert self.attack is not None
        self.splits = self._started()
        self._search()
        if (
            isinstance(self.splits, ReluSplits) and self.splits.left == 0 and not self._over()
        ):  # every ReLU is split, and bounds do not decide
            self._before += self.splits.nodes
            self.splits = self._by_inputs()
            self._search()

    def _search(self) -> None:
        assert self.attack is not None and self.splits is not None
        most = self.method.max_nodes
        while self.splits.left and not self._over() and (most is None or self.nodes < most):
            points = self.splits.step(self._over)
            if len(points) and self.attacked and not self._over():
                self.found = self.attack.among(points) or self.found

    def descend(self, key: jax.Array) -> None:
        """Attack, ever harder."""
        assert self.attack is not None
        self.attacked = True
        for number, (steps, starts) in enumerate(_ATTACKS):
            if self._over():
                return
            self.found = self.attack.descend(jax.random.fold_in(key, number), steps, starts, self._over) or self.found

    def _over(self) -> bool:
        return self.decided or self.clock.over()

    def _reach(self) -> tuple[Array, Array]:
        """The largest magnitudes of inputs, and of outputs where a coefficient has to be rounded."""
        arrays = [array for clause in self.prop.clauses for array in (clause.outputs, clause.inputs)]
        inputs = np.maximum(*map(np.abs, self.box)).ravel().astype(np.float64)
        if all(array is None or np.array_equal(array, array.astype(self.dtype)) for array in arrays):
            return inputs, np.zeros(self.skeleton.nodes[self.skeleton.output].op.size)
        (found,) = IBP().bound(self.graph, self.leaves, Request(rounding=True))
        assert found.upper is not None
        ends = [np.abs(np.asarray(end, np.float64)) for end in (found.lower, found.upper)]
        error = np.maximum(found.lower_rounding, found.upper_rounding)
        return inputs, np.ravel(np.maximum(*ends) + np.asarray(error, np.float64))

    def _started(self) -> InputSplits | ReluSplits:
        split, rectified = self.method.split, bool(self.skeleton.rectifiers)
        if split == "auto":
            free = int((self.box[1] > self.box[0]).sum())
            split = "relu" if rectified and free > _FEW else "input"
        if split == "relu" and not rectified:
            raise errors.argument("split", "is 'relu', but the function has no ReLU", "pass 'input' or 'auto'")
        if split == "input":
            return self._by_inputs()
        known, lower = self._known()
        given = self.skeleton, self.constants, self.goal, self.box, known, lower, self.method.steps
        return ReluSplits(*given, batch=self.method.batch, outward=self.outward)

    def _by_inputs(self) -> InputSplits:
        given = self.skeleton, self.constants, self.goal, self.box
        return InputSplits(*given, batch=self.method.batch, outward=self.outward)

    def _known(self) -> tuple[dict, Array]:
        """Bounds of every value over the whole box, and the best lower bound of each clause's rows."""
        loose = self.skeleton.loose
        wide = max((self.skeleton.nodes[k].op.size for k in loose), default=0) > _WIDE
        given: dict = {}
        if wide:
            found = Crown().pre_activations(self.graph, self.leaves, Request(rounding=True))
            given = {k: (low[None], high[None]) for k, (low, high) in found.items()}
        low, high = (jnp.asarray(end)[None] for end in self.box)
        domain = Domain(self.skeleton, self.constants, (low, high), outward=True)
        for block in self.skeleton.structure.blocks:
            domain.add(block, given)
            for number in sorted(set(loose) & set(range(block.start, block.stop))) if not wide else ():
                domain.tighten(number)
        rows = [None if part is None else jnp.asarray(part)[None] for part in self.goal[:3]]
        lower = domain.bound(*started(self.skeleton, rows)).lower
        known = {k: (low[0], high[0]) for k, (low, high) in domain.ends.items() if k > 0}
        return known, self.goal.best(np.asarray(lower)[0])
