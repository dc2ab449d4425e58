"""Compiled programs on disk, so that the next process need not compile them again."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as _jax_cache


def compilation_cache(path: str | os.PathLike) -> None:
    """Keep compiled programs in a directory, for this process and later ones: JAX's persistent cache, for all programs.

    A first call then reads what an earlier process compiled on this kind of machine. By itself JAX keeps only programs
    that took a second to compile; jaxbound's are many and small. The setting holds for the user's programs as well.

    Args:
        path: the directory; it is made if it is not there. Entries are JAX's, safe to delete at any time.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> compilation_cache(directory)
    >>> jax.config.jax_compilation_cache_dir == directory
    True
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _jax_cache.reset_cache()  # where a program was compiled before, JAX has already settled for what was set then
