"""What may be undefined is bounded by nothing; what is thrown away, proved or a mere overflow is bounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb

pytestmark = pytest.mark.fast

METHODS = [jb.IBP(), jb.Crown()]
UNDEFINED = {
    "bounded after": (lambda x: 2 + jnp.tanh(jnp.log(x**2 - 1)), 1.5, 3.25),
    "two nodes": (lambda x: jax.nn.relu(jnp.ones((2, 2)) @ jnp.log(x)), 0.5, 1.0),
    "compared": (lambda x: jnp.where(jnp.log(x) > 0, 1.0, 2.0), 0.5, 1.0),
    "no weight": (lambda x: 0 * jnp.log(x) + 1, 0.5, 1.0),
    "quotient": (lambda x: jnp.tanh((1 + x) / x), 0.5, 1.0),
    "0 times infinity": (lambda x: jnp.tanh(x * jnp.log(x)), 1.0, 1.0),
    "normalised": (lambda x: x / jnp.linalg.norm(x), 0.5, 1.0),
}
DEFINED = {
    "overflow": (lambda x: 1 / (1 + jnp.exp(-x)), 0.0, 200.0, 0.0, 1.0),
    "excluded": (lambda x: jnp.where(x > 1, jnp.log(x), 0), 0.0, 3.0, 0.0, np.log(3)),
    "norm": (lambda x: jnp.linalg.norm(x), 0.5, 1.0, 0.0, 1.5 * np.sqrt(2)),
    "deviation": (jnp.std, 0.5, 1.0, 0.0, 1.0),
    "log of softmax": (lambda x: jnp.log(jax.nn.softmax(x)), 0.0, 1.0, -2.1269, -0.1270),
    "log of an underflowing softmax": (lambda x: jnp.log(jax.nn.softmax(x)), 0.0, 60.0, -120.0, 0.0),
    "along another axis": (lambda x: jnp.log(jax.nn.softmax(x[:, None] * 60, axis=0)), 0.0, 1.0, -120.0, 0.0),
    "logarithm of a sigmoid": (lambda x: jnp.log(jax.nn.sigmoid(x)), 0.0, 20.0, -20.0, 0.0),
}  # fmt: skip
"""Function, center and radius in both entries, the range of its values."""


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_may_be_undefined_has_no_bounds(name):
    fn, center, radius = UNDEFINED[name]
    box = jb.Box(jnp.full(2, center - radius), jnp.full(2, center + radius))
    for method in METHODS:
        found = jb.bound(fn, method)(box)
        assert np.all(np.isneginf(found.lower)) and np.all(np.isposinf(found.upper)), method


@pytest.mark.parametrize("method", [jb.IBP(), jb.Forward(), jb.ConvexPolytope()], ids=repr)
def test_it_is_never_certified(method):
    fn, center, radius = UNDEFINED["two nodes"]

    def apply(_, batch):
        made = jax.vmap(lambda x: fn(x).ravel()[0])(batch)
        return jnp.stack([jnp.zeros_like(made) + 5, jnp.tanh(made)], axis=-1)

    report = jb.certify({}, np.full((1, 2), center, np.float32), np.array([0]), radius, method=method, apply_fn=apply)
    assert not report.verified.any()


@pytest.mark.parametrize("name", DEFINED)
def test_what_is_defined_is_bounded(name):
    fn, center, radius, low, high = DEFINED[name]
    box = jb.Box(jnp.full(2, center - radius), jnp.full(2, center + radius))
    for method in METHODS:
        found = jb.bound(fn, method, rounding=True)(box)
        assert np.all(found.lower <= low + 1e-4) and np.all(found.upper >= high - 1e-4), method
        assert np.all(np.isfinite(found.lower)) and np.all(np.isfinite(found.upper)), method
    assert np.all(found.lower >= low - 1.5) and np.all(found.upper <= high + 1.5)


def test_only_what_depends_on_it_is_unbounded():
    fn = lambda x: jnp.concatenate([jnp.ones((3, 2)) @ jnp.tanh(jnp.log(x[:2])), jnp.log(x), 2 * x])  # noqa: E731
    box = jb.Box(jnp.array([1.0, -1.0, 1.0]), jnp.array([2.0, 2.0, 2.0]))
    expected = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0], bool)
    for apply in (lambda f: f, jax.jit):
        found = apply(jb.bound(fn, jb.Crown()))(box)
        np.testing.assert_array_equal(np.isinf(found.lower) & np.isinf(found.upper), expected)


def test_the_method_may_prove_what_intervals_cannot():
    hidden, out = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[1.0, -1.0]])
    fn = lambda x: jnp.log(out @ jax.nn.relu(hidden @ x + 2) + 1)  # noqa: E731
    box = jb.Box(-jnp.ones(2), jnp.ones(2))
    assert np.isfinite(jb.bound(fn, jb.Crown())(box).lower).all()
    assert np.isinf(jb.bound(fn, jb.IBP())(box).lower).all()


def test_batched_networks_and_planes():
    apply = lambda p, x: jnp.tanh(jnp.log(x)) @ p  # noqa: E731
    x = np.array([[1.0, 1.0], [1.0, 0.1]], np.float32)
    found = jb.crown(jnp.ones((2, 2)), x, 0.2, apply_fn=apply)
    np.testing.assert_array_equal(np.isfinite(found.lower), [[True, True], [False, False]])
    planes = jb.linear_bounds(lambda x: jnp.tanh(jnp.log(x)), jb.Crown())(jb.Box(-jnp.ones(1), jnp.ones(1)))
    assert np.isneginf(planes.lower_intercept).all() and np.isposinf(planes.upper_intercept).all()
    known = jb.pre_activation_bounds(lambda x: jax.nn.relu(jnp.ones((1, 1)) @ jnp.log(x)), jb.IBP())
    ends = list(known(jb.Box(-jnp.ones(1), jnp.ones(1))).values())[-1]
    assert np.isneginf(ends.lower).all() and np.isposinf(ends.upper).all()
