"""Networks as hashable functions of one example, `(variables, example) -> output`: equal ones share one graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from jaxbound import errors


class OfBatch:
    """A function of one example, from one of a batch: its value on a batch of one, in full precision.

    What is attacked and predicted is what is bounded: by default accelerators round products to TF32 or bfloat16.
    """

    def __call__(self, variables: Any, example: Any):
        """The output for one example."""
        outputs = self.on_batch(variables, jax.tree.map(lambda part: part[None], example))
        if jax.tree.structure(outputs).num_leaves > 1 and any(
            np.shape(o)[:1] != (1,) for o in jax.tree.leaves(outputs)
        ):
            raise errors.logits_alone(f"a {type(outputs).__name__}, some of it without a batch axis")
        return jax.tree.map(self._only, outputs)

    def on_batch(self, variables: Any, batch: Any):
        """The outputs for a batch; what the network raises becomes an `ArgumentError`."""
        try:
            with jax.default_matmul_precision("highest"):
                return self._outputs(variables, batch)
        except errors.JaxboundError:
            raise
        except Exception as error:
            shapes = [np.shape(part) for part in jax.tree.leaves(batch)]
            raise errors.network_failed(*shapes, error=error) from error

    def _outputs(self, variables: Any, batch: Any):
        raise NotImplementedError

    @staticmethod
    def _only(leaf: Any):
        if np.shape(leaf)[:1] != (1,):
            raise errors.ArgumentError(
                f"the network gives shape {np.shape(leaf)} for a batch of one example: it takes a batch and gives one, "
                "as jax.vmap makes of a function of one example"
            )
        return leaf[0]


@dataclass(frozen=True)
class Applied(OfBatch):
    """`apply_fn(variables, batch)`."""

    apply_fn: Callable

    def _outputs(self, variables: Any, batch: Any):
        return self.apply_fn(variables, batch)


@dataclass(frozen=True)
class Linen(OfBatch):
    """A Linen module, which compares by its fields."""

    module: nn.Module

    def _outputs(self, variables: Any, batch: Any):
        return self.module.apply(variables, batch)


@dataclass(frozen=True)
class Merged(OfBatch):
    """An NNX module, from its definition and state; called, or given to apply_fn."""

    definition: Any
    apply_fn: Callable | None = None

    def _outputs(self, variables: Any, batch: Any):
        module = nnx.merge(self.definition, variables)
        return module(batch) if self.apply_fn is None else self.apply_fn(module, batch)


@dataclass(frozen=True)
class Rebuilt(OfBatch):
    """A callable pytree (Equinox) from its arrays and the rest; called on one example, or given to apply_fn."""

    tree: Any
    rest: tuple
    apply_fn: Callable | None

    def _outputs(self, variables: Any, batch: Any):
        arrays = iter(variables)
        module = jax.tree.unflatten(self.tree, [next(arrays) if part is ARRAY else part for part in self.rest])
        return jax.vmap(module)(batch) if self.apply_fn is None else self.apply_fn(module, batch)


@dataclass(frozen=True)
class Stateless(OfBatch):
    """A Keras model on the JAX backend, as it predicts."""

    model: Any

    def _outputs(self, variables: Any, batch: Any):
        return self.model.stateless_call(*variables, batch, training=False)[0]


ARRAY = object()
"""Stands for an array among the leaves of a `Rebuilt` tree."""


@dataclass(frozen=True)
class Chain:
    """Dense layers with one activation between them."""

    activation: Callable

    def __call__(self, layers: Any, example: Any):
        """The output for one example, flattened first."""
        value = example.reshape(-1)
        with jax.default_matmul_precision("highest"):
            for number, (kernel, bias) in enumerate(layers):
                value = value @ kernel if bias is None else value @ kernel + bias
                if number < len(layers) - 1:
                    value = self.activation(value)
        return value


@dataclass(frozen=True)
class OfTuple:
    """A function of several inputs, `fn(params, x, y, ...)`, as one of a tuple of them."""

    fn: Callable

    def __call__(self, variables: Any, example: Any):
        """The output for one example."""
        return self.fn(variables, *example)


@dataclass(frozen=True)
class Specified:
    """A network's flattened output times a specification matrix (specs, outputs)."""

    network: Callable

    def __call__(self, variables: Any, example: Any, spec: jax.Array):
        """The specifications' values for one example."""
        return spec @ self.network(variables, example).reshape(-1)


def on_batch(function: Callable) -> Callable:
    """A network as its user calls it: `(variables, batch)` to outputs, by apply_fn itself where it takes this batch."""

    def values(variables: Any, batch: Any):
        own = getattr(function, "on_batch", None)
        with contextlib.suppress(errors.ArgumentError):  # made for another size
            if (
                own is not None
                and np.shape(found := own(variables, batch))[:1] == np.shape(jax.tree.leaves(batch)[0])[:1]
            ):
                return found
        return jax.vmap(function, in_axes=(None, 0))(variables, batch)

    return values
