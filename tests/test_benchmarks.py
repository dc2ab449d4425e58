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
        assert tasks.make(name).name == name


@pytest.mark.parametrize("name", ["cnn_small crown", "nothing crown 8", "cnn_small guess 8", "cnn_small crown many"])
def test_an_unknown_task_names_the_known_ones(name, capsys):
    with pytest.raises(SystemExit):
        command.main(["--task", name])
    assert "cnn_medium" in capsys.readouterr().err
