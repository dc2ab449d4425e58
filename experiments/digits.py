"""Train a small network on scikit-learn's handwritten digits and certify it: `python -m experiments.digits`.

Prints clean, PGD and verified error for IBP, CROWN-IBP and CROWN at several radii, writes them as CSV and a plot.
Nothing is downloaded: the digits (8 x 8, scaled to [0, 1]) come with scikit-learn.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

import jaxbound as jb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS: dict[str, jb.Method] = {"IBP": jb.IBP(), "CROWN-IBP": jb.CrownIBP(), "CROWN": jb.Crown()}
RADII = {"inf": (0.01, 0.03, 0.05, 0.1), "2": (0.05, 0.1, 0.2, 0.3)}


class Network(nn.Module):
    """Two hidden layers of 64 ReLUs."""

    @nn.compact
    def __call__(self, x):
        """Logits of a batch."""
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def train(x: np.ndarray, y: np.ndarray, *, epochs: int, eps: float, seed: int) -> dict:
    """Fit the network; half of the loss is the cross-entropy of CROWN-IBP's margins at a radius that grows to eps."""
    model, batch = Network(), 128
    params = model.init(jax.random.key(seed), jnp.zeros((1, x.shape[1])))
    steps = epochs * (len(x) // batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    method = jb.CrownIBP()

    def loss(params, images, labels, radius):
        natural = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()
        margins = jb.margins(params, images, labels, radius, method=method, apply_fn=model.apply, clip=(0.0, 1.0))
        robust = jax.nn.logsumexp(jnp.pad(-margins, ((0, 0), (1, 0))), axis=1).mean()
        return 0.5 * natural + 0.5 * robust

    @jax.jit
    def step(params, state, images, labels, radius):
        gradient = jax.grad(loss)(params, images, labels, radius)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, rng, done = optimizer.init(params), np.random.default_rng(seed), 0
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        order = rng.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch)
        for rows in order:
            done += 1
            params, state = step(params, state, x[rows], y[rows], eps * min(1.0, 2 * done / steps))
    return params


def evaluate(params: dict, x: np.ndarray, y: np.ndarray, radii: dict[str, tuple[float, ...]], seed: int) -> list[dict]:
    """One row per norm, radius and method; raises `SoundnessError` if PGD breaks a verified image."""
    model, rows = Network(), []
    cells = [(norm, eps) for norm, several in radii.items() for eps in several]
    for norm, eps in tqdm(cells, desc="certifying", unit="radius"):
        options = {"apply_fn": model.apply, "norm": float(norm), "clip": (0.0, 1.0)}
        attack = jb.pgd(params, x, y, eps, key=jax.random.key(seed), steps=50, restarts=3, **options)
        for name, method in METHODS.items():
            start = time.perf_counter()
            report = jb.certify(params, x, y, eps, method=method, **options)
            seconds = time.perf_counter() - start
            jb.check_against_attack(report, attack)
            rows.append(
                {
                    "norm": norm, "eps": eps, "method": name, "clean_error": report.clean_error,
                    "pgd_error": float(np.mean(attack.success)), "verified_error": report.verified_error,
                    "seconds": round(seconds, 3),
                }
            )  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    """Print the table."""
    print(f"{'norm':>5} {'radius':>7} {'method':>10} {'clean':>8} {'PGD':>8} {'verified':>9} {'seconds':>8}")
    for row in rows:
        errors = f"{row['clean_error']:8.1%} {row['pgd_error']:8.1%} {row['verified_error']:9.1%}"
        print(f"l{row['norm']:>4} {row['eps']:7.3f} {row['method']:>10} {errors} {row['seconds']:8.2f}")


def save(rows: list[dict], folder: Path) -> None:
    """Write `errors.csv` and `errors.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "errors.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    norms = sorted({row["norm"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(norms), figsize=(5 * len(norms), 3.6), sharey=True, squeeze=False)
    for axis, norm in zip(axes[0], norms, strict=True):
        for name in METHODS:
            part = [row for row in rows if row["norm"] == norm and row["method"] == name]
            axis.plot([row["eps"] for row in part], [100 * row["verified_error"] for row in part], "o-", label=name)
        axis.plot(
            [row["eps"] for row in part], [100 * row["pgd_error"] for row in part], "k--", label="PGD (lower bound)"
        )
        axis.set(xlabel=f"radius (l{norm})", title="digits, verified error")
    axes[0][0].set_ylabel("error, %")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(folder / "errors.png", dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train, certify, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/digits"), help="folder of the CSV and the plot")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--eps", type=float, default=0.05, help="the l_inf radius that the network is trained for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few epochs, images and radii: seconds, for CI")
    options = parser.parse_args(arguments)
    digits = load_digits()
    data = (digits.data / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(data, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    radii = RADII
    if options.smoke:
        options.epochs, radii = 2, {"inf": (0.01, 0.03)}
        x_test, y_test = x_test[:32], y_test[:32]
    params = train(x, y, epochs=options.epochs, eps=options.eps, seed=options.seed)
    rows = evaluate(params, x_test, y_test, radii, options.seed)
    show(rows)
    save(rows, options.output)
    print(f"{len(x_test)} test images; table and plot are in {options.output}/")


if __name__ == "__main__":
    main()
