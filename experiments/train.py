"""Train a certifiable network, from data to verified error: `python -m experiments.train --config FILE`.

    python -m experiments.train --config experiments/configs/digits.py --config.eps=0.05 --output results/digits

Every field of `experiments/configs/base.py` can be changed by a flag `--config.FIELD=VALUE`. A configuration may name
several models (a family); `--config.model_subset=0,2` picks some. Each has its own folder `OUTPUT/NAME/MODEL` with its
configuration, `metrics.jsonl`, `checkpoints/` and `result.json`. A run that was killed is continued by the same
command, to the same bits.

The last line on standard output is JSON: for one model its result, for several also the least, median and greatest of
each error. `verified_error` is certified on the test set, in strict arithmetic, and attacked: an attack that breaks a
certificate stops the run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

import jaxbound as jb
from experiments import require
from jaxbound.training import data, fusion, losses, models, schedules
from jaxbound.training.data import Dataset, Examples
from jaxbound.training.loop import Result, Run, fit
from jaxbound.training.step import Schedules, Step, TrainState, create

METHODS: dict[str, jb.Method] = {
    "ibp": jb.IBP(),
    "crown_ibp": jb.CrownIBP(),
    "crown": jb.Crown(),
    "fastlin": jb.FastLin(),
    "crown_zero": jb.Crown(lower_slope="zero"),
}
CLIP = (0.0, 1.0)
Config = Any  # an ml_collections.ConfigDict: its fields have no types


# --- from a configuration to the pieces -------------------------------------------------------------------------------


def model_of(config: Config, name: str, dataset: Dataset):
    """The network that a configuration names: of the paper, "mlp" or "resnet"."""
    normal = {"mean": dataset.mean, "std": dataset.std, "classes": dataset.classes}
    if name == "mlp":
        return models.MLP(tuple(config.hidden), initializer=config.initializer, **normal)
    if name == "resnet":
        axis_name = "devices" if config.parallel == "pmap" else None
        return models.ResNet(tuple(config.hidden), axis_name=axis_name, **normal)
    released = config.released and len(models.ARCHITECTURES[name].convolutions) == 3
    return models.network(name, released=released, initializer=config.initializer, **normal)


def term_of(config: Config, classes: int):
    """The robust term."""
    norm = float(config.norm)
    if config.loss == "natural":
        return None
    if config.loss == "adversarial":
        return losses.AdversarialLoss(config.attack_steps, norm, CLIP)
    if config.loss == "trades":
        return losses.TradesLoss(config.trades_weight, losses.AdversarialLoss(config.attack_steps, norm, CLIP))
    if config.loss == "fused":
        return fusion.FusedLoss(classes, METHODS[config.method], norm, CLIP)
    if config.loss == "margins":
        return losses.MarginLoss(METHODS[config.method], norm, CLIP)
    raise jb.ArgumentError(f"loss={config.loss!r}: choose natural, margins, fused, adversarial or trades")


def epsilon_of(config: Config, steps_per_epoch: int) -> schedules.Epsilon:
    """The radius by step; the configuration counts in epochs."""
    start, length = (round(epochs * steps_per_epoch) for epochs in (config.ramp_start, config.ramp_epochs))
    return schedules.Epsilon(config.eps, start, length, shape=config.ramp_shape)


def learning_rate_of(config: Config, epsilon: schedules.Epsilon, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step."""
    if config.milestones:
        steps = [round(epoch * steps_per_epoch) for epoch in config.milestones]
        return schedules.milestones(config.learning_rate, steps, config.decay_factor)
    if config.decay_every:
        every = max(1, round(config.decay_every * steps_per_epoch))
        return schedules.halved_after(config.learning_rate, epsilon.end, every, config.decay_factor)
    return optax.constant_schedule(config.learning_rate)


def optimizer_of(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam, with the gradient's norm clipped if asked for."""
    adam = optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


def pieces(config: Config, name: str, dataset: Dataset, sampler: data.Sampler) -> tuple[Any, Step, TrainState]:
    """The model, the step and a fresh state."""
    model = model_of(config, name, dataset)
    epsilon = epsilon_of(config, sampler.steps_per_epoch)
    weights = Schedules.of(
        epsilon, kappa_start=config.kappa_start, kappa_final=config.kappa_final, beta_start=config.beta_start,
        beta_final=config.beta_final, clock=config.clock,
    )  # fmt: skip
    objective = losses.Objective(
        model.apply, term_of(config, dataset.classes), l1_weight=config.l1, activity_weight=config.activity
    )
    augment = data.Augment() if config.augment else None
    step = Step(objective, weights, augment=augment, accumulate=config.accumulate)
    optimizer = optimizer_of(config, learning_rate_of(config, epsilon, sampler.steps_per_epoch))
    example = np.zeros((1, *dataset.shape), np.float32)
    return model, step, create(model, example, optimizer, jax.random.key(config.seed))


def sampler_of(config: Config, dataset: Dataset) -> data.Sampler:
    """Which examples a step takes; the batch is a multiple of the number of devices."""
    devices, batch = jax.device_count() * config.accumulate, config.batch_size
    if batch % devices:
        raise jb.ArgumentError(f"batch_size={batch} for {devices} devices and parts: pass a multiple of {devices}")
    return data.Sampler(len(dataset.train), batch, config.seed, jax.process_index(), jax.process_count())


# --- evaluation -------------------------------------------------------------------------------------------------------


def validation(config: Config, model, dataset: Dataset, examples: Examples) -> Callable[[dict], dict] | None:
    """Clean and verified error on held-out examples at the test radius, up to rounding: quick, for choosing."""
    if not len(examples):
        return None
    size = min(config.test_batch_size, len(examples))
    method, norm = METHODS[config.verify_with], float(config.norm)

    @jax.jit
    def look(variables, x, labels):
        bounds = jb.margins(
            variables, x, labels, np.float32(config.eps_test), method=method, apply_fn=model.apply, norm=norm, clip=CLIP
        )
        return model.apply(variables, x).argmax(axis=1) != labels, ~losses.holds(bounds)

    def evaluate(variables: dict) -> dict:
        wrong, unverified = [], []
        for first in range(0, len(examples), size):
            index = np.minimum(np.arange(first, first + size), len(examples) - 1)
            count = min(size, len(examples) - first)
            found = look(variables, dataset.images(examples.x[index]), examples.labels[index])
            wrong.append(np.asarray(found[0])[:count])
            unverified.append(np.asarray(found[1])[:count])
        return {
            "validation_error": float(np.concatenate(wrong).mean()),
            "verified_error": float(np.concatenate(unverified).mean()),
        }

    return evaluate


def test_errors(config: Config, model, variables: dict, dataset: Dataset, eps: float, method: str) -> dict:
    """Clean, PGD and verified error on the test set, or its first `test_examples`.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    count = config.test_examples or len(dataset.test)
    x, labels = dataset.images(dataset.test.x[:count]), dataset.test.labels[:count]
    norm, size = float(config.norm), min(config.test_batch_size, len(x))
    report = jb.certify(
        variables, x, labels, np.float32(eps), method=METHODS[method], apply_fn=model.apply, norm=norm, clip=CLIP,
        batch_size=size,
    )  # fmt: skip

    @jax.jit
    def attack(variables, x, labels, keys):
        return jb.pgd(
            variables, x, labels, np.float32(eps), key=keys, steps=config.pgd_steps, apply_fn=model.apply, norm=norm,
            clip=CLIP, step_size=config.pgd_step_size or None,
        )  # fmt: skip

    keys = jax.random.split(jax.random.key(config.seed), len(x))
    parts = []
    for first in range(0, len(x), size):
        index = np.minimum(np.arange(first, first + size), len(x) - 1)
        parts.append(jax.tree.map(np.asarray, attack(variables, x[index], labels[index], keys[index])))
    found = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(x)], *parts)
    jb.check_against_attack(report, found)
    return {
        "clean_error": report.clean_error,
        "pgd_error": float(np.mean(found.success)),
        "verified_error": report.verified_error,
        "eps": eps,
        "method": method,
    }


# --- a run ------------------------------------------------------------------------------------------------------------


def train_model(config: Config, name: str, dataset: Dataset, folder: Path, stop_after: int | None = None) -> dict:
    """Train one model (or continue) and certify it."""
    rest, held = dataset.holding_out(config.validation)
    sampler = sampler_of(config, rest)
    model, step, state = pieces(config, name, rest, sampler)
    total = stop_after or round(config.epochs * sampler.steps_per_epoch)
    interval = max(1, round(config.interval * sampler.steps_per_epoch))
    ramp_end = epsilon_of(config, sampler.steps_per_epoch).end
    run = Run(total, interval, ramp_end if len(held) else None, config.parallel)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(config, folder / "config.json")
    with _Bar(f"{config.name}/{name}", total) as bar:
        evaluate = validation(config, model, rest, held)
        result = fit(
            step, state, lambda number: data.batch_of(rest, sampler, number), run, folder, evaluate=evaluate,
            report=bar.show,
        )  # fmt: skip
    if stop_after:
        return {"model": name, "seconds": result.seconds, "steps": total}
    found = finished(config, name, model, result, dataset)
    (folder / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def finished(config: Config, name: str, model, result: Result, dataset: Dataset) -> dict:
    """The line of JSON that a run ends with."""
    found = test_errors(config, model, result.variables, dataset, config.eps_test, config.verify_with)
    best = result.best_step if result.best_step >= 0 else int(result.state.step)
    return {
        "name": config.name,
        "model": name,
        "parameters": models.parameter_count(result.variables),
        "seed": config.seed,
        "eps_train": config.eps,
        **found,
        "step": best,
        "seconds": round(result.seconds, 2),
    }


def _check_same(config: Config, path: Path) -> None:
    """A folder holds runs of one configuration."""
    text = config.to_json(sort_keys=True, indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(
            f"{path.parent} holds a run with another configuration; pass another --output, or remove the folder"
        )
    path.write_text(text, encoding="utf-8")


class _Bar:
    """A progress bar with what the last look found."""

    def __init__(self, name: str, total: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=f"{name} (compiling)", unit="step", file=sys.stderr)
        self._name = name

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def show(self, record: dict) -> None:
        """Move to the record's step."""
        shown = {"loss": "loss", "clean": "clean_error", "robust": "robust_error", "val": "validation_error",
                 "verified": "verified_error", "eps": "eps", "kappa": "kappa", "beta": "beta"}  # fmt: skip
        self._bar.set_description(self._name)
        self._bar.set_postfix_str(", ".join(f"{k} {record[key]:.4g}" for k, key in shown.items() if key in record))
        self._bar.update(record["step"] - self._bar.n)


def chosen_models(config: Config) -> list[str]:
    """The models of a configuration, or the subset that was asked for by number."""
    names = list(config.models)
    subset = [int(number) for number in str(config.model_subset).split(",") if number.strip()]
    if any(not 0 <= number < len(names) for number in subset):
        raise SystemExit(
            f"model_subset={config.model_subset}: there are models 0..{len(names) - 1}: {', '.join(names)}"
        )
    return [names[number] for number in subset] or names


def summary(results: list[dict]) -> dict:
    """The least, median, greatest and mean error over a family."""
    rows = {}
    for key in ("clean_error", "pgd_error", "verified_error"):
        values = [result[key] for result in results]
        rows[key] = statistics.median(values)
        rows[f"{key}_min"], rows[f"{key}_max"], rows[f"{key}_mean"] = min(values), max(values), statistics.mean(values)
    same = {key: results[0][key] for key in ("name", "eps_train", "eps", "method")}
    return {**same, **rows, "models": [r["model"] for r in results], "seconds": sum(r["seconds"] for r in results)}


def main(_) -> None:
    """Train the models of a configuration and print the result."""
    require("tqdm", "orbax")
    logging.set_verbosity(logging.WARNING)  # orbax reports every save
    given = flags.FLAGS
    config = given.config
    try:
        dataset = data.load(config.dataset, given.data_dir, download=given.download)
    except (jb.ArgumentError, ImportError) as error:
        raise SystemExit(str(error)) from None
    results = []
    for name in chosen_models(config):
        folder = Path(given.output) / config.name / name
        results.append(train_model(config, name, dataset, folder, given.stop_after))
        if len(results) > 1 or len(config.models) > 1:
            print(json.dumps(results[-1]), flush=True)
    print(json.dumps(results[0] if len(results) == 1 or given.stop_after else summary(results)), flush=True)


def define_flags() -> None:
    """The command's flags; not at import, where defining one reads its default configuration."""
    default = str(Path(__file__).parent / "configs" / "digits.py")
    config_flags.DEFINE_config_file("config", default, "the configuration")
    flags.DEFINE_string("output", "results/train", "folder for checkpoints, metrics and results")
    flags.DEFINE_string("data_dir", None, "where TFDS keeps prepared data sets")
    flags.DEFINE_boolean("download", False, "fetch and prepare a missing data set (needs tensorflow)")
    flags.DEFINE_integer("stop_after", None, "train only so many steps in all, for trials; no result is written")


if __name__ == "__main__":
    define_flags()
    app.run(main)
