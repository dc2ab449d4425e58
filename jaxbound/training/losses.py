"""Losses of certified training, per example: natural, robust, adversarial, and their mixture.

With margins m_j = f_y - f_j to the classes j != y, the cross-entropy is log(1 + sum_j exp(-m_j)). It falls in every
margin, so lower bounds of the margins over a region, put in their place, give an upper bound of the cross-entropy at
every point of the region: the robust loss. Two lower bounds mix to a lower bound, *inside* the loss:

    robust(x)  =  log(1 + sum_j exp(-(beta m_j^tight + (1 - beta) m_j^IBP)))
    loss(x)    =  (1 - kappa) robust(x) + kappa natural(x)  +  regularisers.

Margins come from `jaxbound.margins`: the specification is merged with the last layer, and the label's own row, which
would be 0, is left out.

A robust term is an object called as `term(clean, eps, beta)`, with what is known of the clean batch; `MarginLoss`,
`AdversarialLoss` and `TradesLoss` are here, `fusion.FusedLoss` beside. Bounds of an estimate (a projected polytope)
make a loss like any other, without the guarantee.

BatchNorm: in training the clean batch is normalised by its own statistics, and bounds hold these fixed: the network
with frozen statistics is bounded, so that the bound is one of a network that this batch defines, and of no other. It
is sound for the network in eval mode with those statistics. Gradients flow through the statistics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxbound.certificates.attack import pgd
from jaxbound.certificates.margins import margins
from jaxbound.methods import IBP, CrownIBP, Method
from jaxbound.network.inputs import region_around
from jaxbound.network.resolving import resolve
from jaxbound.regions import per_example
from jaxbound.training.modes import train_pass
from jaxbound.transforms.bounding import pre_activation_bounds

Clip = tuple[ArrayLike, ArrayLike] | None


class Clean(NamedTuple):
    """What is known of a batch without its region; `variables` hold frozen statistics."""

    apply_fn: Callable
    variables: dict
    x: jax.Array
    labels: jax.Array
    logits: jax.Array
    keys: jax.Array
    """One key per example."""
    key: jax.Array | None = None
    """One key for the batch, the same on every device."""


class Robust(NamedTuple):
    """A robust term per example: its loss, and whether the prediction is known (or believed) to hold."""

    loss: jax.Array
    holds: jax.Array


class Term(Protocol):
    """A robust term; `interval` is the same with IBP alone, for beta = 0, where there is such a thing."""

    def __call__(self, clean: Clean, eps: ArrayLike, beta: ArrayLike) -> Robust:
        """The loss over a ball of radius eps."""
        ...

    @property
    def interval(self) -> Term | None:
        """The term for beta = 0."""
        ...


# --- per example ------------------------------------------------------------------------------------------------------


def natural(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy at the example itself, (batch,).

    >>> natural(jnp.zeros((1, 4)), jnp.array([2])).round(4)
    Array([1.3863], dtype=float32)
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def robust(bounds: jax.Array) -> jax.Array:
    """The cross-entropy at lower bounds of the margins.

    `natural(f(x'), y) <= robust(bounds)` wherever `bounds <= margins of f(x')`, so over a whole region if they hold
    over it.

    Args:
        bounds: (batch, classes - 1), from `jaxbound.margins`.

    Returns:
        (batch,).

    Reference: Wong and Kolter 2018, theorem 2; Zhang et al. 2020, equation 4.

    >>> robust(jnp.array([[0.0, 0.0, 0.0]])).round(4)
    Array([1.3863], dtype=float32)
    """
    return jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(bounds[:, :1]), -bounds], axis=1), axis=1)


def holds(bounds: jax.Array) -> jax.Array:
    """Whether every margin's bound is positive; NaN is not, nor is 0.

    >>> holds(jnp.array([[1.0, 0.1], [1.0, 0.0], [jnp.nan, 1.0]]))
    Array([ True, False, False], dtype=bool)
    """
    return jnp.all(bounds > 0, axis=1)


def mixed_margins(
    variables: Any, x: jax.Array, labels: jax.Array, eps: ArrayLike, beta: ArrayLike, *, method: Method,
    apply_fn: Callable, norm: float = math.inf, clip: Clip = None,
) -> jax.Array:  # fmt: skip
    """beta · (the method's bounds) + (1 - beta) · (IBP's bounds) of the margins, a lower bound for 0 <= beta <= 1.

    Args:
        variables: as for `jaxbound.margins`.
        x: (batch, ...).
        labels: int (batch,).
        eps: () or (batch,).
        beta: the weight of the method, ().
        method: how to bound; for `IBP()` beta has no meaning.
        apply_fn, norm, clip: as for `jaxbound.margins`.

    Returns:
        (batch, classes - 1).

    Reference: Zhang et al. 2020, equation 9.

    >>> from jaxbound.training.models import MLP
    >>> model, x = MLP((8,)), jnp.zeros((2, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> bounds = mixed_margins(variables, x, jnp.zeros(2, int), 0.1, 0.5, method=CrownIBP(), apply_fn=model.apply)
    >>> bounds.shape
    (2, 9)
    """
    tight = margins(variables, x, labels, eps, method=method, apply_fn=apply_fn, norm=norm, clip=clip)
    if isinstance(method, IBP):
        return tight
    loose = margins(variables, x, labels, eps, method=IBP(), apply_fn=apply_fn, norm=norm, clip=clip)
    # At either end the other bound has no say, even where it is infinite.
    beta = jnp.asarray(beta)
    mixed = beta * tight + (1 - beta) * loose
    return jnp.where(beta >= 1, tight, jnp.where(beta <= 0, loose, mixed))


def divergence(logits: jax.Array, others: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(others)) per example, (batch,): TRADES' measure of how far a prediction moved.

    >>> divergence(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    Array([0.], dtype=float32)
    """
    one, other = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    return jnp.sum(jnp.exp(one) * (one - other), axis=-1)


# --- robust terms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MarginLoss:
    """The cross-entropy at bounds of the margins, IBP's mixed in with weight 1 - beta.

    `natural(f(x'), y) <= loss` for every x' of the ball, if the method is certified.

    Args:
        method: how to bound: `IBP()`, `Crown()`, `FastLin()`, ..., or a method that gives estimates. The default is the
            paper's, which takes the backward pass alone; `CrownIBP()` also keeps what intervals say of each margin,
            which is tighter and has other gradients.
        norm: of the ball.
        clip: the range of valid inputs.

    Reference: Zhang et al. 2020, equation 9.

    >>> MarginLoss().interval
    MarginLoss(method=IBP(), norm=inf, clip=(0.0, 1.0))
    """

    method: Method = field(default_factory=lambda: CrownIBP(intersect=False))
    norm: float = math.inf
    clip: Clip = (0.0, 1.0)

    @property
    def interval(self) -> MarginLoss:
        """The term for beta = 0: IBP alone."""
        return MarginLoss(IBP(), self.norm, self.clip)

    def __call__(self, clean: Clean, eps: ArrayLike, beta: ArrayLike) -> Robust:
        """The loss over balls of radius eps."""
        method = _drawn_anew(self.method, clean.key)
        bounds = mixed_margins(
            clean.variables, clean.x, clean.labels, eps, beta, method=method, apply_fn=clean.apply_fn, norm=self.norm,
            clip=self.clip,
        )  # fmt: skip
        return Robust(robust(bounds), holds(bounds))


def _drawn_anew(method: Method, key: jax.Array | None) -> Method:
    """A method that draws random projections draws new ones in every step."""
    if key is None or getattr(method, "key", None) is None:
        return method
    fields: Any = method
    return dataclasses.replace(fields, key=key)


@dataclass(frozen=True)
class AdversarialLoss:
    """The cross-entropy at the point that PGD finds: a lower bound of the worst one, which certifies nothing.

    Args:
        steps: of the attack, from the example itself.
        norm: of the ball.
        clip: the range of valid inputs.
        random_start: begin at a random point of the ball beside the example itself.

    Reference: Madry et al. 2018, equation 2.1.

    >>> AdversarialLoss(steps=7).interval is None
    True
    """

    steps: int = 10
    norm: float = math.inf
    clip: Clip = (0.0, 1.0)
    random_start: bool = True

    @property
    def interval(self) -> None:
        """There is none: beta has no meaning here."""

    def __call__(self, clean: Clean, eps: ArrayLike, beta: ArrayLike) -> Robust:
        """The loss at the attacked points, which are constants for the gradient."""
        logits, success = self.attacked(clean, eps)
        return Robust(natural(logits, clean.labels), ~success)

    def attacked(self, clean: Clean, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The logits at the attacked points, and whether the attack succeeded."""
        fixed = jax.lax.stop_gradient((clean.variables, clean.x))
        found = pgd(
            fixed[0], fixed[1], clean.labels, eps, key=clean.keys, steps=self.steps, restarts=1 + self.random_start,
            apply_fn=clean.apply_fn, norm=self.norm, clip=self.clip,
        )  # fmt: skip
        return clean.apply_fn(clean.variables, jax.lax.stop_gradient(found.x)), found.success


@dataclass(frozen=True)
class TradesLoss:
    """The clean cross-entropy plus a multiple of the divergence between clean and attacked prediction.

    Args:
        weight: of the divergence (1 / lambda in the reference).
        attack: how the attacked point is found. (The reference attacks the divergence; this attacks the margin.)

    Reference: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", 2019, equation 5.

    >>> TradesLoss(weight=6.0).attack.steps
    10
    """

    weight: float = 6.0
    attack: AdversarialLoss = field(default_factory=AdversarialLoss)

    @property
    def interval(self) -> None:
        """There is none: beta has no meaning here."""

    def __call__(self, clean: Clean, eps: ArrayLike, beta: ArrayLike) -> Robust:
        """The loss at the attacked points."""
        logits, success = self.attack.attacked(clean, eps)
        moved = divergence(clean.logits, logits)
        return Robust(natural(clean.logits, clean.labels) + self.weight * moved, ~success)


# --- regularisers -----------------------------------------------------------------------------------------------------


def l1(params: Any) -> jax.Array:
    """The sum of absolute values of all parameters that are not called "bias".

    >>> float(l1({"Dense_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([5.0])}}))
    3.0
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum((jnp.sum(jnp.abs(leaf)) for path, leaf in leaves if _name(path) != "bias"), jnp.zeros(()))


def _name(path: Sequence) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))


def activity(
    variables: Any, x: jax.Array, eps: ArrayLike, *, apply_fn: Callable, norm: float = math.inf, clip: Clip = None
) -> jax.Array:
    """How unstable the nonlinearities' inputs are: sum over all of them of max(0, min(upper, -lower)), by IBP.

    It is 0 exactly where every interval stays on one side of 0, so that ReLU is linear on it.

    Args:
        variables: the network's variables.
        x: (batch, ...).
        eps: () or (batch,).
        apply_fn, norm, clip: as for `jaxbound.margins`.

    Returns:
        (batch,).

    >>> activity([(jnp.eye(1), jnp.zeros(1)), (jnp.eye(1), None)], jnp.ones((1, 1)), 3.0, apply_fn=None)
    Array([2.], dtype=float32)
    """
    network = resolve(variables, x, apply_fn, "relu")
    region = region_around(network.variables, x, eps, norm, clip, batched=True)
    bounded = pre_activation_bounds(network.function, IBP())
    found = jax.vmap(bounded, in_axes=(None, 0))(network.variables, per_example(region))
    unstable = [jnp.maximum(jnp.minimum(ends.upper, -ends.lower), 0) for ends in found.values()]
    return sum((jnp.sum(part.reshape(len(x), -1), axis=1) for part in unstable), jnp.zeros(len(x)))


# --- the objective ----------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """An objective's parts per example, all (batch,), and the batch's statistics (empty without BatchNorm)."""

    loss: jax.Array
    natural: jax.Array
    robust: jax.Array
    wrong: jax.Array
    """Whether the clean prediction is wrong; a tie is."""
    unverified: jax.Array
    """Whether the robust term could not hold the prediction at this radius."""
    statistics: dict


@dataclass(frozen=True)
class Objective:
    """(1 - kappa) · robust + kappa · natural + activity and L1 regularisation.

    Args:
        apply_fn: a Linen `module.apply`, or the `apply_fn` of a state that `create` made of an NNX module; called as
            it is for bounds, and in training mode for the natural loss (`modes.train_pass`): dropout is on there and
            off in the bounds, and bounds freeze BatchNorm at the batch's own statistics.
        term: the robust term; None for the natural loss alone.
        l1_weight: of the sum of absolute non-bias parameters.
        activity_weight: of `activity`, in the term's norm and clip.
        natural_dtype: what the clean pass and its gradient are computed in, such as `jnp.bfloat16`; None for the
            parameters' own. Bounds are always computed in the parameters' own.

    Reference: Zhang et al. 2020, equation 9.

    >>> from jaxbound.training.models import MLP
    >>> Objective(MLP((8,)).apply).term == MarginLoss()
    True
    """

    apply_fn: Callable
    term: Term | None = field(default_factory=MarginLoss)
    l1_weight: float = 0.0
    activity_weight: float = 0.0
    natural_dtype: Any = None

    def __call__(
        self, variables: dict, x: jax.Array, labels: jax.Array, eps: ArrayLike, kappa: ArrayLike, beta: ArrayLike,
        keys: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None,
    ) -> Values:  # fmt: skip
        """The parts for a batch.

        Args:
            variables: "params", and "batch_stats" if there is BatchNorm.
            x: (batch, ...).
            labels: int (batch,).
            eps, kappa, beta: scalars.
            keys: one key per example.
            mask: bool (batch,), which examples enter BatchNorm's statistics; None for all.
            key: for what all examples share, such as random projections; None for the method's own.
        """
        logits, frozen, statistics = train_pass(self.apply_fn, variables, x, mask, keys[0], self.natural_dtype)
        plain, wrong = natural(logits, labels), ~_is_correct(logits, labels)
        if self.term is None:
            hard = Robust(plain, ~wrong)
        else:
            hard = self.term(Clean(self.apply_fn, frozen, x, labels, logits, keys, key), eps, beta)
        loss = (1 - jnp.asarray(kappa)) * hard.loss + kappa * plain
        if self.activity_weight and self.term is not None:
            norm, clip = getattr(self.term, "norm", math.inf), getattr(self.term, "clip", None)
            moving = activity(frozen, x, eps, apply_fn=self.apply_fn, norm=norm, clip=clip)
            loss = loss + self.activity_weight * moving
        if self.l1_weight:
            loss = loss + self.l1_weight * l1(variables["params"])
        return Values(loss, plain, hard.loss, wrong, ~hard.holds, statistics)


def _is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the label's logit is the only largest one."""
    own = jnp.arange(logits.shape[1]) == labels[:, None]
    true = jnp.sum(jnp.where(own, logits, 0), axis=1)
    return true > jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)
