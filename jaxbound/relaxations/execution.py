"""The network as it is executed: how far one node's computed value may be from the real value at the same inputs.

`rounding="execution"` bounds every value that JAX can give when it runs the function in its dtype: sums in any order
and blocks, with or without fused multiply-add, eager, compiled, batched or not, with subnormal numbers kept, or taken
for zero wherever they appear. A computed value differs from the real function of the *computed* values that it reads by
at most `error`. So intervals are widened by it node after node, and a backward pass, whose rows are linear in every
node's value, charges `|C| error` where it meets a node. That is beside the charges for the bounds' own rounding.

* An affine node errs by `affine.rounding`: `gamma_n (|L| |x| + |b|)`, whatever the order of its sums, and by what the
  errors of constants that were computed do (as executed, they may be off to the other side).
* Choices (ReLU, absolute values, clips, maxima, sorting) are exact, but for subnormal operands that count as zero:
  by the smallest normal number. A choice between `z` and a multiple of it errs by the product, too.

What is not listed is refused: curved functions, products of two values, rewritten expressions, which are not what runs.
XLA also rewrites programs. It moves multiplications by constants across sums and products and merges consecutive ones;
each factor that it makes so costs one more rounding, for which `affine.rounding` has room (three more terms than a sum
has), unless the merged factor leaves the range of the dtype: consecutive multiplications and divisions by constants are
refused. Nothing is bounded where magnitudes overflow, in any order.

References: Higham 2002, section 3.1; Jin et al., "No Soundness in the Real World", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.curvature.analysis import analyse
from jaxbound.graph import Op, Program
from jaxbound.relaxations import affine
from jaxbound.relaxations.enclosures import evaluation

MODE = "execution"
_KINDS = frozenset({"maximum", "sort"})
"""Nonlinear nodes that choose among entries."""
_LARGEST = 2.0**-32
"""Part of the largest number up to which a value may be multiplied by a constant: XLA moves the same constant out of a
sum, which then has the values themselves as its terms."""
_ROOM = 4
"""How many subnormal operands of one node may count as zero."""


def error(op: Op, magnitudes: Sequence[jax.Array], constants: Sequence) -> jax.Array:
    """A bound on `|computed - real|` of a node's value at computed inputs of at most these magnitudes."""
    flushed = _ROOM * float(jnp.finfo(op.dtype).tiny)
    if op.kind == "affine":
        own = affine.rounding(op, magnitudes, constants)
        if own is None:
            return jnp.full(op.shape, flushed, op.dtype)
        overflows = magnitudes[0] > _LARGEST * float(jnp.finfo(op.dtype).max)
        return jnp.where(overflows, jnp.inf, own + flushed) if op.name in ("mul", "div") else own + flushed
    if op.kind == "scalar":
        share = _share(op.program)
        assert share is not None
        return share * float(jnp.finfo(op.dtype).eps) * magnitudes[0] + (1 + share) * flushed
    return jnp.full(op.shape, flushed, op.dtype)


def refusal(op: Op) -> str:
    """Why a node is not bounded as it is executed; "" if it is."""
    if op.kind in ("input", "affine") or op.kind in _KINDS:
        return ""
    if op.kind != "scalar":
        return f"{op.kind} of computed values"
    return "" if _share(op.program) is not None else f"{op.name}, which is not a choice"


def _share(program: Program) -> float | None:
    """The error of a program that chooses between multiples of z, in units in the last place of z; None for others.

    It has to be continuous: a subnormal z that counts as zero may turn what is chosen. And a product decides nothing.
    """
    proof = analyse(program)
    if proof is None or not proof.is_continuous:
        return None
    share, decides = 0.0, False
    for name, _, operands in program.instructions:
        kinds = [operand[0] for operand in operands]
        if name == "mul" and sorted(kinds) == ["lit", "z"]:
            share += max(1.0, *(abs(float(operand[1])) for operand in operands if operand[0] == "lit"))
        elif not evaluation.is_exact(name) or "const" in kinds:
            return None
        decides |= evaluation.compares(name) and "var" in kinds
    return None if share and decides else share
