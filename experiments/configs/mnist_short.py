"""MNIST, model A on a schedule for two cores: 40 epochs, a ramp of 30 after the first."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.changed(
        "mnist_short", dataset="mnist", models=("A",), epochs=40.0, ramp_epochs=30.0, decay_every=3.0, eps_test=0.3
    )  # fmt: skip
