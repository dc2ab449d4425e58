"""A network, the region around its inputs and a specification, as the problem that a method is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbound import errors, regions
from jaxbound.backend.caches import kept
from jaxbound.methods import Request
from jaxbound.network.functions import Specified
from jaxbound.network.inputs import Inputs, batch_of, example_structs, leaves_of, per_example, structs
from jaxbound.network.resolving import Network
from jaxbound.regions import is_region
from jaxbound.transforms.problems import Problem, prepare

MEMORY_LIMIT = 1 << 30
"""Bytes that the coefficients of one backward pass may take by default."""


def example_of(network: Network, inputs: Inputs):
    """One example of what inputs stand for."""
    return example_structs(inputs, batched=network.batched)


def problem_of(network: Network, inputs: Inputs, spec: ArrayLike | None, *, rounding: bool = False) -> Problem:
    """The network over canonical regions, with a specification composed, for a method (see `transform.prepare`).

    Regions of weights come first among the problem's leaves; in a batch each example has them all.
    """
    variables, count = network.variables, batch_of(inputs) if network.batched else None
    weights = leaves_of(variables)
    if any(map(is_region, weights)):
        variables = jax.tree.map(lambda leaf: _for_each(leaf, count), variables, is_leaf=is_region)
    inputs = per_example(inputs) if network.batched else inputs
    arguments, batch = (variables, inputs), None
    if network.batched:
        batch = [*map(is_region, weights), *[True] * len(leaves_of(inputs))]
    if spec is None:
        return prepare(network.function, arguments, batch, rounding=rounding, canonical=True)
    if np.ndim(spec) not in (2, 3):
        raise errors.ArgumentError(f"spec has shape {np.shape(spec)}: pass (specs, outputs) or (batch, specs, outputs)")
    _check_spec(network, inputs, np.shape(spec))
    batch = None if batch is None else [*batch, np.ndim(spec) == 3]
    return prepare(Specified(network.function), (*arguments, spec), batch, rounding=rounding, canonical=True)


def _for_each(leaf: Any, count: int | None):
    """A region of weights, once for each example."""
    if not is_region(leaf):
        return leaf
    regions.validate(leaf, "a region among params")
    leaf = regions.canonical(leaf)
    return leaf if count is None else jax.tree.map(lambda array: jnp.broadcast_to(array, (count, *array.shape)), leaf)


def output_struct(network: Network, inputs: Inputs):
    """The shapes and dtypes of one example's outputs; traced once per function and shapes."""
    given = structs(network.variables), example_of(network, inputs)
    leaves, tree = jax.tree.flatten(given)
    try:
        return _output_struct(network.function, tree, tuple(leaves), jnp.result_type(float))
    except TypeError:  # an unhashable callable
        return jax.eval_shape(network.function, *given)


@kept(64)
def _output_struct(function: Callable, tree: Any, avals: tuple, _default_dtype: DTypeLike):
    return jax.eval_shape(function, *jax.tree.unflatten(tree, avals))


def _check_spec(network: Network, inputs: Inputs, shape: tuple[int, ...]) -> None:
    outputs = output_struct(network, inputs)
    if not hasattr(outputs, "shape"):
        raise errors.logits_alone(f"a {type(outputs).__name__}")
    size = int(np.prod(outputs.shape))
    if shape[-1] != size:
        raise errors.ArgumentError(f"spec has shape {shape}, but the network has {size} outputs")
    batch = (batch_of(inputs),) if network.batched else ()
    if len(shape) == 3 and shape[:1] != batch:
        raise errors.ArgumentError(f"spec has shape {shape}, but x has {batch[0] if batch else 'no'} examples")


def bytes_of(memory_limit: int | None) -> int:
    """A memory limit in bytes, as given or the usual one."""
    if not isinstance(memory_limit, int | float | np.number | None):
        raise errors.argument_type("memory_limit", f"is {memory_limit!r}", "pass a number of bytes, such as 2**30")
    return MEMORY_LIMIT if memory_limit is None else memory_limit


def request_of(
    problem: Problem, memory_limit: int | None, *, sides: str = "both", rounding: bool | str = False
) -> Request:
    """How many rows fit into the memory limit."""
    limit = bytes_of(memory_limit)
    graph = problem.graph
    batch = 1 if graph.axes is None else jax.tree.leaves(problem.leaves)[0].shape[0]
    row = max(node.op.size * node.op.dtype.itemsize for node in graph.nodes) * batch * 3
    return Request(sides, rounding, int(np.clip(limit // row, 16, 1 << 14)))
