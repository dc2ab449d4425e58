"""What a search did, domain by domain, and the trees of a certificate that are made of it (`certificates.proofs`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxbound.certificates.proofs.files import AGAIN, LEAF, Tree

Array = np.ndarray


class Log:
    """The domains of one search, by number; the first ones are the roots.

    Args:
        roots: how many there are.
    """

    def __init__(self, roots: int):
        self.count = roots
        self.slopes: dict[int, Array] = {}
        """Of domains of input splits, as they were bounded: bits."""
        self.leaves: dict[int, tuple[int, Array, Array]] = {}
        """Of splits of ReLUs: the row that is positive, slopes in steps, and multipliers of all neurons."""
        self.splits: dict[int, tuple[bool, Array, Array, Array | None]] = {}
        """Whether bounding was of use, then where a domain is split one after the other, whether it can be, points."""
        self.children: dict[tuple[int, int], int] = {}
        """By parent and place: a bit for each split, the first one highest."""

    def bounded(self, numbers: Array, slopes: Array) -> None:
        """Note with which slopes domains were bounded."""
        self.slopes.update(zip(numbers.tolist(), slopes, strict=True))

    def leaf(self, number: int, row: int, slopes: Array, multipliers: Array) -> None:
        """Note what proves a domain of ReLU splits."""
        self.leaves[number] = row, slopes, multipliers

    def split(
        self, numbers: Array, useful: Array, where: Array, possible: Array, made: Array, points: Array | None = None
    ) -> Array:
        """Note how domains are split; returns the numbers of their children, in order.

        Args:
            numbers: of the domains.
            useful: whether bounding refuted a clause or cut something off.
            where: coordinates or neurons, (domains, splits).
            possible: whether they can be split there.
            made: which children there are, (places, domains).
            points: where inputs are split.
        """
        for d, number in enumerate(numbers.tolist()):
            self.splits[number] = bool(useful[d]), where[d], possible[d], None if points is None else points[d]
        places, parents = np.nonzero(made)
        fresh = np.arange(self.count, self.count + len(places))
        self.count += len(places)
        pairs = zip(numbers[parents].tolist(), places.tolist(), strict=True)
        self.children.update(zip(pairs, fresh.tolist(), strict=True))
        return fresh

    @property
    def state(self) -> dict[str, Array]:
        """All of it as arrays, for `restore`."""
        rows, slopes, multipliers = zip(*self.leaves.values(), strict=True) if self.leaves else ((), (), ())
        useful, where, possible, points = zip(*self.splits.values(), strict=True) if self.splits else ((),) * 4
        points = () if points and points[0] is None else points
        return {
            "count": np.array(self.count),
            "bounded": np.array(list(self.slopes), int), "slopes": _stacked(list(self.slopes.values())),
            "leaves": np.array(list(self.leaves), int), "rows": np.array(rows, int),
            "leaf_slopes": _stacked(slopes), "multipliers": _stacked(multipliers),
            "splits": np.array(list(self.splits), int), "useful": np.array(useful, bool),
            "counts": np.array([len(one) for one in where], int), "where": _joined(where),
            "possible": _joined(possible), "points": _joined(points),
            "children": np.array([(*pair, child) for pair, child in self.children.items()], int).reshape(-1, 3),
        }  # fmt: skip

    def restore(self, state: dict[str, Array]) -> None:
        """What another process noted."""
        self.count = int(state["count"])
        self.slopes = dict(zip(state["bounded"].tolist(), state["slopes"], strict=True))
        leaves = zip(state["rows"].tolist(), state["leaf_slopes"], state["multipliers"], strict=True)
        self.leaves = dict(zip(state["leaves"].tolist(), leaves, strict=True))
        ends = np.cumsum(state["counts"])[:-1]
        cut = {name: np.split(state[name], ends) for name in ("where", "possible", "points") if len(state[name])}
        nothing = [None] * len(state["splits"])
        parts = (cut.get(name, nothing) for name in ("where", "possible", "points"))
        splits = zip(state["useful"].tolist(), *parts, strict=True)
        self.splits = dict(zip(state["splits"].tolist(), splits, strict=True))
        self.children = {(parent, place): child for parent, place, child in state["children"].tolist()}

    def _preorder(self, root: int):
        """Per node: the domain that begins there (-1 if none), and where it is split (LEAF, AGAIN) at which point."""
        pending: list[tuple[int, int, int]] = [(root, 0, 0)]
        while pending:
            number, depth, place = pending.pop()
            if number not in self.splits:
                yield number, LEAF, 0.0
                continue
            _, where, possible, points = self.splits[number]
            count = len(where)
            usable = np.flatnonzero(possible[depth:]) + depth
            if not len(usable):
                if depth == 0:
                    yield number, AGAIN, 0.0
                pending.append((self.children[number, place], 0, 0))
                continue
            k = int(usable[0])
            yield (number if depth == 0 else -1), int(where[k]), 0.0 if points is None else float(points[k])
            pending.append((number, k + 1, place + (1 << (count - 1 - k))))
            pending.append((number, k + 1, place))

    def inputs(self) -> Tree:
        """The tree of a search by input splits."""
        split, point, bounded, slopes = [], [], [], []
        for number, where, at in self._preorder(0):
            marked = number >= 0 and (where == LEAF or self.splits[number][0])
            split.append(where)
            point.append(at)
            bounded.append(marked)
            if marked:
                slopes.append(self.slopes[number])
        return _tree(split, np.stack(slopes), point=np.array(point), bounded=np.array(bounded))

    def neurons(self, clause: int, unstable: Array, root_slopes: Array) -> Tree:
        """The tree of one clause by ReLU splits.

        Args:
            clause: its number, which is that of its root.
            unstable: whether ReLUs are, on the whole box.
            root_slopes: 0 or 1 for every ReLU, with which the whole box was bounded.
        """
        split, rows, slopes, multipliers = [], [], [], []
        path: list[list[int]] = []
        for number, where, _ in self._preorder(clause):
            split.append(where)
            if where != LEAF:
                path.append([where, 1])
                continue
            row, own, all_multipliers = self.leaves[number]
            rows.append(row)
            slopes.append(own)
            multipliers.append(all_multipliers[[neuron for neuron, _ in path]])
            while path and path[-1][1] < 0:
                path.pop()
            if path:
                path[-1][1] = -1
        return _tree(
            split, np.stack(slopes), clause=clause, row=np.array(rows, np.int32),
            multipliers=np.concatenate(multipliers), unstable=np.packbits(unstable),
            root_slopes=np.packbits(root_slopes),
        )  # fmt: skip


def _stacked(arrays: Sequence[Array]) -> Array:
    return np.stack(arrays) if len(arrays) else np.zeros((0, 0))


def _joined(arrays: Sequence[Array]) -> Array:
    return np.concatenate(arrays) if len(arrays) else np.zeros(0)


def _tree(split: list[int], slopes: Array, *, clause: int = -1, **given: Array) -> Tree:
    nothing = np.zeros(0, np.uint8)
    return Tree(np.array(split, np.int32), slopes, np.array(clause, np.int32), **{
        name: given.get(name, nothing) for name in ("point", "bounded", "row", "multipliers", "unstable", "root_slopes")
    })  # fmt: skip
