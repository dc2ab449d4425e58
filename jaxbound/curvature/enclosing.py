"""What is proved of a scalar program on many cells at once: value, first and second derivative.

Instruction by instruction, with the rules of the table (`functions`), on the jets of `jets`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jaxbound.curvature import functions, jets
from jaxbound.curvature.elementary import Elementary
from jaxbound.curvature.intervals import Array, Interval
from jaxbound.curvature.jets import Cells, Jet, Truth, UnsupportedError

_OWN = functions.Function((1, 1), lambda x: x.cells.constant(1.0, 1.0) - x.squared())
"""`one_minus_square`, of which the graph makes other primitives before it is relaxed."""


def _apply(cells: Cells, name: str, params: dict, operands: list[Jet | Truth]) -> Jet | Truth:
    real = tuple(isinstance(operand, Jet) for operand in operands)
    if name == "convert_element_type":
        return jets.convert(cells, operands[0], params["new_dtype"])
    row = _OWN if name == "one_minus_square" else functions.facts(name)
    rule = row.proof if all(real) else row.logic if not any(real) else None
    if name == "select_n" and real in ((False, True, True), (False, False, False)):
        rule = jets.select
    if rule is None:
        raise UnsupportedError(name)
    if isinstance(rule, Elementary):
        (argument,) = (operand for operand in operands if isinstance(operand, Jet))
        return jets.elementary(rule, argument)
    return rule(*operands, **({"y": params["y"]} if name == "integer_pow" else {}))


def _together(instructions: tuple, name: str, operands: tuple) -> tuple[Any, tuple]:
    """The rule of an instruction that reads a function's value and its argument, and the argument."""
    for value, *argument in (operands, operands[::-1]) if name == "mul" else (operands,):
        made = instructions[value[1]] if value[0] == "var" else ("", (), ())
        rule = functions.TOGETHER.get((name, made[0]))
        if rule is not None and list(made[2]) == argument and argument[0][0] != "lit":
            return rule, argument[0]
    return None, ()


class Enclosure(NamedTuple):
    """What is proved on n cells: `orders` (3 orders, 3 tracks, n), or 1 track for points; the rest is per cell."""

    orders: Interval
    continuous: Array
    smooth: Array
    defined: Array
    decisions: Array


def enclose(instructions: tuple, left: Array, right: Array, *, within: bool = False) -> Enclosure:
    """Value, first and second derivative of a program on the cells `[left, right]`.

    For every z in the open cell `orders.lower[k, 0] <= sigma^(k)(z) <= orders.upper[k, 0]`, and the one-sided limits
    at the ends lie in `orders[k, 1]` and `orders[k, 2]`; k = 1 holds almost everywhere where a decision is open.

    Args:
        instructions: `(name, params, operands)` in order; the last one is the result.
        left, right: (n,) float64; infinite ends are allowed, `left == right` encloses a point.
        within: values, and no derivatives, are wanted for those z alone for which sigma is defined.

    Raises:
        UnsupportedError: an instruction has no rule here.

    Rounding: outward, in float64 on the host.

    >>> enclose((("mul", (), (("z",), ("z",))),), np.array([1.0]), np.array([2.0])).orders.upper[:, 0, 0].tolist()
    [4.0, 4.0, 2.0]
    """
    cells = Cells(left, right, within)
    variable, results = cells.variable(), []

    def read(kind: str, number: Any = None, real: tuple[float, float] | None = None) -> Jet | Truth:
        if kind != "lit":
            return (
                results[number] if kind == "var" else variable if kind == "z" else cells.constant(-math.inf, math.inf)
            )
        if isinstance(number, (bool, np.bool_)):
            return Truth(np.full(left.shape, bool(number)), np.full(left.shape, not number), np.ones(left.shape, bool))
        if real is not None:
            return cells.constant(*real)
        if float(number) != number:
            raise UnsupportedError("a literal that is not a number, or a whole number beyond float64")
        return cells.constant(float(number), float(number))

    with np.errstate(all="ignore"):
        for name, params, operands in instructions:
            rule, argument = _together(instructions, name, operands)
            jet = rule(read(*argument)) if rule else _apply(cells, name, dict(params), [read(*o) for o in operands])
            results.append(jet)
    result, count = results[-1], left.size
    if isinstance(result, Truth):
        raise UnsupportedError("a boolean result")
    tracks = Interval(*(end.reshape(3, cells.tracks, count) for end in result.orders))
    tracks &= tracks[:, :1]  # limits of what is between
    decisions = np.stack(cells.decisions) if cells.decisions else np.zeros((0, count), np.int8)
    return Enclosure(tracks, result.continuous[:count], result.smooth[:count], result.defined, decisions)
