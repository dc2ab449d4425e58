"""Experiments run from the command line: in seconds with --smoke, and with a clear message where something is missing."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import digits, reference, verified_accuracy

ROOT = Path(__file__).resolve().parents[1]
RADII = (0.01, 0.02)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of `python -m experiments.digits --smoke`: its folder and what it printed."""
    output = tmp_path_factory.mktemp("smoke") / "deep" / "digits"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-m", "experiments.digits", "--smoke", "--output", str(output)],
        env={**os.environ, "PYTHONPATH": path}, cwd=output.parents[1], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return output, ended.stdout


@pytest.fixture(scope="module")
def rows(smoke):
    """The rows of its CSV, with numbers where it holds numbers."""
    with open(smoke[0] / "digits.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{key: text if key in ("norm", "method") else float(text) for key, text in row.items()} for row in found]


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_writes_where_it_says(smoke):
    output, printed = smoke
    assert sorted(path.name for path in output.iterdir()) == ["digits.csv", "digits.png"]
    assert [path.name for path in output.parents[1].iterdir()] == ["deep"], "files outside of the output folder"
    assert (output / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert printed.splitlines()[-1].endswith(f"digits.csv and digits.png are in {output}")


def test_digits_prints_the_rows_it_saves(smoke, rows):
    lines = smoke[1].splitlines()
    assert lines[0].startswith("errors on 24 test images") and lines[1].split()[:3] == ["norm", "radius", "method"]
    assert len(lines) == len(rows) + 3
    for line, row in zip(lines[2:-1], rows, strict=True):
        errors = [f"{row[key]:.2%}" for key in ("clean_error", "pgd_error", "verified_error")]
        assert line.split()[:6] == [row["norm"], f"{row['radius']:g}", row["method"], *errors]


def test_digits_has_a_row_per_method_and_radius(rows):
    assert [(row["method"], row["radius"]) for row in rows] == [(m, r) for m in digits.METHODS for r in RADII]
    assert {row["norm"] for row in rows} == {"linf"}


def test_digits_errors_are_coherent(rows):
    verified = {(row["method"], row["radius"]): row["verified_error"] for row in rows}
    for row in rows:
        assert 0 <= row["clean_error"] <= row["pgd_error"] <= row["verified_error"] <= 1, row
        assert all(24 * row[key] == pytest.approx(round(24 * row[key])) for key in row if key.endswith("error")), row
        assert row["first_batch_seconds"] > 0 and row["then_milliseconds_per_image"] > 0, row
        assert row["clean_error"] == rows[0]["clean_error"], "the network is the same in every row"
    for radius in RADII:
        # With one hidden layer CROWN's relaxations are CROWN-IBP's; both keep what IBP finds where it is tighter.
        assert verified["IBP", radius] >= verified["CROWN-IBP", radius] == verified["CROWN", radius]
    for method in digits.METHODS:
        assert verified[method, RADII[0]] <= verified[method, RADII[1]]


def test_smoke_is_less_of_the_same():
    full = digits.Settings(seed=3)
    small = full.smoke()
    assert small.seed == 3 and small.epochs < full.epochs and small.test_images < full.test_images
    data = digits.load_digits(small)
    np.testing.assert_array_equal(data.test_x, digits.load_digits(full).test_x[:24])
    assert data.train_x.shape == (1437, 64) and data.train_x.min() == 0 and data.train_x.max() == 1


def test_digits_refuses_unknown_flags(capsys):
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--epoch-count", "3"])
    assert "unrecognized arguments: --epoch-count" in capsys.readouterr().err


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_missing_package_is_a_sentence():
    experiments.require("json", "csv")
    with pytest.raises(SystemExit, match=r"needs no_such_one, no_such_two: pip install 'jaxbound\[experiments\]'"):
        experiments.require("json", "no_such_one", "no_such_two")


@pytest.mark.parametrize("made", [False, True], ids=["no folder", "an empty one"])
def test_reference_says_what_it_did_not_find(tmp_path, made):
    folder = tmp_path / "arrays"
    if made:
        folder.mkdir()
    with pytest.raises(SystemExit, match=r"rival_\*\.npz"):
        reference.main([str(folder)])
