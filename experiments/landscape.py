"""How far there is no stationary point, by depth: `python -m experiments.landscape`.

Figure 2 of the RecurJac paper, and the third task of its tool. For networks of 20 leaky ReLUs a layer and 2 to 10
layers, the largest radius around each image of a class within which some entry of the gradient of that class's logit
keeps its sign, so that no stationary point is there, in l_2 and l_inf; beside it the Lipschitz constant on that ball,
or with --constants on balls of equal parts of the radius, and the product of operator norms. A radius beyond --limit
counts as the limit (by default 100, 10 and 1 for l_1, l_2 and l_inf: the whole domain); "endless" is the share of
images around which there is no stationary point at all.

Without --networks the networks are trained on the data set and saved. Images are those of the class that all networks
classify correctly. Writes landscape.csv, landscape.md and landscape.png; the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jaxbound as jb
from experiments import mlps, networks, require, robustness, tables, train_mlp
from experiments.lipschitz import add_method_flags

LIMITS = {1.0: 100.0, 2.0: 10.0, math.inf: 1.0}
COLUMNS = {
    "network": ("network", "{}"), "layers": ("layers", "{}"), "norm": ("p", "{}"), "method": ("method", "{}"),
    "images": ("images", "{}"), "radius": ("mean radius", "{:.4f}"), "least": ("least", "{:.4f}"),
    "endless": ("endless", "{:.0%}"), "constant": ("Lipschitz constant there", "{:.4g}"),
    "product": ("product of operator norms", "{:.4g}"), "seconds": ("s/image", "{:.3f}"),
    "first": ("first call s", "{:.1f}"),
}  # fmt: skip


def measure(network: mlps.Network, images: mlps.Images, norm: float, name: str, options: argparse.Namespace) -> dict:
    """One row."""
    method = robustness.jacobian_method(name, robustness.LAYER_BOUNDS[options.layer_bounds])
    classes, size = np.full(len(images.x), options.target), min(options.batch_size, len(images.x))
    spec = np.eye(network.logits(images.x[:1]).shape[1], dtype=np.float32)[options.target][None]
    common = {"norm": norm, "apply_fn": network.apply_fn}
    clip = (0.0, 1.0) if options.clip else None
    limit = options.limit or LIMITS[norm]

    def evaluate(index: np.ndarray) -> np.ndarray:
        """Radii, and the constants at equal parts of each, the last of which is all of it."""
        x = images.x[index]
        found = jb.landscape_radius(
            network.params, x, classes[index], method=method, initial=options.eps, steps=options.steps, clip=clip,
            **common,
        )  # fmt: skip
        own = np.minimum(np.asarray(found), np.float32(limit))
        parts = np.arange(1, options.constants + 1, dtype=np.float32) / options.constants
        constants = [
            jb.lipschitz(network.params, x, part * own, method=method, clip=clip, spec=spec, **common)[:, 0]
            for part in parts
        ]
        return np.stack([found, *constants], axis=1)

    batches, seconds, first = tables.timed(evaluate, len(images.x), size)
    radius, *constants = np.concatenate(batches)[: len(images.x)].T
    whole = np.minimum(radius, limit)
    return {
        "network": network.name, "layers": len(network.params), "norm": f"{norm:g}", "method": name,
        "images": len(radius), "radius": float(whole.mean()), "least": float(whole.min()),
        "endless": float(np.isinf(radius).mean()), "constant": float(constants[-1].mean()),
        "constants": " ".join(f"{part.mean():.6g}" for part in constants),
        "product": float(jb.spectral_lipschitz(network.params, images.x[:1], spec=spec, **common)[0]),
        "seconds": seconds, "first": first,
    }  # fmt: skip


def draw(rows: Sequence[dict], path: Path) -> None:
    """Mean radius against the number of layers, one panel per norm."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    with tables.figure(path, len(norms)) as panels:
        for panel, norm in zip(panels, norms, strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                own = [row for row in rows if (row["norm"], row["method"]) == (norm, method)]
                if own:
                    points = zip(*((row["layers"], row["radius"]) for row in own), strict=True)
                    panel.plot(*points, marker="o", label=method)
            panel.set_xlabel(f"layers, l_{norm}")
        panels[0].set_ylabel("radius without a stationary point")
        panels[0].legend(fontsize=8)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mlps.add_image_flags(parser, count=20)
    parser.add_argument("--target", type=int, default=1, help="the class of the images and of the logit")
    parser.add_argument("--depths", type=int, nargs="+", default=list(range(2, 11)), help="layers of what is trained")
    parser.add_argument("--width", type=int, default=20, help="of their hidden layers")
    parser.add_argument("--activation", choices=networks.ACTIVATIONS, default="leaky_relu", help="of what is trained")
    parser.add_argument("--leaky_slope", type=float, default=0.3, help="of leaky_relu below 0")
    parser.add_argument("--norms", type=float, nargs="+", default=[2.0, math.inf], choices=LIMITS, help="1, 2, inf")
    add_method_flags(parser, ["recurjac"])
    parser.add_argument("--steps", type=int, default=15, help="radii that are evaluated per image")
    parser.add_argument("--eps", type=float, default=0.1, help="the first radius")
    parser.add_argument("--constants", type=int, default=1, help="Lipschitz constants at so many parts of each radius")
    parser.add_argument("--limit", type=float, help="what larger radii count as")
    parser.add_argument("--clip", action="store_true", help="valid inputs are in [0, 1]")
    parser.add_argument("--batch_size", type=int, default=20, help="images at once")
    parser.add_argument("--output", type=Path, default=Path("results/landscape"), help="folder for tables and networks")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: two depths, two images")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(count=2, depths=[2, 3], norms=[2.0], steps=5, epochs=2, width=6)
    if (
        min(options.count, options.steps, options.batch_size, options.constants) < 1
        or min(options.depths) < 1
        or options.eps <= 0
    ):
        parser.error("--count, --steps, --batch_size, --constants and --depths are 1 or more, --eps above 0")
    return options


def wanted(options: argparse.Namespace) -> dict[str, train_mlp.Settings]:
    """What is trained where no networks are given."""
    return {
        f"{depth} layers": train_mlp.Settings(
            (options.width,) * (depth - 1), options.activation, options.leaky_slope, epochs=options.epochs,
            seed=options.seed,
        )
        for depth in options.depths
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    options = parse(arguments)
    require("matplotlib", "tqdm")
    dataset = mlps.dataset_of(options)
    given = train_mlp.given_or_trained(options, dataset, wanted(options))
    images = mlps.correct_images(given, dataset, options, options.target)
    rows, text = [], ""
    with mlps.progress("radii", len(given) * len(options.norms) * len(options.methods), "run") as bar:
        for norm in options.norms:
            for name in options.methods:
                for network in given:
                    bar.set_postfix_str(f"{network.name}, l_{norm:g}, {name}")
                    rows.append(measure(network, images, norm, name, options))
                    bar.update()
                    text = tables.save(options.output, "landscape", rows, COLUMNS, draw)
    print(text)
    print(json.dumps({"target": options.target, "rows": [tables.finite(row) for row in rows]}))


if __name__ == "__main__":
    main()
