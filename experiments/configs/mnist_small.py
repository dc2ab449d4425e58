"""MNIST, the ten small models A to J; --config.eps and --config.eps_test for 0.1, 0.2 and 0.4."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.mnist("mnist_small", "mnist_small")
