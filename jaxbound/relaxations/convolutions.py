"""The transpose of a convolution, in the form that computes it fastest.

A convolution with strides s, along each axis `z[q] = sum_k K[k] x[q s - before + k]`, has the transpose

    x[p - before] = sum over q s + k = p of z[q] K[k].

`jax.linear_transpose` puts s - 1 zeros between the entries of z and multiplies them all. But with p = y s + r and
k = j s + r the sum is `sum_j z[y - j] K[j s + r]`: a convolution without strides whose channels are the s residues r,
put side by side afterwards. And where these are fewer numbers than z itself has, products with every K[j] first and
their shifted sum after cost less than a convolution does. Both are the same sums in another order. On two cores a
stride of 2 takes 2 to 5 times less, and a kernel of few input channels 4 times less (docs/performance.md).

Every convolution here, also those that derivatives transpose to, has its channels last and its kernel's before the
results: XLA for CPU is ten times faster in that form, and brings others into it only outside loops and branches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.relaxations.matrices import bilinear

HIGHEST = jax.lax.Precision.HIGHEST


def transpose(shapes: Sequence[tuple[int, ...]], params: dict, rows: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """Rows on a convolution's result, pulled back to its image; None where groups or dilations leave it to JAX.

    Args:
        shapes: of the image and of the kernel.
        params: of `conv_general_dilated`.
        rows: (rows, *result shape).
        kernel: as the convolution takes it.
    """
    image, output, window = (params["dimension_numbers"][k] for k in (0, 2, 1))
    strides, channels = params["window_strides"], shapes[0][image[1]]
    plain = params["feature_group_count"] == 1 == params["batch_group_count"] and image == output
    if not plain or any(n != 1 for n in (*params["lhs_dilation"], *params["rhs_dilation"])):
        return None
    sizes = [shapes[1][axis] for axis in window[2:]]
    taps = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    residues = channels * math.prod(strides)
    # to (rows, *space, channels) and (taps, residues, ..., channels in, channels out)
    space = range(1, 1 + len(strides))
    inner = jnp.transpose(rows, (0, *(1 + output[k] for k in (0, *range(2, len(output)), 1))))
    inner = inner.reshape(-1, *inner.shape[2:])
    table = jnp.transpose(kernel, (*window[2:], window[1], window[0]))
    gaps = zip(taps, strides, sizes, strict=True)
    table = jnp.pad(table, [*((0, tap * stride - size) for tap, stride, size in gaps), (0, 0), (0, 0)])
    pairs = [n for tap, stride in zip(taps, strides, strict=True) for n in (tap, stride)]
    table = table.reshape(*pairs, channels, -1)
    axes = [2 * k for k in range(len(taps))], [2 * k + 1 for k in range(len(taps))]
    table = jnp.transpose(table, (*axes[0], table.ndim - 1, *axes[1], table.ndim - 2)).reshape(*taps, -1, residues)
    found = _moved(inner, table)
    # residues side by side, then without what was padding
    found = found.reshape(*found.shape[:-1], *strides, channels)
    order = [axis for k in space for axis in (k, k + len(taps))]
    found = jnp.transpose(found, (0, *order, found.ndim - 1))
    lengths = [found.shape[2 * k - 1] * found.shape[2 * k] for k in space]
    found = found.reshape(found.shape[0], *lengths, channels)
    wanted = [shapes[0][axis] for axis in image[2:]]
    cuts = zip(params["padding"], wanted, lengths, strict=True)
    ends = [(-before, n + before - length, 0) for (before, _), n, length in cuts]
    found = jax.lax.pad(found, jnp.zeros((), found.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
    found = found.reshape(rows.shape[0], -1, *found.shape[1:])
    back = [0] * len(image)
    for position, axis in enumerate((image[0], *image[2:], image[1])):
        back[axis] = 1 + position
    return jnp.transpose(found, (0, *back))


def _native(inner: jax.Array, table: jax.Array) -> jax.Array:
    """`sum_j z[y - j] table[j]` by a convolution."""
    axes, names = _axes(table)
    return jax.lax.conv_general_dilated(
        inner, jnp.flip(table, axes), (1,) * len(axes), _full(table.shape[:-2]),
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"), precision=HIGHEST,
    )  # fmt: skip


def _of_rows(inner: jax.Array, table: jax.Array) -> jax.Array:
    """The same, with an adjoint in the rows that has the form."""
    axes, names = _axes(table)
    return jax.lax.conv_general_dilated(
        inner, jnp.swapaxes(jnp.flip(table, axes), -1, -2), (1,) * len(axes), _full(table.shape[:-2]),
        dimension_numbers=(f"N{names}C", f"{names}OI", f"N{names}C"), precision=HIGHEST,
    )  # fmt: skip


def _of_table(inner: jax.Array, table: jax.Array) -> jax.Array:
    """The same with the table as the image, and an adjoint in the table that has the form."""
    axes, names = _axes(table)
    kernel = jnp.moveaxis(jnp.flip(inner, [1 + k for k in axes]), 0, -2)
    found = jax.lax.conv_general_dilated(
        jnp.moveaxis(table, -1, 0), kernel, (1,) * len(axes), _full(inner.shape[1:-1]),
        dimension_numbers=(f"N{names}C", f"{names}OI", f"N{names}C"), precision=HIGHEST,
    )  # fmt: skip
    return jnp.swapaxes(found, 0, -1)


def _full(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(size - 1, size - 1) for size in sizes]


def _axes(table: jax.Array) -> tuple[tuple[int, ...], str]:
    axes = tuple(range(table.ndim - 2))
    return axes, "".join(chr(ord("a") + k) for k in axes)


def _either(inner: jax.Array, table: jax.Array) -> jax.Array:
    """`sum_j z[y - j] table[j]`."""
    taps, (before, after) = math.prod(table.shape[:-2]), table.shape[-2:]
    return (_shifted if taps == 1 or taps * after <= before else _native)(inner, table)


_moved = bilinear(_either, _of_rows, _of_table)


def _shifted(inner: jax.Array, table: jax.Array) -> jax.Array:
    """`sum_j z[y - j] table[j]` by products, shifted and added."""
    taps = table.shape[:-2]
    zero = jnp.zeros((), inner.dtype)
    total = None
    flat = jnp.moveaxis(table.reshape(-1, *table.shape[-2:]), 0, 1)
    products = jnp.matmul(inner, flat.reshape(flat.shape[0], -1), precision=HIGHEST)
    for number, places in enumerate(itertools.product(*map(range, taps))):
        product = products[..., number * flat.shape[2] : (number + 1) * flat.shape[2]]
        padding = [(place, tap - 1 - place, 0) for place, tap in zip(places, taps, strict=True)]
        moved = jax.lax.pad(product, zero, [(0, 0, 0), *padding, (0, 0, 0)])
        total = moved if total is None else total + moved
    assert total is not None
    return total
