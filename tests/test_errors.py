"""Bad input: one clear error each, that names the culprit and the way out; under a trace, bounds certify nothing.

Every row of the tables is a call that a user could make by mistake, the exception that it must raise, and words that
its text must hold. All are `JaxboundError`s, and those that blame an argument are `ValueError` or `TypeError` too.
"""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.errors import ArgumentError, ArgumentTypeError, JaxboundError, UnsupportedError
from jaxbound.methods import Method
from jaxbound.network.bounding import bound_network
from jaxbound.regions import Box, LpBall

RANDOM = np.random.default_rng(0)
LAYERS = [
    (RANDOM.normal(size=shape).astype("f"), RANDOM.normal(size=shape[1]).astype("f")) for shape in ((4, 5), (5, 3))
]
X = RANDOM.uniform(0.2, 0.8, (2, 4)).astype("f")
BOX = Box(np.full(3, -1.0, "f"), np.full(3, 1.0, "f"))
ALL_METHODS = [jb.IBP(), jb.Forward(), jb.CrownIBP(), jb.Crown(), jb.FastLin(), jb.Best(jb.IBP(), jb.CrownIBP())]
by_name = functools.partial(pytest.mark.parametrize, ids=lambda method: type(method).__name__)


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


def apply(variables, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ variables["kernel"])


def kernel(*shape):
    return {"kernel": np.ones(shape, "f")}


def ibp(params=LAYERS, x=X, eps=0.1, **options):
    return jb.ibp(params, x, eps, **{"activation": "relu"} | options)


def ibp_of(region, **options):
    return jb.ibp(LAYERS, region, activation="relu", **options)


INPUTS = [
    ("x is int32", lambda: ibp(x=np.ones((2, 4), np.int32)), ArgumentTypeError, ["x", "int32", "255"]),
    ("x is uint8", lambda: ibp(x=np.ones((2, 4), np.uint8)), ArgumentTypeError, ["x", "uint8", "255"]),
    ("x is bool", lambda: ibp(x=np.ones((2, 4), bool)), ArgumentTypeError, ["x", "bool"]),
    ("x is complex", lambda: ibp(x=np.ones((2, 4), complex)), ArgumentTypeError, ["x", "complex"]),
    ("x has too many features", lambda: ibp(x=np.ones((2, 5), "f")), ArgumentError, [r"\(2, 5\)", r"\(batch, 4\)"]),
    ("x is a number", lambda: ibp(x=np.float32(1)), ArgumentError, [r"\(\)", r"\(batch, 4\)"]),
    ("a number for apply_fn", lambda: ibp(kernel(4, 2), np.float32(1), apply_fn=apply), ArgumentError, ["batch"]),
    ("x is a list", lambda: ibp(x=[[0.1, 0.2, 0.3, 0.4]]), ArgumentTypeError, ["x", "list"]),
    ("x is a string", lambda: ibp(x="image.png"), JaxboundError, ["x "]),
    ("x is None", lambda: ibp(x=None), JaxboundError, ["x "]),
    ("x holds a NaN", lambda: ibp(x=X * np.nan), ArgumentError, ["NaN"]),
    ("no examples", lambda: ibp(kernel(4, 2), X[:0], apply_fn=apply), ArgumentError, ["batch|examples"]),
    ("eps is missing", lambda: ibp(eps=None), ArgumentError, ["eps", "radius", "region"]),
    ("eps is negative", lambda: ibp(eps=-0.1), ArgumentError, ["negative", "eps >= 0"]),
    ("one eps is negative", lambda: ibp(eps=np.array([0.1, -0.1])), ArgumentError, ["negative", "eps >= 0"]),
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
    ("eps beside a region", lambda: ibp_of(Box(X, X + 1), eps=0.1), ArgumentError, ["region", "leave eps out"]),
    ("clip beside a region", lambda: ibp_of(Box(X, X + 1), clip=(0, 1)), ArgumentError, ["region", "clip"]),
    ("norm beside a region", lambda: ibp_of(Box(X, X + 1), norm=2), ArgumentError, ["region", "norm"]),
    ("an empty box", lambda: ibp_of(Box(X + 1, X)), ArgumentError, ["lower > upper"]),
    ("a box of two shapes", lambda: ibp_of(Box(X, X[0])), ArgumentError, [r"\(2, 4\)", r"\(4,\)"]),
    ("one ball over the batch", lambda: ibp_of(LpBall(X, 0.1, 2)), ArgumentError, ["batch_ndim=1"]),
    ("spec is a vector", lambda: ibp(spec=np.ones(3, "f")), ArgumentError, ["spec", r"\(specs, outputs\)"]),
    ("spec of other outputs", lambda: ibp(spec=np.ones((2, 4), "f")), ArgumentError, ["spec", r"\(2, 4\)", "3"]),
    ("spec of another batch", lambda: ibp(spec=np.ones((5, 2, 3), "f")), ArgumentError, ["spec", "5", "2"]),
    ("sides is unknown", lambda: ibp(sides="upper"), ArgumentError, ["sides='upper'", "'both', 'lower'"]),
    ("activation is misspelt", lambda: ibp(activation="rellu"), ArgumentError, ["'rellu'", "callable"]),
    ("activation is no function", lambda: ibp(activation=3), ArgumentError, ["activation", "3", "callable"]),
    ("x has no order", lambda: ibp(x=X + 0j), ArgumentTypeError, ["x has dtype complex", "order", "imaginary"]),
    ("memory_limit is a word", lambda: ibp(memory_limit="1GB"), ArgumentTypeError, ["memory_limit", "'1GB'", "bytes"]),
    ("apply_fn is a class", lambda: ibp(apply_fn=nn.Dense), ArgumentTypeError, ["apply_fn", "class Dense", "instance"]),
    ("two results", lambda: ibp(apply_fn=lambda v, x: (x, x)), ArgumentError, ["gives 2 arrays", "apply_fn="]),
    (
        "two results and a spec",
        lambda: ibp(apply_fn=lambda v, x: (x, x), spec=np.ones((1, 4), "f")),
        ArgumentError,
        ["gives a tuple", "apply_fn="],
    ),
    ("no result", lambda: ibp(apply_fn=lambda v, x: None), ArgumentError, ["gives 0 arrays", "apply_fn="]),
    (
        "logits and a state",
        lambda: ibp(apply_fn=lambda v, x: (x, {"mean": x[0]})),
        ArgumentError,
        ["gives a tuple", "without a batch axis", "apply_fn="],
    ),
    ("a branch", lambda: ibp(apply_fn=lambda v, x: x if x.sum() > 0 else -x), ArgumentError, ["jnp.where"]),
    ("NumPy within", lambda: ibp(apply_fn=lambda v, x: np.tanh(x)), ArgumentError, ["jax.numpy in place"]),
    (
        "no batch statistics",
        lambda: ibp({}, apply_fn=nn.BatchNorm(use_running_average=True).apply),
        ArgumentError,
        ["batch_stats"],
    ),
]


def test_labels_that_are_words():
    raised(lambda: jb.margin_spec(np.array(["a", "b"]), 3), ArgumentTypeError, ["labels", "class indices"])


def test_roundings_are_named():
    call = lambda: jb.certify(LAYERS, X, [0, 1], 0.1, method=jb.IBP(), activation="relu", rounding="up")  # noqa: E731
    raised(call, ArgumentError, ["rounding is 'up'", '"outward", "execution" or None'])


@rows(INPUTS)
def test_input_of_a_network(call, exception, words):
    raised(call, exception, words)


LSTM = {gate: {"kernel": np.ones((4, 4), "f"), "bias": np.ones(4, "f")} for gate in ("hi", "hf", "hg", "ho")}
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


def bounded(fn, *args, method=None):
    return jb.bound(fn, jb.IBP() if method is None else method)(*args)


def box(lower, upper):
    return Box(np.full(3, lower), np.full(3, upper))


NESTED = {"a": [box(1.0, 0.0)]}
CALLS = [
    ("no region", lambda: bounded(jnp.tanh, np.ones(3)), ArgumentError, ["region", "Box", "LpBall"]),
    ("no argument", lambda: bounded(jnp.tanh), ArgumentError, ["region"]),
    ("a string", lambda: bounded(lambda x, mode: x, BOX, "train"), ArgumentTypeError, ["'train'", "partial"]),
    ("a function", lambda: bounded(lambda x, f: f(x), BOX, jnp.tanh), ArgumentTypeError, ["tanh", "partial"]),
    ("an integer box", lambda: bounded(jnp.tanh, box(0, 1)), ArgumentTypeError, ["int", "float"]),
    ("a negative radius", lambda: bounded(jnp.tanh, LpBall(np.zeros(3), -1.0, 2)), ArgumentError, ["negative"]),
    ("an empty box", lambda: bounded(jnp.tanh, box(1.0, 0.0)), ArgumentError, ["lower > upper"]),
    ("a NaN", lambda: bounded(jnp.tanh, box(np.nan, 0.0)), ArgumentError, ["NaN"]),
    ("no function", lambda: bounded({"kernel": X}, BOX), ArgumentTypeError, ["fn is a dict", "function"]),
    ("a flag", lambda: bounded(lambda x, t: x if t else -x, BOX, True), ArgumentTypeError, ["value", "partial"]),
    ("an axis", lambda: bounded(lambda x, axis: x.sum(axis), BOX, 0), ArgumentTypeError, ["value", "partial"]),
    ("a branch", lambda: bounded(lambda x: x if x[0] > 0 else -x, BOX), ArgumentTypeError, ["jnp.where"]),
    ("a nested empty box", lambda: bounded(lambda d: d["a"][0], NESTED), ArgumentError, [r"\['a'\]\[0\]"]),
]


@rows(CALLS)
def test_arguments_of_a_transformed_function(call, exception, words):
    raised(call, exception, words)


@pytest.mark.parametrize("transform", [jb.bound, jb.linear_bounds, jb.pre_activation_bounds, jb.explain])
def test_every_transformation_wants_a_region(transform):
    raised(lambda: transform(jnp.tanh, jb.Crown())(np.ones(3)), ArgumentError, ["region", "Box"])


def test_an_argument_may_be_none():
    assert bounded(lambda x, bias: 2 * x if bias is None else 2 * x + bias, BOX, None).upper.shape == (3,)


@by_name("method", ALL_METHODS)
def test_a_result_may_be_the_region_itself_or_reach_no_region(method):
    itself, fixed, nothing = bounded(lambda x: (x, jnp.arange(2.0), None), BOX, method=method)
    np.testing.assert_array_equal((itself.lower, itself.upper), (BOX.lower, BOX.upper))
    np.testing.assert_array_equal((fixed.lower, fixed.upper), [np.arange(2.0)] * 2)
    assert nothing is None


# --- methods ----------------------------------------------------------------------------------------------------------


class Guess(Method):
    """An estimate, as the projected polytope is one."""

    guarantee = "estimate"


def using(method, fn=jax.nn.relu):
    return jb.bound(fn, method)(BOX)


MISSPELT = ["lower_slope='adaptve'", "did you mean 'adaptive'", "'parallel'"]
METHODS = [
    ("lower_slope is misspelt", lambda: using(jb.Crown(lower_slope="adaptve")), ArgumentError, MISSPELT),
    (
        "lower_slope of crown",
        lambda: jb.crown(LAYERS, X, 0.1, lower_slope="adaptve", activation="relu"),
        ArgumentError,
        MISSPELT,
    ),
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


UNKNOWN = {
    "ibp": lambda: jb.ibp(LAYERS, X, 0.1, steps=3, activation="relu"),
    "crown": lambda: jb.crown(LAYERS, X, 0.1, steps=3, activation="relu"),
    "Crown": lambda: jb.Crown(steps=3),
}


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_option_of_a_method_raises(call):
    with pytest.raises(TypeError, match="steps"):
        call()


# --- what cannot be bounded -------------------------------------------------------------------------------------------


def remains(x):
    return jax.lax.rem(x, 2 * x)  # the line that the message must name


def loops(x):
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
    (remains, "rem", [r"\(3,\)", "jnp.floor"]),
    (loops, "while", [r"\(3,\)", "iterations"]),
    (branches, "cond", ["predicate", "jnp.where"]),
    (calls_back, "pure_callback", ["callback", "JAX"]),
    (reduces_precision, "reduce_precision", ["full precision"]),
    (counts, "convert_element_type", ["int32"]),
    (compares, "gt", ["bool"]),
    (chooses, "argmax", ["largest", "margins"]),
    (indexes, "gather", [r"\(3,\)"]),
]


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize(("fn", "primitive", "words"), REFUSALS, ids=[row[1] for row in REFUSALS])
def test_a_refusal_names_primitive_shapes_line_and_way_out(fn, primitive, words, method):
    line = fn.__code__.co_firstlineno + 1
    text = raised(lambda: bounded(fn, BOX, method=method), UnsupportedError, [f"`{primitive}`", *words])
    assert f"test_errors.py:{line} ({fn.__name__}): " in text
    assert not text.endswith(": ")


def test_a_refusal_is_listed_by_explain_and_raised_under_jit():
    assert "`rem`" in jb.explain(remains, jb.Crown())(BOX).refusals[0]
    with pytest.raises(UnsupportedError, match="`rem`"):
        jax.jit(jb.bound(remains, jb.Crown()))(BOX)


def test_what_follows_from_a_refusal_is_not_told_again():
    found = jb.explain(lambda x: jax.nn.one_hot(jnp.argmax(x), 3), jb.Crown())(BOX).refusals
    assert len(found) == 1 and "`argmax`" in found[0] and len(found[0]) < 300, found


def test_what_the_result_does_not_need_is_not_refused():
    found = bounded(lambda x: (jnp.argsort(x), 2 * x)[1], BOX)
    np.testing.assert_allclose(found.upper, 2.0)


def assert_refused_or_enclosed(fn, primitive, start, stop, method):
    """Either a refusal that names the primitive, or bounds that hold on a grid."""
    values = jax.vmap(fn)(jnp.linspace(start, stop, 4001)[:, None])
    try:
        found = jb.bound(fn, method)(Box(jnp.full(1, start), jnp.full(1, stop)))
    except UnsupportedError as refusal:
        if f"`{primitive}`" not in str(refusal):
            raise
        return
    assert np.all(np.asarray(found.lower <= values.min(axis=0)))
    assert np.all(np.asarray(found.upper >= values.max(axis=0)))


def residue_of_rounding(narrow):
    """Rounding is a staircase: a line through its ends is on neither side of it in between."""
    return lambda x: x.astype(narrow).astype(x.dtype) - x @ jnp.eye(1, dtype=x.dtype)


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize("narrow", [jnp.float16, jnp.bfloat16])
def test_a_narrowing_cast_is_refused_or_enclosed(narrow, method):
    assert_refused_or_enclosed(residue_of_rounding(narrow), "convert_element_type", 1.0, 2.0, method)


@pytest.mark.x64
@by_name("method", ALL_METHODS)
def test_a_cast_from_float64_to_float32_is_refused_or_enclosed(method):
    assert_refused_or_enclosed(residue_of_rounding(jnp.float32), "convert_element_type", 1.0, 1.0 + 1e-6, method)


@by_name("method", ALL_METHODS)
def test_a_product_in_less_precision_is_refused_or_enclosed(method):
    def residue(x):
        product = jnp.dot(x, jnp.eye(1), preferred_element_type=jnp.bfloat16)
        return product.astype(jnp.float32) - x @ jnp.eye(1)

    assert_refused_or_enclosed(residue, "dot_general", 1.0, 2.0, method)


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize("fill", [5.0, -5.0])
def test_indexing_that_fills_what_is_missing_is_refused_or_enclosed(fill, method):
    """The fill value is a constant that a linear transpose forgets."""
    assert_refused_or_enclosed(lambda x: jnp.take(x, np.array([0, 7]), fill_value=fill), "gather", 0.0, 1.0, method)


@by_name("method", ALL_METHODS)
def test_indexing_that_fills_with_nan_certifies_nothing(method):
    found = bounded(lambda x: jnp.take(x, np.array([7])), box(0.0, 1.0), method=method)
    assert_certifies_nothing(found)


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


@pytest.mark.quick(3)
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


@pytest.mark.quick(3)
@by_name("method", ALL_METHODS)
def test_under_jit_one_bad_example_does_not_certify_and_spoils_no_other(method):
    x, eps = np.tile(POINT, (4, 1)), np.array([0.1, -0.1, 0.1, np.nan], "f")
    x[2, 1] = np.nan
    found = jax.jit(lambda x, eps: bound_network(method, LAYERS, x, eps, activation="relu"))(x, eps)
    assert np.all(np.isfinite(np.asarray(found.lower[0])))
    assert_certifies_nothing(jax.tree.map(lambda bound: bound[1:], found))


@by_name("method", ALL_METHODS)
@pytest.mark.parametrize("norm", [2.0, np.inf])
def test_an_infinite_radius_gives_infinite_bounds_not_nan(norm, method):
    assert_certifies_nothing(bounded(two_layers, LpBall(POINT, np.inf, norm), method=method))


@pytest.mark.quick(2)
@by_name("method", ALL_METHODS)
def test_nan_parameters_certify_nothing(method):
    first = np.where(np.eye(4, 5), np.nan, LAYERS[0][0]).astype("f")
    found = bound_network(method, [(first, LAYERS[0][1]), LAYERS[1]], X, 0.1, activation="relu")
    assert_certifies_nothing(found)
