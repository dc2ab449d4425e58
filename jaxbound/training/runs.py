"""Training runs in folders, from a configuration to certified errors.

A run's folder has its `config.json`, `metrics.jsonl`, TensorBoard `events/`, `checkpoints/`, and at its end
`variables.npz` and `result.json`. A run that was killed goes on where its last checkpoint stands, to the same bits.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbound import errors
from jaxbound.methods.named import METHODS
from jaxbound.training import configuration, data, fusion, losses, models, schedules
from jaxbound.training.configuration import Configuration
from jaxbound.training.data import Dataset
from jaxbound.training.evaluation import CLIP, look_of, looked_at, test_errors
from jaxbound.training.loop import Result, Run, fit
from jaxbound.training.progress import Bar, Events
from jaxbound.training.step import Schedules, Step, TrainState, create


def model_of(config: Configuration, name: str, dataset: Dataset):
    """The network that a configuration names: of the paper, "mlp" or "resnet"."""
    normal = {"mean": dataset.mean, "std": dataset.std, "classes": dataset.classes}
    if name == "mlp":
        return models.MLP(tuple(config.hidden), initializer=config.initializer, **normal)
    if name == "resnet":
        axis_name = "devices" if config.parallel == "pmap" else None
        return models.ResNet(tuple(config.hidden), axis_name=axis_name, initializer=config.initializer, **normal)
    released = config.released and len(models.ARCHITECTURES[name].convolutions) == 3
    return models.network(name, released=released, initializer=config.initializer, **normal)


def term_of(config: Configuration):
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


def optimizer_of(config: Configuration, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam, with the gradient's norm clipped if asked for."""
    adam = optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


def pieces(config: Configuration, name: str, dataset: Dataset, sampler: data.Sampler) -> tuple[Any, Step, TrainState]:
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
    model, step, state = pieces(config, name, rest, sampler)
    total = stop_after or round(config.epochs * sampler.steps_per_epoch)
    interval = max(1, round(config.interval * sampler.steps_per_epoch))
    ramp_end = epsilon_of(config, sampler.steps_per_epoch).end
    run = Run(total, interval, ramp_end if len(held) else None, config.parallel)
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


def finished(config: Configuration, name: str, model, result: Result, dataset: Dataset) -> dict:
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


def _check_same(config: Configuration, path: Path) -> None:
    """A folder holds runs of one configuration."""
    text = config.to_json()
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise errors.ArgumentError(
            f"{path.parent} holds a run with another configuration; pass another --output, or remove the folder"
        )
    path.write_text(text, encoding="utf-8")


def chosen_models(config: Configuration) -> list[str]:
    """The models of a configuration, or the subset that was asked for by number."""
    names = list(config.models)
    subset = [int(number) for number in str(config.model_subset).split(",") if number.strip()]
    if any(not 0 <= number < len(names) for number in subset):
        raise errors.ArgumentError(
            f"model_subset={config.model_subset}: there are models 0..{len(names) - 1}: {', '.join(names)}"
        )
    return [names[number] for number in subset] or names
