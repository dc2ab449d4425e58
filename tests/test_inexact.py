"""Constants that a function computes are rounded, and bounds with rounding hold for their real values."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rules
import pytest

import jaxbound as jb

pytestmark = pytest.mark.fast

_RNG = np.random.default_rng(0)
PARAMS = {
    "a": np.float32(1e8), "b": np.float32(1.0), "v": _RNG.uniform(0.1, 2, 3).astype(np.float32),
    "first": _RNG.normal(size=(4, 5)).astype(np.float32), "second": _RNG.normal(size=(5, 3)).astype(np.float32),
    "kernel": _RNG.normal(size=(3, 3, 1, 2)).astype(np.float32),
}  # fmt: skip
LAYOUT = ("NHWC", "HWIO", "NHWC")
COMPUTED = {
    "bias that cancels": lambda p, x: x[:1] + ((p["a"] + p["b"]) - p["a"]),
    "weight that cancels": lambda p, x: x[:1] * ((p["a"] + p["b"]) - p["a"]),
    "divisor": lambda p, x: x[:3] / (p["v"] * p["v"] - 0.5 * p["v"] + 2),
    "scatter": lambda p, x: x[:3] * jnp.zeros(3).at[np.array([0, 0, 0])].add(jnp.stack([p["a"], p["b"], -p["a"]])),
    "product of matrices": lambda p, x: x @ (p["first"] @ p["second"]),
    "folded normalisation": lambda p, x: jax.nn.relu(x @ p["first"] @ p["second"]) * (p["v"] / jnp.sqrt(p["v"] ** 2 + 1e-5)),
    "normalised weights": lambda p, x: jnp.tanh(x @ (p["first"] / jnp.linalg.norm(p["first"], axis=0))),
    "variance": lambda p, x: x[:3] / jnp.sqrt(jnp.var(p["first"]) + 1e-3),
    "slopes": lambda p, x: jnp.where(x[:3] > 0.2, x[:3], jnp.exp(-p["v"]) * x[:3]),
    "convolution": lambda p, x: jax.lax.conv_general_dilated(
        jnp.tile(x.reshape(1, 2, 2, 1), (1, 2, 2, 1)), p["kernel"] * jnp.exp(p["v"][0]), (1, 1), "SAME",
        dimension_numbers=LAYOUT),
    "result": lambda p, x: (x, p["first"] @ p["second"]),
}  # fmt: skip


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", COMPUTED)
def test_bounds_hold_for_the_real_constants(name, method):
    fn, x = COMPUTED[name], np.full(4, 0.1, np.float32)
    found = jb.bound(fn, method, rounding=True)(PARAMS, jb.Box(x, x))
    real = numpy_rules.needed(fn, PARAMS, x)
    found = jax.tree.leaves(found, is_leaf=lambda leaf: hasattr(leaf, "lower"))
    for bounds, value in zip(found, real, strict=True):
        lower, upper = np.asarray(bounds.lower, np.float64), np.asarray(bounds.upper, np.float64)
        assert np.all(lower <= value) and np.all(value <= upper)
        if "cancel" not in name and name != "scatter":
            assert np.all(upper - lower <= 1e-4 * (1 + np.abs(value)))


def test_forward_bounds_hold_for_the_real_constants():
    fn, x = COMPUTED["weight that cancels"], np.full(4, 0.1, np.float32)
    found = jb.bound(fn, jb.Forward(), rounding=True)(PARAMS, jb.Box(x, x))
    assert found.lower <= x[0] <= found.upper


def test_what_cancels_in_rational_arithmetic():
    """The product of matrices whose entries cancel, entry by entry, against fractions."""
    rng = np.random.default_rng(1)
    scales = (2.0 ** rng.integers(-20, 20, (1, 6))).astype(np.float32)
    first = (rng.normal(size=(3, 6)) * scales).astype(np.float32)
    second = (rng.normal(size=(6, 2)) / scales.T).astype(np.float32)
    second[-1] = -np.float32(first[0, :-1] @ second[:-1]) / first[0, -1]
    found = jb.bound(lambda p, x: x @ (p[0] @ p[1]), jb.IBP(), rounding=True)(
        (first, second), jb.Box(np.eye(3), np.eye(3))
    )
    for i in range(3):
        for j in range(2):
            terms = [Fraction(float(first[i, k])) * Fraction(float(second[k, j])) for k in range(6)]
            assert Fraction(float(found.lower[i, j])) <= sum(terms) <= Fraction(float(found.upper[i, j]))


def test_it_counts_in_certificates_and_not_without_rounding():
    def apply(p, x):
        bias = (p["a"] + p["b"]) - p["a"]
        return jnp.concatenate([x[:, :1] + 0.5, x[:, :1] * 0 + bias], axis=1)

    params, x = {"a": jnp.float32(1e8), "b": jnp.float32(1)}, np.zeros((1, 1), np.float32)
    report = jb.certify(params, x, np.array([0]), 0.1, method=jb.Crown(), apply_fn=apply)
    assert not report.verified[0] and report.rounding[0, 0] > 1
    plain = jb.bound(COMPUTED["bias that cancels"], jb.IBP())(PARAMS, jb.Box(np.zeros(4), np.zeros(4)))
    assert plain.lower == plain.upper == 0


def test_choices_that_rounding_may_turn():
    fn = lambda p, x: x * jnp.where((p["a"] + p["b"]) - p["a"] > 0.5, 1.0, 2.0)  # noqa: E731
    found = jb.bound(fn, jb.IBP(), rounding=True)(PARAMS, jb.Box(np.ones(2), np.ones(2)))
    assert np.all(found.lower <= 1) and np.all(found.upper >= 2)
    sure = lambda p, x: x * jnp.where(p["b"] + p["b"] > 0.5, 1.0, 2.0)  # noqa: E731
    found = jb.bound(sure, jb.IBP(), rounding=True)(PARAMS, jb.Box(np.ones(2), np.ones(2)))
    assert np.allclose(found.lower, 1) and np.allclose(found.upper, 1)


def test_what_has_no_rule_is_refused():
    inverse = lambda p, x: x[:3] @ jnp.linalg.inv(jnp.outer(p["v"], p["v"]) + jnp.eye(3))  # noqa: E731
    box = jb.Box(np.zeros(4, np.float32), np.zeros(4, np.float32))
    with pytest.raises(jb.UnsupportedError, match=r"of constants.*pass it as an argument"):
        jb.bound(inverse, jb.IBP(), rounding=True)(PARAMS, box)
    jb.bound(inverse, jb.IBP())(PARAMS, box)
    pytest.importorskip("highspy")
    with pytest.raises(jb.UnsupportedError, match="LP does not count"):
        jb.bound(COMPUTED["product of matrices"], jb.LP(), rounding=True)(PARAMS, box)
