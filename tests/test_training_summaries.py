"""What runs show and leave behind: the progress bar, TensorBoard events, tables and figures, against hand-made numbers."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from experiments import summaries
from jaxbound.training import progress

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
