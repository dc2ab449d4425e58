"""Jacobian bounds by any method: RecurJac and Fast-Lip on the chain itself, all others through `jax.jacrev`.

Bounding is a transformation of functions, and so is differentiation: any method bounds the graph of `jax.jacrev(f)`.
There the derivative of a nonlinearity is one scalar function, a step or a smooth bump, times the cotangent; kinks and
ties are covered by the hull of both sides, so the bounds hold for Clarke's Jacobian too.

A derivative says how a function changes only if the function is continuous and the derivative its own. So functions
that may jump are refused, and so is `stop_gradient`. Custom rules that are not JAX's own are left out: what they are
rules of is differentiated as it is written, and where that is within a loop, refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.backend.sharding import anywhere
from jaxbound.graph import Graph
from jaxbound.jacobian import slopes
from jaxbound.jacobian.recurjac import JacobianMethod, RecurJac
from jaxbound.methods import Best, Bounded, Method, better, check_certified
from jaxbound.network.bounding import outputs_of
from jaxbound.network.functions import Specified
from jaxbound.network.inputs import region_around
from jaxbound.network.problems import example_of, problem_of, request_of
from jaxbound.network.resolving import Network, resolve
from jaxbound.regions import Region
from jaxbound.regions.bounds import Interval
from jaxbound.transforms.problems import Problem, forget_stale, prepare

_OWN = PurePath(jax.__file__).parent / "_src"
_TRUSTED = {
    "nn/functions.py": ("relu", "_softmax", "relu6", "log1mexp"),
    "lax/other.py": ("logaddexp", "logaddexp2"),
    "numpy/lax_numpy.py": ("_i0",),
    "numpy/ufuncs.py": ("_sinc_maclaurin",),
    "numpy/linalg.py": ("_slogdet_small", "_slogdet_lu", "_slogdet_qr", "_det", "_pinv"),
    "scipy/special.py": ("logit", "xlogy", "xlog1py", "_xlogx", "log_ndtr", "_erfcx", "_dawsn", "expi", "sici"),
}
"""Functions of JAX that have rules of their own, by file; their rules give their derivatives."""
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call")
_REFUSED = {
    "staircase": "it jumps, and its derivative of 0 does not tell how far",
    "select": "it may jump where the choice changes, and no derivative says how far",
    "stop_gradient": "it hides a part of the derivative",
}


@dataclass(frozen=True)
class Derivative:
    """The Jacobian of a network's flattened output by its flattened example, as a function of one example."""

    network: Callable
    as_written: bool = False
    """Whether there are rules of others, which do not count."""

    def __call__(self, variables: Any, example: jax.Array, *spec: jax.Array):
        """The Jacobian at one example, of shape (outputs, inputs)."""
        network = as_written(self.network) if self.as_written else self.network
        jacobian = jax.jacrev(lambda example: network(variables, example, *spec).reshape(-1))(example)
        return jacobian.reshape(jacobian.shape[0], -1)


@dataclass(frozen=True)
class Differentiated:
    """A network over a region, whose Jacobian is wanted, and the problem of its values."""

    network: Network
    region: Region
    spec: ArrayLike | None
    values: Problem

    @functools.cached_property
    def derivatives(self) -> Problem:
        """The problem of its derivatives: the graph of `jax.jacrev`.

        Raises:
            UnsupportedError: a derivative that does not tell how the function changes.
        """
        _check_continuous(self.values.graph)
        network, spec = self.network, () if self.spec is None else (self.spec,)
        function = network.function if self.spec is None else Specified(network.function)
        derivative = Derivative(function, _has_rules_of_others(function, self, spec))
        if not network.batched:
            return prepare(derivative, (network.variables, self.region, *spec), rounding=True)
        shared = [False] * len(jax.tree.leaves(network.variables))
        batch = [*shared, True, *(np.ndim(rows) == 3 for rows in spec)]
        arguments = network.variables, regions.per_example(self.region), *spec
        return prepare(derivative, arguments, batch, rounding=True)


def forget(network: Network, region: Region) -> None:
    """What a network closes over counts as it is at a call."""
    if not _compat.is_tracing():
        forget_stale(network.function, network.variables, example_of(network, region))


def differentiated(network: Network, region: Region, spec: ArrayLike | None) -> Differentiated:
    """A network over a region, ready for Jacobian bounds.

    Raises:
        ArgumentError: the network has several outputs.
    """
    problem = Differentiated(network, region, spec, problem_of(network, region, spec, rounding=True))
    if len(problem.values.graph.structure.outputs) != 1:
        raise errors.ArgumentError("the network has several outputs: bound the Jacobian of one at a time")
    return problem


def jacobian_of(
    problem: Differentiated, method: Method, *, rounding: bool = False, memory_limit: int | None = None
) -> Bounded:
    """Bounds of a Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
    check_certified("method", method)
    if isinstance(method, Best):
        parts = [jacobian_of(problem, part, rounding=rounding, memory_limit=memory_limit) for part in method.methods]
        return functools.reduce(better, parts)
    if isinstance(method, JacobianMethod):
        request = request_of(problem.values, memory_limit, rounding=rounding)
        return method.jacobian(problem.values.graph, problem.values.leaves, request)
    request = request_of(problem.derivatives, memory_limit, rounding=rounding)
    (found,) = outputs_of(problem.derivatives, method, request)
    return found


@anywhere
def jacobian_bounds(
    params: Any,
    x: ArrayLike | Region,
    eps: ArrayLike | None = None,
    *,
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    norm: float = np.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    spec: ArrayLike | None = None,
    method: Method = RecurJac(),  # noqa: B008 - immutable
    memory_limit: int | None = None,
) -> Interval:
    """Bounds of the Jacobian of a network over a ball around every example.

    `lower <= d(spec @ f)_i / dx_k (x') <= upper` for every x' with `||x' - x||_norm <= eps` and
    `clip[0] <= x' <= clip[1]` at which f is differentiable, and for Clarke's Jacobian at all others.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: floating, `(batch, *example shape)`; one example for a Dense chain; or a region, and then no eps.
        eps: radius in the given norm, shape () or (batch,); may be infinite.
        apply_fn: the network, `apply_fn(variables, batch)`; not needed for a chain of Dense layers.
        activation: between Dense layers where there is no apply_fn; ReLU, with a warning, if it is not given.
        norm: p >= 1, `jnp.inf` included.
        clip: None or `(low, high)`: the range of valid inputs.
        spec: None, (specs, outputs) or (batch, specs, outputs): bounds the Jacobian of `spec @ f`.
        method: `RecurJac()` and `FastLip()` for chains of affine maps and scalar nonlinearities; any bounding method,
            such as `Crown()`, through `jax.jacrev`, for any network; `Best` of them.
        memory_limit: bytes that the coefficients of a backward pass may take.

    Returns:
        `Interval` of shape `(batch, outputs or specs, *example shape)`; without batch axis for one example.

    Raises:
        UnsupportedError: the function may jump, hides its derivative, or is no chain (RecurJac, FastLip).
        ArgumentError, ArgumentTypeError: with what to do instead.

    Rounding: up to that of the computation.

    Reference: Zhang et al. 2019 (RecurJac); Clarke, "Optimization and nonsmooth analysis", 1983, section 2.6.

    >>> layers = [(jnp.array([[1.0, -1.0]]), jnp.zeros(2)), (jnp.ones((2, 1)), jnp.zeros(1))]
    >>> jacobian_bounds(layers, jnp.ones((1, 1)), 0.5, activation="relu")  # |x| is x here
    Interval(lower=Array([[[1.]]], dtype=float32), upper=Array([[[1.]]], dtype=float32))
    """
    problem = given(params, x, eps, apply_fn, activation, norm, clip, spec)
    found = jacobian_of(problem, method, memory_limit=memory_limit)
    assert found.upper is not None
    inputs = problem.values.graph.nodes[0].op.shape
    return Interval(*(end.reshape(*end.shape[:-1], *inputs) for end in (found.lower, found.upper)))


def given(
    params: Any,
    x: ArrayLike | Region,
    eps: ArrayLike | None,
    apply_fn: Callable | None,
    activation: str | Callable | None,
    norm: float,
    clip: tuple[ArrayLike, ArrayLike] | None,
    spec: ArrayLike | None,
) -> Differentiated:
    """The problem that the arguments of `jacobian_bounds` describe."""
    network = resolve(params, x, apply_fn, activation)
    region = region_around(network.variables, x, eps, norm, clip, batched=network.batched)
    return differentiated(network, region, spec)


# --- derivatives that can be trusted ----------------------------------------------------------------------------------


def _check_continuous(graph: Graph) -> None:
    for node in graph.nodes:
        reason = _REFUSED.get(node.op.kind) or _REFUSED.get(node.op.name)
        if reason:
            raise errors.unsupported(
                node.op.name, [node.op.shape], node.source, reason, method="jax.jacrev",
                way_out="use a continuous function whose derivative is its own",
            )  # fmt: skip
        if node.op.kind == "scalar":
            slopes.check(node, "jax.jacrev")


def as_written(function: Callable) -> Callable:
    """A function without the derivative rules of others: JAX differentiates what it computes.

    Rules within loops and branches stay.
    """

    def applied(*args: Any):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluated(closed, jax.tree.leaves(args)))

    return applied


def _evaluated(closed: _compat.ClosedJaxpr, given: Sequence) -> list:
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(closed.jaxpr.invars, given, strict=True))
    read = lambda atom: atom.val if isinstance(atom, _compat.Literal) else known[atom]  # noqa: E731
    for equation in closed.jaxpr.eqns:
        operands, callee = list(map(read, equation.invars)), _compat.call_jaxpr(equation)
        if callee is not None and not (equation.primitive.name in _CUSTOM and _is_own(equation)):
            found = _evaluated(callee, operands)
        else:
            found = _compat.bind(equation.primitive, operands, equation.params)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return list(map(read, closed.jaxpr.outvars))


def _has_rules_of_others(function: Callable, problem: Differentiated, spec: tuple) -> bool:
    """Whether a function holds derivative rules that are not JAX's own.

    Raises:
        UnsupportedError: one that cannot be left out.
    """
    example = example_of(problem.network, problem.region)
    rows = [jax.ShapeDtypeStruct(np.shape(one)[-2:], jnp.result_type(one)) for one in spec]
    given = problem.network.variables, example, *rows
    if next(_rules_of_others(function, given), None) is None:
        return False
    for equation in _rules_of_others(as_written(function), given):
        name, _, place = _origin(_compat.call_jaxpr(equation)).partition(" at ")
        raise errors.unsupported(
            name or equation.primitive.name, [], place, "its derivative rule may not be its derivative",
            method="jax.jacrev", way_out="write it without a custom rule, or use method=RecurJac(), which needs none",
        )  # fmt: skip
    return True


def _rules_of_others(function: Callable, given: tuple) -> Iterator[_compat.JaxprEqn]:
    for equation in _compat.all_equations(jax.make_jaxpr(function)(*given).jaxpr):
        if equation.primitive.name in _CUSTOM and not _is_own(equation):
            yield equation


def _is_own(equation: _compat.JaxprEqn) -> bool:
    """Whether a rule is one that JAX gives to a function of its own: a known function, a rule from JAX's files, and the
    function's own derivative at random points.

    The files alone say nothing: `jax.custom_gradient` and `defjvps` wrap the user's rules in JAX's own.
    """
    name, _, place = _origin(_compat.call_jaxpr(equation)).partition(" at ")
    _, _, rule = _origin(equation.params.get("jvp_jaxpr_fun")).partition(" at ")
    path = PurePath(place.rpartition(":")[0])
    known = _OWN in path.parents and name in _TRUSTED.get(path.relative_to(_OWN).as_posix(), ())
    return known and _OWN in PurePath(rule.rpartition(":")[0]).parents and _agrees(equation)


def _agrees(equation: _compat.JaxprEqn) -> bool:
    """Whether the rule of a call gives the derivative of what is called, at random points where both are finite."""
    rng, plain = np.random.default_rng(0), _compat.call_jaxpr(equation)
    assert plain is not None
    avals: list[Any] = [variable.aval for variable in equation.invars]
    floats = [jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals]

    def ruled(*given: jax.Array):
        found = _compat.bind(equation.primitive, given, equation.params)
        return list(found) if equation.primitive.multiple_results else [found]

    def pulled(function: Callable, given: list) -> np.ndarray:
        values, pull = jax.vjp(function, *given)
        parts = zip(pull([jnp.ones_like(value) for value in values]), floats, strict=True)
        return np.concatenate([np.asarray(part, np.float64).ravel() for part, is_float in parts if is_float])

    compared = 0
    with jax.ensure_compile_time_eval():
        for draw in (lambda size: rng.uniform(0.1, 0.9, size), rng.normal):  # within most domains, and of both signs
            given = [
                jnp.asarray(draw(size=aval.shape) if f else 0, aval.dtype)
                for aval, f in zip(avals, floats, strict=True)
            ]
            given = [jnp.broadcast_to(x, aval.shape) for x, aval in zip(given, avals, strict=True)]
            own, other = (pulled(function, given) for function in (_compat.jaxpr_as_fun(plain), ruled))
            finite = np.isfinite(own) & np.isfinite(other)
            compared += finite.sum()
            if not np.allclose(own[finite], other[finite], rtol=1e-3, atol=1e-5):
                return False
    return bool(compared)


def _origin(traced: object) -> str:
    """Name and file of the function that was traced; "" if they are not known."""
    return str(getattr(getattr(getattr(traced, "jaxpr", traced), "debug_info", None), "func_src_info", ""))
