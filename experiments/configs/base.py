"""Every field of a training configuration with its default; the other files here change some.

Epochs may be fractions. In the released configurations "schedule_length" is one more than `ramp_epochs` here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxbound.training.models import FAMILIES


def get_config() -> ConfigDict:
    """The defaults: CROWN-IBP with beta and kappa from 1 to 0."""
    return ConfigDict({
        "name": "base",  # of the folder below --output
        "seed": 0,
        # Data
        "dataset": "digits",
        "augment": False,  # crops and flips
        "validation": 0,  # training examples held out to choose the best parameters after the ramp; 0: the last ones
        "batch_size": 256,
        "accumulate": 1,  # parts of a batch that are worked off one after the other
        # Networks
        "models": ("mlp",),
        "model_subset": "",  # such as "0,2"; empty for all
        "hidden": (64, 64),  # widths of "mlp", filters of "resnet"
        "released": False,  # the released code's third convolution
        "initializer": "flax",  # or torch, as in the released code, or ibp
        # Loss
        "loss": "margins",  # natural, margins, fused, adversarial or trades
        "method": "crown_ibp_alone",  # the bounds that beta mixes with IBP's: equation 9 of the paper
        "norm": "inf",
        "kappa_start": 1.0,
        "kappa_final": 0.0,
        "beta_start": 1.0,
        "beta_final": 0.0,
        "clock": "eps",
        "l1": 0.0,
        "activity": 0.0,
        "attack_steps": 10,
        "trades_weight": 6.0,
        "natural_dtype": "float32",  # bfloat16 computes the clean pass in it; bounds and certificates never
        # Schedule, in epochs
        "epochs": 100.0,
        "eps": 0.3,
        "ramp_start": 1.0,
        "ramp_epochs": 60.0,
        "ramp_shape": "linear",
        "learning_rate": 5e-4,
        "decay_every": 10.0,  # after the ramp; 0 for never
        "milestones": (),  # instead of decay_every
        "decay_factor": 0.5,
        "clip_norm": 0.0,  # of the gradient; 0 for none
        # Looks and tests
        "parallel": "jit",  # or pmap
        "interval": 1.0,  # epochs between records and checkpoints
        "watch": 256,  # training examples to look at where none are held out; 0 for none
        "look_pgd_steps": 10,
        "eps_test": 0.3,
        "verify_with": "ibp",
        "test_examples": 0,  # 0 for all
        "test_batch_size": 256,
        "pgd_steps": 200,
        "pgd_step_size": 0.0,  # 0 for 2.5 eps / steps
    })  # fmt: skip


def changed(name: str, **changes) -> ConfigDict:
    """The defaults with some fields changed."""
    config = get_config()
    config.name = name
    config.update(changes)
    return config


def mnist(name: str, family: str, **changes) -> ConfigDict:
    """The released MNIST family: 100 epochs, ramp of 60 after the first (appendix D), no natural loss."""
    settings = {"dataset": "mnist", "models": FAMILIES[family], "initializer": "torch", "kappa_start": 0.0}
    return changed(name, **{**settings, **changes})


def cifar(name: str, family: str, **changes) -> ConfigDict:
    """The released CIFAR-10 family: 200 epochs, ramp of 120 after 10, crops and flips, no natural loss."""
    settings = {
        "dataset": "cifar10", "models": FAMILIES[family], "initializer": "torch", "augment": True, "batch_size": 128,
        "learning_rate": 1e-3, "kappa_start": 0.0,
        "epochs": 200.0, "ramp_start": 10.0, "ramp_epochs": 120.0, "eps": 8 / 255, "eps_test": 8 / 255,
    }  # fmt: skip
    return changed(name, **{**settings, **changes})


def cifar_large(name: str, eps: float, **changes) -> ConfigDict:
    """DM-large on CIFAR-10: 3200 epochs, a smoothed ramp of 1600 after 320, trained at 1.1 times the radius."""
    settings = {
        "models": ("DM-large",), "batch_size": 1024, "learning_rate": 5e-4, "milestones": (2600.0, 3040.0),
        "decay_factor": 0.1, "epochs": 3200.0, "ramp_start": 320.0, "ramp_epochs": 1600.0, "ramp_shape": "smoothed",
        "eps": 1.1 * eps, "eps_test": eps, "interval": 10.0,
    }  # fmt: skip
    return cifar(name, "cifar_small", **{**settings, **changes})
