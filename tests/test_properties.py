"""Properties say what a counterexample satisfies; equality counts as a violation."""

from __future__ import annotations

import numpy as np
import pytest

import jaxbound as jb


def test_robust_counts_ties_as_violations():
    prop = jb.Property.robust(label=1, classes=3)
    assert not prop.violated([0.0], [1.0, 1.5, 1.0])
    assert prop.violated([0.0], [1.0, 1.0, 0.0])
    assert prop.violated([0.0], [2.0, 1.0, 0.0])


def test_a_clause_holds_only_where_all_its_rows_do():
    prop = jb.Property.of([([1.0, 0.0], 1.0), ([0.0, 1.0], 2.0, [-1.0])])
    assert prop.violated([0.5], [1.0, 2.5])
    assert not prop.violated([0.5], [1.0, 2.6])
    assert not prop.violated([0.5], [1.1, 0.0])


def test_arithmetic_is_exact():
    y = [np.float64(1e16), np.float64(1.0)]
    assert not jb.Property.of([([1.0, 1.0], 1e16)]).violated([0.0], y)  # in float64 the sum is 1e16


def test_nothing_undefined_is_a_counterexample():
    assert not jb.Property.of([([1.0], 0.0)]).violated([0.0], [np.nan])
    assert not jb.Property.of([([1.0], 0.0)]).violated([0.0], [-np.inf])


def test_no_clause_is_never_violated_and_a_clause_without_rows_always():
    assert not jb.Property(()).violated([0.0], [0.0])
    assert jb.Property((jb.Clause(np.zeros((0, 1)), np.zeros(0)),)).violated([0.0], [0.0])


def test_margin_has_the_sign_of_the_verdict():
    prop = jb.Property.of([([1.0, -1.0], 0.0), ([1.0, 0.0], 1.0)], [([0.0, 1.0], -1.0, [1.0])])
    points = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    violations = [prop.violated(x[:1], x[1:]) for x in points]
    assert violations == [bool(prop.margin(x[:1], x[1:]) <= 0) for x in points]
    assert 0 < sum(violations) < 100


def test_parts_say_the_same_as_boxes():
    def boxed(low, high, offset):
        return jb.Clause(np.ones((1, 1)), np.array([offset]), box=(np.full(2, low), np.full(2, high)))

    prop = jb.Property((boxed(0.0, 1.0, 0.5), boxed(1.0, 2.0, 1.5), boxed(5.0, 6.0, 9.0), boxed(0.0, 1.0, 0.7)))
    whole = jb.Box(np.zeros((2, 1)), np.full((2, 1), 2.0))
    parts = prop.parts(whole)
    assert [len(part.clauses) for _, part in parts] == [2, 1]
    for x in np.random.default_rng(1).uniform(0, 2, (50, 2, 1)):
        for y in (0.4, 0.6, 1.2, 1.6):
            split = any(
                part.violated(x, [y]) for box, part in parts if np.all(box.lower <= x) and np.all(x <= box.upper)
            )
            assert split == prop.violated(x, [y])
    assert len(prop.parts(jb.Box(np.zeros((2, 1)), np.ones((2, 1))))) == 2  # the second box touches in a point


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([([1.0],)], r"clauses has rows at place 0 that do not fit"),
        ([([1.0], 0.0), ([1.0, 2.0], 0.0)], r"clauses has rows at place 0 that do not fit"),
        ([([np.nan], 0.0)], r"clauses has a number at place 0 that is not finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, text):
    with pytest.raises(jb.ArgumentError, match=text):
        jb.Property.of(rows)


def test_labels_and_sizes_are_checked():
    with pytest.raises(jb.ArgumentError, match="label is 3; pass a class from 0 to 2"):
        jb.Property.robust(3, 3)
    with pytest.raises(jb.ArgumentError, match="y has 2 numbers, but the property speaks of 3"):
        jb.Property.robust(0, 3).violated([0.0], [1.0, 2.0])
