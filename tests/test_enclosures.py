"""Dense checks of every enclosure: about 1000 hard intervals (or boxes) by 1000 points each.

A line with a given slope must be on its side of the graph at every point, and touch it up to rounding; the slopes that
the rules choose are then sound too. In float32 the lines, as numbers, are compared with the function in float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from networks import ACTIVATIONS, Activation

import jaxbound as jb
from jaxbound.driver import Run
from jaxbound.graph import tracing
from jaxbound.relaxations.enclosures import maximum, product, scalar, search
from jaxbound.relaxations.slopes import ADAPTIVE, Given, rule_of

INTERVALS, SAMPLES = 1000, 1000
FLUSHED = {np.float32: 2.0**-125, np.float64: 2.0**-1021}  # subnormal numbers count as 0
PIECEWISE = {
    "relu", "leaky_relu", "leaky_relu_steep", "leaky_relu_negative", "relu6", "clip", "abs", "hard_tanh", "hard_sigmoid",
}  # fmt: skip
CURVED = [name for name in ACTIVATIONS if name not in PIECEWISE]
# their derivatives, or their values, are where a formula that is right elsewhere goes wrong
QUICK_FLOAT32 = [
    "softplus",
    "log_sigmoid",
    "tanh",
    "gelu",
    "erfc",
    "elu",
    "exp",
    "exp2",
    "sinh",
    "mish",
    "relu",
    "hard_swish",
]

# --- intervals and slopes ---------------------------------------------------------------------------------------------


def _intervals(activation: Activation, rng: np.random.Generator, dtype, count: int = INTERVALS):
    """Around kinks and inflections, tiny and wide, dyadic (bisection meets 0), single points, subnormal ends."""
    kinks, low, high = np.array(activation.kinks), activation.low, activation.high
    center = np.where(
        rng.random(count) < 0.6, rng.choice(kinks, count), rng.normal(size=count) * 10 ** rng.uniform(-3, 1.5, count)
    )
    width = 10 ** rng.uniform(-7, np.log10(high - low), count)
    share = rng.choice([0.0, 1.0, 0.5, 2.0, -1.0], count) + 0.3 * rng.normal(size=count)
    lower = center - width * share
    upper = lower + width
    quarter = count // 4
    lower[:quarter] = -(2.0 ** rng.integers(-6, 6, quarter)) * rng.integers(0, 4, quarter)
    upper[:quarter] = 2.0 ** rng.integers(-6, 6, quarter) * rng.integers(1, 4, quarter)
    upper[quarter : quarter + 30] = lower[quarter : quarter + 30]
    tiny = float(np.finfo(dtype).tiny)
    special = [
        (0, 0), (-0.0, 0.0), (-tiny, tiny), (0, tiny), (-tiny / 4, tiny / 8), (-1e-30, 1e-30), (low, high), (low, 0),
        (0, high), (low, low + 1), (high - 1, high), (low, low), (high, high),
    ]  # fmt: skip
    for k, (a, b) in enumerate(special):
        lower[count - 1 - k], upper[count - 1 - k] = a, b
    lower, upper = (np.clip(end, low, high).astype(dtype) for end in (lower, upper))
    return np.minimum(lower, upper), np.maximum(lower, upper)


def _samples(activation: Activation, rng: np.random.Generator, lower, upper, count: int = SAMPLES):
    """Points of each interval, in float64, with its ends and the kinks inside it."""
    lower, upper = lower.astype(np.float64), upper.astype(np.float64)
    share = np.concatenate([np.linspace(0, 1, count // 2), rng.random(count - count // 2)])[:, None]
    kinks = np.clip(np.array([*activation.kinks, 0.0])[:, None], lower, upper)
    return np.clip(np.concatenate([lower + (upper - lower) * share, kinks]), lower, upper)


def _slopes(rng: np.random.Generator, values: np.ndarray, lower, upper, dtype):
    """Chords, multiples of chords, flat, steep and arbitrary slopes."""
    width = upper.astype(np.float64) - lower
    rise = values[SAMPLES // 2 - 1] - values[0]
    chord = np.where(width > 0, rise / np.where(width > 0, width, 1), 0.5)
    factor = rng.choice([0.0, 1.0, 1.0, 0.5, 0.25, 2.0, -1.0], len(chord))
    return np.clip(
        chord * factor + rng.normal(size=len(chord)) * rng.choice([0, 0, 1e-3, 1.0], len(chord)), -1e12, 1e12
    ).astype(dtype)


@functools.cache
def _op(name: str, dtype, shape: tuple[int, ...] = (INTERVALS,)):
    """The one scalar node that an activation is."""
    structure = tracing.build(ACTIVATIONS[name].function, (jax.ShapeDtypeStruct(shape, dtype),), (True,))
    _, node = structure.nodes
    assert node.op.kind == "scalar"
    return node.op


def _dense_problem(name: str, dtype, seed: int):
    """Intervals, points, values in float64 and slopes for one activation."""
    activation, rng = ACTIVATIONS[name], np.random.default_rng(seed)
    lower, upper = _intervals(activation, rng, dtype)
    z = _samples(activation, rng, lower, upper)
    with np.errstate(all="ignore"):
        values = activation.reference(z)
    below, above = (_slopes(rng, values, lower, upper, dtype) for _ in range(2))
    return lower, upper, z, values, below, above


def _worst(z, values, planes, interval, dtype, rounding: float) -> tuple[float, int]:
    """The largest violation beyond `rounding` units of the sizes involved, and its interval."""
    worst = np.zeros(z.shape[1])
    lines = [
        (1, np.zeros(1), interval[0]), (-1, np.zeros(1), interval[1]),
        *((1, s, i) for s, i in zip(planes.lower_slopes, [planes.lower_intercept], strict=True)),
        *((-1, s, i) for s, i in zip(planes.upper_slopes, [planes.upper_intercept], strict=True)),
    ]  # fmt: skip
    for sign, slope, intercept in lines:
        slope, intercept = np.asarray(slope, np.float64), np.asarray(intercept, np.float64)
        assert not np.isnan(slope).any()
        assert not np.isnan(intercept).any()
        with np.errstate(all="ignore"):
            allowed = rounding * (np.abs(values) + np.abs(slope * z)) + FLUSHED[dtype] * (1 + np.abs(slope))
            excess = sign * (slope * z + intercept - values) - allowed
        worst = np.maximum(worst, np.where(np.isnan(excess), np.inf, excess).max(axis=0))
    return float(worst.max()), int(worst.argmax())


def _check_lines(name: str, dtype, seed: int, options: dict, rules=()) -> None:
    lower, upper, z, values, below, above = _dense_problem(name, dtype, seed)

    def given(lower, upper, below, above):
        interval = scalar.interval(_op(name, dtype), [(lower, upper)], [])
        return interval, scalar.planes(_op(name, dtype), [(lower, upper)], [], Given(below, above))

    def chosen(rule, lower, upper):
        return scalar.planes(_op(name, dtype), [(lower, upper)], [], rule_of(rule))

    # the reference itself is a few units of float64 off
    rounding = 4 * np.finfo(np.float64).eps
    arguments = [jnp.asarray(a, dtype) for a in (lower, upper, below, above)]
    interval, planes = jax.jit(given).lower(*arguments).compile(options)(*arguments)
    found = {"given slopes": _worst(z, values, planes, interval, dtype, rounding)}
    for rule in rules:
        program = jax.jit(functools.partial(chosen, rule)).lower(*arguments[:2]).compile(options)
        found[rule] = _worst(z, values, program(*arguments[:2]), interval, dtype, rounding)
    wrong = {
        rule: f"by {excess:.3g} on [{lower[k]!r}, {upper[k]!r}] with slopes {below[k]!r}, {above[k]!r}"
        for rule, (excess, k) in found.items()
        if excess > 0
    }
    assert not wrong, f"{name}: lines on the wrong side of the graph: {wrong}"


# --- soundness --------------------------------------------------------------------------------------------------------

FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.mark.quick(17)
@pytest.mark.x64
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lines_with_any_slope_are_sound(name):
    _check_lines(name, np.float64, 0, FAST_COMPILE)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", QUICK_FLOAT32)
def test_float32_lines_are_sound_for_the_function_itself(name):
    _check_lines(name, np.float32, 1, {})


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("seed", [10, 11, 12])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lines_of_every_rule_are_sound(name, seed):
    _check_lines(name, np.float64, seed, {}, ("adaptive", "parallel", "zero", "one"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [20, 21, 22])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_lines_of_every_rule_are_sound(name, seed):
    _check_lines(name, np.float32, seed, {}, ("adaptive", "parallel", "zero", "one"))


@pytest.mark.quick(10)
@pytest.mark.parametrize("name", ["relu", "sigmoid", "silu", "exp", "abs"])
@pytest.mark.parametrize(
    ("lower", "upper"), [(-np.inf, np.inf), (-np.inf, 1.0), (-2.0, np.inf), (np.nan, 1.0), (5.0, 1e38)]
)
def test_infinite_ends(name, lower, upper):
    op = _op(name, np.float32, (1,))
    ends = [(jnp.array([lower], jnp.float32), jnp.array([upper], jnp.float32))]
    interval = scalar.interval(op, ends, [])
    planes = scalar.planes(op, ends, [])
    low, high = (-100.0, 100.0) if np.isnan(lower) else np.clip([lower, upper], -100, 100)
    z = np.linspace(low, high, 2001)
    values = ACTIVATIONS[name].reference(z)
    assert not np.isnan([*interval, *planes.lower_slopes, planes.lower_intercept, planes.upper_intercept]).any()
    assert np.all(np.asarray(interval[0], float) <= values)
    assert np.all(np.asarray(interval[1], float) >= values)
    assert np.all(
        np.asarray(planes.lower_slopes[0], float) * z + np.asarray(planes.lower_intercept, float)
        <= values + 1e-6 * np.abs(values)
    )
    assert np.all(
        np.asarray(planes.upper_slopes[0], float) * z + np.asarray(planes.upper_intercept, float)
        >= values - 1e-6 * np.abs(values)
    )


# --- tightness --------------------------------------------------------------------------------------------------------

TIGHT = 60  # intervals


def _moderate(name: str, seed: int):
    """Intervals of ordinary width and slopes within reach of the function's own."""
    activation, rng = ACTIVATIONS[name], np.random.default_rng(seed)
    kinks = rng.choice(activation.kinks, TIGHT)
    lower = np.maximum(kinks - rng.uniform(-0.5, 3, TIGHT), activation.low)
    upper = np.minimum(lower + rng.uniform(0.1, 5, TIGHT), activation.high)
    slopes = (activation.reference(upper) - activation.reference(lower)) / (upper - lower) + rng.normal(
        size=TIGHT
    ) * 0.3
    return activation, lower, upper, slopes


def _least_gap(function, kinks, lower, upper, slope) -> np.ndarray:
    """min of function(z) - slope z by three nested grids, with the kinks on them."""
    low, high = lower, upper
    for _ in range(3):
        z = low + (high - low) * np.linspace(0, 1, 401)[:, None]
        z = np.concatenate([z, np.clip(np.array(kinks)[:, None], lower, upper)])
        gaps = function(z) - slope * z
        best, step = z[gaps.argmin(axis=0), np.arange(len(low))], (high - low) / 400
        low, high = np.maximum(best - step, lower), np.minimum(best + step, upper)
    return gaps.min(axis=0)


@pytest.mark.quick(4)
@pytest.mark.x64
@pytest.mark.parametrize("drop", [2e-12, 9e-14, 1e-14])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.3, -2.3])
def test_a_jump_too_small_to_break_monotonicity_is_bounded(at, drop):
    """It passes for a kink of a function that rises, and is far above the rounding of its values."""
    near = np.nextafter(at, [-9.0, 9.0])
    for base in (lambda z: z, jnp.tanh):
        for sign in (1, -1):
            function = lambda z, b=base, s=sign: s * jnp.where(z < at, b(z) + 0.3, b(z) + (0.3 - drop))  # noqa: E731
            for low, high in (near, (near[0], at + 1), (at - 1, near[1]), (at, at + 0.5), (at - 0.5, at)):
                op = tracing.build(function, [jax.ShapeDtypeStruct((1,), np.float64)], [True]).nodes[1].op
                least, most = scalar.interval(op, [(jnp.asarray([low]), jnp.asarray([high]))], [])
                values = function(np.array([z for z in (low, high, at, *near) if low <= z <= high]))
                assert least <= values.min() + 2e-15
                assert values.max() - 2e-15 <= most


@pytest.mark.quick(17)
@pytest.mark.x64
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_intercepts_and_intervals_are_exact(name):
    activation, lower, upper, slopes = _moderate(name, 3)
    op = _op(name, np.float64, (TIGHT,))

    def run(lower, upper, slope):
        return scalar.interval(op, [(lower, upper)], []), scalar.planes(op, [(lower, upper)], [], Given(slope, slope))

    interval, planes = jax.jit(run).lower(lower, upper, slopes).compile(FAST_COMPILE)(lower, upper, slopes)
    least = functools.partial(_least_gap, activation.reference, activation.kinks, lower, upper)
    most = functools.partial(_least_gap, lambda z: -activation.reference(z), activation.kinks, lower, upper)
    scale = 1 + np.abs(activation.reference(upper)) + np.abs(activation.reference(lower))
    assert np.all(least(slopes) - planes.lower_intercept < 1e-8 * scale)
    assert np.all(planes.upper_intercept + most(-slopes) < 1e-8 * scale)
    assert np.all(least(0.0) - interval[0] < 1e-8 * scale)
    assert np.all(interval[1] + most(0.0) < 1e-8 * scale)


@pytest.mark.quick(4)
@pytest.mark.x64
@pytest.mark.parametrize(
    "name", ["relu", "leaky_relu_negative", "abs", "clip", "tanh", "softplus", "gelu", "selu", "sin", "square"]
)
def test_adaptive_lines_touch_the_convex_hull_at_the_midpoint(name):
    activation, lower, upper, _ = _moderate(name, 4)
    planes = jax.jit(lambda *ends: scalar.planes(_op(name, np.float64, (TIGHT,)), [ends], []))(lower, upper)
    middle = lower / 2 + upper / 2
    share = np.linspace(0, 1, 301)[1:, None]
    kinks = np.array(activation.kinks)[:, None]
    left = np.concatenate([middle + (lower - middle) * share, np.clip(kinks, lower, middle - 1e-9)])
    right = np.concatenate([middle + (upper - middle) * share, np.clip(kinks, middle + 1e-9, upper)])
    for sign, slope, intercept in (
        (1, planes.lower_slopes[0], planes.lower_intercept), (-1, planes.upper_slopes[0], planes.upper_intercept)
    ):  # fmt: skip
        f_left, f_right = (sign * activation.reference(z) for z in (left, right))
        part = (middle - left)[:, None] / (right[None] - left[:, None])
        chords = f_left[:, None] + part * (f_right[None] - f_left[:, None])
        hull = np.minimum(chords.min(axis=(0, 1)), sign * activation.reference(middle))
        height = sign * (np.asarray(slope) * middle + intercept)
        assert np.all(height <= hull + 1e-9)
        assert np.all(hull - height < 2e-4 * (1 + np.abs(hull))), name


@pytest.mark.x64
def test_exact_entries_are_lines():
    op = _op("relu6", np.float64, (6,))
    ends = jnp.array([-2.0, -1.0, 0.0, 1.0, 5.0, 6.0]), jnp.array([-1.0, 0.5, 6.0, 2.0, 6.5, 7.0])
    assert scalar.is_exact(op, 0, ends).tolist() == [True, False, True, True, False, True]
    planes = scalar.planes(op, [ends], [])
    exact = np.asarray(scalar.is_exact(op, 0, ends))
    assert np.allclose(np.asarray(planes.lower_slopes[0] - planes.upper_slopes[0])[exact], 0, atol=1e-12)
    assert np.allclose(np.asarray(planes.lower_intercept - planes.upper_intercept)[exact], 0, atol=1e-12)


def test_flat_entries_are_constants():
    """A saturated entry is as good as exact: its lines are the two ends of a range of rounding errors."""
    op = _op("tanh", np.float32, (5,))
    ends = jnp.array([9.5, -30.0, 5.0, -1.0, 9.5]), jnp.array([30.0, -9.5, 9.0, 1.0, jnp.inf])
    assert scalar.is_exact(op, 0, ends).tolist() == [True, True, False, False, True]
    least, most = scalar.interval(op, [ends], [])
    assert np.all((most - least)[np.array([0, 1, 4])] < 2e-6)
    # flat on one side only: values near 0 are small, not equal
    assert scalar.is_exact(_op("sigmoid", np.float32, (2,)), 0, (ends[0][:2], ends[1][:2])).tolist() == [False, False]


def test_saturated_networks_skip_rows_and_lose_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    shapes, biases = [(4, 8), (8, 8), (8, 3)], (30, 30, 0)
    layers = [
        (rng.normal(size=shape).astype(np.float32), (scale * rng.normal(size=shape[1])).astype(np.float32))
        for shape, scale in zip(shapes, biases, strict=True)
    ]
    x, bounded, masks = np.ones((2, 4), np.float32), [], []
    original = Run.bound_needed

    def noted(run, number, needed, bound):
        if needed is not None:
            masks.append(np.asarray(needed))
        return original(run, number, jnp.ones_like(needed) if bounded and needed is not None else needed, bound)

    monkeypatch.setattr(Run, "bound_needed", noted)
    found = jb.crown(layers, x, 0.5, activation="tanh")
    assert len(masks) == 1 and 0 < masks[0].sum() < 12  # of 16 entries of the second layer
    bounded.append(True)
    whole = jb.crown(layers, x, 0.5, activation="tanh")
    np.testing.assert_allclose(found.lower, whole.lower, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.upper, whole.upper, rtol=1e-5, atol=1e-5)


# --- products and maxima ----------------------------------------------------------------------------------------------


def _boxes(rng: np.random.Generator, shape: tuple[int, ...], dtype):
    center = rng.normal(size=shape) * 10 ** rng.uniform(-2, 2, shape)
    radius = 10 ** rng.uniform(-6, 2, shape) * rng.choice([0.0, 1.0, 1.0, 1.0], shape)
    lower, upper = (center - radius).astype(dtype), (center + radius).astype(dtype)
    return np.minimum(lower, upper), np.maximum(lower, upper)


def _points(rng: np.random.Generator, ends, count: int):
    lower, upper = (end.astype(np.float64) for end in ends)
    share = rng.random((count, *lower.shape))
    share = np.where(rng.random(share.shape) < 0.4, np.round(share), share)
    return np.clip(lower + (upper - lower) * share, lower, upper)


def _node(function, shapes, dtype, kind: str):
    structure = tracing.build(function, [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], [True] * len(shapes))
    (op,) = [node.op for node in structure.nodes if node.op.kind == kind]
    return op


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)])
def test_planes_around_products(dtype):
    rng, count = np.random.default_rng(5), 1000
    op = _node(jnp.multiply, [(count,)] * 2, dtype, "product")
    ends = [_boxes(rng, (count,), dtype) for _ in range(2)]
    inputs = [tuple(map(jnp.asarray, pair)) for pair in ends]
    x, y = (_points(rng, pair, 1000) for pair in ends)
    size = np.abs(ends[0]).max(axis=0).astype(float) * np.abs(ends[1]).max(axis=0)
    low, high = product.interval(op, inputs, [])
    assert np.all(np.asarray(low, float) <= x * y)
    assert np.all(x * y <= np.asarray(high, float))
    for given in (None, tuple(jnp.asarray(rng.uniform(-1, 1, count), dtype) for _ in range(2))):
        planes = product.planes(op, inputs, [], Given(*given) if given else ADAPTIVE)
        below = sum(np.asarray(s, float) * v for s, v in zip(planes.lower_slopes, (x, y), strict=True)) + np.asarray(
            planes.lower_intercept, float
        )
        above = sum(np.asarray(s, float) * v for s, v in zip(planes.upper_slopes, (x, y), strict=True)) + np.asarray(
            planes.upper_intercept, float
        )
        slack = 8 * np.finfo(np.float64).eps * size
        assert np.all(below <= x * y + slack)
        assert np.all(above >= x * y - slack)
        # at the middle of the box every McCormick plane is r_x r_y away
        middle = [(pair[0].astype(float) + pair[1]) / 2 for pair in ends]
        radius = [(pair[1].astype(float) - pair[0]) / 2 for pair in ends]
        height = sum(np.asarray(s, float) * m for s, m in zip(planes.lower_slopes, middle, strict=True)) + np.asarray(
            planes.lower_intercept, float
        )
        gap = middle[0] * middle[1] - height - radius[0] * radius[1]
        assert np.all(gap <= 64 * np.finfo(dtype).eps * size)


@pytest.mark.quick(3)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)])
@pytest.mark.parametrize(
    ("shape", "axes"), [((400, 5), (1,)), ((3, 400), (0,)), ((2, 300, 3), (0, 2)), ((500, 1), (1,))]
)
def test_planes_around_maxima(dtype, shape, axes):
    rng = np.random.default_rng(6)
    op = _node(lambda x: jnp.max(x, axis=axes), [shape], dtype, "maximum")
    lower, upper = _boxes(rng, shape, dtype)
    ties = rng.random(shape) < 0.3
    lower, upper = (
        np.where(ties, np.round(lower), lower),
        np.where(ties, np.round(lower) + np.round(upper - lower), upper),
    )
    inputs = [(jnp.asarray(lower, dtype), jnp.asarray(upper, dtype))]
    x = _points(rng, (lower, upper), 500)
    inner = tuple(axis + 1 for axis in axes)
    values, size = x.max(axis=inner), np.abs(np.stack([lower, upper])).max(axis=(0, *inner))
    low, high = maximum.interval(op, inputs, [])
    assert np.all(np.asarray(low, float) <= values)
    assert np.all(values <= np.asarray(high, float))
    planes = maximum.planes(op, inputs, [])
    below = (np.asarray(planes.lower_slopes[0], float) * x).sum(axis=inner) + np.asarray(planes.lower_intercept, float)
    above = (np.asarray(planes.upper_slopes[0], float) * x).sum(axis=inner) + np.asarray(planes.upper_intercept, float)
    slack = 64 * np.finfo(np.float64).eps * size
    assert np.all(below <= values + slack)
    assert np.all(above >= values - slack)
    # one entry that dominates is the maximum
    middle = (lower.astype(float) + upper) / 2
    best = (np.asarray(planes.upper_slopes[0], float) * middle).sum(axis=axes) + np.asarray(
        planes.upper_intercept, float
    )
    assert np.all(best <= upper.max(axis=axes) + 64 * np.finfo(dtype).eps * size)
    dominated = np.sort(np.moveaxis(upper, axes, range(-len(axes), 0)).reshape(*size.shape, -1), axis=-1)
    largest = np.moveaxis(lower, axes, range(-len(axes), 0)).reshape(*size.shape, -1)
    if dominated.shape[-1] > 1:
        alone = (largest.max(axis=-1) >= dominated[..., -2]) & (
            largest.argmax(axis=-1)
            == np.moveaxis(upper, axes, range(-len(axes), 0)).reshape(*size.shape, -1).argmax(axis=-1)
        )
        assert alone.sum() > 20
        assert np.all(np.abs(above - values)[:, alone] <= 64 * np.finfo(dtype).eps * size[alone])
        assert np.all(np.abs(below - values)[:, alone] <= 64 * np.finfo(dtype).eps * size[alone])


# --- derivatives ------------------------------------------------------------------------------------------------------


def _central(function, arguments, position: int, step: float = 1e-6):
    moved = [list(arguments), list(arguments)]
    moved[0][position], moved[1][position] = arguments[position] - step, arguments[position] + step
    return (np.asarray(function(*moved[1])) - np.asarray(function(*moved[0]))) / (2 * step)


@pytest.mark.quick(2)
@pytest.mark.x64
@pytest.mark.parametrize("name", ["relu", "tanh", "softplus", "gelu", "square", "clip"])
def test_derivatives_of_intercepts(name):
    _, lower, upper, slopes = _moderate(name, 8)
    op = _op(name, np.float64, (TIGHT,))

    @jax.jit
    def floor(lower, upper, slope):
        return scalar.planes(op, [(lower, upper)], [], Given(slope, slope)).lower_intercept

    @jax.jit
    def slopes_of(*arguments):
        return jax.grad(lambda *a: jnp.sum(floor(*a)), (0, 1, 2))(*arguments)

    found = slopes_of(lower, upper, slopes)
    for position in range(3):
        expected = _central(floor, (lower, upper, slopes), position)
        assert np.isfinite(found[position]).all()
        # at a kink of the intercept itself the difference quotient lies between the one-sided derivatives
        assert np.mean(np.abs(found[position] - expected) < 1e-4 * (1 + np.abs(expected))) > 0.97


@pytest.mark.slow
@pytest.mark.x64
def test_derivatives_of_bounds():
    network = networks.NETWORKS["mlp_mixed"]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), network.params)
    center = jnp.array([0.3, -0.2, 0.5, 0.1])

    @jax.jit
    def lower(scale, radius):
        scaled = jax.tree.map(lambda leaf: leaf * scale, params)
        return jb.bound(network.function, jb.CrownIBP())(scaled, jb.LpBall(center, radius, 2)).lower.sum()

    found = jax.jit(jax.grad(lower, (0, 1)))(1.0, 0.1)
    for position in range(2):
        expected = _central(lower, (1.0, 0.1), position)
        assert np.isclose(found[position], expected, rtol=1e-4), position


@pytest.mark.slow
@pytest.mark.x64
def test_derivatives_at_single_points_are_finite():
    """Training meets radius 0 and neurons of width 0; one NaN ruins the step."""
    for name in ("relu", "tanh", "abs"):
        op = _op(name, np.float64, (3,))
        ends = jnp.array([0.0, -1.0, 2.0])

        def total(lower, upper, op=op):
            planes = scalar.planes(op, [(lower, upper)], [])
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(planes))

        for part in jax.grad(total, (0, 1))(ends, ends):
            assert np.isfinite(part).all(), name


@pytest.mark.parametrize("change", [0.0, 1.0, -1.0])
def test_where_nothing_bounds_a_chord_its_derivative_is_defined(change):
    """`jax_debug_nans` stops at a NaN in what no result needs, too."""
    value, slope = jax.value_and_grad(search._scaled)(change, 1.0, 0.0)
    assert value == (np.copysign(np.inf, change) if change else 0) and np.isfinite(slope)
    assert np.isnan(search._scaled(jnp.nan, 1.0, 0.0))


def test_numbers_that_are_undefined_may_be_written_down_under_debug_nans():
    """`jnp.var` chooses NaN where there are no degrees of freedom."""
    with jax.debug_nans(True):
        found = jb.bound(lambda x: jnp.var(x), jb.IBP())(jb.Box(-jnp.ones(3), jnp.ones(3)))
    assert 0 <= found.lower <= found.upper < np.inf
