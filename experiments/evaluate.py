"""Evaluate trained networks: clean, PGD and verified error by any method at any radius, and over a family.

    python -m experiments.evaluate results/train/mnist_small --eps 0.1 0.2 0.3 --method ibp crown_ibp crown

Each argument is a folder of `experiments.train`: of one model, or of a family of models. Rows are printed, one per
network, method and radius, and for a family the least, median, greatest and mean of each error; a CSV goes to --output.
A method that the configuration did not train with says how loose it is on such a network (the paper's Table 1: a
network trained by IBP, verified by IBP and by CROWN). The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments import require, train, write_csv
from jaxbound.training import data
from jaxbound.training.loop import restore

ERRORS = ("clean_error", "pgd_error", "verified_error")


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The folders of single models among some folders, and in them."""
    found = []
    for folder in folders:
        inside = (
            [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))
        )
        if not inside:
            raise SystemExit(f"{folder}: there is no run of experiments.train")
        found += inside
    return found


def evaluate_run(
    folder: Path, radii: Sequence[float], methods: Sequence[str], options: argparse.Namespace
) -> list[dict]:
    """One row per method and radius."""
    config: train.Config = ConfigDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config.test_examples = options.count if options.count is not None else config.test_examples
    config.pgd_steps = options.pgd_steps if options.pgd_steps is not None else config.pgd_steps
    config.test_batch_size = options.batch_size or config.test_batch_size
    dataset = data.load(config.dataset, options.data_dir)
    rest, _ = dataset.holding_out(config.validation)
    model, _, state = train.pieces(config, folder.name, rest, train.sampler_of(config, rest))
    variables = restore(state, folder).variables
    rows = []
    for method in methods or (config.verify_with,):
        for eps in radii or (config.eps_test,):
            started = time.perf_counter()
            found = train.test_errors(config, model, variables, dataset, eps, method)
            seconds = time.perf_counter() - started
            rows.append({"name": config.name, "model": folder.name, "method": method, "eps": eps,
                         **{key: found[key] for key in ERRORS}, "seconds": round(seconds, 2)})  # fmt: skip
    return rows


def family(rows: Sequence[dict]) -> list[dict]:
    """Least, median, greatest and mean over the models, per method and radius."""
    found = []
    for method, eps in dict.fromkeys((row["method"], row["eps"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["eps"]) == (method, eps)]
        for label, of in (("min", min), ("median", statistics.median), ("max", max), ("mean", statistics.mean)):
            errors = {key: of([row[key] for row in chosen]) for key in ERRORS}
            found.append({"name": chosen[0]["name"], "model": label, "method": method, "eps": eps, **errors,
                          "seconds": round(sum(row["seconds"] for row in chosen), 2)})  # fmt: skip
    return found


def table(rows: Sequence[dict]) -> str:
    """The rows as text."""
    lines = [
        f"{'name':20} {'model':10} {'method':10} {'eps':>8} {'clean':>8} {'PGD':>8} {'verified':>9} {'seconds':>8}"
    ]
    for row in rows:
        errors = f"{row['clean_error']:8.2%} {row['pgd_error']:8.2%} {row['verified_error']:9.2%}"
        head = f"{row['name']:20} {row['model']:10} {row['method']:10} {row['eps']:8.4g}"
        lines.append(f"{head} {errors} {row['seconds']:8.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, evaluate, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of experiments.train")
    parser.add_argument("--eps", type=float, nargs="+", default=[], help="radii; the configuration's by default")
    parser.add_argument("--method", nargs="+", choices=train.METHODS, default=[], help="the configuration's by default")
    parser.add_argument("--data-dir", type=Path, help="where TFDS keeps prepared data sets")
    parser.add_argument("--count", type=int, help="the first test images only")
    parser.add_argument("--pgd-steps", type=int, help="of the attack; the configuration's (200) by default")
    parser.add_argument("--batch-size", type=int, help="images at once")
    parser.add_argument("--output", type=Path, default=Path("results/evaluate"), help="folder for the CSV")
    options = parser.parse_args(arguments)
    require("orbax")
    rows = []
    for folder in runs_in(options.folders):
        rows += evaluate_run(folder, options.eps, options.method, options)
    models = {(row["name"], row["model"]) for row in rows}
    shown = rows + (family(rows) if len(models) > 1 else [])
    print(table(shown))
    write_csv(options.output / "evaluate.csv", shown)
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
