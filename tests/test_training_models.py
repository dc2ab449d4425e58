"""The networks: every row of Tables A and B word for word, sizes worked out by hand, bounds in both modes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.training import models

SHAPES = {"mnist": (28, 28, 1), "cifar": (32, 32, 3)}

# As printed in the paper: "filters kernel+stride" of each convolution, then the widths of the dense layers.
TABLES = {
    "A": "4 4+2, 8 4+2 | 128",
    "B": "8 4+2, 16 4+2 | 256",
    "C": "4 3+1, 8 3+1, 8 4+4 | 64",
    "D": "8 3+1, 16 3+1, 16 4+4 | 128",
    "E": "4 5+1, 8 5+1, 8 5+4 | 64",
    "F": "8 5+1, 16 5+1, 16 5+4 | 128",
    "G": "4 3+1, 4 4+2, 8 3+1, 8 4+2 | 256, 256",
    "H": "8 3+1, 8 4+2, 16 3+1, 16 4+2 | 256, 256",
    "I": "4 3+1, 4 4+2, 8 3+1, 8 4+2 | 512, 512",
    "J": "8 3+1, 8 4+2, 16 3+1, 16 4+2 | 512, 512",
    "K": "16 3+1, 16 4+2, 32 3+1, 32 4+2 | 256, 256",
    "L": "16 3+1, 16 4+2, 32 3+1, 32 4+2 | 512, 512",
    "M": "32 3+1, 32 4+2, 64 3+1, 64 4+2 | 512, 512",
    "N": "64 3+1, 64 4+2, 128 3+1, 128 4+2 | 512, 512",
    "O": "64 5+1, 128 5+1, 128 4+4 | 512",
    "P": "32 5+1, 64 5+1, 64 4+4 | 512",
    "Q": "16 5+1, 32 5+1, 32 5+4 | 512",
    "R": "32 3+1, 64 3+1, 64 3+4 | 512",
    "S": "32 4+2, 64 4+2 | 128",
    "T": "64 4+2, 128 4+2 | 256",
    "DM-small": "16 4+2, 32 4+1 | 100",
    "DM-medium": "32 3+1, 32 4+2, 64 3+1, 64 4+2 | 512, 512",
    "DM-large": "64 3+1, 64 3+1, 128 3+2, 128 3+1, 128 3+1 | 512",
}  # fmt: skip


def rows(text: str):
    convolutions, dense = text.split("|")
    found = [tuple(map(int, re.findall(r"\d+", part))) for part in convolutions.split(",")]
    return tuple(found), tuple(map(int, dense.split(",")))


def count_by_hand(convolutions, paddings, dense, shape) -> int:
    """Weights and biases, and the image's side after each convolution: floor((n + 2 p - k) / s) + 1."""
    side, channels = shape[0], shape[2]
    total = 0
    for (filters, kernel, stride), padding in zip(convolutions, paddings, strict=True):
        total += filters * (kernel * kernel * channels + 1)
        side, channels = (side + 2 * padding - kernel) // stride + 1, filters
    units = side * side * channels
    for width in (*dense, 10):
        total, units = total + width * (units + 1), width
    return total


def count(model, shape) -> int:
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    return models.parameter_count(made)


def test_every_row_is_there():
    assert list(models.ARCHITECTURES) == list(TABLES)
    for name, text in TABLES.items():
        known = models.ARCHITECTURES[name]
        assert (known.convolutions, known.dense) == rows(text), name


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.parametrize("name", TABLES)
def test_parameter_counts(name, data):
    convolutions, dense = rows(TABLES[name])
    expected = count_by_hand(convolutions, [1] * len(convolutions), dense, SHAPES[data])
    assert count(models.network(name), SHAPES[data]) == expected


def test_parameter_counts_worked_out():
    # A on MNIST: 4·17 + 8·(64 + 1) + (7·7·8 + 1)·128 + 129·10 = 68 + 520 + 50,304 + 1,290
    assert count(models.network("A"), SHAPES["mnist"]) == 52_182
    # DM-large on CIFAR: 1,792 + 36,928 + 73,856 + 2·147,584 + (16·16·128 + 1)·512 + 513·10
    assert count(models.network("DM-large"), SHAPES["cifar"]) == 17_190_602


@pytest.mark.parametrize("name", "CDEFOPQR")
def test_released_third_convolution(name):
    convolutions, dense = rows(TABLES[name])
    convolutions = (*convolutions[:2], (convolutions[2][0], 4, 4))
    for shape in SHAPES.values():
        made = models.network(name, released=True)
        assert count(made, shape) == count_by_hand(convolutions, (1, 1, 0), dense, shape)
    # Both forms end in images of one side for MNIST, so the dense layers agree.
    variables = [jax.eval_shape(lambda m=m: m.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1))))["params"]
                 for m in (made, models.network(name))]  # fmt: skip
    assert variables[0]["Dense_0"]["kernel"].shape == variables[1]["Dense_0"]["kernel"].shape


def test_documented_counts():
    from pathlib import Path

    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    for name in TABLES:
        row = re.search(rf"^\| {name} \|[^|]*\| ([\d,]+|-) \| ([\d,]+|-) \|", text, re.MULTILINE)
        assert row, f"no row for {name}"
        for cell, data in zip(row.groups(), SHAPES, strict=True):
            assert cell == "-" or int(cell.replace(",", "")) == count(models.network(name), SHAPES[data]), (name, data)


def test_families():
    everything = {name for family in models.FAMILIES.values() for name in family}
    assert everything == set("ABCDEFGHIJKLMNOPQRST")
    assert [len(models.FAMILIES[f]) for f in ("mnist_small", "mnist_medium", "cifar_small", "cifar_medium")] == [
        10, 8, 9, 8,
    ]  # fmt: skip


def test_outputs_against_a_loop():
    """One small network against convolution by its definition."""
    rng = np.random.default_rng(0)
    model = models.ConvNet(((2, 4, 2),), (5,), classes=3)
    x = rng.uniform(size=(2, 6, 6, 2)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    layers = jax.tree.map(np.asarray, variables["params"])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = np.zeros((2, 3, 3, 2))
    for i in range(3):
        for j in range(3):
            patch = padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
            hidden[:, i, j] = np.einsum("bhwc,hwcf->bf", patch, layers["Conv_0"]["kernel"])
    hidden = np.maximum(hidden + layers["Conv_0"]["bias"], 0).reshape(2, -1)
    hidden = np.maximum(hidden @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
    expected = hidden @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_mlp_takes_any_shape():
    model = models.MLP((12, 8))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8)))
    assert models.parameter_count(variables) == 64 * 12 + 12 + 12 * 8 + 8 + 8 * 10 + 10
    assert model.apply(variables, jnp.zeros((3, 8, 8))).shape == (3, 10)


def test_ibp_initialisation_keeps_interval_widths():
    """Its reason: the mean width of intervals stays about the same from layer to layer."""
    ratios = {}
    for initializer in models.INITIALIZERS:
        model = models.MLP((400, 400, 400), initializer=initializer)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 400)))
        x = jax.random.uniform(jax.random.key(1), (400,))
        found = jb.pre_activation_bounds(lambda v, m=model, p=variables: m.apply(p, v[None])[0], jb.IBP())(
            jb.Box(x - 0.01, x + 0.01)
        )
        widths = [float(jnp.mean(ends.upper - ends.lower)) for ends in found.values()]
        ratios[initializer] = widths[2] / widths[0]
    assert 0.5 < ratios["ibp"] < 2 and ratios["flax"] > 10
    assert 0.25 < ratios["torch"] / (ratios["flax"] / 3) < 4  # smaller by the root of 3 in each of two layers


@pytest.mark.parametrize("method", [jb.IBP(), jb.CrownIBP()])
def test_normalisation_scales_the_radius_per_channel(method):
    """A ball of pixels through a normalising network is a ball of radius eps / std through the bare one."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.4)
    inside = models.ConvNet(((3, 3, 2),), (6,), mean=mean, std=std)
    bare = models.ConvNet(((3, 3, 2),), (6,))
    x = jax.random.uniform(jax.random.key(1), (2, 6, 6, 3))
    variables = jax.jit(inside.init)(jax.random.key(0), x)
    ends = (jnp.clip(x + sign * 0.05, 0, 1) for sign in (-1, 1))
    scaled = jb.Box(*((end - jnp.asarray(mean)) / jnp.asarray(std) for end in ends))
    labels = jnp.array([3, 4])
    one = jb.margins(variables, x, labels, 0.05, method=method, apply_fn=inside.apply, clip=(0.0, 1.0))
    other = jb.margins(variables, scaled, labels, method=method, apply_fn=bare.apply)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# --- the residual network ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual():
    model = models.ResNet((3, 4), dense=6)
    x = jax.random.uniform(jax.random.key(1), (8, 8, 8, 3))
    return model, jax.jit(model.init)(jax.random.key(0), x), x


@functools.partial(jax.jit, static_argnums=0)
def trained_pass(model, variables, x, mask=None):
    return model.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])


def test_residual_parameters(residual):
    _, variables, _ = residual
    # stem 27·3 + 6; blocks: 2·(9·3·3) + 9 + 3·6 and 9·3·4 + 9·16 + 12 + 3·8; dense (2·2·4 + 1)·6 + 7·10
    assert models.parameter_count(variables) == 87 + (162 + 9 + 18) + (108 + 144 + 12 + 24) + 102 + 70


def test_batch_statistics_are_those_of_the_batch(residual):
    model, variables, x = residual
    logits, moved = trained_pass(model, variables, x)
    first = jax.lax.conv_general_dilated(
        x, variables["params"]["Conv_0"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = moved["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], first.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], first.var((0, 1, 2)), rtol=1e-4)
    frozen = jax.jit(model.apply)({**variables, **moved}, x)
    np.testing.assert_allclose(frozen, logits, rtol=1e-4, atol=1e-5)


def test_masked_examples_do_not_count(residual):
    model, variables, x = residual
    mask = jnp.arange(8) < 5
    spoiled = x.at[5:].set(100.0)
    _, masked = trained_pass(model, variables, spoiled, mask)
    _, short = trained_pass(model, variables, x[:5])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), masked, short)


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", [jb.IBP(), jb.CrownIBP()])
def test_residual_bounds_hold(residual, method):
    model, variables, x = residual
    _, moved = trained_pass(model, variables, x)
    variables = {**variables, **moved}
    labels = jnp.arange(8) % 10
    lower = jb.margins(variables, x, labels, 0.05, method=method, apply_fn=model.apply, clip=(0.0, 1.0))
    noise = jax.random.uniform(jax.random.key(0), (20, *x.shape), minval=-0.05, maxval=0.05)
    noise = jnp.where(jnp.arange(20)[:, None, None, None, None] % 2, noise, 0.05 * jnp.sign(noise))
    points = jnp.clip(x + noise, 0, 1).reshape(-1, *x.shape[1:])
    logits = jax.jit(model.apply)(variables, points).reshape(20, 8, 10)
    true = jnp.einsum("bsk,nbk->nbs", jb.margin_spec(labels, 10), logits)
    assert jnp.all(true >= lower - 1e-4)


@pytest.mark.parametrize(("build", "text"), [
    (lambda: models.network("Z"), "name='Z' is not known"),
    (lambda: models.network("dm-large"), "did you mean 'DM-large'"),
    (lambda: models.network("A", released=True), "has no meaning for A"),
    (lambda: models.MLP((2,), initializer="xavier").init(jax.random.key(0), jnp.zeros((1, 3))), "initializer='xavier'"),
])  # fmt: skip
def test_refusals(build, text):
    with pytest.raises(errors.ArgumentError, match=text):
        build()
