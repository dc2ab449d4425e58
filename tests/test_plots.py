"""Figures show the numbers that they are given, without a display and without pyplot."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from jaxbound import errors, plots
from jaxbound.regions import Interval


def test_bounds_per_class():
    axes = plots.bounds_per_class(
        Interval(np.array([-1.0, 0.5]), np.array([2.0, 0.75])), [0.0, 0.6], class_names=["a", "b"]
    )
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(-1.0, 3.0), (0.5, 0.25)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]
    assert axes.lines[0].get_ydata().tolist() == [0.0, 0.6]
    with pytest.raises(errors.ArgumentError, match="pass those of one example"):
        plots.bounds_per_class(Interval(np.zeros((2, 3)), np.ones((2, 3))))


def test_bounds_per_pixel():
    figure = plots.bounds_per_pixel(Interval(np.zeros((2, 3, 2)), np.arange(12.0).reshape(2, 3, 2)))
    images = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    np.testing.assert_allclose(images["width"], [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]])
    assert list(images) == ["lower", "upper", "width"]
    with pytest.raises(errors.ArgumentError, match="height, width"):
        plots.bounds_per_pixel(Interval(np.zeros(3), np.ones(3)))


def test_certified_accuracy():
    axes = plots.certified_accuracy({"crown": [0.0, 0.5, 0.25, 0.5], "ibp": [0.0, 0.0]})
    crown, ibp = axes.lines
    assert crown.get_xdata().tolist() == [0, 0, 0.25, 0.5, 0.5] and crown.get_ydata().tolist() == [
        0.75,
        0.75,
        0.5,
        0,
        0,
    ]
    assert not np.any(ibp.get_ydata()) and [text.get_text() for text in axes.get_legend().get_texts()] == [
        "crown",
        "ibp",
    ]


def test_radii_and_searches_and_given_axes():
    axes = plots.radius_histogram([0.1, 0.2, 0.2], bins=2)
    assert [bar.get_height() for bar in axes.patches] == [1, 2] and "0.2" in axes.get_title()
    assert plots.radius_histogram([0.3], axes=axes) is axes
    told = [
        {"seconds": 1.0, "nodes": 1, "left": 2, "lower": -np.inf},
        {"seconds": 2.0, "nodes": 5, "left": 0, "lower": 0.5},
    ]
    margin, domains = plots.search_progress(told).axes
    assert np.isnan(margin.lines[0].get_ydata()[0]) and margin.lines[0].get_ydata()[1] == 0.5
    assert [list(line.get_ydata()) for line in domains.lines] == [[1, 5], [2, 0]]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.ArgumentError, match=r"pip install 'jaxbound\[plot\]'"):
        plots.radius_histogram([0.1])
