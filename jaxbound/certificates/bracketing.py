"""Bracketing and bisection of many radii at once, each on its own.

Each example has its
own bracket: `held`, the largest radius seen to hold (0 at first), and `failed`, the smallest above it seen not to
(infinite at first). The next radius to evaluate is

    initial              while neither is known,
    2 held               while none has failed,
    (held + failed) / 2  from then on, which halves as long as none has held.

What comes back is `held`: a radius at which the certificate itself was evaluated. Nothing is concluded from one radius
about another, because bounds with adaptive relaxations need not be monotone in the radius; a larger radius than the
one returned may hold, too.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbound._compat import is_tracing


def search(
    holds: Callable[[jax.Array], jax.Array], possible: jax.Array, first: jax.Array, steps: int, tolerance: ArrayLike
) -> jax.Array:
    """The largest radius seen to hold, entry by entry; see the module's head.

    Args:
        holds: radii (batch,) -> bool (batch,), each entry from its own radius.
        possible: bool (batch,); where it is False the answer is 0 and nothing is searched.
        first: the first radii to evaluate, (batch,).
        steps: how often `holds` is called at most.
        tolerance: relative width of a bracket that is narrow enough.

    Returns:
        (batch,): 0, or a radius for which `holds` was True.

    >>> search(lambda r: r <= 3.0, jnp.array([True, False]), jnp.ones(2), 20, 1e-4).round(2)
    Array([3., 0.], dtype=float32)
    """

    def is_open(held: jax.Array, failed: jax.Array):
        return (held < failed) & (jnp.isinf(failed) | (failed - held > tolerance * failed))

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]):
        count, held, failed = state
        return (count < steps) & jnp.any(is_open(held, failed))

    def advance(state: tuple[jax.Array, jax.Array, jax.Array]):
        count, held, failed = state
        between = jnp.where(jnp.isinf(failed), jnp.where(held > 0, 2 * held, first), held / 2 + failed / 2)
        candidate = jnp.where(is_open(held, failed), between, held)
        success = holds(candidate)
        held, failed = jnp.where(success, candidate, held), jnp.where(success, failed, candidate)
        return count + 1, held, failed

    state = jnp.zeros((), jnp.int32), jnp.zeros_like(first), jnp.where(possible, jnp.inf, 0).astype(first.dtype)
    if is_tracing():
        return jax.lax.while_loop(goes_on, advance, state)[1]
    while goes_on(state):  # each evaluation picks its rows from concrete values, and compiles its steps only once
        state = advance(state)
    return state[1]
