"""Bounds under `shard_map` with its default checks, and of arrays on meshes with explicit axes, are the plain ones."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbound as jb

pytestmark = pytest.mark.fast

MODEL = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
X = np.random.default_rng(0).uniform(size=(4, 5)).astype(np.float32)
LABELS = np.arange(4) % 3


def _params():
    return MODEL.init(jax.random.key(0), X[:1])


def _loss(params, x, labels):
    margins = jb.margins(params, x, labels, 0.01, method=jb.IBP(), apply_fn=MODEL.apply)
    return jnp.log1p(jnp.exp(-margins).sum(-1)).mean()


def _mesh(kind: AxisType):
    return jax.make_mesh((2,), ("batch",), axis_types=(kind,), devices=jax.devices()[:2])


def test_losses_and_gradients_under_shard_map():
    params = _params()
    value, gradient = jax.jit(jax.value_and_grad(_loss))(params, X, LABELS)

    def step(params, x, labels):
        found = jax.value_and_grad(lambda p: jax.lax.pmean(_loss(p, x, labels), "batch"))(params)
        return found

    mapped = jax.shard_map(
        step, mesh=_mesh(AxisType.Auto), in_specs=(P(), P("batch"), P("batch")), out_specs=(P(), P())
    )
    shared, summed = jax.jit(mapped)(params, X, LABELS)
    np.testing.assert_allclose(shared, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), summed, gradient)


def test_bounds_of_explicitly_sharded_arrays():
    params, mesh = _params(), _mesh(AxisType.Explicit)
    x = jax.device_put(X, NamedSharding(mesh, P("batch")))
    plain = jb.crown_ibp(params, X, 0.01, apply_fn=MODEL.apply)
    found = jb.crown_ibp(params, x, 0.01, apply_fn=MODEL.apply)
    np.testing.assert_allclose(found.lower, plain.lower, rtol=1e-5, atol=1e-6)
