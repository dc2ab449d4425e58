"""A function as a flat graph of nodes that depend on a region.

In: a JAX function and the shapes of its arguments (`tracing`). Out: a `Structure`, which is hashable and shared, and a
`Graph`, which is a structure with the constants of one call. `primitives` is the table of what each JAX primitive is;
`rewriting` recognises what is written in several ways. It imports `curvature` for the kinds of scalar functions.
"""

from jaxbound.graph.structure import NONLINEAR, Block, Constants, Graph, Node, Op, Program, Structure, Template

__all__ = ["NONLINEAR", "Block", "Constants", "Graph", "Node", "Op", "Program", "Structure", "Template"]
