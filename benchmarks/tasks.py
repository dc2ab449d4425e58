"""What is timed: networks with random weights, bounds of their margins or gradients, and steps of certified training.

Weights and biases are uniform in +-1/sqrt(fan in), inputs uniform in [0, 1], all float32; the specification is the 9
margins of one class; lower bounds only, at radius 0.01. Convolutions have no padding (`dm_large`: one pixel). Networks
called `trained_...` are trained (`trained`): their images are MNIST's, and at their radius 80 % are certified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from benchmarks import trained
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
    "trained_5x512": (Layers(hidden=(512,) * 5), (784,)),
    "trained_9x200": (Layers(hidden=(200,) * 9), (784,)),
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


RIVALS = (
    "mlp_3x1024 ibp 64", "mlp_3x1024 jit_ibp 64", "mlp_3x1024 crown_ibp 64", "mlp_3x1024 crown 8",
    "mlp_3x1024 crown 32", "mlp_3x1024 frown20 2", "mlp_7x1024 ibp 64", "mlp_7x1024 jit_ibp 64",
    "mlp_7x1024 crown_ibp 64", "mlp_7x1024 crown 8", "trained_5x512 crown 8", "trained_9x200 crown 8",
    "cnn_small ibp 64", "cnn_small jit_ibp 64", "cnn_small crown_ibp 64", "cnn_small crown 8", "cnn_small frown20 2",
    "cnn_medium ibp 16", "cnn_medium jit_ibp 16", "cnn_medium crown_ibp 16", "cnn_medium crown 1",
    "cnn_small train_crown_ibp 256", "mlp_3x1024 train_crown_ibp 256",
)  # fmt: skip
"""Tasks that `--rival` runs with auto_LiRPA as well."""

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
    arrays: Callable[[int], dict[str, Any]]
    """What another process needs to run the same with the first so many seeds (`rival`)."""


def make(name: str, folder: Path | None = None) -> Task:
    """The task called `"<network> <method> <batch>"`; `folder` is where TFDS keeps MNIST, for networks to train.

    Raises:
        ValueError: it names no such network or method.
        ArgumentError: no MNIST there.
    """
    try:
        network, method, batch = name.split()
        (module, shape), bound, count = NETWORKS[network], ALL[method], int(batch)
    except (ValueError, KeyError) as error:
        known = f"networks {', '.join(NETWORKS)}; methods {', '.join(ALL)}"
        raise ValueError(f'task {name!r} is not "<network> <method> <batch>" ({known})') from error
    labels = np.zeros(count, np.int32)
    if network.startswith("trained"):
        params, radius, pool = trained.train(module, folder)
    else:
        params, radius, pool = _uniform(module, shape), RADIUS, None

    def images(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        drawn = rng.uniform(size=(count, *shape)) if pool is None else pool[rng.integers(0, len(pool), count)]
        return drawn.astype(np.float32)

    def bounds(params, x) -> jax.Array:
        return jb.margins(params, x, labels, radius, method=bound, apply_fn=module.apply)

    def gradients(params, x) -> jb.Interval:
        logit = jnp.zeros((1, 10)).at[0, 0].set(1)
        return jb.jacobian_bounds(params, x, radius, method=bound, apply_fn=module.apply, spec=logit)

    def arrays(seeds: int) -> dict[str, Any]:
        layers = _layers(params["params"], module) if isinstance(module, Layers) else {}
        some = np.stack([images(seed) for seed in range(seeds)])
        return {"images": some, "radius": radius, "method": method, **layers}

    if method in TRAINING:
        return Task(name, _training(module, params["params"], bound, images, labels), arrays)
    called = gradients if method in JACOBIANS else jax.jit(bounds) if method in COMPILED else bounds
    return Task(name, lambda seed: called(params, images(seed)), arrays)


def _training(module: nn.Module, params, method: jb.Method, images: Callable, labels: np.ndarray) -> Callable:
    """Steps of certified training at the full radius, with equal weights of the bound and of IBP."""
    objective = losses.Objective(module.apply, losses.MarginLoss(method))
    chosen = schedules.Epsilon(RADIUS, start=0, length=0)
    weights = step.Schedules.of(chosen, beta_start=0.5, beta_final=0.5)
    taken = jax.jit(step.Step(objective, weights, phase="robust"))
    state = step.create(module, images(0)[:1], optax.sgd(0.1), jax.random.key(0)).replace(params=params)
    return lambda seed: taken(state, step.whole_batch(images(seed), labels))


def _layers(params, module: Layers) -> dict[str, np.ndarray | int]:
    names = [f"Conv_{k}" for k in range(len(module.convolutions))]
    names += [f"Dense_{k}" for k in range(len(module.hidden) + 1)]
    found: dict[str, np.ndarray | int] = {"layers": len(names)}
    for k, name in enumerate(names):
        found |= {f"{part}{k}": np.asarray(params[name][part]) for part in ("kernel", "bias")}
    return found | {f"stride{k}": stride for k, (_, _, stride) in enumerate(module.convolutions)}


def _uniform(module: nn.Module, shape: tuple[int, ...]):
    """Parameters uniform in +-1/sqrt(fan in), from a fixed seed."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))

    def layer(leaves: dict):
        scale = 1 / np.sqrt(np.prod(leaves["kernel"].shape[:-1]))
        return {k: jnp.asarray(rng.uniform(-scale, scale, v.shape), jnp.float32) for k, v in leaves.items()}

    return {"params": {name: layer(leaves) for name, leaves in shapes["params"].items()}}
