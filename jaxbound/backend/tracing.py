"""How programs of jaxbound's own are traced: functions of `jax.numpy` become part of them, loops stay loops.

Most functions of `jax.numpy`, and operators of arrays, are jitted. Within a program each becomes a nested one, which is
traced, batched and lowered for itself: half of what tracing takes. Where JAX is told not to jit they run as the plain
functions that they are, and leave their operations in the program (docs/performance.md has the figures). But then JAX
unrolls loops as well, so that those of jaxbound are `rolled`.

A user's function is never traced so, since its own loops would be unrolled. Nor do jaxbound's own programs obey what a
user sets for the promotion of dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """The function, to be traced, with what it calls as a part of itself."""
    return _under(function, disable=True)


def rolled(loop: Callable[P, R]) -> Callable[P, R]:
    """`jax.lax.fori_loop` and its like, as one operation also where the caller is `inlined`."""
    return _under(loop, disable=False)


def _under(function: Callable[P, R], *, disable: bool) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.disable_jit(disable), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call
