"""Checks of the exact oracles in exact arithmetic, for the suite of planted faults; each is quick without `jit` too."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from jaxbound.graph import tracing
from jaxbound.methods.exact import LP, MILP, encoding
from jaxbound.methods.exact.program import Builder, Multipliers, is_empty, lower_bound


def exact_relu(layers, x) -> list[Fraction]:
    """A ReLU network's value in exact arithmetic."""
    value = [Fraction(float(entry)) for entry in np.ravel(x)]
    for number, (kernel, bias) in enumerate(layers):
        value = [max(entry, Fraction(0)) for entry in value] if number else value
        columns = zip(np.asarray(kernel).T.tolist(), np.asarray(bias).tolist(), strict=True)
        value = [
            Fraction(b) + sum((Fraction(w) * v for w, v in zip(k, value, strict=True)), Fraction(0)) for k, b in columns
        ]
    return value


def relu_network(layers, x):
    for number, (kernel, bias) in enumerate(layers):
        x = (jax.nn.relu(x) if number else x) @ kernel + bias
    return x


def contains(found, value: list[Fraction]) -> bool:
    ends = zip(np.ravel(found.lower).tolist(), np.ravel(found.upper).tolist(), value, strict=True)
    return all((a == -np.inf or Fraction(a) <= v) and (b == np.inf or v <= Fraction(b)) for a, b, v in ends)


def check_multipliers():
    """-v over x = 3 v, 0 <= x <= 1: the least is -1/3, and no multipliers may pass it by a rounding."""
    builder = Builder()
    columns = builder.add_columns(np.zeros(2), np.ones(2))
    builder.add_rows([(np.zeros(2, int), columns, np.array([3.0, -1.0]))], np.zeros(1), np.zeros(1))
    for scale in (1.0, 1e-300, 1e-320):
        program = builder.program()
        rows = program.rows._replace(value=program.rows.value * scale)
        for y in (-1 / 3, float(np.nextafter(-1 / 3, 0)), -0.3, -0.35):
            bound = lower_bound(program._replace(rows=rows), 0, -1.0, Multipliers(np.array([y / scale]), ()))
            assert bound == -np.inf or Fraction(bound) <= Fraction(-1, 3)
    builder.add_ball(columns, np.zeros(2), 1e200)
    wide = builder.program()._replace(lower=np.full(2, -1e300), upper=np.full(2, 1e300))
    assert lower_bound(wide, 0, 1.0, Multipliers(np.zeros(1), (np.array([1.0, 0.0]),))) <= -1e200
    small = lower_bound(wide, 0, 1e-170, Multipliers(np.zeros(1), (np.array([1e-170, 0.0]),)))
    assert small <= -1e30


def check_emptiness():
    """x = z = 1 satisfies every row, so no multipliers may prove that nothing does; those of 3 x >= 3 and 3 x <= 2 do."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        builder, size = Builder(), 4
        columns, first = builder.add_columns(np.zeros(2), np.ones(2)), rng.integers(1, 1 << 20, size).astype(float)
        index, second = np.arange(size), 3 * first
        triplets = [(index, np.full(size, columns[0]), first), (index, np.full(size, columns[1]), second)]
        upper = np.array([np.inf] * (size - 1) + [first[-1] + second[-1]])
        builder.add_rows(triplets, np.where(np.isinf(upper), first + second, -np.inf), upper)
        y = np.append(rng.uniform(size=size - 1), 0)
        y[-1] = -np.dot(first, y) / first[-1]
        assert not is_empty(builder.program(), Multipliers(y, ()))
    builder, one, zero = Builder(), np.ones(1), np.zeros(1, int)
    columns = builder.add_columns(np.zeros(1), np.full(1, 2.0))
    builder.add_rows([(zero, columns, one)], one, np.full(1, np.inf))
    builder.add_rows([(zero, columns, 3 * one)], np.full(1, -np.inf), np.full(1, 2.0))
    assert is_empty(builder.program(), Multipliers(np.array([3.0, -1.0]), ()))


def check_branching():
    """|x| - |x - 1/4| / 2 and its like, by hand: least at a kink, largest at an end."""

    def function(x):
        return jnp.abs(x[0]) - jnp.abs(x[0] - 0.25) / 2 + jnp.max(jnp.stack([x[0], -x[0], 0 * x[0] + 0.1]))

    found = jb.bound(function, MILP(pre_activation=jb.IBP()), rounding=True)(jb.Box(-jnp.ones(1), jnp.ones(1)))
    points = np.linspace(-1, 1, 41)
    values = np.abs(points) - np.abs(points - 0.25) / 2 + np.maximum(np.abs(points), 0.1)
    assert np.all(found.lower <= values.min() + 1e-12) and np.all(values.max() <= found.upper + 1e-12)
    assert abs(values.min() - found.lower) <= 1e-6 and abs(values.max() - found.upper) <= 1e-6


def check_equations():
    """The matrix of a node, exactly: subnormal weights, literals and offsets, quotients."""
    weight = np.array([[5e-320, 2.0], [1e-310, 0.0]])
    for function in (
        lambda x: x @ weight, lambda x: x * 1e-310, lambda x: x + 1e-310, lambda x: x / np.array([3.0, 1e-310]),
    ):  # fmt: skip
        structure = tracing.build(function, [jax.ShapeDtypeStruct((2,), jnp.float64)], [True])
        (node,) = structure.nodes[1:]
        constants = structure.constants({})
        found = encoding.equations(node.op, [constants[k] for k in node.constants])
        dense = np.zeros((2, 2))
        np.add.at(dense, found.matrices[0][:2], found.matrices[0][2])
        expected = {
            "dot_general": (weight.T, 0, 1), "mul": (1e-310 * np.eye(2), 0, 1), "add": (np.eye(2), 1e-310, 1),
            "div": (np.eye(2), 0, [3.0, 1e-310]),
        }[node.op.name]  # fmt: skip
        for mine, theirs in zip((dense, found.shift, found.divisor), expected, strict=True):
            assert np.array_equal(mine, np.broadcast_to(theirs, mine.shape)), node.op.name


def check_balls():
    """Over an l_2 ball a sum reaches radius times the norm, through a program of cones."""
    region = jb.LpBall(jnp.array([1.0, 2.0]), 2.0, 2)
    found = jb.bound(lambda x: jax.nn.relu(3 * x[0] + 4 * x[1] + 9), LP(), rounding=True)(region)
    assert 9.99 <= found.lower <= 10 and 30 <= found.upper <= 30.01


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}
