"""Runs an attention kernel on a mesh: every device on its own rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from parallelism.sharding import partition_spec

QUERY_AXES = ('batch', 'length', 'heads_act', None)
KEY_AXES = ('batch', 'length', 'kv_heads_act', None)
SEGMENT_AXES = ('batch', 'length')


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
