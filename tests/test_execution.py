"""`rounding="execution"`: every value that the network may give when it runs lies within the bounds."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from experiments import execution

pytestmark = pytest.mark.fast

SIZES = (6, 9, 9, 3)


def network(params, x):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias


def _params(seed: int, decades: float):
    """Weights over many decades, whose sums cancel: the last term of each product undoes the others, nearly."""
    rng = np.random.default_rng(seed)
    params = []
    for inside, outside in itertools.pairwise(SIZES):
        kernel = rng.normal(size=(inside, outside)) * 10 ** rng.uniform(-decades, decades, (inside, outside))
        kernel[-1] = -kernel[:-1].sum(0) * (1 + 1e-6 * rng.normal(size=outside))
        bias = rng.normal(size=outside) * 10 ** rng.uniform(-decades, decades, outside)
        params.append((kernel.astype(np.float32), bias.astype(np.float32)))
    return params


def _summed(terms: list, rng) -> np.ndarray:
    """A sum in single precision along a random tree."""
    terms = list(terms)
    while len(terms) > 1:
        i, j = rng.choice(len(terms), 2, replace=False)
        total = np.float32(terms[i] + terms[j])
        terms = [t for k, t in enumerate(terms) if k not in (i, j)] + [total]
    return terms[0]


def _run(params, x, rng, fused: bool) -> np.ndarray:
    """The network in single precision: products rounded and summed along trees, or added one by one, fused."""
    for layer, (kernel, bias) in enumerate(params):
        made = []
        for j in range(kernel.shape[1]):
            if fused:
                order, total = rng.permutation(len(x)), np.float32(0)
                for i in order:
                    total = np.float32(np.float64(x[i]) * np.float64(kernel[i, j]) + np.float64(total))
                made.append(np.float32(total + bias[j]))
            else:
                made.append(_summed([*(x * kernel[:, j]), bias[j]], rng))
        x = np.array(made, np.float32)
        x = np.maximum(x, 0) if layer < len(params) - 1 else x
    return x


@pytest.mark.parametrize("method", [jb.Crown(), jb.IBP()], ids=lambda m: type(m).__name__)
def test_every_order_of_sums(method):
    rng, bounded = np.random.default_rng(0), jb.bound(network, method, rounding="execution")
    for seed in range(30):
        params = _params(seed, decades=seed / 5)
        x = rng.uniform(0.9, 1.1, SIZES[0]).astype(np.float32)
        found = bounded(params, jb.Box(x, x))
        real = jb.bound(network, method, rounding=True)(params, jb.Box(x, x))
        runs = [_run(params, x, rng, fused) for fused in (False, True) for _ in range(10)]
        runs += [network(params, x), jax.jit(network)(params, x)]
        runs += [jax.vmap(functools.partial(network, params))(np.stack([x] * 5))[3]]
        for run in runs:
            run = np.asarray(run)
            assert np.all(found.lower <= run) and np.all(run <= found.upper), seed
        assert np.all(found.lower <= real.lower) and np.all(real.upper <= found.upper)


LAYOUT = ("NHWC", "HWIO", "NHWC")
BOUNDED = {
    "convolution and pooling": lambda x: jax.lax.reduce_window(
        jax.lax.conv_general_dilated(
            x.reshape(1, 4, 4, 1), jnp.arange(18, dtype=x.dtype).reshape(3, 3, 1, 2) / 3 - 2.9, (1, 1), "SAME",
            dimension_numbers=LAYOUT), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    "leaky": lambda x: jax.nn.leaky_relu(x - x[::-1], 0.3),
    "scaled and shifted": lambda x: (x / 255 - 0.5) / 0.2,
    "absolute": lambda x: jnp.abs(x[:8] - x[8:]),
    "a product for one": lambda x: jax.nn.silu(x * jnp.arange(1.0, 17)),
    "a product that decides nothing": lambda x: jnp.maximum(0.3 * x - 1, 0.2 * x),
}  # fmt: skip
REFUSED = {
    "a product": (lambda x: x * x[::-1], "product"),
    "a jump": (lambda x: jnp.where(x > 0, 1.0, 0.0), "jumps"),
    "a product that decides": (lambda x: jnp.where(0.3 * x > 1, 0.3 * x - 1, 0.0), "on which a choice depends"),
    "a rewritten expression": (jax.nn.softmax, "another form"),
    "a large factor": (lambda x: jax.nn.leaky_relu(x * 8, 1e30), "too large or small a number"),
    "many factors": (lambda x: jnp.cumsum(x * 9.0) * 9.0 / 7.0 * jnp.float32(0.3), "many consecutive"),
    "an unlisted function": (lambda x: jnp.tan(x / 4), "tan, whose error is not known"),
    "an exponential of a logarithm": (
        lambda x: jnp.exp(jnp.log(1 + x * x) + 0.0 * x) + jnp.exp(jnp.log(1 + x * x)),
        "exp of log",
    ),
    "quotients of quotients": (lambda x: (1 / (2 + x * x)) / (3 + x * x), "div of div"),
    "a root of a square": (lambda x: jnp.sqrt(x * x), "sqrt of mul"),
    "a sum for several readers": (lambda x: ((x + 1e8) + 1.0) - (x + 1e8), "anew"),
    "a product in a sum for several": (lambda x: jax.nn.silu(x / 3 + x[::-1]), "anew"),
    "a product for several": (lambda x: (lambda z: jnp.tanh(z + 1) + jnp.cumsum(z))(x * jnp.arange(1.0, 5)), "anew"),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_bounded_as_it_runs(name):
    fn, rng = BOUNDED[name], np.random.default_rng(1)
    for scale in (1.0, 1e-38):
        x = (scale * rng.normal(size=16)).astype(np.float32)
        radius = np.float32(0.01 * scale)
        found = jb.bound(fn, jb.Crown(), rounding="execution")(jb.Box(x - radius, x + radius))
        for _ in range(20):
            at = np.clip((x + radius * rng.uniform(-1, 1, 16)).astype(np.float32), x - radius, x + radius)
            for run in (fn(jnp.asarray(at)), jax.jit(fn)(at)):
                assert np.all(found.lower <= run) and np.all(run <= found.upper)


CURVES = {
    "tanh": jnp.tanh, "silu": jax.nn.silu, "softplus": jax.nn.softplus, "elu": jax.nn.elu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu by tanh": jax.nn.gelu, "hard swish": jax.nn.hard_swish,
    "logistic": lambda x: 1 / (1 + jnp.exp(-x)), "root": lambda x: jnp.sqrt(1 + x * x) + jnp.log(2 + x**2),
}  # fmt: skip


QUICK = "gelu", "root"
"""One with most that a function may be made of, and one with roots and logarithms."""


def _mostly_slow(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _mostly_slow(CURVES))
def test_curved_functions_keep_within_their_error(name):
    """Of all sizes, subnormal ones included; in intervals and at points."""
    fn, rng, count = CURVES[name], np.random.default_rng(2), 4096
    bounded, compiled = jax.jit(jb.bound(fn, jb.IBP(), rounding="execution")), jax.jit(fn)
    for sizes, radius in ((3, 0.0), (8, 1e-3), (2, 1.0), (None, 0.0)):
        x = rng.normal(size=count) * (sizes or np.exp(rng.uniform(-90, 30, count)))
        low, high = (x - radius).astype(np.float32), (x + radius).astype(np.float32)
        found = bounded(jb.Box(low, high))
        assert np.isfinite(found.lower).mean() > 0.7
        for share in (0.0, 1.0, 0.3):
            at = np.clip((low + share * (high - low)).astype(np.float32), low, high)
            for run in (compiled(at), fn(jnp.asarray(at)), compiled(at[:7])):
                size = len(run)
                assert np.all((found.lower[:size] <= run) & (run <= found.upper[:size])), name


@pytest.mark.parametrize("name", _mostly_slow(["gelu", "silu"]))
def test_curved_networks(name):
    def curved(params, x):
        for kernel, bias in params[:-1]:
            x = CURVES[name](x @ kernel + bias)
        return x @ params[-1][0] + params[-1][1]

    rng, bounded = np.random.default_rng(3), jb.bound(curved, jb.Crown(), rounding="execution")
    for seed in range(10):
        params = _params(seed, decades=seed / 10)
        x = rng.uniform(0.9, 1.1, SIZES[0]).astype(np.float32)
        box = jb.Box(x - np.float32(1e-3 * (seed % 2)), x + np.float32(1e-3 * (seed % 2)))
        found = bounded(params, box)
        assert np.all(np.isfinite(found.lower))
        for run in (curved(params, x), jax.jit(curved)(params, x), jax.jit(functools.partial(curved, params))(x)):
            assert np.all((found.lower <= run) & (run <= found.upper)), seed


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_is_refused(name):
    fn, reason = REFUSED[name]
    with pytest.raises(jb.UnsupportedError, match=f'rounding="execution".*{reason}'):
        jb.bound(fn, jb.Crown(), rounding="execution")(jb.Box(np.ones(4, np.float32), np.ones(4, np.float32)))


def test_methods_that_do_not_bound_it_and_unknown_modes():
    box = jb.Box(np.ones(6, np.float32), np.ones(6, np.float32))
    with pytest.raises(jb.UnsupportedError, match="Forward does not bound it"):
        jb.bound(network, jb.Forward(), rounding="execution")(_params(0, 1), box)
    with pytest.raises(jb.ArgumentError, match="rounding is 'exactly'"):
        jb.bound(network, jb.IBP(), rounding="exactly")(_params(0, 1), box)
    exact = jb.bound(network, jb.IBP(), rounding="exact")(_params(0, 1), box)
    true = jb.bound(network, jb.IBP(), rounding=True)(_params(0, 1), box)
    np.testing.assert_array_equal(exact.lower, true.lower)


def test_certificates_of_the_network_that_runs():
    """Real logits .5 and 0; as it runs, 1e8 + .5 - 1e8 is 0 or 8, and the certificate says so."""
    apply = lambda p, x: jnp.stack([(x[:, 0] + p["a"]) - p["a"], 0 * x[:, 0]], -1)  # noqa: E731
    params, x = {"a": jnp.float32(1e6)}, np.full((1, 1), 0.5, np.float32)
    verdicts = {}
    for rounding in ("exact", "execution"):
        report = jb.certify(
            params, x, np.array([0]), 0.1, method=jb.Crown(), apply_fn=apply, rounding=rounding, norm=jnp.inf
        )
        verdicts[rounding] = report.margins[0, 0] - report.rounding[0, 0]
    assert verdicts["execution"] < verdicts["exact"]
    assert verdicts["execution"] < 0.4 - 0.03  # (x + 1e6) is a multiple of 1/16


def test_double_precision_and_pytrees():
    """In and out of pytrees, in float32 and float64, and from one into the other: eager and compiled values are inside."""
    with jax.enable_x64(True):
        for dtype, wide in ((np.float32, np.float32), (np.float64, np.float64), (np.float32, np.float64)):
            rng = np.random.default_rng(0)
            kernel, out = rng.normal(size=(3, 4)).astype(dtype), rng.normal(size=(4, 2)).astype(wide)

            def tree(d, kernel=kernel, out=out):
                hidden = jnp.tanh(d["a"] @ kernel + kernel[0])
                return {"y": hidden.astype(out.dtype) @ out, "moved": (d["b"][::-1], 3 * d["b"])}

            low, high = rng.normal(size=3).astype(dtype), rng.normal(size=3).astype(dtype)
            box = jb.Box(np.minimum(low, high), np.maximum(low, high))
            found = jb.bound(tree, jb.Crown(), rounding="execution")({"a": box, "b": box})
            share = rng.uniform(size=(200, 3)).astype(dtype)
            x = np.clip(low + share * (high - low), box.lower, box.upper)
            for run in (jax.vmap(tree), jax.jit(jax.vmap(tree))):
                values = run({"a": x, "b": x})
                assert values["y"].dtype == wide and found["y"].lower.dtype == wide
                for value, end in zip(
                    jax.tree.leaves(values), jax.tree.leaves(found, is_leaf=_is_interval), strict=True
                ):
                    assert np.all(np.asarray(end.lower) <= value) and np.all(value <= np.asarray(end.upper))


def _is_interval(leaf) -> bool:
    return isinstance(leaf, jb.Interval)


def test_the_experiment_finds_nothing_outside():
    row = execution.examined(depth=2, count=4, trees=5, seed=0)
    assert row["outside"] == 0 and row["values"] >= 4 * 3 * 12
