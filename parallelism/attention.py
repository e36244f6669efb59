"""Runs an attention kernel on a mesh: every device on its own rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from parallelism.sharding import partition_spec

QUERY_AXES = ('batch', 'length', 'heads_act', None)
KEY_AXES = ('batch', 'length', 'kv_heads_act', None)
SEGMENT_AXES = ('batch', 'length')
CACHE_AXES = ('layers', 'batch', 'kv_heads_act', None, None)


def over_mesh(mesh: Mesh, attend):
  """Returns `attend` (queries, keys, values [B, L, heads, E], **options) under `shard_map`.

  XLA cannot split a kernel by itself. Rows go by the batch axes of the sharding table, heads by
  its head axes; neither talks to another device. Array options may be `segment_ids_BL`,
  `key_segment_ids_BM` and `alibi_slopes_H`; the rest is static. Returns (output [B, L, H, E],
  log-sum-exp [B, H, L]) as `attend` does.
  """
  names = {'segment_ids_BL': SEGMENT_AXES, 'key_segment_ids_BM': SEGMENT_AXES,
           'alibi_slopes_H': ('heads_act',)}
  inputs = tuple(partition_spec(axes) for axes in (QUERY_AXES, KEY_AXES, KEY_AXES))

  def sharded(q_BLHE, k_BMKE, v_BMKE, **options: Any):
    arrays = {name: jnp.asarray(options.pop(name)) for name in names
              if options.get(name) is not None}
    specs = {name: partition_spec(names[name]) for name in arrays}

    def local(q, k, v, arrays):
      return tuple(attend(q, k, v, **arrays, **options))

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(*inputs, specs), check_vma=False,
        out_specs=(partition_spec(QUERY_AXES), partition_spec(('batch', 'heads_act', 'length'))))
    return mapped(q_BLHE, k_BMKE, v_BMKE, arrays)
  return sharded


def decode_over_mesh(mesh: Mesh, attend):
  """Returns `attend` (queries [B, H, E], cache, layer, **options) under `shard_map`.

  The cache is a NamedTuple of keys and values [N, B, K, M, E] and lengths [B]. Rows and heads
  are divided as in `over_mesh`. Returns (output [B, H, E], log-sum-exp [B, H]) as `attend` does.
  """
  rows, queries = partition_spec(('batch',)), partition_spec(('batch', 'heads_act', None))
  keys = partition_spec(CACHE_AXES)

  def sharded(q_BHE, cache, layer, *, alibi_slopes_H=None, **options: Any):
    slopes = {} if alibi_slopes_H is None else {'alibi_slopes_H': jnp.asarray(alibi_slopes_H)}

    def local(q_BHE, cache, layer, slopes):
      return tuple(attend(q_BHE, cache, layer, **slopes, **options))

    mapped = jax.shard_map(
        local, mesh=mesh, check_vma=False,
        in_specs=(queries, type(cache)(keys, keys, rows), partition_spec(()),
                  {name: partition_spec(('heads_act',)) for name in slopes}),
        out_specs=(queries, partition_spec(('batch', 'heads_act'))))
    return mapped(q_BHE, cache, jnp.asarray(layer), slopes)
  return sharded


def with_own_slopes(attend, axis: str):
  """Returns `attend` for inside a manual `shard_map` whose mesh axis splits the heads.

  ALiBi's slopes are given for all heads; each device uses those of its own.
  """
  def local(q_BLHE, k_BMKE, v_BMKE, *, alibi_slopes_H=None, **options: Any):
    if alibi_slopes_H is not None:
      H = q_BLHE.shape[2]
      alibi_slopes_H = jax.lax.dynamic_slice_in_dim(
          jnp.asarray(alibi_slopes_H), jax.lax.axis_index(axis) * H, H)
    return attend(q_BLHE, k_BMKE, v_BMKE, alibi_slopes_H=alibi_slopes_H, **options)
  return local
