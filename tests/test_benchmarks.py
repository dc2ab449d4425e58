"""The benchmarks run and say what they promise; how fast is measured elsewhere, never in a test."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import measure, tasks

FIELDS = {
    "cpu_seconds",
    "wall_seconds",
    "compile_seconds",
    "compile_cpu_seconds",
    *measure.STAGES,
    "programs",
    "peak_mb",
    "base_mb",
    "calibration_cpu_seconds",
}


def test_one_row_ends_with_a_line_of_json(capsys):
    command.main(["--task", "mlp_3x100 ibp 2", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) >= FIELDS
    assert all(np.isfinite(found[name]) and found[name] >= 0 for name in FIELDS)
    assert found["peak_mb"] >= found["base_mb"] > 0
    assert 0 < found["programs"] < 10


def test_every_task_of_the_table_can_be_made():
    for name in (*command.TASKS, *command.FIRST):
        if not name.startswith("trained"):
            assert tasks.make(name).name == name


def test_a_network_to_train_needs_its_data(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--task", "trained_9x200 crown 8", "--data", str(tmp_path)])
    assert "pass the folder that holds mnist/" in capsys.readouterr().err


def test_calls_of_another_library_are_made_in_turn_and_compared():
    task, asked = tasks.make("mlp_3x100 ibp 2"), []

    def other(number):
        asked.append(number)
        bounds = np.asarray(task.run(number)) - (0.25 if number == 0 else 0)
        return {"wall_seconds": 2.0 + number, "cpu_seconds": 2.0 + number, "bounds": bounds.tolist()}

    found = measure.row(task.name, task.run, other)
    assert asked == list(range(measure.REPEATS + 1))
    assert found["rival_cpu_seconds"] == 5
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert found["ratio"] == pytest.approx(5 / found["cpu_seconds"])
    assert found["gap"] == pytest.approx(0.25)


def test_a_task_is_written_for_another_process():
    arrays = tasks.make("cnn_small train_crown_ibp 3").arrays(2)
    assert arrays["images"].shape == (2, 3, 28, 28, 1)
    assert arrays["layers"] == 4
    assert [arrays[f"kernel{k}"].shape for k in range(4)] == [(4, 4, 1, 16), (4, 4, 16, 32), (3200, 100), (100, 10)]
    assert (arrays["stride0"], arrays["stride1"], arrays["method"]) == (2, 1, "train_crown_ibp")


def test_loading_is_measured_for_every_file_of_a_folder(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    ends = [[make.make_tensor_value_info(name, 1, [1, 4])] for name in "xy"]
    graph = make.make_graph([make.make_node("Relu", ["x"], ["y"])], "one", *ends)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx")
    text = "(declare-const X_0 Real) (declare-const Y_0 Real) (assert (and (<= 0 X_0) (<= X_0 1))) (assert (<= Y_0 0))"
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "prop.vnnlib").write_text(text)
    command.main(["--loading", str(tmp_path)])
    said = capsys.readouterr().out
    assert "net.onnx" in said and "prop.vnnlib" in said and "2 files" in said


@pytest.mark.parametrize("name", ["cnn_small crown", "nothing crown 8", "cnn_small guess 8", "cnn_small crown many"])
def test_an_unknown_task_names_the_known_ones(name, capsys):
    with pytest.raises(SystemExit):
        command.main(["--task", name])
    assert "cnn_medium" in capsys.readouterr().err
