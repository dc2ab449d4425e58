"""How far a scalar program's computed value may be from its real one: a running error analysis, at points.

Every instruction passes on the errors of its operands, by what it makes of the operands moved by them, and adds its
own: `u |result|` for arithmetic, more for elementary functions (measured), nothing for choices (Higham 2002, section
3.3).
The errors are far below the sizes on which the functions bend, so the first order is enough; `_SAFETY` covers the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Program

_SAFETY = 1.25
_ELEMENTARY = 4
"""Units in the last place that XLA's functions keep within on CPU and GPU, in both precisions, but for these:"""
_COARSE = {"atanh": (4, 128), "div": (2, 1), "erf_inv": (4, 64), "log1p": (4, 128), "pow": (64, 64)}
"""For float32 and float64. (log1p in float64 loses two digits around -0.414. So does atanh, measured 1.6 and 73 units,
and erf_inv, measured 1.6 and 17 beside `_rounded_square`; asin, acos and acosh: 1.5, 1.6 and 2.4 in both. On an H100,
in float32 division 1.2 and sqrt 0.8; of the functions above none more than 2.7 in either.)"""
_GROWING = frozenset({"cosh", "erfc", "exp2", "sinh"})
"""Times 1 + |argument|: they round it before exp."""
_EXACT = frozenset({
    "abs", "ceil", "clamp", "convert_element_type", "copy", "floor", "max", "min", "neg", "round", "select_n", "sign",
    "stop_gradient",
})  # fmt: skip
_STEEP = {"sqrt": 1 / 2, "cbrt": 1 / 3, "pow": 1 / 4}
"""Subnormal numbers may count as 0, which these functions see: the power of the smallest normal number to allow for."""
_DOMAIN = {
    "acos": (-1, 1), "acosh": (1, math.inf), "asin": (-1, 1), "atanh": (-1, 1), "erf_inv": (-1, 1),
    "log": (0, math.inf), "log1p": (-1, math.inf), "pow": (0, math.inf), "rsqrt": (0, math.inf), "sqrt": (0, math.inf),
}  # fmt: skip
"""An operand in the domain is in it, moved or not; at its ends some of the functions are infinite."""
_ROUNDED = frozenset({"add", "add_any", "mul", "sqrt", "square", "sub"})


def error(program: Program, z: jax.Array, constants: Sequence) -> jax.Array:
    """A bound on `|computed - real|` of the program's value at `z`, entry by entry."""
    eps, tiny = jnp.finfo(z.dtype).eps, jnp.finfo(z.dtype).tiny
    results: list[tuple] = []

    def read(operand):
        if operand[0] == "var":
            return results[operand[1]]
        value = z if operand[0] == "z" else operand[1] if operand[0] == "lit" else constants[operand[1]]
        return jnp.broadcast_to(value, z.shape), None

    for (name, params, operands), primitive in zip(program.instructions, program.primitives, strict=True):
        values, errors = zip(*map(read, operands), strict=True)
        apply = lambda *moved, primitive=primitive, params=params: primitive.bind(*moved, **dict(params))  # noqa: E731
        value = apply(*values)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            results.append((value, None))
            continue
        own = _own(name, dict(params), values)
        if name == "select_n":  # rounding may turn the choice where the cases meet, within the errors of both
            total = sum((err for err in errors if err is not None), jnp.zeros_like(value))
        else:
            pole = name == "div" or (name == "integer_pow" and dict(params)["y"] < 0)
            total = _moved(apply, value, values, errors, _DOMAIN.get(name), pole)
        if own is not None:
            flushed = float(tiny) ** _STEEP.get(name, 1)
            total = (0 if total is None else total) + own * eps * jnp.abs(value) + flushed
            if name == "erf_inv":
                total = total + eps * _rounded_square(values[0], value)
        results.append((value, total))
    found = results[-1][1]
    return jnp.zeros_like(z) if found is None else _SAFETY * found


def _own(name: str, params: dict, values):
    """The error of one instruction in units in the last place of its result; None if it is exact."""
    if name in _EXACT:
        return None
    if name in _ROUNDED:
        return 1
    if name == "integer_pow":
        return abs(params["y"])
    if name in _COARSE:
        return _COARSE[name][values[0].dtype == jnp.float64]
    return _ELEMENTARY * (1 + jnp.abs(values[0])) if name in _GROWING else _ELEMENTARY


def _rounded_square(x, y) -> jax.Array:
    """How y = erf_inv(x) moves, over eps, with x: XLA computes it from `log(1 - x^2)`, with the square rounded."""
    return jnp.abs(x) * jnp.exp(y * y)


def _moved(apply, value, values, errors, domain: tuple[float, float] | None, pole: bool) -> jax.Array | None:
    """How far the result moves with its operands; None if they are exact.

    The first operand is kept in its `domain`; with a `pole` nothing is known where the last one may be 0.
    """
    sides = [(0,) if err is None else (-1, 1) for err in errors]
    if all(side == (0,) for side in sides):
        return None

    def corner(signs) -> jax.Array:
        moved = [v if s == 0 else v + s * err for v, s, err in zip(values, signs, errors, strict=True)]
        if signs[0] and domain:
            inside = (values[0] >= domain[0]) & (values[0] <= domain[1])
            moved[0] = jnp.where(inside, jnp.clip(moved[0], *domain), moved[0])
        return apply(*moved)

    corners = [corner(signs) for signs in itertools.product(*sides)]
    distances = jnp.abs(jnp.stack(corners) - value)
    # the value may be undefined, and thrown away, or infinity may meet itself
    farthest = jnp.max(jnp.where(jnp.isnan(distances), 0, distances), axis=0)
    if pole and errors[-1] is not None:
        farthest = jnp.where((jnp.abs(values[-1]) <= errors[-1]) & ~jnp.isnan(value), jnp.inf, farthest)
    return farthest
