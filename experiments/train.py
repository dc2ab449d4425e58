"""Train a certifiable network, from data to verified error: `python -m experiments.train --config FILE`.

    python -m experiments.train --config experiments/configs/digits.py --config.eps=0.05 --output results/digits

Every field of `experiments/configs/base.py` can be changed by a flag `--config.FIELD=VALUE`. A configuration may name
several models (a family); `--config.model_subset=0,2` picks some. Each has its own folder `OUTPUT/NAME/MODEL` with its
configuration, `metrics.jsonl`, TensorBoard `events/`, `checkpoints/`, and at its end `variables.npz` and
`result.json`. A run that was killed is continued by the same command, to the same bits.

Several processes train one model where each runs the command with the same flags, a folder that all of them see, and
`--coordinator=HOST:PORT --processes=N --process=I` (or `--distributed` where the launcher says who is who).

The last line on standard output is JSON: for one model its result, for several also the least, median and greatest of
each error. `verified_error` is certified on the test set, in strict arithmetic, and attacked: an attack that breaks a
certificate stops the run.

Length: from a configuration to its pieces, the looks and the test, and the command around them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_flags

import jaxbound as jb
from experiments import require
from experiments.configs import base
from experiments.progress import Bar, Events
from jaxbound.training import data, fusion, losses, models, schedules
from jaxbound.training.data import Dataset, Examples
from jaxbound.training.loop import Result, Run, fit
from jaxbound.training.step import Schedules, Step, TrainState, create

_KEY: Any = np.zeros(2, np.uint32)  # a raw key in NumPy: importing this starts no device; each step draws anew
METHODS: dict[str, jb.Method] = {
    "ibp": jb.IBP(),
    "crown_ibp": jb.CrownIBP(),
    "crown_ibp_alone": jb.CrownIBP(intersect=False),
    "crown": jb.Crown(),
    "fastlin": jb.FastLin(),
    "crown_zero": jb.Crown(lower_slope="zero"),
    "crown_alone": jb.Crown(intersect=False),
    "convex_polytope": jb.ConvexPolytope(),
    "convex_polytope_50": jb.ConvexPolytope(projections=50, key=_KEY),
    "frown": jb.Frown(),
    "best": jb.Best(jb.IBP(), jb.CrownIBP()),
}
"""Bounds by name. "crown_ibp_alone" and "crown_alone" keep nothing of what interval arithmetic says of the margins, as
in the paper's equation 9 and Table 1; "convex_polytope_50" estimates, which makes a loss and no certificate; "best" is,
margin by margin, the better one of IBP and CROWN-IBP."""
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
        return models.ResNet(tuple(config.hidden), axis_name=axis_name, initializer=config.initializer, **normal)
    released = config.released and len(models.ARCHITECTURES[name].convolutions) == 3
    return models.network(name, released=released, initializer=config.initializer, **normal)


def term_of(config: Config):
    """The robust term."""
    norm = float(config.norm)
    if config.loss == "natural":
        return None
    if config.loss == "adversarial":
        return losses.AdversarialLoss(config.attack_steps, norm, CLIP)
    if config.loss == "trades":
        return losses.TradesLoss(config.trades_weight, losses.AdversarialLoss(config.attack_steps, norm, CLIP))
    if config.loss == "fused":
        return fusion.FusedLoss(METHODS[config.method], norm, CLIP)
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
        model.apply, term_of(config), l1_weight=config.l1, activity_weight=config.activity,
        natural_dtype=None if config.natural_dtype == "float32" else jnp.dtype(config.natural_dtype),
    )  # fmt: skip
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


def look_of(config: Config, model, dataset: Dataset, examples: Examples, names: tuple[str, str, str]):
    """`variables -> {name: error}`: clean, PGD, verified at the test radius, up to rounding; None without examples."""
    if not len(examples):
        return None
    size = min(config.test_batch_size, len(examples))
    method, eps = METHODS[config.verify_with], np.float32(config.eps_test)
    around = {"apply_fn": model.apply, "norm": float(config.norm), "clip": CLIP}

    @jax.jit
    def look(variables, x, labels, keys):
        bounds = jb.margins(variables, x, labels, eps, method=method, **around)
        attacked = jb.pgd(variables, x, labels, eps, key=keys, steps=config.look_pgd_steps, **around)
        return model.apply(variables, x).argmax(axis=1) != labels, attacked.success, ~losses.holds(bounds)

    def evaluate(variables: dict) -> dict:
        keys = jax.random.split(jax.random.key(config.seed), len(examples))
        found = in_batches(
            lambda index: look(variables, dataset.images(examples.x[index]), examples.labels[index], keys[index]),
            len(examples), size,
        )  # fmt: skip
        return {name: float(np.mean(values)) for name, values in zip(names, found, strict=True)}

    return evaluate


def in_batches(function: Callable, count: int, size: int):
    """What a function of indices gives for all of them, in batches of one size: the last one repeats the last index."""
    parts = []
    for first in range(0, count, size):
        index = np.minimum(np.arange(first, first + size), count - 1)
        parts.append(jax.tree.map(np.asarray, function(index)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def looked_at(dataset: Dataset, held: Examples, count: int) -> tuple[Examples, tuple[str, str, str]]:
    """Held-out examples, or else the first so many of those that are trained on; and what their errors are called."""
    if len(held):
        return held, ("validation_error", "validation_pgd_error", "verified_error")
    watched = Examples(dataset.train.x[:count], dataset.train.labels[:count])
    return watched, ("watched_error", "watched_pgd_error", "watched_verified_error")


def test_errors(
    config: Config, model, variables: dict, dataset: Dataset, eps: float, methods: Sequence[str]
) -> list[dict]:
    """Clean, PGD and verified error on the test set, or its first `test_examples`: one attack, a row per method.

    Raises:
        SoundnessError: PGD broke a certificate.
    """
    count = config.test_examples or len(dataset.test)
    x, labels = dataset.images(dataset.test.x[:count]), dataset.test.labels[:count]
    around = {"apply_fn": model.apply, "norm": float(config.norm), "clip": CLIP}
    size, radius = min(config.test_batch_size, len(x)), np.float32(eps)

    @jax.jit
    def attack(variables, x, labels, keys):
        step_size = config.pgd_step_size or None
        return jb.pgd(
            variables, x, labels, radius, key=keys, steps=config.pgd_steps, step_size=step_size, **around
        )  # fmt: skip

    keys = jax.random.split(jax.random.key(config.seed), len(x))
    found = in_batches(lambda index: attack(variables, x[index], labels[index], keys[index]), len(x), size)
    rows = []
    for method in methods:
        started = time.perf_counter()
        report = jb.certify(variables, x, labels, radius, method=METHODS[method], batch_size=size, **around)
        jb.check_against_attack(report, found)
        rows.append({
            "clean_error": report.clean_error, "pgd_error": float(np.mean(found.success)),
            "verified_error": report.verified_error, "eps": eps, "method": method,
            "seconds": round(time.perf_counter() - started, 2),
        })  # fmt: skip
    return rows


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
    leads = jax.process_index() == 0
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
        _check_same(config, folder / "config.json")
    shows = [Bar(f"{config.name}/{name}", total), Events(folder)] if leads else []

    def report(record: dict) -> None:
        for show in shows:
            show.show(record)

    with contextlib.ExitStack() as open_ones:
        for show in shows:
            open_ones.callback(show.close)
        result = fit(
            step, state, lambda number: data.batch_of(rest, sampler, number), run, folder,
            evaluate=look_of(config, model, rest, *looked_at(rest, held, config.watch)),
            report=report,
        )  # fmt: skip
    if stop_after:
        return {"model": name, "seconds": result.seconds, "steps": total}
    found = finished(config, name, model, result, dataset)
    if leads:
        arrays: Any = flatten_dict(result.variables, sep="/")
        np.savez_compressed(folder / "variables.npz", **arrays)
        (folder / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def trained(folder: Path) -> tuple[Config, dict]:
    """The configuration of a finished run and its variables.

    Raises:
        SystemExit: the run is not finished.
    """
    config = base.get_config()
    config.update(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if not (folder / "variables.npz").is_file():
        raise SystemExit(f"{folder}: the run is not finished; the command that began it goes on with it")
    with np.load(folder / "variables.npz") as found:
        return config, unflatten_dict(dict(found), sep="/")


def finished(config: Config, name: str, model, result: Result, dataset: Dataset) -> dict:
    """The line of JSON that a run ends with."""
    (found,) = test_errors(config, model, result.variables, dataset, config.eps_test, [config.verify_with])
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
    if given.coordinator or given.distributed:
        jax.distributed.initialize(given.coordinator, given.processes, given.process)
    leads = jax.process_index() == 0
    try:
        dataset = data.load(config.dataset, given.data_dir, download=given.download)
    except (jb.ArgumentError, ImportError) as error:
        raise SystemExit(str(error)) from None
    results = []
    for name in chosen_models(config):
        folder = Path(given.output) / config.name / name
        results.append(train_model(config, name, dataset, folder, given.stop_after))
        if leads and len(config.models) > 1:
            print(json.dumps(results[-1]), flush=True)
    if leads:
        print(json.dumps(results[0] if len(results) == 1 or given.stop_after else summary(results)), flush=True)


def define_flags() -> None:
    """The command's flags; not at import, where defining one reads its default configuration."""
    default = str(Path(__file__).parent / "configs" / "digits.py")
    config_flags.DEFINE_config_file("config", default, "the configuration")
    flags.DEFINE_string("output", "results/train", "folder for checkpoints, metrics and results")
    flags.DEFINE_string("data_dir", None, "where TFDS keeps prepared data sets")
    flags.DEFINE_boolean("download", False, "fetch and prepare a missing data set (needs tensorflow)")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes")
    flags.DEFINE_integer("processes", None, "how many there are")
    flags.DEFINE_integer("process", None, "which of them this is, from 0")
    flags.DEFINE_boolean(
        "distributed", False, "join the processes that a launcher such as Slurm's or a TPU pod's names"
    )
    flags.DEFINE_integer("stop_after", None, "train only so many steps in all, for trials; no result is written")


if __name__ == "__main__":
    define_flags()
    app.run(main)
