"""Checks of what adversarial inputs broke, in double precision and uncompiled, for planted faults."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from jaxbound.jacobian import norms

LOW, HIGH = np.array([-2.0, -1.0, -0.5]), np.array([1.0, 2.0, 0.5])
BOX = jb.Box(LOW, HIGH)


def _bounds(function, method=None, box=BOX):
    return jb.bound(function, method or jb.IBP(), rounding=True)(box)


def _is_unbounded(function) -> bool:
    found = _bounds(function)
    return not (np.isfinite(found.lower).any() or np.isfinite(found.upper).any())


def _masked(x):
    return jnp.where(x > 0, x, -jnp.inf)


def check_infinite_factors():
    assert _is_unbounded(lambda x: jnp.tanh(x * jnp.inf))
    assert _is_unbounded(lambda x: jnp.tanh(_masked(x) @ jnp.array([1.0, 0.0, 2.0])))


def check_infinite_differences():
    assert _is_unbounded(lambda x: jnp.tanh(_masked(x) - _masked(x)[::-1]))
    assert _is_unbounded(lambda x: jnp.tanh(_masked(x) + jnp.where(x[::-1] > 0, jnp.inf, x)))
    found = _bounds(lambda x: jax.nn.softmax(jnp.where(jnp.arange(3) < 2, x, -jnp.inf)))
    assert np.all(np.isfinite(found.upper))


def check_masked_softmax():
    assert _is_unbounded(lambda x: jax.nn.softmax(_masked(x)))


def check_masks_of_sums():
    """Of three scores 0, ln 3 and ln 5 the second is masked, so that the shares are 1/6, 0 and 5/6."""
    x, mask = np.log(np.array([1.0, 3.0, 5.0])), np.array([True, False, True])
    for fn, expected in (
        (lambda x: jax.nn.softmax(x, where=mask), [1 / 6, 0, 5 / 6]), (lambda x: jax.nn.logsumexp(x, where=mask), np.log(6))
    ):  # fmt: skip
        for method in (jb.IBP(), jb.Crown(intersect=False)):
            found = jb.bound(fn, method)(jb.Box(x, x + 1e-9))
            assert np.allclose(found.lower, expected, atol=1e-6) and np.allclose(found.upper, expected, atol=1e-6)


def check_nothing_left_by_masks():
    """Undefined, also for the entries that are masked."""
    masks = np.array([True, False, False]), np.array([False, True, False])
    scores = lambda x: jnp.where(masks[1], 2 * jnp.where(masks[0], x, -jnp.inf), -jnp.inf)  # noqa: E731
    found = jb.bound(lambda x: jax.nn.softmax(scores(x)), jb.IBP())(jb.Box(-np.ones(3), np.ones(3)))
    assert not np.any(np.isfinite(found.lower)) and not np.any(np.isfinite(found.upper))


def check_undefined_shifts():
    assert _is_unbounded(lambda x: (lambda e: e / e.sum())(jnp.exp(x - jnp.log(x[0]))))


def check_promised_gathers():
    found = _bounds(lambda x: x[jnp.array([5, -7])], jb.Crown(intersect=False))
    assert np.all(found.lower <= LOW[[2, 0]]) and np.all(found.upper >= HIGH[[2, 0]])


def check_promised_scatters():
    def function(x):
        return jnp.zeros_like(x).at[jnp.array([1, 7])].add(x[:2], mode="promise_in_bounds")

    found = _bounds(function, jb.Crown(intersect=False))
    assert np.allclose(found.upper, [0, 1, 0]) and np.allclose(found.lower, [0, -2, 0])


def check_folded_numbers():
    found = _bounds(lambda x: x + ((jnp.asarray(1e16) + 1) - 1e16))
    assert np.all(found.lower <= LOW + 1) and np.all(found.upper >= HIGH + 1)


def check_folded_numbers_within_functions():
    found = _bounds(lambda x: jnp.exp(x + ((jnp.asarray(1e16) + 1) - 1e16)))
    assert np.all(found.lower <= np.exp(LOW + 1)) and np.all(found.upper >= np.exp(HIGH + 1))


def _chain(*weights: float):
    return [(jnp.full((1, 1), weight), jnp.zeros(1)) for weight in weights]


def check_underflow_of_jacobians():
    for weights, exact in (((1e300, 1e-160, 1e-160), 1e-20), ((3e-309, 1e300), 3e-9)):
        found = jb.lipschitz(_chain(*weights), jnp.ones((1, 1)), 0.5, activation="relu", method=jb.FastLip())
        assert float(found.max()) >= exact * (1 - 1e-12)


def check_underflow_of_norms():
    assert float(norms.product([jnp.asarray(1e-160), jnp.asarray(1e-160), jnp.asarray(1e300)], jnp.float64)) >= 1e-20
    assert float(norms.vector_norm(jnp.full(3, 1e-310), 2)) >= 1e-310


def check_computed_constants_of_jacobians():
    params = {"c": jnp.full((1, 1), 1e16), "d": jnp.ones((1, 1))}
    apply = lambda p, x: jax.nn.relu(x) @ ((p["c"] + p["d"]) - p["c"])  # noqa: E731
    assert float(jb.lipschitz(params, jnp.ones((1, 1)), 0.1, apply_fn=apply).max()) >= 1


def check_subnormal_parameters():
    box = jb.Box(jnp.ones(1), 2 * jnp.ones(1))
    found = jb.bound(lambda p, x: jnp.where(p > 1e-310, x, -x), jb.IBP(), rounding=True)(jnp.full(1, 2e-310), box)
    assert np.all(found.upper >= 2) and np.all(np.isinf(found.upper))  # in doubt, whatever this machine makes of it


def check_values_of_radii():
    apply = lambda p, x: x * (1.0 if x.shape[0] == 1 else -1.0) * p  # noqa: E731
    try:
        jb.certified_radius(
            jnp.ones(1), jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.zeros(2, int), apply_fn=apply, steps=2
        )
    except jb.SoundnessError:
        return
    raise AssertionError("a network that depends on the size of its batch was believed")


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}
