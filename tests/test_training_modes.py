"""A user's own network in training: BatchNorm of any momentum, padding, dropout, NNX modules, inputs out of range."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbound as jb
from jaxbound.training import models, modes
from jaxbound.training.loop import Run, fit
from jaxbound.training.losses import MarginLoss, Objective
from jaxbound.training.schedules import Epsilon
from jaxbound.training.step import AXIS, Schedules, Step, create, pmapped, replicate, split, unreplicate, whole_batch

X = jax.random.uniform(jax.random.key(0), (8, 3))
LABELS = jnp.arange(8) % 2
KEY = jax.random.key(1)
SGD = optax.sgd(0.1)


class Own(nn.Module):
    """As people write it: Flax's BatchNorm with its momentum, no mask."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(x))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=deterministic)(nn.relu(nn.Dense(16)(x))))


class Eager(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


@functools.cache
def own(momentum=0.9):
    model = Own(momentum)
    variables = model.init(KEY, X)
    moved = jax.tree.map(lambda leaf: leaf + 3.0, variables["batch_stats"])  # far from any batch's
    return model, {**variables, "batch_stats": moved}


def made_step(apply_fn, **options):
    schedules = Schedules.of(Epsilon(0.01, start=0, length=1))
    return Step(Objective(apply_fn, MarginLoss(jb.IBP())), schedules, phase="robust", **options)


def of_first(variables, x):
    """The mean and variance of the first layer's outputs."""
    hidden = x @ variables["params"]["Dense_0"]["kernel"] + variables["params"]["Dense_0"]["bias"]
    return hidden.mean(0), hidden.var(0)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_statistics_of_the_batch_are_recovered_from_any_momentum(momentum):
    model, variables = own(momentum)
    logits, frozen, statistics = modes.train_pass(model.apply, variables, X)
    mean, var = of_first(variables, X)
    np.testing.assert_allclose(statistics["BatchNorm_0"]["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(statistics["BatchNorm_0"]["var"], var, atol=1e-5)
    np.testing.assert_allclose(model.apply(frozen, X), logits, atol=1e-4)


def test_padding_enters_no_statistics_of_a_network_without_a_mask():
    model, variables = own()
    padded = jnp.concatenate([X, 100 * jnp.ones((4, 3))])
    _, _, statistics = modes.train_pass(model.apply, variables, padded, jnp.arange(12) < 8)
    np.testing.assert_allclose(statistics["BatchNorm_0"]["mean"], of_first(variables, X)[0], atol=1e-5)


def test_a_mask_of_the_network_is_kept():
    """What a network calls mask is its own; a layer's mask and that of examples count together."""

    class Padded(nn.Module):
        @nn.compact
        def __call__(self, x, train=False, mask=None):
            assert mask is None  # of tokens, say: nothing that training gives
            seen = x[:, :1] > 0.5
            return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(x, mask=seen))

    model = Padded()
    variables = model.init(KEY, X)
    _, _, statistics = modes.train_pass(model.apply, variables, X, jnp.arange(8) < 5)
    counted = np.asarray(X)[:5][np.asarray(X)[:5, 0] > 0.5]
    np.testing.assert_allclose(statistics["BatchNorm_0"]["mean"], counted.mean(0), atol=1e-5)


@pytest.mark.parametrize("kind", ["accumulate", "pmap"])
def test_a_share_that_is_padding_alone_changes_nothing(kind):
    """Of 16 images on two devices, or in two parts, the second half is padding."""
    images = jax.random.uniform(KEY, (16, 4, 4, 1))
    labels, weight = jnp.arange(16) % 10, (jnp.arange(16) < 8).astype(jnp.float32)
    batch = whole_batch(images.at[8:].set(1.0), labels)._replace(weight=weight)
    alone = whole_batch(images[:8], labels[:8])
    model = models.ResNet((2,), dense=4)
    state = create(model, images, SGD, KEY)
    wanted, metrics = jax.jit(made_step(model.apply))(state, alone)
    if kind == "accumulate":
        found, seen = jax.jit(made_step(model.apply, accumulate=2))(state, batch)
    else:
        devices, over = jax.devices()[:2], models.ResNet((2,), dense=4, axis_name=AXIS)
        on_all = replicate(state.replace(apply_fn=over.apply), devices)
        found, seen = unreplicate(pmapped(made_step(over.apply), devices)(on_all, split(batch, 2)))
    assert np.isfinite(float(seen.loss))
    np.testing.assert_allclose(seen.loss, metrics.loss, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        (found.params, found.batch_stats), (wanted.params, wanted.batch_stats),
    )  # fmt: skip


def test_frozen_layers_keep_their_statistics():
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    model = Frozen()
    variables = model.init(KEY, X)
    variables = {**variables, "batch_stats": jax.tree.map(lambda leaf: leaf + 2.0, variables["batch_stats"])}
    logits, frozen, _ = modes.train_pass(model.apply, variables, X)
    jax.tree.map(np.testing.assert_array_equal, frozen["batch_stats"], variables["batch_stats"])
    np.testing.assert_allclose(model.apply(variables, X), logits, atol=1e-6)


def test_batch_norm_without_a_switch_is_refused():
    class Stuck(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    model = Stuck()
    with pytest.raises(jb.ArgumentError, match="no argument that switches it to training"):
        modes.train_pass(model.apply, model.init(KEY, X), X)


def test_dropout_is_on_in_the_natural_loss_and_off_in_bounds():
    model = Dropping()
    variables = model.init(KEY, X)
    plain = model.apply(variables, X)
    one, frozen, _ = modes.train_pass(model.apply, variables, X, key=jax.random.key(2))
    other, _, _ = modes.train_pass(model.apply, variables, X, key=jax.random.key(3))
    assert not np.allclose(one, plain) and not np.allclose(one, other)
    np.testing.assert_array_equal(model.apply(frozen, X), plain)
    state, metrics = jax.jit(made_step(model.apply))(create(model, X, SGD, KEY), whole_batch(X, LABELS))
    assert np.isfinite(float(metrics.loss)) and int(state.step) == 1


def test_nnx_modules_train(tmp_path):
    module = Eager(nnx.Rngs(0))
    state = create(module, X, optax.adam(1e-2), KEY)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    step = made_step(state.apply_fn)
    padded = whole_batch(jnp.concatenate([X, jnp.ones((8, 3))]), jnp.tile(LABELS, 2))
    padded = padded._replace(weight=(jnp.arange(16) < 8).astype(jnp.float32))
    _, _, statistics = modes.train_pass(state.apply_fn, variables, padded.x, padded.weight > 0, KEY)
    hidden = X @ state.params["first"]["kernel"] + state.params["first"]["bias"]
    np.testing.assert_allclose(statistics["norm"]["mean"], hidden.mean(0), atol=1e-5)
    result = fit(step, state, lambda number: padded, Run(steps=20, interval=20), tmp_path)
    assert not np.allclose(result.variables["params"]["last"]["kernel"], state.params["last"]["kernel"])
    bounds = jb.ibp(result.variables, X, 0.01, apply_fn=state.apply_fn)
    values = state.apply_fn(result.variables, X)
    assert np.all(bounds.lower <= values) and np.all(values <= bounds.upper)


def test_other_models_are_refused():
    with pytest.raises(jb.ArgumentTypeError, match="pass a Linen or an NNX module"):
        create(lambda x: x, X, SGD, KEY)


def test_inputs_outside_the_clip_box_are_named(tmp_path):
    model = models.MLP((4,), classes=2)
    state = create(model, X, SGD, KEY)
    with pytest.raises(jb.ArgumentError, match=r"x of step 0 reaches from .* to 255, outside the clip box"):
        fit(
            made_step(model.apply),
            state,
            lambda number: whole_batch(X.at[0, 0].set(255.0), LABELS),
            Run(1, 1),
            tmp_path,
        )


def test_initialisers():
    """PyTorch draws biases too; Shi et al.'s leaves the last layer alone and halves the summands of a block."""
    torch = models.network("A", initializer="torch").init(KEY, jnp.zeros((1, 28, 28, 1)))["params"]
    for name, fan_in in (("Conv_0", 16), ("Dense_0", torch["Dense_0"]["kernel"].shape[0])):
        bias = np.abs(torch[name]["bias"])
        assert 0 < bias.max() <= fan_in**-0.5 and (bias.size < 50 or bias.max() > 0.9 * fan_in**-0.5)
    shi = models.ResNet((2,), dense=400, initializer="ibp").init(KEY, jnp.zeros((1, 6, 6, 1)))["params"]
    assert 0.8 < float(jnp.std(shi["Dense_1"]["kernel"])) * 400**0.5 < 1.2
    scales = sorted(float(part["scale"][0]) for name, part in shi.items() if name.startswith("BatchNorm"))
    assert scales == [0.5, 0.5, 1.0, 1.0]
    with pytest.raises(jb.ArgumentError, match="initializer"):
        models.ResNet(initializer="none").init(KEY, jnp.zeros((1, 6, 6, 1)))
