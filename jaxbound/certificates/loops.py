"""A host loop over a data set: batches of one size on all devices of all processes, with a file and a bar.

Every batch has the same number of examples (the last one is padded with its last example), so memory is bounded and
nothing compiles twice. Under `jax.distributed` all processes call with the same arguments; each works on a share of the
examples, with a file of its own, and all of them return what all have found.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxbound import _compat, errors
from jaxbound.certificates import records
from jaxbound.certificates.records import Record
from jaxbound.network.resolving import Network

Rows = tuple[np.ndarray, ...]


class Task(NamedTuple):
    """What is computed for every example."""

    name: str
    """Of the user's function, for messages."""
    network: Network
    one: Callable[[Network, np.ndarray], Rows]
    """From the network on some device and the examples' numbers to rows of results, one for each example."""
    empty: Record
    """The rows of no example."""
    total: int
    batch_size: int
    summary: Callable[[Record], str]
    """What is shown of a record."""


def run(task: Task, path: Path | None, mark: Callable[..., str], *, progress: bool) -> Record:
    """The record of all examples.

    Args:
        task: what is computed.
        path: a file that a later call continues from; each of several processes puts its number into the name.
        mark: from further options to the computation's fingerprint (see `records`).
        progress: whether to show a bar.

    Raises:
        JaxboundError: the computation failed in another process.
    """
    count, number = jax.process_count(), jax.process_index()
    if count == 1:
        return _share(task, 0, task.total, path, mark() if path else "", progress=progress)
    length = -(-task.total // count)
    first, stop = (min(task.total, length * k) for k in (number, number + 1))
    own = None if path is None else path.with_name(f"{path.stem}.{number}-of-{count}{path.suffix}")
    found, failure = task.empty, None
    try:
        found = _share(task, first, stop, own, mark(count, number) if own else "", progress=progress and number == 0)
    except Exception as error:  # the others would wait for ever
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise errors.JaxboundError(f"{task.name} failed in process {failed[0]}, whose own message says why")
    return _merged(found, length, task.total)


def _merged(own: Record, length: int, total: int) -> Record:
    """The records of all processes as one; each holds `length` examples but for the last ones."""
    whole = []
    for rows in own.rows:
        padded = np.zeros((length, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        found = _gathered(padded)
        whole.append(found.reshape(len(found) * length, *rows.shape[1:])[:total])
    seconds = _gathered(np.array([own.first_batch_seconds, own.seconds], np.float32)).max(axis=0)
    return Record(own.names, tuple(whole), float(seconds[0]), float(seconds[1]))


def _gathered(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, bit by bit: JAX would round float64 where it is not enabled."""
    raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(raw))
    return np.stack([np.frombuffer(row.tobytes(), array.dtype).reshape(array.shape) for row in found])


def _share(task: Task, first: int, stop: int, path: Path | None, mark: str, *, progress: bool) -> Record:
    """The record of the examples from `first` to `stop`."""
    done = task.empty if path is None else records.load(path, mark, task.empty)
    started, before = time.perf_counter(), done.seconds
    with records.Progress(task.name if progress else "", stop - first, done, task.summary) as shown:
        for rows in over_devices(task, range(first + done.examples, stop, task.batch_size), stop):
            seconds = time.perf_counter() - started
            done = done.extended(rows, seconds, before + seconds)
            if path is not None:
                records.save(path, mark, done)
            shown.show(done)
    return done


def over_devices(task: Task, starts: Sequence[int], stop: int) -> Iterator[Rows]:
    """The rows of each batch, in order.

    Each local device works on a batch of its own, driven by a thread, so the host's work for one overlaps with the
    others', and what is found does not depend on their number.
    """

    def batch(network: Network, first: int) -> Rows:
        last = min(first + task.batch_size, stop)
        index = np.minimum(np.arange(first, first + task.batch_size), last - 1)
        return tuple(rows[: last - first] for rows in task.one(network, index))

    devices = _devices(task.network)[: len(starts)]
    if len(devices) <= 1:
        yield from (batch(task.network, first) for first in starts)
        return
    free: queue.SimpleQueue = queue.SimpleQueue()
    for device in devices:
        free.put((device, _placed(task.network, device)))

    x64 = jnp.result_type(float) == np.float64  # a thread begins with the global settings, not with those of its parent

    def on_a_free_device(first: int) -> Rows:
        device, own = free.get()
        try:
            with jax.default_device(device), jax.enable_x64(x64):
                return batch(own, first)
        finally:
            free.put((device, own))

    with ThreadPoolExecutor(len(devices), task.name) as pool:
        yield from pool.map(on_a_free_device, starts)


def _devices(network: Network) -> list:
    """All local devices; one where JAX was told which, or where parameters are split over several."""
    arrays = [leaf for leaf in jax.tree.leaves(network.variables) if isinstance(leaf, jax.Array)]
    if _compat.default_device() is not None or not all(leaf.is_fully_replicated for leaf in arrays):
        return []
    return jax.local_devices()


def _placed(network: Network, device: Any) -> Network:
    """The network with its arrays on one device."""
    place = lambda leaf: jax.device_put(leaf, device) if isinstance(leaf, jax.Array) else leaf  # noqa: E731
    return network._replace(variables=jax.tree.map(place, network.variables))
