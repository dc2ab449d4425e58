"""From a function and arguments, regions among them, to the problem that a method is asked; and back to results.

The function is traced once per structure, shapes and dtypes; the graph is kept by the function itself, so pass the same
function object, not a new lambda each time. What the function closes over counts as it was then; `forget_stale` looks
again. Constants are evaluated here, with their errors where rounding is counted (`relaxations.inexact`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat, errors, regions
from jaxbound.backend.caches import Recent, kept, once_per_array
from jaxbound.backend.programs import Traced
from jaxbound.graph import Graph, Structure, tracing
from jaxbound.graph.values import Inexact
from jaxbound.methods import Bounded
from jaxbound.regions import is_region
from jaxbound.regions.bounds import Estimate, Interval
from jaxbound.relaxations import inexact

Axes = tuple[int | None, ...] | None


class Problem(NamedTuple):
    """A function at its arguments, ready to be bounded."""

    graph: Graph
    leaves: tuple[regions.Region, ...]
    is_region: tuple[bool, ...]
    tree: Any


def prepare(
    fn: Callable,
    args: tuple,
    batch: Sequence[bool] | None = None,
    kwargs: dict | None = None,
    *,
    rounding: bool = False,
    canonical: bool = False,
) -> Problem:
    """Trace a function (or find its graph) and evaluate its constants.

    Args:
        fn: the function of one example.
        args: its arguments, with regions among the leaves.
        batch: per leaf, whether it carries a leading batch axis; None for no batch. Batched regions carry it too.
        kwargs: its keyword arguments.
        rounding: whether constants that fn computes come with their errors.
        canonical: whether the regions are so already.
    """
    leaves, tree = jax.tree.flatten((args, kwargs or {}), is_leaf=is_region)
    chosen = regions_among(leaves)
    single = leaves if batch is None else [_first(leaf) if b else leaf for leaf, b in zip(leaves, batch, strict=True)]
    avals = tuple(aval_of(leaf, region) for leaf, region in zip(single, chosen, strict=True))
    structure = structure_of(fn, tree, avals, chosen)
    axes, constants = None, {i: leaf for i, (leaf, r) in enumerate(zip(leaves, chosen, strict=True)) if not r}
    if batch is not None:
        axes = structure.constants.axes([i for i in constants if batch[i]])
    evaluated = _evaluate(structure, axes, constants, batch, rounding)
    used = tuple(leaf for leaf, region in zip(leaves, chosen, strict=True) if region)
    used = used if canonical else tuple(map(regions.canonical, used))
    made = structure.constants.computed
    finite = [k for k, n in enumerate(structure.constants.used) if _is_finite(evaluated[k], n in made)]
    return Problem(Graph(evaluated, structure, axes, frozenset(finite)), used, chosen, tree)


def _is_finite(constant: Any, computed: bool) -> bool:
    """Whether an array is known to be finite: not if it is traced, far away, or large and computed anew each time."""
    if _compat.is_tracer(constant) or not isinstance(constant, jax.Array) or not constant.is_fully_addressable:
        return False
    if any(device.platform != "cpu" for device in constant.devices()) or (computed and constant.size > _SMALL):
        return False
    return all_finite(constant) if computed else _KNOWN(constant)


def all_finite(array: jax.Array) -> bool:
    """Whether no entry is infinite or NaN, on the host."""
    return bool(np.all(np.isfinite(np.asarray(array))))


_KNOWN, _SMALL = once_per_array(all_finite), 1 << 16


def structure_of(fn: Callable, tree: Any, avals: tuple, chosen: tuple[bool, ...]) -> Structure:
    """The graph of a function, from the cache where it does not close over tracers."""
    key = fn, tree, avals, chosen, jnp.result_type(float)
    try:
        cached = _STRUCTURES.get(key)
    except TypeError:  # an unhashable callable is traced every time
        return tracing.build(flat_function(fn, tree), avals, chosen)
    if cached is None:
        built = tracing.build(flat_function(fn, tree), avals, chosen)
        if not any(_compat.is_tracer(array) for _, array in built.constants.captured):
            watched = any(part in _WATCHED.entries for part in _parts(fn))
            _STRUCTURES.put(key, (built, Traced(flat_function(fn, tree), *avals) if watched else None))
        return built
    return cached[0]


def forget_stale(fn: Callable, *args: Any) -> None:
    """Drop the graphs of a function, and of those made of it, that it would not give any more.

    A function gives another graph where what it closes over has changed, as an NNX module does that is trained. Graphs
    made before the first call for a function are dropped unseen; from then on their programs are kept, to compare.

    Args:
        fn: the function of one example.
        args: its arguments, or their `jax.ShapeDtypeStruct`s; the functions made of it may take more.

    Raises:
        ArgumentError: a jitted network would give other values if it were traced now.
    """
    _refuse_outdated(fn, args)
    try:
        _WATCHED.put(fn, True)
    except TypeError:  # an unhashable callable has no graphs
        return
    wanted = [(np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(args)]
    for key, (_, before) in list(_STRUCTURES.entries.items()):
        function, tree, avals, _, default = key
        given = [(aval.shape, aval.dtype) for aval in avals[: len(wanted)]]
        if given != wanted or default != jnp.result_type(float) or fn not in _parts(function):
            continue
        if before is None or not before.agrees(Traced(flat_function(function, tree), *avals)):
            _STRUCTURES.drop(key)


def _refuse_outdated(fn: Callable, args: Sequence) -> None:
    """A jitted network keeps the arrays of its trace, which has one shape of batches: others see what is there now."""
    network: Any = _parts(fn)[-1]
    applied = getattr(network, "apply_fn", None) or network
    if not (hasattr(applied, "lower") and callable(getattr(applied, "__wrapped__", None))):
        return
    now = lambda *args, **kwargs: applied.__wrapped__(*args, **kwargs)  # noqa: E731
    anew = now if applied is network else dataclasses.replace(network, apply_fn=now)
    flat, tree = jax.tree.flatten((args, {}))
    traced = [Traced(flat_function(function, tree), *flat) for function in (network, anew)]
    if not traced[0].holds_the_same(traced[1]):
        raise errors.ArgumentError(
            "the network is a jitted function that closes over arrays, and they have changed since it was traced: it "
            "gives old values for batches of one size and new ones for others: pass the arrays as arguments, or jit it "
            "again"
        )


def _parts(fn: Callable) -> list[Callable]:
    """A function and those that it wraps, each as the `network` of the one before, where jaxbound made that."""
    inner = getattr(fn, "network", None) if type(fn).__module__.startswith("jaxbound.") else None
    return [fn] if inner is None else [fn, *_parts(inner)]


_STRUCTURES, _WATCHED = Recent(256), Recent(256)


def regions_among(leaves: Sequence) -> tuple[bool, ...]:
    """Which leaves are regions."""
    chosen = tuple(map(is_region, leaves))
    if not any(chosen):
        raise errors.ArgumentError("none of the arguments is a region: wrap one in jaxbound.Box or jaxbound.LpBall")
    return chosen


def flat_function(fn: Callable, tree: Any) -> Callable:
    """The function of the leaves of its arguments."""
    if not callable(fn):
        raise errors.argument_type(
            "fn", f"is a {type(fn).__name__}", "pass a function, and then the regions to what bound gives"
        )

    def flat(*leaves: Any):
        args, kwargs = jax.tree.unflatten(tree, leaves)
        try:
            return fn(*args, **kwargs)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
            raise errors.value_read(error) from error

    return flat


def aval_of(leaf: Any, region: bool) -> jax.ShapeDtypeStruct:
    """The shape and dtype that a leaf is traced with."""
    if region:
        return regions.leaf_struct(leaf)
    if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
        raise errors.ArgumentTypeError(
            f"an argument is {leaf!r} of type {type(leaf).__name__}: arguments are arrays, numbers and regions; "
            "close over anything else with functools.partial"
        )
    weak = not hasattr(leaf, "dtype") or bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), weak_type=weak)


def _first(leaf: Any):
    """One example of a batched leaf, for its shape."""
    take = lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype)  # noqa: E731
    return jax.tree.map(take, leaf)


def _evaluate(
    structure: Structure, axes: Axes, constants: dict, batch: Sequence[bool] | None, rounding: bool
) -> tuple[Any, ...]:
    """The graph's constants. Arrays that are so already stay where they are: a compiled program would copy them."""
    program, place = structure.constants, _compat.owned if _compat.default_device() is None else jnp.array
    constants = {leaf: _compat.owned(value) for leaf, value in constants.items()}
    values, computed = program.given(constants), program.computed
    if computed:
        eager = not any(map(_compat.is_tracer, jax.tree.leaves((constants, program.captured))))
        in_axes = None if batch is None else tuple(0 if batch[i] else None for i in constants)
        out_axes = axes and tuple(axis for k, axis in zip(program.used, axes, strict=True) if k in computed)
        made = (_compiled if eager else _mapped)(structure, tuple(constants), in_axes, out_axes, rounding)
        values.update(zip(computed, made(*constants.values()), strict=True))
    return tuple(jax.tree.map(place, values[number]) for number in program.used)


def _mapped(structure: Structure, numbers: tuple[int, ...], in_axes: Axes, out_axes: Axes, rounding: bool) -> Callable:
    def computed(*leaves: Any):
        given = dict(zip(numbers, leaves, strict=True))
        values = inexact.evaluate(structure.constants, given) if rounding else structure.constants.values(given)
        return tuple(values[number] for number in structure.constants.computed)

    if in_axes is None or all(axis is None for axis in in_axes):
        return computed
    return jax.vmap(computed, in_axes=in_axes, out_axes=out_axes)


@kept(256)
def _compiled(
    structure: Structure, numbers: tuple[int, ...], in_axes: Axes, out_axes: Axes, rounding: bool
) -> Callable:
    return _compat.eager_jit(_mapped(structure, numbers, in_axes, out_axes, rounding))


def validate(args: Any) -> None:
    """Refuse malformed regions, by the argument that holds them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args, is_leaf=is_region):
        if is_region(leaf):
            regions.validate(leaf, f"the region at argument {jax.tree_util.keystr(path)}")


def as_interval(found: Bounded, result: type[Interval] | type[Estimate] = Interval) -> Interval | Estimate:
    """Bounds widened by their rounding."""
    assert found.upper is not None
    return result(found.lower - found.lower_rounding, found.upper + found.upper_rounding)


def ends_of(constant: jax.Array | Inexact) -> tuple[jax.Array, jax.Array]:
    """Between what its real value lies."""
    if not isinstance(constant, Inexact):
        return constant, constant
    return constant.value - constant.error, constant.value + constant.error


def fill(problem: Problem, dependent: Callable, fixed: Callable):
    """A pytree like the function's result."""
    outputs = [
        dependent() if kind == "node" else fixed(problem.graph.constants[number])
        for kind, number in problem.graph.structure.outputs
    ]
    return jax.tree.unflatten(problem.graph.structure.out_tree, outputs)
