"""The same lines without JAX: on object arrays of `Fraction` they are exact, on float64 arrays they are a reference.

`jnp` and `jax` in a program's source are replaced by the few NumPy functions below; a number with a point becomes the
number that the program's dtype stores for it.
"""

from __future__ import annotations

import math
import re
import types
from fractions import Fraction

import numpy as np

from fuzzing.programs import Program

Array = np.ndarray


class UndefinedError(ArithmeticError):
    """The program has no value at a point."""


def rational(values) -> Array:
    """An array of fractions."""
    flat = [Fraction(float(value)) for value in np.ravel(values)]
    return np.array([*flat, None], dtype=object)[:-1].reshape(np.shape(values))


def _floor(x):
    return np.array([*(math.floor(value) for value in np.ravel(x)), None], dtype=object)[:-1].reshape(np.shape(x))


def _windows(x, start, _reducer, _size, _strides, _padding):
    after = np.concatenate([x[1:], x[-1:] if start else 0 * x[-1:]])
    return np.maximum(x, after) if start else x + after


def _convolve(x, kernel, mode):
    padded = np.concatenate([0 * x[:1], x])
    first = x * kernel[0]
    return first + padded[:-1] * kernel[1] if len(kernel) > 1 else first


def _mod(x, y):
    whole = x / y
    return x - y * (_floor(whole) if whole.dtype == object else np.floor(whole))


def _select(conditions, cases, default):
    for condition, case in zip(reversed(conditions), reversed(cases), strict=True):
        default = np.where(condition, case, default)
    return default


def _interp(x, places, values):
    found = np.where(x < places[0], values[0], values[-1])
    for k in range(len(places) - 1):
        part = (x - places[k]) / (places[k + 1] - places[k])
        inside = (places[k] <= x) & (x <= places[k + 1])
        found = np.where(inside, values[k] + part * (values[k + 1] - values[k]), found)
    return found


def _softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)


def _logsumexp(x):
    return np.max(x) + np.log(np.sum(np.exp(x - np.max(x))))


def _sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def _gelu(x, approximate):
    return x * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)) / 2


_JNP = types.SimpleNamespace(
    abs=np.abs, clip=lambda x, low, high: np.minimum(np.maximum(x, low), high), minimum=np.minimum, maximum=np.maximum,
    where=np.where, max=np.max, sort=np.sort, sum=np.sum, mean=lambda x: np.sum(x) / len(x), cumsum=np.cumsum,
    concatenate=np.concatenate, array=np.array, arange=np.arange, convolve=_convolve, inf=np.inf, tanh=np.tanh,
    exp=np.exp, log=np.log, sqrt=np.sqrt, sin=np.sin, floor=lambda x: _floor(x) if x.dtype == object else np.floor(x),
    mod=_mod, select=_select, interp=_interp, arctan2=np.arctan2, round=np.round, int8=np.int8, fft=np.fft,
)  # fmt: skip
_NN = types.SimpleNamespace(
    relu=lambda x: np.maximum(x, 0 * x), sigmoid=_sigmoid, softplus=lambda x: np.logaddexp(x, 0),
    silu=lambda x: x * _sigmoid(x), gelu=_gelu, softmax=_softmax, logsumexp=_logsumexp,
    elu=lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
)  # fmt: skip
_JAX = types.SimpleNamespace(nn=_NN, lax=types.SimpleNamespace(reduce_window=_windows, max=None, add=None))


class Reference:
    """A program's value, exactly where it is rational."""

    def __init__(self, program: Program, dtype):
        values = ", ".join(f"v{number}" for number in range(len(program.lines) + 1))
        source = re.sub(r"(?<![\w\]])\d+\.\d+(e-?\d+)?", r"_number(\g<0>)", program.source(f"({values},)"))
        self._fn = {kind: _compiled(source, dtype, kind) for kind in (Fraction, float)}

    def exact(self, params, x) -> Array:
        """In rational numbers.

        Raises:
            UndefinedError: it has no value there.
        """
        try:
            return np.asarray(self._fn[Fraction]([rational(p) for p in params], rational(x))[-1])
        except ZeroDivisionError as error:
            raise UndefinedError from error

    def approximate(self, params, x) -> tuple[Array, float]:
        """In float64, and the size of the largest number on the way (infinite where it has no value)."""
        with np.errstate(all="ignore"):
            values = self._fn[float]([np.asarray(p, np.float64) for p in params], np.asarray(x, np.float64))
        size = max(float(np.max(np.abs(np.asarray(value, np.float64)))) for value in values)
        return np.asarray(values[-1], np.float64), size if size < math.inf else math.inf


def _compiled(source: str, dtype, kind):
    space = {"jnp": _JNP, "jax": _JAX, "_number": lambda value: kind(float(dtype(value)))}
    exec(compile(source, "<program>", "exec"), space)
    return space["fn"]
