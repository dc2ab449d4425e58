"""The batches of a data set: their regions, their margins, and the network's own values there."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.backend.caches import kept
from jaxbound.certificates.margins import margin_bounds, margin_spec
from jaxbound.methods import Forward, Method
from jaxbound.network import inputs
from jaxbound.network.functions import on_batch
from jaxbound.network.inputs import Clip, Inputs, leaves_of, radii, region_around
from jaxbound.network.problems import bytes_of, problem_of
from jaxbound.network.resolving import Network
from jaxbound.regions import LpBall, is_region

_LARGEST_BATCH, _ROWS = 256, 256  # the automatic batch leaves room for so many rows of coefficients


class Work(NamedTuple):
    """Checked arguments; the whole data set stays on the host."""

    program: str
    """The digest of the network's program."""
    inputs: Inputs
    labels: np.ndarray
    logits: jax.ShapeDtypeStruct
    method: Method
    memory_limit: int | None
    outward: bool | str


def host_inputs(network: Network, x: ArrayLike | Inputs, eps: Any, norm: float, clip: Clip) -> Inputs:
    """The regions of all examples, as NumPy arrays; an empty one is no error, its example is just not verified."""
    refuse_half_precision("params", [jnp.result_type(leaf) for leaf in jax.tree.leaves(network.variables)])
    if not inputs.is_several(x):
        return _host_input(network, x, eps, norm, clip)
    found = []
    for _, leaf, own in inputs.paired(x, eps):
        around = (own, norm, clip) if own is not None else (None, math.inf, None)
        constant = own is None and not is_region(leaf)
        found.append(np.asarray(leaf) if constant else _host_input(network, leaf, *around))
    inputs.check_batch(found)
    if not any(map(is_region, [*found, *leaves_of(network.variables)])):
        raise errors.argument("eps", "is None and x holds no region", "pass a radius, or one per input")
    return jax.tree.unflatten(jax.tree.structure(x, is_leaf=is_region), found)


def _host_input(network: Network, x: Any, eps: Any, norm: float, clip: Clip) -> Any:
    fixed = eps is None and not is_region(x) and any(map(is_region, leaves_of(network.variables)))
    if not is_region(x):
        inputs.check_types(x, 0.0 if fixed else eps)
        x = np.asarray(x)
    around = functools.partial(region_around, network.variables, norm=norm, clip=clip, batched=network.batched)
    traced: Any = jax.eval_shape(around, x, eps)  # every check that needs no values
    refuse_half_precision("x", [inputs.struct_of(x).dtype])
    if fixed:
        return x
    if is_region(x) and not isinstance(x, LpBall):
        return jax.tree.map(np.asarray, x)
    ball: LpBall = x if isinstance(x, LpBall) else _ball(x, eps, norm, clip, traced.batch_ndim)
    radius = np.asarray(ball.radius)
    if not np.all(radius >= 0):
        raise errors.argument("eps", f"holds {radius[~(radius >= 0)].flat[0]}", "pass radii of 0 or more")
    center = np.asarray(ball.center, traced.center.dtype)
    return dataclasses.replace(ball, center=center, radius=_rounded_up(radius, center.dtype))


def _ball(x: Any, eps: Any, norm: float, clip: Clip, batch_ndim: int) -> LpBall:
    return LpBall(x, radii(eps, x.shape, batched=batch_ndim == 1), norm, clip=clip, batch_ndim=batch_ndim)


def refuse_half_precision(name: str, dtypes: list) -> None:
    """Refuse dtypes whose rounding no certificate survives."""
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise errors.argument_type(
                name, f"hold {dtype}, too coarse to certify", "cast to float32, and certify that"
            )


def _rounded_up(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
        return np.where(narrow < values, np.nextafter(narrow, np.asarray(np.inf, dtype)), narrow)


def automatic_batch_size(
    network: Network, given: Inputs, logits: jax.ShapeDtypeStruct, method: Method, memory_limit: int | None
) -> int:
    """As many examples as leave room for a useful number of rows each; forward bounds carry one per input."""
    if method.searches:
        return 1
    spec = margin_spec(np.zeros(1, int), logits.shape[0]).astype(logits.dtype)
    problem = problem_of(network, rows_of(given, np.zeros(1, int)), spec)
    largest = max(node.op.size * node.op.dtype.itemsize for node in problem.graph.nodes)
    parts = jax.tree.leaves(method, is_leaf=lambda part: isinstance(part, Forward))
    forward = any(isinstance(part, Forward) for part in parts)
    rows = 6 * sum(regions.leaf_struct(leaf).size for leaf in problem.leaves) if forward else _ROWS
    return int(np.clip(bytes_of(memory_limit) // (3 * largest * rows), 1, _LARGEST_BATCH))


def rows_of(given: Inputs, index: np.ndarray) -> Inputs:
    """Some of the examples."""
    take = lambda leaf: regions.take(leaf, index) if is_region(leaf) else np.asarray(leaf)[index]  # noqa: E731
    return jax.tree.map(take, given, is_leaf=is_region)


def one_batch(work: Work, network: Network, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """What is known of some examples, with the network on some device.

    Margins, their rounding, whether predictions are right, and counterexamples (flat, NaN where there is none).
    """
    given, labels = rows_of(work.inputs, index), work.labels[index]
    bounds = margin_bounds(network, given, labels, work.logits, work.method, work.memory_limit, outward=work.outward)
    lower, error = np.asarray(bounds.lower), np.asarray(bounds.lower_rounding)
    logits, inside = _predictions(network, work.program, given)
    check_values(repr(work.method), labels, inside, lower, error, int(index[0]))
    correct = _are_correct(logits, labels)
    points = _counterexamples(work, network, bounds.point, labels, np.all(lower > error, axis=1))
    return lower, error, correct, points


def _are_correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the label's logit is the only largest one."""
    is_label = np.arange(logits.shape[1]) == labels[:, None]
    return logits[is_label] > np.where(is_label, -np.inf, logits).max(axis=1)


def _counterexamples(work: Work, network: Network, points: Any, labels: np.ndarray, verified: np.ndarray) -> np.ndarray:
    """The points of a search at which the network itself gives another class, or a tie; flat, the others NaN."""
    if points is None:
        return np.zeros((len(labels), 0), work.logits.dtype)
    points = np.array(points)
    known = np.isfinite(points.reshape(len(labels), -1)).all(axis=1) & ~verified
    points[~known] = 0
    logits = np.array(_predict(network, work.program)(inputs.evaluated_at(network.variables), points))
    points[~known | _are_correct(logits, labels) | ~np.isfinite(logits).all(axis=1)] = np.nan
    return points.reshape(len(labels), -1)


def _predict(network: Network, program: str) -> Callable:
    try:
        return _compiled_prediction(network.function, program)
    except TypeError:  # an unhashable callable runs uncompiled
        return on_batch(network.function)


def check_values(
    method: str, labels: np.ndarray, logits: np.ndarray, lower: np.ndarray, error: np.ndarray, first: int = 0
):
    """Hold a network's own margins at points of its regions against their bounds: a check that costs a forward pass.

    A margin may be below its bound by the rounding of the bound, by as much again, and by 1e-4 of the example's largest
    logit, for what the network's own evaluation rounds.

    Args:
        method: what gave the bounds, for the message.
        labels: int (batch,).
        logits: (batch, classes), each at a point of the example's region; what is not finite is not checked.
        lower, error: (batch, classes - 1), bounds and how much of each may be rounding.
        first: the first example's number.

    Raises:
        SoundnessError: with the likely causes.

    >>> check_values("IBP()", np.array([0]), np.array([[2.0, 1.0]]), np.array([[0.5]]), np.array([[0.0]]))
    """
    rows = np.arange(len(labels))[:, None]
    with np.errstate(all="ignore"):
        others = np.arange(lower.shape[1])
        own = logits[rows, labels[:, None]] - logits[rows, others + (others >= labels[:, None])]
        room = 2 * error + 1e-4 * np.abs(logits).max(axis=1, keepdims=True)
        wrong = np.isfinite(own) & np.isfinite(lower) & (own < lower - room)
    broken = np.flatnonzero(wrong.any(axis=1))
    if broken.size:
        k = broken[0], np.argmax(wrong[broken[0]])
        raise errors.value_outside(method, (first + broken).tolist(), float(lower[k]), float(own[k]))


def _predictions(network: Network, program: str, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The logits at the examples themselves, and at points of their regions (NaN where none is known)."""
    predict = _predict(network, program)
    points, inside = (
        inputs.evaluated_at((network.variables, given), point) for point in (regions.middle, regions.inside)
    )
    logits = np.array(predict(*points))
    leaves = zip(jax.tree.leaves(points), jax.tree.leaves(inside), strict=True)
    same = all(a is b or np.array_equal(a, b, equal_nan=True) for a, b in leaves)
    return logits, logits.copy() if same else np.array(predict(*inside))


@kept(64)
def _compiled_prediction(function: Callable, _program: str) -> Callable:
    """Compiled anew where the function's program is another one than before."""
    return _compat.eager_jit(on_batch(function))
