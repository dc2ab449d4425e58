"""Networks stored as plain arrays: `<name>.npz` with the weights, `<name>.json` beside it with the layers.

The JSON's `layers` run in order. Each has a `name`, a `type` and the `inputs` that it reads (earlier names, or "input",
the normalised image); dense and conv layers name their arrays in the npz:

    dense    y = x @ kernel + bias, kernel (in, out)                flatten   height, width, channel, in this order
    conv     kernel HWIO, with `strides` and `padding`; x is NHWC   add       the sum of its inputs
    relu, sigmoid, tanh, ... (`ACTIVATIONS`), leaky_relu_0.3        entry by entry

`normalization` holds `mean` and `std` per channel. It is part of the network, so radii are in units of the pixels in
[0, 1], before it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "arctan": jnp.arctan,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}
PRECISION = jax.lax.Precision.HIGHEST
_SLOPE = re.compile(r"leaky_relu_([0-9.]+(?:e[+-]?[0-9]+)?)")


@dataclass(frozen=True)
class Layer:
    """One layer; `inputs` are the names of what it reads."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    strides: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class StoredNetwork:
    """`network(params, images)` with images (batch, height, width, channels) in [0, 1]; hashable."""

    layers: tuple[Layer, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, params, images: jax.Array) -> jax.Array:
        """The logits, (batch, classes)."""
        values = {"input": self._normalised(images)}
        for layer in self.layers:
            read = [values[name] for name in layer.inputs]
            values[layer.name] = _apply(layer, params.get(layer.name, {}), read)
        return values[self.layers[-1].name]

    def _normalised(self, images: jax.Array) -> jax.Array:
        if all(mean == 0 for mean in self.mean) and all(std == 1 for std in self.std):
            return images
        return (images - jnp.asarray(self.mean, images.dtype)) / jnp.asarray(self.std, images.dtype)


def activation(kind: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of a layer type; "leaky_relu_0.3" has the slope 0.3.

    Raises:
        KeyError: there is none.

    >>> activation("leaky_relu_0.5")(jnp.array([-1.0, 2.0])).tolist()
    [-0.5, 2.0]
    """
    if slope := _SLOPE.fullmatch(kind):
        return functools.partial(jax.nn.leaky_relu, negative_slope=float(slope[1]))
    return ACTIVATIONS[kind]


def load(path: str | Path) -> tuple[StoredNetwork, dict[str, dict[str, np.ndarray]]]:
    """Read a stored network.

    Args:
        path: the npz file; its JSON has the same name.

    Returns:
        `(apply_fn, params)`, for any function of jaxbound that takes both.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a layer that this file does not know, or arrays that the npz does not hold.
    """
    path = Path(path).with_suffix(".npz")
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    normalisation = description.get("normalization", {"mean": [0.0], "std": [1.0]})
    layers, params = [], {}
    with np.load(path) as arrays:
        for entry in description["layers"]:
            layer = _layer(entry, path)
            if layer.kind in ("dense", "conv"):
                missing = {entry["kernel"], entry["bias"]} - set(arrays.files)
                if missing:
                    raise ValueError(f"{path.name} lacks {sorted(missing)}, which layer {layer.name} needs")
                params[layer.name] = {"kernel": arrays[entry["kernel"]], "bias": arrays[entry["bias"]]}
            layers.append(layer)
    return StoredNetwork(tuple(layers), tuple(normalisation["mean"]), tuple(normalisation["std"])), params


def _layer(entry: dict, path: Path) -> Layer:
    kind = entry["type"]
    known = ("dense", "conv", "flatten", "add", *ACTIVATIONS)
    if kind not in known and not _SLOPE.fullmatch(kind):
        raise ValueError(f"{path.name}: layer {entry['name']} has type {kind!r}; known are {', '.join(known)}")
    if kind == "flatten" and entry.get("order", "HWC") != "HWC":
        raise ValueError(f"{path.name}: layer {entry['name']} flattens in order {entry['order']!r}, not HWC")
    strides = tuple(entry.get("strides", (1, 1)))
    padding = tuple(tuple(sides) for sides in entry.get("padding", ((0, 0), (0, 0))))
    return Layer(entry["name"], kind, tuple(entry["inputs"]), strides, padding)


def _apply(layer: Layer, params: dict, read: list[jax.Array]) -> jax.Array:
    if layer.kind == "dense":
        return jnp.matmul(read[0], params["kernel"], precision=PRECISION) + params["bias"]
    if layer.kind == "conv":
        convolved = jax.lax.conv_general_dilated(
            read[0], jnp.asarray(params["kernel"]), layer.strides, layer.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=PRECISION,
        )  # fmt: skip
        return convolved + params["bias"]
    if layer.kind == "flatten":
        return read[0].reshape(read[0].shape[0], -1)
    if layer.kind == "add":
        return sum(read[1:], read[0])
    return activation(layer.kind)(read[0])
