"""One training step, a pure function of state and batch; the same on one device and on many.

    state, metrics = step(state, batch)

The schedules are functions of `state.step`, so a step needs nothing else and a restored state goes on as if nothing
had happened. There are three programs, the phases, and the radius and beta of the step say which one it is:

    "natural"     eps = 0: natural training (where the robust loss is the natural one, at a multiple of the cost)
    "interval"    beta < 1e-5: IBP's margins alone
    "robust"      otherwise: the robust term as given

A host loop knows the step's number, so it asks `Step.phases` and compiles each phase when it is reached (`loop.fit`).
Left to itself a step holds them all as branches. XLA for CPU brings convolutions into the form that it is good at only
outside branches, so there it is then 1.5 to 9 times slower (docs/training.md).

Over devices: every device sums the gradients of its examples' losses, the sums are added over devices, and the total is
divided by the number of examples that count. So a mean over the whole batch comes out, whatever the number of devices,
the number of accumulated parts and the padding of the last batch (examples of weight 0).

`pmapped` runs this under `pmap` with explicit sums; `sharded` runs the same function under `jit`, with the batch split
over a mesh, where XLA adds up. BatchNorm's statistics are those of the whole batch in both (`models.ResNet.axis_name`
names pmap's axis), and of each part where gradients are accumulated; running averages weigh parts by what counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound.training.losses import Objective
from jaxbound.training.modes import NNXApply
from jaxbound.training.schedules import Epsilon, Schedule, Weight

AXIS = "devices"
"""The name of the axis over which devices add up."""

PHASES = ("natural", "robust", "interval")
"""What a step may compute; see the module's head."""

Trainable = nn.Module | nnx.Module
"""What can be trained."""

_SMALLEST_BETA = 1e-5


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, with BatchNorm's running averages and a key; every function of jaxbound takes it.

    >>> from jaxbound.training.models import MLP
    >>> state = create(MLP((8,)), jnp.zeros((1, 4)), optax.adam(1e-3), jax.random.key(0))
    >>> int(state.step), list(state.params)
    (0, ['Dense_0', 'Dense_1'])
    """

    batch_stats: Any = None
    key: jax.Array | None = None
    """Raw key data, so that states are arrays alone; the step folds its number in."""


class Batch(NamedTuple):
    """Examples with their classes; `index` numbers the rows of the global batch and keys chance, `weight` is 0 or 1."""

    x: ArrayLike
    labels: ArrayLike
    index: ArrayLike
    weight: ArrayLike


class Metrics(NamedTuple):
    """What a step reports: means over the batch at the step's radius, kappa and beta."""

    loss: jax.Array
    natural: jax.Array
    robust: jax.Array
    clean_error: jax.Array
    robust_error: jax.Array
    eps: jax.Array
    kappa: jax.Array
    beta: jax.Array


@dataclass(frozen=True)
class Schedules:
    """The radius and the two weights, as functions of the step.

    >>> schedules = Schedules.of(Epsilon(0.3, start=10, length=100), kappa_final=0.5)
    >>> float(schedules.kappa(110)), float(schedules.beta(110))
    (0.5, 0.0)
    """

    epsilon: Schedule
    kappa: Schedule
    beta: Schedule

    @classmethod
    def of(
        cls, epsilon: Epsilon, *, kappa_start: float = 1.0, kappa_final: float = 0.0, beta_start: float = 1.0,
        beta_final: float = 0.0, clock: str = "eps",
    ) -> Schedules:  # fmt: skip
        """Weights that go with the radius; the defaults are the paper's recommendation."""
        kappa, beta = ((kappa_start, kappa_final), (beta_start, beta_final))
        return cls(epsilon, Weight(*kappa, epsilon, clock), Weight(*beta, epsilon, clock))


def create(model: Trainable, x: ArrayLike, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state of a Linen module, or of an NNX module with the parameters that it has.

    Args:
        model: the module. Objectives are made of the state's own function, `Objective(state.apply_fn)`.
        x: a batch of examples, for its shape and dtype.
        optimizer: any optax transformation.
        key: for a Linen module's parameters, and for all chance in training.

    Raises:
        ArgumentTypeError: neither a Linen nor an NNX module.

    >>> from jaxbound.training.models import MLP
    >>> create(MLP((8,)), jnp.zeros((1, 4)), optax.sgd(0.1), jax.random.key(0)).params["Dense_0"]["kernel"].shape
    (4, 8)
    """
    start, chance = jax.random.split(key)
    if isinstance(model, nn.Module):
        apply_fn, variables = model.apply, model.init(start, jnp.asarray(x))
    elif isinstance(model, nnx.Module):
        apply_fn = NNXApply(model)
        variables = apply_fn.variables
    else:
        raise errors.argument_type("model", f"is a {type(model).__name__}", "pass a Linen or an NNX module")
    raw = jax.random.key_data(chance) if jnp.issubdtype(chance.dtype, jax.dtypes.prng_key) else chance
    state = TrainState.create(
        apply_fn=apply_fn, params=variables["params"], tx=optimizer, batch_stats=variables.get("batch_stats", {}),
        key=raw,
    )  # fmt: skip
    return state.replace(step=jnp.zeros((), jnp.int32))


def variables_of(state: TrainState) -> dict:
    """The collections of the model."""
    return {"params": state.params, "batch_stats": state.batch_stats} if state.batch_stats else {"params": state.params}


@dataclass(frozen=True, eq=False)  # by identity: a method may hold arrays, such as a key
class Step:
    """A training step, `step(state, batch) -> (state, metrics)`: pure, for `jit`, `pmapped` or `sharded`.

    Args:
        objective: the loss.
        schedules: of radius, kappa and beta.
        augment: None or `(keys, x) -> x`, with one key per example.
        accumulate: how many parts the batch is worked off in, one after the other; gradients are added up.
        decay: of BatchNorm's running averages.
        axis_name: the pmap axis to add over; None without pmap.
        phase: the one of `PHASES` to compute, whatever the schedules say; None to choose by them at run time.

    Reference: Zhang et al. 2020, algorithm in section 3.2 and appendix C.

    >>> from jaxbound.training.models import MLP
    >>> model, x = MLP((8,)), jnp.ones((4, 3))
    >>> step = Step(Objective(model.apply), Schedules.of(Epsilon(0.1, start=0, length=10)))
    >>> state = create(model, x, optax.sgd(0.1), jax.random.key(0))
    >>> state, metrics = jax.jit(step)(state, whole_batch(x, jnp.arange(4)))
    >>> int(state.step), float(metrics.eps)
    (1, 0.0)
    """

    objective: Objective
    schedules: Schedules
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    accumulate: int = 1
    decay: float = 0.9
    axis_name: str | None = None
    phase: str | None = None

    def __post_init__(self):
        if self.phase is not None and self.phase not in self._objectives():
            raise errors.unknown_option("phase", self.phase, tuple(self._objectives()))

    def phases(self, first: int, stop: int) -> list[str]:
        """The phases of the steps from `first` on, up to `stop`."""
        index = jax.jit(jax.vmap(self._phase))(jnp.arange(first, stop, dtype=jnp.int32))
        return [PHASES[k] for k in index.tolist()]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The next state, and what happened."""
        gradients, sums, statistics = self.gradients(state, batch)
        updates, optimizer = state.tx.update(gradients, state.opt_state, state.params)
        moved = state.batch_stats
        if moved:
            moved = jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, moved, statistics)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=optimizer, batch_stats=moved)
        return state, sums

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Any, Metrics, dict]:
        """The gradient of the mean loss over the global batch, the metrics, and the batch's statistics."""
        eps, kappa, beta = (
            schedule(state.step) for schedule in (self.schedules.epsilon, self.schedules.kappa, self.schedules.beta)
        )
        assert state.key is not None
        folded = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key, shared = jax.random.split(folded)

        def part(batch: Batch):
            return self._sums(state, batch, key, shared, eps, kappa, beta)

        total = _accumulated(part, batch, self.accumulate)
        if self.axis_name is not None:
            total = jax.lax.psum(total, self.axis_name)
        gradient, values, weight, statistics = total
        # A batch without any example that counts moves nothing.
        gradient, values, statistics = jax.tree.map(
            lambda leaf: leaf / jnp.maximum(weight, 1), (gradient, values, statistics)
        )
        if state.batch_stats:
            statistics = jax.tree.map(lambda new, old: jnp.where(weight > 0, new, old), statistics, state.batch_stats)
        return gradient, Metrics._make((*values, eps, kappa, beta)), statistics

    def _sums(
        self,
        state: TrainState,
        batch: Batch,
        key: jax.Array,
        shared: jax.Array,
        eps: jax.Array,
        kappa: jax.Array,
        beta: jax.Array,
    ):
        """Sums over the examples of a part that count: gradient, values, weight, and the part's statistics."""
        keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(jnp.asarray(batch.index))
        x, labels, weight = jnp.asarray(batch.x), jnp.asarray(batch.labels), jnp.asarray(batch.weight)
        x = x if self.augment is None else self.augment(keys[:, 0], x)
        mask = (weight > 0) if state.batch_stats else None

        def total_loss(params: Any, objective: Objective):
            variables = {"params": params, "batch_stats": state.batch_stats}
            found = objective(variables, x, labels, eps, kappa, beta, keys[:, 1], mask, shared)
            count = lambda values: jnp.sum(jnp.where(weight > 0, weight * values, 0))  # noqa: E731
            values = tuple(map(count, (found.loss, found.natural, found.robust, found.wrong, found.unverified)))
            return values[0], (values, found.statistics)

        def program(objective: Objective) -> Callable:
            slope = jax.grad(functools.partial(total_loss, objective=objective), has_aux=True)
            return lambda params: slope(params)

        gradient, (values, statistics) = self._chosen(program, state.step, state.params)
        count = jnp.sum(weight)
        return gradient, values, count, jax.tree.map(lambda leaf: count * leaf, statistics)

    def _chosen(self, program: Callable, step: Any, params: Any):
        """The gradient of this phase's program."""
        objectives = self._objectives()
        if self.phase is not None or len(objectives) == 1:
            return program(objectives[self.phase or "robust"])(params)
        programs = [program(objective) for objective in objectives.values()]  # in the order of `PHASES`
        return jax.lax.switch(self._phase(step), programs, params)

    def _objectives(self) -> dict[str, Objective]:
        """What each phase that this objective has minimises."""
        whole, term = self.objective, self.objective.term
        if term is None:
            return {"robust": whole}
        found = {"natural": dataclasses.replace(whole, term=None, activity_weight=0.0), "robust": whole}
        if term.interval is not None and term.interval != term:
            found["interval"] = dataclasses.replace(whole, term=term.interval)
        return found

    def _phase(self, step: jax.Array) -> jax.Array:
        """The phase of a step, as its index in `PHASES`."""
        objectives, eps, beta = self._objectives(), self.schedules.epsilon(step), self.schedules.beta(step)
        bounded = jnp.where(beta < _SMALLEST_BETA, 2, 1) if "interval" in objectives else 1
        return jnp.where(eps > 0, bounded, 0) if "natural" in objectives else jnp.asarray(1)


def _accumulated(part: Callable, batch: Batch, count: int):
    """Sums over the parts of a batch, one after the other."""
    size = jnp.shape(batch.labels)[0]
    if count < 1 or size % count:
        raise errors.argument("accumulate", f"is {count} for {size} examples", "pass a divisor of the device's batch")
    if count == 1:
        return part(batch)
    parts = jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, size // count, *jnp.shape(leaf)[1:])), batch)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, first))

    def add(total: Any, batch: Batch):
        return jax.tree.map(jnp.add, total, part(batch)), None

    return jax.lax.scan(add, empty, parts)[0]


# --- over devices -----------------------------------------------------------------------------------------------------


def whole_batch(x: ArrayLike, labels: ArrayLike) -> Batch:
    """A batch in which every example counts.

    >>> whole_batch(jnp.zeros((2, 3)), jnp.array([0, 1])).weight
    Array([1., 1.], dtype=float32)
    """
    count = np.shape(labels)[0]
    return Batch(x, labels, jnp.arange(count), jnp.ones(count, jnp.result_type(x)))


def pmapped(step: Step, devices: Sequence[Any] | None = None) -> Callable:
    """The step over devices by `pmap`: `(replicated state, split batch) -> (replicated state, metrics)`.

    Args:
        step: its `axis_name` is set here.
        devices: all local ones by default (under several processes, all of all processes).

    Returns:
        A function of a state with a leading device axis (`replicate`) and a batch from `split`; the metrics carry the
        axis too, equal on all devices. The state's memory is reused.
    """
    summed = dataclasses.replace(step, axis_name=AXIS)
    return jax.pmap(summed, AXIS, devices=devices, donate_argnums=0)


def sharded(step: Step, devices: Sequence[Any] | None = None) -> Callable:
    """The same step under `jit`: the state on every device, the batch split over them; metrics without device axis.

    Args:
        step: without `axis_name`.
        devices: all of them by default (under several processes, all of all processes).

    Returns:
        A function of a state and a whole batch, whose size is a multiple of the number of devices; under several
        processes, of a batch from `spread`. The state's memory is reused. It compiles twice unless the first state
        comes from `everywhere`.
    """
    on_all, split_over = _placements(devices)
    return jax.jit(step, in_shardings=(on_all, split_over), out_shardings=(on_all, on_all), donate_argnums=0)


def spread(batch: Batch, devices: Sequence[Any] | None = None) -> Batch:
    """A global batch for `sharded`, of the part that this process holds.

    >>> spread(whole_batch(jnp.zeros((8, 3)), jnp.zeros(8, int)), jax.devices()[:1]).x.shape
    (8, 3)
    """
    _, split_over = _placements(devices)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(split_over, np.asarray(leaf)), batch)


def everywhere(state: TrainState, devices: Sequence[Any] | None = None) -> TrainState:
    """The state as `sharded` returns it, so that its first call compiles what all others run.

    Args:
        state: the same on every process.
        devices: as for `sharded`.

    Returns:
        A copy on every device.
    """
    on_all, _ = _placements(devices)
    copy = lambda leaf: jax.make_array_from_process_local_data(on_all, np.array(leaf))  # noqa: E731
    return jax.tree.map(copy, state)


def _placements(devices: Sequence[Any] | None) -> tuple[NamedSharding, NamedSharding]:
    """On every device, and split over them."""
    mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(state: TrainState, devices: Sequence[Any] | None = None) -> TrainState:
    """The state with a leading device axis, for `pmapped`; `unreplicate` takes it away."""
    count = len(jax.local_devices() if devices is None else devices)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), state)


def unreplicate(tree: Any):
    """The first device's copy."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def split(batch: Batch, count: int) -> Batch:
    """A batch with a leading axis of so many equal parts, for `pmapped`.

    >>> split(whole_batch(jnp.zeros((8, 3)), jnp.zeros(8, int)), 4).x.shape
    (4, 2, 3)
    """
    size = np.shape(batch.labels)[0]
    if size % count:
        raise errors.argument("batch", f"has {size} examples for {count} devices", f"pass a multiple of {count}")
    return jax.tree.map(lambda leaf: leaf.reshape(count, size // count, *leaf.shape[1:]), batch)
