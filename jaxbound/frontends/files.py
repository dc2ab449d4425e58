"""What an ONNX file says: its protocol buffer, and names, attributes and shapes in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxbound import errors
from jaxbound.frontends import buffers

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = 7
_PLAIN = {1: "<f4", 11: "<f8"}
"""Types of numbers whose raw data are an array, by their number in `TensorProto.DataType`."""
LARGEST = 1 << 28
"""Entries of one value: what a broken file asks for beyond it is refused, not allocated."""


def parsed(path: Path) -> tuple[onnx.ModelProto, dict[int, np.ndarray]]:
    """The protocol buffer in a file, with data beside it, and functions inlined.

    The second are large initializers, by their place among all; the protocol buffer has their names and shapes.
    """
    try:
        import onnx
        import onnx.inliner
        from google.protobuf.message import DecodeError
        from onnx.external_data_helper import load_external_data_for_model, uses_external_data
    except ImportError as missing:
        raise errors.ArgumentError("reading ONNX needs the package onnx: pip install 'jaxbound[onnx]'") from missing
    try:
        content = buffers.unpacked(path.read_bytes())
        if bytes(content[:32]).startswith(b"version https://git-lfs"):
            raise ValueError("a pointer of Git LFS, not the file: fetch it with git lfs pull")
        model, weights = _model(content)
        if any(map(uses_external_data, model.graph.initializer)):
            load_external_data_for_model(model, str(path.parent))
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as fault:
        raise errors.argument("path", f"{str(path)!r} cannot be read ({fault})", "pass an ONNX file") from fault
    if not model.graph.node and not model.graph.output:
        raise errors.argument("path", f"{str(path)!r} holds no graph", "pass an ONNX file")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    newest = newest_opset()
    if not OLDEST_OPSET <= opset <= newest:
        can = f"{OLDEST_OPSET} to {newest} can be read"
        raise errors.argument("path", f"{str(path)!r} is of operator set {opset}", can)
    return (onnx.inliner.inline_local_functions(model) if model.functions else model), weights


def _model(content: memoryview) -> tuple[onnx.ModelProto, dict[int, np.ndarray]]:
    """The protocol buffer, and large initializers by their place where they are plain numbers that need no copy."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    light, large = buffers.lightened(content)
    model = onnx.load_model_from_string(light)
    if large and model.functions:  # which are inlined: initializers may then stand elsewhere
        return onnx.load_model_from_string(bytes(content)), {}
    weights = {}
    for place, data in large.items():
        tensor = model.graph.initializer[place]
        dtype = _PLAIN.get(int(tensor.data_type))
        if dtype is None or tensor.HasField("segment") or uses_external_data(tensor):
            tensor.raw_data = bytes(data)
        else:
            weights[place] = np.frombuffer(data, dtype).reshape(tuple(tensor.dims))
    return model, weights


def newest_opset() -> int:
    """The newest operator set that the installed package knows."""
    import onnx

    return onnx.defs.onnx_opset_version()


def titled(node: onnx.NodeProto) -> str:
    """How messages name a node."""
    return f"node {node.name or '/'.join(node.output)!r} ({node.op_type})"


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes as Python values: strings, numbers, tuples of them, and NumPy arrays."""
    from onnx import helper, numpy_helper

    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif hasattr(value, "raw_data"):
            value = numpy_helper.to_array(value)
        elif isinstance(value, str | int | float):
            pass
        else:
            value = tuple(part.decode("utf-8", "replace") if isinstance(part, bytes) else part for part in value)
        found[attribute.name] = value
    return found


def inputs_of(graph: onnx.GraphProto) -> list[Any]:
    """What a graph takes: its inputs but those that are parameters with a value in the file."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if not inputs or not graph.output:
        raise errors.ArgumentError(f"the network has no {'input' if graph.output else 'output'}")
    return inputs


def shapes_by_name(given: Sequence[int] | Mapping[str, Sequence[int]] | None, names: Sequence[str]) -> Mapping:
    """The shapes that a user gives, by the names of inputs."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(names) > 1:
            wanted = f"pass a dictionary of shapes by name, of {', '.join(names)}"
            raise errors.argument("input_shape", f"is one shape, and the network has {len(names)} inputs", wanted)
        return {names[0]: given}
    for name in given:
        if name not in names:
            raise errors.unknown_option("input_shape", name, names)
    return given


def input_shape_of(source: onnx.ValueInfoProto, given: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """The input's shape with one example, and whether its first axis may be a batch."""
    if not source.type.tensor_type.HasField("shape") and given is None:
        raise errors.ArgumentError(f"the file does not give the shape of {source.name!r}: pass input_shape")
    sizes = [axis.dim_value for axis in source.type.tensor_type.shape.dim]  # 0 where open
    if given is not None:
        if sizes and (
            len(given) != len(sizes) or any(size not in (0, got) for size, got in zip(sizes, given, strict=True))
        ):
            raise errors.argument(
                "input_shape", f"is {tuple(given)}", f"the file says {tuple(s or None for s in sizes)}"
            )
        return tuple(int(size) for size in given), bool(given) and given[0] == 1
    free = bool(sizes) and sizes[0] <= 1
    shape = tuple([1, *sizes[1:]] if free and len(sizes) > 1 else sizes)
    if any(size <= 0 for size in shape) or math.prod(shape) > LARGEST:
        raise errors.ArgumentError(f"the shape of {source.name!r} is {shape}, 0 where it is open: pass input_shape")
    return shape, free


def check_size(node: onnx.NodeProto, operands: list[Any]) -> None:
    """Refuse what would make a huge array of small ones."""
    if node.op_type in (
        "ConstantOfShape",
        "Expand",
        "Tile",
        "Range",
        "Resize",
        "Upsample",
        "Pad",
        "OneHot",
        "Constant",
    ):
        sizes = [operand for operand in operands if operand is not None and operand.size <= 16 and operand.size]
        numbers = [np.abs(np.asarray(size, np.float64)) for size in sizes if size.dtype.kind in "iuf"]
        if any(np.prod(np.maximum(number, 1)) > LARGEST for number in numbers):
            raise errors.ArgumentError(f"a result of more than {LARGEST} entries")


def check_inputs(node: onnx.NodeProto, opset: int) -> None:
    """Refuse a node of ONNX's own that has fewer or more inputs than its operator takes."""
    import onnx

    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return
    known = onnx.defs.has(node.op_type, max_inclusive_version=opset)
    schema = onnx.defs.get_schema(node.op_type, opset) if known else onnx.defs.get_schema(node.op_type)
    if len(node.input) > schema.max_input:
        raise errors.ArgumentError(f"it has {len(node.input)} inputs, the operator takes {schema.max_input}")
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    for place, name in enumerate([*node.input, *[""] * (schema.min_input - len(node.input))]):
        one = schema.inputs[min(place, len(schema.inputs) - 1)]  # the last may be any number
        if not name and one.option != optional:
            raise errors.ArgumentError(f"it lacks its input {one.name!r}")


def operand_name(node: onnx.NodeProto, place: int) -> str:
    """What ONNX calls an operand, or its place among any number of them."""
    import onnx

    inputs = onnx.defs.get_schema(node.op_type).inputs
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return inputs[place].name if place < len(inputs) and inputs[place].option != variadic else str(place)
