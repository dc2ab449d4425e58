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
# # Jacobians and Lipschitz constants
#
# How fast can a network change? Its Jacobian says so at a point. Over a region there are many Jacobians, and jaxbound
# bounds all of them at once, entry by entry:
#
# $$\text{lower} \;\le\; \frac{\partial f_i}{\partial x_k}(x') \;\le\; \text{upper} \qquad
# \text{for all } x' \text{ with } \|x' - x\|_p \le \epsilon.$$
#
# From these follow local Lipschitz constants, certified radii, and regions without a stationary point.
# `notebooks/certify.py` is the tour to read first, and the page *Jacobians, Lipschitz constants and landscapes* says
# what each method can do.
#
# *Two files hold this notebook: `notebooks/lipschitz.py`, which is the one to edit, and `notebooks/lipschitz.ipynb`,
# which `jupytext --update --to ipynb notebooks/lipschitz.py` makes from it, without outputs. A test holds them together
# and runs them.*

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxbound as jb

images, classes = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, classes = images[order].astype(np.float32) / 16, classes[order].astype(np.int32)

# %% [markdown]
# ## A network
#
# Two hidden layers of 24 ReLUs on the 8 × 8 digits, as plain arrays: a list of kernels and biases is a network, too.


# %%
def logits(layers, x):
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


def train(epochs=12, batch=50, count=1500):
    rng, optimizer = np.random.default_rng(0), optax.adam(5e-3)
    sizes = itertools.pairwise((64, 24, 24, 10))
    start = [(jnp.asarray(rng.normal(size=p) * (2 / p[0]) ** 0.5, jnp.float32), jnp.zeros(p[1])) for p in sizes]
    batches = np.concatenate([rng.permutation(count).reshape(-1, batch) for _ in range(epochs)])
    x, labels = jnp.asarray(images), jnp.asarray(classes)

    def loss(layers, index):
        return optax.softmax_cross_entropy_with_integer_labels(logits(layers, x[index]), labels[index]).mean()

    def step(carry, index):
        layers, state = carry
        updates, state = optimizer.update(jax.grad(loss)(layers, index), state, layers)
        return (optax.apply_updates(layers, updates), state), None

    return jax.jit(lambda start: jax.lax.scan(step, start, batches)[0][0])((start, optimizer.init(start)))


layers = train()
test = slice(1500, None)
right = np.asarray(logits(layers, images[test]).argmax(axis=1)) == classes[test]
x, labels = images[test][right][:16], classes[test][right][:16]
print(f"test accuracy {right.mean():.1%}; below are {len(x)} test images that are classified correctly")

# %% [markdown]
# ## Bounds of the Jacobian
#
# `jacobian_bounds` gives an interval for every entry, here of the gradient of the label's logit (`spec` picks it).
# `RecurJac` follows the chain recursively; `FastLip` takes each layer by itself. Samples never leave the bounds.

# %%
spec = jnp.eye(10)[labels][:, None]  # (images, 1, classes): one row each
eps = 0.03
tight = jb.jacobian_bounds(layers, x, eps, spec=spec, method=jb.RecurJac(), activation="relu")
loose = jb.jacobian_bounds(layers, x, eps, spec=spec, method=jb.FastLip(), activation="relu")
noise = np.random.default_rng(1).uniform(-eps, eps, (200, *x.shape)).astype(np.float32)
gradient = jax.grad(lambda image, label: logits(layers, image)[label])
samples = jax.jit(jax.vmap(jax.vmap(gradient), in_axes=(0, None)))(x + noise, labels)
inside = (samples >= tight.lower[:, 0] - 1e-5) & (samples <= tight.upper[:, 0] + 1e-5)
print("shape", tight.lower.shape, "- all samples inside:", bool(inside.all()))
print(f"mean width: RecurJac {tight.width.mean():.3f}, Fast-Lip {loose.width.mean():.3f}")

# %% [markdown]
# ## Lipschitz constants
#
# `lipschitz` turns them into constants, from above and with their rounding: of each output (as here), of margins, or of
# the whole map, for the norms 1, 2 and ∞. They grow with the radius and saturate: an infinite radius gives the global
# constant. The product of operator norms (`spectral_lipschitz`) knows nothing of the region, and is far above.

# %%
radii = np.float32([0, 0.003, 0.01, 0.03, 0.1, 0.3, 1, np.inf])
methods = {"RecurJac": jb.RecurJac(), "Fast-Lip": jb.FastLip()}
constants = {
    name: np.array([jb.lipschitz(layers, x, r, spec=spec, method=method, activation="relu").mean() for r in radii])
    for name, method in methods.items()
}
product = float(jb.spectral_lipschitz(layers, x, norm=jnp.inf, activation="relu")[labels].mean())
print(f"{'radius':>8}", *(f"{name:>9}" for name in methods))
for radius, *row in zip(radii, *constants.values(), strict=True):
    print(f"{radius:8.3f}", *(f"{value:9.2f}" for value in row))
print(f"product of operator norms: {product:.1f}")
print("constants grow with the radius:", all(np.all(np.diff(values) >= -1e-4) for values in constants.values()))
print("RecurJac is never above Fast-Lip:", bool(np.all(constants["RecurJac"] <= constants["Fast-Lip"] * 1.0001)))

# %% alt="Lipschitz constants against the radius: RecurJac below Fast-Lip below the product of norms"
figure, axes = plt.subplots(figsize=(6, 4))
curves = {name: values[1:-1] for name, values in constants.items()}
curves["product of operator norms"] = np.full(len(radii) - 2, product)
axes = jb.plots.against_radius(radii[1:-1], curves, quantity="Lipschitz constant of the label's logit", axes=axes)
# %% [markdown]
# ## Certified radii
#
# On the way from the centre to a point of the ball, a margin falls by at most the integral of its local Lipschitz
# constants. `LipschitzIntegral` cuts the radius into parts and adds up: an upper bound at every radius, and a method
# for `certify` and `certified_radius` like any other.

# %%
for name, method in methods.items():
    integral = jb.LipschitzIntegral(method, steps=5)
    radius = jb.certified_radius(layers, x, labels, targets="runner-up", method=integral, steps=10, activation="relu")
    print(f"{name}: mean certified radius {radius.mean():.4f}, least {radius.min():.4f}")

# %% [markdown]
# ## Where there is no stationary point
#
# Where one entry of a gradient keeps its sign over a whole ball, nothing in the ball is a minimum, a maximum or a
# saddle of that logit. `landscape_radius` searches the largest such ball, kinks included.

# %%
radius = np.asarray(jb.landscape_radius(layers, x, labels, steps=10, activation="relu"))
print(f"median radius {np.median(radius):.3f}, least {radius.min():.3f}, without any end {np.isinf(radius).mean():.0%}")
print("every image lies in such a ball:", bool((radius > 0).all()))
