"""The fuzzer: its reference is JAX's own value, it finds a planted fault, makes it small and writes it down."""

from __future__ import annotations

import runpy
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from fuzzing import cases, programs, search
from fuzzing.evaluation import Reference, UndefinedError
from fuzzing.programs import Line, Program


@pytest.mark.parametrize("name", programs.TABLE)
def test_every_operation_is_evaluated_as_jax_does(name):
    program = Program((Line(name, 0, 0), Line("shift", 1, 0), Line(name, 2, 1)), 3)
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape).astype(np.float32) for shape in program.shapes()]
    function, reference = search.function_of(program), Reference(program, np.float32)
    for x in (np.array([0.3, -1.2, 2.1], np.float32), np.array([-0.75, -0.5, 0.5], np.float32)):
        value = np.asarray(function([jnp.asarray(p) for p in params], jnp.asarray(x)))
        assert np.allclose(reference.approximate(params, x)[0], value, rtol=1e-4, atol=1e-4)
        if program.is_rational:
            assert np.allclose(reference.exact(params, x).astype(float), value, rtol=1e-4, atol=1e-4)


def test_what_is_undefined_is_said_to_be():
    with pytest.raises(UndefinedError):
        Reference(Program((Line("pole", 0, 0),), 1), np.float32).exact([], np.zeros(1))


def test_literals_are_those_of_the_dtype():
    (value,) = Reference(Program((Line("literal", 0, 0),), 1), np.float32).exact([], np.ones(1))
    assert value == Fraction(float(np.float32(0.3))) - Fraction(float(np.float32(0.7)))


@pytest.mark.parametrize("style", cases.STYLES)
def test_points_lie_in_their_regions(style):
    rng = np.random.default_rng(0)
    for _ in range(40):
        where = cases.region(rng, 3, style, np.float32, str(rng.choice(cases.KINDS)))
        for x in cases.points(rng, where, 8):
            assert cases.contains(where, x)


def test_programs_differ_and_are_the_same_for_a_seed():
    drawn = [[programs.draw(np.random.default_rng([0, k])) for k in range(200)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({program.source() for program in drawn[0]}) > 150


def test_a_planted_fault_is_found_made_small_and_written_down(monkeypatch, tmp_path):
    """What the function is at the center taken for its largest value: of four lines one is left, of three entries one."""

    def faulty(case, call=None):
        box = case.region if isinstance(case.region, jb.Box) else jb.Box(case.region.center, case.region.center)
        middle = np.asarray(box.lower, float) / 2 + np.asarray(box.upper, float) / 2
        value = Reference(case.program, np.float32).approximate(case.params, middle)[0]
        return np.full(value.shape, -np.inf), value * (1 + np.sign(value) * 1e-6)

    monkeypatch.setattr(search, "bounds", faulty)
    monkeypatch.setattr(search, "planned", lambda *_: search.Plan("IBP()", True, (True,), ("box",)))
    program = Program((Line("dense", 0, 0), Line("relu", 1, 0), Line("scale", 2, 1), Line("shift", 3, 2)), 3)
    tally = search.Tally()
    found = list(search.run(program, np.random.default_rng(0), np.float32, 20, tally))
    assert found and tally.violations == len(found) and tally.exact > 0
    small = search.shrink(next(one for one in found if isinstance(one.case.region, jb.Box) and one.case.rounding))
    assert len(small.case.program.lines) == 1 and small.case.program.size == 1
    path = search.write(small, tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path))
    assert not ended.value.code  # jaxbound itself has no such fault


def test_cases_of_a_program_share_what_is_compiled():
    drawn = [search.planned(programs.draw(np.random.default_rng(k)), np.random.default_rng(k)) for k in range(300)]
    compiled = [plan for plan in drawn if plan.compiled]
    assert len(compiled) > 200 and all(len(plan.kinds) == len(plan.roundings) == 1 for plan in compiled)
    assert {kind for plan in compiled for kind in plan.kinds} == set(cases.KINDS)
    assert {rounding for plan in drawn for rounding in plan.roundings} == {True, False, "execution"}
    assert {plan.method for plan in drawn} > {"IBP()", "Crown()", "Frown(steps=2)"}


def test_honest_bounds_pass():
    tally = search.Tally()
    program = Program((Line("dense", 0, 0), Line("relu", 1, 0), Line("matrix", 2, 1)), 3)
    assert not list(search.run(program, np.random.default_rng(1), np.float32, 4, tally))
    assert tally.cases >= 4 and tally.exact >= 4 * 3


def test_refusals_are_counted_not_hidden():
    case = search.Case(Program((Line("tanh", 0, 0),), 1), "MILP()", True, [], jb.Box(np.zeros(1), np.ones(1)))
    assert search.bounds(case) is None


def test_broken_files_are_the_same_everywhere_and_refused_or_right(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from fuzzing import files, networks, texts

    words = set()
    for number in range(14):
        kind, content, rng = files.case(0, number)
        assert content == files.case(0, number)[1]
        words.add(
            texts.check(content.decode(), rng) if kind == "vnnlib" else networks.check(content, rng, tmp_path, print)
        )
    assert {"refused"} <= words <= {"refused", "equal", "not in onnxruntime", "large"}


def _only(operator, *constants, opset=17):
    """A network of one operator on forty numbers."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    names = [f"c{k}" for k in range(len(constants))]
    stored = [onnx.numpy_helper.from_array(np.float32(c), n) for c, n in zip(constants, names, strict=True)]
    ends = [[make.make_tensor_value_info(name, 1, [1, 40])] for name in "xy"]
    graph = make.make_graph([make.make_node(operator, ["x", *names], ["y"])], "one", *ends, stored)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", opset)])
    model.ir_version = 8
    return model.SerializeToString()


def test_nan_is_right_only_where_others_have_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from fuzzing import networks
    from jaxbound.frontends.operators import OPERATORS, Operator

    def found(content):
        return networks.check(content, np.random.default_rng(0), tmp_path, lambda reader: None)

    assert found(_only("Sqrt")) == "equal" and found(_only("Relu")) == "equal"
    monkeypatch.setitem(OPERATORS, "Relu", Operator(lambda _node, x: jnp.where(x > 0, x, jnp.nan)))
    monkeypatch.setitem(OPERATORS, "Sqrt", Operator(lambda _node, x: jnp.sqrt(jnp.maximum(x, 0))))
    assert found(_only("Relu")) == "wrong" and found(_only("Sqrt")) == "wrong"


def test_a_wrong_reader_and_a_wrong_network_are_found(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from fuzzing import networks, texts
    from jaxbound.frontends.operators import OPERATORS, Operator

    rng = np.random.default_rng(0)
    content = networks.draw(np.random.default_rng(0)).SerializeToString()
    monkeypatch.setitem(OPERATORS, "MaxPool", Operator(OPERATORS["AveragePool"].function))
    monkeypatch.setitem(OPERATORS, "MatMul", Operator(lambda _node, a, b: a @ b + 1))
    monkeypatch.setitem(OPERATORS, "Reshape", Operator(lambda _node, a, b: 2 * a))
    monkeypatch.setitem(OPERATORS, "Clip", Operator(lambda _node, x, low, high: x + 1))
    assert networks.check(content, rng, tmp_path, print) == "wrong"
    read = jb.vnnlib.loads
    text = (
        "(declare-const X_0 Real) (declare-const Y_0 Real) (assert (and (>= X_0 -2) (<= X_0 2))) (assert (<= Y_0 0.25))"
    )
    assert texts.check(text, rng) == "equal"
    monkeypatch.setattr(jb.vnnlib, "loads", lambda text: read(text.replace("0.25", "-1.75")))
    assert texts.check(text, rng) == "wrong"
