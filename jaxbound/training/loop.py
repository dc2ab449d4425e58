"""The loop around a step: run, look, save; start again where the last checkpoint stands.

After every `interval` steps, and after the last one, the host looks at what happened, in this order:

    1. every step's metrics, and the parameters, must be finite; if not, `NonFiniteError` names the step, and nothing
       is written: the last checkpoint and the best parameters stay as they were;
    2. the parameters are evaluated, and kept as the best if their verified error is the least so far, from the step
       `select_from` on (the end of the ramp: before it every error is one at a smaller radius);
    3. a record goes to metrics.jsonl, then the checkpoint.

A batch is a function of its step, chance is a key folded with the step, and a checkpoint holds the whole state. So a
run that was killed and started again ends with the same bits and the same records as one that was not.

Under several processes (`jax.distributed`) every process calls `fit` with its own part of each batch and with a folder
that all of them see. All of them hold the whole state, evaluate it and choose alike; the first one alone writes records
and reports, and orbax writes one checkpoint for all.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbound import errors
from jaxbound.training.checkpoints import Checkpoints, MetricsFile
from jaxbound.training.step import (
    Batch,
    Metrics,
    Step,
    TrainState,
    everywhere,
    pmapped,
    replicate,
    sharded,
    split,
    spread,
    unreplicate,
    variables_of,
)

PARALLEL = ("jit", "pmap")


class NonFiniteError(errors.JaxboundError, ArithmeticError):
    """Training met a NaN or an infinity; `step` is the step whose loss, or after which a parameter, is not finite."""

    def __init__(self, step: int, what: str):
        super().__init__(
            f"{what} at step {step} is not finite; nothing was written after the last checkpoint. Lower the learning "
            "rate, lengthen the ramp, or clip the gradients (config.clip_norm)"
        )
        self.step = step


@dataclass(frozen=True)
class Run:
    """How long to run, and when to look.

    Args:
        steps: how many, from the first one on.
        interval: steps between two looks: records, evaluations and checkpoints.
        select_from: the first step after which the best parameters are kept; None to keep the last ones.
        parallel: "jit" (sharded over all devices) or "pmap".

    Raises:
        ArgumentError: no steps, no interval, or another word for `parallel`.

    >>> Run(steps=100, interval=30).stops(0)
    [30, 60, 90, 100]
    """

    steps: int
    interval: int
    select_from: int | None = None
    parallel: str = "jit"

    def __post_init__(self):
        if self.parallel not in PARALLEL:
            raise errors.unknown_option("parallel", self.parallel, PARALLEL)
        for name in ("steps", "interval"):
            if getattr(self, name) < 1:
                raise errors.argument(name, f"is {getattr(self, name)}", "pass at least 1")

    def stops(self, first: int) -> list[int]:
        """The steps after which the host looks, beyond `first`."""
        regular = range((first // self.interval + 1) * self.interval, self.steps, self.interval)
        return [*regular, self.steps] if first < self.steps else []


class Result(NamedTuple):
    """What a run ended with: the variables to use, the last state, and the wall time of all its parts."""

    variables: dict
    state: TrainState
    best_step: int
    seconds: float


class _Kept(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    best: dict
    best_error: Any
    best_step: Any
    seconds: Any


def fit(
    step: Step,
    state: TrainState,
    batch_at: Callable[[int], Batch],
    run: Run,
    folder: str | Path,
    *,
    evaluate: Callable[[dict], dict] | None = None,
    measure: Callable[[TrainState], dict] | None = None,
    report: Callable[[dict], None] | None = None,
) -> Result:
    """Train, from the folder's last checkpoint if there is one.

    Args:
        step: what one step does.
        state: a fresh state; a checkpoint's takes its place.
        batch_at: the batch of a step (this process's part).
        run: how long, and when to look.
        folder: for `checkpoints/` and `metrics.jsonl`.
        evaluate: variables -> numbers, of which "verified_error" chooses the best; called at every look.
        measure: state -> more numbers for the record, which choose nothing; called at every look.
        report: called with every record, for a progress bar; by the first of several processes alone.

    Returns:
        A `Result`; its variables are the best ones if `run.select_from` is set and `evaluate` is given, else the last.

    Raises:
        NonFiniteError: with the step.
        ArgumentError: a checkpoint of another network, or of a longer run; inputs outside the clip box of the term.

    Rounding: the same bits as without interruption, on the same machine and number of devices.
    """
    folder = Path(folder)
    kept = _Kept(state, variables_of(state), np.float64(np.inf), np.int64(-1), np.float64(0))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        first = checkpoints.latest() or 0
        if first > run.steps:
            raise errors.argument("steps", f"is {run.steps}, but {folder} stands at {first}", "pass another folder")
        if first:
            kept = _unnamed(kept, checkpoints.restore(_named(kept)))
        leads = jax.process_index() == 0
        metrics_file = MetricsFile(folder / "metrics.jsonl", first) if leads else None
        devices = _Devices(step, run.parallel)
        placed, started, before = devices.place(kept.state), time.perf_counter(), float(kept.seconds)
        for stop in run.stops(first):
            history = []
            for number, phase in zip(range(first, stop), step.phases(first, stop), strict=True):
                batch = batch_at(number)
                _check_inside(batch, step, number)
                placed, metrics = devices.run(placed, batch, phase)
                history.append(metrics)
            now = devices.take(placed)
            record = _checked(devices.history(history), now, first)
            found = {} if evaluate is None else evaluate(variables_of(now))
            kept = _better(kept._replace(state=now), found, stop, run)
            record = {"step": stop, **record, **found, **({} if measure is None else measure(now))}
            if metrics_file is not None:
                metrics_file.write(record)
            seconds = before + time.perf_counter() - started
            checkpoints.save(stop, _named(kept._replace(seconds=np.float64(seconds))))
            kept, first = kept._replace(seconds=np.float64(seconds)), stop
            if report is not None and leads:
                report(record)
    chosen = kept.best if kept.best_step >= 0 else variables_of(kept.state)
    return Result(chosen, kept.state, int(kept.best_step), float(kept.seconds))


def restore(state: TrainState, folder: str | Path) -> Result:
    """What a run in this folder has reached, without running.

    Args:
        state: a fresh state of the same network and optimizer.
        folder: as given to `fit`.

    Raises:
        ArgumentError: no checkpoint there, or one of another network.
    """
    folder = Path(folder)
    if not (folder / "checkpoints").is_dir():
        raise errors.ArgumentError(f"there is no training run in {folder}")
    kept = _Kept(state, variables_of(state), np.float64(np.inf), np.int64(-1), np.float64(0))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        kept = _unnamed(kept, checkpoints.restore(_named(kept)))
    chosen = kept.best if kept.best_step >= 0 else variables_of(kept.state)
    return Result(chosen, kept.state, int(kept.best_step), float(kept.seconds))


class _Devices:
    """One of the two ways to run a step on all devices; its phases are compiled as they come."""

    def __init__(self, step: Step, parallel: str):
        self.pmap = parallel == "pmap"
        over = pmapped if self.pmap else sharded
        self.step = functools.cache(lambda phase: over(dataclasses.replace(step, phase=phase)))

    def place(self, state: TrainState):
        # A step reuses the memory of the state that it is given, which the caller may still hold.
        return replicate(jax.tree.map(np.array, state)) if self.pmap else everywhere(state)

    def run(self, state: TrainState, batch: Batch, phase: str):
        batch = split(batch, jax.local_device_count()) if self.pmap else spread(batch)
        return self.step(phase)(state, batch)

    def take(self, state: TrainState) -> TrainState:
        return jax.tree.map(np.array, unreplicate(state) if self.pmap else state)

    def history(self, history: list[Metrics]) -> dict[str, np.ndarray]:
        """All steps' metrics, one array each."""
        found = jax.device_get(history)
        columns = (np.asarray([np.ravel(value)[0] for value in column]) for column in zip(*found, strict=True))
        return dict(zip(Metrics._fields, columns, strict=True))


def _check_inside(batch: Batch, step: Step, number: int) -> None:
    """Inputs outside the clip box have empty regions, of which no loss is finite."""
    term = getattr(step.objective.term, "attack", step.objective.term)
    clip = getattr(term, "clip", None)
    x = np.asarray(batch.x)[np.asarray(batch.weight) > 0]
    if clip is not None and not np.all((x >= np.asarray(clip[0])) & (x <= np.asarray(clip[1]))):
        raise errors.argument(
            "x", f"of step {number} reaches from {x.min():.4g} to {x.max():.4g}, outside the clip box {clip}",
            "scale the inputs into it, or give the robust term another clip",
        )  # fmt: skip


def _checked(history: dict[str, np.ndarray], state: TrainState, first: int) -> dict:
    """The record of an interval: means over its steps, and where its schedules ended."""
    finite = np.asarray(np.isfinite(np.stack(list(history.values()))).all(axis=0))
    if not finite.all():
        raise NonFiniteError(first + int(np.argmin(finite)), "the loss")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables_of(state))):
        raise NonFiniteError(first + len(finite) - 1, "a parameter after the update")
    last = ("eps", "kappa", "beta")
    return {
        name: float(values[-1] if name in last else np.mean(values, dtype=np.float64))
        for name, values in history.items()
    }


def _better(kept: _Kept, found: dict, step: int, run: Run) -> _Kept:
    """With the state's variables as the best ones, if they are."""
    if run.select_from is None or step < run.select_from or "verified_error" not in found:
        return kept
    error = np.float64(found["verified_error"])
    if not error < kept.best_error:
        return kept
    return kept._replace(best=variables_of(kept.state), best_error=error, best_step=np.int64(step))


def _named(tree: Any) -> dict[str, np.ndarray]:
    """A flat dict of arrays, by their paths: what checkpoints hold does not depend on how containers are written."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def _unnamed(like: Any, named: dict[str, np.ndarray]):
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), [named[path] for path in paths])
