"""Margins, certificates and the host loop: sound, strict, the same in every batch size, and resumable after a kill."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.certificates import batches, records
from jaxbound.certificates.attack import Attack
from jaxbound.certificates.certification import Report, certify, check_against_attack
from jaxbound.certificates.margins import margin_spec, margins
from jaxbound.methods import Bounded, Method
from jaxbound.network.resolving import Network
from jaxbound.transforms import problems

METHODS = {"IBP": jb.IBP(), "CrownIBP": jb.CrownIBP(), "Crown": jb.Crown()}
COMPILED: list[str] = []

jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def layers(seed: int = 9, sizes=(4, 6, 6, 3), dtype=np.float32):
    """A chain of Dense layers, centred on the inputs' middle so that several classes occur."""
    rng = np.random.default_rng(seed)
    chain = []
    for number, pair in enumerate(itertools.pairwise(sizes)):
        kernel, bias = rng.normal(size=pair) * np.sqrt(2 / pair[0]), rng.normal(size=pair[1]) / 8
        chain.append((jnp.asarray(kernel, dtype), jnp.asarray(bias - kernel.sum(axis=0) / 2 * (number == 0), dtype)))
    return chain


def logits_of(net, x):
    """The chain in NumPy, float64: shares no code with the library."""
    value = np.asarray(x, np.float64)
    for number, (kernel, bias) in enumerate(net):
        value = value @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
        value = np.maximum(value, 0) if number < len(net) - 1 else value
    return value


def margins_of(net, x, labels):
    """True margins at points x (..., features), j ascending."""
    values = logits_of(net, x)
    rows = [values[..., i, y, None] - np.delete(values[..., i, :], y, -1) for i, y in enumerate(labels)]
    return np.stack(rows, axis=-2)


def data(count: int = 7, seed: int = 1, features: int = 4):
    """Images in [0, 1] and the classes that `layers()` gives them."""
    x = np.random.default_rng(seed).uniform(size=(count, features)).astype(np.float32)
    return x, logits_of(layers(), x).argmax(-1) if features == 4 else np.zeros(count, int)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the check of a network's own values against bounds that a test makes up."""
    monkeypatch.setattr(batches, "check_values", lambda *_: None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given(Method):
    """A method that returns what it is told, for every example the same."""

    lower: tuple[float, ...] = field(default=(1.0, 1.0), metadata={"static": True})
    rounding: tuple[float, ...] = field(default=(0.0, 0.0), metadata={"static": True})
    pre_activation: Method | None = None

    def bound(self, graph, leaves, request):
        batch = jax.tree.leaves(leaves)[0].shape[0]
        lower, rounding = (np.broadcast_to(np.float32(v), (batch, 2)) for v in (self.lower, self.rounding))
        return [Bounded(jnp.asarray(lower), None, jnp.asarray(rounding), jnp.asarray(rounding))]


class Log(list):
    """Sizes of batches; says the same of itself whatever it holds."""

    fail_at = None

    def __repr__(self):
        return "Log"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logged(Method):
    """A method that notes the size of every batch, and fails where its log says so."""

    log: Log = field(metadata={"static": True}, hash=False, compare=False)
    inner: Method = field(default_factory=jb.IBP)

    def bound(self, graph, leaves, request):
        self.log.append(jax.tree.leaves(leaves)[0].shape[0])
        if len(self.log) == self.log.fail_at:
            raise KeyboardInterrupt
        return self.inner.bound(graph, leaves, request)


# --- the specification ------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_margin_spec_by_hand():
    expected = [[[1, -1, 0], [1, 0, -1]], [[-1, 0, 1], [0, -1, 1]]]
    np.testing.assert_array_equal(margin_spec(jnp.array([0, 2]), 3), expected)
    np.testing.assert_array_equal(margin_spec(np.uint8(2), 3), expected[1])
    np.testing.assert_array_equal(margin_spec([0, 2], 3), expected)
    np.testing.assert_array_equal(margin_spec(np.array([1]), 2), [[[-1, 1]]])


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_margin_spec_gives_margins_in_ascending_order(classes):
    logits = np.random.default_rng(classes).normal(size=(classes, classes)).astype(np.float32)
    labels = np.arange(classes)
    found = np.einsum("bsc,bc->bs", margin_spec(labels, classes), logits)
    expected = [np.delete(logits[y, y] - logits[y], y) for y in labels]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_margin_spec_refuses_labels_out_of_range(label):
    with pytest.raises(errors.ArgumentError, match=f"labels hold {label}; classes are numbered 0..2"):
        margin_spec(np.array([0, label]), 3)


def test_margin_spec_refuses_other_nonsense():
    with pytest.raises(errors.ArgumentTypeError, match="labels are float32; pass class indices as integers"):
        margin_spec(np.zeros(2, np.float32), 3)
    with pytest.raises(errors.ArgumentTypeError, match="labels are bool"):
        margin_spec(np.zeros(2, bool), 3)
    with pytest.raises(errors.ArgumentError, match="num_classes is 1; margins need two classes"):
        margin_spec(np.zeros(2, int), 1)


@pytest.mark.parametrize("method", [jb.IBP(), jb.Forward(), jb.Crown()], ids=repr)
def test_traced_labels_out_of_range_are_never_verified(method):
    spec = jax.jit(margin_spec, static_argnums=1)(jnp.array([0, 3, -1]), 3)
    assert not np.isnan(spec[0]).any() and np.isnan(spec[1:]).all()
    x, _ = data(3)
    bounds = jax.jit(lambda y: margins(layers(), x, y, 0.01, method=method, activation="relu"))(jnp.array([0, 3, -1]))
    assert np.isfinite(bounds[0]).all() and (np.asarray(bounds[1:]) == -np.inf).all()


# --- margins ----------------------------------------------------------------------------------------------------------


def points(x, eps, norm, count=800):
    """Points of the balls, half of them on the surface, cut to [0, 1] (towards the centers, which lie there)."""
    rng = np.random.default_rng(0)
    step = rng.laplace(size=(count, *x.shape)) if norm == 1 else rng.normal(size=(count, *x.shape))
    step = np.sign(step) if norm == jnp.inf else step / np.linalg.norm(step, norm, axis=-1, keepdims=True)
    step[::2] *= rng.uniform(size=(count // 2, *x.shape[:1], 1))
    return np.clip(x + eps * step, 0, 1)


@pytest.mark.parametrize(("name", "norm"), [("IBP", jnp.inf), ("CrownIBP", 1), ("Crown", 2)])
def test_margins_are_sound(name, norm):
    (x, labels), net, clip = data(), layers(), (0.0, 1.0)
    eps = {jnp.inf: 0.05, 2: 0.1, 1: 0.2}[norm]
    bounds = margins(net, x, labels, eps, method=METHODS[name], norm=norm, clip=clip, activation="relu")
    assert bounds.shape == (7, 2)
    reached = margins_of(net, points(x, eps, norm), labels)
    assert (bounds <= reached.min(axis=0) + 1e-5).all()
    assert (np.asarray(bounds) > reached.min(axis=0) - 1).all()
    alone = margins(net, x, labels, 0.0, method=METHODS[name], norm=norm, clip=clip, activation="relu")
    np.testing.assert_allclose(alone, margins_of(net, x, labels), atol=1e-5)


def test_the_specification_is_composed_not_subtracted():
    x, labels = data()
    net = [(kernel, bias + 5) for kernel, bias in layers()]  # every neuron is active: the network is affine
    logits = jb.ibp(net, x, 0.01, activation="relu")
    apart = [np.delete(logits.lower[i, y] - logits.upper[i], y) for i, y in enumerate(labels)]
    gain = margins(net, x, labels, 0.01, method=jb.IBP(), activation="relu") - np.array(apart)
    assert (gain > -1e-5).all() and (gain > 0.01).any()
    single = margins(net[:1], x, np.zeros(7, int), 0.01, method=jb.IBP(), activation="relu")
    kernel = np.asarray(net[0][0], np.float64)
    expected = margins_of(net[:1], x, np.zeros(7, int)) - 0.01 * np.abs(kernel[:, :1] - kernel[:, 1:]).sum(axis=0)
    np.testing.assert_allclose(single, expected, atol=1e-5)


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown(intersect=False)], ids=repr)
def test_margins_under_jit_and_vmap(method):
    x, labels = data()
    one = functools.partial(margins, method=method, activation="relu")
    expected = one(layers(), x, labels, 0.05)
    np.testing.assert_allclose(jax.jit(one)(layers(), x, labels, 0.05), expected, atol=1e-5)
    over = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))
    singles = over(layers(), x, labels, 0.05)  # one example of a Dense chain, one label
    np.testing.assert_allclose(singles, expected, atol=1e-5)
    pairs = over(layers(), x[:6].reshape(3, 2, 4), labels[:6].reshape(3, 2), 0.05)
    np.testing.assert_allclose(pairs.reshape(6, 2), expected[:6], atol=1e-5)


def test_margins_under_pmap():
    x, labels = data(16)
    spread = jax.pmap(
        lambda net, x, y: margins(net, x, y, 0.05, method=jb.CrownIBP(), activation="relu"),
        in_axes=(None, 0, 0),
        devices=jax.devices()[:8],
    )(layers(), x.reshape(8, 2, 4), labels.reshape(8, 2))
    expected = jax.jit(lambda x: margins(layers(), x, labels, 0.05, method=jb.CrownIBP(), activation="relu"))(x)
    np.testing.assert_allclose(spread.reshape(16, 2), expected, atol=1e-5)


@pytest.mark.x64
def test_gradients_of_margins():
    net, (x, labels) = layers(0, (4, 6, 3), dtype=np.float64), data()

    @jax.jit
    def total(scale):
        scaled = [(kernel * scale, bias) for kernel, bias in net]
        return margins(scaled, x.astype(np.float64), labels, 0.05, method=jb.CrownIBP(), activation="relu").sum()

    found, step = float(jax.grad(total)(1.0)), 1e-6
    assert found == pytest.approx(float(total(1 + step) - total(1 - step)) / (2 * step), rel=1e-4)


def test_margins_refuse_with_the_way_out():
    x, labels = data()
    with pytest.raises(
        errors.ArgumentTypeError, match=r"method is 'crown'; pass a method object such as jaxbound.Crown"
    ):
        margins(layers(), x, labels, 0.1, method="crown", activation="relu")
    with pytest.raises(errors.ArgumentError, match=r"labels have shape \(3,\), not \(7,\)"):
        margins(layers(), x, labels[:3], 0.1, method=jb.IBP(), activation="relu")
    with pytest.raises(errors.ArgumentError, match=r"the network gives an array of shape \(2, 2\)"):
        margins({}, x, labels, 0.1, method=jb.IBP(), apply_fn=lambda _, v: v.reshape(-1, 2, 2))
    with pytest.raises(errors.ArgumentError, match="the network gives tuple for one example"):
        margins({}, x, labels, 0.1, method=jb.IBP(), apply_fn=lambda _, v: (v, v))


# --- what verified means ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.fast
@pytest.mark.parametrize(
    ("lower", "rounding", "verified"),
    [
        ((1.0, 1e-30), (0.0, 0.0), True),
        ((1.0, 0.0), (0.0, 0.0), False),
        ((1.0, -1.0), (0.0, 0.0), False),
        ((1.0, np.nan), (0.0, 0.0), False),
        ((1.0, -np.inf), (0.0, 0.0), False),
        ((1.0, np.inf), (0.0, 0.0), False),  # an overflow, not a bound
        ((1.0, 1.0), (0.0, 1.0), False),
        ((1.0, 1.0), (0.0, 0.5), True),
        ((1.0, 1.0), (0.0, np.nan), False),
        ((1.0, 1.0), (0.0, np.inf), False),
    ],
)
def test_verified_is_strict(lower, rounding, verified):
    x, labels = data(3)
    report = certify(layers(), x, labels, 0.1, method=Given(lower, rounding), activation="relu")
    assert report.verified.tolist() == [verified] * 3
    assert report.verified_accuracy == float(verified) and report.verified_error == 1.0 - verified


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("norm", [jnp.inf, 2])
@pytest.mark.parametrize("method", [Given(), jb.IBP()], ids=repr)
def test_an_empty_region_is_not_verified(method, norm):
    x = np.array([[0.9, 0.1, 0.1], [3.0, 0.1, 0.1], [0.9, 0.2, 0.1]], np.float32)
    options = {"method": method, "norm": norm, "clip": (0.0, 1.0), "activation": "relu"}
    report = certify([(jnp.eye(3), jnp.zeros(3))], x, np.zeros(3, int), 0.05, **options)
    assert report.verified.tolist() == [True, False, True]
    assert (report.margins[1] == -np.inf).all()
    found = jax.jit(lambda x: margins([(jnp.eye(3), jnp.zeros(3))], x, np.zeros(3, int), 0.05, **options))(x)
    assert (np.asarray(found) > 0).all(axis=1).tolist() == [True, False, True]


def test_an_image_with_a_nan_is_neither_verified_nor_correct():
    x, labels = data(3)
    x[1, 2] = np.nan
    report = certify(layers(), x, labels, 0.0, method=jb.CrownIBP(), activation="relu")
    assert report.verified.tolist() == [True, False, True] and report.correct.tolist() == [True, False, True]


def test_an_infinite_radius_verifies_nothing():
    x, labels = data(3)
    assert not certify(layers(), x, labels, np.inf, method=jb.CrownIBP(), activation="relu").verified.any()


@pytest.mark.fast
def test_ties_are_errors():
    x = np.array([[0.5, 0.5], [0.75, 0.5], [0.5, 0.75]], np.float32)
    report = certify([(jnp.eye(2), jnp.zeros(2))], x, np.zeros(3, int), 0.0, method=jb.IBP(), activation="relu")
    assert report.correct.tolist() == report.verified.tolist() == [False, True, False]
    assert report.clean_error == pytest.approx(2 / 3)


@pytest.mark.fast
def test_a_margin_within_rounding_is_not_verified():
    x = np.array([[np.nextafter(np.float32(0.5), np.float32(1)), 0.5]], np.float32)
    net = [(jnp.eye(2), jnp.zeros(2))]
    strict = certify(net, x, np.zeros(1, int), 0.0, method=jb.IBP(), activation="relu")
    loose = certify(net, x, np.zeros(1, int), 0.0, method=jb.IBP(), rounding=None, activation="relu")
    assert strict.margins[0, 0] > 0 and strict.rounding[0, 0] > 0 and not strict.verified[0]
    assert loose.verified[0] and loose.rounding[0, 0] == 0


@pytest.mark.parametrize("name", ["IBP", "Crown"])
def test_float32_certificates_hold_in_float64(name):
    """Affine networks: the exact minimum of each margin is known in closed form, in NumPy's float64."""
    sizes, eps, count = (64, 64, 10), 1e-4, 32
    net = [(kernel, bias + 30) for kernel, bias in layers(3, sizes)]  # every neuron is active
    x, labels = data(count, 5, 64)
    report = certify(net, x, labels, eps, method=METHODS[name], activation="relu")
    kernel = np.asarray(net[0][0], np.float64) @ np.asarray(net[1][0], np.float64)
    radius = np.float64(np.float32(eps)) * np.abs(kernel[:, :1] - kernel[:, 1:]).sum(axis=0)
    exact = margins_of(net, x, labels) - radius
    assert (report.margins - report.rounding <= exact).all()
    # IBP widens its intervals by their rounding at once, and loses what it mixes.
    np.testing.assert_allclose(report.margins, exact, atol=3e-2 if name == "IBP" else 2e-3)


def interval_margins(net, x, labels, eps):
    """Interval propagation of margins in NumPy, float64."""
    low, high = np.asarray(x, np.float64) - eps, np.asarray(x, np.float64) + eps
    for number, (kernel, bias) in enumerate(net):
        kernel = np.broadcast_to(np.asarray(kernel, np.float64), (len(x), *kernel.shape))
        shift = np.broadcast_to(np.asarray(bias, np.float64), (len(x), len(bias)))
        if number == len(net) - 1:
            spec = np.asarray(margin_spec(labels, len(bias)), np.float64).swapaxes(1, 2)
            kernel, shift = kernel @ spec, np.einsum("bo,bos->bs", shift, spec)
        middle, radius = (low + high) / 2, (high - low) / 2
        center = np.einsum("bi,bio->bo", middle, kernel) + shift
        spread = np.einsum("bi,bio->bo", radius, np.abs(kernel))
        low, high = center - spread, center + spread
        if number < len(net) - 1:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
    return low


def test_ibp_certificates_against_numpy():
    (x, labels), net = data(20), layers()
    report = certify(net, x, labels, 0.05, method=jb.IBP(), activation="relu")
    expected = interval_margins(net, x, labels, np.float64(np.float32(0.05)))
    assert 0 < report.verified.sum() < 20
    assert (expected[report.verified] > 0).all()
    assert (report.margins - report.rounding <= expected).all()
    np.testing.assert_allclose(report.margins, expected, atol=1e-4)


# --- the host loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IBP", "Crown"])
def test_results_do_not_depend_on_the_batch_size(name):
    (x, labels), eps = data(), np.linspace(0.01, 0.1, 7)
    call = functools.partial(certify, layers(), x, labels, eps, method=METHODS[name], activation="relu")
    whole = call(batch_size=100)
    for batch_size in (1, 3) if name == "IBP" else (4,):
        found = call(batch_size=batch_size)
        np.testing.assert_allclose(found.margins, whole.margins, atol=1e-5)
        np.testing.assert_allclose(found.rounding, whole.rounding, atol=1e-5)
        assert found.verified.shape == found.correct.shape == (7,)
        np.testing.assert_array_equal(found.verified, whole.verified)
    assert whole.eps.tolist() == pytest.approx(eps) and whole.eps.dtype == np.float32 and (whole.eps >= eps).all()


def test_the_last_batch_and_a_second_call_compile_nothing():
    x, labels = (np.tile(part[:1], (7,) + (1,) * (part.ndim - 1)) for part in data())
    call = functools.partial(certify, method=jb.Crown(), batch_size=4, activation="relu")
    call(layers(), np.tile(x[:4], (2, 1)), np.tile(labels[:4], 2), 0.05)  # as many batches, so as many devices
    COMPILED.clear()
    assert call(layers(), x, labels, 0.06).verified.shape == (7,)
    assert not COMPILED
    jax.jit(lambda v: v + 17)(x)
    assert COMPILED, "the listener hears of compilations"


def test_padding_counts_nowhere():
    log, (x, labels) = Log(), data(5)
    wrong = np.where(np.arange(5) == 4, (labels + 1) % 3, labels)
    report = certify(layers(), x, wrong, 0.0, method=Logged(log), batch_size=3, activation="relu")
    assert log == [3, 3] and report.clean_error == 0.2 and report.verified_error == 0.2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placed(Logged):
    """A method that notes where each batch is worked on; the one that begins with the log's example fails."""

    inner: Method = field(default_factory=jb.Crown)

    def bound(self, graph, leaves, request):
        center = np.asarray(leaves[0].center)
        self.log.append((center[0].tobytes(), *graph.constants[0].devices(), center.dtype))
        if self.log.fail_at == center[0].tobytes():
            raise KeyboardInterrupt
        return self.inner.bound(graph, leaves, request)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)])
def test_every_device_works_and_the_numbers_are_those_of_one(dtype):
    x, labels = (np.concatenate([part] * 3)[:19] for part in data())
    x = (x + np.arange(19)[:, None] / 1000).astype(dtype)
    log, alone = Log(), Log()
    call = functools.partial(certify, layers(dtype=dtype), x, labels, 0.05, batch_size=2, activation="relu")
    many = call(method=Placed(log))
    with jax.default_device(jax.devices()[1]):
        one = call(method=Placed(alone))
    for name in ("margins", "rounding", "verified", "correct"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
    assert many.margins.dtype == dtype and {entry[2] for entry in (*log, *alone)} == {np.dtype(dtype)}
    assert sorted(entry[0] for entry in log) == sorted(part.tobytes() for part in x[::2])
    assert {entry[1] for entry in alone} == {jax.devices()[1]}
    assert len({entry[1] for entry in log}) == min(len(jax.devices()), 10)


def test_a_run_on_many_devices_continues_where_it_stopped_in_order(tmp_path):
    (x, labels), path = data(19), tmp_path / "results.npz"
    log, rest = Log(), Log()
    log.fail_at = x[10].tobytes()
    call = functools.partial(certify, layers(), x, labels, 0.05, batch_size=2, results=path, activation="relu")
    with pytest.raises(KeyboardInterrupt):
        call(method=Placed(log))
    with np.load(path) as stored:
        assert len(stored["margins"]) == 10, "batches before the one that failed are kept"
    found = call(method=Placed(rest))
    assert len(rest) == 5
    np.testing.assert_array_equal(
        found.margins, certify(layers(), x, labels, 0.05, method=jb.Crown(), batch_size=2, activation="relu").margins
    )


def test_parameters_that_are_split_over_devices_stay_there():
    x, labels = data(8)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("rows",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    net = [(jax.device_put(kernel, split), bias) for kernel, bias in layers(0, (4, 6, 3))]
    log = Log()
    found = certify(net, x, labels, 0.05, method=Placed(log), batch_size=2, activation="relu")
    whole = certify(layers(0, (4, 6, 3)), x, labels, 0.05, method=jb.Crown(), batch_size=2, activation="relu")
    np.testing.assert_allclose(found.margins, whole.margins, atol=1e-5)
    assert len(log) == 4


def test_a_linen_network_with_its_own_options():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    x = np.random.default_rng(0).uniform(size=(5, 6, 6, 1)).astype(np.float32)
    model = Net()
    params = model.init(jax.random.key(0), x)
    labels = np.asarray(model.apply(params, x)).argmax(-1)
    low, high = np.zeros((6, 6, 1), np.float32), np.ones((5, 6, 6, 1), np.float32)
    options = {"apply_fn": model.apply, "clip": (low, high)}
    report = certify(params, x, labels, 0.003, method=jb.CrownIBP(), batch_size=3, **options)
    bare = jax.jit(lambda x: margins(params["params"], x, labels, 0.003, method=jb.CrownIBP(), **options))(x)
    np.testing.assert_allclose(report.margins, bare, atol=1e-5)
    assert report.correct.all() and report.verified.any()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("inner", [Given(), Given(pre_activation=jb.Forward())], ids=["rows", "one row per input"])
def test_the_automatic_batch_size_follows_the_memory_limit(inner):
    x, labels = data(40, features=16)
    sizes: list[int] = []
    for limit in (1, 1 << 18, 1 << 20, None):
        log = Log()
        certify(
            layers(0, (16, 32, 3)), x, labels, 0.1, method=Logged(log, inner), memory_limit=limit, activation="relu"
        )
        sizes.append(log[0])
    assert sizes[0] == 1 and sizes == sorted(sizes) and 1 < sizes[1] < 40 and sizes[-1] == 40


@pytest.mark.fast
def test_one_example_and_regions():
    x, labels = data(3)
    ball = certify(layers(), x, labels, 0.05, method=jb.IBP(), activation="relu")
    single = certify(layers(), x[1], labels[1], 0.05, method=jb.IBP(), activation="relu")
    np.testing.assert_allclose(single.margins, ball.margins[1:2], rtol=1e-5, atol=1e-5)
    box = certify(
        layers(),
        jb.Box(x - np.float32(0.05), x + np.float32(0.05)),
        labels,
        method=jb.IBP(),
        batch_size=2,
        activation="relu",
    )
    np.testing.assert_allclose(box.margins, ball.margins, atol=1e-5)
    given = certify(
        layers(), jb.LpBall(x, 0.05, np.inf, batch_ndim=1), labels, method=jb.IBP(), batch_size=2, activation="relu"
    )
    np.testing.assert_allclose(given.margins, ball.margins, rtol=1e-5, atol=1e-5)
    assert box.eps is None and box.norm == np.inf and given.eps == np.float32(0.05) and box.correct.all()
    assert not certify(layers(), jb.Box(x + 1, x), labels, method=jb.IBP(), activation="relu").verified.any()


@pytest.mark.x64
@pytest.mark.parametrize(("params", "x", "expected"), [(4, 4, 4), (8, 4, 8), (4, 8, 8)])
def test_the_dtype_is_that_of_params_and_x(params, x, expected):
    (images, labels), net = data(3), layers(dtype=f"f{params}")
    report = certify(net[:1], images.astype(f"f{x}"), labels, np.full(3, 0.05), method=jb.IBP(), activation="relu")
    assert report.margins.dtype == report.eps.dtype == f"f{expected}" and (report.eps >= 0.05).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_certify_under_a_trace_names_margins():
    x, labels = data(3)
    call = lambda x: certify(layers(), x, labels, 0.1, method=jb.IBP(), activation="relu").margins  # noqa: E731
    for transformed in (jax.jit(call), jax.vmap(call), jax.grad(lambda v: call(v).sum()), jax.jit(lambda _: call(x))):
        with pytest.raises(errors.HostLoopError, match=r"certify loops on the host .* use margins there"):
            transformed(x)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"method": "crown"}, TypeError, "method is 'crown'; pass a method object"),
        ({"method": jb.Crown}, TypeError, "pass a method object such as"),
        ({"x": np.zeros((3, 4), np.uint8)}, TypeError, "integers have no neighbourhood; divide images by 255 first"),
        ({"x": np.zeros((3, 4), np.float16)}, TypeError, "x hold float16, too coarse to certify; cast to float32"),
        ({"x": jnp.zeros((3, 4), jnp.bfloat16)}, TypeError, "x hold bfloat16"),
        ({"params": layers(dtype=np.float16)}, TypeError, "params hold float16"),
        ({"params": layers(dtype=jnp.bfloat16)}, TypeError, "params hold bfloat16"),
        ({"eps": None}, ValueError, "pass eps"),
        ({"eps": -0.1}, ValueError, "eps holds -0.1; pass radii of 0 or more"),
        ({"eps": np.nan}, ValueError, "eps holds nan"),
        ({"eps": np.array([0.1, np.nan, 0.1])}, ValueError, "eps holds nan"),
        ({"eps": np.full(2, 0.1)}, ValueError, r"eps has shape \(2,\)"),
        ({"labels": np.zeros(2, int)}, ValueError, r"labels have shape \(2,\) for 3 examples"),
        ({"labels": np.full(3, 3)}, ValueError, "labels hold 3"),
        ({"labels": np.zeros(3)}, TypeError, "pass class indices"),
        ({"x": np.zeros((0, 4), np.float32), "labels": np.zeros(0, int)}, ValueError, "no examples; pass at least one"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; pass at least 1"),
        ({"rounding": "inward"}, ValueError, "rounding is 'inward'; pass"),
        ({"norm": 0.5}, ValueError, "norm=0.5 is not a norm"),
        ({"clip": (0, 1, 2)}, ValueError, "clip must be None or a pair"),
        ({"apply_fn": lambda _, v: v[:, :1]}, ValueError, "num_classes is 1"),
    ],
)
def test_refusals_say_what_to_do(change, kind, message):
    x, labels = data(3)
    call = {
        "params": layers(),
        "x": x,
        "labels": labels,
        "eps": 0.1,
        "method": jb.IBP(),
        "activation": "relu",
        **change,
    }
    with pytest.raises(kind, match=message):
        certify(call.pop("params"), call.pop("x"), call.pop("labels"), call.pop("eps"), **call)


def test_estimates_are_refused():
    class Guess(jb.IBP):
        guarantee = "estimate"

    x, labels = data(3)
    with pytest.raises(errors.ArgumentError, match="Guess gives an estimate"):
        certify(layers(), x, labels, 0.1, method=Guess(), activation="relu")


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_an_attack_that_breaks_a_certificate_raises():
    x, labels = data()
    found = jb.pgd(layers(), x, labels, 0.5, key=jax.random.key(0), activation="relu")
    assert np.asarray(found.success).any()
    report = certify(layers(), x, labels, 0.5, method=jb.Crown(), activation="relu")
    check_against_attack(report, found)
    assert (report.margins.min(axis=1) <= np.asarray(found.margin) + 1e-5).all()
    unsound = certify(layers(), x, labels, 0.5, method=Given((0.25, 0.5), (0.125, 0.0)), activation="relu")
    with pytest.raises(errors.SoundnessError, match=r"that Given\(.*index \d+ has certified margin >= 0.125 and"):
        check_against_attack(unsound, found)
    nowhere = Attack(x, jnp.full(7, jnp.nan), jnp.ones(7, bool))
    with pytest.raises(errors.SoundnessError, match="broke 7 examples"):
        check_against_attack(unsound, nowhere)
    with pytest.raises(errors.ArgumentError, match=r"attack is on \(3,\) examples, the report on \(7,\)"):
        check_against_attack(unsound, Attack(x[:3], found.margin[:3], found.success[:3]))


# --- the report and progress ------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_the_report_reads_well():
    x, labels = data(3)
    report = certify(
        layers(), x, np.array([labels[0], labels[1], (labels[2] + 1) % 3]), 0.0, method=jb.IBP(), activation="relu"
    )
    text = str(report)
    assert text.startswith("IBP(): 3 examples, linf radius 0\n")
    assert "clean error       33.33%  (1 examples)" in text and "verified error    33.33%" in text
    assert 0 < report.first_batch_seconds <= report.seconds and report.batch_size == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seconds = 0
    assert isinstance(report, Report) and isinstance(report.margins, np.ndarray)
    ranged = certify(layers(), x, labels, np.array([0.0, 0.5, 0.25]), method=jb.IBP(), norm=2, activation="relu")
    assert "l2 radius 0 to 0.5" in str(ranged)


def test_progress(capsys, monkeypatch):
    x, labels = data(5)
    call = functools.partial(certify, layers(), x, labels, 0.0, method=jb.IBP(), batch_size=2, activation="relu")
    call()
    assert capsys.readouterr() == ("", "")
    call(progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "5/5" in shown.err and "5 verified, first batch" in shown.err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    call(progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "pip install tqdm" in lines[0]
    assert lines[-1].startswith("certify: 5 of 5 examples, 5 verified, first batch")


# --- partial results --------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues(tmp_path):
    x, labels = data()
    path, call = (
        tmp_path / "deep" / "results.npz",
        functools.partial(certify, layers(), x, labels, 0.05, batch_size=2, activation="relu"),
    )
    whole, log = call(method=Logged(Log())), Log()
    log.fail_at = 3
    with pytest.raises(KeyboardInterrupt), jax.default_device(jax.devices()[0]):  # one batch after the other
        call(method=Logged(log), results=path)
    assert [file.name for file in path.parent.iterdir()] == ["results.npz"]
    with np.load(path) as stored:
        first_batch_seconds = float(stored["first_batch_seconds"])
    log = Log()
    found = call(method=Logged(log), results=path)
    assert log == [2, 2]
    for name in ("margins", "rounding", "verified", "correct"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    again = call(method=Logged(log), results=str(path))
    assert log == [2, 2] and again.seconds == found.seconds
    assert again.first_batch_seconds == found.first_batch_seconds == first_batch_seconds > 0
    np.testing.assert_array_equal(again.margins, whole.margins)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    x, labels = data()
    path = tmp_path / "results"
    call = functools.partial(certify, layers(), x, labels, 0.05, batch_size=3, results=path, activation="relu")
    monkeypatch.setattr(np, "savez", _failing_after(2, np.savez))
    with pytest.raises(OSError, match="disk full"):
        call(method=jb.IBP())
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["results"]
    with np.load(path) as stored:
        assert stored["margins"].shape == (3, 2)
    whole = certify(layers(), x, labels, 0.05, method=jb.IBP(), batch_size=3, activation="relu")
    np.testing.assert_array_equal(call(method=jb.IBP()).margins, whole.margins)


def _failing_after(count: int, function):
    calls: list[int] = []

    def wrapped(file, **arrays):
        calls.append(1)
        if len(calls) > count:
            file.write(b"half of")
            raise OSError("disk full")
        return function(file, **arrays)

    return wrapped


def test_results_of_another_computation_are_refused(tmp_path):
    (x, labels), path = data(), tmp_path / "results.npz"
    same = {"params": layers(), "x": x, "labels": labels, "eps": 0.05, "method": jb.FastLin(jb.IBP()), "batch_size": 4}
    same["activation"] = "relu"

    def call(**changes):
        given = {**same, **changes}
        arguments = [given.pop(name) for name in ("params", "x", "labels", "eps")]
        return certify(*arguments, results=path, **given)

    call()
    call(progress=False, memory_limit=1 << 28)
    changed = x.copy()
    changed[3, 1] += 1e-6
    others = {
        "params": layers(1), "x": changed, "labels": labels[::-1], "eps": 0.06, "norm": 2, "clip": (0, 1),
        "method": jb.Crown(jb.IBP()), "batch_size": 3, "rounding": None, "activation": "tanh",
        "apply_fn": lambda net, v: v[:, :3],
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(errors.ArgumentError, match=r"another computation.*pass another path, or delete the file"):
            call(**{name: value})
        assert np.load(path)["margins"].shape == (7, 2), name


def test_the_arrays_that_a_network_closes_over_count(tmp_path):
    x, labels = data()

    def network(scale):
        shift = jnp.asarray(np.arange(3) * scale, jnp.float32)
        return lambda net, v: v @ net + shift

    call = functools.partial(
        certify, jnp.ones((4, 3)), x, labels, 0.05, method=jb.IBP(), results=tmp_path / "r", activation="relu"
    )
    call(apply_fn=network(1.0))
    with pytest.raises(errors.ArgumentError, match="another computation"):
        call(apply_fn=network(2.0))


def _with_derivative(inner):
    outer = jax.custom_jvp(inner)
    outer.defjvps(lambda tangent, _, v: tangent)
    return outer


def _chosen(inner):
    return lambda v: jax.lax.cond(v[0] > 0, inner, lambda v: v, v)


def _scanned(inner):
    return lambda v: jax.lax.scan(lambda total, _: (inner(total), None), v, None, length=1)[0]


@pytest.mark.parametrize(
    "nested",
    [jax.jit, lambda f: jax.jit(jax.jit(f)), jax.checkpoint, _with_derivative, _scanned, _chosen],
    ids=["jit", "jit of jit", "checkpoint", "custom_jvp", "scan", "cond"],
)
def test_the_arrays_that_a_nested_function_closes_over_count(nested):
    def mark(scale):
        kernel = jnp.eye(3) * scale
        network = Network(lambda bias, v: nested(lambda v: v @ kernel)(v) + bias, jnp.zeros(3), True)
        return records.fingerprint(network, jb.Box(np.zeros((1, 3)), np.ones((1, 3))), np.zeros(1, int), jb.IBP())

    assert mark(1.0) == mark(1.0) != mark(2.0)


@pytest.mark.fast
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray, float], ids=["JAX", "NumPy in place", "number"])
def test_what_apply_fn_closes_over_counts_as_it_is_at_the_call(kind):
    held = {"scale": kind(1.0) if kind is float else kind(np.ones((1, 2), np.float32))}
    apply = lambda bias, v: v * held["scale"] + bias  # noqa: E731
    call = functools.partial(
        certify, jnp.zeros(2), np.array([[1.0, 0.0]], np.float32), np.array([0]), 0.1, method=jb.IBP(), apply_fn=apply
    )
    first, kept = call(), set(problems._STRUCTURES.entries)
    assert first.verified.all() and first.correct.all()
    COMPILED.clear()
    assert call().verified.all() and not COMPILED and kept == set(problems._STRUCTURES.entries)
    if kind is np.asarray:
        held["scale"] *= -1
    else:
        held["scale"] = -held["scale"]
    trained = call()
    assert not trained.verified.any() and not trained.correct.any()
    np.testing.assert_allclose(trained.margins, -1 - 0.2, atol=1e-5)


@pytest.mark.fast
def test_a_jitted_network_whose_arrays_have_changed_is_refused():
    """It keeps the trace of each shape: old values for one example, new ones for a batch of another size."""
    held = {"scale": jnp.ones((1, 2))}
    apply = jax.jit(lambda bias, v: v * held["scale"] + bias)
    call = functools.partial(
        certify, jnp.zeros(2), np.array([[1.0, 0.0]], np.float32), np.array([0]), 0.1, method=jb.IBP()
    )
    assert call(apply_fn=apply).verified.all()
    held["scale"] = -held["scale"]
    with pytest.raises(jb.ArgumentError, match="jit it again"):
        call(apply_fn=apply)
    assert not call(apply_fn=jax.jit(lambda bias, v: v * held["scale"] + bias)).verified.any()


@pytest.mark.parametrize("content", [b"", b"not an archive", "npz"])
def test_other_files_are_not_overwritten(tmp_path, content):
    (x, labels), path = data(), tmp_path / "results.npz"
    np.savez(path, a=np.zeros(2)) if content == "npz" else path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(errors.ArgumentError, match="which this function did not write; pass another path"):
        certify(layers(), x, labels, 0.05, method=jb.IBP(), results=path, activation="relu")
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused(tmp_path):
    """Sixty bytes that are lost may be those that say how long an array is, and then no check sum is looked at."""
    path, draw = tmp_path / "results.npz", np.random.default_rng(0)
    empty = records.Record.empty(margins=np.zeros((0, 2)), rounding=np.zeros((0, 2)), correct=np.zeros(0, bool))
    rows = draw.normal(size=(4, 2)), draw.uniform(size=(4, 2)), np.ones(4, bool)
    records.save(path, "mark", empty._replace(rows=rows, seconds=1.0))
    content = path.read_bytes()
    for first in range(0, len(content), 5):
        path.write_bytes(content[:first] + bytes(len(content[first : first + 60])) + content[first + 60 :])
        try:
            found = records.load(path, "mark", empty)
        except errors.ArgumentError:
            continue
        assert all(map(np.array_equal, found.rows, rows)) and found.seconds == 1.0


def test_results_of_another_version_are_refused(tmp_path, monkeypatch):
    """What a version made is not kept by the one that mends it."""
    (x, labels), path = data(), tmp_path / "results.npz"
    call = functools.partial(certify, layers(), x, labels, 0.05, method=jb.IBP(), results=path, activation="relu")
    call()
    monkeypatch.setattr(records, "__version__", "0.0.1")
    with pytest.raises(errors.ArgumentError, match="version of jaxbound"):
        call()


def test_a_killed_process_loses_one_batch(tmp_path):
    """SIGKILL in the middle of a write: after two batches, with the third one's file written but not in place."""
    x, labels = data()
    np.savez(tmp_path / "case.npz", x=x, labels=labels, **{f"p{i}": a for i, a in enumerate(jax.tree.leaves(layers()))})
    script = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        import jaxbound as jb
        from jaxbound.certificates.certification import certify

        replace, calls = os.replace, []

        def killed_at_the_fourth(*args):
            calls.append(args)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = killed_at_the_fourth
        case = np.load(sys.argv[1] + "/case.npz")
        net = [(case[f"p{2 * i}"], case[f"p{2 * i + 1}"]) for i in range(3)]
        results = sys.argv[1] + "/results.npz"
        certify(net, case["x"], case["labels"], 0.05, method=jb.IBP(), activation="relu", batch_size=2, results=results)
    """)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    assert ended.returncode == -signal.SIGKILL
    with np.load(tmp_path / "results.npz") as stored:
        assert stored["margins"].shape == (4, 2)
    call = functools.partial(certify, layers(), x, labels, 0.05, method=jb.IBP(), batch_size=2, activation="relu")
    found, whole = call(results=tmp_path / "results.npz"), call()
    np.testing.assert_array_equal(found.margins, whole.margins)
    np.testing.assert_array_equal(found.verified, whole.verified)
