"""The experiment on FROWN's table: one smoke run, what it writes, and the classes that it tells apart."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from experiments import frown, reference_frown

CROWN, FROWN, LP = "CROWN (adaptive)", "FROWN", "LP"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of `python -m experiments.frown --smoke`: its folder, the radii of each call and what it printed."""
    output, found, printed = tmp_path_factory.mktemp("smoke") / "deep" / "frown", {}, io.StringIO()
    radii = frown.radii

    def noted(task, method, *rest):
        found[type(method).__name__] = radii(task, method, *rest)
        return found[type(method).__name__]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(frown, "radii", noted)
        frown.main(["--smoke", "--output", str(output)])
    return output, found, printed.getvalue()


@pytest.fixture(scope="module")
def rows(smoke):
    """The rows of its CSV by method."""
    with open(smoke[0] / "frown.csv", newline="", encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_it_writes_what_it_prints(smoke, rows):
    output, _, printed = smoke
    assert sorted(path.name for path in output.iterdir()) == ["frown.csv", "frown.md", "frown.png"]
    assert (output / "frown.png").read_bytes().startswith(b"\x89PNG")
    *table, last = printed.splitlines()
    assert (output / "frown.md").read_text(encoding="utf-8").splitlines() == table and len(table) == 2 + len(rows)
    assert all(line.count("|") == table[0].count("|") for line in table)
    summary = json.loads(last)
    assert summary["targets"] == "random" and [row["method"] for row in summary["rows"]] == list(rows)


def test_every_method_has_its_row(smoke, rows):
    assert list(rows) == ["CROWN (parallel)", CROWN, FROWN, LP]
    assert (rows[FROWN]["groups"], rows[FROWN]["steps"], rows[LP]["groups"]) == ("neuron", "3", "")
    assert [row["images"] for row in rows.values()] == ["2", "2", "2", "1"]
    for row in rows.values():
        assert row["norm"] == "inf" and row["violations"] == "0"
        assert 0 < float(row["radius"]) < float(row["pgd_radius"])
        assert min(float(row[key]) for key in ("cpu_seconds", "wall_seconds", "first_call_seconds")) > 0


def test_frown_is_never_below_adaptive_crown(smoke, rows):
    """The searches share their brackets, so this holds image by image and without a tolerance."""
    found = smoke[1]
    assert len(found["Frown"]) == 2 and np.all(found["Frown"] >= found["Crown"])
    assert float(rows[FROWN]["over_adaptive_percent"]) >= 0 == float(rows[CROWN]["over_adaptive_percent"])


def test_improvements_compare_the_same_images(smoke, rows):
    found = smoke[1]
    for name, method in ((FROWN, "Frown"), (LP, "LP")):
        base = found["FastLin"][: len(found[method])].mean()
        assert float(rows[name]["radius"]) == pytest.approx(found[method].mean())
        expected = 100 * (found[method].mean() / base - 1)
        assert float(rows[name]["over_parallel_percent"]) == pytest.approx(expected, abs=1e-3)
    ratio = float(rows[LP]["cpu_seconds"]) / float(rows[FROWN]["cpu_seconds"])
    assert float(rows[FROWN]["lp_cpu_over_this"]) == pytest.approx(ratio)


def test_a_radius_that_an_attack_reaches_stops_it():
    radius = np.array([0.0, 0.1, 0.2], np.float32)
    assert frown.check(radius, np.array([0.1, 0.2, np.inf]), "CROWN") == 0
    with pytest.raises(
        jb.SoundnessError, match=r"within 2 of 3 radii certified by CROWN: image 1 has radius 0\.1, and"
    ):
        frown.check(radius, np.array([0.0, 0.1, 0.05]), "CROWN")


@pytest.mark.quick(1)
@pytest.mark.parametrize("norm", [np.inf, 2.0, 1.0])
def test_attacked_radii_are_those_of_a_linear_network(norm):
    """f_0 - f_j = w_j @ x is 0 first at the radius w_j @ x / ||w_j||_q, also from a radius beyond it."""
    w = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 1.0]], np.float32)
    task = frown.Task(
        lambda params, x: x @ jnp.concatenate([jnp.zeros((1, 3)), -params]).T, w,
        np.array([[0.5, 0.4, 0.2], [0.9, 0.6, 0.3]], np.float32), np.array([[0, 1], [0, 2]], np.int32),
    )  # fmt: skip
    dual = {np.inf: 1, 2.0: 2, 1.0: np.inf}[norm]
    exact = np.einsum("ij,ij->i", w, task.x) / np.linalg.norm(w, dual, axis=1)
    for start in (0.1, 3.0):
        found = frown.attacked_radii(task, norm, np.full(2, start, np.float32), seed=0)
        assert np.all(found >= exact * 0.999) and np.all(found <= 1.05 * exact)


def test_classes_told_apart(tmp_path):
    logits, labels = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 5.0]]), np.array([0, 3])
    np.savez(tmp_path / "images.npz", target=np.array([9, 2, 1]))

    def told(targets):
        options = argparse.Namespace(targets=targets, seed=0, images=tmp_path / "images.npz")
        return frown.told_apart(logits, labels, np.array([1, 2]), options).tolist()

    assert told("runner-up") == [[0, 1], [3, 2]] and told("least-likely") == [[0, 3], [3, 0]]
    assert told("all") == [[0, 1, 2, 3], [3, 0, 1, 2]] and told("stored") == [[0, 2], [3, 1]]
    drawn = np.array(told("random"))
    assert drawn.shape == (2, 2) and np.all(drawn[:, 0] != drawn[:, 1]) and np.all((drawn >= 0) & (drawn < 4))


def test_refusals_come_before_any_work(tmp_path, capsys):
    for arguments, text in (
        (["--images", "x.npz"], "--images need --network"),
        (["--targets", "stored"], "--targets stored needs --images"),
        (["--count", "0"], "--count and --batch-size are 1 or more"),
    ):
        with pytest.raises(SystemExit):
            frown.main(arguments)
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"there is no file net\.npz in "):
        frown.main(["--network", str(tmp_path / "net")])


def test_arrays_of_another_code_are_compared(tmp_path, capsys):
    """Margins of CROWN are reached, ones beyond the exact margin are not, and a folder without arrays says so."""
    with pytest.raises(SystemExit, match=r"there is no frown_\*\.npz"):
        reference_frown.main([str(tmp_path)])
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=shape).astype(np.float32), np.zeros(shape[1], np.float32)) for shape in ((3, 6), (6, 2))]
    x = rng.normal(size=(2, 3)).astype(np.float32)
    arrays = {f"{kind}{k}": part for k, layer in enumerate(layers) for kind, part in zip("Wb", layer, strict=True)}
    spec = jnp.array([[[1.0, -1.0]]] * 2)
    for extra, code in ((0.0, 0), (100.0, 1)):
        margins = np.asarray(jb.crown(layers, x, 0.1, spec=spec, activation="relu").lower[:, 0]) + extra
        np.savez(
            tmp_path / "frown_tiny_relu.npz", **arrays, x=x, y=np.zeros(2, int), target=np.ones(2, int),
            **{"fixed|pinf|frown|eps": 0.1, "fixed|pinf|frown|margin_lb": margins},
            **{"fixed|pinf|frown|seconds_wall_cpu": np.ones(2)},
        )  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            reference_frown.main([str(tmp_path), "--steps", "2", "--float32"])
        assert ended.value.code == code
        assert f"at least theirs {0 if code else 2}/2" in capsys.readouterr().out
