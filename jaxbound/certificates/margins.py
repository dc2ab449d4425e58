"""Margins: lower bounds of the true class's logit minus each other.

For an example with true class y, logits f and a region R around it, the margin to class j is f_y - f_j. With

    m_j  <=  min over x' in R of  f_y(x') - f_j(x')       for every j != y,

no point of R changes the class where every m_j > 0. Margins are linear in the logits, so a specification matrix
(`margin_spec`) is composed with the network's last affine map, and they are bounded directly, not as differences.
`margins` is a pure function, for any trace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.backend.sharding import anywhere
from jaxbound.backend.tracing import inlined
from jaxbound.methods import Bounded, Method
from jaxbound.network.bounding import outputs_of
from jaxbound.network.inputs import Inputs, batch_of, region_around
from jaxbound.network.problems import output_struct, problem_of, request_of
from jaxbound.network.resolving import Network, resolve
from jaxbound.regions import Region


def margin_spec(labels: ArrayLike, num_classes: int) -> jax.Array:
    """The specification of margins: rows e_y - e_j for every class j but the label y, j ascending.

    `margin_spec(y, C) @ logits` is `logits[y] - logits[j]`.

    Args:
        labels: true classes, int, (batch,) or ().
        num_classes: the number of logits, at least 2.

    Returns:
        float32, (batch, num_classes - 1, num_classes), without the batch axis for one label.

    Raises:
        ArgumentTypeError: labels that are no integers.
        ArgumentError: fewer than two classes, or a label out of range. Where labels are traced, the rows of such a
            label are NaN, so that its bounds are -inf.

    Rounding: exact.

    >>> margin_spec(jnp.array([1]), 3)
    Array([[[-1.,  1.,  0.],
            [ 0.,  1., -1.]]], dtype=float32)
    """
    if num_classes < 2:
        raise errors.argument("num_classes", f"is {num_classes}", "margins need two classes at least")
    xp = jnp if _compat.is_tracer(labels) else np
    true = xp.asarray(labels)[..., None, None]
    if not jnp.issubdtype(true.dtype, jnp.integer):
        raise errors.argument_type("labels", f"are {true.dtype}", "pass class indices as integers")
    if not _compat.is_tracer(labels):
        wrong = true[(true < 0) | (true >= num_classes)]
        if wrong.size:
            raise errors.argument("labels", f"hold {wrong[0]}", f"classes are numbered 0..{num_classes - 1}")
    row, column = xp.arange(num_classes - 1)[:, None], xp.arange(num_classes)[None]
    other = row + (row >= true)
    rows = (column == true).astype(jnp.float32) - (column == other).astype(jnp.float32)
    return _compat.owned(xp.where((true >= 0) & (true < num_classes), rows, np.float32(np.nan)))


@anywhere
def margins(
    params: Any,
    x: ArrayLike | Inputs,
    labels: ArrayLike,
    eps: ArrayLike | None = None,
    *,
    method: Method,
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    norm: float = math.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    memory_limit: int | None = None,
) -> jax.Array:
    """Lower bounds of the margins f_y - f_j over a ball around every example: what certificates and losses are made of.

    `margins[i, k] <= f_y(x') - f_j(x')` for every x' with `||x' - x[i]||_norm <= eps` and `clip[0] <= x' <= clip[1]`,
    y = labels[i] and j the k-th class that is not y. A plain JAX function for `jit`, `vmap`, `grad` and `pmap`.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: floating, `(batch, *example shape)`; one example for a Dense chain; or a region, and then no eps; or a
            tuple, list or dict of them, which apply_fn takes as it is.
        labels: true classes, int (batch,); () for one example.
        eps: radius in the given norm, shape () or (batch,), or per feature or channel, with as many axes as x: the
            ball is then `||(x' - x) / eps||_norm <= 1`.
        method: how to bound, e.g. `jaxbound.Crown()`.
        apply_fn: the network, `apply_fn(variables, batch)` -> (batch, classes); not needed for Dense layers.
        activation: between Dense layers where there is no apply_fn; ReLU, with a warning, if it is not given.
        norm: p >= 1, `jnp.inf` included.
        clip: None or `(low, high)`: the range of valid inputs.
        memory_limit: bytes that the coefficients of a backward pass may take.

    Returns:
        (batch, classes - 1), j ascending; -inf where a region is empty, a label out of range or a bound undefined.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: with what to do instead; values are checked where concrete.

    Rounding: up to that of the computation; `certify` bounds it.

    Reference: Wong and Kolter 2018, section 3.2; Zhang et al. 2020, section 3.1 (the specification matrix C).

    >>> from jaxbound import IBP
    >>> layers = [(jnp.eye(2), jnp.zeros(2))]
    >>> margins(layers, jnp.array([[0.75, 0.25]]), jnp.array([0]), 0.125, method=IBP(), activation="relu").round(3)
    Array([[0.25]], dtype=float32)
    """
    check_margin_method(method)
    network = resolve(params, x, apply_fn, activation, weights=True)
    region = region_around(network.variables, x, eps, norm, clip, batched=network.batched)
    logits = logits_struct(network, region)
    return margin_bounds(network, region, labels, logits, method, memory_limit, outward=False).lower


def margin_bounds(
    network: Network,
    inputs: Inputs,
    labels: ArrayLike,
    logits: jax.ShapeDtypeStruct,
    method: Method,
    memory_limit: int | None,
    *,
    outward: bool | str,
) -> Bounded:
    """Lower bounds of margins, not widened, and their rounding errors; from a search, also points."""
    batch = (batch_of(inputs),) if network.batched else ()
    if np.shape(labels) != batch:
        raise errors.argument("labels", f"have shape {np.shape(labels)}, not {batch}", "pass one class per example")
    spec = margin_spec(labels, logits.shape[0]).astype(logits.dtype)
    problem = problem_of(network, inputs, spec, rounding=bool(outward))
    request = request_of(problem, memory_limit, sides="lower", rounding=outward)._replace(target=0.0)
    (found,) = outputs_of(problem, method, request)
    return found._replace(lower=_unless_empty(problem.leaves, found.lower, network.batched))


@functools.partial(_compat.eager_jit, static_argnums=2)
@inlined
def _unless_empty(leaves: tuple[Region, ...], lower: jax.Array, batched: bool) -> jax.Array:
    """Bounds over regions, minus infinity over those without a point."""
    if batched:
        return jax.vmap(lambda leaves, lower: _unless_empty(leaves, lower, False))(leaves, lower)
    return jnp.where(functools.reduce(jnp.logical_or, map(regions.is_empty, leaves)), -jnp.inf, lower)


def logits_struct(network: Network, inputs: Inputs) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one example's logits."""
    logits = output_struct(network, inputs)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 1:
        kind = type(logits).__name__ if shape is None else f"an array of shape {shape}"
        raise errors.ArgumentError(f"the network gives {kind} for one example, but margins need a vector of logits")
    return logits


def check_margin_method(method: object) -> None:
    """Refuse what is not a method object, and Jacobian methods."""
    if not isinstance(method, Method):
        raise errors.argument_type("method", f"is {method!r}", "pass a method object such as jaxbound.Crown()")
