"""Parameters and regions of every scale, and points of a region: random ones, corners, ties and kinks."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

import jaxbound as jb
from fuzzing.evaluation import rational

KINDS = ("box", "inf", "two", "one", "inf clipped", "two clipped", "one clipped")
STYLES = ("small integers", "normal", "scales", "subnormal")


def numbers(rng: np.random.Generator, shape, style: str, dtype) -> np.ndarray:
    """An array of a style."""
    drawn = rng.normal(size=shape)
    if style == "small integers":
        drawn = rng.integers(-2, 3, shape) / rng.choice([1, 2])
    elif style == "scales":
        drawn = drawn * 10.0 ** rng.integers(-40, 31)
        drawn = drawn * 10.0 ** rng.integers(-3, 4, shape) if rng.random() < 0.3 else drawn
    elif style == "subnormal":
        drawn = drawn * 10.0 ** rng.integers(-44, -36)
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(np.asarray(drawn, dtype), -1e35, 1e35)


def region(rng: np.random.Generator, size: int, style: str, dtype, kind: str) -> Any:
    """A box or a ball of a kind, maybe a point."""
    center, unit = numbers(rng, (size,), style, dtype), 1.0
    if style in ("scales", "subnormal"):
        unit = float(np.max(np.abs(center))) or 1.0
    radius = dtype(unit * rng.choice([0, 1e-3, 0.25, 0.5, 1, 2, 10]))
    if kind == "box":
        widths = (radius * rng.choice([0, 0.5, 1, 2], (2, size))).astype(dtype)
        return jb.Box(center - widths[0], center + widths[1])
    clip = None
    norm, _, cut = kind.partition(" ")
    if cut:
        clip = (center - dtype(radius / 2)).astype(dtype), (center + np.asarray(3 * radius / 4, dtype)).astype(dtype)
    return jb.LpBall(center, radius, {"inf": np.inf, "two": 2, "one": 1}[norm], clip=clip)


def contains(where: Any, x: np.ndarray) -> bool:
    """Whether a point of float64 numbers lies in a region, exactly."""
    exact = rational(x)
    if isinstance(where, jb.Box):
        return bool(np.all(exact >= rational(where.lower)) and np.all(exact <= rational(where.upper)))
    if where.clip is not None and not contains(jb.Box(*where.clip), x):
        return False
    distance, radius = np.abs(exact - rational(where.center)), Fraction(float(where.radius))
    if where.norm == 1:
        return sum(distance, Fraction(0)) <= radius
    if where.norm == 2:
        return sum(distance * distance, Fraction(0)) <= radius * radius
    return bool(np.all(distance <= radius))


def _box(where: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(where, jb.Box):
        return np.asarray(where.lower, np.float64), np.asarray(where.upper, np.float64)
    center, radius = np.asarray(where.center, np.float64), float(where.radius)
    low, high = center - radius, center + radius
    return low if where.clip is None else np.maximum(low, where.clip[0]), (
        high if where.clip is None else np.minimum(high, where.clip[1])
    )


def points(rng: np.random.Generator, where: Any, count: int) -> Iterator[np.ndarray]:
    """Points of a region in float64; each lies in it exactly."""
    low, high = _box(where)
    center = low / 2 + high / 2 if isinstance(where, jb.Box) else np.asarray(where.center, np.float64)
    for number in range(count):
        kind = number % 4
        if number == 0:
            x = center
        elif kind == 1:
            x = np.where(rng.random(low.shape) < 0.5, low, high)
        elif kind == 2:  # ties and kinks
            some = rng.choice([0.0, 1.0, -1.0, 0.5], low.shape)
            ends = rng.random(low.shape)
            x = np.where(
                (some >= low) & (some <= high), some, np.where(ends < 0.4, low, np.where(ends < 0.8, high, center))
            )
        else:
            x = low + rng.random(low.shape) * (high - low)
        yield from _pulled_in(where, center, np.clip(x, low, high))


def _pulled_in(where: Any, center: np.ndarray, x: np.ndarray) -> Iterator[np.ndarray]:
    """The point, or one nearer to the center that lies in the region."""
    if not isinstance(where, jb.Box) and where.norm != np.inf:
        length = np.linalg.norm(x - center, where.norm)
        if length > float(where.radius):
            x = center + (x - center) * (float(where.radius) / length)
    for shrink in (1.0, 1 - 1e-15, 1 - 1e-7, 0.9):
        near = center + shrink * (x - center) if shrink < 1 else x
        if contains(where, near):
            yield near
            return


def better(reference, params, where: Any, x: np.ndarray, entry: int, sign: float, rng) -> np.ndarray:
    """A few steps of ascent from a point, one coordinate at a time."""
    low, high = _box(where)

    def value(at: np.ndarray) -> float:
        found = float(reference.approximate(params, at)[0].reshape(-1)[entry]) * sign
        return found if found == found else -np.inf

    best, most = x, value(x)
    for _ in range(6):
        k = int(rng.integers(len(x)))
        for end in (low[k], high[k], best[k] / 2 + rng.uniform(low[k], high[k]) / 2):
            moved = best.copy()
            moved[k] = end
            if value(moved) > most and contains(where, moved):
                best, most = moved, value(moved)
    return best
