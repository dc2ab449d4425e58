"""What `certify` found: arrays, a table, columns for a data frame, a figure; and why it may have found nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxbound import errors
from jaxbound.network.inputs import Inputs, leaves_of
from jaxbound.regions import Box, LpBall, enclosing_box, is_region


@dataclass(frozen=True, eq=False)
class Report:
    """What `certify` found, one row per example; arrays are NumPy's.

    Args:
        margins: (N, classes - 1), lower bounds of the margins, j ascending.
        rounding: (N, classes - 1), how much of each may be rounding error; zeros with rounding=None.
        verified: bool (N,), every margin is finite and exceeds its rounding.
        correct: bool (N,), the clean prediction is right (a tie is not).
        eps: the radius, (), (N,) or one per feature, rounded up to the dtype of the computation; None for a `Box`.
        norm: the p of the balls; inf for a `Box`.
        method: the method's repr.
        batch_size: examples at once; the last batch may hold fewer.
        first_batch_seconds: wall time of the first batch: compiling and running.
        seconds: wall time of all batches, those of an earlier run included.
        labels: int (N,), true classes.
        remarks: what is likely wrong with the arguments, such as that all regions are empty.
        counterexamples: `(N, *example shape)`, points of the regions at which the network gives another class, or a
            tie; NaN where none is known. None from methods that do not search.

    >>> import jax.numpy as jnp
    >>> from jaxbound import IBP, certify
    >>> layers, x, labels = [(jnp.eye(2), jnp.zeros(2))], jnp.array([[0.9, 0.1]]), jnp.array([0])
    >>> report = certify(layers, x, labels, 0.5, method=IBP(), activation="relu")
    >>> report.clean_error, report.verified_error
    (0.0, 1.0)
    """

    margins: np.ndarray
    rounding: np.ndarray
    verified: np.ndarray
    correct: np.ndarray
    eps: np.ndarray | None
    norm: float
    method: str
    batch_size: int
    first_batch_seconds: float
    seconds: float
    labels: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
    counterexamples: np.ndarray | None = None

    @property
    def status(self) -> np.ndarray:
        """Per example "verified", "falsified" (a counterexample is known) or "unknown"."""
        known = np.zeros(len(self.verified), bool)
        if self.counterexamples is not None:
            known = np.isfinite(self.counterexamples.reshape(len(known), -1)).all(axis=1)
        return np.where(self.verified, "verified", np.where(known, "falsified", "unknown"))

    @property
    def verified_accuracy(self) -> float:
        """The fraction of examples that are verified."""
        return float(np.mean(self.verified))

    @property
    def verified_error(self) -> float:
        """The fraction of examples that are not verified."""
        return float(np.mean(~self.verified))

    @property
    def clean_error(self) -> float:
        """The fraction of examples that the network itself gets wrong."""
        return float(np.mean(~self.correct))

    @property
    def classes(self) -> np.ndarray:
        """The class j of every margin, int (N, classes - 1)."""
        if self.labels is None:
            raise errors.argument("labels", "are not in this report", "take it from certify")
        others = np.arange(self.margins.shape[1])
        return others + (others >= self.labels[:, None])

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, list]:
        """Columns of equal length, one row per example, as `pandas.DataFrame` takes them.

        Args:
            class_names: names in place of the classes' numbers.

        Returns:
            "label", "correct", "verified", and the least margin (less its rounding) as "margin" "against" a class; with
            one column more per class, "margin to j", NaN for the label itself.
        """
        name = (lambda k: int(k)) if class_names is None else (lambda k: class_names[int(k)])
        classes, certified = self.classes, self.margins - self.rounding
        least, rows = certified.argmin(axis=1), np.arange(len(classes))
        whole = np.full((len(classes), classes.shape[1] + 1), np.nan, certified.dtype)
        whole[rows[:, None], classes] = certified
        columns: dict[str, list] = {
            "label": [name(k) for k in np.asarray(self.labels)],
            "correct": self.correct.tolist(),
            "verified": self.verified.tolist(),
            "margin": certified[rows, least].tolist(),
            "against": [name(k) for k in classes[rows, least]],
        }
        return columns | {f"margin to {name(k)}": whole[:, k].tolist() for k in range(whole.shape[1])}

    def plot(self, axes: Any = None) -> Any:
        """Draw how many examples have at least which margin; verified is what lies right of 0.

        Args:
            axes: matplotlib axes; new ones by default (needs the extra: pip install 'jaxbound[plot]').

        Returns:
            The axes.
        """
        if axes is None:
            try:
                import matplotlib.pyplot as plt
            except ModuleNotFoundError as error:
                raise errors.argument("axes", "are None", "pass axes, or pip install 'jaxbound[plot]'") from error
            axes = plt.subplots()[1]
        least = np.sort((self.margins - self.rounding).min(axis=1))[::-1]
        axes.step(least, 100 * np.arange(1, len(least) + 1) / len(least), where="post")
        axes.axvline(0, color="k", linewidth=0.8)
        axes.set(xlabel="certified margin", ylabel="examples with at least this (%)", title=self._radius)
        return axes

    @property
    def _radius(self) -> str:
        if self.eps is None:
            return "regions as given"
        low, high = float(np.min(self.eps)), float(np.max(self.eps))
        return f"l{self.norm:g} radius {low:.6g}" + (f" to {high:.6g}" if high > low else "")

    def __str__(self) -> str:
        count = len(self.verified)
        wrong, unverified = count - int(self.correct.sum()), count - int(self.verified.sum())
        broken = int((self.status == "falsified").sum())
        lines = [
            f"{self.method}: {count} examples, {self._radius}",
            f"  clean error     {self.clean_error:8.2%}  ({wrong} examples)",
            f"  verified error  {self.verified_error:8.2%}  ({unverified} examples)",
            f"  seconds         {self.seconds:8.2f}  (the first batch {self.first_batch_seconds:.2f})",
        ]
        if self.counterexamples is not None:
            lines.insert(3, f"  falsified       {broken / count:8.2%}  ({broken} examples, each with a counterexample)")
        return "\n".join([*lines, *(f"  note: {remark}" for remark in self.remarks)])


def remarks(variables: Any, inputs: Inputs, margins: np.ndarray) -> tuple[str, ...]:
    """What explains that examples are not verified, though neither network nor method is to blame.

    Args:
        variables: the network's.
        inputs: the regions of all examples, with a batch axis.
        margins: (N, classes - 1), their bounds.

    >>> box = Box(np.ones((2, 3)), np.zeros((2, 3)))
    >>> remarks({}, box, np.full((2, 1), -np.inf))
    ('2 of 2 regions are empty: lower > upper',)
    """
    found, count = [], len(margins)
    with np.errstate(all="ignore"):
        undefined = sum(not np.all(np.isfinite(leaf)) for leaf in map(np.asarray, jax.tree.leaves(variables)))
        if undefined:
            found.append(f"{undefined} arrays of the parameters hold NaN or infinite values")
        unbounded = np.any(~np.isfinite(margins), axis=1)
        for leaf in leaves_of(inputs):
            low, high, reason = _box_of(leaf)
            axes = tuple(range(1, low.ndim))
            lost = np.any(np.isnan(low) | np.isnan(high), axis=axes)
            empty = np.any(low > high, axis=axes) & ~lost
            if lost.any():
                found.append(f"{lost.sum()} of {count} examples hold NaN")
            if empty.any():
                found.append(f"{empty.sum()} of {count} regions are empty: {reason}")
            unbounded = unbounded & ~lost & ~empty
        endless = unbounded
        if endless.any() and not undefined:
            found.append(
                f"{endless.sum()} of {count} examples have infinite bounds: the region is empty or endless, or the "
                "network undefined or unbounded there"
            )
    return tuple(found)


def _box_of(leaf: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """The box around regions, and why it may be empty."""
    if isinstance(leaf, Box):
        return np.asarray(leaf.lower), np.asarray(leaf.upper), "lower > upper"
    if not is_region(leaf):
        return np.asarray(leaf), np.asarray(leaf), ""
    if not isinstance(leaf, LpBall):
        low, high = map(np.asarray, enclosing_box(leaf))
        return low, high, "no point satisfies A x <= b"
    ball, radius = leaf, np.asarray(leaf.radius)
    center = np.asarray(ball.center)
    radius = radius.reshape(radius.shape + (1,) * (center.ndim - radius.ndim))
    if ball.clip is None:
        return center - radius, center + radius, ""
    low, high = (np.asarray(end, center.dtype) for end in ball.clip)
    reason = "clip[0] > clip[1], swap them" if np.any(low > high) else "x lies outside clip"
    allowed = 4 * np.finfo(center.dtype).eps * (np.abs(center) + radius)
    return np.maximum(center - radius - allowed, low), np.minimum(center + radius + allowed, high), reason
