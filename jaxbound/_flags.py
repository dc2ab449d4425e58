"""The flag against XLA's miscompilation on CPU, set when jaxbound is imported; what it is about stands in `_compat`.

XLA reads its flags when the backend starts, so this comes before anything else, and imports no JAX.
"""

from __future__ import annotations

import os
import re
import sys

import jaxlib

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_SAFE_KINDS = frozenset({"", "individual_dot", "individual_convolution"})
AFFECTED = re.fullmatch(r"0\.10\.2(\W.*)?", jaxlib.__version__) is not None


def backend_started() -> bool:
    """Whether JAX has started a backend, after which XLA_FLAGS has no effect."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _fusion_kinds(flags: str) -> list[str] | None:
    """The value of the fusion flag in XLA_FLAGS, split at commas; None if the flag is not there."""
    values = re.findall(rf"(?:^|\s)-?{FLAG[1:]}=(\S*)", flags)
    return values[-1].lower().split(",") if values else None


def protects(flags: str) -> bool:
    """Whether XLA_FLAGS turns reduction fusions off."""
    kinds = _fusion_kinds(flags)
    return kinds is not None and ("-reduce" in kinds or _SAFE_KINDS.issuperset(kinds))


def with_flag(flags: str) -> str:
    """XLA_FLAGS with the guard, unless it already says something of its own or names a file of flags."""
    names_a_file = bool(flags.strip()) and not flags.lstrip().startswith("-")
    if names_a_file or _fusion_kinds(flags) is not None:
        return flags
    return f"{flags} {FLAG}=-reduce,-individual_convolution".strip()


IMPORTED_IN_TIME = not backend_started()
if AFFECTED and IMPORTED_IN_TIME:
    os.environ["XLA_FLAGS"] = with_flag(os.environ.get("XLA_FLAGS", ""))
