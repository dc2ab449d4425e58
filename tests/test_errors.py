"""Bad input: one clear error each, that names the culprit and the way out; under a trace, bounds that certify nothing.

Every row of the tables is a call that a user could make by mistake, the exception it must raise, and words that its text
must hold. All are `JaxboundError`s, and those that blame an argument are `ValueError` or `TypeError` too.
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
LAYERS = [(RANDOM.normal(size=shape).astype("f"), RANDOM.normal(size=shape[1]).astype("f")) for shape in ((4, 5), (5, 3))]
X = RANDOM.uniform(0.2, 0.8, (2, 4)).astype("f")
BOX = Box(np.full(3, -1.0, "f"), np.full(3, 1.0, "f"))
ALL_METHODS = [jb.IBP(), jb.Forward(), jb.CrownIBP(), jb.Crown(), jb.FastLin(), jb.Best(jb.IBP(), jb.CrownIBP())]
by_name = functools.partial(pytest.mark.parametrize, ids=lambda method: type(method).__name__)


def apply(variables, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ variables["kernel"])


def ibp(params=LAYERS, x=X, eps=0.1, **options):
    return jb.ibp(params, x, eps, **options)


def kernel(*shape):
    return {"kernel": np.ones(shape, "f")}


def bounded(fn, *args, method=None):
    return jb.bound(fn, jb.IBP() if method is None else method)(*args)


def raised(call, exception, words) -> str:
    """The text of the error, checked for its class and for what it names."""
    with pytest.raises(exception) as caught:
        call()
    assert isinstance(caught.value, JaxboundError), f"{type(caught.value).__name__}: {caught.value}"
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in {str(caught.value)!r}"
    return str(caught.value)


def rows(table):
    return pytest.mark.parametrize(("call", "exception", "words"), [pytest.param(*row[1:], id=row[0]) for row in table])


# --- calling on a network ---------------------------------------------------------------------------------------------

INPUTS = [
    ("x is int32", lambda: ibp(x=np.ones((2, 4), np.int32)), ArgumentTypeError, ["x", "int32", "255"]),
    ("x is uint8", lambda: ibp(x=np.ones((2, 4), np.uint8)), ArgumentTypeError, ["x", "uint8", "255"]),
    ("x is bool", lambda: ibp(x=np.ones((2, 4), bool)), ArgumentTypeError, ["x", "bool"]),
    ("x is complex", lambda: ibp(x=np.ones((2, 4), complex)), ArgumentTypeError, ["x", "complex"]),
    ("x has too many features", lambda: ibp(x=np.ones((2, 5), "f")), ArgumentError, [r"\(2, 5\)", r"\(batch, 4\)"]),
    ("x is a number", lambda: ibp(x=np.float32(1)), ArgumentError, [r"\(\)", r"\(batch, 4\)"]),
    ("x is a number for apply_fn", lambda: ibp(kernel(4, 2), np.float32(1), apply_fn=apply), ArgumentError, ["batch"]),
    ("x is a list", lambda: ibp(x=[[0.1, 0.2, 0.3, 0.4]]), ArgumentTypeError, ["x", "list", "array"]),
    ("x is a string", lambda: ibp(x="image.png"), ArgumentTypeError, ["x", "str"]),
    ("x is None", lambda: ibp(x=None), ArgumentTypeError, ["x", "None"]),
    ("x holds a NaN", lambda: ibp(x=X * np.nan), ArgumentError, ["NaN"]),
    ("no examples", lambda: ibp(x=X[:0], params=kernel(4, 2), apply_fn=apply), ArgumentError, ["batch", "0"]),
    ("eps is missing", lambda: ibp(eps=None), ArgumentError, ["eps", "radius", "region"]),
    ("eps beside a region", lambda: ibp(x=Box(X, X + 1)), ArgumentError, ["region", "leave eps out"]),
    ("clip beside a region", lambda: ibp(x=Box(X, X), eps=None, clip=(0, 1)), ArgumentError, ["region", "clip"]),
    ("norm beside a region", lambda: ibp(x=Box(X, X), eps=None, norm=2), ArgumentError, ["region", "norm"]),
    ("eps is negative", lambda: ibp(eps=-0.1), ArgumentError, ["negative", "eps >= 0"]),
    ("an eps is negative", lambda: ibp(eps=np.array([0.1, -0.1])), ArgumentError, ["negative", "eps >= 0"]),
    ("eps is NaN", lambda: ibp(eps=np.nan), ArgumentError, ["NaN"]),
    ("eps is a string", lambda: ibp(eps="0.1"), ArgumentTypeError, ["eps", "str"]),
    ("eps has a wrong length", lambda: ibp(eps=np.ones(3)), ArgumentError, ["eps", r"\(3,\)", r"\(2,\)"]),
    ("eps has two axes", lambda: ibp(eps=np.ones((2, 1))), ArgumentError, ["eps", r"\(2, 1\)"]),
    ("norm is below 1", lambda: ibp(norm=0.5), ArgumentError, ["norm", "p >= 1"]),
    ("norm is a word", lambda: ibp(norm="l2"), ArgumentError, ["norm", "'l2'"]),
    ("clip is a number", lambda: ibp(clip=1.0), ArgumentError, ["clip", "pair"]),
    ("clip is a triple", lambda: ibp(clip=(0, 1, 2)), ArgumentError, ["clip", "pair"]),
    ("clip is reversed", lambda: ibp(clip=(1.0, 0.0)), ArgumentError, ["clip"]),
    ("clip is out of reach", lambda: ibp(clip=(5.0, 6.0)), ArgumentError, ["clip"]),
    ("clip has a wrong shape", lambda: ibp(clip=(np.zeros(3), np.ones(3))), ArgumentError, ["clip", r"\(3,\)"]),
    ("an empty box", lambda: ibp(x=Box(X + 1, X), eps=None), ArgumentError, ["lower > upper"]),
    ("a box of two shapes", lambda: ibp(x=Box(X, X[0]), eps=None), ArgumentError, [r"\(2, 4\)", r"\(4,\)"]),
    ("one ball over the batch", lambda: ibp(x=LpBall(X, 0.1, 2), eps=None), ArgumentError, ["batch_ndim=1"]),
    ("spec is a vector", lambda: ibp(spec=np.ones(3, "f")), ArgumentError, ["spec", r"\(specs, outputs\)"]),
    ("spec of other outputs", lambda: ibp(spec=np.ones((2, 4), "f")), ArgumentError, ["spec", r"\(2, 4\)", "3"]),
    ("spec of another batch", lambda: ibp(spec=np.ones((5, 2, 3), "f")), ArgumentError, ["spec", "5", "2"]),
    ("sides is unknown", lambda: ibp(sides="upper"), ArgumentError, ["sides='upper'", "'both', 'lower'"]),
    ("memory_limit is 0", lambda: ibp(memory_limit=0), ArgumentError, ["memory_limit", "0"]),
    ("activation is misspelt", lambda: ibp(activation="rellu"), ArgumentError, ["'rellu'", "callable"]),
    ("activation is no function", lambda: ibp(activation=3), ArgumentError, ["activation", "3", "callable"]),
]  # fmt: skip


@rows(INPUTS)
def test_input_of_a_network(call, exception, words):
    raised(call, exception, words)


LSTM = {f"{gate}": {"kernel": np.ones((4, 4), "f"), "bias": np.ones(4, "f")} for gate in ("hi", "hf", "hg", "ho")}
PARAMETERS = [
    ("an empty list", [], ["Dense", "apply_fn"]),
    ("an empty dict", {}, ["Dense", "apply_fn"]),
    ("None", None, ["Dense", "apply_fn"]),
    ("an array", np.ones((4, 3), "f"), ["Dense", "apply_fn"]),
    ("gates of a recurrent cell", LSTM, ["hf", "apply_fn"]),
    ("two prefixes", {"Dense_0": kernel(4, 4), "Head_1": kernel(4, 4)}, ["Dense_0", "Head_1", "apply_fn"]),
    ("a convolution", {"Conv_0": kernel(3, 3, 1, 2)}, [r"\(3, 3, 1, 2\)", "apply_fn"]),
    ("a normalisation", {"Dense_0": kernel(4, 4), "Dense_1": {"scale": np.ones(4, "f")}}, ["layer 1", "apply_fn"]),
    ("shapes that do not chain", {"Dense_0": kernel(4, 5), "Dense_1": kernel(4, 3)}, ["4", "5", "apply_fn"]),
    ("a bias of another size", [(np.ones((4, 3), "f"), np.ones(4, "f"))], [r"\(4, 3\)", r"\(4,\)"]),
    ("batch statistics", {"params": {"Dense_0": kernel(4, 3)}, "batch_stats": {"mean": np.ones(3)}}, ["apply_fn"]),
    ("a submodule", {"Block_0": {"Dense_0": kernel(4, 3)}}, ["layer 0", "apply_fn"]),
]


@pytest.mark.parametrize(("params", "words"), [pytest.param(*row[1:], id=row[0]) for row in PARAMETERS])
def test_parameters_that_are_no_chain_of_dense_layers_ask_for_apply_fn(params, words):
    raised(lambda: ibp(params), ArgumentError, words)


# --- transforming a function ------------------------------------------------------------------------------------------

CALLS = [
    ("no region", lambda: bounded(jnp.tanh, np.ones(3)), ArgumentError, ["region", "Box", "LpBall"]),
    ("no argument", lambda: bounded(jnp.tanh), ArgumentError, ["region"]),
    ("a string", lambda: bounded(lambda x, mode: x, BOX, "train"), ArgumentTypeError, ["'train'", "partial"]),
    ("a function", lambda: bounded(lambda x, f: f(x), BOX, jnp.tanh), ArgumentTypeError, ["function|ufunc", "partial"]),
    ("an integer box", lambda: bounded(jnp.tanh, Box(np.zeros(3, int), np.ones(3, int))), ArgumentTypeError, ["int"]),
    ("a negative radius", lambda: bounded(jnp.tanh, LpBall(np.zeros(3), -1.0, 2)), ArgumentError, ["negative"]),
    ("an empty box", lambda: bounded(jnp.tanh, Box(np.ones(3), np.zeros(3))), ArgumentError, ["lower > upper"]),
    ("a NaN", lambda: bounded(jnp.tanh, Box(np.full(3, np.nan), np.ones(3))), ArgumentError, ["NaN"]),
    ("a nested empty box", lambda: bounded(lambda d: d["a"][0], {"a": [Box(np.ones(3), np.zeros(3))]}), ArgumentError, [r"\['a'\]\[0\]"]),
]  # fmt: skip


@rows(CALLS)
def test_arguments_of_a_transformed_function(call, exception, words):
    raised(call, exception, words)


@pytest.mark.parametrize("transform", [jb.bound, jb.linear_bounds, jb.pre_activation_bounds, jb.explain])
def test_every_transformation_wants_a_region(transform):
    raised(lambda: transform(jnp.tanh, jb.Crown())(np.ones(3)), ArgumentError, ["region", "Box"])


def test_the_trees_of_two_arguments_may_differ_in_none():
    """None is no leaf: a function may take optional arguments."""
    assert bounded(lambda x, bias: 2 * x if bias is None else 2 * x + bias, BOX, None).upper.shape == (3,)


# --- methods ----------------------------------------------------------------------------------------------------------


class Guess(Method):
    """An estimate, as the projected polytope is one."""

    guarantee = "estimate"


METHODS = [
    ("lower_slope is misspelt", lambda: bounded(jax.nn.relu, BOX, method=jb.Crown(lower_slope="adaptve")), ArgumentError, ["lower_slope='adaptve'", "did you mean 'adaptive'", "'parallel'"]),
    ("lower_slope without use", lambda: bounded(lambda x: 2 * x, BOX, method=jb.Crown(lower_slope="x")), ArgumentError, ["lower_slope='x'"]),
    ("lower_slope of Forward", lambda: bounded(jax.nn.relu, BOX, method=jb.Forward(lower_slope="x")), ArgumentError, ["lower_slope='x'"]),
    ("lower_slope of crown", lambda: jb.crown(LAYERS, X, 0.1, lower_slope="x"), ArgumentError, ["lower_slope='x'"]),
    ("the method is a name", lambda: bounded(jax.nn.relu, BOX, method="crown"), ArgumentTypeError, ["method", "'crown'", r"Crown\(\)"]),
    ("the method is a class", lambda: bounded(jax.nn.relu, BOX, method=jb.IBP), ArgumentTypeError, ["method", "IBP", r"\(\)"]),
    ("pre_activation is a name", lambda: bounded(jax.nn.relu, BOX, method=jb.Crown(pre_activation="ibp")), ArgumentTypeError, ["pre_activation", "'ibp'"]),
    ("pre_activation is a class", lambda: bounded(jax.nn.relu, BOX, method=jb.Crown(pre_activation=jb.IBP)), ArgumentTypeError, ["pre_activation", "IBP"]),
    ("the best of nothing", lambda: bounded(jax.nn.relu, BOX, method=jb.Best()), ArgumentError, ["Best", "method"]),
    ("the best of a name", lambda: jb.Best(jb.IBP(), "crown"), ArgumentTypeError, ["Best", "'crown'"]),
    ("an estimate in Best", lambda: jb.Best(jb.IBP(), Guess()), ArgumentError, ["Guess", "estimate", "certificate"]),
    ("an estimate before Crown", lambda: bounded(jax.nn.relu, BOX, method=jb.Crown(pre_activation=Guess())), ArgumentError, ["Guess", "estimate"]),
    ("an estimate before CrownIBP", lambda: bounded(jax.nn.relu, BOX, method=jb.CrownIBP(pre_activation=Guess())), ArgumentError, ["Guess", "estimate"]),
    ("linear bounds of IBP", lambda: jb.linear_bounds(jax.nn.relu, jb.IBP())(BOX), UnsupportedError, ["IBP", "linear bounds", r"Crown\(\)"]),
]  # fmt: skip


@rows(METHODS)
def test_methods(call, exception, words):
    raised(call, exception, words)


@pytest.mark.parametrize(
    "call", [lambda: jb.ibp(LAYERS, X, 0.1, steps=3), lambda: jb.crown(LAYERS, X, 0.1, steps=3), lambda: jb.Crown(steps=3)]
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


def switches(x):
    return jnp.where(x[::-1] > 0, x, jnp.flip(x) * 2)


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
        assert "convert_element_type" in str(refusal)
        return
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
        assert "convert_element_type" in str(refusal)
        return
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


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize("fn", [two_layers, affine])
def test_under_jit_an_empty_or_undefined_region_gives_infinite_bounds(fn, method):
    bounds = jax.jit(jb.bound(fn, method))
    for name, region in UNBOUNDED.items():
        found = bounds(region)
        assert np.all(np.asarray(found.lower) == -np.inf), name
        assert np.all(np.asarray(found.upper) == np.inf), name


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
    assert np.all(np.asarray(found.lower) == -np.inf)
    assert np.all(np.asarray(found.upper) == np.inf)


def test_nan_parameters_certify_nothing():
    layers = [(np.where(np.eye(4, 5), np.nan, kernel).astype("f"), bias) for kernel, bias in LAYERS[:1]] + LAYERS[1:]
    for method in ALL_METHODS:
        found = jb.network.bound_network(method, layers, X, 0.1)
        assert not np.any(np.asarray(found.lower) > -np.inf), method
        assert not np.any(np.asarray(found.upper) < np.inf), method
