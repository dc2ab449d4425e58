"""Programs: networks as steps that are rows of the table of operators, with their constants; values are numbered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound.frontends.operators import OPERATORS, Node


class Operand(NamedTuple):
    """Where a step takes an input from.

    Args:
        kind: "value" of an input, which have the first numbers, or of an earlier step; "parameter"; "constant"; or
            "nothing", an option left out.
        content: the value's number, the parameter's name, or the constant.
    """

    kind: str
    content: Any = None


class Step(NamedTuple):
    """One row of the table of operators, with its operands and the numbers of the values that it makes."""

    node: Node
    operands: tuple[Operand, ...]
    results: tuple[int, ...]


class Program:
    """The steps of a network; equal where the steps are, so that what is compiled for one serves the other."""

    def __init__(self, steps: Sequence[Step], outputs: Sequence[int], shapes: Sequence[tuple], batched: bool):
        self.steps, self._outputs, self._shapes, self._batched = tuple(steps), tuple(outputs), tuple(shapes), batched
        text = hashlib.sha256(repr((self._outputs, self._shapes, batched)).encode())
        for step in self.steps:
            text.update(_described((step.node.operator, step.node.opset, step.node.outputs, step.results)))
            text.update(_described(sorted(step.node.attributes.items())))
            text.update(_described(step.operands))
        self._digest = text.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __call__(self, params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
        """The outputs for one example, of as many inputs as the network has.

        Raises:
            ArgumentError: there are more or fewer.
        """
        if len(inputs) != len(self._shapes):
            takes = f"the network takes {len(self._shapes)}, of shapes {self._shapes}, one after the other"
            raise errors.argument("x", f"is {len(inputs)} inputs", takes)
        pairs = enumerate(zip(inputs, self._shapes, strict=True))
        values: dict[int, Any] = {number: jnp.asarray(x).reshape(shape) for number, (x, shape) in pairs}
        with jax.default_matmul_precision("highest"):
            for step in self.steps:
                operands = [taken(operand, values, params) for operand in step.operands]
                with jax.named_scope(step.node.operator):
                    found = OPERATORS[step.node.operator].function(step.node, *operands)
                found = found if isinstance(found, tuple) else (found,)
                values.update(zip(step.results, found, strict=False))
        outputs = [values[place][0] if self._batched else values[place] for place in self._outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def taken(operand: Operand, values: Mapping[int, Any], params: Mapping[str, Any]) -> Any:
    """The operand itself, from the values and parameters at hand."""
    if operand.kind == "value":
        return values[operand.content]
    return params[operand.content] if operand.kind == "parameter" else operand.content


def _described(value: Any) -> bytes:
    """Bytes that are equal for equal values."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if isinstance(value, tuple | list):
        return b"(" + b",".join(map(_described, value)) + b")"
    return repr(value).encode()
