# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tuned bounds
#
# CROWN puts two lines around every nonlinearity, by a rule. Every slope gives a sound line, so every choice of slopes
# gives a bound, and the best choice can be searched: this is FROWN (Lyu et al. 2020). `Frown` starts at CROWN's own
# slopes, keeps the best bound of every row, and so is never looser than CROWN. This tour shows what it gains, what it
# costs, and where its limit is; `docs/frown.md` has the mathematics.
#
# *Two files hold this tour: `notebooks/frown.py`, which is the one to edit, and `notebooks/frown.ipynb`, which
# `jupytext --update --to ipynb notebooks/frown.py` makes from it, without outputs. A test holds them together and runs
# them.*

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxbound as jb

# %% [markdown]
# ## Lines around ReLU
#
# On $[l, u]$ with $l < 0 < u$ the chord is the best line above. Below, every slope in $[0, 1]$ is valid, and which one
# is best depends on the rest of the network, not on this neuron.

# %% alt="ReLU on an interval, the chord above it and three valid lines below"
ends = np.array([-2.0, 1.5])
figure, axes = plt.subplots(figsize=(5, 3))
crown = jb.linear_bounds(jax.nn.relu, jb.Crown())(jb.Box(*ends))
axes = jb.plots.lines(jax.nn.relu, jb.Interval(*ends), crown, name="relu", axes=axes)
for slope in (0.4, 1.0):
    axes.plot(ends, slope * ends, "--", label=f"lower line, slope {slope:g}")
axes.legend(fontsize="small")

# %% [markdown]
# ## A small network
#
# Three layers with random weights, eight inputs, boxes around them. `frown` is used like `crown`.

# %%
rng = np.random.default_rng(0)
widths = (6, 12, 12, 4)
params = [
    (jnp.asarray(rng.normal(size=(m, n)) * 1.5 / np.sqrt(m), jnp.float32), jnp.zeros(n))
    for m, n in itertools.pairwise(widths)
]
x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
eps = 0.3

crown = jb.crown(params, x, eps, activation="relu")
tuned = jb.frown(params, x, eps, steps=20, activation="relu")
print(f"mean width: CROWN {crown.width.mean():.3f}, FROWN {tuned.width.mean():.3f}")
print("never looser:", bool(jnp.all(tuned.lower >= crown.lower) & jnp.all(tuned.upper <= crown.upper)))

# %% [markdown]
# Sampled outputs stay inside, of course:


# %%
def network(points):
    for kernel, bias in params[:-1]:
        points = jax.nn.relu(points @ kernel + bias)
    return points @ params[-1][0] + params[-1][1]


noise = rng.choice([-eps, eps], size=(1000, *x.shape)).astype(np.float32)
values = network(x + noise)
print("inside:", bool(((tuned.lower - 1e-5 <= values) & (values <= tuned.upper + 1e-5)).all()))

# %% [markdown]
# ## How many steps?
#
# Few. Another number of steps compiles nothing anew.

# %% alt="The mean width of tuned bounds falls with the number of steps, below CROWN"
steps = [0, 1, 2, 5, 10, 20, 50]
means = [float(jb.frown(params, x, eps, steps=count, activation="relu").width.mean()) for count in steps]
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(steps, means, "o-", label="FROWN")
axes.axhline(float(crown.width.mean()), color="gray", label="CROWN")
axes.set_xlabel("steps")
axes.set_ylabel("mean width")
axes.legend()
print("tighter after 5 steps:", means[3] < float(crown.width.mean()))

# %% [markdown]
# ## The limit of fixed inputs, and how to pass it
#
# With the bounds of the nonlinearities' inputs held at CROWN's, no slopes can pass the linear program over the
# triangles. `pre_activation=jb.Crown()` holds them; the default tunes them, too, and tighter inputs make smaller
# triangles. The program (the extra `exact`) for the first two inputs:

# %%
fixed = jb.frown(params, x, eps, steps=100, pre_activation=jb.Crown(), activation="relu")
joint = jb.frown(params, x, eps, steps=100, activation="relu")
programs = [jb.bound(network, jb.LP(pre_activation=jb.Crown()))(jb.Box(row - eps, row + eps)) for row in x[:2]]

width = {
    "CROWN": float(crown.width[:2].mean()),
    "FROWN, inputs fixed": float(fixed.width[:2].mean()),
    "linear program": float(np.mean([program.width for program in programs])),
    "FROWN": float(joint.width[:2].mean()),
}
for name, value in width.items():
    print(f"{name:20s} {value:.4f}")
closed = (width["CROWN"] - width["FROWN, inputs fixed"]) / (width["CROWN"] - width["linear program"])
print(f"{closed:.1%} of the gap closed; at least 99 %:", closed > 0.99)
print("past the program:", width["FROWN"] < width["linear program"])

# %% [markdown]
# `certify`, `certified_radius` and `margins` take `method=jb.Frown(steps=…)` like any other method, and `jb.tune`
# returns the slopes, which `jb.Crown(slopes=…)` uses again without tuning.
