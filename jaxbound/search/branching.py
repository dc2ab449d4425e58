"""`BranchAndBound`: the search as a method like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from jaxbound import _compat, errors
from jaxbound.graph import Graph
from jaxbound.methods import Bounded, Crown, Method, Request
from jaxbound.methods.base import Ends
from jaxbound.methods.frown import Frown
from jaxbound.search import objectives

SPLITS = ("auto", "neuron", "relu", "input")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BranchAndBound(Method):
    """Branch and bound: how `verify` searches, and a method like any other.

    `lower <= fn(x) <= upper`, never looser than CROWN, from a search for every entry and side of the output, which ends
    where the gap to a value that was found is closed (to 1e-3 of CROWN's), or with the time. `certify` and
    `certified_radius` search for all margins of an example at once, until they are positive or a counterexample is
    found. A host loop.

    Args:
        bounder: how a domain is bounded: `Frown(steps=...)` gives the number of gradient steps on slopes and
            multipliers of splits of neurons; domains of input splits are bounded by CROWN.
        split: "input" bisects the region; "relu" fixes ReLUs to a side; "neuron" does so, and cuts the inputs of other
            functions of one number (tanh, GELU, a maximum with a number) where their planes are loose. "auto" bisects
            where few inputs vary (at most 20, fewer for larger networks) or there is no such function, and else splits
            neurons.
        batch: how many domains are bounded at once; None for what fits the processor's caches.
        timeout: seconds, where `verify` is given none; else for one example, all entries of its outputs together. None
            for no end but that of the search.
        max_nodes: the most domains to bound, for each search.

    Raises:
        HostLoopError: under `jit`, `vmap`, `grad` or `pmap`.
        UnsupportedError: regions that are not one box, or pre-activation bounds, which are another method's.

    Rounding: counted, where that is asked for (`rounding=True`, and in `certify`). Interrupted from the keyboard, a
    bound is the best that is known.

    Reference: Bunel et al. 2020, "Branch and bound for piecewise linear neural network verification"; Wang et al. 2021,
    "Beta-CROWN".

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> jb.bound(lambda x: 2 * x, BranchAndBound(timeout=10))(jb.Box(jnp.zeros(1), jnp.ones(1))).upper
    Array([2.], dtype=float32)
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

    @property
    def searches(self) -> bool:
        """It does: example by example."""
        return True

    @property
    def charges_constants(self) -> bool:
        """It does."""
        return True

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """What CROWN says of every input of a nonlinear node: a search is for outputs."""
        return Crown().pre_activations(graph, leaves, request)

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """The best bounds of the outputs that the time allows."""
        if _compat.is_tracing():
            raise errors.host_loop("BranchAndBound", "Crown() or Frown()")
        check_options(self)
        return objectives.bounded(self, graph, leaves, request)


def check_options(method: object) -> None:
    """Refuse what is no `BranchAndBound`, or one with options that it does not have."""
    if not isinstance(method, BranchAndBound):
        raise errors.argument_type("method", f"is {method!r}", "pass a jaxbound.BranchAndBound(...)")
    if method.split not in SPLITS:
        raise errors.unknown_option("split", method.split, SPLITS)
    if not isinstance(method.bounder, Crown | Frown):
        raise errors.argument("bounder", f"is {method.bounder!r}", "pass Crown(), or Frown(steps=...) to tune bounds")
    for name, value in (("timeout", method.timeout), ("max_nodes", method.max_nodes)):
        if value is not None and not value >= 0:
            raise errors.argument(name, f"is {value!r}", "pass a number of 0 or more, or None")
    if method.batch is not None and not method.batch >= 1:
        raise errors.argument("batch", f"is {method.batch!r}", "pass a number of 1 or more, or None")
