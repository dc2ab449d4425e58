"""Figures (extra `plot`): bounds per class, per pixel and against the radius, radii, lines, training and searches.

Each takes matplotlib axes, or makes its own without pyplot, so that nothing global changes and no display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound.certificates.proofs import files
from jaxbound.regions import Interval, LinearBounds


def _figure(panels: int = 1, **options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise errors.argument("axes", "are None", "pass axes, or pip install 'jaxbound[plot]'") from missing
    return Figure(figsize=(1 + 4 * panels, 4), layout="constrained", **options)


def _axes(axes: Any) -> Any:
    return _figure().subplots() if axes is None else axes


def bounds_per_class(
    bounds: Interval, outputs: ArrayLike | None = None, *, class_names: Sequence[str] | None = None, axes: Any = None
) -> Any:
    """Draw the interval of every output of one example.

    Args:
        bounds: ends of shape (classes,).
        outputs: the network's own, (classes,), as points.
        class_names: names in place of the classes' numbers.
        axes: matplotlib axes; new ones by default.

    Returns:
        The axes.

    Raises:
        ArgumentError: bounds of another shape; matplotlib is missing.

    >>> bounds_per_class(Interval(np.zeros(3), np.ones(3))).get_xlabel()
    'class'
    """
    low, high = np.asarray(bounds.lower), np.asarray(bounds.upper)
    if low.ndim != 1 or high.shape != low.shape:
        raise errors.argument("bounds", f"have shape {low.shape}", "pass those of one example, of shape (classes,)")
    axes, places = _axes(axes), np.arange(len(low))
    axes.bar(places, high - low, bottom=low, width=0.6, alpha=0.6)
    if outputs is not None:
        axes.plot(places, np.asarray(outputs), "k_", markersize=12)
    axes.set_xticks(places, list(class_names) if class_names is not None else [str(k) for k in places])
    axes.set(xlabel="class", ylabel="bounds of the output")
    return axes


def bounds_per_pixel(bounds: Interval) -> Any:
    """Draw lower bounds, upper bounds and widths as three images.

    Args:
        bounds: ends of shape (height, width) or (height, width, channels); of channels the mean is shown.

    Returns:
        The figure.

    Raises:
        ArgumentError: bounds of another shape; matplotlib is missing.

    >>> len(bounds_per_pixel(Interval(np.zeros((4, 4)), np.ones((4, 4)))).axes)  # with a scale each
    6
    """
    low, high = np.asarray(bounds.lower), np.asarray(bounds.upper)
    if low.ndim not in (2, 3) or high.shape != low.shape:
        raise errors.argument("bounds", f"have shape {low.shape}", "pass (height, width) or (height, width, channels)")
    figure = _figure(3)
    for axes, (title, values) in zip(
        figure.subplots(1, 3), {"lower": low, "upper": high, "width": high - low}.items(), strict=True
    ):
        figure.colorbar(axes.imshow(values if values.ndim == 2 else values.mean(axis=-1)), ax=axes)
        axes.set(title=title, xticks=[], yticks=[])
    return figure


def against_radius(
    radii: ArrayLike, values: Mapping[str, ArrayLike], *, quantity: str = "", log: bool = True, axes: Any = None
) -> Any:
    """Draw numbers against the radius, a curve each: widths of bounds, Lipschitz constants, verified accuracies.

    Args:
        radii: (radii,).
        values: from a curve's name to its numbers, (radii,).
        quantity: what the numbers are.
        log: whether both scales are logarithmic.
        axes: matplotlib axes; new ones by default.

    Returns:
        The axes.

    Raises:
        ArgumentError: a curve of another length; matplotlib is missing.

    >>> axes = against_radius([0.1, 0.2], {"ibp": [1.0, 3.0], "crown": [1.0, 2.0]}, quantity="width")
    >>> axes.get_xlabel(), axes.get_ylabel(), len(axes.lines)
    ('radius', 'width', 2)
    """
    axes, places = _axes(axes), np.ravel(np.asarray(radii))
    for name, curve in values.items():
        heights = np.ravel(np.asarray(curve))
        if heights.shape != places.shape:
            raise errors.argument("values", f"{name!r} are {heights.size} numbers", f"pass {places.size}, one a radius")
        axes.plot(places, heights, "o-", markersize=4, label=name)
    if log:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel="radius", ylabel=quantity)
    axes.legend()
    return axes


def certified_accuracy(radii: Mapping[str, ArrayLike], *, axes: Any = None) -> Any:
    """Draw, for each method, what part of the examples has at least which certified radius.

    Args:
        radii: from the method's name to what `certified_radius` found, (examples,).
        axes: matplotlib axes; new ones by default.

    Returns:
        The axes.

    >>> axes = certified_accuracy({"crown": [0.0, 0.1, 0.2]})
    >>> axes.lines[0].get_ydata().round(2).tolist()  # above each radius; a radius of 0 is no certificate
    [0.67, 0.67, 0.33, 0.0]
    """
    axes = _axes(axes)
    for name, found in radii.items():
        ends = np.sort(np.ravel(np.asarray(found)))
        held = [np.mean(ends > r) for r in ends]
        axes.step([0, *ends], [np.mean(ends > 0), *held], where="post", label=name)
    axes.set(xlabel="radius", ylabel="certified accuracy", ylim=(0, 1))
    axes.legend()
    return axes


def radius_histogram(radii: ArrayLike, *, bins: int = 20, axes: Any = None) -> Any:
    """Draw how many examples have which certified radius.

    Args:
        radii: (examples,).
        bins: how many bars.
        axes: matplotlib axes; new ones by default.

    Returns:
        The axes.

    >>> radius_histogram([0.1, 0.2], bins=4).get_ylabel()
    'examples'
    """
    axes, found = _axes(axes), np.ravel(np.asarray(radii))
    axes.hist(found, bins=bins)
    axes.axvline(np.median(found), color="k", linewidth=0.8)
    axes.set(xlabel="certified radius", ylabel="examples", title=f"median {np.median(found):.4g}")
    return axes


def lines(
    fn: Callable,
    interval: Interval,
    bounds: LinearBounds,
    *,
    name: str = "function",
    points: int = 200,
    axes: Any = None,
) -> Any:
    """Draw a function of one number between the two lines that enclose it.

    Args:
        fn: elementwise.
        interval: where it is enclosed, each end one number.
        bounds: what `linear_bounds(fn, method)(box)` gives for one number.
        name: what the function is called.
        points: how many of its values are drawn.
        axes: matplotlib axes; new ones by default.

    Returns:
        The axes.

    Raises:
        ArgumentError: bounds of more than one number; matplotlib is missing.

    >>> import jax, jaxbound as jb
    >>> found = jb.linear_bounds(jax.nn.relu, jb.Crown())(jb.Box(-1.0, 2.0))
    >>> [line.get_label() for line in lines(jax.nn.relu, Interval(-1.0, 2.0), found, name="relu").lines]
    ['relu', 'upper line', 'lower line']
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((bounds, interval))]
    if len(leaves) != 6 or any(leaf.size != 1 for leaf in leaves):
        raise errors.argument("bounds", f"have shapes {[leaf.shape for leaf in leaves]}", "pass those of one number")
    lower_slope, lower_intercept, upper_slope, upper_intercept, low, high = (leaf.item() for leaf in leaves)
    axes, z = _axes(axes), np.linspace(low, high, points)
    axes.plot(z, np.asarray(fn(z)), "k", label=name)
    axes.plot(z, upper_slope * z + upper_intercept, label="upper line")
    axes.plot(z, lower_slope * z + lower_intercept, label="lower line")
    axes.legend()
    return axes


def training_progress(history: Any) -> Any:
    """Draw how training went: errors of the batch at the step's radius, and the radius and weights of the schedule.

    Args:
        history: what the steps of training report (`jaxbound.training`), with an array of all steps in every field.

    Returns:
        The figure.

    >>> from jaxbound.training.step import Metrics
    >>> [axes.get_ylabel() for axes in training_progress(Metrics(*np.zeros((8, 3)))).axes]
    ['part of the batch', 'part of the largest']
    """
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    left.plot(np.asarray(history.robust_error), label="not certified")
    left.plot(np.asarray(history.clean_error), label="wrong")
    left.set(xlabel="step", ylabel="part of the batch")
    for name, label in (("eps", "radius"), ("kappa", "kappa"), ("beta", "beta")):
        values = np.asarray(getattr(history, name))
        right.plot(values / max(values.max(initial=0), np.finfo(np.float32).tiny), label=label)
    right.set(xlabel="step", ylabel="part of the largest")
    for axes in (left, right):
        axes.legend()
    return figure


def search_leaves(certificate: str | os.PathLike, *, coordinates: tuple[int, int] = (0, 1), axes: Any = None) -> Any:
    """Draw how a search split its region: the parts that prove a property, on two coordinates of the input.

    Args:
        certificate: the file that `verify(..., certificate=path)` wrote, of a search that splits inputs.
        coordinates: which two, in the flat input.
        axes: matplotlib axes; new ones by default.

    Returns:
        The axes, with a rectangle a leaf in `axes.patches`.

    Raises:
        ArgumentError: it splits neurons; the input has fewer coordinates; matplotlib is missing.
        CertificateError: the file is not whole.
    """
    from matplotlib.patches import Rectangle

    axes, stored = _axes(axes), files.load(certificate)
    parts = [part for box in stored.regions for part, _ in stored.prop.parts(box)]
    if any(tree.clause >= 0 for tree in stored.trees) or len(parts) != len(stored.trees):
        raise errors.argument("certificate", "splits neurons, not inputs", 'pass one of BranchAndBound(split="input")')
    first, second = coordinates
    for part, tree in zip(parts, stored.trees, strict=True):
        lower, upper = np.ravel(np.asarray(part.lower)), np.ravel(np.asarray(part.upper))
        if lower.size <= max(coordinates):
            raise errors.argument("coordinates", f"are {coordinates}", f"the input has {lower.size}")
        for low, high in _leaves(tree, lower, upper):
            corner, size = (low[first], low[second]), (high - low)[[first, second]]
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="k", linewidth=0.6))
    axes.autoscale_view()
    axes.set(xlabel=f"input {first}", ylabel=f"input {second}")
    return axes


def _leaves(tree: files.Tree, low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ends of the leaves' boxes; the tree stands in preorder."""
    pending = [(low, high)]
    for where, point in zip(tree.split.tolist(), tree.point, strict=True):
        if not pending:
            raise errors.CertificateError("the tree is not whole")
        low, high = pending.pop()
        if where == files.LEAF:
            yield low, high
        elif where == files.AGAIN:
            pending.append((low, high))
        else:
            below, above = high.copy(), low.copy()
            below[where] = above[where] = point
            pending += [(above, high), (low, below)]


def search_progress(history: Sequence[Mapping[str, float]]) -> Any:
    """Draw how a search went: the lower bound of the margin, and domains that are done and left, against seconds.

    Args:
        history: what `verify(progress=history.append)` told.

    Returns:
        The figure.

    >>> told = [{"seconds": 0.5, "nodes": 3, "left": 2, "lower": -1.0}]
    >>> [axes.get_ylabel() for axes in search_progress(told).axes]
    ['margin, lower bound', 'domains']
    """
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    seconds = [now["seconds"] for now in history]
    left.plot(seconds, [now["lower"] if np.isfinite(now["lower"]) else np.nan for now in history], ".-")
    left.axhline(0, color="k", linewidth=0.8)
    left.set(xlabel="seconds", ylabel="margin, lower bound")
    for name, label in (("nodes", "bounded"), ("left", "left")):
        right.plot(seconds, [now[name] for now in history], ".-", label=label)
    right.set(xlabel="seconds", ylabel="domains")
    right.legend()
    return figure
