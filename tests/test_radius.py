"""Certified radii: evaluated and held, each image by its own bracket, whatever the method does between two radii."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.certificates.radius import certified_radius, search
from jaxbound.methods import Bounded, Method

TOLERANCE = 1e-3
COMPILED: list[str] = []

jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


@functools.cache
def layers(sizes=(4, 6, 6, 3), seed=9):
    """A chain of Dense layers, centred on the inputs' middle so that several classes occur."""
    rng, chain = np.random.default_rng(seed), []
    for number, pair in enumerate(itertools.pairwise(sizes)):
        kernel, bias = rng.normal(size=pair) * np.sqrt(2 / pair[0]), rng.normal(size=pair[1]) / 8
        bias = bias - kernel.sum(axis=0) / 2 * (number == 0)
        chain.append((jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)))
    return tuple(chain)


def logits_of(net, x):
    value = np.asarray(x, np.float64)
    for number, (kernel, bias) in enumerate(net):
        value = value @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
        value = np.maximum(value, 0) if number < len(net) - 1 else value
    return value


def data(count=7, seed=1):
    """Images in [0, 1] and the classes that `layers()` gives them."""
    x = np.random.default_rng(seed).uniform(size=(count, 4)).astype(np.float32)
    return x, logits_of(layers(), x).argmax(-1)


LINEAR = [(jnp.eye(3), jnp.zeros(3))]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Holding(Method):
    """Certifies by radius alone: where it lies in one of these intervals; notes every radius that it is asked for."""

    where: tuple[tuple[float, float], ...] = field(metadata={"static": True})
    asked: list = field(default_factory=list, metadata={"static": True}, hash=False, compare=False)
    good: float = field(default=1.0, metadata={"static": True})
    bad: float = field(default=-1.0, metadata={"static": True})
    rounding: float = field(default=0.0, metadata={"static": True})

    def bound(self, graph, leaves, request):
        radius = leaves[0].radius
        self.asked.append(np.asarray(radius))
        held = functools.reduce(jnp.logical_or, [(radius >= low) & (radius <= high) for low, high in self.where])
        lower = jnp.where(held, self.good, self.bad)[:, None] * jnp.ones((1, graph.nodes[-1].op.shape[0]))
        return [Bounded(lower, None, jnp.full_like(lower, self.rounding), jnp.zeros_like(lower))]


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_what_comes_back_was_evaluated_and_held():
    """Random certificates that hold on random unions of intervals: nothing is inferred, nothing is repeated in vain."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.exponential(size=(200, 6)) * 10.0 ** rng.integers(-4, 3, (200, 1)), axis=1).astype(np.float32)
    seen = []

    def holds(radius):
        inside = np.zeros(200, bool)
        for k in (0, 2, 4):
            inside |= (np.asarray(radius) >= ends[:, k]) & (np.asarray(radius) <= ends[:, k + 1])
        seen.append((np.asarray(radius), inside))
        return jnp.asarray(inside)

    possible = rng.uniform(size=200) < 0.9
    found = np.asarray(search(holds, jnp.asarray(possible), jnp.full(200, 0.05), 25, TOLERANCE))
    assert len(seen) <= 25
    radii, held = (np.stack(parts) for parts in zip(*seen, strict=True))
    evaluated = ((radii == found) & held).any(axis=0)
    assert (evaluated | (found == 0)).all() and (found[~possible] == 0).all()
    largest = np.where(held, radii, 0).max(axis=0)  # also where a larger radius failed before it
    np.testing.assert_array_equal(found[possible], largest[possible])
    assert (found > 0).sum() > 50
    for k in range(0, 200, 20):  # alone as in the batch
        own = search(lambda r, k=k: _union(ends[k], r), jnp.asarray([possible[k]]), jnp.full(1, 0.05), 25, TOLERANCE)
        assert own[0] == found[k]


def _union(ends, radius):
    return functools.reduce(jnp.logical_or, [(radius >= ends[k]) & (radius <= ends[k + 1]) for k in (0, 2, 4)])


@pytest.mark.fast
@pytest.mark.parametrize("border", np.float32([1e-6, 0.003, 0.05, 0.3, 1.0, 40.0]))
def test_monotone_certificates_are_found_within_tolerance(border):
    for initial in (1e-3, 0.05, 7.0):
        count = []

        def holds(radius, count=count):
            count.append(1)
            return radius <= border

        found = float(search(holds, jnp.array([True]), jnp.array([initial]), 60, TOLERANCE)[0])
        assert border * (1 - TOLERANCE) - 1e-12 <= found <= border
        assert len(count) <= 2 + abs(np.log2(border / initial)) + 1 + np.log2(1 / TOLERANCE)


@pytest.mark.fast
def test_what_always_or_never_holds_ends_with_the_steps():
    always = search(lambda r: r >= 0, jnp.array([True]), jnp.array([0.5]), 9, TOLERANCE)
    assert float(always[0]) == 0.5 * 2**8
    assert float(search(lambda r: r < 0, jnp.array([True]), jnp.array([0.5]), 9, TOLERANCE)[0]) == 0
    huge = search(lambda r: r >= 0, jnp.array([True]), jnp.array([1e38]), 9, TOLERANCE)
    assert float(huge[0]) == np.inf, "evaluated: the doubled radius is infinite and held"
    assert (
        float(search(jnp.isfinite, jnp.array([True]), jnp.array([1e38]), 9, TOLERANCE)[0]) <= np.finfo(np.float32).max
    )


def test_the_search_is_the_same_under_jit():
    borders = jnp.array([1e-4, 0.01, 0.05, 0.3, 9.0])
    run = functools.partial(search, lambda r: (r <= borders) & (r != 0.2), jnp.ones(5, bool), jnp.full(5, 0.05))
    np.testing.assert_array_equal(jax.jit(lambda: run(30, TOLERANCE))(), run(30, TOLERANCE))


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2, 3, jnp.inf])
def test_affine_networks_have_the_radius_of_the_dual_norm(norm):
    rng = np.random.default_rng(0)
    net = [(jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), jnp.asarray(rng.normal(size=4), jnp.float32))]
    x = rng.normal(size=(6, 8)).astype(np.float32)
    logits, kernel = logits_of(net, x), np.asarray(net[0][0], np.float64)
    labels, dual = logits.argmax(-1), {1: np.inf, 2: 2, 3: 1.5, np.inf: 1}[norm]
    exact = [
        min(
            (logits[i, y] - logits[i, j]) / np.linalg.norm(kernel[:, y] - kernel[:, j], dual)
            for j in range(4)
            if j != y
        )
        for i, y in enumerate(labels)
    ]
    found = np.asarray(certified_radius(net, x, labels, norm=norm, activation="relu"))
    assert (found <= exact).all() and (found >= np.multiply(exact, 1 - 2 * TOLERANCE)).all()


@pytest.mark.slow
def test_a_clip_box_enlarges_the_radius():
    x, labels = data()
    free, cut = (certified_radius(layers(), x, labels, clip=clip, activation="relu") for clip in (None, (0.0, 1.0)))
    assert (cut >= free * (1 - 2 * TOLERANCE)).all() and (cut > free * 1.01).any()
    assert jb.certify(layers(), x, labels, cut, clip=(0.0, 1.0), method=jb.Crown(), activation="relu").verified.all()


def test_a_clip_box_by_hand():
    """f_0 - f_1 = x_0 - x_1 from (0.9, 0.5): free 0.2; cut at 0.6 above, x_1 stops there and x_0 falls alone, to 0.6."""
    x, net = jnp.array([[0.9, 0.5]]), [(jnp.eye(2), jnp.zeros(2))]
    assert float(certified_radius(net, x, jnp.array([0]), activation="relu")[0]) == pytest.approx(
        0.2, rel=2 * TOLERANCE
    )
    cut = certified_radius(net, x, jnp.array([0]), clip=(jnp.zeros(2), jnp.array([1.0, 0.6])), activation="relu")
    assert float(cut[0]) == pytest.approx(0.3, rel=2 * TOLERANCE)


@pytest.mark.parametrize(
    ("method", "norm"),
    [(jb.IBP(), jnp.inf), (jb.CrownIBP(), 1), (jb.Crown(), jnp.inf), (jb.Crown(), 2)],
    ids=["IBP-inf", "CrownIBP-1", "Crown-inf", "Crown-2"],
)
def test_certify_verifies_at_the_radius_and_attacks_fail_there(method, norm):
    x, labels = data()
    radius = certified_radius(layers(), x, labels, norm=norm, method=method, activation="relu")
    assert (radius > 0).all()
    report = jb.certify(layers(), x, labels, radius, norm=norm, method=method, activation="relu")
    assert report.verified.all()
    beyond = jb.certify(layers(), x, labels, radius * (1 + 3 * TOLERANCE), norm=norm, method=method, activation="relu")
    assert not beyond.verified.any()
    attack = jb.pgd(layers(), x, labels, radius, norm=norm, key=jax.random.key(0), restarts=4, activation="relu")
    jb.check_against_attack(report, attack)


def test_no_radius_passes_the_smallest_that_an_attack_breaks():
    x, labels = data()
    radius = np.asarray(certified_radius(layers(), x, labels, activation="relu"))
    for eps in np.geomspace(0.001, 0.5, 30):
        broken = np.asarray(jb.pgd(layers(), x, labels, eps, key=jax.random.key(0), activation="relu").success)
        assert (radius[broken] < eps).all()


def test_each_image_has_its_own_bracket():
    x, labels = data()
    radius = functools.partial(certified_radius, layers(), method=jb.CrownIBP(), activation="relu")
    whole = np.asarray(radius(x, labels))
    np.testing.assert_allclose(radius(x[[6, 0, 3]], labels[[6, 0, 3]]), whole[[6, 0, 3]], rtol=1e-6)
    single = radius(x[3], labels[3])
    assert single.shape == () and float(single) == pytest.approx(whole[3], rel=1e-6)
    started = radius(x, labels, initial=np.geomspace(1e-3, 1, 7).astype(np.float32))
    np.testing.assert_allclose(started, whole, rtol=3 * TOLERANCE)


def test_monotonicity_is_not_assumed():
    """Holds up to 0.03 and from 0.2 to 0.4: what is found depends on where the search starts, and held in any case."""
    x, labels = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([0])
    for initial, expected in ((0.05, 0.03), (0.25, 0.4), (0.5, 0.4), (0.01, 0.03)):
        method = Holding(((0.0, 0.03), (0.2, 0.4)))
        found = float(certified_radius(LINEAR, x, labels, method=method, initial=initial, activation="relu")[0])
        assert found == pytest.approx(expected, rel=TOLERANCE) and found <= expected * (1 + 1e-6)
        assert any(found == asked[0] for asked in method.asked)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("good", "rounding"), [(np.nan, 0.0), (0.0, 0.0), (np.inf, 0.0), (1.0, 1.0), (1.0, np.nan), (1.0, np.inf)]
)
def test_margins_that_verify_nothing(good, rounding):
    x, labels = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([0])
    method = Holding(((0.0, 10.0),), good=good, rounding=rounding)
    assert float(certified_radius(LINEAR, x, labels, method=method, activation="relu")[0]) == 0


def test_wrong_labels_ties_and_undefined_logits_have_no_radius():
    x, labels = data()
    wrong = np.where(np.arange(7) % 2, labels, (labels + 1) % 3)
    found = np.asarray(certified_radius(layers(), x, wrong, activation="relu"))
    assert ((found > 0) == (np.arange(7) % 2 == 1)).all()
    points = jnp.array([[0.5, 0.5, 0.0], [0.5, 0.4, 0.0], [jnp.inf, 0.0, 0.0]])
    found = certified_radius(
        LINEAR, points, jnp.zeros(3, int), method=Holding(((0.0, 0.5),), good=0.05), activation="relu"
    )
    assert found[0] == 0 and found[1] > 0.49 and found[2] == 0
    broken = [(jnp.eye(3).at[2, 2].set(jnp.nan), jnp.zeros(3))]
    assert (
        certified_radius(broken, points[1:2], jnp.zeros(1, int), method=Holding(((0.0, 0.5),)), activation="relu")[0]
        == 0
    )
    other = jnp.array([[0.2, 0.5, 0.0]])  # wrong, though the margin to the target is positive
    assert certified_radius(LINEAR, other, jnp.array([0]), targets="least-likely", activation="relu")[0] == 0


def test_rounding_is_demanded_unless_it_is_switched_off():
    x, labels = data()
    strict, loose = (
        np.asarray(certified_radius(layers(), x, labels, rounding=r, activation="relu")) for r in ("outward", None)
    )
    assert (strict > 0).all() and (loose >= strict * (1 - 2 * TOLERANCE)).all()
    np.testing.assert_allclose(strict, loose, rtol=0.01)
    tie = jnp.array([[np.nextafter(np.float32(0.5), np.float32(1)), 0.5, 0.0]])
    assert certified_radius(LINEAR, tie, jnp.array([0]), activation="relu")[0] == 0


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets():
    x, labels = data(12)
    logits = logits_of(layers(), x)
    radius = functools.partial(certified_radius, layers(), x, labels, method=jb.IBP(), activation="relu")
    single = np.stack([np.asarray(radius(targets=(labels + k) % 3)) for k in (1, 2)])
    classes = np.stack([(labels + k) % 3 for k in (1, 2)])
    scores = np.take_along_axis(logits.T, classes, axis=0)
    best, worst = scores.argmax(axis=0), scores.argmin(axis=0)
    columns = np.arange(12)
    np.testing.assert_array_equal(radius(targets="runner-up"), single[best, columns])
    np.testing.assert_array_equal(radius(targets="least-likely"), single[worst, columns])
    np.testing.assert_allclose(radius(), single.min(axis=0), rtol=2 * TOLERANCE)
    key = jax.random.key(3)
    drawn = np.asarray(radius(targets="random", key=key))
    assert ((drawn == single[0]) | (drawn == single[1])).all()
    assert (drawn != single[0]).any() and (drawn != single[1]).any()
    np.testing.assert_array_equal(drawn, radius(targets="random", key=jax.random.PRNGKey(3)))
    part = certified_radius(layers(), x[:5], labels[:5], targets="random", key=key, method=jb.IBP(), activation="relu")
    np.testing.assert_allclose(part, drawn[:5], rtol=1e-6)


def test_random_targets_are_uniform_and_never_the_label():
    labels = np.arange(400) % 4
    x = np.eye(4, dtype=np.float32)[labels] + np.arange(4, dtype=np.float32) / 100
    net = [(jnp.eye(4), jnp.zeros(4))]
    radius = functools.partial(certified_radius, net, x, labels, activation="relu")
    of_class = {}
    for k in (1, 2, 3):
        of_class[k] = np.asarray(radius(targets=(labels + k) % 4))
    drawn = np.asarray(radius(targets="random", key=jax.random.key(0)))
    counts = [np.isclose(drawn, of_class[k], rtol=1e-5).sum() for k in (1, 2, 3)]
    assert sum(counts) == 400 and min(counts) > 100, counts


@pytest.mark.fast
def test_what_is_refused():
    x, labels = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([0])

    def refuses(text, kind=errors.ArgumentError, x=x, labels=labels, **options):
        with pytest.raises(kind, match=text):
            certified_radius(LINEAR, x, labels, activation="relu", **options)

    refuses("targets='runnerup' is not known; did you mean 'runner-up'", targets="runnerup")
    refuses("key is None; pass a PRNG key", targets="random")
    refuses("targets hold 3; classes are numbered 0..2", targets=np.array([3]))
    refuses("targets hold an example's own label", targets=np.array([0]))
    refuses(r"targets have shape \(\), not \(1,\)", targets=1)
    refuses("targets are float", errors.ArgumentTypeError, targets=np.array([1.0]))
    refuses("labels hold 3; classes are numbered 0..2", labels=np.array([3]))
    refuses(r"labels have shape \(2,\), not \(1,\)", labels=np.array([0, 1]))
    refuses("labels are float32", errors.ArgumentTypeError, labels=np.array([0.0], np.float32))
    refuses("x is a region; pass points", x=jb.Box(x, x))
    refuses("integers have no neighbourhood", errors.ArgumentTypeError, x=jnp.array([[1, 0, 0]]))
    refuses("too coarse to certify", errors.ArgumentTypeError, x=x.astype(jnp.bfloat16))
    refuses("does not meet its clip box", clip=(0.0, 0.5))
    refuses("norm=0.5 is not a norm", norm=0.5)
    refuses("method is .*; pass a method object such as", errors.ArgumentTypeError, method="crown")
    refuses("steps is 0", steps=0)
    for initial in (0.0, -1.0, np.inf, np.nan):
        refuses("initial is .*; pass finite radii above 0", initial=initial)
    refuses("tolerance is -1", tolerance=-1)
    refuses("rounding is 'up'", rounding="up")


@pytest.mark.fast
def test_estimates_are_refused_by_name():
    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Guess(Holding):
        guarantee = "estimate"

    with pytest.raises(errors.ArgumentError, match="Guess gives an estimate"):
        certified_radius(LINEAR, jnp.ones((1, 3)), jnp.array([0]), method=Guess(()), activation="relu")


# --- transformations and networks -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eagerly_and_compiled_the_same():
    x, labels = data()
    eager = certified_radius(layers(), x, labels, norm=2, clip=(0.0, 1.0), activation="relu")

    @jax.jit
    def compiled(net, x, labels):
        return certified_radius(net, x, labels, norm=2, clip=(0.0, 1.0), activation="relu")

    np.testing.assert_allclose(compiled(layers(), x, labels), eager, rtol=2 * TOLERANCE)
    strange = np.where(np.arange(7) < 2, [3, -1, 0, 0, 0, 0, 0], labels)
    found = np.asarray(compiled(layers(), np.where(np.arange(7)[:, None] == 2, x + 5, x), strange))
    assert (found[:3] == 0).all() and (found[3:] > 0).all()


def test_traced_targets():
    x, labels = data()
    compiled = jax.jit(
        lambda targets: certified_radius(layers(), x, labels, targets=targets, method=jb.IBP(), activation="relu")
    )
    given = np.where(np.arange(7) == 0, labels, np.where(np.arange(7) == 1, 3, (labels + 1) % 3))
    found = np.asarray(compiled(given))
    expected = np.asarray(
        certified_radius(layers(), x, labels, targets=(labels + 1) % 3, method=jb.IBP(), activation="relu")
    )
    assert (found[:2] == 0).all()
    np.testing.assert_allclose(found[2:], expected[2:], rtol=2 * TOLERANCE)


def test_vmapped_over_networks():
    x, labels = data(3)
    nets = [layers(), layers(seed=10)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    radius = functools.partial(certified_radius, x=x, labels=labels, method=jb.IBP(), activation="relu")
    found = jax.vmap(radius)(stacked)
    for net, row in zip(nets, found, strict=True):
        np.testing.assert_allclose(row, radius(net), rtol=2 * TOLERANCE)


def test_a_second_call_compiles_nothing():
    x, labels = data()
    certified_radius(layers(), x[:4], labels[:4], method=jb.CrownIBP(), activation="relu")
    COMPILED.clear()
    certified_radius(layers(), x[3:], labels[3:], method=jb.CrownIBP(), activation="relu")
    assert not COMPILED


def test_a_linen_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    x = np.random.default_rng(0).uniform(size=(3, 6, 6, 1)).astype(np.float32)
    model = Net()
    params = model.init(jax.random.key(0), x)
    labels = np.asarray(model.apply(params, x)).argmax(-1)
    options = {"apply_fn": model.apply, "clip": (np.zeros((6, 6, 1), np.float32), 1.0), "method": jb.CrownIBP()}
    radius = certified_radius(params, x, labels, **options)
    assert (radius > 0).all() and jb.certify(params, x, labels, radius, **options).verified.all()


@pytest.mark.x64
def test_float64():
    net = [tuple(part.astype(jnp.float64) for part in layer) for layer in layers()]
    x, labels = data()
    found = certified_radius(
        net, x.astype(np.float64), labels, method=jb.IBP(), tolerance=1e-12, steps=60, activation="relu"
    )
    assert found.dtype == jnp.float64
    below, above = (
        np.asarray(
            jb.certify(net, x.astype(np.float64), labels, found * factor, method=jb.IBP(), activation="relu").verified
        )
        for factor in (1, 1 + 1e-11)
    )
    assert below.all() and not above.any()


def test_what_a_function_closes_over_counts_as_it_is_at_the_call():
    weights = {"kernel": jnp.eye(2)}
    apply = lambda p, x: x @ weights["kernel"] + p["b"]  # noqa: E731
    params, x, label = {"b": jnp.zeros(2)}, np.array([[1.0, 0.0]], np.float32), np.array([0])
    first = jb.certified_radius(params, x, label, method=jb.IBP(), apply_fn=apply)
    weights["kernel"] = -jnp.eye(2)
    second = jb.certified_radius(params, x, label, method=jb.IBP(), apply_fn=apply)
    assert first[0] > 0.4
    assert second[0] == 0
