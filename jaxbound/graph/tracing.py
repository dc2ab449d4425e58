"""From a JAX function to a `Structure`: trace once, inline calls, sort values into kinds, fuse scalar chains.

Length: one walk over the equations and one over the values that it leaves; neither is of use alone.

Every variable of the traced function is one of three things. A `Literal` is one number, whatever its shape. A
`Constant` is an array that no region reaches. A `Value` depends on a region: it remembers the equation that made it
and, through elementwise equations, its *root*, the last single value of which it is an entry-by-entry function:

* with literals only, the root is passed on, so `0.5 * x * (1 + erf(x / sqrt(2)))` is one function of x;
* an affine operation with an array constant starts a new root, so that the pre-activation of Dense, bias and ReLU is
  after the bias;
* where a nonlinear operation meets several roots that are themselves affine images, with array constants, of one value,
  the last such value is the root (PReLU: `where(x >= 0, x, a * x)`).

Nodes are made on demand, from the outputs, so nothing that the outputs do not need is ever refused. A fused chain whose
curvature cannot be proved is made of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat, errors
from jaxbound.graph.rewriting import definedness, integers, patterns
from jaxbound.graph import operations
from jaxbound.graph import Node, Op, Program, Structure
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE, NONLINEAR, REFUSED
from jaxbound.curvature.analysis import analyse
from jaxbound.graph.values import Constant, ConstantProgram, Literal, Value


class _Builder:
    """Walks equations and keeps what each variable is."""

    def __init__(self):
        self.constants = ConstantProgram()
        self.made: dict[tuple, Value] = {}
        self.order: tuple = (-1.0,)
        self.labels: list[str] = []
        self.path = ""
        self.source = ""
        self.rewritten: set[str] = set()

    # --- reading equations ------------------------------------------------------------------------------------------

    def run(self, closed: _compat.ClosedJaxpr, arguments: Sequence) -> list:
        """Apply a jaxpr to literals, constants and values; a fresh environment for every call."""
        environment = dict(zip(closed.jaxpr.invars, arguments, strict=True))
        for variable, array in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            environment[variable] = self._known(variable.aval, array)

        def read(atom):
            return self._known(atom.aval, atom.val) if isinstance(atom, _compat.Literal) else environment[atom]

        for equation in closed.jaxpr.eqns:
            outputs = self._equation(equation, [read(atom) for atom in equation.invars])
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _known(self, aval, array) -> Literal | Constant:
        """A number or array that the function closes over."""
        plain = not (_compat.is_tracer(array) or jnp.issubdtype(aval.dtype, jax.dtypes.extended))
        if plain and np.ndim(array) == 0:
            return Literal(np.asarray(array, aval.dtype)[()], ())
        return self.captured(aval, array)

    def captured(self, aval, array) -> Constant:
        """A new constant, and the array that it is: as it is now, since the graph is kept."""
        constant = self.constants.variable(aval)
        kept = array.copy() if isinstance(array, np.ndarray) else array
        self.constants.captured.append((constant.number, kept))
        return constant

    def empty(self, aval) -> Constant:
        """What no region reaches, since it has no entries."""
        return self.captured(aval, np.zeros(aval.shape, aval.dtype))

    def _equation(self, equation, operands: list) -> list:
        callee = _compat.call_jaxpr(equation)
        if any(isinstance(operand, Value) for operand in operands):
            if callee is not None:
                return self._call(equation, callee, operands)
            outer = self._enter(equation)
            outputs = self.apply(equation.primitive, equation.params, operands, [v.aval for v in equation.outvars])
            self.source, self.path = outer
            return outputs
        avals = [variable.aval for variable in equation.outvars]
        if all(isinstance(operand, Literal) for operand in operands) and len(avals) == 1:
            folded = _fold(equation, operands)
            if folded is not None:
                return [Literal(folded, tuple(avals[0].shape))]
        outputs = [self.constants.variable(aval) for aval in avals]
        params = _highest(equation.primitive.name, equation.params)
        self.constants.equations.append((equation.primitive, params, operands, [o.number for o in outputs]))
        return outputs

    def _enter(self, equation) -> tuple[str, str]:
        """Note where an equation stands; returns what was noted before."""
        outer = self.source, self.path
        self.path = _compat.module_path(equation) or self.path
        if not any(self.labels):  # a library function keeps the line of its first caller, whoever that was
            self.source = _compat.source_line(equation) or self.source
        return outer

    def _call(self, equation, callee, operands) -> list:
        outer = self._enter(equation)
        self.labels.append(str(equation.params.get("name", "")) if _is_elementwise(callee) else "")
        outputs = self.run(callee, operands)
        self.labels.pop()
        self.source, self.path = outer
        return outputs

    def inline(self, function: Callable, *operands) -> list:
        """Apply a JAX function to operands: how one primitive is rewritten into others."""
        closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands))
        return self.run(closed, operands)

    # --- sorting values into kinds ----------------------------------------------------------------------------------

    def value(self, primitive, params, operands, aval, **facts) -> Value:
        """A new value, or the one that the same equation has made before."""
        key = primitive, tuple(sorted(params.items())), tuple(map(_identity, operands)), aval.shape, aval.dtype
        try:
            known = self.made.get(key)
        except TypeError:  # a parameter that cannot be compared
            return self._new_value(primitive, params, operands, aval, **facts)
        if known is None:
            known = self.made[key] = self._new_value(primitive, params, operands, aval, **facts)
        return known

    def _new_value(self, primitive, params, operands, aval, **facts) -> Value:
        label = next((name for name in self.labels if name and not name.startswith("_")), primitive.name)
        return Value(
            self._next(), tuple(aval.shape), aval.dtype, primitive, _highest(primitive.name, params),
            tuple(operands), "/".join(part for part in (self.path, label) if part), self.source,
            sign=definedness.sign_of(primitive.name, params, operands, aval.shape), **facts,
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

    def apply(self, primitive, params: dict, operands: list, avals: list) -> list:
        """What an equation with at least one region-dependent operand makes."""
        if all(0 in aval.shape for aval in avals):
            return [self.empty(aval) for aval in avals]
        if integers.wraps(primitive.name, params, operands, avals[0].shape, avals[0].dtype):
            return [self.value(operations.wrapped, {}, operands, aval) for aval in avals]
        narrowed = any(isinstance(o, Value) and _rounds(o.dtype, avals[0].dtype) for o in operands)
        if primitive.name in ELEMENTWISE:
            operands = [self._expanded(o, avals[0].shape) if isinstance(o, Value) else o for o in operands]
        rewrite = None if narrowed else patterns.match(primitive, params, operands)
        if rewrite is not None:
            function, arguments = rewrite
            if primitive.name not in patterns.SAME_ARITHMETIC:
                self.rewritten.add(primitive.name)
            return self.inline(function, *arguments)
        if primitive.name in ELEMENTWISE and not narrowed:
            return [self._elementwise(primitive, params, operands, avals[0])]
        return [self.value(primitive, params, operands, aval) for aval in avals]

    def _elementwise(self, primitive, params, operands, aval) -> Value:
        dependent = [o for o in operands if isinstance(o, Value)]
        arrays = any(isinstance(o, Constant) for o in operands)
        affine = _is_affine(primitive.name, operands, aval)
        shared = _nearest_shared(dependent)
        one = all(o.root is shared for o in dependent)
        if affine and (arrays or not one):
            return self.value(primitive, params, operands, aval, before=shared)
        if shared is None or not jnp.issubdtype(shared.dtype, jnp.floating):  # no function of one real variable
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


def _identity(operand) -> tuple:
    """What makes two operands the same one."""
    if isinstance(operand, Literal):
        return operand.value.tobytes(), str(operand.dtype), operand.shape
    return (operand.number,) if isinstance(operand, Constant) else (id(operand),)


def _fold(equation, operands: list[Literal]) -> Any:
    """The number that an elementwise or broadcasting equation of literals makes, if it is one number."""
    name = equation.primitive.name
    if name in ("broadcast_in_dim", "reshape", "squeeze"):
        return operands[0].value
    if name not in ELEMENTWISE:
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(equation.primitive.bind(*(o.value for o in operands), **equation.params))[()]


def _highest(name: str, params: dict) -> dict:
    """Matrix products at full precision: the default may be TF32 or bfloat16 on accelerators."""
    if name in ("dot_general", "conv_general_dilated"):
        return {**params, "precision": (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
    return params


def _is_affine(name: str, operands: Sequence, aval) -> bool:
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


def _rounds(old, new) -> bool:
    """Whether floating-point numbers of one type are rounded to another."""
    floats = jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)
    return bool(floats and jnp.promote_types(old, new) != new)


def build(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct], is_region: Sequence[bool]) -> Structure:
    """Trace a function of flat leaves into a structure.

    Args:
        function: maps the flat leaves to a pytree of arrays.
        arguments: shape and dtype of each leaf.
        is_region: whether each leaf is a region.

    Raises:
        UnsupportedError: the outputs need an operation that cannot be bounded.
    """
    closed, out_shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    builder = _Builder()
    leaves: list = []
    inputs: list[Value] = []
    for number, (variable, region) in enumerate(zip(closed.jaxpr.invars, is_region, strict=True)):
        if region:
            leaf = Value((-1.0, len(inputs)), tuple(variable.aval.shape), variable.aval.dtype, label="input")
            inputs.append(leaf)
            leaf = builder.empty(leaf) if 0 in leaf.shape else leaf
        else:
            leaf = builder.constants.variable(variable.aval)
            builder.constants.leaves[number] = leaf.number
        leaves.append(leaf)
    outputs = builder.run(closed, leaves)
    return _assemble(builder, inputs, outputs, jax.tree.structure(out_shapes))


# --- from values to nodes ---------------------------------------------------------------------------------------------


def _assemble(builder: _Builder, inputs: list[Value], outputs: list, out_tree) -> Structure:
    """Make the nodes that the outputs need, in the order of the equations."""
    plans: dict[Value, tuple[Op, list]] = {}
    _demand(builder, plans, outputs)
    _share(builder, plans)
    ordered = _ordered(inputs, plans)
    for number, value in enumerate(ordered):
        value.node = number
    width = len(str(max(len(ordered) - 1, 1)))
    nodes: list[Node] = []
    for number, value in enumerate(ordered):
        if value.primitive is None:
            op = Op("input", "input", value.shape, value.dtype)
            name = f"{number:0{max(3, width)}d}/input"
            nodes.append(Node(op, (), (), name, frozenset({number}), True, ""))
            continue
        op, operands = plans[value]
        sources = tuple(o.node for o in operands if isinstance(o, Value))
        nodes.append(
            Node(
                op, sources,
                tuple(builder.constants.slot(o) for o in operands if isinstance(o, Constant)),
                f"{number:0{max(3, width)}d}/{value.label}",
                frozenset().union(*(nodes[source].leaves for source in sources)),
                op.kind == "affine" and all(nodes[source].affine_in_region for source in sources),
                value.source,
            )
        )  # fmt: skip
    results = []
    for output in outputs:
        if isinstance(output, Literal):
            output = builder.captured(output, np.full(output.shape, output.value))
        kind = ("node", output.node) if isinstance(output, Value) else ("constant", builder.constants.slot(output))
        results.append(kind)
    builder.constants.prune()
    rewritten = tuple(sorted(builder.rewritten))
    return Structure(tuple(nodes), len(inputs), tuple(results), out_tree, builder.constants, rewritten)


def _ordered(inputs: list[Value], plans: dict[Value, tuple[Op, list]]) -> list[Value]:
    """The inputs and the planned values in the order of their equations, each after what it reads."""
    ordered = dict.fromkeys(inputs)
    for value in sorted(plans, key=lambda value: value.order):
        stack = [value]
        while stack:
            missing = [o for o in plans[stack[-1]][1] if isinstance(o, Value) and o not in ordered]
            stack.extend(missing)
            if not missing:
                ordered[stack.pop()] = None
    return list(ordered)


def _demand(builder: _Builder, plans: dict[Value, tuple[Op, list]], wanted: Sequence) -> None:
    """Plan nodes for values, and for all that they need; all refusals are raised together."""
    pending = [value for value in wanted if isinstance(value, Value)]
    refusals: dict[Value, errors.UnsupportedError] = {}
    while pending:
        value = pending.pop()
        if value in plans or value in refusals or value.primitive is None:
            continue
        try:
            plans[value] = _plan(builder, value)
        except errors.UnsupportedError as error:
            refusals[value] = error
        needed = value.operands if value in refusals else plans[value][1]
        pending.extend(operand for operand in needed if isinstance(operand, Value))
    if refusals:
        ordered = sorted(refusals, key=lambda value: value.order)
        raise errors.UnsupportedError(*dict.fromkeys(text for value in ordered for text in refusals[value].refusals))


def _share(builder: _Builder, plans: dict[Value, tuple[Op, list]]) -> None:
    """Where several scalar nodes are affine images of one bent value, let them share its relaxation."""
    images: dict[Value, list[Value]] = {}
    for value, (op, _) in plans.items():
        if op.kind == "scalar":
            images.setdefault(_tail(value)[-1], []).append(value)
    for bent, values in images.items():
        if len(values) > 1:
            for image in {image for value in values for image in _tail(value)[:-1]}:
                plans[image] = _op("affine", image), list(image.operands)
            _demand(builder, plans, [bent])


def _tail(value: Value) -> list[Value]:
    """A bending value and what it is an affine image of, by literals alone, down to the last that is not one."""
    tail = [value]
    while value.bends and len(value.dependent) == 1 and _is_affine(value.name, value.operands, value):
        (value,) = value.dependent
        if not value.bends:
            break
        tail.append(value)
    return tail


def _plan(builder: _Builder, value: Value) -> tuple[Op, list]:
    """The node for a value: its op, and the values and constants that it reads."""
    for root in _roots(value):
        program, constants, partial = _program(value, root)
        proof = analyse(program)
        if proof is not None:
            op = Op(
                "scalar", value.label.rpartition("/")[2], value.shape, value.dtype, (value.shape,), program=program,
                nonnegative=value.sign > 0, partial=partial and bool(proof.undefined),
            )  # fmt: skip
            return op, [root, *constants]
    name = value.name
    rounded = [o for o in value.dependent if _rounds(o.dtype, value.dtype)]
    if rounded:
        reason = f"its result of dtype {value.dtype} rounds its operand of {rounded[0].dtype}"
        raise errors.unsupported(name, _shapes(value), value.source, reason, way_out="use one precision throughout")
    if name in REFUSED:
        reason, way_out = REFUSED[name]
        raise errors.unsupported(name, _shapes(value), value.source, reason, way_out=way_out)
    if value.dtype == np.bool_ or not jnp.issubdtype(value.dtype, jnp.floating):
        reason = f"its result has dtype {value.dtype}, which cannot carry a bound"
        way_out = "use jnp.where on a fixed predicate, or keep comparisons inside one elementwise function"
        raise errors.unsupported(name, _shapes(value), value.source, reason, way_out=way_out)
    if name in AFFINE and _is_affine(name, value.operands, value):
        return _op("affine", value), list(value.operands)
    parts = patterns.parts(name, value.params, value.operands)
    if parts is not None:
        builder.rewritten.add(name)
        return _plan(builder, builder.replaced(value, *parts))
    if name in NONLINEAR:
        return _op(NONLINEAR[name], value), list(value.operands)
    reason, way_out = (
        "no rule bounds it when these operands depend on a region",
        "add a rule as docs/extending.md shows",
    )
    raise errors.unsupported(name, _shapes(value), value.source, reason, way_out=way_out)


def _shapes(value: Value) -> list[tuple[int, ...]]:
    return [operand.shape for operand in value.operands]


def _op(kind: str, value: Value) -> Op:
    operands, counts = [], {"input": 0, "constant": 0}
    for operand in value.operands:
        if isinstance(operand, Literal):
            operands.append(("literal", operand.value, operand.shape))
            continue
        role = "input" if isinstance(operand, Value) else "constant"
        operands.append((role, counts[role]))
        counts[role] += 1
    return Op(
        kind, value.name, value.shape, value.dtype, tuple(operand.shape for operand in value.operands),
        tuple(sorted(value.params.items())), tuple(operands), value.primitive, nonnegative=value.sign > 0,
    )  # fmt: skip


def _roots(value: Value) -> list[Value]:
    """From where a bending value can be one scalar function: its chain's root, else its only operand, or theirs."""
    if not value.bends:
        return []
    roots, inner = [value.root], value
    while len({id(o) for o in inner.dependent}) == 1:
        inner = inner.dependent[0]
        roots.append(inner)
        if not inner.bends:
            break
    return [root for root in dict.fromkeys(roots) if jnp.issubdtype(root.dtype, jnp.floating)]


def _program(value: Value, root: Value) -> tuple[Program, list[Constant], bool]:
    """Linearise the chain from a root to the value; the last says whether signs leave open that all is defined."""
    numbers: dict[int, int] = {}
    instructions, made_by, dtypes, constants, partial = [], [], [], [], False

    def reference(operand):
        if operand is root:
            return ("z",)
        if isinstance(operand, Literal):
            return ("lit", operand.value)
        if isinstance(operand, Constant):
            constants.append(operand)
            return ("const", len(constants) - 1)
        return ("var", numbers[id(operand)])

    stack = [value]
    while stack:
        top = stack[-1]
        missing = [o for o in top.dependent if o is not root and id(o) not in numbers]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if id(top) in numbers:
            continue
        instructions.append((top.name, tuple(sorted(top.params.items())), tuple(map(reference, top.operands))))
        made_by.append(top.primitive)
        partial |= definedness.leaves_domain(top)
        dtypes.append(str(top.dtype))
        numbers[id(top)] = len(instructions) - 1
    return Program(tuple(instructions), tuple(made_by), tuple(dtypes)), constants, partial
