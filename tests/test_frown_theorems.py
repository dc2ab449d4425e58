"""FROWN's theorems 2 and 3 (Lyu et al. 2020): when tighter lines around activations make tighter bounds.

Its theorem 1, that CROWN's bounds are the optimum of the linear program with the same lines, is in `test_exact.py`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.methods import SlopeRule
from tests import oracles

WIDTHS, NETWORKS, SLACK = (4, 6, 5, 4, 3), 20, 1e-9
pytestmark = pytest.mark.x64


def _values(params, x, activation=jax.nn.relu) -> tuple:
    """The inputs of every layer's activation, and the outputs."""
    found = []
    for kernel, bias in params:
        x = (activation(x) if found else x) @ kernel + bias
        found.append(x)
    return tuple(found)


def _networks():
    """So many networks, stacked, and a point for each."""
    rng, shapes = np.random.default_rng(0), itertools.pairwise(WIDTHS)
    params = [(rng.normal(size=(NETWORKS, a, b)) / np.sqrt(a), 0.3 * rng.normal(size=(NETWORKS, b))) for a, b in shapes]
    return params, rng.normal(size=(NETWORKS, WIDTHS[0]))


def _ball(center, norm: float):
    return jb.Box(center - 0.4, center + 0.4) if norm == np.inf else jb.LpBall(center, 0.6, norm)


def _bounds(method, norm: float = np.inf, activation=jax.nn.relu) -> np.ndarray:
    """Lower and upper bounds of all that `_values` gives, for each network: (2, networks, neurons); they are sound."""
    function, (params, center) = functools.partial(_values, activation=activation), _networks()

    def around(params, center, method):
        found = jb.bound(function, method)(params, _ball(center, norm))
        low, high = (jnp.concatenate([getattr(each, end) for each in found]) for end in ("lower", "upper"))
        points = jax.vmap(lambda x: jnp.concatenate(function(params, x)))(_points(center, norm))
        return jnp.stack([low, high]), jnp.all((low - SLACK <= points) & (points <= high + SLACK))

    found, sound = jax.jit(jax.vmap(around, in_axes=(0, 0, None)))(params, center, method)
    assert np.all(sound)
    return np.moveaxis(np.asarray(found), 1, 0)


def _points(center, norm: float):
    return jnp.asarray(oracles.points(_ball(np.zeros(WIDTHS[0]), norm), np.random.default_rng(0), 200)) + center


def _inside(inner: np.ndarray, outer: np.ndarray) -> None:
    """No bound is looser, and some are much tighter."""
    gain = np.stack([inner[0] - outer[0], outer[1] - inner[1]])
    assert np.all(gain >= -SLACK) and np.max(gain) > 0.1


@pytest.mark.parametrize("norm", [np.inf, pytest.param(2.0, marks=pytest.mark.slow)])
def test_theorem_2_tighter_lines_make_tighter_bounds(norm):
    """With the same lines in every pass, three pairs of lines around ReLU, each at least as tight as the next.

    The chord of an interval of CROWN's is below the chord of interval arithmetic's, which is below its upper end; the
    line below is 0 in all of them. Interval arithmetic is CROWN with level lines.
    """
    own, given = (_bounds(jb.Crown(pre, lower_slope="zero", intersect=False), norm) for pre in (None, jb.IBP()))
    _inside(own, given)
    _inside(given, _bounds(jb.IBP(), norm))


def test_theorem_2_needs_lines_of_which_one_is_tighter():
    """Adaptive slopes are chosen anew for tighter intervals, and lines of different slopes cross: some bounds loosen."""
    own, given = (_bounds(jb.Crown(pre, intersect=False)) for pre in (None, jb.IBP()))
    assert np.any(own[0] < given[0] - SLACK) or np.any(own[1] > given[1] + SLACK)


@dataclass(frozen=True)
class _Level(SlopeRule):
    """The same two slopes whatever the interval is: what follows from the interval is the intercepts alone."""

    below: float
    above: float

    def lines(self, choice):
        return jnp.full_like(choice.lower, self.below), jnp.full_like(choice.lower, self.above)


ACTIVATIONS = [jax.nn.relu, pytest.param(jnp.tanh, marks=pytest.mark.slow),
               pytest.param(jax.nn.gelu, marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_theorem_3_better_intercepts_make_tighter_bounds(activation):
    """At given slopes, far from tight. Tighter intervals give larger intercepts below, and smaller ones above."""
    methods = (jb.Crown(pre, lower_slope=_Level(0.3, 0.8), intersect=False) for pre in (jb.Crown(), jb.IBP()))
    _inside(*(_bounds(method, activation=activation) for method in methods))


@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=lambda f: f.__name__)
def test_theorem_3_holds_where_every_bound_has_its_own_slopes(activation):
    """The paper's broken self-consistency: each bound of the outputs has slopes of its own, drawn at random."""
    rng, (params, center) = np.random.default_rng(1), _networks()
    last = lambda params, x: _values(params, x, activation)[-1]  # noqa: E731
    names = jb.pre_activation_bounds(last, jb.IBP())([(k[0], b[0]) for k, b in params], _ball(center[0], np.inf))
    slopes = {
        name: tuple(rng.uniform(-0.2, 1.1, (2, 2 * WIDTHS[-1], *ends.lower.shape))) for name, ends in names.items()
    }

    def around(params, center, method):
        found = jb.bound(last, method)(params, _ball(center, np.inf))
        points = jax.vmap(last, in_axes=(None, 0))(params, _points(center, np.inf))
        holds = jnp.all((found.lower - SLACK <= points) & (points <= found.upper + SLACK))
        return jnp.stack([found.lower, found.upper]), holds

    bounded = jax.jit(jax.vmap(around, in_axes=(0, 0, None)))
    found = [bounded(params, center, jb.Crown(pre, slopes=slopes, intersect=False)) for pre in (jb.Crown(), jb.IBP())]
    assert all(np.all(holds) for _, holds in found)
    _inside(*(np.moveaxis(np.asarray(ends), 1, 0) for ends, _ in found))
