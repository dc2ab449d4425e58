"""What is timed: networks with random weights, bounds of their margins or gradients, and steps of certified training.

Weights and biases are uniform in +-1/sqrt(fan in), inputs uniform in [0, 1], all float32; the specification is the 9
margins of one class; lower bounds only, at radius 0.01. Convolutions have no padding (`dm_large`: one pixel).

`PEERS` holds what the strongest other library took on the same tasks, and at what speed of its machine; figures of the
two are comparable only in units of each machine's own matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from jaxbound.training import losses, models, schedules, step

METHODS = {
    "ibp": jb.IBP(),
    "crown_ibp": jb.CrownIBP(),
    "crown": jb.Crown(),
    "forward": jb.Forward(),
    "frown20": jb.Frown(steps=20),
}
COMPILED = {
    "jit_ibp": jb.IBP(),
    "jit_crown_ibp": jb.CrownIBP(),
    "jit_crown": jb.Crown(),
    "jit_crown_budget": jb.Crown(budget=0.75),
}
"""Methods that are run under `jit`, as a whole: one call instead of many, and rows chosen only within a budget."""
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


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp_3x100": (Layers(hidden=(100,) * 3), (784,)),
    "mlp_20x100": (Layers(hidden=(100,) * 19), (784,)),
    "mlp_3x1024": (Layers(hidden=(1024,) * 3), (784,)),
    "mlp_7x1024": (Layers(hidden=(1024,) * 7), (784,)),
    "mlp_10x20": (Layers(hidden=(20,) * 10), (784,)),
    "mlp_taper": (Layers(hidden=(1024, 512, 256, 128, 64, 32)), (784,)),
    "cnn_small": (Layers(((16, 4, 2), (32, 4, 1)), (100,)), (28, 28, 1)),
    "cnn_medium": (Layers(((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)), (512, 512)), (32, 32, 3)),
    "dm_large": (models.network("DM-large"), (32, 32, 3)),
    **{f"mlp_{depth}x256": (Layers(hidden=(256,) * depth), (784,)) for depth in (2, 4, 8, 16)},
    **{f"mlp_3x{width}": (Layers(hidden=(width,) * 3), (784,)) for width in (256, 512, 2048)},
    **{f"cnn_{side}px": (Layers(((16, 4, 2), (32, 4, 1)), (100,)), (side, side, 1)) for side in (16, 32, 64)},
}


TRAINING = {"train_crown_ibp": jb.CrownIBP()}
"""Methods whose training step is timed: the forward pass, bounds, and the gradient of both."""
JACOBIANS = {"recurjac": jb.RecurJac(), "fastlip": jb.FastLip()}
"""Methods that bound the gradient of one logit."""
ALL = METHODS | COMPILED | TRAINING | JACOBIANS


class Peer(NamedTuple):
    """Seconds of auto_LiRPA (PyTorch), which came first of those tried, and the most memory of its process."""

    cpu_seconds: float
    memory_mb: float | None = None


PEER_CALIBRATION = 0.025
"""CPU seconds of a 1024 x 1024 x 1024 float32 product while they were taken: between 0.021 and 0.030."""

PEERS = {
    "mlp_3x1024 ibp 64": Peer(0.025),
    "mlp_3x1024 crown_ibp 64": Peer(0.083),
    "mlp_3x1024 crown 8": Peer(1.94, 556),
    "mlp_3x1024 crown 32": Peer(8.8, 1326),
    "mlp_3x1024 frown20 2": Peer(28.8),
    "mlp_7x1024 ibp 64": Peer(0.065),
    "mlp_7x1024 crown_ibp 64": Peer(0.215),
    "mlp_7x1024 crown 8": Peer(15.0, 640),
    "cnn_small ibp 64": Peer(0.025),
    "cnn_small crown_ibp 64": Peer(0.129),
    "cnn_small crown 8": Peer(1.32, 562),
    "cnn_small frown20 2": Peer(5.69),
    "cnn_medium ibp 16": Peer(0.040),
    "cnn_medium crown_ibp 16": Peer(0.251),
    "cnn_medium crown 1": Peer(5.8, 1015),
    "cnn_small train_crown_ibp 256": Peer(1.75, 1215),
    "mlp_3x1024 train_crown_ibp 256": Peer(1.22, 1012),
}
PEERS |= {f"{net} jit_ibp {batch}": PEERS[f"{net} ibp {batch}"] for net, batch in (
    ("mlp_3x1024", 64), ("mlp_7x1024", 64), ("cnn_small", 64), ("cnn_medium", 16)
)}  # fmt: skip
"""Task -> what the other library took."""

CURVES = {
    "depth": tuple(f"mlp_{depth}x256 crown 4" for depth in (2, 4, 8, 16)),
    "width": tuple(f"mlp_3x{width} crown 4" for width in (256, 512, 1024, 2048)),
    "batch": tuple(f"mlp_3x256 crown {batch}" for batch in (1, 4, 16, 64)),
    "image size": tuple(f"cnn_{side}px crown 1" for side in (16, 32, 64)),
}
"""How the cost grows: what varies -> tasks."""


@dataclass(frozen=True)
class Task:
    """One row: `run(seed)` bounds a batch of new images, their gradients, or takes a step on it."""

    name: str
    run: Callable[[int], object]


def make(name: str) -> Task:
    """The task called `"<network> <method> <batch>"`.

    Raises:
        ValueError: it names no such network or method.
    """
    try:
        network, method, batch = name.split()
        (module, shape), bound, count = NETWORKS[network], ALL[method], int(batch)
    except (ValueError, KeyError) as error:
        known = f"networks {', '.join(NETWORKS)}; methods {', '.join(ALL)}"
        raise ValueError(f'task {name!r} is not "<network> <method> <batch>" ({known})') from error
    params = _uniform(module, shape)
    labels = np.zeros(count, np.int32)

    def images(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).uniform(size=(count, *shape)).astype(np.float32)

    def bounds(params, x) -> jax.Array:
        return jb.margins(params, x, labels, RADIUS, method=bound, apply_fn=module.apply)

    def gradients(params, x) -> jb.Interval:
        logit = jnp.zeros((1, 10)).at[0, 0].set(1)
        return jb.jacobian_bounds(params, x, RADIUS, method=bound, apply_fn=module.apply, spec=logit)

    if method in TRAINING:
        return Task(name, _training(module, params["params"], bound, images, labels))
    called = gradients if method in JACOBIANS else jax.jit(bounds) if method in COMPILED else bounds
    return Task(name, lambda seed: called(params, images(seed)))


def _training(module: nn.Module, params, method: jb.Method, images: Callable, labels: np.ndarray) -> Callable:
    """Steps of certified training at the full radius, with equal weights of the bound and of IBP."""
    objective = losses.Objective(module.apply, losses.MarginLoss(method))
    chosen = schedules.Epsilon(RADIUS, start=0, length=0)
    weights = step.Schedules.of(chosen, beta_start=0.5, beta_final=0.5)
    taken = jax.jit(step.Step(objective, weights, phase="robust"))
    state = step.create(module, images(0)[:1], optax.sgd(0.1), jax.random.key(0)).replace(params=params)
    return lambda seed: taken(state, step.whole_batch(images(seed), labels))


def _uniform(module: nn.Module, shape: tuple[int, ...]):
    """Parameters uniform in +-1/sqrt(fan in), from a fixed seed."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))

    def layer(leaves: dict):
        scale = 1 / np.sqrt(np.prod(leaves["kernel"].shape[:-1]))
        return {k: jnp.asarray(rng.uniform(-scale, scale, v.shape), jnp.float32) for k, v in leaves.items()}

    return {"params": {name: layer(leaves) for name, leaves in shapes["params"].items()}}
