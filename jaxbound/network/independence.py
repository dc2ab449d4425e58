"""Whether the examples of a batch are independent: what bounding them one by one assumes.

A network is bounded as a function of one example, its value on a batch of one. That is the network only if no example
of a batch matters to another one, which BatchNorm in training mode, a softmax along the wrong axis or dropout break
without an error. So the network is traced once more, on a batch whose size is a prime that nothing else has: an axis
of that size, or of a multiple of it, is the batch's, and an operation that sums, sorts or cuts along it mixes examples;
a floating number that is a multiple of the size, or one over it, tells that the network counts them; and where the
numbers from 0 to the size do more than index an array, an example's place in the batch matters. Nothing is computed.
What is left (places that a loop works out, a loop over examples that reads the whole batch) is seen by `certify`, which
holds the network's own values against its bounds.
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
_PLACES = "depends on where in a batch an example stands"
_RANDOM = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "random_gamma"})
_VALUES = {"gather": (0,), "dynamic_slice": (0,), "dynamic_update_slice": (0, 1), "scatter": (0, 2)}
"""Which operands of an operation are values, where others say which entries of them."""


def check(batched: Callable, variables: Any, example: Any) -> None:
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
def _first_doubt(batched: Callable, tree: Any, avals: tuple) -> tuple[str, str, str] | None:
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
        jaxpr = _compat.used_part(closed)
        equations = list(_compat.all_equations(jaxpr))
        mixing = [k for k, equation in enumerate(equations) if _mixes(equation, size)]
        counting = [k for k, equation in enumerate(equations) if any(_counts(atom, size) for atom in equation.invars)]
        placed = {id(equation) for equation in _placed(jaxpr, _places(closed, size), size)[0]}
        random = [k for k, equation in enumerate(equations) if equation.primitive.name in _RANDOM]
        placing = [k for k, equation in enumerate(equations) if id(equation) in placed]
        doubts = {_MIXES: mixing, _COUNTS: counting, _PLACES: placing, "": random}
        what = next((what for what, numbers in doubts.items() if numbers), None)
        if what is None:
            return None
        number = doubts[what][0]
        lines = map(_compat.source_line, reversed(equations[: number + 1]))  # in a call, the caller's
        found = equations[number].primitive.name, next(filter(None, lines), ""), what
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
    if name == "scan" and params["length"] == size:
        return _compat.scan_counts(params)[1] > 0
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


# --- places in a batch -----------------------------------------------------------------------------------------------


def _places(closed: _compat.ClosedJaxpr, size: int) -> set:
    """The stored arrays of a program that are not the same for each place in a batch."""
    stored = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    return {variable for variable, value in stored if _differs_by_place(value, size)}


def _differs_by_place(value: Any, size: int) -> bool:
    shape = np.shape(value)
    if size not in shape or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return False
    along = np.moveaxis(np.asarray(value), shape.index(size), 0)
    return bool(np.any(along != along[:1]))


def _placed(jaxpr: _compat.Jaxpr, places: set, size: int) -> tuple[list[_compat.JaxprEqn], list[bool]]:
    """The operations that make a number of a place in the batch, and which results of a program tell a place.

    Args:
        jaxpr: a program, also one that another one calls.
        places: those of its constants and arguments that tell a place; the variables that do are added.
        size: the batch's.
    """
    found = []
    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, equation.invars
        values = _VALUES.get(name.partition("-")[0])  # also of scatter-add and its kin
        read = operands if values is None else [operands[k] for k in values if k < len(operands)]
        tells = any(_tells(atom, places) for atom in read) or _looks_up(equation, places, size)
        inner = [_placed_within(part, operands, places, size) for part in _programs(equation) if values is None]
        for doubts, _ in inner:
            found += doubts
        if name == "iota":
            tells = equation.params["shape"][equation.params["dimension"]] in (size - 1, size)
        if name in _RANDOM or inner:
            tells = False
        if (tells and _makes_number(equation)) or _chooses_examples(equation, places, size):
            found.append(equation)
            tells = False
        told = next((results for _, results in inner if len(results) == len(equation.outvars)), None)
        for variable, tells_it in zip(equation.outvars, told or [tells] * len(equation.outvars), strict=True):
            places |= {variable} if tells_it else set()
    return found, [_tells(variable, places) for variable in jaxpr.outvars]


def _placed_within(program: Any, operands: list, places: set, size: int) -> tuple[list[_compat.JaxprEqn], list[bool]]:
    """The same of a program that an operation runs: its arguments are the operation's last ones."""
    jaxpr, inner = program, set()
    if isinstance(program, _compat.ClosedJaxpr):
        jaxpr, inner = program.jaxpr, _places(program, size)
    of_last = operands[max(0, len(operands) - len(jaxpr.invars)) :]
    inner |= {var for var, atom in zip(jaxpr.invars, of_last, strict=False) if _tells(atom, places)}
    return _placed(jaxpr, inner, size)


def _programs(equation: _compat.JaxprEqn) -> list:
    parts = [part for value in equation.params.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in parts if isinstance(part, _compat.ClosedJaxpr | _compat.Jaxpr)]


def _tells(atom: Any, places: set) -> bool:
    return not isinstance(atom, _compat.Literal) and atom in places


def _makes_number(equation: _compat.JaxprEqn) -> bool:
    return any(jax.numpy.issubdtype(getattr(out.aval, "dtype", bool), np.inexact) for out in equation.outvars)


def _chooses_examples(equation: _compat.JaxprEqn, places: set, size: int) -> bool:
    """Whether examples of a batch are read or replaced by number, other than each by its own place."""
    lengths = _indexed(equation)
    return size in lengths and not _tells(equation.invars[1], places)


def _looks_up(equation: _compat.JaxprEqn, places: set, size: int) -> bool:
    """Whether something else than the batch is read at the places of the examples."""
    lengths = _indexed(equation)
    return bool(lengths) and not any(length % size == 0 for length in lengths) and _tells(equation.invars[1], places)


def _indexed(equation: _compat.JaxprEqn) -> list[int]:
    """The lengths of the axes along which a gather or a scatter goes by number."""
    numbers = equation.params.get("dimension_numbers")
    axes = getattr(numbers, "start_index_map", getattr(numbers, "scatter_dims_to_operand_dims", ()))
    return [_shape(equation.invars[0])[axis] for axis in axes]
