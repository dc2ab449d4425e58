"""Draws the figure of the landing page and the README: `python docs/figure.py docs/_static/certified.svg`."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxbound as jb

EPS = (0.005, 0.01, 0.02)
COLORS = ("#08519c", "#4292c6", "#9ecae1")


class Net(nn.Module):
    """A small perceptron."""

    @nn.compact
    def __call__(self, x):
        """Logits of 8 x 8 images."""
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def trained() -> tuple[Net, dict, np.ndarray, np.ndarray]:
    """A network trained on handwritten digits, and its test images."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, classes = images[order].astype(np.float32) / 16, classes[order].astype(np.int32)
    model, optimizer = Net(), optax.adam(1e-3)
    variables = model.init(jax.random.key(0), images[:1])

    def loss(variables):
        logits = model.apply(variables, images[:1500])
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes[:1500]).mean()

    @jax.jit
    def step(carry, _):
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return (optax.apply_updates(variables, updates), state), None

    (variables, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables)), length=400)
    return model, variables, images[1500:], classes[1500:]


def main(path: str) -> None:
    """Draw."""
    model, variables, x, labels = trained()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9, 2.8), width_ratios=(1, 1.6, 1.6), layout="constrained"
    )
    left.imshow(x[0].reshape(8, 8), cmap="gray_r")
    left.set(title=f"a {labels[0]}", xticks=[], yticks=[])
    for eps, color in reversed(list(zip(EPS, COLORS, strict=True))):
        lower, upper = jb.crown(variables, x[:1], eps, apply_fn=model.apply, clip=(0.0, 1.0))
        middle.bar(range(10), upper[0] - lower[0], bottom=lower[0], color=color, label=f"{eps:g}")
    middle.plot(range(10), model.apply(variables, x[:1])[0], "k.", label="value")
    middle.set(title="what its logits can be", xlabel="class", xticks=range(10))
    middle.legend(title="radius", fontsize=7, title_fontsize=7)
    radii = np.linspace(0, 0.05, 11)
    for name, method, style in (("CROWN", jb.Crown(), "-"), ("IBP", jb.IBP(), "--")):
        verified = [
            np.mean(jnp.all(jb.margins(variables, x, labels, r, method=method, apply_fn=model.apply) > 0, axis=1))
            for r in radii
        ]
        right.plot(radii, verified, style, color=COLORS[0], label=name)
    right.set(title="certified accuracy", xlabel="radius (l$_\\infty$)", ylim=(0, 1))
    right.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
