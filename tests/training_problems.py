"""Small networks with data, and the largest cross-entropy that sampling and PGD find over a ball: for tests of losses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from jaxbound.training import models, modes
from jaxbound.training.losses import Clean

CLIP = (0.0, 1.0)


@dataclass(frozen=True)
class Problem:
    model: object
    variables: dict
    x: jax.Array
    labels: jax.Array

    def margins(self, eps, method, **options):
        options = {"clip": CLIP, **options}
        return jb.margins(self.variables, self.x, self.labels, eps, method=method, apply_fn=self.model.apply, **options)

    def clean(self):
        keys = jax.random.split(jax.random.key(9), len(self.x))
        logits, frozen, _ = modes.train_pass(self.model.apply, self.variables, self.x)
        return Clean(self.model.apply, frozen, self.x, self.labels, logits, keys)


def problem(model, shape, scale=1.0, count=6, classes=10) -> Problem:
    x = jax.random.uniform(jax.random.key(1), (count, *shape))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    variables = {**variables, "params": jax.tree.map(lambda leaf: scale * leaf, variables["params"])}
    return Problem(model, variables, x, jnp.arange(count) % classes)


def small() -> Problem:
    """A perceptron."""
    return problem(models.MLP((12, 10)), (5,), scale=1.5)


def residual() -> Problem:
    """A residual network with BatchNorm."""
    return problem(models.ResNet((2,), dense=4), (6, 6, 1), scale=1.5)


@functools.partial(jax.jit, static_argnums=0)
def _losses_at(model, variables, points, labels):
    """The cross-entropy at many points around each example."""
    logits = jax.vmap(lambda x: model.apply(variables, x))(points)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(labels, logits.shape[:2]))


def worst_sampled(given: Problem, eps, norm=np.inf, count=400):
    """The largest cross-entropy seen: random points of the ball, half of them at its corners, and PGD's."""
    noise = jax.random.uniform(jax.random.key(3), (count, *given.x.shape), minval=-1, maxval=1)
    noise = jnp.concatenate([noise, jnp.sign(noise)])
    if norm == 2:
        flat = noise.reshape(*noise.shape[:2], -1)
        noise = (flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)).reshape(noise.shape)
    attacked = jb.pgd(given.variables, given.x, given.labels, eps, key=jax.random.key(2), apply_fn=given.model.apply,
                      clip=CLIP, norm=norm)  # fmt: skip
    points = jnp.concatenate([jnp.clip(given.x + eps * noise, *CLIP), attacked.x[None]])
    return jnp.max(_losses_at(given.model, given.variables, points, given.labels), axis=0)
