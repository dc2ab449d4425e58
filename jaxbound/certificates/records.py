"""What a host loop knows of the first examples: a record of arrays, kept on disk between batches and shown as a bar.

A file of results is one record and a fingerprint: a hash of everything that the numbers depend on (the network's
program as JAX traces it, every array, the method, the options, and the versions of jaxbound and JAX). A run continues
a file only if the fingerprints are equal, so numbers of two computations never meet in one file, and a hash of the
numbers says whether the file is as it was written.

A file is replaced in one step, after it is whole on disk. Whoever reads it, or kills the process at any time, finds the
record of before a batch or of after it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxbound import errors
from jaxbound._version import __version__
from jaxbound.backend.programs import Traced, hashed
from jaxbound.certificates.proofs.files import UNREADABLE
from jaxbound.methods import Method
from jaxbound.network.inputs import Inputs, structs
from jaxbound.network.problems import example_of
from jaxbound.network.resolving import Network


class Record(NamedTuple):
    """What is known of the first examples, and what it cost.

    >>> Record.empty(margins=np.zeros((0, 2))).extended((np.ones((3, 2)),), 1.0, 1.0).examples
    3
    """

    names: tuple[str, ...]
    rows: tuple[np.ndarray, ...]
    """By name, one row per example."""
    first_batch_seconds: float
    seconds: float

    @classmethod
    def empty(cls, **rows: np.ndarray) -> Record:
        """The record of no example."""
        return cls(tuple(rows), tuple(rows.values()), 0.0, 0.0)

    def extended(self, rows: Sequence[np.ndarray], first: float, seconds: float) -> Record:
        """With the rows of a further batch, and the seconds that the first one and all have taken."""
        whole = tuple(map(np.concatenate, zip(self.rows, rows, strict=True)))
        return Record(self.names, whole, self.first_batch_seconds if self.examples else first, seconds)

    @property
    def examples(self) -> int:
        """How many examples are done."""
        return len(self.rows[0])


# --- on disk ----------------------------------------------------------------------------------------------------------


def fingerprint(network: Network, inputs: Inputs, labels: np.ndarray, method: Method, *options: object) -> str:
    """A hash of everything that the numbers depend on: the network's program, all arrays, the options, the versions.

    Args:
        network: as resolved, batched.
        inputs: the regions of all examples, with a batch axis.
        labels: true classes, int (batch,).
        method: how to bound; functions inside count by their names.
        options: arrays, or anything whose text says what it is.

    Rounding: exact, every bit of every array counts.

    >>> from jaxbound import IBP, Box
    >>> network, box = Network(jax.numpy.multiply, np.ones(2), True), Box(np.zeros((1, 2)), np.ones((1, 2)))
    >>> one, two = (fingerprint(network, box, np.array([label]), IBP()) for label in (0, 1))
    >>> len(one), one == two
    (64, False)
    """
    example = example_of(network, inputs)
    program = Traced(network.function, structs(network.variables), example)
    arrays = [option for option in options if hasattr(option, "dtype")]
    given = network.variables, inputs, labels, method, program.arrays, arrays
    leaves, structure = jax.tree_util.tree_flatten_with_path(given)
    said = *(option for option in options if not hasattr(option, "dtype")), example, __version__, jax.__version__
    text = re.sub(r"0x[0-9a-f]+", "", f"{program.text}\n{structure}\n{said}")  # without addresses of functions
    return hashed(text, ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves))


def load(path: Path, mark: str, empty: Record) -> Record:
    """The record that a file holds; a file of the empty record is made where there is none.

    Args:
        path: the file; missing folders are made.
        mark: the computation's `fingerprint`.
        empty: what to begin with.

    Raises:
        ArgumentError: a file that `save` did not write, or one of another computation.
        OSError: the file cannot be made, which shows before the first batch and not after it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, mark, empty)
        return empty
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        found, whole = str(arrays.pop("fingerprint")), str(arrays.pop("whole"))
        if whole != hashed(found, arrays.items()):
            raise ValueError("it is not as it was written")
        seconds = float(arrays["first_batch_seconds"]), float(arrays["seconds"])
        rows = tuple(arrays[name] for name in empty.names)
    except UNREADABLE as error:
        raise errors.argument(
            "results", f"is {path}, which is damaged or which this function did not write", "pass another path"
        ) from error
    if found != mark:
        problem = (
            f"is {path}, which holds results of another computation: params, x, labels, eps, norm, clip, method, "
            "batch_size, rounding, the network's code or the version of jaxbound or JAX differ"
        )
        raise errors.argument("results", problem, "pass another path, or delete the file to start again")
    return Record(empty.names, rows, *seconds)


def save(path: Path, mark: str, record: Record) -> None:
    """Write the file in one step: whoever reads it, or kills this process, sees the old one or the new one.

    Args:
        path: the file, in a folder that exists.
        mark: the computation's `fingerprint`.
        record: what to keep.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            arrays: dict = dict(zip(record.names, record.rows, strict=True))
            arrays["first_batch_seconds"] = np.array(record.first_batch_seconds)
            arrays["seconds"] = np.array(record.seconds)
            np.savez(file, fingerprint=np.array(mark), whole=np.array(hashed(mark, arrays.items())), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- on screen --------------------------------------------------------------------------------------------------------


class Progress:
    """A tqdm bar on the standard error, plain lines where tqdm is not installed, or nothing.

    Args:
        name: the function that works, "" to show nothing.
        total: how many examples there are.
        record: what is done before the first batch.
        summary: what to say of a record.
    """

    def __init__(self, name: str, total: int, record: Record, summary: Callable[[Record], str]):
        self.name, self.total, self.summary, self.bar = name, total, summary, None
        if not name:
            return
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            done = f"{record.examples} of {total} examples done"
            self._line(f"{done}; the first batch compiles (pip install tqdm for a bar)")
            return
        self.bar = tqdm(total=total, initial=record.examples, unit="example", desc=name)
        note = "the first batch compiles" if record.examples < total else "all done by an earlier run"
        self.bar.set_postfix_str(note)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, record: Record) -> None:
        """After a batch: how many are done, what was found, and how long it took."""
        if not self.name:
            return
        text = f"{self.summary(record)}, first batch {record.first_batch_seconds:.1f} s"
        if self.bar is None:
            self._line(f"{record.examples} of {self.total} examples, {text}, in all {record.seconds:.1f} s")
            return
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(record.examples - self.bar.n)

    def _line(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr)
