"""Broken VNN-LIB: properties are drawn, broken, read, and held against a reader that evaluates them word by word."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np

import jaxbound as jb

_FIRST = "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
_SECOND = "(vnnlib-version <2.0>)\n(declare-network N (declare-input X real [1,2]) (declare-output Y real [2]))\n"
_NAMES = {"1": ("X_0", "X_1", "Y_0", "Y_1"), "2": ("X[0,0]", "X[0,1]", "Y[0]", "Y[1]")}
_WORDS = [
    "(",
    ")",
    "and",
    "or",
    "<=",
    ">=",
    "<",
    "==",
    "+",
    "-",
    "*",
    "1.5",
    "-0.25",
    "1e2",
    "assert",
    "X_0",
    "Y_1",
    ";",
    "not",
]


def draw(rng: np.random.Generator) -> str:
    """A property over two inputs and two outputs, of either version."""
    version = "12"[rng.integers(2)]
    names = _NAMES[version]

    def number() -> str:
        return str(rng.integers(-8, 9) / 4)

    def term(depth: int) -> str:
        if depth == 0 or rng.random() < 0.5:
            return names[rng.integers(4)] if rng.random() < 0.7 else number()
        parts = f"{term(depth - 1)} {term(depth - 1)}"
        return [f"(+ {parts})", f"(- {parts})", f"(* {number()} {term(depth - 1)})", f"(- {term(depth - 1)})"][
            rng.integers(4)
        ]

    def formula(depth: int) -> str:
        if depth == 0 or rng.random() < 0.4:
            return f"({('<=', '>=')[rng.integers(2)]} {term(2)} {term(1)})"
        return f"({('and', 'or')[rng.integers(2)]} {' '.join(formula(depth - 1) for _ in range(rng.integers(1, 4)))})"

    ends = "".join(f"(assert (>= {name} -1.0))\n(assert (<= {name} 1.25))\n" for name in names[:2])
    rest = "".join(f"(assert {formula(2)})\n" for _ in range(rng.integers(1, 3)))
    return (_FIRST if version == "1" else _SECOND) + ends + rest


def broken(text: str, rng: np.random.Generator) -> str:
    """The text with a few words or characters changed; sometimes none."""
    for _ in range(rng.integers(0, 3)):
        text = _changed(text, rng) or " "
    return text


def _changed(text: str, rng: np.random.Generator) -> str:
    place, words = int(rng.integers(len(text))), re.findall(r"\s+|[()]|[^\s()]+", text)
    word, length, letter = int(rng.integers(len(words))), int(rng.integers(1, 8)), chr(int(rng.integers(32, 127)))
    return [
        text[:place] + text[place + length :],
        text[:place] + letter + text[place:],
        text + text[place:],
        "".join(words[:word] + words[word + 1 :]),
        "".join([*words[:word], _WORDS[rng.integers(len(_WORDS))], *words[word + 1 :]]),
        "".join([*words[:word], words[rng.integers(len(words))], *words[word:]]),
    ][rng.integers(6)]


def check(text: str, rng: np.random.Generator) -> str:
    """What became of a text: refused, equal or wrong."""
    try:
        regions, prop = jb.vnnlib.loads(text)
    except jb.JaxboundError:
        return "refused"
    inputs, outputs = np.size(regions[0].lower), prop.clauses[0].outputs.shape[1]
    for number in range(20):
        point = rng.integers(-8, 9, inputs + outputs) / 4 if number % 2 else rng.uniform(-2, 2, inputs + outputs)
        x, y = point[:inputs], point[inputs:]
        found = any(
            part.violated(x, y)
            for region in regions
            for box, part in prop.parts(region)
            if np.all(box.lower <= x) and np.all(x <= box.upper)
        )
        wanted = _holds(text, x, y)
        if wanted and not found:
            return "wrong"
        if found and not wanted and number % 2 == 0:  # at points without ties, both must be the same
            return "wrong"
    return "equal"


def _holds(text: str, x: np.ndarray, y: np.ndarray) -> bool:
    """The assertions at a point, strict comparisons as others."""
    values = {}
    for letter, entries in (("X", x), ("Y", y)):
        values |= {f"{letter}_{i}": Fraction(float(entry)) for i, entry in enumerate(entries)}
    words = re.findall(r"[()]|[^\s()\[\]]+(?:\s*\[[^\]()]*\])?|\S", re.sub(";[^\n]*", "", text))

    def read(place: int):
        if words[place] != "(":
            return re.sub(r"\s", "", words[place]), place + 1
        form, place = [], place + 1
        while words[place] != ")":
            part, place = read(place)
            form.append(part)
        return form, place + 1

    def value(form):
        if isinstance(form, str):
            return values[form] if form in values else Fraction(form)
        head, *parts = form[0], *map(value, form[1:])
        if head == "-" and len(parts) == 1:
            return -parts[0]
        total = parts[0]
        for part in parts[1:]:
            total = {"+": total + part, "-": total - part, "*": total * part}[head]
        return total

    def holds(form) -> bool:
        head, *parts = form
        if head in ("and", "or"):
            return (all if head == "and" else any)([holds(part) for part in parts])
        left, right = map(value, parts)
        return (
            {"<": left <= right, ">": left >= right, "=": left == right}[head[0]]
            if head not in ("=", "==")
            else left == right
        )

    place, results = 0, []
    while place < len(words):
        form, place = read(place)
        if form[0] == "declare-network":
            for letter, (_, name, kind, *_rest) in zip("XY", form[2:4], strict=True):
                shape = [int(size) for size in kind.partition("[")[2].rstrip("]").split(",") if size]
                for number, index in enumerate(np.ndindex(*shape)):
                    values[f"{name}[{','.join(map(str, index))}]" if shape else name] = values.pop(f"{letter}_{number}")
        elif form[0] == "assert":
            results.append(holds(form[1]))
    return all(results)
