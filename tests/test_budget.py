"""A budget of rows under `jit`: the same numbers, fewer rows where no example has more open entries."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.driver import Run

SHAPES = (6, 16, 16, 16, 16, 3)  # equal layers are scanned
METHODS = {
    "crown": jb.Crown,
    "fastlin": jb.FastLin,
    "no intersection": functools.partial(jb.Crown, intersect=False),
}


def layers(shapes=SHAPES):
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=pair).astype(np.float32) / np.sqrt(pair[0]) for pair in itertools.pairwise(shapes)]
    return [(kernel, rng.normal(size=kernel.shape[1]).astype(np.float32) / 4) for kernel in kernels]


def bounds(method, x, eps, shapes=SHAPES, activation="relu"):
    return jb.margins(layers(shapes), x, np.zeros(len(x), int), eps, method=method, activation=activation)


X = np.random.default_rng(1).uniform(size=(4, 6)).astype(np.float32)
EPS = np.array([0.0, 0.01, 0.05, 0.2], np.float32)  # from no open entry to most of them


@pytest.mark.parametrize(
    ("name", "activation", "budgets"),
    [
        ("crown", "relu", (0, 0.3, 1.0)),
        ("fastlin", "relu", (0.3,)),  # every budget is a program of its own, and 0.3 meets both of its ways
        ("no intersection", "relu", (0.3,)),
        ("crown", "tanh", (0.3,)),
        *(pytest.param(name, "relu", (0, 1.0), marks=pytest.mark.slow) for name in ("fastlin", "no intersection")),
        pytest.param("crown", "tanh", (0, 1.0), marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_the_same(name, activation, budgets):
    expected = bounds(METHODS[name](budget=None), X, EPS, activation=activation)
    for budget in budgets:
        method = METHODS[name](budget=budget)
        found = jax.jit(functools.partial(bounds, method, activation=activation))(X, EPS)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_tuned_rows_are_the_same():
    call = functools.partial(bounds, x=X, eps=EPS, shapes=(6, 16, 16, 3))
    expected, found = call(jb.Frown(3)), jax.jit(functools.partial(call, jb.Frown(3, budget=0.3)))()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_are_chosen_where_they_suffice_and_only_there(monkeypatch):
    def none(self, flat, most):
        return jnp.full((flat.shape[0], most), -1, np.int32)

    x, eps = X[:2], np.float32(0.2)  # many entries of every layer are open
    expected = {budget: jax.jit(functools.partial(bounds, jb.Crown(budget=budget)))(x, eps) for budget in (None, 1)}
    monkeypatch.setattr(Run, "_chosen", none)  # now a bound by chosen rows alone bounds nothing
    unbounded = jax.jit(functools.partial(bounds, jb.Crown(budget=0.999)))(x, eps)
    assert (unbounded < expected[1] - 1e-4).any()
    too_few = jax.jit(functools.partial(bounds, jb.Crown(budget=0)))(x, eps)  # one row: all layers are bounded whole
    np.testing.assert_allclose(too_few, expected[None], rtol=1e-5)


def test_one_example_beyond_the_budget_is_enough_for_all_rows():
    method = jb.Crown(budget=0.3)
    together = jax.jit(functools.partial(bounds, method))(X, EPS)
    alone = [jax.jit(functools.partial(bounds, method))(X[k : k + 1], EPS[k])[0] for k in range(4)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)


def test_under_vmap_and_with_gradients():
    def one(method, x, eps):
        return bounds(method, x[None], eps)[0]

    mapped = jax.vmap(functools.partial(one, jb.Crown(budget=0.3)))(X, EPS)
    np.testing.assert_allclose(mapped, bounds(jb.Crown(), X, EPS), rtol=1e-4, atol=1e-5)
    total = lambda method, eps: bounds(method, X, eps).sum()  # noqa: E731
    plain, found = (jax.grad(functools.partial(total, jb.Crown(budget=b)))(jnp.asarray(EPS)) for b in (None, 0.5))
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [-0.1, 1.5, np.nan])
def test_a_budget_is_a_part_of_a_layer(budget):
    for method in (jb.Crown(budget=budget), jb.Frown(budget=budget), jb.Frown(pre_activation=jb.IBP(), budget=budget)):
        with pytest.raises(jb.errors.ArgumentError, match=r"budget is .*; pass a part of each layer, from 0 to 1"):
            bounds(method, X, EPS)


def test_a_single_number_is_bounded_by_chosen_rows():
    fn = lambda x: jax.nn.relu(jnp.maximum(x, 0).sum() - 0.5)  # noqa: E731
    found = jb.bound(fn, jb.Crown())(jb.Box(-jnp.ones(3), jnp.ones(3)))
    assert found.lower <= 0 and 2.5 <= found.upper <= 2.501
