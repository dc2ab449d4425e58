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
# # Training a network that can be certified
#
# A network trained for accuracy alone has few certificates: its bounds are loose, and its margins small. Certified
# training minimises a loss *made of bounds*. With lower bounds $m_j$ of the margins $f_y - f_j$ over a ball,
#
# $$ \log\Big(1 + \sum_j e^{-m_j}\Big) \;\ge\; \text{cross-entropy at every point of the ball.} $$
#
# This tour trains one small network with and without it on handwritten digits, certifies both, and shows what the
# bounds of training have to do with those of certification. It is the short form of `python -m experiments.train`.
#
# *Two files hold this tour: `notebooks/training.py`, which is the one to edit, and `notebooks/training.ipynb`, which
# `jupytext --update --to ipynb notebooks/training.py` makes from it, without outputs. A test holds them together and
# runs them.*

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from jaxbound.training import data
from jaxbound.training.losses import MarginLoss, Objective
from jaxbound.training.models import MLP
from jaxbound.training.schedules import Epsilon
from jaxbound.training.step import Schedules, Step, create, everywhere, sharded

# %% [markdown]
# ## Data, a network, schedules
#
# Batch number $s$ is a function of the seed and of $s$ alone, so a run needs no state of a pipeline. The radius grows
# over a ramp: over large balls a fresh network has no loss worth descending. With it go $\kappa$, the weight of the
# natural loss, and $\beta$, which leads from the tight bounds of CROWN-IBP to plain interval bounds.

# %%
digits = data.load("digits")
sampler = data.Sampler(len(digits.train), batch_size=128, seed=0)
model = MLP((24,))
radius, epochs = 0.06, 30
total = epochs * sampler.steps_per_epoch
ramp = Epsilon(radius, start=total // 20, length=total // 2)
schedules = Schedules.of(ramp, kappa_start=1.0, kappa_final=0.25)

# %% [markdown]
# ## Training
#
# A step is a pure function of a state and a batch. `sharded` compiles it for as many devices as there are; `pmapped`
# does so by `pmap`. The robust term takes any bounding method. Intervals, here, compile in a moment;
# `MarginLoss(jb.CrownIBP())`, which starts from tighter bounds and ends in intervals as $\beta$ goes to 0, is what the
# program uses unless told otherwise.

# %%
TERMS = {"accuracy": None, "intervals": MarginLoss(jb.IBP())}


def train(term):
    device, history = jax.devices()[:1], []
    step = sharded(Step(Objective(model.apply, term), schedules), device)
    state = create(model, np.zeros((1, 8, 8, 1), np.float32), optax.adam(5e-3), jax.random.key(0))
    state = everywhere(state, device)
    for number in range(total):
        state, metrics = step(state, data.batch_of(digits, sampler, number))
        history.append(metrics)
        if (number + 1) % (total // 3) == 0:
            print(f"step {number + 1} of {total}, loss {float(metrics.loss):.3f}", flush=True)
    return state, jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(history))


trained = {name: train(term) for name, term in TERMS.items()}

# %% alt="The parts of a batch that are not certified, and wrong, and the schedules, against the step"
jb.plots.training_progress(trained["intervals"][1])

# %% [markdown]
# ## Certificates
#
# Training certifies nothing: its numbers are those of one batch, up to rounding. `certify` bounds every test image with
# the rounding of the computation counted against it, and an attack must not break what it verified.

# %%
x, labels = digits.images(digits.test.x), digits.test.labels
methods = {"IBP": jb.IBP(), "CROWN": jb.Crown(intersect=False)}
found = {}
for name, (state, _) in trained.items():
    attack = jb.pgd(state, x, labels, radius, key=jax.random.key(1), steps=10, clip=(0.0, 1.0))
    for kind, method in methods.items():
        found[name, kind] = jb.certify(state, x, labels, radius, method=method, clip=(0.0, 1.0))
        jb.check_against_attack(found[name, kind], attack)
    clean, attacked = found[name, "IBP"].clean_error, float(jnp.mean(attack.success))
    verified = ", ".join(f"{kind} {found[name, kind].verified_error:.1%}" for kind in methods)
    print(f"trained for {name:9}: clean error {clean:.1%}, PGD {attacked:.1%}; verified error by {verified}")

# %% [markdown]
# The network that was trained for accuracy has hardly a certificate by intervals, and CROWN makes up for most of that.
# In the one that was trained by intervals, intervals are nearly as good as CROWN: it learned to make *them* tight. In
# deeper networks at larger radii they are far better than CROWN alone: that is the finding of Table 1 of the CROWN-IBP
# paper, and what `jb.Best(jb.IBP(), jb.Crown())` is for.

# %%
gap = {name: found[name, "IBP"].verified_error - found[name, "CROWN"].verified_error for name in trained}
print("certified training pays:", found["intervals", "IBP"].verified_error < found["accuracy", "CROWN"].verified_error)
print("intervals are tight where they were trained:", gap["intervals"] < 0.2 * gap["accuracy"])

# %% [markdown]
# ## Where to go on
#
# The training guide has the paper's networks, data sets and configurations, and several devices and hosts;
# `python -m experiments.train` runs them, with checkpoints that survive being killed, and
# `python -m experiments.evaluate` makes the tables and figures of saved runs.
