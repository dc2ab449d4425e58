"""Checks for planted faults in bounds of what runs, in polytopes and zonotopes, and in tuned lines."""

from __future__ import annotations

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import jaxbound as jb
from jaxbound import regions
from jaxbound.graph import tracing
from jaxbound.methods import ascent
from jaxbound.relaxations.enclosures import running

_BOX = jb.Box(np.array([-1.0, 0.25]), np.array([0.5, 2.0]))
_MATRIX = np.array([[1.0, -2.0, 0.5], [0.75, 1.0, -1.5]])


def _width(function, method, rounding, box=_BOX):
    found = jb.bound(function, method, rounding=rounding)(box)
    return np.asarray(found.upper) - np.asarray(found.lower)


def _refuses(function) -> bool:
    try:
        jb.bound(function, jb.IBP(), rounding="execution")(_BOX)
    except jb.UnsupportedError:
        return True
    return False


# --- what runs --------------------------------------------------------------------------------------------------------


def check_executed_sums():
    """At a point, what runs may err twice as much as the bounds' own computation: sums of 3 terms by u each."""
    point = jb.Box(jnp.array([0.1, 0.7]), jnp.array([0.1, 0.7]))
    for method in (jb.IBP(), jb.Crown()):
        own, executed = (_width(lambda x: x @ _MATRIX, method, mode, point) for mode in (True, "execution"))
        assert np.all(executed >= 1.5 * own) and np.all(own > 0)


def check_executed_functions():
    """Float32 values of functions of multiples lie within the error that is said of them, by double precision."""
    z = np.random.default_rng(0).uniform(-1, 1.5, 4000).astype(np.float32)
    low, high, factor = jnp.float32(-1), jnp.float32(1.5), np.float32(63.7)
    functions = {
        "exp": (lambda x: jnp.exp(factor * x - 90), lambda x: np.exp(float(factor) * x - 90)),
        "tanh": (lambda x: jnp.tanh(30 * x + 3), lambda x: np.tanh(30 * x + 3)),
        "mul": (lambda x: jnp.tanh(x) * jnp.sin(20 * x), lambda x: np.tanh(x) * np.sin(20 * x)),
    }
    for function, reference in functions.values():
        struct = jax.ShapeDtypeStruct((), jnp.float32)
        node = tracing.build(function, [struct], [True]).nodes[1]
        assert node.op.kind == "scalar"
        said = float(running.error(node.op.program, low, high))
        seen = np.abs(np.asarray(jax.vmap(function)(z), float) - reference(z.astype(float))).max()
        assert seen <= said <= 0.1


def check_executed_factors():
    """Values times numbers of immoderate size have no bounds, and what is large is not multiplied."""
    assert np.all(np.isinf(_width(lambda x: x @ jnp.eye(2) * 1e-12, jb.IBP(), "execution")))
    narrow = jb.Box(np.float32(_BOX.lower), np.float32(_BOX.upper))  # the largest number of float64 is none of float32
    for box in (_BOX, narrow):
        assert np.all(np.isfinite(_width(lambda x: x @ jnp.eye(2) * 1e-3, jb.IBP(), "execution", box)))
    assert _refuses(lambda x: 3 * jnp.flip(5 * jnp.flip(7 * jnp.flip(9 * x))))


def check_executed_readers():
    """`((x + a) + 1) - (x + a)` is 0 compiled; one reader may see `x + (a + 1)`."""
    assert _refuses(lambda x: (lambda y: (y + 1) - y[::-1])(x + 1e8))
    assert not _refuses(lambda x: (x + 1e8) + 1)


def check_executed_pairs():
    """What the simplifier replaces by what may overflow."""
    assert _refuses(lambda x: jnp.log(jnp.exp(x)))
    assert _refuses(lambda x: jnp.exp(jnp.log(x + 2)))
    assert not _refuses(jnp.exp)


# --- regions ----------------------------------------------------------------------------------------------------------


def _polytope(dtype=float):
    matrix = np.array([[1.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.3, 0.1, -0.7]])
    bounds = np.array([0.5, 0.75, 0.4])
    box = jb.Box(jnp.full(3, -1, dtype), jnp.asarray([1, 1.5, 2], dtype))
    return matrix, bounds, jb.Polytope(matrix, bounds, box)


def check_polytope_minima():
    """The least values of rows and the enclosing box, against linear programs."""
    matrix, bounds, region = _polytope()
    rows = np.concatenate([np.random.default_rng(0).normal(size=(4, 3)), np.eye(3), -np.eye(3)])
    found = np.asarray(regions.minimum(region, jnp.asarray(rows)))
    ends = list(zip(np.asarray(region.box.lower), np.asarray(region.box.upper), strict=True))
    exact = np.array([scipy.optimize.linprog(row, matrix, bounds, bounds=ends).fun for row in rows])
    assert np.all(found <= exact + 1e-12) and np.mean(exact - found) < 0.02
    low, high = map(np.asarray, regions.enclosing_box(region))
    assert np.all(low <= exact[4:7] + 1e-12) and np.all(high >= -exact[7:] - 1e-12)
    assert np.all(low >= np.asarray(region.box.lower)) and np.any(high < np.asarray(region.box.upper))


def check_polytope_rounding():
    """(1, 0.5) lies in the polytope as it is given, so also in the one of rounded rows, in rational numbers."""
    given, point = (0.6, 0.3), (Fraction(1), Fraction(1, 2))
    total = lambda row: sum(Fraction(float(a)) * x for a, x in zip(row, point, strict=True))  # noqa: E731
    box = jb.Box(jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32))
    own = jb.Polytope(np.array([given]), np.array([0.75]), box).canonical()
    (row,), (end,) = np.asarray(own.A), np.asarray(own.b)
    assert row.dtype == np.float32 and total(given) <= Fraction(3, 4) < total(row) <= Fraction(float(end))


def check_polytope_emptiness():
    """Two rows that leave nothing, and two that leave a little."""
    box, rows = jb.Box(jnp.zeros(2), jnp.ones(2)), jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    assert bool(regions.is_empty(jb.Polytope(rows, jnp.array([0.5, -0.75]), box)))
    assert not bool(regions.is_empty(jb.Polytope(rows, jnp.array([0.75, -0.5]), box)))


def check_zonotopes():
    """Least values and the enclosing box against all corners of the cube."""
    center, generators = np.array([0.5, -1.0]), np.array([[1.0, 1.0], [1.0, -0.5], [-0.25, 0.5]])
    region = jb.Zonotope(jnp.asarray(center), jnp.asarray(generators))
    corners = center + np.array(list(itertools.product([-1, 1], repeat=3))) @ generators
    rows = np.random.default_rng(0).normal(size=(20, 2))
    assert np.allclose(regions.minimum(region, jnp.asarray(rows)), (corners @ rows.T).min(axis=0))
    low, high = regions.enclosing_box(region)
    assert np.allclose(low, corners.min(axis=0)) and np.allclose(high, corners.max(axis=0))


# --- tuned lines ------------------------------------------------------------------------------------------------------


def _net(x):
    hidden = jax.nn.relu(x @ _MATRIX + np.array([0.25, -0.5, 0.125]))
    return hidden @ np.array([[1.0, -1.0], [-2.0, 0.5], [0.5, 1.5]])


def check_tuned_lines():
    """Tuned bounds contain the values of a grid, lie within CROWN's, and gain something."""
    grid = np.stack(np.meshgrid(*(np.linspace(a, b, 60) for a, b in zip(_BOX.lower, _BOX.upper, strict=True))), -1)
    values = np.asarray(jax.vmap(_net)(grid.reshape(-1, 2)))
    crown, found = (jb.bound(_net, method)(_BOX) for method in (jb.Crown(), jb.Frown(steps=2)))
    assert np.all(found.lower <= values.min(axis=0)) and np.all(found.upper >= values.max(axis=0))
    assert np.all(found.lower >= crown.lower - 1e-9) and np.all(found.upper <= crown.upper + 1e-9)
    assert np.sum(found.upper - found.lower) < np.sum(crown.upper - crown.lower) - 1e-3


def check_tuned_tables():
    """Averages of a table's lines hold at dense points, at whatever shares."""
    low, high = np.array([-2.0, -0.7, -3.0, 0.2]), np.array([1.0, 2.5, -0.5, 1.1])
    z = low + (high - low) * np.linspace(0, 1, 501)[:, None]
    for function, values in ((jnp.tanh, np.tanh(z)), (jax.nn.relu, np.maximum(z, 0))):
        op = tracing.build(function, [jax.ShapeDtypeStruct((4,), jnp.float64)], [True]).nodes[1].op
        table, freedom = ascent.table_of((op, None, ()), [], [(jnp.asarray(low), jnp.asarray(high))])
        for share in (0.0, 0.3, 0.8, 1.0):
            below, above = (None if own is None else jnp.full_like(own, share) for own in freedom.shares)
            planes = ascent.mixed(op, table, (below, above))
            assert np.all(planes.lower_slopes[0] * z + planes.lower_intercept <= values + 1e-9)
            assert np.all(planes.upper_slopes[0] * z + planes.upper_intercept >= values - 1e-9)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}
