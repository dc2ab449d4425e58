"""Tables and figures of the CROWN-IBP paper from rows of `experiments.evaluate`, one per network, method and radius.

    by_method      Table 1: one network, verified by several methods
    by_network     Tables 2 and C: standard, verified and PGD error of every network
    by_family      Table D: the networks of a family with the best, median and worst verified error
    by_repeat      Table E: mean and standard deviation over seeds
    pareto         Figure 2: verified against standard error
    schedules      Figures 3 and C to E: verified error against the length of the ramp

Each makes lines of Markdown, or a matplotlib figure, and takes the rows that it has something to say about.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments.tables import table

Row = dict[str, Any]
SETTING = ("dataset", "eps", "method", "eps_train", "trained_by", "kappa_start", "kappa_final")
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


TABLES: dict[str, tuple[Callable[[Sequence[Row]], str], str]] = {
    "by_method": (by_method, "Verified error by method of verification (Table 1)"),
    "by_network": (by_network, "Errors of each network (Tables 2 and C)"),
    "by_family": (by_family, "Best, median and worst network (Table D)"),
    "by_repeat": (by_repeat, "Mean and standard deviation over seeds (Table E)"),
}


def document(rows: Sequence[Row]) -> str:
    """All tables, each under its title."""
    return "\n\n".join(f"## {title}\n\n{make(rows)}" for make, title in TABLES.values()) + "\n"


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


def _axes(x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes
