"""`tune`: the slopes that FROWN finds, to be used again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxbound import errors
from jaxbound.methods import Request, output_nodes
from jaxbound.methods.frown import Frown, best_of
from jaxbound.regions.bounds import Interval
from jaxbound.transforms.problems import as_interval, fill, prepare, validate


def tune(fn: Callable, method: Frown) -> Callable:
    """Bounds of a function's result, and the slopes that were found for them.

    `lower <= fn(x) <= upper` for every x in the regions.

    Args:
        fn: any JAX function of pytrees.
        method: how to tune.

    Returns:
        A function of fn's arguments that returns `(bounds, slopes)`: bounds as `bound(fn, method)` returns them, and
        `{node name: (lower, upper)}` for every nonlinear node with a choice of lines. The first axis of a slope is that
        of groups: those of the lower bounds of the result's entries, then those of its upper bounds. Pass them on as
        `Crown(slopes=slopes)`: every slope is sound, for other regions and parameters too. For a result with several
        leaves that depend on a region, slopes is a list with one such dictionary for each.

    Raises:
        UnsupportedError: fn cannot be bounded.
        ArgumentTypeError: the method is not `Frown`.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> fn, box = lambda x: jax.nn.relu(x).sum(), jb.Box(-jnp.ones(2), 2 * jnp.ones(2))
    >>> bounds, slopes = jb.tune(fn, jb.Frown(steps=5))(box)
    >>> {name: lower.shape for name, (lower, upper) in slopes.items()}
    {'001/relu': (2, 2)}
    """

    @functools.wraps(fn, updated=())
    def tuned(*args: Any):
        if not isinstance(method, Frown):
            raise errors.argument_type("method", f"is {method!r}", "pass a jaxbound.Frown(...)")
        validate(args)
        problem = prepare(fn, args)
        graph, request = problem.graph, Request()
        run, untuned = method.prepared(graph, problem.leaves, request)
        most = 2 * max((graph.nodes[k].op.size for k in output_nodes(graph)), default=1)
        run = replace(run, max_rows=most)  # all in one chunk
        found, slopes = [], []
        for number, first in zip(output_nodes(graph), untuned, strict=True):

            def rows(index: jax.Array, number: int = number):
                bounds, chosen = method.tuned_rows(run, number, index)
                slopes.append({graph.nodes[k].name: pair for k, pair in chosen.items()})
                return bounds

            found.append(best_of(run, first, *run.in_chunks(rows, number)))
        results = iter(found)
        bounds = fill(problem, lambda: as_interval(next(results)), lambda c: Interval(c, c))
        return bounds, slopes[0] if len(slopes) == 1 else slopes

    return tuned
