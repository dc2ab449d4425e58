"""The networks of FROWN's Tables 3 and 4 by their names, `DATA:LAYERSxWIDTH:ACTIVATION`, such as `mnist:5x20:relu`.

The data are mnist, fashion_mnist or cifar10 (through TFDS), digits, and scikit-learn's tables wine and breast_cancer,
in the place of the paper's sensorless drive diagnosis; features are scaled to [0, 1], a fifth is held out for testing.
`noise` is random data of CIFAR-10's shape, for where that is not at hand: ten random images, one per class, under
noise. A network is trained by Adam without any bounds, and kept in a folder with what trained it.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from experiments import mlps, networks, train_mlp
from jaxbound.training import data
from jaxbound.training.data import Dataset, Examples

TABLES = ("wine", "breast_cancer")
DATA = (*data.SOURCES, *TABLES, "noise")
_KINDS = ("relu", "sigmoid")
TABLE_3 = {
    **{f"breast_cancer:{m}x20:{kind}": (np.inf,) for kind in _KINDS for m in (4, 8, 12)},
    **{
        f"{name}:{size}:{kind}": (1.0, 2.0, np.inf)
        for name in ("mnist", "fashion_mnist")
        for size in ("5x20", "20x20", "5x100", "7x100")
        for kind in _KINDS
    },
}
"""The networks of Table 3 with the norms in which they are measured."""
_VARIANCE = {"sigmoid": 16.0, "tanh": 1.0}
"""Of kernels at first, times the number of inputs: derivatives keep their size through the layers."""


@dataclass(frozen=True)
class Name:
    """What a name says."""

    dataset: str
    layers: int
    width: int
    activation: str

    def __str__(self) -> str:
        """As it is written."""
        return f"{self.dataset}:{self.layers}x{self.width}:{self.activation}"


def read(text: str) -> Name:
    """A name, or an error for argparse.

    >>> read("mnist:5x20:relu")
    Name(dataset='mnist', layers=5, width=20, activation='relu')
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*):(\w+)", text)
    if found is None or found[1] not in DATA or found[4] not in networks.ACTIVATIONS:
        known = f"one of {', '.join(DATA)}, and one of {', '.join(networks.ACTIVATIONS)}"
        raise argparse.ArgumentTypeError(f"{text!r} is no DATA:LAYERSxWIDTH:ACTIVATION with {known}")
    return Name(found[1], int(found[2]), int(found[3]), found[4])


def table_4(cifar: bool) -> dict[str, tuple[float, ...]]:
    """The networks of Table 4, on CIFAR-10 or on noise."""
    name = "cifar10" if cifar else "noise"
    return {f"{name}:{m}x2048:{kind}": (1.0, 2.0, np.inf) for kind in _KINDS for m in (4, 6, 8)}


def dataset(name: str, data_dir: Path | None, *, download: bool = False) -> Dataset:
    """A data set by its name.

    Raises:
        ArgumentError: it is not there.
    """
    if name == "noise":
        return _noise()
    return _table(name) if name in TABLES else data.load(name, data_dir, download=download)


def _table(name: str) -> Dataset:
    from sklearn import datasets

    x, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    low, high = x[train].min(axis=0), x[train].max(axis=0)
    x, labels = np.clip((x - low) / (high - low), 0, 1).astype(np.float32), labels.astype(np.int32)
    return Dataset(
        name, Examples(x[train], labels[train]), Examples(x[test], labels[test]), 1.0, classes=labels.max() + 1
    )


def _noise(examples: int = 2_000) -> Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, examples, np.int32)
    x = rng.random((10, 32, 32, 3), np.float32)[labels] / 2 + rng.random((examples, 32, 32, 3), np.float32) / 2
    stored, test = np.round(255 * x).astype(np.uint8), examples // 10
    return Dataset("noise", Examples(stored[test:], labels[test:]), Examples(stored[:test], labels[:test]), 255.0)


def network(text: str, given: Dataset, folder: Path, options: argparse.Namespace) -> mlps.Network:
    """The network of a name: from the folder if it was trained there in the same way, else trained and kept."""
    name, path = read(text), folder / re.sub(r"\W", "_", text)
    hidden = (name.width,) * (name.layers - 1)
    settings = train_mlp.Settings(
        hidden, name.activation, epochs=options.epochs, examples=options.examples, seed=options.seed,
        variance=_VARIANCE.get(name.activation, 2.0), validation=max(1, min(200, len(given.train) // 10)),
    )  # fmt: skip
    made_by = json.loads(json.dumps({**asdict(settings), "dataset": name.dataset}))
    file = path.with_suffix(".json")
    if file.is_file() and made_by.items() <= json.loads(file.read_text(encoding="utf-8"))["training"].items():
        return mlps.load(path)._replace(name=text)
    found, record = train_mlp.train(settings, given, text)
    mlps.save(found, path, {**made_by, **record})
    return found
