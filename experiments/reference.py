"""Compare bounds with arrays computed by other code: `python -m experiments.reference FOLDER`.

Reads `rival_*.npz` (one network each: `w.<layer>.kernel`, `x`, `eps.<norm>`, `<method>.<norm>.lb/ub`), rebuilds each
network in JAX, bounds it in float64 and prints, per file, method and norm, the ratio of mean widths (below 1: tighter)
and the largest violation by the file's sampled outputs (below 0: sound on the samples).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "atan": jnp.arctan,
    "hardtanh": jax.nn.hard_tanh,
    "abs": jnp.abs,
    "sin": jnp.sin,
    "cos": jnp.cos,
}

METHODS: dict[str, jb.Method] = {
    "IBP": jb.IBP(),
    "CROWN-IBP": jb.CrownIBP(),
    "CROWN": jb.Crown(),
    "CROWN-same-slope": jb.FastLin(),
    "CROWN-zero-lb": jb.Crown(lower_slope="zero"),
    "CROWN-one-lb": jb.Crown(lower_slope="one"),
    "Forward": jb.Forward(),
    "Forward+Backward": jb.Crown(pre_activation=jb.Forward()),
    "alphafix20": jb.Frown(steps=20, pre_activation=jb.Crown()),
    "alphafix100": jb.Frown(steps=100, pre_activation=jb.Crown()),
    "alphafull20": jb.Frown(steps=20),
    "alphafull100": jb.Frown(steps=100),
}


def network(data: np.lib.npyio.NpzFile) -> Callable:
    """The file's network as a function of one example."""
    arch = json.loads(str(data["arch"]))
    w = {key[2:]: jnp.asarray(data[key]) for key in data.files if key.startswith("w.")}

    def dense(name, x):
        return x @ w[f"{name}.kernel"] + w[f"{name}.bias"]

    def conv(name, x, stride=2, padding=1):
        pads = [(padding, padding)] * 2
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            x[None], w[f"{name}.kernel"], (stride, stride), pads, dimension_numbers=numbers
        )
        return out[0] + w[f"{name}.bias"]

    def mlp(x):
        activation = ACTIVATIONS[arch["act"]]
        for layer in range(len(arch["dims"]) - 1):
            x = dense(f"dense{layer}", x.reshape(-1))
            x = activation(x) if layer < len(arch["dims"]) - 2 else x
        return x

    def cnn(x):
        x = jax.nn.relu(conv("conv1", jax.nn.relu(conv("conv0", x))))
        if "pool" in arch["layers"]:
            kind = jax.lax.max if "maxpool" in arch["layers"] else jax.lax.add
            start = -jnp.inf if "maxpool" in arch["layers"] else 0.0
            x = jax.lax.reduce_window(x, start, kind, (2, 2, 1), (2, 2, 1), "VALID")
            x = x if "maxpool" in arch["layers"] else x / 4
        return dense("dense1", jax.nn.relu(dense("dense0", x.reshape(-1))))

    def recurrent(x):
        h = jnp.zeros(arch["hidden"])
        c = jnp.zeros(arch["hidden"])
        for step in range(arch["T"]):
            z = dense("wx", x[step]) + dense("wh", h)
            if not arch["gate_order"]:
                h = jnp.tanh(z)
                continue
            i, f, g, o = jnp.split(z, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return dense("cls", h)

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        if arch["layernorm"] == "std":
            x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
        return x * w[f"{name}.scale"] + w[f"{name}.bias"]

    def attention(x):
        q, k, v = dense("query", x), dense("key", x), dense("value", x)
        p = jax.nn.softmax(q @ k.T / np.sqrt(arch["d"]), axis=-1)
        h = norm("ln1", x + dense("out", p @ v))
        h = norm("ln2", h + dense("ff2", jax.nn.relu(dense("ff1", h))))
        return dense("cls", h.mean(0))

    if "dims" in arch:
        return mlp
    if "hidden" in arch:
        return recurrent
    return attention if "heads" in arch else cnn


def compare(path: Path, methods: Sequence[str] = tuple(METHODS)) -> Iterator[tuple[str, str, float, float]]:
    """`(method, norm, ratio of mean widths, largest violation)` for every method and norm that the file holds."""
    data = np.load(path)
    function = network(data)
    if "C" in data.files:
        outputs, args = lambda x, spec: spec @ function(x), (jnp.asarray(data["C"]),)
    else:
        outputs, args = function, ()
    for name, method in METHODS.items():
        if name not in methods:
            continue
        for norm in ("inf", "2", "1"):
            key = f"{name}.{norm}"
            if f"{key}.lb" not in data.files:
                continue

            def example(x, *rest, method=method, norm=norm):
                ball = jb.LpBall(x, float(data[f"eps.{norm}"]), float(norm))
                return jb.bound(outputs, method)(ball, *rest)

            found = jax.jit(jax.vmap(example))(jnp.asarray(data["x"]), *args)
            ratio = float(jnp.mean(found.width)) / float(np.mean(data[f"{key}.ub"] - data[f"{key}.lb"]))
            low, high = data[f"sample.{norm}.min"], data[f"sample.{norm}.max"]
            yield name, norm, ratio, float(max(np.max(found.lower - low), np.max(high - found.upper)))


def files(folder: Path, only: str) -> list[Path]:
    """The networks to compare.

    Raises:
        SystemExit: the folder is missing or holds none: a comparison of nothing must not pass.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder}: there is no such folder; pass the one with rival_*.npz")
    found = [path for path in sorted(folder.glob("rival_*.npz")) if "jacobian" not in path.name and only in path.name]
    if not found:
        raise SystemExit(
            f"{folder}: there is no rival_*.npz in it" + (f" whose name contains {only!r}" if only else "")
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exit with 1 if a ratio is above the limit or a sample violates a bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder with rival_*.npz")
    parser.add_argument("--only", default="", help="only files whose name contains this")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="only these methods")
    parser.add_argument("--limit", type=float, default=1.001, help="the largest ratio that passes")
    options = parser.parse_args(arguments)
    paths = files(options.folder, options.only)
    jax.config.update("jax_enable_x64", True)
    failures = 0
    for path in paths:
        for name, norm, ratio, violation in compare(path, options.methods):
            failed = ratio > options.limit or violation > 1e-9
            failures += failed
            verdict = "FAIL" if failed else ""
            print(
                f"{path.stem:36s} {name:18s} l{norm:4s} ratio {ratio:.6f}  violation {violation:+.2e} {verdict}",
                flush=True,
            )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
