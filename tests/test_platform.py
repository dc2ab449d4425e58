"""What jaxbound asks of JAX on every supported version, and its guard against the CPU miscompilation.

Import-time behaviour is tested in fresh processes: this one has started its backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import _compat, _flags, errors

pytestmark = pytest.mark.fast

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
OURS = "-reduce,-individual_convolution"
AFFECTED = jaxlib.__version__ == "0.10.2"
X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(4, 3)


def equations(function, *arguments):
    return jax.make_jaxpr(function)(*arguments).jaxpr.eqns


# --- reading jaxprs ---------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _cube(x):
    return x**3


_cube.defvjp(lambda x: (x**3, x), lambda x, cotangent: (3 * x**2 * cotangent,))


@jax.custom_batching.custom_vmap
def _shift(x):
    return x + 1


@_shift.def_vmap
def _shift_batched(_size, _batched, x):
    return x + 1, True


def _scanned(x):
    return jax.lax.scan(lambda carry, row: (carry + row, carry * row), x[0], x)


def _branched(x):
    return jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)


def _looped(x):
    return jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c + 1, x)


CALLS = {
    "jit": jax.jit(jnp.tanh),
    "jit with a constant": jax.jit(lambda x: x + jnp.arange(3.0)),
    "jit with a captured array": jax.jit(lambda x: x * np.array([1.0, 2.0, 3.0], np.float32)),
    "custom_jvp": jax.nn.relu,
    "custom_jvp under vmap": jax.vmap(jax.nn.relu),
    "custom_vjp": _cube,
    "custom_vjp under vmap": jax.vmap(_cube),
    "custom_gradient": jax.custom_gradient(lambda x: (2 * x, lambda cotangent: 2 * cotangent)),
    "checkpoint": jax.checkpoint(jnp.sin),
    "checkpoint with a constant": jax.checkpoint(lambda x: x * jnp.arange(3.0)),
    "checkpoint with a policy": jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.dots_saveable),
    "custom_vmap": _shift,
    "composite": jax.lax.composite(lambda x: x * 2, "jaxbound.test"),
}
OTHERS = {"scan": _scanned, "cond": _branched, "while": _looped, "sin": jnp.sin, "sort": jax.lax.sort}


@pytest.mark.parametrize("name", CALLS)
def test_calls_have_a_callee_with_the_same_values(name):
    (equation,) = equations(CALLS[name], X)
    callee = _compat.call_jaxpr(equation)
    assert isinstance(callee, _compat.ClosedJaxpr)
    assert len(callee.jaxpr.invars) == len(equation.invars)
    values = [X if isinstance(atom, _compat.Var) else atom.val for atom in equation.invars]
    found = jax.core.eval_jaxpr(callee.jaxpr, callee.consts, *values)
    np.testing.assert_allclose(found[0], CALLS[name](X), rtol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_other_equations_have_no_callee(name):
    (equation,) = (e for e in equations(OTHERS[name], X) if e.primitive.name == name)
    assert _compat.call_jaxpr(equation) is None


def _interpret(closed, *arguments):
    """The jaxpr, evaluated with `bind`."""
    values = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    values |= zip(closed.jaxpr.constvars, closed.consts, strict=True)

    def read(atom):
        return atom.val if isinstance(atom, _compat.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        results = _compat.bind(equation.primitive, list(map(read, equation.invars)), equation.params)
        values |= zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True)
    return list(map(read, closed.jaxpr.outvars))


@pytest.mark.parametrize("name", [*CALLS, *OTHERS])
def test_bind_repeats_any_equation(name):
    function = (CALLS | OTHERS)[name]
    for found, wanted in zip(_interpret(jax.make_jaxpr(function)(X), X), jax.tree.leaves(function(X)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_bind_under_transformations():
    closed = jax.make_jaxpr(jax.nn.selu)(X[0])

    def total(x):
        return jnp.sum(_interpret(closed, x)[0])

    np.testing.assert_allclose(jax.jit(jax.grad(total))(X[0]), jax.grad(lambda x: jnp.sum(jax.nn.selu(x)))(X[0]))
    np.testing.assert_allclose(jax.vmap(total)(X), jnp.sum(jax.nn.selu(X), axis=1), rtol=1e-6)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(2)(x))


def test_source_line_is_the_users():
    def users_function(x):
        return jnp.sin(x)

    line = users_function.__code__.co_firstlineno + 1
    (equation,) = equations(users_function, X)
    wanted = f"{Path(__file__).name}:{line} ("
    assert _compat.source_line(equation).startswith(wanted)
    assert _compat.source_line(equation).endswith("users_function)")


def test_source_line_passes_over_frameworks():
    net = _Net()
    parameters = net.init(jax.random.key(0), X)
    dense = equations(net.apply, parameters, X)[0]
    assert dense.primitive.name == "dot_general"
    line = _Net.__call__.__wrapped__.__code__.co_firstlineno + 2
    assert _compat.source_line(dense) == f"{Path(__file__).name}:{line} (_Net.__call__)"


def test_source_line_of_jaxbounds_own_equations_is_empty():
    assert {_compat.source_line(e) for e in equations(_compat._probe, X, np.eye(3, dtype=np.float32))} == {""}


def test_module_path_leaves_transformations_out():
    net = _Net()
    parameters = net.init(jax.random.key(0), X)
    assert _compat.module_path(equations(net.apply, parameters, X)[0]) == "_Net/Dense_0"
    gradient = jax.grad(lambda p: net.apply(p, X).sum())
    paths = {_compat.module_path(e) for e in equations(gradient, parameters)}
    assert paths == {"", "_Net", "_Net/Dense_0"}


def test_tracers_and_traces_are_seen():
    seen = []

    def look(x):
        seen.append((_compat.is_tracer(x), _compat.is_tracer(1.0), _compat.is_tracing()))
        return x

    look(jnp.ones(3))
    for transformed in (jax.jit(look), jax.vmap(look), jax.jacfwd(look), jax.jacrev(look)):
        transformed(jnp.ones(3))
    assert seen[0] == (False, False, False)
    assert set(seen[1:]) == {(True, False, True)}
    assert not _compat.is_tracing()


# --- eager_jit --------------------------------------------------------------------------------------------------------


def _sum_of_powers(x, power=2):
    return jnp.sum(x**power)


USES = {
    "eager": lambda f: f(X[0]),
    "jit": lambda f: jax.jit(f)(X[0]),
    "jit, called on a constant": lambda f: jax.jit(lambda y: f(X[0]) * y)(1.0),
    "grad": lambda f: jax.grad(f)(X[0]),
    "hessian": lambda f: jax.hessian(f)(X[0]),
    "vmap": lambda f: jax.vmap(f)(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(X),
    "linearize": lambda f: jax.linearize(f, X[0])[1](X[0]),
    "scan": lambda f: jax.lax.scan(lambda total, row: (total + f(row), None), 0.0, X)[0],
    "cond": lambda f: jax.lax.cond(True, lambda: f(X[0]), lambda: 1.0),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X[0]),
    "pmap": lambda f: jax.pmap(f)(X),
    "within itself": lambda f: _compat.eager_jit(lambda x: f(x) + 1)(X[0]),
    "disable_jit": lambda f: jax.disable_jit()(f)(X[0]),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("use", USES)
def test_eager_jit_composes(use):
    np.testing.assert_allclose(USES[use](_compat.eager_jit(_sum_of_powers)), USES[use](_sum_of_powers), rtol=1e-5)


@pytest.mark.parametrize("static", [{"static_argnames": "power"}, {"static_argnums": 1}])
def test_eager_jit_static_arguments(static):
    function = _compat.eager_jit(lambda x, power: x if power == 1 else x**power, **static)
    np.testing.assert_allclose(function(X, 1), X)
    np.testing.assert_allclose(function(X, 3), X**3, rtol=1e-6)


def test_eager_jit_traces_once():
    function = _compat.eager_jit(chex.assert_max_traces(lambda x: x + 1, n=1))
    function(X)
    function(2 * X)


def test_eager_jit_keeps_float64(x64):
    found = _compat.eager_jit(_sum_of_powers)(np.array([1.0, 1e-9]))
    assert found.dtype == np.float64
    assert found == 1.0 + 1e-18


@pytest.mark.parametrize("norm", [np.inf, 2])
def test_dtypes_may_be_promoted_strictly(norm):
    """What jaxbound adds to a network obeys no one's setting."""
    params = [(np.eye(3, dtype=np.float32), np.ones(3, np.float32))] * 2
    x, labels = np.ones((2, 3), np.float32), np.zeros(2, int)
    with jax.numpy_dtype_promotion("strict"):
        found = jb.crown(params, x, 0.25, norm=norm, activation="relu")
        report = jb.certify(params, x, labels, 0.25, norm=norm, activation="relu", method=jb.CrownIBP())
        radius = jb.certified_radius(params, x, labels, norm=norm, activation="relu")
    assert np.all(found.lower <= found.upper) and len(report.verified) == len(radius) == 2


# --- the guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted", "protects"),
    [
        ("", f"{FLAG}={OURS}", True),
        ("--xla_a=1", f"--xla_a=1 {FLAG}={OURS}", True),
        (f"{FLAG}=-reduce --xla_a=1", None, True),
        (f"--xla_a=1 {FLAG}=", None, True),
        (f"{FLAG}=individual_dot,individual_convolution", None, True),
        (f"{FLAG}=-dot,-reduce", None, True),
        (f"{FLAG}=reduce", None, False),
        (f"{FLAG}=+individual_dot", None, False),
        (f"{FLAG}=-reduce {FLAG}=reduce", None, False),
        (f"{FLAG}s=-reduce", f"{FLAG}s=-reduce {FLAG}={OURS}", True),
        ("flags.txt", None, False),
    ],
)
def test_flag_is_added_only_where_unset(flags, wanted, protects):
    found = _flags.with_flag(flags)
    assert found == (flags if wanted is None else wanted)
    assert _flags.protects(found) == protects


def test_probe_is_the_program_it_should_be():
    rows = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    matrix = np.array([[1, 1, 0], [0, 1, 0], [2, 0, 1]], np.float32)
    np.testing.assert_array_equal(_compat._probe(rows, matrix), ((rows @ matrix.T) ** 2).sum(axis=1))


def test_check_raises_where_even_guarded_programs_are_wrong(monkeypatch):
    monkeypatch.setattr(_compat, "_is_right", lambda options: False)
    with pytest.raises(errors.MiscompilationError, match=f"jaxlib {jaxlib.__version__} on cpu"):
        _compat.check_backend.__wrapped__()


def test_check_warns_where_only_guarded_programs_are_right(monkeypatch):
    monkeypatch.setattr(_compat, "_is_right", bool)
    monkeypatch.setattr(_compat, "compiler_options", lambda: dict(_compat._SAFE))
    with pytest.warns(errors.MiscompilationWarning, match="XLA_FLAGS=--xla_cpu"):
        _compat.check_backend.__wrapped__()


def test_options_are_for_unprotected_cpus_only(monkeypatch):
    monkeypatch.setattr(_compat, "_AFFECTED", True)
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=reduce")
    assert _compat.compiler_options() == _compat._SAFE
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _compat.compiler_options() == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=-reduce")
    monkeypatch.setattr(_compat, "_IMPORTED_IN_TIME", True)
    assert _compat.compiler_options() == {}
    monkeypatch.setattr(_compat, "_IMPORTED_IN_TIME", False)
    assert _compat.compiler_options() == _compat._SAFE
    monkeypatch.setattr(_compat, "_AFFECTED", False)
    assert _compat.compiler_options() == {}


def test_jax_accepts_the_options():
    assert jax.jit(lambda x: x + 1, compiler_options=_compat._SAFE)(1.0) == 2.0


@pytest.mark.parametrize("trace", [jax.jit, jax.vmap, jax.pmap, jax.grad])
def test_check_runs_under_any_trace(trace):
    def function(x):
        _compat.check_backend.__wrapped__()
        return jnp.sum(x)

    trace(function)(jnp.ones((2,)) if trace is not jax.pmap else jnp.ones((2, 1)))


# --- in fresh processes -----------------------------------------------------------------------------------------------

PROGRAM = """
import os, warnings
import jax, jax.numpy as jnp, numpy as np

def wrong_rows(jit, count, dtype):
    values = (np.arange(count) % 100).astype(dtype)
    rows = np.stack([values, 0 * values, 0 * values], axis=1)
    matrix = np.eye(3, dtype=dtype)
    function = jit(lambda x: jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x))
    return int((np.asarray(function(rows)) != values**2).sum())

def all_wrong_rows(jit):
    with jax.enable_x64(True):
        doubles = wrong_rows(jit, 16_385, np.float64)
    return [wrong_rows(jit, 32_769, np.float32), wrong_rows(jit, 40_000, np.float32), doubles]
"""


def fresh(code: str, flags: str | None, program: str = PROGRAM) -> list[str]:
    """Run a program in a new process; the lines that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu"} | ({} if flags is None else {"XLA_FLAGS": flags})
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program + code],
        env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ON_IMPORT = """
import jaxbound
from jaxbound import _compat
print(os.environ.get("XLA_FLAGS", ""))
print(_compat.backend_started())
print(all_wrong_rows(jax.jit))
print(all_wrong_rows(_compat.eager_jit))
print(_compat.compiler_options())
"""


@pytest.mark.parametrize("flags", [None, "--xla_force_host_platform_device_count=2", f"{FLAG}="])
def test_import_protects_every_program_and_starts_no_backend(flags):
    found, started, plain, eager, options = fresh(ON_IMPORT, flags)
    assert found == (_flags.with_flag(flags or "") if AFFECTED else flags or "")
    assert started == "False"
    assert plain == eager == "[0, 0, 0]"
    assert options == "{}"


def test_import_protects_a_backend_that_starts_before_the_first_use():
    """The public names, and JAX with them, are imported later than jaxbound itself."""
    code = "import sys\nassert 'jax' not in sys.modules\nimport jaxbound\nassert 'jax' not in sys.modules\n"
    code += f"{PROGRAM}\njax.devices()\nprint(all_wrong_rows(jax.jit), jaxbound.IBP())"
    assert fresh(code, None, program="") == ["[0, 0, 0] IBP()"]


def test_eager_programs_are_right_whatever_the_user_set():
    wanted = f"{FLAG}=reduce"
    found, started, plain, eager, _ = fresh("warnings.simplefilter('ignore')\n" + ON_IMPORT, wanted)
    assert (found, started, eager) == (wanted, "False", "[0, 0, 0]")
    assert (plain != "[0, 0, 0]") == AFFECTED


def test_backend_started_before_import():
    lines = fresh(
        """
jax.devices()
from jaxbound import _compat, _flags, errors
print("XLA_FLAGS" in os.environ, _compat.backend_started())
print(all_wrong_rows(jax.jit))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(all_wrong_rows(_compat.eager_jit))
    _compat.check_backend()
print([w.category.__name__ for w in caught])
cube = _compat.eager_jit(lambda x: jnp.sum(x**3))
x = jnp.ones(3)
print(cube(x), jax.grad(cube)(x), jax.jit(cube)(x), jax.vmap(cube)(x[None]), jax.linearize(cube, x)[1](x))
""",
        None,
    )
    unprotected = "[1, 7232, 1]" if AFFECTED else "[0, 0, 0]"
    warned = "['MiscompilationWarning']" if AFFECTED else "[]"
    assert lines == ["False True", unprotected, "[0, 0, 0]", warned, "3.0 [3. 3. 3.] 3.0 [3.] 9.0"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_every_error_can_be_caught_as_one():
    raised = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(raised) == 11
    assert all(issubclass(c, errors.JaxboundError) for c in raised if not issubclass(c, Warning))
    assert issubclass(errors.ArgumentError, ValueError)
    assert issubclass(errors.ArgumentTypeError, TypeError)
    assert all(issubclass(c, errors.JaxboundWarning) for c in raised if issubclass(c, Warning))
    assert issubclass(errors.JaxboundWarning, UserWarning)


def test_refusals_say_what_where_and_why():
    full = errors.unsupported("sort", [(4, 3), ()], "a.py:3 (f)", "no rule", method="Crown", way_out="use max")
    assert str(full) == "Crown cannot bound `sort` of shapes (4, 3) and () at a.py:3 (f): no rule; use max"
    assert str(errors.unsupported("iota", [], "", "no rule")) == "no method can bound `iota`: no rule"


def test_options_without_a_close_choice_are_refused_by_name():
    text = str(errors.unknown_option("sides", 7, ("both", "lower")))
    assert text == "sides=7 is not known; the choices are 'both', 'lower'"


def test_broken_examples_are_counted():
    text = str(errors.soundness_broken("IBP", range(7), [0.5] * 7, [-1.0] * 7))
    assert text.startswith("an attack broke 7 examples that IBP had verified: index 0 ")
    assert "index 4 has certified margin >= 0.5 and attacked margin -1, and 2 more." in text
