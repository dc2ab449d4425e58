"""`check_certificate`: a certificate replayed on the network, without searching and without trusting what it says.

Everything that the proof rests on is proved again: bounds of values by `bounding`, on the domain where they are used,
with the slopes that the file gives; the cover of the splits by the form of the trees; the clips of input splits from
planes of the checker's own. A leaf holds where, for its clauses, some row is positive, or the domain is empty.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbound import errors
from jaxbound.certificates.proofs import files
from jaxbound.certificates.proofs.bounding import Domains, Ends
from jaxbound.certificates.proofs.files import AGAIN, LEAF, STEPS, Certificate, Tree
from jaxbound.certificates.proofs.layers import Array
from jaxbound.certificates.proofs.reading import Layers, read
from jaxbound.certificates.properties import Clause, Property
from jaxbound.regions import Box

_BATCH = 64
"""Domains that are bounded at once."""


class Proof(NamedTuple):
    """What a certificate proves of a network: `prop` is violated nowhere in `regions`, in real arithmetic.

    Args:
        regions: the boxes, with float64 ends.
        prop: the property.
        leaves: how many domains were proved.
        seconds: how long it took.
        arithmetic: "float64" (with an error that was counted) or "rational".

    >>> Proof([], Property(()), 0, 0.0, "float64").leaves
    0
    """

    regions: list[Box]
    prop: Property
    leaves: int
    seconds: float
    arithmetic: str


def check_certificate(path: str | os.PathLike, network: Any, *, arithmetic: str = "float64") -> Proof:
    """Replay a certificate that `verify(..., certificate=path)` wrote, on an independent path.

    For every x of `regions` and every clause of `prop`, some row has `outputs @ network(x) + inputs @ x > offset`, in
    real arithmetic on the given parameters.

    Bounds are NumPy's, in float64 with an a-priori bound on every error, or rational numbers. Of what bounds networks
    in jaxbound nothing is used; shared are the network itself, as JAX traces it (for ONNX files `jaxbound.onnx.load`),
    and `Property`.

    Args:
        path: the file.
        network: a `Model`, a list of (kernel, bias) with ReLU between them, or a JAX function of one example.
        arithmetic: "float64", or "rational" for small networks: slow, and exact.

    Returns:
        A `Proof`: compare its regions and property with those that you mean.

    Raises:
        CertificateError: the first leaf that fails, and why; or the file cannot be read.
        UnsupportedError: the network does what certificates do not cover.

    Rounding: counted, or none.

    Reference: Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1; for proofs of this kind Isac
    et al. 2022, "Neural network verification with proof production".
    """
    start = time.monotonic()
    if arithmetic not in ("float64", "rational"):
        raise errors.unknown_option("arithmetic", arithmetic, ("float64", "rational"))
    certificate = files.load(path)
    leaves = 0
    layers = None
    for box, clauses, trees in _parts(certificate):
        if layers is None:
            try:
                layers = read(network, np.shape(box.lower), np.float32, rational=arithmetic == "rational")
            except errors.ArgumentError as fault:
                raise errors.CertificateError(f"leaf 0 is of another network: {fault}") from fault
        ends = layers.numbers(np.ravel(box.lower))[None], layers.numbers(np.ravel(box.upper))[None]
        for tree, own in trees:
            _check_sizes(tree, clauses, layers)
            check = _check_inputs if int(tree.clause) < 0 else _check_neurons
            check(layers, ends, own, tree)
            leaves += int((tree.split == LEAF).sum())
    return Proof(certificate.regions, certificate.prop, leaves, time.monotonic() - start, arithmetic)


def _parts(certificate: Certificate) -> Iterator[tuple[Box, tuple[Clause, ...], list[tuple[Tree, tuple[Clause, ...]]]]]:
    """The boxes, the clauses that count there, and the trees that prove them, each with its clauses."""
    trees = iter(certificate.trees)
    for box in certificate.regions:
        lower, upper = np.asarray(box.lower), np.asarray(box.upper)
        if not np.all((lower <= upper) & np.isfinite(lower) & np.isfinite(upper)):
            raise errors.CertificateError("leaf 0: its region is empty, unbounded or undefined")
        for part, prop in certificate.prop.parts(box):
            first = next(trees, None)
            if first is None:
                raise errors.CertificateError("leaf 0 of the tree of a region or clause is missing")
            chosen = [(first, prop.clauses)]
            if int(first.clause) >= 0:
                several = [first, *(next(trees, None) for _ in prop.clauses[1:])]
                for k, tree in enumerate(several):
                    if tree is None or int(tree.clause) != k:
                        raise errors.CertificateError(f"leaf 0 of the tree of clause {k} is missing")
                chosen = [(tree, prop.clauses[k : k + 1]) for k, tree in enumerate(several) if tree is not None]
            yield part, prop.clauses, chosen


def _check_sizes(tree: Tree, clauses: Sequence[Clause], network: Layers) -> None:
    """Whether tree, property and network are of the same sizes."""
    neurons, outputs, inputs = sum(network.sizes), network.layers[-1].size, network.layers[0].size
    leaves = tree.split == LEAF
    bits = -(-neurons // 8)
    if int(tree.clause) < 0:
        bounded = tree.bounded.shape == tree.split.shape and np.all(tree.bounded[leaves])
        fits = bounded and tree.slopes.shape == (tree.bounded.sum(), bits) and tree.point.shape == tree.split.shape
    else:
        unstable = tree.unstable.shape == tree.root_slopes.shape == (bits,)
        fits = unstable and tree.slopes.shape == (leaves.sum(), np.unpackbits(tree.unstable, count=neurons).sum())
        fits = fits and tree.row.shape == (leaves.sum(),)
    for clause in clauses:
        fits = fits and clause.outputs.shape == (len(clause.offsets), outputs) and len(clause.offsets) > 0
        fits = fits and (clause.inputs is None or clause.inputs.shape == (len(clause.offsets), inputs))
    if not fits or tree.split.ndim != 1:
        raise errors.CertificateError(
            f"leaf 0: the certificate is of another network or property; this one has {inputs} inputs, {outputs} "
            f"outputs and layers of {network.sizes} ReLUs"
        )


def _second(split: np.ndarray) -> np.ndarray:
    """For every node of a tree in preorder, the number of its second child."""
    second, open_ = np.full(len(split), -1), []
    for k, where in enumerate(split.tolist()):
        if k and split[k - 1] == LEAF:
            if not open_:
                raise errors.CertificateError(f"leaf {k} belongs to no domain: the tree is not whole")
            second[open_.pop()] = k
        if where not in (LEAF, AGAIN):
            open_.append(k)
    if open_ or not len(split) or split[-1] != LEAF:
        raise errors.CertificateError(f"leaf {len(split)} is missing: the tree ends before its domains do")
    return second


class _Rows(NamedTuple):
    """The rows of some clauses."""

    outputs: Array
    inputs: Array | None
    offsets: Array
    clause: np.ndarray

    @classmethod
    def of(cls, network: Layers, clauses: Sequence[Clause]) -> _Rows:
        size = network.layers[0].size
        linear = any(clause.inputs is not None for clause in clauses)
        none = [np.zeros((len(c.offsets), size)) if c.inputs is None else c.inputs for c in clauses]
        return cls(
            network.numbers(np.concatenate([clause.outputs for clause in clauses])),
            network.numbers(np.concatenate(none)) if linear else None,
            network.numbers(np.concatenate([clause.offsets for clause in clauses])),
            np.repeat(np.arange(len(clauses)), [len(clause.offsets) for clause in clauses]),
        )

    def bounds(self, domains: Domains, chosen: np.ndarray, added: dict[int, Array] | None = None):
        """Lower bounds of chosen rows, (domains, rows), less their offsets."""
        rows = {len(domains.network.layers) - 1: self.outputs[chosen]}
        if self.inputs is not None:
            rows[0] = self.inputs[chosen]
        return domains.lower(rows, -self.offsets[chosen], added)


def _fail(leaf: int, tree: Tree, why: str) -> errors.CertificateError:
    of = "" if int(tree.clause) < 0 else f" of the tree of clause {int(tree.clause)}"
    return errors.CertificateError(f"leaf {leaf}{of} fails: {why}")


# --- input splits -----------------------------------------------------------------------------------------------------


class _Open(NamedTuple):
    """A domain that is to be checked."""

    node: int
    low: Array
    high: Array
    known: dict[int, Ends]
    refuted: np.ndarray


class _Inputs:
    """The check of a tree of input splits."""

    def __init__(self, network: Layers, box: Ends, clauses: Sequence[Clause], tree: Tree):
        self.network, self.tree, self.second = network, tree, _second(tree.split)
        self.rows, self.points = _Rows.of(network, clauses), network.numbers(tree.point)
        self.place = np.cumsum(tree.bounded) - 1
        self.root = _Open(0, box[0][0], box[1][0], {}, np.zeros(len(clauses), bool))
        self.parent = {child: node for node in range(len(tree.split)) for child, _ in self.children(node)}
        self.closely: dict[int, _Open] = {}
        """Domains at which all neurons were bounded, those of known sign too."""

    def children(self, node: int) -> list[tuple[int, int | None]]:
        """The nodes below, and which half each is."""
        where = int(self.tree.split[node])
        if where == LEAF:
            return []
        return [(node + 1, None)] if where == AGAIN else [(node + 1, 0), (int(self.second[node]), 1)]

    def check(self) -> None:
        """Prove every leaf, or raise for the first that fails."""
        pending = [self.root]
        while pending:
            taken, pending = pending[-_BATCH:], pending[:-_BATCH]
            ready = self.bounded(taken, "open")
            wrong = [one.node for one in ready if self.tree.split[one.node] == LEAF and not one.refuted.all()]
            for node in sorted(wrong):
                if not self.close(node).refuted.all():
                    raise _fail(node, self.tree, "no row of a clause is positive there")
            for one in ready:
                if not one.refuted.all() and one.node not in wrong:
                    halves = [self.half(one, *child) for child in self.children(one.node)]
                    pending += [half for half in halves if np.all(half.low <= half.high)]

    def close(self, node: int) -> _Open:
        """A domain from the root, bounded with all neurons at every node above."""
        if node not in self.closely:
            one = self.root
            if node:
                above = self.parent[node]
                one = self.half(self.close(above), node, dict(self.children(above))[node])
            self.closely[node] = self.bounded([one], "all")[0]
        return self.closely[node]

    def half(self, one: _Open, child: int, side: int | None) -> _Open:
        """A part of a domain."""
        if side is None:
            return one._replace(node=child)
        low, high, axis = one.low.copy(), one.high.copy(), int(self.tree.split[one.node])
        end, nearest = (high, min) if side == 0 else (low, max)
        end[axis] = nearest(end[axis], self.points[one.node])
        return one._replace(node=child, low=low, high=high)

    def bounded(self, taken: list[_Open], tighten: str) -> list[_Open]:
        """Domains with what their bounds refute, clipped; those that are not to be bounded as they are."""
        marked = [one for one in taken if self.tree.bounded[one.node] and not one.refuted.all()]
        ready = [one for one in taken if not self.tree.bounded[one.node] or one.refuted.all()]
        if marked:
            bits = self.tree.slopes[self.place[[one.node for one in marked]]]
            slopes = self.network.numbers(np.unpackbits(bits, axis=1, count=sum(self.network.sizes)))
            ready += _bounded(self.network, self.rows, marked, slopes, tighten)
        return ready


def _check_inputs(network: Layers, box: Ends, clauses: Sequence[Clause], tree: Tree) -> None:
    leaf = int(np.argmax(tree.split == LEAF))
    if (
        np.any(tree.split >= network.layers[0].size)
        or np.any(tree.split < AGAIN)
        or not np.all(np.isfinite(tree.point))
    ):
        raise _fail(leaf, tree, "a split is at no coordinate")
    _Inputs(network, box, clauses, tree).check()


def _bounded(network: Layers, rows: _Rows, marked: list[_Open], slopes: Array, tighten: str) -> list[_Open]:
    """Domains with what their bounds refute, clipped."""
    low, high = np.stack([one.low for one in marked]), np.stack([one.high for one in marked])
    known = {
        k: (np.stack([one.known[k][0] for one in marked]), np.stack([one.known[k][1] for one in marked]))
        for k in network.rectified
        if all(k in one.known for one in marked)
    }
    domains = Domains(network, (low, high), slopes, known=known, tighten=tighten)
    everything = np.broadcast_to(np.arange(len(rows.offsets)), (len(marked), len(rows.offsets)))
    found = rows.bounds(domains, everything)
    refuted = np.stack([one.refuted for one in marked]) | domains.empty[:, None]
    for row, clause in enumerate(rows.clause):
        refuted[:, clause] |= found.lower[:, row] > 0
    low, high, refuted = _clipped(low, high, found.lower, found.inputs, refuted, rows.clause, exact=network.rational)
    ends = {k: domains.ends[k] for k in network.rectified}
    return [
        _Open(one.node, low[d], high[d], {k: (a[d], b[d]) for k, (a, b) in ends.items()}, refuted[d])
        for d, one in enumerate(marked)
    ]


def _clipped(low: Array, high: Array, lower: Array, slopes: Array, refuted: Array, clause: Array, *, exact: bool):
    """What is left of boxes where, for some clause, all rows may be at most 0.

    With x* where a row's plane is least, `row(x) >= lower + <slope, x - x*>`, and no term of the product is negative;
    so where the row is at most 0, every coordinate has `|slope| |x - x*| <= -lower`.
    """
    lows, highs, refuted = [], [], refuted.copy()
    for k in range(refuted.shape[1]):
        least, most = low.copy(), high.copy()
        for row in np.flatnonzero(clause == k):
            slope, spare = slopes[:, row], np.maximum(-lower[:, row], 0)[:, None]
            usable = (slope != 0) & (lower[:, row] > -np.inf)[:, None]
            reach = np.where(usable, spare, 0) / np.where(usable, np.abs(slope), 1)
            if not exact:
                reach = reach * (1 + 2.0**-40) + 2.0**-48 * (np.abs(low) + np.abs(high)) + 2.0**-1000
            most = np.where(usable & (slope > 0), np.minimum(most, low + reach), most)
            least = np.where(usable & (slope < 0), np.maximum(least, high - reach), least)
        refuted[:, k] |= np.any(least > most, axis=1)
        dead = refuted[:, k, None]
        lows.append(np.where(dead, np.inf, least))
        highs.append(np.where(dead, -np.inf, most))
    left = ~refuted.all(axis=1)[:, None]
    low = np.where(left, np.maximum(low, np.minimum.reduce(lows)), low)
    return low, np.where(left, np.minimum(high, np.maximum.reduce(highs)), high), refuted


# --- ReLU splits ------------------------------------------------------------------------------------------------------


def _check_neurons(network: Layers, box: Ends, clauses: Sequence[Clause], tree: Tree) -> None:
    _second(tree.split)
    neurons, rows = sum(network.sizes), _Rows.of(network, clauses)
    if np.any(tree.split >= neurons) or np.any(tree.split < LEAF):
        raise _fail(int(np.argmax(tree.split == LEAF)), tree, "a split is at no neuron")
    root = Domains(network, box, network.numbers(np.unpackbits(tree.root_slopes, count=neurons)[None]), tighten="all")
    unstable, starts = np.flatnonzero(np.unpackbits(tree.unstable, count=neurons)), np.cumsum([0, *network.sizes])
    leaves, used = list(_paths(tree)), 0
    for first in range(0, len(leaves), _BATCH):
        own = leaves[first : first + _BATCH]
        signs, multipliers = np.zeros((len(own), neurons), np.int8), np.zeros((len(own), neurons))
        for d, (node, path) in enumerate(own):
            split = [neuron for neuron, _ in path]
            signs[d, split] = [sign for _, sign in path]
            part = tree.multipliers[used : used + len(path)]
            if len(part) < len(path) or not (np.all(part >= 0) and np.all(np.isfinite(part))):
                raise _fail(node, tree, "a multiplier is missing, negative or not finite")
            multipliers[d, split] = part
            used += len(path)
        given = tree.slopes[first : first + len(own)]
        for (node, _), row, part in zip(own, tree.row[first:], given, strict=False):
            if not 0 <= row < len(rows.offsets):
                raise _fail(node, tree, f"the clause has no row {row}")
            if np.any(part > STEPS):
                raise _fail(node, tree, f"a lower slope of {part.max()}/{STEPS} is above 1")
        slopes = np.zeros((len(own), neurons))
        slopes[:, unstable] = given / STEPS
        domains = Domains(network, root.ends[0], network.numbers(slopes), root=root, signs=signs)
        shifts = network.numbers(-multipliers * signs)
        added = {z: shifts[:, starts[k] : starts[k + 1]] for k, z in enumerate(network.rectified)}
        found = rows.bounds(domains, tree.row[first : first + len(own), None], added)
        failed = ~((found.lower[:, 0] > 0) | domains.empty)
        if failed.any():
            d = int(np.argmax(failed))
            raise _fail(own[d][0], tree, f"its row is bounded by {float(found.lower[d, 0]):.6g}, not above 0")


def _paths(tree: Tree) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The leaves, each with the neurons that are split above it and their signs."""
    path: list[tuple[int, int]] = []
    for node, neuron in enumerate(tree.split.tolist()):
        if neuron != LEAF:
            path.append((neuron, 1))
            continue
        yield node, list(path)
        while path and path[-1][1] < 0:
            path.pop()
        if path:
            path[-1] = path[-1][0], -1
