"""What a network is to a search: its nodes, where they are loose, and where it may split."""

from __future__ import annotations

from jaxbound.graph import Structure
from jaxbound.search.rectifiers import is_rectifier


class Skeleton:
    """A structure that equals every structure of the same blocks, so that networks of one architecture share programs.

    >>> Skeleton.__doc__ is not None
    True
    """

    def __init__(self, structure: Structure):
        self.structure = structure
        inputs = tuple(node.op for node in structure.nodes[: structure.num_inputs])
        blocks = tuple((block.template, block.outer, block.constants) for block in structure.blocks)
        self._key = inputs, blocks, structure.outputs
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
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

    @property
    def targets(self) -> tuple[int, ...]:
        """The values that nonlinear nodes read."""
        return tuple(sorted({source for i in self.structure.nonlinear for source in self.nodes[i].inputs}))

    @property
    def loose(self) -> tuple[int, ...]:
        """The targets on which interval arithmetic may be improved by a backward pass."""
        return tuple(number for number in self.targets if not self._is_exact(number))

    @property
    def rectifiers(self) -> tuple[int, ...]:
        """The ReLUs."""
        return tuple(number for number, node in enumerate(self.nodes) if is_rectifier(node.op))

    @property
    def rectified_inputs(self) -> tuple[int, ...]:
        """What the ReLUs read, one for each: where a search may split."""
        return tuple(self.nodes[number].inputs[0] for number in self.rectifiers)

    def _is_exact(self, number: int) -> bool:
        node = self.nodes[number]
        if node.op.kind in ("scalar", "input"):
            return True
        return node.affine_in_region and self.structure.exact_on_boxes[number]
