"""Bounds under JAX's transformations: one table of functions x methods, and the same numbers whatever the wrapping.

Functions take `(params, example)`. Everything runs in float64 where numbers are compared, so that only rounding may
differ, and differences are at most 1e-9. Compiling dominates the cost: the whole matrix is for `make soundness`, the
quick run takes every method on the smallest function and a few methods on the others.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.network.bounding import bound_network
from jaxbound.regions import Box, LpBall

RANDOM = np.random.default_rng(0)
EPS = 0.05
BATCH = 3
METHODS = {
    "IBP": jb.IBP(),
    "CrownIBP": jb.CrownIBP(),
    "Crown": jb.Crown(),
    "FastLin": jb.FastLin(),
    "Forward": jb.Forward(),
    "Best": jb.Best(jb.IBP(), jb.CrownIBP()),
}

# --- the functions ----------------------------------------------------------------------------------------------------


def dense(layer, h):
    return h @ layer["kernel"] + layer["bias"]


def shallow(p, x):
    return dense(p["b"], jax.nn.relu(dense(p["a"], x)))


def mlp(p, x):
    return dense(p["c"], jax.nn.relu(dense(p["b"], jax.nn.relu(dense(p["a"], x)))))


def cnn(p, x):
    h = jax.lax.conv_general_dilated(x[None], p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return dense(p["b"], jax.nn.relu(h).reshape(-1))


def residual(p, x):
    h = dense(p["a"], x)
    h = h + jnp.tanh(dense(p["b"], h))
    return dense(p["c"], h + jnp.tanh(dense(p["b"], h)))


def normalised(p, x):
    h = nn.LayerNorm(use_bias=False).apply({"params": p["norm"]}, dense(p["a"], x))
    return dense(p["b"], jax.nn.gelu(h))


def layer(n, m):
    return {"kernel": RANDOM.normal(size=(n, m)) / np.sqrt(n), "bias": RANDOM.normal(size=m) / 4}


FUNCTIONS: dict[str, tuple[Callable, dict, tuple[int, ...]]] = {
    "shallow": (shallow, {"a": layer(3, 5), "b": layer(5, 2)}, (3,)),
    "mlp": (mlp, {"a": layer(3, 8), "b": layer(8, 8), "c": layer(8, 2)}, (3,)),
    "cnn": (cnn, {"k": RANDOM.normal(size=(3, 3, 1, 2)) / 3, "b": layer(18, 2)}, (5, 5, 1)),
    "residual": (residual, {"a": layer(3, 4), "b": layer(4, 4), "c": layer(4, 2)}, (3,)),
    "normalised": (normalised, {"a": layer(3, 4), "norm": {"scale": np.linspace(0.5, 1.5, 4)}, "b": layer(4, 2)}, (3,)),
}
BATCHES = {name: RANDOM.normal(size=(BATCH, *shape)) for name, (_, _, shape) in FUNCTIONS.items()}

QUICK = {("shallow", "Crown"), ("shallow", "Forward"), ("normalised", "IBP")}


def cases(quick):
    """All pairs of a function and a method; those that are not quick are slow."""
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(f, m, id=f"{f}-{m}", marks=[] if (f, m) in quick else pytest.mark.slow)
            for f in FUNCTIONS
            for m in METHODS
        ],
    )


def setting(name, dtype=np.float64):
    """A function, its parameters and a batch."""
    fn, params, _ = FUNCTIONS[name]
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, BATCHES[name]))
    return fn, params, x


@functools.cache
def batched(fn):
    """An `apply_fn`, the same object at each call."""
    return jax.vmap(fn, in_axes=(None, 0))


def bounds_of_batch(fn, method, norm=np.inf):
    return lambda params, x, eps: bound_network(method, params, x, eps, apply_fn=batched(fn), norm=norm)


def assert_same(found, expected, atol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), found, expected)


# --- jit, vmap, lax.map -----------------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.x64
@cases(QUICK)
def test_eager_is_jit(name, method):
    fn, params, x = setting(name)
    run = bounds_of_batch(fn, METHODS[method])
    assert_same(jax.jit(run)(params, x, EPS), run(params, x, EPS))


@pytest.mark.x64
def test_rows_that_are_skipped_eagerly_change_nothing():
    """Eagerly, neurons whose relaxation is exact already are not bounded again: that must not loosen what follows."""
    random = np.random.default_rng(4)
    sizes = ((4, 8), (8, 6), (6, 3))
    layers = [(random.normal(size=size) / np.sqrt(size[0]), random.normal(size=size[1]) / 4) for size in sizes]
    x = np.random.default_rng(14).normal(size=(3, 4))

    def run(method):
        return bound_network(method, layers, x, 0.2, activation="relu")

    assert_same(run(jb.FastLin()), run(jb.FastLin(pre_activation=jb.FastLin())))
    assert_same(run(jb.FastLin()), jax.jit(run, static_argnums=0)(jb.FastLin()))


@pytest.mark.x64
@cases({("shallow", "CrownIBP")})
def test_a_batch_is_a_loop_is_a_vmap_is_a_map(name, method):
    fn, params, x = setting(name)
    transformed = jb.bound(fn, METHODS[method])
    balls = LpBall(x, jnp.asarray(EPS), 2)
    axes = LpBall(0, None, 2)
    loop = [transformed(params, LpBall(c, EPS, 2)) for c in x]
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    assert_same(bounds_of_batch(fn, METHODS[method], norm=2)(params, x, EPS), loop)
    assert_same(jax.jit(jax.vmap(transformed, in_axes=(None, axes)))(params, balls), loop)
    assert_same(jax.jit(lambda p, x: jax.lax.map(lambda c: transformed(p, LpBall(c, EPS, 2)), x))(params, x), loop)


@pytest.mark.x64
def test_vmap_without_jit_and_inside_another_vmap():
    fn, params, x = setting("shallow")
    transformed = jb.bound(fn, jb.IBP())
    radii = jnp.array([0.0, 0.1])
    table = jax.vmap(lambda c: jax.vmap(lambda r: transformed(params, LpBall(c, r, np.inf)))(radii))(x)
    assert table.lower.shape == (BATCH, 2, 2)
    assert_same(table.lower[1, 1], transformed(params, LpBall(x[1], 0.1, np.inf)).lower)
    assert_same(table.upper[:, 0], jax.vmap(fn, (None, 0))(params, x))


CENTERS = BATCHES["shallow"]
RADII = np.array([0.1, 0.2, 0.0])
LOW, HIGH = np.full(3, -1.0), np.full(3, 1.5)
MAPPED = {
    "one radius": (LpBall(CENTERS, 0.1, 2), LpBall(0, None, 2)),
    "a radius each": (LpBall(CENTERS, RADII, 2), LpBall(0, 0, 2)),
    "a prefix": (LpBall(CENTERS, RADII, 2), 0),
    "a prefix beside numbers": (LpBall(CENTERS, RADII, 2, clip=(-1.0, 1.5)), 0),
    "numbers": (LpBall(CENTERS, 0.1, 2, clip=(-1.0, 1.5)), LpBall(0, None, 2, clip=(-1.0, 1.5))),
    "shared ends": (LpBall(CENTERS, 0.1, 2, clip=(LOW, HIGH)), LpBall(0, None, 2, clip=(None, None))),
    "ends each": (
        LpBall(CENTERS, 0.1, 2, clip=(LOW + 0 * CENTERS, HIGH + 0 * CENTERS)),
        LpBall(0, None, 2, clip=(0, 0)),
    ),
    "a box": (Box(CENTERS - 0.1, CENTERS + 0.1), Box(0, 0)),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", MAPPED)
def test_regions_are_mapped_by_in_axes(name):
    region, axes = MAPPED[name]
    found = jax.jit(jax.vmap(lambda region: jb.regions.enclosing_box(region), in_axes=(axes,)))(region)
    for k, center in enumerate(CENTERS):
        expected = Box(center - 0.1, center + 0.1)
        if isinstance(region, LpBall):
            clip = None if region.clip is None else (-1.0, 1.5)
            expected = LpBall(center, np.broadcast_to(region.radius, 3)[k], 2, clip=clip)
        assert_same([end[k] for end in found], list(jb.regions.enclosing_box(expected)))


@pytest.mark.x64
def test_balls_of_two_batch_axes_lose_one_to_in_axes():
    """`batch_ndim` counts the axes that are left inside the mapped function."""
    fn, params, x = setting("shallow")
    grid, radius = jnp.stack([x, x + 0.1]), jnp.array([[0.1, 0.2, 0.0], [0.0, 0.1, 0.3]])
    rows = jb.bound(jax.vmap(fn, in_axes=(None, 0)), jb.IBP())
    found = jax.jit(jax.vmap(rows, in_axes=(None, 0)))(params, LpBall(grid, radius, 2, batch_ndim=1))
    one = jax.vmap(lambda c, r: jb.bound(fn, jb.IBP())(params, LpBall(c, r, 2)))
    assert_same(found, jax.jit(jax.vmap(one))(grid, radius))


# --- functions made by transformations --------------------------------------------------------------------------------


def unrolled(p, x):
    h = x
    for _ in range(3):
        h = jnp.tanh(h @ p + 0.1)
    return h


@jax.custom_jvp
def with_jvp(p, x):
    return unrolled(p, x)


with_jvp.defjvp(lambda primals, tangents: (unrolled(*primals), tangents[1]))


@jax.custom_vjp
def with_vjp(p, x):
    return unrolled(p, x)


with_vjp.defvjp(lambda p, x: (unrolled(p, x), None), lambda _, g: (None, g))


@jax.jit
def step(p, h):
    return jnp.tanh(h @ p + 0.1)


REWRITTEN = {
    "jit": jax.jit(unrolled),
    "remat": jax.checkpoint(unrolled),
    "vmap": lambda p, x: jax.vmap(unrolled, (None, 0))(p, x[None])[0],
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "primal of jvp": lambda p, x: jax.jvp(lambda c: unrolled(p, c), (x,), (jnp.ones_like(x),))[0],
    "primal of vjp": lambda p, x: jax.vjp(lambda c: unrolled(p, c), x)[0],
    "two calls of one jit": lambda p, x: step(p, step(p, step(p, x))),
    "scan": lambda p, x: jax.lax.scan(lambda h, _: (step(p, h), None), x, length=3)[0],
    "scan over weights": lambda p, x: jax.lax.scan(lambda h, q: (step(q, h), None), x, jnp.stack([p, p, p]))[0],
    "fori_loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: step(p, h), x),
    "cond on a constant": lambda p, x: jax.lax.cond(jnp.sum(p) < 100, unrolled, lambda p, h: h, p, x),
    "switch on a constant": lambda p, x: jax.lax.switch(1, [lambda p, h: h, unrolled], p, x),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", REWRITTEN)
def test_calls_inside_the_function_are_inlined(name):
    p, region = jnp.asarray(RANDOM.normal(size=(3, 3))), LpBall(jnp.arange(3.0), 0.1, np.inf)
    expected = jb.bound(unrolled, jb.IBP())(p, region)
    assert_same(jb.bound(REWRITTEN[name], jb.IBP())(p, region), expected)


@pytest.mark.x64
def test_bounds_of_a_derivative():
    """`bound` composes with `jax.grad` inside: the derivative of a smooth function is a function like any other."""

    def energy(p, x):
        return jnp.sum(jnp.tanh(x @ p["a"]["kernel"]))

    _, params, x = setting("shallow")
    found = jb.bound(jax.grad(energy, argnums=1), jb.IBP())(params, LpBall(x[0], 0.2, np.inf))
    points = x[0] + 0.2 * jax.random.uniform(jax.random.key(0), (500, 3), minval=-1, maxval=1)
    slopes = jax.vmap(jax.grad(energy, argnums=1), (None, 0))(params, points)
    assert np.all(np.asarray(found.lower <= slopes.min(axis=0)))
    assert np.all(np.asarray(slopes.max(axis=0) <= found.upper))


# --- gradients --------------------------------------------------------------------------------------------------------


def weighted(found):
    """A sum in which both sides of every output count differently."""
    weights = jnp.arange(1, 1 + found.lower.size, dtype=found.lower.dtype).reshape(found.lower.shape)
    return jnp.sum(weights * found.lower - (1 + weights) * found.upper)


@functools.cache
def loss_and_gradient(name, method, norm, dtype=np.float64):
    fn, _, _ = setting(name, dtype)
    run = bounds_of_batch(fn, METHODS[method], norm)
    return jax.jit(jax.value_and_grad(lambda *args: weighted(run(*args)), argnums=(0, 1, 2)))


@pytest.mark.x64
@pytest.mark.parametrize("norm", [np.inf, pytest.param(2.0, marks=pytest.mark.slow)])
@cases({("shallow", "CrownIBP")})
def test_gradients_are_finite_differences(name, method, norm):
    """With respect to parameters, centre and radius, in three random directions, at a point away from kinks."""
    _, params, x = setting(name)
    arguments = params, x, jnp.full(BATCH, EPS)
    loss = loss_and_gradient(name, method, norm)
    value, gradient = loss(*arguments)
    assert np.isfinite(value)
    for seed in range(3):
        keys = iter(jax.random.split(jax.random.key(seed), 20))
        direction = jax.tree.map(lambda leaf, keys=keys: jax.random.normal(next(keys), leaf.shape), arguments)
        along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

        def at(size, direction=direction):
            return loss(*jax.tree.map(lambda leaf, change: leaf + size * change, arguments, direction))[0]

        np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, along, rtol=1e-5)


DEGENERATE = {
    "zero radius": lambda p, x: (p, x, np.zeros(BATCH)),
    "tiny radius": lambda p, x: (p, x, np.full(BATCH, 1e-30)),
    "huge radius": lambda p, x: (p, x, np.full(BATCH, 1e6)),
    "all dead": lambda p, x: (jax.tree.map(lambda leaf: -jnp.abs(leaf), p), jnp.abs(x), np.full(BATCH, EPS)),
    "zero parameters": lambda p, x: (jax.tree.map(jnp.zeros_like, p), x, np.full(BATCH, EPS)),
    "zero parameters and radius": lambda p, x: (jax.tree.map(jnp.zeros_like, p), x, np.zeros(BATCH)),
    "zero image": lambda p, x: (p, jnp.zeros_like(x), np.full(BATCH, EPS)),
    "zero image and radius": lambda p, x: (p, jnp.zeros_like(x), np.zeros(BATCH)),
}


def assert_finite_where_relaxations_degenerate(name, method, norm, dtype):
    """One NaN would spoil a whole training step."""
    _, params, x = setting(name, dtype)
    loss = loss_and_gradient(name, method, norm, dtype)
    for case, make in DEGENERATE.items():
        value, gradient = loss(*jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), make(params, x)))
        assert np.isfinite(value), case
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), case


@pytest.mark.x64
@pytest.mark.parametrize("norm", [np.inf, pytest.param(2.0, marks=pytest.mark.slow)])
@cases({("shallow", "CrownIBP")})
def test_gradients_are_finite_where_relaxations_degenerate(name, method, norm):
    """Zero radius, l = u, dead neurons."""
    assert_finite_where_relaxations_degenerate(name, method, norm, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [np.inf, 2.0])
@cases({})
def test_so_they_are_in_single_precision(name, method, norm):
    assert_finite_where_relaxations_degenerate(name, method, norm, np.float32)


@pytest.mark.x64
def test_gradients_through_a_region_of_weights():
    fn, params, x = setting("shallow")

    @jax.jit
    def loss(radius, kernel):
        regions = {**params, "a": {**params["a"], "kernel": LpBall(kernel, radius, np.inf)}}
        return weighted(jb.bound(fn, jb.IBP())(regions, x[0]))

    kernel = params["a"]["kernel"]
    slope, slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.1, kernel)
    np.testing.assert_allclose((loss(0.1 + 1e-6, kernel) - loss(0.1 - 1e-6, kernel)) / 2e-6, slope, rtol=1e-5)
    change = 1e-6 * jnp.ones_like(kernel)
    along = (loss(0.1, kernel + change) - loss(0.1, kernel - change)) / 2e-6
    np.testing.assert_allclose(along, slopes.sum(), rtol=1e-5)


@pytest.mark.x64
@pytest.mark.parametrize("method", ["IBP", pytest.param("Crown", marks=pytest.mark.slow)])
def test_forward_and_reverse_mode_agree(method):
    fn, params, x = setting("shallow")

    def lower(c):
        return jb.bound(fn, METHODS[method])(params, LpBall(c, 0.1, 2)).lower

    reverse = jax.jit(jax.jacrev(lower))(x[0])
    assert reverse.shape == (2, 3)
    assert_same(jax.jit(jax.jacfwd(lower))(x[0]), reverse)


# --- no retracing -----------------------------------------------------------------------------------------------------


class Counted:
    """A network that counts how often it is traced."""

    def __init__(self, fn):
        self.fn, self.traces = fn, 0

    def __call__(self, params, x):
        self.traces += 1
        return self.fn(params, x)


@pytest.mark.parametrize(("method", "jitted"), [("IBP", False), ("Crown", False), ("CrownIBP", True)])
def test_a_second_call_of_the_same_shapes_traces_nothing(method, jitted):
    """New parameters, images, labels, radii, and an equal but new method object: not one new trace or program."""
    _, params, x = setting("shallow", np.float32)
    network = Counted(batched(shallow))

    def run(method, params, x, labels, eps):
        spec = jb.margin_spec(labels, 2)
        return bound_network(method, params, x, eps, apply_fn=network, spec=spec)

    run = jax.jit(run) if jitted else run
    labels = np.array([0, 1, 1])
    others = jax.tree.map(lambda leaf: leaf * 1.01, params), x + 0.01, 1 - labels, 0.2
    run(fresh(METHODS[method]), params, x, labels, 0.1)
    traces = network.traces
    with no_compilation():
        again = run(fresh(METHODS[method]), *others)
    assert network.traces == traces
    assert np.isfinite(again.lower).all()


def fresh(method):
    """An equal method that is another object."""
    return jax.tree.map(lambda leaf: leaf, method)


@contextlib.contextmanager
def no_compilation():
    """Fails if XLA compiles anything inside."""
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, f"{len(compiled)} programs were compiled"


def test_transformations_of_a_function_share_its_graph():
    """`bound` makes a new function at each call; the graph is kept by the function that is bounded."""
    _, params, x = setting("shallow", np.float32)
    network = Counted(shallow)
    for scale in (1.0, 2.0, 3.0):
        jb.bound(network, jb.IBP())(params, LpBall(scale * x[0], 0.1, 2))
    assert network.traces == 1
    jb.bound(network, jb.CrownIBP())(params, LpBall(x[0], 0.3, 2))
    jb.pre_activation_bounds(network, jb.IBP())(params, Box(x[0], x[0]))
    assert network.traces == 1
    jb.bound(network, jb.IBP())(params, Box(jnp.zeros((1, 3)), jnp.ones((1, 3))))
    assert network.traces == 2


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["IBP", pytest.param("CrownIBP", marks=pytest.mark.slow)])
def test_eight_devices_are_one(method):
    assert jax.local_device_count() == 8
    fn, params, _ = setting("shallow", np.float32)
    x = jnp.asarray(RANDOM.normal(size=(8, 2, 3)), jnp.float32)
    run = bounds_of_batch(fn, METHODS[method])
    many = jax.pmap(run, in_axes=(None, 0, None))(params, x, EPS)
    one = jax.jit(run)(params, x.reshape(16, 3), EPS)
    assert_same(jax.tree.map(lambda leaf: leaf.reshape(16, 2), many), one, atol=1e-6)


def test_gradients_are_averaged_over_devices():
    fn, params, _ = setting("shallow", np.float32)
    x = jnp.asarray(RANDOM.normal(size=(8, 2, 3)), jnp.float32)
    run = bounds_of_batch(fn, jb.IBP())

    def loss(p, images):
        return jnp.mean(run(p, images, EPS).width)

    def shard(p, images):
        return jax.lax.pmean(jax.grad(loss)(p, images), "devices")

    many = jax.pmap(shard, "devices", in_axes=(None, 0))(params, x)
    one = jax.jit(jax.grad(loss))(params, x.reshape(16, 3))
    assert_same(jax.tree.map(lambda leaf: leaf[5], many), one, atol=1e-6)


def test_sharded_batches_are_one_batch():
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    fn, params, _ = setting("shallow", np.float32)
    x = jnp.asarray(RANDOM.normal(size=(16, 3)), jnp.float32)
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices")))
    run = bounds_of_batch(fn, jb.IBP())
    assert_same(jax.jit(run)(params, spread, EPS), run(params, x, EPS), atol=1e-6)
    assert_same(run(params, spread, EPS), run(params, x, EPS), atol=1e-6)


# --- shapes, dtypes, precision ----------------------------------------------------------------------------------------


@pytest.mark.quick(3)
@pytest.mark.parametrize("method", METHODS)
def test_eval_shape_needs_no_numbers(method):
    fn, params, x = setting("mlp", np.float32)
    ball = LpBall(jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((), np.float32), 2)
    found = jax.eval_shape(jb.bound(fn, METHODS[method]), params, ball)
    assert found.lower.shape == found.upper.shape == (2,)
    assert found.lower.dtype == np.float32
    batch = jax.eval_shape(bounds_of_batch(fn, METHODS[method]), params, x, EPS)
    assert batch.upper.shape == (BATCH, 2)


def test_eval_shape_of_linear_and_pre_activation_bounds():
    fn, params, x = setting("mlp", np.float32)
    planes = jax.eval_shape(jb.linear_bounds(fn, jb.Crown()), params, LpBall(x[0], 0.1, 2))
    assert planes.lower_slope[1].shape == (2, 3)
    assert planes.upper_intercept.shape == (2,)
    layers = jax.eval_shape(jb.pre_activation_bounds(fn, jb.Crown()), params, LpBall(x[0], 0.1, 2))
    assert [found.lower.shape for found in layers.values()] == [(8,), (8,)]


@pytest.mark.quick(2)
@cases({("mlp", "IBP"), ("mlp", "Crown"), ("mlp", "Forward"), ("cnn", "CrownIBP")})
def test_matrix_products_have_full_precision(name, method):
    """The default may be TF32 or bfloat16 on accelerators, which is a rounding error of one per mille."""
    fn, params, x = setting(name, np.float32)
    run = bounds_of_batch(fn, METHODS[method], norm=2)
    found = jax.make_jaxpr(jax.grad(lambda *args: weighted(run(*args))))(params, x, EPS)
    products = [e for e in equations(found.jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert products
    for equation in products:
        precision = equation.params["precision"]
        both = precision if isinstance(precision, tuple) else (precision, precision)
        assert both == (jax.lax.Precision.HIGHEST,) * 2, equation


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.x64
@pytest.mark.parametrize("method", ["CrownIBP", "Crown"])
def test_single_precision_is_double_precision_rounded(method):
    found = {}
    for dtype in (np.float32, np.float64):
        fn, params, x = setting("shallow", dtype)
        found[dtype] = bounds_of_batch(fn, METHODS[method], norm=2)(params, x, dtype(EPS))
        assert found[dtype].lower.dtype == found[dtype].upper.dtype == dtype
    assert_same(found[np.float32], found[np.float64], atol=1e-5)


def negated_twice(x):
    return jnp.negative(jnp.negative(x))


@pytest.mark.parametrize("method", ["IBP", "CrownIBP", "Crown", "Forward"])
def test_a_double_box_is_rounded_outward_in_single_precision(method):
    """Half of all float64 numbers round inward when they are rounded to nearest."""
    lower = np.random.default_rng(0).normal(size=200)
    upper = lower + np.random.default_rng(1).uniform(size=200)
    assert np.any(np.float32(lower) > lower)
    assert np.any(np.float32(upper) < upper)
    found = jb.bound(negated_twice, METHODS[method])(Box(lower, upper))
    assert found.lower.dtype == np.float32
    assert np.count_nonzero(np.float64(found.lower) > lower) == 0
    assert np.count_nonzero(np.float64(found.upper) < upper) == 0
    np.testing.assert_allclose(found.lower, lower, rtol=1e-6)


@pytest.mark.parametrize("radius", [0.7, np.float64(0.7), np.full(1, 0.7)], ids=["float", "float64", "array"])
def test_a_double_radius_is_rounded_up_in_single_precision(radius):
    """The float32 number nearest to 0.7 is below it."""
    assert np.float64(np.float32(0.7)) < 0.7
    found = jb.bound(jnp.negative, jb.IBP())(LpBall(np.zeros(1, "f"), radius, np.inf))
    assert np.float64(found.upper[0]) >= 0.7
    assert np.float64(found.lower[0]) <= -0.7


# --- regions on any leaf ----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """A user's own container."""

    kernel: object
    bias: object


def nested(tree, scale, x):
    hidden = jax.nn.relu(x @ tree["layers"][0].kernel + tree["layers"][0].bias)
    return {"out": scale * hidden @ tree["layers"][1], "sum": (hidden.sum(), tree["offset"])}


PLACES = {
    "input": (False, False, False, True),
    "weights": (True, False, False, False),
    "bias and input": (False, True, False, True),
    "scalar": (False, False, True, False),
    "everything": (True, True, True, True),
}
QUICK_PLACES = {("IBP", "scalar"), ("Crown", "everything")}


@pytest.mark.x64
@pytest.mark.parametrize(
    ("method", "place"),
    [
        pytest.param(m, p, marks=[] if (m, p) in QUICK_PLACES else pytest.mark.slow)
        for m in ("IBP", "Crown", "FastLin", "Forward")
        for p in PLACES
    ],
)
def test_any_leaf_may_be_a_region(method, place):
    kernel, bias, scale, x = (RANDOM.normal(size=shape) for shape in ((3, 4), (4,), (), (3,)))
    makers = (
        lambda leaf: LpBall(leaf, 0.1, np.inf),
        lambda leaf: LpBall(leaf, 0.2, 1),
        lambda leaf: Box(leaf - 0.1, leaf + 0.2),
        lambda leaf: LpBall(leaf, 0.1, 2),
    )
    points = (kernel, bias, scale, x)
    regions = [make(p) if chosen else p for make, p, chosen in zip(makers, points, PLACES[place], strict=True)]

    def arguments(kernel, bias, scale, x):
        return {"layers": [Layer(kernel, bias), np.eye(4)[:, :2]], "offset": 3.0}, scale, x

    found = jb.bound(nested, METHODS[method])(*arguments(*regions))
    assert set(found) == {"out", "sum"}
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = [
        jb.regions.sample(r, k, (200,)) if chosen else jnp.broadcast_to(jnp.asarray(p), (200, *np.shape(p)))
        for r, p, k, chosen in zip(regions, points, keys, PLACES[place], strict=True)
    ]
    values = jax.vmap(lambda *leaves: nested(*arguments(*leaves)))(*drawn)
    bounds = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, jb.Interval))
    for interval, value in zip(bounds, jax.tree.leaves(values), strict=True):
        assert np.all(np.asarray(interval.lower) <= np.asarray(value.min(axis=0)) + 1e-12)
        assert np.all(np.asarray(interval.upper) >= np.asarray(value.max(axis=0)) - 1e-12)


@pytest.mark.x64
def test_linear_bounds_have_a_slope_per_region_and_concretize_over_them():
    kernel, x = RANDOM.normal(size=(3, 4)), RANDOM.normal(size=3)
    arguments = (
        {"layers": [Layer(LpBall(kernel, 0.1, 2), np.zeros(4)), np.eye(4)[:, :2]], "offset": 3.0},
        2.0,
        Box(x, x + 0.1),
    )
    planes = jb.linear_bounds(nested, jb.Crown())(*arguments)["out"]
    (tree, scale, slope) = planes.lower_slope
    assert tree["layers"][0].kernel.shape == (2, 3, 4)
    assert tree["layers"][0].bias is tree["layers"][1] is tree["offset"] is scale is None
    assert slope.shape == (2, 3)
    interval = planes.concretize(*arguments)
    found = jb.bound(nested, jb.Crown(intersect=False))(*arguments)["out"]
    assert_same((interval.lower, interval.upper), (found.lower, found.upper))


# --- closures ---------------------------------------------------------------------------------------------------------


def test_functions_that_close_over_tracers_do_not_leak():
    """Their graphs hold tracers, so they are not kept; the function object itself may live on."""
    _, params, x = setting("shallow", np.float32)

    class Closure:
        def __call__(self, c):
            return shallow(self.params, c)

    kept = Closure()

    @jax.jit
    def run(params, c):
        kept.params = params
        found = jb.bound(kept, jb.Crown())(LpBall(c, 0.1, 2))
        kept.params = None
        return found

    with jax.checking_leaks():
        first = run(params, x[0])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert_same(first, jb.bound(shallow, jb.Crown())(params, LpBall(x[0], 0.1, 2)), atol=1e-5)
    assert_same(run(doubled, x[0]), jb.bound(shallow, jb.Crown())(doubled, LpBall(x[0], 0.1, 2)), atol=1e-4)


def test_a_closure_over_a_tracer_is_differentiated():
    _, params, x = setting("shallow", np.float32)
    ball = LpBall(x[0], 0.1, 2)
    closed = jax.jit(jax.grad(lambda p: jb.bound(lambda c: shallow(p, c), jb.IBP())(ball).lower.sum()))
    open_ = jax.jit(jax.grad(lambda p: jb.bound(shallow, jb.IBP())(p, ball).lower.sum()))
    assert_same(closed(params), open_(params), atol=1e-6)


def test_graphs_of_short_lived_functions_are_not_kept_for_ever():
    """A lambda in a loop is a new function each time; the cache is bounded."""
    from jaxbound.transforms import problems

    for k in range(300):
        jb.explain(lambda x, k=k: x * k, jb.IBP())(Box(np.zeros(2, "f"), np.ones(2, "f")))
        problems.prepare(lambda x, k=k: x * k, (Box(np.zeros(2, "f"), np.ones(2, "f")),))
    gc.collect()
    assert len(problems._STRUCTURES.entries) <= problems._STRUCTURES.size


def test_what_a_function_closes_over_is_seen_anew_once_caches_are_cleared():
    scale = [2.0]
    fn = lambda x: x * scale[0]  # noqa: E731
    box = Box(np.zeros(2, "f"), np.ones(2, "f"))
    bounds = [jb.bound(fn, jb.IBP())(box)]
    scale[0] = 4.0
    jb.clear_caches()
    bounds.append(jb.bound(fn, jb.IBP())(box))
    assert_same([found.upper for found in bounds], [np.full(2, 2.0), np.full(2, 4.0)], atol=1e-5)


@pytest.mark.parametrize("given", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_weights_are_copied_only_from_memory_that_may_change(given):
    from jaxbound.transforms import problems

    kernel = given(np.ones((2, 3), "f"))
    box = Box(np.zeros((4, 2), "f"), np.ones((4, 2), "f"))
    affine = lambda x, kernel, scale: x @ kernel * jnp.exp(scale)  # noqa: E731
    problem = problems.prepare(affine, (box, kernel, jnp.zeros(3)), (True, False, False))
    assert sum(np.shares_memory(constant, kernel) for constant in problem.graph.constants) == (given is jnp.asarray)
    assert all(isinstance(constant, jax.Array) for constant in problem.graph.constants)


@pytest.mark.x64
@pytest.mark.slow  # with the passes that users have: quick runs leave out the one that did it
def test_compiled_gradients_through_products_are_finite_differences():
    """Two corners of a product's box tie; compiled as one program they may be rounded apart."""
    rng = np.random.default_rng(0)
    first, last, x = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 4), (4, 2), (3,)))

    def loss(t):
        ball = LpBall(x + t[:3], 0.3 + t[3], np.inf)
        return weighted(jb.bound(lambda x: (x @ first) * jnp.tanh((x @ first)[::-1]) @ last, jb.CrownIBP())(ball))

    loss, steps = jax.jit(loss), 1e-6 * np.eye(4)
    expected = [(loss(step) - loss(-step)) / 2e-6 for step in steps]
    for gradient in (jax.grad(loss), jax.jacfwd(loss)):
        np.testing.assert_allclose(jax.jit(gradient)(jnp.zeros(4)), expected, rtol=1e-5)
