"""What jaxbound raises, and the functions that build the texts.

A refusal names what was refused, its shapes, the line of the user's function where JAX knows it, the method, and the
way out. Nothing in jaxbound falls back to evaluating a point, so every refusal is an exception; every exception is a
`JaxboundError`, and those that blame an argument are also the builtin that callers expect.

The builders return exceptions, so that a traceback ends at the `raise` of whoever found the fault.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Hashable, Iterable, Sequence
from pathlib import PurePath


class JaxboundError(Exception):
    """The base of everything that jaxbound raises."""


class UnsupportedError(JaxboundError):
    """Primitives, functions or compositions that cannot be bounded.

    `refusals` has one message each; the text holds them all.
    """

    def __init__(self, *refusals: str):
        super().__init__("\n".join(refusals))
        self.refusals = refusals


class ArgumentError(JaxboundError, ValueError):
    """An argument with a wrong value, shape or combination."""


class ArgumentTypeError(JaxboundError, TypeError):
    """An argument of a wrong type or dtype."""


class HostLoopError(JaxboundError):
    """A function that loops on the host was called under `jit`, `vmap`, `grad` or `pmap`."""


class SoundnessError(JaxboundError):
    """An attack broke an example that bounds had verified: jaxbound, JAX or the hardware is wrong."""


class CertificateError(JaxboundError):
    """A certificate that does not prove what it says, of the network that it was held against."""


class MiscompilationError(JaxboundError):
    """XLA computes wrong numbers here, even in the form in which jaxbound compiles its own programs."""


class JaxboundWarning(UserWarning):
    """The base of everything that jaxbound warns of."""


class AssumedNetworkWarning(JaxboundWarning):
    """What is bounded rests on an assumption about the network, which the text names."""


class MiscompilationWarning(JaxboundWarning):
    """XLA computes wrong numbers here in programs that jaxbound does not compile itself."""


def inexact_constants(method: str) -> UnsupportedError:
    """A method that would take what the function computes from its parameters for exact."""
    return UnsupportedError(
        f"{method} does not count the rounding of what the function computes from its parameters alone: compute it "
        "beforehand and pass it as an argument, use Crown or IBP, or ask for rounding=False"
    )


def not_executed(reason: str, way_out: str = 'ask for rounding="exact"') -> UnsupportedError:
    """What cannot be bounded as it is executed."""
    return UnsupportedError(f'rounding="execution": {reason}; {way_out}')


def unsupported(
    primitive: str,
    shapes: Sequence[tuple[int, ...]],
    source: str,
    reason: str,
    *,
    method: str = "",
    way_out: str = "",
) -> UnsupportedError:
    """A refusal to bound one operation.

    Args:
        primitive: name of the primitive or function.
        shapes: shapes of its operands.
        source: the user's line, as `source_line` gives it; "" if not known.
        reason: why it cannot be bounded.
        method: the method that was asked; "" if no method could.
        way_out: what to do instead, if the reason does not say it.

    >>> print(unsupported("sort", [(4, 3)], "model.py:12 (call)", "its order depends on a region", method="Crown"))
    Crown cannot bound `sort` of shape (4, 3) at model.py:12 (call): its order depends on a region
    """
    who = f"{method} cannot bound" if method else "no method can bound"
    where = f" at {source}" if source else ""
    return UnsupportedError(f"{who} `{primitive}`{_of_shapes(shapes)}{where}: {reason}{_sentence(way_out)}")


def argument(name: str, problem: str, way_out: str = "") -> ArgumentError:
    """An argument with a wrong value: its name, what is wrong with it, what to pass instead.

    >>> print(argument("eps", "is -0.1", "pass eps >= 0"))
    eps is -0.1; pass eps >= 0
    """
    return ArgumentError(f"{name} {problem}{_sentence(way_out)}")


def argument_type(name: str, problem: str, way_out: str = "") -> ArgumentTypeError:
    """An argument of a wrong type or dtype: its name, what is wrong with it, what to pass instead."""
    return ArgumentTypeError(f"{name} {problem}{_sentence(way_out)}")


def unknown_option(name: str, given: object, choices: Iterable[str]) -> ArgumentError:
    """An option with a value that it does not have.

    >>> print(unknown_option("lower_slope", "adaptve", ["adaptive", "zero"]))
    lower_slope='adaptve' is not known; did you mean 'adaptive'? the choices are 'adaptive', 'zero'
    """
    known = list(choices)
    close = difflib.get_close_matches(str(given), known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return ArgumentError(f"{name}={given!r} is not known; {guess}the choices are {', '.join(map(repr, known))}")


def no_such_answer(method: str, what: str, way_out: str = "use another method, such as Crown()") -> UnsupportedError:
    """A method was asked for something that it does not compute.

    >>> print(no_such_answer("MILP", "linear bounds"))
    MILP has no linear bounds; use another method, such as Crown()
    """
    return UnsupportedError(f"{method} has no {what}{_sentence(way_out)}")


def estimate_refused(method: str) -> ArgumentError:
    """An estimate was given where only a certified method may stand.

    >>> print(estimate_refused("ConvexPolytope"))
    ConvexPolytope gives an estimate, which can be on the wrong side of the true value, so no certificate can rest on \
it; pass a method whose guarantee is "certified"
    """
    return ArgumentError(
        f"{method} gives an estimate, which can be on the wrong side of the true value, so no certificate can rest on "
        'it; pass a method whose guarantee is "certified"'
    )


def host_loop(name: str, alternative: str) -> HostLoopError:
    """A host loop was called under a trace: what it is called, and what to use there instead.

    >>> print(host_loop("certify", "margins"))
    certify loops on the host and reads concrete values, so it cannot run under jit, vmap, grad or pmap; \
use margins there
    """
    return HostLoopError(
        f"{name} loops on the host and reads concrete values, so it cannot run under jit, vmap, grad or pmap; "
        f"use {alternative} there"
    )


def soundness_broken(
    method: str, indices: Sequence[int], bounds: Sequence[float], found: Sequence[float]
) -> SoundnessError:
    """An attack found margins below their certified lower bounds.

    Args:
        method: the method that gave the bounds.
        indices: the examples' indices.
        bounds: their certified lower bounds.
        found: the margins that the attack reached, each at a point of the region.

    >>> print(soundness_broken("Crown", [7], [0.25], [-0.5]))
    an attack broke 1 example that Crown had verified: index 7 has certified margin >= 0.25 and attacked margin -0.5. \
Please report this with the model; no result of this run can be trusted
    """
    shown = [
        f"index {i} has certified margin >= {b:.6g} and attacked margin {f:.6g}"
        for i, b, f in zip(indices[:5], bounds[:5], found[:5], strict=True)
    ]
    more = f", and {len(indices) - 5} more" if len(indices) > 5 else ""
    examples = "example" if len(indices) == 1 else "examples"
    return SoundnessError(
        f"an attack broke {len(indices)} {examples} that {method} had verified: {'; '.join(shown)}{more}. "
        "Please report this with the model; no result of this run can be trusted"
    )


def logits_alone(given: str) -> ArgumentError:
    """A network with more results than its outputs.

    >>> print(logits_alone("2 arrays"))
    the network gives 2 arrays, and one is bounded: pass apply_fn=lambda v, x: model.apply(v, x)[0], with the part \
that is meant
    """
    return ArgumentError(
        f"the network gives {given}, and one is bounded: pass apply_fn=lambda v, x: model.apply(v, x)[0], with the "
        "part that is meant"
    )


def value_read(error: Exception) -> ArgumentTypeError:
    """A function that looks at a value while it is traced: a flag, an axis, or a branch on values."""
    return ArgumentTypeError(
        f"the function reads the value of an argument while it is traced ({type(error).__name__}): pass flags and axes "
        "by functools.partial, and write a branch on values as jnp.where"
    )


def network_failed(*shapes: tuple[int, ...], error: Exception) -> ArgumentError:
    """A network that cannot be evaluated: what it was given, its own error in short, and the likely way out.

    >>> print(network_failed((1, 5), error=TypeError("call() missing 1 required positional argument: 'train'")))
    the network fails on a batch of shape (1, 5) with TypeError: call() missing 1 required positional argument: \
'train'; pass apply_fn=functools.partial(model.apply, train=False)
    """
    said = " ".join(str(error).split())
    said = said if len(said) <= 100 else f"{said[:97]}..."
    way_out = next((out for mark, out in _NETWORK_FAILURES.items() if mark in f"{type(error).__name__} {error}"), "")
    way_out = way_out or "x is a batch, and params are those of the network in apply_fn"
    kind = type(error).__name__
    return ArgumentError(f"the network fails on a batch{_of_shapes(shapes)} with {kind}: {said}; {way_out}"[:299])


_NETWORK_FAILURES = {
    "argument: 'train'": "pass apply_fn=functools.partial(model.apply, train=False)",
    "argument: 'training'": "pass apply_fn=functools.partial(model.apply, training=False)",
    "argument: 'deterministic'": "pass apply_fn=functools.partial(model.apply, deterministic=True)",
    "InvalidRng": "switch dropout off, as by apply_fn=functools.partial(model.apply, train=False)",
    "ScopeCollectionNotFound": "pass all of the variables, as {'params': ..., 'batch_stats': ...}",
    "TracerArrayConversion": "write it with jax.numpy in place of NumPy",
    "TracerBoolConversion": "write a branch on values as jnp.where",
    "ModifyScopeVariable": "BatchNorm is in training mode: pass apply_fn=functools.partial(model.apply, train=False)",
    "requires a key": "switch dropout off, as by equinox.nn.inference_mode(model)",
    "argument: 'rng'": "for Haiku pass apply_fn=haiku.without_apply_rng(transformed).apply",
}


def warn_once(text: str, category: type[Warning], key: Hashable) -> None:
    """Warn at the line that called jaxbound, once per key as long as nobody enters `warnings.catch_warnings`."""
    if _SAID["under"] is not warnings.filters:
        _SAID.update(under=warnings.filters, keys=set())
    if (category, key) in _SAID["keys"]:
        return
    inside = PurePath(__file__).parent, PurePath(sys.modules["jax"].__file__ or "").parent
    frame = sys._getframe(1)
    while frame.f_back is not None and any(path in PurePath(frame.f_code.co_filename).parents for path in inside):
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "")
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, {})
    _SAID["keys"].add((category, key))


_SAID: dict = {"under": None, "keys": set()}


def value_outside(method: str, indices: Sequence[int], bound: float, found: float) -> SoundnessError:
    """A network whose own values at the given examples are not within its bounds.

    >>> print(value_outside("Crown", [7], 0.25, -0.5))
    Crown bounds a margin of example 7 by 0.25 from below, but the network's own is -0.5: apply_fn is another function \
of a batch than of one example (BatchNorm in training mode, examples that depend on each other), or jaxbound is wrong; \
nothing was certified
    """
    more = f" (and of {len(indices) - 1} others)" if len(indices) > 1 else ""
    return SoundnessError(
        f"{method} bounds a margin of example {indices[0]}{more} by {bound:.6g} from below, but the network's own is "
        f"{found:.6g}: apply_fn is another function of a batch than of one example (BatchNorm in training mode, "
        "examples that depend on each other), or jaxbound is wrong; nothing was certified"
    )


def miscompiled(backend: str, version: str) -> MiscompilationError:
    """The self-check failed in the form in which jaxbound compiles its own programs."""
    return MiscompilationError(
        f"jaxlib {version} on {backend} computes a vmapped matrix-vector product followed by a sum wrongly, even as "
        "jaxbound compiles it, so no bound computed here can be trusted; install another jaxlib release"
    )


def miscompiled_outside(version: str, flag: str) -> str:
    """The text of the warning that programs which jaxbound does not compile itself are wrong."""
    return (
        f"jaxlib {version} miscompiles on CPU (jax issue 39103: a vmapped matrix-vector product followed by a sum gets "
        "wrong rows). jaxbound's own eager programs are protected; your own jit programs, and bounds under your jit, "
        f"grad, vmap or pmap, are not, because the backend started before jaxbound was imported. Set XLA_FLAGS={flag} "
        "before the first use of JAX (importing jaxbound first does it), or install another jaxlib release"
    )


def _of_shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    if not shapes:
        return ""
    return f" of shape{'s' if len(shapes) > 1 else ''} {' and '.join(map(str, shapes))}"


def _sentence(way_out: str) -> str:
    return f"; {way_out}" if way_out else ""
