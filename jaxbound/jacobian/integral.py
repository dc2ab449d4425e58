"""Robustness by Lipschitz constants: bounds of values over a ball from bounds of the Jacobian over smaller ones.

On the way from the center c to a point x of the ball of radius R, g changes by at most the integral of its local
Lipschitz constants (Theorem 2 of Zhang et al. 2019). With `L(t)` a constant on the ball of radius t around c, and
`0 = t_0 < t_1 < ... < t_n = R`,

    |g(x) - g(c)|  <=  int_0^R L(t) dt  <=  sum_i L(t_i) (t_i - t_{i-1}),

because the ball of radius t_i contains those before it. The sum is an upper bound at every R, whatever n is.

With a clip box the balls are cut by it; where the center lies outside, the box is extended to the center, since the way
from there leads through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound._compat import is_tracer
from jaxbound.backend.tracing import rolled
from jaxbound.graph import Graph
from jaxbound.jacobian import norms
from jaxbound.jacobian.lipschitz import magnitude
from jaxbound.jacobian.recurjac import JacobianMethod, RecurJac
from jaxbound.methods import IBP, Best, Bounded, Method, Request, check_certified
from jaxbound.regions import LpBall


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LipschitzIntegral(Method):
    """Bounds of values from local Lipschitz constants on growing balls: robustness by RecurJac or Fast-Lip.

    `lower <= g(x) <= upper` for every x in the ball; for `certify`, `certified_radius` and `margins`.

    Args:
        jacobian: `RecurJac()`, `FastLip()`, or `Best` of them.
        steps: into how many parts the radius is cut. Static.

    Reference: Zhang et al. 2019, theorem 2 and equation 24.

    >>> from jaxbound.network.bounding import bound_network
    >>> layers = [(jnp.eye(2), jnp.ones(2)), (jnp.array([[1.0], [2.0]]), jnp.zeros(1))]
    >>> found = bound_network(LipschitzIntegral(), layers, jnp.zeros((1, 2)), 0.5, activation="relu")
    >>> bool(1.499 < found.lower[0, 0] < 1.501)  # x_1 + 2 x_2 + 3
    True
    """

    jacobian: Method = field(default_factory=RecurJac)
    steps: int = field(default=15, metadata={"static": True})

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        ball = _only_ball(graph, leaves)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise errors.argument("steps", f"is {self.steps!r}", "pass 1 or more")
        both = request._replace(sides="both")
        point = dataclasses.replace(ball, radius=jnp.zeros_like(ball.radius), clip=None)
        (middle,) = IBP().bound(graph, [point], both)
        ball = _with_center(ball)

        def part(step: jax.Array) -> jax.Array:
            """What one shell adds, with its rounding."""
            radius = jnp.asarray(ball.radius)
            inner, outer = radius * ((step - 1) / self.steps), radius * (step / self.steps)
            outer = jnp.where(step == self.steps, radius, outer)  # a compiled quotient of equal numbers may be below 1
            constants = _constants(self.jacobian, graph, dataclasses.replace(ball, radius=outer), both)
            width = (outer - inner) * (1 + 4 * jnp.finfo(outer.dtype).eps)
            width = width.reshape(width.shape + (1,) * (constants.ndim - width.ndim))
            return constants * width + 2 * jnp.finfo(width.dtype).tiny * (1 + constants + width)  # for underflow

        steps = jnp.arange(1, self.steps + 1).astype(jnp.result_type(ball.radius))
        if any(map(is_tracer, jax.tree.leaves((graph.constants, leaves)))):
            total = jnp.sum(rolled(jax.lax.map)(part, steps), axis=0)
        else:
            total = sum(map(part, steps), start=jnp.zeros(()))
        total = total * (1 + 4 * self.steps * jnp.finfo(total.dtype).eps)
        return [_around(middle, total.reshape(middle.lower.shape), request)]


def _only_ball(graph: Graph, leaves: Sequence) -> LpBall:
    if len(leaves) != 1 or not isinstance(leaves[0], LpBall):
        raise errors.argument("the region", "is not one ball", "LipschitzIntegral needs an LpBall, or x and eps")
    (ball,) = leaves
    radius, center = jnp.asarray(ball.radius), jnp.asarray(ball.center)
    if radius.ndim > (0 if graph.axes is None else 1):
        raise errors.argument("the radius", "differs between features", "LipschitzIntegral needs one per ball")
    return dataclasses.replace(ball, radius=radius, center=center)


def _with_center(ball: LpBall) -> LpBall:
    """The ball with its clip box extended to the center."""
    if ball.clip is None:
        return ball
    low, high = ball.clip
    return dataclasses.replace(ball, clip=(jnp.minimum(low, ball.center), jnp.maximum(high, ball.center)))


def _constants(method: Method, graph: Graph, ball: LpBall, request: Request) -> jax.Array:
    """Lipschitz constants of the outputs on a ball."""
    if isinstance(method, Best):
        return jnp.min(jnp.stack([_constants(part, graph, ball, request) for part in method.methods]), axis=0)
    if not isinstance(method, JacobianMethod):
        raise errors.argument("jacobian", f"is {method!r}", "pass RecurJac(), FastLip() or Best of them")
    check_certified("jacobian", method)
    if ball.norm == jnp.inf:
        return method.row_sums(graph, [ball], request)
    found = method.jacobian(graph, [ball], request)
    return norms.vector_norm(magnitude(found), norms.dual(ball.norm))


def _around(middle: Bounded, reach: jax.Array, request: Request) -> Bounded:
    """The values at the center, moved by as much as they may change; nothing where this is undefined."""
    assert middle.upper is not None
    unit = 2 * jnp.finfo(reach.dtype).eps if request.rounding else 0
    low, high = middle.lower - middle.lower_rounding - reach, middle.upper + middle.upper_rounding + reach
    low, high = low - unit * jnp.abs(low), high + unit * jnp.abs(high)
    low, high = jnp.where(low < jnp.inf, low, -jnp.inf), jnp.where(high > -jnp.inf, high, jnp.inf)
    zeros = jnp.zeros_like(low)
    return Bounded(low, high if request.sides == "both" else None, zeros, zeros)
