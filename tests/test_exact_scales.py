"""The programs' bounds hold in exact arithmetic at every scale of weights, and whatever the solver proposes."""

from __future__ import annotations

import itertools

import checks_exact
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.methods.exact import LP, MILP, solvers
from jaxbound.methods.exact.program import Multipliers

pytest.importorskip("highspy")
pytest.importorskip("clarabel")

METHODS = (LP(), LP(pre_activation=jb.IBP()), MILP(pre_activation=jb.IBP()))
_NET = [([[1.0, 1.0], [-1.0, 2.0]], [0.0, 1.0]), ([[1.0, -1.0], [1.0, 0.5]], [0.0, -0.5]), ([[1.0], [2.0]], [0.0])]


def _scaled(exponents, dtype):
    """The network with columns of weights times powers of ten; what a layer gains a later one loses."""
    first, second, third = (np.array(kernel) for kernel, _ in _NET)
    a, b, c = (10.0**e for e in exponents)
    kernels = first * [a, 1.0], second * [[b], [1.0]], third * c
    shifts = np.array([a, 1.0]) * _NET[0][1], np.array(_NET[1][1]), c * np.array(_NET[2][1])
    return [(k.astype(dtype), s.astype(dtype)) for k, s in zip(kernels, shifts, strict=True)]


def _checked(layers, region, points):
    for method in METHODS:
        found = jb.bound(checks_exact.relu_network, method, rounding=True)(layers, region)
        for x in points:
            assert checks_exact.contains(found, checks_exact.exact_relu(layers, x)), (method, found, x)
    return found


_CORNERS = [np.array(x) for x in itertools.product((-1.0, 0.0, 1.0), repeat=2)]


@pytest.mark.x64
@pytest.mark.parametrize("exponents", [
    (8, -9, 0), (9, -9.3, 0), (-12, 12, 0), (100, -100, 0), (-200, 150, 40), (0, 0, -310), (-310, 300, 0), (6, 6, 6),
], ids=str)  # fmt: skip
def test_weights_of_any_size_in_float64(exponents):
    layers = _scaled(exponents, np.float64)
    found = _checked(layers, jb.Box(-jnp.ones(2), jnp.ones(2)), _CORNERS)
    assert np.all(np.isfinite(found.width))


@pytest.mark.parametrize("exponents", [(0, 0, 0), (8, -9, 0), (-20, -20, 30), (-40, 38, 0), (30, -44, 20)], ids=str)
def test_weights_of_any_size_in_float32(exponents):
    layers = _scaled(exponents, np.float32)
    found = _checked(layers, jb.Box(-jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float32)), _CORNERS)
    assert np.all(np.isfinite(found.width))


@pytest.mark.x64
def test_small_weights_of_large_values_are_not_dropped():
    """HiGHS drops entries of 1e-9 and less of a matrix as it is given, and its tolerances are absolute."""
    layers = [(np.array([[1e8, 1.0]]), np.array([1e8, 0.0])), (np.array([[0.99e-9], [1.0]]), np.zeros(1))]
    for method in (LP(), MILP()):
        found = jb.bound(checks_exact.relu_network, method, rounding=True)(layers, jb.Box(-jnp.ones(1), jnp.ones(1)))
        assert checks_exact.contains(found, checks_exact.exact_relu(layers, np.ones(1)))
        assert found.upper[0] <= 1.198 + 1e-6


@pytest.mark.x64
@pytest.mark.parametrize("fault", ["noise", "huge", "random", "nothing", "empty"])
def test_a_wrong_solver_loosens_an_exact_range_and_never_breaks_it(monkeypatch, fault):
    rng, honest = np.random.default_rng(0), solvers.Linear.multipliers
    layers, box = _scaled((0, 0, 0), np.float64), jb.Box(-jnp.ones(2), jnp.ones(2))

    def wrong(self, column, sign):
        found = honest(self, column, sign)
        rows = np.zeros(len(self._weight)) if found is None else found.rows
        size = {"noise": 1e-3, "huge": 1e5, "random": 1.0}.get(fault, 0.0)
        if fault == "empty":  # every leaf is said to have no value
            self.values, self.ray = None, Multipliers(rng.normal(size=len(rows)), ())
        return (
            None
            if fault == "nothing"
            else Multipliers((fault != "random") * rows + size * rng.normal(size=len(rows)), ())
        )

    monkeypatch.setattr(solvers.Linear, "multipliers", wrong)
    found = jb.bound(checks_exact.relu_network, MILP(pre_activation=jb.IBP()))(layers, box)
    for x in rng.uniform(-1, 1, (100, 2)):
        assert checks_exact.contains(found, checks_exact.exact_relu(layers, x))
    assert np.all(np.isfinite(found.width))


def test_certificates_rest_on_the_tree():
    """With margins of 1e-7 and tolerances of solvers about as large, a certificate still means what it says."""
    layers = [(jnp.eye(2), jnp.zeros(2)), (jnp.eye(2), jnp.array([1.0, 1.0]))]
    x, labels = jnp.array([[0.5, 0.25]]), jnp.array([0])
    for eps, verified in ((0.1249, True), (0.1251, False)):
        report = jb.certify(layers, x, labels, eps, method=MILP(), activation="relu")
        assert bool(report.verified[0]) is verified
