"""Train a small network to be certifiable and certify it: `python -m experiments.digits` (under a minute on two cores).

Data: the 8 x 8 digits that come with scikit-learn, scaled to [0, 1]; nothing is downloaded. The training loss is

    cross-entropy(f(x), y)  +  weight * log(1 + sum_j exp(-m_j(x, eps))),

with m_j the mean of the IBP and the CROWN-IBP lower bounds of the margins f_y - f_j over an l_inf ball, whose radius
eps grows from 0 to --train-radius during the first half. The second term is the cross-entropy at the worst logits that
the bounds allow; IBP's share makes a network whose IBP bounds are of use.

Then every test image is certified by IBP, CROWN-IBP and CROWN at several l_inf and l2 radii, and attacked by PGD. For
each radius  clean error <= PGD error <= true robust error <= verified error,  and an attack that breaks a certificate
stops the experiment. A table is printed; a CSV and a plot go to the --output folder.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from experiments import require, write_csv
from jaxbound.certificates.certification import Report, certify, check_against_attack
from jaxbound.certificates.margins import margins

METHODS: dict[str, jb.Method] = {"IBP": jb.IBP(), "CROWN-IBP": jb.CrownIBP(), "CROWN": jb.Crown()}
CLIP = (0.0, 1.0)
TEST_IMAGES = 360
Params = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What an experiment does; the radii are per norm, in units of pixels in [0, 1]."""

    seed: int
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight: float = 0.5
    train_radius: float = 0.05
    test_images: int = TEST_IMAGES
    attack_steps: int = 40
    radii: tuple[tuple[float, tuple[float, ...]], ...] = (
        (np.inf, (0.01, 0.03, 0.05, 0.1)),
        (2.0, (0.05, 0.1, 0.2, 0.4)),
    )

    def smoke(self) -> Settings:
        """The same in seconds: nothing is learned, everything runs."""
        radii = ((np.inf, (0.01, 0.02)),)
        return Settings(self.seed, (16,), epochs=2, test_images=24, attack_steps=2, radii=radii)


class Digits(NamedTuple):
    """Images (count, 64) in [0, 1] and their classes."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class MLP(nn.Module):
    """Dense layers with ReLU between."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def load_digits(settings: Settings) -> Digits:
    """Scikit-learn's digits, a fifth of them for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, classes = np.asarray(images, np.float32) / 16, np.asarray(labels)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[TEST_IMAGES:], order[: settings.test_images]
    return Digits(x[train], classes[train], x[test], classes[test])


# --- training ---------------------------------------------------------------------------------------------------------


def robust_loss(params, x: jax.Array, labels: jax.Array, eps: jax.Array, *, model: MLP, weight: float) -> jax.Array:
    """Cross-entropy, and its upper bound over the balls."""
    logits = jnp.asarray(model.apply(params, x))
    natural = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    bound = functools.partial(margins, params, x, labels, eps, apply_fn=model.apply, clip=CLIP)
    bounds = (bound(method=jb.IBP()) + bound(method=jb.CrownIBP())) / 2
    worst = jnp.concatenate([jnp.zeros_like(bounds[:, :1]), -bounds], axis=1)
    return jnp.mean(natural + weight * jax.nn.logsumexp(worst, axis=1))


def train(model: MLP, data: Digits, settings: Settings) -> Params:
    """Train with the robust loss; the radius grows linearly for half of the steps."""
    from tqdm import tqdm

    optimizer = optax.adam(settings.learning_rate)
    params: Params = dict(model.init(jax.random.key(settings.seed), data.train_x[:1]))
    state = optimizer.init(params)
    loss = functools.partial(robust_loss, model=model, weight=settings.weight)

    @jax.jit
    def step(params, state, x, labels, eps):
        value, gradient = jax.value_and_grad(loss)(params, x, labels, eps)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    rng = np.random.default_rng(settings.seed)
    steps = len(data.train_x) // settings.batch_size
    bar = tqdm(range(settings.epochs), desc="train (compiling)", unit="epoch")
    for epoch in bar:
        order = rng.permutation(len(data.train_x))
        for number in range(steps):
            index = order[number * settings.batch_size : (number + 1) * settings.batch_size]
            share = min(1.0, 2 * (epoch * steps + number) / (settings.epochs * steps))
            eps = np.float32(settings.train_radius * share)
            params, state, value = step(params, state, data.train_x[index], data.train_y[index], eps)
        bar.set_description("train")
        bar.set_postfix_str(f"loss {float(value):.3f}, radius {eps:.3f}")
    return params


# --- certificates -----------------------------------------------------------------------------------------------------


def evaluate(model: MLP, params: Params, data: Digits, settings: Settings) -> list[dict]:
    """One row per norm, radius and method.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    from tqdm import tqdm

    rows = []
    count = len(METHODS) * sum(len(radii) for _, radii in settings.radii)
    with tqdm(total=count, desc="certify", unit="run") as bar:
        for norm, radii in settings.radii:
            attack = jax.jit(
                functools.partial(
                    jb.pgd, params, key=jax.random.key(settings.seed), steps=settings.attack_steps, restarts=2,
                    apply_fn=model.apply, norm=norm, clip=CLIP,
                )
            )  # fmt: skip
            attacks = [attack(data.test_x, data.test_y, np.float32(eps)) for eps in radii]
            for name, method in METHODS.items():
                for eps, found in zip(radii, attacks, strict=True):
                    bar.set_postfix_str(f"{name}, l{norm:g} radius {eps:g}")
                    report = certify(
                        params, data.test_x, data.test_y, eps, method=method, apply_fn=model.apply, norm=norm,
                        clip=CLIP, batch_size=(len(data.test_x) + 1) // 2,
                    )  # fmt: skip
                    check_against_attack(report, found)
                    rows.append(_row(name, norm, eps, report, float(np.asarray(found.success).mean())))
                    bar.update()
    return rows


def _row(name: str, norm: float, eps: float, report: Report, pgd_error: float) -> dict:
    later = len(report.verified) - report.batch_size
    return {
        "norm": f"l{norm:g}",
        "radius": eps,
        "method": name,
        "clean_error": report.clean_error,
        "pgd_error": pgd_error,
        "verified_error": report.verified_error,
        "first_batch_seconds": report.first_batch_seconds,
        "then_milliseconds_per_image": 1000 * (report.seconds - report.first_batch_seconds) / later,
    }


def table(rows: Sequence[dict], images: int) -> str:
    """The rows as text."""
    head = ("norm", "radius", "method", "clean", "PGD", "verified", "first batch s", "then ms/image")
    lines = [
        f"errors on {images} test images; first batches compile where a method or a number of unstable neurons is new",
        "{:5} {:>6} {:10} {:>7} {:>7} {:>9} {:>14} {:>14}".format(*head),
    ]
    form = "{:5} {:6g} {:10} {:7.2%} {:7.2%} {:9.2%} {:14.2f} {:14.3f}"
    return "\n".join([*lines, *(form.format(*row.values()) for row in rows)])


def plot(rows: Sequence[dict], path: Path) -> None:
    """Verified error against radius, with PGD's error below it; one panel per norm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    norms = list(dict.fromkeys(row["norm"] for row in rows))
    figure, panels = plt.subplots(1, len(norms), figsize=(5 * len(norms), 4), sharey=True, squeeze=False)
    for panel, norm in zip(panels[0], norms, strict=True):
        for name in METHODS:
            chosen = [row for row in rows if row["norm"] == norm and row["method"] == name]
            radii = [row["radius"] for row in chosen]
            panel.plot(radii, [100 * row["verified_error"] for row in chosen], marker="o", label=f"{name}, verified")
        panel.plot(radii, [100 * row["pgd_error"] for row in chosen], "k--", marker="x", label="PGD")
        panel.axhline(100 * chosen[0]["clean_error"], color="grey", linestyle=":", label="clean")
        panel.set_xlabel(f"{norm} radius")
    panels[0][0].set_ylabel("error on the digits' test images [%]")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/digits"), help="folder for the CSV and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of the network's start and of the order of batches")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="passes over the training images")
    parser.add_argument("--train-radius", type=float, default=Settings.train_radius, help="l_inf radius of the loss")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, for tests: nothing is learned")
    options = parser.parse_args(arguments)
    require("sklearn", "matplotlib", "tqdm")
    started = time.perf_counter()
    settings = Settings(options.seed, epochs=options.epochs, train_radius=options.train_radius)
    settings = settings.smoke() if options.smoke else settings
    data, model = load_digits(settings), MLP(settings.hidden)
    params = train(model, data, settings)
    rows = evaluate(model, params, data, settings)
    sys.stderr.flush()
    print(table(rows, len(data.test_x)))
    write_csv(options.output / "digits.csv", rows)
    plot(rows, options.output / "digits.png")
    print(f"{time.perf_counter() - started:.1f} s in all; digits.csv and digits.png are in {options.output.resolve()}")


if __name__ == "__main__":
    main()
