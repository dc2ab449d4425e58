"""What is timed: networks with random weights, and the bounds of their margins.

Weights and biases are uniform in +-1/sqrt(fan in), inputs uniform in [0, 1], all float32; the specification is the 9
margins of one class; lower bounds only, at radius 0.01. Convolutions have no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb

METHODS = {
    "ibp": jb.IBP(),
    "crown_ibp": jb.CrownIBP(),
    "crown": jb.Crown(),
    "forward": jb.Forward(),
    "frown20": jb.Frown(steps=20),
}
RADIUS = 0.01


class Layers(nn.Module):
    """Convolutions (features, size, stride), then hidden Dense layers, then 10 classes; ReLU between."""

    convolutions: tuple[tuple[int, int, int], ...] = ()
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x):
        for features, size, stride in self.convolutions:
            x = nn.relu(nn.Conv(features, (size, size), stride, padding="VALID")(x))
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


NETWORKS: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "mlp_3x100": (Layers(hidden=(100,) * 3), (784,)),
    "mlp_20x100": (Layers(hidden=(100,) * 19), (784,)),
    "mlp_3x1024": (Layers(hidden=(1024,) * 3), (784,)),
    "mlp_7x1024": (Layers(hidden=(1024,) * 7), (784,)),
    "cnn_small": (Layers(((16, 4, 2), (32, 4, 1)), (100,)), (28, 28, 1)),
    "cnn_medium": (Layers(((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)), (512, 512)), (32, 32, 3)),
}


@dataclass(frozen=True)
class Task:
    """One row: `run(seed)` bounds a batch of new images."""

    name: str
    run: Callable[[int], jax.Array]


def make(name: str) -> Task:
    """The task called `"<network> <method> <batch>"`.

    Raises:
        ValueError: it names no such network or method.
    """
    try:
        network, method, batch = name.split()
        (module, shape), bound, count = NETWORKS[network], METHODS[method], int(batch)
    except (ValueError, KeyError) as error:
        known = f"networks {', '.join(NETWORKS)}; methods {', '.join(METHODS)}"
        raise ValueError(f'task {name!r} is not "<network> <method> <batch>" ({known})') from error
    params = _uniform(module, shape)
    labels = np.zeros(count, np.int32)

    def run(seed: int) -> jax.Array:
        x = np.random.default_rng(seed).uniform(size=(count, *shape)).astype(np.float32)
        return jb.margins(params, x, labels, RADIUS, method=bound, apply_fn=module.apply)

    return Task(name, run)


def _uniform(module: Layers, shape: tuple[int, ...]):
    """Parameters uniform in +-1/sqrt(fan in), from a fixed seed."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))

    def layer(leaves: dict):
        scale = 1 / np.sqrt(np.prod(leaves["kernel"].shape[:-1]))
        return {k: rng.uniform(-scale, scale, v.shape).astype(np.float32) for k, v in leaves.items()}

    return {"params": {name: layer(leaves) for name, leaves in shapes["params"].items()}}
