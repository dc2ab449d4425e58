"""PGD: the lower companion of every certificate.

An attack looks for a point of the region where the margin, true logit - largest other logit, is least. Each step goes
down the margin by the steepest direction of the region's norm, v = argmax <v, gradient> over ||v||_p <= 1, and projects
back. With 1/p + 1/q = 1 that is

    v = sign(g) |g|^(q - 1) / || |g|^(q - 1) ||_p,

which is sign(g) for p = inf and g / ||g||_2 for p = 2. For p = 1 it is a single coordinate, too slow in high dimension:
the largest hundredth of the coordinates share the step (Tramer and Boneh 2019). The best point ever seen is kept, the
start included, and every point lies in the region: a margin <= 0 here contradicts any certificate for that example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbound import errors
from jaxbound._compat import eager_jit, is_tracer, is_tracing, owned
from jaxbound.backend.caches import kept
from jaxbound.backend.sharding import anywhere
from jaxbound.network.inputs import is_several, region_around
from jaxbound.network.resolving import per_example_function
from jaxbound.regions import (
    Box,
    LpBall,
    Region,
    enclosing_box,
    is_box,
    is_region,
    leaf_struct,
    minimizer,
    per_example,
    project,
    sample,
)

_SHARE = 0.01  # of the coordinates that move in one step under the 1-norm


class Attack(NamedTuple):
    """What an attack found, one row per example; `margin[i]` is the margin of `x[i]`, a point of the region.

    Args:
        x: the worst points, shape `(batch, ...)`.
        margin: true logit - largest other logit there, shape `(batch,)`; NaN where network or label is undefined.
        success: bool `(batch,)`, True where the margin is not positive (a tie or NaN counts).

    >>> Attack(jnp.zeros((1, 2)), jnp.array([-1.0]), jnp.array([True])).success
    Array([ True], dtype=bool)
    """

    x: jax.Array
    margin: jax.Array
    success: jax.Array


@anywhere
def pgd(
    params: object,
    x: ArrayLike | Region,
    labels: ArrayLike,
    eps: ArrayLike | None = None,
    *,
    key: jax.Array,
    steps: int = 40,
    restarts: int = 1,
    step_size: ArrayLike | None = None,
    apply_fn: Callable | None = None,
    activation: str | Callable | None = None,
    norm: float = math.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
) -> Attack:
    """Attack a network on Flax parameters by projected gradient descent.

    `certified margin <= margin` for every sound certificate of the same examples and regions.

    Args:
        params: variables dict, bare parameters, `TrainState`, module or Dense layers; see `network.resolve`.
        x: a batch `(batch, ...)`, or a region whose first axis is the batch; then `eps`, `norm` and `clip` are omitted.
        labels: true classes, int `(batch,)`; `()` for a single example of a chain of Dense layers.
        eps: radius in `norm`, shape `()` or `(batch,)`.
        key: one key, typed or raw, folded with each example's index; or one key per example.
        steps: gradient steps per start.
        restarts: number of starts: x itself, then random points of the region.
        step_size: length of a step in `norm`; by default 2.5 * eps / steps.
        apply_fn: the model's `apply`; None for a chain of Dense layers with `activation` between.
        activation: of a chain of Dense layers; ReLU, with a warning, if it is not given.
        norm: p >= 1.
        clip: None or `(low, high)`, which every attacked input keeps to.

    Returns:
        An `Attack`.

    Raises:
        ValueError: eps missing or given beside a region, labels out of range (when concrete; under `jit` their margin
            is NaN), a region that `validate` refuses.

    Rounding: margins are the network's own, as computed; points lie in the region up to `project`'s rounding.

    Reference: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1.

    >>> chain = [(jnp.eye(2), jnp.zeros(2))]
    >>> x, labels = jnp.array([[0.5, 0.4]]), jnp.array([0])
    >>> pgd(chain, x, labels, 0.2, key=jax.random.key(0), activation="relu").margin.round(3)
    Array([-0.3], dtype=float32)
    """
    if is_several(x):
        raise errors.argument("x", "holds several inputs", "attack a function of one of them by pgd_on_function")
    _check_kind(x)
    points = _middle(x) if is_region(x) else x
    function, variables, points = per_example_function(params, points, apply_fn, activation)
    region = region_around(variables, x if is_region(x) else points, eps, norm, clip, batched=True)
    single = np.ndim(labels) == 0
    labels = jnp.reshape(jnp.asarray(labels), (1,)) if single else labels
    found = _checked(function, variables, _middle(region), region, labels, key, steps, restarts, step_size)
    return jax.tree.map(lambda leaf: leaf[0], found) if single else found


def pgd_on_function(
    function: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    region: Region,
    labels: ArrayLike,
    *,
    key: jax.Array,
    steps: int = 40,
    restarts: int = 1,
    step_size: ArrayLike | None = None,
) -> Attack:
    """Attack any function of one example; `pgd` is this on Flax parameters.

    `margin <= function's margin at x` where x lies in the region.

    Args:
        function: one example -> logits `(classes,)`.
        x: where the first start is, `(batch, ...)`; projected into the region.
        region: first axis is the batch; an `LpBall` has `batch_ndim >= 1`.
        labels: int `(batch,)`.
        key: one key folded with each example's index, or one key per example; results do not depend on the batch size.
        steps: gradient steps per start.
        restarts: number of starts: x itself, then random points of the region.
        step_size: length of a step in the region's norm; by default 2.5 / steps of the radius (of a `Box`: of each
            half-width).

    Returns:
        An `Attack`.

    Raises:
        TypeError, ValueError: labels that are no integers, not `(batch,)` or (when concrete) out of range, logits that
            are no vector, restarts < 1 or steps < 0.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[0.5, 0.4]])
    >>> ball = LpBall(x, 0.2, jnp.inf, batch_ndim=1)
    >>> found = pgd_on_function(lambda v: v, x, ball, jnp.array([0]), key=jax.random.key(0))
    >>> found.margin.round(3), bool(found.success[0])
    (Array([-0.3], dtype=float32), True)
    """
    return _checked(_Closed(function), (), x, region, labels, key, steps, restarts, step_size)


@dataclass(frozen=True)
class _Closed:
    """A function that has its parameters in it."""

    function: Callable

    def __call__(self, _variables: Any, example: jax.Array):
        return self.function(example)


def _checked(
    function: Callable,
    variables: Any,
    x: ArrayLike,
    region: Region,
    labels: ArrayLike,
    key: jax.Array,
    steps: int,
    restarts: int,
    step_size: ArrayLike | None,
) -> Attack:
    if restarts < 1 or steps < 0:
        raise errors.ArgumentError(f"pgd: restarts={restarts} must be at least 1 and steps={steps} at least 0")
    _check_kind(region)
    struct = leaf_struct(region)
    x, labels = owned(x, struct.dtype), _checked_labels(labels, struct.shape[0])
    if x.shape != struct.shape:
        raise errors.ArgumentError(f"pgd: x has shape {x.shape} and the region {struct.shape}")
    logits = jax.eval_shape(function, variables, jax.ShapeDtypeStruct(struct.shape[1:], struct.dtype))
    if len(logits.shape) != 1:
        raise errors.ArgumentError(
            f"pgd: the function must return a vector of logits for one example, got shape {logits.shape}"
        )
    classes = logits.shape[0]
    if not is_tracer(labels):
        wrong = np.asarray(labels)[(np.asarray(labels) < 0) | (np.asarray(labels) >= classes)]
        if wrong.size:
            raise errors.ArgumentError(
                f"pgd: label {wrong[0]} is not one of the network's {classes} classes, 0..{classes - 1}"
            )

    compiled = not is_tracing() and _is_hashable(function)
    pieces = (_compiled if compiled else _pieces)(function, restarts)
    region, keys = per_example(region), _example_keys(key, struct.shape[0])
    fold = _eager if compiled else _traced
    return _attack(pieces, variables, x, region, labels, keys, steps, step_size, logits.dtype, fold)


def _check_kind(region: Any) -> None:
    if is_region(region) and not isinstance(region, Box | LpBall):
        raise errors.argument(
            "x", f"is a {type(region).__name__}, which pgd does not attack", "pass a Box or an LpBall"
        )


def _is_hashable(function: Callable) -> bool:
    try:
        hash(function)
    except TypeError:
        return False
    return True


def _middle(region: Region) -> ArrayLike:
    return region.center if isinstance(region, LpBall) else minimizer(region, jnp.zeros(leaf_struct(region).shape))


def _checked_labels(labels: ArrayLike, batch: int) -> jax.Array:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise errors.ArgumentTypeError(f"pgd: labels are {labels.dtype}; pass class indices as integers")
    if labels.shape != (batch,):
        raise errors.ArgumentError(f"pgd: labels have shape {labels.shape}, and the batch needs ({batch},)")
    return labels


def _example_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key per example, which depends on the example's index and not on how many there are."""
    if not hasattr(key, "dtype"):
        raise errors.argument_type("key", f"is {key!r}", "pass a PRNG key such as jax.random.key(0)")
    single = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    if key.ndim > single:
        if key.shape[0] != batch:
            raise errors.ArgumentError(
                f"pgd: {key.shape[0]} keys for {batch} examples; pass one key, or one per example"
            )
        return key
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(batch))


def _margin(logits: jax.Array, label: jax.Array) -> jax.Array:
    """True logit - largest other logit; NaN for a label that is no class."""
    is_label = jnp.arange(logits.shape[0]) == label
    true = jnp.sum(jnp.where(is_label, logits, 0))
    other = jnp.max(jnp.where(is_label, -jnp.inf, logits), initial=-jnp.inf)
    return jnp.where(jnp.any(is_label), true - other, jnp.nan)


Best = tuple[jax.Array, jax.Array]
"""The worst points so far, and their margins."""


class _Pieces(NamedTuple):
    """What an attack is made of, each for a batch."""

    begin: Callable[..., tuple[jax.Array, jax.Array]]
    """`(x, region, keys, steps, step_size)` -> where to start, `(restarts, batch, ...)`, and how long steps are."""
    step: Callable[..., tuple[jax.Array, Best]]
    """`(variables, region, labels, length, points, best)` -> the next points, and the best with these points."""
    last: Callable[..., Best]
    """`(variables, labels, points, best)` -> the best with these points."""


def _pieces(function: Callable, restarts: int) -> _Pieces:
    def margin(variables: Any, label: jax.Array, point: jax.Array) -> jax.Array:
        return _margin(function(variables, point), label)

    def begin(
        x: jax.Array, region: Region, key: jax.Array, steps: ArrayLike, step_size: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array]:
        starts = project(region, x)[None]
        if restarts > 1:
            starts = jnp.concatenate([starts, sample(region, key, (restarts - 1,))])
        length = 2.5 * _radius(region) / jnp.maximum(steps, 1) if step_size is None else jnp.asarray(step_size)
        return starts, length

    def keep(best: Best, point: jax.Array, value: jax.Array) -> Best:
        better = (value < best[1]) | (jnp.isnan(value) & ~jnp.isnan(best[1]))
        return jnp.where(better, point, best[0]), jnp.where(better, value, best[1])

    def step(
        variables: Any, region: Region, label: jax.Array, length: jax.Array, point: jax.Array, best: Best
    ) -> tuple[jax.Array, Best]:
        value, gradient = jax.value_and_grad(margin, argnums=2)(variables, label, point)
        moved = project(region, point - length * _steepest(region, point, gradient))
        moved = jnp.where(jnp.isnan(moved), point, moved)  # a step of undefined length is none
        return moved.astype(point.dtype), keep(best, point, value)

    def last(variables: Any, label: jax.Array, point: jax.Array, best: Best) -> Best:
        return keep(best, point, margin(variables, label, point))

    return _Pieces(
        jax.vmap(begin, in_axes=(0, 0, 0, None, None), out_axes=(1, 0)),
        jax.vmap(step, in_axes=(None, 0, 0, 0, 0, 0)),
        jax.vmap(last, in_axes=(None, 0, 0, 0)),
    )


@kept(64)
def _compiled(function: Callable, restarts: int) -> _Pieces:
    begin, step, last = _pieces(function, restarts)
    return _Pieces(eager_jit(begin), eager_jit(step), eager_jit(last))


def _attack(
    pieces: _Pieces,
    variables: Any,
    x: jax.Array,
    region: Region,
    labels: jax.Array,
    keys: jax.Array,
    steps: int,
    step_size: ArrayLike | None,
    dtype: DTypeLike,
    fold: Callable,
) -> Attack:
    """The attack on a batch: a loop over the starts, and in it one over the steps."""
    starts, length = pieces.begin(x, region, keys, steps, step_size)

    def step(carry: tuple[jax.Array, Best], _: Any) -> tuple[tuple[jax.Array, Best], None]:
        return pieces.step(variables, region, labels, length, *carry), None

    def descend(best: Best, start: jax.Array) -> tuple[Best, None]:
        points, best = fold(step, (start, best), np.arange(steps))
        return pieces.last(variables, labels, points, best), None

    point, value = fold(descend, (starts[0], jnp.full(labels.shape, jnp.inf, dtype)), starts)
    return Attack(point, value, ~(value > 0))


def _traced(body: Callable, carry: Any, items: Any):
    return lax.scan(body, carry, items)[0]


def _eager(body: Callable, carry: Any, items: Any):
    """A loop of compiled pieces: XLA for CPU is bad at the gradients of convolutions that stand in its own loops."""
    for item in items:
        carry, _ = body(carry, item)
    return carry


def _radius(region: Region) -> jax.Array:
    """The radius, or a box's half-widths, in a shape that broadcasts to the leaf; 1 where it is infinite."""
    if isinstance(region, Box):
        lower, upper = enclosing_box(region)
        radius = 0.5 * upper - 0.5 * lower
    else:
        assert isinstance(region, LpBall)
        radius = jnp.asarray(region.radius)
        radius = radius.reshape(radius.shape + (1,) * (np.ndim(region.center) - radius.ndim))
    return jnp.where(jnp.isfinite(radius), radius, 1)


def _steepest(region: Region, point: jax.Array, gradient: jax.Array) -> jax.Array:
    """The direction of norm 1 along which the margin falls fastest, over coordinates that can still move."""
    lower, upper = enclosing_box(region)
    free = jnp.where(gradient > 0, point > lower, point < upper)
    gradient = jnp.where(free & jnp.isfinite(gradient), gradient, 0)
    if isinstance(region, Box) or is_box(region):
        return jnp.sign(gradient)
    assert isinstance(region, LpBall)
    rows = gradient.reshape(*gradient.shape[: region.batch_ndim], -1)
    size = jnp.abs(rows)
    peak = jnp.max(size, axis=-1, keepdims=True)
    if region.norm == 1:
        weights = (size >= jnp.quantile(size, 1 - _SHARE, axis=-1, keepdims=True)).astype(size.dtype)
    else:
        weights = (size / jnp.where(peak > 0, peak, 1)) ** (1 / (region.norm - 1))
    total = jnp.sum(weights**region.norm, axis=-1, keepdims=True) ** (1 / region.norm)
    return (jnp.sign(rows) * weights / jnp.where(peak > 0, total, 1)).reshape(gradient.shape)
