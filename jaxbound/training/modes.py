"""A user's network in training mode: which switch turns it on, what dropout draws, what BatchNorm saw of a batch.

A network is called as its owner wrote it. Of the arguments that Flax's networks use to switch to training, `train`,
`training`, `deterministic` and `use_running_average`, it gets those that it takes. What BatchNorm writes is an average
of old statistics and the batch's, with a momentum of the network's own. Bounds of a training loss freeze the batch's
own statistics, so these are recovered: the update is affine in the old ones,

    new = m · old + (1 - m) · batch,     m = the derivative of new in old,     batch = (new - m · old) / (1 - m).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxbound import errors
from jaxbound.training.models import BatchNorm

_SWITCHES = {"train": True, "training": True, "deterministic": False, "use_running_average": False}


class NNXApply:
    """An NNX module's definition as an `apply_fn` of plain dictionaries, as Linen's: what training states hold.

    `apply_fn({"params": ..., "batch_stats": ...}, x)` evaluates; with `train=True` it trains, and with
    `mutable=["batch_stats"]` it also returns what its BatchNorm wrote. Other state of the module (random streams) stays
    as it was; `rngs={"dropout": key}` seeds it anew. It is one object for one module: graphs are shared by identity.
    """

    def __init__(self, module: nnx.Module):
        self.definition, self.params, self.statistics, self.rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)

    @property
    def variables(self) -> dict:
        """The module's parameters and statistics as nested dictionaries of arrays."""
        return {"params": nnx.to_pure_dict(self.params), "batch_stats": nnx.to_pure_dict(self.statistics)}

    def __call__(
        self,
        variables: Any,
        x: jax.Array,
        train: bool = False,
        mask: jax.Array | None = None,
        mutable: Sequence[str] = (),
        rngs: dict[str, jax.Array] | None = None,
    ):
        """The outputs, and with `mutable` the collection "batch_stats" after them."""
        parts = [_filled(self.params, variables["params"]), _filled(self.statistics, variables.get("batch_stats", {}))]
        module = nnx.merge(self.definition, *parts, self.rest, copy=True)
        if train:
            module.train()
            for key in (rngs or {}).values():
                nnx.reseed(module, default=key, dropout=key)
            _count_only(module, mask)
        else:
            module.eval()
        logits = module(x)
        return (logits, {"batch_stats": nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))}) if mutable else logits


def _filled(state: nnx.State, values: dict):
    """A copy of an NNX state that holds other values."""
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled


def _count_only(module: nnx.Module, mask: jax.Array | None) -> None:
    """Let the BatchNorm layers of a module that nobody else holds write what they see of the marked examples."""

    def masked(self, x: jax.Array, *args: Any, **options: Any):
        return nnx.BatchNorm.__call__(self, x, *args, **{**options, "mask": _joined(options.get("mask"), mask, x)})

    counting = type("BatchNorm", (nnx.BatchNorm,), {"__call__": masked})
    for _, part in list(nnx.iter_graph(module)):
        if type(part) is nnx.BatchNorm:
            part.__class__ = counting
            part.momentum = 0.0  # NNX stops the derivative that would tell it


def _joined(own: jax.Array | None, mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """A layer's own mask and that of examples; the latter all True where it marks nothing, of which Flax makes NaN."""
    if mask is None:
        return own
    along = (mask | ~jnp.any(mask)).reshape(mask.shape + (1,) * (x.ndim - 1))
    return along if own is None else along & own


def train_pass(
    apply_fn: Callable, variables: dict, x: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, dict, dict]:  # fmt: skip
    """The logits of a batch in training mode, the variables with its statistics frozen, and these statistics.

    Args:
        apply_fn: `apply` of a Linen module, or an `NNXApply`; in evaluation mode unless told otherwise.
        variables: "params", and "batch_stats" if there is BatchNorm.
        x: (batch, ...).
        mask: bool (batch,), which examples BatchNorm takes its statistics of; None for all. Layers get it beside a mask
            that the network gives them; the network need not know of it. Under `pmap`, Flax's own BatchNorm with an
            `axis_name` gives devices equal weight, whatever counts on them; `models.BatchNorm` and `jit` do not.
        key: for dropout; None where there is none.
        dtype: what the pass is computed in, on copies; what is returned has the dtypes that it would have without.

    Returns:
        Logits (batch, classes); the variables to bound with; the batch's own statistics ({} without BatchNorm).

    Raises:
        ArgumentError: the network has BatchNorm, and none of the arguments by which Flax's networks switch to training.

    >>> from jaxbound.training.models import MLP
    >>> model, x = MLP((8,)), jnp.zeros((2, 3))
    >>> logits, frozen, statistics = train_pass(model.apply, model.init(jax.random.key(0), x), x)
    >>> logits.shape, list(frozen), statistics
    ((2, 10), ['params'], {})
    """
    kept = {name: part for name, part in variables.items() if name != "batch_stats" or part}
    options: dict = {name: on for name, on in _SWITCHES.items() if name in _arguments(apply_fn)}
    if options and key is not None:
        options["rngs"] = {"dropout": key}
    lowered = lambda tree: tree if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
    given = {name: part if name == "batch_stats" else lowered(part) for name, part in kept.items()}
    wide = jnp.result_type(x, *jax.tree.leaves(kept))
    if "batch_stats" not in kept:
        return apply_fn(given, lowered(x), **options).astype(wide), kept, {}
    if not options:
        raise errors.argument(
            "apply_fn", "has BatchNorm but no argument that switches it to training",
            "give the network an argument train=False, and use_running_average=not train in its BatchNorm",
        )  # fmt: skip
    if mask is not None and isinstance(apply_fn, NNXApply):
        options["mask"] = mask

    def updated(statistics: Any):
        with _masked(mask):
            logits, moved = apply_fn(
                {**given, "batch_stats": statistics}, lowered(x), mutable=["batch_stats"], **options
            )
        return moved["batch_stats"], logits

    old = kept["batch_stats"]
    new, momentum, logits = jax.jvp(updated, (old,), (jax.tree.map(jnp.ones_like, old),), has_aux=True)
    statistics = jax.tree.map(_of_batch, old, new, momentum)
    return logits.astype(wide), {**kept, "batch_stats": statistics}, statistics


def _of_batch(old: jax.Array, new: jax.Array, momentum: jax.Array) -> jax.Array:
    """The batch's own statistics; the old ones where nothing moves (layers that are frozen)."""
    moves = momentum < 1
    found = (new - momentum * old) / jnp.where(moves, 1 - momentum, 1)
    return jnp.where(moves, found, old).astype(old.dtype)


def _masked(mask: jax.Array | None):
    """Within it, BatchNorm layers take their statistics of the marked examples."""

    def give(call: Callable, args: tuple, options: dict, context: nn.module.InterceptorContext):
        if context.method_name == "__call__" and mask is not None:
            own = options.get("mask")
            if isinstance(context.module, nn.BatchNorm):
                options = {**options, "mask": _joined(own, mask, args[0])}
            elif isinstance(context.module, BatchNorm):
                options = {**options, "mask": mask if own is None else mask & own}
        return call(*args, **options)

    return nn.intercept_methods(give)


def _arguments(apply_fn: Callable) -> frozenset[str]:
    """The names of the arguments that a network takes."""
    module = getattr(apply_fn, "__self__", None)
    call = type(module).__call__ if isinstance(module, nn.Module) else apply_fn
    return frozenset(inspect.signature(call).parameters)
