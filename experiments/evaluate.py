"""Evaluate trained networks: clean, PGD and verified error by any method at any radius, and over a family.

    python -m experiments.evaluate results/train --eps 0.1 0.2 0.3 --method ibp crown_alone convex_polytope

Each argument is a folder with finished runs of `experiments.train`, at any depth. Rows are printed, one per network,
method, radius and split, and for several networks the least, median, greatest and mean of each error. In --output are
the rows (evaluate.csv), the tables of the CROWN-IBP paper (tables.md; `experiments.summaries`) and, with --figure, its
figures.
The last line on standard output is JSON.

A method that a network was not trained with says how loose it is there. The paper's Table 1: a network trained by IBP,
verified by IBP, by CROWN ("crown_alone", which keeps nothing of IBP) and by the convex polytope.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from experiments import require, summaries, write_csv
from jaxbound.errors import ArgumentError
from jaxbound.methods.named import METHODS, method_named
from jaxbound.training import runs
from jaxbound.training.configuration import Configuration, Slope
from jaxbound.training.data import Dataset
from jaxbound.training.evaluation import test_errors

ERRORS = ("clean_error", "pgd_error", "verified_error")
LABELS = ("dataset", "seed", "kappa_start", "kappa_final", "ramp_epochs", "epochs", "l1")


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs among some folders, and anywhere in them."""
    found = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.rglob("config.json"))
        if not inside:
            raise SystemExit(f"{folder}: there is no run of experiments.train")
        found += inside
    return found


@functools.cache
def read_once(name: str, train_examples: int, data_dir: Path | str | None, download: bool) -> Dataset:
    """A data set, read once for all runs."""
    return runs.dataset_of(Configuration(dataset=name, train_examples=train_examples), data_dir, download=download)


def evaluate_run(
    folder: Path, radii: Sequence[float], methods: Sequence[str], options: argparse.Namespace
) -> list[dict]:
    """One row per method and radius."""
    config, variables = runs.trained(folder)
    finished = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    config.test_examples = options.count if options.count is not None else config.test_examples
    config.pgd_steps = options.pgd_steps if options.pgd_steps is not None else config.pgd_steps
    config.test_batch_size = options.batch_size or config.test_batch_size
    dataset = read_once(config.dataset, config.train_examples, options.data_dir, options.download)
    name = runs.model_in(config, folder)
    apply_fn = runs.apply_of(config, name, dataset)
    bounded = config.loss in ("margins", "fused")
    trained_by = f"{config.method}{' fused' if config.loss == 'fused' else ''}" if bounded else config.loss
    labels = {"name": config.name, "model": name, **{key: getattr(config, key) for key in LABELS}}
    labels |= {"trained_by": trained_by, "eps_train": config.eps, "devices": finished.get("devices", "")}
    labels |= {"training_seconds": finished["seconds"]}
    how, rows = {"lower_slope": options.lower_slope, "intersect": options.intersect}, []
    named = [(method, method_named(method, **how)) for method in methods or (config.verify_with,)]
    for eps in radii or (config.eps_test,):
        for split in options.split:
            found = test_errors(config, apply_fn, variables, dataset, eps, named, split)
            rows += [{**labels, "split": split, **row} for row in found]
    return rows


def family(rows: Sequence[dict]) -> list[dict]:
    """Least, median, greatest and mean over the models, per method and radius."""
    found = []
    for method, eps, split in dict.fromkeys((row["method"], row["eps"], row["split"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["eps"], row["split"]) == (method, eps, split)]
        for label, of in (("min", min), ("median", statistics.median), ("max", max), ("mean", statistics.mean)):
            errors = {key: of([row[key] for row in chosen]) for key in ERRORS}
            what = {"name": f"{len(chosen)} networks", "model": label, "split": split, "method": method, "eps": eps}
            found.append({**what, **errors,
                          "seconds": round(sum(row["seconds"] for row in chosen), 2)})  # fmt: skip
    return found


def table(rows: Sequence[dict]) -> str:
    """The rows as text."""
    lines = [
        f"{'name':20} {'model':10} {'method':16} {'eps':>8} {'clean':>8} {'PGD':>8} {'verified':>9} {'seconds':>8}"
    ]
    for row in rows:
        errors = f"{row['clean_error']:8.2%} {row['pgd_error']:8.2%} {row['verified_error']:9.2%}"
        head = f"{row['name']:20} {row['model']:10} {row['method']:16} {row['eps']:8.4g}"
        lines.append(f"{head} {errors} {row['seconds']:8.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, evaluate, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of experiments.train")
    parser.add_argument("--eps", type=float, nargs="+", default=[], help="radii; the configuration's by default")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[], help="the configuration's by default")
    parser.add_argument("--lower-slope", choices=get_args(Slope), default="", help="of lines below, of every method")
    parser.add_argument("--no-intersect", dest="intersect", action="store_false", help="keep nothing of intervals")
    parser.add_argument("--split", nargs="+", choices=("test", "train"), default=["test"], help="whose errors")
    parser.add_argument("--download", action="store_true", help="fetch and prepare a missing data set")
    parser.add_argument("--data-dir", type=Path, help="where TFDS keeps prepared data sets")
    parser.add_argument("--count", type=int, help="the first images only")
    parser.add_argument("--pgd-steps", type=int, help="of the attack; the configuration's (200) by default")
    parser.add_argument("--batch-size", type=int, help="images at once")
    parser.add_argument(
        "--figure", nargs="+", choices=[*summaries.FIGURES, *summaries.CURVES], default=[], help="figures to draw"
    )
    parser.add_argument("--output", type=Path, default=Path("results/evaluate"), help="folder for tables and figures")
    options = parser.parse_args(arguments)
    require("ml_collections", "matplotlib")
    rows = []
    for folder in runs_in(options.folders):
        try:
            rows += evaluate_run(folder, options.eps, options.method, options)
        except ArgumentError as error:
            raise SystemExit(str(error)) from None
    several = len(rows) > len({(row["method"], row["eps"], row["split"]) for row in rows})
    print(table(rows + (family(rows) if several else [])))
    write_csv(options.output / "evaluate.csv", rows)
    (options.output / "tables.md").write_text(summaries.document(rows), encoding="utf-8")
    histories = [summaries.history(folder) for folder in runs_in(options.folders)]
    for name in options.figure:
        summaries.drawn(name, rows, histories).savefig(options.output / f"{name}.png", dpi=150)
    print(json.dumps(rows + (family(rows) if several else [])))


if __name__ == "__main__":
    main()
