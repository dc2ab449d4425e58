"""The best of several methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxbound import errors
from jaxbound.graph import Graph
from jaxbound.methods.base import Bounded, Ends, Method, Request, better, check_certified
from jaxbound.relaxations import interval


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, init=False)
class Best(Method):
    """The elementwise best of several certified methods.

    >>> import jaxbound as jb
    >>> jb.Best(jb.IBP(), jb.Forward())
    Best(methods=(IBP(), Forward(lower_slope='adaptive')))
    """

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method):
        if not methods:
            raise errors.argument(
                "Best", "has no method to choose from", "pass one or more, such as Best(IBP(), Crown())"
            )
        for method in methods:
            check_certified("a method of Best", method)
        object.__setattr__(self, "methods", methods)

    def tree_flatten(self):
        """The methods are the children."""
        return self.methods, None

    @classmethod
    def tree_unflatten(cls, _aux: Any, methods: Sequence[Method]):
        """Rebuild without checks."""
        best = object.__new__(cls)
        object.__setattr__(best, "methods", tuple(methods))
        return best

    @property
    def charges_constants(self) -> bool:
        """It does, if all its methods do."""
        return all(method.charges_constants for method in self.methods)

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """The intersection of what each method says."""
        first, *others = [method.pre_activations(graph, leaves, request) for method in self.methods]
        for other in others:
            first = {number: interval.intersect(first[number], other[number]) for number in first if number in other}
        return first

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """For each entry the best lower and the best upper bound."""
        first, *others = [method.bound(graph, leaves, request) for method in self.methods]
        for other in others:
            first = [better(a, b) for a, b in zip(first, other, strict=True)]
        return first
