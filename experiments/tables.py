"""What an experiment leaves behind: its rows as CSV, as a Markdown table and as a plot."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

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


class Pieces:
    """Finished pieces of an experiment in a file, so that a command that was stopped goes on with the others.

    Args:
        path: of the file.
        settings: what the pieces depend on; pieces made with other settings are forgotten.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path, self._settings = path, json.loads(json.dumps(dict(settings)))
        self._found: dict[str, Any] = {}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._found = kept["pieces"] if kept["settings"] == self._settings else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """A piece: as it was kept, or made and kept; it is what JSON can hold."""
        if name not in self._found:
            self._found[name] = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"settings": self._settings, "pieces": self._found})
            partial = self._path.with_suffix(".partial")
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self._path)
        return self._found[name]


def timed(call: Callable[[np.ndarray], Any], images: int, size: int) -> tuple[list, float, float]:
    """What `call(index)` gives for batches of images, seconds per image, and seconds of a first call.

    The last batch is filled up. The first one runs twice, so that compilation is timed apart.
    """
    batches = [np.minimum(np.arange(k, k + size), images - 1) for k in range(0, images, size)]
    moments, found = [time.perf_counter()], []
    for index in (batches[0], *batches):
        found.append(jax.block_until_ready(call(index)))
        moments.append(time.perf_counter())
    return found[1:], (moments[-1] - moments[1]) / images, moments[1] - moments[0]


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
