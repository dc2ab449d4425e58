"""`explain`: the table of what would be done, with nothing done, and all that is refused."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound.methods import Method
from jaxbound.regions import Box, LpBall

BOX = Box(np.full(4, -1.0, "f"), np.full(4, 1.0, "f"))


class Network(nn.Module):
    """One node of every kind."""

    @nn.compact
    def __call__(self, x):
        h = jax.nn.relu(nn.Dense(6, name="first")(x))
        pooled = jnp.max(h.reshape(-1, 3, 2), axis=-1)
        return nn.Dense(2, name="last")(pooled * jnp.tanh(pooled[:, ::-1]))


def network(variables, x):
    return Network().apply(variables, x[None])[0]


VARIABLES = Network().init(jax.random.key(0), jnp.zeros((1, 4)))


def explained(fn, *args, method=None) -> jb.Explanation:
    return jb.explain(fn, jb.Crown() if method is None else method)(*args)


def test_there_is_a_row_per_node_with_name_kind_rule_shape_and_line():
    found = explained(network, VARIABLES, BOX)
    assert found.supported
    assert found.refusals == ()
    assert [row[1] for row in found.rows if row[1] != "affine"] == ["input", "scalar", "maximum", "scalar", "product"]
    rows = {name.split("/", 1)[1]: (kind, rule, shape, source) for name, kind, rule, shape, source in found.rows}
    assert rows["input"] == ("input", "region", (4,), "")
    kind, rule, shape, source = rows["Network/first/dot_general"]
    assert (kind, shape) == ("affine", (1, 6))
    assert "affine rule" in rule
    assert source.startswith("test_explain.py:")
    assert source.endswith("(Network.__call__)")
    assert "linear, linear" in rows["Network/relu"][1]
    assert "convex, concave" in rows["Network/tanh"][1]


def test_names_are_numbered_in_the_order_of_evaluation_and_are_those_of_the_bounds():
    found = explained(network, VARIABLES, BOX)
    names = [row[0] for row in found.rows]
    assert names == sorted(names)
    assert [int(name.split("/")[0]) for name in names] == list(range(len(names)))
    bounds = jb.pre_activation_bounds(network, jb.IBP())(VARIABLES, BOX)
    nonlinear = [row[0] for row in found.rows if row[1] in ("scalar", "maximum", "product")]
    assert list(dict.fromkeys(name.split(":")[0] for name in bounds)) == nonlinear


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (jb.Crown(), "Crown()"), (jb.CrownIBP(), "CrownIBP()"), (jb.CrownIBP(intersect=False), "CrownIBP(intersect=False)"),
        (jb.Best(jb.IBP(), jb.Frown(steps=4)), "Best(methods=(IBP(), Frown(steps=4)))"),
        (jb.BranchAndBound(bounder=jb.Crown()), "BranchAndBound(bounder=Crown())"),
    ],
)  # fmt: skip
def test_methods_print_what_is_not_as_by_default(method, expected):
    assert str(method) == expected


def test_it_prints_a_table():
    text = str(explained(network, VARIABLES, BOX))
    first, header, *lines = text.splitlines()
    assert first.startswith("Crown(")
    assert first.endswith("(certified)")
    assert header.split() == ["node", "kind", "rule", "shape", "source"]
    assert len(lines) == len(explained(network, VARIABLES, BOX).rows)
    assert (
        len({line.index("(", line.index("affine rule (") + 13) for line in lines if "affine rule (add)" in line}) == 1
    )
    assert all(line == line.rstrip() for line in lines)


def test_it_needs_shapes_only_and_compiles_nothing():
    structs = jax.eval_shape(Network().init, jax.random.key(0), jnp.zeros((1, 4)))
    ball = LpBall(jax.ShapeDtypeStruct((4,), np.float32), jax.ShapeDtypeStruct((), np.float32), 2)
    events = []

    def listen(event, duration, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        found = explained(network, structs, ball)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert found.rows == explained(network, VARIABLES, BOX).rows
    assert not [event for event in events if event.endswith("backend_compile_duration")]


def test_it_works_under_a_trace():
    seen = []

    @jax.jit
    def run(x):
        seen.append(explained(network, VARIABLES, LpBall(x, 0.1, 2)))
        return x

    run(jnp.zeros(4))
    assert seen[0].rows == explained(network, VARIABLES, BOX).rows


def test_all_refusals_are_listed_with_line_and_way_out_and_none_is_raised():
    def refused(x):
        return jax.lax.nextafter(x, 2 * x), jnp.tanh(x), jnp.argmax(x), jax.lax.reduce_precision(x, 5, 5)

    found = explained(refused, BOX)
    assert not found.supported
    text = str(found)
    assert "refused: " in text
    for primitive in ("nextafter", "argmax", "reduce_precision"):
        assert f"`{primitive}`" in text, primitive
    assert len(found.refusals) == 3
    assert all(f"test_explain.py:{refused.__code__.co_firstlineno + 1} " in reason for reason in found.refusals)


def test_what_the_result_does_not_need_is_not_listed():
    found = explained(lambda x: (jnp.sort(x), 2 * x)[1], BOX)
    assert found.supported
    assert [row[1] for row in found.rows] == ["input", "affine"]


def test_the_guarantee_of_the_method_is_shown():
    class Guess(Method):
        guarantee = "estimate"

    assert explained(jnp.tanh, BOX, method=Guess()).guarantee == "estimate"
    assert explained(jnp.tanh, BOX).guarantee == "certified"


def test_several_regions_are_several_inputs():
    found = explained(
        lambda d, x: jax.nn.relu(d["w"] @ x), {"w": Box(np.zeros((3, 4), "f"), np.ones((3, 4), "f"))}, BOX
    )
    assert [row[1] for row in found.rows[:2]] == ["input", "input"]
    assert "product" in [row[1] for row in found.rows]


@pytest.mark.parametrize("method", [jb.IBP(), jb.Forward(), jb.CrownIBP(), jb.FastLin(), jb.Best(jb.IBP(), jb.Crown())])
def test_every_method_is_named(method):
    assert str(explained(jnp.tanh, BOX, method=method)).startswith(f"{method} (certified)\n")
