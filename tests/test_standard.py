"""The solver's interface of VNN-LIB 2.0: capabilities, verdicts and assignments in its form, and what it must refuse."""

from __future__ import annotations

import numpy as np
import pytest

import jaxbound
from jaxbound.cli import standard
from jaxbound.frontends import vnnlib

onnx = pytest.importorskip("onnx")

QUERY = """(vnnlib-version <2.0>)
(declare-network N (declare-input X real [1,2]) (declare-output Y real [1,1]))
(assert (and (>= X[0,0] -1.0) (<= X[0,0] 1.0) (>= X[0,1] -1.0) (<= X[0,1] 1.0)))
(assert {})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The network relu(x_0 + x_1), with outputs from 0 to 2."""
    folder, make = tmp_path_factory.mktemp("standard"), onnx.helper
    kernel = onnx.numpy_helper.from_array(np.ones((2, 1), np.float32), "w")
    nodes = [make.make_node("MatMul", ["x", "w"], ["1"]), make.make_node("Relu", ["1"], ["y"])]
    ends = [make.make_tensor_value_info("x", 1, [1, 2])], [make.make_tensor_value_info("y", 1, [1, 1])]
    graph = make.make_graph(nodes, "tiny", *ends, [kernel])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)]), folder / "net.onnx")
    return folder


def run(folder, capsys, assertion, *options, network="N=net.onnx", query=QUERY):
    (folder / "q.vnnlib").write_text(query.format(assertion))
    given = [] if network is None else ["--network", network.replace("net.onnx", str(folder / "net.onnx"))]
    code = standard.main(["verify", str(folder / "q.vnnlib"), *given, "--timeout", "60", *options])
    said = capsys.readouterr()
    assert (code == 2) == (not said.out) == (len(said.err.splitlines()) == 1)
    return said.out or said.err


def test_verdicts(folder, capsys):
    assert run(folder, capsys, "(>= Y[0,0] 2.5)") == "unsat\n"
    lines = run(folder, capsys, "(>= Y[0,0] 1.5)").splitlines()
    assert lines[:2] == ["sat", "X real [1,2]"] and lines[4] == "Y real [1,1]" and len(lines) == 6
    x, y = np.array(lines[2:4], np.float32), np.float32(lines[5])
    assert np.abs(x).max() <= 1 and y >= 1.5 and y == pytest.approx(max(x.sum(), 0))
    found = folder / "assignment"
    assert run(folder, capsys, "(>= Y[0,0] 1.5)", "--serialise-assignments", str(found)) == "sat\n"
    tensors = [onnx.load_tensor(str(found / f"{name}.pb")) for name in "XY"]
    assert [tuple(tensor.dims) for tensor in tensors] == [(1, 2), (1, 1)]


def test_strict_comparisons_are_not_satisfied_by_equality(folder, capsys):
    """At most 2, at one corner; and below 0 nowhere, though equal to it on half of the region."""
    assert run(folder, capsys, "(< Y[0,0] 0.0)") == "unknown\n"
    assert run(folder, capsys, "(<= Y[0,0] 0.0)").startswith("sat\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": None}, "network is given for none; pass --network N=FILE, and no other"),
        ({"network": "M=net.onnx"}, "network is given for M"),
        ({"query": QUERY.replace("real [1,2]", "float32 [1,2]")}, "X is declared as float32, and what is proved"),
        ({"query": QUERY.replace("[1,1]", "[1,1,1]").replace("{}", "(>= Y[0,0,0] 1.0)")}, "Y is declared with shape (1, 1, 1)"),
        ({"query": "(declare-const X_0 Real)"}, "query declares no network; VNN-LIB 1.0 is read by"),
    ],
)  # fmt: skip
def test_what_it_must_refuse(folder, capsys, change, reason):
    assert reason in run(folder, capsys, "(>= Y[0,0] 1.5)", **change)


def test_element_types_are_taken_as_real_on_demand(folder, capsys):
    query = QUERY.replace("real", "float32")
    assert run(folder, capsys, "(>= Y[0,0] 2.5)", "--real", query=query) == "unsat\n"
    other = query.replace("float32", "float64")
    assert "is declared as float64, the network is of float32" in run(
        folder, capsys, "(>= Y[0,0] 2.5)", "--real", query=other
    )


def test_capabilities(capsys):
    said = {}
    for option in ("onnx-opset-versions", "onnx-element-types", "onnx-operators", *list(standard._THEORIES)):
        assert standard.main(["supports", f"--{option}"]) == 0
        said[option] = capsys.readouterr().out.split()
    assert said["onnx-opset-versions"][0] == "7" and {"Conv", "Relu", "LSTM"} <= set(said["onnx-operators"])
    assert said["onnx-element-types"] == ["real"] and said["arithmetic-complexity-theories"] == ["LIN"]
    for option, answer in (("--name", "jaxbound"), ("--version", jaxbound.__version__)):
        assert standard.main([option]) == 0 and capsys.readouterr().out.strip() == answer
    assert standard.main([]) == 2 and standard.main(["supports"]) == 2
    capsys.readouterr()


def _value(node, x, y):
    """A node of the standard's own reader at a point."""
    kind = type(node).__name__
    if kind == "Var":
        values = x if node.kind.name == "Input" else y
        return values[tuple(node.indices)]
    if hasattr(node, "lexeme"):
        return float(node.lexeme)
    parts = [_value(part, x, y) for part in node.children()]
    compare = {"GreaterThan": ">", "LessThan": "<", "GreaterEqual": ">=", "LessEqual": "<=", "Equal": "=="}
    if kind in compare:
        return eval(f"a {compare[kind]} b", {"a": parts[0], "b": parts[1]})
    if kind in ("And", "Or"):
        return (all if kind == "And" else any)(parts)
    if kind == "Negate":
        return -parts[0]
    return {"Plus": sum, "Minus": lambda p: p[0] - sum(p[1:]), "Multiply": np.prod}[kind](parts)


def test_queries_mean_what_the_standards_own_reader_says():
    reader = pytest.importorskip("vnnlib")
    rng = np.random.default_rng(0)
    names = [f"X[0,{i}]" for i in range(2)] + [f"Y[{i}]" for i in range(2)]

    def term(depth):
        if depth == 0 or rng.random() < 0.4:
            return str(rng.choice(names)) if rng.random() < 0.7 else str(rng.integers(-4, 5) / 4)
        return [
            f"(+ {term(depth - 1)} {term(depth - 1)})", f"(- {term(depth - 1)} {term(depth - 1)})",
            f"(* {rng.integers(-4, 5) / 2} {term(depth - 1)})", f"(- {term(depth - 1)})",
        ][rng.integers(4)]  # fmt: skip

    def formula(depth):
        if depth == 0 or rng.random() < 0.3:
            return f"({rng.choice(['<=', '>=', '<', '>', '=='])} {term(2)} {rng.choice(names)})"
        return f"({rng.choice(['and', 'or'])} {' '.join(formula(depth - 1) for _ in range(rng.integers(1, 4)))})"

    head = """(vnnlib-version <2.0>)
    (declare-network N (declare-input X float32 [1,2]) (declare-output Y float32 [2]))
    (assert (and (>= X[0,0] -1.0) (<= X[0,0] 1.0) (>= X[0,1] -1.0) (<= X[0,1] 1.0)))"""
    held = 0
    for _ in range(30):
        text = f"{head}\n(assert {formula(2)})"
        points = rng.integers(-4, 5, (10, 4)) / 4.0
        query = reader.parse_query_string(text)
        try:
            regions, prop = vnnlib.loads(text)
        except jaxbound.ArgumentError:  # no input satisfies it
            regions, prop = [], None
        for point in points:
            x, y = point[:2], point[2:]
            wanted = all(_value(assertion.expr, x[None], y) for assertion in query.assertions)
            assert vnnlib.satisfied(text, x, y) == wanted
            inside = any(np.all(box.lower <= x) and np.all(x <= box.upper) for box in regions)
            assert not wanted or (inside and prop is not None and prop.violated(x, y))  # strict ones count as others
            held += wanted
    assert held > 10
