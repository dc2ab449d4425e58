"""The landscape of a logit: the largest ball around an example in which it has no stationary point.

Where one entry of the gradient has a strict sign over a whole ball, the gradient is not zero anywhere in it, and no
point of it is a local minimum, maximum or saddle point. The bounds cover Clarke's gradient, so this holds at kinks too:
0 is in Clarke's gradient at every local extremum (Clarke 1983, proposition 2.3.2). The radius is searched as in
`bracketing.search`: what comes back was evaluated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors, regions
from jaxbound._compat import is_tracer
from jaxbound.certificates.bracketing import search
from jaxbound.certificates.margins import logits_struct
from jaxbound.jacobian.composition import differentiated, forget, jacobian_of
from jaxbound.jacobian.recurjac import RecurJac
from jaxbound.methods import Method
from jaxbound.network.inputs import region_around
from jaxbound.network.resolving import resolve


def landscape_radius(
    params: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    norm: float = math.inf,
    method: Method = RecurJac(),  # noqa: B008 - immutable
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    steps: int = 30,
    initial: ArrayLike = 0.1,
    tolerance: float = 1e-3,
    memory_limit: int | None = None,
) -> jax.Array:
    """The radius around every example within which its label's logit is proved to have no stationary point.

    Some entry of the gradient of f_y, y = labels[i], has one strict sign at every x' with
    `||x' - x[i]||_norm <= radius[i]` and `clip[0] <= x' <= clip[1]`, wherever `radius[i] > 0`.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: floating, `(batch, *example shape)`; one example for a Dense chain.
        labels: the classes whose logits are meant, int (batch,); () for one example.
        norm: p >= 1, `jnp.inf` included.
        method: how to bound the Jacobian, see `jacobian_bounds`.
        apply_fn: the network, `apply_fn(variables, batch)` -> (batch, classes); not needed for Dense layers.
        activation: between Dense layers, where there is neither apply_fn nor a module: no certificate guesses it.
        clip: None or `(low, high)`: the range of valid inputs.
        steps: the most finite radii that are evaluated per example.
        initial: the first one, () or (batch,), in the given norm.
        tolerance: an example is done when `failed - held <= tolerance * failed`.
        memory_limit: bytes that the coefficients of a backward pass may take.

    Returns:
        (batch,), or () for one example: radii that were evaluated and held; 0 where none did, and `inf` where there is
        no stationary point at all.

    Raises:
        UnsupportedError: the function may jump, hides its derivative, or is no chain (RecurJac, FastLip).
        ArgumentError: malformed arguments, and concrete labels out of range.

    Rounding: covered, by outward bounds of the gradient.

    Reference: Zhang et al. 2019, "local optimization landscape"; Clarke 1983, proposition 2.3.2.

    >>> layers = [(jnp.array([[1.0]]), jnp.ones(1)), (jnp.eye(1), jnp.zeros(1))]
    >>> x, labels = jnp.zeros((1, 1)), jnp.array([0])
    >>> landscape_radius(layers, x, labels, activation="relu").round(2)  # relu(x + 1) is flat from -1 on
    Array([1.], dtype=float32)
    """
    if regions.is_region(x):
        raise errors.argument("x", "is a region", "pass points: the radius around each of them is searched")
    if not isinstance(steps, int) or steps < 1:
        raise errors.argument("steps", f"is {steps!r}", "pass how many radii to evaluate at most, 1 or more")
    network = resolve(params, x, apply_fn, activation, certificate="landscape_radius")
    single = not network.batched
    if single:
        network, x = network._replace(batched=True), jnp.asarray(x)[None]
        labels, initial = jnp.asarray(labels)[None], jnp.asarray(initial)[None]
    batch = np.shape(x)[:1]
    if np.shape(labels) != batch:
        raise errors.argument("labels", f"have shape {np.shape(labels)}, not {batch}", "pass one class per example")
    region = region_around(network.variables, x, np.zeros(batch, np.float32), norm, clip, batched=True)
    forget(network, region)
    logits = logits_struct(network, region)
    rows = _one_hot(labels, logits)

    def holds(radius: jax.Array) -> jax.Array:
        problem = differentiated(network, dataclasses.replace(region, radius=radius), rows)
        found = jacobian_of(problem, method, rounding=True, memory_limit=memory_limit)
        assert found.upper is not None
        low, high = found.lower - found.lower_rounding, found.upper + found.upper_rounding
        return jnp.any((low > 0) | (high < 0), axis=(-1, -2))

    first = jnp.broadcast_to(jnp.asarray(initial, regions.leaf_struct(region).dtype), batch)
    endless = holds(jnp.full(batch, jnp.inf, first.dtype))
    possible = ~endless & ~jax.vmap(regions.is_empty)(regions.per_example(region))
    radius = jnp.where(endless, jnp.inf, search(holds, possible, first, steps, tolerance))
    return radius[0] if single else radius


def _one_hot(labels: ArrayLike, logits: jax.ShapeDtypeStruct) -> jax.Array:
    """The specification that picks the label's logit, (batch, 1, classes); NaN where it is no class."""
    classes = logits.shape[0]
    if not is_tracer(labels):
        given = np.asarray(labels)
        wrong = given[(given < 0) | (given >= classes)]
        if wrong.size:
            raise errors.argument("labels", f"hold {wrong[0]}", f"classes are numbered 0..{classes - 1}")
    own = jnp.asarray(labels)[:, None, None]
    row = (jnp.arange(classes) == own).astype(logits.dtype)
    return jnp.where((own >= 0) & (own < classes), row, jnp.nan)
