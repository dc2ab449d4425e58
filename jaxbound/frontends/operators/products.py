"""Operators that are products with weights: matrices and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbound import errors
from jaxbound.frontends.operators.table import Input, Node, lp_norm, operator

Sizes = tuple[int, ...]
Pads = Sequence[tuple[int, int]]


@operator("MatMul")
def _matmul(_node: Node, a: Input, b: Input):
    return jnp.matmul(a, b)


@operator("Gemm")
def _gemm(node: Node, a: Input, b: Input, c: Input | None = None):
    a = a.T if node.flag("transA") else a
    b = b.T if node.flag("transB") else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    value = a @ b if alpha == 1 else alpha * (a @ b)
    if c is None or beta == 0:
        return value
    return value + (c if beta == 1 else beta * c)


@operator("Einsum")
def _einsum(node: Node, *inputs: Input):
    return jnp.einsum(node.get("equation"), *inputs)


_PADDINGS = "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER", ""


def _paddings(
    node: Node, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """The padding before and after each spatial axis."""
    mode, rank = node.require("auto_pad", *_PADDINGS), len(sizes)
    pads = node.get("pads", (0,) * 2 * rank)
    if mode in ("NOTSET", ""):
        return [(pads[axis], pads[axis + rank]) for axis in range(rank)]
    if mode == "VALID":
        return [(0, 0)] * rank
    if any(dilation > 1 for dilation in dilations):  # onnxruntime and the specification differ
        raise errors.ArgumentError(f"auto_pad={mode!r} with dilations={tuple(dilations)} cannot be read: write pads")
    pairs = []
    for size, length, stride, dilation in zip(sizes, window, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return pairs


@operator("Conv")
def _conv(node: Node, x: Input, kernel: Input, bias: Input | None = None):
    rank = x.ndim - 2
    strides, dilations = (node.get(name, (1,) * rank) for name in ("strides", "dilations"))
    value = _convolved(
        x, kernel, strides, _paddings(node, x.shape[2:], kernel.shape[2:], strides, dilations), dilations,
        groups=node.get("group", 1),
    )  # fmt: skip
    return _with_bias(value, bias)


@operator("ConvTranspose")
def _conv_transpose(node: Node, x: Input, kernel: Input, bias: Input | None = None):
    rank, groups = x.ndim - 2, node.get("group", 1)
    strides, dilations = (node.get(name, (1,) * rank) for name in ("strides", "dilations"))
    extra = node.get("output_padding", (0,) * rank)
    window, sizes = kernel.shape[2:], x.shape[2:]
    reach = [(length - 1) * dilation for length, dilation in zip(window, dilations, strict=True)]
    full = [(size - 1) * s + r + 1 + e for size, s, r, e in zip(sizes, strides, reach, extra, strict=True)]
    pads = _transposed_paddings(node, full, sizes, strides)
    # (in, out / groups, ...) with each group's channels apart, as the kernel of the convolution that it transposes
    grouped = kernel.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
    turned = jnp.swapaxes(grouped, 1, 2).reshape(-1, kernel.shape[0] // groups, *window)
    turned = jnp.flip(turned, tuple(range(2, 2 + rank)))
    outside = [(r - low, r - high + e) for r, (low, high), e in zip(reach, pads, extra, strict=True)]
    return _with_bias(_convolved(x, turned, (1,) * rank, outside, dilations, groups=groups, gaps=strides), bias)


def _transposed_paddings(
    node: Node, full: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """What is cut from both ends of each axis."""
    rank, mode = len(full), node.require("auto_pad", *_PADDINGS)
    wanted, pads = node.get("output_shape"), node.get("pads", (0,) * 2 * rank)
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        pads = pads if mode in ("NOTSET", "") else (0,) * 2 * rank
        return [(pads[axis], pads[axis + rank]) for axis in range(rank)]
    totals = [size - want for size, want in zip(full, wanted[-rank:], strict=True)]
    if min(totals) < 0:
        raise errors.ArgumentError(f"output_shape={tuple(wanted)} is more than the {tuple(full)} that there are")
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if mode == "SAME_UPPER" else [(more, less) for less, more in halves]


def _convolved(
    x: Input,
    kernel: Input,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    *,
    groups: int,
    gaps: Sequence[int] | None = None,
):
    dtype = jnp.result_type(x, kernel)
    return lax.conv_general_dilated(
        jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), tuple(strides), pads, lhs_dilation=gaps,
        rhs_dilation=tuple(dilations), feature_group_count=groups,
    )  # fmt: skip


def _with_bias(value: jax.Array, bias: Input | None):
    return value if bias is None else value + bias.reshape(-1, *(1,) * (value.ndim - 2))


# --- pooling ----------------------------------------------------------------------------------------------------------


def _windows(node: Node, x: Any) -> tuple[Sizes, Sizes, Sizes, list[tuple[int, int]], list[int]]:
    """Window, strides, dilations, padding, and how much further the last windows reach in ceil mode."""
    window, sizes = node.get("kernel_shape"), x.shape[2:]
    strides, dilations = (node.get(name, (1,) * len(window)) for name in ("strides", "dilations"))
    pads = _paddings(node, sizes, window, strides, dilations)
    for size, length, dilation, (low, high) in zip(sizes, window, dilations, pads, strict=True):
        if max(low, high) >= length or (dilation > size and low + high):
            raise errors.ArgumentError(f"pads={pads} leave windows that hold padding alone")
    further = [0] * len(window)
    if node.flag("ceil_mode"):
        for axis, (low, high) in enumerate(pads):
            room = sizes[axis] + low + high - (window[axis] - 1) * dilations[axis] - 1
            steps = -(-room // strides[axis])
            if steps * strides[axis] >= sizes[axis] + low:  # a window must begin before the padding at the end
                steps -= 1
            further[axis] = max(steps * strides[axis] - room, 0)
    return window, strides, dilations, pads, further


def _reduced(
    x: Input,
    start: float,
    function: Callable,
    window: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
):
    front = (1, 1)
    return lax.reduce_window(
        x, start, function, (*front, *window), (*front, *strides), [(0, 0), (0, 0), *pads],
        window_dilation=(*front, *dilations),
    )  # fmt: skip


@operator("LpPool")
def _lp_pool(node: Node, x: Input):
    window, strides, dilations, pads, further = _windows(node, x)
    pads = [(low, high + more) for (low, high), more in zip(pads, further, strict=True)]
    return lp_norm(x, node.get("p", 2), lambda powers: _reduced(powers, 0.0, lax.add, window, strides, dilations, pads))


@operator("MaxPool")
def _max_pool(node: Node, x: Input):
    if node.outputs > 1:
        raise errors.ArgumentError("its second output, the places of the maxima, cannot be read")
    window, strides, dilations, pads, further = _windows(node, x)
    pads = [(low, high + more) for (low, high), more in zip(pads, further, strict=True)]
    return _reduced(x, -jnp.inf, lax.max, window, strides, dilations, pads)


@operator("AveragePool")
def _average_pool(node: Node, x: Input):
    window, strides, dilations, pads, further = _windows(node, x)
    reached = [(low, high + more) for (low, high), more in zip(pads, further, strict=True)]
    total = _reduced(x, 0.0, lax.add, window, strides, dilations, reached)
    return total / _counts(x.shape[2:], window, strides, dilations, pads, further, node.flag("count_include_pad"))


def _counts(
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    further: Sequence[int],
    with_padding: bool,
) -> np.ndarray:
    """How many entries each window averages: an outer product of the axes' counts."""
    counts = np.ones((), np.float32)
    for axis, (low, high) in enumerate(pads):
        counted = np.concatenate(
            [np.full(low, with_padding), np.ones(sizes[axis]), np.full(high, with_padding), np.zeros(further[axis])]
        )
        reach = (window[axis] - 1) * dilations[axis]
        starts = range(0, counted.size - reach, strides[axis])
        sums = [counted[start : start + reach + 1 : dilations[axis]].sum() for start in starts]
        counts = np.multiply.outer(counts, np.array(sums, np.float32))
    return counts
