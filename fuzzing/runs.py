"""What JAX gives when it runs a program, to hold against bounds with `rounding="execution"`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

_AS_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
"""Against what `__main__` sets to compile fast."""


class Runs:
    """A program in its dtype: eagerly, compiled as users compile it, and compiled for a batch."""

    def __init__(self, fn: Callable):
        compiled = functools.partial(jax.jit, compiler_options=_AS_USERS)
        self._ways = fn, compiled(fn), compiled(jax.vmap(fn, in_axes=(None, 0)))

    def __call__(self, params: Sequence, x: np.ndarray) -> np.ndarray:
        """Its values at a point, (ways, entries)."""
        eager, one, many = self._ways
        params, point = [jnp.asarray(p) for p in params], jnp.asarray(x)
        found = eager(params, point), one(params, point), many(params, jnp.stack([point] * 3))[1]
        return np.stack([np.asarray(value, np.float64).reshape(-1) for value in found])
