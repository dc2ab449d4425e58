"""Networks as their frameworks write them: taken as they are, or by the recipe of docs/your_framework.md."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import jaxbound as jb
from jaxbound import errors
from jaxbound.network import inputs
from jaxbound.network.independence import check

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
LABELS = np.arange(3)
EPS = 0.0625


def holds(bounds, outputs):
    """Each bound is around the network's own value, and not far from it."""
    assert np.all(bounds.lower <= outputs + 1e-5) and np.all(outputs <= bounds.upper + 1e-5)
    assert np.all(bounds.upper - bounds.lower < 2)


class Net(nn.Module):
    """Takes the flag of Flax's own guide, and has no name that says what it computes."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))


class Strict(Net):
    @nn.compact
    def __call__(self, x, train: bool):
        return Net()(x, train)


class State(train_state.TrainState):
    batch_stats: Any


def state_of(model, **flags):
    variables = model.init(jax.random.key(0), X, **flags)
    create = functools.partial(State.create, apply_fn=model.apply, tx=optax.sgd(0.1))
    return create(params=variables["params"], batch_stats=variables["batch_stats"]), variables


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_a_bound_linen_module():
    _, variables = state_of(Net())
    module = Net().bind(variables)
    expected = jb.crown(variables, X, EPS, apply_fn=Net().apply)
    found = jb.crown(module, X, EPS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, jb.crown(variables, X, EPS, apply_fn=Net()), expected)
    holds(found, module(X))
    with pytest.raises(errors.ArgumentError, match=r"module without variables; pass model.bind\(variables\)"):
        jb.crown(Net(), X, EPS)


def test_a_train_state_whose_model_takes_train():
    state, variables = state_of(Strict(), train=False)
    with pytest.raises(
        errors.ArgumentError, match=r"'train'; pass apply_fn=functools.partial\(model.apply, train=False\)"
    ):
        jb.crown(state, X, EPS)
    apply_fn = functools.partial(Strict().apply, train=False)
    holds(jb.crown(state, X, EPS, apply_fn=apply_fn), apply_fn(variables, X))


def test_an_nnx_module_and_a_function_of_it():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    holds(jb.crown(module, X, EPS), module(X))
    holds(jb.crown(module, X, EPS, apply_fn=lambda module, x: jnp.tanh(module(x))), jnp.tanh(module(X)))


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 5, 2, key=jax.random.key(0))
    holds(jb.crown(model, X, EPS), jax.vmap(model)(X))
    assert jb.certify(model, X, LABELS, EPS, method=jb.CrownIBP()).margins.shape == (3, 2)
    twice = lambda model, x: 2 * jax.vmap(model)(x)  # noqa: E731
    holds(jb.crown(model, X, EPS, apply_fn=twice), twice(model, X))
    dropout = eqx.nn.Sequential([model, eqx.nn.Dropout(0.5)])
    with pytest.raises(errors.ArgumentError, match=r"equinox.nn.inference_mode\(model\)"):
        jb.crown(dropout, X, EPS)
    holds(jb.crown(eqx.nn.inference_mode(dropout), X, EPS), jax.vmap(model)(X))


def test_haiku():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        hk = pytest.importorskip("haiku")
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 3])(x)))
    params = network.init(jax.random.key(0), X)
    holds(jb.crown(params, X, EPS, apply_fn=network.apply), network.apply(params, X))
    with pytest.raises(errors.ArgumentTypeError, match=r"haiku.without_apply_rng\(transformed\).apply"):
        jb.crown(params, X, EPS, apply_fn=network)


def test_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend: set KERAS_BACKEND=jax")
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5), layers.Dense(3)
    ])  # fmt: skip
    holds(jb.ibp(model, X, EPS), model(X, training=False))


# --- what is said -----------------------------------------------------------------------------------------------------

CHAIN = {"params": {f"Dense_{k}": {"kernel": np.ones((4, 4), "f")} for k in range(2)}}


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return found


@pytest.mark.fast
def test_a_guess_is_said_once_at_the_callers_line():
    def call():
        for _ in range(2):
            jb.ibp(CHAIN, X, EPS)
        jb.ibp(CHAIN, X, EPS, activation="relu")

    (found,) = caught(call)
    assert issubclass(found.category, jb.AssumedNetworkWarning) and issubclass(found.category, jb.JaxboundWarning)
    assert found.filename == __file__ and found.lineno == call.__code__.co_firstlineno + 2
    text = str(found.message)
    assert "4 -> 4 -> 4 with relu" in text and 'activation="relu"' in text and len(text) < 300
    with pytest.warns(jb.AssumedNetworkWarning):
        jax.jit(lambda x: jb.margins(CHAIN, x, LABELS, EPS, method=jb.IBP()))(X)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["certify", "certified_radius", "landscape_radius"])
def test_a_certificate_is_never_of_a_guess(name):
    given = (EPS,) if name == "certify" else ()
    with pytest.raises(errors.ArgumentError, match=f'{name} does not guess the network.*activation="relu" if it is'):
        getattr(jb, name)(CHAIN, X, LABELS, *given, method=jb.IBP())


# --- examples that depend on each other -------------------------------------------------------------------------------

STRUCT = jax.ShapeDtypeStruct((6, 4), np.float32)
W = np.ones((4, 4), np.float32)

MIXING = {
    "mean": lambda x: x - x.mean(axis=0),
    "softmax along the batch": lambda x: jax.nn.softmax(x, axis=0),
    "norm of everything": lambda x: x / jnp.linalg.norm(x),
    "attention among examples": lambda x: jax.nn.softmax(x[:, 0] @ x[:, 0].T) @ x[:, 0],
    "a sum in a loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, v: v - v.sum(0), x),
    "sorted": lambda x: jnp.sort(x, axis=0),
    "cumulative": lambda x: jnp.cumsum(x.reshape(-1, 4), axis=0).reshape(x.shape),
    "the first example": lambda x: x - x[:1],
    "rolled": lambda x: x + jnp.roll(x, 1, axis=0),
    "reversed": lambda x: x + x[::-1],
    "dropout": lambda x: jax.random.bernoulli(jax.random.key(0), 0.5, x.shape) * x,
}
COUNTING = {
    "over its size": lambda x: x / len(x),
    "a mean by hand": lambda x: x * (1 / x.shape[0]),
    "under a root": lambda x: x / jnp.sqrt(2 * x.shape[0]),
}
PLACED = {
    "factors by position": lambda x: x * jnp.arange(len(x), dtype=jnp.float32)[:, None, None],
    "stored factors": lambda x: x * np.arange(len(x))[:, None, None],
    "a ramp": lambda x: x * jnp.linspace(0, 1, len(x))[:, None, None],
    "a choice by position": lambda x: jnp.where((jnp.arange(len(x)) < 1)[:, None, None], x, 0),
    "a code of positions": lambda x: x + jax.nn.one_hot(jnp.arange(len(x)) % 4, 4)[:, None],
    "rows of a table": lambda x: x * jnp.asarray(np.arange(3000.0))[jnp.arange(len(x))][:, None, None],
    "in a loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, v: v * jnp.arange(len(v))[:, None, None], x),
    "in a call": jax.jit(lambda x: x * (jnp.arange(len(x)) % 2)[:, None, None]),
    "one after the other": lambda x: jax.lax.map(lambda v: v[0] * v[1], (x, jnp.arange(len(x)))),
    "the first is set to zero": lambda x: x.at[0].set(0),
    "all read the first": lambda x: x[jnp.zeros(len(x), int)],
}
INDEPENDENT = {
    "an entry of each": lambda x: x[jnp.arange(len(x)), 0, 1],
    "an entry of each is set": lambda x: x.at[jnp.arange(len(x)), 0, 1].set(0),
    "an entry of each in a loop": lambda x: jax.lax.fori_loop(
        0, 4, lambda i, v: v.at[jnp.arange(len(v)), 0, i].mul(2), x
    ),
    "as many ones": lambda x: x * jnp.ones(len(x))[:, None, None],
    "the largest of each": lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1, keepdims=True), 1),
    "positions in a sequence": lambda x: x * jnp.arange(6)[:, None] + np.arange(4),
    "a gradient of each": lambda x: jax.vmap(jax.grad(lambda v: jnp.max(v) + v[0, jnp.argmin(v[0])]))(x),
    "numbers of other sizes": lambda x: x / 1000 + 1e-3 * x / x.shape[1],
    "LayerNorm": lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
    "attention among tokens": lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x,
    "vmap": lambda x: jax.vmap(lambda v: jnp.sort(v, axis=0) @ v.T)(x),
    "rows of all examples": lambda x: jax.nn.relu(x.reshape(-1, 4) @ W).reshape(x.shape),
    "one token": lambda x: x[:, 0] + x[:, ::-1].sum(1),
    "flips at test time": lambda x: sum(jnp.split(jnp.concatenate([x, x[:, ::-1]]), 2)),
    "one after the other": lambda x: jax.lax.map(lambda v: v @ W, x),
    "what nothing needs": lambda x: (x, x.mean(0))[0],
    "one example only": lambda x: jnp.sum(x[0]),
    "batches of two": lambda x: x.reshape(2, *x.shape[1:]),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MIXING)
def test_examples_that_depend_on_each_other_are_refused(name):
    with pytest.raises(
        errors.ArgumentError, match=r"the network mixes the examples of a batch by .* bounded by itself"
    ):
        check(lambda _, x: MIXING[name](x), (), STRUCT)


@pytest.mark.fast
@pytest.mark.parametrize("name", COUNTING)
def test_networks_that_count_the_examples_are_refused(name):
    """In a batch of one they are another network."""
    with pytest.raises(errors.ArgumentError, match="depends on the number of examples in a batch"):
        check(lambda _, x: COUNTING[name](x), (), STRUCT)


@pytest.mark.fast
@pytest.mark.parametrize("name", PLACED)
def test_networks_of_places_in_a_batch_are_refused(name):
    with pytest.raises(errors.ArgumentError, match="depends on where in a batch an example stands"):
        check(lambda _, x: PLACED[name](x), (), STRUCT)


@pytest.mark.fast
@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_examples_are_not(name):
    check(lambda _, x: INDEPENDENT[name](x), (), STRUCT)


@pytest.mark.fast
def test_a_size_that_is_also_the_probes_is_no_batch():
    kernel = jax.ShapeDtypeStruct((1009, 3), np.float32)
    check(lambda kernel, x: x @ kernel, kernel, jax.ShapeDtypeStruct((1009,), np.float32))


def _batch_norm(variables, x):
    rngs = {"dropout": jax.random.key(1)}
    return Net().apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)[0]


def _forgotten(variables, x):
    return Net().apply(variables, x, train=True)


def _dropout(_, x):
    return nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(1)})


@pytest.mark.parametrize("apply", [_batch_norm, _dropout, _forgotten])
def test_training_mode_is_refused(apply):
    _, variables = state_of(Net())
    for call in (
        lambda: jb.crown(variables, X, EPS, apply_fn=apply),
        lambda: jb.certify(variables, X, LABELS, EPS, apply_fn=apply, method=jb.Crown()),
    ):
        with pytest.raises(errors.ArgumentError, match=r"train(ing mode|=False)") as found:
            call()
        assert len(str(found.value).splitlines()[0]) < 300


def test_random_numbers_that_examples_share_are_said():
    shared = lambda _, x: x * jax.random.normal(jax.random.key(0), (4,))  # noqa: E731
    (found,) = caught(lambda: jb.ibp((), X, EPS, apply_fn=shared))
    assert "draws random numbers at test_your_network" in str(found.message)


# --- radii and regions ------------------------------------------------------------------------------------------------

IDENTITY = [(jnp.eye(3), jnp.zeros(3))]


@pytest.mark.fast
def test_radii_per_feature_are_not_per_example():
    x, each = np.full((3, 3), 0.5, np.float32), np.array([0.1, 0.2, 0.3], np.float32)
    ibp = functools.partial(jb.ibp, IDENTITY, activation="relu")
    np.testing.assert_allclose(ibp(x, each[None]).width, np.tile(2 * each, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(ibp(x, each).width, np.tile(2 * each[:, None], (1, 3)), rtol=1e-5)
    np.testing.assert_allclose(ibp(x[0], each).width, 2 * each, rtol=1e-5)
    report = jb.certify(IDENTITY, x, np.arange(3), each[None], method=jb.IBP(), activation="relu", batch_size=2)
    np.testing.assert_allclose(report.margins[0], [-0.3, -0.4], atol=1e-5)
    images = np.zeros((2, 2, 2, 3), np.float32)
    assert inputs.radii(each.reshape(1, 1, 1, 3), images.shape, batched=True).shape == images.shape
    for eps in (np.ones((3, 1)), np.ones((2, 3))):
        with pytest.raises(errors.ArgumentError, match="eps has shape"):
            ibp(x, eps)
    for norm in (1, 2):  # weighted balls: an identity reaches each radius, a sum the dual norm of them
        np.testing.assert_allclose(ibp(x, each[None], norm=norm).width, np.tile(2 * each, (3, 1)), rtol=1e-5)
        found = jb.crown([(jnp.ones((3, 1)), jnp.zeros(1))], x, each[None], norm=norm, activation="relu")
        np.testing.assert_allclose(found.width, 2 * (0.3 if norm == 1 else np.linalg.norm(each)), rtol=1e-5)


def two_inputs(params, x):
    return jnp.tanh(x["a"] @ params["a"]) + jax.nn.relu(x["b"] @ params["b"])


def test_several_inputs_and_weights_that_vary():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(size, 3)).astype("f") for name, size in (("a", 2), ("b", 4))}
    x = {name: rng.normal(size=(5, size)).astype("f") for name, size in (("a", 2), ("b", 4))}
    labels = np.asarray(two_inputs(params, x)).argmax(1)
    how = {"apply_fn": two_inputs}
    boxes = {name: jb.Box(part - np.float32(0.1), part + np.float32(0.1)) for name, part in x.items()}
    moved = {name: part + rng.uniform(-0.1, 0.1, (50, *part.shape)).astype("f") for name, part in x.items()}
    values = np.asarray(jax.vmap(two_inputs, (None, 0))(params, moved))
    found = jb.crown(params, x, 0.1, **how)
    assert np.all(found.lower <= values.min(0)) and np.all(found.upper >= values.max(0))
    np.testing.assert_allclose(jb.crown(params, boxes, **how).lower, found.lower, rtol=1e-5, atol=1e-5)
    still = jb.crown(params, x, {"a": 0.1, "b": None}, **how)
    assert np.all(still.width <= found.width) and still.width.sum() < found.width.sum()
    mixed = jb.crown(params, {"a": boxes["a"], "b": x["b"]}, **how)
    np.testing.assert_allclose(mixed.lower, still.lower, rtol=1e-5, atol=1e-5)

    weights = {"a": jb.Box(params["a"] - np.float32(0.01), params["a"] + np.float32(0.01)), "b": params["b"]}
    drawn = params["a"] + rng.uniform(-0.01, 0.01, (50, 2, 3)).astype("f")
    values = np.stack([two_inputs({"a": kernel, "b": params["b"]}, x) for kernel in drawn])
    found = jb.crown(weights, x, **how)
    assert np.all(found.lower <= values.min(0)) and np.all(found.upper >= values.max(0))

    method = {"method": jb.CrownIBP(), **how}
    report = jb.certify(params, x, labels, 0.01, batch_size=2, **method)
    np.testing.assert_allclose(report.margins, jb.margins(params, x, labels, 0.01, **method), rtol=1e-4, atol=1e-5)
    assert np.all(jb.certify(weights, x, labels, 0.01, batch_size=2, **method).margins < report.margins)
    radius = np.asarray(jb.certified_radius(params, x, labels, **method))
    assert jb.certify(params, x, labels, np.maximum(radius, 1e-6), **method).verified[radius > 0].all()
    smaller = np.asarray(jb.certified_radius(weights, x, labels, **method))
    assert np.all(smaller <= radius * 1.01) and smaller.max() > 0

    for text, call in {
        "x holds no region": lambda: jb.crown(params, x, **how),
        "another structure than x": lambda: jb.crown(params, x, {"a": 0.1}, **how),
        "inputs of shapes": lambda: jb.crown(params, {**x, "b": x["b"][:2]}, 0.1, **how),
        "is a region and has an eps": lambda: jb.crown(params, boxes, {"a": 0.1, "b": None}, **how),
        "params hold regions": lambda: jb.lipschitz(weights, x["a"], 0.1, **how),
        "holds several inputs": lambda: jb.pgd(params, x, labels, 0.1, key=jax.random.key(0), **how),
        "pass one array": lambda: jb.crown(IDENTITY, (x["a"],), 0.1, activation="relu"),
        "over which this method searches": lambda: jb.certify(
            params, x, labels, 0.1, method=jb.BranchAndBound(), apply_fn=two_inputs
        ),
    }.items():
        with pytest.raises(errors.JaxboundError, match=text) as caught:
            call()
        assert len(str(caught.value)) < 300


@pytest.mark.fast
def test_a_box_around_a_point():
    x = np.array([[0.25, 1.0], [0.5, 0.0]], np.float32)
    box = jb.Box.around(x, np.array([[0.5, 0.25]]), clip=(0.0, 1.0))
    np.testing.assert_allclose(box.lower, [[0, 0.75], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(box.upper, [[0.75, 1], [1, 0.25]], atol=1e-6)
    with pytest.raises(errors.ArgumentError, match="eps has shape"):
        jb.Box.around(x, np.ones(2))


# --- reports ----------------------------------------------------------------------------------------------------------


def certified(x, **options):
    given = {"method": jb.IBP(), "activation": "relu", "clip": (0, 1)} | options
    return jb.certify(IDENTITY, x, np.arange(3), 0.05, **given)


def test_a_report_says_why_nothing_is_verified():
    x = np.eye(3, dtype=np.float32) * 0.9
    assert certified(x).remarks == ()
    assert "3 of 3 regions are empty: x lies outside clip" in str(certified(x * 255))
    assert "clip[0] > clip[1], swap them" in str(certified(x, clip=(1, 0)))
    assert "3 of 3 examples hold NaN" in str(certified(x * np.nan))


def test_a_report_as_columns_and_figure():
    report = certified(np.eye(3, dtype=np.float32) * 0.9)
    columns = report.to_dict(class_names=["a", "b", "c"])
    assert columns["label"] == ["a", "b", "c"] and columns["verified"] == [True] * 3
    assert np.isnan(columns["margin to a"][0]) and np.allclose(columns["margin to b"][0], 0.8, atol=1e-3)
    assert {len(column) for column in columns.values()} == {3} and report.classes.tolist() == [[1, 2], [0, 2], [0, 1]]
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    assert report.plot().get_title() == "linf radius 0.05"


def test_values_outside_their_bounds_are_found():
    """A network of the whole batch that no trace tells: examples are gathered by number."""
    x = np.eye(3, dtype=np.float32)
    mixed = lambda _, x: x[jnp.arange(len(x)) - 1]  # noqa: E731
    with pytest.raises(errors.SoundnessError, match="BatchNorm in training mode, examples that depend on each other"):
        jb.certify((), x, np.arange(3), 0.01, method=jb.IBP(), apply_fn=mixed)
