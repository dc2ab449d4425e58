"""One of two processes of `jax.distributed` that certify a data set together; writes what it was told."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

import jaxbound as jb


def problem(count: int = 7):
    """A chain of Dense layers and a data set."""
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=shape).astype("f"), np.zeros(shape[1], "f")) for shape in ((4, 8), (8, 3))]
    x = rng.normal(size=(count, 4)).astype("f")
    labels = (np.maximum(x @ layers[0][0], 0) @ layers[1][0]).argmax(1)
    return layers, x, labels


def main(number: int, port: int, folder: Path) -> None:
    """Certify, search radii, and fail together."""
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    layers, x, labels = problem()
    how = {"method": jb.IBP(), "activation": "relu", "batch_size": 2}
    report = jb.certify(layers, x, labels, 0.01, results=folder / "certify.npz", **how)
    radius = jb.certified_radius(layers, x, labels, steps=5, **how)
    again = jb.certify(layers, x, labels, 0.01, results=folder / "certify.npz", **how)
    assert np.array_equal(again.margins, report.margins) and again.seconds == report.seconds
    np.savez(folder / f"{number}.npz", margins=report.margins, verified=report.verified, radius=radius)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
