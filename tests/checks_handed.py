"""Checks for planted faults in what is handed over: files of certificates and of results, and a user's own numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from jaxbound.certificates import records
from jaxbound.certificates.proofs import files, reading
from jaxbound.certificates.proofs.files import LEAF, Certificate, Tree
from jaxbound.certificates.records import Record
from jaxbound.jacobian.norms import nonnegative


def check_forms_of_certificates():
    """ReLU(x) + x over [-1, 1] is -1 at -1: with offsets of two axes, both leaves have the bound of the first."""
    nothing, open_ = np.zeros(0, np.uint8), np.packbits([True])
    tree = Tree(
        np.array([0, LEAF, LEAF], np.int32), np.full((2, 1), 64, np.uint8), np.array(0, np.int32), nothing, nothing,
        np.zeros(2, np.int32), np.array([2.0, 0.0]), open_, open_,
    )  # fmt: skip
    fn = lambda x: jax.nn.relu(x) + x  # noqa: E731
    for offsets, shown in ((np.array([-1.01]), True), (np.array([-0.01]), False), (np.array([[-0.01]]), False)):
        prop = jb.Property((jb.Clause(np.ones((1, 1)), offsets),))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "proof"
            files.save(path, Certificate([jb.Box(-np.ones(1), np.ones(1))], prop, [tree]))
            try:
                jb.check_certificate(path, fn)
                found = True
            except jb.CertificateError:
                found = False
        assert found == shown, offsets


def check_calls_of_certificates():
    """The program of a reduction is not one of arrays."""
    reduced = lambda x: jax.lax.reduce(x, np.float32(0), lambda a, b: jnp.maximum(a + b, 0), (0,)).sum()  # noqa: E731
    try:
        reading.read(reduced, (2, 2), np.float32)
    except jb.UnsupportedError:
        return
    raise AssertionError("a reduction was read as one ReLU per entry")


def check_wholeness_of_results():
    """A margin that was changed on disk."""
    empty = Record.empty(margins=np.zeros((0, 2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.npz"
        records.save(path, "mark", empty._replace(rows=(np.zeros((1, 2)),)))
        with np.load(path) as stored:
            np.savez(path, **{**stored, "margins": np.ones((1, 2))})
        try:
            records.load(path, "mark", empty)
        except jb.ArgumentError:
            return
    raise AssertionError("numbers that were not written were read")


def check_rules_of_others():
    """A function of slope 5 whose rule says 0."""
    liar = jax.custom_jvp(lambda x: 5 * x)
    liar.defjvp(lambda primals, tangents: (liar(*primals), 0 * tangents[0]))
    apply = lambda p, x: liar(x) * p  # noqa: E731
    try:
        found = jb.jacobian_bounds(jnp.ones(1), jnp.ones((1, 1)), 0.1, apply_fn=apply, method=jb.IBP())
    except jb.UnsupportedError:  # safe, but left out it can be bounded
        found = jb.Interval(jnp.zeros(1), jnp.zeros(1))
    assert np.all(np.asarray(found.lower) >= 4.99)


def check_places_in_batches():
    """A factor by position is 0 for the first example, and that is the one of a batch of one."""
    apply = lambda p, x: x * np.arange(len(x), dtype=np.float32)[:, None] * p  # noqa: E731
    try:
        jb.crown(jnp.ones(1), jnp.ones((3, 1)), 0.1, apply_fn=apply)
    except jb.ArgumentError:
        return
    raise AssertionError("a network was taken for that of its first example")


def check_norms_between_powers():
    """Against all directions; the stretch of the plainest ones, and Schur's test with ones, are far from it."""
    angles = np.linspace(0, np.pi / 2, 10001)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    length = lambda v: np.sum(np.abs(v) ** 3, axis=0) ** (1 / 3)  # noqa: E731
    for matrix in (np.array([[2.0, 1], [0, 1]]), np.array([[0.1, 3, 1], [0, 0, 2]]).T, np.eye(2)):
        least = np.max(length(matrix @ directions) / length(directions))
        found = float(nonnegative(jnp.asarray(matrix), 3.0, 3.0))
        assert least * (1 - 1e-9) <= found <= least * 1.002, (least, found)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}
