"""Command line: a table of all tasks, each in a process of its own, or one task as a line of JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import jaxbound as jb
from benchmarks import loading, measure, tasks

TASKS = (
    "mlp_3x100 crown 1", "mlp_20x100 crown 1", *tasks.RIVALS, "mlp_3x1024 jit_crown 8", "mlp_3x1024 jit_crown_budget 8",
    "dm_large crown 1", "mlp_taper recurjac 1", "mlp_taper recurjac 32", "mlp_taper fastlip 1",
)  # fmt: skip
FIRST = (
    "cnn_small ibp 64", "cnn_small crown_ibp 64", "cnn_small crown 8", "cnn_small frown20 2", "cnn_medium ibp 16",
    "cnn_medium crown_ibp 16", "cnn_medium crown 1", "mlp_3x1024 ibp 64", "mlp_3x1024 crown_ibp 64",
    "mlp_3x1024 crown 8",
)  # fmt: skip
FIRST_COLUMNS = ("programs", "compile_seconds", "compile_cpu_seconds", *measure.STAGES, "cpu_seconds",
                 "calibration_cpu_seconds")  # fmt: skip
RIVAL_COLUMNS = ("rival_cpu_seconds", "ratio", "ratio_low", "ratio_high", "rival_first_cpu_seconds", "gap")
"""With auto_LiRPA in turn; `measure.row` says what they are."""
COLUMNS = ("wall_seconds", "cpu_seconds", "compile_seconds", "memory_mb", "calibration_cpu_seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--task", help='"<network> <method> <batch>", such as "cnn_small crown 8"; default: a table')
    parser.add_argument("--curves", action="store_true", help="the table in depth, width, batch and image size instead")
    parser.add_argument("--first", action="store_true", help="a table of what first calls take, and for what, instead")
    parser.add_argument(
        "--loading", type=Path, help="a folder of ONNX and VNN-LIB files: how long reading them takes instead"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--cache", type=Path, help="keep compiled programs there; a second run finds them")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks.json"), help="where the table is kept")
    parser.add_argument("--data", type=Path, help="where TFDS keeps MNIST, for the tasks that train a network")
    parser.add_argument("--rival", type=Path, help="a checkout of auto_LiRPA, to run in turn with the same tasks")
    parser.add_argument("--rival-python", default=sys.executable, help="a Python with PyTorch; default: this one")
    options = parser.parse_args(arguments)
    if options.cache is not None:
        jb.compilation_cache(options.cache)
    if options.loading is not None:
        found = sorted(loading.rows(options.loading), key=lambda row: row[2])
        for name, wall, cpu in found:
            print(f"{wall:8.3f} s {cpu:8.3f} CPU s  {name}")
        print(f"{len(found)} files, {sum(cpu < 1 for _, _, cpu in found)} in less than one CPU second")
        return
    if options.task is not None:
        try:
            task = tasks.make(options.task, options.data)
        except ValueError as error:
            parser.error(str(error))
        beside = options.rival is not None and options.task in tasks.RIVALS
        with _rival(options, task) if beside else contextlib.nullcontext() as rival:
            found = measure.row(task.name, task.run, rival)
        print(json.dumps(found) if options.json else _line(found, options.first))
        return
    passed = [f"--{name.replace('_', '-')}={value}" for name in ("cache", "data", "rival", "rival_python")
              if (value := getattr(options, name)) is not None]  # fmt: skip
    print(_header(options.first))
    rows = []
    chosen = [name for curve in tasks.CURVES.values() for name in curve] if options.curves else TASKS
    chosen = FIRST if options.first else chosen
    for name in chosen:
        if name.startswith("trained") and options.data is None:
            print(f"{name:30s} not measured: --data names no folder of MNIST", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks", "--task", name, "--json", *passed]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(rows[-1], options.first), flush=True)
    machine = {"machine": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(),
               "jax": jax.__version__}  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**machine, "rows": rows}, indent=1))
    print(f"saved to {options.output.resolve()}")


def _rival(options: argparse.Namespace, task: tasks.Task) -> contextlib.AbstractContextManager:
    return measure.rival(options.rival_python, options.rival, task.arrays(measure.REPEATS + 1))


def _header(first: bool) -> str:
    names = FIRST_COLUMNS if first else [*COLUMNS, *RIVAL_COLUMNS]
    return " ".join([f"{'task':30s}", *(f"{name.removesuffix('_seconds'):>16s}" for name in names)])


def _line(found: dict, first: bool) -> str:
    names = FIRST_COLUMNS if first else [*COLUMNS, *RIVAL_COLUMNS]
    cells = [f"{found[name]:16.4f}" if name in found else f"{'not measured':>16s}" for name in names]
    return " ".join([f"{found['task']:30s}", *cells])


if __name__ == "__main__":
    main()
