"""Several processes train one model to the numbers of one process; what a precision for the natural loss changes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb
from jaxbound import errors
from jaxbound.training import data, models
from jaxbound.training.losses import MarginLoss, Objective
from jaxbound.training.modes import train_pass
from jaxbound.training.step import sharded, spread, whole_batch

ROOT = Path(__file__).resolve().parents[1]

# --- processes --------------------------------------------------------------------------------------------------------


def test_a_spread_batch_is_the_batch_split_over_the_devices():
    batch = whole_batch(np.random.default_rng(0).random((16, 3), np.float32), np.arange(16, dtype=np.int32))
    found = spread(batch)
    jax.tree.map(np.testing.assert_array_equal, found, batch)
    for leaf in found:
        assert sorted(shard.index[0].start or 0 for shard in leaf.addressable_shards) == list(range(0, 16, 2))


def test_the_parts_of_two_processes_make_up_the_batch():
    whole = data.Sampler(60, 16, 3)
    parts = [data.Sampler(60, 16, 3, process, 2) for process in (0, 1)]
    for step in range(8):
        joined = [np.concatenate(columns) for columns in zip(*(part(step) for part in parts), strict=True)]
        jax.tree.map(np.testing.assert_array_equal, joined, list(whole(step)))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def train(output: Path, parallel: str, devices: int, *flags: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "experiments.train", "--config", "experiments/configs/digits.py", "--config.hidden=(8,)",
        "--config.epochs=2.0", "--config.ramp_start=0.5", "--config.ramp_epochs=1.0", "--config.interval=0.5",
        "--config.validation=100", "--config.pgd_steps=2", "--config.test_examples=64", "--config.batch_size=64",
        f"--config.parallel={parallel}", "--output", str(output), *flags,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": chosen}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> str:
    printed, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, complaints
    return printed


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "stops"), [("jit", [15]), ("pmap", [])])
def test_two_processes_train_the_model_of_one(tmp_path, parallel, stops):
    """Two processes of two devices each, joined by gloo, against one of four; stopped on the way, they go on alike."""
    alone = json.loads(ended(train(tmp_path / "alone", parallel, 4)).splitlines()[-1])
    for stop in [*([f"--stop_after={step}"] for step in stops), []]:
        port = free_port()
        joined = [f"--coordinator=localhost:{port}", "--processes=2"]
        both = [train(tmp_path / "both", parallel, 2, *joined, f"--process={k}", *stop) for k in (0, 1)]
        printed = [ended(process) for process in both]
        lines = [[line for line in text.splitlines() if line.startswith("{")] for text in printed]
        assert len(lines[0]) == 1 and not lines[1], "the first process speaks for both"
    together = json.loads(lines[0][0])
    assert {**together, "seconds": 0} == {**alone, "seconds": 0}
    folders = [tmp_path / name / "digits" / "mlp" for name in ("alone", "both")]
    one, other = (dict(np.load(folder / "variables.npz")) for folder in folders)
    assert one.keys() == other.keys() and len(one) == 4
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5)
    records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    steps = [[record["step"] for record in part] for part in records]
    assert steps[1] == sorted(steps[0] + stops), "one file of records, written by one process"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run on one device ends with: its folder and its line of JSON."""
    output = tmp_path_factory.mktemp("alone")
    return output / "digits" / "mlp", json.loads(ended(train(output, "pmap", 1, *SHORT)).splitlines()[-1])


SHORT = ("--config.epochs=0.6", "--config.ramp_start=0.2", "--config.ramp_epochs=0.3", "--config.interval=0.3",
         "--config.method=ibp")  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_train_by_pmap_to_the_numbers_of_one(tmp_path, alone, devices):
    folder, one = alone
    several = json.loads(ended(train(tmp_path, "pmap", devices, *SHORT)).splitlines()[-1])
    assert (one["devices"], several["devices"]) == ("1 cpu", f"{devices} cpu")
    other = dict(np.load(tmp_path / "digits" / "mlp" / "variables.npz"))
    for name, values in np.load(folder / "variables.npz").items():
        np.testing.assert_allclose(other[name], values, rtol=1e-4, atol=1e-5)


def test_pmap_is_what_several_devices_run_by_default():
    from jaxbound.training import runs
    from jaxbound.training.configuration import Configuration

    assert Configuration().parallel == "pmap"
    assert (runs.parallel_of(Configuration()), runs.parallel_of(Configuration(parallel="jit"))) == ("pmap", "jit")
    assert runs.model_of(Configuration(), "resnet", data.described("digits")).axis_name == "devices"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        assert runs.parallel_of(Configuration()) == "jit", "one device has nothing to share"
        assert runs.model_of(Configuration(), "resnet", data.described("digits")).axis_name is None


# --- precision --------------------------------------------------------------------------------------------------------

MODEL = models.MLP((8,))


def parts(dtype):
    x = jax.random.uniform(jax.random.key(1), (6, 4))
    labels, keys = jnp.arange(6), jax.random.split(jax.random.key(2), 6)
    objective = Objective(MODEL.apply, MarginLoss(jb.IBP()), natural_dtype=dtype)

    def loss(variables):
        found = objective(variables, x, labels, 0.05, 0.5, 0.0, keys)
        return found.loss.sum(), found

    variables = MODEL.init(jax.random.key(0), x)
    return variables, *jax.jit(jax.grad(loss, has_aux=True))(variables)


def test_only_the_natural_part_is_computed_in_half_precision():
    variables, gradient, full = parts(None)
    _, coarse, half = parts(jnp.bfloat16)
    assert np.any(half.natural != full.natural), "it is used"
    np.testing.assert_allclose(half.natural, full.natural, rtol=3e-2)
    np.testing.assert_array_equal(half.robust, full.robust)
    np.testing.assert_array_equal(half.unverified, full.unverified)
    for one, other, own in zip(*map(jax.tree.leaves, (coarse, gradient, variables)), strict=True):
        assert one.dtype == own.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=0.03 * float(jnp.max(jnp.abs(other))))


def test_statistics_keep_their_precision():
    model, x = models.ResNet((2,), dense=4), jnp.zeros((2, 6, 6, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = jax.eval_shape(lambda v: train_pass(model.apply, v, x, dtype=jnp.bfloat16), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_certificates_are_never_in_half_precision():
    """The network that is certified does not know of the training's precision, and half precision is refused."""
    from experiments.configs import base
    from jaxbound.training import runs

    config = base.changed("half", natural_dtype="bfloat16", method="ibp", hidden=(4,))
    digits = data.load("digits")
    sampler = data.Sampler(len(digits.train), 256)
    model, step, state = runs.pieces(config, "mlp", digits, sampler)
    assert step.objective.natural_dtype == jnp.bfloat16
    moved = jax.eval_shape(sharded(step, jax.devices()[:1]), state, data.batch_of(digits, sampler, 0))[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(moved.params)} == {jnp.dtype("float32")}
    x = digits.images(digits.test.x[:2])
    assert jax.eval_shape(model.apply, {"params": state.params}, x).dtype == jnp.float32
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"params": state.params})
    with pytest.raises(errors.JaxboundError, match="bfloat16"):
        jb.certify(coarse, x.astype(jnp.bfloat16), digits.test.labels[:2], 0.01, method=jb.IBP(), apply_fn=model.apply)
