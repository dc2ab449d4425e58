"""Shared tables: scalar functions with NumPy references, small networks of one example, and regions to bound them over.

All numbers are representable in float32, so that a float32 and a float64 run speak of the same function.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special as special

from jaxbound import Box, LpBall

Array = np.ndarray

# --- scalar functions -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Activation:
    """A scalar function in JAX and, independently, in NumPy float64; `kinks` are points worth testing around."""

    function: Callable
    reference: Callable[[Array], Array]
    kinks: tuple[float, ...] = (0.0,)
    low: float = -60.0
    high: float = 60.0


def _elu(z: Array, alpha: float) -> Array:
    return np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0) / 1.0))


def _gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def _leaky(slope: float) -> Activation:
    return Activation(lambda x: jax.nn.leaky_relu(x, slope), lambda z: np.where(z >= 0, z, slope * z))


_SELU = 1.0507009873554805, 1.6732632423543772

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(jax.nn.relu, lambda z: np.maximum(z, 0)),
    "leaky_relu": _leaky(0.25),
    "leaky_relu_steep": _leaky(2.0),
    "leaky_relu_negative": _leaky(-0.5),
    "relu6": Activation(jax.nn.relu6, lambda z: np.clip(z, 0, 6), (0.0, 6.0)),
    "clip": Activation(lambda x: jnp.clip(x, -1.0, 0.5), lambda z: np.clip(z, -1, 0.5), (-1.0, 0.5)),
    "abs": Activation(jnp.abs, np.abs),
    "hard_tanh": Activation(jax.nn.hard_tanh, lambda z: np.clip(z, -1, 1), (-1.0, 1.0)),
    "hard_sigmoid": Activation(jax.nn.hard_sigmoid, lambda z: np.clip(z + 3, 0, 6) / 6, (-3.0, 3.0)),
    "hard_swish": Activation(jax.nn.hard_swish, lambda z: z * np.clip(z + 3, 0, 6) / 6, (-3.0, -1.5, 0.0, 3.0)),
    "sigmoid": Activation(jax.nn.sigmoid, special.expit),
    "tanh": Activation(jnp.tanh, np.tanh),
    "softplus": Activation(jax.nn.softplus, lambda z: np.logaddexp(z, 0)),
    "log_sigmoid": Activation(jax.nn.log_sigmoid, lambda z: -np.logaddexp(-z, 0)),
    "elu": Activation(jax.nn.elu, lambda z: _elu(z, 1.0)),
    "elu_steep": Activation(lambda x: jax.nn.elu(x, 2.0), lambda z: _elu(z, 2.0)),
    "selu": Activation(jax.nn.selu, lambda z: _SELU[0] * _elu(z, _SELU[1])),
    "celu": Activation(lambda x: jax.nn.celu(x, 2.0), lambda z: np.where(z > 0, z, 2 * np.expm1(np.minimum(z, 0) / 2))),
    "gelu": Activation(
        lambda x: jax.nn.gelu(x, approximate=False), lambda z: z * special.ndtr(z), (-1.4142, 0.0, 1.4142)
    ),
    "gelu_tanh": Activation(jax.nn.gelu, _gelu_tanh, (-1.4192, 0.0, 1.4192)),
    "silu": Activation(jax.nn.silu, lambda z: z * special.expit(z), (-2.3994, 0.0, 2.3994)),
    "mish": Activation(jax.nn.mish, lambda z: z * np.tanh(np.logaddexp(z, 0)), (-2.2563, 0.0, 1.4906)),
    "soft_sign": Activation(jax.nn.soft_sign, lambda z: z / (1 + np.abs(z))),
    "arctan": Activation(jnp.arctan, np.arctan),
    "arcsinh": Activation(jnp.arcsinh, np.arcsinh),
    "erf": Activation(jax.scipy.special.erf, special.erf),
    "erfc": Activation(jax.scipy.special.erfc, special.erfc),
    "exp": Activation(jnp.exp, np.exp),
    "exp2": Activation(jnp.exp2, np.exp2),
    "expm1": Activation(jnp.expm1, np.expm1),
    "sinh": Activation(jnp.sinh, np.sinh),
    "square": Activation(jnp.square, np.square),
    "cube": Activation(lambda x: x**3, lambda z: z**3),
    "sin": Activation(jnp.sin, np.sin, (0.0, 1.5708, 3.1416)),
    "cos": Activation(jnp.cos, np.cos, (0.0, 1.5708, 3.1416)),
    "squareplus": Activation(jax.nn.squareplus, lambda z: (z + np.sqrt(z * z + 4)) / 2),
    "sparse_plus": Activation(
        jax.nn.sparse_plus, lambda z: np.where(z <= -1, 0, np.where(z >= 1, z, (z + 1) ** 2 / 4)), (-1.0, 1.0)
    ),
    "log": Activation(jnp.log, np.log, (1.0,), 2.0**-10),
    "sqrt": Activation(jnp.sqrt, np.sqrt, (0.0, 1.0), 0.0),
    "rsqrt": Activation(jax.lax.rsqrt, lambda z: 1 / np.sqrt(z), (1.0,), 2.0**-10),
    "reciprocal": Activation(lambda x: 1 / x, lambda z: 1 / z, (1.0,), 2.0**-10),
    "log1p": Activation(jnp.log1p, np.log1p, (0.0,), -0.75),
    "arcsin": Activation(jnp.arcsin, np.arcsin, (-1.0, 0.0), -1.0, 1.0),
    "arccos": Activation(jnp.arccos, np.arccos, (-1.0, 0.0), -1.0, 1.0),
    "arctanh": Activation(jnp.arctanh, np.arctanh, (0.0,), 2.0**-12 - 1, 1 - 2.0**-12),
    "arccosh": Activation(jnp.arccosh, np.arccosh, (1.0,), 1.0),
    "erf_inv": Activation(jax.scipy.special.erfinv, special.erfinv, (0.0,), 2.0**-12 - 1, 1 - 2.0**-12),
    "x_arcsin": Activation(lambda x: x * jnp.arcsin(x), lambda z: z * np.arcsin(z), (-1.0, 0.0), -1.0, 1.0),
    "arcsin_tanh": Activation(lambda x: jnp.arcsin(jnp.tanh(x)), lambda z: 2 * np.arctan(np.tanh(z / 2)), low=-1.0),
    "power": Activation(lambda x: x**1.7, lambda z: z**1.7, low=0.0),
    "inverse_power": Activation(lambda x: x**-0.5, lambda z: z**-0.5, (1.0,), 2.0**-10),
}
"""Name -> function; `low` and `high` end the stretch on which intervals are drawn."""

# --- networks ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Network:
    """`function(params, *regions)` of one example; `shapes` are those of the region leaves, packed by `pack`."""

    function: Callable
    params: object
    shapes: tuple[tuple[int, ...], ...] = ((4,),)
    pack: Callable[[list], tuple] = tuple
    slow: bool = False

    def arguments(self, leaves, dtype) -> tuple:
        """The function's arguments with the given leaves in the places of the regions."""
        return (jax.tree.map(lambda a: jnp.asarray(a, dtype), self.params), *self.pack(list(leaves)))


def _random(seed: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(seed.encode()))


def _normal(seed: str, *shape: int, scale: float = 1.0) -> Array:
    return (_random(seed).normal(size=shape) * scale).astype(np.float32)


def _linen(module: nn.Module, *shape: int) -> tuple[Callable, object]:
    """A Linen module as `(params, x) -> output` of one example, with random variables."""
    structs = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.float32))

    def fill(path, struct):
        name, seed = path[-1].key, jax.tree_util.keystr(path)
        if name in ("var", "scale"):
            return _random(seed).uniform(0.5, 2.0, struct.shape).astype(np.float32)
        fan_in = np.prod(struct.shape[:-1]) if name == "kernel" else 4
        return _normal(seed, *struct.shape, scale=float(fan_in) ** -0.5)

    params = jax.tree_util.tree_map_with_path(fill, structs)
    return lambda variables, x: module.apply(variables, x[None])[0], params


def _vector(function: Callable, out: int = 3, inside: int = 5) -> Network:
    """A nonlinear function between two affine maps of a vector."""
    params = {"w": _normal("w", inside, 4), "b": _normal("b", inside, scale=0.5), "v": _normal("v", out, inside)}
    return Network(lambda p, x: p["v"] @ function(p["w"] @ x + p["b"]), params)


def _two(function: Callable) -> Network:
    """A function of two bounded vectors, each a map of the input."""
    params = {"a": _normal("a", 3, 4), "b": _normal("b", 3, 4), "c": _normal("c", 3, scale=0.5)}
    return Network(lambda p, x: function(p["a"] @ x, jnp.tanh(p["b"] @ x + p["c"])), params)


def _image(module: nn.Module, shape: tuple[int, ...] = (4, 4, 2), **more) -> Network:
    return Network(*_linen(module, *shape), shapes=(shape,), **more)


def _lax_conv(p, x):
    out = jax.lax.conv_general_dilated(
        x[None], p["kernel"], (1, 2), ((2, 1), (0, 1)), lhs_dilation=(1, 2), rhs_dilation=(2, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2,
    )  # fmt: skip
    return jax.nn.relu(out[0] + p["bias"]).sum((0, 1))


def _structure(p, x):
    pieces = jnp.flip(x.reshape(2, 2).T, 0)[:, ::-1]
    padded = jax.lax.pad(jax.nn.relu(pieces), jnp.asarray(0.5, x.dtype), ((1, 0, 1), (0, -1, 0)))
    taken = jnp.take(padded.ravel(), jnp.array([3, 0, 0, 2]))
    moved = jax.lax.dynamic_update_slice(jnp.outer(taken, p["b"]), padded[:1, :1] * 2, (1, 0))
    return jnp.cumsum(jnp.tanh(jax.lax.dynamic_slice(moved, (0, 1), (3, 1))[:, 0]))


def _reordered(p, x):
    return p["w"] @ jax.nn.relu(jax.lax.reshape(x, (6,), dimensions=(1, 0)) * p["b"])


def _fixed_where(p, x):
    z = p["w"] @ x
    return jnp.where(p["m"] > 0, jax.nn.relu(z), jnp.where(p["m"] > -0.5, z, 1.0)).sum() + z


def _split_min(p, x):
    first, second = jnp.split(jax.nn.relu(p["w"] @ x), [2])
    return {"min": jnp.min(second), "pair": (first, jnp.max(jnp.stack([first, second[:2]]), axis=0))}


def _attention(p, x):
    tokens = x.reshape(2, 2)
    query, key, value = (tokens @ p[name] for name in ("q", "k", "v"))
    return (jax.nn.softmax(query @ key.T / 2, axis=-1) @ value).ravel()


def _prelu(p, x):
    z = p["w"] @ x
    return jnp.where(z >= 0, z, p["a"] * z)


def _first_relu(p, x):
    return p["w"] @ jax.nn.relu(x)


def _input_skip(p, x):
    return jnp.concatenate([jax.nn.relu(x[:2]), x[1:3] - jnp.abs(x[2:])]) + p["b"] * x


def _conv_residual(nn_name: str) -> nn.Module:
    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(2, (3, 3), name=nn_name)(x)
            y = nn.BatchNorm(use_running_average=True)(y)
            return nn.Dense(3)((x + nn.relu(y)).mean((1, 2)))

    return Residual()


def _layers(*layers) -> nn.Sequential:
    return nn.Sequential([*layers])


def _flat(x):
    return x.reshape(x.shape[0], -1)


_PAIR = {"w": _normal("pair", 5, 4), "b": _normal("pair b", 4)}

NETWORKS: dict[str, Network] = {
    "affine": Network(lambda p, x: p["w"] @ x * 3 - x.sum() / 7 + p["w"] @ (0.5 * x), {"w": _normal("affine", 3, 4)}),
    "mlp_relu": Network(*_linen(_layers(nn.Dense(5), nn.relu, nn.Dense(5), nn.relu, nn.Dense(3)), 4)),
    "mlp_mixed": Network(*_linen(_layers(nn.Dense(4), nn.tanh, nn.Dense(4), nn.gelu, nn.Dense(3), nn.sigmoid), 4)),
    "conv_same": _image(_layers(nn.Conv(3, (3, 3), strides=2), nn.relu, _flat, nn.Dense(3))),
    "conv_valid": _image(_layers(nn.Conv(2, (2, 2), padding="VALID", kernel_dilation=2), nn.relu, _flat, nn.Dense(2))),
    "conv_padded": _image(
        _layers(nn.Conv(4, (2, 3), padding=((1, 0), (0, 2)), feature_group_count=2), nn.relu, _flat, nn.Dense(2))
    ),
    "conv_lax": Network(
        _lax_conv, {"kernel": _normal("kernel", 2, 2, 1, 4), "bias": _normal("bias", 4)}, shapes=((4, 4, 2),)
    ),
    "conv_transpose": _image(_layers(nn.ConvTranspose(2, (2, 2), strides=(2, 2)), nn.relu, _flat, nn.Dense(2)), (2, 2, 2)),
    "residual_batchnorm": _image(_conv_residual("conv")),
    "average_pool": _image(
        _layers(lambda x: nn.avg_pool(x, (2, 2), (1, 2), "SAME", count_include_pad=False), nn.relu, _flat, nn.Dense(2))
    ),
    "max_pool_same": _image(_layers(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"), _flat, nn.Dense(2))),
    "max_pool_overlap": _image(
        _layers(nn.Conv(1, (1, 1)), lambda x: nn.max_pool(x, (2, 2), (1, 1)), nn.relu, _flat, nn.Dense(2)), (3, 3, 2)
    ),
    "min_pool": _image(_layers(lambda x: -nn.max_pool(-x, (2, 2), (2, 2)), _flat, nn.Dense(2))),
    "global_pool": _image(_layers(nn.Conv(2, (2, 2)), lambda x: jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))),
    "structure": Network(_structure, {"b": _normal("structure", 3)}),
    "reordered": Network(_reordered, {"w": _normal("reordered", 3, 6), "b": _normal("scale", 6)}, ((2, 3),)),
    "fixed_where": Network(_fixed_where, {"w": _normal("where", 6, 4), "m": _normal("mask", 6)}),
    "split_min": Network(_split_min, {"w": _normal("split", 5, 4)}),
    "first_relu": Network(_first_relu, {"w": _normal("first", 3, 4)}),
    "input_skip": Network(_input_skip, {"b": _normal("skip", 4)}),
    "product": _two(lambda a, b: a * b),
    "own_square": _two(lambda a, b: a * a - b * b * 0.5),
    "quotient": _two(lambda a, b: a / (2 + b)),
    "max_min": _two(lambda a, b: jnp.maximum(a, b) - 0.5 * jnp.minimum(a, b)),
    "clamp": _two(lambda a, b: jax.lax.clamp(b - 1, a, b + 0.5)),
    "softmax": _vector(lambda z: jax.nn.softmax(z[:4] / 2).repeat(2)[:5]),
    "log_softmax": _vector(jax.nn.log_softmax),
    "logsumexp": _vector(lambda z: jax.nn.logsumexp(z) * jnp.ones_like(z)),
    "layer_norm": Network(*_linen(_layers(nn.Dense(4), nn.LayerNorm(epsilon=0.125), nn.Dense(2)), 4)),
    "attention": Network(_attention, {n: _normal(n, 2, 2) for n in "qkv"}, slow=True),
    "attention_linen": Network(*_linen(nn.MultiHeadDotProductAttention(2, qkv_features=2), 2, 2), shapes=((2, 2),), slow=True),
    "prelu": Network(_prelu, {"w": _normal("prelu", 3, 4), "a": np.float32([0.25, 1.5, -0.5])}),
    "prelu_linen": Network(*_linen(_layers(nn.Dense(3), nn.PReLU(), nn.Dense(2)), 4)),
    "array_power": Network(lambda p, x: jnp.maximum(p["w"] @ x, p["b"]) + jnp.minimum(x, p["b"]),
                           {"w": _normal("power", 4, 4), "b": _normal("power b", 4)}),
    "weights_too": Network(lambda p, x, w: jax.nn.relu(x @ w + p["b"]) @ p["w"][:3, :2],
                           {"b": _normal("too", 3), "w": _PAIR["w"]}, ((2,), (2, 3))),
    "dictionary": Network(lambda p, inputs: {"sum": jnp.tanh(inputs["x"] + p["b"]) - inputs["y"], "x": inputs["x"]},
                          {"b": _PAIR["b"][:2]}, ((2,), (2,)), lambda leaves: ({"x": leaves[0], "y": leaves[1]},)),
    "constant": Network(lambda p, x: (p["b"] * 2, jnp.float32(1.5), jax.nn.relu(x)), _PAIR),
    "kernel_region": Network(lambda p, k: jax.nn.relu(nn.Conv(2, (2, 2), use_bias=False).apply({"params": {"kernel": k}}, p)[0]).sum((0, 1)),
                             _normal("kernel image", 1, 3, 3, 1), ((2, 2, 1, 2),)),
} | {name: _vector(ACTIVATIONS[name].function) for name in ACTIVATIONS if ACTIVATIONS[name].low < -1}  # fmt: skip
"""Name -> network. Every function is defined on the whole space."""

# --- regions ----------------------------------------------------------------------------------------------------------


def _center(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.normal(size=shape).astype(np.float32)


def _box(radius: float) -> Callable:
    def make(rng, shape):
        center = _center(rng, shape)
        reach = (radius * rng.uniform(0.2, 1, shape)).astype(np.float32)
        return Box(center - reach, center + reach)

    return make


def _symmetric(rng, shape):
    """Dyadic ends, so that bisection meets kinks at 0 exactly."""
    reach = 2.0 ** rng.integers(-2, 3, shape)
    return Box((-reach * rng.integers(1, 4, shape)).astype(np.float32), reach.astype(np.float32))


def _degenerate(rng, shape):
    box = _box(0.5)(rng, shape)
    fixed = rng.random(shape) < 0.5
    return Box(box.lower, np.where(fixed, box.lower, box.upper))


def _negative(rng, shape):
    box = _box(0.5)(rng, shape)
    return Box(-np.abs(box.lower) - 2, -np.abs(box.lower) - np.float32(1.5))


def _ball(norm: float, radius: float, clip=None) -> Callable:
    return lambda rng, shape: LpBall(_center(rng, shape), np.float32(radius), norm, clip=clip)


_CLIP = (-0.75, 0.875)

REGIONS: dict[str, dict[str, Callable[[np.random.Generator, tuple[int, ...]], object]]] = {
    "box": {
        "box": _box(0.5), "wide": _box(4.0), "tiny": _box(2.0**-18), "symmetric": _symmetric,
        "degenerate": _degenerate, "negative": _negative, "huge": _box(1e4),
    },
    **{
        f"l{name}{'_clip' if clip else ''}": {
            "ball": _ball(norm, 0.5, clip), "large": _ball(norm, 3.0, clip),
            "point": _ball(norm, 0.0, clip), "huge": _ball(norm, 1e4, clip),
        }
        for name, norm in (("1", 1.0), ("2", 2.0), ("3", 3.0), ("inf", np.inf)) for clip in (None, _CLIP)
    },
}  # fmt: skip
"""Family -> name -> maker. A family's regions have one structure, so that they share compiled programs."""


def regions(network: str, family: str) -> dict[str, list]:
    """For each region of a family, one region per leaf of the network: NumPy float32, never empty."""
    made = {}
    for name, make in REGIONS[family].items():
        rng = _random(f"{network} {family} {name}")
        leaves = [make(rng, shape) for shape in NETWORKS[network].shapes]
        made[name] = [leaf if isinstance(leaf, Box) else _meeting(leaf) for leaf in leaves]
    return made


def _meeting(ball: LpBall) -> LpBall:
    """The center moved so near to its clip box that the ball meets it; it may stay outside."""
    if ball.clip is None:
        return ball
    inside = np.clip(ball.center, *ball.clip)
    gap = np.asarray(ball.center - inside, np.float64)
    share = min(1.0, 0.5 * float(ball.radius) / max(np.linalg.norm(gap.ravel(), ball.norm), 1e-30))
    return dataclasses.replace(ball, center=(inside + share * gap).astype(np.float32))


def cast(region, dtype):
    """The region in a dtype."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), region)
