"""The transpose of a product with a constant matrix, whose derivative in the matrix is fast for a batch.

Rows z go back through `x @ K` as `z @ K.T`. The derivative in K is a sum over rows. Under `vmap` over examples it is a
sum over both, and XLA for CPU copies the larger factor, transposed, together with all that it is computed from. As the
derivative of a convolution with a window of 1 the two are one axis, and nothing large is copied (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

HIGHEST = jax.lax.Precision.HIGHEST


def transpose(shapes: Sequence[tuple[int, ...]], params: dict, rows: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """Rows on `x @ kernel`, pulled back to x; None for other products.

    Args:
        shapes: of x and of the kernel.
        params: of `dot_general`.
        rows: (rows, *shape of the product).
        kernel: (in, out).
    """
    contracting, (batching, _) = params["dimension_numbers"]
    if batching or len(shapes[1]) != 2 or tuple(map(tuple, contracting)) != ((len(shapes[0]) - 1,), (0,)):
        return None
    inner = rows.reshape(rows.shape[0], math.prod(shapes[0][:-1]), shapes[1][1])
    return _moved(inner, kernel).reshape(rows.shape[0], *shapes[0])


def bilinear(product: Callable, in_rows: Callable, in_kernel: Callable) -> Callable:
    """`product(rows, kernel)`, linear in each, whose derivatives are these forms of it."""
    moved = jax.custom_jvp(product)

    def derivative(primals: tuple, tangents: tuple):
        (rows, kernel), (of_rows, of_kernel) = primals, tangents
        parts = []
        if not isinstance(of_rows, SymbolicZero):
            parts.append(in_rows(of_rows, kernel))
        if not isinstance(of_kernel, SymbolicZero):
            parts.append(in_kernel(rows, of_kernel))
        return moved(rows, kernel), sum(parts[1:], parts[0])

    moved.defjvp(derivative, symbolic_zeros=True)
    return moved


def _product(inner: jax.Array, kernel: jax.Array) -> jax.Array:
    """(rows, places, out) to (rows, places, in)."""
    return jnp.matmul(inner, kernel.T, precision=HIGHEST)


def _of_kernel(inner: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as a convolution."""
    return jax.lax.conv_general_dilated(
        inner, kernel.T[None], (1,), [(0, 0)], dimension_numbers=("NWC", "WIO", "NWC"), precision=HIGHEST
    )


_moved = bilinear(_product, _product, _of_kernel)
