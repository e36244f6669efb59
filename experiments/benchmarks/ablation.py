"""Where the production step's time goes, by leaving parts of it away."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.benchmarks import modehop_step, shapes
from models import transformer
from models.attention import configured_attention
from models.config import ModelConfig
from models.kernels.interface import Attended
from models.loss import cross_entropy
from research.build import Build
from research.training.step import make_loss, split_microbatches

STEP = 'whole step'
# Each program contains the one before it; the differences add up to the whole step.
NESTED = {
    'forward': 'layers, forward',
    'forward, loss': 'loss and its gradient',
    'forward, loss, backward': 'layers, backward, and sum over micro-batches',
    STEP: 'clipping, AdamW, guard',
}
VARIANTS = {
    'without attention core': 'logits, softmax and weighted sum replaced by the values',
    'without segment masks': 'attention does not look at segment ids',
    'without rotary embedding': 'queries and keys are not rotated',
    'in one micro-batch': 'no scan over micro-batches',
    'layers scanned': 'model.scan_layers=scan',
}


def _own_values(q_BLHE, k_BMKE, v_BMKE, **options) -> Attended:
  """Returns every token's own value, in place of attention."""
  del k_BMKE, options
  B, L, H, _ = q_BLHE.shape
  return Attended(v_BMKE, jnp.zeros((B, H, L)))


def _built_with(built: Build, model: ModelConfig, attend=None, n_micro: int | None = None) -> Build:
  """Returns the build with another model of the same parameters, or another cut of the batch."""
  graphdef = transformer.build(model, transformer.Seams(attend=attend))
  return dataclasses.replace(built, graphdef=graphdef, device_graphdef=graphdef,
                             n_micro=n_micro or built.n_micro)


def _variants(built: Build) -> dict[str, Build]:
  """Returns the builds of VARIANTS."""
  model = built.config.model

  def without_segments(q_BLHE, k_BMKE, v_BMKE, *, segment_ids_BL, **options):
    del segment_ids_BL
    return configured_attention(model)(q_BLHE, k_BMKE, v_BMKE, **options)

  return {
      'without attention core': _built_with(built, model, attend=_own_values),
      'without segment masks': _built_with(built, model, attend=without_segments),
      'without rotary embedding': _built_with(built, dataclasses.replace(model, positions='none')),
      'in one micro-batch': _built_with(built, model, n_micro=1),
      'layers scanned': _built_with(built, dataclasses.replace(model, scan_layers='scan')),
  }


def _hidden(built: Build, params, micro) -> tuple[transformer.Transformer, jax.Array]:
  model = transformer.apply(built.graphdef, params)
  return model, model(micro['tokens'], micro['segment_ids'], micro['positions'])[0]


def _partial_programs(built: Build) -> dict[str, Callable]:
  """Returns f(params, batch) -> float32 scalar that needs all of the work, per part of NESTED."""
  loss_fn, n_micro = make_loss(built.config, built.graphdef), built.n_micro

  def forward(params, micro):
    return _hidden(built, params, micro)[1].astype(jnp.float32).sum()

  def with_loss(params, micro):
    model, hidden_BLD = _hidden(built, params, micro)

    def loss(hidden_TD, unembedding_VD):
      return cross_entropy(
          hidden_TD, unembedding_VD, micro['targets'].reshape(-1),
          micro['loss_mask'].reshape(-1), chunk=built.config.compute.loss_chunk).loss_sum
    return jax.value_and_grad(loss, (0, 1))(
        hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), model.unembedding_VD())

  def with_backward(params, micro):
    return jax.value_and_grad(loss_fn, has_aux=True)(
        params, micro, jax.random.key(0), jnp.float32(1), n_micro)

  def summed(work):
    def program(params, batch):
      micros = split_microbatches(batch, n_micro)
      shapes_ = jax.eval_shape(work, params, jax.tree.map(lambda x: x[0], micros))
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes_)
      return jax.lax.scan(lambda total, micro: (
          jax.tree.map(jnp.add, total, work(params, micro)), None), zeros, micros)[0]
    return built.in_mesh(jax.jit(program))

  return dict(zip(NESTED, map(summed, (forward, with_loss, with_backward))))


def _run_partial(built: Build, program: Callable, params) -> Callable:
  def run(batch: shapes.Batch) -> Callable:
    result = program(params, built.place_batch(modehop_step.full_batch(batch)))
    return lambda: jax.block_until_ready(result)
  return run


def programs(shape: shapes.Shape, n_rows: int, weights: shapes.Weights) -> dict[str, Callable]:
  """Returns run(batch) -> wait by name: the nested parts, the whole step, the variants."""
  built = modehop_step.build(shape, n_rows, 'float32')
  params = modehop_step.unflatten(built, weights)
  runs = {name: _run_partial(built, program, params)
          for name, program in _partial_programs(built).items()}
  runs[STEP] = modehop_step.stepper(built, weights)
  return runs | {name: modehop_step.stepper(variant, weights)
                 for name, variant in _variants(built).items()}
