"""Local Lipschitz constants against the radius: `python -m experiments.lipschitz`.

Figures 1 and 3 of the RecurJac paper, and the second task of its tool. For every network and radius, the Lipschitz
constant of the label's logit (or of a class's, --target) on the ball around each image, averaged over the images, by
every method of --methods; beside it the global constant (an infinite radius) and the product of operator norms, which
no radius changes. At radius 0 the constant is the norm of the gradient. Radii are 0 and `linspace(eps / steps, eps)`,
or with two different exponents `logspace(log_start, log_end)`.

Without --networks one is trained on the data set. Writes lipschitz.csv, lipschitz.md and lipschitz.png; the last line
printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jaxbound as jb
from experiments import mlps, require, robustness, tables, train_mlp

METHODS = robustness.JACOBIANS[1:]
COLUMNS = {
    "network": ("network", "{}"), "method": ("method", "{}"), "radius": ("radius", "{:.5f}"),
    "constant": ("Lipschitz constant", "{:.4g}"), "product": ("product of operator norms", "{:.4g}"),
    "images": ("images", "{}"), "seconds": ("s/image", "{:.4f}"), "first": ("first call s", "{:.1f}"),
}  # fmt: skip


def radii_of(options: argparse.Namespace) -> np.ndarray:
    """Radius 0, then what the flags say, then infinity."""
    if options.log_start != options.log_end:
        inner = np.logspace(options.log_start, options.log_end, options.steps)
    else:
        inner = np.linspace(options.eps / options.steps, options.eps, options.steps)
    return np.concatenate([[0.0], inner, [math.inf]]).astype(np.float32)


def measure(network: mlps.Network, images: mlps.Images, name: str, options: argparse.Namespace, bar) -> list[dict]:
    """One row per radius for one network and method."""
    method = robustness.jacobian_method(name, robustness.LAYER_BOUNDS[options.layer_bounds])
    classes = network.logits(images.x[:1]).shape[1]
    chosen = images.labels if options.target is None else np.full(len(images.x), options.target)
    rows_of = np.eye(classes, dtype=np.float32)
    product = [
        float(jb.spectral_lipschitz(network.params, images.x[:1], norm=options.norm, apply_fn=network.apply_fn,
                                    spec=rows_of[k : k + 1])[0])
        for k in np.unique(chosen)
    ]  # fmt: skip
    by_class = dict(zip(np.unique(chosen).tolist(), product, strict=True))
    rows = []
    for radius in radii_of(options):

        def constants(index: np.ndarray, radius: np.float32 = radius):
            return jb.lipschitz(
                network.params, images.x[index], radius, norm=options.norm, method=method, apply_fn=network.apply_fn,
                spec=rows_of[chosen[index]][:, None], clip=(0.0, 1.0) if options.clip else None,
            )[:, 0]  # fmt: skip

        parts, seconds, first = tables.timed(constants, len(images.x), min(options.batch_size, len(images.x)))
        found = np.concatenate(parts)[: len(images.x)]
        rows.append({
            "network": network.name, "method": name, "radius": float(radius), "constant": float(found.mean()),
            "product": float(np.mean([by_class[int(k)] for k in chosen])), "images": len(found), "seconds": seconds,
            "first": first,
        })  # fmt: skip
        bar.update()
    return rows


def draw(rows: Sequence[dict], path: Path) -> None:
    """Constants against radii, both logarithmic where this is possible; one panel per network."""
    given = list(dict.fromkeys(row["network"] for row in rows))
    with tables.figure(path, len(given)) as panels:
        for panel, name in zip(panels, given, strict=True):
            own = [row for row in rows if row["network"] == name]
            for method in dict.fromkeys(row["method"] for row in own):
                line = [row for row in own if row["method"] == method]
                inner = [row for row in line if 0 < row["radius"] < math.inf]
                drawn = panel.plot(*zip(*((r["radius"], r["constant"]) for r in inner), strict=True), label=method)
                panel.axhline(line[-1]["constant"], color=drawn[0].get_color(), linestyle=":", linewidth=0.8)
            panel.axhline(own[0]["product"], color="black", linestyle="--", label="product of operator norms")
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xlabel(f"radius, {name} (dotted: global)")
        panels[0].set_ylabel("Lipschitz constant")
        panels[0].legend(fontsize=8)


def add_method_flags(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """How Jacobians and the values before them are bounded."""
    parser.add_argument("--layer_bounds", choices=[k for k in robustness.LAYER_BOUNDS if k != "quadratic"],
                        default="crown", help="how the inputs of nonlinearities are bounded")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=methods, help="which ones")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mlps.add_image_flags(parser, count=1)
    parser.add_argument("--target", type=int, help="images and logit of this class; by default of each image's own")
    parser.add_argument("--norm", type=float, choices=[1.0, 2.0, math.inf], default=math.inf, help="1, 2 or inf")
    add_method_flags(parser, ["recurjac", "fastlip"])
    parser.add_argument("--steps", type=int, default=20, help="how many radii")
    parser.add_argument("--eps", type=float, default=0.1, help="the last of evenly spaced radii")
    parser.add_argument("--log_start", type=float, default=-3.0, help="exponent of 10 of the first radius")
    parser.add_argument("--log_end", type=float, default=0.0, help="of the last one; the same for evenly spaced radii")
    parser.add_argument("--clip", action="store_true", help="valid inputs are in [0, 1]")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once")
    parser.add_argument("--output", type=Path, default=Path("results/lipschitz"), help="folder for the table and plot")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: two images, three radii")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(count=2, steps=3, epochs=1)
    if options.steps < 1 or options.count < 1 or options.eps <= 0 or options.batch_size < 1:
        parser.error("--steps, --count and --batch_size are 1 or more, --eps above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    options = parse(arguments)
    require("matplotlib", "tqdm")
    dataset = mlps.dataset_of(options)
    settings = train_mlp.Settings((8, 8) if options.smoke else (64, 64, 64), epochs=options.epochs, seed=options.seed)
    given = train_mlp.given_or_trained(options, dataset, {"trained": settings})
    images = mlps.correct_images(given, dataset, options, options.target)
    rows, text = [], ""
    with mlps.progress("constants", len(given) * len(options.methods) * len(radii_of(options)), "radius") as bar:
        for network in given:
            for name in options.methods:
                bar.set_postfix_str(f"{network.name}, {name}")
                rows += measure(network, images, name, options, bar)
                text = tables.save(options.output, "lipschitz", rows, COLUMNS, draw)
    print(text)
    print(json.dumps({"norm": str(options.norm), "rows": [tables.finite(row) for row in rows]}))


if __name__ == "__main__":
    main()
