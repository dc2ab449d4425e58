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


# name -> (function of the region, its ends, the least and the largest value that it has there)
WITHIN = {
    "a quotient": (lambda x: jnp.tanh(x) * 0 + x / 2e38, (1e38,), (3e38,), 0.5, 1.5),
    "a product": (lambda x: x[:1] * x[1:], (9e-40, 1e38), (1e-39, 1e38), 0.09, 0.1),
    "a product of small ones": (lambda x: (x[:1] * x[1:]) * 1e38, (1e-20, 1e-20), (1e-20, 1e-20), 0.0099, 0.0099),
    "a maximum with a flat chord": (jnp.max, (0, -3e38), (0, 1), 0, 1),
    "a fused factor": (lambda x: jnp.tanh(x * 1e38), (1e-39,), (1e-39,), 0.0996, 0.0996),
    "a fused subnormal factor": (lambda x: jnp.tanh(x * F(1e-39)), (1e38,), (1e38,), 0.0996, 0.0996),
    "a step": (lambda x: jnp.where(x > 0, 1.0, 0.0), (1e-39,), (1e-39,), 1, 1),
    "a step at a subnormal number": (lambda x: jnp.where(x > -1e-39, 1.0, 0.0), (0,), (0,), 1, 1),
    "a step of a relu": (lambda x: jnp.where(jax.nn.relu(x) > 1e-39, 1.0, 0.0), (2e-39,), (3e-39,), 1, 1),
    "a choice": (lambda x: jnp.where(x[:1] > 0, x[1:] * 1e38, x[1:]), (-1, 1e-39), (1, 1e-39), 1e-39, 0.0999),
}


@pytest.mark.parametrize("method", [*METHODS, jb.Crown(intersect=False)], ids=str)
@pytest.mark.parametrize("name", WITHIN)
def test_values_that_underflow_on_their_way_are_within(name, method):
    function, low, high, least, most = WITHIN[name]
    box = jb.Box(np.array(low, F), np.array(high, F))
    found = jb.bound(function, method, rounding=True)(box)
    assert found.lower.reshape(-1)[0] <= least and most <= found.upper.reshape(-1)[0]


def test_a_quotient_by_an_array_whose_reciprocal_is_subnormal():
    def function(divisor, x):
        return jax.nn.relu(x / divisor - 1)

    for method in METHODS:
        found = jb.bound(function, method, rounding=True)(
            jnp.full(1, F(2e38)), jb.Box(jnp.full(1, F(1e38)), jnp.full(1, F(3e38)))
        )
        assert found.upper[0] >= 0.5, method


@pytest.mark.parametrize("region", [
    jb.Box(np.full(2, 1e-39, F), np.full(2, 1e-39, F)), jb.LpBall(np.full(2, 1e-39, F), 0.0, 2),
    jb.LpBall(np.zeros(2, F), 1e-39, np.inf), jb.LpBall(np.zeros(2, F), 1.0, 2, clip=(np.zeros(2, F), np.full(2, 1e-39, F))),
], ids=["box", "center", "radius", "clip"])  # fmt: skip
def test_subnormal_parts_of_regions_are_not_zero(region):
    """The largest value is .1, where they are not."""
    for method in METHODS:
        found = jb.bound(lambda scale, x: x * scale, method, rounding=True)(jnp.full(2, F(1e38)), region)
        assert np.all(found.upper >= 0.0999), method
