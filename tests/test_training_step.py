"""One step: the same numbers on 1 and 8 devices, by pmap and by jit; accumulation; padding; phases; chance by key."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.training import models
from jaxbound.training.fusion import FusedLoss
from jaxbound.training.losses import AdversarialLoss, MarginLoss, Objective
from jaxbound.training.schedules import Epsilon
from jaxbound.training.step import (
    AXIS,
    Batch,
    Schedules,
    Step,
    create,
    pmapped,
    replicate,
    sharded,
    split,
    unreplicate,
    variables_of,
    whole_batch,
)

MODEL = models.MLP((8,))
SHAPE = (6, 6, 1)
RAMP = Epsilon(0.1, start=2, length=6)
SGD = optax.sgd(0.1)  # one object: an optimizer is a static part of the state
IBP = MarginLoss(jb.IBP())


def made_batch(size=16, seed=1, weight=None) -> Batch:
    x = jax.random.uniform(jax.random.key(seed), (size, *SHAPE))
    batch = whole_batch(x, jax.random.randint(jax.random.key(seed + 1), (size,), 0, 10))
    return batch if weight is None else batch._replace(weight=jnp.asarray(weight, x.dtype))


def made_step(term=None, model=MODEL, ramp=RAMP, **options) -> Step:
    return Step(
        Objective(model.apply, term or MarginLoss()), Schedules.of(ramp, kappa_final=0.25, beta_final=0.0), **options
    )


def made_state(model=MODEL, optimizer=None, step=0):
    state = create(model, jnp.zeros((1, *SHAPE)), optimizer or SGD, jax.random.key(0))
    return state.replace(step=jnp.asarray(step, jnp.int32))


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def run(kind: str, count: int, step: Step, state, batches):
    """The states' parameters and the metrics after some batches, on `count` devices."""
    devices = jax.devices()[:count]
    history = []
    if kind == "pmap":
        taken, state = pmapped(step, devices), replicate(state, devices)
        for batch in batches:
            state, metrics = taken(state, split(batch, count))
            history.append(jax.tree.map(np.asarray, unreplicate(metrics)))
        return jax.tree.map(np.asarray, unreplicate(state)), history
    taken = sharded(step, devices)
    state = jax.tree.map(jnp.array, state)
    for batch in batches:
        state, metrics = taken(state, batch)
        history.append(jax.tree.map(np.asarray, metrics))
    return jax.tree.map(np.asarray, state), history


@functools.cache
def gradients(term=None, accumulate=1):
    """Compiled once for all tests: the phase is chosen by the step's number, what counts by the weights."""
    return jax.jit(made_step(term, accumulate=accumulate).gradients)


@functools.cache
def gradients_over_devices(term=None, count=8):
    """The same by pmap."""
    step = made_step(term, axis_name=AXIS)
    return jax.pmap(step.gradients, AXIS, devices=jax.devices()[:count], in_axes=(None, 0))


def reference(term=None, accumulate=1):
    """One step at a radius inside the ramp, by plain jit."""
    return gradients(term, accumulate)(made_state(step=5), made_batch())


@pytest.mark.parametrize(
    ("term", "count"),
    [
        (None, 8),
        (AdversarialLoss(2), 8),
        (IBP, 8),
        pytest.param(IBP, 1, marks=pytest.mark.slow),
        pytest.param(FusedLoss(), 8, marks=pytest.mark.slow),
    ],
    ids=["margins", "pgd", "ibp", "ibp-1", "fused"],
)
def test_loss_and_gradients_over_devices(term, count):
    gradient, metrics, _ = reference(term)
    found = unreplicate(gradients_over_devices(term, count)(made_state(step=5), split(made_batch(), count)))
    close(found[0], gradient, rtol=1e-5, atol=1e-5)
    close(found[1], metrics, rtol=1e-5, atol=1e-5)
    assert float(metrics.eps) == pytest.approx(0.05) and float(metrics.beta) == pytest.approx(0.5)


def test_the_gradient_is_that_of_the_mean_loss():
    batch, state = made_batch(), made_state(step=5)
    keys = jax.random.split(jax.random.key(0), 16)

    def mean(params):
        return Objective(MODEL.apply, IBP)(
            {"params": params}, batch.x, batch.labels, 0.05, 0.625, 0.5, keys
        ).loss.mean()

    loss, gradient = jax.jit(jax.value_and_grad(mean))(state.params)
    close(reference(IBP)[0], gradient, rtol=1e-4, atol=1e-5)
    assert float(reference(IBP)[1].loss) == pytest.approx(float(loss), rel=1e-5)


@functools.cache
def thirty_steps(term, kind: str, count: int):
    """Natural, mixed and IBP's own phase in one run of 30 different batches, in float64."""
    step = Step(Objective(MODEL.apply, term), Schedules.of(Epsilon(0.1, start=2, length=20), beta_final=0.0))
    state = create(MODEL, jnp.zeros((1, *SHAPE)), optax.adam(1e-2), jax.random.key(0))
    state = state.replace(params=jax.tree.map(lambda leaf: leaf.astype(float), state.params))  # Flax's are float32
    state = state.replace(opt_state=state.tx.init(state.params))
    return run(kind, count, step, state, [made_batch(seed=100 + k) for k in range(30)])


@pytest.mark.x64
@pytest.mark.parametrize(
    ("term", "kind"),
    [
        (IBP, "jit"),
        pytest.param(MarginLoss(), "jit", marks=pytest.mark.slow),
        pytest.param(MarginLoss(), "pmap", marks=pytest.mark.slow),
    ],
    ids=["ibp", "margins", "margins-pmap"],
)
def test_thirty_steps_agree_in_float64(term, kind):
    expected, history = thirty_steps(term, "jit", 1)
    found, also = thirty_steps(term, kind, 8)
    assert history[-1].loss.dtype == np.float64 and jax.tree.leaves(found.params)[0].dtype == np.float64
    close(variables_of(found), variables_of(expected), rtol=0, atol=1e-10)
    close(also, history, rtol=0, atol=1e-10)
    assert [bool(m.eps == 0) for m in history[:4]] == [True, True, True, False] and history[-1].beta < 1e-6


def test_accumulated_gradients_are_those_of_the_whole_batch():
    one, metrics, _ = reference(IBP)
    four, also, _ = reference(IBP, 4)
    close(four, one, rtol=1e-4, atol=1e-6)
    close(also, metrics, rtol=1e-5, atol=1e-6)


def test_padded_examples_do_not_count():
    """The mean over the first 11 and that over the last 5 make up that over all 16, and no value of padding is read."""
    parts = [[1.0] * 11 + [0.0] * 5, [0.0] * 11 + [1.0] * 5, [1.0] * 16]
    first, last, whole = (gradients(IBP)(made_state(step=5), made_batch(weight=part))[:2] for part in parts)
    together = jax.tree.map(lambda one, other: (11 * one + 5 * other) / 16, first, last)
    close(together, whole, rtol=1e-4, atol=1e-6)
    batch = made_batch(weight=parts[0])
    spoiled = batch._replace(x=jnp.asarray(batch.x).at[11:].set(jnp.nan))
    assert float(gradients(IBP)(made_state(step=5), spoiled)[1].loss) == float(first[1].loss)
    # On eight devices two have only padding: means are still over the 11.
    found = unreplicate(gradients_over_devices(IBP)(made_state(step=5), split(batch, 8)))
    close(found[:2], first, rtol=1e-4, atol=1e-6)


def test_a_batch_of_padding_alone_moves_nothing():
    gradient, _, _ = gradients(IBP)(made_state(step=5), made_batch(weight=[0.0] * 16))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


# --- phases -----------------------------------------------------------------------------------------------------------


@functools.cache
def gradients_of_phase(phase):
    return jax.jit(made_step(phase=phase).gradients)


def test_the_host_knows_the_phases():
    names = made_step().phases(0, 10)
    assert names == ["natural"] * 3 + ["robust"] * 5 + ["interval"] * 2 and made_step().phases(7, 9) == names[7:9]
    for step in (2, 3, 8):  # the branch that a step chooses by itself, and no other
        found = gradients_of_phase(names[step])(made_state(step=step), made_batch())
        close(found, gradients()(made_state(step=step), made_batch()), rtol=1e-4, atol=1e-6)
    other = gradients_of_phase("interval")(made_state(step=5), made_batch())[1]
    assert float(other.loss) != pytest.approx(float(reference()[1].loss), rel=1e-3)
    assert set(made_step(IBP).phases(0, 10)) == {"natural", "robust"}, "IBP's margins are their own intervals"
    assert set(Step(Objective(MODEL.apply, None), made_step().schedules).phases(0, 10)) == {"robust"}


@pytest.mark.parametrize("term", [None, IBP], ids=["margins", "ibp"])
def test_phases_are_named(term):
    known = "'natural', 'robust'" + (", 'interval'" if term is None else "")
    with pytest.raises(errors.ArgumentError, match=rf"phase='last' is not known; the choices are {known}"):
        made_step(term, phase="last")


@pytest.mark.parametrize(
    ("step", "kind"), [(0, "natural"), (2, "natural"), (3, "mixed"), (8, "interval"), (50, "interval")]
)
def test_phases(step, kind):
    state, batch = made_state(step=step), made_batch()
    _, metrics, _ = gradients()(state, batch)
    eps, kappa, beta = (float(value) for value in (metrics.eps, metrics.kappa, metrics.beta))
    clean = Objective(MODEL.apply)(
        variables_of(state), batch.x, batch.labels, eps, kappa, beta, jax.random.split(jax.random.key(0), 16)
    )
    assert float(metrics.loss) == pytest.approx(float(clean.loss.mean()), rel=1e-4), "every phase computes one loss"
    assert gradients()._cache_size() == 1
    assert (eps == 0) == (kind == "natural") and (beta < 1e-5) == (kind == "interval")


def test_only_the_phase_at_work_costs_time():
    """The three programs are branches: the compiled step holds a conditional, not three results to choose from."""
    step = Step(Objective(MODEL.apply), Schedules.of(RAMP))
    text = str(jax.make_jaxpr(step)(made_state(), made_batch()))
    assert " cond[" in text


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch_norm():
    """A step's result on one device."""
    model = models.ResNet((2,), dense=4)
    step = made_step(MarginLoss(jb.IBP()), model, decay=0.75)
    return run("jit", 1, step, made_state(model, step=5), [made_batch()])


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["pmap", pytest.param("jit", marks=pytest.mark.slow)])
def test_batch_statistics_are_those_of_the_whole_batch(batch_norm, kind):
    model = models.ResNet((2,), dense=4, axis_name=AXIS if kind == "pmap" else None)
    step = made_step(MarginLoss(jb.IBP()), model, decay=0.75)
    found, history = run(kind, 8, step, made_state(model, step=5), [made_batch()])
    close(variables_of(found), variables_of(batch_norm[0]), rtol=1e-4, atol=1e-5)
    close(history, batch_norm[1], rtol=1e-4, atol=1e-5)


def test_running_averages_move_by_their_decay(batch_norm):
    model = models.ResNet((2,), dense=4)
    state = made_state(model)
    _, moved = model.apply(variables_of(state), made_batch().x, train=True, mutable=["batch_stats"])
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.batch_stats, moved["batch_stats"])
    close(batch_norm[0].batch_stats, expected, rtol=1e-4, atol=1e-6)


# --- chance and state -------------------------------------------------------------------------------------------------


def test_augmentation_has_a_key_per_example_and_step():
    def noise(keys, x):
        moved = x + 0.1 * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        return jnp.clip(moved, 0, 1)  # beyond the clip box the ball around an example would be empty

    step = made_step(MarginLoss(jb.IBP()), augment=noise)
    batch = made_batch()
    order = jnp.array([3, 1, 2, 0, *range(4, 16)])
    mixed = Batch(*(jnp.asarray(leaf)[order] for leaf in batch))
    taken = jax.jit(step.gradients)
    expected = taken(made_state(step=5), batch)[1].loss
    assert float(taken(made_state(step=5), mixed)[1].loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(taken(made_state(step=6), batch)[1].loss) != float(expected)
    renumbered = batch._replace(index=batch.index + 16)
    assert float(taken(made_state(step=5), renumbered)[1].loss) != float(expected)


def test_a_state_is_taken_by_the_rest_of_jaxbound():
    for model in (MODEL, models.ResNet((2,), dense=4)):
        state, batch = made_state(model), made_batch()
        bounds = jb.ibp(state, batch.x, 0.01)
        explicit = jb.ibp(variables_of(state), batch.x, 0.01, apply_fn=model.apply)
        np.testing.assert_array_equal(bounds.lower, explicit.lower)


def test_training_lowers_the_robust_loss():
    batch = made_batch(32)
    step = jax.jit(made_step(IBP, ramp=Epsilon(0.02, start=0, length=10)))
    state, losses = made_state(optimizer=optax.adam(1e-2)), []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics.robust))
    assert losses[-1] < 0.7 * losses[12], "the radius is constant between these two"


@pytest.mark.parametrize(("call", "text"), [
    (lambda: jax.jit(made_step(IBP, accumulate=3))(made_state(), made_batch()), "accumulate is 3 for 16 examples"),
    (lambda: split(made_batch(), 3), "has 16 examples for 3 devices"),
])  # fmt: skip
def test_refusals(call, text):
    with pytest.raises(errors.ArgumentError, match=text):
        call()
