"""A network as layers: what JAX traces of it, primitive by primitive.

What is shared with the rest of jaxbound is the network itself, a function of JAX (of an ONNX file what
`frontends.onnx` makes of it) and JAX's own trace of it. Parameters are taken as the numbers that they are. Every
primitive that is not in the table below is refused, by name, and so is arithmetic on parameters alone, which JAX would
round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbound import _compat, errors
from jaxbound.certificates.proofs.layers import Add, Array, Dense, Layer, Move, Relu, Scale
from jaxbound.network.model import Model

_exactly = np.vectorize(lambda number: Fraction(float(number)), otypes=[object])


class Value(NamedTuple):
    """A value that depends on the input: which layer it is, and its shape."""

    number: int
    shape: tuple[int, ...]

    @property
    def places(self) -> np.ndarray:
        """The numbers of its entries, in its shape."""
        return np.arange(math.prod(self.shape)).reshape(self.shape)


class Layers(NamedTuple):
    """A network: layers[0] is the input, and the last one the output."""

    layers: list[Layer]
    rational: bool

    def numbers(self, array: ArrayLike) -> Array:
        """Numbers as the checker computes with them."""
        wide = np.asarray(array, np.float64)
        return _exactly(wide) if self.rational and wide.size else wide

    @property
    def rectified(self) -> list[int]:
        """What the ReLUs read."""
        return [layer.sources[0] for layer in self.layers if isinstance(layer, Relu)]

    @property
    def sizes(self) -> list[int]:
        """How many neurons each layer of ReLUs has."""
        return [layer.size for layer in self.layers if isinstance(layer, Relu)]


def read(network: Any, shape: tuple[int, ...], dtype: DTypeLike, *, rational: bool = False) -> Layers:
    """A network as layers.

    Args:
        network: a `Model`, a list of (kernel, bias) with ReLU between them, or a JAX function of one example.
        shape: of one example.
        dtype: of one example.
        rational: whether numbers are fractions.

    Raises:
        UnsupportedError: it does something that certificates do not cover.
    """
    fn = _function(network)
    try:
        closed = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(shape, dtype))
    except (TypeError, ValueError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise errors.argument("network", f"cannot be called on an input of shape {shape} ({reason})") from fault
    reader = _Reader(rational)
    reader.layers.append(Layer((), math.prod(shape)))
    found = reader.run(closed, [Value(0, shape)])
    if len(found) != 1 or not isinstance(found[0], Value):
        raise errors.argument("network", "does not return one array that depends on its input")
    reader.add(Add((found[0].number,), math.prod(found[0].shape)), found[0].shape)
    return Layers(_folded(reader.layers), rational)


def _folded(layers: list[Layer]) -> list[Layer]:
    """The same with shifts in the dense layers before them, where nothing else reads those."""
    readers = [sum(number in layer.sources for layer in layers) for number in range(len(layers))]
    kept: list[Layer] = []
    place: list[int] = []
    for layer in layers:
        layer.sources = tuple(place[source] for source in layer.sources)
        before = kept[layer.sources[0]] if isinstance(layer, Add) and len(layer.sources) == 1 else None
        once = before is not None and readers[place.index(layer.sources[0])] == 1
        if isinstance(before, Dense) and before.shift is None and once:
            before.shift = layer.shift
        else:
            kept.append(layer)
        place.append(len(kept) - 1 if before is None or kept[-1] is layer else layer.sources[0])
    return kept


def _function(network: Any) -> Callable:
    if isinstance(network, Model):
        network = network.flat
        return lambda x: network.fn(network.params, x)
    if callable(network):
        return network
    if isinstance(network, list | tuple) and network and all(len(layer) == 2 for layer in network):
        return lambda x: _chain(network, x)
    raise errors.argument_type("network", f"is a {type(network).__name__}", "pass a Model, layers or a JAX function")


def _chain(layers: Sequence, x: jax.Array):
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel if bias is None else x @ kernel + bias
        x = jax.nn.relu(x) if number < len(layers) - 1 else x
    return x


class _Reader:
    """Walks a program and writes down its layers."""

    def __init__(self, rational: bool):
        self.layers: list[Layer] = []
        self.rational = rational

    def run(self, closed: _compat.ClosedJaxpr, given: Sequence) -> list:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        known: dict = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        known.update(zip(jaxpr.invars, given, strict=True))
        get = lambda atom: np.asarray(atom.val) if hasattr(atom, "val") else known[atom]  # noqa: E731
        for equation in jaxpr.eqns:
            operands, inner = [get(atom) for atom in equation.invars], _compat.call_jaxpr(equation)
            if inner is not None:
                results = self.run(inner, operands)
            elif equation.primitive.name == "split":
                results = self.split(operands[0], equation.params)
            else:
                results = [self.step(equation, operands)]
            known.update(zip(equation.outvars, results, strict=False))
        return [get(atom) for atom in jaxpr.outvars]

    def step(self, equation: Any, operands: list) -> Any:
        """One equation: a value, or a constant where it reads no value."""
        name, params = equation.primitive.name, equation.params
        out = equation.outvars[0].aval
        if not any(isinstance(operand, Value) for operand in operands):
            if name in _MOVES:
                return _MOVES[name](operands[0], params, out.shape)
            if name in ("convert_element_type", "copy"):
                found = operands[0].astype(out.dtype)
                if np.array_equal(found.astype(np.float64), operands[0].astype(np.float64)):
                    return found
            raise _refused(name, "on parameters alone, which rounds: compute it beforehand, and pass the result")
        if name in _MOVES:
            return self.move(operands[0], _MOVES[name](operands[0].places, params, out.shape))
        if name == "convert_element_type" and not np.can_cast(equation.invars[0].aval.dtype, out.dtype):
            raise _refused(name, "to a narrower type, which rounds")
        rule = getattr(self, f"_{name}", None)
        if rule is None:
            raise _refused(name, "of values that depend on the input")
        return rule(operands, params, out)

    def split(self, operand: Any, params: dict) -> list:
        """The parts of a value or a constant, one after the other: the only primitive here with several results."""
        ends = np.cumsum(params["sizes"])[:-1]
        places = np.split(operand.places if isinstance(operand, Value) else operand, ends, params["axis"])
        return [self.move(operand, part) for part in places] if isinstance(operand, Value) else places

    # --- layers ---

    def numbers(self, array: ArrayLike) -> Array:
        """Constants as the checker computes with them."""
        return Layers(self.layers, self.rational).numbers(array)

    def add(self, layer: Layer, shape: tuple[int, ...]) -> Value:
        """Append a layer."""
        self.layers.append(layer)
        return Value(len(self.layers) - 1, tuple(shape))

    def move(self, value: Value, take: np.ndarray) -> Value:
        """A value whose entries are those at given places, 0 at -1."""
        if np.array_equal(take.ravel(), np.arange(math.prod(value.shape))):
            return Value(value.number, take.shape)
        return self.add(Move((value.number,), take.size, take.ravel(), math.prod(value.shape)), take.shape)

    def times(self, value: Value, matrix: ArrayLike, shape: tuple[int, ...]) -> Value:
        """Stretches along the last axes times a matrix."""
        return self.add(Dense((value.number,), math.prod(shape), self.numbers(matrix)), shape)

    def shifted(self, value: Value, shift: np.ndarray) -> Value:
        """A value plus a constant that broadcasts to it."""
        shift = self.numbers(np.broadcast_to(shift, value.shape).ravel())
        return self.add(Add((value.number,), shift.size, shift=shift), value.shape)

    def scaled(self, value: Value, factor: Array) -> Value:
        """A value times a constant that broadcasts to it."""
        factor = np.broadcast_to(factor, value.shape).ravel()
        return self.add(Scale((value.number,), factor.size, factor), value.shape)

    def summed(self, value: Value, windows: np.ndarray) -> Value:
        """The sums of the entries at given places, over the last axis."""
        parts, count = self.move(value, windows), windows.shape[-1]
        return self.times(parts, np.ones((count, 1)), windows.shape[:-1])

    # --- primitives, by their names ---

    def _add(self, operands: Sequence, _params: dict, _out: _compat.ShapedArray):
        first, second = operands
        if isinstance(first, Value) and isinstance(second, Value):
            return self.add(Add((first.number, second.number), math.prod(first.shape)), first.shape)
        return self.shifted(first, second) if isinstance(first, Value) else self.shifted(second, first)

    _add_any = _add

    def _neg(self, operands: Sequence, _params: dict, _out: _compat.ShapedArray):
        return self.scaled(operands[0], self.numbers(-1.0))

    def _sub(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        first, second = operands
        second = self._neg([second], params, out) if isinstance(second, Value) else -second
        return self._add([first, second], params, out)

    def _mul(self, operands: Sequence, _params: dict, _out: _compat.ShapedArray):
        first, second = operands
        if isinstance(first, Value) and isinstance(second, Value):
            raise _refused("mul", "of two values that depend on the input")
        value, factor = (first, second) if isinstance(first, Value) else (second, first)
        return self.scaled(value, self.numbers(factor))

    def _div(self, operands: Sequence, _params: dict, _out: _compat.ShapedArray):
        value, divisor = operands
        if isinstance(divisor, Value) or not np.all(divisor):
            raise _refused("div", "by a value that depends on the input, or by 0")
        return self.scaled(value, 1 / self.numbers(divisor))

    def _max(self, operands: Sequence, _params: dict, _out: _compat.ShapedArray):
        value, other = operands if isinstance(operands[0], Value) else operands[::-1]
        if isinstance(other, Value) or np.any(other):
            raise _refused("max", "of two values, or of one and another number than 0")
        return self.add(Relu((value.number,), math.prod(value.shape)), value.shape)

    def _copy(self, operands: Sequence, _params: dict, _out: _compat.ShapedArray):
        return operands[0]

    _convert_element_type = _copy

    def _concatenate(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        starts = np.cumsum([0, *(operand.shape[params["dimension"]] for operand in operands)])
        parts, fixed = [], np.zeros(out.shape)
        for start, operand in zip(starts, operands, strict=False):
            here = [slice(None)] * len(out.shape)
            here[params["dimension"]] = slice(start, start + operand.shape[params["dimension"]])
            if isinstance(operand, Value):
                take = np.full(out.shape, -1)
                take[tuple(here)] = operand.places
                parts.append(self.move(operand, take).number)
            else:
                fixed[tuple(here)] = operand
        return self.add(Add(tuple(parts), fixed.size, shift=self.numbers(fixed.ravel())), out.shape)

    def _pad(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        value, filler = operands
        if isinstance(filler, Value) or np.any(filler):
            raise _refused("pad", "with something else than 0")
        return self.move(value, _padded(value.places, params["padding_config"], out.shape))

    def _reduce_sum(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        places, axes = operands[0].places, params["axes"]
        last = np.moveaxis(places, axes, range(-len(axes), 0))
        return self.summed(operands[0], last.reshape(*out.shape, -1))

    def _reduce_window_sum(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        names = "window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"
        sizes, strides, padding, base, window = (params[name] for name in names)
        places = _windows(operands[0].places, sizes, strides, padding, base, window)
        return self.summed(operands[0], places.reshape(*out.shape, -1))

    def _dot_general(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        (contracted, batch), left = params["dimension_numbers"], isinstance(operands[0], Value)
        value, matrix = operands if left else operands[::-1]
        if isinstance(matrix, Value) or batch[0]:
            raise _refused("dot_general", "of two values that depend on the input, or in batches")
        own, other = contracted if left else contracted[::-1]
        free = [axis for axis in range(len(value.shape)) if axis not in own]
        rest = [axis for axis in range(matrix.ndim) if axis not in other]
        inner = math.prod(value.shape[axis] for axis in own)
        moved = self.move(value, np.transpose(value.places, (*free, *own)))
        matrix = np.transpose(matrix, (*other, *rest)).reshape(inner, -1)
        shape = [value.shape[axis] for axis in free]
        found = self.times(moved, matrix, (*shape, matrix.shape[1]))
        if left:
            return Value(found.number, out.shape)
        order = np.moveaxis(found.places, -1, 0)
        return Value(self.move(found, order).number, out.shape)

    def _conv_general_dilated(self, operands: Sequence, params: dict, out: _compat.ShapedArray):
        value, kernel = operands
        if not isinstance(value, Value) or isinstance(kernel, Value):
            raise _refused("conv_general_dilated", "with a kernel that depends on the input")
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            raise _refused("conv_general_dilated", "in groups")
        spec = params["dimension_numbers"]
        places, kernel = np.transpose(value.places, spec.lhs_spec), np.transpose(kernel, spec.rhs_spec)
        ones = (1, 1)
        windows = _windows(
            places, (1, *kernel.shape[1:]), (*ones, *params["window_strides"]), ((0, 0), (0, 0), *params["padding"]),
            (*ones, *params["lhs_dilation"]), (*ones, *params["rhs_dilation"]),
        )  # fmt: skip
        count, channels = windows.shape[: places.ndim], len(kernel)
        matrix = kernel.reshape(channels, -1).T
        moved = self.move(value, windows.reshape(*count, -1))
        found = self.times(moved, matrix, (count[0], *count[2:], channels))
        ordered = np.moveaxis(found.places, -1, 1)  # batch, channels, space
        return self.move(found, np.transpose(ordered, np.argsort(spec.out_spec)).reshape(out.shape))


# --- entries at other places ------------------------------------------------------------------------------------------


def _broadcast(array: np.ndarray, params: dict, shape: Sequence[int]):
    wide = [1] * len(shape)
    for axis, place in enumerate(params["broadcast_dimensions"]):
        wide[place] = array.shape[axis]
    return np.broadcast_to(array.reshape(wide), shape)


def _slice(array: np.ndarray, params: dict, _shape: Sequence[int]):
    steps = params["strides"] or (1,) * array.ndim
    limits = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return array[tuple(slice(*one) for one in limits)]


def _reshape(array: np.ndarray, _params: dict, shape: Sequence[int]):
    return array.reshape(shape)


_MOVES: dict[str, Callable] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "transpose": lambda array, params, _shape: np.transpose(array, params["permutation"]),
    "rev": lambda array, params, _shape: np.flip(array, params["dimensions"]),
}


def _padded(places: np.ndarray, config: Sequence[tuple[int, int, int]], shape: Sequence[int]) -> np.ndarray:
    found = np.full(shape, -1)
    inside, read = [], []
    for size, whole, (low, _, interior) in zip(places.shape, shape, config, strict=True):
        at = low + np.arange(size) * (interior + 1)
        valid = (at >= 0) & (at < whole)
        inside.append(at[valid])
        read.append(np.flatnonzero(valid))
    found[np.ix_(*inside)] = places[np.ix_(*read)]
    return found


def _windows(
    places: np.ndarray,
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base: Sequence[int],
    window: Sequence[int],
) -> np.ndarray:
    """The places in every window: (windows of every axis, sizes of every axis), -1 outside."""
    config = [(low, high, step - 1) for (low, high), step in zip(padding, base, strict=True)]
    shape = [
        low + high + (size - 1) * (interior + 1) + 1
        for size, (low, high, interior) in zip(places.shape, config, strict=True)
    ]
    whole = _padded(places, config, shape)
    spans = [(size - 1) * step + 1 for size, step in zip(sizes, window, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(whole, spans)
    strided = views[tuple(slice(None, None, step) for step in strides)]
    return strided[(..., *(slice(None, None, step) for step in window))]


def _refused(name: str, what: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"certificates do not cover `{name}` {what}; they cover affine layers, convolutions, sums, average pooling and "
        "ReLU: leave certificate out"
    )
