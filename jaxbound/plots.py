"""Figures (extra `plot`): bounds per class and per pixel, certified accuracy, radii, the progress of a search.

Each takes matplotlib axes, or makes its own without pyplot, so that nothing global changes and no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound.regions import Interval


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
