"""What a method is, and what is asked of one.

A method is a frozen dataclass and a pytree. It answers two questions about a graph over regions,

    pre_activations(graph, leaves, request) -> {node: (lower, upper)} for every input of a nonlinear node (or every
        node), and
    bound(graph, leaves, request) -> for each output that depends on a region, a `Bounded`,

and, where the method has linear functions to show, `planes`. `guarantee` says whether the result is certified or an
estimate. To add a method: a class with these functions in a file of its own (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound.driver import ROWS
from jaxbound.graph import Graph
from jaxbound.regions.bounds import Estimate, Interval

Ends = tuple[jax.Array, jax.Array]


class Request(NamedTuple):
    """How an answer is wanted: static, the same for every method."""

    sides: str = "both"
    """"both", or "lower" for lower bounds only."""
    rounding: bool | str = False
    """Bounds that hold in exact arithmetic, up to a rounding error that is returned; "execution" for those of the
    network as it runs (`relaxations.execution`)."""
    max_rows: int = ROWS
    """The most rows that one step may carry."""
    target: float | None = None
    """What lower bounds are held against: a method that searches stops where all are above it. None for the best."""


def rounding_mode(value: bool | str | None) -> bool | str:
    """What a user's `rounding` asks for: False, True (real arithmetic) or "execution".

    Raises:
        ArgumentError: anything else.
    """
    modes = {None: False, False: False, True: True, "outward": True, "exact": True, "execution": "execution"}
    if not isinstance(value, bool | str | None) or value not in modes:
        raise errors.argument("rounding", f"is {value!r}", 'pass "outward", "execution" or None')
    return modes[value]


class Bounded(NamedTuple):
    """Bounds of one output, and how much of each may be rounding (zeros where that was not asked for)."""

    lower: jax.Array
    upper: jax.Array | None
    lower_rounding: jax.Array
    upper_rounding: jax.Array
    point: Any = None
    """A point of the region, of its shape, where some entry seems not to be above the target; NaN where none is known.
    None from methods that do not search."""


class Method:
    """What every bounding method is; see the module's head.

    >>> from jaxbound import Crown
    >>> issubclass(Crown, Method), Crown().guarantee
    (True, 'certified')
    """

    def __str__(self) -> str:
        """What it is, without the options that are as they are by default."""
        if not dataclasses.is_dataclass(self):
            return repr(self)
        fields = [
            (field.name, _shown(getattr(self, field.name)), _default(field)) for field in dataclasses.fields(self)
        ]
        options = ", ".join(f"{name}={value}" for name, value, default in fields if value != default)
        return f"{type(self).__name__}({options})"

    @property
    def guarantee(self) -> str:
        """ "certified", or "estimate" where bounds may be on the wrong side of the true value."""
        return "certified"

    @property
    def result(self) -> type[Interval] | type[Estimate]:
        """What its bounds come back as."""
        return Interval if self.guarantee == "certified" else Estimate

    @property
    def searches(self) -> bool:
        """Whether it takes its time for every example: a host loop, to which a batch is nothing."""
        return False

    @property
    def charges_constants(self) -> bool:
        """Whether it counts, with rounding, the errors of constants that the function computes (`values.Inexact`)."""
        return False

    @property
    def charges_execution(self) -> bool:
        """Whether it bounds the network as it is executed, too (`relaxations.execution`)."""
        return False

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node."""
        raise errors.no_such_answer(type(self).__name__, "pre-activation bounds")

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region, in order."""
        raise errors.no_such_answer(type(self).__name__, "bounds")

    def planes(self, graph: Graph, leaves: Sequence, request: Request) -> list[tuple]:
        """Per output: lower slopes (by leaf) and intercept, upper slopes and intercept."""
        raise errors.no_such_answer(type(self).__name__, "linear bounds")


def _default(field: dataclasses.Field) -> str:
    made = field.default_factory
    return _shown(field.default if made is dataclasses.MISSING else made())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    return str(value) if isinstance(value, Method) else repr(value)


def targets(graph: Graph) -> list[int]:
    """The nodes whose values nonlinear nodes read, in order."""
    return sorted({source for i in graph.structure.nonlinear for source in graph.nodes[i].inputs})


def output_nodes(graph: Graph) -> list[int]:
    """The nodes that are outputs, in order."""
    return [number for kind, number in graph.structure.outputs if kind == "node"]


def check_method(name: str, method: object) -> None:
    """Refuse what is not a method object, and say what to pass.

    Raises:
        ArgumentTypeError: a name, a class or anything else.
    """
    if not isinstance(method, Method):
        hint = f"{method.__name__}()" if isinstance(method, type) else "jaxbound.Crown()"
        raise errors.argument_type(name, f"is {method!r}", f"pass a method object such as {hint}")


def check_certified(name: str, method: object) -> None:
    """Refuse what is not a method object, and a method that only estimates.

    Raises:
        ArgumentTypeError: a name, a class or anything else.
        ArgumentError: a method whose guarantee is "estimate".
    """
    check_method(name, method)
    if getattr(method, "guarantee", "certified") != "certified":
        raise errors.estimate_refused(type(method).__name__)


def of_ends(ends: Ends, request: Request) -> Bounded:
    """Known ends as an answer, without rounding of its own."""
    zeros = jnp.zeros_like(ends[0])
    return Bounded(ends[0], ends[1] if request.sides == "both" else None, zeros, zeros)


def where_finite(first: Bounded, second: Bounded) -> Bounded:
    """The first bound where it is finite, else the second."""
    low = jnp.isfinite(first.lower)
    lower = jnp.where(low, first.lower, second.lower), jnp.where(low, first.lower_rounding, second.lower_rounding)
    if first.upper is None or second.upper is None:
        return Bounded(lower[0], None, lower[1], lower[1])
    high = jnp.isfinite(first.upper)
    upper = jnp.where(high, first.upper, second.upper), jnp.where(high, first.upper_rounding, second.upper_rounding)
    return Bounded(lower[0], upper[0], lower[1], upper[1])


def better(first: Bounded, second: Bounded) -> Bounded:
    """The better bound entry by entry, judged with its rounding."""
    low = first.lower - first.lower_rounding >= second.lower - second.lower_rounding
    lower = jnp.where(low, first.lower, second.lower), jnp.where(low, first.lower_rounding, second.lower_rounding)
    if first.upper is None or second.upper is None:
        return Bounded(lower[0], None, lower[1], lower[1])
    one, two = first.upper, second.upper
    high = one + first.upper_rounding <= two + second.upper_rounding
    upper = jnp.where(high, one, two), jnp.where(high, first.upper_rounding, second.upper_rounding)
    return Bounded(lower[0], upper[0], lower[1], upper[1])
