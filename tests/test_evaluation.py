"""The error of evaluating a scalar program: the table of each function's own, and what rounding does to choices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as special
from jax import lax

import jaxbound as jb
from jaxbound import _compat
from jaxbound.curvature import functions
from jaxbound.curvature.elementary import Elementary
from jaxbound.graph import Program, tracing
from jaxbound.relaxations.enclosures import evaluation

POINTS = 2000
UNBOUNDED = (-np.inf, np.inf)
# primitive -> (its function, the same in long double, its domain)
FUNCTIONS = {
    "acos": (lax.acos, np.arccos, (-1, 1)), "acosh": (lax.acosh, np.arccosh, (1, np.inf)),
    "asin": (lax.asin, np.arcsin, (-1, 1)), "asinh": (lax.asinh, np.arcsinh, UNBOUNDED),
    "atan": (lax.atan, np.arctan, UNBOUNDED), "atanh": (lax.atanh, np.arctanh, (-1, 1)),
    "cbrt": (lax.cbrt, np.cbrt, UNBOUNDED), "cos": (lax.cos, np.cos, UNBOUNDED),
    "cosh": (lax.cosh, np.cosh, UNBOUNDED), "erf": (lax.erf, special.erf, UNBOUNDED),
    "erf_inv": (lax.erf_inv, special.erfinv, (-1, 1)), "erfc": (lax.erfc, special.erfc, UNBOUNDED),
    "exp": (lax.exp, np.exp, UNBOUNDED), "exp2": (lax.exp2, np.exp2, UNBOUNDED),
    "expm1": (lax.expm1, np.expm1, UNBOUNDED), "log": (lax.log, np.log, (0, np.inf)),
    "log1p": (lax.log1p, np.log1p, (-1, np.inf)), "logistic": (lax.logistic, lambda x: 1 / (1 + np.exp(-x)), UNBOUNDED),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x), (0, np.inf)), "sin": (lax.sin, np.sin, UNBOUNDED),
    "sinh": (lax.sinh, np.sinh, UNBOUNDED), "sqrt": (lax.sqrt, np.sqrt, (0, np.inf)),
    "square": (lax.square, np.square, UNBOUNDED), "tan": (lax.tan, np.tan, UNBOUNDED),
    "tanh": (lax.tanh, np.tanh, UNBOUNDED), "integer_pow": (lambda x: lax.integer_pow(x, 7), lambda x: x**7, UNBOUNDED),
    "pow": (lambda x: x**1.75, lambda x: x**1.75, (0, np.inf)),
    "div": (lambda x: 3 / x, lambda x: 3 / x, (0, np.inf)),
}  # fmt: skip


def _program(function, dtype=np.float32) -> Program:
    """A function of one scalar as jaxbound sees it."""
    return tracing.build(function, (jax.ShapeDtypeStruct((1,), dtype),), (True,)).nodes[1].op.program


def _error(function, *points: float) -> list[float]:
    """Bounds on the error of a function at points."""
    return evaluation.error(_program(function), jnp.array(points, jnp.float32), ()).tolist()


def test_programs_without_error_have_none():
    """What is not charged at all is what the analysis charges with 0; a literal that may be flushed is charged."""
    z = jnp.array([-2.0, -1e-39, 0.0, 0.5, 3.0], jnp.float32)
    tiny, exact = np.float32(1e-40), 0
    for function in (
        jax.nn.relu, jnp.abs, jnp.sign, lambda x: jnp.clip(-x, -1, 2), lambda x: jnp.where(x > 0, x, -1.0),
        jax.nn.leaky_relu, jnp.tanh, jnp.exp, lambda x: jnp.maximum(x, tiny), lambda x: jnp.minimum(-x, tiny),
    ):  # fmt: skip
        program = _program(function)
        makes = evaluation.makes_error(program, np.float32)
        assert makes == bool(np.any(evaluation.error(program, z, ()) > 0))
        exact += not makes
    assert exact == 5


def _points(dtype, low: float, high: float) -> np.ndarray:
    """Of all sizes, near 1, around the zeros and where log1p loses digits."""
    rng, limits = np.random.default_rng(0), np.finfo(dtype)
    sizes = np.exp(rng.uniform(np.log(float(limits.tiny)), 0.9999 * np.log(float(limits.max)), POINTS))
    middle = np.exp(rng.uniform(-12, 7, POINTS))
    near = 1 + np.exp(rng.uniform(np.log(float(limits.eps)), 0, POINTS)) * rng.choice([-1, 1], POINTS)
    lost = -0.4142 + 0.01 * rng.normal(size=POINTS)
    spread = [rng.uniform(-reach, reach, POINTS) for reach in (1, 8, 100, 745)]
    points = np.concatenate([sizes, -sizes, middle, -middle, near, -near, lost, *spread]).astype(dtype)
    return points[(points >= low) & (points <= high)]


def test_every_elementwise_primitive_has_its_error():
    assert {name for name, row in functions.FUNCTIONS.items() if max(row.units)} <= {
        *FUNCTIONS, "add", "add_any", "mul", "sub",
    }  # fmt: skip


def test_an_unlisted_primitive_is_refused():
    program = Program((("lgamma", (), (("z",),)),), (lax.lgamma_p,))
    with pytest.raises(KeyError, match="lgamma"):
        evaluation.error(program, jnp.ones(1), ())


def test_a_new_primitive_is_one_row(monkeypatch):
    """`lgamma`: nothing but its row is needed for it to be fused, proved, relaxed and charged for rounding."""
    box, bound = jb.Box(jnp.array([0.5, 1.2, 2.5]), jnp.array([1.5, 3.0, 4.0])), jb.bound
    with pytest.raises(jb.UnsupportedError, match="lgamma"):
        bound(lambda x: 2 * lax.lgamma(x) + x, jb.Crown())(box)
    orders = special.gammaln, special.digamma, lambda x: special.polygamma(1, x)
    formulas = Elementary(orders, ((1.4616321449683623,), (), ()), domain=(0.0, np.inf), errors=(1e-9, 1e-9, 1e-9))
    monkeypatch.setitem(functions.FUNCTIONS, "lgamma", functions.elementary((64, 256), formulas))
    convex = lambda x: 2 * lax.lgamma(x) + x  # noqa: E731
    assert "convex" in str(jb.explain(convex, jb.Crown())(box))
    found, points = bound(convex, jb.Crown(), rounding=True)(box), np.linspace(box.lower, box.upper, 1001)
    values = 2 * special.gammaln(points) + points
    assert np.all(found.lower <= values.min(axis=0)) and np.all(values.max(axis=0) <= found.upper)
    assert np.allclose(found.upper, values.max(axis=0), atol=1e-4)
    assert np.isinf(bound(convex, jb.Crown())(jb.Box(-jnp.ones(1), jnp.ones(1))).upper)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)])
def test_functions_keep_within_their_error(name, dtype):
    function, exact, domain = FUNCTIONS[name]
    z, program = _points(dtype, *domain), _program(function, dtype)
    value, error = _compat.eager_jit(lambda z: (function(z), evaluation.error(program, z, ())))(z)
    value, error = (np.asarray(found).astype(np.longdouble) for found in (value, error))
    with np.errstate(all="ignore"):
        truth = np.asarray(exact(z.astype(np.float64 if name.startswith("erf") else np.longdouble)))
        known = np.isfinite(truth) & (np.abs(truth) <= np.finfo(dtype).max) & np.isfinite(error)
        assert not np.any(known & ~(np.abs(value - truth) <= error))


CHOICES = {
    "exp": (lambda x: jnp.where(jnp.exp(x) - 1 > 1e-9, 1.0, 0.0), (1e-8, 2e-8), 1.0),
    "tanh": (lambda x: jnp.where(jnp.tanh(x) < 1.0, 0.0, 10.0), (12.0, 14.0), 0.0),
    "and": (lambda x: jnp.where((jnp.tanh(x) < 1.0) & (x > 0), 0.0, 10.0), (12.0, 14.0), 0.0),
    "not": (lambda x: jnp.where(~(jnp.tanh(x) < 1.0), 10.0, 0.0), (12.0, 14.0), 0.0),
    "converted": (lambda x: (jnp.tanh(x) < 1.0).astype(x.dtype), (12.0, 14.0), 1.0),
    "sign": (lambda x: jnp.sign(1 - jnp.tanh(x)), (12.0, 14.0), 1.0),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_that_rounding_turns_are_in_doubt(name):
    function, ends, truth = CHOICES[name]
    program, z = _program(function), jnp.array(ends, jnp.float32)
    value, error = _compat.eager_jit(lambda z: (program(z), evaluation.error(program, z, ())))(z)
    assert np.all(np.abs(value - truth) <= error)
    low, high = (jnp.array([end], jnp.float32) for end in ends)
    found = jb.bound(function, jb.IBP(), rounding=True)(jb.Box(low, high))
    assert found.lower[0] <= truth <= found.upper[0]


def test_steps_that_rounding_takes_are_in_doubt():
    steps = ("tanh", (("accuracy", None),), (("z",),)), ("floor", (), (("var", 0),))
    error = evaluation.error(Program(steps, (lax.tanh_p, lax.floor_p)), jnp.array([0.5, 12.0]), ())
    assert error[0] == 0
    assert error[1] >= 1


def test_choices_that_it_does_not_turn_are_exact():
    points = -1.0, -1e-30, 0.0, 1e-30, 0.5, 1.0, 2.0
    for function in (jax.nn.relu, jnp.abs, jnp.sign, lambda x: jnp.where(x > 0, x, 0), lambda x: jnp.clip(x, 0, 1)):
        assert _error(function, *points) == [0.0] * len(points)
    assert max(_error(lambda x: jnp.where(jnp.tanh(x) < 0.5, 0.0, 10.0), *points)) == 0
    assert max(_error(jax.nn.softplus, *points)) < 1e-5  # it asks whether a computed difference is NaN
