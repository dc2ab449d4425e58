"""A user's own network and data by an import path, `module:attribute`, or arrays in an .npz file."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from jaxbound import errors
from jaxbound.training.data import Dataset, Examples
from jaxbound.training.step import Trainable


def is_own(name: str) -> bool:
    """Whether a name is an import path or a file, and no name of jaxbound's.

    >>> is_own("mnist"), is_own("my_module:network"), is_own("arrays.npz")
    (False, True, True)
    """
    return ":" in name or name.endswith(".npz")


def attribute(option: str, name: str) -> Any:
    """What `module:attribute` names, from the current folder too; a function of no arguments is called.

    Raises:
        ArgumentError: with the option's name; it cannot be imported.
    """
    module, _, path = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return found() if inspect.isfunction(found) and not required(found) else found
    except errors.JaxboundError:
        raise
    except (Exception, SystemExit) as fault:  # whatever the module does
        raise errors.argument(option, f"{name!r} cannot be imported ({type(fault).__name__}: {fault})") from fault
    finally:
        sys.path.remove(os.getcwd())


def required(function: Callable) -> list[str]:
    """The arguments that a function cannot do without."""
    empty = inspect.Parameter.empty
    return [name for name, given in inspect.signature(function).parameters.items() if given.default is empty]


def network(name: str) -> Trainable:
    """A Linen or NNX module by its import path.

    Raises:
        ArgumentError: it cannot be imported, or is something else.
    """
    found = attribute("models", name)
    if not isinstance(found, nn.Module | nnx.Module):
        raise errors.argument("models", f"{name!r} is a {type(found).__name__}", "name a Linen or an NNX module")
    return found


def dataset(name: str) -> Dataset:
    """Training and test examples.

    Args:
        name: an .npz file with `x`, `labels`, `test_x` and `test_labels`, or the import path of a `Dataset` or of
            `((x, labels), (test_x, test_labels))`. Bytes are divided by 255.

    Raises:
        ArgumentError: they are not there, or of unequal shapes.
    """
    if name.endswith(".npz"):
        x, labels, test_x, test_labels = _arrays(Path(name))
    else:
        found = attribute("dataset", name)
        if isinstance(found, Dataset):
            return found
        try:
            (x, labels), (test_x, test_labels) = found
        except (TypeError, ValueError):
            way_out = "name ((x, labels), (test_x, test_labels)), or a jaxbound.training.data.Dataset"
            raise errors.argument("dataset", f"{name!r} is a {type(found).__name__}", way_out) from None
    train, test = _examples(name, x, labels), _examples(name, test_x, test_labels)
    if train.x.shape[1:] != test.x.shape[1:] or train.x.dtype != test.x.dtype:
        shapes = f"{train.x.dtype}{train.x.shape} and {test.x.dtype}{test.x.shape}"
        raise errors.argument(
            "dataset", f"{name!r} holds {shapes}", "training and test examples have one shape and dtype"
        )
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return Dataset(name, train, test, 255.0 if train.x.dtype == np.uint8 else 1.0, classes=classes)


def _arrays(path: Path) -> list[np.ndarray]:
    keys = ("x", "labels", "test_x", "test_labels")
    try:
        with np.load(path) as arrays:
            missing = [key for key in keys if key not in arrays]
            found = [arrays[key] for key in keys if key in arrays]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as fault:
        raise errors.argument(
            "dataset", f"{str(path)!r} cannot be read ({fault})", "write it with numpy.savez"
        ) from fault
    if missing:
        raise errors.argument("dataset", f"{str(path)!r} lacks {', '.join(missing)}", f"it needs {', '.join(keys)}")
    return found


def _examples(name: str, x: Any, labels: Any) -> Examples:
    x, labels = np.asarray(x), np.asarray(labels)
    if x.ndim < 2 or not len(x) or labels.shape != x.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise errors.argument(
            "dataset", f"{name!r} holds x {x.shape} and labels {labels.dtype}{labels.shape}",
            "the first axis is the examples', labels are numbers of classes",
        )  # fmt: skip
    return Examples(x if x.dtype == np.uint8 else x.astype(np.float32), labels.astype(np.int32))
