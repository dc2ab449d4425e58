"""How FROWN steps uphill unless it is given another optimizer: two optax transformations of its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbound.backend.caches import kept

_RATE, _MOMENTUM = 0.3, 0.5


@kept(1)
def default_optimizer() -> optax.GradientTransformationExtraArgs:
    """Momentum on evened-out gradients, with a step that decays to nothing; one object, so that all compiles once."""
    return optax.chain(scale_by_largest(), optax.trace(_MOMENTUM), scale_by_progress(_RATE))


def scale_by_progress(rate: float) -> optax.GradientTransformationExtraArgs:
    """A step downhill that falls from `rate` to 0 by a cosine of `progress` (an extra argument, from 0 to 1)."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        step = -rate * (1 + jnp.cos(jnp.pi * extra["progress"])) / 2
        return jax.tree.map(lambda leaf: step.astype(leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_largest() -> optax.GradientTransformation:
    """Divide the gradient of every row by its largest entry, and take the root of what is left, signs kept.

    The slopes that matter most move by the whole learning rate, others less but not in proportion; rows are independent
    because the first axis of every leaf is theirs.
    """

    def update(updates: Any, state: Any, params: Any = None):
        per_leaf = [jnp.max(jnp.abs(leaf.reshape(leaf.shape[0], -1)), axis=1) for leaf in jax.tree.leaves(updates)]
        if not per_leaf:
            return updates, state
        largest = functools.reduce(jnp.maximum, per_leaf)

        def evened(leaf: jax.Array):
            size = jnp.where(largest > 0, largest, 1).astype(leaf.dtype)
            part = leaf / size.reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.sign(part) * jnp.sqrt(jnp.abs(part))

        return jax.tree.map(evened, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
