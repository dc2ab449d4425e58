"""Networks of several inputs and outputs: ONNX files, VNN-LIB over several arrays, verdicts, certificates, the command."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.cli import standard
from jaxbound.cli.main import main

onnx = pytest.importorskip("onnx")
make = onnx.helper
GENERATOR = np.random.default_rng(0)
WEIGHTS = {
    name: GENERATOR.normal(size=size).astype(np.float32) for name, size in (("w", (3, 4)), ("v", (2, 4)), ("u", (4, 2)))
}
SUM = [
    ("MatMul", ["a", "w"], "1"),
    ("MatMul", ["b", "v"], "2"),
    ("Add", ["1", "2"], "3"),
    ("Relu", ["3"], "4"),
    ("MatMul", ["4", "u"], "y"),
]
PRODUCT = [*SUM[:3], ("Mul", ["1", "2"], "4"), SUM[4]]
A, B = (GENERATOR.normal(size=(5, size)).astype(np.float32) for size in (3, 2))
POINT = np.concatenate([A[0], B[0]])


def _saved(folder, nodes=SUM, inputs=(("a", 3), ("b", 2)), outputs=("y",), kinds=(1, 1), batch="N"):
    given = [
        make.make_tensor_value_info(name, kind, [batch, size]) for (name, size), kind in zip(inputs, kinds, strict=True)
    ]
    results = [make.make_tensor_value_info(name, 1, None) for name in outputs]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()]
    graph = make.make_graph([make.make_node(op, ins, [out]) for op, ins, out in nodes], "n", given, results, stored)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, folder / "n.onnx")
    return folder / "n.onnx"


def _value(a, b):
    return np.maximum(a @ WEIGHTS["w"] + b @ WEIGHTS["v"], 0) @ WEIGHTS["u"]


def _boxes(eps=0.1):
    return jb.Box(A[0] - eps, A[0] + eps), jb.Box(B[0] - eps, B[0] + eps)


@pytest.mark.parametrize("nodes", [SUM, PRODUCT])
def test_several_inputs_and_outputs_equal_onnxruntime(tmp_path, nodes):
    runtime = pytest.importorskip("onnxruntime")
    path = _saved(tmp_path, nodes, outputs=("y", "3"))
    model = jb.onnx.load(path)
    assert (model.input_shape, model.output_shape) == (((3,), (2,)), ((2,), (4,)))
    assert (model.input_name, model.output_name) == (("a", "b"), ("y", "3"))
    wanted = runtime.InferenceSession(str(path)).run(None, {"a": A, "b": B})
    for ours in (model(A, B), jax.vmap(lambda a, b: model.fn(model.params, a, b))(A, B)):
        for given, found in zip(wanted, ours, strict=True):
            np.testing.assert_allclose(found, given, rtol=1e-5, atol=1e-5)
    flat = model.flat
    assert (flat.input_shape, flat.output_shape) == ((5,), (6,)) and flat.fn == jb.onnx.load(path).flat.fn
    joined = np.concatenate([A, B], 1)
    np.testing.assert_array_equal(flat(joined), np.concatenate(model(A, B), 1))


def test_inputs_are_not_exchanged(tmp_path):
    """Of one size, so that only their order says which is which."""
    model = jb.onnx.load(_saved(tmp_path, [("Sub", ["a", "b"], "y")], (("b", 2), ("a", 2))))
    assert model.input_name == ("b", "a")
    b, a = np.float32([1, 2]), np.float32([10, 20])
    np.testing.assert_array_equal(model(b, a), a - b)
    np.testing.assert_array_equal(model.flat(np.concatenate([b, a])), a - b)


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown(), jb.Forward()])
def test_bounds_hold_over_all_inputs(tmp_path, method):
    model = jb.onnx.load(_saved(tmp_path, PRODUCT))
    one = jb.bound(model.fn, method)(model.params, *_boxes())
    joined = jb.Box(POINT - np.float32(0.1), POINT + np.float32(0.1))
    flat = jb.bound(model.flat.fn, method)(model.flat.params, joined)
    batch = jb.bound(lambda a, b: model.fn(model.params, a, b), method)(*_boxes())
    for bounds in (flat, batch):
        np.testing.assert_allclose(bounds.lower, one.lower, rtol=1e-4, atol=1e-5)
    generator = np.random.default_rng(1)
    for _ in range(200):
        a, b = A[0] + generator.uniform(-0.1, 0.1, 3), B[0] + generator.choice([-0.1, 0.1], 2)
        y = model(a.astype(np.float32), b.astype(np.float32))
        assert np.all(one.lower <= y) and np.all(y <= one.upper)
    alone = jb.bound(model.fn, method)(model.params, _boxes()[0], B[0])
    assert np.all(alone.width <= one.width + 1e-6)
    assert jb.explain(model.fn, method)(model.params, *_boxes()).supported


def test_functions_on_networks_take_a_tuple(tmp_path):
    model = jb.onnx.load(_saved(tmp_path))
    both, one = jb.crown(model, (A, B), 0.1), jb.crown(model, (A, B), (0.1, None))
    assert both.lower.shape == (5, 2) and jnp.all(one.width <= both.width + 1e-6)
    labels = np.argmax(model(A, B), 1)
    assert jb.certify(model, (A, B), labels, 1e-4, method=jb.Crown()).verified.all()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda model: model(A), r"x is 1 inputs; the network takes 2, of shapes \(\(3,\), \(2,\)\)"),
        (lambda model: model(A, B[:2]), r"has shape \(\(5, 3\), \(2, 2\)\); pass one example of shape \(\(3,\), \(2,\)\)"),
        (lambda model: model(A[0], B), r"has shape \(\(3,\), \(5, 2\)\)"),
        (lambda model: model.fn(model.params, A[0]), "x is 1 inputs; the network takes 2"),
        (lambda model: jb.crown(model, A, 0.1), "pass a tuple of the inputs a, b, or model.flat for params"),
        (lambda model: jb.crown(model, {"a": A, "b": B}, 0.1), "x is a dict; pass a tuple of the inputs a, b"),
        (lambda model: jb.crown(model, (A[0], B[0]), 0.1), "is one example of several inputs; give each a batch axis of 1"),
        (lambda model: jb.verify(model, _boxes()[0], jb.Property.robust(0, 2)), "region has 3 numbers; the network takes 5"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, call, reason):
    with pytest.raises(jb.JaxboundError, match=reason):
        call(jb.onnx.load(_saved(tmp_path)))


def test_shapes_and_dtypes(tmp_path):
    path = _saved(tmp_path, [("Sub", ["a", "b"], "y")], (("a", "open"), ("b", "open")))
    with pytest.raises(jb.ArgumentError, match=r"the shape of 'a' is \(1, 0\)"):
        jb.onnx.load(path)
    with pytest.raises(jb.ArgumentError, match="is one shape, and the network has 2 inputs; pass a dictionary"):
        jb.onnx.load(path, input_shape=(1, 3))
    with pytest.raises(jb.ArgumentError, match="input_shape='c' is not known"):
        jb.onnx.load(path, input_shape={"c": (1, 3)})
    assert jb.onnx.load(path, input_shape={"a": (1, 3), "b": (1, 3)}).input_shape == ((3,), (3,))
    assert jb.onnx.load(path, input_shape={"a": (2, 3), "b": (2, 3)}).input_shape == ((2, 3), (2, 3))
    with pytest.raises(jb.ArgumentError, match="the input 'b' is of int64: only floating-point inputs have regions"):
        jb.onnx.load(_saved(tmp_path, kinds=(1, 7)))
    with pytest.raises(jb.ArgumentError, match="the inputs are 'a' of float32, 'b' of float16: pass one dtype for all"):
        jb.onnx.load(_saved(tmp_path, kinds=(1, 10)))
    assert jb.onnx.load(_saved(tmp_path, batch=3)).input_shape == ((3, 3), (3, 2))


def test_verdicts_and_certificates(tmp_path):
    model = jb.onnx.load(_saved(tmp_path))
    joined = jb.Box(POINT - np.float32(0.1), POINT + np.float32(0.1))
    low = float(jb.bound(model.fn, jb.Crown())(model.params, *_boxes()).lower[0])
    held = jb.Property.of([([1.0, 0.0], low - 0.1)])
    proof = str(tmp_path / "proof.npz")
    assert jb.verify(model, joined, held, certificate=proof, progress=False).status == "verified"
    assert jb.check_certificate(proof, model).prop is not None
    broken = jb.verify(model, joined, jb.Property.of([([1.0, 0.0], float(_value(A[0], B[0])[0]))]), progress=False)
    assert broken.status == "falsified" and broken.counterexample is not None
    a, b = np.split(broken.counterexample, [3])
    np.testing.assert_allclose(broken.outputs, _value(a, b), rtol=1e-5, atol=1e-5)


QUERY = """(vnnlib-version <2.0>)
(declare-network N (declare-input A real [1,3] "a") (declare-input B real [2]) (declare-output Y real [1,2]))
"""


def _query(folder, row, declared=QUERY):
    names = [*(f"A[0,{i}]" for i in range(3)), *(f"B[{i}]" for i in range(2))]
    rows = [f"(assert (and (>= {n} {float(x) - 0.1}) (<= {n} {float(x) + 0.1})))" for n, x in zip(names, POINT, strict=True)]  # fmt: skip
    (folder / "q.vnnlib").write_text("\n".join([declared, *rows, f"(assert {row})"]))
    return str(folder / "q.vnnlib")


def test_queries_over_several_arrays(tmp_path, capsys):
    network, here = _saved(tmp_path), float(_value(A[0], B[0])[0])
    regions, prop = jb.vnnlib.load(_query(tmp_path, "(<= (+ Y[0,0] (* 2.0 B[1])) 0.0)"))
    np.testing.assert_allclose((regions[0].lower + regions[0].upper) / 2, POINT, rtol=1e-6, atol=1e-6)
    assert prop.clauses[0].inputs is not None and np.flatnonzero(prop.clauses[0].inputs).tolist() == [4]
    asked = ["--network", f"N={network}", "--timeout", "60"]
    assert standard.main(["verify", _query(tmp_path, f"(<= Y[0,0] {here})"), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[1], lines[5], lines[8]] == ["sat", "A real [1,3]", "B real [2]", "Y real [1,2]"]
    numbers = [np.array(lines[start:stop], np.float32) for start, stop in ((2, 5), (6, 8), (9, 11))]
    np.testing.assert_allclose(_value(*numbers[:2]), numbers[2], rtol=1e-5, atol=1e-5)
    assert numbers[2][0] <= here
    folder = tmp_path / "assignment"
    asked += ["--serialise-assignments", str(folder)]
    assert standard.main(["verify", _query(tmp_path, f"(<= Y[0,0] {here})"), *asked]) == 0
    tensors = [onnx.numpy_helper.to_array(onnx.load_tensor(str(folder / f"{name}.pb"))) for name in "ABY"]
    assert [tensor.shape for tensor in tensors] == [(1, 3), (2,), (1, 2)]
    np.testing.assert_array_equal(np.ravel(tensors[1]), numbers[1])


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (QUERY.replace('"a"', '"b"'), "A is declared to be 'b', and is 'a'"),
        (QUERY.replace("(declare-output Y real [1,2])", "(declare-output Y real [1,1]) (declare-output Z real [1,1])"), "declares 2 outputs, the network has 1"),
        (QUERY.replace("[1,3]", "[1,4]"), "A is declared with shape (1, 4), the network has (3,)"),
    ],
)  # fmt: skip
def test_queries_about_another_network_are_refused(tmp_path, capsys, declared, reason):
    query = _query(tmp_path, "(<= Y[0,0] 0.0)", declared) if "4]" not in declared else None
    if query is None:
        query = _query(tmp_path, "(and (<= Y[0,0] 0.0) (<= A[0,3] 0.0) (>= A[0,3] 0.0))", declared)
    assert standard.main(["verify", query, "--network", f"N={_saved(tmp_path)}"]) == 2
    assert reason in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    network, data = str(_saved(tmp_path)), str(tmp_path / "data.npz")
    np.savez(data, a=A, b=B, labels=np.argmax(_value(A, B), 1))
    wanted = jb.crown(jb.onnx.load(network), (A, B), 0.1)
    assert main(["bounds", network, data, "--eps", "0.1", "--json", "--cache", "off"]) == 0
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["lower"], wanted.lower, rtol=1e-4, atol=1e-5)
    assert main(["explain", network, "--cache", "off"]) == 0
    assert main(["verify", network, _query(tmp_path, "(<= Y[0,0] -1000.0)"), "--cache", "off", "--json"]) == 0
    capsys.readouterr()
    np.savez(data, a=A, b=B[:2])
    assert main(["bounds", network, data, "--eps", "0.1"]) == 2
    assert "holds inputs of shapes [(5, 3), (2, 2)]" in capsys.readouterr().err
