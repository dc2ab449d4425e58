"""A small residual network with BatchNorm on scikit-learn's digits, trained by IBP."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.changed(
        "digits_resnet", dataset="digits", models=("resnet",), hidden=(8, 16), batch_size=128, epochs=30.0,
        ramp_start=2.0, ramp_epochs=15.0, learning_rate=2e-3, method="ibp", kappa_final=0.5, eps=0.03, eps_test=0.03,
        interval=5.0, pgd_steps=40,
    )  # fmt: skip
