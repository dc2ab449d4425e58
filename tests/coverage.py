"""What can be bounded: one table of cases, with what is refused and why.

`test_coverage` holds every line of it true; `python -m tests.support` writes it into the documentation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxbound as jb

Array = np.ndarray
_VECTOR, _TOKENS, _IMAGE = (4,), (3, 4), (5, 5, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """`function(*pack(leaves))` over regions of `shapes` whose entries range over `[low, high]`."""

    function: Callable
    shapes: tuple[tuple[int, ...], ...] = (_VECTOR,)
    low: float = -0.5
    high: float = 0.5
    refused: tuple[str, str] | None = None
    """The primitive that a refusal names, and a part of the way out."""
    pack: Callable[[list], tuple] = tuple
    fixed: Array | None = None
    """Entries of the first leaf whose ends are equal: boxes only."""
    section: str = ""
    single: bool = False
    """Whether it computes in float32 whatever it is given."""

    def regions(self, norm: float | None, dtype) -> dict[str, list]:
        """Regions of one kind (a `Box` for None): wide, ending at the middle (where kinks are), and off it."""
        rng, made = np.random.default_rng(0), {}
        for name in ("wide", "ending at the middle", "off the middle"):
            leaves = []
            for k, shape in enumerate(self.shapes):
                middle, radius = np.full(shape, (self.low + self.high) / 2), (self.high - self.low) / 2
                if name == "ending at the middle":
                    radius /= 2
                    middle = middle + radius * np.where(np.arange(middle.size).reshape(shape) % 2, 1, -1)
                elif name == "off the middle":
                    radius /= 2
                    middle = middle + rng.uniform(-1, 1, shape) * radius
                if norm is None:
                    reach = np.where(self.fixed, 0.0, radius) if self.fixed is not None and k == 0 else radius
                    leaves.append(jb.Box(np.asarray(middle - reach, dtype), np.asarray(middle + reach, dtype)))
                else:
                    leaves.append(jb.LpBall(np.asarray(middle, dtype), np.asarray(radius, dtype), norm))
            made[name] = leaves
        return made


_W, _W3, _B = (np.random.default_rng(k).normal(size=s).astype(np.float32) for k, s in enumerate([(4, 4), (3, 4), (4,)]))


# --- layers -----------------------------------------------------------------------------------------------------------


def _filled(structs):
    """Reproducible variables: small kernels, positive scales and variances."""
    leaves, tree = jax.tree.flatten(structs)
    rng = np.random.default_rng(0)
    return tree.unflatten([
        (0.5 + 0.4 * rng.uniform(-1, 1, s.shape) if len(s.shape) < 2 else 0.6 * rng.normal(size=s.shape)).astype(np.float32)
        for s in leaves
    ])  # fmt: skip


def _linen(make: Callable[[type], nn.Module], shape: tuple[int, ...] = _VECTOR, **options) -> Case:
    """A Linen module, made for a parameter dtype, on one example."""
    variables = _filled(
        jax.eval_shape(lambda: make(jnp.float32).init(jax.random.key(0), jnp.zeros((1, *shape)), **options))
    )

    def function(x):
        own = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), variables)
        return make(x.dtype).apply(own, x[None], **options)

    return Case(function, (shape,))


def _nnx(make: Callable[[type], nnx.Module], shape: tuple[int, ...] = _VECTOR) -> Case:
    """An NNX module, made for a dtype, on one example."""
    is_key = lambda a: jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    state = jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, nnx.split(make(jnp.float32))[1])
    with jax.enable_x64(True):
        graphs = {np.dtype(d): nnx.split(nnx.eval_shape(lambda d=d: make(d)))[0] for d in (jnp.float32, jnp.float64)}

    def own(x, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(x.dtype)
        return jax.random.wrap_key_data(leaf) if leaf.shape == (2,) else leaf

    def function(x):
        return nnx.merge(graphs[x.dtype], jax.tree.map(lambda leaf: own(x, leaf), state))(x[None])

    return Case(function, (shape,))


def _rnn(cell: type, shape=_TOKENS, **options) -> Case:
    return _linen(lambda dtype: nn.RNN(cell(3, param_dtype=dtype), **options), shape)


class _Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = lambda module, carry, _: (nn.relu(nn.Dense(4)(carry)), None)  # noqa: E731
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(self, x, None)[0]


class _Causal(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=4)(x, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(2, qkv_features=4)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(5)(x + y)))


_LAYERS = {
    "Dense": _linen(lambda dtype: nn.Dense(3)),
    "DenseGeneral": _linen(lambda dtype: nn.DenseGeneral((2, 3), axis=(-2, -1)), _TOKENS),
    "Einsum": _linen(lambda dtype: nn.Einsum((4, 2), "...a,ab->...b"), _TOKENS),
    "Embed, its table bounded": Case(lambda x: x[np.array([0, 2])], ((5, 4),)),
    "Conv": _linen(lambda dtype: nn.Conv(2, (3, 3), strides=2), _IMAGE),
    "Conv, circular": _linen(lambda dtype: nn.Conv(2, (3, 3), padding="CIRCULAR"), _IMAGE),
    "Conv, causal": _linen(lambda dtype: nn.Conv(2, (3,), padding="CAUSAL"), _TOKENS),
    "Conv, reflected": _linen(lambda dtype: nn.Conv(2, (3, 3), padding="REFLECT"), _IMAGE),
    "Conv, grouped and dilated": _linen(lambda dtype: nn.Conv(4, (2, 2), feature_group_count=2, kernel_dilation=2), _IMAGE),
    "ConvLocal": _linen(lambda dtype: nn.ConvLocal(2, (3, 3)), _IMAGE),
    "ConvTranspose": _linen(lambda dtype: nn.ConvTranspose(2, (3, 3), strides=(2, 2)), (3, 3, 2)),
    "ConvTranspose, circular": _linen(lambda dtype: nn.ConvTranspose(2, (3, 3), padding="CIRCULAR"), (3, 3, 2)),
    "BatchNorm": _linen(lambda dtype: nn.BatchNorm(use_running_average=True)),
    "LayerNorm": _linen(lambda dtype: nn.LayerNorm(), _TOKENS),
    "LayerNorm, slow variance": _linen(lambda dtype: nn.LayerNorm(use_fast_variance=False), _TOKENS),
    "RMSNorm": _linen(lambda dtype: nn.RMSNorm(), _TOKENS),
    "GroupNorm": _linen(lambda dtype: nn.GroupNorm(2), (3, 3, 4)),
    "InstanceNorm": _linen(lambda dtype: nn.InstanceNorm(), (3, 3, 2)),
    "WeightNorm": _linen(lambda dtype: nn.WeightNorm(nn.Dense(3))),
    "Dropout, deterministic": _linen(lambda dtype: nn.Dropout(0.5, deterministic=True)),
    "max_pool": Case(lambda x: nn.max_pool(x, (2, 2), (2, 2), "SAME"), (_IMAGE,)),
    "avg_pool": Case(lambda x: nn.avg_pool(x, (2, 2), (1, 1)), (_IMAGE,)),
    "min_pool": Case(lambda x: -nn.max_pool(-x, (3, 3), (2, 2)), (_IMAGE,)),
    "MultiHeadDotProductAttention": _linen(lambda dtype: nn.MultiHeadDotProductAttention(2, qkv_features=4), _TOKENS),
    "attention, causal": _linen(lambda dtype: _Causal(), _TOKENS),
    "transformer block": _linen(lambda dtype: _Block(), _TOKENS),
    "SimpleCell": _rnn(nn.SimpleCell),
    "SimpleCell, reversed": _rnn(nn.SimpleCell, reverse=True, keep_order=True),
    "GRUCell": _rnn(nn.GRUCell),
    "MGUCell": _rnn(nn.MGUCell),
    "LSTMCell": _rnn(nn.LSTMCell),
    "OptimizedLSTMCell": _rnn(nn.OptimizedLSTMCell),
    "ConvLSTMCell": _linen(lambda dtype: nn.RNN(nn.ConvLSTMCell(2, (2, 2), param_dtype=dtype)), (2, 2, 2, 1)),
    "Bidirectional": _linen(lambda dtype: nn.Bidirectional(nn.RNN(nn.SimpleCell(2, param_dtype=dtype)), nn.RNN(nn.SimpleCell(2, param_dtype=dtype))), _TOKENS),
    "remat": _linen(lambda dtype: nn.remat(nn.Dense)(3)),
    "scan over layers": _linen(lambda dtype: _Scanned()),
    "nnx.Linear": _nnx(lambda dtype: nnx.Linear(4, 3, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))),
    "nnx.Conv": _nnx(lambda dtype: nnx.Conv(2, 3, (3, 3), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)), _IMAGE),
    "nnx.LayerNorm": _nnx(lambda dtype: nnx.LayerNorm(4, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)), _TOKENS),
    "nnx.BatchNorm": _nnx(lambda dtype: nnx.BatchNorm(4, use_running_average=True, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))),
    "nnx.MultiHeadAttention": dataclasses.replace(_nnx(lambda dtype: nnx.MultiHeadAttention(2, 4, decode=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)), _TOKENS), single=True),
    "nnx.RNN of GRUCell": _nnx(lambda dtype: nnx.RNN(nnx.GRUCell(4, 3, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))), _TOKENS),
}  # fmt: skip

# --- functions of one variable ------------------------------------------------------------------------------------------


def _each(function: Callable, low: float = -2.0, high: float = 2.0, refused=None) -> Case:
    return Case(function, low=low, high=high, refused=refused)


_NO_RULE = "add a rule"

_ACTIVATIONS = {
    **{name: _each(getattr(jax.nn, name), -4.0, 4.0) for name in (
        "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "log_sigmoid",
        "softplus", "hard_tanh", "hard_sigmoid", "hard_swish", "soft_sign", "squareplus", "sparse_plus", "sparse_sigmoid",
    )},
    "gelu, exact": _each(lambda x: jax.nn.gelu(x, approximate=False), -4.0, 4.0),
    "relu squared": _each(lambda x: jax.nn.relu(x) ** 2),
    "prelu": _each(lambda x: jnp.where(x >= 0, x, _B * x)),
    "glu": _each(nn.glu), "maxout": _each(lambda x: jnp.max((_W @ x).reshape(2, 2), 1)),
    "swiglu": _each(lambda x: jax.nn.silu(_W @ x) * (_W3[0] * x)),
    **{f"jnp.{name}": _each(getattr(jnp, name)) for name in (
        "abs", "square", "sin", "cos", "sinc", "tanh", "sinh", "cosh", "arctan", "arcsinh", "cbrt", "exp", "exp2", "expm1",
    )},
    "jnp.tan": _each(jnp.tan, -1.0, 1.0), "jnp.log": _each(jnp.log, 0.25, 4.0), "jnp.log1p": _each(jnp.log1p, -0.5, 2.0),
    "jnp.sqrt": _each(jnp.sqrt, 0.0, 2.0), "rsqrt": _each(lax.rsqrt, 0.25, 2.0), "reciprocal": _each(lambda x: 1 / x, 0.25, 2.0),
    "jnp.arcsin": _each(jnp.arcsin, -1.0, 1.0), "jnp.arccos": _each(jnp.arccos, -1.0, 1.0),
    "jnp.arctanh": _each(jnp.arctanh, -0.75, 0.75), "jnp.arccosh": _each(jnp.arccosh, 1.0, 3.0),
    "erf": _each(jax.scipy.special.erf), "erfc": _each(jax.scipy.special.erfc), "erf_inv": _each(lax.erf_inv, -0.75, 0.75),
    "ndtr": _each(jax.scipy.special.ndtr), "log_ndtr": _each(jax.scipy.special.log_ndtr),
    "logit": _each(jax.scipy.special.logit, 0.125, 0.875), "xlogy": _each(lambda x: jax.scipy.special.xlogy(x, x), 0.25, 2.0),
    "log(1 - sigmoid)": _each(lambda x: jnp.log(1 - jax.nn.sigmoid(x))), "logit of a sigmoid": _each(lambda x: jax.scipy.special.logit(jax.nn.sigmoid(x))),
    "entr": _each(jax.scipy.special.entr, 0.25, 2.0), "a cube": _each(lambda x: x**3), "x ** -2": _each(lambda x: x**-2, 0.5, 2.0),
    "x ** 1.7": _each(lambda x: x**1.7, 0.0, 2.0), "1.7 ** x": _each(lambda x: jnp.power(np.float32(1.7), x)),
    "a polynomial": _each(lambda x: x**3 - 2 * x + 0.5), "jnp.clip": _each(lambda x: jnp.clip(x, -1.0, 0.5)),
    "jnp.sign": _each(jnp.sign), "jnp.heaviside": _each(lambda x: jnp.heaviside(x, 0.5)), "a step": _each(lambda x: (x > 0).astype(x.dtype)),
    "jnp.floor": _each(jnp.floor), "jnp.ceil": _each(jnp.ceil), "jnp.round": _each(jnp.round), "jnp.trunc": _each(jnp.trunc),
    "quantized, straight through": _each(lambda x: x + lax.stop_gradient(jnp.round(x) - x)),
    "jnp.nan_to_num": _each(jnp.nan_to_num), "where finite": _each(lambda x: jnp.where(jnp.isfinite(x), x, 0.0)),
    "lgamma": _each(lambda x: lax.lgamma(x), 2.0, 3.0, ("lgamma", _NO_RULE)),
    "digamma": _each(lambda x: lax.digamma(x), 2.0, 3.0, ("digamma", _NO_RULE)),
    "jnp.nextafter": _each(lambda x: jnp.nextafter(x, 1.0), refused=("nextafter", _NO_RULE)),
    "lax.rem": _each(lambda x: lax.rem(x, np.asarray(0.75, x.dtype))), "jnp.mod": _each(lambda x: jnp.mod(x, -0.75)),
    "jnp.floor_divide": _each(lambda x: x // 0.75), "jnp.divmod": _each(lambda x: jnp.divmod(x, 0.75)[1]),
    "a remainder by a bounded divisor": _each(lambda x: jnp.mod(x, 3 + x), refused=("rem", "subtract a multiple of jnp.floor")),
    "to integers and back": _each(lambda x: (4 * x).astype(np.int32).astype(x.dtype)),
    "quantized by a cast": _each(lambda x: jnp.clip(jnp.round(8 * x), -8, 7).astype(np.int8).astype(x.dtype) / 8),
    "to integers": _each(lambda x: x.astype(np.int32), refused=("convert_element_type", "jnp.where")),
    "to bfloat16": _each(lambda x: x.astype(jnp.bfloat16), refused=("convert_element_type", "one precision")),
    "fewer bits": _each(lambda x: lax.reduce_precision(x, 8, 7), refused=("reduce_precision", "full precision")),
    "a real part": _each(lambda x: (x + 1j * x).real), "complex exponentials": _each(lambda x: jnp.exp(1j * x).imag),
    "complex numbers": _each(lambda x: x + 1j * x, refused=("complex", "its imaginary part")),
}  # fmt: skip

# --- structure ------------------------------------------------------------------------------------------------------------

_INDEX = np.array([1, 2, 3, 1], np.int32)  # JAX keeps what it made of an int64 array with float64 on

_STRUCTURE = {
    "jnp.einsum": Case(lambda x: jnp.einsum("ij,kj->ik", x, _W), (_TOKENS,)),
    "a product of two bounded matrices": Case(lambda x: x.reshape(2, 2) @ x.reshape(2, 2).T),
    "a convolution of two bounded arrays": Case(lambda x: jnp.convolve(x[:3], x[1:])),
    "a fixed filter": Case(lambda x: jnp.convolve(x, _B[:2])),
    "jnp.outer": Case(lambda x: jnp.outer(x, x)), "jnp.kron": Case(lambda x: jnp.kron(x, _B)),
    "jnp.cross": Case(lambda x: jnp.cross(x[:3], _B[:3])), "a determinant": Case(lambda x: jnp.linalg.det(x.reshape(2, 2))),
    "a quotient": Case(lambda x: x / (2 + x[::-1])), "jnp.hypot": Case(lambda x: jnp.hypot(x, x[::-1]), low=0.25, high=1.0),
    "softmax": Case(jax.nn.softmax, low=-2.0, high=2.0), "log_softmax": Case(jax.nn.log_softmax, low=-2.0, high=2.0),
    "logsumexp": Case(jax.nn.logsumexp, low=-2.0, high=2.0), "logsumexp with weights": Case(lambda x: jax.nn.logsumexp(x, b=1.0 + np.arange(4) % 3), low=-2.0, high=2.0),
    "entropy of a softmax": Case(lambda x: (lambda p: -jnp.sum(p * jnp.log(p)))(jax.nn.softmax(x)), low=-2.0, high=2.0), "jnp.logaddexp": Case(lambda x: jnp.logaddexp(x, x[::-1])),
    "softmax, masked by where": Case(lambda x: jax.nn.softmax(x, where=np.array([True, True, False, True]))),
    "log_softmax, masked by where": Case(lambda x: jax.nn.log_softmax(x, where=np.array([True, True, False, True]))[..., :2]),
    "logsumexp, masked by where": Case(lambda x: jax.nn.logsumexp(x, axis=-1, where=np.tril(np.ones((3, 4))) > 0), (_TOKENS,)),
    "softmax, masked by -inf": Case(lambda x: jax.nn.softmax(jnp.where(np.tril(np.ones((3, 4))) > 0, x, -jnp.inf)), (_TOKENS,)),
    "softmax, masked by adding -inf": Case(lambda x: jax.nn.softmax(x + jnp.where(np.tril(np.ones((3, 4))) > 0, 0, -jnp.inf)), (_TOKENS,)),
    "jax.nn.standardize": Case(jax.nn.standardize), "jnp.var": Case(jnp.var), "jnp.std": Case(jnp.std),
    "jnp.linalg.norm": Case(jnp.linalg.norm), "norm 1": Case(lambda x: jnp.linalg.norm(x, 1)),
    "norm inf": Case(lambda x: jnp.linalg.norm(x, np.inf)), "normalized": Case(lambda x: x / jnp.linalg.norm(x), low=0.25, high=1.0),
    "jnp.max": Case(jnp.max), "jnp.min": Case(jnp.min), "jnp.maximum": Case(lambda x: jnp.maximum(x, x[::-1])),
    "minimum of three": Case(lambda x: jnp.minimum(jnp.minimum(x, _B), x[::-1])), "jnp.prod": Case(jnp.prod),
    "clip by arrays": Case(lambda x: jnp.clip(x, _B - 1, _B)), "clip by bounded ends": Case(lambda x: lax.clamp(x[::-1] - 0.25, x, x[::-1])),
    "jnp.mean": Case(jnp.mean), "jnp.cumsum": Case(jnp.cumsum), "jnp.cumprod": Case(jnp.cumprod), "cummax": Case(lax.cummax),
    "cummin": Case(lax.cummin), "cumlogsumexp": Case(lax.cumlogsumexp), "associative_scan": Case(lambda x: lax.associative_scan(jnp.add, x)),
    "jnp.sort": Case(jnp.sort), "jnp.median": Case(jnp.median), "top_k": Case(lambda x: lax.top_k(x, 2)[0]),
    "where, on the values": Case(lambda x: jnp.where(x > x[::-1], x, 2 * x)), "where, on a sum": Case(lambda x: jnp.where(x.sum() > 0, x, 2 * x)),
    "a comparison": Case(lambda x: (x > x[::-1]).astype(x.dtype)), "a conjunction": Case(lambda x: ((x > 0) & (x[::-1] > 0)).astype(x.dtype)),
    "jnp.any": Case(lambda x: jnp.any(x > 0).astype(x.dtype)), "jnp.all": Case(lambda x: jnp.all(x > 0).astype(x.dtype)),
    "a count": Case(lambda x: jnp.sum(x > 0).astype(x.dtype)), "which is largest": Case(lambda x: (x == x.max()).astype(x.dtype)),
    "gather": Case(lambda x: x[np.array([0, 2])]), "jnp.split": Case(lambda x: jnp.split(x, 2)), "dynamic_slice": Case(lambda x: lax.dynamic_slice(x, (1,), (2,))),
    "dynamic_update_slice": Case(lambda x: lax.dynamic_update_slice(x, x[:2], (1,))), "jnp.roll": Case(lambda x: jnp.roll(x, 1)),
    "jnp.tile": Case(lambda x: jnp.tile(x, 2)), "jnp.repeat": Case(lambda x: jnp.repeat(x, 2)), "jnp.triu": Case(lambda x: jnp.triu(jnp.outer(x, _B))),
    "jnp.diag": Case(jnp.diag), "at set": Case(lambda x: x.at[1].set(x[0])), "at add": Case(lambda x: x.at[1].add(x[0])), "at multiply": Case(lambda x: x.at[1].multiply(3.0)),
    "scatter": Case(lambda x: jnp.zeros(5, x.dtype).at[np.array([1, 2, 3, 0])].set(x)), "scatter-add": Case(lambda x: jnp.zeros(5, x.dtype).at[_INDEX].add(x)),
    "a resized image": Case(lambda x: jax.image.resize(x.reshape(2, 2), (3, 3), "bilinear")), "jax.lax.map": Case(lambda x: lax.map(lambda r: jnp.tanh(r) * r, x)),
    "scan": Case(lambda x: lax.scan(lambda c, r: (jnp.tanh(c + r), c * r), x[0], x)), "fori_loop": Case(lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(_W @ c), x)),
    "cond, fixed predicate": Case(lambda x: lax.cond(np.bool_(True), jnp.sin, jnp.cos, x)), "checkpoint": Case(jax.checkpoint(lambda x: jnp.tanh(_W @ x))),
    "a radial basis": Case(lambda x: jnp.exp(-jnp.sum((x - _W) ** 2, -1))),
    "argmax": Case(jnp.argmax, refused=("argmax", "bound the differences of entries")), "argmin": Case(jnp.argmin, refused=("argmin", "bound the differences of entries")),
    "argsort": Case(jnp.argsort, refused=("in_order_of", "use the sorted values alone")), "top_k's places": Case(lambda x: lax.top_k(x, 2)[1] * 1.0, refused=("in_order_of", "use the sorted values alone")),
    "the entry at argmax": Case(lambda x: x[jnp.argmax(x)], refused=("argmax", "bound the differences of entries")),
    "a bare comparison": Case(lambda x: x > 0, refused=("gt", "jnp.where")), "at max": Case(lambda x: x.at[1].max(0.0), refused=("scatter-max", _NO_RULE)),
    "an array to a bounded power": Case(lambda x: jnp.power(_W[0] + 4, x)),
    "a bounded base to an array": Case(lambda x: jnp.power(x, np.array([0.5, 2.0, 1.5, -1.0], np.float32)), low=0.25, high=2.0),
    "a bounded base to computed powers": Case(lambda x: jnp.power(x, jnp.exp(_B)), low=0.25, high=2.0), "powers of whole numbers": Case(lambda x: x[:, None] ** np.arange(4)),
    "whether a root is NaN, elsewhere": Case(lambda x: jnp.where(jnp.isnan(jnp.sqrt(x).reshape(2, 2)), 5.0, 1.0), refused=("is_defined", "the whole region")),
    "a bounded base to a bounded power": Case(lambda x: (x + 2) ** x), "jnp.arctan2": Case(lambda x: jnp.arctan2(x, 2 + x[::-1])),
    "jnp.arctan2 around the origin": Case(lambda x: jnp.arctan2(x, x[::-1] - 0.25)), "jnp.angle": Case(lambda x: jnp.angle(x + 1j)),
    "jnp.interp": Case(lambda x: jnp.interp(x, np.array([-1.0, 0, 1], np.float32), np.array([0.0, 1.0, 0.25], np.float32))),
    "jnp.interp, many knots": Case(lambda x: jnp.interp(x, np.linspace(-1, 1, 16, dtype=np.float32), np.arange(16, dtype=np.float32) % 3)),
    "jnp.interp, periodic": Case(lambda x: jnp.interp(x, np.array([-1.0, 0, 1]), np.array([0.0, 1.0, 0]), period=3.0), refused=("lt_to", "jnp.where")),
    "map_coordinates, moving places": Case(lambda x: jax.scipy.ndimage.map_coordinates(_W.astype(x.dtype), [x[:2], x[2:]], 1)),
    "map_coordinates, nearest": Case(lambda x: jax.scipy.ndimage.map_coordinates(x[:3], [x + 1], 1, "nearest")),
    "map_coordinates, a moving image": Case(lambda x: jax.scipy.ndimage.map_coordinates(x, [np.array([0.5, 1.75, -0.25], x.dtype)], 1)),
    "jnp.select": Case(lambda x: jnp.select([x < -0.5, x < x[::-1]], [x, 2 * x], 3 * x)), "jnp.piecewise": Case(lambda x: jnp.piecewise(x, [x < -0.25, x > 0.25], [jnp.negative, jnp.square, jnp.sin])),
    "a spectrum": Case(lambda x: jnp.abs(jnp.fft.rfft(x))), "a filter by FFT": Case(lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * np.array([1, 2j, -1], np.complex64), 4)),
    "a rotary embedding": Case(lambda x: (lambda z: jnp.stack([z.real, z.imag], -1))(lax.complex(x[::2], x[1::2]) * jnp.exp(1j * jnp.arange(2)).astype((1j * x).dtype))), "cholesky": Case(lambda x: jnp.linalg.cholesky(jnp.diag(x + 2)), refused=("cholesky", _NO_RULE)),
    "jnp.linalg.solve": Case(lambda x: jnp.linalg.solve(_W, x), refused=("custom_linear_solve", "multiply by the inverse")),
    "solve_triangular": Case(lambda x: jax.scipy.linalg.solve_triangular(_W, x), refused=("triangular_solve", "multiply by the inverse")),
    "while_loop": Case(lambda x: lax.while_loop(lambda c: c.sum() < 1, lambda c: c + 1, x), refused=("while", "jax.lax.scan")),
    "cond on a bounded predicate": Case(lambda x: lax.cond(x.sum() > 0, lambda y: y, lambda y: 2 * y, x), refused=("cond", "use jnp.where")),
    "pure_callback": Case(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x), refused=("pure_callback", "write the function in JAX")),
    "io_callback": Case(lambda x: jax.experimental.io_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x), refused=("io_callback", "write the function in JAX")),
}  # fmt: skip

# --- derivatives ------------------------------------------------------------------------------------------------------------


def _net(activation: Callable) -> Callable:
    return lambda x: _W3 @ activation(_W @ x + _B)


def _of(cases: dict, name: str, transform: Callable = jax.jacrev) -> Case:
    case = cases[name]
    return dataclasses.replace(case, function=transform(case.function))


_CONV = _linen(lambda dtype: nn.Conv(2, (2, 2)), (3, 3, 2)).function

_DERIVATIVES = {
    **{f"jacrev, {name}": Case(jax.jacrev(_net(getattr(jax.nn, name)))) for name in (
        "relu", "leaky_relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "softplus", "log_sigmoid",
        "hard_tanh", "hard_sigmoid", "hard_swish", "soft_sign", "squareplus", "softmax", "log_softmax",
    )},
    **{f"jacrev, {name}": Case(jax.jacrev(_net(getattr(jnp, name)))) for name in ("tanh", "abs", "square", "sin", "exp", "arctan")},
    "jacrev, gelu, exact": Case(jax.jacrev(_net(lambda z: jax.nn.gelu(z, approximate=False)))),
    "jacrev, clip": Case(jax.jacrev(_net(lambda z: jnp.clip(z, -1, 1)))), "jacrev, erf": Case(jax.jacrev(_net(jax.scipy.special.erf))),
    "jacrev, relu at its kinks": Case(jax.jacrev(jax.nn.relu)), "jacrev, clip at its kinks": Case(jax.jacrev(lambda x: jnp.clip(x, -0.5, 0.0))),
    "jacrev, two layers of relu": Case(jax.jacrev(lambda x: _W3 @ jax.nn.relu(_W @ jax.nn.relu(_W @ x + _B)))),
    "jacrev, two layers of tanh": Case(jax.jacrev(lambda x: _W3 @ jnp.tanh(_W @ jnp.tanh(_W @ x + _B)))),
    "jacrev, max": Case(jax.jacrev(lambda x: jnp.max(_W @ x))), "jacrev, max of the entries": Case(jax.jacrev(jnp.max)),
    "jacrev, min": Case(jax.jacrev(jnp.min)), "jacrev, maximum": Case(jax.jacrev(lambda x: jnp.maximum(x, x[::-1]))),
    "jacrev, max_pool": Case(jax.jacrev(lambda x: nn.max_pool(x, (2, 2), (1, 1)).sum()), ((3, 3, 1),)),
    "jacrev, avg_pool": Case(jax.jacrev(lambda x: nn.relu(nn.avg_pool(x, (2, 2), (2, 2))).sum()), ((4, 4, 1),)),
    "jacrev, Conv and relu": Case(jax.jacrev(lambda x: nn.relu(_CONV(x)).sum()), ((3, 3, 2),)),
    "jacrev, logsumexp": Case(jax.jacrev(lambda x: jax.nn.logsumexp(_W @ x))), "jacrev, where": Case(jax.jacrev(lambda x: jnp.where(x > 0, x, 2 * x))),
    "jacrev, a quotient": Case(jax.jacrev(lambda x: x / (2 + x[::-1]))), "jacrev, jnp.prod": Case(jax.jacrev(jnp.prod)),
    "jacrev, jnp.linalg.norm": Case(jax.jacrev(jnp.linalg.norm), low=0.25, high=1.0), "jacrev, cumsum": Case(jax.jacrev(lambda x: jnp.tanh(jnp.cumsum(x)))),
    "jacrev, LayerNorm": _of(_LAYERS, "LayerNorm"), "jacrev, attention": _of(_LAYERS, "MultiHeadDotProductAttention"),
    "jacrev, SimpleCell": _of(_LAYERS, "SimpleCell"), "jacrev, GRUCell": _of(_LAYERS, "GRUCell"),
    "jacfwd, relu": Case(jax.jacfwd(_net(jax.nn.relu))), "jacfwd, tanh": Case(jax.jacfwd(_net(jnp.tanh))), "jacfwd, max": Case(jax.jacfwd(jnp.max)),
    "jvp, tanh": Case(lambda x: jax.jvp(_net(jnp.tanh), (x,), (jnp.ones(4, x.dtype),))[1]), "jvp, max": Case(lambda x: jax.jvp(jnp.max, (x,), (jnp.arange(4, dtype=x.dtype),))[1]),
    "hessian, tanh": Case(jax.hessian(lambda x: jnp.sum(_net(jnp.tanh)(x)))), "hessian, softplus": Case(jax.hessian(lambda x: jnp.sum(_net(jax.nn.softplus)(x)))),
    "of a logit difference": Case(jax.grad(lambda x: (lambda y: y[0] - y[1])(_net(jax.nn.relu)(x)))),
    "jacfwd, max_pool": Case(jax.jacfwd(lambda x: nn.max_pool(x, (2, 2), (1, 1))), ((3, 3, 1),)),
    "jacrev, jnp.sort": Case(jax.jacrev(jnp.sort), refused=("in_order_of", "use the sorted values alone")),
}  # fmt: skip

# --- regions ----------------------------------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["image", "offset"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Observation:
    """An input of two parts."""

    image: object
    offset: object


_MASK = np.array([True, False, True, False])

_REGIONS = {
    "a dictionary": Case(lambda d: jnp.tanh(_W @ d["x"] + d["b"]), (_VECTOR, _VECTOR), pack=lambda leaves: ({"x": leaves[0], "b": leaves[1]},)),
    "a list": Case(lambda parts: jax.nn.relu(_W @ parts[0]) * parts[1], (_VECTOR, _VECTOR), pack=lambda leaves: (leaves,)),
    "a dataclass": Case(lambda o: jax.nn.relu(_W @ o.image) + o.offset, (_VECTOR, _VECTOR), pack=lambda leaves: (Observation(*leaves),)),
    "several arguments": Case(lambda x, y: jnp.maximum(_W @ x, y), (_VECTOR, _VECTOR)),
    "weights": Case(lambda w: jnp.tanh(w @ _B), ((3, 4),)), "weights of two layers": Case(lambda w, v: v @ jax.nn.relu(w @ _B), ((3, 4), (2, 3))),
    "weights and input": Case(lambda w, x: jax.nn.relu(w @ x), ((3, 4), _VECTOR)), "convolution kernel": Case(lambda k: lax.conv(np.ones((1, 2, 3, 3), k.dtype), k, (1, 1), "SAME"), ((1, 2, 2, 2),)),
    "part of an input (equal ends elsewhere)": Case(_net(jax.nn.relu), fixed=_MASK), "part of an input (a mask)": Case(lambda x: _net(jax.nn.relu)(jnp.where(_MASK, x, _B))),
    "one radius per feature (scaling)": Case(lambda z: _net(jnp.tanh)(_B + np.array([0.1, 0.5, 1.0, 0.0], np.float32) * z)),
}  # fmt: skip

_SECTIONS = {
    "Linen and NNX layers": _LAYERS, "Activations and other functions of one variable": _ACTIVATIONS,
    "Structure": _STRUCTURE, "Derivatives": _DERIVATIVES, "Regions": _REGIONS,
}  # fmt: skip

CASES: dict[str, Case] = {
    name: dataclasses.replace(case, section=section)
    for section, cases in _SECTIONS.items()
    for name, case in cases.items()
}
"""Name -> case, section by section."""

assert len(CASES) == sum(map(len, _SECTIONS.values())), "two cases have one name"

METHODS = {"IBP": jb.IBP(), "Forward": jb.Forward(), "Crown": jb.Crown()}
NORMS = {"Box": None, "L1": 1.0, "L2": 2.0, "Linf": np.inf}
