"""Train a vision transformer or an LSTM and certify it: `python -m experiments.sequences --model vit`.

How far do certificates reach beyond MLPs? Both networks read the 8 x 8 digits of scikit-learn as a sequence:

    vit     four 4 x 4 patches and a class token; pre-norm blocks of attention and an MLP; the head reads the class
            token, so that every pixel passes through attention,
    lstm    the eight rows are the time steps of stacked LSTMs; the head reads the last state.

The training loss is digits.py's, cross-entropy + weight * log(1 + sum_j exp(-m_j(x, eps))), but with IBP's margins
m_j alone: the gradient of CROWN-IBP through these networks takes minutes to compile. The radius grows by equal steps
from 0 to --train-radius, and shrinks by a fifth where the bounds are worse than useless. Kernels start small, because
intervals grow with |W| where values grow with W.

--norm center leaves out LayerNorm's division by the standard deviation. It is affine, while the variance, the inverse
root and the product of LayerNorm each give something away: with --norm layer only smaller radii are certified.

Then every test image is attacked by PGD and certified by IBP, CROWN-IBP and CROWN. For each radius
verified accuracy <= true robust accuracy <= PGD accuracy <= clean accuracy,  and an attack that breaks a certificate
stops the experiment. A table is printed; a CSV and a plot go to the --output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from experiments import digits, require, write_csv
from experiments.verified_accuracy import row

PATCH = 4
LARGE = 4.0  # a loss: that of logits which are all equal is (1 + weight) * log(10), about 3.5
SMALL = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
QKV = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
MEDIUM = nn.initializers.variance_scaling(0.2, "fan_in", "truncated_normal")
RADII = ((np.inf, (0.01, 0.02, 0.03, 0.05)),)
# `hidden` is, per layer, the width of a block's MLP or of an LSTM.
SETTINGS = {
    "vit": digits.Settings(0, (32, 32), epochs=100, learning_rate=5e-3, train_radius=0.03, radii=RADII),
    "lstm": digits.Settings(0, (32, 32), epochs=150, learning_rate=5e-3, train_radius=0.03, radii=RADII),
}


# --- networks ---------------------------------------------------------------------------------------------------------


class Centering(nn.Module):
    """LayerNorm without the division by the standard deviation: affine, so it costs no tightness."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return scale * (x - x.mean(axis=-1, keepdims=True)) + bias


NORMS: dict[str, Callable[[], nn.Module]] = {"layer": nn.LayerNorm, "center": Centering}


class VisionTransformer(nn.Module):
    """A ReLU stem on each patch, a class token, pre-norm blocks of attention and MLP, and a Dense head."""

    hidden: tuple[int, ...]
    width: int = 16
    heads: int = 4
    norm: str = "center"

    @nn.compact
    def __call__(self, x):
        side = 8 // PATCH
        patches = x.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3).reshape(-1, side**2, PATCH**2)
        tokens = nn.relu(nn.Dense(self.width)(patches))
        tokens = jnp.concatenate([jnp.zeros_like(tokens[:, :1]), tokens], axis=1)  # the first one is the class token
        tokens = tokens + self.param("positions", nn.initializers.normal(0.5), (side**2 + 1, self.width))
        for hidden in self.hidden:
            normed = NORMS[self.norm]()(tokens)
            tokens = tokens + nn.MultiHeadDotProductAttention(self.heads, kernel_init=QKV, out_kernel_init=SMALL)(
                normed, normed
            )
            normed = NORMS[self.norm]()(tokens)
            inner = nn.relu(nn.Dense(hidden, kernel_init=SMALL)(normed))
            tokens = tokens + nn.Dense(self.width, kernel_init=SMALL)(inner)
        return nn.Dense(10)(tokens[:, 0])


class LSTM(nn.Module):
    """Stacked LSTMs over the rows of the image, and a Dense head on the last state."""

    hidden: tuple[int, ...]
    steps: int = 8

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), self.steps, -1)
        for width in self.hidden:
            cell = nn.OptimizedLSTMCell(width, kernel_init=MEDIUM, recurrent_kernel_init=MEDIUM)
            x = jnp.asarray(nn.RNN(cell)(x))
        return nn.Dense(10)(x[:, -1])


# --- training ---------------------------------------------------------------------------------------------------------


def robust_loss(params, x: jax.Array, labels: jax.Array, eps: jax.Array, *, model: nn.Module, weight: float):
    """Cross-entropy, and its upper bound over the balls by IBP."""
    natural = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(model.apply(params, x)), labels)
    bounds = jb.margins(params, x, labels, eps, method=jb.IBP(), apply_fn=model.apply, clip=digits.CLIP)
    worst = jnp.concatenate([jnp.zeros_like(bounds[:, :1]), -bounds], axis=1)
    return jnp.mean(natural + weight * jax.nn.logsumexp(worst, axis=1))


def train(model: nn.Module, data: digits.Digits, settings: digits.Settings) -> digits.Params:
    """Train with the robust loss; the radius grows for two thirds of the steps, longer where it had to shrink."""
    from tqdm import tqdm

    steps = len(data.train_x) // settings.batch_size
    total = settings.epochs * steps
    rates = optax.cosine_decay_schedule(settings.learning_rate, total, 0.05)
    # Infinite bounds have no gradient: their batch changes nothing but the radius.
    optimizer = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates)), total)
    params: digits.Params = dict(model.init(jax.random.key(settings.seed), data.train_x[:1]))
    state = optimizer.init(params)
    loss = functools.partial(robust_loss, model=model, weight=settings.weight)

    @jax.jit
    def step(params, state, x, labels, eps):
        value, gradient = jax.value_and_grad(loss)(params, x, labels, eps)
        updates, state = optimizer.update(gradient, state, params)
        useful = jnp.isfinite(optax.tree.norm(gradient)) & (value < LARGE)
        return optax.apply_updates(params, updates), state, value, useful

    rng, share = np.random.default_rng(settings.seed), 0.0
    bar = tqdm(range(settings.epochs), desc="train (compiling)", unit="epoch")
    for _ in bar:
        batches = rng.permutation(len(data.train_x))[: steps * settings.batch_size].reshape(steps, -1)
        for index in batches:
            eps = np.float32(settings.train_radius * share)
            params, state, value, useful = step(params, state, data.train_x[index], data.train_y[index], eps)
            share = min(1.0, share + 1.5 / total) if useful else 0.8 * share
        bar.set_description("train")
        bar.set_postfix_str(f"loss {float(value):.3f}, radius {eps:.3f}")
    return params


# --- certificates -----------------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module, params: digits.Params, data: digits.Digits, settings: digits.Settings, methods: Sequence[str]
) -> list[dict]:
    """One row per method and radius.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    from tqdm import tqdm

    attack = jax.jit(
        functools.partial(
            jb.pgd, params, data.test_x, data.test_y, key=jax.random.key(settings.seed), steps=settings.attack_steps,
            restarts=2, apply_fn=model.apply, clip=digits.CLIP,
        )
    )  # fmt: skip
    ((_, radii),) = settings.radii
    attacks = [attack(np.float32(eps)) for eps in radii]
    rows = []
    for name, (eps, found) in tqdm([*itertools.product(methods, zip(radii, attacks, strict=True))], desc="certify"):
        report = jb.certify(
            params, data.test_x, data.test_y, eps, method=digits.METHODS[name], apply_fn=model.apply,
            clip=digits.CLIP, batch_size=(len(data.test_x) + 1) // 2,
        )  # fmt: skip
        jb.check_against_attack(report, found)
        rows.append({"method": name, **row(eps, report, found)})
    return rows


def table(rows: Sequence[dict], images: int) -> str:
    """The rows as text."""
    lines = [f"accuracy on {images} test images; the first batches compile", ("{:>14}" * 7).format(*rows[0])]
    form = "{:>14}{:14g}{:14.2%}{:14.2%}{:14.2%}{:14.2f}{:14.5f}"
    return "\n".join([*lines, *(form.format(*values.values()) for values in rows)])


def plot(rows: Sequence[dict], path: Path) -> None:
    """Verified accuracy against the radius, with PGD's accuracy above it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 4))
    for name in dict.fromkeys(values["method"] for values in rows):
        chosen = [values for values in rows if values["method"] == name]
        radii = [values["radius"] for values in chosen]
        panel.plot(radii, [100 * values["verified"] for values in chosen], marker="o", label=f"{name}, verified")
    panel.plot(radii, [100 * values["PGD"] for values in chosen], "k--", marker="x", label="PGD")
    panel.axhline(100 * chosen[0]["clean"], color="grey", linestyle=":", label="clean")
    panel.set(xlabel="linf radius", ylabel="accuracy on the digits' test images [%]")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SETTINGS, required=True, help="the network")
    parser.add_argument(
        "--norm", choices=NORMS, default="center", help="of the transformer: LayerNorm or its centering only"
    )
    parser.add_argument("--radii", type=float, nargs="+", default=RADII[0][1], help="l_inf radii to certify")
    parser.add_argument("--methods", choices=digits.METHODS, nargs="+", default=[*digits.METHODS], help="how to bound")
    parser.add_argument("--train-radius", type=float, help="l_inf radius of the loss")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of the network's start and of the order of batches")
    parser.add_argument(
        "--output", type=Path, default=Path("results/sequences"), help="folder for the CSV and the plot"
    )
    parser.add_argument("--smoke", action="store_true", help="small and short, for tests: nothing is learned")
    options = parser.parse_args(arguments)
    require("sklearn", "matplotlib", "tqdm")
    started = time.perf_counter()
    settings = SETTINGS[options.model]
    settings = dataclasses.replace(
        settings, seed=options.seed, epochs=options.epochs or settings.epochs,
        train_radius=options.train_radius or settings.train_radius,
    )  # fmt: skip
    settings = settings.smoke() if options.smoke else settings
    settings = dataclasses.replace(settings, radii=((np.inf, tuple(options.radii)),))
    data = digits.load_digits(settings)
    if options.model == "lstm":
        model = LSTM(settings.hidden, steps=2 if options.smoke else 8)
    else:
        model = VisionTransformer(settings.hidden, norm=options.norm)
    params = train(model, data, settings)
    rows = evaluate(model, params, data, settings, options.methods)
    sys.stderr.flush()
    print(table(rows, len(data.test_x)))
    table_file, plot_file = f"{options.model}.csv", f"{options.model}.png"
    write_csv(options.output / table_file, rows)
    plot(rows, options.output / plot_file)
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s in all; {table_file} and {plot_file} are in {options.output.resolve()}")


if __name__ == "__main__":
    main()
