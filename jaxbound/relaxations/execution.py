"""The network as it is executed: how far one node's computed value may be from the real value at the same inputs.

`rounding="execution"` bounds every value that JAX can give when it runs the function in its dtype: sums in any order
and blocks, with or without fused multiply-add, eager, compiled, batched or not, with subnormal numbers kept, or taken
for zero wherever they appear. A computed value differs from the real function of the *computed* values that it reads by
at most `error`. So intervals are widened by it node after node, and a backward pass, whose rows are linear in every
node's value, charges `|C| error` where it meets a node. That is beside the charges for the bounds' own rounding.

* An affine node errs by `affine.rounding`: `gamma_n (|L| |x| + |b|)`, whatever the order of its sums, and by what the
  errors of constants that were computed do (as executed, they may be off to the other side).
* A scalar function errs by a running error analysis over the interval of its argument (`enclosures.running`).
* Maxima and sorting are exact, but for subnormal operands that count as zero: by the smallest normal number.

What is not listed is refused: products of two values, rewritten expressions, which are not what runs. XLA also rewrites
programs. It moves multiplications by constants across sums and products and merges consecutive ones; each factor that
it makes so costs one more rounding, for which `affine.rounding` has room (three more terms than a sum has), unless
something leaves the range of the dtype on the way. So values are multiplied by numbers of moderate size alone, they
are bounded only far below the largest number, and what underflows is charged times the largest such factor. Two
readers of one value may see different ones (`methods.executed`).

References: Higham 2002, section 3.1; Jin et al., "No Soundness in the Real World", 2025.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.curvature.analysis import analyse
from jaxbound.graph import Op
from jaxbound.graph.values import plain
from jaxbound.relaxations import affine
from jaxbound.relaxations.enclosures import running, simplification

Ends = tuple[jax.Array, jax.Array]

MODE = "execution"
_KINDS = frozenset({"maximum", "sort"})
"""Nonlinear nodes that choose among entries."""
_DTYPES = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
"""What is computed in the precision that it has."""
_LARGEST = 2.0**-64
"""Part of the largest number up to which values and numbers are added, or multiplied in sums, with factors or not."""
_ROOM = 4
"""How many subnormal operands of one node may count as zero."""


def error(op: Op, inputs: Sequence[Ends], constants: Sequence) -> jax.Array:
    """A bound on `|computed - real|` of a node's value at computed inputs between these ends."""
    tiny = _ROOM * float(jnp.finfo(op.dtype).tiny)
    if op.kind == "scalar":
        ((low, high),) = inputs
        return running.error(op.program, low, high)
    magnitudes = [jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in inputs]
    if op.kind != "affine" or affine.moves(op):
        own = affine.inexactness(op, magnitudes, constants) if op.kind == "affine" else None
        return jnp.full(op.shape, tiny, op.dtype) if own is None else own + tiny
    own = affine.rounding(op, magnitudes, constants)
    assert own is not None
    numbers = _numbers(op, constants)
    largest = [jnp.max(part, initial=0).astype(op.dtype) for part in (*magnitudes, *numbers)]
    flushed = tiny * running.LOST * affine.terms(op) * sum(largest, 1.0)
    limits = float(jnp.finfo(op.dtype).max)
    overflows = functools.reduce(jnp.logical_or, [~(part <= _LARGEST * limits) for part in largest])
    if op.name in ("mul", "div"):
        (factor,), (least, most) = numbers, simplification.FACTORS
        moderate = (factor == 0) | ((factor >= least) & (factor <= most))
        overflows = overflows | ~moderate | ~(magnitudes[0] <= running.LARGEST * limits)
    return jnp.where(overflows, jnp.inf, own + flushed)


def _numbers(op: Op, constants: Sequence) -> list[jax.Array]:
    """The magnitudes of the numbers that a node adds, or multiplies by."""
    found = []
    for position, operand in enumerate(op.operands):
        if operand[0] == "input" or (position in op.facts.fixed and not op.facts.divides):
            continue
        found.append(jnp.abs(plain(constants[operand[1]]) if operand[0] == "constant" else operand[1]))
    return found


def refusal(op: Op, made_by: frozenset[str] = frozenset()) -> str:
    """Why a node is not bounded as it is executed; "" if it is. `made_by` says what its argument is the result of."""
    if op.kind == "input":
        return ""
    if op.dtype not in _DTYPES:
        return f"arithmetic in {op.dtype}"
    if op.kind == "affine" or op.kind in _KINDS:
        return ""
    if op.kind != "scalar":
        return f"{op.kind} of computed values"
    proof = analyse(op.program)
    if proof is None or not (proof.is_continuous or simplification.is_smooth(op.program)):
        return f"{op.name}, which jumps"
    reason = simplification.refusal(op.program, made_by)
    return reason and f"{reason} in {op.name}"
