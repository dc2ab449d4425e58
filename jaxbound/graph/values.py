"""What a variable of a traced function can be: a number, an array that no region reaches, or a value that one does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive, bind


@dataclass(frozen=True)
class Literal:
    """One number, repeated over `shape`."""

    value: Any
    """A NumPy scalar."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The number's dtype."""
        return self.value.dtype


class Inexact(NamedTuple):
    """A constant as it was computed, and how far, entry by entry, it may be from its real value."""

    value: jax.Array
    error: jax.Array


def plain(constant: Any) -> Any:
    """A constant as it was computed."""
    return constant.value if isinstance(constant, Inexact) else constant


@dataclass(frozen=True)
class Constant:
    """The `number`-th variable of the constant program."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype
    known: np.ndarray | None = field(default=None, compare=False, repr=False, kw_only=True)
    """The array itself, where it is small and the same in every run."""
    parts: tuple = field(default=(), compare=False, repr=False, kw_only=True)
    """Real and imaginary part, where it is made of them."""


@dataclass(frozen=True)
class Computed(Constant):
    """A constant that is one number made of numbers, and rounded: between what its real value lies."""

    value: Any
    """A NumPy scalar."""
    real: tuple[float, float]


@dataclass(eq=False)
class Value:
    """A value that depends on a region, and the equation that makes it."""

    order: tuple
    """Where the equation stands; sorts the nodes."""
    shape: tuple[int, ...]
    dtype: np.dtype
    primitive: Primitive | None = None
    params: dict = field(default_factory=dict)
    operands: tuple = ()
    label: str = ""
    source: str = ""
    root: Value = None  # pyright: ignore[reportAssignmentType]
    """The value of which this is an entry-by-entry function; itself if it starts a chain."""
    before: Value | None = None
    """For a root that is an elementwise affine image, with array constants, of an earlier root: that root."""
    bends: bool = False
    """Whether the chain from the root contains a nonlinear operation."""
    sign: int = 0
    """What is certain of its sign (`definedness.sign_of`)."""
    reach: float = math.inf
    """Beyond which size it certainly is not, wherever it is defined (`normalisation.reach`)."""
    infinite: int = 0
    """What it may be beside real numbers (`infinities.of_result`)."""
    doubtful: bool = False
    """Whether infinite numbers may make it undefined (`infinities.is_doubtful`)."""
    node: int = -1
    """The number of its node, once it has one."""

    def __post_init__(self):
        self.root = self.root or self

    @property
    def name(self) -> str:
        """The name of the primitive that makes it."""
        return self.primitive.name if self.primitive else "input"

    @property
    def lineage(self) -> list[Value]:
        """The root, and the roots before it."""
        roots: list[Value] = []
        root: Value | None = self.root
        while root is not None:
            roots.append(root)
            root = root.before
        return roots

    @property
    def dependent(self) -> list[Value]:
        """The operands that depend on a region."""
        return [operand for operand in self.operands if isinstance(operand, Value)]


Operand = Literal | Constant | Value


def made_by(operand: Operand | None, *names: str) -> Value | None:
    """The operand if one of these primitives makes it."""
    return operand if isinstance(operand, Value) and operand.name in names else None


def unbroadcast(operand: Any):
    """What a value is before it was repeated or reshaped, without its gradient marks."""
    while made_by(operand, "broadcast_in_dim", "reshape", "squeeze", "stop_gradient"):
        operand = operand.operands[0]
    return operand


def put_back(operand: Any, source: Value, axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an operand is the source, reduced over the axes of a shape, put back along just these axes."""
    rest = tuple(axis for axis in range(len(shape)) if axis not in axes)
    reduced = tuple(shape[axis] for axis in rest)
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    while operand is not source:
        inner = operand.operands[0]
        known = inner.shape in (kept, reduced, shape) and operand.shape in (kept, reduced, shape)
        if operand.name == "broadcast_in_dim":
            expected = rest if len(inner.shape) < len(shape) else tuple(range(len(shape)))
            known = known and tuple(operand.params["broadcast_dimensions"]) == expected
        elif operand.name == "reshape":
            known = inner.shape == operand.shape or (known and shape not in (inner.shape, operand.shape))
        if not known:
            return False
        operand = inner
    return True


class ConstantProgram:
    """The equations that no region reaches, and how to run them."""

    def __init__(self):
        self.equations: list = []
        self.count = 0
        self.leaves: dict[int, int] = {}
        """Leaf of the arguments -> number."""
        self.captured: list[tuple[int, Any]] = []
        """Arrays that the function closes over."""
        self.used: list[int] = []

    def variable(self, aval: Any, **facts: Any) -> Constant:
        """A new constant of this shape and dtype."""
        self.count += 1
        return Constant(self.count - 1, tuple(aval.shape), aval.dtype, **facts)

    def slot(self, constant: Constant) -> int:
        """The position of a constant among the graph's constants."""
        if constant.number not in self.used:
            self.used.append(constant.number)
        return self.used.index(constant.number)

    def prune(self) -> None:
        """Drop the equations that no used constant needs."""
        needed, kept = set(self.used), []
        for equation in reversed(self.equations):
            if needed.isdisjoint(equation[3]):
                continue
            kept.append(equation)
            needed.update(operand.number for operand in equation[2] if isinstance(operand, Constant))
        self.equations = kept[::-1]
        self.leaves = {leaf: number for leaf, number in self.leaves.items() if number in needed}
        self.captured = [(number, array) for number, array in self.captured if number in needed]

    def axes(self, batched: list[int]) -> tuple[int | None, ...]:
        """Which of the graph's constants have a batch axis, if these argument leaves have one."""
        varying = {self.leaves[leaf] for leaf in batched if leaf in self.leaves}
        for _, _, operands, outputs in self.equations:
            if any(isinstance(o, Constant) and o.number in varying for o in operands):
                varying.update(outputs)
        return tuple(0 if number in varying else None for number in self.used)

    @property
    def computed(self) -> tuple[int, ...]:
        """The used constants that equations make; the others are arguments and captured arrays."""
        made = {number for _, _, _, outputs in self.equations for number in outputs}
        return tuple(number for number in self.used if number in made)

    def given(self, leaves: dict[int, Any]) -> dict[int, Any]:
        """The constants that no equation makes, from the argument leaves that are not regions."""
        return {number: leaves[leaf] for leaf, number in self.leaves.items()} | dict(self.captured)

    def values(self, leaves: dict[int, Any]) -> dict[int, Any]:
        """All constants."""
        values = self.given(leaves)
        for primitive, params, operands, outputs in self.equations:
            read = [values[o.number] if isinstance(o, Constant) else _array(o) for o in operands]
            results = bind(primitive, read, params)
            values.update(zip(outputs, results if primitive.multiple_results else [results], strict=True))
        return values

    def __call__(self, leaves: dict[int, jax.Array]) -> tuple[jax.Array, ...]:
        """The graph's constants, in order."""
        values = self.values(leaves)
        return tuple(values[number] for number in self.used)


def _array(literal: Literal):
    return jnp.full(literal.shape, literal.value) if literal.shape else literal.value
