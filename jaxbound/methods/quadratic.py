r"""Quadratic certificates for networks with one ReLU layer over an l_2 ball.

Let `f(x) = c + h.x + sum_i v_i relu(z_i)` with `z = W x + b` in [l, u] over the ball `||x - x0||_2 <= r`. CROWN puts a
line below each term. Where v_i < 0 and l_i < 0 < u_i that line is the chord, and there is room above the ReLU for more:

    relu(z)  <=  chord(z) - a (z - l) (u - z),      a = min(u, -l) / (u - l)^2,      on [l, u]

(the right side minus relu is `(z - l)(u/(u - l) - a (u - z))` for z <= 0 and `(u - z)(-l/(u - l) - a (z - l))` for
z >= 0; both are at least 0 by the choice of a). With `k_i = -v_i a_i >= 0` this adds `k_i (z_i - l_i)(u_i - z_i)`, at
least 0 on the region, to CROWN's lower bound of f. The sum p is concave and quadratic; its minimum over the ball is a
trust-region problem, not convex and yet exactly its Lagrangian dual (the S-lemma; Boyd and Vandenberghe, "Convex
optimization", 2004, appendix B.1). A convex quadratic bound could not pass the triangle program, which holds relu's
whole convex hull; this one can, since `(z - l)(u - z)` is positive in the interior, where the program's optimum lies.

**Why it is a certificate.** The dual is never solved for the result, only evaluated. With `N = W^T diag(k) W`, for any
`s >= lambda_max(N)` the function `L(d) = p(x0 + d) + s (||d||^2 - r^2)` is convex and at most p on the ball, so for
*any* point e of the ball

    p  >=  min L  >=  L(e) - ||L'(e)|| 2 r.

s and e come from an eigenvalue decomposition and bisection, e near the minimum, where the last term is rounding.

Where v_i > 0 and the neuron is unstable, every slope in [0, 1] gives a line below relu, and the bound is concave in
them; by the envelope theorem its derivative is `v_i z_i(e)`. A few projected steps, of one decomposition, improve it.
With the slopes of the triangle program's dual solution it could not be below that program: the linear part alone
attains it.

The decomposition `U diag(m) U^T` of `C = B B^T`, B = diag(sqrt k) W (its eigenvalues are N's, but for zeros), is not
trusted:

    lambda_max(C)  <=  max m (1 + ||U^T U - I||_F) + ||C - U diag(m) U^T||_F + rounding of these products.

Reference: Zhang et al., "Efficient neural network robustness certification with general activation functions", 2018,
section 3.4 (quadratic bounds; solved there by projected gradients, which certifies nothing).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors, regions
from jaxbound.backend.tracing import rolled
from jaxbound.driver import Run
from jaxbound.graph import NONLINEAR, Graph, Node
from jaxbound.methods.base import Bounded, Ends, Method, Request, better, output_nodes
from jaxbound.methods.crown import Crown
from jaxbound.regions import LpBall
from jaxbound.relaxations import backward, coefficients
from jaxbound.relaxations.affine import gamma
from jaxbound.relaxations.backward import Carry
from jaxbound.relaxations.coefficients import Coefficients, Identity
from jaxbound.relaxations.enclosures import scalar

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quadratic(Method):
    """The better of CROWN and a quadratic certificate, for one ReLU layer over an l_2 ball.

    `lower <= fn(x) <= upper`, never looser than `Crown()` and as a rule tighter than the triangle program `LP()`. Works
    under `jit`, `vmap` and `grad`. Each output costs an eigenvalue decomposition of the size of the hidden layer.

    Args:
        steps: steps that tune the slopes of lower lines, from CROWN's own; the best are kept. Static.

    Raises:
        UnsupportedError: a nonlinearity is no ReLU, or its input is not affine in the region.
        ArgumentError: the region is not a single l_2 ball (a clip box may cut it).

    Rounding: like the other methods', up to that of the computation, and bounded with `rounding=True`. In float32 with
        wide layers the guard against wrong eigenvalues costs some tightness.

    Reference: Zhang et al. 2018, section 3.4; the certificate is in the module's head.

    >>> import jax, jax.numpy as jnp, jaxbound as jb
    >>> from jaxbound.methods.quadratic import Quadratic
    >>> corner, disc = lambda x: -jax.nn.relu(x).sum(), jb.LpBall(jnp.zeros(2), 1.0, 2)
    >>> [round(float(jb.bound(corner, method)(disc).lower), 3) for method in (jb.Crown(), Quadratic())]
    [-1.707, -1.457]
    """

    steps: int = field(default=30, metadata={"static": True})

    def pre_activations(self, graph: Graph, leaves: Sequence, request: Request) -> dict[int, Ends]:
        """Bounds of every input of a nonlinear node: affine images of the region, exact."""
        return Crown().pre_activations(graph, leaves, request)

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Bounds of the outputs that depend on a region."""
        _check(graph, leaves)
        run = Crown().relax(graph, leaves, request)
        known = Crown().outputs(run, request)
        found = [_certified(run, number, request, self.steps) for number in output_nodes(graph)]
        return [better(first, second) for first, second in zip(known, found, strict=True)]


def _check(graph: Graph, leaves: Sequence[regions.Region]) -> None:
    ball = leaves[0]
    single = len(leaves) == 1 and isinstance(ball, regions.LpBall) and ball.norm == 2 and ball.batch_ndim == 0
    batch = 0 if graph.axes is None else 1
    if not single or not isinstance(ball, regions.LpBall) or jnp.ndim(ball.radius) > batch:
        raise errors.argument("the region", "is not a single l_2 ball, which Quadratic() needs", "use Frown() or LP()")
    for node in graph.nodes:
        if node.op.kind in NONLINEAR:
            affine = all(graph.nodes[source].affine_in_region for source in node.inputs)
            if not affine or not _is_relu(node):
                reason = "it is not a ReLU" if affine else "another nonlinearity lies before it"
                raise errors.unsupported(
                    node.name, node.op.input_shapes, node.source, reason, method="Quadratic", way_out="use Frown()"
                )


def _is_relu(node: Node) -> bool:
    if node.op.kind != "scalar":
        return False
    pieces = scalar.curvature_of(node.op).pieces
    if [piece.kind for piece in pieces] != ["linear", "linear"] or pieces[0].right != 0:
        return False
    with jax.ensure_compile_time_eval():
        values = node.op.program(jnp.array([-1.0, 0.0, 1.0], node.op.dtype))
    return np.array_equal(np.asarray(values), [0.0, 0.0, 1.0])


# --- rows -------------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Linear functions of nonlinear values and of the region leaf, from the entries of one node."""

    nonlinear: dict[int, Coefficients]
    leaf: Coefficients | None
    carry: Carry


def _certified(run: Run, number: int, request: Request, steps: int) -> Bounded:
    """Bounds of one output by certificates."""
    bare = replace(run, knowledge=run.knowledge._replace(planes={}))  # without planes a pass stops at a nonlinear node
    rows = _pulled(bare, number, request.sides)
    layers = []
    for node, part in rows.nonlinear.items():
        (source,) = run.graph.nodes[node].inputs
        layers.append((part, _pulled(bare, source, "lower"), run.ends[source]))
    static = run.graph.nodes[number].op.shape, request.sides, steps
    return run.call(_bounds, static, ((), ()), run.regions[0], layers, rows, run.void)


def _pulled(run: Run, number: int, sides: str) -> _Rows:
    op = run.graph.nodes[number].op
    index = np.arange(op.size, dtype=np.int32)
    index = jnp.asarray(index if run.batch is None else np.broadcast_to(index, (run.batch, op.size)))
    start, carry = run.call(_begin, (op.shape, op.dtype, sides, run.outward), ((), ()), index)
    rows: dict[int, Coefficients] = {number: start}
    rows, carry = run.walk_back(rows, carry)
    leaf = rows.pop(0, None)
    return _Rows(rows, leaf, carry)


def _begin(static: Any, _constants: Sequence, index: jax.Array) -> tuple[Identity, Carry]:
    shape, dtype, sides, outward = static
    sign = jnp.ones(index.shape, dtype)
    if sides == "both":
        index, sign = jnp.concatenate([index, index]), jnp.concatenate([sign, -sign])
    return Identity(index, sign, shape), backward.start(len(index), dtype, outward)


# --- certificates -----------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """The ReLUs of a network: z = weights @ x + offsets up to `error`, within [low, high]."""

    weights: jax.Array
    offsets: jax.Array
    error: jax.Array
    low: jax.Array
    high: jax.Array


def _bounds(
    static: Any, _constants: Sequence, ball: LpBall, layers: Sequence[tuple[Coefficients, _Rows, Ends]], rows: _Rows,
    void: jax.Array,
) -> Bounded:  # fmt: skip
    shape, sides, steps = static
    size, dtype = regions.leaf_struct(ball).size, rows.carry.intercept.dtype
    count = len(rows.carry.intercept)

    def flat(part: Coefficients | None, height: int, width: int) -> jax.Array:
        return jnp.zeros((height, width), dtype) if part is None else coefficients.dense(part).reshape(height, width)

    outward = rows.carry.rounding is not None
    none = jnp.zeros(count, dtype)
    carried = none if rows.carry.rounding is None else rows.carry.rounding
    skip = flat(rows.leaf, count, size)
    pieces, slopes = [], []
    for part, inner, ends in layers:
        height = len(inner.carry.intercept)
        error = jnp.zeros(height, dtype) if inner.carry.rounding is None else inner.carry.rounding
        weights = flat(inner.leaf, height, size)
        low, high = (end.reshape(-1) for end in ends)
        pieces.append(_Layer(weights, inner.carry.intercept, error, low - error, high + error))
        slopes.append(flat(part, count, height))
    if not pieces:
        lower, rounding = jnp.full(count, -jnp.inf, dtype), none
    else:
        layer = _Layer(*(jnp.concatenate(parts) for parts in zip(*pieces, strict=True)))
        center, radius = jnp.ravel(jnp.asarray(ball.center)), jnp.asarray(ball.radius)

        def one(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            v, own_skip, constant, error = row
            return _certificate(layer, center, radius, v, own_skip, constant, error, steps)

        lower, rounding = rolled(jax.lax.map)(
            one, (jnp.concatenate(slopes, axis=1), skip, rows.carry.intercept, carried)
        )
    lower = jnp.where(jnp.isfinite(lower) & jnp.isfinite(rounding) & ~void, lower, -jnp.inf)
    rounding = jnp.where(jnp.isfinite(rounding), rounding, 0) if outward else none
    if sides == "lower":
        lower, rounding = lower.reshape(shape), rounding.reshape(shape)
        return Bounded(lower, None, rounding, rounding)
    (below, above), (below_error, above_error) = lower.reshape(2, *shape), rounding.reshape(2, *shape)
    return Bounded(below, -above, below_error, above_error)


def _certificate(
    layer: _Layer, center: jax.Array, radius: jax.Array, v: jax.Array, skip: jax.Array, constant: jax.Array,
    carried: jax.Array, steps: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A lower bound of `constant + skip.x + v.relu(z)` over the ball, and of its rounding error."""
    low, high = layer.low, layer.high
    slope, start, bend = _lines(low, high, v)
    k = -v * bend
    steep, s, step = _chosen(*jax.lax.stop_gradient((layer, center, radius, v, k, skip, slope)), steps=steps)
    free = (low < 0) & (high > 0) & (v >= 0)
    steep = jnp.where(free, steep, slope)
    z = _dot(layer.weights, center) + layer.offsets + _dot(layer.weights, step)
    inside = k * (z - low) * (high - z)
    tied = s * (jnp.sum(step * step) - radius * radius)
    value = jnp.sum(v * (steep * z + start)) + jnp.sum(inside) + jnp.sum(skip * (center + step)) + constant + tied
    tilt = _dot(v * steep + k * (low + high - 2 * z), layer.weights) + skip + 2 * s * step
    residual = 2 * radius * jnp.sqrt(jnp.sum(tilt * tilt))
    lower = value - jax.lax.stop_gradient(residual)
    # What rounding may have done to z, to the value and to its gradient; the sizes stand for the sums they are of.
    count, features = layer.weights.shape
    unit, size = functools.partial(gamma, dtype=z.dtype), jnp.abs(center) + jnp.abs(step)
    off = layer.error + unit(2 * features + 4) * (_dot(jnp.abs(layer.weights), size) + jnp.abs(layer.offsets))
    bends = k * (jnp.abs(low) + jnp.abs(high) + 2 * (jnp.abs(z) + off))
    slopes = jnp.abs(v) + jnp.abs(v * steep) + bends
    terms = jnp.sum(jnp.abs(v) * (jnp.abs(steep * z) + jnp.abs(start)) + jnp.abs(inside)) + jnp.sum(
        jnp.abs(skip) * size
    )
    terms = terms + jnp.abs(constant) + s * (jnp.sum(step * step) + radius * radius) + residual
    bent = unit(count + 16) * (_dot(slopes, jnp.abs(layer.weights)) + jnp.abs(skip) + 2 * s * jnp.abs(step))
    bent = bent + _dot(2 * k * off, jnp.abs(layer.weights))
    error = jnp.sum(slopes * off) + unit(count + features + 32) * terms + 2 * radius * jnp.sqrt(jnp.sum(bent * bent))
    return lower, jax.lax.stop_gradient(carried + 2 * error)


def _lines(low: jax.Array, high: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CROWN's line for each relu by the sign of its coefficient, `steep z + start`, and the bend a of the upper one."""
    wide = jnp.where(high > low, high - low, 1)
    unstable = (low < 0) & (high > 0)
    chord = jnp.where(unstable, high / wide, jnp.where(high > 0, 1, 0)).astype(low.dtype)
    above = v < 0
    steep = jnp.where(unstable & ~above, (high > -low).astype(low.dtype), chord)
    unit = jnp.finfo(low.dtype).eps
    # 16 units cover the rounding of the chord; the bend is rounded down.
    start = jnp.where(unstable & above, -chord * low + 16 * unit * wide, 0)
    bend = jnp.where(unstable & above, jnp.minimum(high, -low) / (wide * wide) * (1 - 16 * unit), 0)
    return steep, start, bend


def _chosen(
    layer: _Layer, center: jax.Array, radius: jax.Array, v: jax.Array, k: jax.Array, skip: jax.Array,
    slope: jax.Array, steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Slopes of the lines, a multiplier s of at least the largest eigenvalue, and a point e near the minimum of L."""
    root = jnp.sqrt(k)[:, None] * layer.weights
    gram = _dot(root, root.T)
    values, vectors = jnp.linalg.eigh(gram)
    highest = _largest(root, gram, values, vectors)
    values = jnp.clip(values, 0, highest)
    middle = _dot(layer.weights, center) + layer.offsets
    bent = k * (layer.low + layer.high - 2 * middle)
    scale = jnp.maximum(jnp.maximum(-layer.low, layer.high), jnp.finfo(root.dtype).tiny)
    free = (layer.low < 0) & (layer.high > 0) & (v >= 0)

    def solved(slope: jax.Array):
        tilt = _dot(v * slope + bent, layer.weights) + skip
        s, step = _least(root, values, vectors, highest, tilt, radius)
        # L(e) but for what no slope changes
        moved = _dot(root, step)
        value = jnp.sum(v * slope * middle) + jnp.sum(tilt * step) - jnp.sum(moved * moved)
        return value + s * (jnp.sum(step * step) - radius * radius), s, step

    def improve(number: jax.Array, state: tuple):
        slope, best, kept = state
        value, s, step = solved(slope)
        better = value > best[0]
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (value, s, step), best)
        z = middle + _dot(layer.weights, step)
        moved = jnp.clip(slope + z / (scale * jnp.sqrt(1.0 + number)), 0, 1)
        return jnp.where(free, moved, slope), best, jnp.where(better, slope, kept)

    first = solved(slope)
    _, (_, s, step), slope = rolled(jax.lax.fori_loop)(0, steps + 1, improve, (slope, first, slope))
    return slope, s, step


def _least(
    root: jax.Array, values: jax.Array, vectors: jax.Array, highest: jax.Array, tilt: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The multiplier at which `-(tilt + root^T U (s - m)^-1 U^T root tilt) / 2 s` meets the sphere, and that point."""
    inner, square = _dot(vectors.T, _dot(root, tilt)), jnp.sum(tilt * tilt)

    def halve(_: jax.Array, ends: Ends):
        middle = (ends[0] + ends[1]) / 2
        parts = inner / (middle - values)
        far = square + jnp.sum(parts * (2 * inner + values * parts)) > (2 * middle * radius) ** 2
        return jnp.where(far, middle, ends[0]), jnp.where(far, ends[1], middle)

    tiny = jnp.asarray(jnp.finfo(root.dtype).tiny, root.dtype) ** 0.5
    least = jnp.maximum(highest, tiny)
    most = least + jnp.sqrt(square) / (2 * jnp.maximum(radius, tiny))
    s = rolled(jax.lax.fori_loop)(0, jnp.finfo(root.dtype).nmant + 8, halve, (least, most))[1]
    step = -(tilt + _dot(_dot(vectors, inner / (s - values)), root)) / (2 * s)
    norm = jnp.sqrt(jnp.sum(step * step))
    return s, step * jnp.minimum(1, radius / jnp.where(norm > 0, norm, 1))


def _largest(root: jax.Array, gram: jax.Array, values: jax.Array, vectors: jax.Array) -> jax.Array:
    """An upper bound of the largest eigenvalue of `root @ root.T`, whatever the decomposition is."""
    count, features = root.shape
    frobenius = lambda a: (1 + gamma(count * count + 8, a.dtype)) * jnp.sqrt(jnp.sum(a * a))  # noqa: E731
    loss = frobenius(gram - _dot(vectors * values, vectors.T))
    skew = frobenius(_dot(vectors.T, vectors) - jnp.eye(count, dtype=gram.dtype))
    lengths, most = jnp.sum(vectors * vectors, axis=0), jnp.max(jnp.abs(values))
    sizes = jnp.sum(root * root) + jnp.sum(jnp.abs(values) * lengths) + most * (1 + jnp.sum(lengths))
    rounding = 2 * gamma(features + 2 * count + 32, gram.dtype) * sizes
    return most * (1 + skew) + loss + rounding
