"""Whole numbers that a region decides: computed with as real numbers, and as they wrap where they may leave their dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbound as jb

I8, U8 = jnp.int8, jnp.uint8
WRAPS = {
    "int8 100 + 100": lambda x: (x[0] > 0).astype(I8) * I8(100) + (x[1] > 0).astype(I8) * I8(100),
    "uint8 0 - 1": lambda x: (x[0] > 0).astype(U8) - (x[1] > 0).astype(U8),
    "uint8 -1": lambda x: -(x[:1] > 0).astype(U8),
    "int32 200 to int8": lambda x: ((x > 0).astype(jnp.int32) * 200).astype(I8),
    "int8 sum of 200": lambda x: jnp.sum(jnp.repeat(x > 0, 100).astype(I8), dtype=I8),
    "int8 running sum of 200": lambda x: jnp.cumsum(jnp.repeat(x > 0, 100).astype(I8), dtype=I8),
    "weighted": lambda x: jnp.sum((x > 0).astype(I8) * np.array([50, 90], np.int8), dtype=I8),
    "twice": lambda x: ((x > 0).astype(I8) * I8(100) + I8(100)) * I8(3),
    "compared": lambda x: (x > 0).astype(I8) * I8(100) + I8(100) > 0,
}
REFUSED = {
    "int8 11 ** 3": lambda x: ((x > 0).astype(I8) * I8(11)) ** 3,
    "int32 quotient": lambda x: (1 + (x > 0).astype(jnp.int32)) // 2,
    "times an array": lambda x: (x > 0).astype(jnp.int32) * jnp.array([2**30, 3]) * 4,
}
STAYS = {
    "count": (lambda x: jnp.sum(x > 0), 0, 2),
    "int8 sum": (lambda x: jnp.sum((x > 0).astype(I8) * I8(60), dtype=I8), 0, 120),
    "weighted": (lambda x: jnp.sum((x > 0).astype(I8) * np.array([50, 70], np.int8), dtype=I8), 0, 120),
    "difference": (lambda x: jnp.sum((x > 0).astype(jnp.int32) - (x > 0.5).astype(jnp.int32)), -2, 2),
    "uint8 at its ends": (lambda x: jnp.sum((x[:1] > 0).astype(U8) * U8(255)), 0, 255),
    "doubled often": (
        lambda x: functools.reduce(lambda n, _: n + n, range(29), (x[0] > 0).astype(jnp.int32)),
        0,
        2**29,
    ),
    "uint8 to int32": (lambda x: jnp.sum((x > 0).astype(U8).astype(jnp.int32) - 1), -2, 0),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", REFUSED)
def test_arithmetic_whose_wrapping_has_no_rule_is_refused(name):
    fn = lambda x: REFUSED[name](x).astype(jnp.float32)  # noqa: E731
    with pytest.raises(jb.UnsupportedError):
        jb.bound(fn, jb.IBP())(jb.Box(-jnp.ones(2), jnp.ones(2)))


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()], ids=str)
@pytest.mark.parametrize("name", WRAPS)
def test_arithmetic_is_bounded_as_it_wraps(name, method):
    fn = jax.jit(lambda x: WRAPS[name](x).astype(jnp.float32))
    bound = jb.bound(fn, method)
    for low in np.stack(np.meshgrid(*[[-1, 0.25]] * 2), -1).reshape(-1, 2).astype(np.float32):
        x = jnp.asarray(low) + 0.25
        found = bound(jb.Box(low, low + 0.5))
        assert np.all((found.lower <= fn(x)) & (fn(x) <= found.upper))
        assert np.all(found.upper - found.lower < 0.01)
    found = bound(jb.Box(-jnp.ones(2), jnp.ones(2)))
    for x in np.stack(np.meshgrid(*[[-1, 0, 0.25, 1]] * 2), -1).reshape(-1, 2).astype(np.float32):
        assert np.all((found.lower <= fn(x)) & (fn(x) <= found.upper))


@pytest.mark.parametrize("method", [jb.IBP(), jb.Crown()], ids=str)
@pytest.mark.parametrize("name", STAYS)
def test_arithmetic_within_the_range_is_bounded(name, method):
    count, least, most = STAYS[name]
    fn = lambda x: count(x).astype(jnp.float32)  # noqa: E731
    found = jb.bound(fn, method)(jb.Box(-jnp.ones(2), jnp.ones(2)))
    for x in np.stack(np.meshgrid(*[[-1, 0, 0.25, 0.75, 1]] * 2), -1).reshape(-1, 2).astype(np.float32):
        assert np.all((found.lower - 1e-5 <= fn(x)) & (fn(x) <= found.upper + 1e-5))
    assert np.all((found.lower >= least - 3) & (found.upper <= most + 3))
