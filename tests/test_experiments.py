"""Experiments run from the command line: in seconds with --smoke, and with a clear message where something is missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import beside, digits, reference, sequences, verified_accuracy

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


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", sequences.SETTINGS)
def test_sequences_smoke_is_coherent(model, tmp_path, capsys):
    sequences.main(["--model", model, "--smoke", "--methods", "IBP", "--output", str(tmp_path), "--radii", "1e-4"])
    printed = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{model}.csv", f"{model}.png"]
    with open(tmp_path / f"{model}.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert printed[0].startswith("accuracy on 24 test images") and printed[1].split()[:3] == [
        "method",
        "radius",
        "clean",
    ]
    assert printed[2].split()[:2] == ["IBP", "0.0001"] == [row["method"], f"{float(row['radius']):g}"]
    clean, attacked, verified = (round(24 * float(row[key])) for key in ("clean", "PGD", "verified"))
    assert 24 >= clean >= attacked >= verified >= 0


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_missing_package_is_a_sentence():
    experiments.require("json", "csv")
    with pytest.raises(SystemExit, match=r"needs no_such_one, no_such_two: pip install 'jaxbound\[experiments\]'"):
        experiments.require("json", "no_such_one", "no_such_two")


def test_reference_says_what_it_did_not_find(tmp_path):
    with pytest.raises(SystemExit, match=r"arrays: there is no such folder; pass the one with rival_\*\.npz"):
        reference.main([str(tmp_path / "arrays")])
    with pytest.raises(SystemExit, match=r"there is no rival_\*\.npz in it$"):
        reference.main([str(tmp_path)])
    (tmp_path / "rival_tanh.npz").touch()
    with pytest.raises(SystemExit, match=r"no rival_\*\.npz in it whose name contains 'relu'"):
        reference.main([str(tmp_path), "--only", "relu"])


def test_verified_accuracy_says_what_it_did_not_find(tmp_path):
    given = [
        "--network",
        str(tmp_path / "nets" / "small.npz"),
        "--images",
        str(tmp_path / "images.npz"),
        "--eps",
        "0.1",
    ]
    with pytest.raises(SystemExit, match=r"small\.npz: there is no folder .*nets$"):
        verified_accuracy.main(given)
    stored_network(tmp_path / "nets")
    with pytest.raises(SystemExit, match=r"there is no file images\.npz in "):
        verified_accuracy.main(given)
    (tmp_path / "nets" / "small.json").unlink()
    with pytest.raises(SystemExit, match=r"there is no file small\.json in .*nets$"):
        verified_accuracy.main(given)


# --- verified accuracy ------------------------------------------------------------------------------------------------


def stored_network(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write a small network and images; returns the images and the logits, computed without the library."""
    rng = np.random.default_rng(0)
    hidden, last = rng.normal(size=(9, 8)), rng.normal(size=(8, 3))
    shift = -0.5 * hidden.sum(axis=0)
    arrays = {"k0": hidden, "b0": shift, "k1": last, "b1": np.zeros(3)}
    layers = [
        {"name": "flat", "type": "flatten", "inputs": ["input"]},
        {"name": "d0", "type": "dense", "inputs": ["flat"], "kernel": "k0", "bias": "b0"},
        {"name": "r0", "type": "relu", "inputs": ["d0"]},
        {"name": "d1", "type": "dense", "inputs": ["r0"], "kernel": "k1", "bias": "b1"},
    ]
    folder.mkdir()
    np.savez(folder / "small.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    (folder / "small.json").write_text(json.dumps({"layers": layers}), encoding="utf-8")
    images = rng.integers(0, 256, size=(20, 3, 3, 1), dtype=np.uint8)
    return images, np.maximum(images.reshape(20, 9) / 255 @ hidden + shift, 0) @ last


def test_verified_accuracy_is_coherent(tmp_path, capsys):
    images, logits = stored_network(tmp_path / "nets")
    labels = logits.argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 3  # five errors
    np.savez(tmp_path / "images.npz", image=images, label=labels)
    arguments = [
        "--network", str(tmp_path / "nets" / "small"), "--images", str(tmp_path / "images.npz"), "--method", "crown_ibp",
        "--eps", "0", "0.02", "--batch-size", "8", "--attack-steps", "5", "--attack-restarts", "2",
        "--output", str(tmp_path / "out"), "--results", str(tmp_path / "partial"),
    ]  # fmt: skip
    verified_accuracy.main(arguments)
    assert "no certificate was broken by PGD" in capsys.readouterr().out
    with open(tmp_path / "out" / "small_crown_ibp_linf.csv", newline="", encoding="utf-8") as file:
        zero, small = list(csv.DictReader(file))
    assert float(zero["clean"]) == float(zero["PGD"]) == float(zero["verified"]) == 0.75
    assert float(small["clean"]) == 0.75 >= float(small["PGD"]) >= float(small["verified"]) > 0
    assert float(small["first batch s"]) > 0 and float(small["then s/image"]) > 0
    names = sorted(path.name for path in (tmp_path / "partial").iterdir())
    assert names == ["small_crown_ibp_linf_0.02.npz", "small_crown_ibp_linf_0.npz"]


# --- beside another library -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", beside.NETWORKS)
def test_networks_beside_another_library_are_the_same_on_both_sides(name):
    """The function that is bounded has the values that bounds are held against."""
    w, x = beside.weights(name, 4, 2, 0), np.random.default_rng(0).uniform(size=(2, 2 * beside.INPUTS))
    low, high = beside.ours(name, w, x, "forward", np.inf)
    values = beside.values(name, w, beside.points(x, np.inf, 50, np.random.default_rng(1)))
    assert beside.outside((low, high), values) < 1e-5 and np.max(high - low) < 30 * np.ptp(values, axis=0).max()


@pytest.mark.parametrize("norm", beside.NORMS)
def test_points_beside_another_library_are_in_the_ball(norm):
    w, x = beside.weights("leaky", 4, 2, 0), np.zeros((3, 2 * beside.INPUTS))
    for made in (beside.points(x, norm, 40, np.random.default_rng(0)), beside.steepest("leaky", w, x, norm)):
        sizes = np.linalg.norm(made, ord=norm, axis=-1)
        assert np.all(sizes <= beside.NORMS[norm] * (1 + 1e-12))


def test_another_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["beside", "--rival", str(tmp_path), "--rival-python", sys.executable])
    with pytest.raises(SystemExit, match="auto_LiRPA"):
        beside.main()
