"""The operators of ONNX, as JAX: a table from an operator's name to a function."""

from jaxbound.frontends.operators import elementwise, products, quantized, recurrent, reductions, shapes
from jaxbound.frontends.operators.table import IDLE_ATTRIBUTES, OPERATORS, Node, Operator

__all__ = [
    "IDLE_ATTRIBUTES",
    "OPERATORS",
    "Node",
    "Operator",
    "elementwise",
    "products",
    "quantized",
    "recurrent",
    "reductions",
    "shapes",
]
