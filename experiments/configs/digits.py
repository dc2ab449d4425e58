"""The embedded default: scikit-learn's digits, trained and certified in under a minute on two cores."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.changed(
        "digits", dataset="digits", models=("mlp",), hidden=(64, 64), batch_size=128, epochs=60.0, ramp_start=2.0,
        ramp_epochs=30.0, learning_rate=2e-3, kappa_final=0.5, eps=0.05, eps_test=0.05, interval=5.0, pgd_steps=40,
    )  # fmt: skip
