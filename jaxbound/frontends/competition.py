"""The verification competition's form: an ONNX network and a VNN-LIB property, a time limit, and a file of results.

Reference: Brix, Bak, Johnson and Wu 2024, "The fifth international verification of neural networks competition
(VNN-COMP 2024): summary and results", section 2.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbound import errors
from jaxbound.certificates.properties import Property
from jaxbound.frontends import onnx, queries, vnnlib
from jaxbound.network.model import Model
from jaxbound.regions import Box
from jaxbound.search import Verdict, verify

ANSWERS = {"verified": "unsat", "falsified": "sat"}
"""What the competition calls a verdict."""
STRICT = "nothing is claimed: a counterexample is one only if strict comparisons count as non-strict"
SPARE = 0.5
"""Seconds kept back of every timeout, for what follows the search."""


def decide(
    network: str | Path | Callable,
    prop: str | Path,
    timeout: float | None,
    *,
    started: float | None = None,
    **options: Any,
) -> Verdict:
    """Decide an instance; loading and compiling count.

    Args:
        network: an ONNX file, or what `verify` takes, with flat inputs.
        prop: a VNN-LIB file.
        timeout: seconds, or None for no limit.
        started: when they began, by `time.monotonic`; now by default.
        options: of `verify`.

    Raises:
        JaxboundError: a file cannot be read, or the network cannot be bounded.
    """
    started = time.monotonic() if started is None else started
    fn = network if callable(network) else onnx.load(network)
    (regions, wanted), text = vnnlib.load(prop), vnnlib.text_of(prop)
    declared = vnnlib.declared_network(text)
    if declared is not None and isinstance(fn, Model):
        queries.check_network(declared, fn)
    check_inputs(fn, regions)
    left = None if timeout is None else max(0.0, timeout - SPARE - (time.monotonic() - started))
    verdict = verify(fn, regions, wanted, timeout=left, **options)
    point, outputs = verdict.counterexample, verdict.outputs
    if point is None or outputs is None or vnnlib.satisfied(text, point, outputs):
        return verdict
    return dataclasses.replace(verdict, status="unknown", counterexample=None, outputs=None, guarantee=STRICT)


def check_inputs(fn: Callable, regions: Sequence[Box]) -> None:
    """That a network takes the inputs that a property speaks of.

    Raises:
        ArgumentError: it does not.
    """
    count = np.size(regions[0].lower)
    if isinstance(fn, Model) and math.prod(fn.flat.input_shape) != count:
        raise errors.argument("prop", f"speaks of {count} inputs; the network takes {fn.input_shape}")
    if not isinstance(fn, Model):
        try:
            jax.eval_shape(fn, jax.ShapeDtypeStruct((count,), float))
        except (TypeError, ValueError) as fault:
            raise errors.argument("prop", f"speaks of {count} inputs; the network refuses them ({fault})") from fault


def results(verdict: Verdict, *, timed_out: bool = False) -> str:
    """The text of a file of results: sat with a counterexample, unsat, timeout or unknown.

    Args:
        verdict: what `verify` found.
        timed_out: whether an unknown verdict is one for want of time.

    >>> point = np.float32([0.5, -1.0]), np.float32([0.25])
    >>> print(results(Verdict("falsified", *point, -0.25, 1, 0.1, "as executed")), end="")
    sat
    ((X_0 0.5)
    (X_1 -1.0)
    (Y_0 0.25))
    """
    if verdict.status != "falsified":
        return f"{ANSWERS.get(verdict.status, 'timeout' if timed_out else 'unknown')}\n"
    lines = [
        f"({letter}_{k} {float(value)!r})"
        for letter, values in (("X", verdict.counterexample), ("Y", verdict.outputs))
        for k, value in enumerate(np.ravel(np.asarray(values)))
    ]
    return "sat\n(" + "\n".join(lines) + ")\n"


def is_about(proof: Any, regions: Sequence[Box], prop: Property) -> bool:
    """Whether a proof's regions and property are these, number by number."""

    def numbers(boxes: Sequence[Box], wanted: Any):
        return [np.asarray(leaf) for leaf in jax.tree.leaves((list(boxes), wanted))]

    ours, theirs = numbers(regions, prop), numbers(proof.regions, proof.prop)
    same_tree = jax.tree.structure((list(regions), prop)) == jax.tree.structure((list(proof.regions), proof.prop))
    return same_tree and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
