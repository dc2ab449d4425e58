"""CIFAR-10, DM-large trained at 8.8/255 and tested at 8/255."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.cifar_large("cifar_dm_large_8", 8 / 255)
