"""A network that was read from a file: a function of one example, its parameters, and what they are called."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbound import _compat, errors


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network as `fn(params, x)` on one example, wherever it was written.

    Stands where the functions on networks (`crown`, `certify`, ...) take `params`, and `fn` stands where `bound` takes
    a function. Networks of one architecture have equal `fn`, so that they share compiled programs.

    Args:
        fn: the network on one example of `input_shape`, or on the same numbers flat.
        params: a dictionary of arrays.
        input_shape: the shape of one example, without the batch axis.
        output_shape: the shape of the outputs for one example.
        input_name: what the file calls the input.
        output_name: what the file calls the output.
        dtype: of the input, as the file says.

    >>> double = Model(lambda params, x: params["w"] * x, {"w": jnp.full(2, 2.0)}, (2,), (2,))
    >>> double(jnp.array([1.0, 3.0])), double(jnp.ones((4, 2))).shape
    (Array([2., 6.], dtype=float32), (4, 2))
    """

    fn: Callable[[Any, Any], jax.Array]
    params: dict[str, jax.Array]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    input_name: str = "x"
    output_name: str = "y"
    dtype: DTypeLike = np.float32

    def __call__(self, x: ArrayLike) -> jax.Array:
        """The outputs: for one example, in `input_shape` or flat, or for each of a batch of such.

        Raises:
            ArgumentError: x has another shape.
        """
        x = jnp.asarray(x)
        return _evaluate(self.fn, self.is_batch(x.shape), self.params, x)

    def is_batch(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of a shape is a batch of examples, and not one example.

        Raises:
            ArgumentError: it is neither.
        """
        size = math.prod(self.input_shape)
        if shape in (self.input_shape, (size,)):
            return False
        if len(shape) > 1 and math.prod(shape[1:]) == size:
            return True
        raise errors.argument(
            "x", f"has shape {shape}", f"pass one example of shape {self.input_shape}, or a batch of such"
        )


@functools.partial(_compat.eager_jit, static_argnums=(0, 1))
def _evaluate(function: Callable, batched: bool, params, x: jax.Array) -> jax.Array:
    return jax.vmap(function, in_axes=(None, 0))(params, x) if batched else function(params, x)
