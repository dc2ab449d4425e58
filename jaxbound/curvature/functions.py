"""One table of elementwise primitives: all that is known of each, in one row.

A row says what the function's value and its first two derivatives are on an interval (`proof`), how exactly XLA
computes it (`units`), where it is defined, and what is certain of its sign and of its value at infinity. From it read

    graph       which primitives may be fused into one scalar function (`primitives.ELEMENTWISE`), where they are
                defined (`rewriting.definedness`), what infinite operands make of them (`rewriting.infinities`);
    curvature   where a fused function is convex, concave, linear (`enclosing`);
    relaxations by how much its computed value may be off (`enclosures.evaluation`).

So a new elementwise primitive is one row here, and one row of samples in `tests/test_curvature.py`.

Errors are measured on CPU under the options that `_compat.eager_jit` compiles with, and in part on an H100 (float32
division 1.2, sqrt 0.8, of the others none more than 2.7). log1p in float64 loses two digits around -0.414, and so does
atanh; cbrt is computed as a power, 7.8 and 60 units off at the ends of the range; erf_inv is measured beside
`evaluation._rounded_square`. The other sources: `elementary` for formulas and their errors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxbound.curvature import jets
from jaxbound.curvature.elementary import ELEMENTARY, Elementary
from jaxbound.curvature.jets import Jet

Range = tuple[float, float]
Sign = Literal[0, 1, 2]
"""Nothing, at least 0, more than 0."""


@dataclass(frozen=True)
class Function:
    """One row. What it leaves out is assumed to be unknown, and makes bounds wider or refuses, never wrong."""

    units: tuple[float, float]
    """How many units in the last place of its result XLA is off by, in float32 and in float64; (0, 0) is exact."""
    proof: Elementary | Callable | None = None
    """Value and derivatives: formulas, or a rule on jets (parameters by name); None refuses to fuse it with others."""
    logic: Callable | None = None
    """The same of booleans."""
    kind: Literal["curve", "comparison", "step"] = "curve"
    """A comparison makes booleans of numbers; a step may jump."""
    domain: Range = (-math.inf, math.inf)
    """Where its first operand must lie for it to be defined."""
    closed: bool = False
    """Whether it is finite at the ends of its domain."""
    poles: Literal["", "zero", "many"] = ""
    """Where it is undefined within its domain, too: at 0 of its last operand, or here and there."""
    sign: Sign = 0
    """What is certain of the sign of its result, wherever it is defined."""
    vanishes: bool = False
    """Whether what is positive by `sign`, or by the operands' signs, may be 0 at infinity."""
    keeps_sign: bool = False
    """Whether its result has the least sign of its operands."""
    at_infinity: Literal["", "finite", "rising"] = ""
    """At infinite operands: finite, or infinite with their sign; "" if neither is known."""
    scaled: bool = False
    """Whether `units` are to be taken times 1 + |argument|, which is rounded before exp."""
    steep: float = 1.0
    """It sees subnormal numbers, which may count as 0: the power of the smallest normal number to allow for."""
    flushed: int = 1
    """How many such numbers: sums have terms that may be such, others halve their operand first."""
    without_error: Callable | None = None
    """At which operands that are exact, and not subnormal, a finite result of it is exact."""

    @property
    def is_partial(self) -> bool:
        """Whether there are operands at which it is undefined."""
        return bool(self.poles) or self.domain != (-math.inf, math.inf)

    @property
    def defined_from(self) -> Sign | None:
        """A sign of its operand (of a quotient's denominator) with which it is defined; None if no sign is enough."""
        low, high = self.domain
        if self.poles or low == -math.inf:
            return 2 if self.poles == "zero" else None
        if low > 0 or high < math.inf:
            return None
        return 1 if low < 0 or self.closed else 2


def elementary(units: tuple[float, float], formulas: Elementary, **facts: Any) -> Function:
    """The row of a function by formulas, which know its domain."""
    return Function(units, formulas, **({"domain": formulas.domain, "closed": formulas.closed} | facts))


def comparison(proof: Callable) -> Function:
    """The row of one."""
    return Function(EXACT, proof, kind="comparison", at_infinity="finite")


EXACT, ARITHMETIC, WITHIN_4 = (0, 0), (1, 1), (4, 4)
"""`WITHIN_4`: functions that XLA keeps within 4 units (measured: at most 3.2 and 3.5)."""
_POSITIVE = (0.0, math.inf)


def _row(name: str, units: tuple[float, float] = WITHIN_4, **facts: Any) -> dict[str, Function]:
    return {name: elementary(units, ELEMENTARY[name], **facts)}


def _identity(x: Jet) -> Jet:
    return x


def _is_exact_sum(x: Any, y: Any) -> Any:
    """Nothing added, what cancels, and what is doubled."""
    return (x == 0) | (y == 0) | (x == -y) | (x == y)


# fmt: off
FUNCTIONS: dict[str, Function] = {
    # arithmetic
    "add": Function(ARITHMETIC, operator.add, flushed=3, without_error=_is_exact_sum),
    "add_any": Function(ARITHMETIC, operator.add, flushed=3),
    "sub": Function(ARITHMETIC, operator.sub, flushed=3, without_error=lambda x, y: _is_exact_sum(x, -y)),
    "mul": Function(ARITHMETIC, operator.mul, keeps_sign=True),
    "div": Function((2, 1), operator.truediv, poles="zero", keeps_sign=True, vanishes=True),
    "neg": Function(EXACT, operator.neg),
    "square": Function(ARITHMETIC, Jet.squared, sign=1),
    "integer_pow": Function(ARITHMETIC, jets.raised_to, poles="zero", keeps_sign=True, vanishes=True),
    "pow": Function((64, 64), jets.general_power, domain=_POSITIVE, steep=1 / 4, vanishes=True),
    "sqrt": Function(
        ARITHMETIC, jets.square_root, domain=_POSITIVE, closed=True, keeps_sign=True, at_infinity="rising",
        steep=1 / 2),
    "cbrt": Function((16, 128), jets.cube_root, keeps_sign=True, at_infinity="rising", steep=1 / 3),
    **_row("rsqrt", sign=2, vanishes=True, at_infinity="finite"),
    # exponentials and logarithms
    **_row("exp", sign=2, vanishes=True),
    **_row("exp2", sign=2, vanishes=True, scaled=True),
    **_row("expm1", keeps_sign=True),
    **_row("log", at_infinity="rising"),
    **_row("log1p", (4, 256), keeps_sign=True, at_infinity="rising"),
    **_row("logistic", sign=2, vanishes=True, at_infinity="finite"),
    **_row("tanh", keeps_sign=True, at_infinity="finite"),
    **_row("sinh", (6, 6), keeps_sign=True, at_infinity="rising", scaled=True),
    **_row("cosh", sign=2, scaled=True),
    **_row("asinh", keeps_sign=True, at_infinity="rising"),
    **_row("acosh", closed=False),  # the other end is infinite, and so is the function
    **_row("atanh", (4, 128)),
    **_row("erf", keeps_sign=True, at_infinity="finite"),
    **_row("erfc", (8, 8), at_infinity="finite", scaled=True),
    **_row("erf_inv", (4, 64)),
    # angles
    "sin": Function(WITHIN_4, lambda x: jets.sine(x, 0)),
    "cos": Function(WITHIN_4, lambda x: jets.sine(x, 1)),
    "tan": Function(WITHIN_4, lambda x: jets.sine(x, 0) / jets.sine(x, 1), poles="many"),
    **_row("asin", flushed=2),
    **_row("acos"),
    **_row("atan", keeps_sign=True, at_infinity="finite"),
    # exact: choices, and what only moves or cuts a value
    "abs": Function(EXACT, jets.absolute, sign=1),
    "sign": Function(EXACT, jets.sign, kind="step", at_infinity="finite"),
    "max": Function(EXACT, jets.maximum),
    "min": Function(EXACT, lambda x, y: -jets.maximum(-x, -y), keeps_sign=True),
    "clamp": Function(EXACT, lambda least, x, most: -jets.maximum(-jets.maximum(x, least), -most), keeps_sign=True),
    "copy": Function(EXACT, _identity, _identity, keeps_sign=True, at_infinity="rising"),
    "stop_gradient": Function(EXACT, keeps_sign=True),
    "convert_element_type": Function(EXACT, kind="step", keeps_sign=True, at_infinity="rising"),
    "select_n": Function(EXACT),
    "ceil": Function(EXACT, kind="step", at_infinity="rising"),
    "floor": Function(EXACT, kind="step", at_infinity="rising"),
    "round": Function(EXACT, kind="step", at_infinity="rising"),
    # booleans
    "gt": comparison(lambda x, y: jets.compare(x, y)[0]), "le": comparison(lambda x, y: ~jets.compare(x, y)[0]),
    "lt": comparison(lambda x, y: jets.compare(y, x)[0]), "ge": comparison(lambda x, y: ~jets.compare(y, x)[0]),
    "eq": comparison(lambda x, y: jets.compare(x, y)[1]), "ne": comparison(lambda x, y: ~jets.compare(x, y)[1]),
    "is_finite": Function(EXACT, lambda x: jets.compare(x, x)[1], at_infinity="finite"),
    "and": Function(EXACT, logic=operator.and_, at_infinity="finite"),
    "or": Function(EXACT, logic=operator.or_, at_infinity="finite"),
    "not": Function(EXACT, logic=operator.invert, at_infinity="finite"),
    "xor": Function(EXACT, at_infinity="finite"),
}
# fmt: on
"""Primitive name -> what is known of it."""


TOGETHER: dict[tuple[str, str], Callable] = {("mul", "log"): jets.times_its_logarithm, ("div", "sin"): jets.sine_over}
"""A product or quotient of a function's value with its argument -> the rule of both, which knows the limit at 0."""

_NOTHING = Function((math.inf, math.inf))


def facts(name: str) -> Function:
    """The row of a primitive; an empty one, in which nothing is claimed, if it has none."""
    return FUNCTIONS.get(name, _NOTHING)
