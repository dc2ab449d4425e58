"""Errors of a network: while it trains, and on the test set with certificates in strict arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxbound.certificates.attack import pgd
from jaxbound.certificates.certification import certify, check_against_attack
from jaxbound.certificates.margins import margins
from jaxbound.methods.named import METHODS
from jaxbound.training import losses
from jaxbound.training.configuration import Configuration
from jaxbound.training.data import Dataset, Examples

CLIP = (0.0, 1.0)
"""The range of pixels."""


def look_of(config: Configuration, model, dataset: Dataset, examples: Examples, names: tuple[str, str, str]):
    """`variables -> {name: error}`: clean, PGD, verified at the test radius, up to rounding; None without examples."""
    if not len(examples):
        return None
    size = min(config.test_batch_size, len(examples))
    method, eps = METHODS[config.verify_with], np.float32(config.eps_test)
    around = {"apply_fn": model.apply, "norm": float(config.norm), "clip": CLIP}

    @jax.jit
    def look(variables, x, labels, keys):
        bounds = margins(variables, x, labels, eps, method=method, **around)
        attacked = pgd(variables, x, labels, eps, key=keys, steps=config.look_pgd_steps, **around)
        return model.apply(variables, x).argmax(axis=1) != labels, attacked.success, ~losses.holds(bounds)

    def evaluate(variables: dict) -> dict:
        keys = jax.random.split(jax.random.key(config.seed), len(examples))
        found = in_batches(
            lambda index: look(variables, dataset.images(examples.x[index]), examples.labels[index], keys[index]),
            len(examples), size,
        )  # fmt: skip
        return {name: float(np.mean(values)) for name, values in zip(names, found, strict=True)}

    return evaluate


def in_batches(function: Callable, count: int, size: int):
    """What a function of indices gives for all of them, in batches of one size: the last one repeats the last index."""
    parts = []
    for first in range(0, count, size):
        index = np.minimum(np.arange(first, first + size), count - 1)
        parts.append(jax.tree.map(np.asarray, function(index)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def looked_at(dataset: Dataset, held: Examples, count: int) -> tuple[Examples, tuple[str, str, str]]:
    """Held-out examples, or else the first so many of those that are trained on; and what their errors are called."""
    if len(held):
        return held, ("validation_error", "validation_pgd_error", "verified_error")
    watched = Examples(dataset.train.x[:count], dataset.train.labels[:count])
    return watched, ("watched_error", "watched_pgd_error", "watched_verified_error")


def test_errors(
    config: Configuration, model, variables: dict, dataset: Dataset, eps: float, methods: Sequence[str]
) -> list[dict]:
    """Clean, PGD and verified error on the test set, or its first `test_examples`: one attack, a row per method.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    count = config.test_examples or len(dataset.test)
    x, labels = dataset.images(dataset.test.x[:count]), dataset.test.labels[:count]
    return errors_of(
        variables, x, labels, eps, methods, apply_fn=model.apply, norm=float(config.norm), clip=CLIP,
        batch_size=config.test_batch_size, pgd_steps=config.pgd_steps, step_size=config.pgd_step_size or None,
        key=jax.random.key(config.seed),
    )  # fmt: skip


def errors_of(
    params, x: np.ndarray, labels: np.ndarray, eps: float, methods: Sequence[str], *, batch_size: int, pgd_steps: int,
    key: jax.Array, step_size: float | None = None, **around,
) -> list[dict]:  # fmt: skip
    """Clean, PGD and verified error of any network: one attack, a row per method.

    Args:
        params, x, labels, eps: as for `certify`.
        methods: names in `METHODS`.
        batch_size: examples at once, at most.
        pgd_steps, step_size, key: of the attack.
        around: apply_fn, norm and clip.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    size, radius = min(batch_size, len(x)), np.float32(eps)
    keys = jax.random.split(key, len(x))

    def attack(index: np.ndarray):
        options = {"key": keys[index], "steps": pgd_steps, "step_size": step_size, **around}
        return pgd(params, x[index], labels[index], radius, **options)

    found = in_batches(attack, len(x), size)
    rows = []
    for method in methods:
        started = time.perf_counter()
        report = certify(params, x, labels, radius, method=METHODS[method], batch_size=size, **around)
        check_against_attack(report, found)
        rows.append({
            "clean_error": report.clean_error, "pgd_error": float(np.mean(found.success)),
            "verified_error": report.verified_error, "eps": eps, "method": method,
            "seconds": round(time.perf_counter() - started, 2),
        })  # fmt: skip
    return rows
