"""MNIST, DM-large trained at 0.2 and tested at 0.1."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.changed(
        "mnist_dm_large_02", dataset="mnist", models=("DM-large",), initializer="torch", kappa_final=0.5,
        epochs=100.0, batch_size=100, learning_rate=1e-3,
        ramp_start=3.0, ramp_epochs=17.0, milestones=(25.0, 42.0), decay_factor=0.1, eps=0.2, eps_test=0.1,
    )  # fmt: skip
