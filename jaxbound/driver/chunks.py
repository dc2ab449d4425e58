"""How many rows a pass carries: entries of a node in pieces that fit the memory limit and the processor's caches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import is_tracer

ROWS = 1024
"""The most rows that one step carries where no memory limit says otherwise."""
_PIECES, _FEWEST, _EXAMPLES, _CACHED = 16, 64, 8, 1 << 20
"""Chosen entries of a node are bounded by sixteenths of it, and not fewer than 64 at once: all by one program. Of more
than 8 examples each has as many fewer, down to where the coefficients of all are 2**20 numbers on a side: what a pass
holds stays in the processor's caches."""
_PER_PASS = 16
"""What a pass costs beside its rows, in rows."""


def at_once(size: int, examples: int) -> int:
    """How many chosen entries of a node are bounded at once."""
    most = max(-(-size // _PIECES), _FEWEST)
    return max(1, min(most, max(most * _EXAMPLES // examples, _CACHED // (examples * size))))


def cut(entries: jax.Array | np.ndarray, size: int, largest: int, most: int | None) -> list:
    """Which entries of a node each pass bounds: equal numbers, so that steps are shared; -1 makes an empty row.

    Args:
        entries: int32, ([batch,] count).
        size: of the node.
        largest: how many entries fit.
        most: how many to take; None for what divides the node best.
    """
    total = entries.shape[-1]
    width = _width(total, size, largest) if most is None else min(most, size, largest)
    if total % width:
        xp: Any = jnp if is_tracer(entries) else np
        padding = [(0, 0)] * (entries.ndim - 1) + [(0, -total % width)]
        entries = xp.pad(entries, padding, constant_values=-1)
    return [entries[..., first : first + width] for first in range(0, total, width)]


def _width(count: int, size: int, largest: int) -> int:
    """How many of `count` entries at once: a node's whole size or a half, quarter, ... of it, whichever costs least.

    There are few widths, so that not every count of rows compiles anew.
    """
    widths = [size]
    while widths[-1] >= _FEWEST:
        widths.append(-(-widths[-1] // 2))
    widths = [width for width in widths if width <= largest] or [largest]
    return min(widths, key=lambda width: -(-count // width) * (width + _PER_PASS))
