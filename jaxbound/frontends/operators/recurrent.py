"""Recurrent operators: RNN, GRU and LSTM, unrolled step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound import errors
from jaxbound.frontends.operators.table import Input, Node, operator

_ACTIVATIONS = {
    "Tanh": jnp.tanh, "Sigmoid": jax.nn.sigmoid, "Relu": jax.nn.relu, "Softsign": jax.nn.soft_sign,
    "Softplus": jax.nn.softplus, "HardSigmoid": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1),
    "Elu": jax.nn.elu, "LeakyRelu": lambda x: jax.nn.leaky_relu(x, 0.01),
}  # fmt: skip


class Direction(NamedTuple):
    """What a network in one direction of time computes with."""

    weights: jax.Array
    recurrent: jax.Array
    input_bias: jax.Array
    state_bias: jax.Array
    functions: Sequence[Callable]
    peephole: jax.Array | None

    def mixed(self, value: jax.Array, hidden: jax.Array) -> jax.Array:
        """The affine function of an input and a hidden state."""
        return value @ self.weights.T + self.input_bias + hidden @ self.recurrent.T + self.state_bias


States = tuple[jax.Array, ...]
Step = Callable[[States, jax.Array, Direction], States]


@operator("RNN", known=(4,))
def _rnn(node: Node, x: Input, w: Input, r: Input, bias: Input = None, lengths: Input = None, hidden: Input = None):
    def step(state: States, value: jax.Array, of: Direction):
        (h,) = state
        return (of.functions[0](of.mixed(value, h)),)

    return _recurrent(node, x, w, r, bias, lengths, (hidden,), None, ["Tanh"], step)


@operator("GRU", known=(4,))
def _gru(node: Node, x: Input, w: Input, r: Input, bias: Input = None, lengths: Input = None, hidden: Input = None):
    reset_after = node.flag("linear_before_reset")

    def step(state: States, value: jax.Array, of: Direction):
        (h,), (gate, new) = state, of.functions
        z, reset, candidate = jnp.split(value @ of.weights.T + of.input_bias, 3, -1)
        of_z, of_reset, of_candidate = jnp.split(of.recurrent, 3)
        bias_z, bias_reset, bias_candidate = jnp.split(of.state_bias, 3)
        z, reset = gate(z + h @ of_z.T + bias_z), gate(reset + h @ of_reset.T + bias_reset)
        if reset_after:
            inner = reset * (h @ of_candidate.T + bias_candidate)
        else:
            inner = (reset * h) @ of_candidate.T + bias_candidate
        candidate = new(candidate + inner)
        return (candidate + z * (h - candidate),)

    return _recurrent(node, x, w, r, bias, lengths, (hidden,), None, ["Sigmoid", "Tanh"], step)


@operator("LSTM", known=(4,))
def _lstm(
    node: Node, x: Input, w: Input, r: Input, bias: Input = None, lengths: Input = None, hidden: Input = None,
    cell: Input = None, peephole: Input = None,
):  # fmt: skip
    node.require("input_forget", 0)
    if node.get("clip", 0.0):
        raise errors.ArgumentError(
            "its clip cannot be read: the specification clips the cell's state before the last activation, onnxruntime "
            "does not"
        )

    def step(state: States, value: jax.Array, of: Direction):
        (h, c), (gate, new, last) = state, of.functions
        i, o, f, g = jnp.split(of.mixed(value, h), 4, -1)
        if of.peephole is not None:
            of_i, of_o, of_f = jnp.split(of.peephole, 3)
            i, f = i + of_i * c, f + of_f * c
        c = gate(f) * c + gate(i) * new(g)
        o = o if of.peephole is None else o + of_o * c
        return gate(o) * last(c), c

    return _recurrent(node, x, w, r, bias, lengths, (hidden, cell), peephole, ["Sigmoid", "Tanh", "Tanh"], step)


def _recurrent(
    node: Node, x: Input, w: Input, r: Input, bias: Input, lengths: Input, state: tuple[Input, ...], peephole: Input,
    defaults: list[str], step: Step,
):  # fmt: skip
    """All directions over all steps: the outputs (steps, directions, batch, hidden), then the last of each state."""
    clip = node.get("clip", 0.0)
    if clip < 0:
        raise errors.ArgumentError(f"clip={clip} is no bound")
    if node.get("activation_alpha") or node.get("activation_beta"):
        raise errors.ArgumentError("activation_alpha and activation_beta cannot be read")
    layout, directions, size = node.flag("layout"), w.shape[0], r.shape[-1]
    x = jnp.swapaxes(x, 0, 1) if layout else x
    count, batch = x.shape[:2]
    if lengths is not None and np.any(lengths != count):
        raise errors.ArgumentError("sequence_lens shorter than the sequence cannot be read")
    names = list(node.get("activations", defaults * directions))
    if unknown := [name for name in names if name not in _ACTIVATIONS]:
        raise errors.ArgumentError(f"the activation {unknown[0]!r} cannot be read")
    outputs, last = [], []
    backwards_first = node.require("direction", "forward", "reverse", "bidirectional") == "reverse"
    for direction in range(directions):
        own = names[direction * len(defaults) : (direction + 1) * len(defaults)]
        functions = [_clipped(_ACTIVATIONS[name], clip) if clip else _ACTIVATIONS[name] for name in own]
        biases = jnp.zeros(2 * w.shape[1], x.dtype) if bias is None else bias[direction]
        across = None if peephole is None else peephole[direction]
        input_bias, state_bias = jnp.split(biases, 2)
        one = Direction(w[direction], r[direction], input_bias, state_bias, functions, across)
        now = tuple(_initial(part, direction, layout, (batch, size), x.dtype) for part in state)
        backwards = direction == 1 or backwards_first
        found: list = [None] * count
        for place in reversed(range(count)) if backwards else range(count):
            now = step(now, x[place], one)
            found[place] = now[0]
        outputs.append(jnp.stack(found))
        last.append(now)
    states = [jnp.stack(parts, 1 if layout else 0) for parts in zip(*last, strict=True)]
    results = (jnp.stack(outputs, 2 if layout else 1), *states)
    return (jnp.swapaxes(results[0], 0, 1), *states) if layout else results


def _clipped(function: Callable, limit: float):
    return lambda value: function(jnp.clip(value, -limit, limit))


def _initial(state: Input | None, direction: int, layout: int, shape: tuple[int, int], dtype: DTypeLike):
    if state is None:
        return jnp.zeros(shape, dtype)
    return state[:, direction] if layout else state[direction]
