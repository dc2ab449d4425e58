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
# # From bounds to decisions
#
# A bound that fails says "unknown". Branch and bound goes on: it splits the region until every part is proved, or finds
# a counterexample. This tour decides a property of a small network, looks at how the region was split, writes the proof
# to a file, and checks that file without jaxbound's own bounds.
#
# *Two files hold this tour: `notebooks/verify.py`, which is the one to edit, and `notebooks/verify.ipynb`, which
# `jupytext --update --to ipynb notebooks/verify.py` makes from it, without outputs.*

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import jaxbound as jb

# %% [markdown]
# ## A network and a property
#
# Two inputs, so that we can see the region, and two layers of ReLUs with weights drawn at random. A property says what
# a *counterexample* satisfies: here that the output is at most some height.

# %%
draw = np.random.default_rng(44)
shapes = [(2, 12), (12, 12), (12, 1)]
layers = [
    (draw.normal(size=shape).astype(np.float32), draw.normal(size=shape[1]).astype(np.float32)) for shape in shapes
]


def network(x):
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


box = jb.Box(-np.ones(2, np.float32), np.ones(2, np.float32))
axis = np.linspace(-1, 1, 201, dtype=np.float32)
grid = np.stack(np.meshgrid(axis, axis), axis=-1)
heights = np.asarray(jax.vmap(network)(grid.reshape(-1, 2))).reshape(201, 201)
least = float(heights.min())
print(f"the least output on a grid is {least:.3f}")
print(f"CROWN says at least           {float(jb.bound(network, jb.Crown())(box).lower[0]):.3f}")

# %% [markdown]
# ## Verdicts
#
# A little below the least value there is no counterexample, and CROWN does not see it. A little above there is one.

# %%
folder = Path(tempfile.mkdtemp())
method = jb.BranchAndBound(batch=16)
below, above = (jb.Property.of([([1.0], least + shift)]) for shift in (-0.05, 0.05))
history = []
proved = jb.verify(network, box, below, method=method, certificate=folder / "proof", progress=history.append)
refuted = jb.verify(network, box, above, method=method, progress=False)
print(proved.status, "after", proved.nodes, "domains:", proved.guarantee)
print(refuted.status, "at", refuted.counterexample, "where the output is", refuted.outputs)
assert proved.status == "verified" and refuted.counterexample is not None

# %% [markdown]
# ## The search
#
# The certificate holds the tree of splits: for every node the coordinate where it is split, and the point. So we
# can draw how the box was split: finely where the network is low and bends.

# %% alt="The leaves of the search over the region, small where the output is near its least value"
figure, axes = plt.subplots(figsize=(5.5, 4.5))
shown = axes.contourf(axis, axis, heights, levels=20, cmap="viridis")
axes = jb.plots.search_leaves(folder / "proof", axes=axes)
axes.plot(*refuted.counterexample, "rx", label="counterexample of the other property")
axes.legend(loc="upper right", fontsize=8)
figure.colorbar(shown, label="output")
axes.set(title=f"{len(axes.patches)} leaves prove that the output is above {least - 0.05:.2f}")
plt.show()

# %% alt="How the lower bound of the margin rises and domains are done, against seconds"
jb.plots.search_progress(history)

# %% [markdown]
# ## A proof that can be checked
#
# `check_certificate` replays the file on the network: NumPy in float64 with a bound on every rounding error, or
# rational numbers; nothing of jaxbound's tracing or relaxations. It takes the network from us, not from the file.

# %%
for arithmetic in ("float64", "rational"):
    proof = jb.check_certificate(folder / "proof", layers, arithmetic=arithmetic)
    print(f"{proof.leaves} leaves hold in {proof.arithmetic}")

other = [(kernel * 1.1, bias) for kernel, bias in layers]
try:
    jb.check_certificate(folder / "proof", other)
except jb.CertificateError as fault:
    print("of another network:", fault)

# %% [markdown]
# ## A method like any other
#
# `bound` closes the gap that CROWN leaves; `certify` gives every example a status, and a counterexample where it has
# one. The classes are here whether the output is above its mean on the grid.

# %%
for name, chosen in (("CROWN", jb.Crown()), ("branch and bound", method)):
    found = jb.bound(network, chosen)(box)
    print(f"{name:17} {float(found.lower[0]):8.3f} <= output <= {float(found.upper[0]):7.3f}")
print(f"{'on the grid':17} {least:8.3f}              {heights.max():7.3f}")

kernel, bias = layers[-1]
mean = np.float32(heights.mean())
classes = [*layers[:-1], (np.concatenate([-kernel, kernel], axis=1), np.concatenate([mean - bias, bias - mean]))]
x = draw.uniform(-0.8, 0.8, (8, 2)).astype(np.float32)
labels = np.array([int(network(point)[0] > mean) for point in x])
report = jb.certify(classes, x, labels, 0.2, method=method, activation="relu")
print(report.status)
