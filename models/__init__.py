"""Owns the networks: configuration, layers, attention, the decoder and its losses.

Modules are Flax NNX definitions; training and scoring use the pure functions of
`models.transformer` (`build`, `init`, `apply`) on a plain dict of arrays.
"""

from flax import nnx

# Parameters carry logical axis names, which mean nothing until a placement table binds them.
nnx.use_eager_sharding(False)
