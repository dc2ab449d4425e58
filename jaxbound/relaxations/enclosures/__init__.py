"""What is known about each kind of nonlinear node: its interval and planes around it.

An enclosure is a module with five functions; it never knows which interpreter asks.

    describe(op) -> str                                           for `explain`
    interval(op, inputs, constants) -> (lower, upper)             of the node, from (lower, upper) of its inputs
    is_exact(op, position, ends) -> mask                          entries of an input whose tightening gains nothing
    planes(op, inputs, constants, rule) -> Planes                 with the slopes that a rule chooses (see `slopes`)
    freedom(op, inputs, constants, rule) -> Freedom               which slopes are worth a try, and where the rule's are
"""

from __future__ import annotations

from types import ModuleType

from jaxbound.graph import Op
from jaxbound.relaxations.enclosures import logsumexp, maximum, meet, product, scalar, select, sort, staircase

_ENCLOSURES: dict[str, ModuleType] = {
    "scalar": scalar,
    "product": product,
    "maximum": maximum,
    "select": select,
    "meet": meet,
    "logsumexp": logsumexp,
    "sort": sort,
    "staircase": staircase,
}


def of(op: Op) -> ModuleType:
    """The enclosure of a nonlinear node."""
    return _ENCLOSURES[op.kind]


def is_elementwise(op: Op) -> bool:
    """Whether an entry of a nonlinear node depends on the same entry of its inputs alone."""
    return op.kind in ("scalar", "product", "select", "meet", "staircase")


def reduced_axes(op: Op) -> tuple[int, ...]:
    """The axes over which a node sums its planes (see `planes.Planes`)."""
    return maximum.axes(op) if op.kind in ("maximum", "logsumexp") else ()
