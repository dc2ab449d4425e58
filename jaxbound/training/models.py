"""The networks of the CROWN-IBP paper, named as there, multilayer perceptrons and a residual network.

`network("A")` is model A of Table B, `network("DM-large")` the large one of Table A. All are a `ConvNet`: convolutions
with bias and ReLU, then dense layers with ReLU, then one of 10 classes. Images are (batch, height, width, channels)
with pixels in [0, 1].

What the tables leave open, and what stands here:

* Padding: the paper gives none. The released code pads by 1 pixel, and so do all convolutions here.
* The third convolution of C-F and O-R: Table B has the kernels 4, 4, 5, 5, 4, 4, 5, 3 with stride 4. The released
  code has 4 x 4 kernels with stride 4 and no padding for each of them; `network(name, released=True)` gives those.
* Normalisation is the network's first layer, (x - mean) / std per channel. So radii stay in units of pixels, and an
  l_inf ball of radius eps becomes a box of half-width eps / std per channel before the first convolution.
* Initialisation: Flax's (kernels normal with variance 1 / fan_in, biases 0). initializer="torch" draws kernels and
  biases as the released code does, by PyTorch's default: uniformly, with variance 1 / (3 fan_in). "ibp" has variance
  2 pi / fan_in^2, at which the width of intervals neither grows nor shrinks from layer to layer, leaves the last layer
  as Flax's, and halves the two summands of a residual block (Shi et al. 2021, section 3.2).

Parameters of each, for MNIST (28 x 28 x 1) and for CIFAR-10 and SVHN (32 x 32 x 3), are in docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbound import errors

PRECISION = jax.lax.Precision.HIGHEST

Convolution = tuple[int, int, int]
"""Filters, kernel size and stride of a square convolution."""


@dataclass(frozen=True)
class Architecture:
    """A row of Table A or B: convolutions as (filters, kernel, stride), then the widths of the dense layers."""

    convolutions: tuple[Convolution, ...]
    dense: tuple[int, ...]


def _two(width: int, dense: int) -> Architecture:
    return Architecture(((width, 4, 2), (2 * width, 4, 2)), (dense,))


def _three(width: int, kernel: int, last: int, dense: int) -> Architecture:
    return Architecture(((width, kernel, 1), (2 * width, kernel, 1), (2 * width, last, 4)), (dense,))


def _four(width: int, dense: int) -> Architecture:
    convolutions = ((width, 3, 1), (width, 4, 2), (2 * width, 3, 1), (2 * width, 4, 2))
    return Architecture(convolutions, (dense, dense))


ARCHITECTURES: dict[str, Architecture] = {
    "A": _two(4, 128),
    "B": _two(8, 256),
    "C": _three(4, 3, 4, 64),
    "D": _three(8, 3, 4, 128),
    "E": _three(4, 5, 5, 64),
    "F": _three(8, 5, 5, 128),
    "G": _four(4, 256),
    "H": _four(8, 256),
    "I": _four(4, 512),
    "J": _four(8, 512),
    "K": _four(16, 256),
    "L": _four(16, 512),
    "M": _four(32, 512),
    "N": _four(64, 512),
    "O": _three(64, 5, 4, 512),
    "P": _three(32, 5, 4, 512),
    "Q": _three(16, 5, 5, 512),
    "R": _three(32, 3, 3, 512),
    "S": _two(32, 128),
    "T": _two(64, 256),
    "DM-small": Architecture(((16, 4, 2), (32, 4, 1)), (100,)),
    "DM-medium": Architecture(((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)), (512, 512)),
    "DM-large": Architecture(((64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)), (512,)),
}
"""Tables A and B of Zhang et al. 2020."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "mnist_small": tuple("ABCDEFGHIJ"),
    "mnist_medium": tuple("KLMNOPQR"),
    "cifar_small": tuple("BCDEFGHIJ"),
    "cifar_medium": tuple("KLMNQRST"),
}
"""Which models the paper trains together: A, O and P are for MNIST alone, S and T for CIFAR-10 alone."""


def _ibp_kernel(key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Normal with standard deviation sqrt(2 pi) / fan_in."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 * math.pi) / math.prod(shape[:-1])


KERNELS: dict[str, Callable] = {
    "flax": nn.initializers.lecun_normal(),
    "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "ibp": _ibp_kernel,
}
INITIALIZERS = tuple(KERNELS)
"""How parameters may start; see the module's head."""


def _start(name: str, fan_in: int, *, last: bool = False) -> tuple[Callable, Callable]:
    """The initialisers of a layer's kernel and bias."""
    if name not in KERNELS:
        raise errors.unknown_option("initializer", name, INITIALIZERS)
    kernel = KERNELS["flax" if name == "ibp" and last else name]
    bias = nn.initializers.zeros
    if name == "torch":
        bound = 1 / math.sqrt(fan_in)
        bias = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
    return kernel, bias


def _dense(x: jax.Array, width: int, initializer: str, *, last: bool = False) -> jax.Array:
    """A dense layer; within a module's compact call."""
    kernel, bias = _start(initializer, x.shape[-1], last=last)
    return nn.Dense(width, precision=PRECISION, kernel_init=kernel, bias_init=bias)(x)


def _normalised(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Zero mean and unit variance per channel, where statistics are given."""
    if not mean and not std:
        return x
    return (x - jnp.asarray(mean or (0.0,), x.dtype)) / jnp.asarray(std or (1.0,), x.dtype)


class ConvNet(nn.Module):
    """Convolutions, then dense layers, ReLU after each but the last.

    Args:
        convolutions: (filters, kernel, stride) of each.
        dense: the widths of the hidden dense layers.
        classes: the number of logits.
        paddings: pixels around the image, per convolution; one number for all.
        mean, std: per channel, subtracted and divided by first; empty for none.
        initializer: "flax", "torch" or "ibp".

    >>> model = ConvNet(((4, 3, 1),), (16,))
    >>> model.apply(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))), jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """

    convolutions: tuple[Convolution, ...]
    dense: tuple[int, ...]
    classes: int = 10
    paddings: int | tuple[int, ...] = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    initializer: str = "flax"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        count = len(self.convolutions)
        paddings = (self.paddings,) * count if isinstance(self.paddings, int) else self.paddings
        x = _normalised(x, self.mean, self.std)
        for (filters, kernel, stride), padding in zip(self.convolutions, paddings, strict=True):
            size, strides = (kernel, kernel), (stride, stride)
            start, bias = _start(self.initializer, kernel * kernel * x.shape[-1])
            convolve = nn.Conv(filters, size, strides, padding, precision=PRECISION, kernel_init=start, bias_init=bias)
            x = nn.relu(convolve(x))
        x = x.reshape(x.shape[0], -1)
        for width in self.dense:
            x = nn.relu(_dense(x, width, self.initializer))
        return _dense(x, self.classes, self.initializer, last=True)


def MLP(
    dense: tuple[int, ...],
    classes: int = 10,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    initializer: str = "flax",
) -> ConvNet:
    """A network of dense layers alone; inputs of any shape are flattened.

    Args:
        dense: the widths of the hidden layers.
        classes: the number of logits.
        mean, std: per channel (the last axis of the input), subtracted and divided by first.
        initializer: "flax", "torch" or "ibp".

    >>> MLP((256, 256)).dense
    (256, 256)
    """
    return ConvNet((), tuple(dense), classes, mean=mean, std=std, initializer=initializer)


class BatchNorm(nn.Module):
    """BatchNorm whose statistics are those of the examples that count, on all devices together.

    In training it writes the batch's own statistics, biased variance, to the collection "batch_stats"; whoever trains
    moves the average. In evaluation it is the affine map of the statistics that it is given. An empty batch has mean
    and variance 0.

    Args:
        axis_name: the name of a pmap axis; None for one program (`jit`).
        scale: what the scale starts at.

    >>> model, x = BatchNorm(), jnp.array([[1.0], [3.0], [100.0]])
    >>> counts = jnp.array([True, True, False])
    >>> _, moved = model.apply(model.init(jax.random.key(0), x), x, train=True, mask=counts, mutable=["batch_stats"])
    >>> moved["batch_stats"]["mean"], moved["batch_stats"]["var"]
    (Array([2.], dtype=float32), Array([1.], dtype=float32))
    """

    axis_name: str | None = None
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """The normalised batch (batch, ..., features); `mask`, bool (batch,), says which examples count."""
        features = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", nn.initializers.constant(self.scale), features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        if train and not self.is_initializing():
            counts = jnp.ones(x.shape[0], bool) if mask is None else mask
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean.value = self._mean(wide, counts)
            var.value = self._mean(jnp.square(wide - mean.value), counts)
        slope = scale * jax.lax.rsqrt(var.value + 1e-5)
        return ((x - mean.value) * slope + bias).astype(x.dtype)

    def _mean(self, values: jax.Array, counts: jax.Array) -> jax.Array:
        """The mean over what counts, per feature."""
        counted = counts.reshape(-1, *(1,) * (values.ndim - 1))
        axes = tuple(range(values.ndim - 1))
        total = jnp.sum(values, axis=axes, where=counted)
        count = jnp.sum(counts) * math.prod(values.shape[1:-1])
        if self.axis_name is not None:
            total, count = jax.lax.psum((total, count), self.axis_name)
        return total / jnp.maximum(count, 1)


class ResNet(nn.Module):
    """A residual network: a convolution, blocks of two convolutions around a shortcut, two dense layers.

    Each convolution is followed by `BatchNorm`. With `train=False`, the default and the only mode that can be
    certified, it is an affine map with the statistics that it is given.

    Args:
        widths: filters of each block; every block halves the image.
        dense: the width of the hidden dense layer.
        classes: the number of logits.
        mean, std: per channel, subtracted and divided by first; empty for none.
        axis_name: the name of a pmap axis over which statistics are taken; None for one program (`jit`).
        initializer: "flax", "torch" or "ibp".

    >>> model = ResNet((4, 4), dense=8)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    >>> model.apply(variables, jnp.zeros((2, 8, 8, 3))).shape
    (2, 10)
    """

    widths: tuple[int, ...] = (16, 32)
    dense: int = 100
    classes: int = 10
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    axis_name: str | None = None
    initializer: str = "flax"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels).

        Args:
            x: images.
            train: normalise by the batch's own statistics.
            mask: bool (batch,), which examples count for these; None for all.
        """
        half = 0.5 if self.initializer == "ibp" else 1.0

        def convolve(x: jax.Array, filters: int, kernel: int, stride: int, scale: float = 1.0) -> jax.Array:
            start, _ = _start(self.initializer, kernel * kernel * x.shape[-1])
            size, padding = (kernel, kernel), (kernel - 1) // 2
            made = nn.Conv(
                filters, size, (stride, stride), padding, use_bias=False, precision=PRECISION, kernel_init=start
            )
            return BatchNorm(self.axis_name, scale)(made(x), train=train, mask=mask)

        x = nn.relu(convolve(_normalised(x, self.mean, self.std), self.widths[0], 3, 1))
        for width in self.widths:
            inner = nn.relu(convolve(x, width, 3, 2))
            x = nn.relu(convolve(inner, width, 3, 1, half) + convolve(x, width, 1, 2, half))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(_dense(x, self.dense, self.initializer))
        return _dense(x, self.classes, self.initializer, last=True)


def network(
    name: str,
    *,
    classes: int = 10,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    released: bool = False,
    initializer: str = "flax",
) -> ConvNet:
    """A network of the CROWN-IBP paper by its name.

    Args:
        name: "A" to "T", "DM-small", "DM-medium" or "DM-large".
        classes: the number of logits.
        mean, std: per channel, subtracted and divided by first.
        released: take the third convolution of C-F and O-R from the released code; see the module's head.
        initializer: "flax", "torch" or "ibp".

    Returns:
        A Linen module; the image's size is known from its parameters.

    Raises:
        ArgumentError: no such name, or `released` for a network whose two forms are one.

    Reference: Zhang et al., "Towards stable and efficient training of verifiably robust neural networks", 2020,
    Tables A and B.

    >>> network("A").convolutions, network("A").dense
    (((4, 4, 2), (8, 4, 2)), (128,))
    """
    if name not in ARCHITECTURES:
        raise errors.unknown_option("name", name, ARCHITECTURES)
    known = ARCHITECTURES[name]
    convolutions, paddings = known.convolutions, 1
    if released:
        if len(convolutions) != 3:
            raise errors.argument("released", f"has no meaning for {name}", "leave it out: table and code agree")
        convolutions, paddings = (*convolutions[:2], (convolutions[2][0], 4, 4)), (1, 1, 0)
    return ConvNet(convolutions, known.dense, classes, paddings, tuple(mean), tuple(std), initializer)


def parameter_count(variables: Any) -> int:
    """How many numbers are trained: all of the collection "params".

    >>> parameter_count({"params": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}})
    16
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
