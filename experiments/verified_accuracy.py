"""Clean, PGD and verified accuracy of a stored network, per radius.

    python -m experiments.verified_accuracy --network NET.npz --images IMAGES.npz --eps 0.1 0.2 --count 1000

NET.npz and NET.json: see `experiments.networks`. IMAGES.npz: `image` (count, height, width, channels), uint8 or in
[0, 1], and `label`. Radii are in units of pixels in [0, 1]; the network normalises for itself.

verified accuracy <= true robust accuracy <= PGD accuracy <= clean accuracy for every radius; an attack that breaks a
certificate stops the run. With --results a run that was killed continues after its last batch.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

import jaxbound as jb
from benchmarks import measure
from experiments import networks, require_files, write_csv
from jaxbound.certificates.attack import Attack
from jaxbound.certificates.certification import Report, certify, check_against_attack
from jaxbound.methods import named
from jaxbound.training.evaluation import in_batches

METHODS = {name: named.METHODS[name] for name in ("ibp", "forward", "fastlin", "crown_ibp", "crown")}


def load_images(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images, float32 in [0, 1], and their classes.

    Raises:
        ValueError: floating images that are not in [0, 1].
    """
    with np.load(path) as arrays:
        images, labels = arrays["image"][:count], arrays["label"][:count].astype(np.int32)
    if np.issubdtype(images.dtype, np.integer):
        return images.astype(np.float32) / 255, labels
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"{path.name}: images lie in {images.min():g}..{images.max():g}, not in [0, 1]: scale them")
    return images.astype(np.float32), labels


def _attacked(attack: Callable[..., Attack], x: np.ndarray, labels: np.ndarray, eps, keys, index: np.ndarray) -> Attack:
    """The attack on some images; keys are per image."""
    return attack(x=x[index], labels=labels[index], eps=eps, key=keys[index])


def row(eps: float, report: Report, found: Attack) -> dict:
    """What is printed and saved for one radius."""
    later = len(report.verified) - report.batch_size
    return {
        "radius": eps,
        "clean": 1 - report.clean_error,
        "PGD": 1 - float(np.asarray(found.success).mean()),
        "verified": report.verified_accuracy,
        "first batch s": report.first_batch_seconds,
        "then s/image": (report.seconds - report.first_batch_seconds) / later if later else float("nan"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", type=Path, required=True, help="NAME.npz, with NAME.json beside it")
    parser.add_argument("--images", type=Path, required=True, help="an npz with `image` and `label`")
    parser.add_argument("--eps", type=float, nargs="+", required=True, help="radii, in units of pixels in [0, 1]")
    parser.add_argument("--norm", type=float, default=np.inf, help="1, 2, inf, ...")
    parser.add_argument("--clip", type=float, nargs=2, default=(0.0, 1.0), help="the range of valid pixels")
    parser.add_argument("--count", type=int, default=1000, help="how many images, from the first on")
    parser.add_argument("--method", choices=METHODS, default="crown", help="how to bound")
    parser.add_argument("--batch-size", type=int, help="images at once; by default what fits into the memory limit")
    parser.add_argument(
        "--memory-limit", type=int, help="bytes for the coefficients of a backward pass; 1 GiB by default"
    )
    parser.add_argument("--attack-steps", type=int, default=100, help="PGD's steps per start")
    parser.add_argument("--attack-restarts", type=int, default=5, help="PGD's starts")
    parser.add_argument("--seed", type=int, default=0, help="of PGD's random starts")
    parser.add_argument("--results", type=Path, help="folder for partial results, to continue a run that was killed")
    parser.add_argument("--output", type=Path, default=Path("results/verified_accuracy"), help="folder for the CSV")
    options = parser.parse_args(arguments)
    network = options.network.with_suffix(".npz")
    require_files(network, network.with_suffix(".json"), options.images)
    apply_fn, params = networks.load(network)
    x, labels = load_images(options.images, options.count)
    clip = tuple(options.clip)
    attack = jax.jit(
        functools.partial(
            jb.pgd, params, steps=options.attack_steps, restarts=options.attack_restarts, apply_fn=apply_fn,
            norm=options.norm, clip=clip,
        )
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(options.seed), len(x))
    name = f"{options.network.stem}_{options.method}_l{options.norm:g}"
    print(f"{name}: the first {len(x)} images of {options.images.name}")
    rows = []
    for eps in options.eps:
        results = None if options.results is None else options.results / f"{name}_{eps:g}.npz"
        report = certify(
            params, x, labels, eps, method=METHODS[options.method], apply_fn=apply_fn, norm=options.norm, clip=clip,
            batch_size=options.batch_size, memory_limit=options.memory_limit, results=results, progress=True,
        )  # fmt: skip
        found = in_batches(
            functools.partial(_attacked, attack, x, labels, np.float32(eps), keys),
            len(x), min(100, len(x)),
        )  # fmt: skip
        check_against_attack(report, found)
        rows.append(row(eps, report, found))
    print(" ".join(f"{column:>13s}" for column in rows[0]))
    for values in rows:
        print("{:13g} {:13.2%} {:13.2%} {:13.2%} {:13.2f} {:13.4f}".format(*values.values()))
    path = options.output / f"{name}.csv"
    write_csv(path, rows)
    print(f"no certificate was broken by PGD; at most {measure.peak_mb():.0f} MB; saved to {path.resolve()}")


if __name__ == "__main__":
    main()
