"""The file of a certificate: what is proved, and one or several trees of domains.

A file is an archive of NumPy arrays (`.npz`, compressed, no pickles):

    format                      a line that names it
    region{k}/lower, upper      the ends of the k-th box, float64, in the input's shape
    clause{k}/outputs, offsets  rows of the k-th clause of the property; also inputs and box, where it has them
    tree{k}/...                 the fields of the k-th `Tree`

A tree is in preorder: `split` says for every node where it is split, or -1 for a leaf; the nodes of its first half
follow, then those of the second. So trees cover their domains by the way in which they are written.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbound import errors
from jaxbound.certificates.properties import Clause, Property
from jaxbound.regions import Box

FORMAT = "jaxbound certificate, version 1"
UNREADABLE = (
    OSError, KeyError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What `np.load` raises of files that are damaged, or none of its own."""
LEAF, AGAIN = -1, -2
KINDS = {
    "split": np.int32, "clause": np.int32, "row": np.int32, "slopes": np.uint8, "unstable": np.uint8,
    "root_slopes": np.uint8, "bounded": np.bool_,
}  # fmt: skip
"""The dtypes of fields; all others are floating. Slopes, as bytes, can be neither negative nor undefined."""
AXES = {
    "outputs": 2, "offsets": 1, "inputs": 2, "box": 2, "split": 1, "slopes": 2, "clause": 0, "point": 1, "bounded": 1,
    "row": 1, "multipliers": 1, "unstable": 1, "root_slopes": 1,
}  # fmt: skip
"""How many axes fields have; ends of regions have those of the input."""
STEPS = 128
"""Slopes of ReLU trees are whole numbers of 1/128."""


class Tree(NamedTuple):
    """Domains of one box and one clause (ReLU splits), or of one box and all of its clauses (input splits).

    Input splits are at coordinates: `x <= point`, then `x >= point`. At nodes that are `bounded`, and at leaves,
    every value is bounded with the lower slopes given (a bit for every ReLU), rows that are positive refute their
    clauses, and what planes of rows exclude is cut off. A node with `split` -2 has one child: itself, cut.

    ReLU splits are at neurons: their input is at least 0, then at most 0. Leaves have the row that is positive,
    lower slopes for the neurons that are `unstable` on the whole box, and a multiplier for every neuron that is split
    above them.
    """

    split: np.ndarray
    """int32, (nodes,): a coordinate or the number of a neuron; -1 at leaves; -2 where a node is bounded again."""
    slopes: np.ndarray
    """uint8: for input splits (bounded nodes, bytes of bits); for ReLU splits (leaves, unstable neurons), in 1/128."""
    clause: np.ndarray
    """int32, (): of a ReLU tree; -1 for input splits."""
    point: np.ndarray
    """(nodes,): where inputs are split."""
    bounded: np.ndarray
    """bool, (nodes,): for input splits."""
    row: np.ndarray
    """int32, (leaves,): for ReLU splits."""
    multipliers: np.ndarray
    """Of all leaves one after the other, of each from the root to the leaf, for ReLU splits."""
    unstable: np.ndarray
    """uint8, bits: for ReLU splits."""
    root_slopes: np.ndarray
    """uint8, bits: the lower slopes with which ReLU trees bound values over the whole box."""


class Certificate(NamedTuple):
    """What a file holds; trees in the order of boxes, their parts (`Property.parts`), and the clauses of these."""

    regions: list[Box]
    prop: Property
    trees: list[Tree]


def save(path: str | os.PathLike, certificate: Certificate) -> None:
    """Write a file in one step."""
    write(Path(path), arrays_of(certificate))


def arrays_of(certificate: Certificate) -> dict[str, np.ndarray]:
    """What a file holds, by name."""
    arrays: dict[str, np.ndarray] = {"format": np.array(FORMAT)}
    for k, box in enumerate(certificate.regions):
        arrays[f"region{k}/lower"], arrays[f"region{k}/upper"] = np.asarray(box.lower), np.asarray(box.upper)
    for k, clause in enumerate(certificate.prop.clauses):
        arrays[f"clause{k}/outputs"], arrays[f"clause{k}/offsets"] = clause.outputs, clause.offsets
        if clause.inputs is not None:
            arrays[f"clause{k}/inputs"] = clause.inputs
        if clause.box is not None:
            arrays[f"clause{k}/box"] = np.stack(clause.box)
    for k, tree in enumerate(certificate.trees):
        arrays |= {f"tree{k}/{name}": array for name, array in tree._asdict().items()}
    return arrays


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an archive of arrays; whoever kills the process finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> Certificate:
    """Read a file.

    Raises:
        CertificateError: it is not whole, or of another kind.
    """
    try:
        if os.path.exists(path) and not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if str(arrays.pop("format")) != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            group, _, field = name.partition("/")
            _check_array(name, field, array)
            parts.setdefault(group, {})[field] = array
        boxes = [Box(part["lower"], part["upper"]) for part in _numbered(parts, "region")]
        clauses = tuple(map(_clause, _numbered(parts, "clause")))
        _check_shapes(boxes, clauses)
        return Certificate(boxes, Property(clauses), [Tree(**part) for part in _numbered(parts, "tree")])
    except UNREADABLE as fault:
        raise errors.CertificateError(f"{path} is no whole certificate: leaf 0 cannot be read ({fault})") from fault


def _check_array(name: str, field: str, array: np.ndarray) -> None:
    """Refuse an array that is not of its field's kind: others would be rounded, or broadcast against each other."""
    kind = KINDS.get(field, np.floating)
    wide = not np.can_cast(array.dtype, np.float64)
    if array.size and (not np.issubdtype(array.dtype, kind) or (kind is np.floating and wide)):
        raise ValueError(f"{name} holds {array.dtype} numbers")
    if field in AXES and array.ndim != AXES[field]:
        raise ValueError(f"{name} has {array.ndim} axes")


def _check_shapes(boxes: list[Box], clauses: tuple[Clause, ...]) -> None:
    """Refuse regions that are not all of one shape, and clauses that count in boxes of another size."""
    shapes = {np.shape(end) for box in boxes for end in (box.lower, box.upper)}
    if len(shapes) > 1:
        raise ValueError(f"its regions have ends of shapes {sorted(shapes)}")
    sizes = {(2, math.prod(shape)) for shape in shapes}
    for clause in clauses:
        own = None if clause.box is None else np.shape(clause.box)
        if own is not None and sizes - {own}:
            raise ValueError(f"the box of a clause has shape {own}")


def _clause(part: dict[str, np.ndarray]) -> Clause:
    box = part.get("box")
    return Clause(part["outputs"], part["offsets"], part.get("inputs"), None if box is None else tuple(box))


def _numbered(parts: dict[str, dict], kind: str) -> list[dict]:
    count = sum(name.startswith(kind) for name in parts)
    return [parts[f"{kind}{k}"] for k in range(count)]
