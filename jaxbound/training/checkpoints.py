"""What survives a killed run: orbax checkpoints that are whole or not there, and a metrics file that agrees with them.

A checkpoint is a pytree of arrays under the number of the step that it stands after. Orbax writes it beside and renames
it when it is complete, so a run that is killed at any moment leaves the last complete one to continue from. Metrics are
lines of JSON that begin with a step; on restart the lines after the checkpoint's step are cut off (they will be written
again), so the file ends up as if nothing had happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbound import errors


class Checkpoints:
    """The checkpoints of one run, in a folder.

    Args:
        folder: made where it is missing.
        keep: how many of the latest stay.

    Raises:
        ImportError: orbax is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(3, {"w": np.ones(2, np.float32)})
    ...     checkpoints.latest(), checkpoints.restore({"w": np.zeros(2, np.float32)})["w"]
    (3, array([1., 1.], dtype=float32))
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:  # pragma: no cover - flax depends on it
            raise ImportError("checkpoints need orbax-checkpoint: pip install orbax-checkpoint") from error
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint, complete when this returns."""
        self._manager.save(step, args=self._ocp.args.StandardSave(_arrays(tree)), force=True)
        self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The tree of a step (the latest by default), as NumPy arrays; shapes and dtypes must be those of `like`.

        Raises:
            ArgumentError: no checkpoint, or one of another network or optimizer.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise errors.ArgumentError(f"there is no checkpoint in {self._manager.directory}")
        template = _arrays(like)
        try:
            found = self._manager.restore(step, args=self._ocp.args.StandardRestore(template))
        except (KeyError, ValueError, TypeError) as error:
            raise _of_another_run(self._manager.directory, str(error)) from error
        return jax.tree.map(_as_stored, template, found)


def _arrays(tree: Any) -> Any:
    """NumPy arrays; scalars too, which orbax would store in another way."""
    return jax.tree.map(np.asarray, tree)


def _as_stored(like: np.ndarray, found: Any) -> np.ndarray:
    array = np.asarray(found)
    if array.shape != like.shape or array.dtype != like.dtype:
        raise _of_another_run("the folder", f"{array.dtype}{array.shape} stands where {like.dtype}{like.shape} should")
    return array


def _of_another_run(where: object, why: str) -> errors.ArgumentError:
    return errors.ArgumentError(
        f"the checkpoint in {where} is of another network, optimizer or jaxbound ({why.splitlines()[0][:200]}): pass "
        "another folder, or remove this one to begin anew"
    )


class MetricsFile:
    """Lines of JSON, one per record, each with a "step".

    Args:
        path: the file.
        step: records after this step are cut off: those of a run that was killed after its last checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     MetricsFile(Path(folder) / "metrics.jsonl", 0).write({"step": 1, "loss": 0.5})
    ...     MetricsFile(Path(folder) / "metrics.jsonl", 1).records()
    [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike, step: int):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in self.records() if record["step"] <= step]
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(beside, self.path)

    def records(self) -> list[dict]:
        """All complete records; a line that a kill cut short is none."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last line's end is not complete

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record)) + "\n"
