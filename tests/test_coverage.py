"""The table of what can be bounded (`coverage`) is true: support, reasons of refusal, and soundness case by case.

Bounds are traced, and their equations run in NumPy float64: nothing is compiled, so that a quick run can meet every case
with one method and norm (all combinations over the table), and `make soundness` all of them, compiled.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rules
import oracles
import pytest
import support
from coverage import CASES, METHODS, NORMS, Case

import jaxbound as jb

SUPPORTED = [name for name, case in CASES.items() if case.refused is None]
REFUSED = [name for name, case in CASES.items() if case.refused is not None]
COMBINATIONS = [(method, norm) for norm in NORMS for method in METHODS]
COSTLY = ("GRUCell", "LSTMCell", "MGUCell", "ConvLSTMCell", "transformer", "jacrev, attention", "jacrev, LayerNorm")
"""In the quick run these meet the cheapest method only."""


def _combinations(name: str) -> list[tuple[str, str]]:
    """What a case can be met with."""
    return [pair for pair in COMBINATIONS if CASES[name].fixed is None or pair[1] == "Box"]


def _turn(name: str) -> tuple[str, str]:
    """One combination, another for the next case."""
    pairs = _combinations(name)
    pairs = [pair for pair in pairs if pair[0] == "IBP"] if any(part in name for part in COSTLY) else pairs
    return pairs[SUPPORTED.index(name) % len(pairs)]


def _dtype(case: Case):
    return np.float32 if case.single else np.float64


def _evaluated(function, *leaves) -> list[np.ndarray]:
    """Values of a function of arrays in float64: by NumPy, or by JAX where it has operations that NumPy has not."""
    try:
        return numpy_rules.needed(function, *leaves)
    except (KeyError, ValueError):
        with jax.disable_jit(False):
            return [np.asarray(leaf) for leaf in jax.tree.leaves(function(*leaves))]


def _flat(results) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(results)])


def _values(case: Case, points: list[np.ndarray]) -> np.ndarray:
    (found,) = _evaluated(jax.vmap(lambda *leaves: _flat(case.function(*case.pack(list(leaves))))), *points)
    return np.asarray(found, np.float64)


def _bounding(case: Case, method, **options):
    """Flat ends of all results, of one region's leaves."""

    def bounded(*leaves):
        found = jb.bound(case.function, method, **options)(*case.pack(list(leaves)))
        parts = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, jb.Interval))
        return _flat([part.lower for part in parts]), _flat([part.upper for part in parts])

    return bounded


def _ends(function, method, region) -> list[np.ndarray]:
    """Ends of a function with one result, over one region."""

    def bounded(region):
        found = jb.bound(function, method)(region)
        return found.lower, found.upper

    return _evaluated(bounded, region)


def _points(case: Case, leaves: list, count: int) -> list[np.ndarray]:
    """Points inside, corners, faces, kinks at 0, and both sides of whatever happens at the middle."""
    rng = np.random.default_rng(3)
    made = [oracles.points(leaf, rng, count) for leaf in leaves]
    middle = [
        np.asarray(leaf.center if hasattr(leaf, "center") else (leaf.lower + leaf.upper) / 2, float) for leaf in leaves
    ]
    beside = [m + 1e-3 * (p - m) for m, p in zip(middle, made, strict=True)]
    return [np.concatenate([p, m[None], b[: count // 4]]) for p, m, b in zip(made, middle, beside, strict=True)]


def _check(name: str, label: str, lower, upper, points: list, tolerance: float) -> None:
    values = _values(CASES[name], points)
    assert not np.isnan([lower, upper]).any()
    scale = tolerance * np.maximum(1, np.abs(values).max(axis=0))
    wrong = ~((lower - scale <= values) & (values <= upper + scale)) & ~np.isnan(values)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise AssertionError(
            f"{name}, {label}: output {column} is {values[row, column]!r} at {[p[row].tolist() for p in points]}, "
            f"outside [{lower[column]!r}, {upper[column]!r}]; {int(wrong.sum())} of {wrong.size} values are outside"
        )


# --- what is supported --------------------------------------------------------------------------------------------------


def _explained(name: str, method: str = "Crown") -> jb.Explanation:
    case = CASES[name]
    return jb.explain(case.function, METHODS[method])(*case.pack(case.regions(None, np.float32)["wide"]))


@pytest.mark.parametrize("name", SUPPORTED)
def test_it_is_supported(name):
    found = _explained(name)
    assert found.supported, found.refusals


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_reason_and_way_out(name):
    primitive, way_out = CASES[name].refused
    found = _explained(name)
    assert not found.supported
    assert any(f"`{primitive}`" in reason and way_out in reason for reason in found.refusals), found.refusals
    case = CASES[name]
    arguments = case.pack(case.regions(None, np.float32)["wide"])
    with pytest.raises(jb.errors.UnsupportedError):
        jb.bound(case.function, jb.IBP())(*arguments)


def test_the_quick_run_turns_through_all_combinations():
    assert {_turn(name) for name in SUPPORTED} == set(COMBINATIONS)
    assert len(SUPPORTED) > 200
    assert len(REFUSED) > 20


def test_the_page_of_the_documentation_is_up_to_date():
    """The message says what to run."""
    written = support.PAGE.read_text(encoding="utf-8")
    assert written == support.page(), f"docs/{support.PAGE.name} is out of date: run `{support.COMMAND}`"


# --- soundness ------------------------------------------------------------------------------------------------------------


def _check_one(
    name: str, method: str, norm: str, count: int, labels=("wide", "ending at the middle", "off the middle")
) -> None:
    case = CASES[name]
    regions = case.regions(NORMS[norm], _dtype(case))
    bounded = _bounding(case, METHODS[method])
    for label in labels:
        lower, upper = _evaluated(bounded, *regions[label])
        tolerance = 1e-5 if case.single else 1e-10
        _check(name, f"{method}, {norm}, {label}", lower, upper, _points(case, regions[label], count), tolerance)


@pytest.mark.x64
@pytest.mark.parametrize("name", SUPPORTED)
def test_bounds_hold(name):
    method, norm = _turn(name)
    label = ("wide", "ending at the middle", "off the middle")[SUPPORTED.index(name) % 3]
    _check_one(name, method, norm, 100, (label,))


@pytest.mark.x64
@pytest.mark.parametrize("name", ["gelu", "scan", "jacrev, softmax"])
def test_bounds_run_in_numpy_are_those_compiled(name):
    case = CASES[name]
    leaves = case.regions(2.0, np.float64)["off the middle"]
    bounded = _bounding(case, jb.CrownIBP())
    compiled = jax.jit(bounded).lower(*leaves).compile({"xla_backend_optimization_level": 0})(*leaves)
    for own, expected in zip(numpy_rules.needed(bounded, *leaves), compiled, strict=True):
        assert np.allclose(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("name", SUPPORTED)
def test_bounds_hold_for_every_method_and_norm(name):
    labels = ("wide", "ending at the middle", "off the middle")
    for turn, (method, norm) in enumerate(_combinations(name), SUPPORTED.index(name)):
        _check_one(name, method, norm, 500, labels if norm == "Box" else labels[turn % 3 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_float32_bounds_with_rounding_hold_in_exact_arithmetic(name):
    """Compiled, and at the float32 function's own numbers; only where NumPy knows every operation."""
    case = CASES[name]
    if case.single:
        pytest.skip("it computes in float32 whatever it is given")
    for method, norm in (("IBP", "Box"), ("Crown", "Linf" if case.fixed is None else "Box")):
        leaves = case.regions(NORMS[norm], np.float32)["off the middle"]
        points = _points(case, leaves, 200)
        function = jax.vmap(lambda *parts: _flat(case.function(*case.pack(list(parts)))))
        try:
            (values,) = numpy_rules.needed(function, *[point.astype(np.float32) for point in points])
        except (KeyError, ValueError) as error:
            pytest.skip(f"NumPy does not know {error}")
        inside = np.all(
            [oracles.contains(r, p.astype(np.float32).astype(float)) for r, p in zip(leaves, points, strict=True)],
            axis=0,
        )
        lower, upper = (np.asarray(end, float) for end in _bounding(case, METHODS[method], rounding=True)(*leaves))
        assert np.all((lower <= values[inside] + 1e-13 * np.abs(values[inside])) | np.isnan(values[inside]))
        assert np.all((values[inside] - 1e-13 * np.abs(values[inside]) <= upper) | np.isnan(values[inside]))


# --- derivatives at kinks and ties ------------------------------------------------------------------------------------------

_W = np.array([[1.0, -1.0], [0.5, 2.0], [-1.0, 1.0]])

_KINKED = {
    "relu": (lambda x: jax.nn.relu(x), 2), "abs": (jnp.abs, 2), "leaky_relu": (lambda x: jax.nn.leaky_relu(x, 0.25), 2),
    "a layer of relu": (lambda x: jax.nn.relu(_W @ x), 2), "two layers": (lambda x: jax.nn.relu(_W.T @ jax.nn.relu(_W @ x)), 2),
    "clip": (lambda x: jnp.clip(x, 0.0, 1.0), 2), "hard_tanh": (lambda x: jax.nn.hard_tanh(x + 1), 2),
    "max": (jnp.max, 3), "min": (jnp.min, 3), "max of a layer": (lambda x: jnp.max(_W @ x), 2),
    "max over an axis": (lambda x: jnp.max(x.reshape(2, 2), axis=1), 4), "maximum": (lambda x: jnp.maximum(x[:2], x[2:]), 4),
    "minimum": (lambda x: jnp.minimum(x[0], 2 * x[1]), 2), "max pooling": (lambda x: jax.lax.reduce_window(x.reshape(2, 2), -np.inf, jax.lax.max, (2, 1), (1, 1), "VALID"), 4),
    "maxout": (lambda x: jnp.max((_W @ x)[:2]) + jax.nn.relu(x[0]), 2), "elu": (lambda x: jax.nn.elu(x, 2.0), 2),
    "norm inf": (lambda x: jnp.max(jnp.abs(x)), 2), "sorted as maxima": (lambda x: jnp.stack([jnp.maximum(x[0], x[1]), jnp.minimum(x[0], x[1])]), 2),
}  # fmt: skip


def _clarke(function, point: np.ndarray) -> np.ndarray:
    """Derivatives at points all around, where the function is differentiable: they span the Clarke Jacobian."""
    rng = np.random.default_rng(0)
    around = point + 1e-6 * rng.normal(size=(60, len(point)))
    return np.asarray(_evaluated(jax.vmap(lambda x: _flat(jax.jacrev(function)(x))), around)[0])


@pytest.mark.quick(12)
@pytest.mark.x64
@pytest.mark.parametrize("mode", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", _KINKED)
def test_derivative_bounds_contain_both_sides_of_kinks_and_ties(name, mode):
    """The kink is an end of the region, inside it, or the region itself."""
    if (name, mode) == ("max pooling", "jacfwd"):
        pytest.skip("its forward derivative is refused")
    function, size = _KINKED[name]
    derivative = lambda x: _flat(getattr(jax, mode)(function)(x))  # noqa: E731
    every = ((0, 0), (0, 0.5), (0.5, 0), (0.25, 0.5))
    for turn, (kink, reaches) in enumerate(
        ((np.zeros(size), every), (np.ones(size), every[:2])) if mode == "jacrev" else ((np.zeros(size), every[::3]),)
    ):
        for number, (below, above) in enumerate(reaches):
            low, high = kink - below * (1 + np.arange(size)), kink + above * (1 + np.arange(size))
            method = list(METHODS)[(turn + number) % 3]
            lower, upper = _ends(derivative, METHODS[method], jb.Box(low, high))
            assert not np.isnan([lower, upper]).any()
            inside = [_clarke(function, kink)] if below == above == 0 else []
            points = np.concatenate(
                [[kink, low, high], oracles.points(jb.Box(low, high), np.random.default_rng(1), 60)]
            )
            inside.append(np.asarray(_evaluated(jax.vmap(derivative), points)[0]))
            inside += [_clarke(function, point) for point in (kink, (low + high) / 2)] if below or above else []
            for values in inside:
                assert np.all(lower - 1e-9 <= values), (method, low, high)
                assert np.all(values <= upper + 1e-9), (method, low, high)


# --- tightness ----------------------------------------------------------------------------------------------------------------


def _hidden(x):
    """A sum of exponentials that no pattern knows."""
    return jnp.sum(1.0 * jnp.exp(x))


_COMPOSED = {
    "softmax": (jax.nn.softmax, {
        "exponentials and a reciprocal": lambda x: jnp.exp(x) * (1 / _hidden(x)),
        "exp of a difference": lambda x: jnp.exp(x - jnp.log(_hidden(x))),
    }),
    "log_softmax": (jax.nn.log_softmax, {
        "logarithm of the product": lambda x: jnp.log(jnp.exp(x) * (1 / _hidden(x))),
        "difference": lambda x: x - 1.0 * jnp.log(_hidden(x)),
    }),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, keepdims=True), {"composition": lambda x: jnp.log(_hidden(x))[None]}),
}  # fmt: skip


def _check_tightness(name: str, method: str, norms, boxes) -> None:
    whole, compositions = _COMPOSED[name]
    rng = np.random.default_rng(2)
    for norm, (scale, radius) in itertools.product(norms, boxes):
        center, radius = rng.normal(size=4) * scale, np.asarray(radius)
        region = jb.Box(center - radius, center + radius) if norm is None else jb.LpBall(center, radius, norm)
        lower, upper = _ends(whole, METHODS[method], region)
        for label, composed in compositions.items():
            low, high = _ends(composed, METHODS[method], region)
            slack = 1e-6 * np.maximum(np.abs(low), np.abs(high))
            assert np.all(lower >= low - slack), (label, norm, radius, lower, low)
            assert np.all(upper <= high + slack), (label, norm, radius, upper, high)


_BOXES = ((0.5, 0.1), (1.0, 2.0), (1.0, 0.5))


@pytest.mark.quick(3)
@pytest.mark.x64
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", _COMPOSED)
def test_normalized_exponentials_are_at_least_as_tight_as_compositions(name, method):
    turn = list(_COMPOSED).index(name) + list(METHODS).index(method)
    _check_tightness(
        name, method, (None, (1.0, 2.0, np.inf)[turn % 3]), _BOXES[:2] if name == "logsumexp" else _BOXES[1:2]
    )


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", _COMPOSED)
def test_normalized_exponentials_are_at_least_as_tight_for_every_norm(name, method):
    _check_tightness(name, method, NORMS.values(), _BOXES)
