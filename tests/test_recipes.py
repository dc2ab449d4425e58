"""The recipes of docs/bring_your_network.md that need another framework: each runs where that is installed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras saves so

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
