"""VNN-LIB: what is read has the file's points and no fewer, what is written is read back, what is broken is refused."""

from __future__ import annotations

import gzip
import os
import re
from fractions import Fraction
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import jaxbound as jb

HEAD = """; two inputs and two outputs
(declare-const X_0 Real)
(declare-const X_1 Real) (declare-const Y_0 Real)
(declare-const Y_1 Real)
(assert (>= X_0 -1.5)) (assert (<= X_0 1.5))
(assert (>= X_1 -1)) (assert (<= X_1 0.1))
"""

SECOND = """(vnnlib-version <2.0>)
(declare-network N
  (declare-input X float32 [1, 2]) (declare-output Y float32 [2]))
"""


def _evaluate(text: str, values: dict[str, Fraction]) -> bool:
    """The assertions, word by word, by another reader than the one that is tested."""
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(";.*", "", text))

    def read():
        token = tokens.pop(0)
        if token != "(":
            return token
        form = []
        while tokens[0] != ")":
            form.append(read())
        tokens.pop(0)
        return form

    def value(form):
        if isinstance(form, str):
            return values.get(form) if form in values else Fraction(form)
        head, *rest = form
        if head in ("declare-const",):
            return True
        parts = [value(part) for part in rest]
        if head == "-" and len(parts) == 1:
            return -parts[0]
        result = parts[0]
        for part in parts[1:]:
            result = {
                "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "and": lambda a, b: a and b,
                "or": lambda a, b: a or b, "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "=": lambda a, b: a == b,
            }[head](result, part)  # fmt: skip
        return result

    results = []
    while tokens:
        results.append(value(read()))
    return all(results)


def _holds(regions, prop, x, y) -> bool:
    return any(np.all(box.lower <= x) and np.all(x <= box.upper) for box in regions) and prop.violated(x, y)


@pytest.mark.parametrize(
    "formula",
    [
        "(assert (<= Y_0 Y_1))",
        "(assert (>= Y_0 0.25)) (assert (<= Y_1 0.5))",
        "(assert (or (and (>= Y_0 0.25) (<= Y_1 0)) (and (<= Y_0 (+ Y_1 X_0 0.5)))))",
        "(assert (or (<= X_0 -0.5) (>= X_0 0.25))) (assert (>= Y_0 Y_1))",
        "(assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= X_0 0) (>= Y_0 0.25))))",
        "(assert (<= (+ X_0 X_1) 0.25)) (assert (or (<= Y_0 0) (= Y_1 0.25)))",
        "(assert (<= (- (* 2 Y_0) (* Y_1 0.25) 0.1) (- X_1)))",
        "(assert (or (<= Y_0 0) (<= Y_1 0))) (assert (or (<= X_0 0.5) (and (>= X_0 0.25) (>= X_1 0))))",
        "(assert (and (<= 0 1) (or (<= 1 0) (<= Y_0 0.1))))",
    ],
)
def test_the_set_is_that_of_the_file(formula):
    regions, prop = jb.vnnlib.loads(HEAD + formula)
    again = jb.vnnlib.loads(jb.vnnlib.dumps(regions, prop))
    points = np.random.default_rng(0).integers(-8, 9, (400, 4)) / 4.0  # exact, and ties are many
    inside = 0
    for point in points:
        names = ("X_0", "X_1", "Y_0", "Y_1")
        wanted = _evaluate(HEAD + formula, dict(zip(names, map(Fraction, point), strict=True)))
        assert wanted == _holds(regions, prop, point[:2], point[2:]) == _holds(*again, point[:2], point[2:])
        inside += wanted
    assert 0 < inside < 400


def test_numbers_are_rounded_outward():
    regions, prop = jb.vnnlib.loads(HEAD.replace("-1.5", "-0.1").replace("1.5", "0.3") + "(assert (<= (* 3 Y_0) 0.1))")
    lower, upper = regions[0].lower[0], regions[0].upper[0]
    assert Fraction(lower) <= Fraction("-0.1") < Fraction(np.nextafter(lower, 1))
    assert Fraction(np.nextafter(upper, 0)) < Fraction("0.3") <= Fraction(upper)
    offset = prop.clauses[0].offsets[0] / prop.clauses[0].outputs[0, 0]
    assert Fraction(offset) >= Fraction(1, 30) > Fraction(np.nextafter(offset, 0))


def test_decimal_coefficients_are_exact():
    _, prop = jb.vnnlib.loads(HEAD + "(assert (<= (+ (* 0.1 Y_0) (* 0.7 Y_1)) 0.35))")
    row = prop.clauses[0]
    assert Fraction(row.outputs[0, 0]) * 7 == Fraction(row.outputs[0, 1]) and row.offsets[0] * 2 == row.outputs[0, 1]


def test_version_two_says_the_same_as_version_one():
    ends = "(assert (and (>= X[0,0] -1.5) (<= X[0, 0] 1.5) (>= X[0,1] -1.0) (<= X[0,1] 0.1)))\n"
    regions, prop = jb.vnnlib.loads(SECOND + ends + "(assert (or (<= Y[0] Y[1]) (> (* 2.0 Y[1]) (+ X[0,0] 3.0))))")
    first = HEAD + "(assert (or (<= Y_0 Y_1) (>= (* 2 Y_1) (+ X_0 3))))"
    assert jb.vnnlib.dumps(regions, prop) == jb.vnnlib.dumps(*jb.vnnlib.loads(first))


def test_clauses_of_several_boxes_say_where_they_count():
    text = "(assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= X_0 0) (<= Y_0 1))))"
    regions, prop = jb.vnnlib.loads(HEAD + text)
    assert len(regions) == 2 and all(clause.box is not None for clause in prop.clauses)
    assert [len(part.clauses) for _, part in prop.parts(regions[0])] == [1, 1]  # the other box touches it
    same = "(assert (or (<= X_0 0) (>= X_0 0))) (assert (<= Y_0 0))"
    assert all(clause.box is None for clause in jb.vnnlib.loads(HEAD + same)[1].clauses)


def test_files_plain_and_gzipped(tmp_path):
    regions, prop = jb.vnnlib.loads(HEAD + "(assert (<= Y_0 Y_1))")
    for name in ("p.vnnlib", "p.vnnlib.gz"):
        jb.vnnlib.dump(tmp_path / name, regions, prop)
        found, _ = jb.vnnlib.load(tmp_path / name)
        np.testing.assert_array_equal(found[0].lower, regions[0].lower)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"(assert (<= X_0 1))" * 50)[:40])
    for name in ("cut.gz", "absent.vnnlib"):
        with pytest.raises(jb.ArgumentError, match="cannot be read"):
            jb.vnnlib.load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD + "(assert (<= Y_2 0))", "line 7: 'Y_2' is neither a number nor a declared variable"),
        (HEAD + "(assert (<= Y_0 1e))", "line 7: '1e' is neither a number"),
        (HEAD + "(assert (<= Y_0 1e9999))", "line 7: the number '1e9999' is out of range"),
        (HEAD + "\n(assert (<= (* Y_0 Y_1) 0))", "line 8: (* Y_0 Y_1) multiplies variables"),
        (HEAD + "(assert (not (<= Y_0 0)))", "line 7: (not (...)) is not a comparison by <= or >="),
        (HEAD + "(assert (<= Y_0))", "line 7: (<= Y_0) compares 1 terms, not 2"),
        (HEAD + "(assert (<= Y_0 0)", "line 7: a parenthesis is opened and not closed"),
        (HEAD + "(assert (<= Y_0 0)))", "line 7: ')' stands outside of parentheses"),
        (HEAD + "(" * 100, "line 7: parentheses are nested deeper than 64"),
        (HEAD + "(declare-const X_0 Real)", "line 7: X_0 is declared again; it was in line 2"),
        (HEAD + "(declare-const X_3 Real)", "line 7: 3 variables X_i are declared, but not X_2"),
        (HEAD + "(declare-const Z_3 Real)", "line 7: (declare-const Z_3 Real) does not declare a real X_i or Y_i"),
        (HEAD + "(prove Y_0)", "line 7: (prove Y_0) is not a command of VNN-LIB"),
        (HEAD + "(assert (<= X_0 -2))", "line 1: no input satisfies the assertions"),
        (HEAD.replace("(assert (<= X_1 0.1))", ""), "line 1: X_1 has no upper bound"),
        ("(assert (<= X_0 1))", "line 1: 'X_0' is neither a number nor a declared variable"),
        ("", "line 1: no variable X_i is declared"),
        ("(vnnlib-version <3.0>)", "line 1: (vnnlib-version <3.0>): only versions <1.0> and <2.0> can be read"),
        ("(declare-network N (declare-input X int8 [1]) (declare-output Y Real [1]))", "line 1: X is not declared as an"),
        ("(declare-network N (declare-input X Real [1]))", "line 1: only one network of inputs and, behind them, outputs"),
        ("(declare-network N (declare-output Y Real [1]) (declare-input X Real [1]))", "line 1: only one network of inputs"),
        ("(declare-network N (declare-input X Real [1] x) (declare-output Y Real [1]))", "line 1: X is not declared as an"),
        (SECOND + "(declare-network M (declare-input A Real [1]) (declare-output B Real [1]))", "line 4: only one network can"),
        (SECOND + "(assert (<= X[0,5] 0))", "line 4: 'X[0,5]' is neither a number nor a declared variable"),
        (HEAD + "(assert (<= (+ (* 0.12345678901234567891 Y_0) (* 0.3 Y_1)) 0))", "line 7: the coefficients have too"),
        (HEAD + "(assert (or (<= Y_0 0) (<= Y_1 0)))\n" * 20, "combinations of `or`"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_with_line_and_reason(text, reason):
    with pytest.raises(jb.ArgumentError, match=re.escape(reason)):
        jb.vnnlib.loads(text)


def test_what_has_no_form_is_not_written():
    box = jb.Box(np.zeros(1), np.full(1, np.inf))
    with pytest.raises(jb.ArgumentError, match="cannot state the number inf"):
        jb.vnnlib.dumps(box, jb.Property.robust(0, 2))
    with pytest.raises(jb.ArgumentError, match="without regions or without clauses"):
        jb.vnnlib.dumps(box, jb.Property(()))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12), st.text(alphabet="()XY_019.eE-+<=> ;\nandor*é٣", max_size=8)), min_size=1, max_size=4)
)  # fmt: skip
def test_no_broken_file_raises_anything_else(edits):
    text = HEAD + "(assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= (* 2 X_0) 0) (<= (+ Y_0 (- Y_1)) 1))))"
    for place, length, put in edits:
        text = text[:place] + put + text[place + length :]
    try:
        regions, prop = jb.vnnlib.loads(text)
    except jb.ArgumentError as refusal:
        reason = str(refusal)
    else:
        reason = "line 0: " if regions and prop.clauses else ""
    assert re.match(r"line \d+: ", reason)


@pytest.mark.skipif("JAXBOUND_VNNCOMP" not in os.environ, reason="JAXBOUND_VNNCOMP names no folder of benchmarks")
def test_every_specification_of_a_folder_is_read():
    files = sorted(Path(os.environ["JAXBOUND_VNNCOMP"]).rglob("*.vnnlib*"))
    assert files
    for file in files:
        regions, prop = jb.vnnlib.load(file)
        assert regions and prop.clauses
