"""The function transformations: from a JAX function and a method to a function of regions.

    bound(fn, method)(*args)                  bounds of fn's result
    linear_bounds(fn, method)(*args)          linear functions of the region below and above it
    pre_activation_bounds(fn, method)(*args)  bounds of every nonlinearity's input
    explain(fn, method)(*args)                what would be done, without doing it

Arguments are pytrees in which any leaf may be a region. `tune` is in `tuning`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbound import regions
from jaxbound.backend.sharding import anywhere
from jaxbound.methods import Method, Request, check_method, domains, rounding_mode
from jaxbound.methods.known import Origin, PreActivations
from jaxbound.regions import is_region
from jaxbound.regions.bounds import LinearBounds
from jaxbound.transforms.explanation import Explanation
from jaxbound.transforms.explanation import explain as _explain
from jaxbound.transforms.problems import (
    as_interval,
    aval_of,
    ends_of,
    fill,
    flat_function,
    prepare,
    regions_among,
    validate,
)


def bound(fn: Callable, method: Method, *, rounding: bool | str = False) -> Callable:
    """Transform a function of points into a function of regions.

    `lower <= fn(x) <= upper` for every `x` in the regions, elementwise.

    Args:
        fn: any JAX function of pytrees.
        method: how to bound it, e.g. `jaxbound.Crown()`.
        rounding: widen the result by a bound on the rounding errors of the computation, so that it holds for exact
            arithmetic on the given (floating-point) parameters. Without it, up to rounding. "exact" is True;
            "execution" is for every value that fn can give when it runs in its dtype (docs/guarantee.md).

    Returns:
        A function of fn's arguments, by place or by keyword, in which any leaf may be a `Box` or an `LpBall`, that
        returns a pytree like fn's result with `Interval` leaves (`Estimate` for a guarantee of "estimate").

    Raises:
        UnsupportedError: fn needs an operation that cannot be bounded; `explain` shows it beforehand.
        ArgumentError: a region is malformed (empty, negative radius, wrong shapes), when its values are concrete.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> jb.bound(jax.nn.relu, jb.IBP())(jb.Box(jnp.array([-1.0]), jnp.array([2.0])))
    Interval(lower=Array([0.], dtype=float32), upper=Array([2.], dtype=float32))
    """

    @functools.wraps(fn, updated=())
    @anywhere
    def bounded(*args: Any, **kwargs: Any):
        check_method("method", method)
        validate(args)
        validate(kwargs)
        mode = rounding_mode(rounding)
        problem = prepare(fn, args, kwargs=kwargs, rounding=bool(mode))
        results = iter(domains.bound(method, problem.graph, problem.leaves, Request(rounding=mode)))
        return fill(problem, lambda: as_interval(next(results), method.result), lambda c: method.result(*ends_of(c)))

    return bounded


def linear_bounds(fn: Callable, method: Method) -> Callable:
    """Linear functions of the regions below and above a function's result.

    `<lower_slope, x> + lower_intercept <= fn(x) <= <upper_slope, x> + upper_intercept` for every `x` in the regions.

    Args:
        fn: any JAX function of pytrees.
        method: a method with linear functions to show (`Crown` and its kin, `Forward`).

    Returns:
        A function of fn's arguments that returns a pytree like fn's result with `LinearBounds` leaves.

    Raises:
        UnsupportedError: the method has no linear functions, or fn cannot be bounded.

    Rounding: up to that of the computation.

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> planes = jb.linear_bounds(lambda x: 2 * x + 1, jb.Crown())(jb.Box(jnp.zeros(1), jnp.ones(1)))
    >>> planes.lower_slope[0]
    Array([[2.]], dtype=float32)
    """

    @functools.wraps(fn, updated=())
    @anywhere
    def bounded(*args: Any, **kwargs: Any):
        check_method("method", method)
        validate(args)
        validate(kwargs)
        problem = prepare(fn, args, kwargs=kwargs)
        results = iter(domains.planes(method, problem.graph, problem.leaves, Request()))

        def shaped(slopes: Iterable, like: Any = None):
            slopes = iter(slopes)
            leaves = [next(slopes) if region else None for region in problem.is_region]
            args, kwargs = jax.tree.unflatten(problem.tree, leaves)
            return (args, kwargs) if kwargs else args

        def dependent():
            low, low_intercept, high, high_intercept = next(results)
            return LinearBounds(shaped(low), low_intercept, shaped(high), high_intercept)

        def fixed(constant: jax.Array):
            structs = [regions.leaf_struct(leaf) for leaf in problem.leaves]
            zeros = shaped([jnp.zeros((*constant.shape, *struct.shape), struct.dtype) for struct in structs])
            return LinearBounds(zeros, constant, zeros, constant)

        return fill(problem, dependent, fixed)

    return bounded


def pre_activation_bounds(fn: Callable, method: Method, rounding: bool | str | None = False) -> Callable:
    """Bounds of the input of every nonlinearity, none skipped.

    `lower <= z(x) <= upper` for every `x` in the regions and the input z of every nonlinear node.

    Args:
        fn: any JAX function of pytrees.
        method: how to bound.
        rounding: as in `bound`.

    Returns:
        A function of fn's arguments that returns a dict from node names to `Interval`s, in the order of evaluation;
        a node with two inputs has two entries, `name:0` and `name:1`. It knows what it holds for: `Known` takes it.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> found = jb.pre_activation_bounds(lambda x: jax.nn.relu(3 * x), jb.IBP())(jb.Box(-jnp.ones(1), jnp.ones(1)))
    >>> list(found)
    ['001/relu']
    """

    @functools.wraps(fn, updated=())
    @anywhere
    def bounded(*args: Any, **kwargs: Any):
        check_method("method", method)
        validate(args)
        validate(kwargs)
        mode = rounding_mode(rounding)
        problem = prepare(fn, args, kwargs=kwargs, rounding=bool(mode))
        known = domains.pre_activations(method, problem.graph, problem.leaves, Request(rounding=mode))
        found = {}
        for number in problem.graph.structure.nonlinear:
            node = problem.graph.nodes[number]
            for k, source in enumerate(node.inputs):
                name = node.name if len(node.inputs) == 1 else f"{node.name}:{k}"
                found[name] = method.result(*known[source])
        return PreActivations(
            found, Origin(tuple(found.items()), problem.graph, problem.leaves, mode, method.guarantee)
        )

    return bounded


def explain(fn: Callable, method: Method) -> Callable[..., Explanation]:
    """What `bound(fn, method)` would do: nodes, kinds, rules and refusals, with no bounding work.

    Args:
        fn: any JAX function of pytrees.
        method: how it would be bounded.

    Returns:
        A function of fn's arguments (arrays or `jax.ShapeDtypeStruct`s, with regions among them) that returns an
        `Explanation`; print it for a table. What cannot be bounded is listed, not raised.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> jb.explain(jax.nn.relu, jb.Crown())(jb.Box(-jnp.ones(1), jnp.ones(1))).supported
    True
    """

    @functools.wraps(fn, updated=())
    def explained(*args: Any, **kwargs: Any):
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_region)
        chosen = regions_among(leaves)
        avals = tuple(aval_of(leaf, region) for leaf, region in zip(leaves, chosen, strict=True))
        return _explain(flat_function(fn, tree), avals, chosen, method)

    return explained
