"""The table of operators, and what a row of it is.

An operator is a function `(node, *inputs) -> output or tuple of outputs`. Inputs are JAX arrays; Python numbers, which
are constants without axes, so that elementwise chains fuse; NumPy arrays, which are integers, and constants at the
places that the row names as `known`; or None, which is optional and left out. An output that is a NumPy array is a
constant: a shape, for instance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxbound import errors


@dataclasses.dataclass(frozen=True)
class Node:
    """One node of a file: what an operator may know of it beside its inputs."""

    operator: str
    attributes: Mapping[str, Any]
    opset: int
    outputs: int

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """An attribute that is 0 or 1."""
        return bool(self.require(name, int(default), int(not default)))

    def require(self, name: str, *values: Any) -> Any:
        """An attribute that is one of these values, by default the first; any other is refused."""
        given = self.attributes.get(name, values[0])
        if given not in values:
            raise errors.ArgumentError(f"{name}={given!r} cannot be read; only {' or '.join(map(repr, values))} can")
        return given


class Operator(NamedTuple):
    """A row: the function, and the places of inputs that must be constants (all, where `known` is None)."""

    function: Callable[..., Any]
    known: tuple[int, ...] = ()


Input = Any
"""A JAX array, a NumPy array or a Python number, as said above; `Input | None` where it may be left out."""

OPERATORS: dict[str, Operator] = {}

IDLE_ATTRIBUTES = {
    "kernel_shape", "hidden_size", "num_outputs",  # said by the operands and outputs, too
    "momentum", "ratio", "seed", "consumed_inputs",  # of training
    "storage_order", "stash_type",  # of order and precision within
    "cubic_coeff_a", "nearest_mode", "exclude_outside", "extrapolation_value",  # of modes of Resize that do not ask
}  # fmt: skip
"""Attributes that change no number where a row does not ask for them."""


def operator(*names: str, known: tuple[int, ...] = ()) -> Callable[[Callable], Callable]:
    """Enter a function into the table under these names."""

    def enter(function: Callable) -> Callable:
        for name in names:
            OPERATORS[name] = Operator(function, known)
        return function

    return enter


def elementwise(**functions: Callable[..., Any]) -> None:
    """Enter functions of inputs alone, without attributes."""
    for name, function in functions.items():
        OPERATORS[name] = Operator(lambda _node, *inputs, function=function: function(*inputs))


def axes_of(node: Node, given: Any, rank: int) -> tuple[int, ...] | None:
    """The axes that an attribute names or, in newer operator sets, an input does; counted from the front."""
    axes = node.get("axes") if given is None else given
    return None if axes is None else tuple(int(axis) % rank for axis in axes)


def over_axis(function: Callable[..., Any], node: Node, x: Any) -> Any:
    """Over one axis or, before operator set 13, over it and all after it."""
    if node.opset >= 13:
        return function(x, axis=node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim
    return function(x.reshape(*x.shape[:axis], -1), axis=-1).reshape(x.shape)


def mean(x: Any, axis: tuple[int, ...] | None, *, keepdims: bool = True) -> Any:
    """The mean over axes, of at least one entry."""
    if not x.size:
        raise errors.ArgumentError("a mean of no entries is not defined")
    return jnp.mean(x, axis, keepdims=keepdims)


def lp_norm(x: Any, p: int, total: Callable[[Any], Any]) -> Any:
    """The norm to an exponent of whatever entries `total` sums."""
    if p < 1:
        raise errors.ArgumentError(f"p={p} is no norm")
    if p == 1:
        return total(jnp.abs(x))
    return jnp.sqrt(total(x * x)) if p == 2 else total(jnp.abs(x) ** p) ** (1 / p)
