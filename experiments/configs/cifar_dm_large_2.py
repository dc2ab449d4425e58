"""CIFAR-10, DM-large trained at 2.2/255 with CROWN-IBP to the end (beta 1), tested at 2/255 by CROWN-IBP."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.cifar_large("cifar_dm_large_2", 2 / 255, beta_final=1.0, verify_with="crown_ibp")
