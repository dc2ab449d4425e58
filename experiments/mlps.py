"""Multilayer perceptrons of the experiments on Jacobians: their files, and images to look at.

Files are those of `experiments.networks`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from experiments import networks, require_files
from experiments.networks import Layer, StoredNetwork
from jaxbound.training import data
from jaxbound.training.data import Dataset

Params = dict[str, dict[str, Any]]


class Network(NamedTuple):
    """A network by its name."""

    name: str
    apply_fn: StoredNetwork
    params: Params

    def logits(self, x: np.ndarray, size: int = 500) -> np.ndarray:
        """The logits of many images."""
        parts = [np.asarray(self.apply_fn(self.params, jnp.asarray(x[k : k + size]))) for k in range(0, len(x), size)]
        return np.concatenate(parts)


class Images(NamedTuple):
    """Images in [0, 1], their classes, and their numbers in the data set."""

    x: np.ndarray
    labels: np.ndarray
    index: np.ndarray


# --- files ------------------------------------------------------------------------------------------------------------


def stored(depth: int, kind: str) -> StoredNetwork:
    """The network of so many hidden layers."""
    layers, last = [Layer("flatten", "flatten", ("input",))], "flatten"
    for k in range(depth + 1):
        layers.append(Layer(f"dense{k}", "dense", (last,)))
        last = f"dense{k}"
        if k < depth:
            layers.append(Layer(f"activation{k}", kind, (last,)))
            last = f"activation{k}"
    return StoredNetwork(tuple(layers), (0.0,), (1.0,))


def save(network: Network, path: Path, settings: dict) -> None:
    """Write NAME.npz and NAME.json; the latter also says how it was trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}.{part}": value for name, layer in network.params.items() for part, value in layer.items()}
    np.savez(path.with_suffix(".npz"), **arrays)
    layers = []
    for layer in network.apply_fn.layers:
        entry: dict[str, Any] = {"name": layer.name, "type": layer.kind, "inputs": list(layer.inputs)}
        if layer.kind == "dense":
            entry |= {part: f"{layer.name}.{part}" for part in ("kernel", "bias")}
        layers.append(entry)
    text = json.dumps({"layers": layers, "training": settings}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> Network:
    """Read a network of `save`, or any other one of `experiments.networks`."""
    path = path.with_suffix(".npz")
    require_files(path, path.with_suffix(".json"))
    return Network(path.stem, *networks.load(path))


# --- images -----------------------------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Which data set, and where it is."""
    parser.add_argument("--dataset", choices=data.SOURCES, default="digits", help="digits needs no files")
    parser.add_argument("--data_dir", type=Path, help="where TFDS keeps prepared data sets")


def add_image_flags(parser: argparse.ArgumentParser, count: int) -> None:
    """Which images, and which networks."""
    add_data_flags(parser)
    parser.add_argument("--networks", type=Path, nargs="+", default=[], metavar="NAME",
                        help="NAME.npz with NAME.json; by default networks are trained on the data set")  # fmt: skip
    parser.add_argument("--count", type=int, default=count, help="how many images that all networks classify correctly")
    parser.add_argument("--start", type=int, default=0, help="the first image of the test set to consider")
    parser.add_argument("--epochs", type=int, default=20, help="of the networks that are trained")
    parser.add_argument("--seed", type=int, default=0, help="of training and of whatever is random")


def dataset_of(options: argparse.Namespace) -> Dataset:
    """The data set that the flags name, or a sentence why not."""
    try:
        return data.load(options.dataset, options.data_dir)
    except (jb.ArgumentError, ImportError) as error:
        raise SystemExit(str(error)) from None


def correct_images(given: Sequence[Network], dataset: Dataset, options: argparse.Namespace, label=None) -> Images:
    """The first test images that every network classifies correctly, of one class if there is one."""
    x, labels = dataset.images(dataset.test.x), dataset.test.labels
    right = np.arange(len(labels)) >= options.start
    right &= (labels == label) | (label is None)
    for network in given:
        logits = network.logits(x)
        own = np.arange(logits.shape[1]) == labels[:, None]
        right &= logits[own] > np.where(own, -np.inf, logits).max(axis=1)
    chosen = np.flatnonzero(right)[: options.count]
    if not len(chosen):
        raise SystemExit("no image is classified correctly by all networks, so that there is nothing to look at")
    return Images(x[chosen], labels[chosen], chosen)


def progress(what: str, total: int, unit: str, *, disable: bool = False):
    """A progress bar on standard error."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=disable)
