"""Jacobian bounds: sound over every choice of derivatives, exact where they should be, refused where none exist."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxbound as jb
from jaxbound import errors
from jaxbound.graph import tracing
from jaxbound.jacobian import chains, recursion, slopes
from jaxbound.jacobian.composition import given, jacobian_bounds, jacobian_of
from jaxbound.jacobian.recurjac import FastLip, RecurJac
from jaxbound.methods import Method
from jaxbound.network.bounding import bound_network

CHAIN_METHODS = {
    "backward": RecurJac(),
    "backward, shifted": RecurJac(shift=1),
    "forward": RecurJac("forward"),
    "forward, shifted": RecurJac("forward", 1),
    "fastlip": FastLip(),
}
ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu, "elu": jax.nn.elu, "selu": jax.nn.selu,
    "softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "arctan": jnp.arctan,
    "hard_sigmoid": jax.nn.hard_sigmoid, "hard_swish": jax.nn.hard_swish, "gelu": jax.nn.gelu, "silu": jax.nn.silu,
    "sin": jnp.sin, "abs": jnp.abs, "maximum": lambda x: jnp.maximum(x, 0), "where": lambda x: jnp.where(x > 1, 1, x),
    "prelu": lambda x: jnp.where(x >= 0, x, jnp.linspace(0.1, 0.9, x.shape[-1], dtype=x.dtype) * x),
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given(Method):
    """Pre-activation bounds as they are given, layer by layer, for every example."""

    ends: tuple

    def pre_activations(self, graph, leaves, request):
        """The given bounds by node."""
        numbers = sorted({graph.nodes[k].inputs[0] for k in graph.structure.nonlinear})
        batch = jax.tree.leaves(leaves)[0].shape[0]
        repeat = lambda end: jnp.broadcast_to(end, (batch, *end.shape))  # noqa: E731
        return {k: tuple(map(repeat, ends)) for k, ends in zip(numbers, self.ends, strict=True)}


def random_layers(sizes, seed=0, dtype=jnp.float32, scale=1.0):
    draw = np.random.default_rng(seed)
    return tuple(
        (jnp.asarray(scale * draw.normal(size=(n, m)), dtype), jnp.asarray(0.3 * draw.normal(size=m), dtype))
        for n, m in itertools.pairwise(sizes)
    )


def apply(layers, x, activation=jax.nn.relu):
    for kernel, bias in layers[:-1]:
        x = activation(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


def with_pre_activation(method, pre_activation):
    options = {name: getattr(method, name) for name in method.__dataclass_fields__}
    return type(method)(**{**options, "pre_activation": pre_activation})


# --- ranges of derivatives --------------------------------------------------------------------------------------------


def range_of(activation, low, high):
    structure = tracing.build(activation, [jax.ShapeDtypeStruct(low.shape, low.dtype)], [True])
    (number,) = structure.nonlinear
    op = structure.nodes[number].op
    constants = structure.constants({})
    used = [constants[k] for k in structure.nodes[number].constants]
    return jax.jit(lambda low, high: slopes.slope_range(op, used, (low, high)))(low, high)


@pytest.mark.parametrize(("name", "low", "high"), [("softplus", -0.25, 0.05), ("hard_swish", 2.75, 3.05)])
def test_a_choice_that_no_rounding_turns_costs_nothing(name, low, high):
    """At the border of its cases the programs compare exact sums: z - 0 with 0, z + 3 with 6."""
    lower, upper = range_of(ACTIVATIONS[name], *(jnp.full(1, end, jnp.float32) for end in (low, high)))
    with jax.enable_x64(True):
        slope = np.asarray(jax.vmap(jax.grad(ACTIVATIONS[name]))(jnp.linspace(low, high, 10001)))
    assert np.all((slope.min() - 1e-5 < np.asarray(lower)) & (np.asarray(upper) < slope.max() + 1e-4))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_slope_ranges_hold_and_are_tight(name, dtype):
    draw = np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):
        center, radius = draw.normal(size=256) * 3, 3 * draw.random(256) ** 4
        low, high = (jnp.asarray(end, dtype) for end in (center - radius, center + radius))
        lower, upper = map(np.asarray, range_of(ACTIVATIONS[name], low, high))
    with jax.enable_x64(True):
        share = jnp.linspace(0, 1, 401)[:, None]
        z = np.asarray(low, float) * (1 - share) + np.asarray(high, float) * share
        slope = np.asarray(jax.vmap(lambda z: jax.jvp(ACTIVATIONS[name], (z,), (jnp.ones_like(z),))[1])(z))
    unit = 2e-7 if dtype == "float32" else 0  # literals are other numbers there
    assert np.all(lower <= slope.min(0) + unit) and np.all(slope.max(0) <= upper + unit)
    assert np.max(slope.min(0) - lower) < 0.04 and np.max(upper - slope.max(0)) < 0.04
    assert np.median(slope.min(0) - lower) < 2e-4 and np.median(upper - slope.max(0)) < 2e-4


@pytest.mark.parametrize(
    ("name", "kink", "expected"),
    [("relu", 0.0, (0, 1)), ("maximum", 0.0, (0, 1)), ("abs", 0.0, (-1, 1)), ("leaky_relu", 0.0, (0.01, 1)),
     ("hard_sigmoid", 3.0, (0, 1 / 6)), ("where", 1.0, (0, 1))],
)  # fmt: skip
def test_kinks_have_clarkes_derivative(name, kink, expected):
    at = jnp.array([kink], jnp.float32)
    for low, high in ((at, at), (at - 0.5, at), (at, at + 0.5)):
        lower, upper = range_of(ACTIVATIONS[name], low, high)
        np.testing.assert_allclose([lower[0], upper[0]], expected, atol=1e-6)


def test_lines_have_exact_slopes():
    low, high = jnp.array([0.5, -2.0, -1.0]), jnp.array([7.0, -0.5, 1.0])
    lower, upper = range_of(jax.nn.relu, low, high)
    assert lower.tolist() == [1, 0, 0] and upper.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "expected"), [("relu", (0, 1)), ("tanh", (0, 1)), ("silu", (-0.0999, 1.0999)), ("sin", (-1, 1))]
)
def test_slopes_on_the_whole_line(name, expected):
    ends = jnp.array([-jnp.inf]), jnp.array([jnp.inf])
    lower, upper = range_of(ACTIVATIONS[name], *ends)
    np.testing.assert_allclose([lower[0], upper[0]], expected, atol=1e-4)


def test_unbounded_slopes_are_infinite_on_the_whole_line():
    lower, upper = range_of(lambda x: x**3, jnp.array([-jnp.inf]), jnp.array([jnp.inf]))
    assert upper[0] == jnp.inf and lower[0] <= 0


# --- the recursion ----------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    layers: tuple
    ends: tuple
    """Bounds of the inputs of each nonlinearity, not those of any region: nothing else limits the derivatives."""


def given_problem(sizes, seed, dtype=jnp.float32):
    draw = np.random.default_rng(100 + seed)
    layers = random_layers(sizes, seed, dtype)
    center = [draw.normal(size=n) for n in sizes[1:-1]]
    radius = [draw.random(n) ** 2 * 1.5 for n in sizes[1:-1]]
    ends = tuple((jnp.asarray(c - r, dtype), jnp.asarray(c + r, dtype)) for c, r in zip(center, radius, strict=True))
    return Problem(layers, ends)


def extreme_jacobians(problem, activation):
    """All Jacobians with every derivative at an end of its range: the Jacobian is linear in each, so they span it."""
    matrices = [np.asarray(kernel, float) for kernel, _ in problem.layers]
    ranges = [tuple(map(np.asarray, range_of(activation, *ends))) for ends in problem.ends]
    choices = [np.array(list(itertools.product(*zip(low, high, strict=True))), float) for low, high in ranges]
    jacobians = []
    for chosen in itertools.product(*choices):
        product = matrices[0]
        for matrix, slope in zip(matrices[1:], chosen, strict=True):
            product = (product * slope) @ matrix
        jacobians.append(product.T)
    return np.stack(jacobians)


@pytest.mark.quick(2)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("sizes", [(3, 4, 2), (2, 3, 3, 2), pytest.param((2, 3, 2, 3, 2), marks=pytest.mark.slow)])
def test_bounds_hold_for_every_choice_of_derivatives(activation, sizes):
    function, x = ACTIVATIONS[activation], jnp.zeros((1, sizes[0]))
    for seed in range(3):
        problem = given_problem(sizes, seed)
        extreme = extreme_jacobians(problem, function)
        least, most = extreme.min(0), extreme.max(0)
        size = np.abs(extreme).max()
        found = {}
        for name, method in CHAIN_METHODS.items():
            method = with_pre_activation(method, Given(problem.ends))
            bounds = jacobian_bounds(problem.layers, x, 1.0, activation=function, method=method)
            found[name] = np.asarray(bounds.lower[0]), np.asarray(bounds.upper[0])
            assert np.all(found[name][0] <= least + 1e-5 * size), name
            assert np.all(most <= found[name][1] + 1e-5 * size), name
        assert np.all(found["fastlip"][0] <= found["backward"][0] + 1e-6 * size)
        assert np.all(found["backward"][1] <= found["fastlip"][1] + 1e-6 * size)
        if len(sizes) == 3:  # one nonlinearity: nothing is lost
            np.testing.assert_allclose(found["backward"][0], least, atol=1e-5 * size)
            np.testing.assert_allclose(found["forward"][1], most, atol=1e-5 * size)


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_fixed_signs_lose_nothing(direction):
    """Kernels without negative entries fix all signs: the recursion is exact, plain steps are exact too."""
    problem = given_problem((2, 3, 3, 2), 0)
    layers = tuple((jnp.abs(kernel), bias) for kernel, bias in problem.layers)
    problem = problem._replace(layers=layers)
    extreme = extreme_jacobians(problem, jax.nn.relu)
    method = RecurJac(direction, pre_activation=Given(problem.ends))
    bounds = jacobian_bounds(layers, jnp.zeros((1, 2)), 1.0, method=method, activation="relu")
    np.testing.assert_allclose(bounds.lower[0], extreme.min(0), atol=1e-5)
    np.testing.assert_allclose(bounds.upper[0], extreme.max(0), rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize(
    "open_layer", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_one_open_layer_loses_nothing(activation, open_layer):
    """Where the derivatives of all other layers are known the Jacobian is linear in those that are not."""
    function = ACTIVATIONS[activation]
    problem = given_problem((2, 3, 2, 3, 2), 4)
    middle = [((low + high) / 2,) * 2 for low, high in problem.ends]
    ends = tuple(problem.ends[k] if k == open_layer else middle[k] for k in range(3))
    problem = problem._replace(ends=ends)
    extreme = extreme_jacobians(problem, function)
    for direction in ("backward", "forward"):
        method = RecurJac(direction, pre_activation=Given(ends))
        bounds = jacobian_bounds(problem.layers, jnp.zeros((1, 2)), 1.0, activation=function, method=method)
        np.testing.assert_allclose(bounds.lower[0], extreme.min(0), atol=2e-5)
        np.testing.assert_allclose(bounds.upper[0], extreme.max(0), atol=2e-5)


def test_golden_two_neurons():
    """f = 2 relu(x) - relu(x - 1): the second neuron is unstable on [0.5, 1.5], so J lies in 2 - [0, 1]."""
    layers = ((jnp.ones((1, 2)), jnp.array([0.0, -1.0])), (jnp.array([[2.0], [-1.0]]), jnp.zeros(1)))
    for method in CHAIN_METHODS.values():
        bounds = jacobian_bounds(layers, jnp.ones((1, 1)), 0.5, method=method, activation="relu")
        assert (float(bounds.lower[0, 0, 0]), float(bounds.upper[0, 0, 0])) == (1.0, 2.0)


@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_outward_bounds_hold_in_exact_arithmetic(activation):
    """In float32, compared with float64: the widening covers the rounding, also where all is exactly known."""
    sizes, function = (20, 30, 20, 5), ACTIVATIONS[activation]
    layers = random_layers(sizes, 3, scale=0.3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 20)), jnp.float32)
    problem = given(layers, x, 0.0, None, function, np.inf, None, None)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), layers)
        exact = jax.vmap(jax.jacrev(lambda x: apply(wide, x, function)))(jnp.asarray(x, jnp.float64))
    exact = np.asarray(exact)
    for method in (RecurJac(), RecurJac("forward")):
        found = jacobian_of(problem, method, rounding=True)
        lower, upper = np.asarray(found.lower, float), np.asarray(found.upper, float)
        assert np.all(lower <= exact) and np.all(exact <= upper)
        assert np.max(upper - lower) < 0.02 * np.max(np.abs(exact))


@pytest.mark.slow
def test_outward_bounds_allow_for_every_sum(monkeypatch):
    """A product of matrices with k summands each is computed up to about k u for each, times absolute values."""
    traced, fold = [], recursion._fold
    monkeypatch.setattr(recursion, "_fold", functools.wraps(fold)(lambda *args: traced.append(args) or fold(*args)))
    draw, sizes = np.random.default_rng(6), (3, 150, 3, 150, 3, 150, 2)
    kernels = [jnp.asarray(np.abs(draw.normal(size=pair)), jnp.float32) for pair in itertools.pairwise(sizes)]
    layers = tuple((kernel, jnp.ones(kernel.shape[1])) for kernel in kernels)  # every neuron is active
    product = np.eye(sizes[0])
    for kernel, _ in layers:
        product = product @ np.asarray(kernel, float)
    least = 3 * 150 * 2.0**-24 * product.T  # without one of the three it would be two thirds
    problem = given(layers, jnp.zeros((1, sizes[0])), 0.0, None, jax.nn.relu, np.inf, None, None)
    for method in (RecurJac(), RecurJac("forward"), RecurJac(shift=1), FastLip()):
        found = jacobian_of(problem, method, rounding=True)
        assert found.upper is not None
        assert len(traced) == 2 or method != RecurJac()  # all levels share the steps of two kinds of layers
        assert np.all(np.asarray(found.upper, float)[0] - product.T >= 0.9 * least), method
        assert np.all(product.T - np.asarray(found.lower, float)[0] >= 0.9 * least), method


# --- networks ---------------------------------------------------------------------------------------------------------


def jacobians_inside(function, x, eps, norm, count, key):
    """Jacobians at random points of the balls, (batch, count, outputs, *inputs)."""
    region = jb.LpBall(x, eps, norm, batch_ndim=1)
    half = count // 2
    points = jnp.concatenate(
        [jb.regions.sample(region, key, (half,)), jb.regions.sample(region, key, (half,), extremes=True)]
    )
    return jnp.swapaxes(jax.vmap(jax.vmap(jax.jacrev(function)))(points), 0, 1)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "norm", [2, pytest.param(np.inf, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_sound_by_sampling(activation, norm):
    layers, function = random_layers((4, 8, 6, 3), 5), ACTIVATIONS[activation]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)), jnp.float32)
    inside = jacobians_inside(lambda x: apply(layers, x, function), x, 0.3, norm, 4000, jax.random.key(0))
    methods = {"backward": RecurJac()} if norm != 2 or activation == "tanh" else {"forward": RecurJac("forward")}
    if activation == "relu":
        methods = {**(CHAIN_METHODS if norm == 2 else methods), "crown": jb.Crown()}
    for name, method in methods.items():
        bounds = jacobian_bounds(layers, x, 0.3, norm=norm, activation=function, method=method)
        tolerance = 2e-6 * float(jnp.max(jnp.abs(inside)))
        assert np.all(bounds.lower[:, None] <= inside + tolerance), name
        assert np.all(inside <= bounds.upper[:, None] + tolerance), name


class Convolutions(nn.Module):
    """Two convolutions, one strided, average pooling, Dense."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3, 3), strides=2, padding=1)(x))
        x = nn.relu(nn.avg_pool(nn.Conv(4, (2, 2), padding="VALID")(x), (2, 2)))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def test_convolutions_are_their_matrices():
    module = Convolutions()
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
    params = module.init(jax.random.key(1), x)
    inside = jacobians_inside(lambda x: module.apply(params, x[None])[0], x, 0.2, np.inf, 500, jax.random.key(2))
    spec = jb.margin_spec(jnp.array([0, 2]), 3)
    bounds = jacobian_bounds(params, x, 0.2, apply_fn=module.apply, method=RecurJac())
    assert bounds.lower.shape == (2, 3, 6, 6, 1)
    assert np.all(bounds.lower[:, None] <= inside + 1e-5) and np.all(inside <= bounds.upper[:, None] + 1e-5)
    differences = jnp.einsum("bsc,bnc...->bns...", spec, inside)
    for method in (RecurJac(), FastLip()):
        margins = jacobian_bounds(params, x, 0.2, apply_fn=module.apply, method=method, spec=spec)
        assert np.all(margins.lower[:, None] <= differences + 1e-5)
        assert np.all(differences <= margins.upper[:, None] + 1e-5)


@pytest.mark.slow
def test_convolution_equals_the_dense_network_of_its_matrix():
    kernel = jax.random.normal(jax.random.key(0), (2, 2, 1, 2))
    tail = random_layers((18, 5, 2), 1)

    def network(layers, x):
        x = jax.lax.conv_general_dilated(x, layers[0], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return apply(layers[1], jax.nn.relu(x.reshape(x.shape[0], -1)))

    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    linear = lambda v: jax.lax.conv_general_dilated(  # noqa: E731
        v.reshape(1, 4, 4, 1), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(-1)
    dense = ((jax.vmap(linear)(jnp.eye(16)), jnp.zeros(18)), *tail)
    for method in (RecurJac("forward"), FastLip()):
        found = jacobian_bounds((kernel, tail), x, 0.1, apply_fn=network, method=method)
        expected = jacobian_bounds(dense, x.reshape(2, 16), 0.1, method=method, activation="relu")
        np.testing.assert_allclose(found.lower.reshape(2, 2, 16), expected.lower, atol=1e-5)
        np.testing.assert_allclose(found.upper.reshape(2, 2, 16), expected.upper, atol=1e-5)


def test_batch_chunks_and_jit_change_nothing(monkeypatch):
    layers = random_layers((3, 5, 4, 3), 7)
    x = jax.random.normal(jax.random.key(0), (3, 3))
    method = RecurJac()
    whole = jacobian_bounds(layers, x, 0.2, method=method, activation="relu")
    compiled = jax.jit(lambda layers, x: jacobian_bounds(layers, x, 0.2, method=method, activation="relu"))
    single = jacobian_bounds(layers, x[1], 0.2, method=method, activation="relu")
    assert single.lower.shape == (3, 3)
    np.testing.assert_allclose(single.lower, whole.lower[1], atol=1e-6)
    np.testing.assert_allclose(compiled(layers, x).upper, whole.upper, atol=1e-6)
    monkeypatch.setattr(recursion, "COLUMNS", 2)  # of 3 and 5: the last chunk meets the one before it
    monkeypatch.setattr(recursion, "MEMORY", {"cpu": 2 * 3 * 4 * 5 * 2 * 2})  # two rows at a time, of three
    np.testing.assert_allclose(
        jacobian_bounds(layers, x, 0.2, method=method, activation="relu").lower, whole.lower, atol=1e-6
    )
    chunked = jax.jit(lambda layers, x: jacobian_bounds(layers, x, 0.2, method=method, activation="relu"))
    np.testing.assert_allclose(chunked(layers, x).upper, whole.upper, atol=1e-6)
    monkeypatch.setattr(chains, "MOST", 8)
    with pytest.raises(errors.UnsupportedError, match=r"GiB, .* method=Crown"):
        jacobian_bounds(layers, x, 0.2, method=method, activation="relu")


def test_a_second_call_compiles_nothing():
    layers = random_layers((3, 4, 4, 2), 8)
    x = jnp.ones((2, 3))
    traced = []

    def activation(z):
        traced.append(z)
        return jnp.tanh(z)

    jacobian_bounds(layers, x, 0.1, activation=activation)
    count = len(traced)
    jacobian_bounds(layers, x + 1, 0.2, activation=activation)
    assert count > 0 and len(traced) == count


@pytest.mark.quick(1)
def test_gradients_of_widths_are_finite():
    layers = random_layers((3, 4, 2), 9)
    x = jnp.ones((2, 3))
    grads = jax.grad(lambda layers: jnp.sum(jacobian_bounds(layers, x, 0.1, activation=jnp.tanh).width))(layers)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_constant_and_affine_functions():
    x = jnp.ones((2, 3))
    matrix = jnp.arange(6.0).reshape(3, 2)
    for method in (*CHAIN_METHODS.values(), jb.Crown(), jb.Best(RecurJac(), jb.IBP())):
        affine = jacobian_bounds(matrix, x, jnp.inf, apply_fn=lambda w, x: x @ w, method=method)
        np.testing.assert_array_equal(affine.lower, jnp.broadcast_to(matrix.T, (2, 2, 3)))
        np.testing.assert_array_equal(affine.upper, affine.lower)
        constant = jacobian_bounds(
            matrix, x, 0.1, apply_fn=lambda w, x: w[:1] * jnp.ones((x.shape[0], 2)), method=method
        )
        assert not constant.lower.any() and not constant.upper.any()


def test_nothing_is_certified_of_what_is_undefined():
    layers = random_layers((3, 4, 2), 1)
    broken = ((layers[0][0].at[0, 0].set(jnp.nan), layers[0][1]), layers[1])
    bounds = jacobian_bounds(broken, jnp.ones((1, 3)), 0.1, activation="relu")
    assert np.all(bounds.lower == -jnp.inf) and np.all(bounds.upper == jnp.inf)


# --- composition ------------------------------------------------------------------------------------------------------


def test_composition_covers_kinks_and_ties():
    """Exactly at a kink, with radius 0: Clarke's Jacobian, not the value that JAX picks."""
    for function in (
        jax.nn.relu,
        lambda x: jnp.maximum(x, 0),
        lambda x: jnp.max(jnp.concatenate([x, 0 * x], 1), 1)[:, None],
    ):
        for method in (jb.IBP(), jb.Crown()):
            bounds = jacobian_bounds((), jnp.zeros((1, 1)), 0.0, apply_fn=lambda _, x, f=function: f(x), method=method)
            assert bounds.lower[0, 0, 0] <= 0 and bounds.upper[0, 0, 0] >= 1


def test_composition_bounds_what_is_no_chain():
    def network(w, x):
        return x + jnp.tanh(x @ w)

    w = jax.random.normal(jax.random.key(0), (3, 3))
    x = jax.random.normal(jax.random.key(1), (2, 3))
    bounds = jacobian_bounds(w, x, 0.1, apply_fn=network, method=jb.Crown())
    inside = jacobians_inside(lambda x: network(w, x[None])[0], x, 0.1, np.inf, 1000, jax.random.key(2))
    assert np.all(bounds.lower[:, None] <= inside + 1e-5) and np.all(inside <= bounds.upper[:, None] + 1e-5)
    with pytest.raises(errors.UnsupportedError, match=r"RecurJac cannot bound .*; use method=Crown\(\)"):
        jacobian_bounds(w, x, 0.1, apply_fn=network, method=RecurJac())


@pytest.mark.slow
def test_best_is_never_wider_than_either():
    layers = random_layers((4, 8, 6, 3), 11)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    first, second, both = (
        jacobian_bounds(layers, x, 0.2, method=m, activation="relu")
        for m in (RecurJac(), jb.Crown(), jb.Best(RecurJac(), jb.Crown()))
    )
    np.testing.assert_array_equal(both.lower, jnp.maximum(first.lower, second.lower))
    np.testing.assert_array_equal(both.upper, jnp.minimum(first.upper, second.upper))
    assert np.any(first.width < second.width) and np.any(second.width < first.width)


# --- refusals ---------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def liar(x):
    return 5 * x


liar.defjvp(lambda primals, tangents: (liar(*primals), 0 * tangents[0]))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (jnp.sign, "may jump"),
        (lambda x: jnp.where(x > 0, x + 1, x), "may jump"),
        (jnp.round, "jumps|staircase"),
        (jnp.floor, "jumps|staircase"),
        (lambda x: x * jax.lax.stop_gradient(x), "hides a part of the derivative|not a function of one value"),
        (lambda x: jax.lax.stop_gradient(2 * x), "hides a part of the derivative"),
        (lambda x: 1 / x, "may jump"),
    ],
)
@pytest.mark.parametrize(
    "method", [RecurJac(), FastLip(), jb.Crown(), jb.IBP()], ids=["RecurJac", "FastLip", "Crown", "IBP"]
)
def test_derivatives_that_tell_nothing_are_refused(function, reason, method):
    with pytest.raises(errors.UnsupportedError, match=reason):
        jacobian_bounds((), jnp.ones((1, 2)), 0.1, apply_fn=lambda _, x: function(x), method=method)


def test_derivative_rules_of_others_are_refused_where_they_cannot_be_left_out():
    def apply_fn(_, x):
        return jax.lax.scan(lambda x, _: (jax.jit(liar)(x), None), x, None, length=1)[0]

    x = jnp.ones((1, 2))
    with pytest.raises(errors.UnsupportedError, match=r"`liar`.*may not be its derivative.*RecurJac"):
        jacobian_bounds((), x, 0.1, apply_fn=apply_fn, method=jb.Crown())
    bounds = jacobian_bounds((), x, 0.1, apply_fn=apply_fn, method=RecurJac())
    np.testing.assert_array_equal(bounds.lower[0], 5 * jnp.eye(2))


@jax.custom_gradient
def hidden_liar(x):
    return 5 * x, lambda g: 0 * g


borrower = jax.custom_jvp(jax.nn.relu.__wrapped__)
borrower.defjvp(lambda primals, tangents: (borrower(*primals), 0 * tangents[0]))


@jax.custom_vjp
def several(x, y):
    return 5 * x, {"y": jnp.maximum(y, 0)}


several.defvjp(lambda x, y: (several(x, y), None), lambda _, g: (0 * g[0], 0 * g[1]["y"]))


@jax.custom_batching.custom_vmap
def otherwise_in_batches(x):
    return 5 * x


otherwise_in_batches.def_vmap(lambda size, batched, x: (0 * x, True))


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (liar, 5),
        (jax.checkpoint(jax.jit(liar)), 5),
        (lambda x: liar(hidden_liar(x)), 25),
        (borrower, 1),
        (lambda x: several(x, x)[0] + several(x, x)[1]["y"], 6),
        (otherwise_in_batches, 5),
        (lambda x: jax.lax.custom_root(lambda z: z - x, x, lambda f, z: 5 * x, lambda g, y: 0 * y), 5),
    ],
    ids=[
        "custom_jvp",
        "within calls",
        "custom_gradient",
        "relu with another rule",
        "custom_vjp",
        "vmap",
        "custom_root",
    ],
)
@pytest.mark.parametrize("spec", [None, jnp.ones((1, 2))], ids=["outputs", "spec"])
def test_rules_of_others_do_not_count(function, slope, spec):
    """What they are rules of is differentiated as it is written, whatever they say."""
    call = functools.partial(jacobian_bounds, jnp.ones(2), jnp.ones((1, 2)), 0.1, spec=spec)
    found = call(apply_fn=lambda p, x: function(x) * p, method=jb.Crown())
    for end in (found.lower, found.upper):
        np.testing.assert_allclose(end[0], slope * (jnp.eye(2) if spec is None else spec), rtol=1e-5)


def test_a_jump_with_a_derivative_of_its_own_is_refused():
    straight = jax.custom_jvp(lambda x: jnp.round(x))
    straight.defjvp(lambda primals, tangents: (straight(*primals), tangents[0]))
    with pytest.raises(errors.UnsupportedError, match="it jumps"):
        jacobian_bounds((), jnp.ones((1, 2)), 0.1, apply_fn=lambda _, x: straight(x), method=jb.Crown())


@pytest.mark.parametrize("function", [jax.nn.relu, jax.nn.relu6, jax.nn.softplus], ids=["relu", "relu6", "softplus"])
def test_rules_of_jax_are_trusted(function):
    found = jacobian_bounds((), jnp.ones((1, 2)), 0.1, apply_fn=lambda _, x: function(x), method=jb.IBP())
    assert np.isfinite(found.upper).all()


def test_jumps_of_any_height_are_refused():
    def step(x):
        return jnp.where(x > 0, np.float32(1e-14), np.float32(0))

    with pytest.raises(errors.UnsupportedError, match="may jump"):
        jacobian_bounds((), jnp.zeros((1, 2)), 0.1, apply_fn=lambda _, x: 1e14 * step(x))


def test_residuals_and_branches_are_refused():
    def residual(w, x):
        hidden = jax.nn.relu(x @ w)
        return jax.nn.relu(hidden @ w + hidden) @ w

    def skip(w, x):
        return jax.nn.relu(x @ w) + x

    def pooled(w, x):
        return jnp.max(x @ w, axis=-1, keepdims=True)

    def product(w, x):
        return (x @ w) * jnp.tanh(x)

    w = jnp.eye(3)
    for network in (skip, pooled, product, lambda w, x: jnp.tanh(x @ w) + jax.nn.relu(x @ w.T)):
        with pytest.raises(errors.UnsupportedError, match=r"use method=Crown\(\)"):
            jacobian_bounds(w, jnp.ones((1, 3)), 0.1, apply_fn=network, method=RecurJac())
    inner = jacobian_bounds(w, jnp.ones((1, 3)), 0.1, apply_fn=residual, method=RecurJac())  # affine: a chain
    assert inner.lower.shape == (1, 3, 3)


def test_arguments_are_checked():
    layers, x = random_layers((3, 4, 2), 1), jnp.ones((1, 3))
    with pytest.raises(errors.ArgumentError, match="did you mean 'backward'"):
        jacobian_bounds(layers, x, 0.1, method=RecurJac("backwards"), activation="relu")
    with pytest.raises(errors.ArgumentError, match="shift is 2; pass 0 or 1"):
        jacobian_bounds(layers, x, 0.1, method=RecurJac(shift=2), activation="relu")
    with pytest.raises(errors.ArgumentTypeError, match="pass a method object"):
        jacobian_bounds(layers, x, 0.1, method="recurjac", activation="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(errors.UnsupportedError, match="RecurJac has no bounds of values; call jaxbound"):
        bound_network(RecurJac(), layers, x, 0.1, activation="relu")
    with pytest.raises(errors.ArgumentError, match="several outputs"):
        jacobian_bounds((), x, 0.1, apply_fn=lambda _, x: (x, x))


# --- arrays computed by other code ------------------------------------------------------------------------------------

_FOLDER = os.environ.get("JAXBOUND_REFERENCE", "")
_NEEDS_FOLDER = pytest.mark.skipif(not _FOLDER, reason="JAXBOUND_REFERENCE names no folder of reference arrays")
_METHODS = {"recurjac-B": RecurJac(), "recurjac-F0": RecurJac("forward"), "recurjac-F1": RecurJac("forward", 1), "fastlip": FastLip()}  # fmt: skip


@_NEEDS_FOLDER
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_inside_the_original_with_its_pre_activations(activation):
    data = np.load(Path(_FOLDER) / f"recurjac_{activation}.npz")
    cases = sorted(key.rsplit("|", 1)[0] for key in data.files if key.endswith("jac_lb"))
    for case in cases:
        net, algorithm, norm, eps, name = case.split("|")
        base = f"{net}|{algorithm}|{norm}|{eps}"
        count = sum(key.startswith(f"{net}|W") for key in data.files)
        if algorithm not in ("crown-general", "interval") or f"{base}|pre0_lb" not in data.files:
            continue  # the others give the same kinds of boxes
        layers = [(jnp.asarray(data[f"{net}|W{i}"]), jnp.asarray(data[f"{net}|b{i}"])) for i in range(count)]
        ends = tuple(
            tuple(jnp.asarray(data[f"{base}|pre{i}_{side}"]) for side in ("lb", "ub")) for i in range(count - 1)
        )
        method = with_pre_activation(_METHODS[name], Given(ends))
        x = jnp.asarray(data[f"{net}|x0"])[None]
        bounds = jacobian_bounds(layers, x, 1.0, activation=ACTIVATIONS[activation], method=method)
        low, high = data[f"{case}|jac_lb"], data[f"{case}|jac_ub"]
        assert np.all(bounds.lower[0] >= low - 1e-4) and np.all(bounds.upper[0] <= high + 1e-4), case
        assert float(jnp.mean(bounds.width)) <= 1.001 * np.mean(high - low) + 1e-6, case


@_NEEDS_FOLDER
def test_inside_other_bounds_of_the_derivatives_graph():
    data = np.load(Path(_FOLDER) / "rival_jacobian_relu.npz")
    with jax.enable_x64(True):
        layers = [tuple(jnp.asarray(data[f"w.dense{i}.{part}"]) for part in ("kernel", "bias")) for i in range(3)]
        x, eps = jnp.asarray(data["x"]), float(data["eps.inf"])
        for name, method in (("IBP", jb.IBP()), ("CROWN", jb.Crown()), ("CROWN", jb.Best(RecurJac(), jb.Crown()))):
            bounds = jacobian_bounds(layers, x, eps, method=method, activation="relu")
            assert np.all(bounds.lower >= data[f"{name}.inf.jac_lb"] - 1e-9), name
            assert np.all(bounds.upper <= data[f"{name}.inf.jac_ub"] + 1e-9), name
