"""Tables and figures of the CROWN-IBP paper from rows of `experiments.evaluate`, one per network, method and radius.

    by_method      Table 1: one network, verified by several methods
    by_network     Tables 2 and C: standard, verified and PGD error of every network
    by_family      Table D: the networks of a family with the best, median and worst verified error
    by_repeat      Table E: mean and standard deviation over seeds
    by_split       Table F: errors on the training and the test set, with and without l1 regularisation
    by_time        Table G: seconds of training by model and way of training
    by_devices     Table H: errors of the same training on other devices
    pareto         Figure 2: verified against standard error
    schedules      Figures 3 and C to E: verified error against the length of the ramp
    norms          Figure 1: verified error and norm of the second layer while networks train
    gaps           Figure B: CROWN-IBP's bounds less IBP's while networks train

Each makes lines of Markdown, or a matplotlib figure, and takes the rows that it has something to say about; the last
two take the histories of runs, which `experiments.train` records in metrics.jsonl. Errors are those on the test set
where nothing else is said.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tables import table
from jaxbound.training import configuration
from jaxbound.training.configuration import Configuration

Row = dict[str, Any]
SCHEDULE = ("kappa_start", "kappa_final", "ramp_epochs", "epochs", "l1")
SETTING = ("dataset", "eps", "method", "eps_train", "trained_by", *SCHEDULE, "devices")
"""What networks of one group share: they are compared at one radius, verified in one way and trained in one way."""


def grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    """The rows by their values of some keys, in the order in which these come up.

    >>> grouped([{"a": 1, "b": 2}, {"a": 3, "b": 4}, {"a": 1, "b": 5}], ["a"])
    {(1,): [{'a': 1, 'b': 2}, {'a': 1, 'b': 5}], (3,): [{'a': 3, 'b': 4}]}
    """
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def percent(value: float) -> str:
    """A share, with two digits after the point.

    >>> percent(0.12345)
    '12.35%'
    """
    return f"{100 * value:.2f}%"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- tables -----------------------------------------------------------------------------------------------------------


def by_method(rows: Sequence[Row]) -> str:
    """Table 1: verified error of each network by each method; a dash where it was not evaluated."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    keys = ("dataset", "model", "seed", "trained_by", "eps_train", "eps")
    body = []
    for values, group in grouped(rows, keys).items():
        found = {row["method"]: percent(row["verified_error"]) for row in group}
        body.append([*map(_number, values), *(found.get(method, "-") for method in methods)])
    return table([*keys, *methods], body)


def by_network(rows: Sequence[Row]) -> str:
    """Tables 2 and C: errors of every network."""
    keys = (*SETTING, "model", "seed")
    body = [
        [
            *(_number(row[key]) for key in keys),
            *(percent(row[f"{kind}_error"]) for kind in ("clean", "verified", "pgd")),
        ]
        for row in rows
    ]
    return table([*keys, "standard", "verified", "PGD"], body)


def representatives(rows: Sequence[Row]) -> tuple[Row, Row, Row]:
    """The rows with the least, the median (of an even number, the lower one) and the greatest verified error."""
    order = sorted(rows, key=lambda row: row["verified_error"])
    return order[0], order[(len(order) - 1) // 2], order[-1]


def by_family(rows: Sequence[Row]) -> str:
    """Table D: the best, median and worst network of each setting, with *its* standard error."""
    body = []
    for values, group in grouped(rows, SETTING).items():
        three = representatives(group)
        errors = [percent(row[key]) for key in ("verified_error", "clean_error") for row in three]
        body.append([*map(_number, values), len(group), *errors])
    kinds = [f"{kind} {which}" for kind in ("verified", "standard") for which in ("best", "median", "worst")]
    return table([*SETTING, "networks", *kinds], body)


def by_repeat(rows: Sequence[Row]) -> str:
    """Table E: mean ± sample standard deviation over seeds, for every network that was trained more than once."""
    keys = (*SETTING, "model")
    body = []
    for values, group in grouped(rows, keys).items():
        if len(group) > 1:
            columns = [[row[key] for row in group] for key in ("clean_error", "verified_error")]
            found = [f"{100 * statistics.mean(c):.2f} ± {100 * statistics.stdev(c):.2f}%" for c in columns]
            body.append([*map(_number, values), len(group), *found])
    return table([*keys, "seeds", "standard", "verified"], body)


def by_split(rows: Sequence[Row]) -> str:
    """Table F: errors on the training and the test set, of every network that was evaluated on both."""
    keys = (*SETTING, "model", "seed")
    body = []
    for values, group in grouped(rows, keys).items():
        found = {row["split"]: row for row in group}
        if {"train", "test"} <= found.keys():
            errors = [found[split][f"{kind}_error"] for split in ("train", "test") for kind in ("clean", "verified")]
            body.append([*map(_number, values), *map(percent, errors)])
    heads = [f"{split} {kind}" for split in ("training", "test") for kind in ("standard", "verified")]
    return table([*keys, *heads], body)


def by_time(rows: Sequence[Row]) -> str:
    """Table G: wall seconds of training, a line per way of training, a column per model; the mean over seeds."""
    rows = list({tuple(row[key] for key in (*_RUN, "model", "seed")): row for row in rows}.values())
    models = list(dict.fromkeys(row["model"] for row in rows))
    body = []
    for values, group in grouped(rows, _RUN).items():
        found = {model: [row["training_seconds"] for row in group if row["model"] == model] for model in models}
        body.append([*map(_number, values), *(f"{statistics.mean(s):.0f}" if s else "-" for s in found.values())])
    return table([*_RUN, *models], body)


_RUN = ("dataset", "trained_by", "eps_train", *SCHEDULE, "devices")


def by_devices(rows: Sequence[Row]) -> str:
    """Table H: errors of the same training on other devices, of what was trained on several kinds."""
    shared = [key for key in SETTING if key != "devices"] + ["model", "seed"]
    body = []
    for values, group in grouped(rows, shared).items():
        for row in group if len({row["devices"] for row in group}) > 1 else []:
            errors = [percent(row[f"{kind}_error"]) for kind in ("clean", "verified", "pgd")]
            body.append([*map(_number, values), row["devices"], *errors])
    return table([*shared, "devices", "standard", "verified", "PGD"], body)


TABLES: dict[str, tuple[Callable[[Sequence[Row]], str], str]] = {
    "by_method": (by_method, "Verified error by method of verification (Table 1)"),
    "by_network": (by_network, "Errors of each network (Tables 2 and C)"),
    "by_family": (by_family, "Best, median and worst network (Table D)"),
    "by_repeat": (by_repeat, "Mean and standard deviation over seeds (Table E)"),
    "by_split": (by_split, "Errors on the training and the test set (Table F)"),
    "by_time": (by_time, "Seconds of training (Table G)"),
    "by_devices": (by_devices, "Errors by devices (Table H)"),
}


def tested(rows: Sequence[Row]) -> list[Row]:
    """The rows on the test set."""
    return [row for row in rows if row["split"] == "test"]


def document(rows: Sequence[Row]) -> str:
    """All tables, each under its title."""
    parts = {name: rows if name == "by_split" else tested(rows) for name in TABLES}
    return "\n\n".join(f"## {title}\n\n{make(parts[name])}" for name, (make, title) in TABLES.items()) + "\n"


# --- figures ----------------------------------------------------------------------------------------------------------


def pareto(rows: Sequence[Row]):
    """Figure 2: a point per network, a colour per way of training, a marker per final kappa."""
    figure, axes = _axes("standard error", "verified error")
    markers = dict(zip(sorted({row["kappa_final"] for row in rows}), "os^vD*", strict=False))
    for index, ((trained_by,), group) in enumerate(grouped(rows, ["trained_by"]).items()):
        for kappa, marker in markers.items():
            chosen = [row for row in group if row["kappa_final"] == kappa]
            x, y = ([row[f"{kind}_error"] for row in chosen] for kind in ("clean", "verified"))
            axes.scatter(x, y, color=f"C{index}", marker=marker, label=f"{trained_by}, final κ {kappa:g}")
    axes.legend(fontsize=8)
    return figure


def schedules(rows: Sequence[Row]):
    """Figures 3, C, D and E: medians over networks as bars, best and worst as error bars, per length of the ramp."""
    figure, axes = _axes("epochs of the ramp", "verified error")
    lengths = sorted({row["ramp_epochs"] for row in rows})
    groups = grouped(rows, ["trained_by", "kappa_start", "kappa_final"])
    width = 0.8 / len(groups)
    for index, ((trained_by, first, last), group) in enumerate(groups.items()):
        found = grouped(group, ["ramp_epochs"])
        places = [place for place, length in enumerate(lengths) if (length,) in found]
        errors = [sorted(row["verified_error"] for row in found[(lengths[place],)]) for place in places]
        middles = [statistics.median(values) for values in errors]
        ends = [
            [middle - values[0] for middle, values in zip(middles, errors, strict=True)],
            [values[-1] - middle for middle, values in zip(middles, errors, strict=True)],
        ]
        at = [place + (index - (len(groups) - 1) / 2) * width for place in places]
        axes.bar(at, middles, width, yerr=ends, capsize=3, label=f"{trained_by}, κ {first:g} to {last:g}")
    axes.set_xticks(range(len(lengths)), [f"{length:g}" for length in lengths])
    axes.legend(fontsize=8)
    return figure


FIGURES = {"pareto": pareto, "schedules": schedules}


class History(NamedTuple):
    """What a run recorded while it trained."""

    config: Configuration
    model: str
    records: list[dict[str, float]]

    @property
    def label(self) -> str:
        """How the network was trained."""
        return f"{self.model}, {self.config.method}, ε {self.config.eps:g}, seed {self.config.seed}"

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """A recorded number against the epoch, where there is one."""
        per_epoch = self.records[-1]["step"] / self.config.epochs
        points = [(record["step"] / per_epoch, record[key]) for record in self.records if key in record]
        return [epoch for epoch, _ in points], [value for _, value in points]


def history(folder: Path) -> History:
    """The history of the run in a folder."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return History(configuration.read(folder / "config.json"), folder.name, [json.loads(line) for line in lines])


def norms(histories: Sequence[History]):
    """Figure 1: verified error at the radius of the step (above), l_inf norm of the second layer's kernel (below)."""
    figure, (above, below) = _axes("epoch", "norm of the 2nd layer", rows=2)
    for each in histories:
        layers = [key for key in each.records[-1] if key.startswith("norm/")]
        above.plot(*each.curve("robust_error"), label=each.label)
        if len(layers) > 1:
            below.plot(*each.curve(layers[1]))
    above.set_ylabel("verified error in training")
    above.legend(fontsize=7)
    return figure


def gaps(histories: Sequence[History]):
    """Figure B: the mean of CROWN-IBP's lower bounds of margins less IBP's, at the radius of the step."""
    figure, axes = _axes("epoch", "CROWN-IBP's bounds less IBP's")
    for each in histories:
        axes.plot(*each.curve("gap"), label=each.label)
    axes.set_yscale("symlog")
    axes.legend(fontsize=7)
    return figure


CURVES = {"norms": norms, "gaps": gaps}


def drawn(name: str, rows: Sequence[Row], histories: Sequence[History]):
    """A figure of `FIGURES` or `CURVES`."""
    return FIGURES[name](tested(rows)) if name in FIGURES else CURVES[name](histories)


def _axes(x: str, y: str, rows: int = 1):
    """A figure and its panels, one above the other; the labels are the last one's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2 + 2 * rows), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots(rows, sharex=True)
    last = axes if rows == 1 else axes[-1]
    last.set_xlabel(x)
    last.set_ylabel(y)
    return figure, axes
