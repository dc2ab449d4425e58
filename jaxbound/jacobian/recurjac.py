"""RecurJac and Fast-Lip: bounds of the Jacobian of a chain, from bounds of the inputs of its nonlinearities.

Both are steps over the layers of a chain (`chains`), from the ranges of its derivatives (`slopes`); the steps are in
`recursion`. Fast-Lip takes plain steps alone, so RecurJac, each of whose results is cut with the plain step's, is never
wider. *Forward*: the same for the transposed chain, from the first layer. With `shift` the recursion leaves out the
layer where it starts, which is put back by one plain step: the rows of the recursion are then that layer's values (in
place of all inputs, forward).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound.driver import Run
from jaxbound.graph import Graph, Op
from jaxbound.graph.values import plain
from jaxbound.jacobian import slopes
from jaxbound.jacobian.chains import Scalar, chain_of
from jaxbound.jacobian.recursion import Ends, Problem, transposed
from jaxbound.methods import Bounded, Crown, Method, Request, check_certified, domains
from jaxbound.relaxations.affine import gamma

ROWS = 64
"""The fewest rows of a pre-activation pass that are worth a step."""


class JacobianMethod(Method):
    """A method that bounds the Jacobian of a chain itself, not through `jax.jacrev`.

    >>> JacobianMethod().guarantee
    'certified'
    """

    def jacobian(self, graph: Graph, leaves: Sequence, request: Request) -> Bounded:
        """Bounds of the Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
        raise errors.no_such_answer(type(self).__name__, "Jacobian bounds")

    def row_sums(self, graph: Graph, leaves: Sequence, request: Request) -> jax.Array:
        """Upper bounds of the sums of absolute values in each row of the Jacobian; a batch stands before."""
        return absolute_sums(self.jacobian(graph, leaves, request))

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Refused: it bounds derivatives, not values."""
        raise errors.no_such_answer(
            type(self).__name__, "bounds of values", "call jaxbound.jacobian_bounds or jaxbound.lipschitz with it"
        )


def absolute_sums(found: Bounded) -> jax.Array:
    """Upper bounds of the sums of absolute values along the last axis."""
    assert found.upper is not None
    low, high = found.lower - found.lower_rounding, found.upper + found.upper_rounding
    total = jnp.sum(jnp.maximum(-low, high), axis=-1)
    lost = low.shape[-1] * jnp.finfo(low.dtype).tiny  # subnormal numbers may count as 0
    return total * (1 + gamma(low.shape[-1] + 2, low.dtype)) + lost


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurJac(JacobianMethod):
    """RecurJac: recursive bounds of the Jacobian of a chain.

    `lower <= J(x) <= upper` for the Jacobian J at every x in the region, Clarke's at kinks; by `jacobian_bounds`.

    Args:
        direction: "backward" from the output (a row of work per output) or "forward" from the input (a row per input,
            often a little tighter, much dearer). Static.
        shift: 1 to put the layer at which the recursion starts back by a plain step. Static.
        pre_activation: the method that bounds the inputs of the nonlinearities.

    Reference: Zhang et al., "RecurJac: an efficient recursive algorithm for bounding Jacobian matrix of neural networks
    and its applications", 2019, algorithms 1 and 2.

    >>> import jax.numpy as jnp
    >>> from jaxbound.jacobian.composition import jacobian_bounds
    >>> layers = [(jnp.eye(2), jnp.ones(2)), (jnp.ones((2, 1)), jnp.zeros(1))]
    >>> jacobian_bounds(layers, jnp.zeros((1, 2)), 0.5, method=RecurJac(), activation="relu").lower
    Array([[[1., 1.]]], dtype=float32)
    """

    direction: str = field(default="backward", metadata={"static": True})
    shift: int = field(default=0, metadata={"static": True})
    pre_activation: Method = field(default_factory=Crown)

    def jacobian(self, graph: Graph, leaves: Sequence, request: Request) -> Bounded:
        """Bounds of the Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
        return self._solve(graph, leaves, request)[0]

    def row_sums(self, graph: Graph, leaves: Sequence, request: Request) -> jax.Array:
        """Upper bounds of the sums of absolute values in each row: entries of known sign are bounded together.

        Reference: Zhang et al. 2019, algorithm 2.
        """
        found, problem = self._solve(graph, leaves, request)
        if problem is None or len(problem.chain.layers) == 1:
            return absolute_sums(found)
        call = problem.run.call
        signs, plain, unsure = call(_signs, None, ((), ()), found)
        together = problem.signed_sums(signs, forward=self.direction == "forward")
        size = signs.shape[-1] + problem.chain.layers[0].segment.sizes[1]
        return call(_least_sums, size, ((), ()), plain, unsure, together)

    def _solve(self, graph: Graph, leaves: Sequence, request: Request) -> tuple[Bounded, Problem | None]:
        if self.direction not in ("backward", "forward"):
            raise errors.unknown_option("direction", self.direction, ("backward", "forward"))
        if self.shift not in (0, 1):
            raise errors.argument("shift", f"is {self.shift!r}", "pass 0 or 1")
        problem = _problem(self, self.pre_activation, graph, leaves, request)
        if problem is None:
            return _constant(graph, leaves, request), None
        turn = self.direction == "forward"
        own = problem.flipped if turn else problem
        found = own.shifted() if self.shift and len(own.chain.layers) > 1 else own.recursive()
        return problem.finished(transposed(found) if turn else found), problem


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FastLip(JacobianMethod):
    """Fast-Lip: bounds of the Jacobian of a chain layer by layer, from the output, without recursion.

    `lower <= J(x) <= upper` for the Jacobian J at every x in the region, Clarke's at kinks; by `jacobian_bounds`.

    Args:
        pre_activation: the method that bounds the inputs of the nonlinearities.

    Reference: Weng et al., "Towards fast computation of certified robustness for ReLU networks", 2018, section 3.4.
    """

    pre_activation: Method = field(default_factory=Crown)

    def jacobian(self, graph: Graph, leaves: Sequence, request: Request) -> Bounded:
        """Bounds of the Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
        problem = _problem(self, self.pre_activation, graph, leaves, request)
        if problem is None:
            return _constant(graph, leaves, request)
        return problem.finished(problem.plain())


def _problem(
    method: Method, pre_activation: Method, graph: Graph, leaves: Sequence, request: Request
) -> Problem | None:
    check_certified("pre_activation", pre_activation)
    run = Run.over(graph, leaves, outward=request.rounding)
    chain = chain_of(run, type(method).__name__)
    if chain is None:
        return None
    if not chain.scalars:
        return Problem(run, chain, ())
    if run.eager and isinstance(pre_activation, Crown):
        # No more rows at once than the narrowest layer has: so all layers share the steps of a pass, compiled once.
        narrowest = min(scalar.op.size for scalar in chain.scalars)
        request = request._replace(max_rows=min(request.max_rows, 2 * max(ROWS, narrowest)))
    known = domains.pre_activations(pre_activation, graph, leaves, request)
    return Problem(run, chain, _ranges(run, chain.scalars, known))


def _ranges(run: Run, scalars: Sequence[Scalar], known: dict[int, Ends]) -> tuple[Ends, ...]:
    """The ranges of the derivatives, of all layers with the same function at once, so that it is compiled once."""
    groups: dict = {}
    for k, scalar in enumerate(scalars):
        groups.setdefault(k if scalar.used else (scalar.op.program, scalar.op.dtype), []).append(k)
    found: dict[int, Ends] = {}
    for members in groups.values():
        first, ends = scalars[members[0]], [known[scalars[k].number] for k in members]
        found.update(zip(members, run.call(_slopes, (first.op, first.used), first.constants, ends), strict=True))
    return tuple(found[k] for k in range(len(scalars)))


def _slopes(static: tuple[Op, tuple[int, ...]], constants: Sequence, ends: Sequence[Ends]):
    """Ranges of one function's derivative over the values of one layer or several, each flattened."""
    op, used = static
    sizes = [low.size for low, _ in ends]
    if len(ends) > 1:
        op = dataclasses.replace(op, shape=(sum(sizes),), input_shapes=((sum(sizes),),))
    low, high = (jnp.concatenate([pair[side].reshape(-1) for pair in ends]).reshape(op.shape) for side in (0, 1))
    low, high = slopes.slope_range(op, [constants[k] for k in used], (low, high))
    edges = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return [(low.reshape(-1)[a:b], high.reshape(-1)[a:b]) for a, b in itertools.pairwise(edges)]


def _constant(graph: Graph, leaves: Sequence, request: Request) -> Bounded:
    """The Jacobian of a function that does not depend on the region."""
    run = Run.over(graph, leaves, outward=request.rounding)
    ((_, number),) = graph.structure.outputs
    value = plain(graph.constants[number])
    batched = graph.axes is not None and graph.axes[number] is not None
    outputs = value.size // (value.shape[0] if batched else 1)
    zeros = jnp.zeros((*(() if run.batch is None else (run.batch,)), outputs, graph.nodes[0].op.size), value.dtype)
    return Bounded(zeros, zeros, zeros, zeros)


def _signs(_static: None, _constants: Sequence, found: Bounded):
    """The known signs of entries, the sums of absolute values in each row, and those of entries of unknown sign."""
    assert found.upper is not None
    low, high = found.lower - found.lower_rounding, found.upper + found.upper_rounding
    signs = jnp.where(low >= 0, 1, jnp.where(high <= 0, -1, 0)).astype(low.dtype)
    return signs, absolute_sums(found), jnp.sum(jnp.where(signs == 0, jnp.maximum(-low, high), 0), axis=-1)


def _least_sums(size: int, _constants: Sequence, plain: jax.Array, unsure: jax.Array, together: jax.Array):
    return jnp.fmin(plain, (together + unsure) * (1 + gamma(size + 2, plain.dtype)))
