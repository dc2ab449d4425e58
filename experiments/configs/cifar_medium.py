"""CIFAR-10, the eight medium models K to N and Q to T, radius 8/255."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.cifar("cifar_medium", "cifar_medium")
