"""Local and global Lipschitz constants, from bounds of the Jacobian.

If |J(x)| <= M entry by entry for the (Clarke) Jacobian at every x of a convex set, then f moves there by at most the
operator norm of M: `||f(x') - f(x)||_q <= ||M||_{p -> q} ||x' - x||_p` (Clarke 1983, theorem 2.6.5).
For one output this is the dual norm of a row of M. For p = inf RecurJac bounds the sums of rows better than entry by
entry (`RecurJac.row_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbound import errors, regions
from jaxbound.backend.sharding import anywhere
from jaxbound.certificates.margins import logits_struct, margin_spec
from jaxbound.jacobian import norms
from jaxbound.jacobian.composition import Differentiated, differentiated, forget, jacobian_of
from jaxbound.jacobian.recurjac import JacobianMethod, RecurJac, absolute_sums
from jaxbound.methods import Best, Bounded, Method, check_certified
from jaxbound.network.inputs import region_around
from jaxbound.network.problems import request_of
from jaxbound.network.resolving import Network, resolve
from jaxbound.regions import LpBall, Region

_OF = ("outputs", "margins", "map")


@anywhere
def lipschitz(
    params: Any,
    x: ArrayLike | Region,
    eps: ArrayLike | None = None,
    *,
    norm: float | tuple[float, float] = math.inf,
    of: str = "outputs",
    method: Method = RecurJac(),  # noqa: B008 - immutable
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    spec: ArrayLike | None = None,
    memory_limit: int | None = None,
) -> jax.Array:
    """Local Lipschitz constants of a network, from above.

    `|g(x') - g(x'')| <= L ||x' - x''||_{p_in}` for every x', x'' with `||. - x||_{p_in} <= eps` and within `clip`, for
    each output g of `spec @ f`; for of="map" `||f(x') - f(x'')||_{p_out} <= L ||x' - x''||_{p_in}`.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: floating, `(batch, *example shape)`; one example for a Dense chain; or a region, and then no eps (norm is
            that of the constant alone).
        eps: radius, shape () or (batch,); `jnp.inf` for global constants (infinite where the method finds none).
        norm: p >= 1, or a pair (p_in, p_out); p_out matters for of="map" only.
        of: "outputs", each by itself; "margins" of the class that is predicted at the center, f_c - f_j, j ascending
            (for others pass `spec=margin_spec(labels, classes)`); or "map", all outputs together.
        method: how to bound the Jacobian, see `jacobian_bounds`.
        apply_fn: the network, `apply_fn(variables, batch)`; not needed for a chain of Dense layers.
        activation: between Dense layers where there is no apply_fn; ReLU, with a warning, if it is not given.
        clip: None or `(low, high)`: the range of valid inputs.
        spec: None, (specs, outputs) or (batch, specs, outputs): constants of `spec @ f`.
        memory_limit: bytes that the coefficients of a backward pass may take.

    Returns:
        (batch, outputs, specs or margins), or (batch,) for of="map"; without batch axis for one example.

    Raises:
        UnsupportedError: the function may jump, hides its derivative, or is no chain (RecurJac, FastLip).
        ArgumentError: a pair of norms without a formula, among others.

    Rounding: covered; the constants hold for exact arithmetic on the given parameters.

    Reference: Zhang et al. 2019, proposition 2 and algorithm 2.

    >>> layers = [(jnp.array([[3.0], [4.0]]), jnp.zeros(1))]
    >>> lipschitz(layers, jnp.zeros((1, 2)), 1.0, norm=2, activation="relu").round(3)
    Array([[5.]], dtype=float32)
    """
    p_in, p_out = norms.pair(norm)
    if of not in _OF:
        raise errors.unknown_option("of", of, _OF)
    network = resolve(params, x, apply_fn, activation)
    own = math.inf if regions.is_region(x) else p_in
    region = region_around(network.variables, x, eps, own, clip, batched=network.batched)
    forget(network, region)
    if of == "margins":
        if spec is not None:
            raise errors.argument("spec", 'is given with of="margins"', "leave one of them out")
        spec = _predicted_margins(network, region)
    problem = differentiated(network, region, spec)
    if of == "map":
        return _map_norm(problem, method, p_in, p_out, memory_limit)
    return row_norms(problem, method, p_in, memory_limit)


def row_norms(problem: Differentiated, method: Method, p_in: float, memory_limit: int | None = None) -> jax.Array:
    """Upper bounds of the dual norms of the rows of a Jacobian, `(batch, outputs)`."""
    check_certified("method", method)
    if p_in != math.inf:
        return norms.vector_norm(_magnitude(problem, method, memory_limit), norms.dual(p_in))
    if isinstance(method, Best):
        parts = [row_norms(problem, part, p_in, memory_limit) for part in method.methods]
        return jnp.min(jnp.stack([*parts, norms.vector_norm(_magnitude(problem, method, memory_limit), 1)]), axis=0)
    if isinstance(method, JacobianMethod):
        request = request_of(problem.values, memory_limit, rounding=True)
        return method.row_sums(problem.values.graph, problem.values.leaves, request)
    return absolute_sums(jacobian_of(problem, method, rounding=True, memory_limit=memory_limit))


def _map_norm(problem: Differentiated, method: Method, p_in: float, p_out: float, memory_limit: int | None):
    if p_in == math.inf:
        return norms.vector_norm(row_norms(problem, method, p_in, memory_limit), p_out)
    return norms.nonnegative(_magnitude(problem, method, memory_limit), p_in, p_out)


def _magnitude(problem: Differentiated, method: Method, memory_limit: int | None) -> jax.Array:
    return magnitude(jacobian_of(problem, method, rounding=True, memory_limit=memory_limit))


def magnitude(found: Bounded) -> jax.Array:
    """The largest absolute value of each entry."""
    assert found.upper is not None
    return jnp.maximum(found.lower_rounding - found.lower, found.upper + found.upper_rounding)


def _predicted_margins(network: Network, region: Region) -> jax.Array:
    """Rows f_c - f_j for the class c that is predicted at the center."""
    logits = logits_struct(network, region)
    if isinstance(region, LpBall):
        center = jnp.asarray(region.center)
    else:
        low, high = regions.enclosing_box(region)
        center = low / 2 + high / 2
    predict = jax.vmap(network.function, in_axes=(None, 0)) if network.batched else network.function
    label = jnp.argmax(predict(network.variables, center), axis=-1)
    return margin_spec(label, logits.shape[0]).astype(logits.dtype)
