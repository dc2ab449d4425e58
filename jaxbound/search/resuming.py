"""Searches on disk: a run that was killed, or whose time was up, goes on with the domains that it had left.

Beside the file of a certificate, `NAME.search` holds the domains and the log of every part of a call, and a mark: a
hash of the network, the regions, the property, the options and the versions. It is replaced in one step, now and then,
and goes when the property is decided.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound._version import __version__
from jaxbound.backend.programs import Traced, hashed
from jaxbound.certificates.proofs import files
from jaxbound.certificates.properties import Property
from jaxbound.regions import Box

Array = np.ndarray

FORMAT = 1
"""A new one for every change of how domains are bounded or split: nothing is kept of what a mended fault found."""
EVERY = 10.0
"""Seconds between two files."""


def mark_of(fn: Callable, boxes: list[Box], prop: Property, *options: object) -> str:
    """A hash of all that a search depends on: its domains also on the dtype, their bounds on who found them."""
    arrays = files.arrays_of(files.Certificate(boxes, prop, []))
    program = Traced(fn, np.zeros(np.shape(boxes[0].lower), np.float32)).digest
    options = *options, jnp.result_type(float), FORMAT, __version__, jax.__version__
    return hashed(f"{program} {options}", sorted(arrays.items()))


class Kept:
    """The file of one call.

    Args:
        certificate: the path of the certificate that the call is to write.
        mark: what `mark_of` gives.

    Raises:
        ArgumentError: the file is there, and another search's, or none.
    """

    def __init__(self, certificate: str | os.PathLike, mark: str):
        path = Path(certificate)
        self.path, self.mark = path.with_name(f"{path.name}.search"), mark
        self.parts: dict[int, dict[str, Array]] = {}
        self.due = time.monotonic() + EVERY
        self.lock, self.decided = threading.Lock(), False
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            found, whole = str(arrays.pop("mark")), str(arrays.pop("whole"))
            if whole != hashed(found, arrays.items()):
                raise ValueError("it is not as it was written")
            for name, array in arrays.items():
                part, _, field = name.partition("/")
                self.parts.setdefault(int(part), {})[field] = array
        except files.UNREADABLE as fault:
            raise errors.argument(
                "certificate", f"has {self.path} beside it, which is no search", "delete it, or pass another path"
            ) from fault
        if found != self.mark:
            raise errors.argument(
                "certificate", f"has {self.path} beside it, the search for another property, region, network or method",
                "delete it to start anew, or pass another path",
            )  # fmt: skip

    def keep(self, part: int, state: Callable[[], dict[str, Array]], *, now: bool = False) -> None:
        """Note the state of a part's search, if it is time."""
        if not now and time.monotonic() < self.due:
            return
        self.parts[part] = state()
        arrays = {f"{k}/{name}": array for k, own in self.parts.items() for name, array in own.items()}
        with self.lock:
            if not self.decided:
                whole = np.array(hashed(self.mark, arrays.items()))
                files.write(self.path, {"mark": np.array(self.mark), "whole": whole, **arrays})
        self.due = time.monotonic() + EVERY

    def remove(self) -> None:
        """All is decided; a step that is still under way leaves nothing any more."""
        with self.lock:
            self.decided = True
            self.path.unlink(missing_ok=True)
