"""Whether a graph is bounded as it is executed: what one node at a time does not show (`relaxations.execution`).

The compiler looks across nodes. Where its rules and where it may evaluate a value decide what is computed, there are
three answers: the error of each node has room for it, a node's bounds become infinite, or the graph is refused, here.

* **Rewritten.** What jaxbound bounds in another form than it is written in has other errors.
* **Gathered factors.** Along sums and products XLA gathers the numbers by which values are multiplied, and the product
  of more than a few might leave the range of the dtype.
* **Values that several readers share.** XLA evaluates what is cheap anew for each of its readers, and simplifies it
  with what reads it: `(x + a) + b` becomes `x + (a + b)` though `x + a` is read elsewhere, too, and a product may reach
  one reader rounded and another one in a fused multiply-add. So the readers of such a value may see different ones,
  each within its error, and `((x + 1e8) + 1) - (x + 1e8)` is 0. A linear pass would let them cancel. What is evaluated
  once, as convolutions, sums over axes, maxima and sorting are, is settled again. (A product itself differs by a unit
  in the last place, for which its readers have room.)
"""

from __future__ import annotations

import jax

from jaxbound import errors
from jaxbound.graph import Graph, Node
from jaxbound.methods.base import Method
from jaxbound.relaxations import affine, execution
from jaxbound.relaxations.enclosures import simplification

_SCALES = frozenset({"div", "mul"})
_SUMS = frozenset({"add", "add_any", "sub"})
_RUNNING = frozenset({"cumsum", "reduce_window_sum"})
"""Sums that may be added up from others."""
_PRODUCTS = frozenset({"div", "integer_pow", "mul", "square"})


def check(method: Method, graph: Graph) -> None:
    """Refuse what is not bounded as it is executed.

    Raises:
        UnsupportedError: the method, a node, a rewritten expression, or the way in which matrices are multiplied.
    """
    if not method.charges_execution:
        raise errors.not_executed(f"{type(method).__name__} does not bound it", "use Crown, CrownIBP or IBP")
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if jax.default_backend() != "cpu" and precision not in ("highest", "float32"):
        raise errors.not_executed("matrices may be multiplied in less than float32", "set jax_default_matmul_precision")
    if graph.structure.rewritten:
        names = ", ".join(graph.structure.rewritten)
        reason = "is bounded in another form than it runs in, as normalisations, softmax and quotients are, so its own "
        raise errors.not_executed(f"what {names} makes {reason}rounding errors are not known")
    factors, unsettled = _factors(graph), _unsettled(graph)
    for number, node in enumerate(graph.nodes):
        reason = execution.refusal(node.op, _made_by(graph, node))
        if factors[number] > simplification.GATHERED:
            reason = "the compiler may gather the factors of many consecutive multiplications"
        if (unsettled[number] and _reads(graph, number) > 1) or _is_shared_product(graph, number):
            reason = "the compiler may evaluate this anew, and in another way, for each that reads it"
        if reason:
            raise errors.not_executed(f"{reason} ({node.name}{node.source and ' at ' + node.source})")


def _moved_from(graph: Graph, node: Node) -> list[Node]:
    """What a node reads, before it was moved, repeated, negated or put beside others."""
    found, pending = [], list(node.inputs)
    while pending:
        source = graph.nodes[pending.pop()]
        moved = source.op.kind == "affine" and affine.moves(source.op)
        if moved:
            pending.extend(source.inputs)
        else:
            found.append(source)
    return found


def _made_by(graph: Graph, node: Node) -> frozenset[str]:
    """What makes the argument of a scalar function."""
    names = set()
    for source in _moved_from(graph, node):
        names.add("multiple" if _is_product(source) and source.op.kind == "affine" else _last(source))
    return frozenset(names)


def _last(node: Node) -> str:
    """The name of the instruction that makes a node's value; "multiple" of one that multiplies by a number."""
    return simplification.result(node.op.program) if node.op.kind == "scalar" else node.op.name


def _is_product(node: Node) -> bool:
    """Whether a node's value is a product, which a sum that reads it may take in unrounded."""
    if node.op.kind == "scalar":
        return _last(node) in _PRODUCTS | {"multiple"}
    return node.op.kind == "affine" and node.op.facts.scales and _contracted(node) == 1


def _contracted(node: Node) -> int:
    """How many products each entry of a node's value adds."""
    count = affine.terms(node.op)
    if node.op.name != "conv_general_dilated":
        return count
    return count // node.op.input_shapes[1][dict(node.op.params)["dimension_numbers"].rhs_spec[0]]


def _is_sum(node: Node) -> bool:
    return node.op.kind == "affine" and node.op.name in _SUMS


def _ends_adding(node: Node) -> bool:
    """Whether a node's value is a sum with a number, which XLA may gather with another one that is added to it."""
    if node.op.kind == "scalar":
        return simplification.result(node.op.program) == "shifted"
    return _is_sum(node) and len(node.inputs) == 1 and len(node.op.operands) == 2


def _begins_adding(node: Node) -> bool:
    """Whether a node adds a number to what it reads."""
    return simplification.shifts(node.op.program) if node.op.kind == "scalar" else _ends_adding(node)


def _factors(graph: Graph) -> list[int]:
    """How many factors XLA may gather into one, at the most, on the way to each node's value and in it."""
    behind: list[int] = []
    most: list[int] = []
    for node in graph.nodes:
        before = max((behind[k] for k in node.inputs), default=0)
        if node.op.kind == "scalar":
            largest, before = simplification.gathered(node.op.program, before)
        elif _is_sum(node):  # of two multiples of one number a multiple may be made
            largest = before = 0 if len(node.inputs) < 2 else min(behind[k] for k in node.inputs)
        elif node.op.kind == "affine":
            largest = before = before + (node.op.name in _SCALES)
        else:
            largest = before = 0
        behind.append(before)
        most.append(largest)
    return most


def _unsettled(graph: Graph) -> list[bool]:
    """Which values may be different ones for different readers."""
    found: list[bool] = []
    for number, node in enumerate(graph.nodes):
        op = node.op
        cheap = op.kind == "scalar" or (op.kind == "affine" and affine.terms(op) <= 1)
        differs = cheap and any(found[k] for k in node.inputs)
        fused = _is_sum(node) or op.name in _RUNNING
        differs |= fused and any(map(_is_product, _moved_from(graph, node)))
        differs |= _ends_adding(node) and any(map(_begins_adding, _readers(graph, number)))
        differs |= op.kind == "scalar" and simplification.differs(op.program)
        found.append(differs)
    return found


def _is_shared_product(graph: Graph, number: int) -> bool:
    """Whether a node's value is a product that several read, and a scalar function among them not rounded."""
    readers, node = _readers(graph, number), graph.nodes[number]
    several = len(readers) + sum(source == number for kind, source in graph.structure.outputs if kind == "node") > 1
    takes_in = (n.op.kind == "scalar" and simplification.takes_in(n.op.program) for n in readers)
    return several and _is_product(node) and any(takes_in)


def _readers(graph: Graph, number: int) -> list[Node]:
    """What reads a value, also after it was moved, repeated or put beside others."""
    found = []
    for reader in graph.structure.consumers[number]:
        node = graph.nodes[reader]
        moved = node.op.kind == "affine" and affine.moves(node.op)
        found.extend(_readers(graph, reader) if moved else [node])
    return found


def _reads(graph: Graph, number: int) -> int:
    """How often a value is read, its copies and what is made of it entry by entry counted one by one."""
    count = sum(kind == "node" and source == number for kind, source in graph.structure.outputs)
    for reader in graph.structure.consumers[number]:
        node = graph.nodes[reader]
        times = node.inputs.count(number)
        if node.op.kind == "scalar":
            times = simplification.reads(node.op.program)
        elif node.op.kind == "affine" and affine.moves(node.op) and affine.copies(node.op) > 1:
            times = 2
        count += times
    return count
