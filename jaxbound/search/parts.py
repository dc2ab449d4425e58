"""One box with the clauses that count there: its network, its attack and its domains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxbound import errors
from jaxbound.certificates.proofs.files import STEPS, Tree
from jaxbound.certificates.properties import Property
from jaxbound.search.goals import Goal, goal_of
from jaxbound.search.inputs import InputSplits
from jaxbound.search.logs import Log
from jaxbound.search.neurons import NeuronSplits
from jaxbound.search.passes import adaptive_slopes
from jaxbound.search.points import Attack, Counterexample
from jaxbound.search.resuming import Kept
from jaxbound.search.roots import Root
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_FEW = 20
"""Inputs that are not fixed, up to which a search splits inputs."""
_DEAR = 40
"""The logarithm of the products that bounding all parts of a region takes where every free input is cut once, up to
which a search splits inputs."""
_ATTACKS = ((20, 64), (60, 128), (120, 256))
"""Steps and starts of one attack after the other."""


_WAIT = 0.05
"""Seconds after which an attack looks whether the search has begun."""


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

    def stop(self) -> None:
        """End the search before its time."""
        self.stopped = True

    def over(self) -> bool:
        """Whether the time is up, or the search was stopped."""
        return self.stopped or self.left == 0


class Part:
    """A search over one box. Threads may read `nodes`, `lower` and `found` at any time.

    Args:
        root: makes the network over the box; called by `prepare`, since tracing takes time.
        fn: the network as the user runs it; None for the graph's own values.
        prop: the clauses that count.
        method: how to search.
        clock: until when.
        outward: whether bounds count rounding.
        logged: whether to keep what a certificate needs.
        kept: what another process left of the search, and where to note the state of this one.
    """

    def __init__(
        self,
        root: Callable[[], Root],
        fn: Callable | None,
        prop: Property,
        method: Any,
        clock: Clock,
        *,
        outward: bool,
        logged: bool = False,
        kept: Kept | None = None,
        number: int = 0,
    ):
        self.make, self.fn, self.prop, self.method, self.clock, self.outward = root, fn, prop, method, clock, outward
        self.logged, self.kept, self.number = logged, kept, number
        self.splits: InputSplits | NeuronSplits | None = None
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

    def expect_attack(self, expected: bool) -> None:
        """Say whether points of the search may be tried before an attack of its own begins."""
        self.attacked = expected

    def prepare(self) -> None:
        """Trace the network, and state what is to be proved of it."""
        self.root = self.make()
        root = self.root
        for name, given, wanted in zip(("inputs", "outputs"), self.prop.sizes, root.sizes, strict=True):
            if given is not None and given != wanted:
                raise errors.argument("prop", f"speaks of {given} {name}", f"the function has {wanted}")
        self.goal: Goal = goal_of(self.prop, root.dtype, root.sizes, root.reach(self.prop))
        self.attack = Attack(self.fn, self.prop, self.goal, root.ends, root.box[0].shape, root.skeleton, root.constants)

    def run(self) -> None:
        """Split domains until the property is proved, refuted, or the time is up."""
        assert self.attack is not None
        self.splits = self._started()
        left = {} if self.kept is None else self.kept.parts.get(self.number, {})
        if left:
            self._before = int(left["before"])
            if bool(left["by_inputs"]) and isinstance(self.splits, NeuronSplits):
                self.splits = self._by_inputs()
            self.splits.restore(left)
        self._search()
        if (
            isinstance(self.splits, NeuronSplits) and self.splits.left == 0 and not self._over()
        ):  # nothing is left to split, and bounds do not decide
            self._before += self.splits.nodes
            self.splits = self._by_inputs()
            self._search()

    def _search(self) -> None:
        assert self.attack is not None and self.splits is not None
        most = self.method.max_nodes
        while self.splits.left and not self._over() and (most is None or self.nodes < most):
            points = self.splits.step(self._over)
            if self.kept is not None:
                self.kept.keep(self.number, self._state)
            if len(points) and self.attacked and not self._over():
                self.found = self.attack.among(points) or self.found
        if self.kept is not None:
            self.kept.keep(self.number, self._state, now=True)

    def _state(self) -> dict[str, Array]:
        """What another process needs to go on."""
        assert self.splits is not None
        by_inputs = isinstance(self.splits, InputSplits)
        return {"before": np.array(self._before), "by_inputs": np.array(by_inputs), **self.splits.state}

    def descend(self, key: jax.Array) -> None:
        """Attack, ever harder."""
        assert self.attack is not None
        self.attacked = True
        for number, (steps, starts) in enumerate(_ATTACKS):
            while number and self.splits is None and not self._over():  # the root's programs are compiled first
                time.sleep(_WAIT)
            if self._over():
                return
            self.found = self.attack.descend(jax.random.fold_in(key, number), steps, starts, self._over) or self.found

    def _over(self) -> bool:
        return self.decided or self.clock.over()

    def _started(self) -> InputSplits | NeuronSplits:
        split, root = self.method.split, self.root
        skeleton = Skeleton(root.graph.structure, everywhere=split != "relu" and not self.logged)
        if split == "auto":
            free = int((root.box[1] > root.box[0]).sum())
            dear = free > _FEW or free + np.log2(skeleton.work + 1) > _DEAR
            split = "neuron" if skeleton.places and dear else "input"
        if split in ("relu", "neuron") and not skeleton.places:
            what = "ReLU" if split == "relu" else "function of one number"
            raise errors.argument("split", f"is {split!r}, but the network has no {what}", "pass 'input' or 'auto'")
        if split == "input":
            return self._by_inputs()
        lower = root.lower(self.goal)
        known = {k: (low[0], high[0]) for k, (low, high) in root.domain.ends.items() if k in skeleton.targets}
        log = Log(self.goal.count) if self.logged else None
        functions = None if self.logged else root.functions(skeleton.place_inputs)
        given = skeleton, root.constants, self.goal, root.box, known, self.goal.best(lower)
        splits = NeuronSplits(
            *given, self.method.steps, batch=self.method.batch, outward=self.outward, log=log, functions=functions
        )
        for clause in range(self.goal.count) if log is not None else ():  # CROWN alone may prove some
            own = np.flatnonzero(self.goal.clause == clause)
            slopes = adaptive_slopes(root.domain)[0][splits.unstable]
            assert log is not None
            log.leaf(clause, int(lower[own].argmax()), (slopes * STEPS).astype(np.uint8), np.zeros(splits.size))
        return splits

    def _by_inputs(self) -> InputSplits:
        given = self.root.skeleton, self.root.constants, self.goal, self.root.box
        log = Log(1) if self.logged else None
        return InputSplits(*given, batch=self.method.batch, outward=self.outward, log=log)

    def trees(self) -> list[Tree]:
        """What proves that the part is verified, for a certificate."""
        assert self.splits is not None and self.splits.log is not None
        if isinstance(self.splits, InputSplits):
            return [self.splits.log.inputs()]
        chosen = adaptive_slopes(self.root.domain)[0]
        return [self.splits.log.neurons(k, self.splits.unstable, chosen) for k in range(self.goal.count)]
