"""What an experiment leaves behind: its rows as CSV, as a Markdown table and as a plot."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import write_csv

Columns = Mapping[str, tuple[str, str]]
"""Per key of a row the head of its column and the form of its values."""


def markdown(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """Rows as a Markdown table.

    >>> print(markdown([{"a": 1, "b": 0.5}], {"a": ("first", "{}"), "b": ("second", "{:.2f}")}))
    | first | second |
    | --- | --- |
    | 1 | 0.50 |
    """
    body = [[form.format(row[key]) for key, (_, form) in columns.items()] for row in rows]
    return table([head for head, _ in columns.values()], body)


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table of these cells."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *body))


def save(folder: Path, name: str, rows: Sequence[dict], columns: Columns, draw: Callable[[Sequence[dict], Path], None]):
    """Write `name.csv`, `name.md` and, by `draw(rows, path)`, `name.png`.

    Returns:
        The table.
    """
    write_csv(folder / f"{name}.csv", rows)
    text = markdown(rows, columns)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, folder / f"{name}.png")
    return text


@contextlib.contextmanager
def figure(path: Path, panels: int, **options: Any) -> Iterator[Sequence[Any]]:
    """Panels in a row to draw in; what was drawn is saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), squeeze=False, layout="tight", **options)
    try:
        yield list(axes[0])
        made.savefig(path, dpi=150)
    finally:
        plt.close(made)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without numbers that JSON does not have."""
    return {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
