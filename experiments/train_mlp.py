"""Train a multilayer perceptron for the experiments on Jacobians: `python -m experiments.train_mlp`.

    python -m experiments.train_mlp --dataset mnist --data_dir FOLDER --hidden 1024 512 256 128 64 32 --output nets/deep
    python -m experiments.train_mlp --dataset mnist --data_dir FOLDER --attack_radius 0.1 --output nets/adversarial

Writes NAME.npz and NAME.json for `experiments.networks`; images are flattened and pixels stay in [0, 1]. The loss is

    cross-entropy(f(x'), y)  +  gradient_weight * || d cross-entropy / dx' ||_2^2,

where x' is the image itself, or with --attack_radius the point that PGD finds; the radius grows from 0 during the first
half of the steps. Dropout acts on the hidden layers, weight decay on the kernels. After every epoch the error on
held-out images is measured (under the attack, if there is one), and the best parameters since the radius is whole are
kept. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from experiments import mlps, networks, require
from jaxbound.training import losses
from jaxbound.training.data import Dataset, Examples, Sampler

CLIP = (0.0, 1.0)


@dataclass(frozen=True)
class Settings:
    """A network and its training; radii are in units of pixels in [0, 1]."""

    hidden: tuple[int, ...] = (64, 64)
    activation: str = "relu"
    leaky_slope: float = 0.3
    weight_decay: float = 0.0
    dropout: float = 0.0
    gradient_weight: float = 0.0
    attack_radius: float = 0.0
    attack_steps: int = 5
    attack_norm: float = math.inf
    learning_rate: float = 1e-3
    epochs: int = 20
    batch_size: int = 128
    validation: int = 200
    examples: int | None = None
    variance: float = 2.0
    seed: int = 0

    @property
    def kind(self) -> str:
        """The activation's name in files."""
        return f"leaky_relu_{self.leaky_slope:g}" if self.activation == "leaky_relu" else self.activation


class Trained(NamedTuple):
    """A network with its parameters, and what was measured."""

    network: mlps.Network
    record: dict[str, Any]


def initial(sizes: Sequence[int], seed: int, variance: float = 2.0) -> mlps.Params:
    """Kernels with so much variance / fan_in, biases 0."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"dense{k}": {
            "kernel": jax.random.normal(key, pair) * math.sqrt(variance / pair[0]),
            "bias": jnp.zeros(pair[1]),
        }
        for k, (key, pair) in enumerate(zip(keys, itertools.pairwise(sizes), strict=True))
    }


def forward(params: mlps.Params, x: jax.Array, settings: Settings, key: jax.Array | None) -> jax.Array:
    """The logits; with a key some values of hidden layers are left out."""
    x, last = x.reshape(x.shape[0], -1), len(params) - 1
    for k in range(len(params)):
        layer = params[f"dense{k}"]
        x = x @ layer["kernel"] + layer["bias"]
        if k < last:
            x = networks.activation(settings.kind)(x)
            if settings.dropout and key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, k), 1 - settings.dropout, x.shape)
                x = jnp.where(kept, x / (1 - settings.dropout), 0)
    return x


def attacked(params: mlps.Params, x, labels, radius, key: jax.Array, settings: Settings) -> jax.Array:
    """The points that PGD finds; x itself without an attack."""
    if not settings.attack_radius:
        return x
    found = jb.pgd(
        params, x, labels, radius, key=key, steps=settings.attack_steps, norm=settings.attack_norm, clip=CLIP,
        apply_fn=lambda params, batch: forward(params, batch, settings, None), restarts=1,
    )  # fmt: skip
    return jax.lax.stop_gradient(found.x)


def loss(params: mlps.Params, x, labels, weight, radius, key: jax.Array, settings: Settings) -> jax.Array:
    """The mean loss over the examples that count."""
    chance, noise = jax.random.split(key)
    x = attacked(jax.lax.stop_gradient(params), x, labels, radius, noise, settings)

    def total(x):
        found = losses.natural(forward(params, x, settings, chance), labels)
        return jnp.sum(weight * found)

    if not settings.gradient_weight:
        return total(x) / jnp.sum(weight)
    value, slope = jax.value_and_grad(total)(x)
    return (value + settings.gradient_weight * jnp.sum(slope**2)) / jnp.sum(weight)


def train(settings: Settings, dataset: Dataset, name: str = "network", *, progress: bool = True) -> Trained:
    """Train a network; all steps of an epoch are one compiled loop."""
    dataset, held = dataset.holding_out(settings.validation)
    count = len(dataset.train) if settings.examples is None else min(settings.examples, len(dataset.train))
    sampler = Sampler(count, settings.batch_size, settings.seed)
    stored, classes = jnp.asarray(dataset.train.x[:count]), jnp.asarray(dataset.train.labels[:count])
    decayed = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")
    optimizer = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay, mask=decayed)
    params = initial((math.prod(dataset.shape), *settings.hidden, dataset.classes), settings.seed, settings.variance)
    state = (params, optimizer.init(params))
    steps = sampler.steps_per_epoch
    whole = max(1, settings.epochs * steps // 2)

    def step(state, batch):
        params, moments = state
        examples, weight, number = batch
        x = stored[examples].astype(jnp.float32) / dataset.scale
        radius = settings.attack_radius * jnp.minimum(1.0, (number + 1) / whole)
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), number)
        value, gradient = jax.value_and_grad(loss)(params, x, classes[examples], weight, radius, key, settings)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    run = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))
    wrong = jax.jit(functools.partial(_wrong, settings=settings))
    best, least = params, math.inf
    with mlps.progress(f"train {name}", settings.epochs, "epoch", disable=not progress) as bar:
        for epoch in range(settings.epochs):
            numbers = np.arange(epoch * steps, (epoch + 1) * steps)
            examples, _, weights = (np.stack(part) for part in zip(*map(sampler, numbers.tolist()), strict=True))
            state, values = run(state, (examples, weights, numbers))
            error = _error(wrong, state[0], dataset, held, settings)
            if (epoch + 1) * steps >= whole and error <= least:
                best, least = state[0], error
            bar.set_postfix_str(f"loss {float(values.mean()):.3f}, validation error {error:.2%}")
            bar.update()
    params = jax.tree.map(np.asarray, best)
    network = mlps.Network(name, mlps.stored(len(settings.hidden), settings.kind), params)
    clean = replace(settings, attack_radius=0.0)
    error = _error(jax.jit(functools.partial(_wrong, settings=clean)), params, dataset, dataset.test, clean)
    return Trained(network, {"name": name, "validation_error": least, "test_error": error})


def given_or_trained(
    options: argparse.Namespace, dataset: Dataset, wanted: Mapping[str, Settings]
) -> list[mlps.Network]:
    """The networks of the flags (`mlps.add_image_flags`), or those wanted, trained and saved by their names."""
    if options.networks:
        return [mlps.load(path) for path in options.networks]
    found = []
    for name, settings in wanted.items():
        network, record = train(settings, dataset, name)
        mlps.save(network, options.output / name.replace(" ", "_"), record)
        found.append(network)
    return found


def _wrong(params, x, labels, weight, key, *, settings: Settings) -> jax.Array:
    x = attacked(params, x, labels, settings.attack_radius, key, settings)
    return jnp.sum(weight * (forward(params, x, settings, None).argmax(axis=1) != labels))


def _error(wrong, params, dataset: Dataset, examples: Examples, settings: Settings) -> float:
    total, size = 0.0, min(500, len(examples))
    for first in range(0, len(examples), size):
        places = np.arange(first, first + size)
        index = np.minimum(places, len(examples) - 1)
        weight = (places < len(examples)).astype(np.float32)
        images = dataset.images(examples.x[index])
        total += float(wrong(params, images, examples.labels[index], weight, jax.random.key(settings.seed)))
    return total / len(examples)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mlps.add_data_flags(parser)
    parser.add_argument("--depth", type=int, help="layers, the last one included, each but this of --width")
    parser.add_argument("--width", type=int, default=20, help="of the hidden layers, with --depth")
    parser.add_argument("--hidden", type=int, nargs="*", default=list(Settings.hidden), help="widths, without --depth")
    parser.add_argument("--activation", choices=networks.ACTIVATIONS, default="relu", help="between the layers")
    for name, text in (
        ("leaky_slope", "of leaky_relu below 0"), ("weight_decay", "of the kernels, as in AdamW"),
        ("dropout", "share of hidden values left out"), ("gradient_weight", "of the squared gradient by the input"),
        ("attack_radius", "adversarial training within this radius"), ("attack_steps", "of PGD"),
        ("attack_norm", "1, 2 or inf"), ("learning_rate", "of Adam"), ("epochs", "passes over the images"),
        ("batch_size", "images at once"), ("validation", "images held out to choose the best epoch"),
        ("variance", "of kernels at first, times their inputs"),
        ("seed", "of the start, of the order and of chance"),
    ):  # fmt: skip
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--examples", type=int, help="train on so many images only")
    parser.add_argument("--output", type=Path, default=Path("results/train_mlp/network"), help="NAME of the two files")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: one epoch, few images")
    options = parser.parse_args(arguments)
    if options.depth is not None:
        if options.depth < 1:
            parser.error("--depth is 1 or more")
        options.hidden = [options.width] * (options.depth - 1)
    if not 0 <= options.dropout < 1 or options.attack_radius < 0 or min(options.epochs, options.validation) < 1:
        parser.error("--dropout is in [0, 1), --attack_radius 0 or more, --epochs and --validation 1 or more")
    if options.smoke:
        vars(options).update(epochs=1, examples=256, validation=32)
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the flags name."""
    fields = {name: getattr(options, name) for name in asdict(Settings())}
    return Settings(**{**fields, "hidden": tuple(options.hidden)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, train, save and print."""
    options = parse(arguments)
    require("tqdm")
    settings = settings_of(options)
    network, record = train(settings, mlps.dataset_of(options), options.output.name)
    mlps.save(network, options.output, {**asdict(settings), "dataset": options.dataset, **record})
    print(json.dumps({**record, "file": str(options.output.with_suffix(".npz"))}))


if __name__ == "__main__":
    main()
