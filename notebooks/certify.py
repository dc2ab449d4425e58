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
# # Certifying a Flax network
#
# A test set tells what a network does at some points. A *bound* tells what it can do at **every** point of a region:
#
# $$\text{lower} \;\le\; f(x') \;\le\; \text{upper} \qquad \text{for all } x' \text{ with } \|x' - x\|_p \le \epsilon.$$
#
# Where the lower bound of every margin, true logit minus other logit, is positive, no input of the region changes the
# class: the example is *verified*. This tour trains a small network on handwritten digits, bounds it, certifies it,
# attacks it, and then looks at what else can be done with a bound, because it is a JAX function like any other.
#
# *Two files hold this tour: `notebooks/certify.py`, which is the one to edit, and `notebooks/certify.ipynb`, which
# `jupytext --update --to ipynb notebooks/certify.py` makes from it, without outputs. A test holds them together and
# runs them.*

# %%
import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxbound as jb

# %% [markdown]
# ## A network
#
# 8 × 8 images with pixels in [0, 1], and plain training: nothing here knows of bounds.

# %%
images, classes = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, classes = images[order].astype(np.float32) / 16, classes[order].astype(np.int32)
train_x, train_y, test_x, test_y = images[:1500], classes[:1500], images[1500:], classes[1500:]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


def train(model, x, labels, epochs=30, batch=50, seed=0):
    """Adam on the cross-entropy; all steps are one compiled loop."""
    optimizer = optax.adamw(2e-3, weight_decay=0.1)
    params = model.init(jax.random.key(seed), x[:1])
    rng = np.random.default_rng(seed)
    batches = np.concatenate([rng.permutation(len(x)).reshape(-1, batch) for _ in range(epochs)])

    def loss(params, index):
        logits = model.apply(params, jnp.asarray(x)[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[index]).mean()

    def step(carry, index):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, index), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda start: jax.lax.scan(step, start, batches)[0][0])((params, optimizer.init(params)))


model = MLP()
params = train(model, train_x, train_y)
accuracy = (model.apply(params, test_x).argmax(axis=1) == test_y).mean()
print(f"test accuracy {accuracy:.1%} on {len(test_x)} images")

# %% [markdown]
# ## Bounds in five lines
#
# A chain of Linen `Dense` layers with ReLU between needs no model: the parameters say it all. (Any other network is
# passed as `apply_fn=model.apply`, see below.) `x` is a batch, and the bounds have the same leading axis.

# %%
x, labels = test_x[:100], test_y[:100]
eps = 0.02
bounds = jb.crown(params, x, eps, activation="relu")
print(f"bounds of {bounds.lower.shape} logits, mean width {bounds.width.mean():.2f}")
print(f"first image, class {labels[0]}:\n{np.stack([bounds.lower[0], bounds.upper[0]]).round(2)}")

# %% alt="Intervals of the ten logits of one image, with their values"
figure, axes = plt.subplots(figsize=(5, 3))
axes = jb.plots.bounds_per_class(jb.Interval(bounds.lower[0], bounds.upper[0]), model.apply(params, x[0]), axes=axes)
# %% [markdown]
# However many points of the balls we try, no logit leaves its bounds:

# %%
noise = np.random.default_rng(1).choice([-eps, eps], size=(200, *x.shape)).astype(np.float32)
sampled = jax.vmap(lambda step: model.apply(params, x + step))(noise)
print("inside:", bool(((bounds.lower <= sampled) & (sampled <= bounds.upper)).all()))

# %% [markdown]
# ## Three methods
#
# `ibp` propagates intervals and is nearly free. `crown_ibp` bounds the output by one backward pass of linear functions
# over IBP's intervals. `crown` makes such a pass for every layer. All three are sound; what differs is how much they
# give away, and the deeper the network or the larger the radius, the more.

# %% alt="The mean width of bounds against the radius: IBP is widest, CROWN closest to the sampled range"
radii = np.geomspace(0.0025, 0.08, 6, dtype=np.float32)
functions = {"IBP": jb.ibp, "CROWN-IBP": jb.crown_ibp, "CROWN": jb.crown}

widths = {
    name: [function(params, x, radius, activation="relu").width.mean() for radius in radii]
    for name, function in functions.items()
}
widths["range of 200 random corners"] = [
    np.ptp(jax.vmap(lambda step, r=radius: model.apply(params, x + r * step))(noise / eps), axis=0).mean()
    for radius in radii
]
figure, axes = plt.subplots(figsize=(5, 3.5))
axes = jb.plots.against_radius(radii, widths, quantity="mean width of the logits' bounds", axes=axes)

# %% [markdown]
# ## Certificates
#
# `certify` bounds margins directly (not as differences of two bounds), batch by batch, and counts an example as
# verified only if every margin exceeds a bound on the *rounding error* of the whole computation. `clip` says that
# pixels stay in [0, 1].

# %%
print(jb.certify(params, x, labels, eps, method=jb.Crown(), activation="relu", clip=(0, 1)))

# %% [markdown]
# A certificate is a lower limit of the robust accuracy. The upper limit comes from an attack: `pgd` looks for an input
# of the same ball that is misclassified. The truth lies between, and `check_against_attack` raises if an attack ever
# broke a certificate.

# %% alt="Verified accuracy against the radius by method, below the accuracy under attack"
radii = np.linspace(0, 0.08, 9, dtype=np.float32)
methods = {"IBP": jb.IBP(), "CROWN-IBP": jb.CrownIBP(), "CROWN": jb.Crown()}
attack = jax.jit(
    functools.partial(jb.pgd, params, x, labels, activation="relu", key=jax.random.key(0), restarts=3, clip=(0, 1))
)
attacks = [attack(radius) for radius in radii]

accuracies = {"PGD (upper limit)": [100 * (1 - found.success.mean()) for found in attacks]}
for name, method in methods.items():
    reports = [jb.certify(params, x, labels, radius, method=method, activation="relu", clip=(0, 1)) for radius in radii]
    for report, found in zip(reports, attacks, strict=True):
        jb.check_against_attack(report, found)
    verified = np.array([report.verified_accuracy for report in reports])
    accuracies[f"{name}, verified"] = 100 * verified
    print(f"{name}: done, {verified[1]:.0%} at radius {radii[1]:g}", flush=True)

figure, axes = plt.subplots(figsize=(5, 3.5))
axes = jb.plots.against_radius(radii, accuracies, quantity="accuracy on 100 test images [%]", log=False, axes=axes)

# %% [markdown]
# ## What is done, and what is refused
#
# `explain` traces a function and says how every operation would be bounded, without bounding anything. What cannot be
# bounded is refused here with the reason, and never approximated by a point.


# %%
def logits(image):
    return model.apply(params, image)


ball = jb.LpBall(x[0], eps, np.inf)
for name, _, rule, shape, _ in jb.explain(logits, jb.Crown())(ball).rows:
    print(f"{name:22} {shape!s:8} {rule}")

# %%
print(jb.explain(lambda image: jnp.sort(logits(image)), jb.Crown())(ball))

# %% [markdown]
# ## A convolutional network and an $\ell_2$ ball
#
# Nothing changes but `apply_fn=model.apply`; any norm with $p \ge 1$ will do. With `clip`, the region is the ball
# *intersected* with the valid images, which is smaller than either. A `spec` asks for linear functions of the outputs:
# here the margins, of which only lower bounds are of interest.


# %%
class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


square = (-1, 8, 8, 1)
convnet = ConvNet()
conv_params = train(convnet, train_x.reshape(square), train_y, epochs=30)
worst = jb.crown_ibp(
    conv_params, x.reshape(square), 0.15, apply_fn=convnet.apply, norm=2, clip=(0, 1),
    spec=jb.margin_spec(labels, 10), sides="lower",
)  # fmt: skip
print(f"margins {worst.lower.shape}; positive for {(worst.lower > 0).all(axis=1).mean():.0%} of the images")

# %% [markdown]
# ## The linear functions behind a bound
#
# CROWN encloses every activation between two lines, and composes the lines of all layers into two linear functions of
# the *input*. `linear_bounds` returns them for any JAX function and any region. Here the function is one GELU, and the
# regions are four intervals at once, through `vmap`.

# %% alt="GELU on four intervals, each between its two lines"
boxes = jb.Box(jnp.array([-4.0, -2.0, -1.0, -4.0]), jnp.array([-1.5, 0.5, 3.0, 4.0]))
lines = jax.jit(jax.vmap(jb.linear_bounds(jax.nn.gelu, jb.Crown())))(boxes)

figure, axes = plt.subplots(1, 4, figsize=(12, 2.8))
for i, panel in enumerate(axes):
    ends, own = jb.Interval(boxes.lower[i], boxes.upper[i]), jax.tree.map(lambda leaf, i=i: leaf[i], lines)
    panel = jb.plots.lines(jax.nn.gelu, ends, own, name="GELU", axes=panel)

# %% [markdown]
# ## Bounds are JAX functions
#
# `bound(fn, method)` maps regions to bounds as `fn` maps points to values, so it goes under `jit` and `vmap` like `fn`
# itself. Its arguments may mix regions and arrays; below the parameters are an array argument, so that one compiled
# function serves every network of this shape.

# %%
bound = jb.bound(model.apply, jb.CrownIBP())


@jax.jit
def over_batch(params, centers, radius):
    return jax.vmap(lambda center: bound(params, jb.LpBall(center, radius, 2)))(centers)


for radius in (0.05, 0.1, 0.2):
    started = time.perf_counter()
    widths = jax.block_until_ready(over_batch(params, x, radius)).width
    milliseconds = 1000 * (time.perf_counter() - started)  # only the first call compiles
    print(f"l2 radius {radius}: mean width {widths.mean():6.2f} for {len(x)} images in {milliseconds:7.1f} ms")

# %% [markdown]
# `margins` is `certify` without the host loop: a function for `jit` and `grad`. Radii may differ between examples, so a
# bisection finds for all images at once the largest radius at which they are verified. (Every radius that it keeps was
# itself verified, up to rounding, so this needs no assumption on how margins depend on the radius.)

# %% alt="Ten images with their class and certified radius"
margins = functools.partial(jb.margins, method=jb.CrownIBP(), activation="relu", clip=(0, 1))


@jax.jit
def certified_radius(params, x, labels):
    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        verified = (margins(params, x, labels, middle) > 0).all(axis=1)
        return jnp.where(verified, middle, low), jnp.where(verified, high, middle)

    return jax.lax.fori_loop(0, 12, halve, (jnp.zeros(len(x)), jnp.full(len(x), 0.25)))[0]


radius = certified_radius(params, x, labels)
ranked = np.argsort(radius)
figure, axes = plt.subplots(1, 10, figsize=(12, 1.8))
for panel, index in zip(axes, [*ranked[:5], *ranked[-5:]], strict=True):
    panel.imshow(x[index].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    panel.set_title(f"{labels[index]}: {radius[index]:.3f}")
    panel.axis("off")
figure.suptitle("class and certified radius: the five most fragile images, and the five most robust")
figure.tight_layout()

# %% alt="The share of images that are certified, against the radius"
figure, axes = plt.subplots(figsize=(5, 3))
axes = jb.plots.certified_accuracy({"CROWN-IBP": radius}, axes=axes)

# %% [markdown]
# ## Gradients of bounds
#
# How fast does a certificate decay with the radius? `grad` knows: radii are per image, so the gradient of the summed
# margins holds every image's own derivative. One Newton step from a common radius then comes close to the certified
# radius that the bisection found.


# %% alt="Radii by one Newton step against those by bisection: close to the diagonal"
@jax.jit
def smallest_margins(radii):
    margin = margins(params, x, labels, radii).min(axis=1)
    return margin.sum(), margin


start = jnp.full(len(x), 0.015)
slope, margin = jax.grad(smallest_margins, has_aux=True)(start)
predicted = start - margin / slope

figure, axes = plt.subplots(figsize=(4, 3.5))
axes.plot(radius, predicted, ".", label="one image")
axes.plot([0, 0.03], [0, 0.03], "k--", linewidth=0.8, label="equal")
axes.set(xlabel="certified radius by bisection", ylabel="by one Newton step from 0.015")
axes.legend()
figure.tight_layout()

# %% [markdown]
# The same derivative by the *parameters* is what certified training descends: `python -m experiments.digits` does so,
# in under a minute, and draws the curves above for the network that it gets.
