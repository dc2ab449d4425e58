"""Figures 1 and 2 of the FROWN paper: `python -m experiments.frown_figures`.

    figure_1    lines around three neurons' ReLU, tuned for each bound of the next layer apart: each is best for that
                bound alone, so that one line for all of them loses
    figure_2    which lines there are to choose from, around sigmoid and ReLU: the lower ones that `Frown` tunes among

The network of Figure 1 is a small one with random weights. Writes figure_1.png and figure_2.png; the last line printed
is JSON: how much tighter the bounds of Figure 1 are than CROWN's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from experiments import require, tables
from jaxbound.methods import SlopeRule

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
INTERVALS: dict[str, tuple[Callable, float, float]] = {
    "sigmoid": (jax.nn.sigmoid, -3.0, 4.0),
    "relu": (jax.nn.relu, -2.0, 3.0),
}


@dataclass(frozen=True)
class Part(SlopeRule):
    """A part of the way from the flattest to the steepest lower slope that can gain anything."""

    share: float

    def lines(self, choice):
        """The slopes."""
        low, high = choice.range
        return low + self.share * (high - low), choice.hull[1]


def lower_lines(function: Callable, low: float, high: float) -> list[tuple[float, float]]:
    """Slopes and intercepts of lower lines, from the flattest to the steepest."""
    found = [jb.linear_bounds(function, jb.Crown(lower_slope=Part(s)))(jb.Box(low, high)) for s in SHARES]
    return [(float(slope), float(start)) for slope, start, _, _ in map(jax.tree.leaves, found)]


def figure_2(path: Path) -> None:
    """Sigmoid's lines above are those below, turned about its centre: sigmoid(-z) = 1 - sigmoid(z)."""
    with tables.figure(path, len(INTERVALS)) as panels:
        for panel, (name, (function, low, high)) in zip(panels, INTERVALS.items(), strict=True):
            z = np.linspace(low, high, 200)
            panel.plot(z, np.asarray(function(z)), "k", label=name)
            if name == "sigmoid":
                above = [(slope, 1 - start) for slope, start in lower_lines(function, -high, -low)]
            else:
                slope = high / (high - low)
                above = [(slope, -slope * low)]
            for lines, color, side in ((lower_lines(function, low, high), "C2", "below"), (above, "C1", "above")):
                for number, (slope, start) in enumerate(lines):
                    panel.plot(z, slope * z + start, color, linewidth=0.8, label="" if number else f"lines {side}")
            panel.set_ylim(function(low) - 0.5, function(high) + 0.5)
            panel.legend(fontsize=8)


def tuned(seed: int, steps: int) -> tuple[list, list, float]:
    """For each of three neurons its interval and the slopes below it, one per bound of the next layer; and the gain."""
    rng = np.random.default_rng(seed)
    first, second = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3), (3, 3)))
    box = jb.Box(jnp.full(2, -1.0), jnp.ones(2))

    def network(x):
        return jax.nn.relu(x @ first) @ second

    (inputs,) = jb.pre_activation_bounds(network, jb.Crown())(box).values()
    bounds, slopes = jb.tune(network, jb.Frown(steps, groups="neuron"))(box)
    below, _ = next(iter(slopes.values()))
    width = float((bounds.upper - bounds.lower).mean())
    crown = jb.bound(network, jb.Crown())(box)
    intervals = [(float(low), float(high)) for low, high in zip(inputs.lower, inputs.upper, strict=True)]
    return intervals, np.asarray(below).T.tolist(), 1 - width / float((crown.upper - crown.lower).mean())


def figure_1(path: Path, intervals: Sequence, slopes: Sequence) -> None:
    """A panel per neuron: ReLU, the line above, and a line below for each bound."""
    with tables.figure(path, len(intervals)) as panels:
        for panel, (low, high), chosen in zip(panels, intervals, slopes, strict=True):
            z = np.linspace(low, high, 200)
            panel.plot(z, np.maximum(z, 0), "C0", label="ReLU")
            panel.plot(z, max(high, 0) / (high - low) * (z - min(low, 0)), "C1", label="line above")
            for number, slope in enumerate(chosen):
                panel.plot(z, slope * z, "C2", linewidth=0.8, label="" if number else "lines below, one per bound")
        panels[0].legend(fontsize=8)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of FROWN's tuning")
    parser.add_argument("--seed", type=int, default=0, help="of the network's weights")
    parser.add_argument("--output", type=Path, default=Path("results/frown_figures"), help="folder for the figures")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps is 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, draw and print."""
    options = parse(arguments)
    require("matplotlib")
    options.output.mkdir(parents=True, exist_ok=True)
    intervals, slopes, gain = tuned(options.seed, options.steps)
    figure_1(options.output / "figure_1.png", intervals, slopes)
    figure_2(options.output / "figure_2.png")
    print(json.dumps({"tighter_than_crown": gain, "intervals": intervals, "slopes": slopes}))


if __name__ == "__main__":
    main()
