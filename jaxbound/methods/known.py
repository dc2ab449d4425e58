"""Pre-activation bounds that are known already, with what they hold for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbound import errors
from jaxbound._compat import is_tracer
from jaxbound.graph import Graph
from jaxbound.methods.base import Ends, Method, Request
from jaxbound.regions.bounds import Estimate, Interval


class Origin(NamedTuple):
    """What bounds hold for, and what they were: a dictionary may be changed."""

    bounds: tuple[tuple[str, Interval | Estimate], ...]
    graph: Graph
    regions: tuple
    rounding: bool | str
    guarantee: str


class PreActivations(dict[str, Interval | Estimate]):
    """Bounds of the inputs of nonlinearities by node name, in the order of evaluation, from `pre_activation_bounds`.

    A pytree of intervals. What they hold for (`origin`) is lost where it is taken apart, as by `jax.jit` and `vmap`:
    then other numbers may stand in it.
    """

    def __init__(self, bounds: Mapping[str, Interval | Estimate], origin: Origin | None = None):
        super().__init__(bounds)
        self.origin = origin


jax.tree_util.register_pytree_with_keys(
    PreActivations,
    lambda known: ([(jax.tree_util.DictKey(name), interval) for name, interval in known.items()], tuple(known)),
    lambda names, intervals: PreActivations(dict(zip(names, intervals, strict=True))),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Known(Method):
    """Bounds of pre-activations from an earlier `pre_activation_bounds`, in the place of a method that computes them.

    They are taken only for the function, constants and regions that they were computed for, and where rounding counts
    only if it counted there: what is merely asserted is refused. It bounds no outputs itself.

    Args:
        bounds: what `pre_activation_bounds(fn, method, rounding=...)(*args)` returned.

    Raises:
        ArgumentTypeError: bounds that `pre_activation_bounds` did not return.
        ArgumentError: another function, other constants or regions, bounds without rounding where it counts; bounds
            that have passed through `jit`, and arguments under it, whose numbers cannot be compared.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> fn, box = lambda x: jax.nn.relu(3 * x).sum(), jb.Box(-jnp.ones(2), jnp.ones(2))
    >>> known = jb.pre_activation_bounds(fn, jb.IBP())(box)
    >>> float(jb.bound(fn, jb.Crown(pre_activation=jb.Known(known)))(box).upper)
    6.0
    """

    bounds: PreActivations

    @property
    def guarantee(self) -> str:
        """That of the method which computed the bounds."""
        return self._origin.guarantee

    @property
    def charges_constants(self) -> bool:
        """It does, if rounding counted there."""
        return bool(self._origin.rounding)

    @property
    def charges_execution(self) -> bool:
        """It does, if the bounds are of the network as it runs."""
        return self._origin.rounding == "execution"

    @property
    def _origin(self) -> Origin:
        way_out = "pass what pre_activation_bounds returned, as it is"
        if not isinstance(self.bounds, PreActivations):
            raise errors.argument_type("bounds", f"of Known is {type(self.bounds).__name__}", way_out)
        if self.bounds.origin is None:
            raise errors.argument("bounds", "of Known has passed through jit, vmap or tree.map", way_out)
        own = self.bounds.origin.bounds
        if list(self.bounds) != [name for name, _ in own] or any(self.bounds[name] is not known for name, known in own):
            raise errors.argument("bounds", "of Known was changed", way_out)
        return self.bounds.origin

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """The known bounds of the inputs of nonlinear nodes."""
        known = self._origin
        if known.rounding != request.rounding and (request.rounding or known.rounding == "execution"):
            how = f"with rounding={known.rounding!r}, and rounding={request.rounding!r} is wanted"
            raise errors.argument("bounds", f"of Known was computed {how}", "give pre_activation_bounds the same")
        if graph.structure is not known.graph.structure or graph.axes != known.graph.axes:
            raise errors.argument(
                "bounds", "of Known holds for another function", "compute it for the one that is given"
            )
        parts = {"constants": (graph.constants, known.graph.constants), "regions": (leaves, known.regions)}
        for what, (given, own) in parts.items():
            if not _same(given, own):
                raise errors.argument(
                    "bounds", f"of Known holds for other {what}", "compute it for those that are given"
                )
        sources = [source for number in graph.structure.nonlinear for source in graph.nodes[number].inputs]
        return {source: _ends(interval) for source, interval in zip(sources, self.bounds.values(), strict=True)}


def _ends(interval: Interval | Estimate) -> Ends:
    """Both ends."""
    assert interval.upper is not None
    return interval.lower, interval.upper


def _same(first: Any, second: Any) -> bool:
    """Whether two trees hold the same numbers; of tracers nothing is known unless they are the same one."""
    (one, of_one), (other, of_other) = jax.tree.flatten(tuple(first)), jax.tree.flatten(tuple(second))
    if of_one != of_other:
        return False
    known = [not (is_tracer(a) or is_tracer(b)) for a, b in zip(one, other, strict=True)]
    return all(a is b or (k and np.array_equal(a, b)) for a, b, k in zip(one, other, known, strict=True))
