"""The input sets that bounds hold over: boxes and balls, their enclosing boxes, and whether a point is left.

A region is a `Box`, {x : lower <= x <= upper}, an `LpBall`, {x : ||x - center||_p <= radius}, possibly cut by a clip
box {x : low <= x <= high}, or one of the classes of SHAPED, which answer by methods what the functions here and in
`support` ask. All are pytrees of plain data and check nothing when built (`tree.map`, `in_axes` and `eval_shape` build
them from things that are not arrays): `validate` checks where bounding starts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbound import errors
from jaxbound._compat import eager_jit, is_tracer
from jaxbound.backend.tracing import inlined
from jaxbound.regions import balls
from jaxbound.regions.polytopes import Polytope
from jaxbound.regions.rounding import cast_to, next_number
from jaxbound.regions.zonotopes import Zonotope


@jax.tree_util.register_static
class Constants(tuple):
    """A clip box given as Python numbers: static, so that a ball can cross `vmap` with the default `in_axes`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """The set of every `x` with `lower <= x <= upper`, elementwise.

    Args:
        lower, upper: floating, both of the shape of the leaf they stand for; -inf and +inf are no end.

    >>> from jaxbound.regions import minimum
    >>> minimum(Box(jnp.zeros(2), jnp.ones(2)), jnp.array([1.0, -2.0]))
    Array(-2., dtype=float32)
    """

    lower: ArrayLike
    upper: ArrayLike

    @classmethod
    def around(cls, x: ArrayLike, eps: ArrayLike, clip: tuple[ArrayLike, ArrayLike] | None = None) -> Box:
        """The box of every point within `eps` of `x`, entry by entry, and within `clip`; rounded outward.

        Args:
            x: floating, the leaf's value.
            eps: a radius, or an array with as many axes as x, each 1 or x's: radii per entry or channel.
            clip: None, or `(low, high)`, which broadcast to x.

        Raises:
            ArgumentError: eps or clip do not fit x, or no point is left.

        >>> Box.around(jnp.array([0.25, 1.0]), 0.25, clip=(0.0, 1.0)).upper.round(3)
        Array([0.5, 1. ], dtype=float32)
        """
        size, shape = np.shape(eps), np.shape(x)
        if size and (len(size) != len(shape) or any(a not in (1, b) for a, b in zip(size, shape, strict=True))):
            raise errors.argument("eps", f"has shape {size}", f"pass a number, or an array that broadcasts to {shape}")
        radius = jnp.broadcast_to(eps, shape) if size else eps
        ball = LpBall(jnp.asarray(x), radius, math.inf, clip=clip)
        validate(ball, "x and eps", X_AND_EPS)
        return cls(*enclosing_box(ball))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LpBall:
    """The set of every `x` with `||x - center||_norm <= radius`, and `low <= x <= high` where `clip = (low, high)`.

    With a radius per feature it is `||(x - center) / radius||_norm <= 1`; a feature of radius 0 stays at its center.

    The norm is over all axes after the first `batch_ndim`: by default the leaf is one ball, not one per example. A
    center wider than JAX's widest enabled dtype is rounded to it first; radius and clip round outward.

    Args:
        center: floating, the shape of the leaf.
        radius: shape `()` or `center.shape[:batch_ndim]`, or `center.shape`, a radius per feature.
        norm: p >= 1 (static), `jnp.inf` included.
        clip: None, or a pair that broadcasts to `center.shape`; Python numbers beside an array center are static.
        batch_ndim: the number of leading axes that index separate balls (static).

    >>> from jaxbound.regions import minimum
    >>> minimum(LpBall(jnp.zeros(2), 0.5, 2), jnp.array([3.0, 4.0]))
    Array(-2.5, dtype=float32)
    """

    center: ArrayLike
    radius: ArrayLike
    norm: float = dataclasses.field(metadata={"static": True})
    clip: tuple[ArrayLike, ArrayLike] | None = dataclasses.field(default=None, kw_only=True)
    batch_ndim: int = dataclasses.field(default=0, kw_only=True, metadata={"static": True})

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", float(self.norm))
        # An `in_axes` tree has integers everywhere: beside a center that is not an array they stay leaves.
        numbers = (int, float) if hasattr(self.center, "shape") else (float,)
        clip = self.clip if isinstance(self.clip, tuple | list) else (None,)
        if all(type(end) in numbers for end in clip):
            object.__setattr__(self, "clip", Constants(clip))


SHAPED = (Polytope, Zonotope)
Region: TypeAlias = Box | LpBall | Polytope | Zonotope


def is_region(value: object) -> TypeGuard[Region]:
    """Whether `value` is a region; the `is_leaf` of `jax.tree.map` over arguments."""
    return isinstance(value, (Box, LpBall, *SHAPED))


def is_box(region: Region) -> bool:
    """Whether the region is an axis-aligned box; static, so it may steer Python control flow under `jit`."""
    return isinstance(region, Box) or (isinstance(region, LpBall) and region.norm == math.inf)


def leaf_struct(region: Region) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array that the region stands for: those of a ball's center, whatever its radius is."""
    if isinstance(region, SHAPED):
        return region.struct()
    if isinstance(region, LpBall):
        return jax.ShapeDtypeStruct(np.shape(region.center), jnp.result_type(region.center))
    return jax.ShapeDtypeStruct(np.shape(region.lower), jnp.result_type(region.lower, region.upper))


def enclosing_box(region: Region, dtype: DTypeLike | None = None) -> tuple[jax.Array, jax.Array]:
    """The smallest box around the region that its dtype can hold.

    `lower <= x <= upper` for every `x` in the region, in exact arithmetic. Both have the leaf's shape and `dtype`, by
    default the region's; an infinite radius gives -inf, +inf or the clip box. Subnormal numbers count as 0.

    Rounding: outward, narrowing casts included: one unit in the last place at most; exact for radius 0 and for a `Box`.

    >>> lower, upper = enclosing_box(LpBall(jnp.array([0.1]), 0.3, jnp.inf, clip=(0.0, 1.0)))
    >>> float(lower[0]), bool(upper[0] >= 0.4)
    (0.0, True)
    """
    return box_ends(region, np.dtype(leaf_struct(region).dtype if dtype is None else dtype), outward=True)


def magnitude(region: Region) -> jax.Array:
    """The largest `|x|` over the enclosing box, elementwise: `|x| <= magnitude(region)` for every `x` in the region."""
    return jnp.maximum(*map(jnp.abs, enclosing_box(region)))


def is_empty(region: Region) -> jax.Array:
    """Whether no point is left, or a part is NaN: what is bounded over such a region certifies nothing.

    A bool of shape `()`: lower > upper anywhere, or no real number between them, a negative radius, a NaN anywhere, or
    a ball that does not meet its clip box (for a product of balls: any of them).

    Rounding: a ball that misses its clip box by no more than rounding counts as non-empty.

    >>> bool(is_empty(LpBall(jnp.array([2.0]), 0.5, 2, clip=(0.0, 1.0))))
    True
    """
    if isinstance(region, SHAPED):
        return region.is_empty()
    lower, upper = enclosing_box(region)
    empty = jnp.any(~((lower <= upper) & (lower < jnp.inf) & (upper > -jnp.inf)))
    if isinstance(region, Box):
        return empty
    empty = empty | jnp.any(~(jnp.asarray(region.radius) >= 0))
    if region.clip is None or is_box(region):
        return empty
    ball = flat_ball(region)
    nearest = jnp.clip(ball.center, ball.low, ball.high)
    gap = nearest - ball.center
    # The ends were rounded when they were written down: 1.1 - 1.0 is not 0.1.
    doubt = jnp.where(gap == 0, 0, 2 * jnp.finfo(gap.dtype).eps * (jnp.abs(nearest) + jnp.abs(ball.center)))
    if ball.share is not None:
        still = (ball.share == 0) & (jnp.abs(gap) > doubt)
        gap, doubt = balls.unweighted(ball, gap), balls.unweighted(ball, doubt)
        empty = empty | jnp.any(still)
    reach = ball.radius * (1 + balls.slack(gap)) + balls.vector_norm(doubt, region.norm)
    return empty | jnp.any(~(balls.vector_norm(gap, region.norm) <= reach))


def box_ends(region: Region, dtype: np.dtype, outward: bool) -> tuple[jax.Array, jax.Array]:
    """The enclosing box; points are taken from the one that is not rounded outward."""
    if isinstance(region, SHAPED):
        return region.ends(dtype)
    if isinstance(region, Box):
        return cast_to(region.lower, dtype, -1), cast_to(region.upper, dtype, +1)
    own = leaf_struct(region).dtype
    center, radius = cast_to(region.center, own, 0), cast_to(region.radius, own, +1)
    radius = radius.reshape(radius.shape + (1,) * (center.ndim - radius.ndim))
    ends = center - radius, center + radius
    if outward:
        exact = jnp.broadcast_to(radius == 0, center.shape)
        ends = tuple(jnp.where(exact, center, next_number(end, side)) for end, side in zip(ends, (-1, +1), strict=True))
    lower, upper = cast_to(ends[0], dtype, -1), cast_to(ends[1], dtype, +1)
    if region.clip is not None:
        lower = jnp.maximum(lower, cast_to(region.clip[0], dtype, -1))
        upper = jnp.minimum(upper, cast_to(region.clip[1], dtype, +1))
    return lower, upper


def flat_ball(region: LpBall) -> balls.Ball:
    """The ball with one axis of features, and its clip box."""
    struct = leaf_struct(region)
    batch = struct.shape[: region.batch_ndim]
    flat = (*batch, math.prod(struct.shape[region.batch_ndim :]))
    low, high = (-math.inf, math.inf) if region.clip is None else region.clip
    low, high = cast_to(low, struct.dtype, -1), cast_to(high, struct.dtype, +1)
    low, high = (jnp.broadcast_to(end, struct.shape).reshape(flat) for end in (low, high))
    radius, share = cast_to(region.radius, struct.dtype, +1), None
    if radius.ndim > len(batch):
        radius, share = balls.weighted(radius.reshape(flat))
    radius = jnp.broadcast_to(radius, batch)
    return balls.Ball(cast_to(region.center, struct.dtype, 0).reshape(flat), radius, low, high, share)


X_AND_EPS = {"center": "x", "radius": "eps", "clip[0]": "clip[0]", "clip[1]": "clip[1]"}
"""What the parts of a ball are called where a caller gives them one by one."""


def validate(region: Region, name: str = "the region", parts_called: Mapping[str, str] | None = None) -> None:
    """Refuse a region that bounding cannot start from, and say what to do instead.

    Values are checked where they are concrete; under `jit` emptiness is left to `is_empty`. The names, of the region
    and of parts that have one of their own, are for the message.

    Raises:
        TypeError: integer, bool or complex data.
        ValueError: shapes that do not fit, norm < 1 or NaN, and concrete NaN, negative radius, lower > upper, or a ball
            that does not meet its clip box.
    """

    def called(part: str) -> str:
        return (parts_called or {}).get(part, f"{name}.{part}")

    parts = parts_of(region)
    for part, value in parts.items():
        if not hasattr(value, "dtype") and not isinstance(value, bool | int | float):
            raise errors.argument_type(called(part), f"is a {type(value).__name__}", "pass an array or a number")
    _check_shapes(region, name)
    for part, value in parts.items():
        dtype = jnp.result_type(value)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise errors.ArgumentTypeError(
                f"{called(part)} is {dtype}, which has no order: bound the real and imaginary parts"
            )
        if dtype == jnp.bool_ or (part in ("lower", "upper", "center") and jnp.issubdtype(dtype, jnp.integer)):
            raise errors.ArgumentTypeError(
                f"{called(part)} is {dtype}: integers have no neighbourhood: divide by 255, or use float32"
            )
    concrete = {part: v for part, v in parts.items() if not is_tracer(v) and not isinstance(v, jax.ShapeDtypeStruct)}
    for part, value in concrete.items():
        if np.any(np.isnan(np.asarray(value))):
            raise errors.ArgumentError(f"{called(part)} holds a NaN, and nothing can be bounded over it")
    if "radius" in concrete and np.any(np.asarray(concrete["radius"]) < 0):
        raise errors.ArgumentError(f"{called('radius')} is negative; pass eps >= 0")
    if len(concrete) == len(parts) and (not isinstance(region, LpBall) or region.clip is not None):
        with jax.ensure_compile_time_eval():
            void = bool(_is_empty()(region))
        if void:
            raise errors.ArgumentError(f"{name}: {_VOID[type(region)]}")


_VOID = {
    Box: "lower > upper somewhere, or no real number lies between: swap the ends",
    LpBall: "the ball does not meet its clip box: is the center in its range?",
    Polytope: "no point of the box satisfies A x <= b (or a part is infinite): check the signs of A and b",
    Zonotope: "a part is undefined: pass finite numbers",
}


@functools.cache
def _is_empty() -> Callable:
    return eager_jit(inlined(is_empty))


def _check_shapes(region: Region, name: str) -> None:
    if isinstance(region, SHAPED):
        region.check_shapes(name)
        return
    if isinstance(region, Box):
        lower, upper = np.shape(region.lower), np.shape(region.upper)
        if lower != upper:
            raise errors.ArgumentError(
                f"{name}: lower has shape {lower} and upper {upper}: broadcast both to the argument's shape"
            )
        return
    shape, radius, batch_ndim = np.shape(region.center), np.shape(region.radius), region.batch_ndim
    if not region.norm >= 1:
        raise errors.ArgumentError(f"{name}: norm={region.norm} is not a norm; pass p >= 1, such as 1, 2 or jnp.inf")
    if not 0 <= batch_ndim <= len(shape):
        raise errors.ArgumentError(
            f"{name}: batch_ndim={batch_ndim} must lie in 0..{len(shape)} for center of shape {shape}"
        )
    if radius not in ((), shape[:batch_ndim], shape):
        raise errors.ArgumentError(
            f"{name}: radius of shape {radius} fits neither () nor center.shape[:batch_ndim] = {shape[:batch_ndim]} "
            f"(center {shape}); one per example needs batch_ndim=1, one per feature center's shape"
        )
    for end in map(np.shape, region.clip or ()):
        pairs = zip(end[::-1], shape[::-1], strict=False)
        if len(end) > len(shape) or any(mine not in (1, size) for mine, size in pairs):
            raise errors.ArgumentError(f"{name}: an end of clip has shape {end}, which does not broadcast to {shape}")


def parts_of(region: Region) -> dict[str, ArrayLike]:
    """Every array of the region by name."""
    if isinstance(region, SHAPED):
        return region.parts()
    if isinstance(region, Box):
        return {"lower": region.lower, "upper": region.upper}
    if region.clip is not None and (not isinstance(region.clip, tuple | list) or len(region.clip) != 2):
        raise errors.ArgumentError(f"clip must be None or a pair (low, high), got {region.clip!r}")
    ends = {} if region.clip is None else {"clip[0]": region.clip[0], "clip[1]": region.clip[1]}
    return {"center": region.center, "radius": region.radius, **ends}
