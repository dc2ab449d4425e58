"""How tight tuned bounds are, next to CROWN's and to the linear program's: `python -m experiments.tightness`.

    crown   about --rows bounds of random networks, in equal parts for all of --activations and --norms: how many are
            looser with FROWN than with CROWN? None may be (else this ends with 1). And how much narrower is the mean?
    lp      ReLU networks of --hidden, trained on digits, --count images, all margins, each image at --scale times the
            radius that CROWN certifies: which part of the gap between CROWN and the linear program of the same
            pre-activation bounds do --lp-steps steps close with these bounds fixed, how many margins does joint tuning
            bring past the program, and how much longer does the program take?

The gap closed is (FROWN - CROWN) / (LP - CROWN) of sums over all margins. Seconds are CPU seconds per image of a second
call, of CROWN and FROWN for a batch, of LP for one image after the other. Writes tightness_crown.csv and
tightness_lp.csv; the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from experiments import digits, require, write_csv
from experiments.frown import MLP, train

PARTS = ("crown", "lp")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu, "relu6": jax.nn.relu6, "abs": jnp.abs,
    "hard_tanh": jax.nn.hard_tanh, "hard_sigmoid": jax.nn.hard_sigmoid, "hard_swish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid, "log_sigmoid": jax.nn.log_sigmoid, "tanh": jnp.tanh, "arctan": jnp.arctan,
    "soft_sign": jax.nn.soft_sign, "erf": jax.scipy.special.erf, "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus, "elu": jax.nn.elu, "celu": jax.nn.celu, "selu": jax.nn.selu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu,
    "mish": jax.nn.mish, "exp": jnp.exp, "square": jnp.square, "sin": jnp.sin, "cos": jnp.cos,
}  # fmt: skip
WIDTHS = (6, 12, 12, 20)
"""Of the random networks: inputs, two hidden layers, outputs."""
RADIUS = {np.inf: 0.2, 2.0: 0.4, 1.0: 0.8}


# --- never looser than CROWN ------------------------------------------------------------------------------------------


def against_crown(options: argparse.Namespace) -> list[dict]:
    """One row per activation and norm; eagerly, so that both methods run the same compiled steps of CROWN."""
    combinations = list(itertools.product(options.activations, options.norms))
    count = -(-options.rows // (len(combinations) * 2 * WIDTHS[-1]))
    rng, rows = np.random.default_rng(options.seed), []
    layers = [
        (jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32), jnp.zeros(shape[1], jnp.float32))
        for shape in itertools.pairwise(WIDTHS)
    ]
    x = jnp.asarray(rng.normal(size=(count, WIDTHS[0])) / 2, jnp.float32)
    for name, norm in combinations:
        jax.clear_caches()  # each has programs of its own, some 100 MB of them
        eps = jnp.asarray(RADIUS.get(norm, 0.3) * rng.uniform(0.1, 1, count), jnp.float32)
        how = {"activation": ACTIVATIONS[name], "norm": norm}
        plain, tuned = jb.crown(layers, x, eps, **how), jb.frown(layers, x, eps, steps=options.steps, **how)
        looser = np.sum(tuned.lower < plain.lower) + np.sum(tuned.upper > plain.upper)
        width = float(jnp.mean(tuned.width) / jnp.mean(plain.width))
        rows.append({
            "activation": name, "norm": f"{norm:g}", "rows": 2 * plain.lower.size, "looser": int(looser),
            "width_over_crown": width,
        })  # fmt: skip
        print(f"{name:14s} norm {norm:g}: {looser} of {2 * plain.lower.size} looser, width x {width:.4f}", flush=True)
    return rows


# --- next to the linear program ---------------------------------------------------------------------------------------


def against_program(options: argparse.Namespace) -> list[dict]:
    """One row per network and norm."""
    rows = []
    for hidden, norm in itertools.product(options.hidden, options.norms):
        rows.append(next_to_program(tuple(map(int, hidden.split("x"))), norm, options))
        row = rows[-1]
        print(
            f"{hidden:12s} norm {norm:g}: {row['closed_percent']:.2f} % of the gap closed, joint past LP on "
            f"{row['joint_past_percent']:.1f} % of {row['margins']}, LP takes x {row['lp_over_fixed']:.0f} and "
            f"x {row['lp_over_joint']:.0f}", flush=True,
        )  # fmt: skip
    return rows


def next_to_program(hidden: tuple[int, ...], norm: float, options: argparse.Namespace) -> dict:
    """What one network with these widths says in one norm."""
    data, model = digits.load_digits(digits.Settings(options.seed, hidden)), MLP(hidden, "relu")
    params = train(model, data, digits.Settings(options.seed, hidden))
    x, labels, how = jnp.asarray(data.test_x), np.asarray(data.test_y), {"norm": norm, "apply_fn": model.apply}
    radii = np.asarray(jb.certified_radius(params, x, labels, method=jb.Crown(), **how))
    chosen = np.flatnonzero(radii)[: options.count]
    x, labels, radii = x[chosen], labels[chosen], options.scale * radii[chosen]
    methods = {
        "crown": jb.Crown(), "fixed": jb.Frown(options.lp_steps, pre_activation=jb.Crown()),
        "joint": jb.Frown(options.lp_steps), "lp": jb.LP(pre_activation=jb.Crown()),
    }  # fmt: skip
    found, seconds = {}, {}
    for name, method in methods.items():
        find = functools.partial(jb.margins, params, x, labels, radii, method=method, **how)
        jax.block_until_ready(find())
        started = time.process_time()
        found[name] = np.asarray(find())
        seconds[name] = (time.process_time() - started) / len(x)
    gained = {name: float(np.sum(found[name] - found["crown"])) for name in ("fixed", "joint", "lp")}
    return {
        "hidden": "x".join(map(str, hidden)), "norm": f"{norm:g}", "margins": found["lp"].size,
        "mean_radius": float(radii.mean()),
        "closed_percent": 100 * gained["fixed"] / gained["lp"],
        "joint_percent": 100 * gained["joint"] / gained["lp"],
        "joint_past_percent": float(100 * np.mean(found["joint"] > found["lp"])),
        **{f"{name}_mean": float(values.mean()) for name, values in found.items()},
        **{f"{name}_cpu_seconds": value for name, value in seconds.items()},
        "lp_over_fixed": seconds["lp"] / seconds["fixed"], "lp_over_joint": seconds["lp"] / seconds["joint"],
    }  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which questions to answer")
    parser.add_argument("--norms", type=float, nargs="+", default=[np.inf, 2.0, 1.0], help="p >= 1, inf included")
    parser.add_argument("--rows", type=int, default=100_000, help="bounds to compare with CROWN's")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=5, help="of the tuning compared with CROWN")
    parser.add_argument("--hidden", nargs="+", default=["20x20", "50x50", "20x20x20x20"], help="widths, one by one")
    parser.add_argument("--count", type=int, default=200, help="images for the linear program")
    parser.add_argument("--lp-steps", type=int, default=12, help="of the tuning compared with the linear program")
    parser.add_argument("--scale", type=float, default=1.0, help="of each image's radius certified by CROWN")
    parser.add_argument("--seed", type=int, default=0, help="of networks and training")
    parser.add_argument("--output", type=Path, default=Path("results/tightness"), help="folder for the tables")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: one norm, one activation, one image")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(norms=[np.inf], rows=400, activations=["relu"], steps=2, hidden=["8"], count=1)
    if options.rows < 1 or options.count < 1:
        parser.error("--rows and --count are 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save; exit with 1 if a tuned bound is looser than CROWN's."""
    options = parse(arguments)
    if "lp" in options.parts:
        require("sklearn", "highspy")
    found = {}
    for part in options.parts:
        found[part] = {"crown": against_crown, "lp": against_program}[part](options)
        write_csv(options.output / f"tightness_{part}.csv", found[part])
    looser = sum(row["looser"] for row in found.get("crown", []))
    compared = sum(row["rows"] for row in found.get("crown", []))
    print(json.dumps({"rows": compared, "looser": looser, "lp": found.get("lp", [])}))
    raise SystemExit(looser > 0)


if __name__ == "__main__":
    main()
