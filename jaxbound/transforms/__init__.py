"""The function transformations: `bound`, `linear_bounds`, `pre_activation_bounds`, `explain`, `tune`.

In: any JAX function, regions among its arguments, a method. Out: results shaped like the function's. `problems` is the
one way from (function, arguments) to what a method is asked.
"""
