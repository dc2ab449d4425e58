"""What XLA's algebraic simplifier may make of a scalar program, alone and beside other operations.

Its rules are patterns of one operation and those that make its operands (read from its source; what it makes of common
activations was looked at). `refusal` names what `running` does not cover: instructions without a rule there, and pairs
that XLA replaces by something whose steps may overflow or lose more: products and quotients of quotients, `exp(log(x))`
and its kin, roots of squares, products of two multiples, whose factors it gathers. What it does to the rest is counted
there: a quotient by a number becomes a product with its rounded reciprocal, one by a repeated value a product with
`1 / y`, `x / sqrt(y)` a product with `rsqrt(y)`, neighbouring factors and terms that are numbers are folded.

The other functions say how a program begins and ends, for rules that look across nodes (`methods.executed`).
"""

from __future__ import annotations

import math

import numpy as np

from jaxbound.graph import Program
from jaxbound.relaxations.enclosures import running

FACTORS = 2.0**-20, 2.0**20
"""Numbers by which a value may be multiplied. XLA gathers them; up to `GATHERED` stay within the range of the dtype."""
GATHERED = 3
_LOGIC = frozenset({"and", "not", "or", "select_n"})
_SUMS = frozenset({"add", "add_any", "sub"})
_EXPENSIVE = frozenset({
    "asinh", "atan", "cos", "cosh", "erf", "erfc", "exp", "expm1", "log", "log1p", "logistic", "rsqrt", "sin", "sinh",
    "sqrt", "tanh",
})  # fmt: skip
"""What XLA evaluates once: its fusions duplicate what is cheap alone."""
_SIMPLIFIED = {
    "div": frozenset({"div", "exp", "log", "pow", "rsqrt"}),
    "exp": frozenset({"log"}),
    "log": frozenset({"exp", "pow", "rsqrt", "sqrt"}),
    **dict.fromkeys(
        ("rsqrt", "sqrt"), frozenset({"div", "exp", "integer_pow", "mul", "pow", "rsqrt", "sqrt", "square"})
    ),
    **dict.fromkeys(("integer_pow", "square"), frozenset({"abs", "exp", "multiple", "rsqrt", "sqrt"})),
}
"""Instruction -> what may not make its operands, since XLA simplifies the pair."""
_SIMPLIFIED_PRODUCTS = frozenset({"abs", "exp", "multiple", "rsqrt", "sqrt"})
"""What may not make both factors of a product."""


def refusal(program: Program, made_by: frozenset[str] = frozenset()) -> str:
    """Why the execution of a program is not bounded; "" if it is. `made_by` says what z may be the result of."""
    kinds = _kinds(program)

    def makers(operand: tuple) -> frozenset[str]:
        if operand[0] == "var" and kinds[operand[1]] != "z":
            return frozenset({kinds[operand[1]]})
        return frozenset() if operand[0] == "lit" else made_by

    for kind, (name, params, operands) in zip(kinds, program.instructions, strict=True):
        if any(operand[0] == "const" or len(operand) > 2 for operand in operands):
            return f"{name} of an array, or of a computed constant,"
        if name in running.COMPARISONS or name in _LOGIC:
            if name in running.COMPARISONS and operands[0] != operands[1] and any(o[0] == "var" for o in operands):
                return f"{name} of a computed value, on which a choice depends,"
            if len(operands) > 3:
                return "a choice among more than two"
            continue
        if name not in running.RULES and not (name in running.POWERS and running.POWERS[name](dict(params)) >= 2):
            return f"{name}, whose error is not known,"
        numbers = [float(o[1]) for o in operands if o[0] == "lit"]
        if kind == "multiple" and not all(n == 0 or FACTORS[0] <= abs(n) <= FACTORS[1] for n in numbers):
            return f"{name} by {numbers[0]:g}, too large or small a number,"
        if name not in ("clamp", "max", "min") and not all(map(math.isfinite, numbers)):
            return f"{name} of {numbers[0]:g}"
        read = [makers(operand) for operand in operands]
        found = frozenset().union(*read) & _SIMPLIFIED.get(name, frozenset())
        if name == "mul":
            found = frozenset() if kind == "multiple" else read[0] & read[1] & _SIMPLIFIED_PRODUCTS
        if found and kind != "multiple":
            return f"{name} of {' and '.join(sorted(found))}, which the compiler may simplify,"
    return ""


def result(program: Program) -> str:
    """The name of the instruction that makes the result; "multiple" and "shifted" of a product or sum with a number."""
    return _kinds(program)[-1]


def shifts(program: Program) -> bool:
    """Whether it adds a number to z."""
    return any(kind == "shifted" and ("z",) in read for kind, (_, _, read) in _named(program))


def takes_in(program: Program) -> bool:
    """Whether it adds to z or multiplies it, so that it may read a product that is not rounded, or other factors."""
    return any(name in _SUMS or name in ("div", "mul") for name, _, read in program.instructions if ("z",) in read)


def is_smooth(program: Program) -> bool:
    """Whether nothing in it is chosen, so that it jumps at poles alone, where nothing is bounded."""
    return all(name not in running.COMPARISONS and name != "select_n" for name, _, _ in program.instructions)


def gathered(program: Program, before: int) -> tuple[int, int]:
    """How many factors XLA may gather, at the most, anywhere and in the result, with so many on z."""
    counts: list[int] = []
    for kind, (name, _, operands) in _named(program):
        read = [before if o[0] == "z" else counts[o[1]] if o[0] == "var" else 0 for o in operands]
        power = 3 if name in running.POWERS else 1
        product = kind == "multiple" or name in ("mul", "div", *running.POWERS)
        least = min(read, default=0) if name in _SUMS else max(read, default=0)
        most = sum(read) * power if product else 0 if name in _EXPENSIVE else least
        counts.append(most + (kind == "multiple"))
    return max(counts), counts[-1]


def reads(program: Program) -> int:
    """1 if it evaluates each value for one reader alone, z included, and 2 if not."""
    operands = [o for _, _, read in program.instructions for o in read if o[0] in ("var", "z")]
    return 1 if len(operands) == len(set(operands)) else 2


def differs(program: Program) -> bool:
    """Whether a reader may see a sum whose products are not rounded, and another reader one of rounded ones."""
    kinds, found = _kinds(program), []
    for name, _, operands in program.instructions:
        read = [o[1] for o in operands if o[0] == "var"]
        fused = name in _SUMS and any(kinds[k] in ("div", "mul", "multiple", *running.POWERS) for k in read)
        found.append(name not in _EXPENSIVE and (fused or any(found[k] for k in read)))
    return found[-1]


def _kinds(program: Program) -> list[str]:
    kinds: list[str] = []
    for name, _, operands in program.instructions:
        numbers = [float(o[1]) for o in operands if o[0] == "lit" and np.ndim(o[1]) == 0]
        if name in ("mul", "div") and numbers and (name == "mul" or operands[1][0] == "lit"):
            kinds.append("multiple")
        elif name in _SUMS and any(numbers):
            kinds.append("shifted")
        elif name in ("copy", "neg", "stop_gradient"):
            kinds.append(kinds[operands[0][1]] if operands[0][0] == "var" else "z")
        else:
            kinds.append(name)
    return kinds


def _named(program: Program):
    return zip(_kinds(program), program.instructions, strict=True)
