"""One run over a graph: what is known of each node, and the compiled steps that learn more.

In: a `Graph` and regions. Out: `Run`, a record that never changes: `propagate`, `enclose` and `tighten` return one that
knows more, `bound_node` bounds. `sweep` is the walk over all nodes. `stretches` scans equal parts of a graph under
`jit`; `pruning` leaves out of eager passes what is zero. It imports the interpreters of `relaxations`.
"""

from jaxbound.driver.chunks import ROWS
from jaxbound.driver.run import Rows, Run
from jaxbound.driver.walks import sweep

__all__ = ["ROWS", "Rows", "Run", "sweep"]
