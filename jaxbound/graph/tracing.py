"""From a JAX function to a `Structure`: trace once, read the values, sort them into kinds, fuse scalar chains.

Nodes are made on demand, from the outputs, so nothing that the outputs do not need is ever refused. A fused chain whose
curvature cannot be proved is made of its parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound.curvature.analysis import analyse
from jaxbound.graph.primitives import AFFINE, NONLINEAR, REFUSED
from jaxbound.graph.reading import Builder, is_affine, rounds
from jaxbound.graph.rewriting import definedness, indicators, infinities, patterns
from jaxbound.graph.structure import Node, Op, Program, Structure
from jaxbound.graph.values import Computed, Constant, Literal, Operand, Value


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
    builder = Builder()
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


def _assemble(builder: Builder, inputs: list[Value], outputs: list, out_tree: Any) -> Structure:
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


def _demand(builder: Builder, plans: dict[Value, tuple[Op, list]], wanted: Sequence) -> None:
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
        ordered = [value for value in sorted(refusals, key=lambda value: value.order) if not _follows(value, refusals)]
        raise errors.UnsupportedError(*dict.fromkeys(text for value in ordered for text in refusals[value].refusals))


def _follows(value: Value, refused: Container[Value]) -> bool:
    """Whether a refusal only says that what it reads was refused: a number of what is none."""
    reads_refused = any(operand in refused for operand in value.dependent)
    return value.name == "convert_element_type" and reads_refused and not _rounded(value)


def _share(builder: Builder, plans: dict[Value, tuple[Op, list]]) -> None:
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
    while value.bends and len(value.dependent) == 1 and is_affine(value.name, value.operands, value):
        (value,) = value.dependent
        if not value.bends:
            break
        tail.append(value)
    return tail


def _plan(builder: Builder, value: Value) -> tuple[Op, list]:
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
    rounded = _rounded(value)
    if rounded:
        reason = f"its result of dtype {value.dtype} rounds its operand of {rounded[0]}"
        raise errors.unsupported(name, _shapes(value), value.source, reason, way_out="use one precision throughout")
    if name in REFUSED:
        reason, way_out = REFUSED[name]
        raise errors.unsupported(name, _shapes(value), value.source, reason, way_out=way_out)
    if value.dtype == np.bool_ or not jnp.issubdtype(value.dtype, jnp.floating):
        reason = f"its result has dtype {value.dtype}, which cannot carry a bound"
        way_out = "use jnp.where on a fixed predicate, or keep comparisons inside one elementwise function"
        raise errors.unsupported(name, _shapes(value), value.source, reason, way_out=way_out)
    if name in AFFINE and is_affine(name, value.operands, value):
        return _op("affine", value), list(value.operands)
    parts = patterns.parts(name, value.params, value.operands)
    if parts is not None:
        builder.rewritten.add(name)
        op, operands = _plan(builder, builder.replaced(value, *parts))
        if op.kind != "scalar" or not value.doubtful:  # of a scalar function the infinite numbers may lie within
            return dataclasses.replace(op, partial=op.partial or value.doubtful), operands
    if name in NONLINEAR:
        return _op(NONLINEAR[name], value), list(value.operands)
    reason, way_out = (
        ("infinite numbers may meet in it, or 0", "use a large finite number in place of the infinite one")
        if value.doubtful
        else ("no rule bounds it when these operands depend on a region", "add a rule as docs/extending.md shows")
    )
    raise errors.unsupported(name, _shapes(value), value.source, reason, way_out=way_out)


def _rounded(value: Value) -> list[np.dtype]:
    """The precisions of operands that a value has no room for."""
    return [old for old in map(indicators.precision, value.dependent) if rounds(old, value.dtype)]


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
    chosen = kind == "select" and any(isinstance(o, Literal) and np.isnan(o.value) for o in value.operands)
    masked = kind == "logsumexp" and bool(infinities.of(value.operands[0]))
    divided = kind == "affine" and value.name == "div" and definedness.leaves_domain(value)
    return Op(
        kind, value.name, value.shape, value.dtype, tuple(operand.shape for operand in value.operands),
        tuple(sorted(value.params.items())), tuple(operands), value.primitive, nonnegative=value.sign > 0,
        reach=value.reach, partial=value.doubtful or chosen or masked or divided,
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

    def reference(operand: Operand):
        if operand is root:
            return ("z",)
        if isinstance(operand, Literal):
            return ("lit", operand.value)
        if isinstance(operand, Computed):
            return ("lit", operand.value, operand.real)
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
