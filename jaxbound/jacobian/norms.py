"""Operator norms, from above: of matrices known entry by entry, and of matrices with no negative entries.

A Jacobian J with |J| <= M entry by entry has `||J||_{p -> q} <= ||M||_{p -> q}`, since M maps |v| above |J v|. For a
matrix M with no negative entries (p* the dual exponent of p):

    p = 1        the largest q-norm of a column           q = inf      the largest p*-norm of a row
    p = inf      the q-norm of the sums of the rows       q = 1        the p*-norm of the sums of the columns
    p = q        at most max_j ((M^T (M v)^(p-1))_j / v_j^(p-1))^(1/p) for any v > 0, powers entry by entry (Schur's
                 test; for p = 2 Collatz 1942, Wielandt 1950), whatever v is; v comes from power iteration (Boyd 1974)
                 and only tightens it. And at most (largest row sum)^(1-1/p) (largest column sum)^(1/p), its v = 1

Schur's test is Hölder's inequality: with w = M v and 1/p + 1/q = 1,

    sum_i (M x)_i^p  <=  sum_i w_i^(p/q) sum_j M_ij v_j^(-p/q) x_j^p  <=  max_j ((M^T w^(p-1))_j / v_j^(p-1)) ||x||_p^p.

For any matrix W, `||W||_2^2 = ||W^T W||_2`, and the Frobenius norm is above the spectral norm: after k squarings the
bound `||(W^T W)^(2^(k-1))||_F^(1 / 2^k)` exceeds it by a factor of at most `rank^(1 / 2^(k+1))`. Power iteration itself
converges from below, and bounds nothing.

Every result includes its rounding, and as much as subnormal numbers are that count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbound import errors
from jaxbound.backend.tracing import rolled
from jaxbound.regions import balls
from jaxbound.relaxations.affine import gamma

_SQUARINGS = 12
"""Above the spectral norm of a matrix of rank 1000 by less than 0.1 %."""
_ROUNDS = 30
"""Steps of power iteration: what is missing costs tightness only."""


def pair(norm: Any) -> tuple[float, float]:
    """The norms of the input and of the output from `p` or `(p_in, p_out)`.

    Raises:
        ArgumentError: not a number of at least 1, nor a pair of such.
    """
    given = norm if isinstance(norm, tuple | list) else (norm, norm)
    if len(given) != 2 or not all(isinstance(p, int | float) and p >= 1 for p in given):
        raise errors.argument("norm", f"is {norm!r}", "pass p >= 1, such as 1, 2 or jnp.inf, or a pair (p_in, p_out)")
    return float(given[0]), float(given[1])


def dual(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    return 1.0 if p == math.inf else balls.dual_exponent(p)


def vector_norm(values: jax.Array, p: float) -> jax.Array:
    """The p-norm along the last axis, from above; infinite where something is undefined."""
    found = balls.vector_norm(values, p) * (1 + _slack(values)) + values.shape[-1] * jnp.finfo(values.dtype).tiny
    return jnp.where(jnp.all(jnp.isfinite(values), axis=-1), found, jnp.inf)


def nonnegative(matrix: jax.Array, p_in: float, p_out: float) -> jax.Array:
    """The operator norm of matrices `(..., outputs, inputs)` with no negative entries, from above.

    Raises:
        ArgumentError: a pair of norms for which there is no formula.
    """
    own, columns = dual(p_in), jnp.swapaxes(matrix, -1, -2)
    if p_out == math.inf:
        return jnp.max(vector_norm(matrix, own), axis=-1)
    if p_in == 1:
        return jnp.max(vector_norm(columns, p_out), axis=-1)
    if p_in == math.inf:
        return vector_norm(vector_norm(matrix, 1), p_out)
    if p_out == 1:
        return vector_norm(vector_norm(columns, 1), own)
    if p_in == p_out:
        # ||M||_p = ||M^T||_q, so that the vector may have the shorter side's length
        return _schur(matrix, p_in) if matrix.shape[-1] <= matrix.shape[-2] else _schur(columns, own)
    raise errors.argument(
        "norm",
        f"is ({p_in:g}, {p_out:g})",
        "there are formulas for p_in in (1, inf), p_out in (1, inf), and equal ones",
    )


def _schur(matrix: jax.Array, p: float) -> jax.Array:
    """The operator norm from p to p, 1 < p < inf, of matrices with no negative entries, from above."""
    limits, power = jnp.finfo(matrix.dtype), p - 1
    largest = jnp.max(matrix, axis=(-1, -2), keepdims=True)
    finite = jnp.isfinite(largest[..., 0, 0])
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    matrix = matrix / scale
    lost = 2 * (sum(matrix.shape[-2:]) + 2) * limits.tiny  # what may underflow in a sum of so many products
    # No entry may be so small that its power, which is divided by, vanishes; none is above 1, or it would overflow.
    floor = max(float(limits.eps), float(limits.tiny) ** min(1.0, 0.75 / power))

    def apply(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """M^T (M v / m)^(p-1), and the largest entry m of M v."""
        inner = jnp.einsum("...ij,...j->...i", matrix, vector, precision=jax.lax.Precision.HIGHEST) + lost
        most = jnp.max(inner, axis=-1, keepdims=True)
        outer = _raised(inner / most, power)
        return jnp.einsum("...ij,...i->...j", matrix, outer, precision=jax.lax.Precision.HIGHEST) + lost, most[..., 0]

    def improve(_: Any, vector: jax.Array) -> jax.Array:
        moved, _ = apply(vector)
        return jnp.maximum(_raised(moved / jnp.max(moved, axis=-1, keepdims=True), 1 / power), floor)

    start = jnp.ones((*matrix.shape[:-2], matrix.shape[-1]), matrix.dtype)
    vector = jax.lax.stop_gradient(rolled(jax.lax.fori_loop)(0, _ROUNDS, improve, start))
    moved, most = apply(vector)
    tested = _raised(jnp.max(moved / _raised(vector, power), axis=-1), 1 / p) * _raised(most, power / p)
    rows, columns = (jnp.max(jnp.sum(matrix, axis=axis), axis=-1) + lost for axis in (-1, -2))
    between = _raised(rows, power / p) * _raised(columns, 1 / p)
    units = 2 * sum(matrix.shape[-2:]) + 16
    if p != 2:  # five powers, of 64 units each; an exponent's rounding changes b^e by |log b^e|, at most -log(tiny)
        units += 5 * 64 + math.ceil(-4 * math.log(limits.tiny))
    found = jnp.minimum(tested, between) * (1 + gamma(units, matrix.dtype)) * scale[..., 0, 0]
    return jnp.where(finite, found + math.prod(matrix.shape[-2:]) * limits.tiny, jnp.inf)  # subnormal entries


def _raised(base: jax.Array, exponent: float) -> jax.Array:
    return base if exponent == 1 else jnp.sqrt(base) if exponent == 0.5 else base**exponent


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """The spectral norm of a matrix, from above.

    Reference: Delattre et al., "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration",
    2023.

    >>> bool(1.0 <= spectral_norm(jnp.eye(3)) <= 1.001)
    True
    """
    slim = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return _gram(slim, _SQUARINGS) + matrix.size * jnp.finfo(matrix.dtype).tiny  # subnormal entries


def _gram(matrix: jax.Array, squarings: int) -> jax.Array:
    """By `||A||_2^2 <= ||fl(A^T A)||_2 + error`, with A scaled so that no large entry overflows or vanishes."""
    largest = jnp.max(jnp.abs(matrix))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = matrix / scale
    frobenius = jnp.sum(scaled * scaled) * (1 + gamma(matrix.size + 8, matrix.dtype))
    if squarings == 0:
        return jnp.sqrt(frobenius) * scale * (1 + gamma(8, matrix.dtype))
    product = jnp.matmul(scaled.T, scaled, precision=jax.lax.Precision.HIGHEST)
    error = gamma(matrix.shape[0] + 8, matrix.dtype) * frobenius  # of the products, and of scaling
    return jnp.sqrt(_gram(product, squarings - 1) + error) * scale * (1 + gamma(8, matrix.dtype))


def _slack(values: jax.Array) -> float:
    return gamma(values.shape[-1] + 8, values.dtype)


def product(factors: Sequence[jax.Array], dtype: DTypeLike) -> jax.Array:
    """The product of numbers that are not negative, from above: the largest meets the smallest, and none is below tiny.

    Scalars or arrays of one shape. What underflows is below the smallest normal number, which takes its place.
    """
    tiny = jnp.finfo(dtype).tiny
    ordered = jnp.sort(jnp.maximum(jnp.stack([jnp.asarray(factor, dtype) for factor in factors]), tiny), axis=0)
    total, (first, last) = jnp.ones(ordered.shape[1:], dtype), (0, len(ordered) - 1)
    for turn in range(len(ordered)):
        chosen = ordered[last] if turn % 2 == 0 else ordered[first]
        first, last = (first, last - 1) if turn % 2 == 0 else (first + 1, last)
        total = jnp.maximum(total * chosen, tiny)
    return total * (1 + gamma(len(ordered) + 2, dtype))
