"""Fashion-MNIST, the eight medium models K to R, radius 0.1."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """The configuration."""
    return base.mnist(
        "fashion_mnist_medium", "mnist_medium", dataset="fashion_mnist", learning_rate=1e-3, eps=0.1, eps_test=0.1
    )  # fmt: skip
