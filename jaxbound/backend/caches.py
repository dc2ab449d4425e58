"""What is kept between calls, all of it in this one list, so that it can be let go."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax

_CACHES: list = []


def kept(size: int) -> Callable:
    """`functools.lru_cache` whose entries `clear_caches` drops."""

    def wrap(function: Callable) -> Callable:
        cached = functools.lru_cache(maxsize=size)(function)
        _CACHES.append(cached)
        return cached

    return wrap


def once_per_array(function: Callable[[jax.Array], bool]) -> Callable[[jax.Array], bool]:
    """A function that is asked once about an array, which never changes, for as long as that lives."""
    known: dict[int, tuple[weakref.ref, bool]] = {}

    @functools.wraps(function)
    def call(array: jax.Array) -> bool:
        key = id(array)
        if key not in known or known[key][0]() is not array:
            known[key] = weakref.ref(array, lambda _: known.pop(key, None)), function(array)
        return known[key][1]

    return call


class Recent:
    """The most recently used entries of a dictionary."""

    def __init__(self, size: int):
        self.size, self.entries = size, {}
        _CACHES.append(self)

    def get(self, key: Hashable):
        """The value at a key, or None."""
        if key in self.entries:
            self.entries[key] = self.entries.pop(key)
        return self.entries.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value, and drop the one that was not used for longest."""
        self.entries[key] = value
        if len(self.entries) > self.size:
            del self.entries[next(iter(self.entries))]

    def drop(self, key: Hashable) -> None:
        """Forget one entry."""
        self.entries.pop(key, None)

    def cache_clear(self) -> None:
        """Drop all entries."""
        self.entries.clear()


def clear_caches() -> None:
    """Drop the graphs and compiled programs that jaxbound keeps between calls, as `jax.clear_caches` does for JAX.

    For long processes that bound many different networks, and for a function that closes over something that changed
    since it was traced. The next call traces and compiles anew; no result changes. Programs on disk
    (`compilation_cache`) stay, and so do proofs about scalar functions, which are small.

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> box = jb.Box(jnp.zeros(1), jnp.ones(1))
    >>> before = jb.bound(jnp.tanh, jb.IBP())(box).upper
    >>> jb.clear_caches()
    >>> bool(jb.bound(jnp.tanh, jb.IBP())(box).upper == before)
    True
    """
    for cache in _CACHES:
        cache.cache_clear()
