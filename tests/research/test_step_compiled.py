"""The production train step through the real TPU compiler for a v5e:2x4, with no TPU."""

import re

import jax
import pytest

from models.config import ModelConfig
from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_mesh
from research import build as build_lib
from research.config import ExperimentConfig
from research.data.config import DataConfig

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

B, L, H, K, E = 8, 1024, 4, 2, 64
MODEL = ModelConfig(vocab_size=512, context_length=L, n_layers=4, d_model=256, n_heads=H,
                    n_kv_heads=K, d_head=E, d_ff=512, compute_dtype='bfloat16',
                    layer_pattern=('sliding', 'full'), window=300)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.slow
def test_every_device_runs_the_kernels_on_its_rows_and_heads(capfd):
  mesh = compile_only_mesh('v5e:2x4', MESH)
  config = ExperimentConfig(n_steps=10, model=MODEL, mesh=MESH,
                            data=DataConfig(sequence_length=L, batch_size=B))
  numerics = build_lib.resolve_numerics(config, mesh)
  assert numerics['attention'] == 'flash_tpu'
  built = build_lib.build(config, mesh, numerics)
  names = ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')
  batch = {name: jax.ShapeDtypeStruct((B, L), 'float32' if name == 'loss_mask' else 'int32',
                                      sharding=built.batch_sharding) for name in names}
  compiled = built.in_mesh(built.jitted_step().lower)(built.abstract_state, batch).compile()
  calls = re.findall(r'%(flash_tpu_\w+)\S* = \(?(\w+\[[\d,]+\]).*tpu_custom_call',
                     compiled.as_text())
  rows, heads, key_heads = B // 4, H // 2, K // 2
  queries, keys = f'bf16[{rows},{heads},{L},{E}]', f'bf16[{rows},{key_heads},{L},{E}]'
  # Two layers, one sliding and one full, are the body of the loop over layers.
  assert sorted(calls) == sorted(2 * [('flash_tpu_forward', queries), ('flash_tpu_keys', keys),
                                      ('flash_tpu_queries', queries)])
  assert 'nvoluntary' not in capfd.readouterr().err
