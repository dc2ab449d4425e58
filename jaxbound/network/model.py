"""A network that was read from a file: a function of one example, its parameters, and what they are called."""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
    """A network as `fn(params, x)` on one example, or `fn(params, x, y, ...)`, wherever it was written.

    Stands where the functions on networks (`crown`, `certify`, ...) take `params`, and `fn` stands where `bound` takes
    a function. Networks of one architecture have equal `fn`, so that they share compiled programs.

    Args:
        fn: the network on one example of `input_shape`, or on the same numbers flat.
        params: a dictionary of arrays.
        input_shape: the shape of one example, without the batch axis; of several inputs a tuple of shapes.
        output_shape: the shape of the outputs for one example; of several outputs a tuple of shapes.
        input_name: what the file calls the input; of several inputs a tuple of names.
        output_name: what the file calls the output; of several outputs a tuple of names.
        dtype: of the inputs, as the file says.

    >>> double = Model(lambda params, x: params["w"] * x, {"w": jnp.full(2, 2.0)}, (2,), (2,))
    >>> double(jnp.array([1.0, 3.0])), double(jnp.ones((4, 2))).shape
    (Array([2., 6.], dtype=float32), (4, 2))
    """

    fn: Callable[..., Any]
    params: dict[str, jax.Array]
    input_shape: tuple
    output_shape: tuple
    input_name: str | tuple[str, ...] = "x"
    output_name: str | tuple[str, ...] = "y"
    dtype: DTypeLike = np.float32

    def __call__(self, *inputs: ArrayLike) -> Any:
        """The outputs: for one example, in `input_shape` or flat, or for each of a batch of such.

        Raises:
            ArgumentError: there are more or fewer inputs than the network has, or of other shapes.
        """
        arrays = tuple(map(jnp.asarray, inputs))
        return _evaluate(self.fn, self.is_batch(*(array.shape for array in arrays)), self.params, arrays)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each input; one of a network of one."""
        return _each(self.input_shape)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each output; one of a network of one."""
        return _each(self.output_shape)

    @property
    def flat(self) -> Model:
        """The network from one vector, all inputs one behind the other, to one vector of all outputs.

        So `verify` and VNN-LIB files see several inputs or outputs; a network of one of each is its own.

        >>> total = Model(lambda params, x, y: x.sum() + y, {}, ((2,), (3,)), (3,))
        >>> total.flat(jnp.arange(5.0))
        Array([3., 4., 5.], dtype=float32)
        """
        if len(self.input_shapes) == len(self.output_shapes) == 1:
            return self
        sizes = [(sum(map(math.prod, shapes)),) for shapes in (self.input_shapes, self.output_shapes)]
        return dataclasses.replace(
            self, fn=_Flat(self.fn, self.input_shapes), input_shape=sizes[0], output_shape=sizes[1]
        )

    def is_batch(self, *shapes: tuple[int, ...]) -> bool:
        """Whether arrays of these shapes, one for each input, are a batch of examples, and not one example.

        Raises:
            ArgumentError: they are neither.
        """
        own = self.input_shapes
        if len(shapes) != len(own):
            raise errors.argument("x", f"is {len(shapes)} inputs", f"the network takes {len(own)}, of shapes {own}")
        if all(shape in (mine, (math.prod(mine),)) for shape, mine in zip(shapes, own, strict=True)):
            return False
        whole = (len(shape) > 1 and math.prod(shape[1:]) == math.prod(m) for shape, m in zip(shapes, own, strict=True))
        if all(whole) and len({shape[0] for shape in shapes}) == 1:
            return True
        given, wanted = (pair[0] if len(own) == 1 else pair for pair in (shapes, own))
        raise errors.argument("x", f"has shape {given}", f"pass one example of shape {wanted}, or a batch of such")


def _each(shape: tuple) -> tuple[tuple[int, ...], ...]:
    return shape if shape and isinstance(shape[0], tuple) else (shape,)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A network of several inputs or outputs, from one vector to one vector."""

    fn: Callable
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, params: Any, x: jax.Array):
        x, ends = jnp.ravel(x), list(itertools.accumulate(map(math.prod, self.shapes), initial=0))
        parts = [jax.lax.slice_in_dim(x, start, end) for start, end in itertools.pairwise(ends)]
        found = self.fn(params, *(part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)))
        return jnp.concatenate([jnp.ravel(output) for output in jax.tree.leaves(found)])


@functools.partial(_compat.eager_jit, static_argnums=(0, 1))
def _evaluate(function: Callable, batched: bool, params: Any, inputs: tuple[jax.Array, ...]) -> Any:
    each = functools.partial(function, params)
    return jax.vmap(each)(*inputs) if batched else each(*inputs)
