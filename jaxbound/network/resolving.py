"""What a user hands over as a network, as a hashable function of one example.

Parameters beside an `apply_fn`, Linen and NNX modules, train states, Equinox, Haiku and Keras models, loaded files and
chains of Dense layers: each becomes `(variables, example) -> output` without a batch axis, so that equal networks share
one graph. Everything before this room bounds functions; what knows Flax is here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.core.meta
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbound import errors, regions
from jaxbound.network import independence
from jaxbound.network.functions import ARRAY, Applied, Chain, Linen, Merged, OfTuple, Rebuilt, Stateless
from jaxbound.network.inputs import example_structs, is_several, leaves_of, struct_of
from jaxbound.network.model import Model
from jaxbound.regions import is_region


class Network(NamedTuple):
    """A function of one example and the variables it takes.

    `batched` says whether the given x has a batch axis.
    """

    function: Callable
    variables: object
    batched: bool


def per_example_function(
    params: Any, x: Any, apply_fn: Callable | None, activation: str | Callable | None
) -> tuple[Callable, object, object]:
    """A network as `(fn, variables, x)` with `fn(variables, example)` and x a batch.

    Args:
        params, apply_fn, activation: see `resolve`.
        x: a batch, or one example of a Dense chain, which then gets a batch axis.
    """
    network = resolve(params, x, apply_fn, activation)
    return network.function, network.variables, x if network.batched else jnp.asarray(x)[None]


def resolve(
    params: Any,
    x: Any,
    apply_fn: Any,
    activation: str | Callable | None = None,
    *,
    certificate: str = "",
    weights: bool = False,
) -> Network:
    """Find out what a network is.

    Args:
        params: a variables dict, a bare parameter tree, a `TrainState`; a bound Linen module, an NNX module, a callable
            pytree of one example (Equinox), a Keras model, a `Model`; or Dense layers: a list of `(kernel, bias)` or
            `{"kernel", "bias"}`, or a tree of layers named with a common prefix and an integer.
        x: the input, array or region, or several in a tuple, list or dict; of a `Model` in a tuple, in its order.
        apply_fn: a Linen module or its `apply` (bare trees are wrapped as `{"params": ...}`), or any
            `f(params, batch)`, to which modules go as they are and a `TrainState` as its variables.
        activation: between Dense layers without `apply_fn`: a name in `jax.nn` or `jax.numpy`, or a callable. None for
            ReLU, which is then an assumption, as the order of the layers by their names is.
        certificate: the function that gives a certificate, which rests on no assumption.
        weights: whether params may hold regions.

    Raises:
        ArgumentError: the parameters are ambiguous, the network cannot be evaluated, or it mixes the examples of a
            batch; the message says what to pass.

    Warns:
        AssumedNetworkWarning: what network the parameters are taken for, or that random numbers are drawn.
    """
    if not weights and any(map(is_region, leaves_of(params))):
        raise errors.argument("params", "hold regions", "bound a function of its weights by jaxbound.bound(fn, method)")
    if isinstance(params, Model):
        return _of_model(params, x, apply_fn)
    network = _module(params, x, apply_fn)
    if network is None:
        _check_single(x)
        return _chain(_plain(params), x, activation, certificate)
    struct = _struct(x)
    if struct is not None:
        independence.check(network.function, network.variables, struct)
    return network


def _module(params: Any, x: Any, apply_fn: Any) -> Network | None:
    """The network that a module, a state or apply_fn says; None where there is none of them."""
    if isinstance(apply_fn, nn.Module):
        apply_fn = apply_fn.apply
    if isinstance(apply_fn, type):
        raise errors.argument_type("apply_fn", f"is the class {apply_fn.__name__}", "pass model.apply of an instance")
    if apply_fn is not None and not callable(apply_fn):
        way_out = "pass a function (variables, batch) -> outputs; for Haiku haiku.without_apply_rng(transformed).apply"
        raise errors.argument_type("apply_fn", f"is a {type(apply_fn).__name__}", way_out)
    if isinstance(params, nnx.Module):
        definition, state = nnx.split(_evaluation_view(params))
        return Network(Merged(definition, apply_fn and _hashable(apply_fn)), state, True)
    if isinstance(params, nn.Module):
        if params.scope is None:
            raise errors.argument("params", "are a module without variables", "pass model.bind(variables)")
        module, variables = params.unbind()
        return Network(Linen(module), _plain(variables), True)
    if hasattr(params, "stateless_call") and apply_fn is None:
        parts = params.trainable_variables, params.non_trainable_variables
        values = [[variable.value for variable in part] for part in parts]
        return Network(Stateless(params), values, True)
    if callable(getattr(params, "apply_fn", None)) and hasattr(params, "params"):
        apply_fn, params = apply_fn or params.apply_fn, _state_variables(params)
    leaves, tree = jax.tree.flatten(params)
    if callable(params) and not jax.tree_util.treedef_is_leaf(tree):
        arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
        rest = tuple(ARRAY if hasattr(leaf, "dtype") else leaf for leaf in leaves)
        return Network(Rebuilt(tree, rest, apply_fn and _hashable(apply_fn)), arrays, True)
    if apply_fn is None:
        return None
    params = _plain(params)
    if _is_linen(apply_fn) and not (isinstance(params, Mapping) and "params" in params):
        params = {"params": params}
    return Network(Applied(_hashable(apply_fn)), params, True)


def _struct(x: Any):
    """One example of a batch; None where x is none, which is refused elsewhere."""
    leaves = leaves_of(x)
    if not leaves or not all(is_region(leaf) or hasattr(leaf, "dtype") for leaf in leaves):
        return None
    found = list(map(struct_of, leaves))
    if not all(struct.shape for struct in found) or not any(jnp.issubdtype(s.dtype, jnp.floating) for s in found):
        return None
    return example_structs(x, batched=True)


def _check_single(x: Any) -> None:
    if is_several(x):
        raise errors.argument_type("x", f"is a {type(x).__name__}", "pass one array, or apply_fn(params, x) beside it")


def _chain(params: Any, x: Any, activation: str | Callable | None, certificate: str) -> Network:
    """A chain of Dense layers, assumed or said."""
    names, layers = _dense_chain(params)
    if activation is None:
        widths = [_shape(layers[0][0])[0], *(_shape(kernel)[1] for kernel, _ in layers)]
        shown = widths if len(widths) < 8 else [*widths[:3], "...", *widths[-3:]]
        shape = f"{' -> '.join(map(str, shown))} with relu between its layers, in the order of their names"
        if certificate:
            raise errors.ArgumentError(
                f"{certificate} does not guess the network, which may be a Dense chain {shape}, or not: pass "
                'apply_fn=model.apply, a module, a TrainState, or activation="relu" if it is'
            )
        errors.warn_once(
            f"the parameters are taken for a Dense chain {shape}: pass activation=\"relu\" if that is so, and "
            "apply_fn=model.apply if not",
            errors.AssumedNetworkWarning, (tuple(_shape(kernel) for kernel, _ in layers), names),
        )  # fmt: skip
    function = Chain(_activation("relu" if activation is None else activation))
    size = _shape(layers[0][0])[0]
    shape = regions.leaf_struct(x).shape if is_region(x) else np.shape(x)
    if len(shape) > 1 and int(np.prod(shape[1:])) == size:
        return Network(function, layers, True)
    if int(np.prod(shape)) == size:
        return Network(function, layers, False)
    raise errors.ArgumentError(
        f"x has shape {shape}, but the first kernel takes {size} numbers: pass x of shape (batch, {size}) or ({size},)"
    )


def _of_model(model: Model, x: Any, apply_fn: Callable | None) -> Network:
    if apply_fn is not None:
        raise errors.argument("apply_fn", "is given beside a Model, which is a function already", "leave it out")
    if len(model.input_shapes) == 1:
        _check_single(x)
        return Network(model.fn, model.params, model.is_batch(_shape(x)))
    if not isinstance(x, tuple | list):
        wanted = f"pass a tuple of the inputs {', '.join(model.input_name)}, or model.flat for params"
        raise errors.argument_type("x", f"is a {type(x).__name__}", wanted)
    if not model.is_batch(*map(_shape, x)):
        raise errors.argument("x", "is one example of several inputs", "give each a batch axis of 1")
    return Network(OfTuple(model.fn), model.params, True)


def _evaluation_view(module: Any):
    """The module as it is evaluated: deterministic, with running averages; the module itself is not touched."""
    return nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)


def _state_variables(state: Any) -> dict:
    if isinstance(state.params, Mapping) and "params" in state.params:
        return dict(state.params)
    variables = {"params": state.params}
    for collection in ("batch_stats",):
        if getattr(state, collection, None) is not None:
            variables[collection] = getattr(state, collection)
    return variables


def _plain(params: Any):
    """Without boxes (`Partitioned`) and frozen dicts."""
    params = flax.core.meta.unbox(params)
    return flax.core.unfreeze(params) if isinstance(params, flax.core.FrozenDict) else params


def _is_linen(apply_fn: Callable) -> bool:
    while isinstance(apply_fn, functools.partial):
        apply_fn = apply_fn.func
    return isinstance(getattr(apply_fn, "__self__", None), nn.Module)


@dataclass(frozen=True)
class _Partial:
    """A `functools.partial` that compares by its contents."""

    func: Callable
    args: tuple
    keywords: tuple

    def __call__(self, *args: Any):
        return self.func(*self.args, *args, **dict(self.keywords))


def _hashable(apply_fn: Callable) -> Callable:
    if isinstance(apply_fn, functools.partial):
        return _Partial(apply_fn.func, apply_fn.args, tuple(sorted(apply_fn.keywords.items())))
    return apply_fn


def _activation(activation: str | Callable) -> Callable:
    if callable(activation):
        return activation
    for module in (jax.nn, jnp) if isinstance(activation, str) else ():
        if callable(getattr(module, activation, None)):
            return getattr(module, activation)
    raise errors.ArgumentError(f"activation={activation!r} is not a function of jax.nn or jax.numpy: pass a callable")


def _dense_chain(params: Any) -> tuple[tuple, tuple]:
    """The names, and the kernels and biases, of a chain of Dense layers, or an error that says why it is not one."""
    layers, names = params["params"] if isinstance(params, Mapping) and set(params) == {"params"} else params, ()
    if isinstance(layers, Mapping):
        names = tuple(_in_order(list(layers)))
        layers = [layers[name] for name in names]
    if not isinstance(layers, list | tuple) or not layers:
        raise _ambiguous(f"the parameters are a {type(params).__name__}")
    chain = []
    for number, layer in enumerate(layers):
        if isinstance(layer, Mapping) and set(layer) in ({"kernel"}, {"kernel", "bias"}):
            kernel, bias = layer["kernel"], layer.get("bias")
        elif isinstance(layer, tuple | list) and len(layer) == 2:
            kernel, bias = layer
        else:
            raise _ambiguous(f"layer {number} is not a kernel and a bias")
        kernel, bias = (leaf if leaf is None or is_region(leaf) else jnp.asarray(leaf) for leaf in (kernel, bias))
        shape, own = _shape(kernel), None if bias is None else _shape(bias)
        if len(shape) != 2 or own not in (None, shape[1:]):
            raise _ambiguous(f"layer {number} has kernel {shape} and bias {own}")
        if chain and _shape(chain[-1][0])[1] != shape[0]:
            raise _ambiguous(f"layer {number} takes {shape[0]} numbers, not the {_shape(chain[-1][0])[1]} made before")
        chain.append((kernel, bias))
    return names, tuple(chain)


def _shape(leaf: Any) -> tuple[int, ...]:
    return struct_of(leaf).shape


def _in_order(names: list[str]) -> list[str]:
    parts = [match.groups() for name in names if (match := re.fullmatch(r"(.*?)(\d+)", str(name)))]
    if not names or len(parts) < len(names) or len({prefix for prefix, _ in parts}) != 1:
        raise _ambiguous(f"the layers are named {sorted(map(str, names))}, not with one prefix and an integer")
    numbers = {name: int(number) for name, (_, number) in zip(names, parts, strict=True)}
    return sorted(names, key=numbers.__getitem__)


def _ambiguous(why: str) -> errors.ArgumentError:
    return errors.ArgumentError(f"these parameters are not a chain of Dense layers ({why}): pass apply_fn=model.apply")
