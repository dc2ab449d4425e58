"""Everything that depends on JAX's version or on what JAX calls private, and the guard against its CPU miscompilation.

Names. `Primitive, Jaxpr, ClosedJaxpr, Literal, Var, JaxprEqn` are the ones that JAX >= 0.10.1 exports for interpreters.
Measured on 0.10.2 and 0.12.0.1:

* The nested-call primitives are `jit` (params `jaxpr`), `custom_jvp_call` and `custom_vjp_call` (`call_jaxpr`),
  `remat2` (`jaxpr`, open on 0.10.2), `custom_vmap_call` (`call`), `composite` (`jaxpr`; `call_jaxpr` on 0.12).
* `scan` counts its operands in `num_consts` and `num_carry`; on 0.12 in a tree of three, `ft_in`.
* On 0.12 `ClosedJaxpr is Jaxpr`: a jaxpr holds its constants, and `closed.jaxpr is closed`.
* The trace of a `jit` function is cached, so inside one the lines of JAX's own functions (such as `jax.nn.silu`) are
  those of the *first* call ever made; the call equation itself has the right line.

The miscompilation (jax issue 39103). Measured with jaxlib 0.10.2 on CPU, on 1 and 2 cores:

* `vmap(lambda row: sum((M @ row) ** 2))` under `jit`, M of shape (3, 3), is wrong in the rows past a power of two: at
  32,769 float32 rows one, at 40,000 float32 rows 7,232, at 32,769 float64 rows 16,376. Also with `relu` for the square,
  and with M of shape (5, 5). jaxlib 0.10.1, 0.11.0, 0.11.1, 0.11.2, 0.12.0 and 0.12.0.1 are right.
* The cause is one kind of fusion: 0.10.2 turned on library fusions of *reductions*, besides those of dot products and
  convolutions that 0.10.1 had. `XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce` leaves those two. Of 384
  programs of 6 kinds, compared with NumPy, 12 were wrong by default and none without reductions.
* The library's dot products are kept, since they are faster (without them CROWN-IBP of the 3 x 1024 network takes 1.15
  to 1.5 times as long), and its convolutions are turned off with the reductions, since they use one core: 2,304 images
  of 16 x 16 x 16 by a 4 x 4 kernel to 32 channels take 0.35 s, and 0.05 s (0.10 CPU s) by XLA's own. With padding of 2
  or more XLA takes its own in any case.
* The flag is read when the backend starts, and an unknown flag ends the process, so it is set for this version only.
  An unknown option raises; this one is known to 0.10.1 ... 0.12.0.1.
* `jit(f, compiler_options=…)` raises where its program is part of another: under `jit`, `make_jaxpr`, `scan`, `cond`,
  `pmap`, `checkpoint`, `linearize`, and (0.10.2) `grad` and `vjp`. So `eager_jit` passes options only where no trace is
  under way, and the self-check warns once where other programs are not protected.
* Cost, wall time on 2 cores, unprotected → `_SAFE`: 1024³ matmul 5.1 → 5.0 ms; vmapped matvec, relu, sum (4096 × 256)
  1.7 → 1.6 ms (empty option: 3.6 ms); plain sums and softmax of 4M float32 0.2 → 2.1 ms and 1.1 → 3.3 ms.
* The self-check takes 0.04 s after the backend has started, 0.08 s where it must compare both forms.

Nothing here starts the backend at import: that would break `jax.distributed.initialize`. Where the default backend is
not the CPU, arrays that the user puts on the CPU by hand are protected by the flag alone.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax._src import config as _config
from jax._src import core as _core
from jax._src import source_info_util as _source_info
from jax.core import ShapedArray, Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun
from jax.interpreters import mlir as _mlir
from jax.interpreters import partial_eval as _partial_eval
from jax.typing import ArrayLike, DTypeLike

from jaxbound import errors
from jaxbound._flags import AFFECTED as _AFFECTED
from jaxbound._flags import FLAG as _FLAG
from jaxbound._flags import IMPORTED_IN_TIME as _IMPORTED_IN_TIME
from jaxbound._flags import backend_started
from jaxbound._flags import protects as _protects

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "ShapedArray",
    "Var",
    "all_equations",
    "backend_started",
    "bind",
    "call_jaxpr",
    "check_backend",
    "compiler_options",
    "eager_jit",
    "is_tracer",
    "is_tracing",
    "jaxpr_as_fun",
    "module_path",
    "run_as",
    "scan_counts",
    "source_line",
    "unchecked_types",
    "used_part",
    "varying_axes",
]

P = ParamSpec("P")
R = TypeVar("R")

# --- reading jaxprs ---------------------------------------------------------------------------------------------------

_CALLEE = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "core_call": ("call_jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_jvp_call_jaxpr": ("fun_jaxpr",),
    "custom_vjp_call": ("call_jaxpr", "fun_jaxpr"),
    "custom_vjp_call_jaxpr": ("fun_jaxpr", "call_jaxpr"),
    "custom_vmap_call": ("call",),
    "composite": ("jaxpr", "call_jaxpr"),
    "remat": ("jaxpr",),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
}
"""Primitives that apply one function to all their operands, and the parameter that holds it, by version."""

_FRAMEWORKS = ("flax", "optax")
_PACKAGE = PurePath(__file__).parent


def is_tracer(value: object) -> bool:
    """Whether a value is being traced, so that its numbers are not known."""
    return isinstance(value, Tracer)


def is_tracing() -> bool:
    """Whether a trace (`jit`, `vmap`, `grad`, `scan`, …) is under way, whatever the arguments at hand are."""
    return not _core.trace_state_clean()


def default_device() -> Any:
    """The device that JAX was told to use by default, or None: a program moves uncommitted arrays there."""
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]


def owned(value: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.asarray`, with a copy of NumPy's memory, which JAX may otherwise read after the caller has changed it.

    Programs read their NumPy arguments where they are, and so do arrays made from them with a dtype.
    """
    if isinstance(value, jax.Array):
        array = value
    else:  # outside of traces without a program for each shape, as `jnp.array` has
        array = jnp.array(value) if is_tracing() else jax.device_put(np.array(value))
    return array if dtype is None else jnp.asarray(array, dtype)


def call_jaxpr(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The function that a call-like equation applies to its operands, or None for any other equation.

    `custom_jvp_call` and `custom_vjp_call` give the primal function: right for values, not for derivatives.
    """
    return called(equation.primitive, equation.params, [variable.aval for variable in equation.invars])


def called(primitive: Primitive, params: Mapping[str, Any], avals: Sequence) -> ClosedJaxpr | None:
    """The same by the equation's primitive, parameters and what it reads."""
    for name in _CALLEE.get(primitive.name, ()):
        callee = params.get(name)
        plain = _plain(callee)
        if plain is not None:
            return jax.make_jaxpr(plain)(*avals)
        if isinstance(callee, ClosedJaxpr):
            return callee
        if isinstance(callee, Jaxpr) and not callee.constvars:
            return ClosedJaxpr(callee, ())
    return None


def _plain(callee: Any) -> Callable | None:
    """What one of JAX's own functions computes, where it is written with the bits of floating-point numbers."""
    info = getattr(getattr(callee, "jaxpr", None), "debug_info", None)
    name, _, place = str(getattr(info, "func_src_info", "")).partition(" at ")
    own = PurePath(jax.__file__).parent
    return _PLAIN.get(name) if own in PurePath(place).parents else None


_PLAIN: dict[str, Callable] = {"exp_neg_sq": lambda x: jnp.exp(-jnp.square(x))}
"""Used by the derivatives of erf and erfc since 0.12."""


def all_equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    """The equations of a jaxpr, and of those among their parameters."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from all_equations(inner)


def used_part(closed: ClosedJaxpr) -> Jaxpr:
    """A jaxpr without the equations that none of its results needs, in calls and loops too."""
    jaxpr = closed.jaxpr
    return _partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are the same in every step, and how many carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def varying_axes(array: jax.Array) -> frozenset:
    """The axes of a `shard_map` over which an array varies, by its type; none where types are not checked."""
    if not _config._check_vma.value:
        return frozenset()
    aval = jax.typeof(array)
    return getattr(getattr(aval, "mat", None), "varying", getattr(aval, "vma", frozenset()))


def unchecked_types() -> Any:
    """A context in which operations may mix arrays that vary over a `shard_map`'s axes and arrays that do not."""
    return _config._check_vma(False)


def bind(primitive: Primitive, operands: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """Apply a primitive with the parameters of an equation; a list if it has several results.

    Functions among the parameters (`custom_jvp_call`, `scan`, …) are put into the form that binding wants.
    """
    return primitive.bind(*operands, **primitive.get_bind_params(dict(params)))


def run_as(primitive: Primitive, function: Callable) -> None:
    """Let compiled programs run a primitive of one result as a JAX function does."""
    primitive.def_impl(function)
    _mlir.register_lowering(primitive, _mlir.lower_fun(function, multiple_results=False))


def source_line(equation: JaxprEqn) -> str:
    """The user's line that made an equation, such as "model.py:12 (Net.__call__)"; "" if there is none.

    Lines of JAX and of neural-network frameworks are not the user's; an equation that jaxbound itself wrote has none.
    """
    frames = _source_info.user_frames(equation.source_info.traceback)
    for frame in frames:
        path = PurePath(frame.file_name)
        if _PACKAGE in path.parents:
            return ""
        if not any(name in path.parts for name in _FRAMEWORKS):
            return f"{path.name}:{frame.start_line} ({frame.function_name})"
    return ""


def module_path(equation: JaxprEqn) -> str:
    """The named scopes around an equation, such as "MLP/Dense_0", without JAX's own `jvp(…)` and `transpose(…)`."""
    stack = equation.source_info.name_stack.stack
    return "/".join(part.name for part in stack if isinstance(part, _source_info.Scope))


# --- the guard against the CPU miscompilation -------------------------------------------------------------------------

_SAFE = {_FLAG[2:]: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_PROBE_ROWS = 40_000


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit(…, compiler_options=…)` on outermost programs: empty where nothing needs protection.

    Starts the backend.
    """
    flagged = _IMPORTED_IN_TIME and _protects(os.environ.get("XLA_FLAGS", ""))
    if not _AFFECTED or flagged or jax.default_backend() != "cpu":
        return {}
    return dict(_SAFE)


_QUICK = "xla_cpu_use_fusion_emitters"


def _quick_options() -> dict[str, Any]:
    """Options that compile a fifth quicker and run as fast: the emitters before 0.11, which knows no others."""
    known = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)
    chosen = not known or _QUICK in os.environ.get("XLA_FLAGS", "") or jax.default_backend() != "cpu"
    return {} if chosen else {_QUICK: False}


def _at(level: int) -> dict[str, Any]:
    """Options that compile at a level of optimization, in few parts: each of the usual 32 costs a compiler's start."""
    options = {"xla_backend_optimization_level": level, "xla_cpu_parallel_codegen_split_count": 4}
    return options if jax.default_backend() == "cpu" else {}


def _probe(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """The program that 0.10.2 gets wrong."""
    product = functools.partial(jnp.matmul, matrix, precision=jax.lax.Precision.HIGHEST)
    return jax.vmap(lambda row: jnp.sum(product(row) ** 2))(rows)


def _is_right(options: dict[str, Any]) -> bool:
    """Whether the probe comes out right: its numbers are small integers, exact in any precision."""
    values = (np.arange(_PROBE_ROWS) % 251).astype(np.float32)
    rows = np.zeros((_PROBE_ROWS, 3), np.float32)
    rows[:, 0] = values
    with jax.ensure_compile_time_eval(), jax.disable_jit(False), jax.transfer_guard("allow"):
        found = jax.jit(_probe, compiler_options=options)(rows, np.eye(3, dtype=np.float32))
        return bool(np.array_equal(np.asarray(found), values**2))


@functools.cache
def check_backend() -> None:
    """Check, once per process, that this backend computes right sums of products. Starts the backend.

    Raises:
        MiscompilationError: if it does not, compiled as jaxbound compiles its own programs.

    Warns:
        MiscompilationWarning: if it does not in programs that are compiled without `compiler_options`.
    """
    options = compiler_options()
    if not _is_right({**_quick_options(), **options}):
        raise errors.miscompiled(jax.default_backend(), jaxlib.__version__)
    if options and not _is_right({}):
        text = errors.miscompiled_outside(jaxlib.__version__, f"{_FLAG}=-reduce")
        warnings.warn(text, errors.MiscompilationWarning, stacklevel=2)


def eager_jit(
    function: Callable[P, R],
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    level: int = 1,
) -> Callable[P, R]:
    """`jax.jit`, protected from miscompilation where it is the outermost program, and as usual under a trace.

    There it also compiles by the quicker of XLA's two kinds of emitters, and at a level of optimization. At 1 programs
    compile in .6 to .9 of the time that XLA's own 3 takes, large ones of small operations in a quarter, and run as
    fast; at 0 they compile quicker still, and loops take some times as long (products are library calls, and do not):
    for what runs once, or only puts numbers somewhere.

    The first call of any such function checks the backend.
    """
    jit = functools.partial(jax.jit, function, static_argnums=static_argnums, static_argnames=static_argnames)
    nested = jit()

    @functools.cache
    def outermost():
        options = {**_quick_options(), **_at(level), **compiler_options()}
        return jit(compiler_options=options) if options else nested

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_backend()
        return (nested if is_tracing() else outermost())(*args, **kwargs)

    return call
