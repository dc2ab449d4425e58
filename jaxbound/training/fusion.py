r"""Loss fusion: the robust loss by one backward pass, whatever the number of classes.

The cross-entropy over a region is at most log of the largest S(x') = sum_j exp(d_j(x')), with d_j = f_j - f_y, the
label's own d_y = 0 included. Instead of bounding every margin by a backward pass and summing, bound the sum: IBP gives
l_j <= d_j <= u_j, exp lies below its chord there, and a shift c keeps the numbers small,

    exp(d_j - c)  <=  a_j d_j + b_j,  a_j = (exp(u_j - c) - exp(l_j - c)) / (u_j - l_j),  b_j = exp(u_j - c) - a_j u_j,
    S(x')         <=  exp(c) (exp(-c) + sum_j b_j  +  max over x' of sum_j a_j d_j(x')).

The last maximum is of *one* linear combination of the logits, so a single row goes backward, where margins take one row
per class. c = max(0, max_j u_j) makes every exponential at most 1, and S cannot be below its value at the l_j, nor is
the true maximum above its value at the u_j: the result keeps both.

Mixed are the *losses* (no bound per class is left to mix): beta · fused + (1 - beta) · (the robust loss of IBP's
margins). Both terms bound the cross-entropy from above, so the mixture does. It is often looser than the loss of
CROWN-IBP's margins, since a chord replaces exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbound.certificates.margins import margin_spec
from jaxbound.methods import IBP, Method
from jaxbound.network.bounding import bound_network
from jaxbound.training.losses import Clean, Clip, MarginLoss, Robust, holds, robust


def fused(
    variables: Any, x: jax.Array, labels: jax.Array, eps: ArrayLike, beta: ArrayLike = 1.0, *, method: Method,
    apply_fn: Callable, classes: int, norm: float = math.inf, clip: Clip = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """An upper bound of the cross-entropy over a ball around every example, by one backward row.

    `natural(f(x'), y) <= loss` for every x' of the ball, if the method is certified.

    Args:
        variables: as for `jaxbound.margins`.
        x: (batch, ...).
        labels: int (batch,).
        eps: () or (batch,).
        beta: the weight of the fused loss against the loss of IBP's margins, ().
        method: how the fused row is bounded, such as `jaxbound.CrownIBP()`.
        apply_fn, norm, clip: as for `jaxbound.margins`.
        classes: the number of logits.

    Returns:
        The loss (batch,), and IBP's lower bounds of the margins (batch, classes - 1).

    Rounding: up to that of the computation.

    Reference: Xu et al., "Automatic perturbation analysis for scalable certified robustness and beyond", 2020,
    section 3.4.

    >>> from jaxbound import CrownIBP
    >>> from jaxbound.training.models import MLP
    >>> model, x, labels = MLP((8,)), jnp.zeros((2, 3)), jnp.array([1, 2])
    >>> variables = model.init(jax.random.key(0), x)
    >>> loss, _ = fused(variables, x, labels, 0.1, method=CrownIBP(), apply_fn=model.apply, classes=10)
    >>> loss.shape
    (2,)
    """
    common = {"apply_fn": apply_fn, "norm": norm, "clip": clip}
    spec = margin_spec(labels, classes).astype(jnp.result_type(x))
    intervals = bound_network(IBP(), variables, x, eps, spec=spec, **common)
    assert intervals.upper is not None
    lower, upper = -intervals.upper, -intervals.lower  # of d = f_j - f_y
    shift = jax.lax.stop_gradient(jnp.maximum(jnp.max(upper, axis=1, keepdims=True), 0))
    slope = jnp.exp(upper - shift) * _mean_of_exponential(upper - lower)
    intercept = jnp.exp(upper - shift) - slope * upper
    row = jnp.einsum("bs,bsk->bk", slope, spec, precision=jax.lax.Precision.HIGHEST)
    smallest = bound_network(method, variables, x, eps, spec=row[:, None], sides="lower", **common).lower[:, 0]
    own = jnp.exp(-shift[:, 0])
    total = own + jnp.sum(intercept, axis=1) - smallest
    least, most = (own + jnp.sum(jnp.exp(ends - shift), axis=1) for ends in (lower, upper))
    loss = shift[:, 0] + jnp.log(jnp.clip(total, least, most))
    beta = jnp.asarray(beta)
    return beta * loss + (1 - beta) * robust(intervals.lower), intervals.lower


def _mean_of_exponential(width: jax.Array) -> jax.Array:
    """(1 - exp(-w)) / w, the mean of exp over [-w, 0], and a series near 0, where the quotient's derivative cancels."""
    small = width < 0.1
    safe = jnp.where(small, 1, width)
    near = jnp.where(small, width, 0)
    series = 1 - near / 2 * (1 - near / 3 * (1 - near / 4 * (1 - near / 5)))
    return jnp.where(small, series, -jnp.expm1(-safe) / safe)


class FusedLoss(MarginLoss):
    """The robust term by loss fusion: `losses.MarginLoss`, its fields and all, at one backward row.

    `natural(f(x'), y) <= loss` for every x' of the ball, if the method is certified. Whether a prediction holds is
    judged by IBP's margins, for no others are computed.

    >>> FusedLoss().interval
    MarginLoss(method=IBP(), norm=inf, clip=(0.0, 1.0))
    """

    def __call__(self, clean: Clean, eps: ArrayLike, beta: ArrayLike) -> Robust:
        """The loss over balls of radius eps."""
        loss, bounds = fused(
            clean.variables, clean.x, clean.labels, eps, beta, method=self.method, apply_fn=clean.apply_fn,
            classes=clean.logits.shape[1], norm=self.norm, clip=self.clip,
        )  # fmt: skip
        return Robust(loss, holds(bounds))
