"""Networks whose sums cancel, run in every order: do bounds with `rounding="execution"` hold all values?

    python -m experiments.execution --networks 10000 --trees 100
    python -m experiments.execution --networks 1000 --activation gelu

Each network has 1 to 6 layers of weights over 16 decades, the last of each product undoing the others but for 1e-6, and
an activation between them, by default ReLU. At a point it is bounded, and run in single precision along random
summation trees, and in random orders with fused multiply-add (the activation by JAX); and by JAX itself, compiled, in
batches and, one in ten, eagerly. Printed are the values, how many lie outside, and how wide the bounds are beside the
values' spread. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from experiments import networks

WIDTH, INPUTS, OUTPUTS, DECADES, MOST = 8, 6, 3, 16, 6
Layers = list[tuple[np.ndarray, np.ndarray]]


@functools.cache
def network(activation: str) -> Callable:
    """Dense layers with an activation between."""

    def values(params, x):
        for kernel, bias in params[:-1]:
            x = networks.activation(activation)(x @ kernel + bias)
        kernel, bias = params[-1]
        return x @ kernel + bias

    return values


def drawn(rng: np.random.Generator, depth: int, count: int) -> tuple[Layers, np.ndarray]:
    """Networks of one depth, stacked, and a point for each."""
    layers = []
    for inside, outside in itertools.pairwise((INPUTS, *[WIDTH] * (depth - 1), OUTPUTS)):
        kernel = rng.normal(size=(count, inside, outside)) * 10.0 ** rng.uniform(-DECADES, 0, (count, inside, outside))
        kernel[:, -1] = -kernel[:, :-1].sum(1) * (1 + 1e-6 * rng.normal(size=(count, outside)))
        bias = rng.normal(size=(count, outside)) * 10.0 ** rng.uniform(-DECADES, 0, (count, outside))
        layers.append((kernel.astype(np.float32), bias.astype(np.float32)))
    return layers, rng.uniform(0.9, 1.1, (count, INPUTS)).astype(np.float32)


def activated(activation: str, x: np.ndarray) -> np.ndarray:
    """What JAX makes of a layer's values, which come from elsewhere."""
    return np.maximum(x, 0) if activation == "relu" else np.asarray(_compiled(activation)(x))


@functools.cache
def _compiled(activation: str) -> Callable:
    return jax.jit(networks.activation(activation))


def along_trees(
    layers: Layers, x: np.ndarray, rng: np.random.Generator, trees: int, activation: str = "relu"
) -> np.ndarray:
    """The values (trees, outputs) of one network along random summation trees."""
    x = np.broadcast_to(x, (trees, *x.shape))
    for number, (kernel, bias) in enumerate(layers):
        terms = np.concatenate([x[:, :, None] * kernel, np.broadcast_to(bias, (trees, 1, bias.size))], axis=1)
        terms = rng.permuted(terms, axis=1)
        while terms.shape[1] > 1:
            k = rng.integers(terms.shape[1] - 1)
            terms[:, k] += terms[:, k + 1]
            terms = np.delete(terms, k + 1, axis=1)
        x = terms[:, 0] if number == len(layers) - 1 else activated(activation, terms[:, 0])
    return x


def fused(layers: Layers, x: np.ndarray, rng: np.random.Generator, orders: int, activation: str = "relu") -> np.ndarray:
    """The values (orders, outputs) of one network with fused multiply-add, in random orders."""
    x = np.broadcast_to(x, (orders, *x.shape))
    for number, (kernel, bias) in enumerate(layers):
        order = rng.permuted(np.broadcast_to(np.arange(len(kernel)), (orders, len(kernel))), axis=1)
        total = np.zeros((orders, bias.size), np.float32)
        for place in order.T:
            exact = np.take_along_axis(x, place[:, None], 1).astype(np.float64) * kernel[place].astype(np.float64)
            total = (exact + total).astype(np.float32)
        total = total + bias
        x = total if number == len(layers) - 1 else activated(activation, total)
    return x


def examined(depth: int, count: int, trees: int, seed: int, activation: str = "relu") -> dict:
    """What was found of networks of one depth."""
    rng = np.random.default_rng([seed, depth])
    layers, points = drawn(rng, depth, count)
    found, values_of = {}, network(activation)
    for method in (jb.IBP(), jb.Crown()):
        one = jax.jit(jax.vmap(lambda p, x, m=method: jb.bound(values_of, m, rounding="execution")(p, jb.Box(x, x))))
        found[type(method).__name__] = [np.asarray(end, np.float64) for end in jax.tree.leaves(one(layers, points))]
    batched = np.asarray(jax.jit(jax.vmap(values_of))(layers, points))
    single = jax.jit(values_of)
    row = {"depth": depth, "networks": count, "values": 0, "outside": 0}
    spreads = {name: [] for name in found}
    for k in range(count):
        own = [(kernel[k], bias[k]) for kernel, bias in layers]
        runs = [make(own, points[k], rng, trees, activation) for make in (along_trees, fused)] + [batched[k : k + 1]]
        runs.append(np.asarray(single(own, points[k]))[None])
        if k % 10 == 0:
            runs.append(np.asarray(values_of(own, jnp.asarray(points[k])))[None])
            runs.append(np.asarray(jax.vmap(functools.partial(values_of, own))(jnp.stack([points[k]] * 3)))[:1])
        values = np.concatenate(runs).astype(np.float64)
        row["values"] += values.size
        for name, (low, high) in found.items():
            row["outside"] += int(((values < low[k]) | (values > high[k])).sum())
            spread = np.ptp(values, axis=0)
            spreads[name].extend((high[k] - low[k])[spread > 0] / spread[spread > 0])
    row |= {
        f"width of {name} / spread, median": float(np.median(ratios or [np.nan])) for name, ratios in spreads.items()
    }
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--trees", type=int, default=100, help="and as many orders with fused multiply-add")
    parser.add_argument("--activation", choices=networks.ACTIVATIONS, default="relu", help="between the layers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows, started = [], time.perf_counter()
    for depth in range(1, MOST + 1):
        count = options.networks // MOST + (depth <= options.networks % MOST)
        if count:
            rows.append(examined(depth, count, options.trees, options.seed, options.activation))
            print(", ".join(f"{name} {value:.6g}" for name, value in rows[-1].items()), flush=True)
    total = {name: sum(row[name] for row in rows) for name in ("networks", "values", "outside")}
    print(json.dumps({**total, "seconds": time.perf_counter() - started, "rows": rows}))


if __name__ == "__main__":
    main()
