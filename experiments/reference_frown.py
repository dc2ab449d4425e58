"""Compare tuned margins and radii with arrays of the FROWN code: `python -m experiments.reference_frown FOLDER`.

Reads `frown_*_<activation>.npz`: a chain of Dense layers (`W0`, `b0`, ...), images `x`, labels `y`, one other class for
each (`target`), and for p = inf, 2, 1 what FROWN with slopes for every neuron found: lower bounds of the margins of
label over target at one radius (`fixed|p<p>|frown|eps`, `margin_lb`), certified radii (`radius|p<p>|frown|l_eps`), and
wall and CPU seconds for the whole batch. Prints how many of ours are at least theirs, the worst difference, and CPU
seconds per image of a second call. Theirs are float32: a difference below 1e-6 of a margin, or of 1, counts as none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb

_ROUNDED = 1e-6
"""What their float32 arrays may lack, relative to a margin, or to a radius."""


def timed(function: Callable[[], object]) -> tuple[np.ndarray, float]:
    """The result of a call, and the CPU seconds of a second one."""
    jax.block_until_ready(function())
    started = time.process_time()
    found = np.asarray(function())
    return found, time.process_time() - started


def compare(
    path: Path, norm: str, method: jb.Frown, dtype, tolerance: float
) -> list[tuple[str, np.ndarray, np.ndarray, float, float]]:
    """`(what, ours, theirs, our CPU seconds, theirs)` for margins, and for radii where the file has them."""
    data = np.load(path)
    depth = sum(name[0] == "W" for name in data.files)
    layers = [(jnp.asarray(data[f"W{k}"], dtype), jnp.asarray(data[f"b{k}"], dtype)) for k in range(depth)]
    x, labels, others = jnp.asarray(data["x"], dtype), data["y"], data["target"]
    key = f"p{norm}|frown"
    eps = float(data[f"fixed|{key}|eps"])
    options = {"activation": path.stem.rpartition("_")[2], "norm": float(norm)}
    images = np.arange(len(labels))
    spec = np.zeros((len(labels), 1, layers[-1][0].shape[1]), dtype)
    spec[images, 0, labels] = 1
    spec[images, 0, others] -= 1

    def margins():
        fixed = {"steps": method.steps, "spec": jnp.asarray(spec), "sides": "lower"}
        return jb.frown(layers, x, eps, **options, **fixed).lower[:, 0]

    def radii():
        how = {"targets": others, "method": method, "initial": eps, "tolerance": tolerance}
        return jb.certified_radius(layers, x, labels, **how, **options)

    seconds = float(data[f"fixed|{key}|seconds_wall_cpu"][1])
    found = [("margin", *timed(margins), data[f"fixed|{key}|margin_lb"], seconds)]
    if f"radius|{key}|l_eps" in data.files:
        seconds = float(data[f"radius|{key}|seconds_wall_cpu_total"][1])
        found.append(("radius", *timed(radii), data[f"radius|{key}|l_eps"], seconds))
    return [(what, ours, theirs, mine, other) for what, ours, mine, theirs, other in found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exit with 1 if a margin or a radius is below theirs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with frown_*.npz")
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="of tuning, for every bound")
    parser.add_argument("--norms", nargs="+", default=["inf", "2", "1"], choices=("inf", "2", "1"))
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of radii; theirs is 0.02, on the same grid")
    parser.add_argument("--float32", action="store_true", help="by default all is computed in float64")
    options = parser.parse_args(arguments)
    paths = [path for path in sorted(options.folder.glob("frown_*.npz")) if "y" in np.load(path).files]
    if not paths:
        raise SystemExit(f"{options.folder}: there is no frown_*.npz with labels `y` in it")
    jax.config.update("jax_enable_x64", not options.float32)
    dtype, failures = np.float32 if options.float32 else np.float64, 0
    for path in paths:
        for norm in options.norms:
            if f"fixed|p{norm}|frown|eps" not in np.load(path).files:
                continue
            for steps in options.steps:
                method = jb.Frown(steps=steps)
                for what, ours, theirs, mine, other in compare(path, norm, method, dtype, options.tolerance):
                    least = (ours - theirs) / np.maximum(1, np.abs(theirs)) if what == "margin" else ours / theirs - 1
                    failed = bool(least.min() < -_ROUNDED)
                    failures += failed
                    count = len(theirs)
                    print(
                        f"{path.stem:28s} l{norm:4s} {steps:4d} steps  {what}: mean {ours.mean():.5f} over"
                        f" {theirs.mean():.5f}, at least theirs {np.sum(least >= -_ROUNDED)}/{count}, least"
                        f" {least.min():+.1e}; CPU s per image {mine / count:.4f}, {other / mine:.1f} times less"
                        + (" FAIL" if failed else ""),
                        flush=True,
                    )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
