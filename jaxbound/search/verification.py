"""`verify`: a property of a function over a region, proved, refuted by a counterexample, or left open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat, errors, regions
from jaxbound.certificates.properties import Property
from jaxbound.methods import Crown, Method
from jaxbound.methods.frown import Frown
from jaxbound.regions import Box, LpBall, Region
from jaxbound.search.parts import Clock, Part

SPLITS = ("auto", "relu", "input")
PROVED = "real arithmetic on the given parameters and inputs, rounding counted"
UNROUNDED = "up to rounding, which was not counted"
EXECUTED = "as executed: the function, called at this point of the region, violates the property"
NEAREST = "as executed at the floats nearest to a region that has no float in some coordinate"
NOTHING = "nothing is claimed"
_GRACE = 0.5
"""Seconds past the deadline for a step that is under way."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BranchAndBound:
    """Branch and bound: how `verify` searches.

    Args:
        bounder: how a domain is bounded: `Frown(steps=...)` gives the number of gradient steps on slopes and
            multipliers of ReLU splits; domains of input splits are bounded by CROWN.
        split: "input" bisects the region, "relu" fixes neurons to a side; "auto" bisects where at most 20 inputs vary
            or the function has no ReLU.
        batch: how many domains are bounded at once; None for what fits the processor's caches.
        timeout: seconds, where `verify` is given none.
        max_nodes: the most domains to bound.

    Reference: Bunel et al. 2020, "Branch and bound for piecewise linear neural network verification"; Wang et al. 2021,
    "Beta-CROWN".

    >>> BranchAndBound(max_nodes=100).split
    'auto'
    """

    bounder: Method = field(default_factory=Frown)
    split: str = field(default="auto", metadata={"static": True})
    batch: int | None = field(default=None, metadata={"static": True})
    timeout: float | None = field(default=None, metadata={"static": True})
    max_nodes: int | None = field(default=None, metadata={"static": True})

    @property
    def steps(self) -> int:
        """Gradient steps of every domain."""
        return self.bounder.steps if isinstance(self.bounder, Frown) else 0


@dataclass(frozen=True)
class Verdict:
    """What is known of a property over a region.

    Args:
        status: "verified", "falsified" or "unknown".
        counterexample: a point of the region that violates the property, in the function's dtype, or None.
        outputs: the function's outputs there.
        lower: a lower bound of the property's margin (see `Property.margin`) over the region: positive if verified.
        nodes: how many domains were bounded.
        seconds: how long it took, tracing and compiling included.
        guarantee: what the verdict holds for, in words.

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


def verify(
    fn: Callable,
    region: Region | Sequence[Region],
    prop: Property,
    *,
    method: BranchAndBound = BranchAndBound(),
    timeout: float | None = None,
    key: jax.Array | None = None,
    attack: bool = True,
    certificate: object = None,
    progress: bool | Callable[[dict], object] = True,
    rounding: bool = True,
) -> Verdict:
    """Decide whether a property holds over a region: proved, or refuted by a counterexample, or unknown in time.

    If "verified", for every x of the region and every clause of the property, some row has
    `outputs @ fn(x) + inputs @ x > offset`. If "falsified", `prop.violated(x, fn(x))` at the counterexample x, with
    `fn(x)` as computed by calling fn at x.

    Args:
        fn: any JAX function of one example, or a `Model`.
        region: a `Box`, a ball of the maximum norm, or several.
        prop: what a counterexample satisfies.
        method: how to search.
        timeout: seconds, compiling included; None for the method's.
        key: a PRNG key of the attack; None for key 0.
        attack: whether to look for counterexamples.
        certificate: none are written yet: None.
        progress: show the domains bounded and left on the standard error; or a function that is told of them twice a
            second, as a dictionary with "seconds", "nodes", "left" and "lower" (see `jaxbound.plots.search_progress`).
        rounding: whether bounds count rounding. Without it "verified" holds up to rounding.

    Returns:
        A `Verdict`. Interrupted from the keyboard, and where the time is up, the best that is known.

    Raises:
        ArgumentError: an empty or malformed region, a property without clauses or on other sizes than fn's.
        UnsupportedError: fn cannot be bounded, or a certificate is asked for.

    Rounding: the ends of a region are rounded outward for proofs, and inward for counterexamples. Where a region has no
    float in some coordinate, counterexamples are at the nearest ones, and the guarantee says so.

    Reference: `BranchAndBound`.

    >>> import jax, jaxbound as jb
    >>> box, prop = jb.Box(-jnp.ones(2), jnp.ones(2)), jb.Property.of([([1.0], -0.5)])
    >>> verify(lambda x: jax.nn.relu(x).sum(keepdims=True), box, prop, progress=False).status
    'verified'
    """
    if _compat.is_tracing():
        raise errors.host_loop("verify", "bound")
    if certificate is not None:
        raise errors.UnsupportedError("verify writes no certificates yet: leave certificate out")
    _check(method, timeout)
    clock = Clock(method.timeout if timeout is None else timeout)
    boxes = [_as_box(one) for one in _several(region)]
    own = [(box, part) for one in boxes for box, part in _checked(prop).parts(one)]
    parts = [Part(fn, box, part, method, clock, outward=rounding) for box, part in own]
    key = jax.random.key(0) if key is None else key
    proved = 0
    for number, part in enumerate(parts):
        interrupted = _decide(part, jax.random.fold_in(key, number) if attack else None, clock, progress)
        if part.found is not None:
            return _verdict("falsified", parts, clock, EXECUTED if part.ends.inside else NEAREST, part.found)
        proved += part.lower > 0
        if interrupted:
            break
    if proved == len(parts):
        return _verdict("verified", parts, clock, PROVED if rounding else UNROUNDED)
    return _verdict("unknown", parts, clock, NOTHING)


def _verdict(status: str, parts: list[Part], clock: Clock, guarantee: str, found: tuple = (None, None)) -> Verdict:
    lower = min((part.lower for part in parts), default=np.inf)
    point, outputs = found
    return Verdict(status, point, outputs, lower, sum(part.nodes for part in parts), clock.seconds, guarantee)


def _decide(part: Part, key: jax.Array | None, clock: Clock, progress: bool | Callable[[dict], object]) -> bool:
    """Search and attack in threads, so that time is kept also while programs compile; whether to stop here."""
    ready, x64 = threading.Event(), jnp.result_type(float) == np.float64  # threads begin with the global setting
    part.attacked = key is not None

    def search() -> None:
        with jax.enable_x64(x64):
            try:
                part.prepare()
            finally:
                ready.set()
            part.run()

    def descend() -> None:
        ready.wait()
        with jax.enable_x64(x64):
            if key is not None and part.attack is not None:
                part.descend(key)

    pool, shown = ThreadPoolExecutor(2), _Shown(progress)
    try:
        pending: set[Future] = {pool.submit(search), pool.submit(descend)}
        while pending and not part.decided:
            left = clock.left
            wanted = 0.5 if left is None else min(0.5, left) if left else _GRACE
            done, pending = wait(pending, wanted, FIRST_COMPLETED)
            for future in done:
                future.result()
            shown.show(part)
            if left == 0:
                break
    except KeyboardInterrupt:
        clock.stopped = True
    except BaseException:
        clock.stopped = True
        raise
    finally:
        shown.close()
        pool.shutdown(wait=False, cancel_futures=True)
    return clock.over()


class _Shown:
    """A tqdm bar on the standard error, a function that is told, or nothing."""

    def __init__(self, wanted: bool | Callable[[dict], object]):
        self.bar, self.tell = None, wanted if callable(wanted) else None
        if wanted and self.tell is None:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self.bar = tqdm(unit="domain", desc="verify")

    def show(self, part: Part) -> None:
        """How many domains were bounded, how many are left, and what is known so far."""
        if part.splits is None:
            return
        if self.tell is not None:
            now = {"seconds": part.clock.seconds, "nodes": part.nodes, "left": part.splits.left, "lower": part.lower}
            self.tell(now | {name: float(now[name]) for name in ("seconds", "lower")})
        if self.bar is not None:
            self.bar.set_postfix_str(f"{part.splits.left} left, margin >= {part.lower:.4g}", refresh=False)
            self.bar.update(part.nodes - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def _check(method: object, timeout: float | None) -> None:
    if not isinstance(method, BranchAndBound):
        raise errors.argument_type("method", f"is {method!r}", "pass a jaxbound.BranchAndBound(...)")
    if method.split not in SPLITS:
        raise errors.unknown_option("split", method.split, SPLITS)
    if not isinstance(method.bounder, Crown | Frown):
        raise errors.argument("bounder", f"is {method.bounder!r}", "pass Crown(), or Frown(steps=...) to tune bounds")
    for name, value in (("timeout", timeout), ("method.timeout", method.timeout), ("max_nodes", method.max_nodes)):
        if value is not None and not value >= 0:
            raise errors.argument(name, f"is {value!r}", "pass a number of 0 or more, or None")
    if method.batch is not None and not method.batch >= 1:
        raise errors.argument("batch", f"is {method.batch!r}", "pass a number of 1 or more, or None")


def _checked(prop: Property) -> Property:
    if not isinstance(prop, Property):
        raise errors.argument_type("prop", f"is {prop!r}", "pass a jaxbound.Property, such as Property.robust(0, 10)")
    if not prop.clauses or any(len(clause.offsets) == 0 for clause in prop.clauses):
        raise errors.argument("prop", "has no clauses, or a clause without rows", "say what a counterexample satisfies")
    return prop


def _several(region: Region | Sequence[Region]) -> list[Region]:
    found: list = list(region) if isinstance(region, list | tuple) else [region]
    if not found:
        raise errors.argument("region", "is an empty list", "pass a jaxbound.Box, or several")
    for one in found:
        if not regions.is_region(one):
            raise errors.argument_type("region", f"is a {type(one).__name__}", "pass a jaxbound.Box, or several")
    return found


def _as_box(region: Region) -> Box:
    """The ends of a box in float64."""
    regions.validate(region, "region")
    if not regions.is_box(region):
        norm = region.norm if isinstance(region, LpBall) else None
        raise errors.argument("region", f"is a ball of norm {norm}", "pass a Box, or a ball with norm=jnp.inf")
    ends = (region.lower, region.upper) if isinstance(region, Box) else regions.enclosing_box(region)
    low, high = (np.asarray(end, np.float64) for end in ends)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise errors.argument("region", "has an infinite end", "pass a bounded Box")
    return Box(low, high)
