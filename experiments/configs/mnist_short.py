"""MNIST, model A on a schedule for two cores: 20 epochs with a ramp of 12 after half an epoch.

Runs of this file are in `experiments/runs`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.changed(
        "mnist_short", dataset="mnist", models=("A",), initializer="torch", epochs=20.0, ramp_start=0.5,
        ramp_epochs=12.0, learning_rate=1e-3, decay_every=2.0, eps_test=0.3,
    )  # fmt: skip
