"""How it is timed: first call apart from later ones, CPU seconds beside wall seconds, peak memory, calibration."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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


def calibration() -> tuple[float, float]:
    """The median `(wall, CPU)` seconds of a 1024 x 1024 x 1024 float32 product: the machine's speed in this run."""
    matrix = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    jax.block_until_ready(multiply(matrix))
    return typical(lambda _: multiply(matrix), 9)


def peak_mb() -> float:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(name: str, run: Callable[[int], Any]) -> dict[str, float | str]:
    """Everything that is reported of one task.

    `compile_seconds` is the wall time of the first call beyond that of a later one, `compile_cpu_seconds` the same in
    CPU seconds; `base_mb` is what the process held before it.
    """
    calibrated = calibration()
    base = peak_mb()
    first = making(lambda: run(0))
    wall, cpu = typical(lambda k: run(k + 1))
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
    }
