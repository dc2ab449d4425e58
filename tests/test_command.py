"""The command `jaxbound`, called in this process on tiny networks; and what it must not import to say how it is used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

import jaxbound as jb

pytest.importorskip("tyro")
from jaxbound.cli import networks, options
from jaxbound.cli.main import default_cache, main
from jaxbound.methods.named import METHODS
from jaxbound.training import configuration, data, examples

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
W, B, V = (RNG.normal(size=shape).astype(np.float32) / 2 for shape in ((4, 5), (5,), (5, 3)))


def network(x):
    """What the files below hold."""
    return np.maximum(x @ W + B, 0) @ V


LABELS = network(X).argmax(1)
MODULE = """
import numpy as np, jax
with np.load({path!r}) as arrays:
    w, b, v = (arrays[name] for name in "wbv")
def batch(x):
    return jax.nn.relu(x @ w + b) @ v
def made():
    import flax.linen as nn
    layers = {{"layers_0": {{"kernel": w, "bias": b}}, "layers_2": {{"kernel": v, "bias": 0 * v[0]}}}}
    return nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]), {{"params": layers}}
def fails():
    raise RuntimeError("no weights")
"""
PROPERTY = """
(declare-const X_0 Real) (declare-const X_1 Real) (declare-const X_2 Real) (declare-const X_3 Real)
(declare-const Y_0 Real) (declare-const Y_1 Real) (declare-const Y_2 Real)
(assert (and (>= X_0 -0.5) (<= X_0 0.5) (>= X_1 -0.5) (<= X_1 0.5)))
(assert (and (>= X_2 -0.5) (<= X_2 0.5) (>= X_3 -0.5) (<= X_3 0.5)))
(assert (>= Y_0 {bound}))
"""


def save_onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make, arrays = onnx.helper, {"w": W, "b": B, "v": V}
    nodes = [("MatMul", ["x", "w"], "1"), ("Add", ["1", "b"], "2"), ("Relu", ["2"], "3"), ("MatMul", ["3", "v"], "y")]
    ends = [make.make_tensor_value_info("x", 1, ["batch", 4])], [make.make_tensor_value_info("y", 1, ["batch", 3])]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = make.make_graph([make.make_node(op, ins, [out]) for op, ins, out in nodes], "tiny", *ends, tensors)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)]), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One network as an ONNX file, a module and a training run; examples; properties that hold, do not, and might."""
    path = tmp_path_factory.mktemp("command")
    save_onnx(path / "net.onnx")
    np.savez(path / "x.npz", x=X, labels=LABELS)
    np.savez(path / "weights.npz", w=W, b=B, v=V)
    (path / "tiny_network.py").write_text(MODULE.format(path=str(path / "weights.npz")))
    for name, bound in (("holds", 50), ("broken", -50), ("open", 0.9)):
        (path / f"{name}.vnnlib").write_text(PROPERTY.format(bound=bound))
    return path


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    yield
    sys.modules.pop("tiny_network", None)


def run(capsys, *arguments: object) -> tuple[int, dict]:
    """The exit code and the JSON."""
    code = main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert not printed.err, printed.err
    return code, json.loads(printed.out)


# --- what is found ----------------------------------------------------------------------------------------------------

AROUND = {"apply_fn": lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]}
PARAMS = {"w": W, "b": B, "v": V}


@pytest.mark.parametrize("net", ["net.onnx", "tiny_network:batch", "tiny_network:made"])
def test_bounds_are_those_of_the_function(net, capsys):
    code, found = run(capsys, "bounds", net, "x.npz", "--eps", "0.1", "--method", "ibp", "--count", 2)
    expected = jb.ibp(PARAMS, X[:2], 0.1, **AROUND)
    assert code == 0 and found["guarantee"] == "certified" and found["net"] == net
    np.testing.assert_allclose(found["lower"], expected.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["upper"], expected.upper, rtol=1e-5, atol=1e-6)


def test_slopes_and_intersection_are_options(capsys):
    """same-slope, zero-lb and one-lb, and bounds that keep nothing of intervals."""
    found = {}
    for slope in ("parallel", "zero", "one"):
        flags = ["--method", "crown_ibp", "--lower-slope", slope, "--no-intersect"]
        code, found[slope] = run(capsys, "bounds", "tiny_network:batch", "x.npz", "--eps", "0.5", *flags)
        expected = jb.crown_ibp(PARAMS, X, 0.5, lower_slope=slope, intersect=False, **AROUND)
        assert code == 0
        np.testing.assert_allclose(found[slope]["lower"], expected.lower, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found["zero"]["lower"], found["one"]["lower"], atol=1e-3)
    assert main(["certify", "net.onnx", "x.npz", "--eps", "0.1", "--method", "ibp", "--lower-slope", "zero"]) == 2
    assert "but ibp has no such option; use crown_ibp" in capsys.readouterr().err


def test_certify_and_attack_say_by_their_codes(capsys):
    code, found = run(capsys, "certify", "net.onnx", "x.npz", "--eps", "1e-4", "--method", "ibp")
    assert code == 0 and found["verified"] == [True] * 3 and found["verified_error"] == 0
    code, found = run(capsys, "certify", "net.onnx", "x.npz", "--eps", "5", "--method", "ibp")
    assert code == 20 and found["correct"] == [True] * 3
    np.savez("wrong.npz", x=X, labels=(LABELS + 1) % 3)
    code, found = run(capsys, "certify", "net.onnx", "wrong.npz", "--eps", "1e-4", "--method", "ibp")
    assert code == 10 and not any(found["correct"])
    code, found = run(capsys, "attack", "net.onnx", "x.npz", "--eps", "5", "--steps", "3")
    assert code == (10 if any(found["success"]) else 20)
    margins = network(np.asarray(found["x"]))
    own = margins[range(3), LABELS] - np.where(np.eye(3)[LABELS] > 0, -np.inf, margins).max(1)
    np.testing.assert_allclose(found["margin"], own, rtol=1e-4, atol=1e-5)
    assert run(capsys, "attack", "net.onnx", "x.npz", "--eps", "1e-4", "--steps", "3")[0] == 20


def test_radius_and_lipschitz(capsys):
    code, found = run(capsys, "radius", "net.onnx", "x.npz", "--method", "ibp", "--steps", 5, "--plot", "radii.png")
    assert code == 0 and len(found["radius"]) == 3 and min(found["radius"]) > 0
    assert Path("radii.png").read_bytes().startswith(b"\x89PNG")
    code, found = run(
        capsys, "lipschitz", "net.onnx", "x.npz", "--eps", 0.1, "--of", "map", "--norm", 2, "--method", "ibp"
    )
    assert code == 0 and np.shape(found["lipschitz"]) == (3,)
    assert max(found["lipschitz"]) <= np.linalg.norm(np.abs(W) @ np.abs(V)) * 1.01


def test_explain(capsys):
    code, found = run(capsys, "explain", "net.onnx")
    assert code == 0 and found["supported"] and "relu" in found["text"]
    assert run(capsys, "explain", "tiny_network:batch", "--input-shape", 4)[1]["supported"]
    assert main(["explain", "tiny_network:batch"]) == 2
    assert "pass --input-shape" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code", "status"), [("holds", 0, "verified"), ("broken", 10, "falsified")])
def test_verify(name, code, status, capsys):
    found = run(capsys, "verify", "net.onnx", f"{name}.vnnlib", "--timeout", 60, "--results", "results.txt")
    assert found[0] == code and found[1]["status"] == status
    lines = Path("results.txt").read_text().splitlines()
    assert lines[0] == {"verified": "unsat", "falsified": "sat"}[status]
    if status == "falsified":
        values = [float(line.strip("()").split()[1]) for line in lines[1:]]
        assert np.abs(values[:4]).max() <= 0.5
        np.testing.assert_allclose(values[4:], network(np.float32(values[:4])), rtol=1e-4, atol=1e-5)


def test_verify_without_time_or_domains_is_unknown(capsys):
    code, found = run(capsys, "verify", "net.onnx", "open.vnnlib", "--timeout", 0, "--results", "results.txt")
    assert code == 20 and found["status"] == "unknown" and Path("results.txt").read_text() == "timeout\n"
    code, found = run(capsys, "verify", "tiny_network:batch", "holds.vnnlib", "--input-shape", 4, "--no-attack")
    assert code == 0 and found["status"] == "verified"


def test_sizes_that_a_file_leaves_open_are_given(folder, capsys):
    import onnx

    ends = [[onnx.helper.make_tensor_value_info(name, 1, ["batch", "width"])] for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "open", *ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "open.onnx")
    (folder / "one.vnnlib").write_text(PROPERTY_INPUT.format(0) + "(declare-const Y_0 Real) (assert (<= Y_0 -1))")
    assert run(capsys, "verify", "open.onnx", "one.vnnlib", "--input-shape", 1)[1]["status"] == "verified"
    assert run(capsys, "explain", "open.onnx", "--input-shape", 1)[1]["supported"]
    assert main(["verify", "open.onnx", "one.vnnlib"]) == 2
    assert "pass input_shape" in capsys.readouterr().err


def test_check(capsys):
    given = ["verify", "net.onnx", "holds.vnnlib", "--certificate", "proof.npz"]
    assert run(capsys, *given)[1]["status"] == "verified"
    code, found = run(capsys, "check", "proof.npz", "net.onnx", "holds.vnnlib")
    assert code == 0 and found["proved"]
    code, found = run(capsys, "check", "proof.npz", "net.onnx", "open.vnnlib")
    assert code == 20 and "another property" in found["text"]
    Path("proof.npz").write_bytes(b"nothing")
    assert run(capsys, "check", "proof.npz", "net.onnx")[0] == 20


def test_people_get_a_table_and_a_bar(capsys):
    assert main(["bounds", "net.onnx", "x.npz", "--eps", "0.1", "--method", "ibp", "--count", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["example", "output", "lower", "upper"]
    assert len(printed.out.splitlines()) == 7 and "2/2" in printed.err


# --- training runs ----------------------------------------------------------------------------------------------------


FEW = ["--count", 16, "--batch-size", 16, "--method", "ibp"]


@pytest.fixture(scope="module")
def trained(folder):
    """The folder of a finished training run, with parameters that nobody trained."""
    pytest.importorskip("sklearn")
    run = folder / "runs" / "digits" / "mlp"
    run.mkdir(parents=True)
    (run / "config.json").write_text(dataclasses.replace(configuration.digits(), hidden=(8,)).to_json())
    rng = np.random.default_rng(1)
    shapes = {"Dense_0": (64, 8), "Dense_1": (8, 10)}
    kernels = {f"params/{name}/kernel": rng.normal(size=shape) / 8 for name, shape in shapes.items()}
    biases = {f"params/{name}/bias": np.zeros(shape[1]) for name, shape in shapes.items()}
    np.savez(run / "variables.npz", **{name: a.astype(np.float32) for name, a in (kernels | biases).items()})
    return run


def test_a_run_is_a_network_with_data_of_its_own(trained, capsys):
    code, found = run(capsys, "evaluate", trained, *FEW, "--pgd-steps", 2)
    (row,) = found["rows"]
    assert code == 0 and row["eps"] == 0.05 and row["clean_error"] <= row["pgd_error"] <= row["verified_error"]
    code, found = run(capsys, "certify", trained.parent, "--eps", row["eps"], *FEW)
    assert code == 10 and found["verified_error"] == row["verified_error"] and len(found["labels"]) == 16


def test_another_configuration_is_refused(trained, capsys):
    assert main(["train", "--output", str(trained.parents[1]), "--seed", "5"]) == 2
    assert "holds a run with another configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_train(folder, capsys):
    pytest.importorskip("sklearn")
    flags = ["--epochs", "0.1", "--hidden", "6", "--test-examples", "16", "--pgd-steps", "2", "--method", "ibp"]
    assert main(["train", "--output", str(folder / "trained"), "--watch", "16", *flags]) == 0
    printed = capsys.readouterr()
    assert "verified_error" in printed.out and "digits/mlp" in printed.err
    result = json.loads((folder / "trained" / "digits" / "mlp" / "result.json").read_text())
    code, found = run(capsys, "evaluate", folder / "trained", "--count", 16, "--pgd-steps", 2)
    assert code == 0 and found["rows"][0]["verified_error"] == result["verified_error"]


# --- networks and data ------------------------------------------------------------------------------------------------


def test_layouts_are_not_guessed():
    images = np.arange(24).reshape(2, 2, 2, 3)
    assert networks.fitted(images, (2, 2, 3)) is images
    np.testing.assert_array_equal(networks.fitted(images, (3, 2, 2)), images.transpose(0, 3, 1, 2))
    assert networks.fitted(images[..., :1], (4,)).shape == (2, 4)
    with pytest.raises(jb.ArgumentError, match="examples of shape"):
        networks.fitted(images, (12,))  # in which order?


def test_an_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        image.fromarray(np.full((3, 5), 51 * label, np.uint8)).save(tmp_path / name / "a.png")
    x, labels = examples.read(str(tmp_path))
    assert x.shape == (2, 3, 5, 1) and x.dtype == np.float32 and labels.tolist() == [0, 1]
    np.testing.assert_allclose(x[:, 0, 0, 0], [0, 0.2])
    image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "dog" / "b.png")
    with pytest.raises(jb.ArgumentError, match="different sizes"):
        examples.read(str(tmp_path))


def test_data_that_is_not_there(tmp_path):
    np.savez(tmp_path / "a.npz", other=X)
    np.savez(tmp_path / "b.npz", x=X, labels=np.zeros(2))
    for source, said in (("nothing", "an .npz file"), (tmp_path / "a.npz", "has no array x"), (tmp_path / "b.npz", "first axis"),
                         ("sklearn:irs", "did you mean 'iris'"), (tmp_path, "no folder of images")):  # fmt: skip
        with pytest.raises(jb.ArgumentError, match=said):
            examples.read(str(source))


def test_descriptions_are_those_of_the_data():
    pytest.importorskip("sklearn")
    found, described = data.load("digits"), data.described("digits")
    assert (found.shape, found.scale, found.mean, found.classes) == (
        described.shape, described.scale, described.mean, described.classes,
    )  # fmt: skip


# --- bad input --------------------------------------------------------------------------------------------------------


PROPERTY_INPUT = "(declare-const X_{0} Real) (assert (<= X_{0} 1)) (assert (>= X_{0} 0))\n"
PROPERTY_OUTPUT = "(declare-const Y_0 Real) (assert (<= Y_0 0))"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bounds", "nothing.onnx", "x.npz", "--eps", "1"], "'nothing.onnx' is not there"),
        (["bounds", "nothing", "x.npz", "--eps", "1"], "module:attribute"),
        (["bounds", "nothing:net", "x.npz", "--eps", "1"], "cannot be imported"),
        (["bounds", "net.onnx", "nothing.npz", "--eps", "1"], "'nothing.npz' is not there"),
        (["bounds", "net.onnx", "--eps", "1"], "data is missing"),
        (["bounds", "net.onnx", "x.npz", "--eps", "-1"], "pass a number of 0 or more"),
        (["bounds", "net.onnx", "x.npz", "--eps", "1", "--norm", "0.5"], "pass p >= 1"),
        (["bounds", "net.onnx", "x.npz", "--eps", "1", "--clip", "1", "0"], "lower end first"),
        (["certify", "net.onnx", "unlabelled.npz", "--eps", "1"], "has no labels that number classes"),
        (["verify", "net.onnx", "x.npz"], "x.npz, line 1"),
        (["verify", "net.onnx", "three.vnnlib"], "speaks of 3 inputs; the network takes (4,)"),
        (
            ["verify", "tiny_network:batch", "three.vnnlib", "--input-shape", "4"],
            "speaks of 3 inputs; the network refuses",
        ),
        (
            ["bounds", "net.onnx", "x.npz", "--eps", "1", "--plot", "figure.nope"],
            "plot is 'figure.nope'; pass a file that",
        ),
        (["bounds", "net.onnx", "junk.npz", "--eps", "1"], "'junk.npz' is no .npz file"),
        (["bounds", "net.onnx", "empty.npz", "--eps", "1"], "'empty.npz' is no .npz file"),
        (["bounds", "net.onnx", "complex.npz", "--eps", "1"], "holds x of complex64; pass real numbers"),
        (["certify", "net.onnx", "targets.npz", "--eps", "1"], "has no labels that number classes"),
        (["bounds", ":net", "x.npz", "--eps", "1"], "':net' cannot be imported (ValueError: Empty module name)"),
        (["bounds", "tiny_network:fails", "x.npz", "--eps", "1"], "cannot be imported (RuntimeError: no weights)"),
        (["verify", "net.onnx", "three.vnnlib", "--certificate", "empty"], "certificate 'empty' cannot be written"),
        (["verify", "net.onnx", "three.vnnlib", "--results", "nowhere/a"], "results 'nowhere/a' cannot be written"),
        (["verify", "net.onnx", "three.vnnlib", "--steps", "-1"], "steps is -1; pass a number of 0 or more"),
        (["evaluate", "net.onnx", "x.npz"], "eps is missing"),
        (["certify", ".", "x.npz", "--eps", "1"], "holds 0 training runs"),
    ],
)
def test_bad_input_is_one_line(arguments, said, folder, capsys):
    np.savez(folder / "unlabelled.npz", x=X)
    np.savez(folder / "complex.npz", x=np.asarray(X) * np.complex64(1j))
    np.savez(folder / "targets.npz", x=X, labels=np.arange(len(X)) + 0.5)
    (folder / "junk.npz").write_text("junk")
    (folder / "empty.npz").write_text("")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "three.vnnlib").write_text("".join(map(PROPERTY_INPUT.format, range(3))) + PROPERTY_OUTPUT)
    if arguments[1] == ".":
        arguments = [arguments[0], "empty", *arguments[2:]]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("jaxbound: ") and said in printed.err


@pytest.mark.parametrize(
    "arguments", [["bound"], ["bounds", "net.onnx", "x.npz", "--eps", "1", "--method", "crwn"], []]
)
def test_unknown_words_are_refused_by_the_parser(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_a_broken_certificate_is_no_bad_input(monkeypatch, capsys):
    from jaxbound import errors

    def wrong(*_, **__):
        raise errors.SoundnessError("it is wrong")

    monkeypatch.setattr("jaxbound.cli.bounding.bounds", wrong)
    assert main(["bounds", "net.onnx", "x.npz", "--eps", "1"]) == 1
    assert capsys.readouterr().err == "jaxbound: it is wrong\n"


# --- the page about it -----------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
COMMANDS = [shlex.split(line)[1:] for line in LINES if line.startswith("jaxbound ")]


@pytest.fixture
def on_the_page(folder, trained, monkeypatch, tmp_path):
    """A folder with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("network.onnx", "net.onnx"), ("examples.npz", "x.npz"), ("property.vnnlib", "holds.vnnlib")):
        shutil.copy(folder / source, tmp_path / name)
    shutil.copytree(folder / "runs", tmp_path / "runs")


def test_every_command_on_the_page_is_one(on_the_page):
    from jaxbound.cli.main import _parsed

    assert {arguments[0] for arguments in COMMANDS} == set(options.COMMANDS) - {"check"}
    for arguments in COMMANDS:
        _parsed(arguments).check()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_on_the_page_runs(arguments, on_the_page):
    if arguments[0] == "train":
        shutil.rmtree("runs")
    assert main(arguments) in (0, 10, 20)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", options.COMMANDS)
def test_help_lists_every_option_with_its_default(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(options.COMMANDS[name]):
        if "Positional" not in str(field.type) and field.name != "config":
            assert f"--{field.name.replace('_', '-')}" in text, field.name
    if name == "train":
        assert all(
            f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(configuration.Configuration)
        )


def test_help_imports_no_jax():
    code = "import sys\nfrom jaxbound.cli.main import main\nmain(['verify', '--help'])\nsys.exit('jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True)
    assert ended.returncode == 0, ended.stderr


def _environment():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


INTERRUPTED = """
import gc, os, signal
from jaxbound.cli.main import interruptible, program
def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
def work():
    try:
        with interruptible():
            interrupt()
    except KeyboardInterrupt:
        print("as an exception", flush=True)
    gc.callbacks.append(interrupt)  # exceptions there are ignored
    gc.collect()
    return 0
program(work)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_program_ends_at_once():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], env=_environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "as an exception\n", "\njaxbound: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_search_says_what_is_known(tmp_path):
    """A search without end: as soon as it says what is known, it is interrupted, and this is the answer."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(30, 60)) / 4, rng.normal(size=60) / 4
    np.savez(tmp_path / "weights.npz", w=w, v=v)
    (tmp_path / "hard.py").write_text(
        "import jax, jax.numpy as jnp, numpy as np\nwith np.load('weights.npz') as a: w, v = a['w'], a['v']\n"
        "def batch(x): return (jax.nn.relu(x @ w) @ v)[:, None]\n"
    )
    lines = [f"(declare-const X_{k} Real) (assert (and (>= X_{k} -1) (<= X_{k} 1)))" for k in range(30)]
    highest = np.max(np.maximum(rng.choice([-1, 1], (2000, 30)) @ w, 0) @ v)
    (tmp_path / "hard.vnnlib").write_text(
        "\n".join([*lines, f"(declare-const Y_0 Real) (assert (>= Y_0 {1.6 * highest}))"])
    )
    words = ["verify", "hard:batch", "hard.vnnlib", "--input-shape", "30", "--no-attack", "--results", "results.txt"]
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # where it is ignored
    command = [sys.executable, "-c", f"{heeding}runpy.run_module('jaxbound', run_name='__main__')", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=_environment(), cwd=tmp_path, text=True, bufsize=1, **pipes) as running:
        said = ""
        while "left, margin >= -" not in said or "-inf" in said.rpartition("margin")[2]:
            more = running.stderr.read(1)
            assert more, said
            said += more
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 20 and out.startswith("unknown in ") and "margin of the property >= -" in out, (
        out,
        err,
    )
    assert "Traceback" not in err and (tmp_path / "results.txt").read_text() == "unknown\n"


def test_methods_of_the_command_are_those_by_name():
    assert set(get_args(configuration.MethodName)) == set(METHODS)


def test_the_folder_for_programs_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "jaxbound"
    monkeypatch.setenv("JAXBOUND_CACHE", "off")
    assert options.Explain(net="net.onnx").cache == "off"
