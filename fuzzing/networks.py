"""Broken ONNX: small networks are drawn, their bytes or parts are changed; what is read is held against onnxruntime."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

import jaxbound as jb
from fuzzing.files import MOST_ENTRIES
from jaxbound.frontends import buffers
from jaxbound.frontends.operators import OPERATORS

onnxruntime.set_default_logger_severity(4)
buffers.LARGE = 16  # so that weights of small networks are read as those of large ones
_ATTRIBUTES = {
    "axis": [0, 1, 2, -1, -2, 5], "keepdims": [0, 1], "alpha": [0.3, -1.0], "beta": [2.0], "group": [1, 2],
    "epsilon": [0.1], "strides": [[2, 2], [1, 2]], "dilations": [[2, 1], [1, 1]],
    "pads": [[1, 0, 1, 0], [0, 1, 2, 1], [-1, 0, 0, 0]], "kernel_shape": [[2, 2], [3, 1]],
    "auto_pad": ["SAME_UPPER", "SAME_LOWER", "VALID"], "ceil_mode": [0, 1], "perm": [[1, 0], [0, 2, 1]],
    "count_include_pad": [1], "transA": [1], "transB": [1, 0],
    "mode": ["linear", "cubic", "nearest", "reflect", "edge"], "to": [1, 6, 7, 9, 10, 99],
    "axes": [[0], [1], [-1], [0, 1]], "noop_with_empty_axes": [0, 1], "direction": ["reverse", "bidirectional"],
    "hidden_size": [2, 3],
    "coordinate_transformation_mode": ["align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel"],
    "fmod": [1], "nearest_mode": ["floor", "ceil", "round_prefer_ceil"], "linear_before_reset": [1],
    "exclude_outside": [1], "blocksize": [2], "allowzero": [1], "largest": [0], "exclusive": [1], "reverse": [1],
    "approximate": ["tanh"], "select_last_index": [1], "output_padding": [[1, 1], [0, 1]], "num_groups": [2],
    "p": [1, 2], "size": [1, 3], "upper": [0], "reduction": ["add"],
}  # fmt: skip
_VALUES = [
    np.array(v, np.int64) for v in ([1, 1, 2, 2], [0, -1], [1], [2], [-1], [3, 2], [1, 12], [0, 1, 0, 1], [0, 0, 1, 1])
]
_VALUES += [np.array(v, np.float32) for v in ([1, 1, 2, 2], [1, 1, 0.7, 1.3], 0.5, [0.5, 2.0, 1.0, 3.0])]
_WHOLE = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "Softmax",
    "Flatten",
    "Abs",
    "Floor",
    "Sign",
    "LogSoftmax",
    "Gelu",
    "Elu",
    "Erf",
    "Identity",
    "ReduceMean",
    "Sum",
]
_SCALES = [0.0, -1.0, 0.5, 1.0, 1.0, 1.0, 3.0, 100.0]
_ONE, _TWO, _INDEX = np.float32(0.5), np.array([2.0], np.float32), np.array([0, -1], np.int64)
_INSERTED = [
    *((name, [None], {}) for name in ("Sin", "Exp", "Softplus", "Mish", "HardSwish", "Celu", "Selu", "Softsign")),
    *((name, [None], {}) for name in ("Sqrt", "Reciprocal", "Log", "Round", "Ceil", "Neg", "Shrink", "Atan", *_WHOLE)),
    *((name, [None, _ONE], {}) for name in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Greater", "LessOrEqual")),
    *((name, [_TWO, None], {}) for name in ("Sub", "Div", "Pow", "Less", "Equal", "PRelu", "Mean")),
    *((name, [None], {"keepdims": 1}) for name in ("ReduceMax", "ReduceL2", "ReduceLogSumExp", "ArgMax", "ReduceProd")),
    *((name, [None, None], {}) for name in ("Mul", "Sub", "Div", "Max", "GreaterOrEqual")),
    ("Concat", [None, None], {"axis": -1}), ("Gather", [None, _INDEX], {"axis": -1}),
    ("GatherElements", [None, np.array([[1]], np.int64)], {"axis": 1}),
    ("Pad", [None, np.array([0, 1, 0, 0], np.int64), _ONE], {}), ("CumSum", [None, np.int64(1)], {}),
    ("Split", [None], {"axis": 1, "num_outputs": 1}), ("Tile", [None, np.array([1, 2], np.int64)], {}),
    ("Expand", [None, np.array([2, 1, 1], np.int64)], {}), ("Unsqueeze", [None, np.array([1], np.int64)], {}),
    ("Where", [np.array([True]), None, _ONE], {}), ("Mod", [None, _TWO], {"fmod": 1}),
    ("Einsum", [None, None], {"equation": "ij,ij->ij"}), ("LRN", [None], {"size": 3}), ("Trilu", [None], {}),
    ("LpNormalization", [None], {"axis": 1}), ("LayerNormalization", [None, _TWO], {}),
    ("TopK", [None, np.array([1], np.int64)], {}), ("Clip", [None, _ONE], {}),
    ("Hardmax", [None], {}), ("GlobalLpPool", [None], {"p": 2}), ("LpPool", [None], {"kernel_shape": [2, 2]}),
    ("ReverseSequence", [None, np.array([2], np.int64)], {"batch_axis": 0, "time_axis": 1}),
]  # fmt: skip
"""What is put between: an operator, its inputs (None where the value goes), and its attributes."""


def draw(rng: np.random.Generator) -> onnx.ModelProto:
    """A small network: dense, of images, or of sequences, with a few operators between."""
    make, kind = onnx.helper, rng.integers(4)

    def weights(*shape):
        return rng.integers(-8, 9, shape).astype(np.float32) / 4

    shape = [(1, 4), (1, 2, 5, 4), (1, 3, 4), (1, 4)][kind]
    nodes, constants, last = [], {}, "x"

    def step(operator, *arrays, **attributes):
        nonlocal last
        names = [f"c{len(constants) + i}" for i in range(len(arrays))]
        constants.update(zip(names, arrays, strict=True))
        nodes.append(make.make_node(operator, [last, *names], [f"v{len(nodes)}"], name=f"n{len(nodes)}", **attributes))
        last = f"v{len(nodes) - 1}"

    if kind == 0:
        step("Gemm", weights(5, 4), weights(5), transB=1)
        step(_WHOLE[rng.integers(len(_WHOLE))])
        step("MatMul", weights(5, 3))
    elif kind == 1:
        step("Conv", weights(3, 2, 2, 3), weights(3), pads=[1, 0, 1, 1], strides=[1, 2])
        name = ["Relu", "LeakyRelu", "HardSigmoid", "GlobalAveragePool", "InstanceNormalization"][rng.integers(5)]
        step(name, *(weights(3) for _ in range(2 * (name == "InstanceNormalization"))))
        step(["MaxPool", "AveragePool"][rng.integers(2)], kernel_shape=[2, 1], ceil_mode=int(rng.integers(2)))
        if rng.random() < 0.3:
            step("Resize", np.zeros(0, np.float32), np.array([1, 1, 1.5, 2], np.float32), mode="linear")
        step("Flatten")
    elif kind == 2:
        step("Transpose", perm=[0, 2, 1])
        step("Slice", *(np.array([v], np.int64) for v in (0, 3, 1)))
        step("ReduceSum", np.array([1], np.int64), keepdims=1)
        step(_WHOLE[rng.integers(len(_WHOLE))])
        step("Reshape", np.array([1, -1], np.int64))
    else:
        step("Mul", weights(4))
        step("QuantizeLinear", np.float32(0.05), np.uint8(120))
        step("DequantizeLinear", np.float32(0.05), np.uint8(120))
        step("Clip", np.float32(-1), np.float32(2))
        step(_WHOLE[rng.integers(len(_WHOLE))])
    values = [make.make_tensor_value_info("x", 1, shape)], [make.make_tensor_value_info(last, 1, None)]
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = make.make_graph(nodes, "network", *values, tensors)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", [13, 17, 21][rng.integers(3)])], ir_version=8)


def broken(model: onnx.ModelProto, rng: np.random.Generator) -> bytes:
    """The model with a few of its parts changed, so that it mostly stays one or not, or its bytes, or neither."""
    way = rng.random()
    if way < 0.7:
        change = _vary if way < 0.4 else _change
        for _ in range(rng.integers(1, 4)):
            change(model, rng)
    content = bytearray(model.SerializeToString())
    if way > 0.75:
        for _ in range(rng.integers(1, 3)):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        if rng.random() < 0.3:
            content = content[: int(rng.integers(len(content)))]
    return bytes(content)


def _vary(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Change what leaves most files whole: numbers, attributes that the operator has, inserted steps, operator sets."""
    graph = model.graph
    node, way = graph.node[rng.integers(len(graph.node))], rng.integers(6)
    if way == 0 and graph.initializer:
        tensor = graph.initializer[rng.integers(len(graph.initializer))]
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            scales = _SCALES[int(array.ndim == 0) :]  # a scale of 0 is nothing to quantize by
            array = np.asarray(array * rng.choice(scales, array.shape), np.float32)
        else:
            array = (array + rng.integers(-1, 2, array.shape)).astype(array.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    elif way <= 2:
        names = sorted(_ATTRIBUTES.keys() & onnx.defs.get_schema(node.op_type).attributes)
        if names:
            name = names[rng.integers(len(names))]
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            value = _ATTRIBUTES[name][rng.integers(len(_ATTRIBUTES[name]))]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    elif way <= 4:
        _insert(graph, int(rng.integers(len(graph.node))), rng)
    else:
        model.opset_import[0].version = int(rng.integers(13, 24))


def _insert(graph: onnx.GraphProto, place: int, rng: np.random.Generator) -> None:
    """Put a step behind a node: what took the node's result takes the step's."""
    make = onnx.helper.make_node
    operator, others, attributes = _INSERTED[rng.integers(len(_INSERTED))]
    old, count = graph.node[place].output[0], len(graph.node) + len(graph.initializer)
    new = f"w{count}"
    for each in graph.node:
        each.input[:] = [new if name == old else name for name in each.input]
    if graph.output[0].name == old:
        graph.output[0].name = new
    arrays = {f"k{count}_{number}": other for number, other in enumerate(others) if other is not None}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    inputs = [old if other is None else f"k{count}_{number}" for number, other in enumerate(others)]
    made = [
        make(operator, inputs, [f"{new}_own"], name=f"i{count}", **attributes),
        make("Cast", [f"{new}_own"], [new], name=f"j{count}", to=1),  # of comparisons; else it changes nothing
    ]
    nodes = [*graph.node[: place + 1], *made, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)


def _change(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = model.graph
    nodes, tensors = graph.node, graph.initializer
    if not nodes:
        return
    node = nodes[rng.integers(len(nodes))]
    names = [name for each in nodes for name in (*each.input, *each.output)]
    way = rng.integers(10)
    if way == 0:
        node.op_type = sorted(OPERATORS)[rng.integers(len(OPERATORS))]
    elif way <= 3:
        name = (
            sorted(_ATTRIBUTES)[rng.integers(len(_ATTRIBUTES))]
            if not node.attribute or way < 2
            else node.attribute[0].name
        )
        choices = _ATTRIBUTES.get(name, [1])
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, choices[rng.integers(len(choices))])])
    elif way == 4 and node.input:
        node.input[int(rng.integers(len(node.input)))] = names[rng.integers(len(names))]
    elif way == 5:
        nodes.remove(node)
    elif way == 6 and tensors:
        tensor = tensors[rng.integers(len(tensors))]
        tensor.CopyFrom(onnx.numpy_helper.from_array(_VALUES[rng.integers(len(_VALUES))], tensor.name))
    elif way == 7:
        model.opset_import[0].version = int(rng.integers(6, 24))
    elif way == 8:
        added = nodes.add()
        added.CopyFrom(node)
        added.op_type = _WHOLE[rng.integers(len(_WHOLE))] if rng.random() < 0.7 else added.op_type
        del added.attribute[:]
        added.input[:] = [graph.output[0].name]
        added.output[:] = [f"added{len(nodes)}"]
        graph.output[0].name = added.output[0]
    elif way == 9:
        dims = graph.input[0].type.tensor_type.shape.dim
        dims[rng.integers(len(dims))].dim_value = int(rng.integers(0, 6))


def check(content: bytes, rng: np.random.Generator, folder: Path, reading: Callable[[str], None]) -> str:
    """What became of a network: refused, equal, wrong, too large to evaluate, or onnxruntime refused."""
    path = folder / "fuzzed.onnx"
    path.write_bytes(content)
    try:
        model = jb.onnx.load(path)
    except jb.JaxboundError:
        return "refused"
    found = [[rng.uniform(-2, 2, shape).astype(np.float32) for shape in model.input_shapes] for _ in range(3)]
    jaxpr = jax.make_jaxpr(model.fn)(model.params, *found[0])
    sizes = [np.prod(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars]  # pyright: ignore
    if max(sizes, default=0) > MOST_ENTRIES:
        return "large"
    ours = [model.fn(model.params, *map(jnp.asarray, x)) for x in found]
    reading("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        feeds = [
            {
                given.name: one.reshape([size if isinstance(size, int) and size > 0 else 1 for size in given.shape])
                for given, one in zip(session.get_inputs(), x, strict=True)
            }
            for x in found
        ]
        theirs = [session.run(None, feed) for feed in feeds]
    except Exception:  # it refuses what we need not, such as names of types
        return "not in onnxruntime"
    finally:
        reading("jaxbound")
    triples = zip(ours, theirs, feeds, strict=True)
    same = [_same(one, other, _Second(content, feed)) for one, other, feed in triples]
    return "equal" if any(same) else "wrong"  # a step may fall to either side by rounding, at one point


class _Second:
    """Another view of a network at a point, where one library says NaN and the other does not."""

    def __init__(self, content: bytes, feed: Mapping[str, np.ndarray]):
        self.model, self.feed = onnx.load_from_string(content), feed

    def outputs(self) -> list[np.ndarray] | None:
        """What ONNX's own reference gives, or None where it gives nothing."""
        with np.errstate(all="ignore"), contextlib.suppress(Exception):  # it raises whatever NumPy does
            return [np.asarray(value) for value in ReferenceEvaluator(self.model).run(None, dict(self.feed))]
        return None

    def is_undefined(self) -> bool:
        """Whether onnxruntime has a NaN on the way, which a cast or a comparison may hide in the end."""
        seen = onnx.ModelProto()
        seen.CopyFrom(self.model)
        del seen.graph.output[:]
        seen.graph.output.extend(onnx.ValueInfoProto(name=k) for node in seen.graph.node for k in node.output if k)
        with contextlib.suppress(Exception):
            session = onnxruntime.InferenceSession(seen.SerializeToString(), providers=["CPUExecutionProvider"])
            values = [np.asarray(value) for value in session.run(None, dict(self.feed))]
            return any(value.dtype.kind == "f" and np.isnan(value).any() for value in values)
        return False


def _same(ours, theirs, second: _Second) -> bool:
    """Whether outputs are equal; where one library alone says NaN, a second view must say so too.

    What is undefined, libraries compute as they like. Ours is NaN rightly where ONNX's reference is, or where a NaN
    was met on the way; it is a number rightly, beside their NaN, where the reference has that number.
    """
    ours = ours if isinstance(ours, tuple) else (ours,)
    if len(ours) != len(theirs):
        return False
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        one, other = np.asarray(one), np.asarray(other)
        if one.shape not in (other.shape, other.shape[1:]):
            return False
        other = other.reshape(one.shape)
        if np.any(differ := np.isnan(one) != np.isnan(other)):
            view = second.outputs()
            fits = view is not None and np.size(view[place]) == one.size
            third = view[place].reshape(one.shape) if view is not None and fits else np.where(differ, np.inf, other)
            other = np.where(differ, third, other)
            if np.any(np.isnan(one) & ~np.isnan(other)) and not second.is_undefined():
                return False
            if np.any(~np.isnan(one) & np.isnan(other)):
                return False
        defined = ~np.isnan(one)
        one, other = one[defined], other[defined]
        scale = np.max(np.abs(other[np.isfinite(other)]), initial=1.0) if other.dtype.kind == "f" else 1.0
        if not np.allclose(one, other, rtol=1e-3, atol=1e-4 * scale):
            return False
    return True
