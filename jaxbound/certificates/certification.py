"""Certificates: lower bounds of margins, and how many examples they verify.

For an example with true class y, logits f and a region R around it, the margin to class j is f_y - f_j. With

    m_j  <=  min over x' in R of  f_y(x') - f_j(x')       for every j != y,

no point of R changes the class where every m_j > 0. Margins are linear in the logits, so a specification matrix
(`margin_spec`) is composed with the network's last affine map, and they are bounded directly, not as differences.

`margins` is a pure function, for any trace. `certify` is its host loop: batches of one size (the last one padded), so
that memory is bounded and nothing compiles twice, partial results on disk (`records`), and strict arithmetic: with
rounding="outward" a bound e_j on the rounding error of the whole computation goes with each m_j, and

    verified  =  m_j > e_j for every j, in comparisons that NaN fails.

Nothing is clamped to look consistent: where an attack breaks a verified example, `check_against_attack` raises.

Length: the second half is the host's side of one batch, which only `certify` uses; its disk and screen are `records`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.certificates import records
from jaxbound.certificates.attack import Attack
from jaxbound.network.functions import on_batch
from jaxbound.methods import Forward, Method, rounding_mode
from jaxbound.network import (
    MEMORY_LIMIT,
    Network,
    check_types,
    example_of,
    output_struct,
    outputs_of,
    problem_of,
    radii,
    region_around,
    request_of,
    resolve,
)
from jaxbound.backend.programs import Traced
from jaxbound.certificates.records import Record
from jaxbound.regions import Box, LpBall, Region, is_region
from jaxbound.certificates.report import Report, remarks
from jaxbound.backend.sharding import anywhere
from jaxbound.transforms.transform import forget_stale

_LARGEST_BATCH, _ROWS = 256, 256  # the automatic batch leaves room for so many rows of coefficients


# --- margins ----------------------------------------------------------------------------------------------------------


def margin_spec(labels: ArrayLike, num_classes: int) -> jax.Array:
    """The specification of margins: rows e_y - e_j for every class j but the label y, j ascending.

    `margin_spec(y, C) @ logits` is `logits[y] - logits[j]`.

    Args:
        labels: true classes, int, (batch,) or ().
        num_classes: the number of logits, at least 2.

    Returns:
        float32, (batch, num_classes - 1, num_classes), without the batch axis for one label.

    Raises:
        ArgumentTypeError: labels that are no integers.
        ArgumentError: fewer than two classes, or a label out of range. Where labels are traced, the rows of such a
            label are NaN, so that its bounds are -inf.

    Rounding: exact.

    >>> margin_spec(jnp.array([1]), 3)
    Array([[[-1.,  1.,  0.],
            [ 0.,  1., -1.]]], dtype=float32)
    """
    if num_classes < 2:
        raise errors.argument("num_classes", f"is {num_classes}", "margins need two classes at least")
    if not _compat.is_tracer(labels):
        given = np.asarray(labels)
        wrong = given[(given < 0) | (given >= num_classes)]
        if wrong.size:
            raise errors.argument("labels", f"hold {wrong[0]}", f"classes are numbered 0..{num_classes - 1}")
    true = jnp.asarray(labels)[..., None, None]
    if not jnp.issubdtype(true.dtype, jnp.integer):
        raise errors.argument_type("labels", f"are {true.dtype}", "pass class indices as integers")
    return _margin_rows(true, num_classes)


@functools.partial(_compat.eager_jit, static_argnums=1)
def _margin_rows(true: jax.Array, num_classes: int) -> jax.Array:
    row, column = jnp.arange(num_classes - 1)[:, None], jnp.arange(num_classes)[None]
    other = row + (row >= true)
    rows = (column == true).astype(jnp.float32) - (column == other)
    return jnp.where((true >= 0) & (true < num_classes), rows, jnp.nan)


@anywhere
def margins(
    params,
    x: ArrayLike | Region,
    labels: ArrayLike,
    eps: ArrayLike | None = None,
    *,
    method: Method,
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    norm: float = math.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    memory_limit: int | None = None,
) -> jax.Array:
    """Lower bounds of the margins f_y - f_j over a ball around every example: what certificates and losses are made of.

    `margins[i, k] <= f_y(x') - f_j(x')` for every x' with `||x' - x[i]||_norm <= eps` and `clip[0] <= x' <= clip[1]`,
    y = labels[i] and j the k-th class that is not y. A plain JAX function for `jit`, `vmap`, `grad` and `pmap`.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: floating, `(batch, *example shape)`; one example for a Dense chain; or a region, and then no eps.
        labels: true classes, int (batch,); () for one example.
        eps: radius in the given norm, shape () or (batch,); for norm=inf also per feature or channel, with as many
            axes as x.
        method: how to bound, e.g. `jaxbound.Crown()`.
        apply_fn: the network, `apply_fn(variables, batch)` -> (batch, classes); not needed for Dense layers.
        activation: between Dense layers where there is no apply_fn; ReLU, with a warning, if it is not given.
        norm: p >= 1, `jnp.inf` included.
        clip: None or `(low, high)`: the range of valid inputs.
        memory_limit: bytes that the coefficients of a backward pass may take.

    Returns:
        (batch, classes - 1), j ascending; -inf where a region is empty, a label out of range or a bound undefined.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: with what to do instead; values are checked where concrete.

    Rounding: up to that of the computation; `certify` bounds it.

    Reference: Wong and Kolter 2018, section 3.2; Zhang et al. 2020, section 3.1 (the specification matrix C).

    >>> from jaxbound import IBP
    >>> layers = [(jnp.eye(2), jnp.zeros(2))]
    >>> margins(layers, jnp.array([[0.75, 0.25]]), jnp.array([0]), 0.125, method=IBP(), activation="relu").round(3)
    Array([[0.25]], dtype=float32)
    """
    _check_method(method)
    network = resolve(params, x, apply_fn, activation)
    region = region_around(network.variables, x, eps, norm, clip, batched=network.batched)
    logits = logits_struct(network, region)
    return _lower_bounds(network, region, labels, logits, method, memory_limit, outward=False)[0]


def _lower_bounds(
    network: Network, region: Region, labels: ArrayLike, logits, method: Method, memory_limit, *, outward: bool | str
) -> tuple[jax.Array, jax.Array]:
    """Lower bounds of margins, not widened, and their rounding errors."""
    batch = regions.leaf_struct(region).shape[:1] if network.batched else ()
    if np.shape(labels) != batch:
        raise errors.argument("labels", f"have shape {np.shape(labels)}, not {batch}", "pass one class per example")
    spec = margin_spec(labels, logits.shape[0]).astype(logits.dtype)
    problem = problem_of(network, region, spec, rounding=bool(outward))
    (found,) = outputs_of(problem, method, request_of(problem, memory_limit, sides="lower", rounding=outward))
    empty = _are_empty(regions.per_example(region)) if network.batched else regions.is_empty(region)
    return jnp.where(empty[..., None], -jnp.inf, found.lower), found.lower_rounding


@_compat.eager_jit
def _are_empty(stacked: Region) -> jax.Array:
    return jax.vmap(regions.is_empty)(stacked)


def logits_struct(network: Network, region: Region) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one example's logits."""
    logits = output_struct(network, region)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 1:
        kind = type(logits).__name__ if shape is None else f"an array of shape {shape}"
        raise errors.ArgumentError(f"the network gives {kind} for one example, but margins need a vector of logits")
    return logits


def _check_method(method: object) -> None:
    if not isinstance(method, Method):
        raise errors.argument_type("method", f"is {method!r}", "pass a method object such as jaxbound.Crown()")


# --- certificates -----------------------------------------------------------------------------------------------------


def certify(
    params,
    x: ArrayLike | Region,
    labels: ArrayLike,
    eps: ArrayLike | None = None,
    *,
    method: Method,
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    norm: float = math.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    rounding: str | None = "outward",
    results: str | os.PathLike | None = None,
    progress: bool = False,
) -> Report:
    """Certify a data set, batch by batch: which examples keep their class over a ball around them.

    Where `report.verified[i]`, `argmax f(x') == labels[i]` for every x' with `||x' - x[i]||_norm <= eps` and
    `clip[0] <= x' <= clip[1]`.

    What apply_fn closes over counts as it is at the call. The data set stays on the host. All local devices share the
    work, each on batches of its own, unless `jax.default_device` names one or parameters are split over several.

    Args:
        params, x, labels, eps, apply_fn, activation, norm, clip: as for `margins`, with N examples, in float32 or
            float64; Dense layers without apply_fn want activation, since no certificate guesses the network.
        method: how to bound; its guarantee is "certified".
        batch_size: examples at once on a device; by default what fits into the memory limit, at most 256.
        memory_limit: bytes that the coefficients of a backward pass may take, per device.
        rounding: "outward" (or "exact") to demand margins above a bound on the rounding error of the computation;
            "execution" for margins of the logits that the network gives when it runs (docs/guarantee.md); None for
            margins above 0 as computed.
        results: a file for partial results, written after every batch. A later call with the same arguments continues
            after the last finished batch (functions inside a method count by their names).
        progress: show a bar (tqdm, or lines where it is not installed) on the standard error.

    Returns:
        A `Report`. An example whose region is empty is not verified.

    Raises:
        HostLoopError: under `jit`, `vmap`, `grad` or `pmap`; `margins` works there.
        ArgumentTypeError: integers as x; float16 or bfloat16 anywhere, whose rounding no certificate survives.
        ArgumentError: a method that gives estimates, malformed arguments, or a results file of another computation.

    Rounding: bounded, and demanded of every margin, for exact arithmetic on the given parameters (rounding="outward").

    Reference: Zhang et al. 2018, section 4; for the rounding Higham 2002, section 3.5.

    >>> from jaxbound import IBP
    >>> layers = [(jnp.eye(2), jnp.zeros(2))]
    >>> x, labels = jnp.array([[0.75, 0.25], [0.5, 0.25]]), jnp.array([0, 0])
    >>> certify(layers, x, labels, 0.125, method=IBP(), activation="relu").verified
    array([ True, False])
    """
    _check_certified(method)
    mode = rounding_mode(rounding)
    labels = np.asarray(labels)
    network = resolve(params, x, apply_fn, activation, certificate="certify")
    region = _host_region(network, x, eps, norm, clip)
    if not network.batched:
        network, region, labels = network._replace(batched=True), _with_batch_axis(region), labels[None]
    total = regions.leaf_struct(region).shape[0]
    if total == 0 or labels.shape != (total,):
        raise errors.argument("labels", f"have shape {labels.shape} for {total} examples", "pass one class per example")
    logits = logits_struct(network, region)
    forget_stale(network.function, network.variables, example_of(network, region))
    margin_spec(labels, logits.shape[0])  # raises where a label is no class
    if batch_size is None:
        batch_size = _automatic_batch_size(network, region, logits, method, memory_limit)
    if batch_size < 1:
        raise errors.argument("batch_size", f"is {batch_size}", "pass at least 1")
    program = Traced(network.function, network.variables, example_of(network, region)).digest
    size = min(batch_size, total)
    work = _Work(network, program, region, labels, logits, method, size, memory_limit, mode)
    path = None if results is None else Path(results)
    done, mark = Record.empty(logits), ""
    if path is not None:
        mark = records.fingerprint(network, region, labels, method, work.batch_size, work.outward)
        done = records.load(path, mark, done)
    started, before = time.perf_counter(), done
    with records.Progress(progress, total, done) as shown:
        for found in _over_devices(work, range(done.examples, total, work.batch_size)):
            seconds = time.perf_counter() - started
            lower, error, correct = (np.concatenate(parts) for parts in zip(done[:3], found, strict=True))
            first = seconds if done.examples == 0 else done.first_batch_seconds
            done = Record(lower, error, correct, first, before.seconds + seconds)
            if path is not None:
                records.save(path, mark, done)
            shown.show(done)
    return Report(
        done.margins, done.rounding, done.verified, done.correct,
        eps=None if isinstance(region, Box) else np.asarray(region.radius),
        norm=math.inf if isinstance(region, Box) else region.norm,
        method=repr(method), batch_size=work.batch_size, first_batch_seconds=done.first_batch_seconds,
        seconds=done.seconds, labels=labels, remarks=remarks(network.variables, region, done.margins),
    )  # fmt: skip


def check_against_attack(report: Report, attack: Attack) -> None:
    """Hold certificates against an attack on the same examples and regions.

    Args:
        report: what `certify` returned.
        attack: what `pgd` returned for the same params, x, labels, eps, norm and clip.

    Raises:
        SoundnessError: a verified example has a margin that is not positive at a point of its region.
        ArgumentError: the attack is on another number of examples.

    Rounding: the attack's margins are the network's own, as computed.

    >>> import jax
    >>> from jaxbound import IBP, pgd
    >>> network = [(jnp.eye(2), jnp.zeros(2))], jnp.array([[0.75, 0.25]]), jnp.array([0])
    >>> report = certify(*network, 0.125, method=IBP(), activation="relu")
    >>> attack = functools.partial(pgd, key=jax.random.key(0), activation="relu")
    >>> check_against_attack(report, attack(*network, 0.125))
    >>> check_against_attack(report, attack(*network, 0.5))  # a larger ball: not what was certified
    Traceback (most recent call last):
    jaxbound.errors.SoundnessError: an attack broke 1 example that IBP() had verified: ...
    """
    found = np.asarray(attack.margin)
    if found.shape != report.verified.shape:
        raise errors.argument("attack", f"is on {found.shape} examples, the report on {report.verified.shape}")
    broken = np.flatnonzero(report.verified & ~(found > 0))
    if broken.size:
        certified = (report.margins - report.rounding).min(axis=1)
        bounds, attacked = certified[broken].tolist(), found[broken].tolist()
        raise errors.soundness_broken(report.method, broken.tolist(), bounds, attacked)


# --- one batch --------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """Checked arguments; the whole data set stays on the host."""

    network: Network
    program: str
    """The digest of the network's program."""
    region: Region
    labels: np.ndarray
    logits: jax.ShapeDtypeStruct
    method: Method
    batch_size: int
    memory_limit: int | None
    outward: bool | str


def _check_certified(method: Method) -> None:
    if _compat.is_tracing():
        raise errors.host_loop("certify", "margins")
    _check_method(method)
    if method.guarantee != "certified":
        raise errors.estimate_refused(type(method).__name__)


def _host_region(network: Network, x: ArrayLike | Region, eps, norm: float, clip) -> Region:
    """The region of all examples, as NumPy arrays; an empty one is no error, its example is just not verified."""
    if not is_region(x):
        check_types(x, eps)
        x = np.asarray(x)
    around = functools.partial(region_around, network.variables, norm=norm, clip=clip, batched=network.batched)
    traced = jax.eval_shape(around, x, eps)  # every check that needs no values
    refuse_half_precision("params", [jnp.result_type(leaf) for leaf in jax.tree.leaves(network.variables)])
    refuse_half_precision("x", [regions.leaf_struct(x).dtype if is_region(x) else np.asarray(x).dtype])
    if isinstance(x, Box):
        return jax.tree.map(np.asarray, x)
    if not isinstance(x, LpBall):
        eps = radii(eps, np.shape(x), norm, batched=network.batched)
    ball = x if isinstance(x, LpBall) else LpBall(x, eps, norm, clip=clip, batch_ndim=traced.batch_ndim)
    radius = np.asarray(ball.radius)
    if not np.all(radius >= 0):
        raise errors.argument("eps", f"holds {radius[~(radius >= 0)].flat[0]}", "pass radii of 0 or more")
    center = np.asarray(ball.center, traced.center.dtype)
    return dataclasses.replace(ball, center=center, radius=_rounded_up(radius, center.dtype))


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


def _with_batch_axis(region: Region) -> Region:
    region = jax.tree.map(lambda leaf: np.asarray(leaf)[None], region)
    return region if isinstance(region, Box) else dataclasses.replace(region, batch_ndim=region.batch_ndim + 1)


def _automatic_batch_size(network: Network, region: Region, logits, method: Method, memory_limit: int | None) -> int:
    """As many examples as leave room for a useful number of rows each; forward bounds carry one per input."""
    spec = margin_spec(np.zeros(1, int), logits.shape[0]).astype(logits.dtype)
    problem = problem_of(network, _rows(region, np.zeros(1, int)), spec)
    largest = max(node.op.size * node.op.dtype.itemsize for node in problem.graph.nodes)
    parts = jax.tree.leaves(method, is_leaf=lambda part: isinstance(part, Forward))
    forward = any(isinstance(part, Forward) for part in parts)
    rows = 6 * math.prod(regions.leaf_struct(region).shape[1:]) if forward else _ROWS
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    return int(np.clip(limit // (3 * largest * rows), 1, _LARGEST_BATCH))


def _rows(region: Region, index: np.ndarray) -> Region:
    """Some of the examples' regions."""
    if isinstance(region, Box):
        return Box(np.asarray(region.lower)[index], np.asarray(region.upper)[index])
    center, radius, clip = np.asarray(region.center), np.asarray(region.radius), region.clip
    if jax.tree.leaves(clip):  # arrays; numbers are static
        clip = tuple(np.broadcast_to(end, center.shape)[index] for end in clip or ())
    return dataclasses.replace(region, center=center[index], radius=radius[index] if radius.ndim else radius, clip=clip)


def _over_devices(work: _Work, starts: Sequence[int]) -> Iterator[tuple[np.ndarray, ...]]:
    """What `_one_batch` finds for each batch, in order.

    Each local device works on a batch of its own, driven by a thread, so the host's work for one overlaps with the
    others', and what is found does not depend on their number.
    """
    devices = _devices(work)[: len(starts)]
    if len(devices) <= 1:
        yield from (_one_batch(work, first) for first in starts)
        return
    free: queue.SimpleQueue = queue.SimpleQueue()
    for device in devices:
        free.put((device, work._replace(network=_placed(work.network, device))))

    x64 = jnp.result_type(float) == np.float64  # a thread begins with the global settings, not with those of its parent

    def on_a_free_device(first: int) -> tuple[np.ndarray, ...]:
        device, own = free.get()
        try:
            with jax.default_device(device), jax.enable_x64(x64):
                return _one_batch(own, first)
        finally:
            free.put((device, own))

    with ThreadPoolExecutor(len(devices), "certify") as pool:
        yield from pool.map(on_a_free_device, starts)


def _devices(work: _Work) -> list:
    """All local devices; one where JAX was told which, or where parameters are split over several."""
    arrays = [leaf for leaf in jax.tree.leaves(work.network.variables) if isinstance(leaf, jax.Array)]
    if _compat.default_device() is not None or not all(leaf.is_fully_replicated for leaf in arrays):
        return []
    return jax.local_devices()


def _placed(network: Network, device) -> Network:
    """The network with its arrays on one device."""
    place = lambda leaf: jax.device_put(leaf, device) if isinstance(leaf, jax.Array) else leaf  # noqa: E731
    return network._replace(variables=jax.tree.map(place, network.variables))


def _one_batch(work: _Work, first: int) -> tuple[np.ndarray, ...]:
    """Margins, their rounding and whether predictions are right, of the batch that begins at example `first`."""
    stop = min(first + work.batch_size, len(work.labels))
    index = np.minimum(np.arange(first, first + work.batch_size), stop - 1)  # padded with the last example
    region, labels = _rows(work.region, index), work.labels[index]
    network, logits, method, limit = work.network, work.logits, work.method, work.memory_limit
    bounds = _lower_bounds(network, region, labels, logits, method, limit, outward=work.outward)
    lower, error = map(np.asarray, bounds)
    logits, inside = _predictions(network, work.program, region)
    check_values(repr(method), labels, inside, lower, error, first)
    rows = np.arange(len(labels))
    true, logits[rows, labels] = logits[rows, labels], -np.inf
    return tuple(values[: stop - first] for values in (lower, error, true > logits.max(axis=1)))


def check_values(method: str, labels: np.ndarray, logits: np.ndarray, lower: np.ndarray, error: np.ndarray, first=0):
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


def _predictions(network: Network, program: str, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """The logits at the examples themselves, and at the nearest points of their regions, a batch at once."""
    points = region.center if isinstance(region, LpBall) else (np.asarray(region.lower) + region.upper) / 2
    try:
        predict = _compiled_prediction(network.function, program)
    except TypeError:  # an unhashable callable runs uncompiled
        predict = on_batch(network.function)
    logits, inside = np.array(predict(network.variables, points)), points
    if isinstance(region, LpBall) and region.clip is not None:
        inside = np.clip(points, *map(np.asarray, region.clip)).astype(np.asarray(points).dtype)
    same = np.array_equal(inside, points, equal_nan=True)
    return logits, logits.copy() if same else np.array(predict(network.variables, inside))


@functools.lru_cache(maxsize=64)
def _compiled_prediction(function: Callable, _program: str) -> Callable:
    """Compiled anew where the function's program is another one than before."""
    return _compat.eager_jit(on_batch(function))
