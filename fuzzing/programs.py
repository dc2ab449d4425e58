"""Programs: lines of JAX on vectors, drawn at random from a table of operations.

A program is a chain of stages, each one nonlinear and one affine operation, which read the value before and the one
before that. Tracing and compiling is what a program costs, seconds for each stage, so most chains are short. A few
programs have any operation anywhere, or are the gradient of another one.

To add an operation: one line in a table, with `{x}` the last value, `{y}` an earlier one, `{v}` a vector of parameters,
`{m}` a matrix, `{n}` the size. What it calls must exist in `evaluation` too.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

RATIONAL = {
    "relu": "jax.nn.relu({x})",
    "abs": "jnp.abs({x})",
    "clip": "jnp.clip({x}, -1, 1)",
    "relu6": "jnp.minimum(jax.nn.relu({x}), 6)",
    "leaky": "jnp.where({x} > 0, {x}, 0.25 * {x})",
    "prelu": "jnp.where({x} > 0, {x}, {v} * {x})",
    "maximum": "jnp.maximum({x}, {y})",
    "minimum": "jnp.minimum({x}, {y})",
    "threshold": "jnp.maximum({x}, {v})",
    "product": "{x} * {y}",
    "square": "{x} * {x}",
    "largest": "{x} - jnp.max({x})",
    "sort": "jnp.sort({x})",
    "choice": "jnp.where({x} > {y}, {x}, {y} / 2)",
    "gate": "jnp.where({x} > 0.1, {y}, {v})",
    "step": "jnp.where({x} > {v}, 1.0, 0.0)",
    "floor": "jnp.floor({x})",
    "quotient": "{x} / (1 + jnp.abs({y}))",
    "reciprocal": "1 / (1 + {x} * {x})",
    "pole": "1 / {x}",
    "ratio": "{x} / {y}",
    "remainder": "jnp.mod({x}, 1.5)",
    "pieces": "jnp.select([{x} < -0.5, {x} < {y}], [{y}, 2 * {x}], {v})",
    "look-up": "jnp.interp({x}, jnp.array([-1.0, 0.0, 1.0]), jnp.array([0.0, 1.0, 0.5]))",
    "pool": "jax.lax.reduce_window({x}, -jnp.inf, jax.lax.max, (2,), (1,), 'SAME')",
}
SMOOTH = {
    "tanh": "jnp.tanh({x})",
    "sigmoid": "jax.nn.sigmoid({x})",
    "softplus": "jax.nn.softplus({x})",
    "silu": "jax.nn.silu({x})",
    "gelu": "jax.nn.gelu({x}, approximate=False)",
    "exp": "jnp.exp(jnp.minimum({x}, 3))",
    "log": "jnp.log(1 + {x} * {x})",
    "root": "jnp.sqrt(1 + {x} * {x})",
    "norm": "{x} / jnp.sqrt(jnp.sum({x} * {x}) + 0.01)",
    "sine": "jnp.sin({x})",
    "softmax": "jax.nn.softmax({x})",
    "logsumexp": "{x} - jax.nn.logsumexp({x})",
    "elu": "jax.nn.elu({x})",
    "angle": "jnp.arctan2({x}, {y})",
    "power": "(1 + {x} * {x}) ** jnp.clip({v}, -2, 2)",
    "cast": "jnp.clip(jnp.round(4 * {x}), -128, 127).astype(jnp.int8) * 0.25",
    "filter": "jnp.fft.irfft(jnp.fft.rfft({x}), n={n})",
}
AFFINE = {
    "dense": "{x} @ {m} + {v}",
    "matrix": "{x} @ {m}",
    "scale": "{x} * {v}",
    "shift": "{x} + {v}",
    "literal": "{x} * 0.3 - 0.7",
    "reverse": "{x}[::-1]",
    "running": "jnp.cumsum({x})",
    "centred": "{x} - jnp.mean({x})",
    "roll": "jnp.concatenate([{x}[1:], {x}[:1]])",
    "gather": "{x}[jnp.array([0] * {n})] - {x}",
    "divide": "{x} / {v}",
    "third": "{x} / 3",
    "add": "{x} + {y}",
    "subtract": "{y} - {x}",
    "mask": "jnp.where(jnp.arange({n}) % 2 == 0, {x}, {v})",
    "convolve": "jnp.convolve({x}, {v}[:2], mode='full')[:{n}]",
    "windows": "jax.lax.reduce_window({x}, 0.0, jax.lax.add, (2,), (1,), 'SAME')",
}
LINEAR_PIECES = ("relu", "abs", "clip", "relu6", "leaky", "maximum", "minimum", "threshold", "largest", "pool")
"""Of these MILP knows the exact range."""
_STAGES = [0.45, 0.3, 0.15, 0.1]
"""How often a chain has one stage, two, three or four."""
TABLE = RATIONAL | SMOOTH | AFFINE


@dataclasses.dataclass(frozen=True)
class Line:
    """One operation on values (numbers of earlier lines; the argument is number 0)."""

    name: str
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Lines on vectors of one size; the last value is the result, or its gradient's."""

    lines: tuple[Line, ...]
    size: int
    derivative: bool = False

    @property
    def is_rational(self) -> bool:
        """Whether every value is a rational function of the numbers before it."""
        return not self.derivative and all(line.name not in SMOOTH for line in self.lines)

    @property
    def has_linear_pieces(self) -> bool:
        """Whether MILP knows its range."""
        return not self.derivative and all(line.name in LINEAR_PIECES or line.name in AFFINE for line in self.lines)

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its parameters."""
        kinds = re.findall(r"\{([vm])\}", " ".join(TABLE[line.name] for line in self.lines))
        return [(self.size,) if kind == "v" else (self.size, self.size) for kind in kinds]

    def source(self, result: str = "") -> str:
        """The function in JAX; `result` is what it returns, by default the last value."""
        used, lines = 0, []
        for number, line in enumerate(self.lines, 1):
            text = TABLE[line.name]
            while match := re.search(r"\{[vm]\}", text):
                text = text[: match.start()] + f"p[{used}]" + text[match.end() :]
                used += 1
            values = {"x": f"v{line.x}", "y": f"v{line.y}", "n": self.size}
            lines.append(f"v{number} = " + text.format(**values))
        body = [*lines, f"return {result or f'v{len(self.lines)}'}"]
        if not self.derivative:
            return "def fn(p, v0):\n    " + "\n    ".join(body)
        inner = "\n        ".join(body)
        return (
            f"def fn(p, v0):\n    def inner(v0):\n        {inner}\n    return jax.grad(lambda v: jnp.sum(inner(v)))(v0)"
        )


def draw(rng: np.random.Generator) -> Program:
    """A random program."""
    kind = rng.random()
    return _anything(rng) if kind < 0.04 else dataclasses.replace(_chain(rng), derivative=kind > 0.97)


def _anything(rng: np.random.Generator) -> Program:
    """Operations of any kind on any values."""
    lines: list[Line] = []
    for last in range(int(rng.integers(2, 7))):
        name = str(rng.choice([*RATIONAL, *SMOOTH, *AFFINE]))
        lines.append(Line(name, max(0, last - int(rng.integers(0, 2))), int(rng.integers(0, last + 1))))
    return Program(tuple(lines), int(rng.integers(1, 4)))


def _chain(rng: np.random.Generator) -> Program:
    """One to four stages: a nonlinear operation and an affine one."""
    pieces, rational = rng.random() < 0.25, rng.random() < 0.6
    nonlinear = LINEAR_PIECES if pieces else list(RATIONAL) if rational else list(RATIONAL | SMOOTH)
    lines: list[Line] = []

    def add(name: str) -> None:
        lines.append(Line(name, len(lines), max(0, len(lines) - 1)))

    if rng.random() < 0.7:
        add("dense")
    for _ in range(int(rng.choice([1, 2, 3, 4], p=_STAGES))):
        name = str(rng.choice(nonlinear))
        add(name)
        add("dense" if rng.random() < 0.6 else str(rng.choice(list(AFFINE))))
    return Program(tuple(lines), 3)
