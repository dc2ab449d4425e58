"""A user's network: Flax, Equinox, Keras, a chain of layers or a loaded file; and bounding it per example.

In: params, a batch x, eps. Out: `crown(params, x, eps)` and its kin. From here on Flax is known.
"""
