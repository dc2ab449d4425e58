"""What a VNN-LIB 2.0 query declares, networks held against it, and assignments in its form.

Reference: the VNN-LIB 2.0 standard, https://www.vnnlib.org, chapters "Query language" and "Solver interface".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxbound import errors
from jaxbound.network.model import Model

_ARRAY = re.compile(r"(\w+)\s*\[([\d\s,]{0,200})\]", re.ASCII)
_REAL = ("Real", "real")
_FLOATS = (*_REAL, "float16", "float32", "float64", "bfloat16")
_MOST_VARIABLES = 10_000_000


class Array(NamedTuple):
    """A declared input or output: its name, element type and shape."""

    name: str
    kind: str
    shape: tuple[int, ...]


class Query(NamedTuple):
    """A network as a query declares it."""

    network: str
    input: Array
    output: Array


def refuse(line: int, reason: str) -> NoReturn:
    """Say what is wrong in a line."""
    raise errors.ArgumentError(f"line {line}: {reason}")


def declared(form: list) -> Query:
    """The declaration of a network of one input and one output, from the form (line, command, name, parts)."""
    line, _, *parts = form
    kinds = [part[1] if isinstance(part, list) and len(part) > 1 else part for part in parts[1:]]
    if kinds != ["declare-input", "declare-output"] or not isinstance(parts[0], str):
        refuse(line, "only one network of one input and one output can be read")
    return Query(parts[0], *(_array(part) for part in parts[1:]))


def _array(form: list) -> Array:
    line, _, name, kind, *rest = [*form, "", ""]
    array = _ARRAY.fullmatch(kind) if isinstance(kind, str) else None
    if not array or not isinstance(name, str) or any(rest[:-2]) or array[1] not in _FLOATS:
        refuse(line, f"{name} is not declared as an array of floating-point numbers")
    shape = tuple(int(size) for size in array[2].split(",") if size.strip())
    if math.prod(shape) > _MOST_VARIABLES:
        refuse(line, f"{name} has more than {_MOST_VARIABLES} entries")
    return Array(name, array[1], shape)


def check_network(query: Query, model: Model) -> None:
    """That a network is what a query declares: shapes, a batch axis of 1 aside, and the element type unless it is real.

    Raises:
        ArgumentError: it is another.
    """
    shapes = (query.input, model.input_shape), (query.output, model.output_shape)
    for array, shape in shapes:
        if array.shape not in (tuple(shape), (1, *shape)) and (1, *array.shape) != tuple(shape):
            raise errors.argument(
                array.name, f"is declared with shape {array.shape}, the network has {tuple(shape)}", "pass its network"
            )
    for array in query[1:]:
        if array.kind not in (*_REAL, str(model.dtype)):
            raise errors.argument(array.name, f"is declared as {array.kind}, the network is of {model.dtype}")


def check_real(query: Query) -> None:
    """That a query asks for real numbers, which is what is proved.

    Raises:
        ArgumentError: it asks for the numbers of a machine.
    """
    for array in query[1:]:
        if array.kind not in _REAL:
            raise errors.argument(
                array.name,
                f"is declared as {array.kind}, and what is proved holds in real arithmetic",
                "declare it as real, or take it so with --real",
            )


def assigned(query: Query, values: Sequence[Any]) -> str:
    """An input and an output in the form that the standard prints: a line for each array, and one for each entry.

    >>> x = Array("X", "real", (1, 2))
    >>> print(assigned(Query("N", x, Array("Y", "real", ())), [np.float32([0.5, 0.1]), np.float32(2)]), end="")
    X real [1,2]
    0.5
    0.1
    Y real []
    2.0
    """
    lines = []
    for array, value in zip(query[1:], values, strict=True):
        lines.append(f"{array.name} {array.kind} [{','.join(map(str, array.shape))}]")
        lines += [str(entry) for entry in np.ravel(np.asarray(value))]
    return "\n".join(lines) + "\n"


def serialise(query: Query, values: Sequence[Any], folder: str | Path) -> None:
    """Write an input and an output as ONNX tensors, a file for each array."""
    from onnx import numpy_helper

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for array, value in zip(query[1:], values, strict=True):
        tensor = numpy_helper.from_array(np.asarray(value).reshape(array.shape), array.name)
        (folder / f"{array.name}.pb").write_bytes(tensor.SerializeToString())
