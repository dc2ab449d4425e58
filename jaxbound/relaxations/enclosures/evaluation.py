"""How far a scalar program's computed value may be from its real one: a running error analysis, at points.

Every instruction passes on the errors of its operands, by what it makes of the operands moved by them, and adds its
own: `u |result|` for arithmetic, more for elementary functions (measured), nothing for choices (Higham 2002, section
3.3).
The errors are far below the sizes on which the functions bend, so the first order is enough; `_SAFETY` covers the rest.
The error of a boolean is whether rounding may turn it; a choice that it may turn is off by the distance of its cases.
Only computed operands are in doubt: a choice that depends on z itself is exact.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbound.curvature.functions import FUNCTIONS, facts
from jaxbound.graph import Program
from jaxbound.graph.values import Inexact

_SAFETY = 1.25
_FACTORS = {"mul": lambda x, y: x + y, "div": lambda x, y: x + 1 / y}
"""What multiplies a factor that counts as 0: of a quotient's, one may be the reciprocal."""


def makes_error(program: Program, dtype: DTypeLike) -> bool:
    """Whether a value of the program may differ from the real one, for z of a dtype: else `error` is 0 everywhere."""
    tiny = float(jnp.finfo(dtype).tiny)
    read = [operand for _, _, operands in program.instructions for operand in operands]
    stored = all(
        operand[0] != "const" and not (operand[0] == "lit" and _stored(*operand[1:], tiny=tiny)) for operand in read
    )
    return not stored or not all(is_exact(name) for name, _, _ in program.instructions)


def error(program: Program, z: jax.Array, constants: Sequence) -> jax.Array:
    """A bound on `|computed - real|` of the program's value at `z`, entry by entry."""
    eps, tiny = jnp.finfo(z.dtype).eps, jnp.finfo(z.dtype).tiny
    deciding = {operand for name, _, read in program.instructions if facts(name).kind != "curve" for operand in read}
    results: list[tuple] = []

    def read(operand: tuple):
        if operand[0] == "var":
            return results[operand[1]]
        value = z if operand[0] == "z" else operand[1] if operand[0] == "lit" else constants[operand[1]]
        if isinstance(value, Inexact):
            return jnp.broadcast_to(value.value, z.shape), jnp.broadcast_to(value.error, z.shape)
        if operand[0] == "const" and operand in deciding and jnp.issubdtype(value.dtype, jnp.floating):
            return jnp.broadcast_to(value, z.shape), jnp.broadcast_to(tiny * is_subnormal(value), z.shape)
        error = _stored(*operand[1:], tiny=float(tiny)) if operand[0] == "lit" else 0.0
        return jnp.broadcast_to(value, z.shape), jnp.full(z.shape, error, z.dtype) if error else None

    for (name, params, operands), primitive in zip(program.instructions, program.primitives, strict=True):
        values, errors = zip(*map(read, operands), strict=True)
        apply = lambda *moved, primitive=primitive, params=params: primitive.bind(*moved, **dict(params))  # noqa: E731
        value = apply(*values)
        own, row = units(name, dict(params), values), facts(name)
        if all(err is None for err in errors):
            total = None
        elif row.kind == "comparison":  # a value is never in doubt against itself: that asks whether it is NaN
            total = None if operands[0] == operands[1] else _met(values, errors)
        elif name == "is_finite":
            total = ~jnp.isfinite(jnp.abs(values[0]) + _SAFETY * errors[0])
        elif name == "select_n" and value.dtype != bool:
            total = _turned(values[0], values[1:], errors)
        else:
            pole = name == "div" or (name == "integer_pow" and dict(params)["y"] < 0)
            reach = _SAFETY if row.kind == "step" else 1  # it may jump: all that rounding may do counts
            moves = tuple(err if err is None or err.dtype == bool else reach * err for err in errors)
            domain = row.domain if row.domain != (-math.inf, math.inf) else None
            total = _moved(apply, value, values, moves, domain, pole)
        if own is not None and jnp.issubdtype(value.dtype, jnp.floating):
            flushed = row.flushed * float(tiny) ** row.steep
            if name in _FACTORS:
                flushed = flushed * (1 + _FACTORS[name](*map(jnp.abs, values)))
            made = own * eps * jnp.abs(value) + flushed
            if row.without_error is not None:
                exact = [err == 0 for err in errors if err is not None]  # not `total == 0`: a sum may absorb an error
                exact += [~is_subnormal(operand) for operand in values]
                exact += [jnp.isfinite(value), row.without_error(*values)]
                made = jnp.where(functools.reduce(operator.and_, exact), 0, made)
            total = made if total is None else total + made
            if name == "erf_inv":
                total = total + eps * _rounded_square(values[0], value)
        results.append((value, total))
    found = results[-1][1]
    return jnp.zeros_like(z) if found is None else _SAFETY * found


def _stored(value: Any, real: tuple[float, float] | None = None, *, tiny: float) -> float:
    """How far a literal may be from its real value; a subnormal one may count as 0."""
    error = tiny if 0 < abs(value) < tiny else 0.0
    if real is None:
        return error
    farthest = max(abs(float(value) - end) for end in real)
    return error + (1.001 * farthest + tiny if math.isfinite(farthest) else math.inf)


def is_subnormal(values: jax.Array) -> jax.Array:
    """Which floating-point numbers are subnormal, by their bits: in comparisons they may count as 0."""
    width = jnp.finfo(values.dtype).bits
    bits = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{width}"))
    size = bits & jnp.asarray(2 ** (width - 1) - 1, bits.dtype)
    return (size > 0) & (size < jnp.asarray(2 ** jnp.finfo(values.dtype).nmant, bits.dtype))


def compares(name: str) -> bool:
    """Whether an instruction makes a truth value of numbers."""
    return facts(name).kind == "comparison" or name == "is_finite"


def is_exact(name: str) -> bool:
    """Whether an instruction makes no error of its own."""
    return name in FUNCTIONS and FUNCTIONS[name].units == (0, 0)


def units(name: str, params: dict, values: Sequence[jax.Array]):
    """The error of one instruction in units in the last place of its result; None if it is exact."""
    if name not in FUNCTIONS:
        raise KeyError(
            f"no bound is known on the rounding error of `{name}`: measure it, and add a row to `curvature.functions`"
        )
    found = FUNCTIONS[name].units[values[0].dtype == jnp.float64]
    if not found:
        return None
    if name == "integer_pow":
        return found * abs(params["y"])
    return found * (1 + jnp.abs(values[0])) if FUNCTIONS[name].scaled else found


def _met(values: Sequence[jax.Array], errors: Sequence[jax.Array | None]) -> jax.Array:
    """Whether two values are so near to each other that rounding may turn how they compare."""
    reach = _SAFETY * sum(err for err in errors if err is not None)
    near = values[0] ^ values[1] if values[0].dtype == bool else jnp.abs(values[0] - values[1])
    return (reach != 0) & ~(near > reach)


def _turned(predicate: jax.Array, cases: Sequence[jax.Array], errors: Sequence[jax.Array | None]) -> jax.Array:
    """The error of a choice: that of the case and, where rounding may turn it, how far all of them are from it."""
    own = [jnp.zeros_like(case) if err is None else err for case, err in zip(cases, errors[1:], strict=True)]
    chosen = jax.lax.select_n(predicate, *own)
    if errors[0] is None:
        return chosen
    value = jax.lax.select_n(predicate, *cases)
    farthest = jnp.max(jnp.stack([jnp.abs(case - value) + err for case, err in zip(cases, own, strict=True)]), axis=0)
    return jnp.where(errors[0] != 0, jnp.where(jnp.isnan(farthest), jnp.inf, farthest), chosen)


def _rounded_square(x: jax.Array, y: jax.Array) -> jax.Array:
    """How y = erf_inv(x) moves, over eps, with x: XLA computes it from `log(1 - x^2)`, with the square rounded."""
    return jnp.abs(x) * jnp.exp(y * y)


def _moved(
    apply: Callable,
    value: jax.Array,
    values: Sequence[jax.Array],
    errors: Sequence[jax.Array | None],
    domain: tuple[float, float] | None,
    pole: bool,
) -> jax.Array:
    """How far the result moves with its operands; of a boolean, whether it turns.

    The first operand is kept in its `domain`; with a `pole` nothing is known where the last one may be 0.
    """
    sides = [(0,) if err is None else (0, 1) if err.dtype == bool else (-1, 1) for err in errors]

    def corner(signs: tuple[int, ...]) -> jax.Array:
        moved = [v if s == 0 else _shifted(v, s, err) for v, s, err in zip(values, signs, errors, strict=True)]
        if signs[0] and domain:
            inside = (values[0] >= domain[0]) & (values[0] <= domain[1])
            moved[0] = jnp.where(inside, jnp.clip(moved[0], *domain), moved[0])
        return apply(*moved)

    corners = jnp.stack([corner(signs) for signs in itertools.product(*sides)])
    if value.dtype == bool:
        return jnp.any(corners != value, axis=0)
    distances = jnp.abs(corners - value)
    # the value may be undefined, and thrown away, or infinity may meet itself
    farthest = jnp.max(jnp.where(jnp.isnan(distances), 0, distances), axis=0)
    if pole and errors[-1] is not None:
        farthest = jnp.where((jnp.abs(values[-1]) <= errors[-1]) & ~jnp.isnan(value), jnp.inf, farthest)
    return farthest


def _shifted(value: jax.Array, sign: int, err: Any) -> jax.Array:
    """A number moved by its error, or a boolean turned where it may turn."""
    return value ^ err if value.dtype == bool else (value + sign * err).astype(value.dtype)
