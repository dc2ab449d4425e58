"""The value of a function's graph at points: node by node, as real functions, with nothing relaxed.

Rewrites must not change it. Where several expressions of one value meet, their largest difference is returned too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Structure, tracing
from jaxbound.relaxations import affine


def evaluated(function: Callable, *arguments, bounded: Sequence[bool] = ()) -> tuple[list, jax.Array]:
    """The flat outputs of the graph of a function of flat arrays, and how far expressions that meet are apart."""
    avals = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arguments]
    return run(tracing.build(function, avals, bounded or [True] * len(arguments)), arguments, bounded)


def run(structure: Structure, arguments: Sequence, bounded: Sequence[bool] = ()) -> tuple[list, jax.Array]:
    """`evaluated`, with the structure given."""
    bounded = bounded or [True] * len(arguments)
    constants = structure.constants({k: jnp.asarray(x) for k, x in enumerate(arguments) if not bounded[k]})
    values = [jnp.asarray(x) for x, is_bounded in zip(arguments, bounded, strict=True) if is_bounded]
    apart = jnp.zeros(())
    for node in structure.nodes[len(values) :]:
        inputs, read = [values[k] for k in node.inputs], [constants[k] for k in node.constants]
        values.append(_value(node.op, inputs, read))
        if node.op.kind == "meet":
            scale = 1 + jnp.abs(inputs[0])
            apart = jnp.stack([apart, *(jnp.max(jnp.abs(x - inputs[0]) / scale) for x in inputs[1:])]).max()
    return [values[k] if kind == "node" else constants[k] for kind, k in structure.outputs], apart


def _value(op, inputs: list, constants: list):
    if op.kind == "affine":
        return affine.apply(op, inputs, constants)
    if op.kind == "scalar":
        return op.program(inputs[0], *constants)
    roles = {"input": inputs, "constant": constants}
    operands = [
        jnp.full(operand[2], operand[1]) if operand[0] == "literal" else roles[operand[0]][operand[1]]
        for operand in op.operands
    ]
    return _WHOLE[op.kind](op, *operands)


def _bound_to(op, *operands):
    made = op.primitive.bind(*operands, **dict(op.params))
    return made[0] if op.primitive.multiple_results else made


_WHOLE = {
    "product": lambda op, x, y: x * y,
    "select": lambda op, which, no, yes: no + which * (yes - no),
    "meet": lambda op, first, *_: first,
    "logsumexp": lambda op, x: jax.nn.logsumexp(x, dict(op.params)["axes"]),
    "maximum": _bound_to,
    "sort": _bound_to,
    "staircase": _bound_to,
}
