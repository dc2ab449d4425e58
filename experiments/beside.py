"""How wide bounds of networks that are not chains are, beside auto_LiRPA's: `python -m experiments.beside`.

    python -m experiments.beside --rival CHECKOUT --rival-python PYTHON

Recurrent networks (LSTM and GRU over --steps steps), gated units, and a chain of leaky ReLUs, of several widths, with
the same random weights on both sides, in float64. Each is bounded over balls by CROWN, CROWN-IBP and forward linear
bounds. A row gives the ratio of the mean widths (below 1: ours is tighter), its least and greatest over the outputs,
and by how much values leave the bounds of either side (0: they do not), at random points, at corners and where the
tangents at the example are steepest. auto_LiRPA runs in a process of its own, with a Python that has PyTorch. Ends with
1 if a ratio of a bound that holds on both sides is above --limit. Writes beside.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NORMS = {np.inf: 0.05, 2.0: 0.15, 1.0: 0.3}
"""The radius for each norm."""
METHODS = {"crown": "CROWN", "crown_ibp": "CROWN-IBP", "forward": "forward"}
"""What its methods are called there."""
INPUTS, OUTPUTS, EXAMPLES = 6, 5, 3

Ops = Any  # sigmoid, tanh, leaky_relu and zeros of one of the libraries


def lstm(x: Any, w: dict, ops: Ops):
    """The last state of an LSTM, over steps of INPUTS numbers each."""
    width = w["out"].shape[0]
    hidden = cell = ops.zeros(x, width)
    for step in range(x.shape[1] // INPUTS):
        gates = x[:, step * INPUTS : (step + 1) * INPUTS] @ w["read"] + hidden @ w["again"] + w["bias"]
        take, keep, give = (ops.sigmoid(gates[:, k * width : (k + 1) * width]) for k in (0, 1, 3))
        cell = keep * cell + take * ops.tanh(gates[:, 2 * width : 3 * width])
        hidden = give * ops.tanh(cell)
    return hidden @ w["out"]


def gru(x: Any, w: dict, ops: Ops):
    """The last state of a GRU."""
    width = w["out"].shape[0]
    hidden = ops.zeros(x, width)
    for step in range(x.shape[1] // INPUTS):
        read = x[:, step * INPUTS : (step + 1) * INPUTS] @ w["read"] + w["bias"]
        again = hidden @ w["again"]
        reset = ops.sigmoid(read[:, :width] + again[:, :width])
        update = ops.sigmoid(read[:, width : 2 * width] + again[:, width : 2 * width])
        new = ops.tanh(read[:, 2 * width : 3 * width] + reset * again[:, 2 * width : 3 * width])
        hidden = update * hidden + (1 - update) * new
    return hidden @ w["out"]


def gated(x: Any, w: dict, ops: Ops):
    """Two layers of gated linear units."""
    width = w["out"].shape[0]
    first = (x @ w["read"][: x.shape[1], :width]) * ops.sigmoid(x @ w["read"][: x.shape[1], width : 2 * width])
    second = (first @ w["again"][:, :width]) * ops.sigmoid(first @ w["again"][:, width : 2 * width])
    return second @ w["out"]


def leaky(x: Any, w: dict, ops: Ops):
    """A chain of Dense layers with leaky ReLU between."""
    width = w["out"].shape[0]
    hidden = ops.leaky_relu(x @ w["read"][: x.shape[1], :width] + w["bias"][:width])
    hidden = ops.leaky_relu(hidden @ w["again"][:, :width] + w["bias"][width : 2 * width])
    return hidden @ w["out"]


NETWORKS: dict[str, Callable] = {"lstm": lstm, "gru": gru, "gated": gated, "leaky": leaky}


def weights(name: str, width: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Normal weights, of variance 2 over the number of inputs; every network takes the part that it needs."""
    rng = np.random.default_rng([seed, width, steps, *name.encode()])
    rows = INPUTS if name in ("lstm", "gru") else INPUTS * steps

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) * np.sqrt(2 / shape[0])

    found = {"read": normal(rows, 4 * width), "again": normal(width, 4 * width), "out": normal(width, OUTPUTS)}
    return {**found, "bias": 0.1 * rng.normal(size=4 * width)}


# --- the two sides ----------------------------------------------------------------------------------------------------


def ours(name: str, w: dict, x: np.ndarray, method: str, norm: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the outputs, (examples, outputs) each."""
    import jax
    import jax.numpy as jnp

    import jaxbound as jb

    ops = types.SimpleNamespace(
        sigmoid=jax.nn.sigmoid, tanh=jnp.tanh, leaky_relu=lambda v: jax.nn.leaky_relu(v, 0.1),
        zeros=lambda v, width: jnp.zeros((v.shape[0], width), v.dtype),
    )  # fmt: skip
    made = {"crown": jb.Crown(), "crown_ibp": jb.CrownIBP(), "forward": jb.Forward()}[method]
    network = NETWORKS[name]
    found = jb.bound(lambda v: network(v[None], w, ops)[0], made)
    boxes = [jb.Box.around(v, NORMS[norm]) if norm == np.inf else jb.LpBall(v, NORMS[norm], norm) for v in x]
    ends = [found(region) for region in boxes]
    return np.stack([e.lower for e in ends]), np.stack([e.upper for e in ends])


def main_of_rival(checkout: str, task: str) -> None:
    """Bounds by auto_LiRPA: JSON of {method: {norm: [lower, upper]}}, null where it raised. Needs no JAX."""
    import warnings

    warnings.simplefilter("ignore")
    sys.path.insert(0, checkout)
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    torch.set_default_dtype(torch.float64)
    arrays = dict(np.load(task))
    name, x = str(arrays.pop("name")), torch.from_numpy(arrays.pop("x"))
    ops = types.SimpleNamespace(
        sigmoid=torch.sigmoid, tanh=torch.tanh, leaky_relu=torch.nn.LeakyReLU(0.1),
        zeros=lambda v, width: torch.zeros(v.shape[0], width, dtype=v.dtype),
    )  # fmt: skip

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = torch.nn.ParameterDict({k: torch.from_numpy(v) for k, v in arrays.items()})

        def forward(self, v: Any):
            return NETWORKS[name](v, self.held, ops)

    bounded, found = BoundedModule(Network(), x), {}
    for method, norm in itertools.product(METHODS, NORMS):
        ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=NORMS[norm]))
        try:
            ends = bounded.compute_bounds(x=(ball,), method=METHODS[method])
            answer = [end.detach().tolist() for end in ends]
        except Exception as error:
            print(f"{name}, {method}, {norm}: {type(error).__name__}: {error}", file=sys.stderr)
            answer = None
        found.setdefault(method, {})[str(norm)] = answer
    print(json.dumps(found))


def farthest(ways: np.ndarray, norm: float) -> np.ndarray:
    """The steps within the ball that go farthest in some directions: to a corner, along one axis, or straight."""
    if norm == np.inf:
        ways = np.sign(ways)
    elif norm == 1.0:
        ways = np.where(np.abs(ways) == np.abs(ways).max(axis=-1, keepdims=True), ways, 0)
    return _to_the_edge(ways, norm)


def _to_the_edge(ways: np.ndarray, norm: float) -> np.ndarray:
    return NORMS[norm] * ways / np.linalg.norm(ways, ord=norm, axis=-1, keepdims=True)


def points(x: np.ndarray, norm: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points at the edge of the ball around each example, in random directions, and corners; (count, *x.shape)."""
    ways = rng.normal(size=(count, *x.shape))
    return x + np.concatenate([farthest(ways[::2], norm), _to_the_edge(ways[1::2], norm)])


def steepest(name: str, w: dict, x: np.ndarray, norm: float) -> np.ndarray:
    """Where the tangent at each example is least and greatest on the ball, for each output; (2 OUTPUTS, *x.shape)."""
    moved = x[:, None] + 1e-6 * np.eye(x.shape[-1])
    slopes = (values(name, w, moved) - values(name, w, x[:, None])).transpose(2, 0, 1)
    steps = farthest(slopes, norm)
    return np.concatenate([x + steps, x - steps])


def outside(ends: tuple[np.ndarray, np.ndarray], found: np.ndarray) -> float:
    """The farthest that a value is outside its bounds."""
    return max(0.0, float(np.max(ends[0] - found)), float(np.max(found - ends[1])))


# --- the table --------------------------------------------------------------------------------------------------------


def compare(name: str, width: int, options: argparse.Namespace) -> list[dict]:
    """One row for each method and norm of a network."""
    w, rng = weights(name, width, options.steps, options.seed), np.random.default_rng(options.seed)
    x = rng.uniform(size=(EXAMPLES, INPUTS * options.steps))
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.npz"
        held: dict[str, Any] = {"name": name, "x": x, **w}
        np.savez(task, **held)
        command = [str(options.rival_python), __file__, "rival", str(options.rival), str(task)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"auto_LiRPA failed on {name}:\n{answer.stderr}")
    theirs, rows = json.loads(answer.stdout.splitlines()[-1]), []
    for method, norm in itertools.product(METHODS, NORMS):
        if theirs[method][str(norm)] is None:
            print(f"{name} of width {width}, {method}, norm {norm:g}: auto_LiRPA raises, not measured", file=sys.stderr)
            continue
        low, high = map(np.asarray, theirs[method][str(norm)])
        sides = ours(name, w, x, method, norm), (low, high)
        tried = np.concatenate([points(x, norm, options.points, rng), steepest(name, w, x, norm)])
        found = values(name, w, tried)
        ratio = (sides[0][1] - sides[0][0]) / (sides[1][1] - sides[1][0])
        rows.append({
            "network": name, "width": width, "steps": options.steps, "method": method, "norm": f"{norm:g}",
            "ratio": float(np.mean(sides[0][1] - sides[0][0]) / np.mean(sides[1][1] - sides[1][0])),
            "least": float(ratio.min()), "greatest": float(ratio.max()),
            "ours_outside": outside(sides[0], found), "theirs_outside": outside(sides[1], found),
        })  # fmt: skip
    return rows


def values(name: str, w: dict, x: np.ndarray) -> np.ndarray:
    """Of a network at points, (count, examples, outputs)."""
    ops = types.SimpleNamespace(
        sigmoid=lambda v: 1 / (1 + np.exp(-v)), tanh=np.tanh, leaky_relu=lambda v: np.where(v > 0, v, 0.1 * v),
        zeros=lambda v, width: np.zeros((v.shape[0], width)),
    )  # fmt: skip
    return NETWORKS[name](x.reshape(-1, x.shape[-1]), w, ops).reshape(*x.shape[:2], OUTPUTS)


def main() -> int:
    """Print and save the table; 1 if a ratio is above the limit."""
    from experiments import require, require_files, write_csv

    require("tqdm")
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m experiments.beside", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rival", type=Path, required=True, help="a checkout of auto_LiRPA")
    parser.add_argument("--rival-python", type=Path, required=True, help="a Python with PyTorch and what it needs")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--widths", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--steps", type=int, default=4, help="of the recurrent networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=2000, help="values to hold bounds against")
    parser.add_argument("--limit", type=float, default=1.001, help="the greatest ratio that passes")
    parser.add_argument("--output", type=Path, default=Path("experiments/runs/beside"))
    options = parser.parse_args()
    require_files(options.rival_python, options.rival / "auto_LiRPA" / "__init__.py")
    import jax

    jax.config.update("jax_enable_x64", True)
    networks = list(itertools.product(options.networks, options.widths))
    rows = [row for name, width in tqdm(networks, desc="networks") for row in compare(name, width, options)]
    form = "{network:8s}{width:6d}{method:>11s}{norm:>5s}{ratio:9.4f}{least:9.4f}{greatest:9.4f}"
    form += "{ours_outside:10.2g}{theirs_outside:10.2g}"
    print("network  width     method norm    ratio    least greatest  outside    theirs")
    print("\n".join(form.format(**row) for row in rows))
    write_csv(options.output / "beside.csv", rows)
    return int(any(row["ratio"] > options.limit and row["theirs_outside"] < 1e-9 for row in rows))


if __name__ == "__main__":
    sys.exit(main_of_rival(*sys.argv[2:]) if sys.argv[1:2] == ["rival"] else main())
