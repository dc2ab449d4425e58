"""What runs show and leave behind: the progress bar, TensorBoard events, tables and figures, against hand-made numbers."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest

import jaxbound as jb
from experiments import crown_ibp_paper, step_time, summaries
from jaxbound.training import configuration, data, evaluation, progress, runs

RECORD = {"step": 3, "loss": 0.51234, "clean_error": 0.25, "validation_error": 0.2, "validation_pgd_error": 0.3,
          "verified_error": 0.4, "eps": 0.1, "kappa": 0.5, "beta": 0.25}  # fmt: skip


def test_the_bar_shows_loss_errors_and_schedules(capsys):
    expected = "loss 0.5123, clean 0.2, pgd 0.3, verified 0.4, eps 0.1, kappa 0.5, beta 0.25"
    assert progress.shown(RECORD) == expected
    assert progress.shown({"loss": 1.0, "clean_error": 0.25}) == "loss 1, clean 0.25"
    bar = progress.Bar("name", 10)
    bar.show(RECORD)
    bar.close()
    printed = capsys.readouterr()
    assert expected in printed.err and "3/10" in printed.err and not printed.out


# --- events -----------------------------------------------------------------------------------------------------------


def scalars(folder) -> list[tuple[int, str, float]]:
    """Every scalar of the one event file: records are length, check sum, bytes, check sum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = (folder / "events").iterdir()
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    return found


def test_events_render_the_records_over_a_restart(tmp_path):
    pytest.importorskip("tensorboardX")
    records = [{"step": step, "loss": 1 / step, "eps": 0.1} for step in (5, 10, 15)]

    def run(written, shown):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
        events = progress.Events(tmp_path)
        events.show(shown)
        return events

    run(records[:2], records[1]).close()  # then a kill: the second record is cut off, and comes again
    events = run(records[:2], records[1])
    events.show(records[2])
    events.close()
    found = scalars(tmp_path)
    assert [(step, tag) for step, tag, _ in found] == [(s, tag) for s in (5, 10, 15) for tag in ("loss", "eps")]
    np.testing.assert_allclose([value for _, tag, value in found if tag == "loss"], [1 / 5, 1 / 10, 1 / 15], rtol=1e-6)


# --- tables and figures -----------------------------------------------------------------------------------------------


def row(verified, **changes):
    return {"name": "n", "dataset": "mnist", "model": "A", "seed": 0, "kappa_start": 1.0, "kappa_final": 0.0,
            "ramp_epochs": 10.0, "epochs": 20.0, "l1": 0.0, "devices": "1 cpu", "split": "test",
            "training_seconds": 60.0, "trained_by": "ibp", "eps_train": 0.3, "method": "ibp", "eps": 0.3,
            "clean_error": verified / 2, "pgd_error": 0.75 * verified, "verified_error": verified, "seconds": 1.0,
            **changes}  # fmt: skip


def cells(text: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [lines[0], *lines[2:]]


def test_table_by_method():
    rows = [row(0.1), row(0.9, method="crown_alone"), row(0.05, eps=0.1)]
    head, *body = cells(summaries.by_method(rows))
    assert head[-3:] == ["eps", "ibp", "crown_alone"]
    assert [line[-3:] for line in body] == [["0.3", "10.00%", "90.00%"], ["0.1", "5.00%", "-"]]


def test_table_by_network():
    head, line = cells(summaries.by_network([row(0.2)]))
    assert head[-3:] == ["standard", "verified", "PGD"] and line[-3:] == ["10.00%", "20.00%", "15.00%"]


def test_table_by_family():
    """Of an even number the lower median; the standard errors are those of the three chosen networks."""
    rows = [
        row(v, model=m, clean_error=c)
        for v, m, c in ((0.4, "A", 0.1), (0.1, "B", 0.4), (0.2, "C", 0.3), (0.3, "D", 0.2))
    ]
    rows.append(row(0.6, trained_by="crown_ibp"))
    _, one, other = cells(summaries.by_family(rows))
    assert one[-7:] == ["4", "10.00%", "20.00%", "40.00%", "40.00%", "30.00%", "10.00%"]
    assert other[-7:] == ["1", "60.00%", "60.00%", "60.00%", "30.00%", "30.00%", "30.00%"]


def test_table_by_repeat():
    rows = [row(0.1, seed=0), row(0.2, seed=1), row(0.5, model="B")]
    _, *body = cells(summaries.by_repeat(rows))
    assert len(body) == 1 and body[0][-3:] == ["2", "7.50 ± 3.54%", "15.00 ± 7.07%"]
    assert all(f"## {title}" in summaries.document(rows) for _, title in summaries.TABLES.values())


def test_figure_of_schedules():
    rows = [row(v, ramp_epochs=e) for v, e in ((0.5, 10.0), (0.3, 10.0), (0.1, 10.0), (0.2, 60.0))]
    rows.append(row(0.05, trained_by="crown_ibp", ramp_epochs=60.0))
    axes = summaries.schedules(rows).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.3, 0.2, 0.05]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "60"]
    np.testing.assert_allclose(np.asarray(axes.collections[0].get_segments()[0])[:, 1], [0.1, 0.5])


def test_figure_of_the_front():
    rows = [row(0.4), row(0.5, kappa_final=0.5), row(0.3, trained_by="crown_ibp")]
    axes = summaries.pareto(rows).axes[0]
    points = np.concatenate([np.asarray(drawn.get_offsets()) for drawn in axes.collections])
    assert sorted(map(tuple, points.tolist())) == [(0.15, 0.3), (0.2, 0.4), (0.25, 0.5)]


def test_table_by_split():
    """Table F has what was evaluated on both splits, in its order."""
    both = [row(0.2, split="train", l1=5e-5), row(0.4, l1=5e-5)]
    _, line = cells(summaries.by_split([*both, row(0.3)]))
    assert line[-4:] == ["10.00%", "20.00%", "20.00%", "40.00%"] and "5e-05" in line
    assert "30.00%" in summaries.document([*both, row(0.3)]).split("(Table D)")[1], "other tables show the test set"
    assert summaries.tested([*both, row(0.3)]) == [both[1], row(0.3)]


def test_table_by_time():
    rows = [row(0.1, training_seconds=40.0), row(0.2, training_seconds=60.0, seed=1), row(0.3, model="B")]
    rows.append(row(0.3, method="best", training_seconds=40.0))  # evaluated twice, trained once
    head, *body = cells(summaries.by_time(rows))
    assert head[-2:] == ["A", "B"] and [line[-2:] for line in body] == [["50", "60"]]


def test_table_of_seconds_per_step():
    """Table G by steps has the polytope's projections."""
    losses = ("ibp", "convex_polytope_10", "convex_polytope_50")
    assert set(losses) < set(step_time.LOSSES)
    rows = [{"task": f"{m} {loss} mnist 256", "wall_seconds": k} for k, loss in enumerate(losses) for m in "AB"]
    head, *body = cells(step_time.by_loss(rows))
    assert head == ["model", "data", "batch", *losses]
    assert body == [[m, "mnist", "256", "0.000", "1.000", "2.000"] for m in "AB"]


def test_table_by_devices():
    rows = [row(0.1), row(0.2, devices="4 gpu"), row(0.3, model="B")]
    head, *body = cells(summaries.by_devices(rows))
    assert head[-4:] == ["devices", "standard", "verified", "PGD"]
    assert [line[-4:] for line in body] == [
        ["1 cpu", "5.00%", "10.00%", "7.50%"],
        ["4 gpu", "10.00%", "20.00%", "15.00%"],
    ]


def test_curves_of_training(tmp_path):
    """Against the epoch; a run that recorded no gap has none."""
    records = [{"step": k, "robust_error": 1 / k, "norm/Conv_0": 9.0, "norm/Conv_1": 2.0 * k} for k in (10, 20)]
    records[1]["gap"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.json").write_text(configuration.Configuration(epochs=4.0).to_json())
    history = summaries.history(tmp_path)
    above, below = summaries.drawn("norms", [], [history]).axes
    assert above.lines[0].get_xydata().tolist() == [[2.0, 0.1], [4.0, 0.05]]
    assert below.lines[0].get_xydata().tolist() == [[2.0, 20.0], [4.0, 40.0]]
    (gaps,) = summaries.drawn("gaps", [], [history]).axes
    assert gaps.lines[0].get_xydata().tolist() == [[4.0, 0.5]]


def test_what_training_measures():
    """Norms are those of the matrices; the gap is the mean difference of bounds at the radius of the step."""
    config = configuration.Configuration(hidden=(5,), batch_size=64, ramp_start=0.0, ramp_epochs=1.0, norm="inf")
    digits = data.load("digits")
    _, step, state = runs.pieces(config, "mlp", digits, data.Sampler(len(digits.train), 64))
    measure = evaluation.measure_of(config, state.apply_fn, digits, data.Examples(digits.train.x[:9], digits.train.labels[:9]),
                                    step.schedules.epsilon)  # fmt: skip
    at_first = measure(state)
    kernels = {f"norm/{name}": np.abs(layer["kernel"]).sum(axis=0).max() for name, layer in state.params.items()}
    assert at_first == pytest.approx(kernels) and list(at_first) == ["norm/Dense_0", "norm/Dense_1"]
    later = state.replace(step=np.int32(12))
    x, labels = digits.images(digits.train.x[:9]), digits.train.labels[:9]
    bounds = [
        jb.margins({"params": state.params}, x, labels, step.schedules.epsilon(12), method=method, clip=(0.0, 1.0),
                   apply_fn=state.apply_fn)
        for method in (jb.CrownIBP(intersect=False), jb.IBP())
    ]  # fmt: skip
    assert measure(later)["gap"] == pytest.approx(float(np.mean(bounds[0] - bounds[1])), rel=1e-5)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4))
    assert evaluation.layer_norms({"Conv_0": {"kernel": kernel}})["norm/Conv_0"] == pytest.approx(
        max(np.abs(kernel[..., k]).sum() for k in range(4))
    )


# --- the paper in small -----------------------------------------------------------------------------------------------


def test_the_plan_has_what_every_table_and_figure_needs():
    plans = crown_ibp_paper.planned(crown_ibp_paper.parse([]))
    configs = [plan.config for plan in plans]
    assert len({(c.name, c.models) for c in configs}) == len(plans) and all(len(c.models) == 1 for c in configs)
    assert {plan.devices for plan in plans} == {1, 2, 4} and {c.l1 for c in configs} == {0.0, 5e-5}
    assert {c.method for c in configs} == {"ibp", "crown_ibp_alone", "convex_polytope_50"}
    assert len({c.ramp_epochs for c in configs}) == 3 and len({(c.kappa_start, c.kappa_final) for c in configs}) == 3
    assert {c.seed for c in configs} == {0, 1} and {c.models[0] for c in configs} == {"A", "mlp"}
    with pytest.raises(SystemExit):
        crown_ibp_paper.parse(["--batch_size", "6"])


def test_the_command_makes_tables_and_figures_and_goes_on(tmp_path, capsys, monkeypatch):
    """Two of its runs, twice: the second time nothing is trained or evaluated."""
    every = crown_ibp_paper.planned
    few = lambda options: [plan for plan in every(options) if plan.config.name in ("IBP-kappa-1-0", "l1-0")]  # noqa: E731
    monkeypatch.setattr(
        crown_ibp_paper, "planned", lambda options: [dataclasses.replace(p, devices=8) for p in few(options)]
    )
    monkeypatch.setattr(crown_ibp_paper, "compilation_cache", lambda folder: None)
    arguments = ["--smoke", "--output", str(tmp_path)]
    crown_ibp_paper.main(arguments)
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [row["split"] for row in rows] == ["test"] * 8 + ["train", "test"]
    assert all(row["devices"] == "8 cpu" and row["pgd_error"] <= row["verified_error"] for row in rows)
    assert (tmp_path / "tables.md").read_text(encoding="utf-8").count("## ") == len(summaries.TABLES)
    for name in ("pareto", "schedules", "norms", "gaps"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("train_model", "apply_of"):
        monkeypatch.setattr(runs, name, lambda *_, **__: pytest.fail("again"))
    crown_ibp_paper.main(arguments)
    assert capsys.readouterr().out == printed
