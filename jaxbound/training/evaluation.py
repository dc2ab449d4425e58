"""Errors of a network: while it trains, and on the test set with certificates in strict arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbound.certificates.attack import pgd
from jaxbound.certificates.certification import certify, check_against_attack
from jaxbound.certificates.margins import margins
from jaxbound.methods import IBP, CrownIBP, Method
from jaxbound.methods.named import METHODS, method_named
from jaxbound.training import losses
from jaxbound.training.configuration import Configuration
from jaxbound.training.data import Dataset, Examples
from jaxbound.training.step import TrainState, variables_of


def clip_of(config: Configuration) -> tuple[float, float] | None:
    """The range of valid inputs of a run, if it has one."""
    return (config.clip[0], config.clip[1]) if config.clip else None


def around_of(config: Configuration, apply_fn: Callable) -> dict:
    """What the balls of a run are: apply_fn, norm and clip, as `margins` and its kin take them."""
    return {"apply_fn": apply_fn, "norm": float(config.norm), "clip": clip_of(config)}


def look_of(
    config: Configuration, apply_fn: Callable, dataset: Dataset, examples: Examples, names: tuple[str, str, str]
):
    """`variables -> {name: error}`: clean, PGD, verified at the test radius, up to rounding; None without examples."""
    if not len(examples):
        return None
    size = min(config.test_batch_size, len(examples))
    method, eps = METHODS[config.verify_with], np.float32(config.eps_test)
    around = around_of(config, apply_fn)

    @jax.jit
    def look(variables: Any, x: jax.Array, labels: jax.Array, keys: jax.Array):
        bounds = margins(variables, x, labels, eps, method=method, **around)
        attacked = pgd(variables, x, labels, eps, key=keys, steps=config.look_pgd_steps, **around)
        return apply_fn(variables, x).argmax(axis=1) != labels, attacked.success, ~losses.holds(bounds)

    def evaluate(variables: dict) -> dict:
        keys = jax.random.split(jax.random.key(config.seed), len(examples))
        found = in_batches(
            lambda index: look(variables, dataset.images(examples.x[index]), examples.labels[index], keys[index]),
            len(examples), size,
        )  # fmt: skip
        return {name: float(np.mean(values)) for name, values in zip(names, found, strict=True)}

    return evaluate


def measure_of(config: Configuration, apply_fn: Callable, dataset: Dataset, examples: Examples, epsilon: Callable):
    """`state -> {name: number}`: what the CROWN-IBP paper's Figures 1 and B show while a network trains.

    "norm/LAYER" is `layer_norms`; "gap" the mean over margins of CROWN-IBP's lower bound (equation 9) less IBP's, at
    the step's own radius once that is not 0, where the loss is made of bounds.
    """
    around, size = around_of(config, apply_fn), min(config.test_batch_size, len(examples))
    bounded = config.loss in ("margins", "fused") and len(examples) > 0

    @jax.jit
    def gap(variables: Any, x: jax.Array, labels: jax.Array, eps: ArrayLike):
        tight, loose = (
            margins(variables, x, labels, eps, method=method, **around) for method in (CrownIBP(intersect=False), IBP())
        )
        return (tight - loose).mean(axis=1)

    def measure(state: TrainState) -> dict[str, float]:
        found, eps = layer_norms(state.params), np.float32(epsilon(state.step))
        if bounded and eps > 0:
            variables = variables_of(state)
            gaps = in_batches(
                lambda index: gap(variables, dataset.images(examples.x[index]), examples.labels[index], eps),
                len(examples), size,
            )  # fmt: skip
            found["gap"] = float(np.mean(gaps, dtype=np.float64))
        return found

    return measure


def layer_norms(params: Any) -> dict[str, float]:
    """The l_inf-induced norm of every layer's kernel: the largest sum of absolute weights into one output.

    >>> layer_norms({"Dense_0": {"kernel": np.array([[1.0, -2.0], [3.0, 0.5]]), "bias": np.zeros(2)}})
    {'norm/Dense_0': 4.0}
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *layer, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if name == "kernel":
            weights = np.abs(np.asarray(leaf, np.float64))
            found["/".join(["norm", *layer])] = float(weights.reshape(-1, weights.shape[-1]).sum(axis=0).max())
    return found


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
    config: Configuration, apply_fn: Callable, variables: dict, dataset: Dataset, eps: float,
    methods: Sequence[str | tuple[str, Method]], split: str,
) -> list[dict]:  # fmt: skip
    """Clean, PGD and verified error on a split, or its first `test_examples`: one attack, a row per method.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    examples: Examples = getattr(dataset, split)
    count = config.test_examples or len(examples)
    x, labels = dataset.images(examples.x[:count]), examples.labels[:count]
    return errors_of(
        variables, x, labels, eps, methods, batch_size=config.test_batch_size, pgd_steps=config.pgd_steps,
        step_size=config.pgd_step_size or None, key=jax.random.key(config.seed), **around_of(config, apply_fn),
    )  # fmt: skip


def errors_of(
    params: Any, x: np.ndarray, labels: np.ndarray, eps: float, methods: Sequence[str | tuple[str, Method]], *,
    batch_size: int, pgd_steps: int, key: jax.Array, step_size: float | None = None, **around: Any,
) -> list[dict]:  # fmt: skip
    """Clean, PGD and verified error of any network: one attack, a row per method.

    Args:
        params, x, labels, eps: as for `certify`.
        methods: names in `METHODS`, or pairs of a name and a method.
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
    for given in methods:
        name, method = (given, method_named(given)) if isinstance(given, str) else given
        started = time.perf_counter()
        report = certify(params, x, labels, radius, method=method, batch_size=size, **around)
        check_against_attack(report, found)
        rows.append({
            "clean_error": report.clean_error, "pgd_error": float(np.mean(found.success)),
            "verified_error": report.verified_error, "eps": eps, "method": name,
            "seconds": round(time.perf_counter() - started, 2),
        })  # fmt: skip
    return rows
