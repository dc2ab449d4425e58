"""The exact oracles: linear programs over all values of a network, and its exact range (extra `exact`).

program     programs, and lower bounds of them from any multipliers
solvers     HiGHS and Clarabel, which propose the multipliers
families    planes around a nonlinear node
encoding    nodes of a graph as rows
tree        branch and bound
oracles     the methods `LP` and `MILP`
"""

from jaxbound.methods.exact.oracles import LP, MILP

__all__ = ["LP", "MILP"]
