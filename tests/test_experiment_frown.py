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
from experiments import frown, frown_figures, frown_networks, reference_frown, tables

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


# --- lists of networks ------------------------------------------------------------------------------------------------


def test_names_say_what_is_trained(capsys):
    assert str(frown_networks.read("mnist:20x100:sigmoid")) == "mnist:20x100:sigmoid"
    for wrong in ("mnist:5x20", "mnst:5x20:relu", "mnist:0x20:relu", "mnist:5x20:rely"):
        with pytest.raises(SystemExit):
            frown.main(["--networks", wrong])
        assert "no DATA:LAYERSxWIDTH:ACTIVATION" in capsys.readouterr().err, "before anything is loaded"
    with pytest.raises(SystemExit):
        frown.main(["--networks", "wine:2x4:relu", "--table", "3"])
    assert "exclude each other" in capsys.readouterr().err


def test_the_papers_lists(tmp_path):
    """Table 3: six networks on a table in one norm, eight each on two sets of images in three. Table 4: six."""
    assert len(frown_networks.TABLE_3) == 22 and sum(map(len, frown_networks.TABLE_3.values())) == 54
    listed = frown.wanted(frown.parse(["--table", "4", "--data_dir", str(tmp_path)]))
    assert all(name.startswith("noise:") and norms == (1.0, 2.0, np.inf) for name, norms in listed.items())
    for name in (*listed, *frown_networks.TABLE_3):
        assert str(frown_networks.read(name)) == name
    assert next(iter(frown_networks.table_4(True))) == "cifar10:4x2048:relu"


@pytest.mark.parametrize("name", [*frown_networks.TABLES, "noise"])
def test_data_without_files(name):
    given = frown_networks.dataset(name, None)
    x = given.images(given.train.x)
    assert x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1 and given.train.labels.max() == given.classes - 1
    assert x.shape[1:] == given.shape == given.test.x.shape[1:] and len(given.test) >= 30
    assert (given.shape == (32, 32, 3)) == (name == "noise")


def test_a_list_is_trained_measured_and_gone_on_with(tmp_path, capsys, monkeypatch):
    flags = ["--smoke", "--output", str(tmp_path), "--networks", "wine:2x4:relu", "breast_cancer:2x5:sigmoid"]
    done, measure = [], frown.measure

    def stopped(task, norm, options, network):
        if done:
            raise KeyboardInterrupt
        done.append(network)
        return measure(task, norm, options, network)

    monkeypatch.setattr(frown, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        frown.main([*flags, "--lp_width", "4"])
    monkeypatch.setattr(frown, "measure", lambda task, norm, options, network: (
        done.append(network) or measure(task, norm, options, network)))  # fmt: skip
    frown.main([*flags, "--lp_width", "4"])
    assert done == ["wine:2x4:relu", "breast_cancer:2x5:sigmoid"], "each of them once"
    with open(tmp_path / "frown.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["method"]) for row in rows if row["method"] in (FROWN, LP)] == [
        ("wine:2x4:relu", FROWN), ("wine:2x4:relu", LP), ("breast_cancer:2x5:sigmoid", FROWN),
    ]  # fmt: skip
    assert all(0 < float(row["radius"]) < float(row["pgd_radius"]) for row in rows)
    assert (tmp_path / "frown.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "networks").glob("*.npz"))) == 2
    capsys.readouterr()
    frown.main([*flags, "--lp_width", "4"])
    assert len(done) == 2 and len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == len(rows)


def test_pieces_of_other_settings_are_forgotten(tmp_path):
    path = tmp_path / "deep" / "pieces.json"
    assert tables.Pieces(path, {"a": (1, 2)}).get("x", lambda: [1]) == [1]
    assert tables.Pieces(path, {"a": (1, 2)}).get("x", lambda: pytest.fail("kept")) == [1]
    assert tables.Pieces(path, {"a": (1, 3)}).get("x", lambda: [2]) == [2]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_lines_of_the_figures_hold_and_differ(tmp_path, capsys):
    frown_figures.main(["--steps", "5", "--output", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert found["tighter_than_crown"] > 0.01
    assert max(len({round(slope, 3) for slope in own}) for own in found["slopes"]) > 1, "each bound has its own"
    assert all(0 <= slope <= 1 for own in found["slopes"] for slope in own)
    for name, (function, low, high) in frown_figures.INTERVALS.items():
        lines, z = frown_figures.lower_lines(function, low, high), np.linspace(low, high, 201)
        heights = [slope * z + start for slope, start in lines]
        assert np.all(heights <= np.asarray(function(z)) + 1e-6), name
        assert np.all(np.diff([slope for slope, _ in lines]) > 0.01), "from the flattest to the steepest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure_1.png", "figure_2.png"]
