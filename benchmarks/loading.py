"""How long networks and properties of a folder take until they can be bounded: reading, and tracing of networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxbound as jb
from benchmarks import measure


def rows(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Of every ONNX and VNN-LIB file, plain or gzipped: its name, wall seconds and CPU seconds of all threads.

    The first file is read once before, so that no row counts the import of packages.
    """
    found = sorted(path for kind in ("onnx", "vnnlib") for path in folder.rglob(f"*.{kind}*"))
    for path in found[:1]:
        _read(path)
    for path in found:
        wall, cpu = measure.seconds(lambda path=path: _read(path))
        yield str(path.relative_to(folder)), wall, cpu


def _read(path: Path) -> None:
    if ".vnnlib" in path.suffixes:
        jb.vnnlib.load(path)
        return
    model = jb.onnx.load(path).flat
    jax.make_jaxpr(model.fn)(model.params, jnp.zeros(model.input_shape, model.dtype))
