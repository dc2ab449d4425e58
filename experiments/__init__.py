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


def require_files(*paths: Path) -> None:
    """Leave with a sentence instead of a traceback where a file that the user named is missing."""
    for path in paths:
        if not path.is_file():
            where = f"no file {path.name} in {path.parent}" if path.parent.is_dir() else f"no folder {path.parent}"
            raise SystemExit(f"{path}: there is {where}")


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows with equal keys, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
