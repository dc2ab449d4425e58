"""ONNX: networks of any framework, read from files.

Reading runs the file's graph once on shapes. What depends on no input is evaluated by ONNX's own reference, and what
remains is a `Program`: steps that are rows of the table of operators, with their constants. Arrays of floating-point
numbers are parameters, named after the step and the operand that they are; so networks of one architecture have equal
programs, whatever their files call things. Numbers without axes and everything that says a shape belong to the program.

Reference: the ONNX specification, https://onnx.ai/onnx/operators; operator sets 7 and later.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound import errors
from jaxbound.frontends import files
from jaxbound.frontends.operators import IDLE_ATTRIBUTES, OPERATORS, Node
from jaxbound.frontends.program import Operand, Program, Step
from jaxbound.network.model import Model

if TYPE_CHECKING:
    import onnx


_Shapes = Sequence[int] | Mapping[str, Sequence[int]] | None


def load(path: str | Path, *, input_shape: _Shapes = None, dtype: DTypeLike | None = None) -> Model:
    """Read a network from an ONNX file, plain or gzipped.

    The model's `fn(params, x)` equals the file's network up to the rounding of its operations, with the batch axis left
    out: it is the first axis if that is symbolic or 1 in every input, each has another, and the outputs begin with 1
    too. Several inputs are arguments one after the other, `fn(params, x, y)`, in the order of the file.

    Args:
        path: the file; data beside it are read as well.
        input_shape: the whole shape of the input, where the file leaves some of it open, or a dictionary of shapes by
            name; by default open sizes in front are 1, and others are refused.
        dtype: the floating dtype that the parameters are rounded to; by default the file's own.

    Returns:
        A `Model`; it stands where `crown`, `certify` and the like take parameters.

    Raises:
        ArgumentError: the file is broken, or has inputs that are no floating-point numbers or of several dtypes, or
            float64 numbers while JAX has none.
        UnsupportedError: operators that are not read, all of them at once, with node and operator set.

    Reference: Bai, Lu, Zhang et al. 2019, "ONNX: Open Neural Network Exchange".
    """
    model, weights = files.parsed(Path(path))
    try:
        return _Reader(model, weights, dtype).read(input_shape)
    except errors.UnsupportedError:
        raise
    except Exception as fault:  # a broken file may be broken anywhere
        raise errors.ArgumentError(f"{Path(path).name}: {_first_line(fault)}") from fault


class _Missing:
    """What a step that cannot be read would have given."""


class _Watched(dict):
    """Attributes that know which were asked for: what is not asked for cannot have been obeyed."""

    def __init__(self, attributes: Mapping[str, Any]):
        super().__init__(attributes)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


class _Reader:
    """Runs a graph once on shapes, and writes down the steps that depend on the input."""

    def __init__(self, model: onnx.ModelProto, weights: Mapping[int, np.ndarray], dtype: DTypeLike | None):
        self._model, self._weights, self._dtype = model, weights, None if dtype is None else jnp.dtype(dtype)
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._opset = self._opsets.get("", self._opsets.get("ai.onnx", 1))
        self._places: dict[str, int] = {}
        self._numbers = itertools.count()
        self._steps: list[Step] = []
        self._params: dict[str, np.ndarray] = {}
        self._named: dict[int, tuple[str, np.ndarray]] = {}  # by identity, with the array, so that it stays
        self._refusals: list[str] = []

    def read(self, input_shape: _Shapes) -> Model:
        graph = self._model.graph
        sources = files.inputs_of(graph)
        given = files.shapes_by_name(input_shape, [source.name for source in sources])
        found = [files.input_shape_of(source, given.get(source.name)) for source in sources]
        shapes = [shape for shape, _ in found]
        dtype = self._input_dtype(sources)
        names = [value.name for value in graph.output]

        def outputs(*inputs: Any):
            given = {source.name: x for source, x in zip(sources, inputs, strict=True)}
            values = self._run(graph, given, self._weights)
            if self._refusals:
                raise errors.UnsupportedError(*dict.fromkeys(self._refusals))
            if absent := [name for name in names if name not in values]:
                raise errors.ArgumentError(f"nothing gives the output {absent[0]!r}")
            return [values[name] for name in names]

        self._places = {source.name: next(self._numbers) for source in sources}
        traced = [_abstract(*pair) for pair in zip(self._traced(outputs, shapes, dtype), names, strict=True)]
        batched = all(free and len(shape) > 1 for shape, free in found)
        batched = batched and all(value.shape[:1] == (1,) for value in traced)
        own, sizes = ([shape[batched:] for shape in each] for each in (shapes, [value.shape for value in traced]))
        program = Program(self._used(names), [self._places[name] for name in names], shapes, batched)
        kept = {o.content for step in program.steps for o in step.operands if o.kind == "parameter"}
        return Model(
            program,
            jax.device_put({name: array for name, array in self._params.items() if name in kept}),
            _one_or_all(own),
            _one_or_all(sizes),
            _one_or_all([source.name for source in sources]),
            _one_or_all(names),
            np.dtype(dtype),
        )

    def _traced(self, outputs: Callable, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike):
        found = []

        def trace(*inputs: Any):
            found.extend(outputs(*inputs))
            return jnp.zeros(())

        jax.eval_shape(trace, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
        return found

    def _input_dtype(self, sources: Sequence[onnx.ValueInfoProto]) -> np.dtype:
        import onnx

        kinds = [source.type.tensor_type.elem_type for source in sources]
        dtypes = [np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)) for kind in kinds]
        for source, dtype in zip(sources, dtypes, strict=True):
            if not jnp.issubdtype(dtype, jnp.floating):
                raise errors.ArgumentError(
                    f"the input {source.name!r} is of {dtype}: only floating-point inputs have regions"
                )
        if len(set(dtypes)) > 1 and self._dtype is None:
            names = ", ".join(f"{source.name!r} of {dtype}" for source, dtype in zip(sources, dtypes, strict=True))
            raise errors.ArgumentError(f"the inputs are {names}: pass one dtype for all, load(path, dtype=jnp.float32)")
        return self._floating(dtypes[0])

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

    def _used(self, names: Sequence[str]) -> list[Step]:
        """The steps that outputs depend on, in order."""
        wanted = {self._places[name] for name in names}
        kept = []
        for step in reversed(self._steps):
            if wanted & set(step.results):
                wanted |= {operand.content for operand in step.operands if operand.kind == "value"}
                kept.append(step)
        return kept[::-1]

    def _run(self, graph: onnx.GraphProto, values: dict[str, Any], weights: Mapping[int, np.ndarray]) -> dict[str, Any]:
        """All values of a graph; of its initializers some may be at hand, by their place."""
        from onnx import numpy_helper

        for place, tensor in enumerate(graph.initializer):
            values[tensor.name] = weights[place] if place in weights else np.asarray(numpy_helper.to_array(tensor))
        for node in graph.node:
            absent = [name for name in node.input if name and name not in values]
            if absent:
                raise errors.ArgumentError(f"{files.titled(node)} takes {absent[0]!r}, which nothing gives")
            if twice := [name for name in node.output if name and name in values]:
                raise errors.ArgumentError(f"{files.titled(node)} gives {twice[0]!r}, which is given before")
            operands = [values[name] if name else None for name in node.input]
            try:
                files.check_inputs(node, self._opset)
                found = self._step(node, operands, values)
            except errors.UnsupportedError:
                raise
            except Exception as fault:  # whatever operators say about operands that do not fit
                raise errors.ArgumentError(f"{files.titled(node)}: {_first_line(fault)}") from fault
            values.update(zip(node.output, found, strict=False))
        return values

    def _step(self, node: onnx.NodeProto, operands: list[Any], values: dict[str, Any]) -> Sequence[Any]:
        if node.op_type == "If" and isinstance(operands[0], np.ndarray):
            return self._branch(node, bool(operands[0].item()), values)
        row = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if all(operand is None or isinstance(operand, np.ndarray) for operand in operands):
            if node.op_type == "DequantizeLinear":  # of which the reference knows new operator sets only
                with jax.ensure_compile_time_eval():
                    return [np.asarray(OPERATORS[node.op_type].function(self._short(node), *operands))]
            return self._folded(node, operands)
        if row is None:
            domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
            opset = self._opsets.get(node.domain, self._opsets.get("", 0))
            self._refusals.append(
                f"{files.titled(node)}: the operator {domain}{node.op_type} (set {opset}) cannot be read"
            )
        if row is None or any(isinstance(operand, _Missing) for operand in operands):
            return [_Missing()] * len(node.output)
        for place in row.known:
            if place < len(operands) and not (operands[place] is None or isinstance(operands[place], np.ndarray)):
                raise errors.ArgumentError(f"its input {node.input[place]!r} depends on the network's input")
        return self._recorded(node, self._short(node), operands, row.known)

    def _short(self, node: onnx.NodeProto) -> Node:
        return Node(node.op_type, files.attributes(node), self._opset, len(node.output))

    def _recorded(
        self, node: onnx.NodeProto, short: Node, operands: list[Any], known: tuple[int, ...]
    ) -> Sequence[Any]:
        references = [self._operand(node, place, operand, place in known) for place, operand in enumerate(operands)]
        watched = _Watched(short.attributes)
        watching = dataclasses.replace(short, attributes=watched)
        found = OPERATORS[node.op_type].function(watching, *map(self._given, references, operands))
        if unread := sorted(watched.keys() - watched.asked - IDLE_ATTRIBUTES):
            raise errors.ArgumentError(f"its attribute {unread[0]!r} cannot be read")
        found = found if isinstance(found, tuple) else (found,)
        if any(math.prod(np.shape(value)) > files.LARGEST for value in found):
            raise errors.ArgumentError(f"a result of more than {files.LARGEST} entries")
        if all(isinstance(value, np.ndarray) for value in found):
            return found
        results = []
        for name in node.output[: len(found)]:
            self._places[name] = next(self._numbers)
            results.append(self._places[name])
        self._steps.append(Step(short, tuple(references), tuple(results)))
        return found

    def _operand(self, node: onnx.NodeProto, place: int, operand: Any, known: bool) -> Operand:
        if operand is None:
            return Operand("nothing")
        if not isinstance(operand, np.ndarray):
            return Operand("value", self._places[node.input[place]])
        if known or not jnp.issubdtype(operand.dtype, jnp.floating):
            return Operand("constant", operand)
        if operand.ndim == 0:
            return Operand("constant", operand.item())
        if id(operand) not in self._named:
            name = f"{len(self._steps):03d}/{node.op_type}/{files.operand_name(node, place)}"
            self._named[id(operand)] = name, operand
            self._params[name] = operand.astype(self._floating(operand.dtype), copy=False)
        return Operand("parameter", self._named[id(operand)][0])

    def _given(self, reference: Operand, operand: Any) -> Any:
        if reference.kind == "parameter":  # within a trace, so that nothing is copied: of a parameter no value is asked
            return jnp.zeros_like(self._params[reference.content])
        return operand if reference.kind == "value" else reference.content

    def _folded(self, node: onnx.NodeProto, operands: list[Any]) -> Sequence[np.ndarray]:
        """What depends on no input, by ONNX's reference."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        files.check_size(node, operands)
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
        return [np.array(by_name[name]) if name else _Missing() for name in node.output]  # pyright: ignore[reportReturnType]

    def _branch(self, node: onnx.NodeProto, condition: bool, values: dict[str, Any]) -> Sequence[Any]:
        wanted = "then_branch" if condition else "else_branch"
        (graph,) = (attribute.g for attribute in node.attribute if attribute.name == wanted)
        inner = self._run(graph, dict(values), {})
        for name, value in zip(node.output, graph.output, strict=True):
            if value.name in self._places:
                self._places[name] = self._places[value.name]
        return [inner[value.name] for value in graph.output]


def _one_or_all(found: Sequence[Any]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)


def _first_line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def _abstract(value: Any, name: str) -> jax.ShapeDtypeStruct:
    if isinstance(value, np.ndarray):
        raise errors.ArgumentError(f"the output {name!r} does not depend on the input")
    return jax.ShapeDtypeStruct(value.shape, value.dtype)
