"""A jaxpr read as values: calls inlined, constants folded, and for each value the one that it is a function of.

Every variable of the traced function is one of three things. A `Literal` is one number, whatever its shape. A
`Constant` is an array that no region reaches. A `Value` depends on a region: it remembers the equation that made it
and, through elementwise equations, its *root*, the last single value of which it is an entry-by-entry function:

* with literals only, the root is passed on, so `0.5 * x * (1 + erf(x / sqrt(2)))` is one function of x;
* an affine operation with an array constant starts a new root, so that the pre-activation of Dense, bias and ReLU is
  after the bias;
* where a nonlinear operation meets several roots that are themselves affine images, with array constants, of one value,
  the last such value is the root (PReLU: `where(x >= 0, x, a * x)`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat
from jaxbound.graph import folding, operations
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE
from jaxbound.graph.rewriting import (
    definedness,
    indicators,
    infinities,
    integers,
    library,
    normalisation,
    pairs,
    patterns,
)
from jaxbound.graph.values import Computed, Constant, ConstantProgram, Literal, Operand, Value

Aval = _compat.ShapedArray | Operand
"""What has a shape and a dtype."""


class Builder:
    """Walks equations and keeps what each variable is."""

    def __init__(self):
        self.constants = ConstantProgram()
        self.made: dict[tuple, Value] = {}
        self.order: tuple = (-1.0,)
        self.labels: list[str] = []
        self.path = ""
        self.source = ""
        self.rewritten: set[str] = set()
        self.is_rewriting = False
        self.checks_for_nan = False
        """Within a function of JAX that asks of what it computes with whether it is NaN."""

    # --- reading equations ------------------------------------------------------------------------------------------

    def run(self, closed: _compat.ClosedJaxpr, arguments: Sequence) -> list:
        """Apply a jaxpr to literals, constants and values; a fresh environment for every call."""
        environment = dict(zip(closed.jaxpr.invars, arguments, strict=True))
        for variable, array in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            environment[variable] = self._known(variable.aval, array)

        def read(atom: _compat.Var | _compat.Literal):
            return self._known(atom.aval, atom.val) if isinstance(atom, _compat.Literal) else environment[atom]

        for equation in closed.jaxpr.eqns:
            outputs = self._equation(equation, [read(atom) for atom in equation.invars])
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _known(self, aval: Any, array: Any) -> Literal | Constant:
        """A number or array that the function closes over."""
        plain = not (_compat.is_tracer(array) or jnp.issubdtype(aval.dtype, jax.dtypes.extended))
        if plain and np.ndim(array) == 0:
            return Literal(np.asarray(array, aval.dtype)[()], ())
        return self.captured(aval, array)

    def captured(self, aval: Aval, array: Any) -> Constant:
        """A new constant, and the array that it is: as it is now, since the graph is kept."""
        kept = array.copy() if isinstance(array, np.ndarray) else array
        constant = self.constants.variable(aval, known=folding.small(kept))
        self.constants.captured.append((constant.number, kept))
        return constant

    def empty(self, aval: Aval) -> Constant:
        """What no region reaches, since it has no entries."""
        return self.captured(aval, np.zeros(aval.shape, aval.dtype))

    def _equation(self, equation: _compat.JaxprEqn, operands: list) -> list:
        callee = _compat.call_jaxpr(equation)
        if any(isinstance(operand, Value) for operand in operands):
            if callee is not None:
                return self._call(equation, callee, operands)
            outer = self._enter(equation)
            outputs = self.apply(equation.primitive, equation.params, operands, [v.aval for v in equation.outvars])
            self.source, self.path = outer
            return outputs
        return self._constants(equation, callee, operands)

    def _constants(self, equation: _compat.JaxprEqn, callee: _compat.ClosedJaxpr | None, operands: list) -> list:
        """What an equation makes that no region reaches: numbers, or constants."""
        avals: list[Any] = [variable.aval for variable in equation.outvars]
        of_pairs = any(pairs.is_complex(known.dtype) for known in (*operands, *avals))
        if callee is not None and (of_pairs or folding.is_known(operands)):
            return self.run(callee, operands)
        if of_pairs and (rewrite := pairs.match(equation.primitive, equation.params, operands)) is not None:
            return self.inline(*rewrite[:1], *rewrite[1])
        folded = folding.fold(equation, operands)
        if folded is not None and folded.real is None:
            return [Literal(folded.value, tuple(avals[0].shape))]
        parts = tuple(operands) if equation.primitive.name == "complex" else ()
        moved = folding.move(equation, operands)
        outputs = [self.constants.variable(aval, known=moved, parts=parts) for aval in avals]
        if folded is not None and folded.real is not None:
            outputs = [Computed(o.number, o.shape, o.dtype, folded.value, folded.real) for o in outputs]
        params = _highest(equation.primitive.name, equation.params)
        self.constants.equations.append((equation.primitive, params, operands, [o.number for o in outputs]))
        return outputs

    def _enter(self, equation: _compat.JaxprEqn) -> tuple[str, str]:
        """Note where an equation stands; returns what was noted before."""
        outer = self.source, self.path
        self.path = _compat.module_path(equation) or self.path
        if not any(self.labels):  # a library function keeps the line of its first caller, whoever that was
            self.source = _compat.source_line(equation) or self.source
        return outer

    def _call(self, equation: _compat.JaxprEqn, callee: _compat.ClosedJaxpr, operands: list) -> list:
        outer = self._enter(equation)
        name = str(equation.params.get("name", ""))
        rewrite = library.match(name, callee, operands)
        self.labels.append(name if rewrite is not None or _is_elementwise(callee) else "")
        if rewrite is None:
            within, self.checks_for_nan = self.checks_for_nan, library.is_logaddexp(callee)
            outputs = self.run(callee, operands)
            self.checks_for_nan = within
        else:
            self.rewritten.add(name)
            outputs = self.inline(*rewrite[:1], *rewrite[1])
        self.labels.pop()
        self.source, self.path = outer
        return outputs

    def inline(self, function: Callable, *operands: Operand, rewriting: bool = True) -> list:
        """Apply a JAX function to operands: how one primitive is rewritten into others, equal where it is defined."""
        closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands))
        outer, self.is_rewriting = self.is_rewriting, self.is_rewriting or rewriting
        made = self.run(closed, operands)
        self.is_rewriting = outer
        return made

    # --- sorting values into kinds ----------------------------------------------------------------------------------

    def value(
        self,
        primitive: _compat.Primitive,
        params: dict,
        operands: Sequence[Operand],
        aval: _compat.ShapedArray,
        **facts: Any,
    ) -> Value:
        """A new value, or the one that the same equation has made before."""
        read = tuple(map(_identity, operands)), facts.get("doubtful", False)
        key = primitive, tuple(sorted(params.items())), read, aval.shape, aval.dtype
        try:
            known = self.made.get(key)
        except TypeError:  # a parameter that cannot be compared
            return self._new_value(primitive, params, operands, aval, **facts)
        if known is None:
            known = self.made[key] = self._new_value(primitive, params, operands, aval, **facts)
        return known

    def _new_value(
        self,
        primitive: _compat.Primitive,
        params: dict,
        operands: Sequence[Operand],
        aval: _compat.ShapedArray,
        **facts: Any,
    ) -> Value:
        label = next((name for name in self.labels if name and not name.startswith("_")), primitive.name)
        return Value(
            self._next(), tuple(aval.shape), aval.dtype, primitive, _highest(primitive.name, params),
            tuple(operands), "/".join(part for part in (self.path, label) if part), self.source,
            sign=definedness.sign_of(primitive.name, params, operands, aval.shape),
            reach=normalisation.reach(primitive.name, operands),
            infinite=infinities.of_result(primitive.name, params, operands), **facts,
        )  # fmt: skip

    def _next(self) -> tuple:
        self.order = (*self.order[:-1], self.order[-1] + 1)
        return self.order

    def replaced(self, value: Value, function: Callable, arguments: Sequence) -> Value:
        """A value remade by a JAX function of earlier values: its parts stand just before it in the order."""
        self.order = (*value.order[:-1], value.order[-1] - 0.5, -1.0)
        self.labels, self.path, self.source = [], value.label.rpartition("/")[0], value.source
        (made,) = self.inline(function, *arguments)
        return made

    def apply(self, primitive: _compat.Primitive, params: dict, operands: list, avals: list) -> list:
        """What an equation with at least one region-dependent operand makes."""
        if all(0 in aval.shape for aval in avals):
            return [self.empty(aval) for aval in avals]
        if integers.wraps(primitive.name, params, operands, avals[0].shape, avals[0].dtype):
            own = {"primitive": primitive, "params": tuple(sorted(params.items()))}
            return [self.value(operations.wrapped, own, operands, aval) for aval in avals]
        narrowed = any(isinstance(o, Value) and rounds(indicators.precision(o), avals[0].dtype) for o in operands)
        if primitive.name in ELEMENTWISE:
            operands = [self._expanded(o, avals[0].shape) if isinstance(o, Value) else o for o in operands]
        doubtful = not self.is_rewriting and infinities.is_doubtful(primitive.name, operands)
        rewrite = None if narrowed else patterns.match(primitive, params, operands, doubtful=doubtful)
        if rewrite is not None:
            function, arguments = rewrite
            known = primitive.name == "ne" and self.checks_for_nan
            if not known and not patterns.keeps_arithmetic(primitive.name, rewrite):
                self.rewritten.add(primitive.name)
            return self.inline(function, *arguments, rewriting=primitive.name not in infinities.CALLS)
        if doubtful:
            return [self.value(primitive, params, operands, aval, doubtful=True) for aval in avals]
        if primitive.name in ELEMENTWISE and not narrowed:
            return [self._elementwise(primitive, params, operands, avals[0])]
        return [self.value(primitive, params, operands, aval) for aval in avals]

    def _elementwise(
        self, primitive: _compat.Primitive, params: dict, operands: Sequence[Operand], aval: _compat.ShapedArray
    ) -> Value:
        dependent = [o for o in operands if isinstance(o, Value)]
        arrays = any(isinstance(o, Constant) and not isinstance(o, Computed) for o in operands)
        affine = is_affine(primitive.name, operands, aval)
        shared = _nearest_shared(dependent)
        one = all(o.root is shared for o in dependent)
        if affine and (arrays or not one):
            return self.value(primitive, params, operands, aval, before=shared)
        if shared is None or not jnp.issubdtype(shared.dtype, jnp.floating):  # no function of one real variable
            return self.value(primitive, params, operands, aval)
        if jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype != shared.dtype:  # of one precision
            return self.value(primitive, params, operands, aval)
        bends = not affine or any(o.bends for o in dependent)
        return self.value(primitive, params, operands, aval, root=shared, bends=bends)

    def _expanded(self, operand: Value, shape: tuple[int, ...]) -> Value:
        """Make implicit broadcasting (scalars, axes of size 1) explicit."""
        if operand.shape == shape:
            return operand
        axes = tuple(range(len(shape) - len(operand.shape), len(shape)))
        if not operand.shape:
            axes = ()
        (made,) = self.inline(lambda x: jax.lax.broadcast_in_dim(x, shape, axes), operand)
        return made


def _is_elementwise(callee: _compat.ClosedJaxpr) -> bool:
    """Whether a call is one scalar function, which then lends its name to the node."""
    for equation in callee.jaxpr.eqns:
        inner = _compat.call_jaxpr(equation)
        name = equation.primitive.name
        if not (_is_elementwise(inner) if inner is not None else name in ELEMENTWISE or name == "broadcast_in_dim"):
            return False
    return True


def _identity(operand: Operand) -> tuple:
    """What makes two operands the same one."""
    if isinstance(operand, Literal):
        return operand.value.tobytes(), str(operand.dtype), operand.shape
    return (operand.number,) if isinstance(operand, Constant) else (id(operand),)


def _highest(name: str, params: dict) -> dict:
    """Matrix products at full precision: the default may be TF32 or bfloat16 on accelerators."""
    if name in ("dot_general", "conv_general_dilated"):
        return {**params, "precision": (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
    return params


def is_affine(name: str, operands: Sequence, aval: Aval) -> bool:
    """Whether a primitive is affine in its operands that depend on a region."""
    if name not in AFFINE:
        return False
    dependent = [o.dtype for o in operands if isinstance(o, Value)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (*dependent, aval.dtype)):
        return False
    return AFFINE[name].allows([isinstance(o, Value) for o in operands])


def _nearest_shared(values: Sequence[Value]) -> Value | None:
    """The last single value of which all these are entry-by-entry functions, or None."""
    first, *others = [value.lineage for value in values]
    return next((root for root in first if all(any(root is r for r in other) for other in others)), None)


def rounds(old: np.dtype, new: np.dtype) -> bool:
    """Whether floating-point numbers of one type are rounded to another."""
    floats = jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)
    return bool(floats and jnp.promote_types(old, new) != new)
