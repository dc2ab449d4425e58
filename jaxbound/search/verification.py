"""`verify`: a property of a function over a region, proved, refuted by a counterexample, or left open."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat, errors, regions
from jaxbound.certificates import proofs
from jaxbound.certificates.properties import Property
from jaxbound.methods import CrownIBP, Request, domains
from jaxbound.network.model import Model
from jaxbound.regions import Box, LpBall, Region
from jaxbound.search.branching import BranchAndBound, check_options
from jaxbound.search.parts import Clock, Part
from jaxbound.search.points import exact_ends, inward
from jaxbound.search.race import decide
from jaxbound.search.resuming import Kept, mark_of
from jaxbound.search.roots import Root
from jaxbound.search.skeletons import Skeleton
from jaxbound.transforms.problems import forget_stale, prepare

PROVED = "real arithmetic on the given parameters and inputs, rounding counted"
UNROUNDED = "up to rounding, which was not counted"
EXECUTED = "as executed: the function, called at this point of the region, violates the property"
NEAREST = "as executed at the floats nearest to a region that has no float in some coordinate"
NOTHING = "nothing is claimed"


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
    method: BranchAndBound = BranchAndBound(),  # noqa: B008 - immutable
    timeout: float | None = None,
    key: jax.Array | None = None,
    attack: bool = True,
    certificate: str | os.PathLike | None = None,
    progress: bool | Callable[[dict], object] = True,
    rounding: bool = True,
) -> Verdict:
    """Decide whether a property holds over a region: proved, or refuted by a counterexample, or unknown in time.

    If "verified", for every x of the region and every clause of the property, some row has
    `outputs @ fn(x) + inputs @ x > offset`. If "falsified", `prop.violated(x, fn(x))` at the counterexample x, with
    `fn(x)` as computed by calling fn at x.

    Args:
        fn: any JAX function of one example, or a `Model`; one of several inputs or outputs as its `flat`, on one box
            of all inputs, one behind the other.
        region: a `Box`, a ball of the maximum norm, or several.
        prop: what a counterexample satisfies.
        method: how to search.
        timeout: seconds, compiling included; None for the method's.
        key: a PRNG key of the attack; None for key 0.
        attack: whether to look for counterexamples.
        certificate: where to write what proves a verdict of "verified", for `check_certificate`; for another
            verdict there is none. Until there is one, `NAME.search` beside it holds what is left of the search, written
            every ten seconds and in the end: the same call goes on there, also after its process was killed.
        progress: show the domains bounded and left on the standard error; or a function that is told of them twice a
            second, as a dictionary with "seconds", "nodes", "left" and "lower" (see `jaxbound.plots.search_progress`).
        rounding: whether bounds count rounding. Without it "verified" holds up to rounding.

    Returns:
        A `Verdict`. Interrupted from the keyboard, and where the time is up, the best that is known.

    Raises:
        ArgumentError: an empty or malformed region, a property without clauses or on other sizes than fn's.
        UnsupportedError: fn cannot be bounded; or it does what certificates do not cover, and one is asked for.

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
    fn = fn.flat if isinstance(fn, Model) else fn
    check_options(method)
    if timeout is not None and not timeout >= 0:
        raise errors.argument("timeout", f"is {timeout!r}", "pass a number of 0 or more, or None")
    clock = Clock(method.timeout if timeout is None else timeout)
    boxes = [_as_box(one) for one in _several(region)]
    counts = {np.size(box.lower) for box in boxes}
    if isinstance(fn, Model) and (other := counts - {math.prod(fn.input_shape)}):
        raise errors.argument("region", f"has {min(other)} numbers", f"the network takes {math.prod(fn.input_shape)}")
    own = [(box, part) for one in boxes for box, part in _checked(prop).parts(one)]
    sizes = kept = None
    if certificate is not None:
        if not rounding:
            raise errors.argument("certificate", "is given with rounding=False", "certificates hold in real arithmetic")
        sizes = proofs.read(fn, np.shape(boxes[0].lower), np.float32).sizes
        kept = Kept(certificate, mark_of(fn, boxes, prop, method.split, method.steps, method.batch))
    parts = [
        Part(
            functools.partial(_root, fn, box, sizes, outward=rounding), fn, part, method, clock, outward=rounding,
            logged=certificate is not None, kept=kept, number=number,
        )
        for number, (box, part) in enumerate(own)
    ]  # fmt: skip
    key = jax.random.key(0) if key is None else key
    proved = 0
    for number, part in enumerate(parts):
        own_key = jax.random.fold_in(key, number) if attack else None
        interrupted = decide(part, own_key, clock, progress=progress)
        if part.found is not None:
            if kept is not None:
                kept.remove()
            return _verdict("falsified", parts, clock, EXECUTED if part.root.ends.inside else NEAREST, part.found)
        proved += part.lower > 0
        if interrupted:
            break
    if proved == len(parts) and certificate is not None and kept is not None:
        trees = [tree for part in parts for tree in part.trees()]
        proofs.save(certificate, proofs.Certificate(boxes, prop, trees))
        kept.remove()
    if proved == len(parts):
        return _verdict("verified", parts, clock, PROVED if rounding else UNROUNDED)
    return _verdict("unknown", parts, clock, NOTHING)


def _verdict(status: str, parts: list[Part], clock: Clock, guarantee: str, found: tuple = (None, None)) -> Verdict:
    lower = min((part.lower for part in parts), default=np.inf)
    point, outputs = found
    return Verdict(status, point, outputs, lower, sum(part.nodes for part in parts), clock.seconds, guarantee)


def _root(fn: Callable, box: Box, sizes: list[int] | None, *, outward: bool) -> Root:
    """A function over a box with float64 ends; sizes are those of its layers of ReLUs as a certificate takes them."""
    dtype = np.dtype(jnp.result_type(float))
    outer = Box(*regions.enclosing_box(box, dtype))
    arguments, function = ((fn.params, outer), fn.fn) if isinstance(fn, Model) else ((outer,), fn)
    forget_stale(function, *arguments[:-1], jax.ShapeDtypeStruct(np.shape(box.lower), dtype))
    problem = prepare(function, arguments, rounding=outward)
    outputs = problem.graph.structure.outputs
    if len(outputs) != 1 or outputs[0][0] != "node":
        raise errors.argument("fn", "does not return one array that depends on its input", "pass one that does")
    marks = domains.undefined(CrownIBP(), problem.graph, problem.leaves, Request(rounding=True))
    if np.any(marks.get(outputs[0][1], False)):
        raise errors.argument("fn", "may be undefined (NaN) in the region", "verify it where it is defined")
    found = [problem.graph.nodes[z].op.size for z in Skeleton(problem.graph.structure).rectified_inputs]
    if sizes is not None and found != sizes:
        raise errors.UnsupportedError(
            f"certificates take the network for layers of {sizes} ReLUs, the search for layers of {found}: "
            "leave certificate out"
        )
    return Root(problem.graph, problem.leaves, inward(np.asarray(box.lower), np.asarray(box.upper), dtype))


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
        kind = f"a ball of norm {region.norm:g}" if isinstance(region, LpBall) else f"a {type(region).__name__}"
        raise errors.argument("region", f"is {kind}", "pass a Box, or a ball with norm=jnp.inf")
    low, high = exact_ends(region)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise errors.argument("region", "has an infinite end", "pass a bounded Box")
    return Box(low, high)
