"""From Flax to a function of one example: parameters, train states, NNX modules and chains of Dense layers.

Length: one room, what a network is and the functions that bound it; their shared docstring is a third of it.

Everything above this file bounds functions; everything that knows Flax is here. A network becomes a hashable callable
`(variables, example) -> output` without a batch axis, so that equal networks share one graph, and the functions named
after methods bound it over a ball around every example of a batch:

    ibp | forward | fastlin | crown | crown_ibp | frown | cap (params, x, eps, ...) -> Interval(lower, upper)
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import flax.core.meta
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.methods import domains
from jaxbound.network import independence
from jaxbound.regions.bounds import Estimate, Interval
from jaxbound.network.functions import ARRAY, Applied, Chain, Linen, Merged, Rebuilt, Specified, Stateless
from jaxbound.methods import IBP, Bounded, Crown, CrownIBP, FastLin, Forward, Method, Request
from jaxbound.network.model import Model
from jaxbound.methods.polytope import ConvexPolytope
from jaxbound.regions import LpBall, Region, is_region
from jaxbound.backend.sharding import anywhere
from jaxbound.transforms.transform import Problem, prepare
from jaxbound.methods.tuning import Frown
from jaxbound.graph.values import Inexact, plain

MEMORY_LIMIT = 1 << 30
"""Bytes that the coefficients of one backward pass may take by default."""


class Network(NamedTuple):
    """A function of one example and the variables it takes.

    `batched` says whether the given x has a batch axis.
    """

    function: Callable
    variables: object
    batched: bool


# --- what a network is ------------------------------------------------------------------------------------------------


def per_example_function(params, x, apply_fn, activation) -> tuple[Callable, object, object]:
    """A network as `(fn, variables, x)` with `fn(variables, example)` and x a batch.

    Args:
        params, apply_fn, activation: see `resolve`.
        x: a batch, or one example of a Dense chain, which then gets a batch axis.
    """
    network = resolve(params, x, apply_fn, activation)
    return network.function, network.variables, x if network.batched else jnp.asarray(x)[None]


def resolve(params, x, apply_fn, activation: str | Callable | None = None, *, certificate: str = "") -> Network:
    """Find out what a network is.

    Args:
        params: a variables dict, a bare parameter tree, a `TrainState`; a bound Linen module, an NNX module, a callable
            pytree of one example (Equinox), a Keras model, a `Model`; or Dense layers: a list of `(kernel, bias)` or
            `{"kernel", "bias"}`, or a tree of layers named with a common prefix and an integer.
        x: the input, array or region.
        apply_fn: a Linen module or its `apply` (bare trees are wrapped as `{"params": ...}`), or any
            `f(params, batch)`, to which modules go as they are and a `TrainState` as its variables.
        activation: between Dense layers without `apply_fn`: a name in `jax.nn` or `jax.numpy`, or a callable. None for
            ReLU, which is then an assumption, as the order of the layers by their names is.
        certificate: the function that gives a certificate, which rests on no assumption.

    Raises:
        ArgumentError: the parameters are ambiguous, the network cannot be evaluated, or it mixes the examples of a
            batch; the message says what to pass.

    Warns:
        AssumedNetworkWarning: what network the parameters are taken for, or that random numbers are drawn.
    """
    if any(map(is_region, jax.tree.leaves(params, is_leaf=is_region))):
        raise errors.argument("params", "hold regions", "bound a function of its weights by jaxbound.bound(fn, method)")
    if isinstance(params, Model):
        return _of_model(params, regions.leaf_struct(x).shape if is_region(x) else np.shape(x), apply_fn)
    network = _module(params, x, apply_fn)
    if network is None:
        return _chain(_plain(params), x, activation, certificate)
    struct = _struct(x)
    if struct is not None:
        independence.check(network.function, network.variables, struct)
    return network


def _module(params, x, apply_fn) -> Network | None:
    """The network that a module, a state or apply_fn says; None where there is none of them."""
    if isinstance(apply_fn, nn.Module):
        apply_fn = apply_fn.apply
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


def _struct(x) -> jax.ShapeDtypeStruct | None:
    """One example of a batch; None where x is none, which is refused elsewhere."""
    if not is_region(x) and not hasattr(x, "dtype"):
        return None
    shape = lambda array: jax.ShapeDtypeStruct(np.shape(array), jnp.result_type(array))  # noqa: E731
    struct = regions.leaf_struct(x) if is_region(x) else shape(x)
    if not struct.shape or not jnp.issubdtype(struct.dtype, jnp.floating):
        return None
    return jax.ShapeDtypeStruct(struct.shape[1:], struct.dtype)


def _chain(params, x, activation, certificate: str) -> Network:
    """A chain of Dense layers, assumed or said."""
    names, layers = _dense_chain(params)
    if activation is None:
        widths = [layers[0][0].shape[0], *(kernel.shape[1] for kernel, _ in layers)]
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
            errors.AssumedNetworkWarning, (tuple(kernel.shape for kernel, _ in layers), names),
        )  # fmt: skip
    function = Chain(_activation("relu" if activation is None else activation))
    size = layers[0][0].shape[0]
    shape = regions.leaf_struct(x).shape if is_region(x) else np.shape(x)
    if len(shape) > 1 and int(np.prod(shape[1:])) == size:
        return Network(function, layers, True)
    if int(np.prod(shape)) == size:
        return Network(function, layers, False)
    raise errors.ArgumentError(
        f"x has shape {shape}, but the first kernel takes {size} numbers: pass x of shape (batch, {size}) or ({size},)"
    )


def _of_model(model: Model, shape: tuple[int, ...], apply_fn: Callable | None) -> Network:
    if apply_fn is not None:
        raise errors.argument("apply_fn", "is given beside a Model, which is a function already", "leave it out")
    return Network(model.fn, model.params, model.is_batch(shape))


def _evaluation_view(module):
    """The module as it is evaluated: deterministic, with running averages; the module itself is not touched."""
    return nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)


def _state_variables(state) -> dict:
    if isinstance(state.params, Mapping) and "params" in state.params:
        return dict(state.params)
    variables = {"params": state.params}
    for collection in ("batch_stats",):
        if getattr(state, collection, None) is not None:
            variables[collection] = getattr(state, collection)
    return variables


def _plain(params):
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

    def __call__(self, *args):
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


def _dense_chain(params) -> tuple[tuple, tuple]:
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
        kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
        if kernel.ndim != 2 or (bias is not None and bias.shape != kernel.shape[1:]):
            shape = None if bias is None else bias.shape
            raise _ambiguous(f"layer {number} has kernel {kernel.shape} and bias {shape}")
        if chain and chain[-1][0].shape[1] != kernel.shape[0]:
            raise _ambiguous(
                f"layer {number} takes {kernel.shape[0]} numbers, not the {chain[-1][0].shape[1]} made before"
            )
        chain.append((kernel, bias))
    return names, tuple(chain)


def _in_order(names: list[str]) -> list[str]:
    parts = [match.groups() for name in names if (match := re.fullmatch(r"(.*?)(\d+)", str(name)))]
    if not names or len(parts) < len(names) or len({prefix for prefix, _ in parts}) != 1:
        raise _ambiguous(f"the layers are named {sorted(map(str, names))}, not with one prefix and an integer")
    numbers = {name: int(number) for name, (_, number) in zip(names, parts, strict=True)}
    return sorted(names, key=numbers.__getitem__)


def _ambiguous(why: str) -> errors.ArgumentError:
    return errors.ArgumentError(f"these parameters are not a chain of Dense layers ({why}): pass apply_fn=model.apply")


# --- bounding a network -----------------------------------------------------------------------------------------------


def example_of(network: Network, region: Region) -> jax.ShapeDtypeStruct:
    """One example of what a region stands for."""
    struct = regions.leaf_struct(region)
    return jax.ShapeDtypeStruct(struct.shape[1:] if network.batched else struct.shape, struct.dtype)


def region_around(params, x, eps, norm: float, clip, *, batched: bool) -> Region:
    """One ball per example, or the region that x already is.

    Raises:
        ArgumentError: x is an array and eps is missing, or x is a region and eps is given.
    """
    if is_region(x):
        given = [
            name
            for name, set_ in (("eps", eps is not None), ("norm", norm != np.inf), ("clip", clip is not None))
            if set_
        ]
        if given:
            raise errors.ArgumentError(f"x is a region already: leave {' and '.join(given)} out")
        regions.validate(x, "x")
        return regions.canonical(x)
    check_types(x, eps)
    if not isinstance(norm, int | float | np.number):
        raise errors.argument("norm", f"is {norm!r}", "pass a number p >= 1, such as 1, 2 or jnp.inf")
    if batched and np.shape(x)[:1] == (0,):
        raise errors.argument("x", "is a batch of no examples", "pass at least one")
    given = jnp.result_type(x)
    if not jnp.issubdtype(given, jnp.floating):
        raise errors.ArgumentTypeError(
            f"x has dtype {given}: integers have no neighbourhood; divide images by 255 first"
        )
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    dtype = jnp.result_type(*floats, x)
    x = _compat.owned(x, dtype)
    eps = radii(eps, x.shape, norm, batched=batched)
    region = LpBall(x, eps, norm, clip=clip, batch_ndim=1 if batched else 0)
    regions.validate(region, "x and eps")
    return regions.canonical(region)


def radii(eps: ArrayLike, shape: tuple[int, ...], norm: float, *, batched: bool) -> ArrayLike:
    """Radii as a ball takes them: one, one per example, or, where eps has as many axes as x, one per feature.

    Args:
        eps: shape (), (batch,), or (1 or batch, *example shape), of which some axes may be 1 (per channel), not all.
        shape: that of x.
        norm: with radii per feature the ball is a box.
        batched: whether x has a batch axis.

    >>> radii(np.array([[0.5, 0.25]]), (3, 2), np.inf, batched=True).shape
    (3, 2)
    """
    given, whole = np.shape(eps), shape if batched else (1, *shape)
    if given == () or (batched and given == shape[:1]):
        return eps
    own = given if batched or len(given) > len(shape) else (1, *given)
    fits = len(own) == len(whole) > 1 and all(size in (1, most) for size, most in zip(own, whole, strict=True))
    if not fits or (set(own[1:]) == {1} and set(whole[1:]) != {1}):
        features = (1, *whole[1:])
        raise errors.ArgumentError(
            f"eps has shape {given}: pass one radius, or one per example, ({whole[0]},), or per feature, {features}"
        )
    if norm != np.inf:
        raise errors.argument("eps", f"has shape {given} and norm is {norm:g}", "radii per feature need norm=jnp.inf")
    xp = jnp if isinstance(eps, jax.Array) else np
    return xp.broadcast_to(eps if batched else xp.reshape(eps, own)[0], shape)


def check_types(x, eps) -> None:
    """Refuse inputs and radii that are no arrays."""
    if eps is None:
        raise errors.ArgumentError("pass eps, the radius of the ball around each example, or a region as x")
    if isinstance(x, tuple | list | Mapping):
        raise errors.argument_type(
            "x", f"is a {type(x).__name__}", "pass an array; several inputs go through jaxbound.bound(fn, method)"
        )
    for name, value in (("x", x), ("eps", eps)):
        if not hasattr(value, "dtype") and (name == "x" or not isinstance(value, int | float)):
            raise errors.argument_type(name, f"is a {type(value).__name__}", "pass an array")


def problem_of(network: Network, region: Region, spec, *, rounding: bool = False) -> Problem:
    """The network over a region, with a specification composed, ready for a method (see `transform.prepare`)."""
    region = regions.per_example(region) if network.batched else region
    arguments, batch = (network.variables, region), None
    if network.batched:
        batch = [False] * len(jax.tree.leaves(network.variables)) + [True]
    if spec is None:
        return prepare(network.function, arguments, batch, rounding=rounding)
    if np.ndim(spec) not in (2, 3):
        raise errors.ArgumentError(f"spec has shape {np.shape(spec)}: pass (specs, outputs) or (batch, specs, outputs)")
    _check_spec(network, region, np.shape(spec))
    batch = None if batch is None else [*batch, np.ndim(spec) == 3]
    return prepare(Specified(network.function), (*arguments, spec), batch, rounding=rounding)


def output_struct(network: Network, region: Region):
    """The shapes and dtypes of one example's outputs; traced once per function and shapes."""
    example = example_of(network, region)
    leaves, tree = jax.tree.flatten(network.variables)
    try:
        avals = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        return _output_struct(network.function, tree, avals, example, jnp.result_type(float))
    except (AttributeError, TypeError):  # a Python number among the variables, or an unhashable callable
        return jax.eval_shape(network.function, network.variables, example)


@functools.lru_cache(maxsize=64)
def _output_struct(function: Callable, tree, avals: tuple, example: jax.ShapeDtypeStruct, _default_dtype):
    return jax.eval_shape(function, jax.tree.unflatten(tree, avals), example)


def _check_spec(network: Network, region: Region, shape: tuple[int, ...]) -> None:
    outputs = output_struct(network, region)
    size = int(np.prod(outputs.shape))
    if shape[-1] != size:
        raise errors.ArgumentError(f"spec has shape {shape}, but the network has {size} outputs")
    batch = jax.tree.leaves(region)[0].shape[:1] if network.batched else ()
    if len(shape) == 3 and shape[:1] != batch:
        raise errors.ArgumentError(f"spec has shape {shape}, but x has {batch[0] if batch else 'no'} examples")


def request_of(
    problem: Problem, memory_limit: int | None, *, sides: str = "both", rounding: bool | str = False
) -> Request:
    """How many rows fit into the memory limit."""
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    graph = problem.graph
    batch = 1 if graph.axes is None else jax.tree.leaves(problem.leaves)[0].shape[0]
    row = max(node.op.size * node.op.dtype.itemsize for node in graph.nodes) * batch * 3
    return Request(sides, rounding, int(np.clip(limit // row, 16, 1 << 14)))


@anywhere
def bound_network(
    method: Method, params, x, eps=None, *, apply_fn=None, activation=None, norm=np.inf, clip=None, spec=None,
    sides="both", memory_limit=None,
) -> Interval | Estimate:  # fmt: skip
    """Bounds of a network's outputs, or of linear specifications of them, over a ball around every example.

    `lower <= spec @ f(x') <= upper` for every x' with `||x' - x||_norm <= eps`, and `clip[0] <= x' <= clip[1]`.

    Args:
        method: how to bound.
        params: variables dict, bare parameters, `TrainState`, module, `Model` or Dense layers; see `resolve`.
        x: floating, `(batch, *example shape)`; one example for a Dense chain or `Model`; or a region, and then no eps.
        eps: radius in the given norm, shape () or (batch,); for norm=inf also per feature or channel, with as many
            axes as x.
        apply_fn: the network, `apply_fn(variables, batch)`; not needed for a chain of Dense layers.
        activation: between Dense layers where there is no apply_fn; ReLU, with a warning, if it is not given.
        norm: p >= 1, `jnp.inf` included.
        clip: None or `(low, high)`: the range of valid inputs.
        spec: None, (specs, outputs) or (batch, specs, outputs), composed with the network's last affine map.
        sides: "both", or "lower" at half the cost (`upper` is None).
        memory_limit: bytes that the coefficients of a backward pass may take.

    Returns:
        `Interval` of shape (batch, outputs or specs); without batch axis for one example. `Estimate` from a method
        whose guarantee is "estimate".

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: with what to do instead.

    Rounding: up to that of the computation; see docs/guarantee.md.
    """
    if sides not in ("both", "lower"):
        raise errors.unknown_option("sides", sides, ("both", "lower"))
    network = resolve(params, x, apply_fn, activation)
    region = region_around(network.variables, x, eps, norm, clip, batched=network.batched)
    problem = problem_of(network, region, spec)
    (found,) = outputs_of(problem, method, request_of(problem, memory_limit, sides=sides))
    return method.result(found.lower, found.upper)


def outputs_of(problem: Problem, method: Method, request: Request) -> list[Bounded]:
    """Bounds of all outputs; those that no region reaches are their own bounds."""
    found = iter(domains.bound(method, problem.graph, problem.leaves, request))
    results = []
    for kind, number in problem.graph.structure.outputs:
        if kind == "node":
            results.append(next(found))
            continue
        constant = problem.graph.constants[number]
        value = plain(constant)
        error = constant.error if isinstance(constant, Inexact) else jnp.zeros_like(value)
        if problem.graph.axes is not None and problem.graph.axes[number] is None:
            batch = jax.tree.leaves(problem.leaves)[0].shape[0]
            value, error = (jnp.broadcast_to(array, (batch, *array.shape)) for array in (value, error))
        results.append(Bounded(value, value, error, error))
    return results


def _made(name: str, method: type[Method], options: dict) -> Method:
    known = list(inspect.signature(method).parameters)
    for option in options:
        if option not in known:
            way_out = f"its options are {', '.join(known)}" if known else "it has no options"
            raise errors.argument_type(option, f"is no option of {name}", way_out)
    return method(**options)


def _named(name: str, method: type[Method], what: str, reference: str) -> Callable:
    def function(
        params, x, eps=None, *, apply_fn=None, activation=None, norm=np.inf, clip=None, spec=None,
        sides="both", memory_limit=None, **options,
    ) -> Interval | Estimate:  # fmt: skip
        return bound_network(
            _made(name, method, options), params, x, eps, apply_fn=apply_fn, activation=activation, norm=norm,
            clip=clip, spec=spec, sides=sides, memory_limit=memory_limit,
        )  # fmt: skip

    function.__name__ = function.__qualname__ = name
    arguments = (bound_network.__doc__ or "").split("\n\n", 1)[1].replace("        method: how to bound.\n", "")
    end = f"Options of the method: see `{method.__name__}`.\n\n    Reference: {reference}\n    "
    function.__doc__ = f"{what}\n\n    {arguments.strip()}\n\n    {end}"
    return function


ibp = _named("ibp", IBP, "Bounds of a network by interval propagation.", "Gowal et al. 2018, section 3.")
forward = _named("forward", Forward, "Bounds of a network by forward linear bounds.", "Xu et al. 2020, appendix A.")
fastlin = _named("fastlin", FastLin, "Bounds of a network by Fast-Lin.", "Weng et al. 2018, section 3.3.")
crown = _named("crown", Crown, "Bounds of a network by CROWN.", "Zhang et al. 2018, theorem 3.2.")
crown_ibp = _named("crown_ibp", CrownIBP, "Bounds of a network by CROWN-IBP.", "Zhang et al. 2020, section 3.2.")
frown = _named("frown", Frown, "Bounds of a network by FROWN, tuned CROWN.", "Lyu et al. 2020, section 4.")
cap = _named(
    "cap", ConvexPolytope, "Bounds of a network by the convex polytope, or estimates by random projections.",
    "Wong and Kolter 2018, theorem 1; Wong et al. 2018, section 3.2.",
)  # fmt: skip
