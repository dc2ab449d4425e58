"""VNN-LIB: properties of networks as files, 1.0 read and written, 2.0 read where it speaks of one network.

A file declares inputs `X_0`, `X_1`, ... and outputs `Y_0`, `Y_1`, ..., or in 2.0 a network with input and output
arrays, whose entries `X[0,1]` are numbered in row-major order, one array after the other. It asserts what a
*counterexample* satisfies: comparisons of linear terms, joined by `and` and `or`. Reading brings the assertions into a
disjunction of conjunctions.
In each conjunction the rows of one input make a box, and the others a `Clause` (see `properties`).

Rounding is outward, always to the side where there are more counterexamples: what is verified of the result holds for
the decimal numbers in the file. Ends of boxes and offsets are the nearest float64 numbers outside; coefficients are
exact, or refused. Strict comparisons count as non-strict.
"""

from __future__ import annotations

import gzip
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxbound import errors
from jaxbound.certificates.properties import Clause, Property
from jaxbound.frontends import buffers, queries
from jaxbound.frontends.queries import refuse as _refuse
from jaxbound.regions import Box

_TOKEN = re.compile(r"[()]|[^\s()\[\]]+(?:\s*\[[^\]()]*\])?|\S")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE]([-+]?\d{1,6}))?", re.ASCII)
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)
_COMPARISONS = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b}
_COMPARISONS |= dict.fromkeys(("=", "=="), lambda a, b: a == b)
_IGNORED = ("set-logic", "set-info", "set-option", "check-sat", "get-model", "exit")
_DEEPEST, _LONGEST_NUMBER, _LARGEST_EXPONENT, _MOST_CLAUSES = 64, 2000, 400, 20_000

_Declared = dict[str, tuple[str, int]]
"""From what the file calls a variable to `X_i` or `Y_i`, and the line that declares it."""


class _Row(NamedTuple):
    """`sum(coefficient * variable) <= offset`, from a line of the file."""

    coefficients: dict[str, Fraction]
    offset: Fraction
    line: int


_End = tuple[int, int, float]
"""One end of an input: its number, the side (1: at most, -1: at least), and the value, rounded outward.

Large files are made of these: a plain tuple of numbers is nothing that Python's garbage collector has to visit.
"""

_Rows = list[_Row | _End]


def load(path: str | Path) -> tuple[list[Box], Property]:
    """Read a VNN-LIB file, 1.0 or 2.0, plain or gzipped.

    Every x and y that satisfy the file's assertions have x in one of the regions and `Property.violated(x, y)`, so
    what is verified over all regions is verified of the file.

    Args:
        path: the file.

    Returns:
        The input boxes, float64 of shape (inputs,), several inputs one behind the other as in `Model.flat`, and the
        property over them. Where the boxes have properties of
        their own, the clauses say in which box they count.

    Raises:
        ArgumentError: the file is not VNN-LIB, or of several networks; with the line and the reason.

    Rounding: outward.

    Reference: Demarchi, Guidotti, Pulina and Tacchella 2023, "Supporting standardization of neural networks
    verification with VNNLIB and CoCoNet".
    """
    text = text_of(path)
    try:
        return loads(text)
    except errors.ArgumentError as fault:
        raise errors.ArgumentError(f"{Path(path).name}, {fault}") from None


def text_of(path: str | Path) -> str:
    """The text of a file, plain or gzipped.

    Raises:
        ArgumentError: it cannot be read.
    """
    try:
        return str(buffers.unpacked(Path(path).read_bytes()), "utf-8", "replace")
    except (OSError, ValueError) as fault:
        raise errors.argument("path", f"{str(path)!r} cannot be read ({fault})", "pass a VNN-LIB file") from fault


def loads(text: str) -> tuple[list[Box], Property]:
    """Read VNN-LIB from a text; see `load`.

    >>> regions, prop = loads('''
    ... (declare-const X_0 Real) (declare-const Y_0 Real)
    ... (assert (>= X_0 -1)) (assert (<= X_0 0.5)) (assert (<= Y_0 (+ X_0 2)))''')
    >>> regions[0].upper, prop.violated(x=[0.5], y=[2.0])
    (array([0.5]), True)
    """
    declared: _Declared = {}
    common: _Rows = []
    choices: list[list[_Rows]] = []
    for form in _forms(text):
        line, command = form[0], form[1] if len(form) > 1 else ""
        if command == "assert" and len(form) == 3:
            alternatives = _alternatives(form[2], line, declared)
            if len(alternatives) == 1:
                common.extend(alternatives[0])
                continue
            choices.append(alternatives)
            if math.prod(map(len, choices)) > _MOST_CLAUSES:
                _refuse(line, f"more than {_MOST_CLAUSES} combinations of `or`")
        elif command in ("declare-const", "declare-fun"):
            _declare(form, declared)
        elif command == "declare-network":
            _declare_network(form, declared)
        elif command == "vnnlib-version":
            if form[2:] not in (["<1.0>"], ["<2.0>"]):
                _refuse(line, f"{_shown(form)}: only versions <1.0> and <2.0> can be read")
        elif command not in _IGNORED:
            _refuse(line, f"{_shown(form)} is not a command of VNN-LIB")
    inputs, outputs = (_count(declared, letter) for letter in "XY")
    return _joined(common, [list(itertools.chain(*choice)) for choice in itertools.product(*choices)], inputs, outputs)


# --- from text to rows ------------------------------------------------------------------------------------------------


def _forms(text: str) -> Iterator[list]:
    """The parenthesised forms, as nested lists, each beginning with its line."""
    form: list = []  # the innermost one that is open
    around: list[list] = []  # those that it stands in, of which the first is the file
    for line, written in enumerate(text.splitlines(), 1):
        for token in _TOKEN.findall(written.partition(";")[0]):
            if token == "(":
                if len(around) == _DEEPEST:
                    _refuse(line, f"parentheses are nested deeper than {_DEEPEST}")
                around.append(form)
                form = [line]
            elif not around:
                _refuse(line, f"{token[:40]!r} stands outside of parentheses")
            elif token != ")":
                form.append(re.sub(r"\s", "", token) if "[" in token else token)
            elif len(around) == 1:
                yield form
                form = around.pop()
            else:
                around[-1].append(form)
                form = around.pop()
    if around:
        _refuse([*around, form][1][0], "a parenthesis is opened and not closed")


def _shown(form: Any) -> str:
    if isinstance(form, list):
        return f"({' '.join(_shown(part) if isinstance(part, str) else '(...)' for part in form[1:4])[:60]})"
    return str(form)[:40]


def _declare(form: list, declared: _Declared) -> None:
    line, command, *rest = form
    wanted = 3 if command == "declare-fun" else 2
    name = rest[0] if len(rest) == wanted and isinstance(rest[0], str) else ""
    if not _VARIABLE.fullmatch(name) or rest[-1] != "Real" or (wanted == 3 and (not isinstance(rest[1], list))):
        _refuse(line, f"{_shown(form)} does not declare a real X_i or Y_i")
    if name in declared:
        _refuse(line, f"{name} is declared again; it was in line {declared[name][1]}")
    declared[name] = name, line


def _declare_network(form: list, declared: _Declared) -> None:
    """The entries of the inputs and outputs of a network, as 2.0 declares them, numbered one array after the other."""
    if declared:
        _refuse(form[0], "only one network can be read")
    query = queries.declared(form)
    for arrays, letter in ((query.inputs, "X"), (query.outputs, "Y")):
        entries = [(array, index) for array in arrays for index in np.ndindex(*array.shape)]
        for number, (array, index) in enumerate(entries):
            name = f"{array.name}[{','.join(map(str, index))}]" if array.shape else array.name
            if name in declared:
                _refuse(form[0], f"{name} is declared again")
            declared[name] = f"{letter}_{number}", form[0]


def _count(declared: _Declared, letter: str) -> int:
    names = {name: line for name, line in declared.values() if name[0] == letter}
    for number in range(len(names)):
        if f"{letter}_{number}" not in names:
            _refuse(max(names.values()), f"{len(names)} variables {letter}_i are declared, but not {letter}_{number}")
    if not names:
        _refuse(1, f"no variable {letter}_i is declared")
    return len(names)


def _alternatives(form: Any, line: int, declared: _Declared) -> list[_Rows]:
    """A formula as a disjunction of conjunctions of rows; [[]] is true, [] is false."""
    if not isinstance(form, list) or len(form) < 2 or not isinstance(form[1], str):
        _refuse(line, f"{_shown(form)} is not a formula")
    line, operator, *parts = form
    if operator in _COMPARISONS:
        if len(parts) != 2:
            _refuse(line, f"{_shown(form)} compares {len(parts)} terms, not 2")
        if operator[0] != "=" and _is_simple(parts, declared):  # nearly all rows of large files
            side = 1 if operator[0] == "<" else -1
            return [[(int(declared[parts[0]][0][2:]), side, _decimal(parts[1], side, line))]]
        left, right = (_linear(part, line, declared) for part in parts)
        ways = {"<": [(left, right)], ">": [(right, left)], "=": [(left, right), (right, left)]}
        return [[_difference(low, high, line) for low, high in ways[operator[0]]]]
    if operator in ("and", "or") and parts:
        found = [_alternatives(part, line, declared) for part in parts]
        size = math.prod(map(len, found)) if operator == "and" else sum(map(len, found))
        if size > _MOST_CLAUSES:
            _refuse(line, f"more than {_MOST_CLAUSES} combinations of `or`")
        if operator == "or":
            return list(itertools.chain(*found))
        return [list(itertools.chain(*choice)) for choice in itertools.product(*found)]
    return _refuse(line, f"{_shown(form)} is not a comparison by <= or >=, nor `and` or `or` of some")


def _is_simple(parts: list, declared: _Declared) -> bool:
    """Whether an input is compared with a number."""
    name, number = parts
    if not (isinstance(name, str) and isinstance(number, str)):
        return False
    return name in declared and declared[name][0][0] == "X" and number not in declared


_Linear = tuple[dict[str, Fraction], Fraction]


def _linear(term: Any, line: int, declared: _Declared) -> _Linear:
    """A term as coefficients and a constant."""
    if isinstance(term, str):
        if term in declared:
            return {declared[term][0]: Fraction(1)}, Fraction(0)
        return {}, _number(term, line)
    if len(term) < 3 or term[1] not in ("+", "-", "*"):
        _refuse(line, f"{_shown(term)} is not a sum, difference or product of terms")
    line, operator, *parts = term
    coefficients, constant = _linear(parts[0], line, declared)
    if operator == "-" and len(parts) == 1:
        return _scaled(coefficients, constant, Fraction(-1))
    for part in parts[1:]:
        others, number = _linear(part, line, declared)
        if operator == "*":
            if coefficients and others:
                _refuse(line, f"{_shown(term)} multiplies variables: only linear terms can be read")
            coefficients, constant = (
                _scaled(coefficients, constant, number) if coefficients else _scaled(others, number, constant)
            )
        else:
            sign = 1 if operator == "+" else -1
            coefficients = dict(coefficients)
            for name, value in others.items():
                coefficients[name] = coefficients.get(name, Fraction(0)) + sign * value
            constant += sign * number
    return coefficients, constant


def _scaled(coefficients: dict[str, Fraction], constant: Fraction, factor: Fraction) -> _Linear:
    return {name: factor * value for name, value in coefficients.items()}, factor * constant


def _number(text: str, line: int) -> Fraction:
    _check_number(text, line)
    return Fraction(text)


def _decimal(text: str, side: int, line: int) -> float:
    """A number rounded up (side 1) or down (side -1) to float64."""
    _check_number(text, line)
    near = float(text)
    exact, rounded = Decimal(text), Decimal(near)
    return near if rounded == exact or (rounded > exact) == (side > 0) else math.nextafter(near, side * math.inf)


def _check_number(text: str, line: int) -> None:
    match = _NUMBER.fullmatch(text)
    if not match:
        _refuse(line, f"{text[:40]!r} is neither a number nor a declared variable")
    if len(text) > _LONGEST_NUMBER or abs(int(match[1] or 0)) > _LARGEST_EXPONENT:
        _refuse(line, f"the number {text[:40]!r} is out of range")


def _difference(low: _Linear, high: _Linear, line: int) -> _Row | _End:
    """`low <= high` as a row, with variables on the left and the constant on the right."""
    coefficients = dict(low[0])
    for name, value in high[0].items():
        coefficients[name] = coefficients.get(name, Fraction(0)) - value
    coefficients, offset = {name: value for name, value in coefficients.items() if value}, high[1] - low[1]
    if len(coefficients) == 1:
        ((name, value),) = coefficients.items()
        if name[0] == "X":
            side = 1 if value > 0 else -1
            return int(name[2:]), side, _rounded(offset / value, side)
    return _Row(coefficients, offset, line)


# --- from rows to regions and a property ------------------------------------------------------------------------------


def _joined(common: _Rows, choices: list[_Rows], inputs: int, outputs: int) -> tuple[list[Box], Property]:
    """Boxes, and the clauses over them: one for each conjunction that some input can satisfy."""
    everywhere = np.full(inputs, -np.inf), np.full(inputs, np.inf)
    shared = _narrow(common, everywhere)
    groups: dict[bytes, tuple[tuple[np.ndarray, np.ndarray], dict[bytes, Clause]]] = {}
    for choice in choices if shared is not None else []:
        box = everywhere
        if not all(isinstance(row, _Row) for row in choice):
            box = everywhere[0].copy(), everywhere[1].copy()
        rows = _narrow(choice, box)
        if rows is None or np.any(box[0] > box[1]):
            continue
        clause = _clause([*(shared or []), *rows], inputs, outputs)
        group = groups.setdefault(_key(*box), (box, {}))
        group[1].setdefault(_key(clause.outputs, clause.inputs, clause.offsets), clause)
    if not groups:
        raise errors.ArgumentError("line 1: no input satisfies the assertions, so there is nothing to verify")
    for box, _ in groups.values():
        _check_box(*box)
    boxes = [Box(*box) for box, _ in groups.values()]
    if len({frozenset(clauses) for _, clauses in groups.values()}) == 1:
        return boxes, Property(tuple(next(iter(groups.values()))[1].values()))
    within = [(clause, box) for box, clauses in groups.values() for clause in clauses.values()]
    return boxes, Property(tuple(Clause(clause.outputs, clause.offsets, clause.inputs, box) for clause, box in within))


def _key(*arrays: np.ndarray | None) -> bytes:
    return b"|".join(b"" if array is None else array.tobytes() for array in arrays)


def _narrow(rows: _Rows, box: tuple[np.ndarray, np.ndarray]) -> list[_Row] | None:
    """The rows that are no ends of the box, which becomes narrower; None if a row without variables is false."""
    left = []
    lower, upper = box
    for row in rows:
        if not isinstance(row, _Row):
            place, side, value = row
            if side < 0:
                lower[place] = max(lower[place], value)
            else:
                upper[place] = min(upper[place], value)
        elif row.coefficients:
            left.append(row)
        elif row.offset < 0:
            return None
    return left


def _check_box(lower: np.ndarray, upper: np.ndarray) -> None:
    for end, word in ((lower, "lower"), (upper, "upper")):
        if np.isinf(end).any():
            name = f"X_{int(np.flatnonzero(np.isinf(end))[0])}"
            raise errors.ArgumentError(f"line 1: {name} has no {word} bound: every input must lie in a box")


def _rounded(value: Fraction, side: int) -> float:
    """The nearest float64 that is not below (side 1) or not above (side -1) a number."""
    try:
        near = float(value)
    except OverflowError:
        near = math.inf if value > 0 else -math.inf
    return math.nextafter(near, side * math.inf) if side * near < side * value else near


def _clause(rows: list[_Row], inputs: int, outputs: int) -> Clause:
    matrix, offsets = np.zeros((len(rows), inputs + outputs)), np.zeros(len(rows))
    for number, row in enumerate(rows):
        values = list(row.coefficients.values())
        # A row may be multiplied by any positive number; decimals then become integers.
        scale = 1 / abs(values[0]) if len(values) == 1 else Fraction(1)
        if not all(_is_exact(scale * value) for value in values):
            scale = Fraction(
                math.lcm(*(value.denominator for value in values)), math.gcd(*(v.numerator for v in values))
            )
        if not all(_is_exact(scale * value) for value in values):
            _refuse(row.line, "the coefficients have too many digits for float64; write them with 15 at most")
        for name, value in row.coefficients.items():
            place = int(name[2:]) + (inputs if name[0] == "Y" else 0)
            matrix[number, place] = float(scale * value)
        offsets[number] = _rounded(scale * row.offset, 1)
    of_inputs = matrix[:, :inputs]
    return Clause(matrix[:, inputs:].copy(), offsets, of_inputs.copy() if of_inputs.any() else None)


def _is_exact(value: Fraction) -> bool:
    try:
        return Fraction(float(value)) == value
    except OverflowError:
        return False


# --- a point ----------------------------------------------------------------------------------------------------------


def declared_network(text: str) -> queries.Query | None:
    """The network as a 2.0 text declares it; None for 1.0."""
    if "declare-network" not in text:  # large files are of 1.0, and were read once
        return None
    return next((queries.declared(form) for form in _forms(text) if form[1:2] == ["declare-network"]), None)


def satisfied(text: str, x: ArrayLike, y: ArrayLike) -> bool:
    """Whether an input and an output satisfy the assertions of a text, word by word, strict comparisons as such.

    Numbers are exact. Comparisons of inputs alone, unless strict, hold within a millionth, since a region may have no
    float where the text puts its ends.

    >>> satisfied("(declare-const X_0 Real) (declare-const Y_0 Real) (assert (< Y_0 X_0))", [1.0], [1.0])
    False
    """
    declared: _Declared = {}
    numbers = {f"X_{i}": Fraction(float(value)) for i, value in enumerate(np.ravel(x))}
    numbers |= {f"Y_{i}": Fraction(float(value)) for i, value in enumerate(np.ravel(y))}

    def holds(form: Any) -> bool:
        line, operator, *parts = form
        if operator in ("and", "or"):
            return (all if operator == "and" else any)(map(holds, parts))
        terms = [_linear(part, line, declared) for part in parts]
        left, right = (number + sum(factor * numbers[name] for name, factor in of.items()) for of, number in terms)
        inputs_alone = all(name[0] == "X" for of, _ in terms for name in of)
        near = inputs_alone and "=" in operator and abs(left - right) <= Fraction(1, 10**6) * max(1, abs(right))
        return near or _COMPARISONS[operator](left, right)

    asserted = []
    for form in _forms(text):
        command = form[1] if len(form) > 1 else ""
        if command == "assert":
            asserted.append(form[2])
        elif command in ("declare-const", "declare-fun"):
            _declare(form, declared)
        elif command == "declare-network":
            _declare_network(form, declared)
    return all(map(holds, asserted))


# --- writing ----------------------------------------------------------------------------------------------------------


def dump(path: str | Path, regions: Box | Sequence[Box], prop: Property) -> None:
    """Write regions and a property as a VNN-LIB 1.0 file, gzipped where its name ends in `.gz`; see `dumps`."""
    content = dumps(regions, prop).encode()
    Path(path).write_bytes(gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)


def dumps(regions: Box | Sequence[Box], prop: Property) -> str:
    """Regions and a property as VNN-LIB 1.0, number by number exact: `loads` reads the same set.

    Args:
        regions: a `Box`, or several, with finite ends.
        prop: the property over them.

    Raises:
        ArgumentError: an end is not finite, or there is no clause or region, which VNN-LIB cannot say.

    >>> print(dumps(Box(np.zeros(1), np.ones(1)), Property.robust(0, 2)))
    (declare-const X_0 Real)
    (declare-const Y_0 Real)
    (declare-const Y_1 Real)
    (assert (>= X_0 0))
    (assert (<= X_0 1))
    (assert (<= (+ (* 1 Y_0) (* -1 Y_1)) 0))
    """
    boxes = [regions] if isinstance(regions, Box) else list(regions)
    if not boxes or not prop.clauses:
        raise errors.ArgumentError("VNN-LIB cannot state a property without regions or without clauses")
    sizes = [np.size(boxes[0].lower), prop.clauses[0].outputs.shape[1]]
    lines = [
        f"(declare-const {letter}_{i} Real)" for letter, size in zip("XY", sizes, strict=True) for i in range(size)
    ]
    if any(clause.box is not None for clause in prop.clauses):
        pieces = [(box, clause) for region in boxes for box, part in prop.parts(region) for clause in part.clauses]
        lines += _asserted([_box_rows(box) + _clause_rows(clause) for box, clause in pieces])
    else:
        lines += _asserted([_box_rows(box) for box in boxes])
        lines += _asserted([_clause_rows(clause) for clause in prop.clauses])
    return "\n".join(lines)


def _asserted(alternatives: list[list[str]]) -> list[str]:
    if len(alternatives) == 1:
        return [f"(assert {row})" for row in alternatives[0]]
    return ["(assert (or", *(f"  (and {' '.join(rows)})" for rows in alternatives), "))"]


def _box_rows(box: Box) -> list[str]:
    ends = zip(np.ravel(np.asarray(box.lower)), np.ravel(np.asarray(box.upper)), strict=True)
    return [
        f"({sign} X_{number} {_written(end)})"
        for number, pair in enumerate(ends)
        for sign, end in zip((">=", "<="), pair, strict=True)
    ]


def _clause_rows(clause: Clause) -> list[str]:
    rows = []
    for number, offset in enumerate(clause.offsets):
        terms = [f"(* {_written(clause.outputs[number, i])} Y_{i})" for i in np.flatnonzero(clause.outputs[number])]
        if clause.inputs is not None:
            terms += [f"(* {_written(clause.inputs[number, i])} X_{i})" for i in np.flatnonzero(clause.inputs[number])]
        left = f"(+ {' '.join(terms)})" if len(terms) > 1 else terms[0] if terms else "0"
        rows.append(f"(<= {left} {_written(offset)})")
    return rows or ["(<= 0 0)"]


def _written(number: float) -> str:
    """All digits of a float64."""
    if not np.isfinite(number):
        raise errors.ArgumentError(f"VNN-LIB cannot state the number {number}")
    return str(Decimal(float(number)))
