"""The command `jaxbound`, also `python -m jaxbound`.

    options       every subcommand as a dataclass of its options; knows no JAX
    main          from arguments to an exit code
    networks      the network that an argument names
    bounding      bounds, certify, radius, lipschitz, explain, attack
    verifying     verify, check
    training      train, evaluate
    output        tables for people, JSON for machines

In: arguments. Out: a table or JSON on standard output, and an exit code. Options are checked before JAX is imported.
"""
