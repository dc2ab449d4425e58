"""Certified radii by bounds of values and by Lipschitz constants: `python -m experiments.robustness`.

Table 1 of the RecurJac paper, and the first task of its tool. For every network and kind of target, the largest radius
around each image at which the label's logit provably stays above the target's, by

    the bounds of --layer_bounds themselves,                                                    "disable"
    local Lipschitz constants on growing balls (Theorem 2), from bounds of the Jacobian that    "recurjac", "fastlip",
    take their pre-activations from --layer_bounds,                                             "recurjac-forward", ...
    the product of operator norms: the margin divided by that constant.                         "spectral"

Without --networks two are trained on the data set, one of them adversarially. The images are those that all networks
classify correctly. For each image PGD looks for the smallest radius at which it succeeds: a certified radius that is
not below it ends the run. Radii are in units of pixels in [0, 1]. One line per image is printed; robustness.csv,
robustness.md and robustness.png have the averages, robustness_images.csv the lines. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jaxbound as jb
from experiments import frown, mlps, require, tables, train_mlp, write_csv

LAYER_BOUNDS: dict[str, jb.Method] = {
    "crown": jb.Crown(),
    "fastlin": jb.FastLin(),
    "interval": jb.IBP(),
    "crown-interval": jb.CrownIBP(),
    "fastlin-interval": jb.FastLin(pre_activation=jb.IBP()),
    "forward": jb.Forward(),
    "quadratic": jb.Quadratic(),
}
JACOBIANS = ("disable", "recurjac", "recurjac-shift", "recurjac-forward", "recurjac-forward-shift", "fastlip")
TARGETS = ("runner-up", "random", "least-likely", "all")
COLUMNS = {
    "network": ("network", "{}"), "target": ("target", "{}"), "layers": ("layer bounds", "{}"),
    "jacobian": ("Jacobian", "{}"), "images": ("images", "{}"), "radius": ("mean radius", "{:.5f}"),
    "pgd_radius": ("PGD's radius", "{:.5f}"), "seconds": ("s/image", "{:.3f}"), "first": ("first batch s", "{:.1f}"),
}  # fmt: skip


def jacobian_method(name: str, layers: jb.Method) -> jb.RecurJac | jb.FastLip:
    """A Jacobian method by its name, over pre-activations by another."""
    if name == "fastlip":
        return jb.FastLip(layers)
    direction = "forward" if "forward" in name else "backward"
    return jb.RecurJac(direction, int(name.endswith("shift")), layers)


def method_of(layers: str, jacobian: str, steps: int) -> jb.Method:
    """What certifies: bounds of values, or an integral of Lipschitz constants."""
    own = LAYER_BOUNDS[layers]
    return own if jacobian == "disable" else jb.LipschitzIntegral(jacobian_method(jacobian, own), steps)


def spectral_radii(network: mlps.Network, x: np.ndarray, classes: np.ndarray, norm: float) -> np.ndarray:
    """The least margin over the product of operator norms, for each image."""
    logits, found = network.logits(x), []
    for k, (label, *others) in enumerate(classes):
        eye = np.eye(logits.shape[1], dtype=np.float32)
        spec = eye[label] - eye[others]
        constants = jb.spectral_lipschitz(network.params, x[:1], norm=norm, apply_fn=network.apply_fn, spec=spec)
        found.append(np.min((logits[k, label] - logits[k, others]) * (1 - 1e-5) / np.asarray(constants)))
    return np.asarray(found)


def targets_of(logits: np.ndarray, images: mlps.Images, target: str, seed: int) -> np.ndarray:
    """For each image its label, then the classes to tell it from."""
    if target.isdigit():
        return np.stack([images.labels, np.full(len(images.x), int(target))], axis=1).astype(np.int32)
    chosen = argparse.Namespace(targets=target, seed=seed, images=None)
    return frown.told_apart(logits, images.labels, images.index, chosen)


def radii(network: mlps.Network, x, classes, method: jb.Method, options: argparse.Namespace) -> np.ndarray:
    """The certified radius of each of a batch of images."""
    targets = "all" if classes.shape[1] > 2 else classes[:, 1]
    found = jb.certified_radius(
        network.params, x, classes[:, 0], targets=targets, norm=options.norm, method=method, steps=options.steps,
        apply_fn=network.apply_fn, clip=(0.0, 1.0) if options.clip else None, initial=options.eps, tolerance=1e-4,
    )  # fmt: skip
    return np.asarray(found)


def measure(network: mlps.Network, images: mlps.Images, target: str, options: argparse.Namespace, bar) -> list[dict]:
    """One row per method for one network and kind of target, each with its images' radii."""
    classes = targets_of(network.logits(images.x), images, target, options.seed)
    kept = np.flatnonzero(classes[:, 0] != classes[:, 1])  # an image of the target's own class has nothing to certify
    x, classes, size = images.x[kept], classes[kept], min(options.batch_size, len(kept))
    rows = []
    for layers, jacobian in options.methods:
        parts, started, first = [], time.perf_counter(), 0.0
        for begin in range(0, len(x), size):
            index = np.minimum(np.arange(begin, begin + size), len(x) - 1)
            if layers == "spectral":
                part = spectral_radii(network, x[index], classes[index], options.norm)
            else:
                method = method_of(layers, jacobian, options.integral_steps)
                part = radii(network, x[index], classes[index], method, options)
            first = first or time.perf_counter() - started
            parts.append(part)
            bar.update()
        found, later = np.concatenate(parts)[: len(x)], len(x) - size
        seconds = (time.perf_counter() - started - first) / later if later else math.nan
        rows.append({"network": network.name, "target": target, "layers": layers, "jacobian": jacobian,
                     "images": len(x), "radius": float(found.mean()), "seconds": seconds, "first": first,
                     "found": found})  # fmt: skip
    largest = np.max([row["found"] for row in rows], axis=0)
    task = frown.Task(network.apply_fn, network.params, x, classes)
    start = np.where(largest > 0, largest, 0.01).astype(np.float32)
    attacked = frown.attacked_radii(task, options.norm, start, options.seed)
    for row in rows:
        name = f"{row['layers']} and {row['jacobian']} on {network.name}"
        frown.check(row["found"], attacked, name)
        row["pgd_radius"], row["attacked"] = float(attacked.mean()), attacked
        row["image"], row["class"] = images.index[kept], classes
    return rows


def lines(rows: Sequence[dict]) -> list[dict]:
    """One line per image and method."""
    return [
        {"network": row["network"], "target": row["target"], "layers": row["layers"], "jacobian": row["jacobian"],
         "image": int(image), "label": int(classes[0]),
         "against": int(classes[1]) if len(classes) == 2 else "all", "radius": float(radius), "pgd_radius": float(pgd)}
        for row in rows
        for image, classes, radius, pgd in zip(row["image"], row["class"], row["found"], row["attacked"], strict=True)
    ]  # fmt: skip


def draw(rows: Sequence[dict], path: Path) -> None:
    """Mean radius by method, one panel per kind of target."""
    targets, given = (list(dict.fromkeys(row[key] for row in rows)) for key in ("target", "network"))
    methods = list(dict.fromkeys((row["layers"], row["jacobian"]) for row in rows))
    with tables.figure(path, len(targets), sharey=True) as panels:
        for panel, target in zip(panels, targets, strict=True):
            for k, name in enumerate(given):
                own = {(r["layers"], r["jacobian"]): r for r in rows if (r["network"], r["target"]) == (name, target)}
                heights = [own[method]["radius"] if own else 0 for method in methods]  # while the others are under way
                panel.bar(np.arange(len(methods)) + 0.8 * k / len(given), heights, 0.8 / len(given), label=name)
            heads = [a if b == "disable" else f"{a}\n{b}" for a, b in methods]
            panel.set_xticks(np.arange(len(methods)) + 0.4 - 0.4 / len(given), heads, fontsize=7)
            panel.set_title(f"target: {target}", fontsize=9)
        panels[0].set_ylabel("mean certified radius")
        panels[0].legend(fontsize=8)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mlps.add_image_flags(parser, count=10)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS[:3]), help=f"{', '.join(TARGETS)}, or a class")
    parser.add_argument("--norm", type=float, default=math.inf, help="1, 2 or inf")
    parser.add_argument("--layer_bounds", nargs="+", choices=[*LAYER_BOUNDS, "spectral"], default=["crown"],
                        help="how values are bounded; quadratic is for two layers and norm 2")  # fmt: skip
    parser.add_argument("--jacobian", nargs="+", choices=JACOBIANS, default=["disable", "recurjac", "fastlip"],
                        help="how Jacobians are bounded; disable for the layer bounds themselves")  # fmt: skip
    parser.add_argument("--integral_steps", type=int, default=15, help="parts of a radius (Theorem 2); the paper: 30")
    parser.add_argument("--steps", type=int, default=15, help="radii that are evaluated per image")
    parser.add_argument("--eps", type=float, default=0.02, help="the first radius")
    parser.add_argument("--clip", action="store_true", help="valid inputs are in [0, 1]")
    parser.add_argument("--attack_radius", type=float, default=0.1, help="of the adversarial training without networks")
    parser.add_argument("--batch_size", type=int, default=5, help="images at once")
    parser.add_argument("--output", type=Path, default=Path("results/robustness"), help="folder for tables and plot")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: two images, short searches")
    options = parser.parse_args(arguments)
    wrong = [target for target in options.targets if target not in TARGETS and not target.isdigit()]
    if wrong or min(options.count, options.steps, options.integral_steps, options.batch_size) < 1:
        parser.error(f"--targets are {', '.join(TARGETS)} or classes; counts, steps and sizes are 1 or more")
    if options.smoke:
        vars(options).update(count=2, targets=["runner-up"], integral_steps=2, steps=6, epochs=2, batch_size=2)
    pairs = [(a, b) for a in options.layer_bounds if a != "spectral" for b in options.jacobian]
    options.methods = pairs + [("spectral", "disable")] * ("spectral" in options.layer_bounds)
    return options


def wanted(options: argparse.Namespace) -> dict[str, train_mlp.Settings]:
    """What is trained where no networks are given."""
    hidden = (8,) if options.smoke else (64, 64)
    radii = {"undefended": 0.0, "adversarial": options.attack_radius}
    return {
        name: train_mlp.Settings(hidden, epochs=options.epochs, attack_radius=radius, seed=options.seed)
        for name, radius in radii.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    options = parse(arguments)
    require("matplotlib", "tqdm")
    dataset = mlps.dataset_of(options)
    given = train_mlp.given_or_trained(options, dataset, wanted(options))
    images = mlps.correct_images(given, dataset, options)
    rows, text = [], ""
    batches = -(-len(images.x) // options.batch_size)
    total = len(given) * len(options.targets) * len(options.methods) * batches
    with mlps.progress("radii", total, "batch") as bar:
        for network in given:
            for target in options.targets:
                bar.set_postfix_str(f"{network.name}, {target}")
                rows += measure(network, images, target, options, bar)
                shown = [{key: row[key] for key in COLUMNS} for row in rows]
                text = tables.save(options.output, "robustness", shown, COLUMNS, draw)
                write_csv(options.output / "robustness_images.csv", lines(rows))
    for line in lines(rows):
        print(" ".join(f"{key}={value:.5f}" if isinstance(value, float) else f"{key}={value}"
                       for key, value in line.items()))  # fmt: skip
    print(text)
    print(json.dumps({"norm": options.norm if options.norm != math.inf else "inf",
                      "rows": [tables.finite({key: row[key] for key in COLUMNS}) for row in rows]}))  # fmt: skip


if __name__ == "__main__":
    main()
