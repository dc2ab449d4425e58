"""What `analyse` claims of a scalar function, checked on dense samples against formulas written down a second time."""

from __future__ import annotations

import dataclasses
import decimal
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as special

from jaxbound.curvature.analysis import Cell, Curvature, Piece, analyse
from jaxbound.curvature.elementary import ELEMENTARY
from jaxbound.curvature.enclosing import enclose
from jaxbound.curvature.intervals import Interval
from jaxbound.curvature.jets import UnsupportedError

pytestmark = pytest.mark.x64

LINEAR, CONVEX, CONCAVE = "linear", "convex", "concave"
REACH = 30.0  # samples lie in [-REACH, REACH]


@dataclasses.dataclass(frozen=True)
class Program:
    """The least that `analyse` asks for."""

    instructions: tuple


def program(function: Callable, constants: int = 0) -> Program:
    """The program of a scalar JAX function of z and unknown constants, with every call inlined."""
    instructions: list[tuple] = []

    def run(jaxpr, captured, arguments):
        environment = dict(zip(jaxpr.invars, arguments, strict=True))
        environment |= {v: ("lit", np.asarray(c).item()) for v, c in zip(jaxpr.constvars, captured, strict=True)}

        def read(atom):
            return ("lit", np.asarray(atom.val).item()) if hasattr(atom, "val") else environment[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            callee = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            name = getattr(callee, "jaxpr", callee).debug_info.func_name if callee else ""
            if name.split(" ")[0] == "exp_neg_sq":  # JAX 0.12 splits the bits of z to round exp(-z^2) better
                callee = jax.make_jaxpr(lambda z: jnp.exp(-z * z))(0.5)
            if callee is not None:
                outputs = run(getattr(callee, "jaxpr", callee), getattr(callee, "consts", ()), operands)
            else:
                params = {key: value for key, value in equation.params.items() if key in ("y", "new_dtype")}
                instructions.append((equation.primitive.name, tuple(sorted(params.items())), tuple(operands)))
                outputs = [("var", len(instructions) - 1)]
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    closed = jax.make_jaxpr(function)(0.5, *[1.0] * constants)
    (result,) = run(closed.jaxpr, closed.consts, [("z",), *(("const", k) for k in range(constants))])
    if result != ("var", len(instructions) - 1):
        instructions.append(("copy", (), (result,)))
    return Program(tuple(instructions))


def curvature(function: Callable, constants: int = 0) -> Curvature:
    found = analyse(program(function, constants))
    assert found is not None
    return found


# Formulas, in NumPy ---------------------------------------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])


def _sigmoid(z):
    return np.where(z < 0, np.exp(np.minimum(z, 0)), 1.0) / (1.0 + np.exp(-np.abs(z)))


def _softplus(z):
    return np.logaddexp(z, 0.0)


def _elu(z):
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0.0)))


def _gelu(z):
    return 0.5 * z * _erfc(-z / math.sqrt(2.0))


def _gelu_tanh(z):
    return z * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))


def _gelu_slope(z):
    return 0.5 * _erfc(-z / math.sqrt(2.0)) + z * np.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)


SELU, ALPHA = 1.0507009873554805, 1.6732632423543772


@dataclasses.dataclass(frozen=True)
class Row:
    """A function twice, the kinds of its pieces, and the borders between them where they are known numbers."""

    function: Callable
    formula: Callable
    kinds: tuple[str, ...] | None = None
    borders: tuple[float, ...] | None = None
    turns: tuple[float, ...] = ()
    monotone: int = 0
    continuous: bool = True


# fmt: off
ROWS = {
    "relu": Row(jax.nn.relu, lambda z: np.maximum(z, 0), (LINEAR,) * 2, (0.0,), monotone=1),
    "leaky_relu": Row(jax.nn.leaky_relu, lambda z: np.where(z < 0, 0.01 * z, z), (LINEAR,) * 2, (0.0,), monotone=1),
    "relu6": Row(jax.nn.relu6, lambda z: np.clip(z, 0, 6), (LINEAR,) * 3, (0.0, 6.0), monotone=1),
    "clip": Row(lambda z: jnp.clip(z, -1, 2), lambda z: np.clip(z, -1, 2), (LINEAR,) * 3, (-1.0, 2.0), monotone=1),
    "clamp": Row(lambda z: jax.lax.clamp(0.1, z, 0.7), lambda z: np.clip(z, 0.1, 0.7), (LINEAR,) * 3, (0.1, 0.7),
                 monotone=1),
    "abs": Row(jnp.abs, np.abs, (LINEAR,) * 2, (0.0,)),
    "hard_tanh": Row(jax.nn.hard_tanh, lambda z: np.clip(z, -1, 1), (LINEAR,) * 3, (-1.0, 1.0), monotone=1),
    "hard_swish": Row(jax.nn.hard_swish, lambda z: z * np.clip(z / 6 + 0.5, 0, 1), (LINEAR, CONVEX, LINEAR),
                      (-3.0, 3.0), (-1.5,)),
    "elu": Row(jax.nn.elu, _elu, (CONVEX,), monotone=1),
    "selu": Row(jax.nn.selu, lambda z: SELU * np.where(z > 0, z, ALPHA * _elu(np.minimum(z, 0))), (CONVEX, LINEAR),
                (0.0,), monotone=1),
    "celu": Row(jax.nn.celu, _elu, (CONVEX,), monotone=1),
    "softplus": Row(jax.nn.softplus, _softplus, (CONVEX,), monotone=1),
    "log_sigmoid": Row(jax.nn.log_sigmoid, lambda z: -_softplus(-z), (CONCAVE,), monotone=1),
    "sigmoid": Row(jax.nn.sigmoid, _sigmoid, (CONVEX, CONCAVE), (0.0,), monotone=1),
    "tanh": Row(jnp.tanh, np.tanh, (CONVEX, CONCAVE), (0.0,), monotone=1),
    "silu": Row(jax.nn.silu, lambda z: z * _sigmoid(z), (CONCAVE, CONVEX, CONCAVE), turns=(-1.278464542761074,)),
    "gelu": Row(lambda z: jax.nn.gelu(z, approximate=False), _gelu, (CONCAVE, CONVEX, CONCAVE),
                (-math.sqrt(2), math.sqrt(2)), (-0.7517915246935645,)),
    "gelu by tanh": Row(jax.nn.gelu, _gelu_tanh, (CONCAVE, CONVEX, CONCAVE), turns=(-0.7524614220710163,)),
    "steep gelu": Row(lambda z: 1000 * jax.nn.gelu(z), lambda z: 1000 * _gelu_tanh(z), (CONCAVE, CONVEX, CONCAVE),
                      turns=(-0.7524614220710163,)),
    "mish": Row(jax.nn.mish, lambda z: z * np.tanh(_softplus(z)), (CONCAVE, CONVEX, CONCAVE),
                turns=(-1.1924312145154995,)),
    "x tanh": Row(lambda z: z * jnp.tanh(z), lambda z: z * np.tanh(z), (CONCAVE, CONVEX, CONCAVE), turns=(0.0,)),
    "soft_sign": Row(jax.nn.soft_sign, lambda z: z / (1 + np.abs(z)), (CONVEX, CONCAVE), (0.0,), monotone=1),
    "squareplus": Row(jax.nn.squareplus, lambda z: (z + np.sqrt(z * z + 4)) / 2, (CONVEX,), monotone=1),
    "sparse_plus": Row(jax.nn.sparse_plus, lambda z: np.where(np.abs(z) < 1, (z + 1) ** 2 / 4, np.maximum(z, 0)),
                       (CONVEX,), monotone=1),
    "arctan": Row(jnp.arctan, np.arctan, (CONVEX, CONCAVE), (0.0,), monotone=1),
    "erf": Row(jax.scipy.special.erf, _erf, (CONVEX, CONCAVE), (0.0,), monotone=1),
    "exp": Row(jnp.exp, np.exp, (CONVEX,), monotone=1),
    "log cosh": Row(lambda z: jnp.logaddexp(z, -z), lambda z: np.logaddexp(z, -z), (CONVEX,), turns=(0.0,)),
    "gauss": Row(lambda z: jnp.exp(-z * z), lambda z: np.exp(-z * z), (CONVEX, CONCAVE, CONVEX),
                 (-math.sqrt(0.5), math.sqrt(0.5)), (0.0,)),
    "square": Row(jnp.square, np.square, (CONVEX,), turns=(0.0,)),
    "cube": Row(lambda z: z**3, lambda z: z**3, (CONCAVE, CONVEX), (0.0,), monotone=1),
    "fifth power": Row(lambda z: (z - 0.3) ** 5, lambda z: (z - 0.3) ** 5, (CONCAVE, CONVEX), (0.3,), monotone=1),
    "eighth power": Row(lambda z: (z - 1) ** 8, lambda z: (z - 1) ** 8, (CONVEX,), turns=(1.0,)),
    "cbrt": Row(jnp.cbrt, np.cbrt, (CONVEX, CONCAVE), (0.0,), monotone=1),
    "sqrt": Row(jnp.sqrt, np.sqrt, (CONCAVE,), monotone=1),
    "log": Row(jnp.log, np.log, (CONCAVE,), monotone=1),
    "rsqrt": Row(jax.lax.rsqrt, lambda z: 1 / np.sqrt(z), (CONVEX,), monotone=-1),
    "reciprocal": Row(lambda z: 1 / z, lambda z: 1 / z, (CONCAVE, CONVEX), continuous=False),
    "inverse square": Row(lambda z: z**-2, lambda z: z**-2.0, (CONVEX, CONVEX), continuous=False),
    "logit": Row(lambda z: jnp.log(z / (1 - z)), lambda z: np.log(z / (1 - z)), (CONCAVE, CONVEX), (0.5,), monotone=1),
    "root of relu": Row(lambda z: jnp.sqrt(jax.nn.relu(z)), lambda z: np.sqrt(np.maximum(z, 0)), (LINEAR, CONCAVE),
                        (0.0,), monotone=1),
    "power 1.7": Row(lambda z: z**1.7, lambda z: z**1.7, (CONVEX,), monotone=1),
    "power -0.5": Row(lambda z: z**-0.5, lambda z: 1 / np.sqrt(z), (CONVEX,), monotone=-1),
    "arcsin": Row(jnp.arcsin, np.arcsin, (CONCAVE, CONVEX), (0.0,), monotone=1),
    "arccos": Row(jnp.arccos, np.arccos, (CONVEX, CONCAVE), (0.0,), monotone=-1),
    "arctanh": Row(jnp.arctanh, np.arctanh, (CONCAVE, CONVEX), (0.0,), monotone=1),
    "arccosh": Row(jnp.arccosh, np.arccosh, (CONCAVE,), monotone=1),
    "erf_inv": Row(jax.scipy.special.erfinv, special.erfinv, (CONCAVE, CONVEX), (0.0,), monotone=1),
    "arctanh of a half": Row(lambda z: jnp.arctanh(z / 2), lambda z: np.arctanh(z / 2), (CONCAVE, CONVEX), (0.0,),
                             monotone=1),
    "x arcsin": Row(lambda z: z * jnp.arcsin(z), lambda z: z * np.arcsin(z), (CONVEX,), turns=(0.0,)),
    "arcsin of tanh": Row(lambda z: jnp.arcsin(jnp.tanh(z)), lambda z: 2 * np.arctan(np.tanh(z / 2)),
                          (CONVEX, CONCAVE), (0.0,), monotone=1),
    "arcsin of clip": Row(lambda z: jnp.arcsin(jnp.clip(z, -1, 1)), lambda z: np.arcsin(np.clip(z, -1, 1)),
                          (LINEAR, CONCAVE, CONVEX, LINEAR), (-1.0, 0.0, 1.0), monotone=1),
    "quantile": Row(lambda z: jax.scipy.special.erfinv(2 * z - 1), lambda z: special.erfinv(2 * z - 1),
                    (CONCAVE, CONVEX), (0.5,), monotone=1),
    "arcsin'": Row(jax.grad(jnp.arcsin), lambda z: 1 / np.sqrt((1 - z) * (1 + z)), (CONVEX,), turns=(0.0,)),
    "sin": Row(jnp.sin, np.sin),
    "cos": Row(jnp.cos, np.cos),
    "tan": Row(jnp.tan, np.tan, continuous=False),
    "snake": Row(lambda z: z + jnp.sin(z) ** 2, lambda z: z + np.sin(z) ** 2, monotone=1),
    "sigmoid'": Row(jax.grad(jax.nn.sigmoid), lambda z: _sigmoid(z) * _sigmoid(-z), (CONVEX, CONCAVE, CONVEX),
                    turns=(0.0,)),
    "tanh'": Row(jax.grad(jnp.tanh), lambda z: 1 - np.tanh(z) ** 2, (CONVEX, CONCAVE, CONVEX), turns=(0.0,)),
    "softplus'": Row(jax.grad(jax.nn.softplus), _sigmoid, (CONVEX, CONCAVE), (0.0,), monotone=1),
    "elu'": Row(jax.grad(jax.nn.elu), lambda z: np.exp(np.minimum(z, 0)), (CONVEX, LINEAR), (0.0,), monotone=1),
    "gelu'": Row(jax.grad(lambda z: jax.nn.gelu(z, approximate=False)), _gelu_slope,
                 (CONCAVE, CONVEX, CONCAVE, CONVEX), (-2.0, 0.0, 2.0), (-math.sqrt(2), math.sqrt(2))),
    "gelu by tanh'": Row(jax.grad(jax.nn.gelu), None, (CONCAVE, CONVEX, CONCAVE, CONVEX)),
    "silu'": Row(jax.grad(jax.nn.silu), lambda z: _sigmoid(z) * (1 + z * _sigmoid(-z)),
                 (CONCAVE, CONVEX, CONCAVE, CONVEX)),
    "step": Row(lambda z: jnp.where(z > 0, 1.0, 0.0), lambda z: np.where(z > 0, 1.0, 0.0), (LINEAR,) * 2, monotone=1,
                continuous=False),
    "falling step": Row(lambda z: jnp.where(z >= 0.1, -1.0, 0.0), lambda z: np.where(z >= 0.1, -1.0, 0.0),
                        (LINEAR,) * 2, monotone=-1, continuous=False),
    "sign": Row(jnp.sign, np.sign, (LINEAR,) * 2, monotone=1, continuous=False),
    "spike": Row(lambda z: jnp.where(z == 0.3, 5.0, z), lambda z: np.where(z == 0.3, 5.0, z), (LINEAR,) * 2,
                 continuous=False),
    "three functions": Row(lambda z: jnp.where(z > 1.3, jnp.exp(z), jnp.where(z < -0.7, z * z, jnp.tanh(z))),
                           lambda z: np.where(z > 1.3, np.exp(z), np.where(z < -0.7, z * z, np.tanh(z))),
                           (CONVEX, CONVEX, CONCAVE, CONVEX), continuous=False),
    "soft shrink": Row(lambda z: jnp.where(jnp.abs(z) > 0.5, z - 0.5 * jnp.sign(z), 0.0),
                       lambda z: np.where(np.abs(z) > 0.5, z - 0.5 * np.sign(z), 0.0), (LINEAR,) * 3, (-0.5, 0.5),
                       monotone=1),
    "hard shrink": Row(lambda z: jnp.where(jnp.abs(z) > 0.5, z, 0.0), lambda z: np.where(np.abs(z) > 0.5, z, 0.0),
                       (LINEAR,) * 3, monotone=1, continuous=False),
    "huber": Row(lambda z: jnp.where(jnp.abs(z) < 1, 0.5 * z * z, jnp.abs(z) - 0.5),
                 lambda z: np.where(np.abs(z) < 1, 0.5 * z * z, np.abs(z) - 0.5), (CONVEX,), turns=(0.0,)),
    "line and square": Row(lambda z: jnp.where(z >= 0, z * z, -z), lambda z: np.where(z >= 0, z * z, -z), (CONVEX,),
                           turns=(0.0,)),
    "square and line": Row(lambda z: jnp.where(z > 0.5, 0.5 - z, -((z - 0.5) ** 2)),
                           lambda z: np.where(z > 0.5, 0.5 - z, -((z - 0.5) ** 2)), (CONCAVE,), turns=(0.5,)),
    "inexact kink": Row(lambda z: jnp.maximum(0.1 * z + 0.3, 0.0), lambda z: np.maximum(0.1 * z + 0.3, 0.0),
                        (LINEAR,) * 2, (-3.0,), monotone=1),
    "kink of curves": Row(lambda z: jnp.maximum(0.1 * z + 0.3, 0.7 * z * z - 1),
                          lambda z: np.maximum(0.1 * z + 0.3, 0.7 * z * z - 1), (CONVEX,)),
    "relu(z) - relu(-z)": Row(lambda z: jax.nn.relu(z) - jax.nn.relu(-z), lambda z: z, (LINEAR,), monotone=1),
    "kink inside a root": Row(lambda z: jnp.sqrt((z - 0.375) ** 2), lambda z: np.abs(z - 0.375)),
    "constant": Row(lambda z: 0.0 * z + 2.0, lambda z: 0.0 * z + 2.0, (LINEAR,), monotone=1),
}
# fmt: on


# The checker ----------------------------------------------------------------------------------------------------------


def _samples(left: float, right: float) -> np.ndarray:
    """Points of `[left, right]` in reach: even ones, and some that crowd at the ends."""
    left, right = max(left, -REACH), min(right, REACH)
    if left >= right:
        return np.zeros(0)
    steps = (right - left) * 2.0 ** -np.arange(1.0, 40.0)
    points = np.concatenate([np.linspace(left, right, 401), left + steps, right - steps])
    return np.unique(np.clip(points, left, right))


def violations(claim: Curvature, formula: Callable) -> list[str]:
    """What samples contradict."""

    def sigma(points):
        with np.errstate(all="ignore"):
            return np.asarray(formula(points), float)

    found = []
    parts = sorted([*claim.pieces, *claim.cells], key=lambda part: part.left)
    ends = [part.left for part in parts] + [math.inf], [-math.inf] + [part.right for part in parts]
    if ends[0] != ends[1]:
        found.append(f"the line is not covered: {ends}")
    for piece in claim.pieces:
        points = _samples(piece.left, piece.right)
        values = sigma(points)
        if not np.isfinite(values).all():
            found.append(f"infinite or undefined on [{piece.left}, {piece.right}]")
            continue
        for stride in (1, 9, 60, 150):
            a, b, c = points[: -2 * stride], points[stride:-stride], points[2 * stride :]
            before, at, after = values[: -2 * stride], values[stride:-stride], values[2 * stride :]
            gap = at - (before * (c - b) + after * (b - a)) / (c - a)
            tolerance = 1e-13 * (1 + np.abs(before) + np.abs(after)) + claim.slack * REACH
            excess = {CONVEX: gap, CONCAVE: -gap, LINEAR: np.abs(gap)}[piece.kind] - tolerance
            if not (excess <= 0).all():
                found.append(f"not {piece.kind} on [{piece.left}, {piece.right}] by {np.max(excess)}")
        far = np.diff(points) > 1e-3
        quotients = np.diff(values)[far] / np.diff(points)[far]
        tolerance = 1e-9 * (1 + np.max(np.abs(quotients), initial=0))
        if not (np.abs(np.clip(quotients, *claim.slope_range) - quotients) <= tolerance).all():
            found.append(f"slopes leave {claim.slope_range}")
    for cell in claim.cells:
        inner = _samples(cell.left, cell.right)
        values = sigma(inner[(inner > cell.left) & (inner < cell.right)])
        values = values[np.isfinite(values)]
        if not ((values >= cell.lower) & (values <= cell.upper)).all():
            found.append(f"{cell} does not hold its values")
    borders = {end for part in parts for end in (part.left, part.right)} | {*claim.critical}
    for left, right in zip(sorted(borders)[:-1], sorted(borders)[1:], strict=True):
        if any(cell.left < right and cell.right > left for cell in claim.cells):
            continue
        values = sigma(_samples(left, right))
        steps, tolerance = np.diff(values), 1e-13 * (1 + np.abs(values[1:])) + claim.slack * REACH
        if not ((steps >= -tolerance).all() or (steps <= tolerance).all()):
            found.append(f"not monotone on [{left}, {right}]")
    if claim.is_monotone:
        values = sigma(_samples(*claim.domain))
        steps, tolerance = np.diff(values) * claim.is_monotone, 1e-13 * (1 + np.abs(values[1:])) + claim.slack * REACH
        if not (steps >= -tolerance).all():
            found.append(f"not monotone of sign {claim.is_monotone}")
    return found


def _formula(row: Row) -> Callable:
    return row.formula or (lambda z: np.asarray(jax.vmap(row.function)(jnp.asarray(z))))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_claims_hold_on_samples(row):
    claim = curvature(row.function)
    assert violations(claim, _formula(row)) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.kinds], ids=[n for n, r in ROWS.items() if r.kinds]
)
def test_pieces_are_the_known_ones(row):
    claim = curvature(row.function)
    assert tuple(piece.kind for piece in claim.pieces) == row.kinds
    assert claim.is_monotone == row.monotone
    assert claim.is_continuous == row.continuous
    if row.borders is not None:
        borders = [piece.right for piece in claim.pieces[:-1]]
        exact = [border == float(f"{border:.3g}") for border in row.borders]
        assert all(b == r if e else abs(b - r) < 1e-6 for b, r, e in zip(borders, row.borders, exact, strict=True))
    for turn in row.turns:
        assert min(abs(turn - point) for point in claim.critical) < 1e-13 * max(1.0, abs(turn))
    steepness = max(
        1.0, *(abs(s) for s in jax.vmap(jax.grad(row.function))(jnp.array([0.3, 0.6, 1.1, 1.9])) if s < 1e6)
    )
    assert claim.slack <= 3e-13 * steepness


@pytest.mark.parametrize(
    "name", ["gelu", "silu", "softplus", "elu", "gauss", "mish", "squareplus", "hard_swish", "gelu'"]
)
def test_tangents_support_their_piece(name):
    """The inequality by which `scalar.py` bounds intercepts, with slopes by automatic differentiation."""
    row = ROWS[name]
    claim = curvature(row.function)
    for piece in claim.pieces:
        points = _samples(piece.left, piece.right)
        inner = np.minimum(np.abs(points - piece.left), np.abs(points - piece.right)) > 1e-9
        slopes = np.where(inner, np.asarray(jax.vmap(jax.grad(row.function))(jnp.asarray(points))), 0.0)
        values = row.formula(points)
        gap = values[None] - values[:, None] - slopes[:, None] * (points[None] - points[:, None])
        gap = {CONVEX: gap, CONCAVE: -gap, LINEAR: -np.abs(gap)}[piece.kind][inner]
        assert (gap >= -(claim.slack * REACH + 1e-12)).all()


def _replace_piece(claim: Curvature, index: int, **changes) -> Curvature:
    pieces = list(claim.pieces)
    pieces[index] = dataclasses.replace(pieces[index], **changes)
    return dataclasses.replace(claim, pieces=tuple(pieces))


def _move_border(claim: Curvature, index: int, to: float) -> Curvature:
    return _replace_piece(_replace_piece(claim, index, right=to), index + 1, left=to)


def _whole(claim: Curvature, kind: str) -> Curvature:
    return dataclasses.replace(claim, pieces=(Piece(claim.domain[0], claim.domain[1], kind),))


FAULTS = {
    "convex for concave": ("sigmoid", lambda c: _replace_piece(c, 1, kind=CONVEX)),
    "inflection at 1.3": ("gelu", lambda c: _move_border(c, 1, 1.3)),
    "selu as one convex piece": ("selu", lambda c: _whole(c, CONVEX)),
    "hard_swish as one convex piece": ("hard_swish", lambda c: _whole(c, CONVEX)),
    "kink of relu6 at 5.99": ("relu6", lambda c: _move_border(c, 1, 5.99)),
    "kink of relu at 1e-6": ("relu", lambda c: _move_border(c, 0, 1e-6)),
    "softplus linear": ("softplus", lambda c: _whole(c, LINEAR)),
    "pole bridged": ("reciprocal", lambda c: dataclasses.replace(_whole(c, CONVEX), cells=())),
    "jump bridged": ("step", lambda c: dataclasses.replace(_whole(c, CONVEX), cells=())),
    "gap in the cover": ("sigmoid", lambda c: _replace_piece(c, 0, right=-0.5)),
    "cell too low": (
        "sin",
        lambda c: dataclasses.replace(c, cells=tuple(Cell(q.left, q.right, -1, 0.9) for q in c.cells)),
    ),
    "no turning point": ("silu", lambda c: dataclasses.replace(c, critical=())),
    "turning point moved": ("silu", lambda c: dataclasses.replace(c, critical=(-1.27,))),
    "monotone gelu": ("gelu", lambda c: dataclasses.replace(c, is_monotone=1)),
    "falling tanh": ("tanh", lambda c: dataclasses.replace(c, is_monotone=-1)),
    "slopes at most 1": ("gelu", lambda c: dataclasses.replace(c, slope_range=(-1.0, 1.0))),
    "slopes at least 0": ("silu", lambda c: dataclasses.replace(c, slope_range=(0.0, 2.0))),
}


@pytest.mark.fast
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_checker_sees_planted_faults(fault):
    name, plant = fault
    row = ROWS[name]
    claim = curvature(row.function)
    assert violations(claim, row.formula) == []
    assert violations(plant(claim), row.formula) != []


# Single facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_learned_slopes_are_linear_with_a_kink_at_zero():
    claim = curvature(lambda z, a: jnp.where(z >= 0, z, a * z), constants=1)
    assert [(p.left, p.right, p.kind) for p in claim.pieces] == [(-math.inf, 0.0, LINEAR), (0.0, math.inf, LINEAR)]
    assert claim.is_piecewise_linear
    assert claim.is_continuous
    assert claim.is_monotone == 0
    assert claim.slope_range == (-math.inf, math.inf)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("names", "reach"),
    [
        ("relu sigmoid tanh exp softplus elu soft_sign arctan square", math.inf),
        ("gelu silu mish squareplus gauss gelu' silu'", np.finfo(np.float32).max),  # every float32
    ],
)
def test_domains(names, reach):
    for name in names.split():
        low, high = curvature(ROWS[name].function).domain
        assert min(-low, high) >= reach


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sin", "cos", "tan", "snake"])
def test_twelve_pieces_are_enough(name):
    """What oscillates is known around 0, the rest is a cell on each side."""
    claim = curvature(ROWS[name].function)
    kinds = [piece.kind for piece in claim.pieces]
    assert len(kinds) == 12
    assert set(kinds[::2]) != set(kinds[1::2])
    low, high = claim.domain
    assert low < -8
    assert high > 8
    assert (claim.cells[0].left, claim.cells[-1].right) == (-math.inf, math.inf)


@pytest.mark.fast
def test_slope_ranges():
    assert curvature(jax.nn.leaky_relu).slope_range == (0.01, 1.0)
    assert curvature(jax.nn.sigmoid).slope_range == pytest.approx((0.0, 0.25), abs=1e-14)
    assert curvature(ROWS["gelu"].function).slope_range == pytest.approx(
        (-0.12890414518516, 1.12890414518516), abs=1e-10
    )
    assert curvature(jnp.sign).slope_range == (-math.inf, math.inf)


@pytest.mark.fast
def test_poles_and_undefined_parts_are_cells():
    claim = curvature(lambda z: 1 / z)
    assert [piece.kind for piece in claim.pieces] == [CONCAVE, CONVEX]
    assert any(cell.left < 0 < cell.right and (cell.lower, cell.upper) == (-math.inf, math.inf) for cell in claim.cells)
    assert curvature(jnp.sqrt).domain == (0.0, math.inf)  # closed: sqrt is continuous at 0
    assert curvature(jnp.sqrt).cells == (Cell(-math.inf, 0.0, -math.inf, math.inf),)
    low, high = curvature(jnp.log).domain
    assert 0 < low < 1e-37
    assert high == math.inf


@pytest.mark.fast
def test_domains_with_two_ends():
    """Closed where the function is continuous at its ends, open where it has a pole there; nothing is known beyond."""
    for function in (jnp.arcsin, jnp.arccos):
        claim = curvature(function)
        assert claim.domain == (-1.0, 1.0)
        assert claim.cells == (Cell(-math.inf, -1.0, -math.inf, math.inf), Cell(1.0, math.inf, -math.inf, math.inf))
        assert math.inf in np.abs(claim.slope_range)
    assert curvature(jnp.arccosh).domain == (1.0, math.inf)
    for function in (jnp.arctanh, jax.scipy.special.erfinv):
        claim = curvature(function)
        low, high = claim.domain
        assert -1 < low < 1e-6 - 1 < 1 - 1e-6 < high < 1
        assert np.float32(low) > -1 and np.float32(high) < 1  # the poles stay in their cells
        assert all((cell.lower, cell.upper) == (-math.inf, math.inf) for cell in claim.cells)


@pytest.mark.fast
@pytest.mark.parametrize("height", [1e-14, 1e-20])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_jumps_of_any_height_are_jumps(height, factor):
    """Also at 1 / 3, which floating point cannot name."""
    claim = curvature(lambda z: jnp.where(factor * z > 1.0, height, 0.0))
    assert not claim.is_continuous and claim.slope_range == (-math.inf, math.inf)
    assert curvature(lambda z: jnp.where(factor * z > 1.0, factor * z - 1.0, 0.0)).is_continuous


@pytest.mark.fast
def test_jump_cells_survive_float32():
    """A jump lies strictly inside its cell, also after the ends are rounded to float32."""
    for jump in (0.0, 0.1, -3.0, 1e-20, 1e10):
        claim = curvature(lambda z, jump=jump: jnp.where(z > jump, 1.0, 0.0))
        (cell,) = claim.cells
        assert np.float32(cell.left) < np.float32(jump) < np.float32(cell.right)
        assert (cell.lower, cell.upper) == (0.0, 1.0)


@pytest.mark.fast
@pytest.mark.parametrize(
    "function",
    [
        jnp.floor,
        jnp.round,
        lambda z: z + jax.lax.stop_gradient(z) * jax.lax.reduce_precision(z, 5, 10),
        jax.scipy.special.digamma,
        lambda z: z * jnp.nan,
        lambda z: (z > 0) | (z < -1),
        lambda z: z.astype(int).astype(float),
        lambda z: jnp.power(jnp.abs(z), z),
    ],
    ids=["floor", "round", "reduce_precision", "digamma", "nan", "boolean", "cast", "pow"],
)
def test_what_has_no_rule_is_left_to_the_caller(function):
    assert analyse(program(function)) is None
    with pytest.raises(UnsupportedError):
        enclose(program(function).instructions, np.array([1.0]), np.array([2.0]))


@pytest.mark.fast
def test_nothing_proved_is_none():
    assert analyse(program(lambda z, a: jnp.where(z > a, 1.0, 0.0), constants=1)) is None
    assert analyse(program(lambda z, a: z / a, constants=1)) is None
    assert analyse(program(lambda z: jnp.log(-1.0 - z * z))) is None


@pytest.mark.fast
def test_results_are_cached_and_hashable():
    assert analyse(program(jax.nn.silu)) is analyse(program(jax.nn.silu))
    assert isinstance(hash(curvature(jax.nn.silu)), int)


@pytest.mark.fast
def test_values_that_were_not_selected_do_not_matter():
    """The double-where idiom: the root of a negative number is computed and thrown away."""
    claim = curvature(lambda z: jnp.where(z > 1, jnp.sqrt(jnp.where(z > 1, z - 1, 1.0)), 0.0))
    assert [piece.kind for piece in claim.pieces] == [LINEAR, CONCAVE]
    assert claim.is_continuous


@pytest.mark.fast
def test_float32_traces_mean_the_same():
    with jax.enable_x64(False):
        found = analyse(program(jax.nn.hard_swish)), analyse(program(jax.nn.gelu))
    assert [piece.right for piece in found[0].pieces[:2]] == [-3.0, 3.0]
    assert [piece.kind for piece in found[1].pieces] == [CONCAVE, CONVEX, CONCAVE]


# Intervals and jets ---------------------------------------------------------------------------------------------------


def _numbers() -> np.ndarray:
    signs = np.array([1.0, -1.0])
    sizes = np.array(
        [0.0, 5e-324, 2.0**-1030, 2.0**-1021, 1e-200, 1e-20, 0.1, 1 / 3, 0.5, 1.0, 3.0, 1e20, 1e200, 1.7e308]
    )
    return (signs[:, None] * np.concatenate([sizes, np.nextafter(sizes, np.inf)[1:-1]])).ravel()


@pytest.mark.fast
@pytest.mark.parametrize("operation", ["+", "-", "*", "/", "square"])
def test_interval_arithmetic_holds_the_exact_rational_result(operation):
    a, b = (x.ravel() for x in np.meshgrid(_numbers(), _numbers()))
    a, b = (a[b != 0], b[b != 0]) if operation == "/" else (a, b)
    x, y = Interval(a, a), Interval(b, b)
    with np.errstate(all="ignore"):
        results = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if operation == "/" else x, "square": x.squared()}
    lower, upper = results[operation]
    for u, v, low, high in zip(a.tolist(), b.tolist(), lower.tolist(), upper.tolist(), strict=True):
        p, q = Fraction(u), Fraction(v)
        exact = {"+": p + q, "-": p - q, "*": p * q, "/": p / q if q else p, "square": p * p}[operation]
        assert low == -math.inf or Fraction(low) <= exact
        assert high == math.inf or exact <= Fraction(high)
        assert low <= high
        moderate = all(x == 0 or 1e-250 < abs(x) < 1e250 for x in (p, q, exact))
        if moderate and Fraction(float(exact)) == exact:
            assert low == high


@pytest.mark.fast
def test_unbounded_intervals():
    inf, one, zero = np.array([np.inf]), np.array([1.0]), np.array([0.0])
    whole = Interval(-inf, inf)
    with np.errstate(all="ignore"):
        cases = [
            (Interval(zero, one) * whole, (-math.inf, math.inf)),
            (Interval(zero, zero) * whole, (0.0, 0.0)),  # unknown but finite
            (Interval(-inf, one) + Interval(one, inf), (-math.inf, math.inf)),
            (Interval(one, one) / Interval(zero, inf), (0.0, math.inf)),
            (Interval(one, one) / Interval(-one, one), (-math.inf, math.inf)),
        ]
    for interval, (low, high) in cases:
        assert (interval.lower.item(), interval.upper.item()) == (low, high)


RULES: dict[str, tuple[Callable, float, float]] = {
    "add": (lambda z: z + jnp.sin(z), -9, 9),
    "mul": (lambda z: z * jnp.exp(z), -9, 9),
    "div": (lambda z: jnp.sin(z) / (2 + jnp.cos(z)), -9, 9),
    "div by a pole": (lambda z: 1 / (z - 0.3), -2, 2),
    "integer_pow": (lambda z: z**5 - z**4 + z**-3, 0.1, 4),
    "pow": (lambda z: jnp.power(z, 1.3) + jnp.power(z, -0.4) + 3.0**z, 0.01, 9),
    "sqrt": (lambda z: jnp.sqrt(z) + jnp.sqrt(1 + z * z) + jax.lax.rsqrt(z), 0.01, 9),
    "cbrt": (jnp.cbrt, -9, 9),
    "exponentials": (lambda z: jnp.exp(z) + jnp.exp2(-z) + jnp.expm1(0.5 * z), -9, 9),
    "logarithms": (lambda z: jnp.log(z) * jnp.log1p(z), 0.01, 9),
    "hyperbolic": (lambda z: jnp.tanh(z) * jnp.sinh(0.2 * z) + jnp.cosh(z - 1), -9, 9),
    "logistic": (lambda z: jax.nn.sigmoid(z) ** 2, -40, 40),
    "erf": (lambda z: jax.scipy.special.erf(z) * jax.scipy.special.erfc(z - 1), -6, 6),
    "inverse": (lambda z: jnp.arctan(z) + jnp.arcsinh(3 * z), -9, 9),
    "arcs": (lambda z: jnp.arcsin(z) * jnp.arccos(0.9 * z) + jnp.arctanh(-0.8 * z), -1, 1),
    "arcs of functions": (lambda z: jnp.arcsin(jnp.tanh(z)) + jnp.arccosh(1.5 + z * z) / (2 + jnp.sin(z)), -9, 9),
    "erf_inv": (lambda z: jax.scipy.special.erfinv(0.9 * z) * jnp.exp(z), -1.1, 1.1),
    "trigonometric": (lambda z: jnp.sin(z) * jnp.cos(3 * z) + jnp.tan(0.1 * z), -9, 9),
    "max and abs": (lambda z: jnp.maximum(jnp.abs(z), 2 + jnp.sin(z)) - jnp.minimum(z, 0.3), -9, 9),
    "select": (lambda z: jnp.where((z > 0.7) & ~(z >= 2.1) | (z < -1), z * z, jnp.exp(z)), -3, 3),
    "x log x": (lambda z: z * jnp.log(z), 0, 4),
    "x log x of functions": (lambda z: (lambda u: jnp.log(u) * u)(jax.nn.sigmoid(z)) + jnp.sin(z), -9, 9),
    "sin x / x": (lambda z: jnp.sin(z) / z, 0.1, 9),
    "sin x / x of a function": (lambda z: (lambda u: jnp.sin(u) / u)(0.3 + z * z), -3, 3),
    "clamp and sign": (lambda z: jax.lax.clamp(-1.0, z, 2.0) * jnp.sign(z - 0.4), -3, 3),
}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("left", "right"), [(-0.5, 0.25), (0, 1e-3), (-2, 0), (-1e-9, 1e-9), (3, 20), (-math.inf, math.inf)]
)
def test_sin_x_over_x_has_no_pole(left, right):
    """Around 0 by its series; at 0 itself it is not defined."""
    proof = enclose(program(lambda z: jnp.sin(z) / z).instructions, np.array([left]), np.array([right]))
    z = np.linspace(max(left, -30), min(right, 30), 2001) + 1e-12
    near, series = np.abs(z) < 0.5, [(-1) ** k * (2 * k + 1) ** -1.0 / math.factorial(2 * k) for k in range(12)]
    power = np.polynomial.Polynomial([number for pair in zip(series, [0] * 12, strict=True) for number in pair])
    sin, cos, one = np.sin(z), np.cos(z), np.where(near, 1, z)
    far = sin / one, cos / one - sin / one**2, -sin / one - 2 * cos / one**2 + 2 * sin / one**3
    for order, formula in enumerate(far):
        values = np.where(near, power.deriv(order)(z) if order else power(z), formula)
        assert np.all(
            (proof.orders.lower[order, 0] <= values + 1e-12) & (values - 1e-12 <= proof.orders.upper[order, 0])
        )
    assert proof.continuous[0] or math.isinf(left)
    assert proof.defined[0] == (not left < 0 < right)
    if right - left < 1:
        assert np.all(proof.orders.upper[:, 0] - proof.orders.lower[:, 0] < 0.4)


@pytest.mark.fast
@pytest.mark.parametrize("right", [1e-300, 1e-9, 0.3, 0.36787944117144233, 0.5, 2.0])
def test_x_log_x_rises_from_0(right):
    """It has a limit at 0, and is no number at it."""
    instructions = program(lambda z: z * jnp.log(z)).instructions
    proof = enclose(instructions, np.array([0.0, right]), np.array([right, right]))
    z = right * np.linspace(0.01, 1, 100)
    (lower, upper), values = proof.orders[0, 0], z * np.log(z)
    assert proof.continuous[0] and proof.defined[0] and lower[0] <= values.min() and max(0.0, values.max()) <= upper[0]
    assert upper[0] <= max(0.0, values.max()) + 1e-9 and lower[0] >= values.min() - 1e-4
    assert proof.orders.lower[0, 1, 0] == proof.orders.upper[0, 1, 0] == 0
    with decimal.localcontext(prec=50):  # the derivative changes its sign at 1 / e
        exact, ends = 1 + Decimal(right).ln(), [Decimal(float(end[1, 0, 1])) for end in proof.orders]
    assert ends[0] <= exact <= ends[1]
    assert not enclose(instructions, np.zeros(1), np.zeros(1)).defined[0]


@pytest.mark.quick(7)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_jets_hold_values_and_derivatives(rule):
    """Cells of all widths; derivatives by automatic differentiation, where no decision is open."""
    function, low, high = rule
    rng = np.random.default_rng(0)
    left = rng.uniform(low, high, 400)
    right = np.minimum(left + np.exp2(rng.uniform(-30, 2, 400)), high)
    left, right = left[left < right], right[left < right]
    proof = enclose(program(function).instructions, left, right)
    derivatives = [function, jax.grad(function), jax.grad(jax.grad(function))]
    for part in rng.uniform(0.001, 0.999, 5):
        points = jnp.asarray(left + part * (right - left))
        for order, derivative in enumerate(derivatives):
            values = np.asarray(jax.vmap(derivative)(points))
            lower, upper = proof.orders[order, 0]
            tolerance = 1e-11 * (1 + np.abs(values))
            inside = (values >= lower - tolerance) & (values <= upper + tolerance)
            assert (inside | ~np.isfinite(values)).all()
    narrow = (right - left < 1e-6) & proof.smooth
    assert narrow.any()
    with np.errstate(invalid="ignore"):
        width = proof.orders.upper[:, 0, narrow] - proof.orders.lower[:, 0, narrow]
        size = np.abs(proof.orders.upper[:, 0, narrow])
    assert np.median(width / (1 + size)) < 1e-4  # the enclosures are tight, not merely true


@pytest.mark.fast
def test_limits_at_the_ends_of_a_cell():
    left, right = np.array([-1.0, 0.0]), np.array([0.0, 1.0])
    orders = enclose(program(jax.nn.relu).instructions, left, right).orders
    assert orders.lower[1, 2, 0] == orders.upper[1, 2, 0] == 0.0
    assert orders.lower[1, 1, 1] == orders.upper[1, 1, 1] == 1.0
    step = program(lambda z: jnp.where(z > 0, 1.0, 0.0))
    orders = enclose(step.instructions, left, right).orders
    assert (orders.upper[0, 2, 0], orders.lower[0, 1, 1]) == (0.0, 1.0)
    assert not enclose(step.instructions, left[:1], right[1:]).continuous.any()
    assert enclose(step.instructions, right[:1], right[:1]).orders.upper[0, 0, 0] == 0.0  # the jump belongs to its left


ENDS = {
    "asin": (-1.0, 1.0),
    "acos": (-1.0, 1.0),
    "atanh": (-1.0, 1.0),
    "erf_inv": (-1.0, 1.0),
    "acosh": (1.0, math.inf),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", ENDS)
def test_jets_at_the_ends_of_domains(name):
    """The infinite slopes at an end are enclosed, the value is where it is finite; beyond nothing is known."""
    left, right = ENDS[name]
    instructions = ((name, (), (("z",),)),)
    beyond = enclose(instructions, np.array([left - 1, left - 0.5]), np.array([left + 0.5, left - 0.25]))
    assert (beyond.orders.lower[:, 0] == -math.inf).all()
    assert (beyond.orders.upper[:, 0] == math.inf).all()
    assert not beyond.continuous.any()
    for end in (left, right):
        if math.isfinite(end):
            inward = end - math.copysign(0.25, end) if right == 1 else end + 0.25
            cells = np.array([min(end, inward)]), np.array([max(end, inward)])
            for proof in (enclose(instructions, *cells), enclose(instructions, np.array([end]), np.array([end]))):
                track = 0 if proof.orders.lower.shape[1] == 1 else 1 if end < inward else 2
                assert proof.continuous.all() == ELEMENTARY[name].closed
                assert not proof.smooth.any()
                assert np.isinf([*proof.orders[1:, track]]).any(axis=0).all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "slope"), [("asin", 1.0), ("acos", -1.0), ("atanh", 1.0), ("erf_inv", math.sqrt(math.pi) / 2)]
)
def test_jets_of_subnormal_arguments(name, slope):
    tiny = np.array([-5e-324, 0.0, -1e-30, 5e-324]), np.array([5e-324, 2.0**-1060, 1e-30, 5e-324])
    proof = enclose(((name, (), (("z",),)),), *tiny)
    lower, upper = proof.orders[1, 0]
    assert proof.smooth.all()
    assert ((lower <= slope) & (slope <= upper) & (upper - lower < 1e-12)).all()
    value = ELEMENTARY[name].formulas[0](np.zeros(1)).item()
    assert ((proof.orders.lower[0, 0, :3] <= value) & (value <= proof.orders.upper[0, 0, :3])).all()


def _residual(point: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`erf(point) - size`, relative to the smaller of size and 1 - size."""
    tail = size > 0.5
    excess = np.where(tail, (1 - size) - _erfc(point), _erf(point) - size)
    return excess / np.where(tail, 1 - size, size)


@pytest.mark.fast
def test_inverse_error_function_is_proved_everywhere():
    """Both ends of the enclosure are on their sides of the root of `erf(y) - x`, and close to it."""
    rng = np.random.default_rng(1)
    tails = 1 - 2.0 ** -rng.uniform(0, 53, 4000)
    size = np.concatenate(
        [rng.uniform(0, 1, 4000), tails, 2.0 ** -rng.uniform(0, 60, 1000), 1 - np.arange(1, 9) / 2**53]
    )
    size = size[(size > 0) & (size < 1)]
    outer = ELEMENTARY["erf_inv"].orders(Interval(size, size))
    lower, upper = outer[0]
    assert np.isfinite([lower, upper]).all()
    assert (_residual(lower, size) < 0).all()
    assert (_residual(upper, size) > 0).all()
    assert (upper - lower <= 2e-14 * size * (1 + upper)).all()
    mirrored = ELEMENTARY["erf_inv"].orders(Interval(-size, -size))
    assert (mirrored.lower[0] == -upper).all()
    slope = np.sqrt(np.pi) / 2 * np.exp(special.erfinv(size) ** 2)
    assert (np.abs(outer.lower[1] / slope - 1) < 4e-13).all()
    assert (np.abs(outer.upper[1] / slope - 1) < 4e-13).all()
    assert (outer.lower[1] < outer.upper[1]).all()
