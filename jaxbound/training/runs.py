"""Training runs in folders, from a configuration to certified errors.

A run's folder has its `config.json`, `metrics.jsonl`, TensorBoard `events/`, `checkpoints/`, and at its end
`variables.npz` and `result.json`. A run that was killed goes on where its last checkpoint stands, to the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbound import errors
from jaxbound.methods.named import method_named
from jaxbound.training import configuration, data, fusion, imported, losses, models, schedules
from jaxbound.training.configuration import Configuration
from jaxbound.training.data import Dataset
from jaxbound.training.evaluation import clip_of, look_of, looked_at, measure_of, test_errors
from jaxbound.training.loop import Result, Run, fit
from jaxbound.training.modes import NNXApply
from jaxbound.training.progress import Bar, Events
from jaxbound.training.step import Schedules, Step, Trainable, TrainState, create


def dataset_of(config: Configuration, data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """The data set that a configuration names, of jaxbound or the user's own; as much of it as is trained on.

    Raises:
        ArgumentError: it is not there; the message says what to do.
    """
    own = imported.is_own(config.dataset)
    found = imported.dataset(config.dataset) if own else data.load(config.dataset, data_dir, download=download)
    if not 0 <= config.train_examples <= len(found.train):
        total = len(found.train)
        raise errors.argument("train_examples", f"is {config.train_examples} of {total}", "pass fewer, or 0 for all")
    few = config.train_examples or len(found.train)
    return dataclasses.replace(found, train=data.Examples(found.train.x[:few], found.train.labels[:few]))


def described(config: Configuration) -> Dataset:
    """What a network needs to know of the data set, without reading more than this takes."""
    return dataset_of(config) if imported.is_own(config.dataset) else data.described(config.dataset)


def parallel_of(config: Configuration) -> str:
    """How to run over the devices; one device has nothing to share."""
    return config.parallel if jax.device_count() > 1 else "jit"


def model_of(config: Configuration, name: str, dataset: Dataset) -> Trainable:
    """The network that a configuration names: of the paper, "mlp" or "resnet", or the user's own."""
    if imported.is_own(name):
        return imported.network(name)
    normal = {"mean": dataset.mean, "std": dataset.std, "classes": dataset.classes}
    if name == "mlp":
        return models.MLP(tuple(config.hidden), initializer=config.initializer, **normal)
    if name == "resnet":
        axis_name = "devices" if parallel_of(config) == "pmap" else None
        return models.ResNet(tuple(config.hidden), axis_name=axis_name, initializer=config.initializer, **normal)
    released = config.released and len(models.ARCHITECTURES[name].convolutions) == 3
    return models.network(name, released=released, initializer=config.initializer, **normal)


def apply_of(config: Configuration, name: str, dataset: Dataset) -> Callable:
    """`apply_fn(variables, x)` of that network."""
    model = model_of(config, name, dataset)
    return model.apply if isinstance(model, nn.Module) else NNXApply(model)


def term_of(config: Configuration):
    """The robust term."""
    norm, clip = float(config.norm), clip_of(config)
    method = method_named(config.method, lower_slope=config.lower_slope)
    if config.loss == "natural":
        return None
    if config.loss == "adversarial":
        return losses.AdversarialLoss(config.attack_steps, norm, clip)
    if config.loss == "trades":
        return losses.TradesLoss(config.trades_weight, losses.AdversarialLoss(config.attack_steps, norm, clip))
    if config.loss == "fused":
        return fusion.FusedLoss(method, norm, clip)
    if config.loss == "margins":
        return losses.MarginLoss(method, norm, clip)
    raise errors.ArgumentError(f"loss={config.loss!r}: choose natural, margins, fused, adversarial or trades")


def epsilon_of(config: Configuration, steps_per_epoch: int) -> schedules.Epsilon:
    """The radius by step; the configuration counts in epochs."""
    start, length = (round(epochs * steps_per_epoch) for epochs in (config.ramp_start, config.ramp_epochs))
    return schedules.Epsilon(config.eps, start, length, shape=config.ramp_shape)


def learning_rate_of(config: Configuration, epsilon: schedules.Epsilon, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step."""
    if config.milestones:
        steps = [round(epoch * steps_per_epoch) for epoch in config.milestones]
        return schedules.milestones(config.learning_rate, steps, config.decay_factor)
    if config.decay_every:
        every = max(1, round(config.decay_every * steps_per_epoch))
        return schedules.halved_after(config.learning_rate, epsilon.end, every, config.decay_factor)
    return optax.constant_schedule(config.learning_rate)


def optimizer_of(config: Configuration, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam, with the gradient's norm clipped if asked for."""
    adam = optax.adam(learning_rate_of(config, epsilon_of(config, steps_per_epoch), steps_per_epoch))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


def pieces(config: Configuration, name: str, dataset: Dataset, sampler: data.Sampler) -> tuple[Any, Step, TrainState]:
    """The model, the step and a fresh state."""
    model = model_of(config, name, dataset)
    optimizer = optimizer_of(config, sampler.steps_per_epoch)
    state = create(model, np.zeros((1, *dataset.shape), np.float32), optimizer, jax.random.key(config.seed))
    epsilon = epsilon_of(config, sampler.steps_per_epoch)
    weights = Schedules.of(
        epsilon, kappa_start=config.kappa_start, kappa_final=config.kappa_final, beta_start=config.beta_start,
        beta_final=config.beta_final, clock=config.clock,
    )  # fmt: skip
    objective = losses.Objective(
        state.apply_fn, term_of(config), l1_weight=config.l1, activity_weight=config.activity,
        natural_dtype=None if config.natural_dtype == "float32" else jnp.dtype(config.natural_dtype),
    )  # fmt: skip
    augment = data.Augment() if config.augment else None
    step = Step(objective, weights, augment=augment, accumulate=config.accumulate)
    return model, step, started(state, trained(Path(config.warm_start))[1]) if config.warm_start else state


def sampler_of(config: Configuration, dataset: Dataset) -> data.Sampler:
    """Which examples a step takes; the batch is a multiple of the number of devices."""
    devices, batch = jax.device_count() * config.accumulate, config.batch_size
    if batch % devices:
        raise errors.ArgumentError(f"batch_size={batch} for {devices} devices and parts: pass a multiple of {devices}")
    return data.Sampler(len(dataset.train), batch, config.seed, jax.process_index(), jax.process_count())


# --- a run ------------------------------------------------------------------------------------------------------------


def train_model(
    config: Configuration,
    name: str,
    dataset: Dataset,
    folder: Path,
    stop_after: int | None = None,
    *,
    progress: bool = True,
) -> dict:
    """Train one model (or continue) and certify it.

    Args:
        config: of the run.
        name: one of the configuration's models.
        dataset: the one that the configuration names.
        folder: of the run.
        stop_after: train only so many steps in all; nothing is certified or written but checkpoints and records.
        progress: show a bar on the standard error.

    Returns:
        The content of `result.json`.

    Raises:
        ArgumentError: the folder holds a run with another configuration.
        NonFiniteError: with the step.
    """
    rest, held = dataset.holding_out(config.validation)
    sampler = sampler_of(config, rest)
    _, step, state = pieces(config, name, rest, sampler)
    watched, names = looked_at(rest, held, config.watch)
    total = stop_after or round(config.epochs * sampler.steps_per_epoch)
    interval = max(1, round(config.interval * sampler.steps_per_epoch))
    ramp_end = epsilon_of(config, sampler.steps_per_epoch).end
    run = Run(total, interval, ramp_end if len(held) else None, parallel_of(config))
    leads = jax.process_index() == 0
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
        _check_same(config, folder / "config.json")
    shows = [Events(folder), *([Bar(f"{config.name}/{name}", total)] if progress else [])] if leads else []

    def report(record: dict) -> None:
        for show in shows:
            show.show(record)

    with contextlib.ExitStack() as open_ones:
        for show in shows:
            open_ones.callback(show.close)
        result = fit(
            step, state, lambda number: data.batch_of(rest, sampler, number), run, folder,
            evaluate=look_of(config, state.apply_fn, rest, watched, names),
            measure=measure_of(config, state.apply_fn, rest, watched, step.schedules.epsilon), report=report,
        )  # fmt: skip
    if stop_after:
        return {"model": name, "seconds": result.seconds, "steps": total}
    found = finished(config, name, state.apply_fn, result, dataset)
    if leads:
        arrays: Any = flatten_dict(result.variables, sep="/")
        np.savez_compressed(folder / "variables.npz", **arrays)
        (folder / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def trained(folder: Path) -> tuple[Configuration, dict]:
    """The configuration of a finished run and its variables.

    Raises:
        ArgumentError: the run is not finished.
    """
    config = configuration.read(folder / "config.json")
    if not (folder / "variables.npz").is_file():
        raise errors.ArgumentError(f"{folder}: the run is not finished; the command that began it goes on with it")
    with np.load(folder / "variables.npz") as found:
        return config, unflatten_dict(dict(found), sep="/")


def started(state: TrainState, variables: dict, option: str = "warm_start") -> TrainState:
    """A fresh state with the variables of another one of the same network.

    Raises:
        ArgumentError: they are of another network.
    """
    given = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    own = {"params": state.params, "batch_stats": state.batch_stats}
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (given, own)]
    if shapes[0] != shapes[1]:
        raise errors.argument(option, f"has arrays of shapes {shapes[0]}", f"this network has {shapes[1]}")
    return state.replace(**jax.tree.map(jnp.asarray, given))


def finished(config: Configuration, name: str, apply_fn: Callable, result: Result, dataset: Dataset) -> dict:
    """The line of JSON that a run ends with."""
    (found,) = test_errors(config, apply_fn, result.variables, dataset, config.eps_test, [config.verify_with], "test")
    best = result.best_step if result.best_step >= 0 else int(result.state.step)
    return {
        "name": config.name,
        "model": name,
        "parameters": models.parameter_count(result.variables),
        "seed": config.seed,
        "eps_train": config.eps,
        **found,
        "step": best,
        "devices": f"{jax.device_count()} {jax.default_backend()}",
        "seconds": round(result.seconds, 2),
    }


def _check_same(config: Configuration, path: Path) -> None:
    """A folder holds runs of one configuration."""
    text = config.to_json()
    if path.exists() and configuration.read(path) != config:
        raise errors.ArgumentError(
            f"{path.parent} holds a run with another configuration; pass another --output, or remove the folder"
        )
    path.write_text(text, encoding="utf-8")


def chosen_models(config: Configuration) -> list[str]:
    """The models of a configuration, or the subset that was asked for by number.

    Raises:
        ArgumentError: a number or a name that is not known.
    """
    names = list(config.models)
    known = ["mlp", "resnet", *models.ARCHITECTURES]
    for name in names:
        if name not in known and not imported.is_own(name):
            raise errors.unknown_option("models", name, [*known, "module:attribute"])
    subset = [int(number) for number in str(config.model_subset).split(",") if number.strip()]
    if any(not 0 <= number < len(names) for number in subset):
        raise errors.ArgumentError(
            f"model_subset={config.model_subset}: there are models 0..{len(names) - 1}: {', '.join(names)}"
        )
    return [names[number] for number in subset] or names


def folder_of(config: Configuration, output: str | Path, name: str) -> Path:
    """Where a model's run is, `OUTPUT/NAME/MODEL`; an import path without its colon.

    >>> folder_of(Configuration(name="runs"), "results", "my_module:network").as_posix()
    'results/runs/my_module-network'
    """
    return Path(output) / config.name / name.replace(":", "-")


def model_in(config: Configuration, folder: Path) -> str:
    """The name of the model whose run a folder holds."""
    return next((name for name in config.models if folder_of(config, "", name).name == folder.name), folder.name)
