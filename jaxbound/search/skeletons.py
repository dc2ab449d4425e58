"""What a network is to a search: its nodes, where they are loose, and where it may split."""

from __future__ import annotations

import itertools
from functools import cached_property

from jaxbound.graph import Op, Structure
from jaxbound.relaxations import affine
from jaxbound.relaxations.enclosures import scalar
from jaxbound.search.rectifiers import is_rectifier


class Skeleton:
    """A structure that equals every structure of the same blocks, so that networks of one architecture share programs.

    Args:
        structure: of the network.
        everywhere: whether neurons of any function of one number may be split, or ReLUs alone.

    >>> Skeleton.__doc__ is not None
    True
    """

    def __init__(self, structure: Structure, *, everywhere: bool = False):
        self.structure = structure
        self.everywhere = everywhere
        inputs = tuple(node.op for node in structure.nodes[: structure.num_inputs])
        blocks = tuple((block.template, block.outer, block.constants) for block in structure.blocks)
        self._key = inputs, blocks, structure.outputs, everywhere
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self._key == other._key

    @property
    def nodes(self):
        """The structure's nodes."""
        return self.structure.nodes

    @property
    def output(self) -> int:
        """The one node that is the function's result."""
        ((_, number),) = self.structure.outputs
        return number

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """The values that nonlinear nodes read."""
        return tuple(sorted({source for i in self.structure.nonlinear for source in self.nodes[i].inputs}))

    @cached_property
    def loose(self) -> tuple[int, ...]:
        """The targets on which interval arithmetic may be improved by a backward pass."""
        return tuple(number for number in self.targets if not self._is_exact(number))

    @cached_property
    def rectifiers(self) -> tuple[int, ...]:
        """The ReLUs."""
        return tuple(number for number, node in enumerate(self.nodes) if is_rectifier(node.op))

    @cached_property
    def rectified_inputs(self) -> tuple[int, ...]:
        """What the ReLUs read, one for each."""
        return tuple(self.nodes[number].inputs[0] for number in self.rectifiers)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The nodes before which a search may split."""
        curved = tuple(number for number, node in enumerate(self.nodes) if node.op.kind == "scalar")
        return curved if self.everywhere else self.rectifiers

    @cached_property
    def curved(self) -> tuple[int, ...]:
        """Those of them that are not ReLUs."""
        return tuple(number for number in self.places if number not in self.rectifiers)

    @cached_property
    def place_inputs(self) -> tuple[int, ...]:
        """What they read, one for each."""
        return tuple(self.nodes[number].inputs[0] for number in self.places)

    @cached_property
    def turns(self) -> tuple[tuple[tuple[float, ...], bool], ...]:
        """Per place, where its function bends the other way or has a kink, and whether it is linear between."""
        found = []
        for number in self.places:
            curvature = scalar.curvature_of(self.nodes[number].op)
            ends = {end for piece in curvature.pieces for end in (piece.left, piece.right)} - set(curvature.domain)
            found.append((tuple(sorted(ends)), curvature.is_piecewise_linear))
        return tuple(found)

    @cached_property
    def products(self) -> int:
        """How many products a row takes on its way from the output to the input, about."""
        return sum(_products(node.op) for node in self.nodes)

    @cached_property
    def work(self) -> int:
        """How many products passes from all entries of all loose values take, both ways, about."""
        behind = itertools.accumulate(_products(node.op) for node in self.nodes)
        return sum(
            2 * node.op.size * n for i, (node, n) in enumerate(zip(self.nodes, behind, strict=True)) if i in self.loose
        )

    def _is_exact(self, number: int) -> bool:
        node = self.nodes[number]
        if node.op.kind in ("scalar", "input"):
            return True
        return node.affine_in_region and self.structure.exact_on_boxes[number]


def _products(op: Op) -> int:
    return op.size * (affine.terms(op) if op.kind == "affine" else 1)
