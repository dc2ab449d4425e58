"""Complex values as pairs of real ones, so that what is linear in real numbers stays linear.

Every equation that makes a complex value is rewritten until `complex(real, imaginary)` makes it; whatever reads it,
reads the two parts. Rotary embeddings and filters by FFT are affine like that, a spectrum's magnitude is
`sqrt(re^2 + im^2)`. A Fourier transform is the product with its matrix, axis by axis, whose numbers are known up to an
error that `rounding=True` counts. A part that is the number 0 is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive
from jaxbound.graph import operations
from jaxbound.graph.primitives import AFFINE
from jaxbound.graph.values import Literal, Operand, Value

Rewrite = tuple[Callable, Sequence]
Part = jax.Array | None

_MOST = 8
"""The largest power that is made by multiplication."""


class Pair(NamedTuple):
    """Real and imaginary part, of a shape and a real dtype; None is 0."""

    real: Any
    imaginary: Any
    shape: tuple[int, ...]
    dtype: Any

    def filled(self) -> tuple[jax.Array, jax.Array]:
        """Both parts as arrays."""
        zeros = jnp.zeros(self.shape, self.dtype)
        return zeros if self.real is None else self.real, zeros if self.imaginary is None else self.imaginary


def match(primitive: Primitive, params: dict, operands: Sequence) -> Rewrite | None:
    """The function and operands that replace an equation which reads or makes complex values; None for any other."""
    name = primitive.name
    reads = any(is_complex(o.dtype) for o in operands)
    makes = name == "fft" or (name == "convert_element_type" and is_complex(params["new_dtype"]))
    rule = _RULES.get(name, _each_part if name in _LINEAR else None)
    if name == "complex" or rule is None or not (reads or makes):
        return None
    if name == "integer_pow" and not 0 < params["y"] <= _MOST:
        return None
    found = [parts for operand in operands if (parts := _read(operand)) is not None]
    is_taken_apart = name in ("real", "imag") and [*map(len, found)] == [1]
    if is_taken_apart or len(found) < len(operands):
        return None

    def function(*arrays: jax.Array):
        rest = iter(arrays)
        given = [_pair(operand, parts, rest) for operand, parts in zip(operands, found, strict=True)]
        result = rule(primitive, params, given)
        return jax.lax.complex(*result.filled()) if isinstance(result, Pair) else result

    return function, [part for parts in found for part in parts if part is not None]


def is_complex(dtype: np.dtype) -> bool:
    """Whether numbers of this type are complex."""
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _read(operand: Operand) -> list | None:
    """What is read for an operand: its parts, or itself; None in the place of 0."""
    if not is_complex(operand.dtype):
        return [operand]
    if isinstance(operand, Literal):
        parts = [Literal(part, operand.shape) for part in (operand.value.real, operand.value.imag)]
    elif isinstance(operand, Value):
        parts = list(operand.operands) if operand.name == "complex" else None
    else:
        parts = list(operand.parts)
    if not parts:  # an array that the function closes over
        return None if parts is None else [operand]
    return [None if isinstance(part, Literal) and part.value == 0 else part for part in parts]


def _pair(operand: Operand, parts: list, arrays: Iterator):
    """An operand of a rule: a `Pair`, or the array itself if it is real."""
    read: list[Any] = [None if part is None else next(arrays) for part in parts]
    if not is_complex(operand.dtype):
        return read[0]
    real, imaginary = read if len(read) == 2 else (jnp.real(read[0]), jnp.imag(read[0]))
    return Pair(real, imaginary, operand.shape, np.finfo(operand.dtype).dtype)


# --- rules: of a primitive, its parameters, and operands that are pairs or real arrays --------------------------------

_LINEAR = frozenset({
    *(name for name, facts in AFFINE.items() if not facts.scales and not name.startswith("scatter"))
} - {"convert_element_type"})  # fmt: skip
"""Applied to each part alone."""


def _plus(x: Part, y: Part):
    return x if y is None else y if x is None else x + y


def _minus(x: Part, y: Part):
    return x if y is None else -y if x is None else x - y


def _by(product: Callable, x: Part, y: Part):
    return None if x is None or y is None else product(x, y)


def _of(real: Part, imaginary: Part) -> Pair:
    """A pair of parts, of which at most one is 0."""
    like = imaginary if real is None else real
    return Pair(real, imaginary, like.shape, like.dtype) if like is not None else Pair(None, None, (), jnp.float32)


def _each_part(primitive: Primitive, params: dict, given: Sequence) -> Pair:
    whole = [o.filled() if isinstance(o, Pair) else (o, o) for o in given]
    real, imaginary = (primitive.bind(*(parts[k] for parts in whole), **params) for k in range(2))
    is_real = all(o.imaginary is None for o in given if isinstance(o, Pair))
    return _of(real, None if is_real else imaginary)


def _bilinear(product: Callable, x: Any, y: Any) -> Pair:
    x, y = (o if isinstance(o, Pair) else _of(o, None) for o in (x, y))
    real = _minus(_by(product, x.real, y.real), _by(product, x.imaginary, y.imaginary))
    imaginary = _plus(_by(product, x.real, y.imaginary), _by(product, x.imaginary, y.real))
    if real is None and imaginary is None:
        real = product(*(o.filled()[0] for o in (x, y)))
    return _of(real, imaginary)


def _multiplied(_primitive: Primitive, _params: dict, given: Sequence) -> Pair:
    return _bilinear(jnp.multiply, *given)


def _contracted(primitive: Primitive, params: dict, given: Sequence) -> Pair:
    own = {**params, "preferred_element_type": None}
    return _bilinear(lambda x, y: primitive.bind(x, y, **own), *given)


def _divided(_primitive: Primitive, _params: dict, given: Sequence) -> Pair:
    x, y = given
    if y.imaginary is None:
        (below, _), inverse = y.filled(), None
    elif y.real is None:  # 1 / (i y) = -i / y
        (_, below), inverse = y.filled(), Pair(None, -jnp.ones(y.shape, y.dtype), y.shape, y.dtype)
    else:
        below, inverse = jnp.square(y.real) + jnp.square(y.imaginary), y._replace(imaginary=-y.imaginary)
    above = x if inverse is None else _bilinear(jnp.multiply, x, inverse)
    return _of(*(None if part is None else part / below for part in above[:2]))


def _power(_primitive: Primitive, params: dict, given: Sequence) -> Pair | None:
    (x,), result = given, given[0]
    for _ in range(params.get("y", 2) - 1):
        result = _bilinear(jnp.multiply, result, x)
    return result


def _exponential(_primitive: Primitive, _params: dict, given: Sequence) -> Pair:
    (z,) = given
    if z.imaginary is None:
        return _of(jnp.exp(z.filled()[0]), None)
    turned = jnp.cos(z.imaginary), jnp.sin(z.imaginary)
    return _of(*(part if z.real is None else jnp.exp(z.real) * part for part in turned))


def _converted(_primitive: Primitive, params: dict, given: Sequence):
    (x,), dtype = given, params["new_dtype"]
    if not is_complex(dtype):
        return x.filled()[0].astype(dtype)
    parts = x[:2] if isinstance(x, Pair) else (x, None)
    return _of(*(None if part is None else part.astype(np.finfo(dtype).dtype) for part in parts))


def _magnitude(_primitive: Primitive, _params: dict, given: Sequence):
    (z,) = given
    if z.real is None or z.imaginary is None:
        return jnp.abs(z.filled()[z.real is None])
    return jnp.sqrt(jnp.square(z.real) + jnp.square(z.imaginary))


def _transformed(_primitive: Primitive, params: dict, given: Sequence):
    """A Fourier transform over the last axes; the last one of all may be that of a real array."""
    (x,), lengths, kind = given, params["fft_lengths"], params["fft_type"].name
    z = x if isinstance(x, Pair) else _of(x, None)
    axes = range(len(z.shape) - len(lengths), len(z.shape))
    sign = 1 if kind.startswith("I") else -1
    for axis, length in zip(axes, lengths, strict=True):
        is_last = axis == len(z.shape) - 1
        if kind == "IRFFT" and is_last:
            return _synthesis(z, length)
        z = _along(z, axis, length, sign, length // 2 + 1 if kind == "RFFT" and is_last else length)
    return z


def _along(z: Pair, axis: int, length: int, sign: int, count: int) -> Pair:
    """Along one axis: `sum_j exp(sign 2 pi i j k / n) z_j` for the first numbers k, over n if the sign is 1."""
    cosines, sines = _matrices(np.arange(count), np.arange(length), length, z.dtype, 1 / length if sign > 0 else 1)
    make = lambda part, matrix: jnp.moveaxis(jnp.tensordot(part, matrix, ((axis,), (1,))), -1, axis)  # noqa: E731
    kernel = Pair(cosines, sign * sines, cosines.shape, z.dtype)
    return _bilinear(make, z, kernel)


def _synthesis(z: Pair, length: int):
    """A real signal from the first half of its spectrum; what is imaginary at both ends of that does not count."""
    numbers = np.arange(length // 2 + 1)
    twice = np.where((numbers == 0) | (2 * numbers == length), 1.0, 2.0)
    cosines, sines = _matrices(np.arange(length), numbers, length, z.dtype, twice / length)
    product = lambda part, matrix: jnp.tensordot(part, matrix, ((-1,), (1,)))  # noqa: E731
    result = _minus(_by(product, z.real, cosines), _by(product, z.imaginary, sines))
    return jnp.zeros((*z.shape[:-1], length), z.dtype) if result is None else result


def _matrices(
    rows: np.ndarray, columns: np.ndarray, length: int, dtype: np.dtype, scale: np.ndarray | float
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of `2 pi j k / n`, times a scale, known up to an error."""
    turns = 2 * np.pi * (np.outer(rows, columns) % length) / length
    made = []
    for function in (np.cos, np.sin):
        exact = scale * function(turns)
        value = exact.astype(dtype)
        error = np.abs(value.astype(np.float64) - exact) + 2.0**-48 * np.max(scale)
        made.append(operations.known_up_to(jnp.asarray(value), jnp.asarray((1.01 * error).astype(dtype))))
    return made[0], made[1]


_RULES: dict[str, Callable] = {
    "real": lambda _primitive, _params, given: given[0].filled()[0],
    "imag": lambda _primitive, _params, given: given[0].filled()[1],
    "conj": lambda _primitive, _params, given: _of(given[0].real, _minus(None, given[0].imaginary)),
    "mul": _multiplied,
    "div": _divided,
    "dot_general": _contracted,
    "square": _power,
    "integer_pow": _power,
    "exp": _exponential,
    "abs": _magnitude,
    "convert_element_type": _converted,
    "fft": _transformed,
}
