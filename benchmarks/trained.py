"""Networks trained for the benchmark: multilayer perceptrons on MNIST, and the radius at which 80 % are certified.

Most neurons of a trained network are stable at such a radius, unlike those of random weights. Three epochs of Adam on
the cross-entropy of clean images take a few seconds; nothing is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from jaxbound.training import data

EPOCHS, BATCH, RATE = 3, 128, 1e-3
CERTIFIED, IMAGES = 0.8, 64


class Trained(NamedTuple):
    """Parameters, the radius, and the images of the test set that are classified correctly, flat."""

    params: Any
    radius: float
    images: np.ndarray


def train(module: nn.Module, folder: Path | None) -> Trained:
    """Train on MNIST in `folder` (see `jaxbound.training.data.load`), and find the radius by bisection.

    Raises:
        ArgumentError: no MNIST there.
    """
    found = data.load("mnist", folder)
    params = _fit(module, *_flat(found.train))
    images, labels = _flat(found.test)
    right = np.flatnonzero(np.argmax(np.asarray(module.apply(params, images[:1000])), axis=1) == labels[:1000])
    images, labels = images[right], labels[right]
    low, high = 0.0, 0.1
    for _ in range(8):
        middle = (low + high) / 2
        lower = jb.margins(params, images[:IMAGES], labels[:IMAGES], middle, method=jb.Crown(), apply_fn=module.apply)
        share = float(jnp.mean(jnp.all(lower > 0, axis=1)))
        low, high = (middle, high) if share >= CERTIFIED else (low, middle)
    return Trained(params, low, images)


def _flat(examples: data.Examples) -> tuple[np.ndarray, np.ndarray]:
    return examples.x.reshape(len(examples), -1) / np.float32(255), examples.labels


def _fit(module: nn.Module, images: np.ndarray, labels: np.ndarray) -> Any:
    optimizer = optax.adam(RATE)
    params = module.init(jax.random.key(0), images[:1])
    held = jnp.asarray(images), jnp.asarray(labels)

    def loss(params, chosen):
        logits: Any = module.apply(params, held[0][chosen])
        return optax.softmax_cross_entropy_with_integer_labels(logits, held[1][chosen]).mean()

    @jax.jit
    def epoch(params, state, key):
        order = jax.random.permutation(key, len(labels))[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)

        def step(carry, chosen):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, chosen), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    state = optimizer.init(params)
    for k in range(EPOCHS):
        params, state = epoch(params, state, jax.random.key(k))
    return params
