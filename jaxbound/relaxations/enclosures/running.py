"""How far a scalar program's value, as it is executed, may be from its real one, anywhere in an interval of z.

`evaluation` asks at points, for values that jaxbound computes itself. Here every instruction is evaluated once at
computed operands, of which three things are known: `low` and `high` bound the computed and the real value for every z
of the interval, `error` their distance at the same z. An instruction carries the errors of its operands on, by how fast
it changes between `low` and `high`, and adds its own: the units in the last place of `evaluation`'s table, what
subnormal operands and results that count as zero make, and one more rounding of a literal that is added (Higham 2002,
section 3.3).

Nothing is assumed of two readers of one value: each may see another one within the error. So a product may be rounded
for one reader and reach another one in a fused multiply-add, or be evaluated twice. Predicates ask about z and numbers
alone. They are then exact, but where z is subnormal: around 0 the cases are taken to be chosen wrongly.

`simplification` says what XLA may make of a program, and what of that is not covered here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbound.graph import Program
from jaxbound.relaxations.enclosures import evaluation

LOST = 2.0**60
"""By what factors that are moved behind a sum, or before one, may enlarge what underflows (see `simplification`)."""
LARGEST = 2.0**-80
"""Part of the largest number up to which a value may be multiplied: without the factors, sums of such are finite."""
_SAFETY = 1.25


class _Known(NamedTuple):
    """What is known of an instruction's value; of a truth value, `low` is where it is certain, `high` where possible,
    and `error` whether the execution may take the other one."""

    low: jax.Array
    high: jax.Array
    error: jax.Array

    @property
    def size(self) -> jax.Array:
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


_Rule = Callable[..., tuple]


def _rising(function: Callable, steepest: Callable) -> _Rule:
    """Of a function that does not decrease; `steepest(low, high)` bounds its derivative between them."""

    def rule(x: _Known) -> tuple:
        return function(x.low), function(x.high), x.error * steepest(x.low, x.high)

    return rule


def _at_most(slope: float) -> Callable:
    return lambda low, high: slope


def _where(holds: jax.Array, value: jax.Array):
    return jnp.where(holds, value, jnp.inf)


def _times(x: _Known, y: _Known) -> tuple:
    corners = [x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high]
    carried = x.size * y.error + y.size * x.error + x.error * y.error
    return _least(corners), _most(corners), carried


def _power(x: _Known, y: int) -> tuple:
    ends = x.low**y, x.high**y
    inside = jnp.where((x.low <= 0) & (x.high >= 0), 0, jnp.minimum(*ends)) if y % 2 == 0 else jnp.minimum(*ends)
    return inside, jnp.maximum(*ends), x.error * y * x.size ** (y - 1)


def _over(x: _Known, y: _Known) -> tuple:
    least = jnp.where(y.low > 0, y.low, -y.high)  # of |y|, which has no 0
    inside = least > 4 * jnp.finfo(least.dtype).tiny + y.error
    corners = [x.low / y.low, x.low / y.high, x.high / y.low, x.high / y.high]
    carried = x.error / least + x.size / least * (y.error / least)
    too_large = y.size > jnp.finfo(least.dtype).max / 8  # its reciprocal may count as 0
    return _least(corners), _most(corners), _where(inside & ~too_large, carried)


def _sqrt(x: _Known) -> tuple:
    least = jnp.maximum(x.low, jnp.finfo(x.low.dtype).tiny)
    return jnp.sqrt(least), jnp.sqrt(x.high), _where(x.low > 4 * jnp.finfo(least.dtype).tiny, x.error / jnp.sqrt(least))


def _rsqrt(x: _Known) -> tuple:
    least = jnp.maximum(x.low, jnp.finfo(x.low.dtype).tiny)
    carried = x.error / (2 * least * jnp.sqrt(least))
    return jax.lax.rsqrt(x.high), jax.lax.rsqrt(least), _where(x.low > 4 * jnp.finfo(least.dtype).tiny, carried)


def _log(x: _Known) -> tuple:
    least = jnp.maximum(x.low, jnp.finfo(x.low.dtype).tiny)
    return jnp.log(least), jnp.log(x.high), _where(x.low > 4 * jnp.finfo(least.dtype).tiny, x.error / least)


def _log1p(x: _Known) -> tuple:
    defined = x.low > -0.99
    least = jnp.where(defined, x.low, -0.99)
    return jnp.log1p(least), jnp.log1p(x.high), _where(defined, x.error / (1 + least))


def _wave(x: _Known) -> tuple:
    return jnp.full_like(x.low, -1), jnp.full_like(x.low, 1), x.error


def _cosh(x: _Known) -> tuple:
    nearest = jnp.where((x.low <= 0) & (x.high >= 0), 0, jnp.minimum(jnp.abs(x.low), jnp.abs(x.high)))
    return jnp.cosh(nearest), jnp.cosh(x.size), x.error * jnp.cosh(x.size)


def _abs(x: _Known) -> tuple:
    nearest = jnp.where((x.low <= 0) & (x.high >= 0), 0, jnp.minimum(jnp.abs(x.low), jnp.abs(x.high)))
    return nearest, x.size, x.error


def _of_both(choose: Callable) -> _Rule:
    return lambda x, y: (choose(x.low, y.low), choose(x.high, y.high), jnp.maximum(x.error, y.error))


def _clamp(least: _Known, x: _Known, most: _Known) -> tuple:
    error = jnp.maximum(jnp.maximum(least.error, most.error), x.error)
    return jax.lax.clamp(least.low, x.low, most.low), jax.lax.clamp(least.high, x.high, most.high), error


def _falling(rule: _Rule) -> _Rule:
    def turned(x: _Known) -> tuple:
        high, low, carried = rule(x)
        return low, high, carried

    return turned


RULES: dict[str, _Rule] = {
    "abs": _abs,
    "add": lambda x, y: (x.low + y.low, x.high + y.high, x.error + y.error),
    "asinh": _rising(jnp.arcsinh, _at_most(1)),
    "atan": _rising(jnp.arctan, _at_most(1)),
    "clamp": _clamp,
    "copy": lambda x: tuple(x),
    "cos": _wave,
    "cosh": _cosh,
    "div": _over,
    "erf": _rising(jax.lax.erf, _at_most(1.13)),
    "erfc": _falling(_rising(jax.lax.erfc, _at_most(1.13))),
    "exp": _rising(jnp.exp, lambda low, high: jnp.exp(high)),
    "expm1": _rising(jnp.expm1, lambda low, high: jnp.exp(high)),
    "log": _log,
    "log1p": _log1p,
    "logistic": _rising(jax.lax.logistic, _at_most(1 / 4)),
    "max": _of_both(jnp.maximum),
    "min": _of_both(jnp.minimum),
    "mul": _times,
    "neg": lambda x: (-x.high, -x.low, x.error),
    "rsqrt": _rsqrt,
    "sin": _wave,
    "sinh": _rising(jnp.sinh, lambda low, high: jnp.cosh(jnp.maximum(jnp.abs(low), jnp.abs(high)))),
    "sqrt": _sqrt,
    "stop_gradient": lambda x: tuple(x),
    "sub": lambda x, y: (x.low - y.high, x.high - y.low, x.error + y.error),
    "tanh": _rising(jnp.tanh, _at_most(1)),
}
"""What an instruction makes of its operands: bounds of its value, and the error that it carries on."""
RULES["add_any"] = RULES["add"]
COMPARISONS: dict[str, Callable] = {
    "gt": lambda x, y: (x.low > y.high, x.high > y.low),
    "ge": lambda x, y: (x.low >= y.high, x.high >= y.low),
    "lt": lambda x, y: (x.high < y.low, x.low < y.high),
    "le": lambda x, y: (x.high <= y.low, x.low <= y.high),
    "eq": lambda x, y: ((x.low == y.high) & (x.high == y.low), (x.high >= y.low) & (x.low <= y.high)),
    "ne": lambda x, y: ((x.high < y.low) | (x.low > y.high), ~((x.low == y.high) & (x.high == y.low))),
}
POWERS = {"square": lambda params: 2, "integer_pow": lambda params: params["y"]}
_SUMS = frozenset({"add", "add_any", "sub"})


def error(program: Program, low: jax.Array, high: jax.Array) -> jax.Array:
    """A bound on `|executed - real|` of the program's value at every z between `low` and `high`, entry by entry."""
    tiny = float(jnp.finfo(low.dtype).tiny)
    found = _analysed(program, low, high, turned=False)
    names = {name for name, _, _ in program.instructions}
    if names & set(COMPARISONS):
        around = jnp.clip(low, -2 * tiny, 2 * tiny), jnp.clip(high, -2 * tiny, 2 * tiny)
        near = _analysed(program, *around, turned=True)
        found = jnp.where((low < tiny) & (high > -tiny), jnp.maximum(found, near), found)
    return jnp.where(jnp.isnan(found), jnp.inf, _SAFETY * found)


def _analysed(program: Program, low: jax.Array, high: jax.Array, *, turned: bool) -> jax.Array:
    """`turned` says that predicates about z may be taken wrongly."""
    limits = jnp.finfo(low.dtype)
    eps, tiny = float(limits.eps), float(limits.tiny)
    shared = sum(operand == ("z",) for name, _, read in program.instructions for operand in read) > 1
    exact = all(evaluation.is_exact(name) for name, _, _ in program.instructions)
    most = float(limits.max) * (1 if exact else LARGEST)
    loose = 2 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high)) if shared and not exact else 0.0
    z = _Known(low, high, jnp.full(low.shape, tiny, low.dtype) + loose)
    results: list[_Known] = []

    def read(operand: tuple) -> _Known:
        if operand[0] == "var":
            known = results[operand[1]]
            return known if known.low.dtype == bool else known._replace(error=known.error + tiny)
        if operand[0] == "z":
            return z
        number = jnp.full(low.shape, operand[1])
        if number.dtype == bool:
            return _Known(number, number, jnp.zeros_like(number))
        number = number.astype(low.dtype)
        return _Known(number, number, jnp.full(low.shape, tiny, low.dtype))

    for name, params, operands in program.instructions:
        known: list[Any] = [read(operand) for operand in operands]
        if name in COMPARISONS and operands[0] == operands[1]:  # asks whether it is NaN
            holds = jnp.full(low.shape, name in ("eq", "ge", "le"))
            results.append(_Known(holds, holds, jnp.zeros(low.shape, bool)))
        elif name in COMPARISONS:
            certain, possible = COMPARISONS[name](*known)
            results.append(_Known(certain, possible, jnp.full(low.shape, turned)))
        elif name == "select_n":
            results.append(_chosen(*known) if turned else _chosen(known[0], *_narrowed(program, operands, known)))
        elif known[0].low.dtype == bool:
            results.append(_logic(name, known))
        else:
            found = _evaluated(program, name, dict(params), operands, known)
            results.append(found._replace(error=jnp.where(found.size <= most, found.error, jnp.inf)))
    return results[-1].error


def _evaluated(program: Program, name: str, params: dict, operands: Sequence, known: Sequence[_Known]) -> _Known:
    """An instruction at its operands."""
    limits = jnp.finfo(known[0].low.dtype)
    eps, tiny = float(limits.eps), float(limits.tiny)
    power = POWERS[name](params) if name in POWERS else 2 if name == "mul" and operands[0] == operands[1] else 0
    low, high, carried = _power(known[0], power) if power else RULES[name](*known)
    units = evaluation.units(name, params, [x.size for x in known])
    if units is None:
        return _Known(low, high, carried)
    if name == "div":  # by the reciprocal, or the reciprocal root
        units = units + 1 + 4 * (operands[1][0] == "var" and program.instructions[operands[1][1]][0] == "sqrt")
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    if name in _SUMS:
        size = size + sum(abs(float(operand[1])) for operand in operands if operand[0] == "lit")
    flushed = 1.0
    if power:
        flushed = power * (1 + known[0].size) ** (power - 1)
    elif name in ("mul", "div"):
        flushed = (
            1 + known[0].size + (known[1].size if name == "mul" else _most([1 / abs(end) for end in known[1][:2]]))
        )
    own = units * eps * size + 8 * LOST * tiny * flushed
    below, above = low - 2 * own, high + 2 * own  # the ends are rounded, too; rounding keeps signs
    below, above = jnp.where(low < 0, below, jnp.maximum(below, 0)), jnp.where(high > 0, above, jnp.minimum(above, 0))
    return _Known(below, above, carried + own)


def _logic(name: str, known: Sequence[_Known]) -> _Known:
    """Of truth values."""
    doubt = known[0].error if len(known) == 1 else known[0].error | known[1].error
    if name == "not":
        return _Known(~known[0].high, ~known[0].low, doubt)
    combine = jnp.logical_and if name == "and" else jnp.logical_or
    return _Known(combine(known[0].low, known[1].low), combine(known[0].high, known[1].high), doubt)


def _narrowed(program: Program, operands: Sequence, known: Sequence[_Known]) -> list[_Known]:
    """The cases of a choice; of z itself what the predicate leaves, if it compares z with a number."""
    cases = list(known[1:])
    if operands[0][0] != "var":
        return cases
    name, _, compared = program.instructions[operands[0][1]]
    if name not in ("gt", "ge", "lt", "le") or compared[0] != ("z",) or compared[1][0] != "lit":
        return cases
    number = float(compared[1][1])
    for which, operand in enumerate(operands[1:]):
        if operand == ("z",):
            case = cases[which]
            above = (name in ("gt", "ge")) == bool(which)
            low = jnp.maximum(case.low, number - case.error) if above else case.low
            high = case.high if above else jnp.minimum(case.high, number + case.error)
            cases[which] = case._replace(low=jnp.minimum(low, case.high), high=jnp.maximum(high, case.low))
    return cases


def _chosen(predicate: _Known, no: _Known, yes: _Known) -> _Known:
    certain, possible, doubt = predicate
    low, high = jnp.minimum(no.low, yes.low), jnp.maximum(no.high, yes.high)
    error = jnp.maximum(no.error, yes.error)
    found = _Known(
        *(
            jnp.where(certain, one, jnp.where(possible, hull, other))
            for one, hull, other in zip(yes, (low, high, error), no, strict=True)
        )
    )
    if low.dtype == bool:
        return found
    wrong = _Known(low, high, error + (high - low))
    return _Known(*(jnp.where(doubt, one, other) for one, other in zip(wrong, found, strict=True)))


def _least(values: Sequence[jax.Array]) -> jax.Array:
    return jnp.min(jnp.stack(values), axis=0)


def _most(values: Sequence[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(values), axis=0)
