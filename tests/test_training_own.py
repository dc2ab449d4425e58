"""Train your own: any module, arrays or a loader, any optimizer, a warm start; as a library and by the command."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbound as jb
from jaxbound.training import imported, runs
from jaxbound.training.configuration import Configuration
from jaxbound.training.losses import MarginLoss
from jaxbound.training.own import train
from jaxbound.training.schedules import Epsilon

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)
X = np.clip(0.8 * np.eye(3)[LABELS].repeat(2, axis=1) + 0.1 * RNG.random((60, 6)), 0, 1).astype(np.float32)
RADIUS = Epsilon(0.05, start=5, length=20)


class Net(nn.Module):
    """A network of the user's."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class NNXNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def trained(model, examples, **options):
    common = {"steps": 40, "optimizer": optax.adam(0.05), "term": MarginLoss(jb.IBP()), "batch_size": 24}
    return train(model, examples, RADIUS, **{**common, **options})


def verified_error(result) -> float:
    return jb.certify(result.state, X, LABELS, 0.05, method=jb.IBP(), clip=(0.0, 1.0)).verified_error


@pytest.mark.parametrize("model", [Net(), NNXNet(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_a_module_and_arrays_are_enough(model):
    assert verified_error(trained(model, (X, LABELS))) < 0.2


def test_a_loader_gives_batches_and_begins_again():
    """Three of the five batches' kinds: mappings, pairs, and a last batch that is smaller and filled up."""
    batches = [{"image": X[k : k + 24], "label": LABELS[k : k + 24]} for k in (0, 24)] + [(X[48:], LABELS[48:])]
    assert verified_error(trained(Net(), batches)) < 0.2
    with pytest.raises(jb.ArgumentError, match="ends before step 3"):
        trained(Net(), iter(batches))
    assert int(trained(Net(), iter(batches), steps=3).state.step) == 3


def test_filling_up_changes_nothing():
    """One batch of 12 after one of 24 moves the parameters as 12 examples do."""
    first, last = (X[:24], LABELS[:24]), (X[24:36], LABELS[24:36])
    straight = trained(Net(), [first, last], steps=2, optimizer=optax.sgd(0.1))
    doubled = trained(Net(), [first, tuple(np.concatenate([part, part]) for part in last)], steps=2,
                      optimizer=optax.sgd(0.1))  # fmt: skip
    for one, other in zip(*map(jax.tree.leaves, (straight.variables, doubled.variables)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_warm_start_begins_where_another_run_ended():
    before = trained(Net(), (X, LABELS))
    after = trained(Net(), (X, LABELS), start=before.variables, steps=1, optimizer=optax.sgd(0.0))
    jax.tree.map(np.testing.assert_array_equal, after.variables, before.variables)
    with pytest.raises(jb.ArgumentError, match=r"^start"):
        trained(nn.Dense(3), (X, LABELS), start=before.variables)


def test_the_same_call_goes_on(tmp_path):
    straight = trained(Net(), (X, LABELS))
    trained(Net(), (X, LABELS), folder=tmp_path, steps=13)
    again = trained(Net(), (X, LABELS), folder=tmp_path, interval=4)
    jax.tree.map(np.testing.assert_array_equal, again.variables, straight.variables)


@pytest.mark.parametrize(
    ("examples", "said"),
    [((X.astype(np.uint8), LABELS), "divided by 255"), ((X, LABELS[:5]), "a class number for each"), ([], "no batches"),
     ([{"x": X, "target": LABELS}], "name the parts"), ([(X[:20], LABELS[:20]), (X, LABELS)], "largest"),
     ((X + 1, LABELS), "outside the clip box")],
)  # fmt: skip
def test_examples_that_cannot_be_used_are_named(examples, said):
    with pytest.raises(jb.ArgumentError, match=said):
        trained(Net(), examples)


# --- by the command ---------------------------------------------------------------------------------------------------

MODULE = """
import flax.linen as nn
import numpy as np

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))

net, number = Net(), 3

def data():
    with np.load("own.npz") as arrays:
        return (arrays["x"], arrays["labels"]), (arrays["test_x"], arrays["test_labels"])
"""


@pytest.fixture
def _own(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(MODULE, encoding="utf-8")
    np.savez(tmp_path / "own.npz", x=X[:40], labels=LABELS[:40], test_x=X[40:], test_labels=LABELS[40:])
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_network", None)


@pytest.mark.usefixtures("_own")
def test_data_by_an_import_path_or_in_a_file(tmp_path):
    one, other = imported.dataset("own_network:data"), imported.dataset("own.npz")
    for found in (one, other):
        assert (len(found.train), len(found.test), found.shape, found.classes) == (40, 20, (6,), 3)
        np.testing.assert_array_equal(found.images(found.test.x), X[40:])
    assert len(runs.dataset_of(Configuration(dataset="own.npz", train_examples=7)).train) == 7
    np.savez("less.npz", x=X, labels=LABELS)
    for call, said in (
        (lambda: imported.dataset("less.npz"), "lacks test_x, test_labels"),
        (lambda: imported.dataset("own_network:number"), "is a int"),
        (lambda: imported.network("own_network:number"), "name a Linen or an NNX module"),
        (lambda: imported.network("own_network:nothing"), "cannot be imported"),
        (lambda: imported.dataset("nothing.npz"), "cannot be read"),
        (lambda: runs.dataset_of(Configuration(dataset="own.npz", train_examples=70)), "is 70 of 40"),
    ):
        with pytest.raises(jb.ArgumentError, match=said):
            call()


@pytest.mark.usefixtures("_own")
def test_the_command_trains_evaluates_and_starts_warm(tmp_path, capsys):
    pytest.importorskip("tyro")
    from jaxbound.cli.main import main

    flags = ["--models", "own_network:net", "--dataset", "own_network:data", "--method", "ibp", "--pgd-steps", "2",
             "--batch-size", "24", "--epochs", "2", "--ramp-start", "0", "--ramp-epochs", "1", "--watch", "16"]  # fmt: skip
    assert main(["train", "--output", "out", "--name", "own", *flags, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["runs"]
    folder = Path("out") / "own" / "own_network-net"
    assert Path(result["folder"]) == folder and result["model"] == "own_network:net"
    assert main(["evaluate", str(folder), "--pgd-steps", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["verified_error"] == result["verified_error"]
    start = ["--warm-start", str(folder), "--name", "warm", "--learning-rate", "0"]
    assert main(["train", "--output", "out", *start, *flags, "--json"]) == 0
    one, other = (runs.trained(Path("out") / name / "own_network-net")[1] for name in ("own", "warm"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert main(["train", "--output", "out", *start, "--dataset", "digits", "--name", "other"]) == 2
    assert "warm_start has arrays of shapes" in capsys.readouterr().err


def test_values_are_refused_before_anything_is_loaded():
    for field, value in (("method", "crwn"), ("loss", "margin"), ("parallel", "none"), ("lower_slope", "two"),
                         ("clip", (1.0, 0.0)), ("verify_with", "pgd")):  # fmt: skip
        with pytest.raises(jb.ArgumentError, match=field):
            Configuration(**{field: value})
    with pytest.raises(jb.ArgumentError, match="did you mean 'mlp'"):
        runs.chosen_models(Configuration(models=("mpl",)))


def test_slopes_of_the_training_bounds_are_options():
    config = Configuration(method="crown_ibp_alone", lower_slope="zero")
    assert dataclasses.asdict(config)["lower_slope"] == "zero"
    assert runs.term_of(config).method == jb.CrownIBP(lower_slope="zero", intersect=False)
    with pytest.raises(jb.ArgumentError, match="ibp has no such option"):
        runs.term_of(Configuration(method="ibp", lower_slope="zero"))
    assert runs.term_of(Configuration(clip=())).clip is None and jnp.ndim(0.0) == 0
