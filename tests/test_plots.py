"""Figures show the numbers that they are given, without a display and without pyplot."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib")
import jaxbound as jb
from jaxbound import errors, plots
from jaxbound.regions import Interval
from jaxbound.training.step import Metrics


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


def test_against_radius():
    axes = plots.against_radius([0.1, 0.2], {"ibp": [1.0, 4.0], "crown": [1.0, 2.0]}, quantity="width")
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1, 4], [1, 2]]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylabel()) == ("log", "log", "width")
    assert plots.against_radius([0, 1], {"a": [0, 1]}, log=False, axes=axes) is axes
    with pytest.raises(errors.ArgumentError, match=r"'ibp' are 1 numbers.*pass 2"):
        plots.against_radius([0.1, 0.2], {"ibp": [1.0]})


def test_lines_enclose_the_function():
    found = jb.linear_bounds(jax.nn.gelu, jb.Crown())(jb.Box(-2.0, 1.0))
    function, upper, lower = plots.lines(jax.nn.gelu, Interval(-2.0, 1.0), found, name="GELU").lines
    assert np.all(lower.get_ydata() <= function.get_ydata()) and np.all(function.get_ydata() <= upper.get_ydata())
    with pytest.raises(errors.ArgumentError, match="pass those of one number"):
        plots.lines(jax.nn.gelu, Interval(np.zeros(2), np.ones(2)), found)


def test_training_progress():
    history = Metrics(*np.arange(24.0).reshape(8, 3))
    errors_, schedules = plots.training_progress(history).axes
    assert [line.get_label() for line in errors_.lines] == ["not certified", "wrong"]
    np.testing.assert_allclose(schedules.lines[0].get_ydata(), history.eps / history.eps.max())


def test_search_leaves_cover_the_region(tmp_path):
    """The leaves' areas sum up to the region's."""
    draw = np.random.default_rng(44)
    kernels = [draw.normal(size=shape).astype(np.float32) for shape in ((2, 6), (6, 6), (6, 1))]

    def network(x):
        for kernel in kernels[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ kernels[-1]

    axis = np.linspace(-1, 1, 101, dtype=np.float32)
    least = float(jax.vmap(network)(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)).min())
    box, path = jb.Box(-np.ones(2, np.float32), np.ones(2, np.float32)), tmp_path / "proof"
    prop = jb.Property.of([([1.0], least - 0.1)])
    verdict = jb.verify(network, box, prop, method=jb.BranchAndBound(split="input"), certificate=path, progress=False)
    assert verdict.status == "verified" and verdict.nodes > 1
    leaves = plots.search_leaves(path).patches
    assert len(leaves) > 1 and sum(leaf.get_width() * leaf.get_height() for leaf in leaves) == pytest.approx(4)
    with pytest.raises(errors.ArgumentError, match="the input has 2"):
        plots.search_leaves(path, coordinates=(0, 2))
    method = jb.BranchAndBound(split="relu")
    assert jb.verify(network, box, prop, method=method, certificate=path, progress=False).status == "verified"
    with pytest.raises(errors.ArgumentError, match="splits neurons"):
        plots.search_leaves(path)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.ArgumentError, match=r"pip install 'jaxbound\[plot\]'"):
        plots.radius_histogram([0.1])
