"""What bounding a function would do, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxbound import errors
from jaxbound.graph import Node, tracing
from jaxbound.methods import Method
from jaxbound.relaxations import enclosures


@dataclass(frozen=True)
class Explanation:
    """The nodes of a function's graph and what a method does with each.

    `rows` has one `(name, kind, rule, shape, source)` per node; `refusals` the reasons why it cannot be bounded.

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> jb.explain(jnp.argsort, jb.IBP())(jb.Box(jnp.zeros(2), jnp.ones(2))).supported
    False
    """

    method: str
    guarantee: str
    rows: tuple[tuple[str, str, str, tuple[int, ...], str], ...]
    refusals: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether the function can be bounded."""
        return not self.refusals

    def __str__(self) -> str:
        lines = [f"{self.method} ({self.guarantee})"]
        if self.rows:
            table = [("node", "kind", "rule", "shape", "source"), *((*r[:3], str(r[3]), r[4]) for r in self.rows)]
            widths = [max(len(row[k]) for row in table) for k in range(5)]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, *(f"refused: {reason}" for reason in self.refusals)])


def explain(function: Callable, avals: Sequence, is_region: Sequence[bool], method: Method) -> Explanation:
    """Trace a flat function and describe its graph; see `transform.explain`."""
    name, guarantee = str(method), getattr(method, "guarantee", "certified")
    try:
        structure = tracing.build(function, avals, is_region)
    except errors.UnsupportedError as error:
        return Explanation(name, guarantee, (), error.refusals)
    rows = tuple((n.name, n.op.kind, _rule(n), n.op.shape, n.source) for n in structure.nodes)
    return Explanation(name, guarantee, rows, ())


def _rule(node: Node) -> str:
    op = node.op
    if op.kind == "input":
        return "region"
    if op.kind == "affine":
        return f"affine rule ({op.name})"
    return enclosures.of(op).describe(op)
