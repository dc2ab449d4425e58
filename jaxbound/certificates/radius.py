"""Certified radii: for every example the largest ball that a bracketing search could certify.

With m_j(r) the method's lower bound of the margin f_y - f_j over the ball of radius r, and e_j(r) a bound on its
rounding error, a radius *holds* if m_j(r) is finite and exceeds e_j(r) for every wanted class j. Each example has its
own bracket (see `bracketing`); what comes back is a radius at which the certificate itself was evaluated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors, regions
from jaxbound._compat import is_tracer, is_tracing
from jaxbound.backend.sharding import anywhere
from jaxbound.certificates import records
from jaxbound.certificates.batches import automatic_batch_size, refuse_half_precision, rows_of
from jaxbound.certificates.bracketing import search
from jaxbound.certificates.loops import Task, run
from jaxbound.certificates.margins import logits_struct, margin_spec
from jaxbound.certificates.records import Record
from jaxbound.methods import Bounded, Crown, Method, check_method, rounding_mode
from jaxbound.network import inputs
from jaxbound.network.bounding import outputs_of
from jaxbound.network.functions import on_batch
from jaxbound.network.inputs import Inputs, leaves_of, region_around, structs
from jaxbound.network.problems import example_of, problem_of, request_of
from jaxbound.network.resolving import Network, resolve
from jaxbound.transforms.problems import forget_stale

TARGETS = ("all", "runner-up", "least-likely", "random")
"""The names of what a certificate may be about; an array of classes is the other choice."""


@anywhere
def certified_radius(
    params: Any,
    x: ArrayLike | Inputs,
    labels: ArrayLike,
    *,
    targets: str | ArrayLike = "all",
    key: jax.Array | None = None,
    norm: float = math.inf,
    method: Method = Crown(),  # noqa: B008 - immutable
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    steps: int = 30,
    initial: ArrayLike = 0.05,
    tolerance: float = 1e-3,
    memory_limit: int | None = None,
    rounding: str | None = "outward",
    batch_size: int | None = None,
    results: str | os.PathLike | None = None,
    progress: bool = False,
) -> jax.Array:
    """The radius around every example that a method certifies, by bracketing and bisection of each on its own.

    `f_y(x') > f_j(x')` for y = labels[i], every wanted class j and every x' with `||x' - x[i]||_norm <= radius[i]` and
    `clip[0] <= x' <= clip[1]`, wherever `radius[i] > 0`. Works under `jit`, `vmap` and `pmap`;
    outside them, what apply_fn closes over counts as it is at the call, and a data set is searched as `certify` does:
    batch by batch, on all devices and processes.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: floating (float32 or float64), `(batch, *example shape)`; one example for a Dense chain; or a tuple, list or
            dict of arrays, of which all floating ones have a ball of the radius, and the others stay as they are.
        labels: true classes, int (batch,); () for one example.
        targets: the classes j: "all" but the label; "runner-up" or "least-likely", the largest or smallest other
            logit at x; "random", one by `key`; or int, of the labels' shape.
        key: for random targets; folded with each example's index.
        norm: p >= 1, `jnp.inf` included.
        method: how to bound; its guarantee is "certified".
        apply_fn: the network, `apply_fn(variables, batch)` -> (batch, classes); not needed for Dense layers.
        activation: between Dense layers, where there is neither apply_fn nor a module: no certificate guesses it.
        clip: None or `(low, high)`: the range of valid inputs.
        steps: the most radii that are evaluated per example.
        initial: the first one, () or (batch,), in the given norm.
        tolerance: an example is done when `failed - held <= tolerance * failed`.
        memory_limit: bytes that the coefficients of a backward pass may take.
        rounding: "outward" (or "exact") to demand margins above a bound on the rounding error of the computation;
            "execution" for those of the network as it runs; None for margins above 0 as computed.
        batch_size, results, progress: as for `certify`.

    Returns:
        (batch,), or () for one example, in the dtype of the computation: radii that were evaluated and held. 0 where
        the prediction is wrong or tied, or nothing held; where values are traced, also where x lies outside clip or a
        label or target is no class.

    Raises:
        ArgumentError: a method that gives estimates; malformed arguments, and concrete x outside clip, labels or
            targets out of range.
        ArgumentTypeError: integers as x; float16 or bfloat16 anywhere.

    Rounding: that of the certificates at this radius is covered (rounding="outward"); the radius is exact.

    Reference: Weng et al. 2018, section 4; Zhang et al. 2018, section 4 (binary search for the certified radius).

    >>> chain = [(jnp.eye(2), jnp.zeros(2))]
    >>> x, labels = jnp.array([[0.75, 0.25], [0.25, 0.75]]), jnp.array([0, 0])
    >>> certified_radius(chain, x, labels, activation="relu").round(2)
    Array([0.25, 0.  ], dtype=float32)
    """
    _check(x, method, targets, key, steps, initial, tolerance, rounding)
    network = resolve(params, x, apply_fn, activation, certificate="certified_radius", weights=True)
    single = not network.batched
    if single:
        network, x, labels, initial = network._replace(batched=True), _row(x), _row(labels), _row(initial)
        targets = targets if isinstance(targets, str) else _row(targets)
    batch = np.shape(jax.tree.leaves(x)[0])[:1]
    refuse_half_precision("params", [jnp.result_type(leaf) for leaf in jax.tree.leaves(network.variables)])
    refuse_half_precision("x", [jnp.result_type(leaf) for leaf in jax.tree.leaves(x)])
    if np.shape(labels) != batch:
        raise errors.argument("labels", f"have shape {np.shape(labels)}, not {batch}", "pass one class per example")
    given = region_around(network.variables, x, 0.0, norm, clip, batched=True)
    logits = logits_struct(network, given)
    if not is_tracing():
        forget_stale(network.function, structs(network.variables), example_of(network, given))
    margin_spec(labels, logits.shape[0])  # raises where a label is no class
    dtype = next(regions.leaf_struct(leaf).dtype for leaf in leaves_of(given) if regions.is_region(leaf))
    first = jnp.broadcast_to(jnp.asarray(initial, dtype), batch)
    how = _Search(method, memory_limit, rounding_mode(rounding), key, steps, tolerance)
    asked = [name for name, value in (("batch_size", batch_size), ("results", results)) if value is not None]
    asked += ["progress"] if progress else []
    if is_tracing() and asked:
        raise errors.argument(
            asked[0], "is given under a trace", "leave it out, or call certified_radius outside of it"
        )
    whole = is_tracing() or any(len(array.devices()) > 1 for array in jax.tree.leaves(given))
    if batch_size is None and not (whole and not asked):
        batch_size = automatic_batch_size(network, given, logits, method, memory_limit)
    if batch_size is None or not (asked or batch[0] > batch_size or jax.process_count() > 1):
        radius = _radii(how, network, given, jnp.asarray(labels), targets, first, jnp.arange(batch[0]))
        return radius[0] if single else radius
    if batch_size < 1:
        raise errors.argument("batch_size", f"is {batch_size}", "pass at least 1")
    arrays = jax.tree.map(np.asarray, (given, labels, targets, first))  # on the host

    def one(network: Network, index: np.ndarray) -> tuple[np.ndarray]:
        own, labels, first = rows_of(arrays[0], index), *(jnp.asarray(part[index]) for part in (arrays[1], arrays[3]))
        wanted = targets if isinstance(targets, str) else arrays[2][index]
        return (np.asarray(_radii(how, network, own, labels, wanted, first, jnp.asarray(index))),)

    size = min(batch_size, batch[0])
    options = norm, rounding, steps, tolerance, size, targets if isinstance(targets, str) else arrays[2], arrays[3]
    mark = functools.partial(
        records.fingerprint, network, arrays[0], arrays[1], method, "certified_radius", key, *options
    )
    empty = Record.empty(radius=np.zeros(0, dtype))
    shown = lambda done: f"mean radius {done.rows[0].mean():.4g}"  # noqa: E731
    task = Task("certified_radius", network, one, empty, batch[0], size, shown)
    radius = jnp.asarray(run(task, None if results is None else Path(results), mark, progress=progress).rows[0])
    return radius[0] if single else radius


class _Search(NamedTuple):
    """How radii are searched; the same for every example."""

    method: Method
    memory_limit: int | None
    rounding: bool | str
    key: jax.Array | None
    steps: int
    tolerance: float


def _radii(
    how: _Search,
    network: Network,
    given: Inputs,
    labels: jax.Array,
    targets: str | ArrayLike,
    first: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """The radii of some examples; `index` are their numbers in the data set."""
    given = jax.tree.map(regions.canonical, given, is_leaf=regions.is_region)
    spec = margin_spec(labels, logits_struct(network, given).shape[0])
    logits = jax.vmap(network.function, in_axes=(None, 0))(*inputs.evaluated_at((network.variables, given)))
    if not (isinstance(targets, str) and targets == "all"):
        spec = _targeted(spec, labels, _classes(targets, logits, labels, how.key, index))
    problem = problem_of(network, given, spec.astype(logits.dtype), rounding=bool(how.rounding))
    request = request_of(problem, how.memory_limit, sides="lower", rounding=how.rounding)._replace(target=0.0)
    fixed = sum(map(regions.is_region, leaves_of(network.variables)))  # weights that vary, whatever the radius
    believed: list[tuple[jax.Array, Bounded]] = []

    def holds(radius: jax.Array) -> jax.Array:
        balls = [dataclasses.replace(ball, radius=radius) for ball in problem.leaves[fixed:]]
        moved = problem._replace(leaves=(*problem.leaves[:fixed], *balls))
        (found,) = outputs_of(moved, how.method, request)
        verified = jnp.all(jnp.isfinite(found.lower) & (found.lower > found.lower_rounding), axis=-1)
        believed.append((verified & possible, found))
        return verified

    empty = [jax.vmap(regions.is_empty)(leaf) for leaf in problem.leaves]
    possible = _is_correct(logits, labels) & ~functools.reduce(jnp.logical_or, empty)
    radius = search(holds, possible, first, how.steps, how.tolerance)
    if not is_tracing():
        _check_values(repr(how.method), network, given, spec, believed, np.asarray(index))
    return radius


def _check_values(
    method: str, network: Network, given: Inputs, spec: jax.Array, believed: list, index: np.ndarray
) -> None:
    """Hold the network's own margins at the centers, a batch at once, against bounds (see `batches.check_values`).

    Raises:
        SoundnessError: with the likely causes.
    """
    points = inputs.evaluated_at((network.variables, given), regions.inside)
    logits = np.asarray(on_batch(network.function)(*points))
    with np.errstate(all="ignore"):
        own = np.einsum("...sc,...c->...s", np.asarray(spec), logits)
        for verified, found in believed:
            lower, error = np.asarray(found.lower), np.asarray(found.lower_rounding)
            room = 2 * error + 1e-4 * np.abs(logits).max(axis=1, keepdims=True)
            wrong = np.asarray(verified)[:, None] & (own < lower - room)
            broken = np.flatnonzero(wrong.any(axis=1))
            if broken.size:
                k = broken[0], np.argmax(wrong[broken[0]])
                raise errors.value_outside(method, index[broken].tolist(), float(lower[k]), float(own[k]))


# --- what the certificate is about ------------------------------------------------------------------------------------


def _classes(
    targets: str | ArrayLike, logits: jax.Array, labels: jax.Array, key: jax.Array | None, index: jax.Array
) -> jax.Array:
    """One other class per example."""
    count = logits.shape[1]
    is_label = jnp.arange(count) == labels[:, None]
    if not isinstance(targets, str):
        _check_targets(targets, labels, count)
        return jnp.asarray(targets)
    if targets == "runner-up":
        return jnp.argmax(jnp.where(is_label, -jnp.inf, logits), axis=1)
    if targets == "least-likely":
        return jnp.argmin(jnp.where(is_label, jnp.inf, logits), axis=1)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(index)  # pyright: ignore[reportArgumentType]
    drawn = jax.vmap(lambda own: jax.random.randint(own, (), 0, count - 1))(keys)
    return drawn + (drawn >= labels)


def _targeted(spec: jax.Array, labels: jax.Array, classes: jax.Array) -> jax.Array:
    """The rows of `margin_spec` for one class each, (batch, 1, classes); NaN where it is the label or no class."""
    count = spec.shape[-1]
    valid = (classes >= 0) & (classes < count) & (classes != labels)
    row = jnp.clip(classes - (classes > labels), 0, count - 2)
    chosen = jnp.take_along_axis(spec, row[:, None, None], axis=1)
    return jnp.where(valid[:, None, None], chosen, jnp.nan)


def _is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the label's logit is the only largest one; never where the label is no class or a logit is NaN."""
    is_label = jnp.arange(logits.shape[1]) == labels[:, None]
    true = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
    return jnp.any(is_label, axis=1) & (true > jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=1))


# --- checks -----------------------------------------------------------------------------------------------------------


def _row(value: Any):
    """With a batch axis of one."""
    return (value if is_tracer(value) else np.asarray(value))[None]


def _check(
    x: ArrayLike | Inputs,
    method: Method,
    targets: str | ArrayLike,
    key: jax.Array | None,
    steps: int,
    initial: ArrayLike,
    tolerance: float,
    rounding: str | None,
) -> None:
    check_method("method", method)
    if method.guarantee != "certified":
        raise errors.estimate_refused(type(method).__name__)
    if any(map(regions.is_region, leaves_of(x))):
        raise errors.argument("x", "is a region", "pass points: the radius around each of them is searched")
    if not jax.tree.leaves(x):
        raise errors.argument_type("x", f"is {x!r}", "pass an array of points, or several")
    if inputs.is_several(x) and not any(own is not None for _, _, own in inputs.paired(x, 0.0)):
        raise errors.argument_type("x", "holds no floating input", "pass one around which the radius is searched")
    if isinstance(targets, str):
        if targets not in TARGETS:
            raise errors.unknown_option("targets", targets, TARGETS)
        if targets == "random" and key is None:
            raise errors.argument("key", "is None", 'pass a PRNG key such as jax.random.key(0) for targets="random"')
    if not isinstance(steps, int) or steps < 1:
        raise errors.argument("steps", f"is {steps!r}", "pass how many radii to evaluate at most, 1 or more")
    if not is_tracer(initial) and not (np.all(np.isfinite(initial)) and np.all(np.asarray(initial) > 0)):
        raise errors.argument("initial", f"is {initial}", "pass finite radii above 0")
    if not is_tracer(tolerance) and not tolerance >= 0:
        raise errors.argument("tolerance", f"is {tolerance}", "pass a relative width of 0 or more")
    rounding_mode(rounding)


def _check_targets(targets: ArrayLike, labels: jax.Array, count: int) -> None:
    if np.shape(targets) != labels.shape:
        raise errors.argument("targets", f"have shape {np.shape(targets)}, not {labels.shape}", "pass one per example")
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise errors.argument_type("targets", f"are {jnp.result_type(targets)}", "pass class indices as integers")
    if is_tracer(targets):
        return
    given = np.asarray(targets)
    if np.any((given < 0) | (given >= count)):
        wrong = given[(given < 0) | (given >= count)][0]
        raise errors.argument("targets", f"hold {wrong}", f"classes are numbered 0..{count - 1}")
    if not is_tracer(labels) and np.any(given == np.asarray(labels)):
        raise errors.argument("targets", "hold an example's own label", "pass other classes")
