"""Command line: a table of all tasks, each in a process of its own, or one task as a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import jaxbound as jb
from benchmarks import measure, tasks

TASKS = (
    "mlp_3x100 crown 1", "mlp_20x100 crown 1", *tasks.PEERS, "mlp_3x1024 jit_crown 8", "mlp_3x1024 jit_crown_budget 8",
    "dm_large crown 1", "mlp_taper recurjac 1", "mlp_taper recurjac 32", "mlp_taper fastlip 1",
)  # fmt: skip
FIRST = (
    "cnn_small ibp 64", "cnn_small crown_ibp 64", "cnn_small crown 8", "cnn_small frown20 2", "cnn_medium ibp 16",
    "cnn_medium crown_ibp 16", "cnn_medium crown 1", "mlp_3x1024 ibp 64", "mlp_3x1024 crown_ibp 64",
    "mlp_3x1024 crown 8",
)  # fmt: skip
FIRST_COLUMNS = ("programs", "compile_seconds", "compile_cpu_seconds", *measure.STAGES, "cpu_seconds",
                 "calibration_cpu_seconds")  # fmt: skip
COLUMNS = ("wall_seconds", "cpu_seconds", "compile_seconds", "memory_mb", "calibration_cpu_seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--task", help='"<network> <method> <batch>", such as "cnn_small crown 8"; default: a table')
    parser.add_argument("--curves", action="store_true", help="the table in depth, width, batch and image size instead")
    parser.add_argument("--first", action="store_true", help="a table of what first calls take, and for what, instead")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--cache", type=Path, help="keep compiled programs there; a second run finds them")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks.json"), help="where the table is kept")
    options = parser.parse_args(arguments)
    if options.cache is not None:
        jb.compilation_cache(options.cache)
    if options.task is not None:
        try:
            task = tasks.make(options.task)
        except ValueError as error:
            parser.error(str(error))
        found = measure.row(task.name, task.run)
        print(json.dumps(found) if options.json else _line(found, options.first))
        return
    print(_header(options.first))
    rows = []
    chosen = [name for curve in tasks.CURVES.values() for name in curve] if options.curves else TASKS
    chosen = FIRST if options.first else chosen
    for name in chosen:
        command = [sys.executable, "-m", "benchmarks", "--task", name, "--json"]
        command += [] if options.cache is None else ["--cache", str(options.cache)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(rows[-1], options.first), flush=True)
    machine = {"machine": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(),
               "jax": jax.__version__}  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**machine, "rows": rows}, indent=1))
    print(f"saved to {options.output.resolve()}")


def _header(first: bool) -> str:
    names = FIRST_COLUMNS if first else [*COLUMNS, "peer_cpu", "times_faster", "at_equal_speed"]
    return " ".join([f"{'task':30s}", *(f"{name.removesuffix('_seconds'):>16s}" for name in names)])


def _line(found: dict, first: bool) -> str:
    cells = [f"{found[name]:16.4f}" for name in (FIRST_COLUMNS if first else COLUMNS)]
    peer = None if first else tasks.PEERS.get(found["task"])
    if peer is not None:
        ratio = peer.cpu_seconds / found["cpu_seconds"]
        speed = found["calibration_cpu_seconds"] / tasks.PEER_CALIBRATION
        cells += [f"{peer.cpu_seconds:16.3f}", f"{ratio:16.2f}", f"{ratio * speed:16.2f}"]
    return " ".join([f"{found['task']:30s}", *cells])


if __name__ == "__main__":
    main()
