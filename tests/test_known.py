"""Pre-activation bounds that are given back: taken for what they hold for, refused for anything else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb

pytestmark = pytest.mark.fast

WEIGHTS = [jax.random.normal(key, (4, 4)) for key in jax.random.split(jax.random.key(0), 3)]
X, RADIUS = np.linspace(-1, 1, 4).astype(np.float32), 0.1


def network(weights, x):
    for w in weights[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ weights[-1]


def _box(shift=0.0):
    return jb.Box(X - RADIUS + np.float32(shift), X + RADIUS)


@pytest.mark.parametrize("rounding", [False, True])
def test_known_bounds_are_those_of_the_method_that_made_them(rounding):
    known = jb.pre_activation_bounds(network, jb.CrownIBP(), rounding=rounding)(WEIGHTS, _box())
    assert issubclass(type(known), dict) and all(isinstance(interval, jb.Interval) for interval in known.values())
    found = jb.bound(network, jb.Crown(pre_activation=jb.Known(known)), rounding=rounding)(WEIGHTS, _box())
    expected = jb.bound(network, jb.Crown(pre_activation=jb.CrownIBP()), rounding=rounding)(WEIGHTS, _box())
    np.testing.assert_allclose(found.lower, expected.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.upper, expected.upper, rtol=1e-5, atol=1e-6)


def test_anything_else_is_refused():
    known = jb.pre_activation_bounds(network, jb.IBP())(WEIGHTS, _box())
    crown = jb.Crown(pre_activation=jb.Known(known))
    with pytest.raises(jb.ArgumentError, match="other regions"):
        jb.bound(network, crown)(WEIGHTS, _box(-0.1))
    with pytest.raises(jb.ArgumentError, match="other constants"):
        jb.bound(network, crown)([WEIGHTS[0], *WEIGHTS[:2]], _box())
    with pytest.raises(jb.ArgumentError, match="another function"):
        jb.bound(lambda w, x: network(w, x), crown)(WEIGHTS, _box())
    with pytest.raises(jb.ArgumentError, match="rounding=False, and rounding=True is wanted"):
        jb.bound(network, crown, rounding=True)(WEIGHTS, _box())
    with pytest.raises(jb.ArgumentError, match="rounding=False"):
        jb.certify(WEIGHTS, X[None], np.array([0]), RADIUS, method=crown, apply_fn=network)
    with pytest.raises(jb.ArgumentError, match="passed through"):
        jb.bound(network, jb.Crown(pre_activation=jb.Known(jax.tree.map(lambda a: a, known))))(WEIGHTS, _box())
    changed = jb.pre_activation_bounds(network, jb.IBP())(WEIGHTS, _box())
    changed[next(iter(changed))] = jb.Interval(jnp.zeros(4), jnp.zeros(4))
    with pytest.raises(jb.ArgumentError, match="was changed"):
        jb.bound(network, jb.Crown(pre_activation=jb.Known(changed)))(WEIGHTS, _box())
    with pytest.raises(jb.ArgumentTypeError, match="pre_activation_bounds"):
        jb.bound(network, jb.Crown(pre_activation=jb.Known(dict(known))))(WEIGHTS, _box())  # pyright: ignore[reportArgumentType]
    with pytest.raises(jb.JaxboundError):
        jax.jit(lambda box: jb.bound(network, crown)(WEIGHTS, box))(_box())
    estimate = jb.pre_activation_bounds(network, jb.ConvexPolytope(4, jax.random.key(0)))(WEIGHTS, _box())
    with pytest.raises(jb.ArgumentError, match="stimate"):
        jb.bound(network, jb.Crown(pre_activation=jb.Known(estimate)))(WEIGHTS, _box())


def test_they_are_a_pytree_of_intervals():
    known = jax.jit(jb.pre_activation_bounds(network, jb.IBP()))(WEIGHTS, _box())
    assert list(known) == list(jb.pre_activation_bounds(network, jb.IBP())(WEIGHTS, _box()))
    assert len(jax.tree.leaves(known)) == 2 * len(known)
