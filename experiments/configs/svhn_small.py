"""SVHN with the small models and the schedule of CIFAR-10; not in the paper."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.cifar("svhn_small", "cifar_small", dataset="svhn", augment=False)
