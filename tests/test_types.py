"""What public functions say they take and return: annotations by beartype, shapes by jaxtyping."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Array, Float, Int, TypeCheckError, jaxtyped

import jaxbound as jb

PARAMS = [{"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}]
X, LABELS = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1])
NAMED = {"cap", "crown", "crown_ibp", "fastlin", "forward", "frown", "ibp"}
"""Made by one factory, so that beartype does not find their module."""
FUNCTIONS = [name for name in jb.__all__ if inspect.isfunction(getattr(jb, name)) and name not in NAMED]

shaped = jaxtyped(typechecker=beartype)


def test_annotations_name_what_there_is():
    """beartype reads every annotation of a public function, and refuses those that mean nothing."""
    for name in FUNCTIONS:
        beartype(getattr(jb, name))


def test_annotations_are_true():
    assert beartype(jb.margin_spec)(LABELS, 2).shape == (5, 1, 2)
    with pytest.raises(BeartypeCallHintViolation):
        beartype(jb.margin_spec)(LABELS, "two")
    box = jb.Box(jnp.zeros(3), jnp.ones(3))
    assert isinstance(beartype(jb.bound)(jnp.tanh, jb.IBP())(box), jb.Interval)
    beartype(jb.margins)(PARAMS, X, LABELS, 0.1, method=jb.IBP(), activation="relu")


@shaped
def _spec(labels: Int[Array, " batch"], classes: int) -> Float[Array, "batch {classes-1} {classes}"]:
    return jb.margin_spec(labels, classes)


@shaped
def _ibp(x: Float[Array, "batch inputs"], labels: Int[Array, " batch"]) -> Float[Array, "batch 1"]:
    return jb.ibp(PARAMS, x, 0.1, activation="relu", spec=jb.margin_spec(labels, 2)).lower


@shaped
def _margins(x: Float[Array, "batch inputs"], labels: Int[Array, " batch"]) -> Float[Array, "batch 1"]:
    return jb.margins(PARAMS, x, labels, 0.1, method=jb.IBP(), activation="relu")


@shaped
def _bound(low: Float[Array, " inputs"]) -> tuple[Float[Array, " inputs"], Float[Array, " inputs"]]:
    found = jb.bound(jnp.tanh, jb.IBP())(jb.Box(low, low + 1))
    return found.lower, found.upper


@shaped
def _planes(low: Float[Array, " inputs"]) -> tuple[Float[Array, "inputs inputs"], Float[Array, " inputs"]]:
    found = jb.linear_bounds(jnp.tanh, jb.Crown())(jb.Box(low, low + 1))
    return found.lower_slope[0], found.lower_intercept


def test_shapes_are_those_of_the_documentation():
    _spec(LABELS, 4)
    assert np.array_equal(_ibp(X, LABELS), _margins(X, LABELS))
    _bound(jnp.zeros(3))
    _planes(jnp.zeros(3))
    with pytest.raises(TypeCheckError):
        _bound(jnp.zeros((3, 1)))
