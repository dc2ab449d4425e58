"""Tables for people, JSON for machines, and progress on the standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


def show(as_json: bool, found: dict[str, Any], text: str) -> None:
    """Print what was found: all of it as one JSON object, or the text."""
    print(json.dumps(plain(found)) if as_json else text, flush=True)


def plain(value: Any) -> Any:
    """A value as JSON has it; numbers that are not finite become strings.

    >>> plain({"a": np.array([1.5, np.inf]), "b": (np.int64(3), None, True)})
    {'a': [1.5, 'inf'], 'b': [3, None, True]}
    """
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "dtype"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns that are flush right.

    >>> print(table(["a", "long"], [[1, 0.25], [22, 1e-9]]))
     a   long
     1   0.25
    22  1e-09
    """
    cells = [list(head), *([f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def counted(number: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "domain"), counted(2, "domain")
    ('1 domain', '2 domains')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def progress(wanted: bool, title: str, total: int | None, unit: str = "example") -> Iterator[Callable[..., object]]:
    """A bar that is told how many more are done, and what to say; nothing where it is not wanted or tqdm is missing."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        wanted = False
    if not wanted:
        yield lambda more, said="": None
        return
    with tqdm(total=total, desc=title, unit=unit, file=sys.stderr) as bar:

        def advance(more: int, said: str = "") -> None:
            if said:
                bar.set_postfix_str(said, refresh=False)
            bar.update(more)

        yield advance


def save_figure(drawn: Any, path: str) -> None:
    """Write a figure, or the figure of axes, to a file."""
    getattr(drawn, "figure", drawn).savefig(path, dpi=150)
