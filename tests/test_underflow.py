"""Bounds hold where numbers fall below the smallest normal one, which processors may count as zero."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb

F = np.float32
METHODS = [jb.IBP(), jb.Crown(), jb.FastLin(), jb.CrownIBP(), jb.Forward(), jb.Frown(steps=2)]
SCALES = [(3e37, 1e-19, 1e-20), (1e-25, 1e-20, 3e37), (1e-39, 1e38), (1e38, 1e-39), (1e-20, 1e-20, 1e20, 1e20)]


def names(method):
    return type(method).__name__


def exact_chain(scales, x):
    """Positive factors on a positive number, exactly."""
    value = Fraction(float(x))
    for scale in scales:
        value *= Fraction(float(F(scale)))
    return value


def holds(found, value):
    low, high = (float(end.reshape(-1)[0]) for end in (found.lower, found.upper))
    below = low == -np.inf or Fraction(low) <= value
    return below and (high == np.inf or value <= Fraction(high))


@pytest.mark.fast
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=names)
def test_products_of_a_chain_of_layers_that_underflow(method, scales):
    def network(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(x @ kernel)
        return x

    kernels = [jnp.full((1, 1), F(scale)) for scale in scales]
    for point in (F(1), F(0.3)):
        box = jb.Box(jnp.full(1, point), jnp.full(1, point))
        found = jb.bound(network, method, rounding=True)(kernels, box)
        assert holds(found, exact_chain(scales, point)), found
    wide = jb.bound(network, method, rounding=True)(kernels, jb.Box(jnp.zeros(1), jnp.ones(1)))
    assert holds(wide, exact_chain(scales, 1)) and float(wide.lower[0]) <= 0


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("method", METHODS[:3], ids=names)
def test_products_of_entries_that_underflow(method, scales):
    def network(factors, x):
        for factor in factors:
            x = x * factor
        return x

    factors = [jnp.full(1, F(scale)) for scale in scales]
    found = jb.bound(network, method, rounding=True)(factors, jb.Box(jnp.ones(1), jnp.ones(1)))
    assert holds(found, exact_chain(scales, 1)), found


def test_a_coefficient_that_underflows_is_no_certificate():
    net = [
        (jnp.full((1, 1), F(3e37)), None),
        (jnp.full((1, 1), F(1e-19)), None),
        (jnp.array([[1e-20, 0.0]], F), jnp.array([0.0, 0.01], F)),
    ]
    for method in METHODS:
        report = jb.certify(net, np.zeros((1, 1), F), np.array([1]), 1.0, method=method, activation="relu")
        assert not report.verified[0], method
