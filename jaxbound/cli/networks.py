"""The network that an argument names: an ONNX or Keras file, the folder of a training run, or module:attribute."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbound import errors
from jaxbound.network.model import Model
from jaxbound.training.configuration import Configuration


class Loaded(NamedTuple):
    """A network as `crown` and the like take it."""

    params: Any
    apply_fn: Callable | None = None
    input_shape: tuple[int, ...] | None = None
    """Of one example, where the network says it."""
    run: Configuration | None = None
    """Of the training run that it is from."""
    inputs: tuple[str, ...] = ()
    """What several inputs are called, which are flat and one behind the other here."""


def load(net: str, input_shape: Sequence[int] = ()) -> Loaded:
    """The network that an argument names; of an ONNX file with open sizes, for examples of a shape.

    Raises:
        ArgumentError: there is none, or it cannot be read.
    """
    path = Path(net)
    if net.endswith((".onnx", ".onnx.gz")):
        from jaxbound.frontends import onnx

        return _of_model(onnx.load(path, input_shape=(1, *input_shape) if input_shape else None))
    if net.endswith((".keras", ".h5")):
        return _keras(path)
    return _of_run(path) if path.is_dir() else _imported(net)


def _of_model(model: Model) -> Loaded:
    names = () if isinstance(model.input_name, str) else model.input_name
    return Loaded(model.flat, input_shape=model.flat.input_shape, inputs=names)


def _keras(path: Path) -> Loaded:
    if "keras" not in sys.modules:  # whatever else the user's Keras runs on, files fit every backend
        os.environ["KERAS_BACKEND"] = "jax"
    try:
        import keras
    except ImportError as missing:
        raise errors.ArgumentError("Keras files need the package keras: pip install keras") from missing
    if keras.backend.backend() != "jax":
        raise errors.ArgumentError("Keras runs on another backend: set KERAS_BACKEND=jax")
    try:
        model: Any = keras.saving.load_model(path, compile=False)
    except Exception as fault:  # a broken file may be broken anywhere
        raise errors.argument("net", f"{str(path)!r} cannot be read ({str(fault).splitlines()[0]})") from fault
    shape = model.input_shape[1:] if isinstance(model.input_shape, tuple) else None
    return Loaded(model, input_shape=None if shape is None or None in shape else tuple(shape))


def _of_run(folder: Path) -> Loaded:
    from jaxbound.training import runs

    found = [path.parent for path in folder.rglob("config.json")]
    if len(found) != 1:
        raise errors.argument("net", f"{str(folder)!r} holds {len(found)} training runs", "pass the folder of one")
    config, variables = runs.trained(found[0])
    dataset = runs.described(config)
    apply_fn = runs.apply_of(config, runs.model_in(config, found[0]), dataset)
    return Loaded(variables, apply_fn, dataset.shape, config)


def _imported(net: str) -> Loaded:
    """What module:attribute gives: a network, (parameters, function or module), or a function of no arguments that
    returns one; any other function is the network of a batch."""
    from jaxbound.training.imported import attribute

    found = attribute("net", net)
    if isinstance(found, Model):
        return _of_model(found)
    if isinstance(found, tuple) and len(found) == 2:
        params, apply_fn = found if callable(found[1]) or hasattr(found[1], "apply") else found[::-1]
        return Loaded(params, apply_fn)
    if inspect.isfunction(found):
        return Loaded({}, lambda _, batch: found(batch))
    return Loaded(found)


def shape_of(loaded: Loaded, given: Sequence[int]) -> tuple[int, ...]:
    """The shape of one example.

    Raises:
        ArgumentError: neither the network nor the user says it.
    """
    if given:
        return tuple(given)
    if loaded.input_shape is None:
        raise errors.argument("input_shape", "is not known", "pass --input-shape, such as --input-shape 28 28 1")
    return loaded.input_shape


def of_one_example(loaded: Loaded, shape: tuple[int, ...]) -> tuple[Callable, Any]:
    """The network as `(fn, params)` with `fn(params, x)` of one example, flat or of this shape."""
    if isinstance(loaded.params, Model):
        return loaded.params.fn, loaded.params.params
    from jaxbound.network.resolving import resolve

    network = resolve(loaded.params, np.zeros((1, *shape), np.result_type(float)), loaded.apply_fn)
    return lambda variables, x: network.function(variables, x.reshape(shape)), network.variables


def fitted(x: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """Examples in the shape that a network takes: as they are, channels first, or flat.

    Raises:
        ArgumentError: they do not fit, or only in an order that would be a guess.
    """
    given = x.shape[1:]
    if shape is None or given == shape:
        return x
    if len(given) == 3 and shape == (given[2], *given[:2]):
        return np.ascontiguousarray(np.moveaxis(x, -1, 1))
    if np.prod(given) == np.prod(shape) and (len(given) < 3 or 1 in (given[0], given[2])):
        return x.reshape(len(x), *shape)
    raise errors.argument("data", f"has examples of shape {given}, the network takes {shape}")
