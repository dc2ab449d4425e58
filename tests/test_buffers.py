"""Bytes of files: what is unpacked is the content, and weights read in place are those that protobuf reads."""

from __future__ import annotations

import gzip
import importlib
import zlib

import numpy as np
import pytest

import jaxbound as jb
from jaxbound.frontends import buffers, files

onnx = pytest.importorskip("onnx")

FLOATS = np.arange(12, dtype=np.float32).reshape(3, 4) / 3
ARRAYS = [
    FLOATS, FLOATS.astype(np.float64), FLOATS.astype(np.float16), np.arange(40), np.arange(40, dtype=np.int8),
    np.ones((6, 6), bool), np.float32(0.5), np.zeros((0, 3), np.float32), np.arange(3, dtype=np.float32),
]  # fmt: skip


def _graph(name="g", arrays=(), nodes=(), sparse=()):
    values = [onnx.helper.make_tensor_value_info(v, 1, [3, 4]) for v in "xy"]
    tensors = [array if isinstance(array, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(array), f"{name}{k}")
               for k, array in enumerate(arrays)]  # fmt: skip
    nodes = [*nodes, onnx.helper.make_node("Add", ["x", f"{name}0"], ["y"])]
    return onnx.helper.make_graph(nodes, name, [values[0]], [values[1]], tensors, sparse_initializer=list(sparse))


def _model(**parts):
    return onnx.helper.make_model(_graph(**parts), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def _tensor(array, **fields):
    tensor = onnx.numpy_helper.from_array(array, "other")
    dims = fields.pop("dims", None)
    tensor.MergeFrom(onnx.TensorProto(**fields))
    if dims:
        tensor.dims[:] = dims
    return tensor


def _external():
    tensor = _tensor(FLOATS, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="none.bin")
    return tensor


def _sparse():
    return onnx.helper.make_sparse_tensor(_tensor(FLOATS.ravel()), _tensor(np.arange(12)), [40])


def _length(number):
    return buffers._written(number)


def _field(number, value):
    return bytes([number << 3 | 2]) + _length(len(value)) + value


def _twice():
    """A tensor whose raw data are written twice, the last time other ones, or few, or a graph in two parts."""
    raw = _field(9, FLOATS.tobytes()[::-1])
    short = _tensor(np.arange(12, dtype=np.int8)).SerializeToString()
    yield _field(7, _field(5, raw + _tensor(FLOATS).SerializeToString()))
    yield _field(7, _field(5, raw + short))
    yield _field(7, _field(5, _tensor(FLOATS).SerializeToString() + _field(9, b"few")))
    whole = _model(arrays=ARRAYS).SerializeToString()
    yield whole + _field(7, _field(5, _tensor(FLOATS).SerializeToString()))
    yield whole + bytes([7 << 3 | 0, 5])  # a graph's number with another type
    graph = _field(7, _field(5, _tensor(-FLOATS).SerializeToString()))[1:]
    yield b"\xba\x00" + graph + whole  # a key longer than need be
    yield b"\xba\x80\x80\x80\x10" + graph + whole  # a graph's key but for a bit beyond the 32 of keys
    yield whole + b"\x3a\x80\x00"  # a length longer than need be
    yield whole + b"\xa3\x06\xa4\x06"  # a group
    yield whole + b"\xf9\x3e12345678\xfd\x3e1234"  # unknown fields of fixed size
    yield b"\xf8\x3e" + b"\xff" * 9 + b"\x01" + whole  # a negative number


WHOLE = {
    "arrays": _model(arrays=ARRAYS).SerializeToString(),
    "one name twice": _model(arrays=[_tensor(FLOATS), _tensor(-FLOATS), *ARRAYS]).SerializeToString(),
    "constants in nodes": _model(arrays=ARRAYS, nodes=[onnx.helper.make_node("Constant", [], ["c"], value=_tensor(FLOATS))]).SerializeToString(),
    "subgraphs": _model(arrays=ARRAYS, nodes=[onnx.helper.make_node("If", ["c"], ["d"], then_branch=_graph("t", ARRAYS), else_branch=_graph("e", ARRAYS))]).SerializeToString(),
    "external": _model(arrays=[FLOATS, _external(), FLOATS]).SerializeToString(),
    "segment": _model(arrays=[FLOATS, _tensor(FLOATS, segment=onnx.TensorProto.Segment(begin=0, end=6))]).SerializeToString(),
    "sparse": _model(arrays=ARRAYS, sparse=[_sparse()]).SerializeToString(),
    "numbers in fields": _model(arrays=[onnx.helper.make_tensor("a", 1, [3, 4], FLOATS.ravel()), *ARRAYS]).SerializeToString(),
    "wrong shape": _model(arrays=[FLOATS, _tensor(FLOATS, dims=[5, 3])]).SerializeToString(),
    "strings": _model(arrays=[FLOATS, _tensor(FLOATS, data_type=8)]).SerializeToString(),
} | {f"written otherwise {number}": content for number, content in enumerate(_twice())}  # fmt: skip


def _by_protobuf(content):
    try:
        return onnx.load_model_from_string(content)
    except Exception:
        return None


def _by_us(content):
    """The model with what was cut out put back."""
    light, large = buffers.lightened(memoryview(content))
    model = _by_protobuf(light)
    for place, data in large.items() if model is not None else ():
        assert model.graph.initializer[place].raw_data == b""
        model.graph.initializer[place].raw_data = bytes(data)
    return model


@pytest.fixture
def _all_are_large(monkeypatch):
    monkeypatch.setattr(buffers, "LARGE", 5)


@pytest.mark.usefixtures("_all_are_large")
@pytest.mark.parametrize("name", WHOLE)
def test_weights_in_place_are_those_of_protobuf(name):
    content = WHOLE[name]
    wanted = _by_protobuf(content)
    assert _by_us(content) == wanted
    if wanted is None or name == "wrong shape":
        return
    model, weights = files._model(memoryview(content))
    assert [t.name for t in model.graph.initializer] == [t.name for t in wanted.graph.initializer]
    for place, tensor in enumerate(wanted.graph.initializer):
        if place in weights:
            array = onnx.numpy_helper.to_array(tensor)
            assert weights[place].dtype == array.dtype and not weights[place].flags.writeable
            np.testing.assert_array_equal(weights[place], array)
        else:
            assert model.graph.initializer[place] == tensor
    kinds = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    plain = {k for k, t in enumerate(wanted.graph.initializer)
             if t.data_type in kinds and len(t.raw_data) >= 5 and not t.HasField("segment") and not t.external_data}  # fmt: skip
    assert weights.keys() == plain or name.startswith("written otherwise")


@pytest.mark.usefixtures("_all_are_large")
@pytest.mark.parametrize("name", WHOLE)
def test_broken_models_are_what_protobuf_says(name):
    content, rng = WHOLE[name], np.random.default_rng(0)
    for end in range(0, len(content), max(1, len(content) // 300)):
        assert _by_us(content[:end]) == _by_protobuf(content[:end])
    for _ in range(500):
        broken = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(len(broken))] = (
                rng.integers(256) if rng.random() < 0.7 else rng.choice([58, 42, 74, 0, 128])
            )
        assert _by_us(bytes(broken)) == _by_protobuf(bytes(broken))


@pytest.mark.usefixtures("_all_are_large")
def test_networks_with_weights_in_place(tmp_path):
    path = tmp_path / "network.onnx"
    for name, refused in (("arrays", ""), ("subgraphs", "'c'"), ("wrong shape", "reshape"), ("segment", "segment")):
        path.write_bytes(WHOLE[name])
        if refused:
            with pytest.raises(jb.ArgumentError, match=refused):
                jb.onnx.load(path)
        else:
            np.testing.assert_array_equal(jb.onnx.load(path)(FLOATS), 2 * FLOATS)
    model = _model(arrays=[FLOATS])  # an inlined function, whose initializers come behind
    model.functions.add(name="Twice", domain="own", input=["a"], output=["b"],
                        node=[onnx.helper.make_node("Add", ["a", "a"], ["b"])],
                        opset_import=[onnx.helper.make_opsetid("", 17)])  # fmt: skip
    model.opset_import.add(domain="own", version=1)
    model.graph.node[0].output[0] = "z"
    model.graph.node.append(onnx.helper.make_node("Twice", ["z"], ["y"], domain="own"))
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(jb.onnx.load(path)(FLOATS), 4 * FLOATS)


def test_large_weights_are_read_in_place(tmp_path):
    weights = np.random.default_rng(0).normal(size=(3, 40_000)).astype(np.float32)
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    values = [
        onnx.helper.make_tensor_value_info("x", 1, [3, 2]),
        onnx.helper.make_tensor_value_info("y", 1, [2, 40_000]),
    ]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [onnx.numpy_helper.from_array(weights, "w")])
    content = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString()
    assert files._model(memoryview(content))[1].keys() == {0}
    (tmp_path / "n.onnx.gz").write_bytes(gzip.compress(content))
    (param,) = jb.onnx.load(tmp_path / "n.onnx.gz").params.values()
    np.testing.assert_array_equal(param, weights)


@pytest.fixture(params=["gzip", "zlib_ng.gzip_ng"])
def _unpacker(request, monkeypatch):
    pytest.importorskip(request.param.partition(".")[0])
    monkeypatch.setattr(buffers, "gzip", importlib.import_module(request.param))
    fast = request.param.startswith("zlib_ng")
    monkeypatch.setattr(buffers, "zlib", importlib.import_module("zlib_ng.zlib_ng") if fast else zlib)


@pytest.mark.usefixtures("_unpacker")
@pytest.mark.parametrize("size", [0, 1, 1000, 1_500_000])
def test_gzipped_files_of_one_part_and_of_several(size):
    """Of several parts the first is not the file, whatever the last bytes say; nor is what they say true."""
    content = np.random.default_rng(size).integers(0, 7, size, np.uint8).tobytes()
    half = size // 2
    parts = (
        [content],
        [content[:half], content[half:]],
        [content, b""],
        [b"", content],
        [content, content],
        [b"12", content],
    )
    for each in parts:
        packed = b"".join(map(gzip.compress, each))
        assert buffers.unpacked(packed) == b"".join(each) == buffers.unpacked(packed + b"\0" * 100)
    packed = gzip.compress(content)
    for broken in (
        packed[:-8] + b"\1" * 8,
        packed[:-1],
        packed[:15],
        packed[:-4] + b"\xff\xff\xff\x00",
        packed + packed[:-2],
        packed + b"more",
    ):
        with pytest.raises(ValueError, match=r"\w"):
            buffers.unpacked(broken)
    changed = bytearray(packed)
    changed[len(packed) // 2] ^= 16
    if size > 1:
        with pytest.raises(ValueError, match=r"\w"):
            buffers.unpacked(bytes(changed))
