"""Examples to certify, wherever they are: arrays in a file, folders of images, data sets of TFDS and scikit-learn."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxbound import errors
from jaxbound.training import data, imported

_X, _LABELS = ("test_x", "x", "image", "images", "inputs"), ("test_labels", "labels", "label", "y")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""Endings of the files that an image folder may hold."""


def read(
    source: str, count: int = 0, data_dir: str | None = None, inputs: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray | None]:
    """Examples and their classes.

    Args:
        source: an .npz file with `x` (or `image`, `images`, `inputs`) and perhaps `labels` (or `label`, `y`), or with
            `test_x` and `test_labels`, which are then meant; a folder with a folder of images per class, in the order
            of their names; a name of `data.SOURCES`, or the import path of a user's own data set
            (`training.imported`), for its test set; or `sklearn:NAME`, such as `sklearn:iris`.
        count: the first so many; 0 for all.
        data_dir: where TFDS keeps prepared data sets.
        inputs: what several inputs of a network are called: an .npz file may hold an array for each instead of x.

    Returns:
        x, floating; arrays of bytes and images as float32 in [0, 1]; several inputs flat, one behind the other. Labels,
        int32, or None where there are none, or they are no numbers of classes.

    Raises:
        ArgumentError: no such source, or one that cannot be read.

    >>> x, labels = read("sklearn:iris", count=5)
    >>> x.shape, labels
    ((5, 4), array([0, 0, 0, 0, 0], dtype=int32))
    """
    path, stop = Path(source), count or None
    if source in data.SOURCES:
        dataset = data.load(source, data_dir, splits=("test",))
        return dataset.images(dataset.test.x[:stop]), dataset.test.labels[:stop]
    if source.startswith("sklearn:"):
        x, labels = _sklearn(source.partition(":")[2])
    elif path.is_dir():
        return _images(path, stop)
    elif ":" in source:
        dataset = imported.dataset(source)
        return dataset.images(dataset.test.x[:stop]), dataset.test.labels[:stop]
    elif source.endswith(".npz") and path.is_file():
        x, labels = _arrays(path, inputs)
    else:
        known = f"an .npz file, a folder of images, sklearn:NAME, module:attribute, or one of {', '.join(data.SOURCES)}"
        raise errors.argument("data", f"is {source!r}", f"pass {known}")
    if x.ndim < 2 or len(x) == 0 or (labels is not None and labels.shape != x.shape[:1]):
        shapes = f"x {x.shape}" + ("" if labels is None else f" and labels {labels.shape}")
        raise errors.argument("data", f"{source!r} holds {shapes}", "the first axis is the examples'")
    return _floating(x[:stop]), None if labels is None else _classes(labels[:stop])


def _classes(labels: np.ndarray) -> np.ndarray | None:
    """Numbers of classes, which the targets of a regression are not."""
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.all(labels == np.trunc(labels)))
    return labels.astype(np.int32) if whole else None


def _floating(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind not in "iubf":
        raise errors.argument("data", f"holds x of {x.dtype}", "pass real numbers")
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def _arrays(path: Path, inputs: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(path) as arrays:
            x = [arrays[name] for name in _X if name in arrays]
            several = [arrays[name] for name in inputs if name in arrays]
            labels = [arrays[name] for name in _LABELS if name in arrays]
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as fault:
        raise errors.argument("data", f"{str(path)!r} is no .npz file", "write one with numpy.savez") from fault
    if inputs and len(several) == len(inputs):
        x = [_joined(several)]
    if not x:
        named = f"name them {', '.join(inputs)}" if inputs else f"name it one of {', '.join(_X)}"
        raise errors.argument("data", f"{str(path)!r} has no array x", named)
    return x[0], labels[0] if labels else None


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Several inputs as one, each flat."""
    if len({np.shape(part)[:1] for part in parts}) != 1 or not parts[0].ndim:
        shapes = [part.shape for part in parts]
        raise errors.argument("data", f"holds inputs of shapes {shapes}", "the first axis is the examples'")
    return np.concatenate([_floating(part).reshape(len(part), -1) for part in parts], axis=1)


def _images(folder: Path, stop: int | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ImportError as missing:
        raise errors.ArgumentError("image folders need pillow: pip install 'jaxbound[experiments]'") from missing
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [
        (path, k) for k, of in enumerate(classes) for path in sorted(of.iterdir()) if path.suffix.lower() in IMAGES
    ]
    if not files:
        raise errors.argument("data", f"{str(folder)!r} holds no folder of images per class")
    x = [np.asarray(Image.open(path)) for path, _ in files[:stop]]
    if len({image.shape for image in x}) > 1:
        raise errors.argument("data", f"{str(folder)!r} holds images of different sizes", "scale them first")
    stacked = np.stack(x)
    stacked = stacked[..., None] if stacked.ndim == 3 else stacked
    return _floating(stacked), np.asarray([k for _, k in files[:stop]], np.int32)


def _sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as missing:
        raise errors.ArgumentError("sklearn:NAME needs scikit-learn: pip install 'jaxbound[experiments]'") from missing
    known = {each.removeprefix("load_") for each in dir(datasets) if each.startswith("load_")}
    if name not in known:
        raise errors.unknown_option("data", name, sorted(known))
    x, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    return np.asarray(x, np.float32), np.asarray(labels)
