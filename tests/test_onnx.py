"""ONNX: every operator against onnxruntime, over its attributes; what a model is; what is refused."""

from __future__ import annotations

import csv
import gzip
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.frontends.operators import OPERATORS

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
runtime.set_default_logger_severity(4)


def _random(*shape, seed=0, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def _integers(*values):
    return np.array(values, np.int64)


def _file(nodes, shape, constants=(), opset=17, outputs=("y",), batch=None, elem=1):
    """The bytes of a network of one input x: nodes are (operator, inputs, outputs, attributes)."""
    made = [
        onnx.helper.make_node(operator, list(inputs), list(results), name=f"{operator}_{number}", **attributes)
        for number, (operator, inputs, results, attributes) in enumerate(nodes)
    ]
    graph = onnx.helper.make_graph(
        made,
        "network",
        [onnx.helper.make_tensor_value_info("x", elem, [batch, *shape[1:]] if batch else list(shape))],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in dict(constants).items()],
    )
    for value in graph.output:
        value.type.Clear()
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = 8 if opset < 21 else 10
    return model.SerializeToString()


def _loaded(tmp_path, content, **options):
    path = tmp_path / "network.onnx"
    path.write_bytes(content)
    return jb.onnx.load(path, **options)


def _agrees(tmp_path, content, shape, low=-2.0, high=2.0, tolerance=1e-5):
    """The model's outputs are onnxruntime's, on random points."""
    model = _loaded(tmp_path, content)
    session = runtime.InferenceSession(content)
    for seed in range(2):
        x = _random(*shape, seed=seed, low=low, high=high)
        wanted = session.run(None, {"x": x})
        found = model.fn(model.params, x.reshape(model.input_shape))
        for given, ours in zip(wanted, found if isinstance(found, tuple) else (found,), strict=True):
            assert np.shape(ours) in (given.shape, given.shape[1:])
            scale = np.maximum(1, np.abs(given)) if given.dtype.kind == "f" else 1
            assert np.all(np.abs(np.reshape(ours, given.shape) - given) <= tolerance * scale)
    return model


ARRAY, IMAGE, CUBE = (2, 3, 4), (1, 4, 7, 6), (1, 2, 5, 4, 6)
UNARY = [
    "Abs",
    "Neg",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Exp",
    "Erf",
    "Sin",
    "Cos",
    "Tan",
    "Atan",
    "Sinh",
    "Cosh",
    "Tanh",
    "Asinh",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Elu",
    "Celu",
    "Selu",
    "ThresholdedRelu",
    "Shrink",
    "HardSigmoid",
    "Softmax",
    "LogSoftmax",
    "Flatten",
    "Transpose",
    "Squeeze",
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "LpNormalization",
    "Mish",
]
POSITIVE = ["Sqrt", "Log", "Reciprocal", "Acosh", "ReduceLogSum"]

# operator, attributes, shape of x, other inputs, operator set
CASES = [
    *[(name, {}, ARRAY, [], 18 if name == "Mish" else 17) for name in UNARY],
    *[(name, {}, (2, 3), [_random(2, 3, low=0.5)], 17) for name in ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum"]],
    *[("Gelu", {"approximate": kind}, ARRAY, [], 20) for kind in ("none", "tanh")],
    *[(f"Reduce{name}", {"noop_with_empty_axes": 1, "keepdims": kept}, ARRAY, [], 18) for name in ["Sum", "L1", "L2", "SumSquare", "Max"] for kept in (0, 1)],
    *[("Resize", {"nearest_mode": kind}, (7, 6), [None, np.array([0.6, 0.5], np.float32)], 13) for kind in ("floor", "ceil")],
    ("Softmax", {"axis": 1}, ARRAY, [], 11),
    ("LogSoftmax", {}, ARRAY, [], 9),
    ("Softmax", {"axis": 0}, ARRAY, [], 13),
    ("LeakyRelu", {"alpha": 0.3}, ARRAY, [], 7),
    ("Elu", {"alpha": 0.5}, ARRAY, [], 7),
    ("Celu", {"alpha": 0.5}, ARRAY, [], 12),
    ("Selu", {"alpha": 1.5, "gamma": 1.2}, ARRAY, [], 7),
    ("Shrink", {"lambd": 0.8, "bias": 0.3}, ARRAY, [], 9),
    ("HardSigmoid", {"alpha": 0.4, "beta": 0.3}, ARRAY, [], 7),
    ("PRelu", {}, ARRAY, [_random(3, 1)], 9),
    ("Clip", {"min": -0.5, "max": 0.5}, ARRAY, [], 7),
    ("Clip", {}, ARRAY, [np.float32(-0.3), np.float32(0.7)], 13),
    ("Clip", {}, ARRAY, [None, np.float32(0.7)], 13),
    ("Clip", {}, ARRAY, [np.float32(-0.3)], 13),
    *[("Pow", {}, ARRAY, [np.float32(power)], 13) for power in (2, 3, -1)],
    ("Pow", {}, ARRAY, [np.array([2.0, 1.0, 3.0, 2.0], np.float32)], 13),
    ("Mod", {"fmod": 1}, ARRAY, [_random(4, low=0.5)], 13),
    ("MatMul", {}, ARRAY, [_random(4, 5)], 13),
    ("MatMul", {}, ARRAY, [_random(2, 4, 5)], 9),
    ("MatMul", {}, (4,), [_random(4, 5)], 13),
    ("Gemm", {}, (1, 4), [_random(4, 5), _random(5)], 7),
    ("Gemm", {"transB": 1, "alpha": 0.5, "beta": 2.0}, (3, 4), [_random(5, 4), _random(3, 5)], 13),
    ("Gemm", {"transA": 1}, (3, 4), [_random(3, 5)], 11),
    ("Einsum", {"equation": "bij,jk->bik"}, ARRAY, [_random(4, 5)], 12),
    ("Conv", {}, IMAGE, [_random(3, 4, 3, 2)], 11),
    ("Conv", {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}, IMAGE, [_random(3, 4, 3, 2), _random(3)], 11),
    ("Conv", {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, IMAGE, [_random(6, 2, 3, 2)], 11),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 3]}, IMAGE, [_random(6, 4, 3, 2)], 11),
    ("Conv", {"auto_pad": "VALID"}, (1, 2, 9), [_random(3, 2, 4)], 7),
    ("Conv", {"pads": [1] * 6}, CUBE, [_random(3, 2, 3, 2, 3), _random(3)], 11),
    ("ConvTranspose", {}, IMAGE, [_random(4, 3, 3, 2)], 11),
    ("ConvTranspose", {"strides": [2, 3], "pads": [1, 0, 2, 1], "output_padding": [1, 2]}, IMAGE, [_random(4, 3, 3, 4), _random(3)], 11),
    ("ConvTranspose", {"group": 2, "dilations": [2, 1]}, IMAGE, [_random(4, 3, 3, 2)], 11),
    ("ConvTranspose", {"strides": [2, 2], "output_shape": [14, 11]}, IMAGE, [_random(4, 3, 3, 2)], 11),
    ("ConvTranspose", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, IMAGE, [_random(4, 3, 3, 3)], 11),
    ("MaxPool", {"kernel_shape": [3, 2]}, IMAGE, [], 8),
    ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 0], "ceil_mode": 1}, IMAGE, [], 12),
    ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 3]}, IMAGE, [], 12),
    ("MaxPool", {"kernel_shape": [3], "auto_pad": "SAME_LOWER", "strides": [2]}, (1, 2, 8), [], 12),
    ("AveragePool", {"kernel_shape": [3, 2]}, IMAGE, [], 7),
    ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "strides": [2, 2]}, IMAGE, [], 11),
    ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "strides": [2, 2], "count_include_pad": 1}, IMAGE, [], 11),
    ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, IMAGE, [], 19),
    ("AveragePool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}, IMAGE, [], 11),
    ("GlobalAveragePool", {}, IMAGE, [], 7),
    ("GlobalMaxPool", {}, IMAGE, [], 7),
    *[("GlobalLpPool", {"p": p}, IMAGE, [], 7) for p in (1, 2, 3)],
    *[("LpPool", {"kernel_shape": [3, 2], "p": p}, IMAGE, [], 11) for p in (1, 2, 3)],
    ("LpPool", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "strides": [2, 2]}, IMAGE, [], 11),
    ("LpPool", {"kernel_shape": [2, 2], "dilations": [2, 3], "strides": [1, 2]}, IMAGE, [], 18),
    ("LpPool", {"kernel_shape": [3], "auto_pad": "SAME_LOWER", "strides": [2]}, (1, 2, 8), [], 11),
    ("Hardmax", {}, ARRAY, [], 13),
    ("Hardmax", {"axis": 0}, ARRAY, [], 13),
    ("Hardmax", {}, ARRAY, [], 11),
    *[("ReverseSequence", {"batch_axis": batch, "time_axis": 1 - batch}, (3, 3, 2), [_integers(1, 3, 2)], 10) for batch in (0, 1)],
    ("ReverseSequence", {}, (4, 2), [_integers(3, 4)], 10),
    ("BatchNormalization", {"epsilon": 1e-2}, IMAGE, [_random(4), _random(4, seed=1), _random(4, seed=2), _random(4, low=0.5)], 9),
    ("BatchNormalization", {}, (2, 4), [_random(4), _random(4, seed=1), _random(4, seed=2), _random(4, low=0.5)], 15),
    ("InstanceNormalization", {}, IMAGE, [_random(4), _random(4, seed=1)], 7),
    ("LayerNormalization", {"axis": -2, "epsilon": 1e-3}, ARRAY, [_random(3, 4), _random(3, 4, seed=1)], 17),
    ("LayerNormalization", {}, ARRAY, [_random(4)], 17),
    ("GroupNormalization", {"num_groups": 2}, IMAGE, [_random(4), _random(4, seed=1)], 21),
    ("MeanVarianceNormalization", {}, IMAGE, [], 13),
    ("LpNormalization", {"p": 1, "axis": 1}, ARRAY, [], 17),
    ("LRN", {"size": 3, "alpha": 0.1, "beta": 0.5, "bias": 2.0}, IMAGE, [], 13),
    ("ReduceSum", {"axes": [0, -1], "keepdims": 0}, ARRAY, [], 11),
    ("ReduceSum", {"keepdims": 0}, ARRAY, [_integers(1)], 13),
    ("ReduceSum", {"noop_with_empty_axes": 1}, ARRAY, [], 13),
    ("ReduceMean", {"noop_with_empty_axes": 0}, ARRAY, [_integers(1)], 18),
    ("ReduceMean", {"axes": [1]}, ARRAY, [], 13),
    ("ReduceMax", {"keepdims": 0}, ARRAY, [_integers(-1)], 18),
    ("ArgMax", {"axis": 1, "keepdims": 0}, ARRAY, [], 13),
    ("ArgMin", {"axis": -1, "select_last_index": 1}, ARRAY, [], 13),
    ("Reshape", {}, ARRAY, [_integers(0, -1)], 13),
    ("Reshape", {}, ARRAY, [_integers(4, 6)], 7),
    ("Flatten", {"axis": 2}, ARRAY, [], 9),
    ("Flatten", {"axis": -1}, ARRAY, [], 13),
    ("Transpose", {"perm": [1, 2, 0]}, ARRAY, [], 13),
    ("Squeeze", {"axes": [0]}, IMAGE, [], 11),
    ("Squeeze", {}, (2, 1, 3, 1), [_integers(-1)], 13),
    ("Unsqueeze", {"axes": [0, 2]}, ARRAY, [], 11),
    ("Unsqueeze", {}, ARRAY, [_integers(-1)], 13),
    ("Expand", {}, (3, 1), [_integers(2, 1, 4)], 13),
    ("Tile", {}, ARRAY, [_integers(1, 2, 3)], 13),
    ("Concat", {"axis": 1}, ARRAY, [_random(2, 2, 4)], 13),
    ("Slice", {"starts": [1, -3], "ends": [9, -1], "axes": [1, 2]}, ARRAY, [], 9),
    ("Slice", {}, ARRAY, [_integers(0, 1), _integers(2, 3)], 13),
    ("Slice", {}, ARRAY, [_integers(-1), _integers(-99), _integers(2), _integers(-2)], 13),
    ("Slice", {}, ARRAY, [_integers(3), _integers(0), _integers(-1), _integers(-1)], 13),
    ("Slice", {}, ARRAY, [_integers(0), _integers(2**62), _integers(1), _integers(2)], 13),
    ("Gather", {"axis": 1}, ARRAY, [np.array(-1)], 13),
    ("Gather", {"axis": 2}, ARRAY, [np.array([[0, -1], [2, 2]])], 11),
    ("GatherElements", {"axis": 1}, ARRAY, [np.array([[[0, -1, 2, 1]]] * 2)], 13),
    ("GatherND", {}, ARRAY, [np.array([[0, 1], [1, -1]])], 13),
    ("GatherND", {"batch_dims": 1}, ARRAY, [np.array([[1], [2]])], 13),
    ("ScatterElements", {"axis": 1}, ARRAY, [np.array([[[1, 0, -1, 2]]] * 2), _random(2, 1, 4)], 16),
    ("ScatterElements", {"reduction": "add"}, ARRAY, [np.zeros((2, 3, 4), np.int64), _random(2, 3, 4)], 16),
    ("ScatterND", {}, ARRAY, [np.array([[0, 1], [1, 0]]), _random(2, 4)], 13),
    ("ScatterND", {"reduction": "add"}, ARRAY, [np.array([[0, 1], [0, 1]]), _random(2, 4)], 16),
    ("Pad", {"pads": [0, 1, 0, 0, 2, 1], "value": 0.5}, ARRAY, [], 10),
    ("Pad", {}, ARRAY, [_integers(0, -1, 1, 0, 2, -2), np.float32(0.3)], 13),
    *[("Pad", {"mode": mode}, ARRAY, [_integers(0, 1, 2, 0, 0, 1)], 13) for mode in ("reflect", "edge")],
    ("Pad", {}, ARRAY, [_integers(1, 2), np.float32(0), _integers(-1)], 18),
    ("DepthToSpace", {"blocksize": 2}, IMAGE, [], 13),
    ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, IMAGE, [], 13),
    ("SpaceToDepth", {"blocksize": 2}, (1, 2, 4, 6), [], 13),
    ("Trilu", {"upper": 0}, ARRAY, [np.array(1)], 14),
    ("Trilu", {}, ARRAY, [], 14),
    ("CumSum", {}, ARRAY, [np.array(1)], 14),
    ("CumSum", {"reverse": 1, "exclusive": 1}, ARRAY, [np.array(2)], 14),
    ("Upsample", {"mode": "nearest"}, IMAGE, [np.array([1, 1, 2, 3], np.float32)], 9),
    ("Upsample", {"mode": "linear"}, IMAGE, [np.array([1, 1, 2, 2], np.float32)], 9),
    ("Resize", {}, IMAGE, [np.array([1, 1, 2, 0.5], np.float32)], 10),
    *[
        ("Resize", {"mode": mode, "coordinate_transformation_mode": way}, IMAGE, [None, np.array([1, 1, 1.7, 0.6], np.float32)], 13)
        for mode in ("nearest", "linear", "cubic")
        for way in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
    ],
    ("Resize", {"mode": "linear"}, IMAGE, [None, None, _integers(1, 4, 5, 9)], 13),
    ("Resize", {}, (1, 1, 10, 5), [None, np.array([1, 1, 0.7, 0.3], np.float32)], 13),
    ("Resize", {"nearest_mode": "floor"}, IMAGE, [None, None, _integers(1, 4, 5, 9)], 13),
    ("Resize", {"nearest_mode": "ceil"}, IMAGE, [None, None, _integers(1, 4, 5, 9)], 13),
    ("Resize", {"nearest_mode": "round_prefer_ceil"}, IMAGE, [None, None, _integers(1, 4, 14, 3)], 13),
    ("Resize", {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}, IMAGE, [None, None, _integers(1, 4, 5, 9)], 13),
    ("Dropout", {}, ARRAY, [], 7),
    ("Dropout", {}, ARRAY, [np.float32(0.5)], 13),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4]}-{case[1]}")
def test_operators_equal_onnxruntime(tmp_path, case):
    operator, attributes, shape, others, opset = case
    names = [f"c{place}" if other is not None else "" for place, other in enumerate(others)]
    constants = {name: np.asarray(other) for name, other in zip(names, others, strict=True) if name}
    content = _file([(operator, ["x", *names], ["y"], attributes)], shape, constants, opset)
    _agrees(tmp_path, content, shape)


@pytest.mark.parametrize("name", [*POSITIVE, "Asin", "Acos", "Atanh"])
def test_operators_on_their_domains(tmp_path, name):
    low, high = (-0.9, 0.9) if name[0] == "A" and name != "Acosh" else (1.5, 3.0)
    _agrees(tmp_path, _file([(name, ["x"], ["y"], {})], ARRAY), ARRAY, low, high)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("name", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrent_operators(tmp_path, name, gates, direction):
    steps, batch, features, hidden, count = 3, 2, 4, 5, 2 if direction == "bidirectional" else 1
    constants = {
        "w": _random(count, gates * hidden, features), "r": _random(count, gates * hidden, hidden, seed=1),
        "b": _random(count, 2 * gates * hidden, seed=2), "h": _random(count, batch, hidden, seed=3),
    }  # fmt: skip
    inputs, outputs = ["x", "w", "r", "b", "", "h"], ["y", "last"]
    options = [{"linear_before_reset": 0}, {"linear_before_reset": 1}] if name == "GRU" else [{}]
    options += [{"clip": 0.4, **each} for each in options if name != "LSTM"]
    if name == "LSTM":
        constants |= {"c": _random(count, batch, hidden, seed=4), "p": _random(count, 3 * hidden, seed=5)}
        inputs, outputs = [*inputs, "c", "p"], [*outputs, "cell"]
    for attributes in options:
        attributes = attributes | {"hidden_size": hidden, "direction": direction}
        content = _file([(name, inputs, outputs, attributes)], (steps, batch, features), constants, 14, outputs)
        _agrees(tmp_path, content, (steps, batch, features))


def test_several_outputs(tmp_path):
    nodes = [("Split", ["x"], ["a", "b"], {"axis": 1}), ("TopK", ["a", "k"], ["y", "places"], {"axis": 1})]
    _agrees(tmp_path, _file(nodes, (2, 6), {"k": _integers(2)}, 13, ["y", "places", "b"]), (2, 6))


def test_choices_and_comparisons(tmp_path):
    nodes = [
        ("Greater", ["x", "zero"], ["positive"], {}),
        ("LessOrEqual", ["x", "one"], ["small"], {}),
        ("And", ["positive", "small"], ["both"], {}),
        ("Not", ["both"], ["other"], {}),
        ("Cast", ["both"], ["number"], {"to": 1}),
        ("Where", ["other", "zero", "x"], ["chosen"], {}),
        ("Add", ["chosen", "number"], ["y"], {}),
    ]
    constants = {"zero": np.float32(0), "one": np.float32(1)}
    model = _agrees(tmp_path, _file(nodes, (1, 4), constants, 16), (1, 4))
    box = jb.Box(jnp.array([-2.0, 0.1, 0.2, 1.1]), jnp.array([-1.0, 0.9, 1.9, 2.0]))
    bounds = jb.bound(lambda x: model.fn(model.params, x), jb.IBP())(box)
    for x in np.random.default_rng(0).uniform(box.lower, box.upper, (50, 4)):
        y = model.fn(model.params, jnp.asarray(x, jnp.float32))
        assert np.all(bounds.lower <= y) and np.all(y <= bounds.upper)


def test_the_first_maximum_is_bounded(tmp_path):
    """Hardmax chooses the first of equal entries, as onnxruntime; its bounds are exact where one entry leads."""
    nodes = [("Round", ["x"], ["r"], {}), ("Hardmax", ["r"], ["y"], {})]
    _agrees(tmp_path, _file(nodes, (40, 5)), (40, 5))
    model = _loaded(tmp_path, _file(nodes[1:], (1, 4)).replace(b"\x01r", b"\x01x"))
    lower, upper = jnp.array([0.0, 1.0, 0.2, 2.0]), jnp.array([0.5, 3.0, 0.9, 4.0])
    for method in (jb.IBP(), jb.Crown()):
        bounds = jb.bound(lambda x: model.fn(model.params, x), method)(jb.Box(lower, upper))
        np.testing.assert_array_equal([bounds.lower, bounds.upper], [[0, 0, 0, 0], [0, 1, 0, 1]])
        bounds = jb.bound(lambda x: model.fn(model.params, x), method)(jb.Box(lower, jnp.array([0.5, 1.5, 0.9, 4.0])))
        np.testing.assert_array_equal([bounds.lower, bounds.upper], [[0, 0, 0, 1], [0, 0, 0, 1]])


@pytest.mark.parametrize(("operator", "attributes", "shape"), [
    ("LpPool", {"kernel_shape": [2, 2], "p": 3}, (1, 2, 3, 4)),
    ("LpPool", {"kernel_shape": [2, 2], "p": 1}, (1, 2, 3, 4)),
    ("GlobalLpPool", {}, (1, 2, 3, 4)),
    ("ReverseSequence", {"batch_axis": 0, "time_axis": 1}, (1, 24)),
])  # fmt: skip
def test_norms_of_windows_and_reversed_sequences_are_bounded(tmp_path, operator, attributes, shape):
    nodes = [
        ("MatMul", ["x", "w"], ["a"], {}), ("Reshape", ["a", "s"], ["b"], {}),
        (operator, ["b"] if "Pool" in operator else ["b", "l"], ["c"], attributes), ("Flatten", ["c"], ["y"], {}),
    ]  # fmt: skip
    model = _loaded(
        tmp_path, _file(nodes, (1, 4), {"w": _random(4, 24), "s": _integers(*shape), "l": _integers(17)}, 18)
    )
    corners = np.stack(np.meshgrid(*[[-1, 1]] * 4), -1).reshape(-1, 4)
    for radius in (0.01, 1.0):
        center = _random(4, seed=1)
        points = np.concatenate([center + radius * corners, center + radius * _random(300, 4, seed=2), [center]])
        box = jb.Box(jnp.asarray(center - radius), jnp.asarray(center + radius))
        values = np.asarray(model(points.astype(np.float32)))
        for method in (jb.IBP(), jb.Crown()):
            bounds = jb.bound(lambda x: model.fn(model.params, x), method)(box)
            assert np.all(bounds.lower <= values + 1e-5) and np.all(values - 1e-5 <= bounds.upper)
            assert np.mean(bounds.upper - bounds.lower) < 3 * np.mean(values.max(0) - values.min(0))


def test_shapes_computed_in_the_graph_are_constants(tmp_path):
    nodes = [
        ("Shape", ["x"], ["shape"], {}),
        ("Gather", ["shape", "first"], ["size"], {}),
        ("Unsqueeze", ["size"], ["sizes"], {"axes": [0]}),
        ("Concat", ["sizes", "rest"], ["target"], {"axis": 0}),
        ("Reshape", ["x", "target"], ["flat"], {}),
        ("Transpose", ["w"], ["turned"], {}),
        ("MatMul", ["flat", "turned"], ["y"], {}),
    ]
    constants = {"first": np.array(0), "rest": _integers(-1), "w": _random(5, 12)}
    model = _agrees(tmp_path, _file(nodes, (1, 3, 4), constants, 11, batch="n"), (1, 3, 4))
    assert (model.input_shape, model.output_shape) == ((3, 4), (5,))
    assert {name: array.shape for name, array in model.params.items()} == {"001/MatMul/B": (12, 5)}


def test_branches_and_quantised_networks(tmp_path):
    make = onnx.helper.make_node
    value = [onnx.helper.make_tensor_value_info("t", 1, None)]
    then = onnx.helper.make_graph([make("Relu", ["x"], ["t"])], "then", [], value)
    other = onnx.helper.make_graph([make("Neg", ["x"], ["t"])], "other", [], value)
    nodes = [
        ("If", ["yes"], ["a"], {"then_branch": then, "else_branch": other}),
        ("QuantizeLinear", ["a", "scale", "zero"], ["q"], {}),
        ("DequantizeLinear", ["q", "scale", "zero"], ["d"], {}),
        ("DequantizeLinear", ["w", "scale"], ["f"], {}),
        ("MatMul", ["d", "f"], ["y"], {}),
    ]
    constants = {
        "yes": np.array(True), "scale": np.float32(0.03), "zero": np.uint8(20), "w": np.arange(8).reshape(4, 2).astype(np.uint8)
    }  # fmt: skip
    _agrees(tmp_path, _file(nodes, (1, 4), constants, 13), (1, 4))


def _bytes(*shape, seed=0, dtype=np.uint8):
    ends = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(ends.min, ends.max, shape, endpoint=True).astype(dtype)


QUANTIZE = ("QuantizeLinear", ["x", "xs", "xz"], ["q"], {})
QUANTIZED = {
    "QLinearMatMul": (
        [QUANTIZE, ("QLinearMatMul", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["r"], {})],
        (2, 5),
        {"w": _bytes(5, 3, dtype=np.int8), "ws": np.float32([0.01, 0.02, 0.03]), "wz": np.int8([0, 0, 0])},
    ),
    "QLinearConv": (
        [QUANTIZE, ("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["r"], {"pads": [1, 1, 0, 0], "strides": [2, 1]})],
        (1, 2, 5, 6),
        {"w": _bytes(3, 2, 3, 2, dtype=np.int8), "ws": np.float32([0.01, 0.02, 0.03]), "wz": np.int8([0, 0, 0]), "b": np.int32([500, -3000, 7])},
    ),
    "MatMulInteger": (
        [QUANTIZE, ("MatMulInteger", ["q", "w", "xz", "wz"], ["i"], {}), ("Cast", ["i"], ["f"], {"to": 1}), ("Mul", ["f", "ys"], ["y"], {})],
        (2, 5),
        {"w": _bytes(5, 3), "wz": np.uint8(100)},
    ),
    "ConvInteger": (
        [QUANTIZE, ("ConvInteger", ["q", "w", "xz", "wz"], ["i"], {"pads": [1, 1, 1, 1]}), ("Cast", ["i"], ["f"], {"to": 1}), ("Mul", ["f", "ys"], ["y"], {})],
        (1, 2, 5, 6),
        {"w": _bytes(3, 2, 3, 3), "wz": np.uint8(100)},
    ),
    "DynamicQuantizeLinear": (
        [
            ("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], {}), ("MatMulInteger", ["q", "w", "z"], ["i"], {}),
            ("Cast", ["i"], ["f"], {"to": 1}), ("Mul", ["s", "ys"], ["t"], {}), ("Mul", ["f", "t"], ["y"], {}),
        ],
        (2, 5),
        {"w": _bytes(5, 3, dtype=np.int8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_operators_are_staircases(tmp_path, name):
    nodes, shape, constants = QUANTIZED[name]
    if nodes[-1][2] == ["r"]:
        nodes = [*nodes, ("DequantizeLinear", ["r", "ys", "yz"], ["y"], {})]
    constants = constants | {"xs": np.float32(0.0173), "xz": np.uint8(120), "ys": np.float32(0.11), "yz": np.uint8(99)}
    used = {name: array for name, array in constants.items() if any(name in node[1] for node in nodes)}
    model = _agrees(tmp_path, _file(nodes, shape, used, 13), shape)
    box = jb.Box.around(jnp.asarray(_random(*model.input_shape)), 0.05)
    bounds = jb.bound(model.fn, jb.IBP())(model.params, box)
    for x in np.random.default_rng(0).uniform(box.lower, box.upper, (20, *model.input_shape)):
        y = model.fn(model.params, jnp.asarray(x, jnp.float32))
        assert np.all(bounds.lower <= y) and np.all(y <= bounds.upper)
    assert np.all(np.isfinite(bounds.upper - bounds.lower)) or name == "DynamicQuantizeLinear"


CHAIN = [
    ("MatMul", ["x", "w0"], ["a"], {}), ("Add", ["a", "b0"], ["b"], {}), ("Relu", ["b"], ["c"], {}),
    ("Gemm", ["c", "w1", "b1"], ["y"], {}),
]  # fmt: skip


def _chain_weights(seed=0):
    return {
        "w0": _random(3, 4, seed=seed),
        "b0": _random(4, seed=seed),
        "w1": _random(4, 2, seed=seed),
        "b1": _random(2),
    }


def test_a_model_stands_where_parameters_stand(tmp_path):
    weights = _chain_weights()
    model = _loaded(tmp_path, gzip.compress(_file(CHAIN, (1, 3), weights, batch="n")))
    assert (model.input_name, model.output_name, model.dtype) == ("x", "y", np.float32)
    layers = [(weights["w0"], weights["b0"]), (weights["w1"], weights["b1"])]
    x = jnp.asarray(_random(4, 3))
    np.testing.assert_allclose(
        model(x), np.maximum(x @ layers[0][0] + layers[0][1], 0) @ layers[1][0] + layers[1][1], rtol=1e-5
    )
    np.testing.assert_allclose(model(x)[1], model(x[1]), rtol=1e-5)
    found, wanted = jb.crown(model, x, 0.1), jb.crown(layers, x, 0.1, activation="relu")
    np.testing.assert_allclose(found.lower, wanted.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jb.crown(model, x[0], 0.1).upper, wanted.upper[0], rtol=1e-5, atol=1e-6)
    labels = jnp.argmax(model(x), 1)
    report = jb.certify(model, x, labels, 0.01, method=jb.Crown())
    assert report.verified.all() and not jb.certify(model, x, labels, 10.0, method=jb.Crown()).verified.any()
    with pytest.raises(jb.ArgumentError, match=r"x has shape \(2, 2\); pass one example of shape \(3,\), or a batch"):
        jb.crown(model, jnp.zeros((2, 2)), 0.1)
    with pytest.raises(jb.ArgumentError, match="apply_fn is given beside a Model"):
        jb.crown(model, x, 0.1, apply_fn=lambda params, x: x)


def test_networks_of_one_architecture_share_programs(tmp_path):
    one = _loaded(tmp_path, _file(CHAIN, (1, 3), _chain_weights()))
    renamed = [
        (op, [f"{n}'" if n != "x" else n for n in ins], [f"{n}'" for n in outs], at) for op, ins, outs, at in CHAIN
    ]
    weights = {f"{name}'": array for name, array in _chain_weights(1).items()}
    other = _loaded(tmp_path, _file(renamed, (1, 3), weights, outputs=["y'"]))
    assert one.fn == other.fn and hash(one.fn) == hash(other.fn) and one.params.keys() == other.params.keys()
    different = _loaded(tmp_path, _file([*CHAIN[:2], ("Tanh", ["b"], ["c"], {}), CHAIN[3]], (1, 3), _chain_weights()))
    assert one.fn != different.fn
    jaxprs = [str(jax.make_jaxpr(m.fn)(m.params, jnp.zeros(3))) for m in (one, other)]
    assert jaxprs[0] == jaxprs[1] and "HIGHEST" in jaxprs[0]


@pytest.mark.parametrize(
    ("nodes", "shape", "options", "reason"),
    [
        (
            [("Det", ["x"], ["a"], {}), ("NonZero", ["a"], ["b"], {}), ("Relu", ["b"], ["y"], {})], (1, 2, 2), {},
            r"node 'Det_0' \(Det\): the operator Det \(set 17\) cannot be read\nnode 'NonZero_1' \(NonZero\)",
        ),
        ([("Relu", ["z"], ["y"], {})], (1, 2), {}, r"node 'Relu_0' \(Relu\) takes 'z', which nothing gives"),
        ([("Conv", ["x", "w"], ["y"], {})], (1, 2), {}, r"network.onnx: node 'Conv_0' \(Conv\): "),
        ([("Reshape", ["x", "s"], ["y"], {})], (1, 2), {}, r"node 'Reshape_0' \(Reshape\): its input 's' depends on the"),
        ([("Relu", ["x"], ["z"], {})], (1, 2), {}, "nothing gives the output 'y'"),
        ([("Relu", ["x"], ["y"], {}), ("Neg", ["y"], ["y"], {})], (1, 2), {}, r"node 'Neg_1' \(Neg\) gives 'y', which is given"),
        ([("Identity", ["w"], ["y"], {})], (1, 2), {}, "the output 'y' does not depend on the input"),
        ([("Relu", ["x"], ["y"], {})], (1, "height"), {}, r"the shape of 'x' is \(1, 0\), 0 where it is open: pass input_shape"),
        ([("Relu", ["x"], ["y"], {})], (1, 2), {"input_shape": (1, 3)}, r"input_shape is \(1, 3\); the file says \(1, 2\)"),
        ([("IsInf", ["x"], ["y"], {"detect_negative": 0})], (1, 2), {}, "its attribute 'detect_negative' cannot be read"),
        ([("Gather", ["x", "i"], ["y"], {})], (1, 2), {}, r"its indices reach beyond an axis of size 1"),
        ([("Resize", ["x", "", "w"], ["y"], {"mode": "area"})], (3, 2), {}, "mode='area' cannot be read"),
        ([("Resize", ["x", "", "u"], ["y"], {"coordinate_transformation_mode": "half_pixel_symmetric"})], (2, 3), {}, "halfway between two entries"),
        ([("Dropout", ["x", "", "t"], ["y"], {})], (3, 2), {}, "training mode, in which entries are dropped at random"),
        ([("MaxPool", ["x"], ["a"], {"kernel_shape": [2]}), ("ReduceMean", ["a"], ["y"], {})], (1, 2, 1), {}, "a mean of no entries"),
        ([("MaxPool", ["x"], ["a"], {"kernel_shape": [2]}), ("GlobalAveragePool", ["a"], ["y"], {})], (1, 2, 1), {}, "a mean of no entries"),
        ([("MaxPool", ["x"], ["y"], {"kernel_shape": [2], "pads": [2, 0]})], (1, 1, 5), {}, r"pads=\[\(2, 0\)\] leave windows that hold padding"),
        ([("AveragePool", ["x"], ["y"], {"kernel_shape": [2], "pads": [1, 1], "dilations": [3]})], (1, 1, 2), {}, "hold padding alone"),
        ([("Conv", ["x"], ["y"], {})], (1, 2, 3), {}, r"node 'Conv_0' \(Conv\): it lacks its input 'W'"),
        ([("Gemm", ["x", "", "w"], ["y"], {})], (1, 2), {}, r"node 'Gemm_0' \(Gemm\): it lacks its input 'B'"),
        ([("Concat", [], ["y"], {})], (1, 2), {}, "it lacks its input 'inputs'"),
        ([("Relu", ["x", "w"], ["y"], {})], (1, 2), {}, "it has 2 inputs, the operator takes 1"),
        ([("LSTM", ["x", "m", "m"], ["y"], {"clip": 0.5})], (1, 1, 4), {}, "the specification clips the cell's state"),
        ([("RNN", ["x", "m", "m"], ["y"], {"clip": -0.5})], (1, 1, 4), {}, "clip=-0.5 is no bound"),
        ([("LpPool", ["x"], ["y"], {"kernel_shape": [2], "p": 0})], (1, 1, 5), {}, "p=0 is no norm"),
        ([("ReverseSequence", ["x", "k"], ["y"], {})], (1, 2), {}, r"sequence_lens=\[1\] do not fit a value of shape \(1, 2\)"),
        ([("TopK", ["x", "k"], ["y", "z"], {"sorted": 0})], (3, 2), {}, "sorted=0 cannot be read"),
        ([("Squeeze", ["x", "e"], ["y"], {})], (1, 2), {}, r"axes=\(\) cannot be read"),
        ([("MaxPool", ["x"], ["y"], {"kernel_shape": [2], "dilations": [2], "auto_pad": "SAME_UPPER"})], (1, 2, 7), {}, r"auto_pad='SAME_UPPER' with dilations=\(2,\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, nodes, shape, options, reason):
    if nodes[0][0] == "Reshape":
        nodes = [("Cast", ["x"], ["s"], {"to": 7}), *[(op, ins, outs, at) for op, ins, outs, at in nodes]]
        reason = reason.replace("Reshape_0", "Reshape_1")
    constants = {"w": np.array([2.0, 2.0], np.float32), "i": np.array(3), "t": np.array(True), "k": _integers(1)}
    constants |= {"m": _random(1, 4, 4), "e": _integers(), "u": np.array([0.6, 1.0], np.float32)}
    content = _file(nodes, shape, constants)
    with pytest.raises(jb.JaxboundError, match=reason):
        _loaded(tmp_path, content, **options)


def test_inputs_that_have_no_regions_are_refused(tmp_path):
    with pytest.raises(jb.ArgumentError, match="the input 'x' is of int64: only floating-point inputs have regions"):
        _loaded(tmp_path, _file([("Relu", ["x"], ["y"], {})], (1, 2), elem=7))
    double = _file([("Relu", ["x"], ["y"], {})], (1, 2), elem=11)
    with pytest.raises(jb.ArgumentError, match="the network has float64 numbers: enable them"):
        _loaded(tmp_path, double)
    assert _loaded(tmp_path, double, dtype=jnp.float32).dtype == np.float32


def test_open_shapes_can_be_given(tmp_path):
    content = _file([("Relu", ["x"], ["y"], {})], (1, "height"))
    assert _loaded(tmp_path, content, input_shape=(1, 3)).input_shape == (3,)


def test_networks_without_batch_axis_keep_their_shape(tmp_path):
    model = _loaded(tmp_path, _file([("MatMul", ["x", "w"], ["y"], {})], (3,), {"w": _random(3, 2)}))
    assert (model.input_shape, model.output_shape) == ((3,), (2,))
    model = _loaded(tmp_path, _file([("Squeeze", ["x"], ["y"], {})], (1, 3)))
    assert (model.input_shape, model.output_shape) == ((1, 3), (3,))


def test_broken_files_are_refused(tmp_path):
    whole = np.frombuffer(_file(CHAIN, (1, 3), _chain_weights()), np.uint8)
    generator = np.random.default_rng(0)
    x = _random(1, 3)
    for _ in range(100):
        broken = whole.copy()
        places = generator.integers(0, whole.size, generator.integers(1, 4))
        broken[places] = generator.integers(0, 256, places.size)
        content = broken.tobytes()[: generator.integers(whole.size // 2, 2 * whole.size)]
        try:
            model = _loaded(tmp_path, content)
        except jb.JaxboundError:
            continue
        try:
            (wanted,) = runtime.InferenceSession(content).run(None, {"x": x})
        except Exception:  # onnxruntime checks what we do not need, such as names of types
            continue
        np.testing.assert_allclose(np.reshape(model.fn(model.params, x), wanted.shape), wanted, rtol=1e-4)
    for content in (b"", b"no protocol buffer", gzip.compress(whole.tobytes())[:100]):
        with pytest.raises(jb.ArgumentError):
            _loaded(tmp_path, content)
    with pytest.raises(jb.ArgumentError, match="a pointer of Git LFS, not the file"):
        _loaded(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_every_row_of_the_table_is_tested():
    tested = {case[0] for case in CASES} | set(POSITIVE) | {"Asin", "Acos", "Atanh", "RNN", "GRU", "LSTM"}
    tested |= set(re.findall(r'\("([A-Z]\w+)", \[', Path(__file__).read_text(encoding="utf-8")))
    assert not OPERATORS.keys() - tested - {
        "Or", "Xor", "Less", "GreaterOrEqual", "Equal", "IsNaN", "IsInf", "CastLike", "Size", "Scatter",
        "Swish", "RMSNormalization",
    }  # fmt: skip


def _boxes(network):
    """The input boxes of a network's first property, where a table of instances stands beside it."""
    table = network.parent / "instances.csv"
    table = table if table.exists() else network.parent.parent / "instances.csv"
    for row in csv.reader(table.read_text().splitlines()) if table.exists() else ():
        if str(network).removesuffix(".gz").endswith(f"/{row[0]}".removesuffix(".gz")):
            named = table.parent / row[1]
            return jb.vnnlib.load(named if named.exists() else f"{named}.gz")[0][:1]
    return []


@pytest.mark.skipif("JAXBOUND_VNNCOMP" not in os.environ, reason="JAXBOUND_VNNCOMP names no folder of benchmarks")
def test_every_network_of_a_folder_equals_onnxruntime():
    from onnx.reference import ReferenceEvaluator

    files = sorted(Path(os.environ["JAXBOUND_VNNCOMP"]).rglob("*.onnx*"))
    assert files
    for file in files:
        model = jb.onnx.load(file)
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        session = runtime.InferenceSession(content)
        (source, *_), generator = session.get_inputs(), np.random.default_rng(0)
        shape = [size if isinstance(size, int) else 1 for size in source.shape]
        points = generator.uniform(-1, 1, (100, *model.input_shape))
        for box in _boxes(file):
            ends = np.reshape([box.lower, box.upper], (2, *model.input_shape))
            points = np.concatenate([points, np.where(generator.random((20, *ends.shape[1:])) < 0.5, *ends)])
        points = points.astype(np.float32)
        wanted = np.stack([session.run(None, {source.name: x.reshape(shape)})[0].reshape(-1) for x in points])
        found = np.reshape(model(points), wanted.shape)
        scale = np.maximum(1, np.abs(wanted))
        if np.any(np.abs(found - wanted) > 1e-5 * scale):  # float32 may not reach it: then no worse than NumPy does
            reference = ReferenceEvaluator(onnx.load_model_from_string(content))
            other = [reference.run(None, {source.name: x.reshape(shape)})[0].reshape(-1) for x in points]
            assert np.max(np.abs(found - wanted) / scale) <= 2 * np.max(np.abs(other - wanted) / scale), file.name
