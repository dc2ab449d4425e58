"""What a VNN-LIB 2.0 query declares, networks held against it, and assignments in its form.

Reference: the VNN-LIB 2.0 standard, https://www.vnnlib.org, chapters "Query language" and "Solver interface".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxbound import errors
from jaxbound.network.model import Model

_NAME = re.compile(r'"[^"\s]{1,500}"')
_ARRAY = re.compile(r"(\w+)\s*\[([\d\s,]{0,200})\]", re.ASCII)
_REAL = ("Real", "real")
_FLOATS = (*_REAL, "float16", "float32", "float64", "bfloat16")
_MOST_VARIABLES = 10_000_000


class Array(NamedTuple):
    """A declared input or output: its name, element type and shape, and what the ONNX file calls it if that is said."""

    name: str
    kind: str
    shape: tuple[int, ...]
    own_name: str | None = None


class Query(NamedTuple):
    """A network as a query declares it."""

    network: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Inputs and outputs."""
        return self.inputs + self.outputs


def refuse(line: int, reason: str) -> NoReturn:
    """Say what is wrong in a line."""
    raise errors.ArgumentError(f"line {line}: {reason}")


def declared(form: list) -> Query:
    """The declaration of a network of inputs and outputs, from the form (line, command, name, parts)."""
    line, _, *parts = form
    kinds = [part[1] if isinstance(part, list) and len(part) > 1 else part for part in parts[1:]]
    count = kinds.count("declare-input")
    wanted = ["declare-input"] * count + ["declare-output"] * (len(kinds) - count)
    if not 0 < count < len(kinds) or kinds != wanted or not isinstance(parts[0], str):
        refuse(line, "only one network of inputs and, behind them, outputs can be read")
    arrays = tuple(_array(part) for part in parts[1:])
    if sum(math.prod(array.shape) for array in arrays) > _MOST_VARIABLES:
        refuse(line, f"{parts[0]} has more than {_MOST_VARIABLES} entries")
    return Query(parts[0], arrays[:count], arrays[count:])


def _array(form: list) -> Array:
    line, _, name, kind, own, *rest = [*form, "", "", ""][: max(5, len(form))]
    array = _ARRAY.fullmatch(kind) if isinstance(kind, str) else None
    named = own == "" or (isinstance(own, str) and _NAME.fullmatch(own))
    if not array or not isinstance(name, str) or not named or rest or array[1] not in _FLOATS:
        refuse(line, f"{name} is not declared as an array of floating-point numbers")
    shape = tuple(int(size) for size in array[2].split(",") if size.strip())
    if math.prod(shape) > _MOST_VARIABLES:
        refuse(line, f"{name} has more than {_MOST_VARIABLES} entries")
    return Array(name, array[1], shape, own[1:-1] or None)


def check_network(query: Query, model: Model) -> None:
    """That a network is what a query declares: shapes, a batch axis of 1 aside, and the element type unless it is real.

    Raises:
        ArgumentError: it is another.
    """
    ends = (
        ("inputs", query.inputs, model.input_shapes, model.input_name),
        ("outputs", query.outputs, model.output_shapes, model.output_name),
    )
    for what, arrays, shapes, names in ends:
        if len(arrays) != len(shapes):
            raise errors.argument("query", f"declares {len(arrays)} {what}, the network has {len(shapes)}")
        names = (names,) if isinstance(names, str) else names
        for array, shape, name in zip(arrays, shapes, names, strict=True):
            _check_array(array, shape, name, str(model.dtype))


def _check_array(array: Array, shape: tuple[int, ...], name: str, dtype: str) -> None:
    if array.own_name not in (None, name):
        raise errors.argument(
            array.name, f"is declared to be {array.own_name!r}, and is {name!r}", "declare arrays in the file's order"
        )
    if array.shape not in (tuple(shape), (1, *shape)) and (1, *array.shape) != tuple(shape):
        raise errors.argument(
            array.name, f"is declared with shape {array.shape}, the network has {tuple(shape)}", "pass its network"
        )
    if array.kind not in (*_REAL, dtype):
        raise errors.argument(array.name, f"is declared as {array.kind}, the network is of {dtype}")


def check_real(query: Query) -> None:
    """That a query asks for real numbers, which is what is proved.

    Raises:
        ArgumentError: it asks for the numbers of a machine.
    """
    for array in query.arrays:
        if array.kind not in _REAL:
            raise errors.argument(
                array.name,
                f"is declared as {array.kind}, and what is proved holds in real arithmetic",
                "declare it as real, or take it so with --real",
            )


def assigned(query: Query, values: Sequence[Any]) -> str:
    """Inputs and outputs in the form that the standard prints: a line for each array, and one for each entry.

    >>> x = Array("X", "real", (1, 2))
    >>> print(assigned(Query("N", (x,), (Array("Y", "real", ()),)), [np.float32([0.5, 0.1]), np.float32(2)]), end="")
    X real [1,2]
    0.5
    0.1
    Y real []
    2.0
    """
    lines = []
    for array, value in _by_array(query, values):
        lines.append(f"{array.name} {array.kind} [{','.join(map(str, array.shape))}]")
        lines += [str(entry) for entry in np.ravel(value)]
    return "\n".join(lines) + "\n"


def serialise(query: Query, values: Sequence[Any], folder: str | Path) -> None:
    """Write inputs and outputs as ONNX tensors, a file for each array."""
    from onnx import numpy_helper

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for array, value in _by_array(query, values):
        (folder / f"{array.name}.pb").write_bytes(numpy_helper.from_array(value, array.name).SerializeToString())


def _by_array(query: Query, values: Sequence[Any]) -> list[tuple[Array, np.ndarray]]:
    """Each array with its part of the flat inputs or the flat outputs."""
    found = []
    for arrays, value in zip((query.inputs, query.outputs), values, strict=True):
        ends = list(itertools.accumulate(math.prod(array.shape) for array in arrays))
        parts = np.split(np.ravel(np.asarray(value)), ends[:-1])
        found += [(array, part.reshape(array.shape)) for array, part in zip(arrays, parts, strict=True)]
    return found
