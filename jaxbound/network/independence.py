"""Whether the examples of a batch are independent: what bounding them one by one assumes.

A network is bounded as a function of one example, its value on a batch of one. That is the network only if no example
of a batch matters to another one, which BatchNorm in training mode, a softmax along the wrong axis or dropout break
without an error. So the network is traced once more, on a batch whose size is a prime that nothing else has: an axis
of that size, or of a multiple of it, is the batch's, and an operation that sums, sorts or cuts along it mixes examples;
a floating number that is a multiple of the size, or one over it, tells that the network counts them. Nothing is
computed. What no trace can tell (gathers of examples by number, factors by position) is left to `certify`, which holds
the network's own values against its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxbound import _compat, errors
from jaxbound.backend.caches import kept
from jaxbound.network.inputs import structs

_PRIMES = 1009, 1511  # two, in case that something else has the first one's size
_MIXES, _COUNTS = "mixes the examples of a batch", "depends on the number of examples in a batch"
_RANDOM = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "random_gamma"})


def check(batched: Callable, variables, example) -> None:
    """Refuse a network that mixes the examples of a batch, and warn of one that draws random numbers.

    Args:
        batched: `(variables, batch) -> outputs`, each with the batch as its first axis.
        variables: arrays, regions or what has their shapes and dtypes.
        example: the shape and dtype of one example, or those of each of its inputs.

    Raises:
        ArgumentError: with the operation and its line.

    Warns:
        AssumedNetworkWarning: random numbers that every example shares, as those of a dropout that is on.

    >>> try:
    ...     check(lambda v, x: x - x.mean(axis=0), (), jax.ShapeDtypeStruct((2,), "float32"))
    ... except errors.ArgumentError as error:
    ...     print(str(error).partition(" at ")[0])
    the network mixes the examples of a batch by `reduce_sum`
    """
    avals, tree = jax.tree.flatten((structs(variables), example))
    try:
        found = _first_doubt(batched, tree, tuple(avals))
    except TypeError:  # an unhashable callable
        found = _first_doubt.__wrapped__(batched, tree, tuple(avals))
    if found is None:
        return
    name, place, what = found
    where = f" at {place}" if place else ""
    if not what:
        errors.warn_once(
            f"the network draws random numbers{where}, and what is bounded is the one with these: is dropout on? "
            "pass apply_fn=functools.partial(model.apply, train=False) or deterministic=True",
            errors.AssumedNetworkWarning, found,
        )  # fmt: skip
        return
    way_out = "leave that out of it and apply it to the bounds"
    if what == _MIXES:
        off = "apply_fn=functools.partial(model.apply, train=False)"
        way_out = f"switch off BatchNorm's training mode and dropout, as by {off}"
    raise errors.ArgumentError(f"the network {what} by `{name}`{where}, but each is bounded by itself: {way_out}")


@kept(256)
def _first_doubt(batched: Callable, tree, avals: tuple) -> tuple[str, str, str] | None:
    """The name and line of the first operation that mixes or counts examples, and what it does.

    Or else, with "", of one that draws random numbers.
    """
    found, whole = None, getattr(batched, "on_batch", batched)  # a bound method is equal to no other, the function is
    variables, example = jax.tree.unflatten(tree, avals)
    for size in _PRIMES:
        batch = jax.tree.map(lambda part, size=size: jax.ShapeDtypeStruct((size, *part.shape), part.dtype), example)
        try:
            closed = jax.make_jaxpr(whole)(variables, batch)
        except Exception:  # it takes no batch of this size, or none at all, which its user is told elsewhere
            return None
        if any(aval.shape[:1] != (size,) for aval in closed.out_avals):
            return None
        equations = list(_compat.all_equations(_compat.used_part(closed)))
        mixing = [k for k, equation in enumerate(equations) if _mixes(equation, size)]
        counting = [k for k, equation in enumerate(equations) if any(_counts(atom, size) for atom in equation.invars)]
        random = [k for k, equation in enumerate(equations) if equation.primitive.name in _RANDOM]
        if not mixing and not counting and not random:
            return None
        number = (mixing or counting or random)[0]
        lines = map(_compat.source_line, reversed(equations[: number + 1]))  # in a call, the caller's
        found = (
            equations[number].primitive.name,
            next(filter(None, lines), ""),
            _MIXES if mixing else _COUNTS if counting else "",
        )
    return found


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _counts(atom: Any, size: int) -> bool:
    """Whether an operand is a floating number that is a multiple of the batch's size, or one over such a multiple."""
    value = atom.val if isinstance(atom, _compat.Literal) else 0
    if not isinstance(value, float | np.floating) and getattr(value, "dtype", np.dtype(int)).kind != "f":
        return False
    value = abs(float(value)) if np.ndim(value) == 0 else 0.0
    if not 0 < value < math.inf:
        return False
    times = max(value / size, 1 / value / size)
    return 0.5 < times < 1000 and abs(times - round(times)) < 1e-5 * times


def _mixes(equation: _compat.JaxprEqn, size: int) -> bool:
    """Whether an operation makes an entry from several examples."""
    name, params = equation.primitive.name, equation.params
    shape = _shape(equation.invars[0]) if equation.invars else ()
    of_batch = [axis for axis, length in enumerate(shape) if length and length % size == 0]
    if name in _RANDOM:
        return any(length % size == 0 for variable in equation.outvars for length in _shape(variable) if length)
    if not of_batch:
        return False
    if name in ("slice", "dynamic_slice"):  # some examples of a batch, not a part of several batches
        kept = _shape(equation.outvars[0])
        return any(shape[axis] == size != kept[axis] for axis in of_batch)
    if name == "conv_general_dilated":
        groups = params["feature_group_count"] % size == 0
        numbers = params["dimension_numbers"].lhs_spec
        return any(axis in numbers[1 if not groups else 2 :] for axis in of_batch)
    if name.startswith(("reduce_window", "select_and_")):
        windows = params.get("window_dimensions", (1,) * len(shape))
        return any(windows[axis] > 1 for axis in of_batch)
    return any(axis in _axes(name, params, len(shape)) for axis in of_batch)


def _axes(name: str, params: dict, rank: int) -> tuple[int, ...]:
    """The axes of the first operand along which entries meet."""
    if name == "dot_general":
        return tuple(params["dimension_numbers"][0][0])
    if name == "fft":
        return tuple(range(rank - len(params["fft_lengths"]), rank))
    if name.startswith(("reduce_", "arg")):
        return tuple(params.get("axes", params.get("dimensions", ())))
    if name == "rev":
        return tuple(params["dimensions"])
    if name in ("sort", "top_k") or name.startswith("cum"):
        return (params.get("dimension", params.get("axis", rank - 1)) % rank,)
    return ()
