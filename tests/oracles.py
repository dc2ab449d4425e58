"""Independent references: an exact evaluator in NumPy float64, points of regions, linear and mixed-integer programs.

Nothing here uses jaxbound's interpreters: regions are read as plain data, functions as the jaxprs that JAX traces.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
import scipy.special as special
from jax.lax import GatherScatterMode
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from jaxbound import Box

Array = np.ndarray

# --- functions, in float64 --------------------------------------------------------------------------------------------


def exactly(function: Callable, *args) -> list[Array]:
    """The flat results of a function in NumPy float64, whatever dtype it is traced in: its numbers count as given."""
    closed = jax.make_jaxpr(function)(*args)
    flat = [_wide(np.asarray(leaf)) for leaf in jax.tree.leaves(args)]
    with np.errstate(all="ignore"):
        return _run(closed.jaxpr, closed.consts, flat)


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array


def _run(jaxpr, consts, args: Sequence[Array]) -> list[Array]:
    """Equation by equation; what has a rule is not taken for a call, though it has a jaxpr (loops)."""
    known = dict(zip(jaxpr.invars, args, strict=True))
    known.update(zip(jaxpr.constvars, [_wide(np.asarray(c)) for c in consts], strict=True))

    def read(atom):
        return _wide(np.asarray(atom.val)) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        rule, operands = _RULES.get(equation.primitive.name), [read(atom) for atom in equation.invars]
        if rule is not None:
            results = rule(equation, *operands)
        else:
            inner = next((equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params), None)
            if inner is None:
                raise KeyError(equation.primitive.name)
            results = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
        known.update(zip(equation.outvars, results if isinstance(results, list) else [results], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _elementwise(function: Callable) -> Callable:
    return lambda _, *operands: function(*operands)


def _shaped(function: Callable) -> Callable:
    return lambda equation, *operands: function(*operands, equation.params)


def _broadcast(x, p):
    shape = [1] * len(p["shape"])
    for axis, size in zip(p["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), p["shape"])


def _pad(x, value, p):
    for axis, (low, high, inside) in enumerate(p["padding_config"]):
        moved = np.moveaxis(x, axis, 0)
        size = max(len(moved) + (len(moved) - 1) * inside, 0) if len(moved) else 0
        wide = np.full((size, *moved.shape[1:]), value, dtype=x.dtype)
        wide[:: inside + 1] = moved
        wide = wide[max(-low, 0) : size - max(-high, 0)]
        ends = [np.full((max(n, 0), *moved.shape[1:]), value, dtype=x.dtype) for n in (low, high)]
        x = np.moveaxis(np.concatenate([ends[0], wide, ends[1]]), 0, axis)
    return x


def _dot(x, y, p):
    (cx, cy), (bx, by) = p["dimension_numbers"]
    names = iter("abcdefghijklmnopqrstuvwxyz")
    left, right = [next(names) for _ in x.shape], [next(names) for _ in y.shape]
    for i, j in (*zip(cx, cy, strict=True), *zip(bx, by, strict=True)):
        right[j] = left[i]
    free = [left[i] for i in range(x.ndim) if i not in (*cx, *bx)]
    free += [right[j] for j in range(y.ndim) if j not in (*cy, *by)]
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join([*(left[i] for i in bx), *free])}", x, y)


def _conv(x, kernel, p):
    """Place by place, with the batch, feature and spatial axes brought to one order."""
    numbers = p["dimension_numbers"]
    x, kernel = np.transpose(x, numbers.lhs_spec), np.transpose(kernel, numbers.rhs_spec)
    config = [(0, 0, 0), (0, 0, 0)]
    config += [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = _pad(x, 0.0, {"padding_config": config})
    kernel = _pad(kernel, 0.0, {"padding_config": [(0, 0, 0), (0, 0, 0), *((0, 0, d - 1) for d in p["rhs_dilation"])]})
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel.shape[2:], p["window_strides"], strict=True)]
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    out = np.zeros((x.shape[0] // batches, kernel.shape[0], *sizes))
    width, outs = kernel.shape[1], kernel.shape[0] // (groups * batches)
    for group in range(groups * batches):
        rows = x[group * out.shape[0] : (group + 1) * out.shape[0]] if batches > 1 else x
        rows = rows[:, group * width : (group + 1) * width] if groups > 1 else rows
        weights = kernel[group * outs : (group + 1) * outs]
        for place in np.ndindex(*kernel.shape[2:]):
            spans = zip(place, sizes, p["window_strides"], strict=True)
            part = rows[(slice(None), slice(None), *(slice(o, o + (n - 1) * s + 1, s) for o, n, s in spans))]
            out[:, group * outs : (group + 1) * outs] += np.einsum("ni...,oi->no...", part, weights[(..., *place)])
    return np.transpose(out, np.argsort(numbers.out_spec))


def _window(reduce: Callable, start: float) -> Callable:
    def rule(x, p):
        dilated = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["base_dilation"], strict=True)]
        spans = [(n - 1) * d + 1 for n, d in zip(p["window_dimensions"], p["window_dilation"], strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(_pad(x, start, {"padding_config": dilated}), spans)
        steps = [slice(None, None, s) for s in p["window_strides"]]
        windows = windows[(*steps, *(slice(None, None, d) for d in p["window_dilation"]))]
        return reduce(windows, axis=tuple(range(x.ndim, 2 * x.ndim)))

    return _shaped(rule)


def _gather(equation, x, indices):
    """Window by window, with starts kept inside as the modes "clip" and "promise in bounds" do."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    out = np.zeros(equation.outvars[0].aval.shape)
    places = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for place in np.ndindex(*(out.shape[axis] for axis in places)):
        start = np.zeros(x.ndim, int)
        start[list(numbers.start_index_map)] = indices[place]
        for axis, mine in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            start[axis] = place[mine]
        window = x[_starts(x, start, sizes)].squeeze(dropped)
        target = dict(zip(places, place, strict=True))
        out[tuple(target.get(axis, slice(None)) for axis in range(out.ndim))] = window
    return out


def _scatter(combine: Callable[[Array, Array], Array]) -> Callable:
    """Windows put together with what is there; those that do not fit are dropped, unless the mode says otherwise."""

    def rule(equation, x, indices, updates):
        numbers, x, mode = equation.params["dimension_numbers"], x.copy(), equation.params["mode"]
        places = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
        dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        for place in np.ndindex(*(updates.shape[axis] for axis in places)):
            start = np.zeros(x.ndim, int)
            start[list(numbers.scatter_dims_to_operand_dims)] = indices[place]
            for axis, mine in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
                start[axis] = place[mine]
            at = dict(zip(places, place, strict=True))
            window = np.expand_dims(updates[tuple(at.get(axis, slice(None)) for axis in range(updates.ndim))], dropped)
            most = np.array(x.shape) - window.shape
            if mode == GatherScatterMode.CLIP:
                start = np.clip(start, 0, most)
            if np.all((start >= 0) & (start <= most)):
                where = tuple(slice(s, s + n) for s, n in zip(start, window.shape, strict=True))
                x[where] = combine(x[where], window)
        return x

    return rule


def _starts(x, starts, sizes):
    return tuple(
        slice(s, s + n)
        for s, n in ((int(np.clip(s, 0, m - n)), n) for s, n, m in zip(starts, sizes, x.shape, strict=True))
    )


def _slice_update(x, update, *starts):
    x = x.copy()
    x[_starts(x, starts, update.shape)] = update
    return x


def _integer_power(equation, x):
    return x ** float(equation.params["y"])


def _convert(equation, x):
    dtype = np.dtype(equation.params["new_dtype"])
    return x.astype(dtype) if dtype.kind in "iub" else _wide(x).astype(np.float64)


def _split(x, p):
    return np.split(x, np.cumsum(p["sizes"])[:-1], axis=p["axis"])


def _choose(_, which, *cases):
    return np.choose(np.asarray(which, int), np.broadcast_arrays(*cases)) if np.ndim(which) else cases[int(which)]


_RULES: dict[str, Callable] = {
    **{
        name: _elementwise(getattr(np, function))
        for name, function in {
            "add": "add", "sub": "subtract", "mul": "multiply", "neg": "negative", "max": "maximum",
            "min": "minimum", "abs": "abs", "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log",
            "log1p": "log1p", "tanh": "tanh", "sin": "sin", "cos": "cos", "sinh": "sinh", "atan": "arctan",
            "asinh": "arcsinh", "sqrt": "sqrt", "square": "square", "pow": "power", "sign": "sign", "ge": "greater_equal",
            "gt": "greater", "le": "less_equal", "lt": "less", "eq": "equal", "ne": "not_equal", "and": "bitwise_and",
            "or": "bitwise_or", "not": "bitwise_not", "is_finite": "isfinite", "copy": "array", "stop_gradient": "array",
            "floor": "floor", "add_any": "add",
        }.items()
    },
    "div": _elementwise(lambda x, y: x // y if x.dtype.kind in "iu" else x / y),  # of integers that are not negative
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x)),
    "logistic": _elementwise(special.expit),
    "erf": _elementwise(special.erf),
    "erfc": _elementwise(special.erfc),
    "clamp": _elementwise(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "integer_pow": _integer_power,
    "convert_element_type": _convert,
    "select_n": _choose,
    "reshape": _shaped(lambda x, p: np.transpose(x, p["dimensions"] or range(x.ndim)).reshape(p["new_sizes"])),
    "squeeze": _shaped(lambda x, p: np.squeeze(x, tuple(p["dimensions"]))),
    "expand_dims": _shaped(lambda x, p: np.expand_dims(x, tuple(p["dimensions"]))),
    "transpose": _shaped(lambda x, p: np.transpose(x, p["permutation"])),
    "rev": _shaped(lambda x, p: np.flip(x, tuple(p["dimensions"]))),
    "broadcast_in_dim": _shaped(_broadcast),
    "concatenate": lambda equation, *parts: np.concatenate(parts, equation.params["dimension"]),
    "stack": lambda equation, *parts: np.stack(parts, equation.params.get("axis", 0)),
    "pad": _shaped(_pad),
    "slice": _shaped(
        lambda x, p: x[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or (1,) * x.ndim))]
    ),
    "dynamic_slice": lambda equation, x, *starts: x[_starts(x, starts, equation.params["slice_sizes"])],
    "dynamic_update_slice": _elementwise(_slice_update),
    "gather": _gather,
    "scatter": _scatter(lambda _, new: new),
    "split": _shaped(_split),
    "iota": lambda equation: np.broadcast_to(
        np.arange(equation.params["shape"][equation.params["dimension"]]).reshape(
            [-1 if k == equation.params["dimension"] else 1 for k in range(len(equation.params["shape"]))]
        ),
        equation.params["shape"],
    ),
    "dot_general": _shaped(_dot),
    "conv_general_dilated": _shaped(_conv),
    "reduce_sum": _shaped(lambda x, p: np.sum(x, axis=tuple(p["axes"]))),
    "reduce_max": _shaped(lambda x, p: np.max(x, axis=tuple(p["axes"]))),
    "reduce_min": _shaped(lambda x, p: np.min(x, axis=tuple(p["axes"]))),
    "cumsum": _shaped(lambda x, p: np.cumsum(x, p["axis"]) if not p["reverse"] else np.flip(np.cumsum(np.flip(x, p["axis"]), p["axis"]), p["axis"])),
    "reduce_window_sum": _window(np.sum, 0.0),
    "reduce_window_max": _window(np.max, -np.inf),
}  # fmt: skip

# --- points of regions ------------------------------------------------------------------------------------------------

_INSIDE = 1 - 1e-9  # keeps points of a ball inside whatever the rounding of their distance


def points(region, rng: np.random.Generator, count: int) -> Array:
    """Uniform points, corners, faces, poles, surfaces, and points with coordinates at 0, all inside, in float64."""
    low, high = _frame(region)
    shape = (count, *low.shape)
    part = rng.random(shape)
    corner = np.where(rng.random(shape) < 0.5, low, high)
    inner = low + (high - low) * part
    face = np.where(rng.random(shape) < 0.5, corner, inner)
    kink = np.where(rng.random(shape) < 0.4, np.clip(0.0, low, high), face)
    direction = rng.normal(size=shape)
    sparse = rng.random((count, *(1,) * low.ndim)) < 0.4
    largest = np.abs(direction) == np.max(np.abs(direction), axis=tuple(range(1, direction.ndim)), keepdims=True)
    pole = vertex(region, np.where(sparse & ~largest, 0.0, direction))
    choice = rng.integers(0, 5, (count, *(1,) * low.ndim))
    return _into(region, np.choose(choice, [corner, inner, face, kink, pole]))


def vertex(region, direction: Array) -> Array:
    """For each direction a point far along it: a corner of a box, the support point of a ball moved into its clip box."""
    if isinstance(region, Box) or region.norm == np.inf:
        low, high = _frame(region)
        return np.where(direction > 0, high, np.where(direction < 0, low, low / 2 + high / 2))
    flat = direction.reshape(len(direction), -1)
    size = np.abs(flat) / np.maximum(np.abs(flat).max(axis=1, keepdims=True), 1e-300)
    if region.norm == 1:
        unit = (np.arange(flat.shape[1]) == size.argmax(axis=1)[:, None]).astype(float)
    else:
        unit = size ** (1 / (region.norm - 1))
        unit = unit / np.maximum(np.linalg.norm(unit, region.norm, axis=1, keepdims=True), 1e-300)
    step = (np.sign(flat) * unit).reshape(direction.shape)
    return _into(region, np.asarray(region.center, float) + float(region.radius) * step)


def between(region, x: Array, far: Array, share: float) -> Array:
    """A share of the way from points of the region to others, inside the region despite rounding."""
    return _into(region, x + share * (far - x))


def contains(region, x: Array) -> Array:
    """Whether each point is in the region, with the region's own numbers."""
    axes = tuple(range(1, x.ndim))
    if isinstance(region, Box):
        low, high = np.asarray(region.lower, float), np.asarray(region.upper, float)
        return np.all((x >= low) & (x <= high), axis=axes)
    inside = _distance(region, x) <= float(region.radius)
    if region.clip is not None:
        inside &= np.all((x >= np.asarray(region.clip[0], float)) & (x <= np.asarray(region.clip[1], float)), axis=axes)
    return inside


def _distance(region, x: Array) -> Array:
    gap = (x - np.asarray(region.center, float)).reshape(len(x), -1)
    return np.linalg.norm(gap, region.norm, axis=1)


def _frame(region) -> tuple[Array, Array]:
    """A finite box around (or, if the region is infinite, inside) the region."""
    if isinstance(region, Box):
        low, high = np.asarray(region.lower, float), np.asarray(region.upper, float)
        least, most = np.minimum(high, 0) - 1e3, np.maximum(low, 0) + 1e3
        return np.where(np.isfinite(low), low, least), np.where(np.isfinite(high), high, most)
    center, radius = np.asarray(region.center, float), float(region.radius)
    radius = radius if np.isfinite(radius) else 1e3
    if region.norm != np.inf or region.clip is None:
        return center - radius, center + radius
    low, high = (np.broadcast_to(np.asarray(end, float), center.shape) for end in region.clip)
    return np.maximum(center - radius, low), np.minimum(center + radius, high)


def _into(region, x: Array) -> Array:
    """Candidates pulled into the region along the line to one of its points."""
    if isinstance(region, Box) or region.norm == np.inf:
        return np.clip(x, *_frame(region))
    center = np.asarray(region.center, float)
    low, high = (-np.inf, np.inf) if region.clip is None else (np.asarray(end, float) for end in region.clip)
    anchor, x = np.clip(center, low, high), np.clip(x, low, high)

    def moved(share: Array) -> Array:
        return np.clip(anchor + share.reshape(-1, *(1,) * (x.ndim - 1)) * (x - anchor), low, high)

    def inside(share: Array) -> Array:
        return _distance(region, moved(share)) <= float(region.radius) * _INSIDE

    far = np.ones(len(x))
    near = np.where(inside(far), 1.0, 0.0)
    for _ in range(50):
        middle = (near + far) / 2
        within = inside(middle)
        near, far = np.where(within, middle, near), np.where(within, far, middle)
    return moved(near)


# --- programs ---------------------------------------------------------------------------------------------------------

Layers = Sequence[tuple[Array, Array]]
"""Dense layers `(kernel (in, out), bias)`, ReLU between."""


def relu_value(layers: Layers, x: Array) -> Array:
    """The network's value at a batch of points."""
    for number, (kernel, bias) in enumerate(layers):
        x = (np.maximum(x, 0) if number else x) @ kernel + bias
    return x


def relu_linear_program(layers: Layers, low: Array, high: Array, lines: Sequence[tuple]) -> tuple[Array, Array]:
    """Bounds of every output by a linear program in which each ReLU is replaced by given lines.

    Args:
        layers: the network.
        low, high: the input box.
        lines: per hidden layer `(lower slope, lower intercept, upper slope, upper intercept)`, each (neurons,).
    """
    sizes = [len(low), *(len(bias) for _, bias in layers[:-1])]
    offsets = np.cumsum([0, *sizes])
    rows, limits = [], []
    for k, (kernel, bias) in enumerate(layers[:-1]):
        below, below_at, above, above_at = lines[k]
        for j in range(len(bias)):
            z = np.zeros(offsets[-1])
            z[offsets[k] : offsets[k + 1]] = kernel[:, j]
            y = np.zeros(offsets[-1])
            y[offsets[k + 1] + j] = 1
            rows += [below[j] * z - y, y - above[j] * z]
            limits += [-below_at[j] - below[j] * bias[j], above_at[j] + above[j] * bias[j]]
    kernel, bias = layers[-1]
    ends = [(a, b) for a, b in zip(low, high, strict=True)] + [(None, None)] * int(offsets[-1] - len(low))
    found = np.zeros((2, len(bias)))
    for j, side in itertools.product(range(len(bias)), range(2)):
        cost = np.zeros(offsets[-1])
        cost[offsets[-2] :] = kernel[:, j] * (1, -1)[side]
        matrix = np.array(rows).reshape(-1, len(cost))
        solved = linprog(cost, A_ub=matrix, b_ub=np.array(limits), bounds=ends, method="highs")
        assert solved.status == 0, solved.message
        found[side, j] = (1, -1)[side] * solved.fun + bias[j]
    return found[0], found[1]


def relu_exact(layers: Layers, low: Array, high: Array) -> tuple[Array, Array]:
    """The exact range of every output over a box, by a mixed-integer program with interval pre-activation bounds."""
    sizes = [len(low), *(len(bias) for _, bias in layers[:-1])]
    neurons = sum(sizes[1:])
    offsets = np.cumsum([0, *sizes])
    width = int(offsets[-1]) + neurons
    rows, at_most = [], []
    ends_low, ends_high = np.full(width, 0.0), np.full(width, 1.0)
    ends_low[: len(low)], ends_high[: len(low)] = low, high
    l, u = low, high  # noqa: E741
    for k, (kernel, bias) in enumerate(layers[:-1]):
        z_low = np.maximum(kernel, 0).T @ l + np.minimum(kernel, 0).T @ u + bias
        z_high = np.maximum(kernel, 0).T @ u + np.minimum(kernel, 0).T @ l + bias
        for j in range(len(bias)):
            y, step = int(offsets[k + 1]) + j, width - neurons + int(offsets[k + 1] - offsets[1]) + j
            z = np.zeros(width)
            z[offsets[k] : offsets[k + 1]] = kernel[:, j]
            most, least = max(z_high[j], 0), min(z_low[j], 0)
            unit = np.eye(width)
            # y >= z, y <= z - least (1 - step), y <= most step, 0 <= y
            rows += [z - unit[y], unit[y] - z - least * unit[step], unit[y] - most * unit[step]]
            at_most += [-bias[j], bias[j] - least, 0.0]
            ends_high[y] = most
        l, u = np.maximum(z_low, 0), np.maximum(z_high, 0)  # noqa: E741
    kernel, bias = layers[-1]
    whole = np.zeros(width)
    whole[width - neurons :] = 1
    found = np.zeros((2, len(bias)))
    for j, side in itertools.product(range(len(bias)), range(2)):
        cost = np.zeros(width)
        cost[offsets[-2] : offsets[-1]] = kernel[:, j] * (1, -1)[side]
        solved = milp(
            cost, constraints=LinearConstraint(np.array(rows), -np.inf, np.array(at_most)), integrality=whole,
            bounds=Bounds(ends_low, ends_high), options={"mip_rel_gap": 0},
        )  # fmt: skip
        assert solved.status == 0, solved.message
        found[side, j] = (1, -1)[side] * solved.fun + bias[j]
    return found[0], found[1]
