"""Every table and figure of the CROWN-IBP paper in small, by one command: `python -m experiments.crown_ibp_paper`.

    python -m experiments.crown_ibp_paper --data_dir DATA --output results/crown_ibp_paper

Small networks are trained on the first --examples images of a data set, with ramps of a few epochs, and evaluated on
the first --count images of its test set. What is there already is not done again: a command that was stopped goes on,
in the middle of a run too. In --output are the runs (`experiments.train`; `runs/`), their rows (evaluate.csv),
tables.md with Tables 1, 2 and C to H, and the figures: pareto (2), schedules (3, C to E), norms (1), gaps (B).
`experiments.summaries` says what each is. Table G's seconds per step, the convex polytope's 10 and 50 projections
included, are in step_time.md.

Table H's runs train on forced host devices. The errors are those of small runs; experiments/runs has longer ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import evaluate, mlps, require, step_time, summaries, tables, write_csv
from jaxbound.backend.compilation import compilation_cache
from jaxbound.errors import ArgumentError
from jaxbound.training import configuration, data, runs
from jaxbound.training.configuration import Configuration

METHODS = {"IBP": "ibp", "CROWN-IBP": "crown_ibp_alone"}
KAPPAS = ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5))
DEVICES = (1, 2, 4)
VERIFIERS = ("ibp", "crown_ibp_alone", "crown_alone", "convex_polytope")


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run: its configuration, of one model, and how many devices it is trained on."""

    config: Configuration
    devices: int = 1

    def folder(self, output: Path) -> Path:
        """Of the run."""
        return runs.folder_of(self.config, output / "runs", self.config.models[0])


def planned(options: argparse.Namespace) -> list[Planned]:
    """The runs of all tables and figures; the first model is the one of Figure 1, the last one is in most of them."""
    base = Configuration(
        dataset=options.dataset, train_examples=options.examples, hidden=(options.width,) * 2, initializer="ibp",
        eps=options.eps, eps_test=options.eps, epochs=options.epochs, ramp_start=0.05 * options.epochs,
        ramp_epochs=0.6 * options.epochs, decay_every=0.1 * options.epochs, learning_rate=2e-3, watch=128,
        batch_size=options.batch_size, interval=options.epochs / 10, test_examples=options.count, pgd_steps=40,
        look_pgd_steps=3,
    )  # fmt: skip
    first, last = options.models[0], options.models[-1]
    found = []

    def add(name: str, model: str, devices: int = 1, **changes: Any) -> None:
        found.append(Planned(dataclasses.replace(base, name=name, models=(model,), **changes), devices))

    for model in options.models:
        for label, method in METHODS.items():  # Tables 1, 2, C, D; Figure 2; seeds are Table E's
            for start, final in KAPPAS if model == last else KAPPAS[1:2]:
                add(f"{label}-kappa-{start:g}-{final:g}", model, method=method, kappa_start=start, kappa_final=final)
            for seed in range(1, options.seeds):
                add(f"{label}-seed-{seed}", model, method=method, seed=seed)
    for share in (0.15, 0.3):  # Figures 3, C, D, E
        for label, method in METHODS.items():
            add(f"{label}-ramp-{share:g}", last, method=method, ramp_epochs=share * options.epochs)
    for l1 in (0.0, 5e-5):  # Table F
        add(f"l1-{l1:g}", last, eps=options.eps / 2, eps_test=options.eps / 2, l1=l1)
    for devices in DEVICES[1:]:  # Table H; one device is above
        add(f"devices-{devices}", last, devices=devices)
    add("polytope", first, method="convex_polytope_50", beta_final=1.0, kappa_start=0.0)  # Figure 1
    return found


def train(plan: Planned, options: argparse.Namespace) -> None:
    """Train what is planned, in another process where this one has not so many devices; it goes on where it stopped."""
    folder = plan.folder(options.output)
    if (folder / "result.json").is_file() and configuration.read(folder / "config.json") == plan.config:
        return
    request = {"config": dataclasses.asdict(plan.config), "folder": str(folder), "cache": str(options.output / "cache")}
    request |= {"data_dir": options.data_dir and str(options.data_dir), "download": options.download}
    if jax.device_count() == plan.devices:
        return run(request)
    flags = os.environ.get("XLA_FLAGS", "")
    flags = " ".join(flag for flag in flags.split() if "force_host_platform_device_count" not in flag)
    forced = f"{flags} --xla_force_host_platform_device_count={plan.devices}"
    command = [sys.executable, "-m", "experiments.crown_ibp_paper", "--run", json.dumps(request)]
    ended = subprocess.run(command, env={**os.environ, "XLA_FLAGS": forced.strip()}, check=False)
    if ended.returncode:
        raise SystemExit(f"training {folder} failed with code {ended.returncode}; the same command goes on from here")


def run(given: dict[str, Any]) -> None:
    """One run; what its programs have in common with other runs' is compiled once."""
    compilation_cache(given["cache"])
    config = Configuration(**given["config"])
    (name,) = config.models
    try:
        dataset = evaluate.read_once(config.dataset, config.train_examples, given["data_dir"], given["download"])
        runs.train_model(config, name, dataset, Path(given["folder"]))
    except ArgumentError as error:
        raise SystemExit(str(error)) from None


def rows_of(plan: Planned, options: argparse.Namespace) -> list[dict]:
    """The rows of a run, kept beside it: on both splits for Table F, by several methods and radii for Table 1."""
    folder = plan.folder(options.output)
    config = plan.config
    many = config.method == "ibp" and config.name.endswith("kappa-1-0") and config.models[0] == options.models[-1]
    methods = VERIFIERS if many else ("ibp",)
    radii = [config.eps / 2, config.eps] if many else [config.eps]
    splits = ["train", "test"] if config.name.startswith("l1") else ["test"]
    what = {"methods": list(methods), "eps": radii, "split": splits, "count": options.count}
    how = argparse.Namespace(
        count=options.count, pgd_steps=40, batch_size=128, data_dir=options.data_dir, download=False, split=splits,
        lower_slope="", intersect=True,
    )  # fmt: skip
    kept = tables.Pieces(folder / "rows.json", what)
    return kept.get("rows", lambda: evaluate.evaluate_run(folder, radii, methods, how))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=data.SOURCES, default="mnist", help="digits needs no files")
    parser.add_argument("--data_dir", type=Path, help="where TFDS keeps prepared data sets")
    parser.add_argument("--download", action="store_true", help="fetch and prepare a missing data set")
    parser.add_argument("--models", nargs="+", choices=["mlp", "resnet", *runs.models.ARCHITECTURES],
                        default=["A", "mlp"], help="networks; the last one has most runs")  # fmt: skip
    parser.add_argument("--width", type=int, default=64, help="of the two hidden layers of mlp")
    parser.add_argument("--examples", type=int, default=5_120, help="training images; 0 for all")
    parser.add_argument("--count", type=int, default=500, help="images to evaluate on; 0 for all")
    parser.add_argument("--epochs", type=float, default=10.0, help="of a run; ramps are a part of it")
    parser.add_argument("--batch_size", type=int, default=128, help="a multiple of 4, for Table H")
    parser.add_argument(
        "--eps", type=float, default=0.1, help="the radius; half of it in Table F, and in Table 1 beside it"
    )
    parser.add_argument("--seeds", type=int, default=2, help="runs of each way of training, for Table E")
    parser.add_argument("--output", type=Path, default=Path("results/crown_ibp_paper"), help="folder for everything")
    parser.add_argument("--smoke", action="store_true", help="for tests: digits, tiny networks, two epochs")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(
            dataset="digits", models=["mlp"], width=6, examples=256, count=16, epochs=2.0, batch_size=64
        )
    if options.batch_size % math.lcm(*DEVICES) or min(options.epochs, options.seeds, options.width) < 1:
        parser.error("--batch_size is a multiple of 4, --epochs, --seeds and --width are 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, train, evaluate, print and save."""
    options = parse(arguments)
    require("tqdm", "orbax", "matplotlib")
    if options.run:
        return run(json.loads(options.run))
    plans, rows = planned(options), []
    options.output.mkdir(parents=True, exist_ok=True)
    with mlps.progress("CROWN-IBP paper", len(plans) + 1, "run") as bar:
        for plan in plans:
            bar.set_postfix_str(f"{plan.config.name}, {plan.config.models[0]}")
            train(plan, options)
            rows += rows_of(plan, options)
            write_csv(options.output / "evaluate.csv", rows)
            (options.output / "tables.md").write_text(summaries.document(rows), encoding="utf-8")
            bar.update()
        histories = [summaries.history(plan.folder(options.output)) for plan in plans]
        shown = [each for each in histories if each.model == options.models[0] and each.config.seed == 0]
        for name in (*summaries.FIGURES, *summaries.CURVES):
            figure = summaries.drawn(name, rows, shown)
            figure.savefig(options.output / f"{name}.png", dpi=150)
        bar.set_postfix_str("seconds per step")
        timed(options)
        bar.update()
    print(summaries.document(rows))
    print(json.dumps({"rows": rows}))


def timed(options: argparse.Namespace) -> None:
    """Table G's seconds per step."""
    if (options.output / "step_time.md").is_file():
        return
    losses = ["ibp", "crown_ibp", "convex_polytope_10", "convex_polytope_50"]
    models = ["A"] if "A" in options.models else []
    if models:
        step_time.main(["--model", *models, "--loss", *losses, "--output", str(options.output)])


if __name__ == "__main__":
    main()
