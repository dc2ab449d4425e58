"""Branch and bound: the search that turns bounds into verdicts.

`verify` runs one `parts.Part` for every box; a part splits inputs (`inputs`) or neurons (`neurons`), bounds domains in
batches (`passes`) against the rows of a property (`goals`), and looks for counterexamples (`points`).
"""

from jaxbound.search.branching import BranchAndBound
from jaxbound.search.verification import Verdict, verify

__all__ = ["BranchAndBound", "Verdict", "verify"]
