"""ONNX: networks of any framework, read from files.

Reading runs the file's graph once on shapes. What depends on no input is evaluated by ONNX's own reference, and what
remains is a `Program`: steps that are rows of the table of operators, with their constants. Arrays of floating-point
numbers are parameters, named after the step and the operand that they are; so networks of one architecture have equal
programs, whatever their files call things. Numbers without axes and everything that says a shape belong to the program.

Reference: the ONNX specification, https://onnx.ai/onnx/operators; operator sets 7 and later.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound import errors
from jaxbound.frontends.operators import OPERATORS, Node
from jaxbound.model import Model

if TYPE_CHECKING:
    import onnx

_LARGEST = 1 << 28  # entries of one value: what a broken file asks for beyond it is refused, not allocated


def load(path: str | Path, *, input_shape: Sequence[int] | None = None, dtype: DTypeLike | None = None) -> Model:
    """Read a network from an ONNX file, plain or gzipped.

    The model's `fn(params, x)` equals the file's network up to the rounding of its operations, with the batch axis left
    out: it is the input's first axis if that is symbolic or 1, the input has another, and the outputs begin with 1 too.

    Args:
        path: the file; data beside it are read as well.
        input_shape: the whole shape of the input, where the file leaves some of it open; by default open sizes in
            front are 1, and others are refused.
        dtype: the floating dtype that the parameters are rounded to; by default the file's own.

    Returns:
        A `Model`; it stands where `crown`, `certify` and the like take parameters.

    Raises:
        ArgumentError: the file is broken, or has several inputs, or float64 numbers while JAX has none.
        UnsupportedError: operators that are not read, all of them at once, with node and operator set.

    Reference: Bai, Lu, Zhang et al. 2019, "ONNX: Open Neural Network Exchange".
    """
    model = _parsed(Path(path))
    try:
        return _Reader(model, dtype).read(input_shape)
    except errors.JaxboundError as fault:
        if isinstance(fault, errors.UnsupportedError):
            raise
        raise errors.ArgumentError(f"{Path(path).name}: {fault}") from fault


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        import onnx
        import onnx.inliner
        from google.protobuf.message import DecodeError
        from onnx.external_data_helper import load_external_data_for_model, uses_external_data
    except ImportError as missing:
        raise errors.ArgumentError("reading ONNX needs the package onnx: pip install 'jaxbound[onnx]'") from missing
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        model = onnx.load_model_from_string(content)
        if any(map(uses_external_data, model.graph.initializer)):
            load_external_data_for_model(model, str(path.parent))
    except (OSError, EOFError, zlib.error, DecodeError, ValueError, onnx.checker.ValidationError) as fault:
        raise errors.argument("path", f"{str(path)!r} cannot be read ({fault})", "pass an ONNX file") from fault
    if not model.graph.node and not model.graph.output:
        raise errors.argument("path", f"{str(path)!r} holds no graph", "pass an ONNX file")
    return onnx.inliner.inline_local_functions(model) if model.functions else model


# --- what is read -----------------------------------------------------------------------------------------------------


class _Operand(NamedTuple):
    """Where a step takes an input from: "value" of an earlier step, "parameter", "constant" or "nothing"."""

    kind: str
    content: Any = None


class _Step(NamedTuple):
    node: Node
    operands: tuple[_Operand, ...]
    results: tuple[int, ...]


class Program:
    """The steps of a network; equal where the steps are, so that what is compiled for one serves the other."""

    def __init__(self, steps: Sequence[_Step], outputs: Sequence[int], shape: tuple[int, ...], batched: bool):
        self._steps, self._outputs, self._shape, self._batched = tuple(steps), tuple(outputs), shape, batched
        text = hashlib.sha256(repr((self._outputs, shape, batched)).encode())
        for step in self._steps:
            text.update(_described((step.node.operator, step.node.opset, step.node.outputs, step.results)))
            text.update(_described(sorted(step.node.attributes.items())))
            text.update(_described(step.operands))
        self._digest = text.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __call__(self, params: Mapping[str, jax.Array], x: jax.Array) -> Any:
        """The outputs for one example."""
        values: dict[int, Any] = {0: jnp.reshape(x, self._shape)}
        with jax.default_matmul_precision("highest"):
            for step in self._steps:
                operands = [_taken(operand, values, params) for operand in step.operands]
                with jax.named_scope(step.node.operator):
                    found = OPERATORS[step.node.operator].function(step.node, *operands)
                found = found if isinstance(found, tuple) else (found,)
                values.update(zip(step.results, found, strict=False))
        outputs = [values[place][0] if self._batched else values[place] for place in self._outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _taken(operand: _Operand, values: Mapping[int, Any], params: Mapping[str, Any]) -> Any:
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


# --- reading ----------------------------------------------------------------------------------------------------------


class _Missing:
    """What a step that cannot be read would have given."""


class _Reader:
    """Runs a graph once on shapes, and writes down the steps that depend on the input."""

    def __init__(self, model: onnx.ModelProto, dtype: DTypeLike | None):
        self._model, self._dtype = model, None if dtype is None else jnp.dtype(dtype)
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._places: dict[str, int] = {}
        self._steps: list[_Step] = []
        self._params: dict[str, np.ndarray] = {}
        self._named: dict[int, tuple[str, np.ndarray]] = {}  # by identity, with the array, so that it stays
        self._refusals: list[str] = []

    def read(self, input_shape: Sequence[int] | None) -> Model:
        graph = self._model.graph
        given = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in given]
        if len(inputs) != 1 or not graph.output:
            names = ", ".join(value.name for value in inputs) or "none"
            raise errors.ArgumentError(f"the network's inputs are {names}: networks of one input can be read")
        (source,) = inputs
        shape, first_is_free = _shape_of(source, input_shape)
        dtype = self._input_dtype(source)
        names = [value.name for value in graph.output]

        def outputs(x):
            values = self._run(graph, {source.name: x})
            if self._refusals:
                raise errors.UnsupportedError(*dict.fromkeys(self._refusals))
            if absent := [name for name in names if name not in values]:
                raise errors.ArgumentError(f"nothing gives the output {absent[0]!r}")
            return [values[name] for name in names]

        self._places[source.name] = 0
        traced = [
            _abstract(value, name) for value, name in zip(*self._traced(outputs, shape, dtype, names), strict=True)
        ]
        batched = first_is_free and len(shape) > 1 and all(value.shape[:1] == (1,) for value in traced)
        sizes = [value.shape[1:] if batched else value.shape for value in traced]
        program = Program(self._used(names), [self._places[name] for name in names], shape, batched)
        kept = {o.content for step in program._steps for o in step.operands if o.kind == "parameter"}
        return Model(
            program,
            {name: jnp.array(array) for name, array in self._params.items() if name in kept},
            shape[1:] if batched else shape,
            sizes[0] if len(sizes) == 1 else tuple(sizes),  # pyright: ignore[reportArgumentType]
            source.name,
            ", ".join(names),
            np.dtype(dtype),
        )

    def _traced(self, outputs, shape, dtype, names):
        found = []

        def trace(x):
            found.extend(outputs(x))
            return jnp.zeros(())

        jax.eval_shape(trace, jax.ShapeDtypeStruct(shape, dtype))
        return found, names

    def _input_dtype(self, source) -> np.dtype:
        import onnx

        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(source.type.tensor_type.elem_type))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise errors.ArgumentError(
                f"the input {source.name!r} is of {dtype}: only floating-point inputs have regions"
            )
        return self._floating(dtype)

    def _floating(self, dtype: np.dtype) -> np.dtype:
        """The dtype that numbers of a floating dtype get."""
        if self._dtype is not None:
            return self._dtype
        if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            raise errors.ArgumentError(
                'the network has float64 numbers: enable them, jax.config.update("jax_enable_x64", True), '
                "or round the network, load(path, dtype=jnp.float32)"
            )
        return dtype

    def _used(self, names: Sequence[str]) -> list[_Step]:
        """The steps that outputs depend on, in order."""
        wanted = {self._places[name] for name in names}
        kept = []
        for step in reversed(self._steps):
            if wanted & set(step.results):
                wanted |= {operand.content for operand in step.operands if operand.kind == "value"}
                kept.append(step)
        return kept[::-1]

    def _run(self, graph: onnx.GraphProto, values: dict[str, Any]) -> dict[str, Any]:
        from onnx import numpy_helper

        for tensor in graph.initializer:
            values[tensor.name] = _kept(numpy_helper.to_array(tensor))
        for node in graph.node:
            absent = [name for name in node.input if name and name not in values]
            if absent:
                raise errors.ArgumentError(f"{_titled(node)} takes {absent[0]!r}, which nothing gives")
            operands = [values[name] if name else None for name in node.input]
            try:
                found = self._step(node, operands, values)
            except errors.UnsupportedError:
                raise
            except Exception as fault:  # whatever operators say about operands that do not fit
                reason = str(fault).strip().splitlines()
                raise errors.ArgumentError(
                    f"{_titled(node)}: {reason[0] if reason else type(fault).__name__}"
                ) from fault
            values.update(zip(node.output, found, strict=False))
        return values

    def _step(self, node: onnx.NodeProto, operands: list[Any], values: dict[str, Any]) -> Sequence[Any]:
        if node.op_type == "If" and isinstance(operands[0], np.ndarray):
            return self._branch(node, bool(operands[0].item()), values)
        row = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if all(operand is None or isinstance(operand, np.ndarray) for operand in operands):
            return self._folded(node, operands)
        if row is None:
            domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
            opset = self._opsets.get(node.domain, self._opsets.get("", 0))
            self._refusals.append(f"{_titled(node)}: the operator {domain}{node.op_type} (set {opset}) cannot be read")
        if row is None or any(isinstance(operand, _Missing) for operand in operands):
            return [_Missing()] * len(node.output)
        for place in row.known:
            if place < len(operands) and not (operands[place] is None or isinstance(operands[place], np.ndarray)):
                raise errors.ArgumentError(f"its input {node.input[place]!r} depends on the network's input")
        short = Node(
            node.op_type, _attributes(node), self._opsets.get("", self._opsets.get("ai.onnx", 1)), len(node.output)
        )
        return self._recorded(node, short, operands, row.known)

    def _recorded(self, node, short: Node, operands: list[Any], known: tuple[int, ...]) -> Sequence[Any]:
        references = tuple(
            self._operand(node, place, operand, place in known) for place, operand in enumerate(operands)
        )
        arrays = {
            reference.content: operand
            for reference, operand in zip(references, operands, strict=True)
            if reference.kind == "parameter"
        }
        arrays = {name: jnp.asarray(self._params[name]) for name in arrays}
        values = {
            self._places[name]: operand
            for name, operand in zip(node.input, operands, strict=True)
            if name in self._places
        }
        found = OPERATORS[node.op_type].function(
            short, *(_taken(reference, values, arrays) for reference in references)
        )
        found = found if isinstance(found, tuple) else (found,)
        if any(math.prod(np.shape(value)) > _LARGEST for value in found):
            raise errors.ArgumentError(f"a result of more than {_LARGEST} entries")
        if all(isinstance(value, np.ndarray) for value in found):
            return found
        results = []
        for name in node.output[: len(found)]:
            self._places[name] = len(self._places)
            results.append(self._places[name])
        self._steps.append(_Step(short, references, tuple(results)))
        return found

    def _operand(self, node, place: int, operand: Any, known: bool) -> _Operand:
        if operand is None:
            return _Operand("nothing")
        if not isinstance(operand, np.ndarray):
            return _Operand("value", self._places[node.input[place]])
        if known or not jnp.issubdtype(operand.dtype, jnp.floating):
            return _Operand("constant", operand)
        if operand.ndim == 0:
            return _Operand("constant", operand.item())
        if id(operand) not in self._named:
            name = f"{len(self._steps):03d}/{node.op_type}/{place}"
            self._named[id(operand)] = name, operand
            self._params[name] = operand.astype(self._floating(operand.dtype), copy=False)
        return _Operand("parameter", self._named[id(operand)][0])

    def _folded(self, node: onnx.NodeProto, operands: list[Any]) -> Sequence[np.ndarray]:
        """What depends on no input, by ONNX's reference."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        _check_size(node, operands)
        names = [f"i{place}" if name else "" for place, name in enumerate(node.input)]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(names)
        infos = [onnx.ValueInfoProto(name=name) for name in names if name]
        results = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([copy], "constant", infos, results)
        model = onnx.helper.make_model(graph, opset_imports=self._model.opset_import)
        found = ReferenceEvaluator(model).run(
            None, dict(zip(filter(None, names), (o for o in operands if o is not None), strict=True))
        )
        by_name = dict(zip((name for name in node.output if name), found, strict=True))
        return [_kept(np.asarray(by_name[name])) if name else _Missing() for name in node.output]  # pyright: ignore[reportReturnType]

    def _branch(self, node: onnx.NodeProto, condition: bool, values: dict[str, Any]) -> Sequence[Any]:
        wanted = "then_branch" if condition else "else_branch"
        (graph,) = (attribute.g for attribute in node.attribute if attribute.name == wanted)
        inner = self._run(graph, dict(values))
        for name, value in zip(node.output, graph.output, strict=True):
            if value.name in self._places:
                self._places[name] = self._places[value.name]
        return [inner[value.name] for value in graph.output]


def _kept(array: np.ndarray) -> np.ndarray:
    """An array of its own, of a type that NumPy has."""
    return np.array(array)


def _abstract(value: Any, name: str) -> jax.ShapeDtypeStruct:
    if isinstance(value, np.ndarray):
        raise errors.ArgumentError(f"the output {name!r} does not depend on the input")
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _titled(node: onnx.NodeProto) -> str:
    return f"node {node.name or '/'.join(node.output)!r} ({node.op_type})"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
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


def _shape_of(source, given: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
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
    if any(size <= 0 for size in shape) or math.prod(shape) > _LARGEST:
        raise errors.ArgumentError(f"the shape of {source.name!r} is {shape}, 0 where it is open: pass input_shape")
    return shape, free


def _check_size(node: onnx.NodeProto, operands: list[Any]) -> None:
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
        if any(np.prod(np.maximum(number, 1)) > _LARGEST for number in numbers):
            raise errors.ArgumentError(f"a result of more than {_LARGEST} entries")
