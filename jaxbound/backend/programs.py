"""What a function is at this moment: its equations and every array that it closes over, to compare and to hash."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat


class Traced:
    """The program that a function is now, with all that it closes over, in calls and loops at any depth.

    >>> one, two, three = (Traced(jax.jit(lambda x, k=jnp.full(2, k): k * x), jnp.ones(2)) for k in (1.0, 2.0, 1.0))
    >>> one.agrees(two), one.agrees(three)
    (False, True)
    """

    def __init__(self, fn: Callable, *args: Any):
        self.program = jax.make_jaxpr(lambda *args: fn(*args))(*args)  # a new function: a trace of its own
        self.arrays = [array.copy() if isinstance(array, np.ndarray) else array for array in _held(self.program)]

    @functools.cached_property
    def text(self) -> str:
        """The equations, without addresses of functions."""
        return re.sub(r"0x[0-9a-f]+", "", str(self.program))

    @property
    def digest(self) -> str:
        """A hash of the equations and of every bit of every array."""
        return hashed(self.text, (("", array) for array in self.arrays))

    def agrees(self, other: Traced) -> bool:
        """Whether both are the same equations with the same arrays."""
        return self.text == other.text and self.holds_the_same(other)

    def holds_the_same(self, other: Traced) -> bool:
        """Whether the arrays and numbers of both are the same."""
        return len(self.arrays) == len(other.arrays) and all(map(_is_same, self.arrays, other.arrays))


def hashed(text: str, arrays: Iterable[tuple[str, Any]]) -> str:
    """A hash of a text, and of the names, shapes, dtypes and every bit of arrays.

    >>> hashed("", [("a", np.zeros(1))]) == hashed("", [("a", -np.zeros(1))])
    False
    """
    digest = hashlib.sha256(text.encode())
    for name, array in arrays:
        part = bits(array)
        digest.update(f"{name} {part.shape} {part.dtype}".encode())
        digest.update(part.tobytes())
    return digest.hexdigest()


def bits(array: Any) -> np.ndarray:
    """An array's entries on the host; a PRNG key's own data."""
    is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array)


def _is_same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, jax.Array) and old.is_deleted():  # given away by training, say
        return False
    old, new = bits(old), bits(new)
    return old.shape == new.shape and old.dtype == new.dtype and old.tobytes() == new.tobytes()


def _held(part: Any) -> Iterator:
    """The arrays and literals of a jaxpr and of those among its parameters."""
    if isinstance(part, _compat.ClosedJaxpr | _compat.Jaxpr):
        jaxpr = getattr(part, "jaxpr", part)
        yield from getattr(part, "consts", ())
        for equation in jaxpr.eqns:
            yield from (atom.val for atom in equation.invars if isinstance(atom, _compat.Literal))
            yield from _held(equation.params)
        yield from (atom.val for atom in jaxpr.outvars if isinstance(atom, _compat.Literal))
    elif isinstance(part, jax.Array | np.ndarray | np.generic):
        yield part
    elif isinstance(part, Mapping | tuple | list):
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _held(inner)
