"""Checks for planted faults where passes leave out neurons that are proved inactive."""

from __future__ import annotations

import itertools

import jax
import numpy as np

import jaxbound as jb
from jaxbound.driver import pruning


def network(width: int = 16) -> tuple[list, np.ndarray]:
    """A chain of Dense layers of which more than half of the neurons are inactive, others in each example."""
    rng, sizes = np.random.default_rng(0), (6, width, width, width, width, 4)
    params = [
        (rng.normal(size=(n, m)).astype(np.float32) / np.sqrt(n), np.full(m, -0.12, np.float32))
        for n, m in itertools.pairwise(sizes)
    ]
    return params, rng.normal(size=(5, 6)).astype(np.float32)


def apply(params: list, x: jax.Array) -> jax.Array:
    """The chain of a batch."""
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def check_margins(report: jb.Report, labels: np.ndarray, eps: float) -> None:
    """Margins hold at points of every box, evaluated in double precision."""
    params, x = network()
    params = [(kernel.astype(np.float64), bias.astype(np.float64)) for kernel, bias in params]
    points = x[:, None] + np.random.default_rng(1).choice([-eps, eps, 0], (len(x), 500, x.shape[1]))
    for kernel, bias in params[:-1]:
        points = np.maximum(points @ kernel + bias, 0)
    logits = points @ params[-1][0] + params[-1][1]
    own = np.take_along_axis(logits, labels[:, None, None], axis=2)
    others = [np.delete(one, label, axis=1) for one, label in zip(own - logits, labels, strict=True)]
    assert np.all(np.min(others, axis=1) >= report.margins - report.rounding)


def check_inactive():
    """What is left out is inactive."""
    params, x = network()
    fewest, pruning._FEWEST = pruning._FEWEST, 8
    try:
        found = jb.crown(params, x, 0.02, apply_fn=apply)
    finally:
        pruning._FEWEST = fewest
    expected = jax.jit(lambda x: jb.crown(params, x, 0.02, apply_fn=apply))(x)
    assert np.allclose(found.lower, expected.lower, atol=1e-5) and np.allclose(found.upper, expected.upper, atol=1e-5)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_") and name != "check_margins"}
