"""Lipschitz constants, what is built on them, and the norms that they are made of: from above, everywhere."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.certificates.radius import certified_radius
from jaxbound.jacobian import norms
from jaxbound.jacobian.composition import jacobian_bounds
from jaxbound.jacobian.integral import LipschitzIntegral
from jaxbound.jacobian.landscape import landscape_radius
from jaxbound.jacobian.lipschitz import lipschitz
from jaxbound.jacobian.recurjac import FastLip, RecurJac
from jaxbound.jacobian.spectral import spectral_lipschitz
from jaxbound.network.bounding import bound_network

PAIRS = [
    (1, 1), (1, 2), (1, np.inf), (2, 2), (2, np.inf), (2, 1), (np.inf, 1), (np.inf, 2), (np.inf, np.inf), (3, 1),
    (1.2, 1.2), (1.5, 1.5), (3, 3), (10, 10), (20, 20),
]  # fmt: skip


def random_layers(sizes, seed=0, scale=1.0):
    draw = np.random.default_rng(seed)
    return tuple(
        (
            jnp.asarray(scale * draw.normal(size=(n, m)), jnp.float32),
            jnp.asarray(0.3 * draw.normal(size=m), jnp.float32),
        )
        for n, m in itertools.pairwise(sizes)
    )


def apply(layers, x, activation=jax.nn.relu):
    for kernel, bias in layers[:-1]:
        x = activation(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


LAYERS = random_layers((4, 7, 6, 3), 1, 0.6)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p_in", "p_out"), PAIRS)
def test_norms_of_matrices_without_negative_entries(p_in, p_out):
    """Above every quotient, and attained: directions without negative entries suffice."""
    draw = np.random.default_rng(3)
    matrix = draw.random((3, 4))
    found = float(norms.nonnegative(jnp.asarray(matrix, jnp.float32), p_in, p_out))
    directions = np.concatenate(
        [draw.random((200_000, 4)) ** 3, np.eye(4), np.ones((1, 4)), draw.normal(size=(999, 4))]
    )
    quotients = np.linalg.norm(directions @ matrix.T, p_out, axis=1) / np.linalg.norm(directions, p_in, axis=1)
    assert quotients.max() <= found <= 1.01 * quotients.max()


def test_norms_without_a_formula_are_refused():
    with pytest.raises(errors.ArgumentError, match="there are formulas for"):
        norms.nonnegative(jnp.ones((2, 2)), 2, 3)
    with pytest.raises(errors.ArgumentError, match="p >= 1"):
        lipschitz(LAYERS, X, 0.1, norm=0.5, activation="relu")
    assert norms.nonnegative(jnp.full((2, 2), jnp.inf), 2, 2) == jnp.inf


@pytest.mark.parametrize("shape", [(1, 5), (6, 4), (40, 60), (3, 3)])
def test_spectral_norms_are_above_and_close(shape):
    draw = np.random.default_rng(4)
    for matrix in (
        draw.normal(size=shape), np.ones(shape), np.zeros(shape), 1e-20 * draw.normal(size=shape), np.eye(*shape),
        np.diag(10.0 ** -np.arange(min(shape)))[: shape[0], : shape[1]],
    ):  # fmt: skip
        matrix = np.asarray(matrix, np.float32)
        exact = np.linalg.norm(matrix.astype(float), 2)
        found = float(norms.spectral_norm(jnp.asarray(matrix)))
        assert exact <= found <= 1.002 * exact + 1e-30
        size = np.abs(matrix)
        exact = np.linalg.norm(size.astype(float), 2)
        assert exact <= float(norms.nonnegative(jnp.asarray(size), 2, 2)) <= 1.001 * exact + 1e-30


def test_perron_bound_needs_no_convergence():
    """Two nearly equal eigenvalues and blocks that do not meet: power iteration is far off, the bound is not below."""
    matrix = np.array([[1, 0, 0], [0, 0.999999, 0], [0, 1e-6, 1e-9]], np.float32)
    assert np.linalg.norm(matrix.astype(float), 2) <= float(norms.nonnegative(jnp.asarray(matrix), 2, 2)) < 1.001


@pytest.mark.parametrize("p", [1.000001, 1.05, 1.5, 2.5, 5.0, 100.0, 300.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (20, 20), (1, 9)])
def test_norms_from_p_to_p_are_above_and_close(p, shape):
    """Boyd's power method converges from below; matrices of sizes far apart, with zeros, and tiny ones."""
    draw = np.random.default_rng(5)
    full = draw.random(shape)
    for matrix in (full, full * (full < 0.5), full * 10.0 ** draw.integers(-12, 12, shape), 1e-30 * full):
        matrix = np.asarray(matrix, np.float32)
        exact, x = matrix / matrix.max().astype(float), np.ones(shape[1])
        for _ in range(2000):
            outer = exact @ x
            inner = exact.T @ (outer / outer.max()) ** (p - 1)
            x = (inner / inner.max()) ** (1 / (p - 1))
        outer = exact @ x  # either norm by its largest entry, so that no power overflows
        below = outer.max() * np.linalg.norm(outer / outer.max(), p) / np.linalg.norm(x, p) * float(matrix.max())
        found = float(norms.nonnegative(jnp.asarray(matrix), p, p))
        assert below <= found <= 1.005 * below, (p, shape)


# --- Lipschitz constants ----------------------------------------------------------------------------------------------


def difference_quotients(function, norm, radius, count=4000):
    """|f_i(x') - f_i(x'')| / ||x' - x''|| for pairs of points of each ball, some far apart and some near."""
    keys = jax.random.split(jax.random.key(5), 3)
    ball = jb.LpBall(X, radius, norm, batch_ndim=1)
    first = jb.regions.sample(ball, keys[0], (count,), extremes=True)
    second = jb.regions.sample(ball, keys[1], (count,))
    near = jnp.arange(count)[:, None, None] % 2 == 0
    second = jnp.where(near, first + 0.1 * (second - first), second)
    change = jax.vmap(jax.vmap(function))(first) - jax.vmap(jax.vmap(function))(second)
    return change, jnp.linalg.norm(first - second, norm, axis=-1)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "norm", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(np.inf, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_constants_are_above_difference_quotients(activation, norm):
    function = getattr(jax.nn, activation)
    change, distance = difference_quotients(lambda x: apply(LAYERS, x, function), norm, 0.4)
    largest = jnp.max(jnp.abs(change) / distance[..., None], axis=0)
    mapped = jnp.max(jnp.linalg.norm(change, norm, axis=-1) / distance, axis=0)
    for method in (RecurJac(), FastLip()) if activation == "relu" else (RecurJac("forward"),):
        found = lipschitz(LAYERS, X, 0.4, norm=norm, activation=function, method=method)
        assert found.shape == (3, 3) and np.all(largest <= found * (1 + 1e-4))
        whole = lipschitz(LAYERS, X, 0.4, norm=norm, of="map", activation=function, method=method)
        assert whole.shape == (3,) and np.all(mapped <= whole * (1 + 1e-4))
        assert np.all(found <= lipschitz(LAYERS, X, jnp.inf, norm=norm, activation=function, method=method) * 1.00001)


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_row_sums_gain_and_are_never_above_entries(direction):
    method = RecurJac(direction)
    bounds = jacobian_bounds(LAYERS, X, 0.1, method=method, activation="relu")
    entries = jnp.sum(jnp.maximum(-bounds.lower, bounds.upper), axis=-1)
    found = lipschitz(LAYERS, X, 0.1, norm=jnp.inf, method=method, activation="relu")
    assert np.all(found <= entries * 1.0001) and np.any(found < 0.999 * entries)


def test_margins_maps_and_compositions_agree():
    logits = apply(LAYERS, X)
    spec = jb.margin_spec(jnp.argmax(logits, 1), 3)
    margins = lipschitz(LAYERS, X, 0.1, norm=2, of="margins", activation="relu")
    np.testing.assert_allclose(margins, lipschitz(LAYERS, X, 0.1, norm=2, spec=spec, activation="relu"), rtol=1e-6)
    wide = lipschitz(LAYERS, X, 0.1, norm=(2, np.inf), of="map", activation="relu")
    np.testing.assert_allclose(wide, jnp.max(lipschitz(LAYERS, X, 0.1, norm=2, activation="relu"), axis=1), rtol=1e-5)
    assert np.all(wide <= lipschitz(LAYERS, X, 0.1, norm=(2, 2), of="map", activation="relu") * 1.0001)
    single = lipschitz(LAYERS, X[0], 0.1, norm=2, method=FastLip(), activation="relu")
    np.testing.assert_allclose(
        single, lipschitz(LAYERS, X, 0.1, norm=2, method=FastLip(), activation="relu")[0], rtol=1e-5
    )
    best = lipschitz(LAYERS, X, 0.1, method=jb.Best(RecurJac(), FastLip()), activation="relu")
    assert np.all(best <= lipschitz(LAYERS, X, 0.1, method=RecurJac(), activation="relu"))
    box = jb.Box(X - 0.1, X + 0.1)
    np.testing.assert_allclose(lipschitz(LAYERS, box, norm=1, activation="relu"), lipschitz(LAYERS, jb.LpBall(X, 0.1, jnp.inf, batch_ndim=1), norm=1, activation="relu"), rtol=1e-4)  # fmt: skip


@pytest.mark.slow
def test_composition_has_constants_of_margins():
    margins = lipschitz(LAYERS, X, 0.1, norm=2, of="margins", method=jb.CrownIBP(), activation="relu")
    assert margins.shape == (3, 2) and np.all(
        margins >= lipschitz(LAYERS, X, 0.0, norm=2, of="margins", activation="relu") * 0.999
    )


def test_composition_has_constants_too():
    found = lipschitz((), X, 0.1, norm=2, apply_fn=lambda _, x: x + jnp.tanh(x), method=jb.CrownIBP())
    change, distance = difference_quotients(lambda x: x + jnp.tanh(x), 2, 0.1)
    assert np.all(jnp.max(jnp.abs(change) / distance[..., None], axis=0) <= found * (1 + 1e-4))
    assert np.all(found < 2.001)


def test_global_constants():
    """relu(x) - relu(-x) = x in disguise: each neuron is unstable, signs cannot cancel, so 1 + 1 would be the product."""
    layers = ((jnp.array([[1.0, -1.0]]), jnp.zeros(2)), (jnp.array([[1.0], [-1.0]]), jnp.zeros(1)))
    found = lipschitz(layers, jnp.zeros((1, 1)), jnp.inf, activation="relu")
    assert 1 <= found[0, 0] <= 2.0001
    cubes = lipschitz(layers, jnp.zeros((1, 1)), jnp.inf, activation=lambda x: x**3)
    assert cubes[0, 0] == jnp.inf


@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_products_of_norms_are_above(norm):
    change, distance = difference_quotients(lambda x: apply(LAYERS, x, jnp.tanh), norm, 3.0)
    product = spectral_lipschitz(LAYERS, X, norm=norm, activation=jnp.tanh)
    assert np.all(jnp.max(jnp.abs(change) / distance[..., None], axis=(0, 1)) <= product)
    order = {1: 1, 2: 2, np.inf: np.inf}[norm]
    kernels = [np.asarray(kernel, float).T for kernel, _ in LAYERS]
    inner = np.prod([np.linalg.norm(kernel, order) for kernel in kernels[:-1]])
    rows = np.linalg.norm(kernels[-1], {1: np.inf, 2: 2, np.inf: 1}[norm], axis=1)
    assert np.all(rows * inner <= product) and np.all(product <= 1.005 * rows * inner)
    whole = spectral_lipschitz(LAYERS, X, norm=norm, of="map", activation=jnp.tanh)
    exact = np.linalg.norm(kernels[-1], order) * inner
    assert exact <= whole <= 1.005 * exact


def test_products_of_norms_of_convolutions(monkeypatch):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 2))

    def network(kernel, x):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(x.reshape(x.shape[0], -1))[:, :2]

    x = jnp.ones((1, 5, 5, 1))
    found = spectral_lipschitz(kernel, x, of="map", apply_fn=network)
    matrix = jax.vmap(lambda v: jax.lax.conv_general_dilated(v.reshape(1, 5, 5, 1), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(-1))(jnp.eye(25))  # fmt: skip
    exact = np.linalg.norm(np.asarray(matrix, float), 2)
    assert exact <= found <= 1.01 * exact
    monkeypatch.setattr("jaxbound.jacobian.spectral.DENSE", 600)  # the convolution has 1250 numbers, the choice 100
    assert exact <= spectral_lipschitz(kernel, x, of="map", apply_fn=network) <= 4 * exact
    with pytest.raises(errors.ArgumentError, match="1, 2 or"):
        spectral_lipschitz(kernel, x, norm=3, apply_fn=network)


# --- robustness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [np.inf, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_integrals_bound_values(norm):
    ball = jb.LpBall(X, 0.3, norm, batch_ndim=1)
    points = jb.regions.sample(ball, jax.random.key(0), (3000,), extremes=True)
    values = apply(LAYERS, points)
    found = {}
    for steps in (1, 4):
        method = LipschitzIntegral(steps=steps)
        found[steps] = bound_network(method, LAYERS, X, 0.3, norm=norm, activation="relu")
        assert np.all(found[steps].lower <= values.min(0) + 1e-5) and np.all(values.max(0) <= found[steps].upper + 1e-5)
    assert np.all(found[4].width <= found[1].width * 1.0001) and np.any(found[4].width < 0.99 * found[1].width)
    once = lipschitz(LAYERS, X, 0.3, norm=norm, activation="relu") * 0.3
    np.testing.assert_allclose(found[1].lower, apply(LAYERS, X) - once, rtol=1e-3, atol=1e-4)


def test_integrals_of_affine_functions_are_exact():
    layers = ((jnp.array([[1.0], [-2.0]]), jnp.array([0.5])),)
    for norm, reach in ((np.inf, 3.0), (2, 5**0.5), (1, 2.0)):
        found = bound_network(LipschitzIntegral(), layers, jnp.ones((1, 2)), 0.25, norm=norm, activation="relu")
        np.testing.assert_allclose(found.lower[0, 0], -0.5 - 0.25 * reach, rtol=1e-4)


def test_the_way_from_a_center_outside_of_the_clip_box_counts():
    """f = 10 relu(-x): flat within the clip box [0, 1], steep on the way from the center at -0.5."""
    layers = ((-jnp.ones((1, 1)), jnp.zeros(1)), (10 * jnp.ones((1, 1)), jnp.zeros(1)))
    found = bound_network(LipschitzIntegral(), layers, jnp.array([[-0.5]]), 1.0, clip=(0.0, 1.0), activation="relu")
    assert found.lower[0, 0] <= 0 <= found.upper[0, 0]


def test_certificates_by_integrals():
    labels = jnp.argmax(apply(LAYERS, X), axis=1)
    for method in (LipschitzIntegral(steps=3), LipschitzIntegral(FastLip(), steps=3)):
        radius = certified_radius(LAYERS, X, labels, method=method, steps=8, activation="relu")
        assert np.all(radius > 0)
        attack = jb.pgd(LAYERS, X, labels, radius, key=jax.random.key(0), steps=10, activation="relu")
        jb.check_against_attack(jb.certify(LAYERS, X, labels, radius, method=method, activation="relu"), attack)
    traced = jax.jit(
        lambda x: jb.margins(LAYERS, x, labels, 0.05, method=LipschitzIntegral(steps=3), activation="relu")
    )(X)
    eager = jb.margins(LAYERS, X, labels, 0.05, method=LipschitzIntegral(steps=3), activation="relu")
    np.testing.assert_allclose(traced, eager, atol=1e-5)


def test_integrals_refuse_what_is_no_ball():
    with pytest.raises(errors.ArgumentError, match="needs an LpBall"):
        bound_network(LipschitzIntegral(), LAYERS, jb.Box(X, X), activation="relu")
    region = jb.LpBall(X, jnp.full_like(X, 0.1), jnp.inf, batch_ndim=1)
    with pytest.raises(errors.ArgumentError, match="needs one per ball"):
        bound_network(LipschitzIntegral(), LAYERS, region, activation="relu")
    with pytest.raises(errors.ArgumentError, match=r"pass RecurJac\(\), FastLip\(\)"):
        bound_network(LipschitzIntegral(jb.Crown()), LAYERS, X, 0.1, activation="relu")
    with pytest.raises(errors.ArgumentError, match="pass 1 or more"):
        bound_network(LipschitzIntegral(steps=0), LAYERS, X, 0.1, activation="relu")


# --- landscape --------------------------------------------------------------------------------------------------------


def test_landscape_of_hand_made_functions():
    """relu(x + 1) is flat from -1 on; (x - 1)^2 has its minimum at 1; a line has none anywhere."""
    flat = ((jnp.array([[1.0]]), jnp.ones(1)), (jnp.eye(1), jnp.zeros(1)))
    zero = jnp.zeros((1, 1)), jnp.array([0])
    assert 0.99 < landscape_radius(flat, *zero, activation="relu")[0] < 1
    square = ((jnp.eye(1), -jnp.ones(1)), (jnp.eye(1), jnp.zeros(1)))
    assert 0.99 < landscape_radius(square, *zero, activation=jnp.square)[0] < 1
    assert landscape_radius(((jnp.eye(1), jnp.zeros(1)),), *zero, activation="relu")[0] == jnp.inf
    assert landscape_radius(((0 * jnp.eye(1), jnp.zeros(1)),), *zero, activation="relu")[0] == 0


def test_landscape_radii_hold():
    labels = jnp.array([0, 1, 2])
    slow, fast = (
        landscape_radius(LAYERS, X, labels, norm=2, method=m, steps=8, activation="relu")
        for m in (RecurJac(), FastLip())
    )
    assert np.all(fast <= slow * 1.01) and np.all(slow > 0)
    ball = jb.LpBall(X, jnp.where(jnp.isinf(slow), 100.0, slow), 2, batch_ndim=1)
    points = jb.regions.sample(ball, jax.random.key(0), (3000,), extremes=True)
    gradient = jax.vmap(jax.vmap(jax.grad(lambda x, k: apply(LAYERS, x)[k])), in_axes=(0, None))(points, labels)
    assert np.all(jnp.linalg.norm(gradient, axis=-1) > 0)
    signs = jnp.all(gradient > 0, axis=0) | jnp.all(gradient < 0, axis=0)
    assert np.all(jnp.any(signs, axis=-1))


def test_estimates_are_refused():
    estimate, labels = jb.ConvexPolytope(1, jax.random.key(0)), jnp.array([0, 1, 2])
    for method in (estimate, RecurJac(pre_activation=estimate), FastLip(pre_activation=estimate)):
        for call in (
            lambda method: jacobian_bounds(LAYERS, X, 0.05, method=method, activation="relu"),
            lambda method: lipschitz(LAYERS, X, 0.05, method=method, activation="relu"),
            lambda method: lipschitz(LAYERS, X, 0.05, norm=2, of="map", method=method, activation="relu"),
            lambda method: landscape_radius(LAYERS, X, labels, method=method, activation="relu"),
            lambda method: bound_network(LipschitzIntegral(method), LAYERS, X, 0.05, activation="relu"),
        ):
            with pytest.raises(errors.ArgumentError, match=r"gives an estimate|pass RecurJac\(\), FastLip"):
                call(method)


def test_landscape_arguments_are_checked():
    with pytest.raises(errors.ArgumentError, match=r"classes are numbered 0\.\.2"):
        landscape_radius(LAYERS, X, jnp.array([0, 1, 3]), activation="relu")
    with pytest.raises(errors.ArgumentError, match="one class per example"):
        landscape_radius(LAYERS, X, jnp.array([0]), activation="relu")
    with pytest.raises(errors.ArgumentError, match="is a region"):
        landscape_radius(LAYERS, jb.Box(X, X), jnp.array([0, 1, 2]), activation="relu")
    single = landscape_radius(LAYERS, X[0], jnp.array(0), steps=2, method=FastLip(), activation="relu")
    assert single.shape == ()
