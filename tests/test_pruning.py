"""Passes without the neurons that are proved inactive find the same bounds as those with all."""

from __future__ import annotations

import checks_pruning
import jax
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.driver import pruning
from jaxbound.methods import crown


@pytest.fixture
def parts(monkeypatch):
    """What is left of what each block reads and makes, as lists of numbers, for every time that it is asked."""
    seen = []

    def spy(run):
        found = pruning.pruned(run)
        seen.append([
            tuple(None if side is None else side.shape[-1] for side in getattr(segment, "left", (None, None)))
            for segment in found.segments
        ])  # fmt: skip
        return found

    monkeypatch.setattr(pruning, "_FEWEST", 8)
    monkeypatch.setattr(crown, "pruned", spy)
    return seen


def test_bounds_are_the_same(parts):
    """Those of a program that knows no values, which leaves nothing out."""
    params, x = checks_pruning.network()
    found = jb.crown(params, x, 0.02, apply_fn=checks_pruning.apply)
    assert parts[-1] == [(None, None), (None, 8), (8, 8), (8, None), (None, None)]
    expected = jax.jit(lambda x: jb.crown(params, x, 0.02, apply_fn=checks_pruning.apply))(x)
    assert np.allclose(found.lower, expected.lower, atol=1e-5) and np.allclose(found.upper, expected.upper, atol=1e-5)


def test_one_region(parts):
    """Without a batch."""
    params, x = checks_pruning.network()
    bounded = jb.bound(lambda x: checks_pruning.apply(params, x), jb.Crown(), rounding=True)
    box = jb.Box.around(x[0], 0.02)
    found, expected = bounded(box), jax.jit(bounded)(box)
    assert parts[-1][1] != (None, None)
    assert np.allclose(found.lower, expected.lower, atol=1e-3) and np.allclose(found.upper, expected.upper, atol=1e-3)


def test_layers_with_a_factor_of_each_example_stay_whole(parts):
    """A product with another input is no Dense layer."""
    params, x = checks_pruning.network()
    scales = np.linspace(0.5, 1.5, len(x), dtype=np.float32)[:, None]
    eps = np.full_like(scales, 0.02)

    def scaled(_params, inputs):
        points, scale = inputs
        for kernel, bias in params[:-1]:
            points = jax.nn.relu((points @ kernel) * scale + bias)
        return points @ params[-1][0]

    found = jb.crown(params, (x, scales), (0.02, 0 * eps), apply_fn=scaled)
    expected = jax.jit(lambda x: jb.crown(params, (x, scales), (0.02, 0 * eps), apply_fn=scaled))(x)
    assert all(left == (None, None) for run in parts for left in run)
    assert np.allclose(found.lower, expected.lower, atol=1e-5) and np.allclose(found.upper, expected.upper, atol=1e-5)


def test_rounding_is_counted_for_what_is_left(parts):
    """Margins hold at points in double precision."""
    params, x = checks_pruning.network()
    labels = np.asarray(checks_pruning.apply(params, x)).argmax(1)
    report = jb.certify(params, x, labels, 0.02, apply_fn=checks_pruning.apply, method=jb.Crown())
    assert parts[-1][2] != (None, None)
    checks_pruning.check_margins(report, labels, 0.02)


def test_what_something_else_reads_stays_whole(parts):
    """A residual connection reads all entries."""
    params, x = checks_pruning.network()

    def residual(params, x):
        (first, *others), inner = params, x
        inner = jax.nn.relu(inner @ first[0] + first[1])
        for kernel, bias in others[:-1]:
            inner = inner + jax.nn.relu(inner @ kernel + bias)
        return inner @ others[-1][0] + others[-1][1]

    jb.crown(params, x, 0.02, apply_fn=residual)
    assert all(left == (None, None) for left in parts[-1][2:])
