"""Operators that act entry by entry."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxbound import errors
from jaxbound.frontends.operators.table import Input, Node, elementwise, operator, over_axis


def _many(function: Callable):
    """A function of two as one of any number."""
    return lambda *inputs: functools.reduce(function, inputs)


def _divide(x: Input, y: Input):
    if jnp.issubdtype(jnp.result_type(x, y), jnp.integer):
        return lax.div(*jnp.broadcast_arrays(x, y))
    return jnp.divide(x, y)


elementwise(
    Abs=jnp.abs, Neg=jnp.negative, Sign=jnp.sign, Floor=jnp.floor, Ceil=jnp.ceil, Round=jnp.round,
    Sqrt=jnp.sqrt, Exp=jnp.exp, Log=jnp.log, Reciprocal=lambda x: 1 / x, Erf=lax.erf,
    Sin=jnp.sin, Cos=jnp.cos, Tan=jnp.tan, Asin=jnp.arcsin, Acos=jnp.arccos, Atan=jnp.arctan,
    Sinh=jnp.sinh, Cosh=jnp.cosh, Tanh=jnp.tanh, Asinh=jnp.arcsinh, Acosh=jnp.arccosh, Atanh=jnp.arctanh,
    Relu=jax.nn.relu, Sigmoid=jax.nn.sigmoid, Softplus=jax.nn.softplus, Softsign=jax.nn.soft_sign, Mish=jax.nn.mish,
    HardSwish=lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1), PRelu=lambda x, slope: jnp.where(x >= 0, x, slope * x),
    Add=jnp.add, Sub=jnp.subtract, Mul=jnp.multiply, Div=_divide,
    Sum=_many(jnp.add), Max=_many(jnp.maximum), Min=_many(jnp.minimum),
    Mean=lambda *inputs: _many(jnp.add)(*inputs) / len(inputs),
    Less=jnp.less, LessOrEqual=jnp.less_equal, Greater=jnp.greater, GreaterOrEqual=jnp.greater_equal, Equal=jnp.equal,
    And=jnp.logical_and, Or=jnp.logical_or, Xor=jnp.logical_xor, Not=jnp.logical_not, Where=jnp.where,
    IsNaN=jnp.isnan, IsInf=jnp.isinf, Identity=lambda x: x,
)  # fmt: skip


@operator("LeakyRelu")
def _leaky_relu(node: Node, x: Input):
    return jax.nn.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def _elu(node: Node, x: Input):
    return jax.nn.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def _celu(node: Node, x: Input):
    return jax.nn.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def _selu(node: Node, x: Input):
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * jax.nn.elu(x, alpha)


@operator("ThresholdedRelu")
def _thresholded_relu(node: Node, x: Input):
    return jnp.where(x > node.get("alpha", 1.0), x, 0)


@operator("Shrink")
def _shrink(node: Node, x: Input):
    limit, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    return jnp.where(x < -limit, x + bias, jnp.where(x > limit, x - bias, 0))


@operator("HardSigmoid")
def _hard_sigmoid(node: Node, x: Input):
    return jnp.clip(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


@operator("Swish")
def _swish(node: Node, x: Input):
    return x * jax.nn.sigmoid(node.get("alpha", 1.0) * x)


@operator("Gelu")
def _gelu(node: Node, x: Input):
    return jax.nn.gelu(x, approximate=node.require("approximate", "none", "tanh") == "tanh")


@operator("Clip", known=(1, 2))
def _clip(node: Node, x: Input, low: Input | None = None, high: Input | None = None):
    low, high = node.get("min", low), node.get("max", high)
    return jnp.clip(x, *(None if end is None else np.asarray(end).item() for end in (low, high)))


@operator("Pow")
def _power(_node: Node, x: Input, exponent: Input):
    if isinstance(exponent, np.ndarray) and exponent.size == 1 and exponent.ndim == 0:
        exponent = exponent.item()
    if isinstance(exponent, int | float):
        return x ** (int(exponent) if float(exponent).is_integer() else exponent)
    return jnp.power(x, exponent)


@operator("Mod")
def _mod(node: Node, x: Input, y: Input):
    return jnp.fmod(x, y) if node.flag("fmod") else jnp.mod(x, y)


@operator("Cast")
def _cast(node: Node, x: Input):
    to = node.get("to")
    if to not in _DTYPES:
        raise errors.ArgumentError(f"its type to={to} cannot be read")
    return _converted(x, _DTYPES[to])


@operator("CastLike")
def _cast_like(_node: Node, x: Input, like: Input):
    return _converted(x, jnp.result_type(like))


_DTYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64, 16: jnp.bfloat16,
}  # fmt: skip
"""The numbers that `TensorProto.DataType` gives to dtypes."""


def _converted(x: Input, dtype: DTypeLike):
    """A number in another dtype; floats that would only become wider stay, and take the dtype of what they meet."""
    dtype, given = jax.dtypes.canonicalize_dtype(dtype), jnp.result_type(x)
    if jnp.issubdtype(given, jnp.floating) and jnp.promote_types(given, dtype) == dtype:
        return x
    return lax.convert_element_type(x, dtype)


@operator("Softmax")
def _softmax(node: Node, x: Input):
    return over_axis(jax.nn.softmax, node, x)


@operator("LogSoftmax")
def _log_softmax(node: Node, x: Input):
    return over_axis(jax.nn.log_softmax, node, x)


@operator("Dropout")
def _dropout(node: Node, x: Input, _ratio: Input | None = None, training: np.ndarray | None = None):
    if node.get("is_test", 1) == 0 or (training is not None and np.any(training)):
        raise errors.ArgumentError("training mode, in which entries are dropped at random, cannot be read")
    return (x, np.ones(x.shape, bool))[: node.outputs] if node.outputs > 1 else x
