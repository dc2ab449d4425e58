"""One table of facts: what jaxbound knows about each JAX primitive.

Nothing here bounds anything. A fact says what a primitive *is*; the interpreters act on kinds, never on names.

* `AFFINE`: affine in the operands that depend on a region, once the other operands are fixed. A combination of
  dependent operands that its facts exclude is not affine (`mul` of two bounded values is a product).
* `ELEMENTWISE`: applied entry by entry, so that a chain of them on one value is one scalar function.
* `NONLINEAR`: relaxed as a whole, by the enclosure of that kind.
* `REFUSED`: primitives that cannot be bounded, with the reason and the way out.

To add a structural or linear primitive: one line here and one row in `tests/test_primitives.py`. Elementwise ones have
their table in `curvature.functions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxbound.curvature.functions import FUNCTIONS

Shape = tuple[int, ...]
Count = Callable[[Sequence[Shape], Shape, dict], int]

_ALL = 1 << 30
"""More operands than any primitive has."""


def _none(_shapes: Sequence[Shape], _out: Shape, _params: dict) -> int:
    return 0


def _one(_shapes: Sequence[Shape], _out: Shape, _params: dict) -> int:
    return 1


def _reduced(shapes: Sequence[Shape], out: Shape, _params: dict) -> int:
    return math.prod(shapes[0]) // max(1, math.prod(out))


def _expanded(shapes: Sequence[Shape], out: Shape, _params: dict) -> int:
    return math.prod(out) // max(1, math.prod(shapes[0]))


def _input_size(shapes: Sequence[Shape], _out: Shape, _params: dict) -> int:
    return math.prod(shapes[0])


def _output_size(_shapes: Sequence[Shape], out: Shape, _params: dict) -> int:
    return math.prod(out)


def _updates(shapes: Sequence[Shape], _out: Shape, _params: dict) -> int:
    return math.prod(shapes[2])


def _window(_shapes: Sequence[Shape], _out: Shape, params: dict) -> int:
    return math.prod(params["window_dimensions"])


def _contracted(shapes: Sequence[Shape], _out: Shape, params: dict) -> int:
    (lhs, _), _ = params["dimension_numbers"]
    return math.prod(shapes[0][axis] for axis in lhs)


def _free(shapes: Sequence[Shape], _out: Shape, params: dict) -> int:
    contracting, batching = params["dimension_numbers"]
    return max(
        math.prod(size for axis, size in enumerate(shape) if axis not in contract and axis not in batch)
        for shape, contract, batch in zip(shapes, contracting, batching, strict=True)
    )


def _kernel(shapes: Sequence[Shape], _out: Shape, _params: dict) -> int:
    return math.prod(shapes[1])


def _kernel_or_places(shapes: Sequence[Shape], out: Shape, _params: dict) -> int:
    return max(math.prod(shapes[1]), math.prod(out))


@dataclass(frozen=True)
class Affine:
    """Facts of a primitive that is affine in its region-dependent operands.

    `fixed`: operand positions that may not depend on a region. `alone`: at most one operand may.
    `additive`: constant operands (outside `fixed`) add to the result, and zeros in their place leave the linear part.
    `scales`: constant operands multiply, so their absolute values carry the radius of an interval.
    `divides`: they multiply as denominators.
    `signs`: per operand, whether the result increases or decreases with it (the last entry repeats).
    `terms`, `adjoint_terms`: how many rounded operations one entry of the result, or of the transposed product, takes.
    `order_preserving`: entry k of the flattened result is entry k of the flattened operand (plus a constant).
    """

    fixed: range = range(0)
    alone: bool = False
    additive: bool = False
    scales: bool = False
    divides: bool = False
    signs: tuple[int, ...] = (1,)
    terms: Count = _none
    adjoint_terms: Count = _none
    order_preserving: bool = False

    def allows(self, dependent: Sequence[bool]) -> bool:
        """Whether the primitive is affine when exactly these operands depend on a region."""
        fixed = any(depends and position in self.fixed for position, depends in enumerate(dependent))
        return not fixed and not (self.alone and sum(dependent) > 1)


AFFINE: dict[str, Affine] = {
    # one value added to another
    "add": Affine(additive=True, terms=_one, order_preserving=True),
    "add_any": Affine(additive=True, terms=_one, order_preserving=True),
    "sub": Affine(additive=True, terms=_one, signs=(1, -1)),
    "neg": Affine(signs=(-1,)),
    # a bounded value scaled by constants
    "mul": Affine(alone=True, scales=True, terms=_one, adjoint_terms=_one),
    "div": Affine(fixed=range(1, _ALL), scales=True, divides=True, terms=_one, adjoint_terms=_one),
    "dot_general": Affine(alone=True, scales=True, terms=_contracted, adjoint_terms=_free),
    "conv_general_dilated": Affine(alone=True, scales=True, terms=_kernel, adjoint_terms=_kernel_or_places),
    # sums
    "reduce_sum": Affine(terms=_reduced),
    "reduce_window_sum": Affine(terms=_window, adjoint_terms=_window),
    "cumsum": Affine(terms=_input_size, adjoint_terms=_input_size),
    # structure: entries are moved, repeated or dropped, never changed
    "reshape": Affine(order_preserving=True),
    "squeeze": Affine(order_preserving=True),
    "copy": Affine(order_preserving=True),
    "stop_gradient": Affine(order_preserving=True),
    "convert_element_type": Affine(order_preserving=True),
    "transpose": Affine(),
    "rev": Affine(),
    "slice": Affine(),
    "broadcast_in_dim": Affine(adjoint_terms=_expanded),
    "concatenate": Affine(additive=True),
    "stack": Affine(additive=True),
    "pad": Affine(additive=True),
    "select_n": Affine(fixed=range(1), additive=True),
    "dynamic_slice": Affine(fixed=range(1, _ALL)),
    "dynamic_update_slice": Affine(fixed=range(2, _ALL), additive=True),
    "tile": Affine(adjoint_terms=_expanded),
    "gather": Affine(fixed=range(1, _ALL), adjoint_terms=_output_size),
    "scatter-add": Affine(fixed=range(1, 2), additive=True, terms=_updates),
}
"""Primitive name -> facts. `convert_element_type` is here for conversions that widen; the graph refuses the others."""

NONLINEAR: dict[str, str] = {
    "mul": "product",
    "reduce_max": "maximum",
    "sort": "sort",
    "floor": "staircase",
    "ceil": "staircase",
    "round": "staircase",
    # jaxbound's own, see operations.py
    "select": "select",
    "meet": "meet",
    "logsumexp": "logsumexp",
}
"""Primitive name -> the kind of node that it is where it is neither affine nor one scalar function."""

ELEMENTWISE = FUNCTIONS.keys()
"""Applied entry by entry (operands are scalars or of one shape): one row each in `curvature.functions`."""

REFUSED: dict[str, tuple[str, str]] = {
    "while": ("its number of iterations may depend on the region", "use a loop of fixed length (jax.lax.scan)"),
    "cond": ("its predicate depends on the region", "use jnp.where, or bound each branch on its own"),
    "pure_callback": ("a callback's result is unknown to JAX", "write the function in JAX"),
    "io_callback": ("a callback's result is unknown to JAX", "write the function in JAX"),
    "ffi_call": ("foreign code cannot be traced", "write the function in JAX"),
    "pallas_call": ("a kernel cannot be traced", "bound the reference implementation in JAX instead"),
    "argmax": ("which entry is largest depends on the region", "bound the differences of entries, as margins do"),
    "argmin": ("which entry is least depends on the region", "bound the differences of entries, as margins do"),
    "is_defined": ("whether a value is defined depends on the region", "bound what is defined on the whole region"),
    "complex": ("its result is complex", "return its real and its imaginary part"),
    "in_order_of": ("the order of the entries depends on the region", "use the sorted values alone"),
    "whole_number_arithmetic": (
        "integers may leave the range of their dtype and wrap around, or are not computed with as real numbers are",
        "convert to floating point before the arithmetic",
    ),
    "rem": ("a remainder jumps wherever the quotient is whole", "subtract a multiple of jnp.floor"),
    "triangular_solve": ("solving a linear system is not exact", "multiply by the inverse matrix"),
    "custom_linear_solve": ("solving a linear system is not exact", "multiply by the inverse matrix"),
    "reduce_precision": ("rounding to fewer bits is not affine", "bound the function in full precision"),
}
"""Primitive name -> why, and what to do instead."""
