"""Data sets in memory, batches as a function of the step, and augmentation with a key per example.

Batch number s of a run is a pure function of (key, s): epoch e = s // steps_per_epoch takes the permutation of all
examples that the key, folded with e, draws, in consecutive parts. So every example comes once per epoch, the last batch
of an epoch is padded with rows of weight 0, a restarted run needs no state of the pipeline, and process p of P takes
rows p B/P up to (p + 1) B/P of each global batch of B. The data sets here fit into memory as bytes, and a batch is one
slice of them (below a millisecond), so there is no other pipeline.

Images are (height, width, channels), and become floats in [0, 1]. `mean` and `std` are statistics of the training
images, for the network's first layer (`models`), which scales the radius by 1 / std per channel.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound.training.step import Batch


class Examples(NamedTuple):
    """Images as stored, and their classes."""

    x: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples in memory.

    Args:
        name: as given to `load`.
        train, test: stored images and classes.
        scale: what stored values are divided by.
        mean, std: per channel, of the scaled training images; empty where the paper normalises nothing.
        classes: how many.

    >>> load("digits").shape, load("digits").classes
    ((8, 8, 1), 10)
    """

    name: str
    train: Examples
    test: Examples
    scale: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: int = 10

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.train.x.shape[1:]

    def images(self, stored: np.ndarray) -> np.ndarray:
        """Stored images as float32 in [0, 1]."""
        return stored.astype(np.float32) / np.float32(self.scale)

    def holding_out(self, count: int) -> tuple[Dataset, Examples]:
        """The same without some training examples, and these, drawn the same way every time."""
        if not 0 <= count < len(self.train):
            total = len(self.train)
            raise errors.argument("validation", f"is {count} of {total} examples", "leave some to train on")
        order = np.random.default_rng(0).permutation(len(self.train))
        held, kept = order[:count], np.sort(order[count:])
        train = Examples(self.train.x[kept], self.train.labels[kept])
        held_out = Examples(self.train.x[held], self.train.labels[held])
        return Dataset(self.name, train, self.test, self.scale, self.mean, self.std, self.classes), held_out


# --- sources ----------------------------------------------------------------------------------------------------------

_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1914, 0.2010)  # as in the paper, appendix D
_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_PREPARED: dict[str, tuple[str, tuple]] = {
    "mnist": ("mnist", ()),
    "fashion_mnist": ("fashion_mnist", ()),
    "cifar10": ("cifar10", _CIFAR),
    "svhn": ("svhn_cropped", _SVHN),
}
SOURCES = ("digits", *_PREPARED)
"""Names for `load`: scikit-learn's digits, embedded in that package, and data sets of TFDS."""
_SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}


def described(name: str) -> Dataset:
    """A data set of `SOURCES` without its examples: what networks need to know of it.

    >>> described("cifar10").shape, len(described("cifar10").train)
    ((32, 32, 3), 0)
    """
    if name not in SOURCES:
        raise errors.unknown_option("dataset", name, SOURCES)
    nothing = Examples(np.zeros((0, *_SHAPES.get(name, (32, 32, 3))), np.uint8), np.zeros(0, np.int32))
    mean, std = _PREPARED.get(name, ("", ()))[1] or ((), ())
    return Dataset(name, nothing, nothing, 16.0 if name == "digits" else 255.0, mean, std)


def load(
    name: str, data_dir: str | Path | None = None, *, download: bool = False, splits: Sequence[str] = ("train", "test")
) -> Dataset:
    """A data set by its name.

    Args:
        name: one of `SOURCES`.
        data_dir: where TFDS keeps prepared data sets; None for its own default.
        download: fetch and prepare what is missing, which needs the network and tensorflow.
        splits: which examples to read; of digits always both.

    Raises:
        ArgumentError: no such name, or data that is not there; the message says what to do.
        ImportError: a package of the extra `experiments` is missing.

    >>> len(load("digits").test)
    360
    """
    if name not in SOURCES:
        raise errors.unknown_option("dataset", name, SOURCES)
    if name == "digits":
        return _digits()
    return _prepared(name, None if data_dir is None else Path(data_dir), download, splits)


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"this data set needs {package}: pip install 'jaxbound[experiments]'", name=module)


@functools.cache
def _digits() -> Dataset:
    _require("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, labels = np.asarray(images, np.uint8).reshape(-1, 8, 8, 1), np.asarray(labels, np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[:360], order[360:]
    return Dataset("digits", Examples(x[train], labels[train]), Examples(x[test], labels[test]), 16.0)


def _prepared(name: str, data_dir: Path | None, download: bool, splits: Sequence[str]) -> Dataset:
    _require("tensorflow_datasets", "tensorflow-datasets")
    import tensorflow_datasets as tfds

    folder = _PREPARED[name][0]
    where = "the default folder of TFDS" if data_dir is None else str(data_dir)
    try:
        builder: Any = tfds.builder(folder, data_dir=data_dir, file_format="array_record")
    except (ValueError, FileNotFoundError) as error:
        raise errors.ArgumentError(f"TFDS cannot read {folder} in {where}: {error}") from error
    if download:
        _download(builder, folder)
    found = described(name)
    for split in splits:
        try:
            source = builder.as_data_source(split)
        except (AssertionError, KeyError, ValueError, NotImplementedError, FileNotFoundError) as error:
            raise errors.ArgumentError(
                f"{folder} is not prepared for tfds.data_source in {where}: pass the folder that holds {folder}/ as "
                "data_dir, or download=True to fetch and prepare it (which needs the network and tensorflow), with "
                f"file_format=array_record. TFDS says: {error}"
            ) from error
        found = dataclasses.replace(found, **{split: _read(source)})
    return found


def _download(builder: Any, folder: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"preparing {folder} needs tensorflow, which is not installed; install it, or copy a data set that was "
            "prepared elsewhere with file_format=array_record",
            name="tensorflow",
        )
    builder.download_and_prepare()


def _read(source: Any) -> Examples:
    """All examples of a data source, as bytes."""
    size = 4096
    pieces = [source.__getitems__(range(k, min(k + size, len(source)))) for k in range(0, len(source), size)]
    rows = [row for piece in pieces for row in piece]
    return Examples(np.stack([row["image"] for row in rows]), np.asarray([row["label"] for row in rows], np.int32))


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """Which examples batch number `step` holds: `sampler(step) -> (examples, rows, weight)`.

    Args:
        count: how many examples there are.
        batch_size: of the global batch.
        seed: of the key that shuffles.
        process, processes: which part of each batch this process takes.

    Raises:
        ArgumentError: a batch that the processes cannot share evenly.

    >>> sampler = Sampler(5, 2, seed=0)
    >>> sampler.steps_per_epoch, sorted(int(i) for step in range(3) for i in sampler.real(step))
    (3, [0, 1, 2, 3, 4])
    """

    count: int
    batch_size: int
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __post_init__(self):
        if self.count < 1 or self.batch_size < 1 or self.batch_size % self.processes:
            raise errors.argument(
                "batch_size", f"is {self.batch_size} for {self.count} examples and {self.processes} processes",
                "pass a multiple of the number of processes",
            )  # fmt: skip
        if not 0 <= self.process < self.processes:
            raise errors.argument("process", f"is {self.process} of {self.processes}", "number processes from 0")

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every example once; the last may be padded."""
        return math.ceil(self.count / self.batch_size)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The examples of this process's part, their rows in the global batch, and weights: 0 for padding."""
        epoch, part = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.processes
        rows = np.arange(self.process * share, (self.process + 1) * share)
        places = part * self.batch_size + rows
        order = _permutation(self.seed, epoch, self.count)
        return order[np.minimum(places, self.count - 1)], rows, (places < self.count).astype(np.float32)

    def real(self, step: int) -> np.ndarray:
        """The examples that count."""
        examples, _, weight = self(step)
        return examples[weight > 0]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return np.asarray(jax.random.permutation(key, count))


def batch_of(dataset: Dataset, sampler: Sampler, step: int) -> Batch:
    """The training batch of a step, this process's part.

    >>> digits = load("digits")
    >>> batch_of(digits, Sampler(len(digits.train), 32), 0).x.shape
    (32, 8, 8, 1)
    """
    examples, rows, weight = sampler(step)
    return Batch(dataset.images(dataset.train.x[examples]), dataset.train.labels[examples], rows, weight)


# --- augmentation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random crops and flips, with a key per example: `augment(keys, x) -> x`, jittable.

    Args:
        crop: an image is moved by up to so many pixels in each direction; black comes in (0, as in the released code).
        flip: mirrored left to right with probability one half.

    Reference: Zhang et al. 2020, appendix C and D: random horizontal flips and random crops for CIFAR-10.

    >>> Augment()(jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 3)
    """

    crop: int = 4
    flip: bool = True

    def __call__(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        """The images (batch, height, width, channels), each by its own key."""
        return jax.vmap(self._one)(keys, x)

    def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
        places, side = jax.random.split(key)
        if self.crop:
            at = jax.random.randint(places, (2,), 0, 2 * self.crop + 1)
            padded = jnp.pad(image, ((self.crop, self.crop), (self.crop, self.crop), (0, 0)))
            image = jax.lax.dynamic_slice(padded, (at[0], at[1], 0), image.shape)
        if self.flip:
            image = jnp.where(jax.random.bernoulli(side), image[:, ::-1], image)
        return image
