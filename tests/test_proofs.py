"""Certificates: what they prove is true, what is planted in them is found, and networks are read as they are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_verify import BOX, least, make, model

import jaxbound as jb
from jaxbound.certificates.proofs import files
from jaxbound.certificates.proofs.bounding import Domains
from jaxbound.certificates.proofs.files import AGAIN, LEAF, Certificate, Tree
from jaxbound.certificates.proofs.reading import read
from jaxbound.search.resuming import mark_of

TREES = ("input", "relu")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Certificate]:
    """Certificates of one property, 0.02 from being violated, by both kinds of splits."""
    folder, found = tmp_path_factory.mktemp("certificates"), {}
    prop = jb.Property.of([([1.0, -1.0], least(make(1), np.array([1.0, -1.0])) - 0.02)])
    for split in TREES:
        method = jb.BranchAndBound(split=split, batch=16)
        verdict = jb.verify(model(1), BOX, prop, method=method, progress=False, certificate=folder / split)
        assert verdict.status == "verified"
        found[split] = files.load(folder / split)
    return found


def checked(path, certificate: Certificate, net=None, **options):
    files.save(path, certificate)
    return jb.check_certificate(path, model(1) if net is None else net, **options)


def changed(certificate: Certificate, **fields) -> Certificate:
    return certificate._replace(trees=[certificate.trees[0]._replace(**fields)])


@pytest.mark.parametrize("split", TREES)
def test_certificates_hold_in_both_arithmetics_and_for_layers(split, written, tmp_path):
    for arithmetic, net in itertools.product(("float64", "rational"), (model(1), make(1))):
        proof = checked(tmp_path / "proof", written[split], net, arithmetic=arithmetic)
        assert proof.leaves == (written[split].trees[0].split == LEAF).sum() > 1
        assert proof.arithmetic == arithmetic
        np.testing.assert_array_equal(proof.regions[0].upper, BOX.upper)


@pytest.mark.parametrize("split", TREES)
def test_a_search_goes_on_where_it_was_left(split, written, tmp_path):
    """As `written`, in two runs, of which the first may be another process: its state is in a file."""
    path, left = tmp_path / "proof", tmp_path / "proof.search"
    prop = written[split].prop
    run = functools.partial(jb.verify, model(1), BOX, prop, progress=False, attack=False, certificate=path)
    assert run(method=jb.BranchAndBound(split=split, batch=16, max_nodes=2)).status == "unknown"
    stopped = left.read_bytes()
    with pytest.raises(jb.ArgumentError, match="another property"):
        run(method=jb.BranchAndBound(split=split, batch=8))
    nodes = []
    assert run(method=jb.BranchAndBound(split=split, batch=16), progress=lambda now: nodes.append(now["nodes"])).status
    assert not left.exists() and all(count >= 2 for count in nodes)
    for name, field in files.load(path).trees[0]._asdict().items():
        np.testing.assert_array_equal(field, getattr(written[split].trees[0], name), name)
    left.write_bytes(stopped)
    with np.load(left) as stored:
        np.savez(left.with_suffix(".npz"), **{**stored, "0/before": stored["0/before"] + 1})
    for content in (stopped[:-100], left.with_suffix(".npz").read_bytes()):
        left.write_bytes(content)
        with pytest.raises(jb.ArgumentError, match="no search"):
            run(method=jb.BranchAndBound(split=split, batch=16))


def test_a_search_goes_on_only_with_what_it_began():
    """Domains of one precision are none of another: their ends would be rounded, and leave gaps."""
    prop, other = (jb.Property.of([([1.0, -1.0], offset)]) for offset in (0.0, 1.0))
    mark = mark_of(model(1), [BOX], prop, "input")
    assert mark == mark_of(model(1), [BOX], prop, "input")
    assert len({mark, mark_of(model(2), [BOX], prop, "input"), mark_of(model(1), [BOX], other, "input")}) == 3
    with jax.enable_x64(True):
        assert mark_of(model(1), [BOX], prop, "input") != mark


@pytest.mark.parametrize("split", TREES)
def test_planted_faults_are_found_at_a_leaf(split, written, tmp_path):
    good = written[split]
    (tree,), path = good.trees, tmp_path / "bad"
    (clause,) = good.prop.clauses

    def fails(certificate: Certificate, net=None, match=r"leaf \d+"):
        with pytest.raises(jb.CertificateError, match=match):
            checked(path, certificate, net)

    last = int(np.flatnonzero(tree.split == LEAF)[-1])
    kept = np.arange(len(tree.split)) != last
    if split == "input":
        dropped = {"point": tree.point[kept], "bounded": tree.bounded[kept], "slopes": tree.slopes[:-1]}
        fails(changed(good, point=np.where(np.arange(len(tree.point)) == 0, tree.point + 0.9, tree.point)))
        fails(changed(good, split=np.where(tree.split == tree.split[0], (tree.split[0] + 1) % 3, tree.split)))
        fails(changed(good, split=np.where(kept, tree.split, 3)))
    else:
        dropped = {"row": tree.row[:-1], "slopes": tree.slopes[:-1]}
        fails(changed(good, slopes=tree.slopes + np.uint8(129)), match=r"leaf \d+ .* above 1")
        fails(changed(good, multipliers=-1 - tree.multipliers), match=r"leaf \d+ .* multiplier")
        fails(changed(good, multipliers=tree.multipliers[:-1]), match=r"leaf \d+ .* multiplier")
        fails(changed(good, row=tree.row + 1), match=r"leaf \d+ .* row")
        fails(changed(good, split=np.where(tree.split >= 0, (tree.split + 1) % 7, LEAF)))
    fails(changed(good, split=tree.split[kept], **dropped), match=rf"leaf {last} is missing")
    fails(changed(good, split=np.array([*tree.split, LEAF], np.int32)))
    fails(good, model(3))
    fails(good, [make(1)[0], make(1)[2]], match="leaf 0")
    harder = jb.Property.of([(clause.outputs[0], clause.offsets[0] + 0.03)])  # violated
    fails(good._replace(prop=harder))
    fails(good._replace(prop=jb.Property((*good.prop.clauses, *harder.clauses))), match="leaf")
    fails(good._replace(regions=[jb.Box(2 * np.asarray(BOX.lower, float), 2 * np.asarray(BOX.upper, float))]))
    fails(good._replace(trees=[]), match="leaf 0")
    content = (files.save(path, good), path.read_bytes())[1]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(jb.CertificateError, match="leaf 0 cannot be read"):
        jb.check_certificate(path, model(1))


def test_bounds_hold_and_float64_is_never_better_than_exact():
    """Values at points, in rational arithmetic, lie within; so do the rational bounds within those in float64."""
    draw = np.random.default_rng(0)
    for seed, width in itertools.product((1, 2), (1.0, 1e-3, 0.0)):
        low = draw.uniform(-1, 1, (2, 3))
        slopes = draw.integers(0, 129, (2, 7)) / 128
        rows = {k: draw.normal(size=(2, 3, size)) for k, size in ((0, 3), (1, 4))}
        found = []
        for rational in (False, True):
            layers = read(make(seed), (3,), np.float32, rational=rational)
            box = layers.numbers(low), layers.numbers(low + width)
            domains = Domains(layers, box, layers.numbers(slopes), tighten="all")
            given = {k: layers.numbers(part) for k, part in rows.items()}
            found.append((domains, domains.lower(given, layers.numbers(np.ones((2, 3)))).lower))
        (floats, lower), (exact, exactly) = found
        assert np.all(lower <= exactly) and np.all(np.asarray(exactly, float) - lower < 1e-9)
        for (a, b), (c, d) in zip(floats.ends, exact.ends, strict=True):
            assert np.all(a <= c) and np.all(d <= b)
        values = exact.network.numbers(low + width * draw.uniform(size=(20, 2, 3)))
        values = np.minimum(np.maximum(values, exact.ends[0][0]), exact.ends[0][1])
        for layer, (least_value, most) in zip(exact.network.layers[1:], exact.ends[1:], strict=True):
            values = layer.apply(values)
            values = values if layer.shift is None else values + layer.shift
            assert np.all(least_value <= values) and np.all(values <= most)


def test_networks_are_read_as_they_are():
    """Boxes without width around a point give its value: convolutions, pooling, sums, moves, concatenation."""
    draw = np.random.default_rng(1)
    shapes = (3, 2, 2, 4), (2, 2, 4, 3), (5, 27), (4,), (27,)
    kernel, other, weights, shift, scale = (draw.normal(size=shape).astype(np.float32) for shape in shapes)
    convolve: Any = jax.lax.conv_general_dilated

    def net(x):
        same = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        h = jax.nn.relu(convolve(x[None] - 0.25, kernel, (2, 1), rhs_dilation=(1, 2), **same) + shift)
        h = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 2, 1), "VALID") / 3
        padded = jnp.pad(jnp.transpose(h, (0, 3, 1, 2)), ((0, 0), (0, 0), (1, 0), (0, 1)))
        own = {"lhs_dilation": (1, 2), "dimension_numbers": ("NCHW", "HWIO", "NCHW")}
        g = convolve(padded, other, (1, 1), ((0, 0), (1, 0)), **own)
        parts = [jnp.ravel(g), jnp.flip(jnp.ravel(h)[::2]), jnp.ones(1), 2.0 - x[1:3, 1].sum(axis=0)]
        z = jnp.concatenate(parts)[:27] * scale
        first, second = jnp.split(z, [4])
        z = jnp.concatenate([second, first + jnp.split(scale, [4])[0]])
        return weights @ z - 0.5 * (z[:5] + jnp.maximum(-z, 0.0) @ weights.T)

    x = draw.normal(size=(5, 4, 2)).astype(np.float32)
    for rational in (False, True):
        layers = read(net, x.shape, np.float32, rational=rational)
        point = layers.numbers(x.ravel())[None]
        ends = Domains(layers, (point, point), layers.numbers(np.ones((1, sum(layers.sizes))))).ends[-1]
        assert float(np.max(ends[1] - ends[0])) <= 1e-8
        np.testing.assert_allclose(np.asarray(ends[0][0], float), net(x), rtol=1e-4, atol=1e-4)


def test_what_is_not_covered_is_refused_before_the_search(tmp_path):
    prop = jb.Property.of([([1.0], -9.0)])
    for fn, name in (
        (lambda x: jnp.tanh(x[:1]), "tanh"),
        (lambda x: x[:1] * x[1:2], "mul"),
        (lambda x: x[:1] @ (jnp.asarray(make(1)[0][0])[:1] * 2.5)[:, :1], "parameters alone"),
    ):
        with pytest.raises(jb.UnsupportedError, match=name):
            jb.verify(fn, BOX, prop, certificate=tmp_path / "proof", progress=False)
    with pytest.raises(jb.ArgumentError, match="rounding"):
        jb.verify(lambda x: x[:1], BOX, prop, certificate=tmp_path / "proof", rounding=False)
    with pytest.raises(jb.ArgumentError, match="arithmetic"):
        jb.check_certificate(tmp_path / "proof", make(1), arithmetic="float32")
    assert not (tmp_path / "proof").exists()


def test_a_node_may_be_bounded_again(tmp_path):
    """Where clips alone leave nothing, no split is needed: x <= -1/2 and x >= -1/4."""
    nothing = np.zeros(0, np.uint8)
    split, slopes = np.array([AGAIN, LEAF], np.int32), np.zeros((2, 0), np.uint8)
    tree = Tree(
        split, slopes, np.array(-1, np.int32), np.zeros(2), np.ones(2, bool), nothing, nothing, nothing, nothing
    )
    for offset, holds in ((0.25, True), (0.75, False)):
        prop = jb.Property.of([([1.0], -0.5), ([-1.0], offset)])
        certificate = Certificate([jb.Box(-np.ones(1), np.ones(1))], prop, [tree])
        if holds:
            assert checked(tmp_path / "proof", certificate, lambda x: 1.0 * x).leaves == 1
        else:
            with pytest.raises(jb.CertificateError, match="leaf 1 fails"):
                checked(tmp_path / "proof", certificate, lambda x: 1.0 * x)


def test_what_only_looks_like_a_call_is_not_entered():
    """A reduction holds a program too, which is not applied to the array: entered, this is one ReLU per entry."""
    for fold in (jax.lax.reduce, functools.partial(jax.lax.reduce_window, window_strides=(1, 1), padding="VALID")):
        where = (0,) if fold is jax.lax.reduce else (2, 1)
        fn = lambda x, fold=fold, where=where: fold(x, np.float32(0), lambda a, b: jnp.maximum(a + b, 0), where).sum()  # noqa: E731
        with pytest.raises(jb.UnsupportedError, match="`reduce"):
            read(fn, (2, 2), np.float32)


def test_arrays_of_another_form_are_no_certificate(written, tmp_path):
    """They would be broadcast: with offsets of two axes every leaf has the bound of the first; or rounded."""
    good = written["relu"]
    (clause,), (tree,), ends = good.prop.clauses, good.trees, BOX.upper[None]
    harder = clause.offsets + 0.03

    def of(*clauses, **fields) -> Certificate:
        return changed(good, **fields)._replace(prop=jb.Property(clauses))

    wrong = [
        of(dataclasses.replace(clause, offsets=harder[None])),
        of(dataclasses.replace(clause, offsets=clause.offsets.astype(np.longdouble))),
        of(dataclasses.replace(clause, inputs=np.zeros(3))),
        of(clause, dataclasses.replace(clause, box=(np.ones(1), np.zeros(1)))),
        of(clause, clause=np.zeros(1, np.int32)),
        of(clause, multipliers=tree.multipliers[:, None]),
        good._replace(regions=[jb.Box(BOX.lower, BOX.upper[:1])]),
        good._replace(regions=[BOX, jb.Box(-ends, ends)], trees=good.trees * 2),
    ]
    for certificate in wrong:
        with pytest.raises(jb.CertificateError, match="leaf 0 cannot be read"):
            checked(tmp_path / "bad", certificate)


@pytest.mark.parametrize("slope", [np.int16(-640), np.float32(-640.0), np.float32(np.nan)])
def test_numbers_of_another_kind_are_no_slopes(slope, tmp_path):
    """A ReLU does not lie above a line that falls: `relu(x) + 5 x >= 0` would follow, which is -5 at -1."""
    nothing = np.zeros(0, np.uint8)
    given = np.array([[slope]]), np.array(0, np.int32), nothing, nothing, np.zeros(1, np.int32), np.zeros(0)
    tree = Tree(np.array([LEAF], np.int32), *given, np.packbits([True]), np.packbits([False]))
    certificate = Certificate([jb.Box(-np.ones(1), np.ones(1))], jb.Property.of([([1.0], -1.0)]), [tree])
    with pytest.raises(jb.CertificateError, match="leaf 0"):
        checked(tmp_path / "proof", certificate, lambda x: jax.nn.relu(x) + 5.0 * x)


def test_a_region_without_end_proves_nothing(tmp_path):
    nothing = np.zeros(0, np.uint8)
    split, slopes = np.array([LEAF], np.int32), np.zeros((1, 0), np.uint8)
    tree = Tree(split, slopes, np.array(-1, np.int32), np.zeros(1), np.ones(1, bool), *(nothing,) * 4)
    certificate = Certificate([jb.Box(-np.ones(1), np.full(1, np.inf))], jb.Property.of([([1.0], -2.0)]), [tree])
    for arithmetic in ("float64", "rational"):
        with pytest.raises(jb.CertificateError, match="leaf 0"):
            checked(tmp_path / "proof", certificate, lambda x: 1.0 * x, arithmetic=arithmetic)
