"""Checks for planted faults in choices, meets, logsumexp, roundings, sorted entries, rewrites and derivatives."""

from __future__ import annotations

import dense
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special as special
from jax import lax

import jaxbound as jb
from jaxbound.graph import operations
from jaxbound.relaxations.enclosures import evaluation

_METHODS = (jb.IBP(), jb.Forward(), jb.Crown())


def _ends(low, high):
    return np.asarray(low, float), np.asarray(high, float)


def _contained(function, low, high, *, methods=_METHODS, grid=5):
    """Bounds over a box contain the values at the points of a grid; returns them."""
    axes = [np.linspace(a, b, grid) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, len(low))
    values = np.asarray(jax.vmap(function)(points))
    found = []
    for method in methods:
        bounds = jb.bound(function, method)(jb.Box(*map(jnp.asarray, _ends(low, high))))
        assert np.all(bounds.lower <= values.min(axis=0) + 1e-9)
        assert np.all(bounds.upper >= values.max(axis=0) - 1e-9)
        found.append(bounds)
    return found


def _at(function, *points, tolerance=1e-9):
    """Interval bounds over single points are the values."""
    for x in points:
        x = jnp.asarray(x, float)
        found, value = jb.bound(function, jb.IBP())(jb.Box(x, x)), function(x)
        for interval, expected in zip(
            jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, jb.Interval)),
            jax.tree.leaves(value),
            strict=True,
        ):
            assert np.allclose(interval.lower, expected, rtol=tolerance, atol=tolerance)
            assert np.allclose(interval.upper, expected, rtol=tolerance, atol=tolerance)


def check_choices():
    """Decided choices are their case; undecided ones lie between chords that touch."""
    op = dense.node(operations.select, [(4,)] * 3, np.float64, "select")
    rng = np.random.default_rng(0)
    share = _ends([0, 1, 0, 0], [0, 1, 1, 1])
    a, b = _ends([-1, 2, -2, 0.5], [1, 3, 1, 1]), _ends([5, -1, -1, 1], [6, 1, 3, 4])
    at = [dense.points(rng, ends, 2000) for ends in (share, a, b)]
    value = lambda s, a, b: np.where(s == 0, a, np.where(s == 1, b, (1 - s) * a + s * b))  # noqa: E731
    planes = dense.check(op, value, [share, a, b], at, slack=4)
    below, above = dense.heights(op, planes, at)
    for gap in (value(*at) - below, above - value(*at)):
        assert np.all(gap[:, :2] < 1e-12)
        assert np.all(gap.min(axis=0) < 1e-9)
    dense.check(op, value, [share, a, b], at, slopes=(jnp.full(4, 0.25), jnp.full(4, 0.75)), slack=4)


def check_meets():
    """The intersection, and on each side the better plane."""
    found = jb.bound(lambda x: jnp.maximum(x[0], x[1]), jb.IBP())(jb.Box(jnp.array([-1.0, 0.0]), jnp.array([1.0, 2.0])))
    assert np.allclose([found.lower, found.upper], [0, 2])
    op = dense.node(lambda x, y: operations.meet(x, y), [(2,)] * 2, np.float64, "meet")
    first, second = _ends([0, -1], [3, 1]), _ends([-1, 0], [2, 2])
    x = dense.points(np.random.default_rng(1), _ends([0, 0], [2, 1]), 200)
    planes = dense.check(op, lambda x, y: x, [first, second], [x, x])
    assert np.array_equal(planes.lower_slopes[0], [1, 0])
    assert np.array_equal(planes.upper_slopes[0], [0, 1])


def check_logsumexp():
    op = dense.node(lambda x: operations.logsumexp(x, (1,)), [(3, 3)], np.float64, "logsumexp")
    ends = _ends([[-1, 0, 2], [0, 0, 0], [-50, 3, 40]], [[1, 0.5, 2], [1e-5, 1e-5, 2], [50, 4, 41]])
    at = dense.points(np.random.default_rng(2), ends, 2000)
    planes = dense.check(op, lambda x: special.logsumexp(x, axis=2), [ends], [at], slack=8)
    middle = (ends[0] + ends[1])[None] / 2
    below, above = dense.heights(op, planes, [middle])
    value = special.logsumexp(middle, axis=2)
    assert np.all(value - below < 1e-9)
    assert np.all((above - value)[0, :2] < 0.5)
    open_ends = np.where([[0, 0, 1], [1, 0, 0], [0, 1, 1]], -np.inf, ends[0]), ends[1]
    at = dense.points(
        np.random.default_rng(3), (np.where(np.isinf(open_ends[0]), ends[1] - 30, ends[0]), ends[1]), 2000
    )
    dense.check(op, lambda x: special.logsumexp(x, axis=2), [open_ends], [at], slack=8)


def check_staircases():
    rng = np.random.default_rng(3)
    ends = _ends([-0.5, 0.25, -3.0, 1.0, 0.5], [0.5, 0.75, 4.0, 2.0, 1.5])
    at = dense.points(rng, ends, 3000)
    at = np.clip(np.concatenate([at, np.round(2 * at) / 2, np.round(2 * at) / 2 - 1e-9]), *ends)
    for name in ("floor", "ceil", "round"):
        op = dense.node(getattr(jnp, name), [(5,)], np.float64, "staircase")
        planes = dense.check(op, getattr(np, name), [ends], [at])
        below, above = dense.heights(op, planes, [at])
        assert np.all(above - below <= 1 + 1e-9)


def check_sorted():
    ends = _ends([[3, -1, 0.5], [0, 0, 0]], [[4, 2, 1], [1, 2, 0]])
    op = dense.node(lambda x: jnp.sort(x, 1), [(2, 3)], np.float64, "sort")
    dense.check(op, lambda x: np.sort(x, 2), [ends], [dense.points(np.random.default_rng(4), ends, 500)])
    function = lambda x: lax.top_k(x, 2)[0]  # noqa: E731
    found = jb.bound(function, jb.IBP())(jb.Box(jnp.array([3.0, -1.0, 0.5]), jnp.array([4.0, 2.0, 1.0])))
    assert np.array_equal(found.lower, [3, 0.5])
    assert np.array_equal(found.upper, [4, 2])
    _at(jnp.median, [3.0, 1.0, 2.0, 7.0])


# --- functions whose graphs are rewritten -------------------------------------------------------------------------------

_V = np.array([[1.0, -2.0], [0.5, 3.0]])


def _true(truth):
    return truth.astype(float)


_TRUTHS = {
    "and": lambda x: _true((x[0] > 0) & (x[1] > 0)),
    "or": lambda x: _true((x[0] > 0) | (x[1] > 0)),
    "xor": lambda x: _true((x[0] > 0) ^ (x[1] > 0)),
    "comparisons": lambda x: _true(~(x[0] > x[1])) - 2 * _true(x[0] < x[1]),
    "any_all": lambda x: _true(jnp.any(x > 0)) + 2 * _true(jnp.all(x > 0)),
    "counts": lambda x: jnp.sum(x > 0).astype(float),
    "where": lambda x: jnp.where(x[0] > x[1], 2 * x, x[1] + x),
}


def _checked_truth(function):
    """A truth value as a number: over points on either side, and over a box."""

    def check():
        _at(function, *[(a, b) for a in (-1.0, 1.0) for b in (-1.5, 0.5)])
        _contained(function, [-1.0, -0.5], [1.0, 0.5], methods=[jb.IBP()])

    return check


def _spread(x):
    return _V @ jnp.exp(x)


_MADE = {
    "product": lambda x: _spread(x) * jnp.tanh(x) * jax.nn.sigmoid(x),
    "difference": lambda x: (lambda g: g * jnp.sin(x) - g * jnp.cos(x))(_spread(x)),
    "choice": lambda x: (lambda g, t: jnp.where(x > 0, 0.1 * g * t, 0.7 * g * t))(_spread(x), jnp.tanh(_V @ x)),
    "chain": jax.jacrev(lambda x: jnp.tanh(_V @ jax.nn.leaky_relu(_V @ x, 0.1))),
}


def _checked_group(function):
    """Regrouped factors: over points and over a box."""

    def check():
        _at(function, [0.5, -1.0], [2.0, -0.25])
        _contained(function, [-1.0, 0.25], [0.5, 1.0], methods=[jb.IBP()])

    return check


_PLACES, _FILTER = np.array([1, 3, 1, 9]), ("NHC", "HIO", "NHC")


def _convolution(x):
    kernel = jnp.stack([x[:2], x[2:]], 1)[:, None]
    return lax.conv_general_dilated(x.reshape(1, 4, 1), kernel, (1,), [(1, 0)], dimension_numbers=_FILTER)


def _pooled(x):
    return lax.reduce_window(x.reshape(2, 2), -jnp.inf, lax.max, (2, 1), (1, 1), ((1, 0), (0, 0))).sum()


_REWRITTEN = {
    "scatter": lambda x: jnp.full(5, 7.0).at[_PLACES].set(x, mode="drop"),
    "scatter_mul": lambda x: jnp.tile(x, 2).at[_PLACES].multiply(jnp.arange(1.0, 5), mode="drop"),
    "convolution": _convolution,
    "running": lambda x: lax.cummax(x, reverse=True) + 2 * lax.cumprod(x),
    "reduce_prod": lambda x: jnp.prod(jnp.concatenate([x, x[:1]])),
    "padding": lambda x: lax.pad(x, x[0], [(1, 1, 0)]),
    "filled": lambda x: jnp.take(x, np.array([0, 9]), mode="fill", fill_value=2.0),
    "scanned": lambda x: lax.scan(lambda c, r: (c * r, c - r), 1.0, x, reverse=True),
    "repeated": lambda x: lax.broadcast_in_dim(lax.broadcast_in_dim(x, (4, 1), (0,)), (2, 4, 3), (1, 2)),
    "pool_gradient": jax.grad(_pooled),
}


def _checked_rewrite(function):
    def check():
        with jax.disable_jit(False):  # without, JAX unrolls loops itself
            _at(function, [0.5, -1.25, 2.0, 0.75])

    return check


def check_gradients_of_maxima():
    """They contain what they are on either side of a tie, and are themselves where there is none."""
    for function in (jnp.max, lambda x: jnp.minimum(x[0], x[1]) + 0 * x[2]):
        gradient = jax.grad(function)
        _contained(gradient, [0.0, 1.0, -3.0], [1.0, 2.0, -2.0], methods=[jb.IBP()], grid=3)
        tie = jnp.ones(3)
        bounds = jb.bound(gradient, jb.IBP())(jb.Box(tie, tie))
        sides = np.stack([gradient(tie + shift) for shift in 0.5 * np.concatenate([np.eye(3), -np.eye(3)])])
        assert np.all(bounds.lower <= sides.min(axis=0) + 1e-9)
        assert np.all(bounds.upper >= sides.max(axis=0) - 1e-9)
        _at(gradient, [0.0, 1.0, -3.0])


def check_divided_by_ties():
    """Divided by the number of ties, but no derivative of a maximum: the value at a tie counts."""
    shared = lambda x: jnp.sum(x) / jnp.sum((x == x.max()).astype(x.dtype))  # noqa: E731
    other = lambda x: (x == x.max()) * (x[::-1] / jnp.sum((x == x.min()).astype(x.dtype)))  # noqa: E731
    for function in (shared, other):
        _contained(function, [1.0, 1.0, 2.0], [1.0, 1.0, 2.0], grid=1, methods=[jb.IBP()])
        _contained(function, [0.0, 1.0, 1.0], [1.0, 1.5, 1.0], grid=3, methods=[jb.IBP()])


def check_turned_choices():
    """The error of a choice that is made by a rounded value counts both cases: rounding may turn it."""
    wide = np.float32(2.0**12)
    op = dense.node(lambda z: jnp.where((z + wide) - wide > 0, z + 1, z), [(3,)], np.float32, "scalar")
    error = evaluation.error(op.program, jnp.array([1e-4, -1e-4, 3.0], jnp.float32), ())
    assert np.all(error[:2] >= 1)
    assert error[2] < 1e-5


def check_exact_sums():
    """Only exact operands have an exact sum, though a large one absorbs their errors; overflow is never exact."""
    rounded = dense.node(lambda z: jnp.where(jnp.exp(z) + 1 > 1, 5.0, 0.0), [(2,)], np.float32, "scalar")
    assert np.array_equal(
        evaluation.error(rounded.program, jnp.array([-110.0, 0.0], jnp.float32), ()) >= 1, [True, False]
    )
    doubled = dense.node(lambda z: jnp.where(z + z > 0, z + z, jnp.tanh(z)), [(4,)], np.float32, "scalar")
    error = evaluation.error(doubled.program, jnp.array([2e38, -0.5, 0.5, 1e-40], jnp.float32), ())
    assert np.isinf(error[0]) and np.all(error[1:3] < 1e-6) and error[3] > 0


CHECKS = {
    **{name: value for name, value in list(globals().items()) if name.startswith("check_")},
    **{f"check_truth_{name}": _checked_truth(function) for name, function in _TRUTHS.items()},
    **{f"check_group_{name}": _checked_group(function) for name, function in _MADE.items()},
    **{f"check_rewrite_{name}": _checked_rewrite(function) for name, function in _REWRITTEN.items()},
}
