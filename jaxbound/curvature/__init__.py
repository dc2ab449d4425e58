"""Proofs about scalar functions: where one is convex, monotone, defined, and in which range.

In: a program of elementwise primitives. Out: a `Curvature` (`analysis`), proved by interval arithmetic on Taylor jets
over a partition of the real line. NumPy alone; it imports nothing of ours.
"""
