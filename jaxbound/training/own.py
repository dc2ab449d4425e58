"""Train your own: a Linen or NNX network, arrays or batches of any loader, any optax optimizer, in one call.

It is `create`, `Step` and `fit` put together for the usual case; for anything else take these.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxbound import errors
from jaxbound.training.data import Sampler
from jaxbound.training.loop import Result, Run, fit
from jaxbound.training.losses import MarginLoss, Objective, Term
from jaxbound.training.runs import started
from jaxbound.training.schedules import Epsilon
from jaxbound.training.step import Batch, Schedules, Step, Trainable, create

Examples = tuple[Any, Any] | Iterable
"""Arrays `(x, labels)`, or an iterable of batches: such pairs, or mappings with an "image" or "x" and a "label"."""


def train(
    model: Trainable, examples: Examples, epsilon: Epsilon, *, steps: int, optimizer: optax.GradientTransformation,
    term: Term | None = None, kappa_final: float = 0.0, batch_size: int = 128, start: Mapping | None = None,
    folder: str | Path | None = None, interval: int | None = None, key: jax.Array | None = None,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    evaluate: Callable[[dict], dict] | None = None, report: Callable[[dict], None] | None = None,
) -> Result:  # fmt: skip
    """Train a network so that it can be certified.

    The loss is (1 - kappa) · robust + kappa · natural. As the radius grows, kappa and the weight of the term's own
    bounds beside IBP's fall from 1.

    Args:
        model: a Linen module, or an NNX module with the parameters that it has.
        examples: `(x, labels)`, which are shuffled; or an iterable of batches (`tf.data`, grain, a list), which is
            begun again when it ends. A batch that is smaller than the first is filled up with what does not count.
        epsilon: the radius by step.
        steps: how many.
        optimizer: any optax transformation.
        term: the robust term; CROWN-IBP on inputs in [0, 1] by default.
        kappa_final: the weight of the natural loss in the end.
        batch_size: of arrays.
        start: variables to start from, such as those of `Result.variables` or `runs.trained`.
        folder: for checkpoints and records, from which the same call goes on; None to keep nothing. What an iterable
            gave before is then taken from it again, so that it must give the same batches.
        interval: steps between two records and checkpoints; a tenth of all by default.
        key: for parameters, order and chance.
        augment, evaluate, report: as for `Step` and `fit`.

    Returns:
        `Result`: `variables`, and `state`, which every function of jaxbound takes.

    Raises:
        ArgumentError: inputs outside the term's clip box; no examples; variables of another network.

    Reference: Zhang et al. 2020, section 3.2.

    >>> from jaxbound.training.models import MLP
    >>> x, labels = np.full((8, 3), 0.5, np.float32), np.arange(8) % 2
    >>> result = train(MLP((4,), classes=2), (x, labels), Epsilon(0.1, 0, 2), steps=3, optimizer=optax.adam(1e-2))
    >>> int(result.state.step)
    3
    """
    key = jax.random.key(0) if key is None else key
    batch_at, x = _batches(examples, batch_size, key)
    state = create(model, x, optimizer, key)
    state = state if start is None else started(state, dict(start), "start")
    objective = Objective(state.apply_fn, MarginLoss() if term is None else term)
    step = Step(objective, Schedules.of(epsilon, kappa_final=kappa_final), augment=augment)
    run = Run(steps, max(1, steps // 10) if interval is None else interval)
    with contextlib.ExitStack() as entered:
        place = entered.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder
        return fit(step, state, batch_at, run, place, evaluate=evaluate, report=report)


def _batches(examples: Examples, size: int, key: jax.Array) -> tuple[Callable[[int], Batch], np.ndarray]:
    """Batches by step, and an example."""
    if not (isinstance(examples, tuple) and len(examples) == 2 and hasattr(examples[0], "shape")):
        return _loaded(examples)
    x, labels = _checked(*examples)
    sampler = Sampler(len(x), size, seed=int(jax.random.randint(key, (), 0, 2**31 - 1)))

    def batch_at(number: int) -> Batch:
        rows, index, weight = sampler(number)
        return _filled(Batch(x[rows], labels[rows], index, weight), _whole(size))

    return batch_at, x[:1]


def _loaded(examples: Iterable) -> tuple[Callable[[int], Batch], np.ndarray]:
    """Batches of an iterable, in its order; steps come in order, too."""
    stream = _pairs(examples)
    first = next(stream, None)
    if first is None:
        raise errors.argument("examples", "has no batches", "pass (x, labels), or an iterable of such batches")
    endless = itertools.chain([first], stream, itertools.chain.from_iterable(map(_pairs, itertools.repeat(examples))))
    taken = enumerate(endless if iter(examples) is not examples else itertools.chain([first], stream))

    def batch_at(number: int) -> Batch:
        for place, (x, labels) in taken:
            if place == number:
                batch = Batch(x, labels, np.arange(len(x)), np.ones(len(x), np.float32))
                return _filled(batch, _whole(len(first[1])))
        raise errors.argument("examples", f"ends before step {number}", "pass an iterable that can begin again")

    return batch_at, first[0][:1]


def _pairs(examples: Iterable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch as arrays."""
    for batch in examples:
        if isinstance(batch, Mapping):
            found = [next((batch[name] for name in names if name in batch), None) for names in _NAMES]
            if any(part is None for part in found):
                raise errors.argument("examples", f"gives {sorted(batch)}", "name the parts x and label")
            yield _checked(*found)
        else:
            x, labels = batch
            yield _checked(x, labels)


_NAMES = ("x", "image", "images", "inputs"), ("labels", "label", "y")


def _checked(x: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    x, labels = np.asarray(x), np.asarray(labels)
    if x.dtype.kind != "f" or not len(x) or labels.shape != x.shape[:1] or labels.dtype.kind not in "iu":
        raise errors.argument(
            "examples", f"holds x {x.dtype}{x.shape} and labels {labels.dtype}{labels.shape}",
            "pass floating inputs (bytes divided by 255) and a class number for each",
        )  # fmt: skip
    return x, labels.astype(np.int32)


def _whole(size: int) -> int:
    """What devices can share evenly."""
    devices = jax.local_device_count()
    return -(-size // devices) * devices


def _filled(batch: Batch, size: int) -> Batch:
    """A batch of a size; what is missing repeats its last example and does not count."""
    count = np.shape(batch.labels)[0]
    if count > size:
        raise errors.argument("examples", f"gives {count} after batches of {size}", "make the first one the largest")
    rows = np.minimum(np.arange(size), count - 1)
    x, labels, _, weight = (np.asarray(part)[rows] for part in batch)
    return Batch(x, labels, np.arange(size), np.where(np.arange(size) < count, weight, 0).astype(np.float32))
