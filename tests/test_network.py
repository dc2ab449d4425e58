"""What a network may be, and how the functions named after methods are called: the same numbers whatever the wrapping.

The reference is always the plainest call, `bound` on a function of one example, or the network with zero radius, which
gives the network's own values.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxbound as jb
from jaxbound.methods import Method
from jaxbound.network.bounding import bound_network
from jaxbound.network.resolving import resolve
from jaxbound.regions import Box, LpBall

RANDOM = np.random.default_rng(0)
X = RANDOM.uniform(0.1, 0.9, (3, 4)).astype("f")
EPS = 0.05
NAMED = {
    "ibp": jb.IBP(),
    "forward": jb.Forward(),
    "fastlin": jb.FastLin(),
    "crown": jb.Crown(),
    "crown_ibp": jb.CrownIBP(),
}
METHODS = [*NAMED.values(), jb.Best(jb.IBP(), jb.CrownIBP())]
FEW = [jb.IBP(), jb.CrownIBP(), jb.Crown()]
by_method = functools.partial(pytest.mark.parametrize, "method", ids=lambda method: type(method).__name__)


class MLP(nn.Module):
    """Dense layers."""

    widths: tuple[int, ...] = (6, 3)

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


MODEL = MLP()
VARIABLES = jax.tree.map(lambda leaf: leaf + 0.1, MODEL.init(jax.random.key(0), X))


def values(found) -> np.ndarray:
    return np.stack([np.asarray(found.lower), np.asarray(found.upper)])


def assert_same(found, expected, rtol=2e-5):
    scale = np.abs(values(expected)).max()
    np.testing.assert_allclose(values(found), values(expected), rtol=0, atol=rtol * scale)


def per_example(method, x=X, eps=EPS, norm=np.inf, clip=None, spec=None):
    """The reference: the transformation of a plain function, example by example."""

    def fn(c):
        logits = MODEL.apply(VARIABLES, c[None])[0]
        return logits if spec is None else spec @ logits

    transformed = jb.bound(fn, method)
    found = [transformed(LpBall(c, e, norm, clip=clip)) for c, e in zip(x, np.broadcast_to(eps, len(x)), strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@functools.cache
def reference():
    return per_example(jb.CrownIBP())


# --- what a network may be --------------------------------------------------------------------------------------------


class Loose:
    """Something with a method: hashable by identity."""

    def run(self, variables, x):
        return MODEL.apply(variables, x)


def plain(variables, x):
    return MODEL.apply(variables, x)


def scaled(scale, variables, x, *, offset=0.0):
    return scale * MODEL.apply(variables, x) + offset


def dense_layers(variables):
    layers = variables["params"]
    return [layers[f"Dense_{k}"] for k in range(len(layers))]


STATE = TrainState.create(apply_fn=MODEL.apply, params=VARIABLES["params"], tx=optax.sgd(0.1))
WHOLE_STATE = TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=optax.sgd(0.1))
BOXED = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), VARIABLES)
PAIRS = [(layer["kernel"], layer["bias"]) for layer in dense_layers(VARIABLES)]

WRAPPINGS = {
    "a variables dict": (VARIABLES, {"apply_fn": MODEL.apply}),
    "bare parameters": (VARIABLES["params"], {"apply_fn": MODEL.apply}),
    "a frozen variables dict": (flax.core.freeze(VARIABLES), {"apply_fn": MODEL.apply}),
    "frozen bare parameters": (flax.core.freeze(VARIABLES["params"]), {"apply_fn": MODEL.apply}),
    "a train state": (STATE, {}),
    "a train state of variables": (WHOLE_STATE, {}),
    "Partitioned leaves": (BOXED, {"apply_fn": MODEL.apply}),
    "Partitioned leaves of Dense layers": (BOXED, {}),
    "an abstractly named function": (VARIABLES, {"apply_fn": plain}),
    "a lambda": (VARIABLES, {"apply_fn": lambda v, x: MODEL.apply(v, x)}),
    "a bound method": (VARIABLES, {"apply_fn": Loose().run}),
    "a partial of a Linen apply": (VARIABLES["params"], {"apply_fn": functools.partial(MODEL.apply, mutable=False)}),
    "a partial of a function": (VARIABLES, {"apply_fn": functools.partial(scaled, 1.0, offset=0.0)}),
    "a partial of a partial": (VARIABLES, {"apply_fn": functools.partial(functools.partial(scaled, 1.0), offset=0.0)}),
    "a jitted function": (VARIABLES, {"apply_fn": jax.jit(plain)}),
    "Dense layers by name": (VARIABLES, {}),
    "Dense layers by name, bare": (VARIABLES["params"], {}),
    "Dense layers by name, frozen": (flax.core.freeze(VARIABLES), {}),
    "a list of Dense layers": (dense_layers(VARIABLES), {}),
    "a list of pairs": (PAIRS, {}),
    "a tuple of pairs": (tuple(PAIRS), {}),
    "arrays of NumPy": (jax.tree.map(np.asarray, VARIABLES), {}),
    "an activation by name": (PAIRS, {"activation": "relu"}),
    "an activation": (PAIRS, {"activation": jax.nn.relu}),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_wrapping_of_a_network_does_not_matter(name):
    params, options = WRAPPINGS[name]
    assert_same(jb.crown_ibp(params, X, EPS, **{"activation": "relu"} | options), reference())


@pytest.mark.parametrize("name", ["a variables dict", "a list of pairs", "a jitted function", "an NNX module"])
def test_what_is_attacked_and_predicted_is_what_is_bounded(name):
    """Accelerators would round the factors of its products to TF32 or bfloat16."""
    params, options = WRAPPINGS.get(name, (nnx.Linear(4, 3, rngs=nnx.Rngs(0)), {}))
    network = resolve(params, X, options.get("apply_fn"), "relu")
    found = str(jax.make_jaxpr(network.function)(network.variables, X[0]))
    assert found.count("dot_general[") == found.count("(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_a_plain_function_gets_the_parameters_as_they_are():
    """Only a Linen `apply` gets a bare tree wrapped."""
    found = jb.crown_ibp(VARIABLES["params"], X, EPS, apply_fn=lambda params, x: MODEL.apply({"params": params}, x))
    assert_same(found, reference())


def test_an_activation_is_the_callers_word():
    found = jb.crown_ibp(PAIRS, X, 0.0, activation="tanh")
    hidden = functools.reduce(lambda h, layer: jnp.tanh(h @ layer[0] + layer[1]), PAIRS[:-1], X)
    assert_same(found, jb.Interval(*[hidden @ PAIRS[-1][0] + PAIRS[-1][1]] * 2))


def test_layers_stand_in_integer_order():
    """Dense_10 comes after Dense_9, not after Dense_1."""
    kernels = [RANDOM.normal(size=(4, 4)).astype("f") / 2 for _ in range(12)]
    named = sorted((f"Dense_{k}", {"kernel": kernel}) for k, kernel in enumerate(kernels))
    assert [name for name, _ in named][1:4] == ["Dense_1", "Dense_10", "Dense_11"]
    exact = functools.reduce(lambda h, kernel: jnp.sin(h) @ kernel, kernels[1:], X @ kernels[0])
    assert_same(jb.ibp(dict(named), X, 0.0, activation="sin"), jb.Interval(exact, exact), rtol=1e-2)


def test_layers_may_have_any_prefix_and_no_bias():
    layers = {f"layers_{k}": {"kernel": layer["kernel"]} for k, layer in enumerate(dense_layers(VARIABLES))}
    exact = functools.reduce(lambda h, layer: jax.nn.relu(h @ layer[0]), PAIRS[:-1], X) @ PAIRS[-1][0]
    assert_same(jb.ibp(layers, X, 0.0, activation="relu"), jb.Interval(exact, exact))
    assert_same(jb.ibp([(kernel, None) for kernel, _ in PAIRS], X, 0.0, activation="relu"), jb.Interval(exact, exact))


# --- modules that behave differently in training ----------------------------------------------------------------------


class Normalised(nn.Module):
    """BatchNorm and Dropout: what it computes depends on `train`."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def test_batch_statistics_are_variables():
    model = Normalised()
    variables = model.init(jax.random.key(0), X)
    statistics = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    variables = {"params": variables["params"], "batch_stats": statistics}
    exact = model.apply(variables, X)
    assert_same(jb.crown_ibp(variables, X, 0.0, apply_fn=model.apply), jb.Interval(exact, exact))


def test_a_train_state_with_batch_statistics():
    @flax.struct.dataclass
    class State(TrainState):
        batch_stats: dict = field(default_factory=dict)

    model = Normalised()
    variables = model.init(jax.random.key(0), X)
    statistics = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    state = State.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1), batch_stats=statistics)
    exact = model.apply({"params": variables["params"], "batch_stats": statistics}, X)
    assert_same(jb.crown_ibp(state, X, 0.0), jb.Interval(exact, exact))


class Module(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def trained_module() -> Module:
    """A module in training mode with running averages that matter."""
    module = Module(nnx.Rngs(0))
    module.train()
    for _ in range(3):
        module(jnp.asarray(X))
    return module


def test_an_nnx_module_is_evaluated_and_not_mutated():
    module = trained_module()
    before = numbers_in(module)
    found = jb.crown_ibp(module, jnp.asarray(X), EPS)
    again = jb.crown_ibp(module, jnp.asarray(X), EPS)
    assert_same(again, found, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, before, numbers_in(module))
    assert module.dropout.deterministic is False
    assert module.norm.use_running_average is False
    assert_same(jb.crown_ibp(module, jnp.asarray(X), 0.0), jb.Interval(*[evaluated(module)] * 2))


def numbers_in(module) -> dict:
    """Parameters, running averages and counts of random keys."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngCount)))
    return jax.tree.map(np.array, state)


def evaluated(module):
    module.eval()
    result = module(jnp.asarray(X))
    module.train()
    return result


def test_an_nnx_module_as_a_traced_argument():
    """Under `nnx.jit` and `nnx.grad` a module's parameters are tracers."""
    module = trained_module()

    def loss(m):
        return jnp.sum(jb.ibp(m, jnp.asarray(X), EPS, activation="relu").lower)

    value, gradient = nnx.value_and_grad(loss)(module)
    eager = jb.ibp(module, jnp.asarray(X), EPS).lower.sum()
    np.testing.assert_allclose(value, eager, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


class Unhashable(nn.Module):
    """A module with a list among its fields cannot be hashed, nor can its `apply`."""

    widths: list = field(default_factory=lambda: [6, 3])
    options: dict = field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        return MLP(tuple(self.widths))(x)


def test_a_module_with_unhashable_fields():
    model = Unhashable([6, 3], {"a": np.ones(2)})
    variables = {"params": {"MLP_0": VARIABLES["params"]}}
    assert_same(jb.crown_ibp(variables, X, EPS, apply_fn=model.apply), reference())
    assert_same(jb.crown_ibp(variables, X, EPS, apply_fn=functools.partial(model.apply, mutable=False)), reference())


def test_modules_that_differ_only_in_a_field_are_not_confused():
    """Graphs are kept by function: equal classes with other fields are other functions."""

    class Shifted(nn.Module):
        shift: float = 0.0

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x) + self.shift

    variables = Shifted().init(jax.random.key(0), X)
    low = jb.ibp(variables, X, EPS, apply_fn=Shifted(0.0).apply)
    high = jb.ibp(variables, X, EPS, apply_fn=Shifted(1.0).apply)
    np.testing.assert_allclose(high.lower - low.lower, 1.0, atol=1e-5)
    one = functools.partial(scaled, 1.0)
    two = functools.partial(scaled, 2.0)
    found = [jb.ibp(VARIABLES, X, EPS, apply_fn=fn) for fn in (one, two, functools.partial(scaled, 1.0, offset=3.0))]
    np.testing.assert_allclose(found[1].lower, 2 * found[0].lower, rtol=1e-5)
    np.testing.assert_allclose(found[2].lower - found[0].lower, 3.0, atol=1e-5)


# --- how it is called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), NAMED.items(), ids=NAMED)
def test_the_named_functions_are_their_methods_example_by_example(name, method):
    found = getattr(jb, name)(VARIABLES, X, EPS, apply_fn=MODEL.apply)
    assert found.lower.shape == found.upper.shape == (3, 3)
    assert_same(found, per_example(method))


@by_method([jb.IBP(), jb.Crown()])
def test_one_example_of_a_dense_chain_has_no_batch_axis(method):
    found = bound_network(method, VARIABLES, X[0], EPS, activation="relu")
    batch = bound_network(method, VARIABLES, X[:1], EPS, activation="relu")
    assert found.lower.shape == (3,)
    assert batch.lower.shape == (1, 3)
    assert_same(found, jax.tree.map(lambda leaf: leaf[0], batch))


def test_examples_of_a_dense_chain_are_flattened():
    images = X.reshape(3, 2, 2, 1)
    assert_same(jb.crown_ibp(VARIABLES, images, EPS, activation="relu"), reference())
    one = jb.crown_ibp(VARIABLES, images[0], EPS, activation="relu")
    assert one.lower.shape == (3,)
    assert_same(one, jax.tree.map(lambda leaf: leaf[0], reference()))


@pytest.mark.parametrize(
    ("method", "norm"),
    [*itertools.product(METHODS, [np.inf]), *itertools.product(FEW, [2.0]), (jb.CrownIBP(), 1), (jb.CrownIBP(), 3.0)],
    ids=str,
)
def test_zero_radius_gives_the_networks_values(method, norm):
    exact = MODEL.apply(VARIABLES, X)
    assert_same(bound_network(method, VARIABLES, X, 0.0, norm=norm, activation="relu"), jb.Interval(exact, exact))


ENDS = np.full(4, 0.05, "f"), np.full(4, 0.92, "f")


@pytest.mark.quick(2)
@pytest.mark.parametrize(("norm", "clip"), [(np.inf, None), (np.inf, ENDS), (2.0, None), (2.0, (0.0, 1.0)), (1, ENDS)])
def test_one_radius_per_example(norm, clip):
    eps = np.array([0.0, 0.05, 0.2], "f")
    found = jb.crown_ibp(VARIABLES, X, eps, norm=norm, clip=clip, activation="relu")
    assert_same(found, per_example(jb.CrownIBP(), eps=eps, norm=norm, clip=clip))
    assert np.all(np.diff((found.upper - found.lower).sum(axis=-1)) > 0)


SPEC = RANDOM.normal(size=(2, 3)).astype("f")


@by_method(FEW)
def test_a_specification_is_composed_with_the_last_layer(method):
    found = bound_network(method, VARIABLES, X, EPS, spec=SPEC, activation="relu")
    assert found.lower.shape == (3, 2)
    assert_same(found, per_example(method, spec=SPEC))
    outputs = bound_network(method, VARIABLES, X, EPS, activation="relu")
    loose = np.maximum(SPEC, 0) @ outputs.lower.T + np.minimum(SPEC, 0) @ outputs.upper.T
    assert np.all(loose - 1e-5 <= found.lower.T)


@by_method(FEW)
def test_a_specification_per_example(method):
    specs = np.stack([SPEC, -SPEC, 2 * SPEC])
    found = bound_network(method, VARIABLES, X, EPS, spec=specs, activation="relu")
    plus = bound_network(method, VARIABLES, X, EPS, spec=SPEC, activation="relu")
    expected = np.stack([values(plus)[:, 0], -values(plus)[::-1, 1], 2 * values(plus)[:, 2]], axis=1)
    np.testing.assert_allclose(values(found), expected, atol=2e-5)


def test_specifications_may_be_made_under_jit():
    labels = jnp.array([0, 2, 1])
    found = jax.jit(lambda y: jb.crown_ibp(VARIABLES, X, EPS, spec=jb.margin_spec(y, 3), activation="relu"))(labels)
    assert_same(found, jb.crown_ibp(VARIABLES, X, EPS, spec=jb.margin_spec(labels, 3), activation="relu"))


@by_method(FEW)
def test_lower_sides_are_those_of_both(method):
    both = bound_network(method, VARIABLES, X, EPS, spec=SPEC, activation="relu")
    lower = bound_network(method, VARIABLES, X, EPS, spec=SPEC, sides="lower", activation="relu")
    assert lower.upper is None
    np.testing.assert_allclose(lower.lower, both.lower, atol=1e-6)


@by_method([jb.IBP(), jb.Crown()])
def test_a_small_memory_limit_changes_nothing(method):
    model = MLP((40, 3))
    variables = model.init(jax.random.key(2), X)
    free = bound_network(method, variables, X, EPS, activation="relu")
    tight = bound_network(method, variables, X, EPS, memory_limit=1, activation="relu")
    assert_same(tight, free, rtol=1e-6)


@by_method([jb.IBP(), jb.Crown()])
def test_x_may_be_a_region(method):
    expected = bound_network(method, VARIABLES, X, EPS, norm=2, activation="relu")
    region = LpBall(X, EPS, 2, batch_ndim=1)
    assert_same(bound_network(method, VARIABLES, region, apply_fn=MODEL.apply), expected)
    box = Box(X - 0.02, X + np.arange(4, dtype="f") / 100)
    found = bound_network(method, VARIABLES, box, activation="relu")
    one = bound_network(method, VARIABLES, Box(box.lower[1], box.upper[1]), activation="relu")
    assert_same(one, jax.tree.map(lambda leaf: leaf[1], found))


def test_x_may_be_a_region_of_several_balls_an_example():
    """Two balls, one per row, are inside one of radius sqrt(r_1^2 + r_2^2); interval propagation is monotone."""
    images = X.reshape(3, 2, 2)
    radius = np.array([[0.05, 0.0], [0.1, 0.02], [0.0, 0.0]], "f")
    found = jb.ibp(VARIABLES, LpBall(images, radius, 2, batch_ndim=2), activation="relu")
    whole = jb.ibp(VARIABLES, LpBall(images, np.linalg.norm(radius, axis=1), 2, batch_ndim=1), activation="relu")
    assert np.all(whole.lower - 1e-5 <= found.lower)
    assert np.all(found.upper <= whole.upper + 1e-5)
    np.testing.assert_allclose(found.upper[2], MODEL.apply(VARIABLES, X)[2], atol=1e-5)


class CNN(nn.Module):
    """One strided convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=(2, 2))(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


IMAGES = RANDOM.uniform(size=(4, 5, 5, 1)).astype("f")
CONVOLUTIONAL = CNN().init(jax.random.key(0), IMAGES)


@by_method(FEW)
def test_examples_do_not_depend_on_their_batch(method):
    """Eager row selection looks at the whole batch, so its numbers must not."""

    def run(images, eps):
        return bound_network(method, CONVOLUTIONAL, images, eps, apply_fn=CNN().apply)

    eps = np.array([0.3, 0.001, 0.05, 0.0], "f")
    whole = run(IMAGES, eps)
    parts = [run(IMAGES[k : k + 1], eps[k : k + 1]) for k in range(4)]
    assert_same(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), whole)


def test_outputs_of_any_shape_are_flattened_for_specifications_only():
    def two_rows(variables, x):
        return MODEL.apply(variables, x).reshape(-1, 3, 1)

    found = jb.crown_ibp(VARIABLES, X, EPS, apply_fn=two_rows)
    assert found.lower.shape == (3, 3, 1)
    spec = jb.crown_ibp(VARIABLES, X, EPS, apply_fn=two_rows, spec=SPEC)
    assert_same(spec, jb.crown_ibp(VARIABLES, X, EPS, spec=SPEC, activation="relu"))


@pytest.mark.x64
def test_the_dtype_is_that_of_parameters_and_x_together():
    expected = jb.ibp(VARIABLES, X, EPS, activation="relu")
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), VARIABLES)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), VARIABLES)
    for variables, x, dtype in ((narrow, X, np.float32), (wide, X, np.float64), (narrow, X.astype(float), np.float64)):
        found = jb.ibp(variables, x, EPS, activation="relu")
        assert found.lower.dtype == dtype
        assert_same(found, expected)


def test_a_double_radius_does_not_shrink_in_single_precision():
    """0.1 in float64 lies between two float32 numbers: the ball takes the larger."""
    eps = np.float64(0.1)
    identity = [(np.eye(1, dtype="f"), None)]
    found = jb.ibp(identity, np.zeros((1, 1), "f"), eps, activation="relu")
    assert float(found.upper[0, 0]) >= eps
    assert float(found.lower[0, 0]) <= -eps


# --- options of the methods -------------------------------------------------------------------------------------------


OPTIONS = [
    (jb.crown, {"lower_slope": "zero"}, jb.Crown(lower_slope="zero")),
    (jb.crown, {"pre_activation": jb.IBP()}, jb.CrownIBP()),
    (jb.crown, {"intersect": False}, jb.Crown(intersect=False)),
    (jb.fastlin, {"pre_activation": jb.Forward()}, jb.FastLin(pre_activation=jb.Forward())),
    (jb.forward, {"lower_slope": "parallel"}, jb.Forward(lower_slope="parallel")),
]


@pytest.mark.parametrize(("function", "options", "method"), OPTIONS, ids=[str(row[2])[:40] for row in OPTIONS])
def test_options_of_a_method_are_passed_on(function, options, method):
    assert_same(
        function(VARIABLES, X, EPS, activation="relu", **options),
        bound_network(method, VARIABLES, X, EPS, activation="relu"),
        rtol=0,
    )


@dataclass(frozen=True)
class Recorded(Method):
    """A method that keeps the request that it gets."""

    requests: list = field(default_factory=list, hash=False)

    def bound(self, graph, leaves, request):
        self.requests.append(request)
        return jb.IBP().bound(graph, leaves, request)


def test_the_memory_limit_decides_how_many_rows_a_pass_carries():
    method = Recorded()
    for limit in (1, 1 << 20, 1 << 30):
        bound_network(method, VARIABLES, X, EPS, memory_limit=limit, activation="relu")
    rows = [request.max_rows for request in method.requests]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy in memory that JAX can read where it is."""
    memory = np.zeros(values.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    made = memory[first : first + values.nbytes].view(values.dtype).reshape(values.shape)
    made[:] = values
    return made


@pytest.mark.parametrize("given", ["x", "box", "weights", "labels"])
def test_numpy_arrays_may_be_changed_once_a_call_has_returned(given):
    """Programs run on after that, and meanwhile a loader of data may fill its buffer again."""
    x = RANDOM.uniform(size=(8, 300)).astype("f")
    layers = [RANDOM.normal(size=shape).astype("f") / 20 for shape in [(300, 500), (500, 500), (500, 10)]]
    arrays = {"x": aligned(x), "weights": aligned(layers[0]), "labels": aligned(np.zeros(8, np.int32))}
    arrays["box"] = arrays["x"]

    def run():
        params = [(arrays["weights"], np.zeros(500, "f")), *((w, np.zeros(w.shape[1], "f")) for w in layers[1:])]
        region = (arrays["x"], 0.01) if given != "box" else (Box(arrays["x"], arrays["x"]), None)
        return jb.margins(params, region[0], arrays["labels"], region[1], method=jb.Crown(), activation="relu")

    expected = np.asarray(run())
    found = run()
    arrays[given][:] = 7
    np.testing.assert_array_equal(found, expected)


def test_arrays_that_a_function_closes_over_are_as_they_were_when_it_was_first_bounded():
    """As under `jit`: never some of them old and some new."""
    weights, bias = np.ones((3, 2), "f"), np.ones(2, "f")
    function = lambda x: x @ weights + 2 * bias  # noqa: E731
    call = functools.partial(jb.bound(function, jb.IBP()), Box(np.zeros(3, "f"), np.ones(3, "f")))
    first = call()
    weights[:], bias[:] = 5, 7
    jax.tree.map(np.testing.assert_array_equal, call(), first)
