"""One run over a graph: what is known of each node, and the compiled steps that learn more.

In: a `Graph` and regions. Out: `Run`, on which methods call `propagate`, `enclose`, `tighten` and `bound_node`.
`stretches` scans equal parts of a graph under `jit`. It imports the interpreters of `relaxations`.
"""

from jaxbound.driver.run import ROWS, Rows, Run

__all__ = ["ROWS", "Rows", "Run"]
