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
# # Beyond MLPs
#
# Nothing in jaxbound knows of layers: a function is traced, and its operations are bounded one by one. So attention,
# recurrent networks, residuals, convolutions and LayerNorm need no special call. This notebook bounds one small network
# of each kind, then asks about regions other than a ball around the whole input: the weights of a layer, and a part of
# the input. `notebooks/certify.py` is the tour to read first.
#
# *Two files hold this notebook: `notebooks/beyond_mlps.py`, which is the one to edit, and
# `notebooks/beyond_mlps.ipynb`, which `jupytext --update --to ipynb notebooks/beyond_mlps.py` makes from it, without
# outputs. A test holds them together and runs them.*

# %%
import flax.linen as nn
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
train_x, train_y, x, labels = images[:1500], classes[:1500], images[1500:1550], classes[1500:1550]

# %% [markdown]
# ## Three networks
#
# All read the 8 × 8 digits. The first cuts them into four patches and lets these attend to each other, after a
# LayerNorm and with a residual. The second reads the upper half, then the lower half, with an LSTM. The third is
# convolutional, with a residual around its second layer.


# %%
class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        patches = x.reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, 4, 16)
        tokens = nn.relu(nn.Dense(16)(patches))
        normed = nn.LayerNorm()(tokens)
        tokens = tokens + nn.MultiHeadDotProductAttention(num_heads=2)(normed, normed)
        return nn.Dense(10)(tokens.reshape(-1, 64))


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        states = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(24))(x.reshape(-1, 2, 32)))
        return nn.Dense(10)(states[:, -1])


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x.reshape(-1, 8, 8, 1)))
        x = x + nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(10)(x.reshape(-1, 128))


def train(model, epochs=10, batch=50):
    """Adam on the cross-entropy, with weight decay; all steps are one compiled loop."""
    optimizer = optax.adamw(5e-3, weight_decay=0.1)
    params = model.init(jax.random.key(0), train_x[:1])
    rng = np.random.default_rng(0)
    batches = np.concatenate([rng.permutation(len(train_x)).reshape(-1, batch) for _ in range(epochs)])

    def loss(params, index):
        logits = model.apply(params, jnp.asarray(train_x)[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(train_y)[index]).mean()

    def step(carry, index):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, index), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda start: jax.lax.scan(step, start, batches)[0][0])((params, optimizer.init(params)))


networks = {"attention": Attention(), "LSTM": LSTM(), "residual": Residual()}
trained = {name: train(model) for name, model in networks.items()}
for name, model in networks.items():
    accuracy = (jax.jit(model.apply)(trained[name], images[1500:]).argmax(axis=1) == classes[1500:]).mean()
    print(f"{name:10} test accuracy {accuracy:.1%}")

# %% [markdown]
# ## What will be done
#
# `explain` traces the network and names the rule for every operation, without bounding anything. Operations that are
# affine in the image are many, and all have the same rule, so only the others are printed here. LayerNorm is a square,
# an inverse square root and a product; attention is a product, a softmax and a second product; an LSTM has sigmoids,
# tanhs and products at each step. The loop of `nn.RNN` has a fixed length and is unrolled.


# %%
def explain(name):
    model, params = networks[name], trained[name]
    ball = jb.LpBall(x[0], 0.01, jnp.inf)
    explanation = jb.explain(lambda image: model.apply(params, image[None])[0], jb.CrownIBP())(ball)
    print(f"{name}: {len(explanation.rows)} operations, refusals: {len(explanation.refusals)}")
    return [row for row in explanation.rows if row[1] not in ("affine", "input")]


for operation, _, rule, shape, _ in explain("attention"):
    print(f"{operation:48} {shape!s:16} {rule}")
print()
for operation, _, rule, shape, _ in explain("LSTM")[:6]:
    print(f"{operation:48} {shape!s:16} {rule}")

# %% [markdown]
# What has no rule is refused, with the reason, before any work. Such is a loop whose length depends on the region:

# %%
collatz = jb.explain(lambda z: jax.lax.while_loop(lambda v: v < 1, lambda v: 2 * v, z), jb.IBP())
print(collatz(jb.Box(jnp.float32(0.1), jnp.float32(0.2))))

# %% [markdown]
# ## Certificates
#
# `certify` is the same call for every network. Verified accuracy is a lower limit of the robust accuracy, and what PGD
# leaves is an upper limit; `check_against_attack` raises if the attack broke a certificate. These networks were trained
# without any thought of bounds, so the radii are small. Attention and the LSTM are bounded by IBP, the cheapest and
# loosest method, because CROWN-IBP's first call on them takes some ten seconds to compile.

# %%
runs = [("attention", jb.IBP()), ("LSTM", jb.IBP()), ("residual", jb.CrownIBP())]
print(f"{'network':10} {'method':9} {'radius':>7} {'clean':>7} {'PGD':>7} {'verified':>9}")
for name, method in runs:
    settings = {"apply_fn": networks[name].apply, "clip": (0, 1)}
    for eps in (0.0005, 0.001, 0.004):
        report = jb.certify(trained[name], x, labels, eps, method=method, **settings)
        found = jb.pgd(trained[name], x, labels, eps, key=jax.random.key(0), steps=20, **settings)
        jb.check_against_attack(report, found)
        accuracies = 1 - report.clean_error, 1 - float(found.success.mean()), report.verified_accuracy
        print(f"{name:10} {type(method).__name__:9} {eps:7}", *(f"{value:7.0%}" for value in accuracies))

# %% [markdown]
# Training changes this far more than the choice of a method. `python -m experiments.sequences --model vit` and `--model
# lstm` train a deeper transformer and a stack of two LSTMs on their IBP margins, and certify them at larger radii.
#
# ## A region on the weights
#
# Any argument may be a region. Below it is the last kernel of the attention network, each entry of which is known up to
# a relative error of 1 %, as after a coarse rounding of the weights; the image is fixed. `bound` gives bounds of all
# logits, and the class is certain where the lower bound of its logit exceeds the upper bounds of the others.

# %%
model, params = networks["attention"], trained["attention"]


def with_last_kernel(kernel, image):
    last = {**params["params"]["Dense_1"], "kernel": kernel}
    return model.apply({"params": {**params["params"], "Dense_1": last}}, image[None])[0]


kernel = params["params"]["Dense_1"]["kernel"]
box = jb.Box(kernel - 0.01 * jnp.abs(kernel), kernel + 0.01 * jnp.abs(kernel))
over_kernels = jax.jit(jax.vmap(jb.bound(with_last_kernel, jb.IBP()), in_axes=(None, 0)))
logits = over_kernels(box, x)
own = jnp.arange(10) == labels[:, None]
certain = jnp.where(own, logits.lower, jnp.inf).min(axis=1) > jnp.where(own, -jnp.inf, logits.upper).max(axis=1)
print(f"the class is certain for {certain.mean():.0%} of {len(x)} images; mean width {logits.width.mean():.3f}")

# %% alt="Intervals of the ten logits of one image over all these kernels"
figure, axes = plt.subplots(figsize=(5, 3))
axes = jb.plots.bounds_per_class(
    jb.Interval(logits.lower[0], logits.upper[0]), model.apply(params, x[:1])[0], axes=axes
)

# %% [markdown]
# ## A region on a part of the input
#
# A region on a part of the input is a function of that part. Here each pixel of the top left quarter may change by
# 0.001, and the rest is an ordinary array argument. Less may change
# than in a ball of the same radius around the whole image, so intervals are narrower:


# %%
def with_corner(corner, image):
    return model.apply(params, image.reshape(8, 8).at[:4, :4].set(corner).reshape(1, 64))[0]


image = x[0]
corner = jb.LpBall(image.reshape(8, 8)[:4, :4], 0.001, jnp.inf, clip=(0.0, 1.0))
whole = jb.LpBall(image, 0.001, jnp.inf, clip=(0.0, 1.0))
part = jb.bound(with_corner, jb.IBP())(corner, image)
full = jb.bound(lambda image: model.apply(params, image[None])[0], jb.IBP())(whole)
print(f"mean width of the logits: {part.width.mean():.3f} for the corner, {full.width.mean():.3f} for the whole image")
