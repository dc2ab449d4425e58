"""CIFAR-10, the nine small models B to J, radius 8/255."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.cifar("cifar_small", "cifar_small")
