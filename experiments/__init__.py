"""Experiments: each answers one question about jaxbound and runs as `python -m experiments.<name>`."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path


def require(*modules: str) -> None:
    """Leave with a sentence instead of a traceback where an optional package is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"this experiment needs {', '.join(missing)}: pip install 'jaxbound[experiments]'")


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows with equal keys, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
