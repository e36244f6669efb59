"""What a laid-out step keeps for backward, and what a mesh refuses."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.training.checkpoints import Checkpoints
from research.training.config import ComputeConfig

MODEL = ModelConfig(vocab_size=96, context_length=32, n_layers=4, d_model=64, n_heads=8,
                    n_kv_heads=4, d_head=8, d_ff=160, scan_layers='scan')


def config_for(mesh: MeshConfig, model: ModelConfig = MODEL, **compute) -> ExperimentConfig:
  return ExperimentConfig(
      model=model, mesh=mesh, data=DataConfig(sequence_length=32, batch_size=16),
      compute=ComputeConfig(microbatch_tokens=512, **compute))


def stacked_by_scans(jaxpr) -> set[tuple[int, ...]]:
  """Returns the shapes of all that scans stack, scans inside others included."""
  shapes = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'scan':
      stacked = equation.outvars[equation.params['num_carry']:]
      shapes |= {variable.aval.shape for variable in stacked}
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      shapes |= stacked_by_scans(inner)
  return shapes


@pytest.mark.parametrize('mesh', [MeshConfig(data=1, fsdp=8), MeshConfig(data=1, stage=2, fsdp=4)],
                         ids=['fsdp', 'stages'])
@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_backward_keeps_no_whole_weights(remat, mesh):
  config = config_for(mesh, dataclasses.replace(MODEL, remat=remat))
  built = build_lib.build(config, make_mesh(mesh), {})
  batch = {name: jax.ShapeDtypeStruct((16, 32), jnp.int32) for name in (
      'tokens', 'targets', 'segment_ids', 'positions')}
  batch['loss_mask'] = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  jaxpr = built.in_mesh(jax.make_jaxpr(built.total_up()))(
      built.params, batch, jax.random.key_data(jax.random.key(0)), jnp.float32(1))
  kept = stacked_by_scans(jaxpr.jaxpr)
  assert kept  # Backward does stack what it needs of each layer.
  whole = {leaf.shape[1:] for leaf in jax.tree.leaves(built.params['blocks']) if leaf.ndim > 2}
  whole |= {(shape[0], shape[1] * shape[2]) for shape in whole if len(shape) == 3}
  whole |= {(shape[0] * shape[1], shape[2]) for shape in whole if len(shape) == 3}
  assert not {shape for shape in kept if shape[1:] in whole}
  if remat == 'none':  # The hidden layer is kept, so that it is not computed again.
    assert any(shape[-1] == MODEL.d_ff for shape in kept)


@pytest.mark.parametrize('mesh, model, compute, says', [
    ({'stage': 4}, {'n_layers': 3}, {}, 'mesh.stage=4 makes 4 places for model.n_layers=3; at most '
     'mesh.stage=3 has a layer in each'),
    ({}, {}, {'pipeline': 'interleaved', 'pipeline_chunks': 2},
     'compute.pipeline_chunks=2 is of a pipeline and mesh.stage=1 is none'),
    ({'context': 8, 'tensor': 1}, {}, {'context': 'all_to_all', 'microbatch_tokens': 0}, ''),
    ({'fsdp': 3}, {}, {}, 'data.batch_size=16 is not divided by mesh.fsdp=3; 15 is'),
    ({'tensor': 8}, {}, {}, "its 'kv_heads' axis of 4 is not divided by mesh.tensor=8"),
    ({'context': 3}, {}, {}, 'data.sequence_length=32 is not divided by mesh.context=3 in two '
     'chunks per device of the ring; 30 is'),
    ({'stage': 2, 'context': 2}, {}, {}, "compute.context='all_to_all' works there")])
def test_a_mesh_that_does_not_fit_is_refused_in_one_sentence(mesh, model, compute, says):
  mesh = MeshConfig(**{'data': 1, **mesh})
  config = config_for(mesh, dataclasses.replace(MODEL, **model))
  config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, **compute))
  if not says:
    build_lib.build(config, make_mesh(mesh), {})
    return
  with pytest.raises(ValueError) as error:
    build_lib.build(config, make_mesh(mesh), {})
  assert says in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('mesh, compute', [
    ({'fsdp': 4, 'tensor': 2}, {'gather': 'step'}), ({'context': 4, 'fsdp': 2}, {}),
    ({'stage': 2, 'fsdp': 2, 'context': 2}, {'gather': 'step', 'context': 'all_to_all'})], ids=str)
def test_the_held_out_loss_is_that_of_one_device(mesh, compute):
  rng = np.random.default_rng(0)
  batch = {name: rng.integers(1, 90, (16, 32)).astype(np.int32) for name in ('tokens', 'targets')}
  batch |= {'positions': np.tile(np.arange(32, dtype=np.int32), (16, 1)),
            'segment_ids': np.ones((16, 32), np.int32),
            'loss_mask': rng.integers(0, 2, (16, 32)).astype(np.float32)}

  def nats(mesh, **compute):
    config = config_for(MeshConfig(**{'data': 1, **mesh}), matmul_precision='highest', **compute)
    built = build_lib.build(config, make_mesh(config.mesh), {})
    return np.asarray(built.eval_step()(built.init_state().params, built.place_batch(batch)))

  want = nats({})
  assert want[batch['loss_mask'] > 0].min() > 1
  np.testing.assert_allclose(nats(mesh, **compute), want, atol=1e-5)


def test_a_checkpoint_of_a_pipeline_is_read_on_any_mesh(tmp_path):
  config = config_for(MeshConfig(data=1, stage=2, fsdp=2, tensor=2))
  state = build_lib.build(config, make_mesh(config.mesh), {}).init_state()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state._replace(step=jnp.int32(3)), {'step': 3, 'tokens': 0}, {})
  checkpoints.close()
  for axes in ({}, {'fsdp': 8}, {'context': 4, 'fsdp': 2}):
    config = config_for(MeshConfig(**{'data': 1, **axes}))
    target = build_lib.build(config, make_mesh(config.mesh), {}).abstract_state
    checkpoints = Checkpoints(tmp_path)
    read, position = checkpoints.restore(3, target)
    checkpoints.close()
    assert position['step'] == int(read.step) == 3
    for got, want, leaf in zip(*map(jax.tree.leaves, (read.params, state.params, target.params)),
                               strict=True):
      assert got.sharding == leaf.sharding
      np.testing.assert_array_equal(got, want)
