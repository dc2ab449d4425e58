"""The quadratic certificate: by hand, against brute force and sampling, and with a wrong eigenvalue decomposition."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import oracles
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.methods import quadratic
from jaxbound.methods.quadratic import Quadratic

pytestmark = pytest.mark.x64


def _layers(seed: int = 0, sizes=(4, 12, 3), scale: float = 1.5) -> list:
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    return [(scale * rng.normal(size=pair) / np.sqrt(pair[0]), 0.3 * rng.normal(size=pair[1])) for pair in pairs]


def _net(layers):
    return lambda x: jax.nn.relu(x @ layers[0][0] + layers[0][1]) @ layers[1][0] + layers[1][1]


def _far(layers, ball: jb.LpBall, rng: np.random.Generator, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value found by projected gradient steps of every output from many points."""
    (kernel, bias), (out, shift) = layers
    least, most = [], []
    for k in range(out.shape[1]):
        for sign, kept in ((1, least), (-1, most)):
            x, best = oracles.points(ball, rng, count), np.inf
            for step in 0.3 * float(ball.radius) * 0.9 ** np.arange(40):
                active = x @ kernel + bias > 0
                slope = sign * (active * out[:, k]) @ kernel.T
                moved = x - step * slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-300)
                x = oracles.between(ball, np.broadcast_to(np.asarray(ball.center), x.shape), moved, 1.0)
                best = min(best, float((sign * (np.maximum(x @ kernel + bias, 0) @ out[:, k] + shift[k])).min()))
            kept.append(sign * best)
    return np.array(least), np.array(most)


def _contains(found, low, high, tolerance: float = 1e-12) -> None:
    assert np.all(np.asarray(found.lower, float) <= low + tolerance), (found.lower, low)
    assert np.all(np.asarray(found.upper, float) >= high - tolerance), (found.upper, high)


def test_corner_by_hand():
    """f = -relu(x1) - relu(x2) on the unit disc: l = -1, u = 1, chord x/2 + 1/2, a = 1/4.

    p = -(x1 + x2)/2 - 1 + (1 - x1^2)/4 + (1 - x2^2)/4 = -(x1 + x2)/2 - 1/2 - |x|^2/4, least at (1, 1)/sqrt(2):
    -1/sqrt(2) - 3/4. (CROWN: -1/sqrt(2) - 1. The true minimum is -sqrt(2).)
    """
    corner = lambda x: -jax.nn.relu(x).sum()  # noqa: E731
    disc = jb.LpBall(jnp.zeros(2), 1.0, 2)
    found = jb.bound(corner, Quadratic())(disc)
    assert np.allclose(found.lower, -np.sqrt(0.5) - 0.75, rtol=0, atol=1e-9)
    assert found.lower <= -np.sqrt(0.5) - 0.75
    assert np.allclose(jb.bound(corner, jb.Crown())(disc).lower, -np.sqrt(0.5) - 1)
    # upwards f has only lines below its relus: max of -x1 a1 - x2 a2 with a in {0, 1} as CROWN chooses
    assert found.upper == jb.bound(corner, jb.Crown())(disc).upper


@pytest.mark.parametrize("seed", range(4))
def test_the_dual_is_the_minimum_of_the_quadratic(seed):
    """Two inputs: p written out in NumPy, minimised over the circle and the disc by a fine grid."""
    layers, center, radius = _layers(seed, (2, 8, 1)), np.array([0.2, -0.1]), 0.8
    (kernel, bias), (out, shift) = layers
    v, reach = out[:, 0], radius * np.linalg.norm(kernel, axis=0)
    low, high = center @ kernel + bias - reach, center @ kernel + bias + reach
    angle = np.linspace(0, 2 * np.pi, 20001)[:-1]
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    x = center + radius * np.concatenate(
        [share * circle[:: (1 if share == 1 else 50)] for share in np.linspace(0, 1, 101)]
    )
    z = x @ kernel + bias
    terms = np.zeros_like(z)
    for i in range(len(v)):
        if low[i] >= 0 or high[i] <= 0:
            terms[:, i] = np.maximum(z[:, i], 0)
        elif v[i] >= 0:
            terms[:, i] = z[:, i] * (high[i] > -low[i])
        else:
            wide = high[i] - low[i]
            chord, bend = high[i] * (z[:, i] - low[i]) / wide, min(high[i], -low[i]) / wide**2
            terms[:, i] = chord - bend * (z[:, i] - low[i]) * (high[i] - z[:, i])
            assert np.all(terms[:, i] >= np.maximum(z[:, i], 0) - 1e-12)
    p = terms @ v + shift[0]
    assert np.all(p <= np.maximum(z, 0) @ v + shift[0] + 1e-12)
    ball = jb.LpBall(jnp.asarray(center), radius, 2)
    found = jb.bound(_net(layers), Quadratic(steps=0))(ball).lower[0]
    crown = jb.bound(_net(layers), jb.Crown())(ball).lower[0]
    assert np.allclose(found, max(p.min(), float(crown)), rtol=0, atol=1e-6)
    assert jb.bound(_net(layers), Quadratic())(ball).lower[0] >= found - 1e-9


@pytest.mark.quick(1)
@pytest.mark.parametrize("clip", [None, (-0.3, 0.5)])
def test_sound_and_better_than_crown_and_the_program(clip):
    pytest.importorskip("highspy")
    rng, gains = np.random.default_rng(1), []
    for seed in range(5):
        layers = _layers(seed)
        ball = jb.LpBall(jnp.asarray(0.3 * rng.normal(size=4)), 0.2 + 0.3 * seed, 2, clip=clip)
        crown, relaxed, found = (jb.bound(_net(layers), m)(ball) for m in (jb.Crown(), jb.LP(), Quadratic()))
        low, high = _far(layers, ball, rng, 300)
        _contains(found, low, high)
        assert np.all(found.lower >= crown.lower)
        assert np.all(found.upper <= crown.upper)
        gains += [found.lower - relaxed.lower, relaxed.upper - found.upper]
    if clip is None:
        assert np.mean(np.array(gains) > -1e-6) > 0.9  # with the program's own slopes it would be always
        assert np.mean(gains) > 0.05


_SHARED = [
    ("conv_same", "l2"),
    ("conv_padded", "l2_clip"),
    ("average_pool", "l2"),
    ("reordered", "l2"),
    ("first_relu", "l2_clip"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "family"), _SHARED)
def test_other_networks_of_one_layer(network, family):
    case = networks.NETWORKS[network]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), case.params)
    function = lambda x: case.function(params, x)  # noqa: E731
    for leaves in networks.regions(network, family).values():
        ball = networks.cast(leaves[0], float)
        found, crown = (jb.bound(function, method)(ball) for method in (Quadratic(), jb.Crown()))
        values = np.asarray(jax.vmap(function)(jnp.asarray(oracles.points(leaves[0], np.random.default_rng(2), 2000))))
        scale = 1e-12 * (1 + np.abs(values).max())
        _contains(found, values.min(axis=0), values.max(axis=0), scale)
        assert np.all((found.lower >= crown.lower) & (found.upper <= crown.upper))


@pytest.mark.slow
def test_skips_parallel_layers_and_outputs_that_are_relus():
    rng = np.random.default_rng(3)
    weights, doubled = jnp.asarray(rng.normal(size=(3, 5))), jnp.full(3, 2.0)  # an array, as a literal would be fused

    def function(x):
        first, second = jax.nn.relu(x @ weights), jax.nn.relu(x @ weights[:, :3] - doubled)
        return {
            "sum": first.sum() - 3 * second.sum() + x[0],
            "first": first,
            "affine": x * 2,
            "both": -first[:3] - second,
        }

    ball = jb.LpBall(jnp.array([0.3, 0.4, 0.6]), 0.7, 2)
    found = jb.bound(function, Quadratic())(ball)
    crown = jb.bound(function, jb.Crown())(ball)
    values = jax.vmap(function)(jnp.asarray(oracles.points(ball, np.random.default_rng(0), 5000)))
    for name, value in values.items():
        _contains(found[name], np.asarray(value).min(axis=0), np.asarray(value).max(axis=0))
    assert found["sum"].lower > crown["sum"].lower + 0.01
    assert np.allclose(found["affine"].lower, crown["affine"].lower)


# --- the certificate trusts nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fault", ["none", "scaled", "shuffled", "noise", "zeros", "one lost"])
def test_the_largest_eigenvalue_is_bounded_whatever_the_decomposition(fault, dtype):
    rng = np.random.default_rng(4)
    for count, features in ((1, 1), (5, 9), (20, 3)):
        root = rng.normal(size=(count, features)).astype(dtype)
        true = np.linalg.eigvalsh(root.astype(float) @ root.T.astype(float)).max()
        values, vectors = np.linalg.eigh(root @ root.T)
        if fault == "scaled":
            values, vectors = values / 2, vectors * 0.9
        elif fault == "shuffled":
            vectors = rng.permuted(vectors, axis=1)
        elif fault == "noise":
            vectors = vectors + 0.1 * rng.normal(size=vectors.shape)
        elif fault == "zeros":
            values = 0 * values
        elif fault == "one lost":
            values[-1] = 0
        arrays = (jnp.asarray(a, dtype) for a in (root, root @ root.T, values, vectors))
        bound = float(quadratic._largest(*arrays))
        assert bound >= true
        if fault == "none":
            assert bound <= true * (1 + (1e-3 if dtype == np.float32 else 1e-11))


@pytest.mark.quick(1)
@pytest.mark.parametrize("factor", [1.0, 1.5, 30.0])
def test_any_multiplier_above_and_any_point_certify(monkeypatch, factor):
    """A worse multiplier and a worse point loosen the bound; it stays below the attained values."""
    layers, rng = _layers(7), np.random.default_rng(7)
    ball = jb.LpBall(jnp.zeros(4), 0.9, 2)
    low, high = _far(layers, ball, rng, 300)
    honest = quadratic._chosen

    def worse(layer, *others, steps):
        slope, s, step = honest(layer, *others, steps=steps)
        return (
            jnp.where(factor > 20, 0.5, slope),
            factor * s,
            step * (1 if factor == 1 else 0.3) * jnp.where(jnp.arange(len(step)) == 0, -1, 1),
        )

    monkeypatch.setattr(quadratic, "_chosen", worse)
    weights = [jnp.asarray(a) for a in layers[0]]
    reach = 0.9 * np.linalg.norm(layers[0][0], axis=0)
    layer = quadratic._Layer(weights[0].T, weights[1], jnp.zeros(12), weights[1] - reach, weights[1] + reach)
    for k in range(3):
        v, shift = jnp.asarray(layers[1][0][:, k]), jnp.asarray(layers[1][1][k])
        for sign, end in ((1, low[k]), (-1, -high[k])):
            found, error = quadratic._certificate(
                layer, jnp.zeros(4), jnp.asarray(0.9), sign * v, jnp.zeros(4), sign * shift, jnp.asarray(0.0), 5
            )
            assert found <= end + 1e-12
            assert 0 <= error <= 1e-9


def test_float32_rounding_is_covered():
    """With rounding=True float32 bounds contain what float64 attains, on networks whose sums cancel."""
    for seed in range(3):
        layers = [(np.float32(k), np.float32(100 * b)) for k, b in _layers(seed, (30, 40, 2), 4.0)]
        center = np.float32(np.random.default_rng(seed).normal(size=30))
        ball = jb.LpBall(jnp.asarray(center), jnp.float32(0.01 * seed), 2)
        narrow = [(jnp.asarray(k), jnp.asarray(b)) for k, b in layers]
        found = jb.bound(_net(narrow), Quadratic(), rounding=True)(ball)
        assert found.lower.dtype == jnp.float32
        wide = [(k.astype(float), b.astype(float)) for k, b in layers]
        exact = jb.LpBall(center.astype(float), float(np.float32(0.01 * seed)), 2)
        values = oracles.relu_value(wide, oracles.points(exact, np.random.default_rng(0), 3000))
        _contains(found, values.min(axis=0), values.max(axis=0), 0)
        loose = jb.bound(_net(narrow), Quadratic())(ball)
        assert np.all(found.lower <= loose.lower)
        assert np.all(found.width - loose.width < 0.05 * (1 + np.abs(values).max()))


# --- as any other method ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_transformations():
    layers = [(jnp.asarray(k), jnp.asarray(b)) for k, b in _layers(2)]

    def lower(x, radius=0.6):
        return jb.bound(_net(layers), Quadratic())(jb.LpBall(x, radius, 2)).lower

    x = jnp.asarray(0.2 * np.random.default_rng(5).normal(size=(3, 4)))
    one_by_one = jnp.stack([lower(point) for point in x])
    assert np.allclose(jax.jit(jax.vmap(lower))(x), one_by_one, rtol=0, atol=1e-9)
    batch = jb.margins(layers, x, jnp.array([0, 1, 2]), 0.6, method=Quadratic(), norm=2, activation="relu")
    single = jb.margins(layers, x[1:2], jnp.array([1]), 0.6, method=Quadratic(), norm=2, activation="relu")
    assert np.allclose(batch[1], single[0], rtol=0, atol=1e-9)
    total = jax.jit(jax.value_and_grad(lambda x, radius: lower(x, radius).sum(), (0, 1)))
    _, (by_point, by_radius) = total(x[0], 0.6)
    for k, step in enumerate(1e-6 * jnp.eye(4)):
        difference = (total(x[0] + step, 0.6)[0] - total(x[0] - step, 0.6)[0]) / 2e-6
        assert np.allclose(by_point[k], difference, rtol=2e-2, atol=2e-2)  # tuned slopes are not quite the best
    difference = (total(x[0], 0.600001)[0] - total(x[0], 0.599999)[0]) / 2e-6
    assert np.allclose(by_radius, difference, rtol=2e-2, atol=2e-2)
    assert by_radius < 0


def test_certificates_and_empty_regions():
    layers = [(jnp.asarray(k), jnp.asarray(b)) for k, b in _layers(4)]
    x = np.array([[0.1, 0.2, -0.3, 0.0], [5.0, 5.0, 5.0, 5.0]])
    labels = np.argmax(np.asarray(jax.vmap(_net(layers))(jnp.asarray(x))), axis=1)
    report = jb.certify(layers, x, labels, 1e-4, method=Quadratic(), norm=2, clip=(-1.0, 1.0), activation="relu")
    assert np.array_equal(report.verified, [True, False])
    assert np.all(report.rounding[0] > 0)
    assert np.all(report.margins[1] == -np.inf)


@pytest.mark.parametrize("radius", [0.0, 1e-300, np.inf])
def test_extreme_radii(radius):
    layers, x = _layers(6), jnp.array([0.1, -0.4, 0.2, 0.3])
    found, crown = (jb.bound(_net(layers), m)(jb.LpBall(x, radius, 2)) for m in (Quadratic(), jb.Crown()))
    value = np.asarray(_net(layers)(x))
    _contains(found, value, value)
    assert not np.isnan([found.lower, found.upper]).any()
    assert np.all((found.lower >= crown.lower) & (found.upper <= crown.upper))


def test_refusals_say_what_to_do():
    ball, layers = jb.LpBall(jnp.zeros(4), 0.5, 2), _layers()
    for region in (
        jb.Box(-jnp.ones(4), jnp.ones(4)),
        jb.LpBall(jnp.zeros(4), 0.5, np.inf),
        jb.LpBall(jnp.zeros(4), 0.5, 1),
    ):
        with pytest.raises(errors.ArgumentError, match=r"not a single l_2 ball.*use Frown\(\) or LP\(\)"):
            jb.bound(_net(layers), Quadratic())(region)
    with pytest.raises(errors.UnsupportedError, match=r"Quadratic cannot bound .*tanh.*it is not a ReLU; use Frown"):
        jb.bound(jnp.tanh, Quadratic())(ball)
    with pytest.raises(errors.UnsupportedError, match="not a ReLU"):
        jb.bound(lambda x: jax.nn.leaky_relu(x, 0.25), Quadratic())(ball)
    with pytest.raises(errors.UnsupportedError, match="another nonlinearity lies before it"):
        jb.bound(lambda x: jax.nn.relu(_net(layers)(x)), Quadratic())(ball)
    with pytest.raises(errors.UnsupportedError, match="has no linear bounds"):
        jb.linear_bounds(_net(layers), Quadratic())(ball)
