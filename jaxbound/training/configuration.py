"""What a training run is made of: every field with its default. It knows no JAX, so that it may be read at once.

Epochs may be fractions. In the CROWN-IBP paper's released configurations "schedule_length" is one more than
`ramp_epochs` here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from jaxbound.errors import ArgumentError, argument, unknown_option

MethodName = Literal[
    "ibp", "crown_ibp", "crown_ibp_alone", "crown", "fastlin", "forward", "crown_zero", "crown_alone",
    "convex_polytope", "convex_polytope_10", "convex_polytope_50", "frown", "best",
]  # fmt: skip
"""The names in `jaxbound.methods.named`."""
Slope = Literal["", "adaptive", "parallel", "zero", "one"]
"""How the slope of lower lines is chosen; empty for the method's own way."""


@dataclasses.dataclass
class Configuration:
    """The defaults: CROWN-IBP with beta and kappa from 1 to 0.

    >>> Configuration(eps=0.1).method
    'crown_ibp_alone'
    """

    name: str = "base"
    """of the folder below the output folder"""
    seed: int = 0
    """of parameters, batches and attacks"""
    dataset: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, svhn, or your own: module:attribute or an .npz file (docs/training.md)"""
    train_examples: int = 0
    """of the training set, the first ones; 0 for all"""
    clip: tuple[float, ...] = (0.0, 1.0)
    """the range of valid inputs; empty for none"""
    augment: bool = False
    """crops and flips"""
    validation: int = 0
    """training examples held out to choose the best parameters after the ramp; 0 keeps the last ones"""
    batch_size: int = 256
    """examples of a step"""
    accumulate: int = 1
    """parts of a batch that are worked off one after the other"""
    models: tuple[str, ...] = ("mlp",)
    """mlp, resnet, networks of the paper (A to T, DM-small, DM-medium, DM-large), or module:attribute of your own"""
    warm_start: str = ""
    """the folder of a finished run whose parameters to start from"""
    model_subset: str = ""
    """which of the models, such as "0,2"; empty for all"""
    hidden: tuple[int, ...] = (64, 64)
    """widths of mlp, filters of resnet"""
    released: bool = False
    """the released code's third convolution"""
    initializer: Literal["flax", "torch", "ibp"] = "flax"
    """of parameters; torch as in the released code"""
    loss: Literal["natural", "margins", "fused", "adversarial", "trades"] = "margins"
    """the robust term"""
    method: MethodName = "crown_ibp_alone"
    """the bounds that beta mixes with IBP's; crown_ibp_alone is equation 9 of the paper"""
    lower_slope: Slope = ""
    """of its lines below: adaptive, parallel (same-slope), zero (zero-lb) or one (one-lb)"""
    norm: str = "inf"
    """of the balls"""
    kappa_start: float = 1.0
    """weight of the natural loss at first"""
    kappa_final: float = 0.0
    """weight of the natural loss in the end"""
    beta_start: float = 1.0
    """weight of the method's bounds at first"""
    beta_final: float = 0.0
    """weight of the method's bounds in the end"""
    clock: Literal["eps", "step"] = "eps"
    """what kappa and beta go with"""
    l1: float = 0.0
    """weight of the sum of absolute parameters"""
    activity: float = 0.0
    """weight of the unstable inputs of nonlinearities"""
    attack_steps: int = 10
    """steps of PGD in the adversarial losses"""
    trades_weight: float = 6.0
    """weight of the divergence in the loss trades"""
    natural_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16 computes the clean pass in it; bounds and certificates never"""
    epochs: float = 100.0
    """how long to train"""
    eps: float = 0.3
    """the radius in training"""
    ramp_start: float = 1.0
    """epochs before the radius grows"""
    ramp_epochs: float = 60.0
    """epochs over which it grows"""
    ramp_shape: Literal["linear", "smoothed"] = "linear"
    """how it grows"""
    learning_rate: float = 5e-4
    """of Adam"""
    decay_every: float = 10.0
    """epochs between two decays after the ramp; 0 for never"""
    milestones: tuple[float, ...] = ()
    """epochs of decays, instead of decay_every"""
    decay_factor: float = 0.5
    """of the learning rate"""
    clip_norm: float = 0.0
    """of the gradient; 0 for none"""
    parallel: Literal["pmap", "jit"] = "pmap"
    """over several devices; jit shards the batch"""
    interval: float = 1.0
    """epochs between records and checkpoints"""
    watch: int = 256
    """training examples to look at where none are held out; 0 for none"""
    look_pgd_steps: int = 10
    """steps of PGD at every look"""
    eps_test: float = 0.3
    """the radius in tests"""
    verify_with: MethodName = "ibp"
    """the method of the certificates"""
    test_examples: int = 0
    """of the test set; 0 for all"""
    test_batch_size: int = 256
    """examples at once"""
    pgd_steps: int = 200
    """steps of PGD in tests"""
    pgd_step_size: float = 0.0
    """their length; 0 for 2.5 eps / steps"""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            setattr(self, field.name, tuple(value) if isinstance(value, list) else value)
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise unknown_option(name, getattr(self, name), get_args(kind))
        if self.clip and not (len(self.clip) == 2 and self.clip[0] <= self.clip[1]):
            raise argument("clip", f"is {self.clip}", "pass the lower end, then the upper one, or nothing")

    def to_json(self) -> str:
        """The text of a run's `config.json`."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1) + "\n"


def described() -> str:
    """Every field with its default and what it is, a line each; behind it what it may be, where that is a list.

    >>> described().splitlines()[1]
    'seed = 0: of parameters, batches and attacks'
    """
    kinds, defaults = get_type_hints(Configuration), dataclasses.asdict(Configuration())
    among = {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}
    (body,) = (node.body for node in ast.parse(inspect.getsource(Configuration)).body if isinstance(node, ast.ClassDef))
    texts = [ast.literal_eval(node.value) for node in body[1:] if isinstance(node, ast.Expr)]
    lines = []
    for name, text in zip(defaults, texts, strict=True):
        choices = f" ({', '.join(map(repr, among[name]))})" if name in among else ""
        lines.append(f"{name} = {defaults[name]!r}: {' '.join(text.split())}{choices}")
    return "\n".join(lines)


def digits() -> Configuration:
    """The embedded default: scikit-learn's digits, trained and certified in under a minute on two cores."""
    return Configuration(
        name="digits", hidden=(64, 64), batch_size=128, epochs=60.0, ramp_start=2.0, ramp_epochs=30.0,
        learning_rate=2e-3, kappa_final=0.5, eps=0.05, eps_test=0.05, interval=5.0, pgd_steps=40,
    )  # fmt: skip


def read(path: Path) -> Configuration:
    """The configuration in a file.

    Raises:
        ArgumentError: the file is not one of a training run.
    """
    try:
        return Configuration(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ArgumentError(f"{path} is not the configuration of a training run ({error})") from error
