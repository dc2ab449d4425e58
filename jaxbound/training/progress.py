"""What a training run shows while it runs: a progress bar, and TensorBoard events.

Both show the records of `metrics.jsonl`, after every look. The events are a rendering of that file: the first look of a
process writes all of its records again, into a fresh event file, so they agree with it however often a run was killed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path

SHOWN = {
    "loss": ("loss",),
    "clean": ("validation_error", "watched_error", "clean_error"),
    "pgd": ("validation_pgd_error", "watched_pgd_error"),
    "verified": ("verified_error", "watched_verified_error"),
    "eps": ("eps",),
    "kappa": ("kappa",),
    "beta": ("beta",),
}
"""What the bar calls a number, and where a record has it: the first of these keys that is there."""


def shown(record: Mapping[str, float]) -> str:
    """A record in a line.

    >>> shown({"step": 3, "loss": 0.51234, "clean_error": 0.25, "eps": 0.1})
    'loss 0.5123, clean 0.25, eps 0.1'
    """
    found = {name: next((record[key] for key in keys if key in record), None) for name, keys in SHOWN.items()}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if value is not None)


class Bar:
    """A progress bar on standard error with what the last look found."""

    def __init__(self, name: str, total: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=f"{name} (compiling)", unit="step", file=sys.stderr)
        self._name = name

    def show(self, record: Mapping[str, float]) -> None:
        """Move to the record's step."""
        self._bar.set_description(self._name)
        self._bar.set_postfix_str(shown(record))
        self._bar.update(int(record["step"]) - self._bar.n)

    def close(self) -> None:
        """End its line."""
        self._bar.close()


class Events:
    """TensorBoard's scalars of a run, in the folder `events` beside its `metrics.jsonl`; nothing without tensorboardX.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer = None

    def show(self, record: Mapping[str, float]) -> None:
        """Write a record, after all before it if it is this process's first."""
        if importlib.util.find_spec("tensorboardX") is None:
            return
        if self._writer is not None:
            return self._write(record)
        from tensorboardX import SummaryWriter

        place = self._folder / "events"
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(place))
        for line in (self._folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            self._write(json.loads(line))

    def _write(self, record: Mapping[str, float]) -> None:
        assert self._writer is not None
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(record["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
