"""Command line: a table of all tasks, each in a process of its own, or one task as a line of JSON."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import measure, tasks

TASKS = (
    "mlp_3x100 crown 1",
    "mlp_20x100 crown 1",
    "mlp_3x1024 ibp 64",
    "mlp_3x1024 crown_ibp 64",
    "mlp_3x1024 crown 8",
    "cnn_small ibp 64",
    "cnn_small crown_ibp 64",
    "cnn_small crown 8",
)
COLUMNS = ("wall_seconds", "cpu_seconds", "first_call_seconds", "peak_mb", "calibration_cpu_seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--task", help='"<network> <method> <batch>", such as "cnn_small crown 8"; default: a table')
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks.json"), help="where the table is kept")
    options = parser.parse_args(arguments)
    if options.task is not None:
        try:
            task = tasks.make(options.task)
        except ValueError as error:
            parser.error(str(error))
        found = measure.row(task.name, task.run)
        print(json.dumps(found) if options.json else _line(found))
        return
    print(_header())
    rows = []
    for name in TASKS:
        command = [sys.executable, "-m", "benchmarks", "--task", name, "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(rows[-1]), flush=True)
    machine = {"machine": platform.platform(), "python": platform.python_version(), "jax": jax.__version__}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**machine, "rows": rows}, indent=1))
    print(f"saved to {options.output.resolve()}")


def _header() -> str:
    return " ".join([f"{'task':24s}", *(f"{name:>24s}" for name in COLUMNS)])


def _line(found: dict) -> str:
    return " ".join([f"{found['task']:24s}", *(f"{found[name]:24.4f}" for name in COLUMNS)])


if __name__ == "__main__":
    main()
