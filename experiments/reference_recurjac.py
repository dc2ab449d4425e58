"""Compare derivatives with arrays of the RecurJac code: `python -m experiments.reference_recurjac FOLDER`.

Reads `recurjac_<activation>.npz`, whose keys begin with the name of a chain of Dense layers (`NET|W0`, `NET|b0`, ...,
`NET|x0`), and computes in float64, with pre-activations by the same algorithm, what is in it for every network, norm
and radius:

    jacobian   ratio of mean widths of Jacobian bounds, ours over theirs, and how far --samples Jacobians are outside of
               ours (below 0: all are inside)
    margins, class, map  ratio of Lipschitz constants: each margin of the predicted class, its logit, all logits
    robust     ratio of certified radii against the runner-up; `disable` by bounds of values
    landscape  ratio of radii without a stationary point

Prints one line per network, norm, algorithm and method: the worst ratio over radii and rows, largest of widths and
constants, least of radii. Their forward recursion's constants in linf are too small (every row takes the first one's
sum) and are left out. Theirs are float32 and found by a bisection of their own: ratios within --limit of 1 pass.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from experiments.reference import ACTIVATIONS
from jaxbound import regions

LAYER_BOUNDS = {"crown-general": jb.Crown(), "crown-adaptive": jb.Crown(), "fastlin": jb.FastLin()}
_CONSTANTS = {"lip_margins": "margins", "lip_class_c": "class", "lip_all_logits": "map"}
_ROUNDED = 1e-6
"""What a mean width in float32 may lack: where signs are known all along, it is 0."""
_RADII = {"steps": 60, "tolerance": 1e-5}
_SLOPE = {"leaky": lambda z: jax.nn.leaky_relu(z, 0.3)}


class Network(NamedTuple):
    """One network of a file, and its arrays by the rest of their keys."""

    layers: list[tuple[jax.Array, jax.Array]]
    how: dict
    x: jax.Array
    arrays: dict[str, np.ndarray]

    @property
    def label(self) -> int:
        """The predicted class."""
        return int(self.arrays["c"])


def networks(path: Path) -> Iterator[tuple[str, Network]]:
    """All networks of a file by their names."""
    data, activation = np.load(path), path.stem.rpartition("_")[2]
    parts: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for key in data.files:
        name, _, rest = key.partition("|")
        parts[name][rest] = data[key]
    for name, arrays in parts.items():
        depth = sum(key[0] == "W" for key in arrays)
        layers = [(jnp.asarray(arrays[f"W{k}"], float), jnp.asarray(arrays[f"b{k}"], float)) for k in range(depth)]
        how = {"activation": (ACTIVATIONS | _SLOPE)[{"arctan": "atan"}.get(activation, activation)]}
        yield name, Network(layers, how, jnp.asarray(arrays["x0"], float)[None], arrays)


def method_of(name: str, algorithm: str) -> jb.RecurJac | jb.FastLip:
    """Recursion from the output (B, or no more than its name), from the input (F0, F1), or plain steps."""
    layers = LAYER_BOUNDS[algorithm]
    if name == "fastlip":
        return jb.FastLip(layers)
    return jb.RecurJac("forward" if "-F" in name else "backward", int(name.endswith("F1")), layers)


def sampled(network: Network, eps: float, norm: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest entries of Jacobians, half of them at random points and half at extreme ones."""

    def function(z):
        for kernel, bias in network.layers[:-1]:
            z = network.how["activation"](z @ kernel + bias)
        return z @ network.layers[-1][0] + network.layers[-1][1]

    ball, halves = jb.LpBall(network.x[0], eps, norm), jax.random.split(jax.random.key(0))
    points = [regions.sample(ball, key, (count // 2,), extremes=k == 1) for k, key in enumerate(halves)]
    found = jax.jit(jax.vmap(jax.jacrev(function)))(jnp.concatenate(points))
    return np.min(found, axis=0), np.max(found, axis=0)


def compare(network: Network, samples: int) -> Iterator[tuple[str, str, float, float]]:
    """`(case, what, ratio, how far samples are outside)` of every array, -inf where nothing was sampled."""
    seen: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for key in network.arrays:
        if key.endswith("|jac_lb") and key.split("|")[0] in LAYER_BOUNDS:
            algorithm, p, radius, name, _ = key.split("|")
            if (p, radius) not in seen:
                seen[p, radius] = sampled(network, float(radius[3:]), float(p[1:]), samples)
            for what, ratio, outside in derivatives(network, key.removesuffix("|jac_lb"), seen[p, radius]):
                yield _case(p, algorithm, name), what, ratio, outside
        elif key.startswith("robust|"):
            _, algorithm, p, name = key.split("|")
            yield _case(p, algorithm, name), "robust", certified(network, key), -np.inf
        elif key.startswith("landscape|"):
            _, algorithm, p, name, _ = key.split("|")
            found = jb.landscape_radius(
                network.layers, network.x, np.array([network.label]), norm=float(p[1:]), initial=0.1, **network.how,
                method=method_of(name, algorithm), **_RADII,
            )  # fmt: skip
            yield _case(p, algorithm, name), "landscape", float(np.asarray(found)[0] / network.arrays[key]), -np.inf


def _case(p: str, algorithm: str, name: str) -> str:
    return f"l{p[1:]:4s} {algorithm:15s} {name}"


def derivatives(network: Network, key: str, samples: tuple) -> Iterator[tuple[str, float, float]]:
    """`(what, ratio, how far samples are outside)` of a Jacobian and of its constants."""
    algorithm, p, radius, name = key.split("|")
    norm, method = float(p[1:]), method_of(name, algorithm)
    common = (network.layers, network.x, float(radius[3:]))
    bounds = jb.jacobian_bounds(*common, norm=norm, method=method, **network.how)
    low, high = (network.arrays[f"{key}|jac_{side}"] for side in ("lb", "ub"))
    assert bounds.upper is not None
    outside = max(np.max(bounds.lower[0] - samples[0]), np.max(samples[1] - bounds.upper[0]))
    ours, theirs = (max(float(np.mean(width)), _ROUNDED) for width in (bounds.width, high - low))
    yield "jacobian", ours / theirs, float(outside)
    for constant, what in _CONSTANTS.items():
        if f"{key}|{constant}" not in network.arrays or ("-F" in name and norm == np.inf):
            continue
        of = {"margins": {"of": "margins"}, "map": {"of": "map", "norm": (norm, norm)}}.get(what, {})
        found = jb.lipschitz(*common, method=method, **{"norm": norm, **network.how, **of})
        found = np.asarray(found)[0, network.label] if what == "class" else np.asarray(found)[0]
        yield what, float(np.max(found / network.arrays[f"{key}|{constant}"])), -np.inf


def certified(network: Network, key: str) -> float:
    """The ratio of certified radii against the runner-up."""
    _, algorithm, p, name = key.split("|")
    own = LAYER_BOUNDS[algorithm]
    method = own if name == "disable" else jb.LipschitzIntegral(method_of(name, algorithm), 15)
    found = jb.certified_radius(
        network.layers, network.x, np.array([network.label]), targets=network.arrays["runnerup"].reshape(1),
        norm=float(p[1:]), method=method, **network.how, **_RADII,
    )  # fmt: skip
    return float(np.asarray(found)[0] / network.arrays[key])


def table(path: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Print the lines of one file; how many comparisons they hold, and how many lines fail."""
    compared = failures = 0
    for name, network in networks(path):
        worst: dict[tuple[str, str], Sequence[float]] = {}
        for case, what, ratio, outside in compare(network, options.samples):
            loss = 1 / max(ratio, 1e-9) if what in ("robust", "landscape") else ratio
            known = worst.get((case, what), (0.0, -np.inf))
            worst[case, what] = tuple(np.maximum((loss, outside), known))
            compared += 1
        for (case, what), (loss, outside) in sorted(worst.items()):
            failed = not loss <= 1 + options.limit or outside > 1e-9
            failures += failed
            seen = f"  outside {outside:+.1e}" if np.isfinite(outside) else ""
            text = f"{path.stem:16s} {name:5s} {case:32s} {what:9s} {loss:.5f}{seen}"
            print(text + (" FAIL" if failed else ""), flush=True)
    return compared, failures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exit with 1 if something is worse than theirs by more than the limit, or a sample is outside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with recurjac_*.npz")
    parser.add_argument("--samples", type=int, default=30_000, help="Jacobians per network, norm and radius")
    parser.add_argument("--limit", type=float, default=0.001, help="how much worse than theirs passes, relative")
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.glob("recurjac_*.npz"))
    if not paths:
        raise SystemExit(f"{options.folder}: there is no recurjac_*.npz in it")
    failures = compared = 0
    for path in paths:
        with jax.enable_x64(True):
            count, failed = table(path, options)
        compared, failures = compared + count, failures + failed
    print(f"{compared} comparisons, {failures} lines worse than theirs or violated")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
