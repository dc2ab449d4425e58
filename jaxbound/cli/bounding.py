"""What is bounded around examples: bounds, certify, radius, lipschitz, explain, attack."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from jaxbound import errors
from jaxbound.cli import options as given
from jaxbound.cli.main import FALSIFIED, UNKNOWN, VERIFIED
from jaxbound.cli.networks import Loaded, fitted, load, of_one_example, shape_of
from jaxbound.cli.output import progress, save_figure, show, table
from jaxbound.methods import Method
from jaxbound.methods.named import method_named
from jaxbound.network.bounding import bound_network
from jaxbound.regions import Interval
from jaxbound.training import examples
from jaxbound.training.evaluation import clip_of, in_batches

_BATCH = 64


class Problem(NamedTuple):
    """A network at examples."""

    loaded: Loaded
    x: np.ndarray
    labels: np.ndarray | None
    around: dict
    """apply_fn, norm and clip."""

    @property
    def known(self) -> np.ndarray:
        """The labels.

        Raises:
            ArgumentError: there are none.
        """
        if self.labels is None:
            raise errors.argument("data", "has no labels that number classes", "add an array named labels")
        return self.labels


def method_of(options: given.Bounding) -> Method:
    """The method that options name."""
    return method_named(options.method, lower_slope=options.lower_slope, intersect=options.intersect)


def problem_of(options: given.OnData) -> Problem:
    """The network and the examples that options name."""
    loaded = load(options.net)
    clip = options.clip
    if loaded.run is not None:
        options.data, clip = options.data or loaded.run.dataset, clip or clip_of(loaded.run)
    if not options.data:
        raise errors.argument("data", "is missing", f"pass it after the network: jaxbound COMMAND {options.net} DATA")
    x, labels = examples.read(options.data, options.count, options.data_dir, loaded.inputs)
    x = fitted(x, loaded.input_shape).astype(jnp.result_type(float), copy=False)
    return Problem(loaded, x, labels, {"apply_fn": loaded.apply_fn, "norm": options.norm, "clip": clip})


def over(function: Callable, problem: Problem, options: given.OnData, title: str, *more: np.ndarray):
    """What a function of a batch gives for all examples, as NumPy arrays."""
    arrays = (problem.x, *more)
    size = min(options.batch_size or _BATCH, len(problem.x))
    with progress(not options.json, title, len(problem.x)) as advance:

        def call(index: np.ndarray):
            found = function(*(array[index] for array in arrays))
            advance(len(np.unique(index)))
            return found

        return in_batches(call, len(problem.x), size)


def bounds(options: given.Bounds, started: float) -> int:
    """`jaxbound bounds`."""
    method, problem = method_of(options), problem_of(options)
    bound = functools.partial(bound_network, method, problem.loaded.params, eps=options.eps, **problem.around)
    found = over(lambda x: bound(x), problem, options, "bounds")
    low, high = (np.asarray(end).reshape(len(problem.x), -1) for end in (found.lower, found.upper))
    rows = [(i, k, float(low[i, k]), float(high[i, k])) for i in range(len(low)) for k in range(low.shape[1])]
    result = {"lower": low, "upper": high, "guarantee": method.guarantee}
    if options.plot:
        from jaxbound import plots

        save_figure(plots.bounds_per_class(Interval(low[0], high[0])), options.plot)
    show(options.json, _about(options, started) | result, table(["example", "output", "lower", "upper"], rows))
    return VERIFIED


def certify(options: given.Certify, started: float) -> int:
    """`jaxbound certify`."""
    method, problem = method_of(options), problem_of(options)
    report = jb.certify(
        problem.loaded.params, problem.x, problem.known, options.eps, method=method,
        batch_size=options.batch_size or None, results=options.results, progress=not options.json, **problem.around,
    )  # fmt: skip
    keys = ("clean_error", "verified_error", "verified", "correct", "margins", "rounding", "labels")
    result = {key: getattr(report, key) for key in keys}
    show(options.json, _about(options, started) | result, str(report))
    return VERIFIED if report.verified.all() else UNKNOWN if report.correct.all() else FALSIFIED


def radius(options: given.Radius, started: float) -> int:
    """`jaxbound radius`."""
    method, problem = method_of(options), problem_of(options)
    search = functools.partial(
        jb.certified_radius, problem.loaded.params, method=method, steps=options.steps,
        initial=options.initial, tolerance=options.tolerance, **problem.around,
    )  # fmt: skip
    radii = over(lambda x, labels: search(x, labels), problem, options, "radius", problem.known)
    if options.plot:
        from jaxbound import plots

        save_figure(plots.radius_histogram(radii), options.plot)
    rows = [(i, int(label), float(r)) for i, (label, r) in enumerate(zip(problem.known, radii, strict=True))]
    text = f"{table(['example', 'label', 'radius'], rows)}\nmean {radii.mean():.6g}, median {np.median(radii):.6g}"
    show(options.json, _about(options, started) | {"radius": radii, "labels": problem.labels}, text)
    return VERIFIED


_JACOBIANS = {"recurjac": jb.RecurJac, "fastlip": jb.FastLip, "ibp": jb.IBP, "crown": jb.Crown}


def lipschitz(options: given.Lipschitz, started: float) -> int:
    """`jaxbound lipschitz`."""
    problem = problem_of(options)
    find = functools.partial(
        jb.lipschitz, problem.loaded.params, eps=options.eps, of=options.of, method=_JACOBIANS[options.method](),
        **problem.around,
    )  # fmt: skip
    found = over(lambda x: find(x), problem, options, "lipschitz")
    rows = [(i, *map(float, np.ravel(row))) for i, row in enumerate(found)]
    head = ["example", *(f"{options.of[:-1]} {k}" if options.of != "map" else "map" for k in range(len(rows[0]) - 1))]
    show(options.json, _about(options, started) | {"lipschitz": found}, table(head, rows))
    return VERIFIED


def explain(options: given.Explain, started: float) -> int:
    """`jaxbound explain`."""
    method, loaded = method_of(options), load(options.net, options.input_shape)
    shape = shape_of(loaded, options.input_shape)
    fn, params = of_one_example(loaded, shape)
    box = jb.Box(np.zeros(shape, jnp.result_type(float)), np.ones(shape, jnp.result_type(float)))
    found = jb.explain(fn, method)(params, box)
    show(options.json, _about(options, started) | {"supported": found.supported, "text": str(found)}, str(found))
    return VERIFIED if found.supported else UNKNOWN


def attack(options: given.Attack, started: float) -> int:
    """`jaxbound attack`."""
    problem = problem_of(options)
    run = functools.partial(
        jb.pgd, problem.loaded.params, eps=options.eps, steps=options.steps, restarts=options.restarts,
        step_size=options.step_size or None, **problem.around,
    )  # fmt: skip
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(options.seed), len(problem.x))))
    found = over(lambda x, labels, key: run(x, labels, key=key), problem, options, "attack", problem.known, keys)
    rows = [
        (i, int(label), float(margin), "yes" if success else "no")
        for i, (label, margin, success) in enumerate(zip(problem.known, found.margin, found.success, strict=True))
    ]
    text = f"{table(['example', 'label', 'margin', 'broken'], rows)}\n{found.success.mean():.2%} broken"
    result = {"margin": found.margin, "success": found.success, "x": found.x, "labels": problem.labels}
    show(options.json, _about(options, started) | result, text)
    return FALSIFIED if found.success.any() else UNKNOWN


def _about(options: given.Options, started: float) -> dict:
    """What every result says of its command."""
    names = ("net", "data", "method", "eps", "norm")
    said = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return said | {"seconds": round(time.monotonic() - started, 3)}
