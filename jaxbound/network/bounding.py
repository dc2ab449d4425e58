"""The functions named after methods: a network's outputs over a ball around every example of a batch.

ibp | forward | fastlin | crown | crown_ibp | frown | cap (params, x, eps, ...) -> Interval(lower, upper)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound.backend.sharding import anywhere
from jaxbound.graph.values import Inexact, plain
from jaxbound.methods import IBP, Bounded, Crown, CrownIBP, FastLin, Forward, Method, Request, domains
from jaxbound.methods.frown import Frown
from jaxbound.methods.polytope import ConvexPolytope
from jaxbound.network.inputs import Clip, Inputs, region_around
from jaxbound.network.problems import problem_of, request_of
from jaxbound.network.resolving import resolve
from jaxbound.regions.bounds import Estimate, Interval
from jaxbound.transforms.problems import Problem


@anywhere
def bound_network(
    method: Method, params: Any, x: Inputs, eps: Any = None, *, apply_fn: Callable | None = None,
    activation: str | Callable | None = None, norm: float = np.inf, clip: Clip = None, spec: ArrayLike | None = None,
    sides: str = "both", memory_limit: int | None = None,
) -> Interval | Estimate:  # fmt: skip
    """Bounds of a network's outputs, or of linear specifications of them, over a ball around every example.

    `lower <= spec @ f(x') <= upper` for every x' with `||x' - x||_norm <= eps`, and `clip[0] <= x' <= clip[1]`.

    Args:
        method: how to bound.
        params: variables dict, bare parameters, `TrainState`, module, `Model` or Dense layers; see `resolve`. Arrays
            among variables and layers may be regions; without eps, they alone vary.
        x: floating, `(batch, *example shape)`; one example for a Dense chain or `Model`; or a region, and then no eps;
            or a tuple, list or dict of them, which apply_fn takes as it is.
        eps: radius in the given norm, shape () or (batch,), or per feature or channel, with as many axes as x: the
            ball is then `||(x' - x) / eps||_norm <= 1`. For several inputs one for all that are floating, or a tree
            like x with None for those that stay as they are.
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
    network = resolve(params, x, apply_fn, activation, weights=True)
    region = region_around(network.variables, x, eps, norm, clip, batched=network.batched)
    problem = problem_of(network, region, spec)
    if len(problem.graph.structure.outputs) != 1:
        raise errors.logits_alone(f"{len(problem.graph.structure.outputs)} arrays")
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
        params: Any, x: Inputs, eps: Any = None, *, apply_fn: Callable | None = None,
        activation: str | Callable | None = None, norm: float = np.inf, clip: Clip = None,
        spec: ArrayLike | None = None, sides: str = "both", memory_limit: int | None = None, **options: Any,
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
