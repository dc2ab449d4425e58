"""The recipes of docs/bring_your_network.md that need another framework: each runs where that is installed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # Keras saves so
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's exporters do
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*HDF5"),  # Keras prefers its own form of files
]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bring_your_network.md"
RECIPES = {
    match[2]: match[1]
    for match in re.finditer(r"^```py\n(import (\w+)\n.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
}


def test_recipes_are_short():
    blocks = re.findall(
        r"^```py(?:thon)?\n(.*?)^```", PAGE.read_text(encoding="utf-8").partition("## PyTorch")[2], re.M | re.S
    )
    assert set(RECIPES) == {"torch", "keras"} and max(block.count("\n") for block in blocks) <= 10


@pytest.mark.parametrize("framework", RECIPES)
def test_a_recipe(framework, tmp_path):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    module = pytest.importorskip(framework)
    if framework == "keras" and module.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend: set KERAS_BACKEND=jax")
    exec(
        compile(RECIPES[framework], str(PAGE), "exec"), {"folder": tmp_path, "x": jnp.ones((2, 4)), "jb": jb, "np": np}
    )


def test_the_older_exporter_of_torch(tmp_path):
    pytest.importorskip("torch")
    code = RECIPES["torch"].replace("dynamo=True", "dynamo=False")
    assert code != RECIPES["torch"]
    exec(compile(code, str(PAGE), "exec"), {"folder": tmp_path, "x": jnp.ones((2, 4)), "jb": jb, "np": np})


def test_weights_of_torch_in_flax(tmp_path):
    """A convolution, too: kernels in Flax's order of axes, and channels last behind it."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file
    from safetensors.torch import save_file

    layers = torch.nn.Conv2d(2, 3, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(27, 4)
    theirs = torch.nn.Sequential(*layers).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    ours = nn.Sequential([nn.Conv(3, (3, 3), 2, "VALID"), nn.relu, lambda x: x.reshape(len(x), -1), nn.Dense(4)])
    dense = stored["3.weight"].reshape(4, 3, 3, 3).transpose(2, 3, 1, 0).reshape(27, 4)  # channels first, then last
    params = {
        "layers_0": {"kernel": stored["0.weight"].transpose(2, 3, 1, 0), "bias": stored["0.bias"]},
        "layers_3": {"kernel": dense, "bias": stored["3.bias"]},
    }
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 2)).astype(np.float32)
    wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2).copy())).detach().numpy()
    np.testing.assert_allclose(ours.apply({"params": params}, x), wanted, rtol=1e-4, atol=1e-5)
    bounds = jb.ibp(params, x, 0.01, apply_fn=lambda params, x: ours.apply({"params": params}, x))
    assert np.all(bounds.lower <= wanted) and np.all(wanted <= bounds.upper)


def test_h5_files_of_keras(tmp_path):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    pytest.importorskip("h5py")
    from jaxbound.cli.networks import load

    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
    x = np.ones((2, 4), np.float32)
    for name in ("network.h5", "network.keras"):
        net.save(tmp_path / name)
        same = load(str(tmp_path / name))
        assert same.input_shape == (4,)
        np.testing.assert_allclose(np.asarray(same.params(x)), np.asarray(net(x)), rtol=1e-6)


def test_a_keras_file_on_the_command_line(tmp_path, capsys):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    pytest.importorskip("tyro")
    from jaxbound.cli.main import main

    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
    net.save(tmp_path / "network.keras")
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32), labels=np.zeros(2, int))
    files = [str(tmp_path / name) for name in ("network.keras", "x.npz")]
    assert main(["bounds", *files, "--eps", "0.1", "--method", "ibp"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 3
    (tmp_path / "network.keras").write_bytes(b"nothing")
    assert main(["explain", files[0]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
