"""Data sets in batches, from files and by several processes: the same radii and certificates as at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxbound as jb

sys.path.insert(0, str(Path(__file__).parent))
from processes import problem

HOW = {"method": jb.IBP(), "activation": "relu"}


def test_radii_of_a_data_set_in_batches(tmp_path, capsys):
    layers, x, labels = problem()
    whole = np.asarray(jb.certified_radius(layers, x, labels, steps=5, **HOW))
    path = tmp_path / "radius.npz"
    for _ in range(2):  # the second time all is read
        found = jb.certified_radius(layers, x, labels, steps=5, batch_size=2, results=path, progress=True, **HOW)
        np.testing.assert_array_equal(found, whole)
    assert "certified_radius" in capsys.readouterr().err
    with pytest.raises(jb.ArgumentError, match="results of another computation"):
        jb.certified_radius(layers, x, labels, steps=6, batch_size=2, results=path, **HOW)
    with pytest.raises(jb.ArgumentError, match="this function did not write"):
        jb.certify(layers, x, labels, 0.01, batch_size=2, results=path, **HOW)
    with pytest.raises(jb.ArgumentError, match="batch_size is 0"):
        jb.certified_radius(layers, x, labels, batch_size=0, **HOW)


@pytest.mark.slow
def test_two_processes_share_a_data_set(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(root / "tests" / "processes.py")]
    running = [
        subprocess.Popen([*command, str(k), str(port), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for k in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()[-2000:]
    layers, x, labels = problem()
    report = jb.certify(layers, x, labels, 0.01, **HOW)
    radius = jb.certified_radius(layers, x, labels, steps=5, **HOW)
    for k in range(2):
        assert (tmp_path / f"certify.{k}-of-2.npz").exists()
        with np.load(tmp_path / f"{k}.npz") as found:
            np.testing.assert_allclose(found["margins"], report.margins, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(found["verified"], report.verified)
            np.testing.assert_allclose(found["radius"], radius, rtol=1e-5)
