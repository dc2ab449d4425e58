"""What is trained and evaluated: train, evaluate."""

from __future__ import annotations

import time

import jax

from jaxbound import errors
from jaxbound.cli import options as given
from jaxbound.cli.bounding import problem_of
from jaxbound.cli.main import VERIFIED
from jaxbound.cli.output import show, table
from jaxbound.methods.named import method_named
from jaxbound.training import runs
from jaxbound.training.evaluation import errors_of

_COLUMNS = ("eps", "method", "clean_error", "pgd_error", "verified_error", "seconds")


def train(options: given.Train, started: float) -> int:
    """`jaxbound train`."""
    config = options.config
    names, found = runs.chosen_models(config), []
    dataset = runs.dataset_of(config, options.data_dir, download=options.download)
    for name in names:
        folder = runs.folder_of(config, options.output, name)
        result = runs.train_model(config, name, dataset, folder, options.stop_after, progress=not options.json)
        found.append({"folder": str(folder)} | result)
    columns = [column for column in ("folder", *_COLUMNS) if column in found[0]]
    rows = [[row[column] for column in columns] for row in found]
    about = {"seconds": round(time.monotonic() - started, 3)}
    show(options.json, {"runs": found} | about, table(columns, rows))
    return VERIFIED


def evaluate(options: given.Evaluate, started: float) -> int:
    """`jaxbound evaluate`."""
    problem = problem_of(options)
    run = problem.loaded.run
    radii = options.eps or (() if run is None else (run.eps_test,))
    if not radii:
        raise errors.argument("eps", "is missing", "pass radii, such as --eps 0.01 0.02")
    names = options.method or (("crown",) if run is None else (run.verify_with,))
    how = {"lower_slope": options.lower_slope, "intersect": options.intersect}
    methods = [(name, method_named(name, **how)) for name in names]
    rows = []
    for eps in radii:
        rows += errors_of(
            problem.loaded.params, problem.x, problem.known, eps, methods, batch_size=options.batch_size or 256,
            pgd_steps=options.pgd_steps, key=jax.random.key(options.seed), **problem.around,
        )  # fmt: skip
    text = table(_COLUMNS, [[row[column] for column in _COLUMNS] for row in rows])
    show(options.json, {"net": options.net, "rows": rows, "seconds": round(time.monotonic() - started, 3)}, text)
    return VERIFIED
