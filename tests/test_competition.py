"""The scripts of the verification competition, on a network that the test writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxbound.cli.main import main
from jaxbound.frontends import competition
from jaxbound.search import Verdict

pytest.importorskip("tyro")
onnx = pytest.importorskip("onnx")

ROOT = Path(__file__).resolve().parents[1]
PROPERTY = """
(declare-const X_0 Real) (declare-const X_1 Real) (declare-const Y_0 Real)
(assert (and (>= X_0 -1) (<= X_0 1) (>= X_1 -1) (<= X_1 1)))
(assert (>= Y_0 {bound}))
"""


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [str(ROOT / "competition" / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "JAXBOUND": f"{sys.executable} -m jaxbound"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    """A network with outputs from 0 to 2, and two properties: one that it has, one that it has not."""
    folder, make = tmp_path_factory.mktemp("instance"), onnx.helper
    kernel = onnx.numpy_helper.from_array(np.ones((2, 1), np.float32), "w")
    nodes = [make.make_node("MatMul", ["x", "w"], ["1"]), make.make_node("Relu", ["1"], ["y"])]
    ends = [make.make_tensor_value_info("x", 1, [1, 2])], [make.make_tensor_value_info("y", 1, [1, 1])]
    graph = make.make_graph(nodes, "tiny", *ends, [kernel])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)]), folder / "net.onnx")
    for name, bound in (("holds", 2.5), ("broken", 1.5)):
        (folder / f"{name}.vnnlib").write_text(PROPERTY.format(bound=bound))
    return folder


@pytest.mark.parametrize("name", ["broken", pytest.param("holds", marks=pytest.mark.slow)])
def test_an_instance(instance, name):
    files = instance / "net.onnx", instance / f"{name}.vnnlib"
    assert script("prepare_instance.sh", "v1", "test", *files).returncode == 0
    results = instance / f"{name}.txt"
    ended = script("run_instance.sh", "v1", "test", *files, results, 120)
    assert ended.returncode == 0, ended.stderr
    lines = results.read_text().splitlines()
    if name == "holds":
        assert lines == ["unsat"]
        return
    assert lines[0] == "sat" and lines[1].startswith("((X_0 ") and lines[-1].endswith("))") and len(lines) == 4
    x, y = np.float32([line.strip("()").split()[1] for line in lines[1:3]]), float(lines[3].strip("()").split()[1])
    assert np.abs(x).max() <= 1 and y == pytest.approx(max(float(x.sum()), 0)) and y >= 1.5


def test_what_is_missing(instance):
    assert script("prepare_instance.sh", "v1", "test", instance / "no.onnx", instance / "holds.vnnlib").returncode == 1
    assert script("run_instance.sh", "v2").returncode == 1


def test_a_broken_network_is_an_error(instance, tmp_path, capsys):
    """In this process: what the script calls."""
    broken, results = tmp_path / "broken.onnx", tmp_path / "results.txt"
    broken.write_bytes(b"no network")
    assert main(["verify", str(broken), str(instance / "holds.vnnlib"), "--results", str(results)]) == 2
    assert results.read_text() == "error\n" and len(capsys.readouterr().err.splitlines()) == 1


def test_results_in_words():
    nothing = Verdict("unknown", None, None, -1.0, 3, 0.1, "nothing is claimed")
    assert competition.results(nothing) == "unknown\n" and competition.results(nothing, timed_out=True) == "timeout\n"
