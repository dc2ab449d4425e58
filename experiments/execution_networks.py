"""Trained networks as they run: do bounds with `rounding="execution"` hold all values, and what do they cost?

    python -m experiments.execution_networks values --networks A.npz B.npz --images IMAGES.npz --evaluations 1000000
    python -m experiments.execution_networks cost --networks A.npz B.npz C.npz --images IMAGES.npz --radii .01 .02 .03

Networks and images are stored as `experiments.networks` and `experiments.verified_accuracy` say. `values` bounds each
network around a few images, at the radii and at points, and runs it within: random points, corners and the centre; in
batches of several sizes, compiled with the weights as arguments and as constants, mapped over examples, and eagerly.
`cost` certifies the images for each radius with rounding=None, True and "execution", and prints a table: verified
accuracy, and processor seconds for each image once everything is compiled. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from experiments import networks, require_files, tables
from experiments.verified_accuracy import load_images

BATCHES = 1, 7, 64, 500
MODES = {"None": None, "True": True, "execution": "execution"}
METHODS = {"ibp": jb.IBP(), "crown": jb.Crown(), "crown_ibp": jb.CrownIBP()}


def runs(apply_fn: Callable, params) -> dict[str, Callable]:
    """The ways to run a network on images (batch, ...)."""
    network = functools.partial(apply_fn, params)
    one = lambda image: network(image[None])[0]  # noqa: E731
    compiled = jax.jit(apply_fn)
    return {
        "compiled": lambda x: compiled(params, x),
        "compiled with constants": jax.jit(network),
        "mapped": jax.jit(jax.vmap(one)),
        "eager": lambda x: network(jnp.asarray(x)),
    }


def points(rng: np.random.Generator, low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """Random points of a box, corners, and points on faces, within it in single precision."""
    share = rng.uniform(size=(count, *low.shape)).astype(np.float32)
    corners = rng.integers(0, 2, share.shape).astype(np.float32)
    share[1::3] = corners[1::3]
    share[2::3] = np.where(rng.uniform(size=share[2::3].shape) < 0.5, share[2::3], corners[2::3])
    return np.clip(low + (high - low) * share, low, high).astype(np.float32)


def values(path: Path, images: np.ndarray, radii: Sequence[float], evaluations: int, seed: int) -> dict:
    """What was found of one network."""
    rng = np.random.default_rng([seed, len(path.stem)])
    apply_fn, params = networks.load(path)
    one = lambda params, image: apply_fn(params, image[None])[0]  # noqa: E731
    bounded = {
        name: jb.bound(one, method, rounding="execution") for name, method in METHODS.items() if name != "crown_ibp"
    }
    row = {"network": path.stem, "evaluations": 0, "values": 0, "outside": 0}
    cases = [(image, radius) for image in images for radius in (0.0, *radii)]
    widths = []
    for image, radius in cases:
        low, high = image - np.float32(radius), image + np.float32(radius)
        found = [b(params, jb.Box(low, high)) for b in bounded.values()]
        ends = [[np.asarray(end, np.float64) for end in (f.lower, f.upper)] for f in found]
        spread = [np.full(ends[0][0].shape, end) for end in (np.inf, -np.inf)]
        for number, (name, run) in enumerate(runs(apply_fn, params).items()):
            count = evaluations // len(cases) // 4 if name != "eager" else max(8, evaluations // len(cases) // 40)
            tried = points(rng, low, high, count)
            for piece in _pieces(tried, BATCHES[(number + len(widths)) % len(BATCHES)] if name != "eager" else 500):
                got = np.asarray(run(piece), np.float64)
                row["evaluations"] += len(got)
                row["values"] += got.size * len(ends)
                row["outside"] += sum(int((~((got >= lower) & (got <= upper))).sum()) for lower, upper in ends)
                spread = [np.minimum(spread[0], got.min(0)), np.maximum(spread[1], got.max(0))]
        seen = spread[1] > spread[0]
        ratios = ((ends[-1][1] - ends[-1][0])[seen] / (spread[1] - spread[0])[seen]).tolist()
        widths.append(float(np.median(ratios or [np.nan])))
    row["width of Crown / spread, radius 0"] = float(np.nanmedian(widths[:: 1 + len(radii)]))
    return row


def _pieces(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of one size, so that each way compiles few programs; single ones for a thousandth of the points."""
    size, array = (size, array) if size > 1 else (1, array[: max(1, len(array) // 20)])
    whole = len(array) // size * size
    return [array[k : k + size] for k in range(0, whole, size)] or [array]


def cost(path: Path, images: np.ndarray, labels: np.ndarray, radii: Sequence[float], method: str) -> list[dict]:
    """Verified accuracy and time for each radius and mode."""
    apply_fn, params = networks.load(path)
    rows = []
    for radius in radii:
        row = {"network": path.stem, "radius": radius}
        for name, rounding in MODES.items():
            call = functools.partial(
                jb.certify, params, images, labels, radius, method=METHODS[method], apply_fn=apply_fn, norm=jnp.inf,
                clip=(0.0, 1.0), rounding=rounding,
            )  # fmt: skip
            report = call()
            seconds = []
            for _ in range(3):
                started = time.process_time()
                report = call()
                seconds.append((time.process_time() - started) / len(images))
            row[f"verified, {name}"], row[f"s/image, {name}"] = report.verified_accuracy, min(seconds)
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", choices=["values", "cost"])
    parser.add_argument("--networks", type=Path, nargs="+", required=True, help="NAME.npz, with NAME.json beside each")
    parser.add_argument("--images", type=Path, required=True, help="an npz with `image` and `label`")
    parser.add_argument(
        "--radii", type=float, nargs="+", default=[0.01, 0.02, 0.03], help="in units of pixels in [0, 1]"
    )
    parser.add_argument("--count", type=int, default=100, help="images to certify")
    parser.add_argument("--centres", type=int, default=4, help="images around which values are taken")
    parser.add_argument("--evaluations", type=int, default=1_000_000, help="of all networks together")
    parser.add_argument("--method", choices=METHODS, default="crown")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    require_files(*options.networks, options.images)
    images, labels = load_images(options.images, options.count if options.question == "cost" else options.centres)
    started = time.perf_counter()
    if options.question == "values":
        each = options.evaluations // len(options.networks) * 2  # single images are fewer
        rows = []
        for path in options.networks:
            rows.append(values(path, images, options.radii[:1], each, options.seed))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        total = {key: sum(row[key] for row in rows) for key in ("evaluations", "values", "outside")}
        print(json.dumps({**total, "seconds": time.perf_counter() - started, "rows": rows}))
        return
    rows = [row for path in options.networks for row in cost(path, images, labels, options.radii, options.method)]
    forms = {"network": ("network", "{}"), "radius": ("radius", "{:g}")}
    forms |= {f"verified, {name}": (f"verified, {name}", "{:.0%}") for name in MODES}
    forms |= {f"s/image, {name}": (f"CPU s/image, {name}", "{:.4f}") for name in MODES}
    print(tables.markdown(rows, forms))
    print(json.dumps({"method": options.method, "images": len(images), "rows": rows}))


if __name__ == "__main__":
    main()
