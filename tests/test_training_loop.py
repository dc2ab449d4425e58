"""The loop: killed and continued to the same bits, faults found at their step, best kept after the ramp; the commands.

Length: the loop, and the two commands around it, share one run of the command, which is what costs time.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import jaxbound as jb
from jaxbound import errors
from jaxbound.methods.named import METHODS
from jaxbound.training import data, models
from jaxbound.training.checkpoints import Checkpoints, MetricsFile
from jaxbound.training.configuration import Configuration
from jaxbound.training.loop import NonFiniteError, Run, fit, restore
from jaxbound.training.losses import MarginLoss, Objective
from jaxbound.training.schedules import Epsilon
from jaxbound.training.step import Schedules, Step, create

ROOT = Path(__file__).resolve().parents[1]
MODEL = models.MLP((6,))
OPTIMIZER = optax.adam(1e-2)
SAMPLER = data.Sampler(60, 16, seed=3)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def made(optimizer=OPTIMIZER):
    step = Step(Objective(MODEL.apply, MarginLoss(jb.IBP())), Schedules.of(Epsilon(0.02, start=2, length=8)))
    return step, create(MODEL, jnp.zeros((1, 8, 8, 1)), optimizer, jax.random.key(0))


def batches(digits, fault=None):
    """The batches of the first 60 digits; at step `fault` an interruption, or an image that is not a number."""
    few = data.Dataset("few", data.Examples(digits.train.x[:60], digits.train.labels[:60]), digits.test, 16.0)

    def batch_at(number):
        batch = data.batch_of(few, SAMPLER, number)
        if fault == ("stop", number):
            raise KeyboardInterrupt
        return batch._replace(x=batch.x * np.nan) if fault == ("nan", number) else batch

    return batch_at


def run_of(**options):
    return Run(**{"steps": 21, "interval": 5, **options})


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def files(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


# --- to the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_interrupted_runs_end_the_same(digits, tmp_path, parallel):
    run = run_of(parallel=parallel)
    straight = fit(*made(), batches(digits), run, tmp_path / "straight")
    for stop in (3, 13, 20):
        with pytest.raises(KeyboardInterrupt):
            fit(*made(), batches(digits, ("stop", stop)), run, tmp_path / "broken")
    broken = fit(*made(), batches(digits), run, tmp_path / "broken")
    same(jax.tree.leaves(broken.state), jax.tree.leaves(straight.state))
    assert files(tmp_path / "broken") == files(tmp_path / "straight")
    assert [json.loads(line)["step"] for line in files(tmp_path / "broken").splitlines()] == [5, 10, 15, 20, 21]
    assert int(straight.state.step) == 21 and straight.best_step == -1
    again = fit(*made(), batches(digits, ("stop", 0)), run, tmp_path / "broken")
    same(again.variables, straight.variables)
    same(restore(made()[1], tmp_path / "broken").variables, straight.variables)


COMMAND = [
    sys.executable, "-m", "experiments.train", "--config", "experiments/configs/digits.py", "--config.hidden=(6,)",
    "--config.method=ibp", "--config.epochs=8.0", "--config.ramp_epochs=4.0", "--config.interval=0.25",
    "--config.validation=100", "--config.pgd_steps=2", "--config.test_examples=64", "--config.batch_size=64",
]  # fmt: skip


def start(output: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*COMMAND, "--output", str(output)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of the command that nothing interrupts: its folder and its output."""
    output = tmp_path_factory.mktemp("straight")
    process = start(output)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    return output / "digits" / "mlp", printed


@pytest.mark.parametrize("kills", [(8,), pytest.param((3, 9, 20), marks=pytest.mark.slow)], ids=["once", "thrice"])
def test_killed_runs_end_the_same(straight, tmp_path, kills):
    """SIGKILL after so many records, wherever it hits; then the command finishes."""
    folder = tmp_path / "digits" / "mlp"
    for lines in kills:
        process = start(tmp_path)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if (folder / "metrics.jsonl").exists() and files(folder).count("\n") >= lines:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "result.json").exists()
    process = start(tmp_path)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    assert files(folder) == files(straight[0])
    ends = [json.loads(text.splitlines()[-1]) for text in (printed, straight[1])]
    assert {**ends[0], "seconds": 0} == {**ends[1], "seconds": 0}
    found = [stored(place) for place in (folder, straight[0])]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name in found[0]:
        assert name == "seconds" or found[0][name].tobytes() == found[1][name].tobytes(), name


def stored(folder: Path) -> dict:
    """All arrays of a run's last checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    return {name: np.asarray(leaf) for name, leaf in found.items()}


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_reported_with_its_step(digits, tmp_path):
    with pytest.raises(NonFiniteError, match="the loss at step 12 is not finite") as caught:
        fit(*made(), batches(digits, ("nan", 12)), run_of(), tmp_path)
    assert caught.value.step == 12
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 10, "nothing was written after the last good interval"
    assert [json.loads(line)["step"] for line in files(tmp_path).splitlines()] == [5, 10]
    good = fit(*made(), batches(digits), run_of(), tmp_path)
    assert np.isfinite(jax.tree.leaves(good.variables)[0]).all(), "and it goes on from there"


def test_a_parameter_that_is_not_finite_is_not_saved(digits, tmp_path):
    """The last update of an interval breaks the parameters: no loss has shown it yet."""
    breaks = optax.sgd(lambda count: jnp.where(count == 9, jnp.inf, 1e-3))
    with pytest.raises(NonFiniteError, match="a parameter after the update at step 9"):
        fit(*made(breaks), batches(digits), run_of(), tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 5


def test_a_checkpoint_of_another_network_is_refused(digits, tmp_path):
    fit(*made(), batches(digits), run_of(steps=5), tmp_path)
    other = models.MLP((7,))
    step = Step(Objective(other.apply, MarginLoss(jb.IBP())), made()[0].schedules)
    state = create(other, jnp.zeros((1, 8, 8, 1)), OPTIMIZER, jax.random.key(0))
    with pytest.raises(errors.ArgumentError, match="of another network"):
        fit(step, state, batches(digits), run_of(), tmp_path)
    with pytest.raises(errors.ArgumentError, match=r"steps is 4, but .* stands at 5"):
        fit(*made(), batches(digits), run_of(steps=4), tmp_path)


def test_refused_runs():
    with pytest.raises(errors.ArgumentError, match="parallel='pamp' is not known; did you mean 'pmap'"):
        Run(10, 1, parallel="pamp")
    with pytest.raises(errors.ArgumentError, match="interval is 0"):
        Run(10, 0)
    with pytest.raises(errors.ArgumentError, match="no training run"):
        restore(made()[1], "nowhere")


def test_metrics_cut_short_by_a_kill_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"ste')
    MetricsFile(file, 10).write({"step": 11})
    assert file.read_text() == '{"step": 5}\n{"step": 10}\n{"step": 11}\n'


# --- the best ---------------------------------------------------------------------------------------------------------


def test_the_best_parameters_are_kept_after_the_ramp(digits, tmp_path):
    """Errors 0.1 before the ramp ends do not count; of 0.5, 0.3, 0.3, 0.4 the first 0.3 stays, over a restart too."""
    given = {5: 0.1, 10: 0.5, 15: 0.3, 20: 0.3, 21: 0.4}
    seen = []

    def evaluate(variables):
        seen.append(variables)
        stop = [5, 10, 15, 20, 21][len(seen) - 1]
        return {"verified_error": given[stop]}

    run = run_of(select_from=10)
    with pytest.raises(KeyboardInterrupt):
        fit(*made(), batches(digits, ("stop", 17)), run, tmp_path, evaluate=evaluate)
    result = fit(*made(), batches(digits), run, tmp_path, evaluate=evaluate)
    assert result.best_step == 15 and len(seen) == 5
    same(result.variables, seen[2])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (seen[2], seen[4])), strict=True))
    assert [json.loads(line)["verified_error"] for line in files(tmp_path).splitlines()] == list(given.values())


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_a_line_of_json(straight):
    folder, printed = straight
    found = json.loads(printed.splitlines()[-1])
    assert len(printed.splitlines()) == 1 and found == json.loads((folder / "result.json").read_text())
    assert {"clean_error", "pgd_error", "verified_error", "eps", "seconds"} <= set(found)
    assert 0 <= found["clean_error"] <= found["pgd_error"] <= found["verified_error"] <= 1
    records = [json.loads(line) for line in files(folder).splitlines()]
    ramp_end = 6 * 21  # epochs 2 to 6 of 21 steps
    assert found["step"] >= ramp_end and records[-1]["step"] == 8 * 21
    kept = [record for record in records if record["step"] >= ramp_end]
    best = min(kept, key=lambda record: record["verified_error"])
    assert all(0 <= record["validation_pgd_error"] <= 1 for record in records)
    assert found["step"] == best["step"], "the first of the best"


def test_another_configuration_does_not_overwrite_a_run(straight):
    from jaxbound.training import runs

    config, _ = runs.trained(straight[0])
    runs._check_same(config, straight[0] / "config.json")
    config.seed = 1
    with pytest.raises(jb.ArgumentError, match="holds a run with another configuration"):
        runs._check_same(config, straight[0] / "config.json")


def test_a_run_leaves_its_variables(straight, tmp_path):
    """The best ones of the last checkpoint; a run that is not finished has none yet."""
    from jaxbound.training import runs

    config, variables = runs.trained(straight[0])
    kept = {name: leaf for name, leaf in stored(straight[0]).items() if name.startswith("best.")}
    found = {".".join(["best", *path]): leaf for path, leaf in flatten_dict(variables).items()}
    assert found.keys() == kept.keys() and config.hidden == (6,)
    same(found, kept)
    (tmp_path / "config.json").write_text((straight[0] / "config.json").read_text())
    with pytest.raises(jb.ArgumentError, match="is not finished"):
        runs.trained(tmp_path)


def test_evaluate(straight, tmp_path, capsys):
    from experiments import evaluate

    folder, printed = straight
    flags = f"--eps 0.01 0.05 --method ibp best --figure pareto --output {tmp_path}"
    evaluate.main([str(folder.parent), *flags.split()])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "| digits | mlp | 0 | ibp | 0.05 | 0.01 |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    errors_of = {(row["method"], row["eps"]): row["verified_error"] for row in rows}
    assert len(rows) == 4 and (tmp_path / "evaluate.csv").exists()
    assert errors_of["ibp", 0.05] == json.loads(printed)["verified_error"]
    for method in ("ibp", "best"):
        assert errors_of[method, 0.01] <= errors_of[method, 0.05]
    assert errors_of["best", 0.05] <= errors_of["ibp", 0.05], "what IBP finds is kept"


def test_family_rows():
    from experiments import evaluate

    rows = [{"name": "f", "model": m, "split": "test", "method": "ibp", "eps": 0.1, "clean_error": c, "pgd_error": c + 0.1,
             "verified_error": c + 0.2, "seconds": 1.0} for m, c in (("A", 0.1), ("B", 0.3), ("C", 0.5), ("D", 0.2))]  # fmt: skip
    found = {row["model"]: row for row in evaluate.family(rows)}
    np.testing.assert_allclose(
        [found[k]["clean_error"] for k in ("min", "median", "max", "mean")], [0.1, 0.25, 0.5, 0.275]
    )
    assert "27.50%" in evaluate.table(list(found.values()))


# --- the configurations -----------------------------------------------------------------------------------------------

# epochs, batch, learning rate, start and length of the ramp, eps in training and test, of the table in the paper's code
PAPER = {
    "mnist_small": (100, 256, 5e-4, 1, 60, 0.3, 0.3), "mnist_medium": (100, 256, 5e-4, 1, 60, 0.3, 0.3),
    "fashion_mnist_small": (100, 256, 1e-3, 1, 60, 0.1, 0.1), "fashion_mnist_medium": (100, 256, 1e-3, 1, 60, 0.1, 0.1),
    "cifar_small": (200, 128, 1e-3, 10, 120, 8 / 255, 8 / 255), "cifar_medium": (200, 128, 1e-3, 10, 120, 8 / 255, 8 / 255),
    "mnist_dm_large_04": (200, 256, 5e-4, 10, 50, 0.4, 0.3), "mnist_dm_large_02": (100, 100, 1e-3, 3, 17, 0.2, 0.1),
    "cifar_dm_large_8": (3200, 1024, 5e-4, 320, 1600, 8.8 / 255, 8 / 255),
    "cifar_dm_large_2": (3200, 1024, 5e-4, 320, 1600, 2.2 / 255, 2 / 255),
}  # fmt: skip
CONFIGS = sorted(p.stem for p in (ROOT / "experiments" / "configs").glob("*.py") if p.stem not in ("__init__", "base"))


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name):
    """Every file gives a configuration from which model, loss and schedules can be made."""
    from experiments.configs import base
    from jaxbound.training import runs

    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    assert config.name == name and set(config) == set(base.get_config())
    if name in PAPER:
        found = (config.epochs, config.batch_size, config.learning_rate, config.ramp_start, config.ramp_epochs, config.eps,
                 config.eps_test)  # fmt: skip
        assert found == pytest.approx(PAPER[name])
    large = config.dataset in ("cifar10", "svhn")
    shape, count = ((32, 32, 3), 50_000) if large else ((28, 28, 1), 60_000)
    examples = data.Examples(np.zeros((10, *shape), np.uint8), np.zeros(10, np.int32))
    dataset = data.Dataset(config.dataset, examples, examples, 255.0)
    sampler = data.Sampler(count, config.batch_size)
    epsilon = runs.epsilon_of(config, sampler.steps_per_epoch)
    rate = runs.learning_rate_of(config, epsilon, sampler.steps_per_epoch)
    assert float(epsilon(epsilon.end)) == pytest.approx(config.eps)
    assert float(rate(0)) == pytest.approx(config.learning_rate) and float(rate(10**7)) < float(rate(0))
    assert epsilon.end < config.epochs * sampler.steps_per_epoch
    for model in config.models:
        assert runs.model_of(config, model, dataset).apply and runs.term_of(config) is not None


def test_help_lists_every_field_and_its_choices():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run([sys.executable, "-m", "experiments.train", "--help"], env={**os.environ, "PYTHONPATH": path},
                           cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    fields = [field.name for field in dataclasses.fields(Configuration)]
    assert all(f"{name} = " in ended.stdout for name in fields), ended.stderr
    assert "'convex_polytope_50'" in ended.stdout and "'trades'" in ended.stdout


def test_subsets_of_a_family():
    from experiments.configs import mnist_small
    from jaxbound.training import runs

    config = mnist_small.get_config()
    assert runs.chosen_models(config) == list("ABCDEFGHIJ")
    config.model_subset = "0,3"
    assert runs.chosen_models(config) == ["A", "D"]
    config.model_subset = "10"
    with pytest.raises(jb.ArgumentError, match=r"there are models 0\.\.9"):
        runs.chosen_models(config)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("margins", "MarginLoss"),
        ("fused", "FusedLoss"),
        ("adversarial", "AdversarialLoss"),
        ("trades", "TradesLoss"),
        ("natural", "NoneType"),
    ],
)
def test_losses_by_name(loss, kind):
    from experiments.configs import base
    from jaxbound.training import runs

    config = base.get_config()
    config.loss = loss
    assert type(runs.term_of(config)).__name__ == kind
    config.loss = "margin"
    with pytest.raises(jb.ArgumentError, match="choose natural, margins"):
        runs.term_of(config)


def test_without_held_out_examples_some_of_the_others_are_watched(digits):
    from jaxbound.training import runs

    rest, held = digits.holding_out(0)
    watched, names = runs.looked_at(rest, held, 20)
    assert len(watched) == 20 and "verified_error" not in names, "what was trained on chooses nothing"
    rest, held = digits.holding_out(30)
    assert runs.looked_at(rest, held, 20)[0] is held


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ibp", "crown_ibp", "crown", "fastlin", "crown_zero", "crown_alone", "crown_ibp_alone", "convex_polytope",
                                  "convex_polytope_50", "frown", "best"])  # fmt: skip
def test_every_method_by_name_trains(digits, name):
    """A step of its loss is finite; an estimate makes a loss and no certificate."""
    from experiments.configs import base
    from jaxbound.training import runs

    assert list(METHODS)[:2] == ["ibp", "crown_ibp"] and name in METHODS
    config = base.changed("methods", method=name, hidden=(5,), batch_size=8, ramp_start=0.0)
    sampler = data.Sampler(len(digits.train), 8)
    _, step, state = runs.pieces(config, "mlp", digits, sampler)
    state = state.replace(step=jnp.asarray(100, jnp.int32))
    gradient, metrics, _ = jax.jit(step.gradients)(state, data.batch_of(digits, sampler, 0))
    assert np.isfinite(metrics.loss) and metrics.eps > 0 and metrics.beta > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if name == "convex_polytope_50":
        with pytest.raises(errors.JaxboundError, match="estimate"):
            runs.test_errors(config, state.apply_fn, {"params": state.params}, digits, 0.01, [name], "test")
