"""What methods share once inputs of nonlinearities are bounded: a pass from a node, as numbers or linear functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxbound import regions
from jaxbound.driver import Run, steps
from jaxbound.methods.base import Bounded, Ends, Request, better, of_ends
from jaxbound.relaxations import coefficients


def tighten_prefix(run: Run, number: int) -> Run:
    """An affine image of the region is bounded by its dual norm."""
    if run.graph.nodes[number].affine_in_region and not run.exact(number):
        return run.tighten(number, skip_exact=False)
    return run


def bound_by_pass(run: Run, number: int, request: Request, *, known: bool = False) -> Bounded:
    """A backward pass from one node, and maybe the better of this and what is known.

    No other pass has as many rows, so that its steps would be compiled for it alone: where they carry all rows at once
    they are one program, unless there are convolutions (`driver.stages` says what these cost in one).
    """
    nodes = run.graph.nodes
    rows = nodes[number].op.size * (2 if request.sides == "both" else 1)
    at_once = rows <= run.max_rows and all(node.op.name != "conv_general_dilated" for node in nodes)
    static = number, request, run.max_rows, known
    return (run.together(_pass, static) if at_once else _pass(run, static))[1]


def _pass(run: Run, static: tuple[int, Request, int, bool]) -> tuple[Run, Bounded]:
    number, request, max_rows, known = static
    run = replace(run, max_rows=max_rows)
    found, rounding = run.bound_node(number, sides=request.sides)
    return run, run.call(_finish, request, ((), ()), found, rounding, run.ends[number] if known else None, run.void)


def _finish(
    request: Request, _constants: Sequence, found: Any, rounding: Ends, known: Ends | None, void: jax.Array
) -> Bounded:
    """Ends that rounding put in the wrong order are swapped."""
    (low, high), (low_error, high_error) = found, rounding
    result = Bounded(low, None, low_error, high_error)
    if request.sides == "both":
        swapped = low > high
        result = Bounded(
            jnp.where(swapped, high, low), jnp.where(swapped, low, high),
            jnp.where(swapped, high_error, low_error), jnp.where(swapped, low_error, high_error),
        )  # fmt: skip
    return result if known is None else better(result, of_ends(steps.unless_void(None, (), known, void), request))


def linear_functions(run: Run, number: int) -> tuple:
    """The linear functions of one node: a pass that stops at the region."""
    op = run.graph.nodes[number].op
    static = op.shape, tuple(regions.leaf_struct(leaf).shape for leaf in run.regions)
    rows, carry = run.pull_to_inputs(*run.start(number))
    return run.call(_split_sides, static, ((), ()), rows, carry.intercept)


def _split_sides(static: Any, _constants: Sequence, rows: Sequence, intercept: jax.Array):
    shape, leaf_shapes = static
    half = intercept.shape[0] // 2
    low, high = [], []
    for part, leaf in zip(rows, leaf_shapes, strict=True):
        values = jnp.zeros((2 * half, *leaf), intercept.dtype) if part is None else coefficients.dense(part)
        low.append(values[:half].reshape(*shape, *leaf))
        high.append(-values[half:].reshape(*shape, *leaf))
    return tuple(low), intercept[:half].reshape(shape), tuple(high), -intercept[half:].reshape(shape)
