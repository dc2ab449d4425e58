"""Random programs whose bounds are checked at points, in exact rational arithmetic where they are piecewise rational.

    make fuzz SECONDS=60 SEED=0

programs     what a program is: lines of JAX, and how one is drawn
evaluation   the same lines in rational numbers and in float64
cases        parameters, regions, and points of them
runs         what JAX gives when it runs them
search       bounds against values; a failure is made smaller and written down as a script
"""
