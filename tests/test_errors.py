"""Bad input: one clear error each, that names the culprit and the way out; under a trace, bounds certify nothing.

Every row of the tables is a call that a user could make by mistake, the exception that it must raise, and words that its
text must hold. All are `JaxboundError`s, and those that blame an argument are `ValueError` or `TypeError` too.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.errors import ArgumentError, ArgumentTypeError, JaxboundError, UnsupportedError
from jaxbound.methods import Method
from jaxbound.regions import Box, LpBall

RANDOM = np.random.default_rng(0)
LAYERS = [
    (RANDOM.normal(size=shape).astype("f"), RANDOM.normal(size=shape[1]).astype("f")) for shape in ((4, 5), (5, 3))
]
X = RANDOM.uniform(0.2, 0.8, (2, 4)).astype("f")
BOX = Box(np.full(3, -1.0, "f"), np.full(3, 1.0, "f"))
ALL_def using(method, fn=jax.nn.relu):
    return jb.bound(fn, method)(BOX)


MISSPELT = ["lower_slope='adaptve'", "did you mean 'adaptive'", "'parallel'"]
METHODS = [
    ("lower_slope is misspelt", lambda: using(jb.Crown(lower_slope="adaptve")), ArgumentError, MISSPELT),
    ("lower_slope of crown", lambda: jb.crown(LAYERS, X, 0.1, lower_slope="adaptve"), ArgumentError, MISSPELT),
    ("lower_slope of Forward", lambda: using(jb.Forward(lower_slope="adaptve")), ArgumentError, MISSPELT),
    ("no lower_slope needed", lambda: using(jb.Crown(lower_slope="adaptve"), jnp.negative), ArgumentError, MISSPELT),
    ("method is a name", lambda: using("crown"), ArgumentTypeError, ["method", "'crown'"]),
    ("method is a class", lambda: using(jb.IBP), ArgumentTypeError, ["method", r"IBP\(\)"]),
    ("pre_activation is a name", lambda: using(jb.Crown("ibp")), ArgumentTypeError, ["pre_activation", "'ibp'"]),
    ("pre_activation is a class", lambda: using(jb.Crown(jb.IBP)), ArgumentTypeError, ["pre_activation", r"IBP\(\)"]),
    ("the best of nothing", lambda: using(jb.Best()), ArgumentError, ["Best", "method"]),
    ("the best of a name", lambda: jb.Best(jb.IBP(), "crown"), ArgumentTypeError, ["Best", "'crown'"]),
    ("an estimate in Best", lambda: jb.Best(jb.IBP(), Guess()), ArgumentError, ["Guess", "estimate", "certificate"]),
    ("an estimate before Crown", lambda: using(jb.Crown(Guess())), ArgumentError, ["Guess", "estimate"]),
    ("an estimate before CrownIBP", lambda: using(jb.CrownIBP(Guess())), ArgumentError, ["Guess", "estimate"]),
    (
        "linear bounds of IBP",
        lambda: jb.linear_bounds(jax.nn.relu, jb.IBP())(BOX),
        UnsupportedError,
        ["IBP", "linear bounds", r"Crown\(\)"],
    ),
]


@rows(METHODS)
def test_methods(call, exception, words):
    raised(call, exception, words)


@pytest.mark.parametrize(
    "call",
    [lambda: jb.ibp(LAYERS, X, 0.1, steps=3), lambda: jb.crown(LAYERS, X, 0.1, steps=3), lambda: jb.Crown(steps=3)],
)
def test_an_unknown_option_of_a_method_raises(call):
    with pytest.raises(TypeError, match="steps"):
        call()


# --- what cannot be bounded -------------------------------------------------------------------------------------------


def sorts(x):
    return jnp.sort(x)  # the line that the message must name


def loops_while(x):
    return jax.lax.while_loop(lambda v: v.sum() < 3, lambda v: v + 1, x)


def branches(x):
    return jax.lax.cond(x[0] > 0, lambda v: v, lambda v: 2 * v, x)


def calls_back(x):
    return jax.pure_callback(np.sin, x, x)


def reduces_precision(x):
    return jax.lax.reduce_precision(x, 5, 5)


def counts(x):
    return x.astype(int)


def compares(x):
    return x > 0


def chooses(x):
    return jnp.argmax(x)


def indexes(x):
    return x[x.astype(int)]


REFUSALS = [
    (sorts, "sort", [r"\(3,\)"]),
    (loops_while, "while", [r"\(3,\)", "iterations"]),
    (branches, "cond", ["predicate", "jnp.where"]),
    (calls_back, "pure_callback", ["callback", "JAX"]),
    (reduces_precision, "reduce_precision", ["full precision"]),
    (counts, "convert_element_type", ["int32"]),
    (compares, "gt", ["bool"]),
    (chooses, "argmax", ["int32"]),
    (indexes, "gather", [r"\(3,\)"]),
]


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize(("fn", "primitive", "words"), REFUSALS, ids=[row[1] for row in REFUSALS])
def test_a_refusal_names_primitive_shapes_line_and_way_out(fn, primitive, words, method):
    line = fn.__code__.co_firstlineno + 1
    text = raised(lambda: bounded(fn, BOX, method=method), UnsupportedError, [f"`{primitive}`", *words])
    assert f"test_errors.py:{line} ({fn.__name__})" in text
    assert len(text) > text.index(":") + 10  # a reason follows


def test_a_refusal_is_listed_by_explain_and_raised_under_jit():
    assert "`sort`" in jb.explain(sorts, jb.Crown())(BOX).refusals[0]
    with pytest.raises(UnsupportedError, match="`sort`"):
        jax.jit(jb.bound(sorts, jb.Crown()))(BOX)


def test_what_the_result_does_not_need_is_not_refused():
    found = bounded(lambda x: (jnp.sort(x), 2 * x)[1], BOX)
    np.testing.assert_allclose(found.upper, 2.0)


STAIRS = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize("dtype", STAIRS.values(), ids=STAIRS)
def test_a_narrowing_cast_is_refused_or_enclosed(dtype, method):
    """Rounding is a staircase: a line through its ends is on neither side of it in between."""

    def residue(x):
        return x.astype(dtype).astype(jnp.float32) - x @ jnp.eye(1)

    points = jnp.linspace(1.0, 2.0, 4001)[:, None]
    values = jax.vmap(residue)(points)
    try:
        found = bounded(residue, Box(jnp.ones(1), jnp.full(1, 2.0)), method=method)
    except UnsupportedError as refusal:
        names_the_cast = "convert_element_type" in str(refusal)
        pytest.skip("refused") if names_the_cast else pytest.fail(str(refusal))
    assert float(found.lower[0]) <= float(values.min())
    assert float(found.upper[0]) >= float(values.max())


@pytest.mark.x64
def test_a_cast_from_float64_to_float32_is_refused_or_enclosed():
    def residue(x):
        return x.astype(jnp.float32).astype(jnp.float64) - x @ jnp.eye(1)

    values = jax.vmap(residue)(jnp.linspace(1.0, 1.0 + 1e-6, 4001)[:, None])
    try:
        found = bounded(residue, Box(jnp.ones(1), jnp.full(1, 1.0 + 1e-6)), method=jb.Crown())
    except UnsupportedError as refusal:
        names_the_cast = "convert_element_type" in str(refusal)
        pytest.skip("refused") if names_the_cast else pytest.fail(str(refusal))
    assert float(found.lower[0]) <= float(values.min())
    assert float(found.upper[0]) >= float(values.max())


# --- under a trace, values are not known: what cannot be bounded certifies nothing ------------------------------------

POINT = np.full(4, 0.5, "f")
HOLE = np.array([0.5, np.nan, 0.5, 0.5], "f")
UNBOUNDED = {
    "NaN center": LpBall(HOLE, 0.1, 2.0),
    "NaN center, box": LpBall(HOLE, 0.1, np.inf),
    "NaN end": Box(HOLE, POINT),
    "NaN radius": LpBall(POINT, np.nan, np.inf),
    "negative radius": LpBall(POINT, -0.1, 2.0),
    "negative radius, box": LpBall(POINT, -0.1, np.inf),
    "empty box": Box(POINT, POINT - 1),
    "empty in one coordinate": Box(POINT, np.array([1, 1, 1, 0], "f")),
    "clip out of reach": LpBall(POINT, 0.1, 2.0, clip=(3.0, 4.0)),
    "clip out of reach, box": LpBall(POINT, 0.1, np.inf, clip=(3.0, 4.0)),
}


def two_layers(x):
    (first, bias), (second, _) = LAYERS
    return jax.nn.relu(x @ first + bias) @ second


def affine(x):
    return x @ LAYERS[0][0]


def assert_certifies_nothing(found, of=""):
    assert np.all(np.asarray(found.lower) == -np.inf), (of, found.lower)
    assert np.all(np.asarray(found.upper) == np.inf), (of, found.upper)


@by_name("method", ALL_METHODS)
def test_under_jit_an_empty_or_undefined_region_gives_infinite_bounds(method):
    bounds = jax.jit(jb.bound(affine, method))
    for name, region in UNBOUNDED.items():
        assert_certifies_nothing(bounds(region), name)


@by_name("method", ALL_METHODS)
def test_under_jit_so_does_an_empty_box_before_a_nonlinearity(method):
    bounds = jax.jit(jb.bound(two_layers, method))
    for name, region in UNBOUNDED.items():
        if isinstance(region, Box):
            assert_certifies_nothing(bounds(region), name)


@pytest.mark.slow
@by_name("method", ALL_METHODS)
def test_under_jit_so_does_every_such_region_before_a_nonlinearity(method):
    bounds = jax.jit(jb.bound(two_layers, method))
    for name, region in UNBOUNDED.items():
        assert_certifies_nothing(bounds(region), name)


@by_name("method", ALL_METHODS)
def test_under_jit_one_bad_example_does_not_certify_and_spoils_no_other(method):
    x, eps = np.tile(POINT, (4, 1)), np.array([0.1, -0.1, 0.1, np.nan], "f")
    x[2, 1] = np.nan
    found = jax.jit(lambda x, eps: jb.network.bound_network(method, LAYERS, x, eps))(x, eps)
    assert np.all(np.isfinite(np.asarray(found.lower[0])))
    assert np.all(np.asarray(found.lower[1:]) == -np.inf)
    assert np.all(np.asarray(found.upper[1:]) == np.inf)


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize("norm", [2.0, np.inf])
def test_an_infinite_radius_gives_infinite_bounds_not_nan(norm, method):
    found = bounded(two_layers, LpBall(POINT, np.inf, norm), method=method)
    assert_certifies_nothing(found)


def test_nan_parameters_certify_nothing():
    layers = [(np.where(np.eye(4, 5), np.nan, kernel).astype("f"), bias) for kernel, bias in LAYERS[:1]] + LAYERS[1:]
    for method in ALL_METHODS:
        found = jb.network.bound_network(method, layers, X, 0.1)
        assert not np.any(np.asarray(found.lower) > -np.inf), method
        assert not np.any(np.asarray(found.upper) < np.inf), method
