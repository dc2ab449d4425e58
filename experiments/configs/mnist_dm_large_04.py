"""MNIST, DM-large trained at 0.4 and tested at 0.3 (--config.eps_test=0.4 for the other row)."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.changed(
        "mnist_dm_large_04", dataset="mnist", models=("DM-large",), initializer="torch", kappa_final=0.5,
        epochs=200.0, ramp_start=10.0, ramp_epochs=50.0,
        milestones=(130.0, 190.0), decay_factor=0.1, eps=0.4, eps_test=0.3,
    )  # fmt: skip
