"""How it is timed: first call apart from later ones, CPU seconds beside wall seconds, peak memory, calibration."""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REPEATS = 5
STAGES = {
    "trace_seconds": "/jax/core/compile/jaxpr_trace_duration",
    "lower_seconds": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "xla_seconds": "/jax/core/compile/backend_compile_duration",
}
"""What JAX reports of every program that it makes, in wall seconds."""


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """`(wall, CPU)` seconds of one call, its result awaited."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - cpu


def typical(function: Callable[[int], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """The median `(wall, CPU)` seconds of several calls."""
    walls, cpus = zip(*(seconds(lambda k=k: function(k)) for k in range(repeats)), strict=True)
    return statistics.median(walls), statistics.median(cpus)


def making(function: Callable[[], Any]) -> dict[str, float]:
    """`(wall, CPU)` seconds of a first call, the number of its programs, and the wall seconds of each stage of them."""
    spent, programs = dict.fromkeys(STAGES, 0.0), 0

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal programs
        programs += event == STAGES["xla_seconds"]
        for stage in (stage for stage, name in STAGES.items() if name == event):
            spent[stage] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    wall, cpu = seconds(function)
    found = {"first_call_seconds": wall, "first_call_cpu_seconds": cpu, "programs": float(programs), **spent}
    jax.monitoring.unregister_event_duration_listener(listen)
    return found


@contextlib.contextmanager
def rival(python: str, checkout: Path, arrays: dict[str, Any]) -> Iterator[Callable[[int], dict]]:
    """auto_LiRPA on the same task, in a process that waits between calls: number of the batch -> `rival`'s answer."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.npz"
        np.savez(task, **arrays)
        command = [python, str(Path(__file__).with_name("rival.py")), str(checkout), str(task)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            asked, answers = process.stdin, process.stdout
            assert asked is not None and answers is not None

            def call(number: int) -> dict:
                print(number, file=asked, flush=True)
                for line in answers:
                    if line.startswith("{"):  # it prints other things as well
                        return json.loads(line)
                raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")

            yield call
            asked.close()


def calibration() -> tuple[float, float]:
    """The median `(wall, CPU)` seconds of a 1024 x 1024 x 1024 float32 product: the machine's speed in this run."""
    matrix = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    jax.block_until_ready(multiply(matrix))
    return typical(lambda _: multiply(matrix), 9)


def peak_mb() -> float:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(name: str, run: Callable[[int], Any], other: Callable[[int], dict] | None = None) -> dict[str, float | str]:
    """Everything that is reported of one task.

    `compile_seconds` is the wall time of the first call beyond that of a later one, `compile_cpu_seconds` the same in
    CPU seconds; `base_mb` is what the process held before it. With a rival, its calls are made in turn with these:
    `rival_...` is what they took, `ratio` its CPU seconds in ours, and `ratio_low` and `ratio_high` the same of the
    pairs of calls that were least and most in our favour; `gap` is how far the bounds of the first batch are apart, at
    most, and positive where ours is the higher one (nothing where the task has no bounds).
    """
    calibrated = calibration()
    base = peak_mb()
    first = making(lambda: run(0))
    others = [] if other is None else [other(0)]
    calls = []
    for seed in range(1, REPEATS + 1):
        calls.append(seconds(lambda seed=seed: run(seed)))
        others += [] if other is None else [other(seed)]
    wall, cpu = (statistics.median(values) for values in zip(*calls, strict=True))
    peak = peak_mb()
    return {
        "task": name,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        **first,
        "compile_seconds": max(first["first_call_seconds"] - wall, 0.0),
        "compile_cpu_seconds": max(first["first_call_cpu_seconds"] - cpu, 0.0),
        "peak_mb": peak,
        "base_mb": base,
        "memory_mb": peak - base,
        "calibration_cpu_seconds": calibrated[1],
        "calibration_wall_seconds": calibrated[0],
        **(_beside(others, [cpu for _, cpu in calls], run) if others else {}),
    }


def _beside(others: list[dict], cpus: list[float], run: Callable[[int], Any]) -> dict[str, float]:
    first, *later = (call["cpu_seconds"] for call in others)
    ratios = [theirs / ours for theirs, ours in zip(later, cpus, strict=True)]
    typical_cpu = statistics.median(later)
    theirs = np.asarray(others[0]["bounds"])
    gap = np.asarray(run(0)) - theirs if theirs.size else theirs
    return {
        "rival_cpu_seconds": typical_cpu,
        "rival_wall_seconds": statistics.median(call["wall_seconds"] for call in others[1:]),
        "rival_first_cpu_seconds": max(first - typical_cpu, 0.0),
        "ratio": typical_cpu / statistics.median(cpus),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "gap": float(gap.flat[np.argmax(np.abs(gap))]) if gap.size else 0.0,
    }
