"""Data: no example lost or repeated, by any number of processes; batches by step; augmentation; clear messages."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbound import errors
from jaxbound.training import data
from jaxbound.training.data import Augment, Sampler


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_digits(digits):
    assert (len(digits.train), len(digits.test), digits.shape, digits.classes) == (1437, 360, (8, 8, 1), 10)
    x = digits.images(digits.train.x)
    assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1
    assert digits.train.labels.dtype == np.int32 and set(digits.test.labels) == set(range(10))
    both = np.concatenate([digits.train.x, digits.test.x]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797, "no image is in both parts"


def test_held_out_examples_are_not_trained_on(digits):
    rest, held = digits.holding_out(100)
    assert len(held) == 100 and len(rest.train) == 1337 and rest.test is digits.test
    together = np.concatenate([rest.train.x, held.x]).reshape(1437, -1)
    assert len(np.unique(together, axis=0)) == 1437
    again, _ = digits.holding_out(100)
    np.testing.assert_array_equal(again.train.labels, rest.train.labels)


def test_images_of_a_prepared_data_set():
    folder = os.environ.get("JAXBOUND_TFDS")
    if not folder:
        pytest.skip("set JAXBOUND_TFDS to a folder of data sets that TFDS prepared")
    found = data.load("mnist", folder)
    assert (len(found.train), len(found.test), found.shape) == (60_000, 10_000, (28, 28, 1))
    assert found.train.x.dtype == np.uint8 and found.mean == ()
    # 5,923 zeros and 6,742 ones, as published with the data; the mean pixel of the training images is .1307.
    assert np.bincount(found.train.labels)[:2].tolist() == [5923, 6742]
    assert np.mean(found.train.x) / 255 == pytest.approx(0.1307, abs=1e-4)


class Source(list):
    """Like a data source of TFDS: rows by number, many at once."""

    def __getitems__(self, numbers):
        return [self[number] for number in numbers]


class Builder:
    """Like a builder of TFDS."""

    def __init__(self, rows):
        self.rows = rows

    def as_data_source(self, split):
        return Source(self.rows[split])


@pytest.mark.parametrize(
    ("name", "shape", "channels"), [("mnist", (28, 28, 1), 0), ("svhn", (32, 32, 3), 3), ("cifar10", (32, 32, 3), 3)]
)
def test_prepared_data_sets_are_read_in_order(monkeypatch, name, shape, channels):
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)
    rows = {split: [{"image": rng.integers(0, 256, shape, np.uint8), "label": k % 10} for k in range(count)]
            for split, count in (("train", 30), ("test", 7))}  # fmt: skip
    asked = []
    monkeypatch.setattr(tfds, "builder", lambda *args, **options: asked.append((args, options)) or Builder(rows))
    found = data.load(name, "here")
    assert asked[0][0] == ({"svhn": "svhn_cropped"}.get(name, name),) and asked[0][1]["data_dir"] == Path("here")
    assert found.train.labels.tolist() == [k % 10 for k in range(30)] and len(found.test) == 7
    np.testing.assert_array_equal(found.train.x[5], rows["train"][5]["image"])
    assert len(found.mean) == len(found.std) == channels


def test_missing_data_says_what_to_do(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(errors.ArgumentError, match=r"not prepared for tfds\.data_source in .*download=True"):
        data.load("cifar10", tmp_path)


def test_missing_tensorflow_says_so(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    find = data.importlib.util.find_spec
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name))
    with pytest.raises(ImportError, match="preparing cifar10 needs tensorflow"):
        data.load("cifar10", tmp_path, download=True)


def test_missing_packages_say_so(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxbound\[experiments\]'"):
        data.load("mnist")


def test_unknown_names_are_refused():
    with pytest.raises(errors.ArgumentError, match="did you mean 'cifar10'"):
        data.load("cifar")


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(10, 4), (12, 4), (3, 4), (1, 1), (101, 20)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_example_comes_once_per_epoch(count, size, processes):
    if size % processes:
        pytest.skip("the batch does not divide")
    samplers = [Sampler(count, size, 7, process, processes) for process in range(processes)]
    whole = Sampler(count, size, 7)
    for epoch in range(3):
        seen = []
        for step in range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch):
            parts = [sampler(step) for sampler in samplers]
            joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
            for one, other in zip(joined, whole(step), strict=True):
                np.testing.assert_array_equal(one, other)
            assert len(joined[0]) == size and joined[1].tolist() == list(range(size))
            seen += joined[0][joined[2] > 0].tolist()
        assert sorted(seen) == list(range(count))


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    def order(seed, epoch):
        sampler = Sampler(50, 50, seed)
        return sampler(epoch)[0].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) != list(range(50))


def test_a_batch_depends_on_its_number_alone():
    sampler = Sampler(101, 20, 3)
    forward = [sampler(step)[0] for step in range(20)]
    data._permutation.cache_clear()
    for step in reversed(range(20)):
        np.testing.assert_array_equal(sampler(step)[0], forward[step])


def test_batches_hold_what_the_sampler_says(digits):
    sampler = Sampler(len(digits.train), 100, 1)
    batch, (examples, rows, weight) = data.batch_of(digits, sampler, 14), sampler(14)
    np.testing.assert_array_equal(batch.x, digits.train.x[examples].astype(np.float32) / 16)
    np.testing.assert_array_equal(batch.labels, digits.train.labels[examples])
    np.testing.assert_array_equal(batch.index, rows)
    assert weight.sum() == 37 and batch.weight.tolist() == weight.tolist()


@pytest.mark.parametrize("arguments", [(10, 3, 0, 0, 2), (0, 1), (5, 0), (8, 4, 0, 2, 2)])
def test_refused_samplers(arguments):
    with pytest.raises(errors.ArgumentError):
        Sampler(*arguments)


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_augmented_images_are_shifted_or_mirrored_ones():
    image = jax.random.uniform(jax.random.key(0), (6, 6, 2))
    keys = jax.random.split(jax.random.key(1), 64)
    found = jax.jit(Augment(crop=1))(keys, jnp.broadcast_to(image, (64, 6, 6, 2)))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    shifted = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    possible = np.stack(shifted + [one[:, ::-1] for one in shifted])
    which = [np.flatnonzero((possible == one).all((1, 2, 3))) for one in np.asarray(found)]
    assert all(len(matches) for matches in which)
    assert len({int(matches[0]) for matches in which}) > 12, "most of the 18 possibilities come up"


def test_augmentation_depends_on_the_key_alone():
    x = jax.random.uniform(jax.random.key(0), (8, 6, 6, 1))
    keys = jax.random.split(jax.random.key(1), 8)
    together = Augment()(keys, x)
    apart = jnp.concatenate([Augment()(keys[k : k + 1], x[k : k + 1]) for k in range(8)])
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_array_equal(Augment(crop=0, flip=False)(keys, x), x)
