"""The experiment on tightness: one smoke run and what it writes."""

from __future__ import annotations

import contextlib
import csv
import io
import json

import pytest

from experiments import tightness


@pytest.mark.slow
def test_a_smoke_run_says_what_it_saves(tmp_path):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        tightness.main(["--smoke", "--output", str(tmp_path / "deep")])
    assert not ended.value.code
    summary = json.loads(printed.getvalue().splitlines()[-1])
    assert summary["rows"] == 400 and summary["looser"] == 0
    with open(tmp_path / "deep" / "tightness_crown.csv", newline="", encoding="utf-8") as file:
        (crown,) = csv.DictReader(file)
    assert (crown["activation"], crown["norm"], crown["rows"]) == ("relu", "inf", "400")
    assert 0 < float(crown["width_over_crown"]) < 1
    with open(tmp_path / "deep" / "tightness_lp.csv", newline="", encoding="utf-8") as file:
        (program,) = csv.DictReader(file)
    assert float(program["crown_mean"]) <= float(program["fixed_mean"]) <= float(program["lp_mean"]) + 1e-4


def test_looser_bounds_end_it_with_an_error(tmp_path, monkeypatch):
    row = {"activation": "relu", "norm": "inf", "rows": 2, "looser": 1, "width_over_crown": 1.0}
    monkeypatch.setattr(tightness, "against_crown", lambda options: [row])
    with pytest.raises(SystemExit) as ended:
        tightness.main(["--parts", "crown", "--output", str(tmp_path)])
    assert ended.value.code == 1


def test_what_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tightness.main(["--rows", "0", "--output", str(tmp_path)])
    assert "--rows and --count are 1 or more" in capsys.readouterr().err
