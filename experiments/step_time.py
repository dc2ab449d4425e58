"""Time and memory of one training step: `python -m experiments.step_time`.

    python -m experiments.step_time --model A B DM-small --loss natural ibp crown_ibp fused
    python -m experiments.step_time --model DM-large --loss crown_ibp --data cifar --batch 32

A row per network and loss, each measured in a process of its own, with random images and the radius in the middle of
its ramp, Adam and everything else that a step of `experiments.train` does, on one device. Beside wall and CPU seconds
stand those of a float32 matrix product of 1024 x 1024 x 1024 in the same process, and the most memory that the process
held. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from benchmarks import measure
from experiments import tables
from jaxbound.methods.named import method_named
from jaxbound.training import fusion, losses, models
from jaxbound.training.schedules import Epsilon
from jaxbound.training.step import Schedules, Step, create, everywhere, sharded, whole_batch

SHAPES = {"mnist": (28, 28, 1), "cifar": (32, 32, 3)}
LOSSES: dict[str, losses.Term | None] = {
    "natural": None,
    "ibp": losses.MarginLoss(jb.IBP()),
    "crown_ibp": losses.MarginLoss(),
    "fused": fusion.FusedLoss(),
    **{
        name: losses.MarginLoss(method_named(name))
        for name in ("convex_polytope", "convex_polytope_10", "convex_polytope_50")
    },
}
RAMP = Epsilon(0.3, start=0, length=10_000)


def step_of(name: str, loss: str, shape: Sequence[int], size: int, accumulate: int = 1) -> Callable[[int], jax.Array]:
    """A function that takes one more step, whatever number it is given, and returns its loss."""
    model = models.network(name)
    objective = losses.Objective(model.apply, LOSSES[loss])
    step = Step(objective, Schedules.of(RAMP), accumulate=accumulate, phase="robust")
    state = create(model, np.zeros((1, *shape), np.float32), optax.adam(5e-4), jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = whole_batch(rng.random((size, *shape), np.float32), rng.integers(0, 10, size, np.int32))
    device = jax.devices()[:1]
    held = [everywhere(state.replace(step=jnp.asarray(RAMP.end // 2, jnp.int32)), device)]
    taken = sharded(step, device)

    def run(_: int) -> jax.Array:
        held[0], metrics = taken(held[0], batch)
        return metrics.loss

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=models.ARCHITECTURES, default=["A", "B", "DM-small"])
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=["natural", "ibp", "crown_ibp"])
    parser.add_argument("--data", choices=SHAPES, default="mnist", help="whose shape the images have")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    parser.add_argument("--output", type=Path, help="folder for the table, step_time.md")
    options = parser.parse_args(arguments)
    pairs = [(name, loss) for name in options.model for loss in options.loss]
    if len(pairs) == 1:
        ((name, loss),) = pairs
        run = step_of(name, loss, SHAPES[options.data], options.batch, options.accumulate)
        rows = [measure.row(f"{name} {loss} {options.data} {options.batch}", run)]
        print(line(rows[0]))
    else:
        same = ["--data", options.data, "--batch", str(options.batch), "--accumulate", str(options.accumulate)]
        rows = []
        for name, loss in pairs:
            command = [sys.executable, "-m", "experiments.step_time", "--model", name, "--loss", loss, *same]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows += json.loads(done.stdout.splitlines()[-1])
            print(line(rows[-1]), flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "step_time.md").write_text(by_loss(rows) + "\n", encoding="utf-8")
    print(json.dumps(rows))


def by_loss(rows: Sequence[dict]) -> str:
    """Table G: wall seconds of a step, a line per network and data set, a column per loss."""
    found = {tuple(row["task"].split()): row["wall_seconds"] for row in rows}
    kinds = list(dict.fromkeys(task[1] for task in found))
    lines = dict.fromkeys((task[0], *task[2:]) for task in found)
    body = [[*at, *(f"{found[at[0], loss, *at[1:]]:.3f}" for loss in kinds)] for at in lines]
    return tables.table(["model", "data", "batch", *kinds], body)


def line(row: dict) -> str:
    """A row as text."""
    times = f"wall {row['wall_seconds']:.4f} s, CPU {row['cpu_seconds']:.4f} s, compile {row['compile_seconds']:.1f} s"
    product = f"product {row['calibration_wall_seconds']:.4f} / {row['calibration_cpu_seconds']:.4f} s"
    return f"{row['task']:30} {times}, {product}, at most {row['peak_mb']:.0f} MB"


if __name__ == "__main__":
    main()
