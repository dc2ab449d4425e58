"""Constants that a function computes are rounded: how far each may be from its real value, entry by entry.

What no region reaches and is computed (a folded normalisation, `W1 @ W2`, normalised weights) is evaluated in floating
point before anything is bounded. Where bounds have to hold for exact arithmetic, the same equations are walked once
more beside their values, as a running error analysis (Higham 2002, section 3.3), and the interpreters charge what it
finds (`values.Inexact`). Arguments and arrays that a function closes over are exact, and what is made of exact entries
by moving them, by comparing them or in integers stays so; it costs nothing.

    elementwise functions   by their own error and what the moved operands make of them (`evaluation.error`)
    sums and products       |A| e_B + e_A |B| + e_A e_B + gamma_n (|A| + e_A) (|B| + e_B)
    maxima, sorted entries  the largest error of an entry

What has no rule here is refused. Numbers that JAX folds into literals count as stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound._compat import ClosedJaxpr, Literal, Primitive, Var, bind, called
from jaxbound.graph import Program
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE
from jaxbound.graph.values import Constant, ConstantProgram, Inexact
from jaxbound.relaxations import affine
from jaxbound.relaxations.enclosures import evaluation

Error = jax.Array | None
"""Entry by entry, or None for none; of a truth value, whether rounding may turn it."""

_LARGEST = frozenset({
    "reduce_max", "reduce_min", "cummax", "cummin", "sort", "reduce_window_max", "reduce_window_min", "top_k",
})  # fmt: skip
"""Primitives whose result is one of the operand's entries, moved by no more than the largest error of any."""
_CUTS = frozenset({"split", "unstack"})
"""Primitives of one operand that only take it apart."""
_EXACT = frozenset({"iota", "random_bits", "random_unwrap", "random_wrap"})
_NO_BOUND = frozenset({"sin", "cos", "tan"})
"""They turn again and again, so the ends of an interval say nothing of what is between."""
_JUMPS = frozenset({"ceil", "floor", "sign"})
"""They jump by 1 where a subnormal number counts as 0."""
_SMALL = 1 / 16
"""The first order is enough for operands whose error is at most this part of them."""


def evaluate(program: ConstantProgram, leaves: dict[int, jax.Array]) -> dict[int, jax.Array | Inexact]:
    """All constants of a program; those that may be rounded with their errors."""
    known: dict[int, tuple] = {number: (array, None) for number, array in program.given(leaves).items()}
    for primitive, params, operands, outputs in program.equations:
        read = [known[o.number] if isinstance(o, Constant) else (jnp.full(o.shape, o.value), None) for o in operands]
        known.update(zip(outputs, _results(primitive, params, read), strict=True))
    return {n: value if error is None else Inexact(value, _rounded_up(error)) for n, (value, error) in known.items()}


def _results(primitive: Primitive, params: dict, read: Sequence[tuple]) -> list[tuple]:
    """The results of an equation, each with its error; of a call, by its own equations."""
    operands, given = [value for value, _ in read], [error for _, error in read]
    callee = called(primitive, params, [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in operands])
    if callee is not None and not all(map(_is_discrete, operands)):
        return _run(callee, read)
    found = bind(primitive, operands, params)
    results = list(found) if primitive.multiple_results else [found]
    return list(zip(results, _errors(primitive, params, operands, given, results), strict=True))


def _run(closed: ClosedJaxpr, arguments: Sequence[tuple]) -> list[tuple]:
    known: dict = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    known.update((v, (array, None)) for v, array in zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Literal | Var) -> tuple:
        return (jnp.asarray(atom.val), None) if isinstance(atom, Literal) else known[atom]

    for equation in closed.jaxpr.eqns:
        results = _results(equation.primitive, equation.params, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _is_real(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _is_discrete(array: jax.Array) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.inexact)


def _rounded_up(error: jax.Array) -> jax.Array:
    """Errors are computed in floating point too, and by fewer than 2**20 operations in a row."""
    if error.dtype == bool:  # with a choice in doubt nothing is known
        return jnp.where(error, jnp.inf, 0.0)
    error = 1.25 * error + jnp.finfo(error.dtype).tiny
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def _errors(
    primitive: Primitive, params: dict, operands: Sequence, given: Sequence[Error], results: Sequence
) -> list[Error]:
    """The errors of an equation's results."""
    name, exact = primitive.name, all(error is None for error in given)
    floating = [jnp.issubdtype(result.dtype, jnp.floating) for result in results]
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (*operands, *results)):
        if not exact or not _keeps_parts(name, params, operands, results):
            raise _refused(name, "no bound is known on the rounding of complex numbers")
        return [None] * len(results)
    if exact and not any(floating):
        return [_turned_by_flushing(name, operands, result) for result in results]
    if name == "known_up_to":
        return [operands[1]]
    if name == "convert_element_type" and floating[0] and not any(x.dtype == bool for x in operands):
        return [_converted(operands[0], given[0], results[0])]
    if name in ELEMENTWISE and all(is_float or x.dtype == bool for is_float, x in zip(floating, results, strict=True)):
        return [_elementwise(primitive, params, operands, given)]
    if not any(floating):
        raise _refused(name, "its whole number may turn on a rounded one")
    if name in _EXACT or (exact and name in _LARGEST | _CUTS):
        return [None] * len(results)
    if name in _CUTS and given[0] is not None:
        return list(bind(primitive, [given[0]], params))
    if name in _LARGEST and len(results) == 1 and given[0] is not None:
        return [jnp.full(results[0].shape, jnp.max(given[0]))]
    if name not in AFFINE:
        raise _refused(name, "no bound is known on the rounding of it")
    return [_affine(primitive, params, operands, given, results[0])]


def _keeps_parts(name: str, params: dict, operands: Sequence, results: Sequence) -> bool:
    """Whether an equation of complex numbers only moves, takes apart or negates them."""
    if name == "convert_element_type":
        return jnp.promote_types(operands[0].dtype, results[0].dtype) == results[0].dtype
    facts = AFFINE.get(name)
    shapes = [jnp.shape(operand) for operand in operands]
    moves = facts is not None and not facts.scales and not facts.terms(shapes, results[0].shape, params)
    return moves or name in ("complex", "conj", "imag", "real")


def _turned_by_flushing(name: str, operands: Sequence, result: jax.Array) -> Error:
    """Whether a comparison of exact numbers may turn, where subnormal ones count as 0."""
    floats = [x for x in operands if jnp.issubdtype(x.dtype, jnp.floating)]
    if not evaluation.compares(name) or name == "is_finite" or not floats:
        return None
    marks = [jnp.broadcast_to(evaluation.is_subnormal(x), result.shape) for x in floats]
    return functools.reduce(jnp.logical_or, marks)


def _refused(name: str, reason: str) -> errors.UnsupportedError:
    way_out = "compute it beforehand and pass it as an argument, or ask for rounding=False"
    return errors.unsupported(f"{name} of constants", [], "", reason, way_out=way_out)


def _converted(operand: jax.Array, error: Error, result: jax.Array) -> Error:
    narrows = not _is_real(operand) or jnp.promote_types(operand.dtype, result.dtype) != result.dtype
    if not narrows and error is None:
        return None
    carried = jnp.zeros(result.shape, result.dtype) if error is None else error.astype(result.dtype) * 1.01
    limits = jnp.finfo(result.dtype)
    if not _is_real(operand):  # whole numbers are exact up to 2**24, or 2**53
        return carried + jnp.where(jnp.abs(result) > 2 / limits.eps, limits.eps * jnp.abs(result), 0)
    return carried + (limits.eps * jnp.abs(result) + limits.tiny if narrows else 0)


def _elementwise(primitive: Primitive, params: dict, operands: Sequence, given: Sequence[Error]) -> Error:
    """Of one instruction, by the analysis of scalar programs."""
    name = primitive.name
    shape = jnp.broadcast_shapes(*(jnp.shape(operand) for operand in operands))
    known = [
        operand if error is None else Inexact(jnp.broadcast_to(operand, shape), jnp.broadcast_to(error, shape))
        for operand, error in zip(operands, given, strict=True)
    ]
    dtype = next((x.dtype for x in operands if jnp.issubdtype(x.dtype, jnp.floating)), jnp.float32)
    reads = tuple(("const", k) for k in range(len(operands)))
    program = Program(((name, tuple(sorted(params.items())), reads),), (primitive,))
    if all(error is None for error in given) and evaluation.is_exact(name):
        jumps = name in _JUMPS and jnp.issubdtype(operands[0].dtype, jnp.floating)
        return evaluation.is_subnormal(operands[0]).astype(dtype) if jumps else None
    error = evaluation.error(program, jnp.zeros(shape, dtype), known)
    if all(not jnp.issubdtype(x.dtype, jnp.floating) for x in operands) or evaluation.compares(name):
        return error != 0
    if name in _NO_BOUND and given[0] is not None:
        error = error + given[0] if name != "tan" else jnp.full(shape, jnp.inf, dtype)
    elif name not in ("add", "add_any", "sub", "mul", "neg", "max", "min", "abs", "square", "exp", "clamp", "select_n"):
        for operand, err in zip(operands, given, strict=True):
            if err is not None:
                error = jnp.where(err <= _SMALL * jnp.abs(operand), error, jnp.inf)
    return error


def _affine(primitive: Primitive, params: dict, operands: Sequence, given: Sequence[Error], result: jax.Array) -> Error:
    """Of what moves, adds or multiplies entries."""
    facts = AFFINE[primitive.name]
    shapes = [jnp.shape(operand) for operand in operands]
    terms = facts.terms(shapes, result.shape, params)
    if not terms and all(error is None for error in given):
        return None
    if any(given[k] is not None for k in range(len(operands)) if k in facts.fixed):
        raise _refused(primitive.name, "where it reads may turn on a rounded number")
    room = affine.enlargement(result.dtype)

    def made(change: Callable) -> jax.Array:
        """The equation at magnitudes instead of its operands; what is fixed stays."""
        changed = [x if k in facts.fixed else change(k, x) for k, x in enumerate(operands)]
        return jnp.abs(bind(primitive, changed, params))

    def error_of(k: int) -> jax.Array:
        error = given[k]
        return jnp.zeros(shapes[k], result.dtype) if error is None else error

    signs = [facts.signs[min(k, len(facts.signs) - 1)] for k in range(len(operands))]
    largest = made(lambda k, x: signs[k] * (jnp.abs(x) + error_of(k) + room)) if terms else jnp.zeros(())
    if facts.scales:
        carried = jnp.maximum(largest - made(lambda k, x: jnp.abs(x) + room), 0)
    else:
        carried = made(lambda k, x: signs[k] * error_of(k))
    return carried + affine.gamma(2 * terms + 6, result.dtype) * (largest + room) if terms else carried
