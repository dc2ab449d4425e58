"""Every fact of the primitive table, sampled: `AFFINE` against matrices found by evaluation, the others by example.

Constants and points are small integers, so that matrices, transposes and intervals are compared exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rules  # noqa: F401
import oracles
import pytest
from jax import lax

import jaxbound as jb
from jaxbound import errors
from jaxbound.graph import NONLINEAR as KINDS
from jaxbound.graph import operations, tracing
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE, NONLINEAR, REFUSED
from jaxbound.relaxations import affine, coefficients, enclosures, interval

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """`function(*inputs, *constants)` is one equation of the named primitive."""

    name: str
    function: Callable
    inputs: tuple[Shape, ...]
    constants: tuple[Shape, ...] = ()
    widens: bool = False


_IMAGE = ("NHWC", "HWIO", "NHWC")


def _conv(x, kernel, strides=(1, 1), padding="SAME", **more):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_IMAGE, **more)


def _window_sum(x, window, strides, padding, **more):
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, window, strides, padding, **more)


def _dot(x, y, contracting, batching=((), ())):
    return lax.dot_general(x, y, (contracting, batching))


def _added(x, places, y, mode="drop"):
    return jnp.asarray(x).at[places].add(y, mode=mode)


_TAKEN = np.array([[2], [0], [2], [1]], np.int32)
_PLACES = np.array([1, 2, 1, 7, 0], np.int32)  # one twice, one outside
_ROWS = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))

ROWS = [
    Row("add", lambda x, y: x + y, ((2, 3), (2, 3))),
    Row("add", lambda x, c: x + c, ((2, 3),), ((2, 3),)),
    Row("add", lambda x: x + 3.0, ((2, 3),)),
    Row("add_any", lambda x, y: jax.vjp(lambda z: (z, z), x)[1]((x, y))[0], ((3,), (3,))),
    Row("sub", lambda x, y: x - y, ((4,), (4,))),
    Row("sub", lambda x, c: c - x, ((4,),), ((4,),)),
    Row("neg", lambda x: -x, ((4,),)),
    Row("mul", lambda x, c: x * c, ((2, 3),), ((2, 3),)),
    Row("mul", lambda x: -2.0 * x, ((3,),)),
    Row("div", lambda x: x / 4.0, ((3,),)),
    Row("div", lambda x, c: x / (2.0**c), ((3,),), ((3,),)),
    Row("dot_general", lambda x, c: _dot(x, c, ((0,), (0,))), ((4,),), ((4, 3),)),
    Row("dot_general", lambda x, c: _dot(x, c, ((1,), (0,))), ((1, 4),), ((4, 3),)),
    Row("dot_general", lambda x, c: _dot(x, c, ((1,), (0,))), ((3, 4),), ((4, 2),)),
    Row("dot_general", lambda x, c: _dot(c, x, ((1,), (0,))), ((4, 5),), ((2, 4),)),
    Row("dot_general", lambda x, c: _dot(x, c, ((2,), (1,)), ((0,), (0,))), ((2, 3, 4),), ((2, 4, 5),)),
    Row("conv_general_dilated", _conv, ((1, 4, 4, 2),), ((3, 3, 2, 3),)),
    Row("conv_general_dilated", lambda k, x: _conv(x, k), ((3, 3, 2, 3),), ((1, 4, 4, 2),)),
    Row("conv_general_dilated", lambda k, x: _conv(x, k), ((1, 1, 1, 1),), ((2, 5, 5, 1),)),
    Row("conv_general_dilated", lambda x, k: _conv(x, k, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(2, 1)), ((1, 5, 4, 1),), ((2, 2, 1, 2),)),
    Row("conv_general_dilated", lambda x, k: _conv(x, k, padding=((1, 0), (0, 1)), lhs_dilation=(2, 2)), ((1, 3, 3, 1),), ((2, 2, 1, 2),)),
    Row("conv_general_dilated", lambda x, k: _conv(x, k, feature_group_count=2), ((1, 3, 3, 4),), ((2, 2, 2, 4),)),
    Row("conv_general_dilated", lambda x, k: _conv(x, k, batch_group_count=2), ((4, 3, 3, 1),), ((2, 2, 1, 2),)),
    Row("reduce_sum", lambda x: jnp.sum(x, (0, 2)), ((3, 2, 4),)),
    Row("reduce_window_sum", lambda x: _window_sum(x, (2, 3), (1, 2), ((0, 1), (1, 1))), ((3, 5),)),
    Row("reduce_window_sum", lambda x: _window_sum(x, (2,), (1,), "VALID", base_dilation=(2,), window_dilation=(2,)), ((5,),)),
    Row("cumsum", lambda x: lax.cumsum(x, 1), ((2, 4),)),
    Row("cumsum", lambda x: lax.cumsum(x, 0, reverse=True), ((5,),)),
    Row("reshape", lambda x: x.reshape(3, 2), ((2, 3),)),
    Row("squeeze", lambda x: lax.squeeze(x, (1,)), ((2, 1, 3),)),
    Row("copy", lambda x: jnp.array(x, copy=True), ((3,),)),
    Row("stop_gradient", lax.stop_gradient, ((3,),)),
    Row("convert_element_type", lambda x: x.astype(jnp.float64), ((3,),), widens=True),
    Row("transpose", lambda x: jnp.transpose(x, (2, 0, 1)), ((2, 3, 2),)),
    Row("rev", lambda x: lax.rev(x, (1,)), ((2, 3),)),
    Row("slice", lambda x: lax.slice(x, (1, 0), (4, 3), (2, 1)), ((5, 3),)),
    Row("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (3, 2, 4), (1,)), ((2,),)),
    Row("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (3, 2), (0, 1)), ((1, 2),)),
    Row("concatenate", lambda x, y, c: lax.concatenate([x, c, y], 1), ((2, 1), (2, 2)), ((2, 2),)),
    Row("stack", lambda x, y, c: jnp.stack([x, c, y], 1), ((2, 3), (2, 3)), ((2, 3),)),
    Row("pad", lambda x: lax.pad(x, np.asarray(2, x.dtype), ((1, 2, 1), (0, -1, 0))), ((3, 3),)),
    Row("select_n", lambda x, y, c: lax.select(c > 0, x, y), ((2, 3), (2, 3)), ((2, 3),)),
    Row("select_n", lambda x, c, d: lax.select(c > 0, x, d), ((2, 3),), ((2, 3), (2, 3))),
    Row("dynamic_slice", lambda x, c: lax.dynamic_slice(x, (c.astype(int), 1), (2, 2)), ((4, 3),), ((),)),
    Row("dynamic_update_slice", lambda x, y, c: lax.dynamic_update_slice(x, y, (c.astype(int), 1)), ((4, 3), (2, 2)), ((),)),
    Row("dynamic_update_slice", lambda x, c: lax.dynamic_update_slice(c, x, (1,)), ((2,),), ((4,),)),
    Row("tile", lambda x: jnp.tile(x, (2, 3)), ((3, 2),)),
    Row("tile", lambda x: jnp.tile(x, 4), ((1,),)),
    Row("scatter-add", lambda x, y: _added(x, _PLACES, y), ((4,), (5,))),
    Row("scatter-add", lambda x, c: _added(x, _PLACES, c), ((4,),), ((5,),)),
    Row("scatter-add", lambda y, c: _added(c, _PLACES, y, "clip"), ((5,),), ((4,),)),
    Row("scatter-add", lambda x, y: _added(x, (slice(None), _PLACES[:2]), y), ((2, 3), (2, 2))),
    Row("gather", lambda x: lax.gather(x, _TAKEN, _ROWS, (1, 2), mode="clip"), ((3, 2),)),
    Row("gather", lambda x: lax.gather(x, np.zeros((6, 1), np.int32), _ROWS, (1, 1), mode="promise_in_bounds"), ((2, 1),)),
]  # fmt: skip

IDS = [f"{row.name}-{k}" for k, row in enumerate(ROWS)]


class _Case:
    """A row's node with concrete integer constants, its matrix per input and its offset."""

    def __init__(self, row: Row, dtype, seed: int = 0):
        self.row, self.dtype, self.rng = row, dtype, np.random.default_rng(seed)
        own = np.float32 if row.widens else dtype
        self.constants = [self.integers(shape).astype(dtype) for shape in row.constants]
        count = len(row.inputs)
        shapes = [jax.ShapeDtypeStruct(shape, own) for shape in row.inputs]
        shapes += [jax.ShapeDtypeStruct(shape, dtype) for shape in row.constants]
        structure = tracing.build(row.function, shapes, [k < count for k in range(len(shapes))])
        assert len(structure.nodes) == count + 1, [node.op.name for node in structure.nodes]
        node = structure.nodes[-1]
        values = structure.constants({count + k: jnp.asarray(c) for k, c in enumerate(self.constants)})
        self.op, self.read = node.op, [values[k] for k in node.constants]
        self.order = list(node.inputs)
        self.offset = np.ravel(self(*[np.zeros(shape, own) for shape in row.inputs]))
        self.matrices = [self._matrix(k, own) for k in range(count)]

    def integers(self, shape: Shape, *lead: int) -> np.ndarray:
        values = self.rng.integers(-3, 4, (*lead, *shape)).astype(float)
        return np.where(values == 0, 1.0, values)

    def __call__(self, *inputs) -> np.ndarray:
        return np.asarray(self.row.function(*inputs, *self.constants))

    def _matrix(self, which: int, dtype) -> np.ndarray:
        columns = []
        for entry in range(int(np.prod(self.row.inputs[which]))):
            inputs = [np.zeros(shape, dtype) for shape in self.row.inputs]
            inputs[which].flat[entry] = 1
            columns.append(np.ravel(self(*inputs)) - self.offset)
        return np.stack(columns, axis=1)

    def operands(self, values):
        """Per input of the node, in its order."""
        return [jnp.asarray(values[k]) for k in self.order]


@functools.cache
def _case(index: int) -> _Case:
    return _Case(ROWS[index], np.float64)


def test_every_entry_of_the_table_has_a_row():
    assert {row.name for row in ROWS} == set(AFFINE)


@pytest.mark.x64
@pytest.mark.parametrize("index", range(len(ROWS)), ids=IDS)
class TestAffine:
    """One row: the node that the graph makes of it, against its matrices."""

    def test_the_node_is_the_primitive(self, index):
        case = _case(index)
        assert case.op.kind == "affine"
        assert case.op.name == ROWS[index].name

    def test_apply_linear_and_offset(self, index):
        case = _case(index)
        x = [case.integers(shape) for shape in case.row.inputs]
        parts = sum(matrix @ np.ravel(v) for matrix, v in zip(case.matrices, x, strict=True))
        assert np.array_equal(np.ravel(affine.linear(case.op, case.operands(x), case.read)), parts)
        assert np.array_equal(np.ravel(affine.apply(case.op, case.operands(x), case.read)), parts + case.offset)
        found = affine.offset(case.op, case.read)
        assert np.array_equal(np.zeros_like(case.offset) if found is None else np.ravel(found), case.offset)
        assert affine.linear(case.op, case.operands(x), case.read).shape == case.op.shape

    def test_pull_is_the_transpose(self, index):
        case = _case(index)
        rows = case.integers(case.op.shape, 4)
        parts = affine.pull(case.op, jnp.asarray(rows), case.read)
        for k, part in zip(case.order, parts, strict=True):
            assert part.shape == (4, *case.row.inputs[k])
            assert np.array_equal(part.reshape(4, -1), rows.reshape(4, -1) @ case.matrices[k])

    def test_identity_rows_pull_like_dense_ones(self, index):
        case = _case(index)
        size = int(np.prod(case.op.shape))
        index_, sign = np.arange(size) % max(size - 1, 1), case.rng.choice([-1.0, 0.0, 1.0], size)
        start = coefficients.Identity(jnp.asarray(index_), jnp.asarray(sign), case.op.shape)
        rows = np.asarray(coefficients.dense(start)).reshape(size, -1)
        expected = np.zeros((size, size))
        expected[np.arange(size), index_] = sign
        assert np.array_equal(rows, expected)
        for k, part in zip(case.order, coefficients.pull(case.op, start, case.read), strict=True):
            assert np.array_equal(coefficients.dense(part).reshape(size, -1), expected @ case.matrices[k])

    def test_intervals_are_exact(self, index):
        case = _case(index)
        low = [case.integers(shape) for shape in case.row.inputs]
        high = [v + case.rng.integers(0, 4, v.shape) * 2 for v in low]
        ends = list(zip(case.operands(low), case.operands(high), strict=True))
        found = affine.interval(case.op, ends, case.read)
        lower, upper = case.offset.copy(), case.offset.copy()
        for matrix, a, b in zip(case.matrices, low, high, strict=True):
            positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
            lower += positive @ np.ravel(a) + negative @ np.ravel(b)
            upper += positive @ np.ravel(b) + negative @ np.ravel(a)
        assert np.array_equal(np.ravel(found[0]), lower)
        assert np.array_equal(np.ravel(found[1]), upper)
        functions = affine.interval_functions(case.op, ends, case.read)
        assert np.array_equal(np.ravel(functions[0]), lower)
        assert np.array_equal(np.ravel(functions[1]), upper)

    def test_infinite_ends_stay_sound(self, index):
        case = _case(index)
        low = [np.where(case.rng.random(shape) < 0.4, -np.inf, -1.0) for shape in case.row.inputs]
        high = [np.where(case.rng.random(shape) < 0.4, np.inf, 2.0) for shape in case.row.inputs]
        ends = list(zip(case.operands(low), case.operands(high), strict=True))
        found = interval.node(case.op, ends, case.read, outward=False)
        assert not np.isnan(found).any()
        for _ in range(5):
            x = [case.rng.uniform(np.maximum(a, -50), np.minimum(b, 50)) for a, b in zip(low, high, strict=True)]
            value = np.ravel(case(*x))
            assert np.all(np.ravel(found[0]) <= value + 1e-9)
            assert np.all(value <= np.ravel(found[1]) + 1e-9)
        unbounded = np.zeros(case.offset.shape, bool)
        for matrix, a, b in zip(case.matrices, low, high, strict=True):
            unbounded |= (np.abs(matrix) @ np.ravel(np.isinf(a) | np.isinf(b)).astype(float)) > 0
        assert np.all(np.isfinite(found[0]) | unbounded.reshape(case.op.shape))
        assert np.all(np.isfinite(found[1]) | unbounded.reshape(case.op.shape))

    def test_absolute(self, index):
        case = _case(index)
        x = [np.abs(case.integers(shape)) for shape in case.row.inputs]
        expected = sum(np.abs(matrix) @ np.ravel(v) for matrix, v in zip(case.matrices, x, strict=True))
        assert np.array_equal(np.ravel(affine.absolute(case.op, case.operands(x), case.read)), expected)

    def test_signs(self, index):
        case = _case(index)
        if case.op.facts.scales:
            return
        roles = [position for position, operand in enumerate(case.op.operands) if operand[0] == "input"]
        signs = case.op.facts.signs
        for position, k in zip(roles, case.order, strict=True):
            sign = signs[min(position, len(signs) - 1)]
            assert np.all(sign * case.matrices[k] >= 0)

    def test_counts_are_large_enough(self, index):
        """n products and n - 1 sums make n rounded operations; an added constant one more."""
        case = _case(index)
        facts, params = case.op.facts, dict(case.op.params)
        terms = facts.terms(case.op.input_shapes, case.op.shape, params)
        adjoint = facts.adjoint_terms(case.op.input_shapes, case.op.shape, params)
        used = sum((matrix != 0).sum(axis=1) for matrix in case.matrices)
        constant = (case.offset != 0) & (used > 0)
        products = 1 if facts.scales else 0
        assert terms >= max(0, (used - 1 + products + constant).max())
        for matrix in case.matrices:
            columns = (matrix != 0).sum(axis=0)
            assert adjoint >= max(0, (columns - 1 + products).max())
            assert case.op.repeats or columns.max() <= 1
        assert case.op.mixes or used.max() <= 1

    def test_order_preserving(self, index):
        case = _case(index)
        if case.op.facts.order_preserving:
            for matrix in case.matrices:
                assert np.array_equal(matrix, np.eye(len(matrix)))


@pytest.mark.parametrize("index", range(len(ROWS)), ids=IDS)
def test_rounding_covers_the_error_in_float32(index):
    row = ROWS[index]
    if row.widens:
        return
    case = _Case(row, np.float32)
    rng = np.random.default_rng(1)
    for spread in (0, 4):
        case.constants = [
            (rng.normal(size=c.shape) * 10.0 ** rng.uniform(-spread, spread, c.shape)).astype(np.float32)
            if not ({"dynamic_slice", "dynamic_update_slice", "div"} & {row.name}) else c
            for c in case.constants
        ]  # fmt: skip
        x = [(rng.normal(size=s) * 10.0 ** rng.uniform(-spread, spread, s)).astype(np.float32) for s in row.inputs]
        count = len(row.inputs)
        arguments = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (*x, *case.constants)]
        structure = tracing.build(row.function, arguments, [k < count for k in range(len(arguments))])
        values = structure.constants({count + k: jnp.asarray(c) for k, c in enumerate(case.constants)})
        node = structure.nodes[-1]
        read = [values[k] for k in node.constants]
        inputs = [jnp.asarray(x[k]) for k in node.inputs]
        found = np.asarray(jax.jit(lambda i, r, op=node.op: affine.apply(op, i, r))(inputs, read), np.float64)
        (exact,) = oracles.exactly(lambda i, r, op=node.op: affine.apply(op, i, r), inputs, read)
        allowed = affine.rounding(node.op, [jnp.abs(v) for v in inputs], read)
        allowed = np.zeros(found.shape) if allowed is None else np.asarray(allowed, np.float64)
        assert np.all(np.abs(found - exact) <= allowed * (1 + 1e-6))


# --- what is not affine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dependent", "allowed"),
    [
        ("mul", (True, True), False), ("mul", (True, False), True), ("div", (True, True), False),
        ("div", (False, True), False), ("dot_general", (True, True), False), ("select_n", (True, False, False), False),
        ("select_n", (False, True, True), True), ("dynamic_slice", (True, True), False), ("gather", (True, True), False),
        ("gather", (False, True), False), ("dynamic_update_slice", (True, True, False), True),
        ("dynamic_update_slice", (False, False, True), False), ("concatenate", (True, True, True), True),
        ("conv_general_dilated", (True, True), False), ("conv_general_dilated", (False, True), True),
        ("scatter-add", (True, False, True), True), ("scatter-add", (False, False, True), True),
        ("scatter-add", (True, True, True), False),
    ],
)  # fmt: skip
def test_which_operands_may_depend_on_a_region(name, dependent, allowed):
    assert AFFINE[name].allows(dependent) is allowed


def test_narrowing_is_refused_even_inside_a_chain():
    box = jb.Box(jnp.zeros(2), jnp.ones(2))
    for function in (
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jax.nn.relu(x.astype(jnp.float16)).astype(jnp.float32),
        lambda x: jnp.tanh(x).astype(jnp.int32),
    ):
        with pytest.raises(errors.UnsupportedError):
            jb.bound(function, jb.IBP())(box)


# --- elementwise and refused ----------------------------------------------------------------------------------------------

_ODD = {
    "convert_element_type": lambda x, _: lax.convert_element_type(x, jnp.int32),
    "integer_pow": lambda x, _: lax.integer_pow(x, 3),
    "round": lambda x, _: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "clamp": lambda x, y: lax.clamp(-0.5, x, y + 1),
    "select_n": lambda x, y: lax.select_n(x > 0, x, y),
    "copy": lambda x, _: jnp.array(x, copy=True),
    "add_any": lambda x, y: jax.vjp(lambda z: (z, z), x)[1]((x, y))[0],
    "and": lambda x, y: (x > 0) & (y > 0),
    "or": lambda x, y: (x > 0) | (y > 0),
    "xor": lambda x, y: (x > 0) ^ (y > 0),
    "not": lambda x, _: ~(x > 0),
    "stop_gradient": lambda x, _: lax.stop_gradient(x),
}  # fmt: skip
_BINARY = {"add", "div", "eq", "ge", "gt", "le", "lt", "max", "min", "mul", "ne", "pow", "sub"}
_LAX = {"logistic": "logistic", "erf_inv": "erf_inv", "not": "bitwise_not"}


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_elementwise_primitives_act_entry_by_entry(name):
    x, y = jnp.array([0.3, -0.7, 0.9, 0.2]), jnp.array([0.5, 0.4, -0.6, 0.2])
    function = _ODD.get(name)
    if function is None:
        own = getattr(lax, _LAX.get(name, name))
        function = own if name in _BINARY else lambda x, _: own(x)
    names = {equation.primitive.name for equation in jax.make_jaxpr(function)(x, y).eqns}
    assert name in names
    whole = np.asarray(function(x, y))
    order = np.array([2, 0, 3, 1])
    assert np.array_equal(np.asarray(function(x[order], y[order])), whole[order], equal_nan=True)
    changed = np.asarray(function(x.at[1].set(0.1), y.at[1].set(0.8)))
    assert np.array_equal(np.delete(changed, 1), np.delete(whole, 1), equal_nan=True)


_SOLVED = np.eye(2, dtype=np.float32) + 1

_REFUSED: dict[str, Callable] = {
    "while": lambda x: lax.while_loop(lambda z: z.sum() < 3, lambda z: z + 1, x),
    "cond": lambda x: lax.cond(x.sum() > 0, lambda z: z, lambda z: 2 * z, x),
    "pure_callback": lambda x: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
    "io_callback": lambda x: jax.experimental.io_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
    "argmax": lambda x: jnp.argmax(x) * 1.0,
    "argmin": lambda x: x[jnp.argmin(x)],
    "complex": lambda x: jnp.fft.rfft(x),
    "in_order_of": lambda x: jnp.argsort(x) * 1.0,
    "is_defined": lambda x: jnp.isnan(jnp.sqrt(x).reshape(1, 2)) * 1.0,
    "whole_number_arithmetic": lambda x: ((x > 0).astype(jnp.int8) * jnp.int8(11)) ** 3 * 1.0,
    "rem": lambda x: lax.rem(x, 2 + x),
    "triangular_solve": lambda x: jax.scipy.linalg.solve_triangular(_SOLVED, x),
    "custom_linear_solve": lambda x: jnp.linalg.solve(_SOLVED, x),
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
}


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_refusals_name_the_primitive_and_the_way_out(name):
    box = jb.Box(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(errors.UnsupportedError, match=name):
        jb.bound(_REFUSED[name], jb.Crown())(box)
    refusals = jb.explain(_REFUSED[name], jb.Crown())(box).refusals
    assert any(f"`{name}`" in text and all(part in text for part in REFUSED[name]) for text in refusals)


def test_every_refusal_is_known():
    assert set(_REFUSED) | {"ffi_call", "pallas_call"} == set(REFUSED)


# --- relaxed as a whole ---------------------------------------------------------------------------------------------------

_WHOLE: dict[str, Callable] = {
    "mul": lambda x: x * x[::-1],
    "reduce_max": jnp.max,
    "sort": jnp.sort,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "select": lambda x: jnp.where(x > x[::-1], x, 2 * x),
    "meet": lambda x: jnp.maximum(x, x[::-1]),
    "logsumexp": jax.nn.logsumexp,
}


def test_every_nonlinear_entry_makes_a_node_of_its_kind_with_an_enclosure():
    assert set(_WHOLE) == set(NONLINEAR)
    for name, function in _WHOLE.items():
        structure = tracing.build(function, [jax.ShapeDtypeStruct((3,), np.float32)], [True])
        (op,) = {
            node.op for node in structure.nodes if node.op.primitive is not None and node.op.primitive.name == name
        }
        assert op.kind == NONLINEAR[name]
        enclosure = enclosures.of(op)
        assert all(callable(getattr(enclosure, part)) for part in ("describe", "interval", "is_exact", "planes"))
    assert {"scalar", *NONLINEAR.values()} == KINDS


@pytest.mark.x64
def test_own_operations_are_what_their_names_say():
    x, y = jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, 4.0, -1.0])
    share = jnp.array([0.0, 1.0, 0.25])
    assert np.array_equal(operations.select(share, x, y), [1.0, 4.0, 0.125])
    assert np.array_equal(operations.meet(x, x + 0), x)
    assert np.allclose(
        operations.logsumexp(jnp.stack([x, y]), (1,)), jax.nn.logsumexp(jnp.stack([x, y]), 1), rtol=1e-14
    )
    assert np.array_equal(operations.in_order_of(x, y), y)
    assert np.array_equal(jax.jit(operations.known_up_to)(x, y), x)
    difference, same = operations.pairwise(x)
    assert np.array_equal(difference, np.asarray(x)[None, :] - np.asarray(x)[:, None])
    assert np.array_equal(same, np.eye(3, dtype=bool))
    cube = jnp.arange(24.0).reshape(2, 3, 4)
    for axes in ((0,), (1,), (0, 2), (0, 1, 2)):
        turned = operations.over_last_axis(lambda a: a - a.max(-1, keepdims=True), cube, axes=axes)
        assert np.array_equal(turned, cube - cube.max(axes, keepdims=True))
