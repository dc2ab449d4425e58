"""Certificates: how many examples of a data set keep their class in their regions.

`certify` is the host loop around `margins`: batches of one size (the last one padded), so that memory is bounded and
nothing compiles twice, partial results on disk (`records`), and strict arithmetic: with rounding a bound e_j on the
rounding error of the whole computation goes with each margin's lower bound m_j, and

    verified  =  m_j > e_j for every j, in comparisons that NaN fails.

Nothing is clamped to look consistent: where an attack breaks a verified example, `check_against_attack` raises.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.backend.programs import Traced
from jaxbound.certificates import records
from jaxbound.certificates.attack import Attack
from jaxbound.certificates.batches import Work, automatic_batch_size, host_inputs, one_batch
from jaxbound.certificates.loops import Task, run
from jaxbound.certificates.margins import check_margin_method, logits_struct, margin_spec
from jaxbound.certificates.records import Record
from jaxbound.certificates.report import Report, remarks
from jaxbound.methods import Method, rounding_mode
from jaxbound.network.inputs import Inputs, batch_of, is_several, struct_of, structs
from jaxbound.network.problems import example_of
from jaxbound.network.resolving import resolve
from jaxbound.regions import LpBall
from jaxbound.transforms.problems import forget_stale


def certify(
    params: Any,
    x: ArrayLike | Inputs,
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
    work, each on batches of its own, unless `jax.default_device` names one or parameters are split over several; and
    so do all processes of `jax.distributed`, which call with the same arguments and return the same report.

    Args:
        params, x, labels, eps, apply_fn, activation, norm, clip: as for `margins`, with N examples, in float32 or
            float64; Dense layers without apply_fn want activation, since no certificate guesses the network.
        method: how to bound; its guarantee is "certified". `BranchAndBound` goes on until an example is verified or
            falsified (`report.status`, `report.counterexamples`), or its time is up.
        batch_size: examples at once on a device; by default what fits into the memory limit, at most 256.
        memory_limit: bytes that the coefficients of a backward pass may take, per device.
        rounding: "outward" (or "exact") to demand margins above a bound on the rounding error of the computation;
            "execution" for margins of the logits that the network gives when it runs (docs/guarantee.md); None for
            margins above 0 as computed.
        results: a file for partial results, written after every batch. A later call with the same arguments continues
            after the last finished batch (functions inside a method count by their names). Each of several processes
            writes a file of its own, with its number in the name.
        progress: show a bar (tqdm, or lines where it is not installed) on the standard error.

    Returns:
        A `Report`. An example whose region is empty is not verified.

    Raises:
        HostLoopError: under `jit`, `vmap`, `grad` or `pmap`; `margins` works there.
        ArgumentTypeError: integers as x; float16 or bfloat16 anywhere, whose rounding no certificate survives.
        ArgumentError: a method that gives estimates, malformed arguments, or a results file of another computation.

    Rounding: bounded, and demanded of every margin, for exact arithmetic on the given parameters (rounding="outward").

    Reference: Zhang et al. 2018, section 4; for the rounding Higham 2002, section 3.5.

    >>> import jax.numpy as jnp
    >>> from jaxbound import IBP
    >>> layers = [(jnp.eye(2), jnp.zeros(2))]
    >>> x, labels = jnp.array([[0.75, 0.25], [0.5, 0.25]]), jnp.array([0, 0])
    >>> certify(layers, x, labels, 0.125, method=IBP(), activation="relu").verified
    array([ True, False])
    """
    _check_certified(method)
    mode = rounding_mode(rounding)
    labels = np.asarray(labels)
    network = resolve(params, x, apply_fn, activation, certificate="certify", weights=True)
    inputs = host_inputs(network, x, eps, norm, clip)
    if not network.batched:
        inputs = regions.with_batch_axis(inputs) if regions.is_region(inputs) else inputs[None]
        network, labels = network._replace(batched=True), labels[None]
    if method.searches and (is_several(inputs) or not regions.is_region(inputs)):
        raise errors.argument("x", "is not one region, over which this method searches", "pass one input with eps")
    total = batch_of(inputs)
    if total == 0 or labels.shape != (total,):
        raise errors.argument("labels", f"have shape {labels.shape} for {total} examples", "pass one class per example")
    logits = logits_struct(network, inputs)
    given = structs(network.variables), example_of(network, inputs)
    forget_stale(network.function, *given)
    margin_spec(labels, logits.shape[0])  # raises where a label is no class
    if batch_size is None:
        batch_size = automatic_batch_size(network, inputs, logits, method, memory_limit)
    if batch_size < 1:
        raise errors.argument("batch_size", f"is {batch_size}", "pass at least 1")
    program = Traced(network.function, *given).digest
    size = min(batch_size, total)
    work = Work(program, inputs, labels, logits, method, memory_limit, mode)
    shape = struct_of(inputs).shape[1:] if method.searches else ()
    margins = np.zeros((0, logits.shape[0] - 1), logits.dtype)
    points = np.zeros((0, math.prod(shape) if method.searches else 0), logits.dtype)
    empty = Record.empty(margins=margins, rounding=margins, correct=np.zeros(0, bool), points=points)
    one = functools.partial(one_batch, work)
    task = Task("certify", network, one, empty, total, size, lambda done: f"{_verified(*done.rows[:2]).sum()} verified")
    mark = functools.partial(records.fingerprint, network, inputs, labels, method, size, mode)
    done = run(task, None if results is None else Path(results), mark, progress=progress)
    margins, error, correct, points = done.rows
    return Report(
        margins, error, _verified(margins, error), correct,
        eps=np.asarray(inputs.radius) if isinstance(inputs, LpBall) else None,
        norm=inputs.norm if isinstance(inputs, LpBall) else math.inf,
        method=str(method), batch_size=size, first_batch_seconds=done.first_batch_seconds,
        seconds=done.seconds, labels=labels, remarks=remarks(network.variables, inputs, margins),
        counterexamples=points.reshape(-1, *shape) if method.searches else None,
    )  # fmt: skip


def _verified(margins: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Whether all margins exceed their rounding; False for NaN, 0 and infinities."""
    return np.all(np.isfinite(margins) & (margins > error), axis=1)


def check_against_attack(report: Report, attack: Attack) -> None:
    """Hold certificates against an attack on the same examples and regions.

    Args:
        report: what `certify` returned.
        attack: what `pgd` returned for the same params, x, labels, eps, norm and clip.

    Raises:
        SoundnessError: a verified example has a margin that is not positive at a point of its region.
        ArgumentError: the attack is on another number of examples.

    Rounding: the attack's margins are the network's own, as computed.

    >>> import functools, jax, jax.numpy as jnp
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


def _check_certified(method: Method) -> None:
    if _compat.is_tracing():
        raise errors.host_loop("certify", "margins")
    check_margin_method(method)
    if method.guarantee != "certified":
        raise errors.estimate_refused(type(method).__name__)
