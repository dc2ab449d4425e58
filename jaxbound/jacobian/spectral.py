"""The product of operator norms: what a Lipschitz constant costs without bounding anything.

For a chain `W_H sigma_{H-1} ... sigma_1 W_1` with |sigma_l'| <= d_l everywhere, `||W_H||_p d_{H-1} ... d_1 ||W_1||_p`
bounds the global Lipschitz constant in the p-norm (Szegedy et al. 2014, section 4.3). One output takes the dual norm of
its own row in place of ||W_H||. Norms of 1 and infinity are sums of absolute values; the spectral norm is bounded from
above (`norms.spectral_norm`). A map too large for a dense matrix, such as a wide convolution, is measured by applying
its absolute values to a vector of ones, forwards and transposed, which gives both sums, and by
`||W||_2^2 <= ||W||_1 ||W||_inf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors, regions
from jaxbound.driver import Run
from jaxbound.graph.values import plain
from jaxbound.jacobian import norms, slopes
from jaxbound.jacobian.chains import Chain, Segment, chain_of
from jaxbound.network.problems import problem_of
from jaxbound.network.resolving import resolve
from jaxbound.regions import Box
from jaxbound.relaxations.affine import gamma

DENSE = 1 << 26
"""Numbers that a matrix may have to be made dense."""


def spectral_lipschitz(
    params: Any,
    x: ArrayLike,
    *,
    norm: float = 2,
    of: str = "outputs",
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    spec: ArrayLike | None = None,
) -> jax.Array:
    """A global Lipschitz constant by the product of operator norms: the baseline for `lipschitz`.

    `|g(x') - g(x'')| <= L ||x' - x''||_p` for all x' and x'' and each output g of `spec @ f`; for of="map"
    `||f(x') - f(x'')||_p <= L ||x' - x''||_p`.

    Args:
        params: a chain of affine maps and scalar nonlinearities; see `network.resolve`.
        x: a batch or an example, for its shape.
        norm: p = 1, 2 or `jnp.inf`.
        of: "outputs", each by itself, or "map", all together.
        apply_fn: the network, `apply_fn(variables, batch)`; not needed for a chain of Dense layers.
        activation: between Dense layers where there is no apply_fn; ReLU, with a warning, if it is not given.
        spec: None or (specs, outputs): constants of `spec @ f`.

    Returns:
        (outputs or specs,), or () for of="map".

    Raises:
        UnsupportedError: the network is no chain, or may jump.

    Rounding: covered.

    Reference: Szegedy et al., "Intriguing properties of neural networks", 2014, section 4.3.

    >>> layers = [(2 * jnp.eye(2), jnp.zeros(2)), (jnp.array([[3.0], [4.0]]), jnp.zeros(1))]
    >>> bool(10 <= spectral_lipschitz(layers, jnp.zeros(2), activation="relu")[0] <= 10.1)
    True
    """
    if norm not in (1, 2, math.inf):
        raise errors.argument("norm", f"is {norm!r}", "pass 1, 2 or jnp.inf")
    if of not in ("outputs", "map"):
        raise errors.unknown_option("of", of, ("outputs", "map"))
    if spec is not None and np.ndim(spec) != 2:
        raise errors.argument("spec", f"has shape {np.shape(spec)}", "pass (specs, outputs)")
    network = resolve(params, x, apply_fn, activation)
    dtype = jnp.result_type(*jax.tree.leaves(network.variables), x)
    example = jnp.zeros(np.shape(x)[1:] if network.batched else np.shape(x), dtype)
    problem = problem_of(network._replace(batched=False), regions.canonical(Box(example, example)), spec, rounding=True)
    chain = chain_of(Run.over(problem.graph, problem.leaves), "spectral_lipschitz", dense=False)
    if chain is None:
        outputs = sum(plain(value).size for value in problem.graph.constants[:1])
        return jnp.zeros((outputs,) if of == "outputs" else (), dtype)
    *inner, last = chain.layers
    measured = [_norm(layer.segment, layer.constants[0], norm) for layer in inner]
    factors = [*measured, *_steepest(chain)]
    rows = norms.vector_norm(_rows(last.segment, last.constants[0]), norms.dual(norm))
    final = rows if of == "outputs" else _norm(last.segment, last.constants[0], norm)
    return norms.product([final, *(jnp.broadcast_to(factor, final.shape) for factor in factors)], dtype)


def _steepest(chain: Chain) -> list[jax.Array]:
    """The largest |sigma'| of every scalar."""
    found = []
    for scalar in chain.scalars:
        everywhere = (
            jnp.full(scalar.op.shape, -jnp.inf, scalar.op.dtype),
            jnp.full(scalar.op.shape, jnp.inf, scalar.op.dtype),
        )
        low, high = slopes.slope_range(scalar.op, [scalar.constants[0][k] for k in scalar.used], everywhere)
        found.append(jnp.max(jnp.maximum(-low, high)))
    return found


def _rows(segment: Segment, constants: Sequence) -> jax.Array:
    """Above the absolute values of the last map's matrix."""
    if math.prod(segment.sizes) > DENSE:
        raise errors.UnsupportedError("the last map is too large for a dense matrix: pass a spec with fewer rows")
    return (jnp.abs(segment.matrix(constants)) + _matrix_error(segment, constants)).T


def _norm(segment: Segment, constants: Sequence, p: float) -> jax.Array:
    """`||W||_p`, from above."""
    if p == 2 and math.prod(segment.sizes) <= DENSE:
        error = norms.vector_norm(jnp.ravel(_matrix_error(segment, constants)), 2)
        return norms.spectral_norm(segment.matrix(constants)) + 1.1 * error
    dtype = jnp.dtype(segment.dtype)
    slack = gamma(2 * (segment.terms + max(segment.sizes) + 4), dtype)

    def largest(map: Segment, size: int) -> jax.Array:
        """The largest sum of absolute values of a map, from above."""
        ones = jnp.ones(size, dtype)
        return jnp.max(map.absolute(constants, ones) + slack * map.widened(constants, ones))

    rows, columns = largest(segment, segment.sizes[0]), largest(segment.flipped, segment.sizes[1])
    bound = rows if p == math.inf else columns if p == 1 else jnp.sqrt(rows) * jnp.sqrt(columns)
    return bound * (1 + slack)


def _matrix_error(segment: Segment, constants: Sequence) -> jax.Array:
    """How far the matrix may be from the product of the maps that it is made of."""
    if segment.is_exact(constants):
        return jnp.zeros((), segment.dtype)
    return gamma(segment.terms, segment.dtype) * segment.magnitude(constants)
