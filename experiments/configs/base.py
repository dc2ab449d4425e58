"""The fields of `jaxbound.training.configuration` with their defaults; the other files here change some."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from jaxbound.training.configuration import Configuration
from jaxbound.training.models import FAMILIES


def get_config() -> ConfigDict:
    """The defaults: CROWN-IBP with beta and kappa from 1 to 0."""
    return ConfigDict(dataclasses.asdict(Configuration()))


def changed(name: str, **changes) -> ConfigDict:
    """The defaults with some fields changed."""
    config = get_config()
    config.name = name
    config.update(changes)
    return config


def mnist(name: str, family: str, **changes) -> ConfigDict:
    """The released MNIST family: 100 epochs, ramp of 60 after the first (appendix D), no natural loss."""
    settings = {"dataset": "mnist", "models": FAMILIES[family], "initializer": "torch", "kappa_start": 0.0}
    return changed(name, **{**settings, **changes})


def cifar(name: str, family: str, **changes) -> ConfigDict:
    """The released CIFAR-10 family: 200 epochs, ramp of 120 after 10, crops and flips, no natural loss."""
    settings = {
        "dataset": "cifar10", "models": FAMILIES[family], "initializer": "torch", "augment": True, "batch_size": 128,
        "learning_rate": 1e-3, "kappa_start": 0.0,
        "epochs": 200.0, "ramp_start": 10.0, "ramp_epochs": 120.0, "eps": 8 / 255, "eps_test": 8 / 255,
    }  # fmt: skip
    return changed(name, **{**settings, **changes})


def cifar_large(name: str, eps: float, **changes) -> ConfigDict:
    """DM-large on CIFAR-10: 3200 epochs, a smoothed ramp of 1600 after 320, trained at 1.1 times the radius."""
    settings = {
        "models": ("DM-large",), "batch_size": 1024, "learning_rate": 5e-4, "milestones": (2600.0, 3040.0),
        "decay_factor": 0.1, "epochs": 3200.0, "ramp_start": 320.0, "ramp_epochs": 1600.0, "ramp_shape": "smoothed",
        "eps": 1.1 * eps, "eps_test": eps, "interval": 10.0,
    }  # fmt: skip
    return cifar(name, "cifar_small", **{**settings, **changes})
