"""What a search has to prove: the rows of a property's clauses, as arrays of the network's dtype, rounded safely.

A clause is refuted on a domain where one of its rows `outputs @ y + inputs @ x - offsets` is positive there, so a
domain is proved where every clause has a row with a positive lower bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxbound.certificates.properties import Property

Array = np.ndarray


class Goal(NamedTuple):
    """The rows of all clauses, clause by clause."""

    outputs: Array
    """(rows, outputs)."""
    inputs: Array | None
    """(rows, inputs), or None where no row has any."""
    offsets: Array
    """(rows,), rounded up."""
    clause: Array
    """Which clause a row belongs to, (rows,)."""

    @property
    def count(self) -> int:
        """How many clauses there are."""
        return int(self.clause.max(initial=-1)) + 1

    def best(self, lower: Array) -> Array:
        """The largest lower bound of every clause's rows, (..., clauses); NaN counts for nothing."""
        lower = np.where(np.isnan(lower), -np.inf, lower)
        return np.stack([lower[..., self.clause == k].max(axis=-1) for k in range(self.count)], axis=-1)

    def of(self, clause: Array) -> tuple[Array, Array | None, Array]:
        """The rows of one clause for each of several domains, (domains, rows, ...), the last one repeated."""
        members = [np.flatnonzero(self.clause == k) for k in range(self.count)]
        longest = max(map(len, members))
        table = np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in members])[clause]
        return self.outputs[table], None if self.inputs is None else self.inputs[table], self.offsets[table]


def goal_of(prop: Property, dtype: DTypeLike, sizes: tuple[int, int], reach: tuple[Array, Array]) -> Goal:
    """A property's rows in a dtype.

    Offsets are rounded up, and grow by what the rounding of coefficients can change.

    Args:
        prop: at least one clause, each with at least one row.
        dtype: of the network.
        sizes: how many inputs and outputs there are.
        reach: the largest magnitudes of inputs and of outputs, flat.
    """
    outputs = np.concatenate([clause.outputs for clause in prop.clauses]).reshape(-1, sizes[1])
    offsets = np.concatenate([clause.offsets for clause in prop.clauses])
    nothing = [np.zeros((len(c.offsets), sizes[0])) if c.inputs is None else c.inputs for c in prop.clauses]
    inputs = np.concatenate(nothing) if any(c.inputs is not None for c in prop.clauses) else None
    clause = np.repeat(np.arange(len(prop.clauses)), [len(c.offsets) for c in prop.clauses])
    slack = np.zeros(len(offsets))
    for exact, size in ((inputs, reach[0]), (outputs, reach[1])):
        if exact is not None:
            lost = np.abs(exact - exact.astype(dtype).astype(np.float64))
            slack += np.where(lost > 0, lost * np.where(lost > 0, size, 0), 0).sum(axis=1) * (1 + 1e-9)
    wanted = np.where(slack > 0, np.nextafter(offsets + slack, np.inf), offsets)
    near = wanted.astype(dtype)
    near = np.where(near < wanted, np.nextafter(near, np.array(np.inf, dtype)), near)
    return Goal(outputs.astype(dtype), None if inputs is None else inputs.astype(dtype), near, clause)
