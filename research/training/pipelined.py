"""The gradients of a batch through a pipeline: the model cut into stages of layer chunks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.stack import REMATS
from parallelism import pipeline
from parallelism.schedules import Schedule
from research.training.step import (
    Batch,
    Totals,
    dropout_of,
    router_loss,
    split_microbatches,
    token_loss,
)

NO_LAYER = -1
# Names of the conditionals in a compiled program, see `branch_shares`.
LAYER, KIND = 'pipeline_layer', 'pipeline_kind'


def too_many_places(n_layers: int, n_stages: int, n_chunks: int) -> str:
  """Returns why a pipeline's places cannot all have a layer, '' if they can."""
  if n_stages * n_chunks <= n_layers:
    return ''
  chunks = f' x compute.pipeline_chunks={n_chunks}' if n_chunks > 1 else ''
  return (f'mesh.stage={n_stages}{chunks} makes {n_stages * n_chunks} places for '
          f'model.n_layers={n_layers}; at most mesh.stage={max(1, n_layers // n_chunks)} has a '
          'layer in each')


def layer_order(n_layers: int, n_stages: int, n_chunks: int) -> np.ndarray:
  """Returns the layers of each place of the pipeline, int32 [places, n].

  Layers go to places in order, as evenly as they can; what is short is short at the end of the
  model, where the loss is computed too. A place with less than n layers has NO_LAYER after them.

  Raises:
    ValueError: there are more places than layers.
  """
  if problem := too_many_places(n_layers, n_stages, n_chunks):
    raise ValueError(problem)
  n_places = n_stages * n_chunks
  counts = np.full(n_places, n_layers // n_places) + (np.arange(n_places) < n_layers % n_places)
  order_Pn = np.full((n_places, counts.max()), NO_LAYER, np.int32)
  order_Pn[np.arange(counts.max()) < counts[:, None]] = np.arange(n_layers)
  return order_Pn


def by_stage(order_Pn: np.ndarray, n_stages: int) -> np.ndarray:
  """Returns the layers of each stage's chunks one after another, [stages, chunks * n]."""
  n_chunks = len(order_Pn) // n_stages
  return order_Pn.reshape(n_chunks, n_stages, -1).swapaxes(0, 1).reshape(n_stages, -1)


def make_run_chunk(model: ModelConfig, layers_n: jax.Array, *, full: bool) -> Callable:
  """Returns a `RunLayers` of one chunk, whose layers are known to the program only when it runs.

  Args:
    model: the model.
    layers_n: numbers of the chunk's layers, NO_LAYER where there is none.
    full: whether every place has as many layers as any.
  """
  kinds = sorted(set(model.layer_kinds))
  kind_N = np.array([kinds.index(kind) for kind in model.layer_kinds], np.int32)

  def run(body, carry, inputs, config):
    remat = REMATS[config.remat]
    steps = [remat(lambda carry, inputs, kind=kind: body(kind, carry, inputs)[0]) for kind in kinds]

    def layer(carry, layer_inputs):
      number, inputs = layer_inputs
      def run_layer():
        if len(steps) == 1:
          return steps[0](carry, inputs)
        with jax.named_scope(KIND):
          return jax.lax.switch(jnp.asarray(kind_N)[number], steps, carry, inputs)
      if full:
        return run_layer(), None
      with jax.named_scope(LAYER):
        return jax.lax.cond(number != NO_LAYER, run_layer, lambda: carry), None

    return jax.lax.scan(layer, carry, (layers_n, inputs))
  return run


def branch_shares(model: ModelConfig, order_Pn: np.ndarray) -> dict[str, tuple[float, ...]]:
  """Returns how often the conditionals of a chunk take each branch, by name; a mean over places."""
  kinds = sorted(set(model.layer_kinds))
  full = model.n_layers / order_Pn.size
  return {LAYER: (1 - full, full),
          KIND: tuple(model.layer_kinds.count(kind) / model.n_layers for kind in kinds)}


def make_pipelined(config, graphdef, schedule: Schedule, order_Pn: np.ndarray,
                   gather: Callable, own_run: Callable) -> Callable:
  """Returns f(blocks, ends, batch, key, n_tokens) -> Totals of the stage's share, and what ran.

  Args:
    config: the experiment.
    graphdef: the model's static half.
    schedule: what stages do when.
    order_Pn: see `layer_order`.
    gather: makes parameters of the ends whole.
    own_run: wraps a `RunLayers` so that each layer's parameters are whole where it runs.

  Blocks are the stage's own, stacked [chunks * n, ...]; ends are those outside the blocks. The
  gradients have the same trees. What ran is int32 [ticks, 2], see `pipeline`.
  """
  model_config, n_micro = config.model, schedule.n_microbatches
  full = bool((order_Pn != NO_LAYER).all())

  def pipelined(blocks, ends, batch: Batch, key, n_tokens):
    C, n = schedule.n_chunks, order_Pn.shape[1]
    chunks = jax.tree.map(lambda x: x.reshape(C, n, *x.shape[1:]), blocks)
    one = jax.tree.map(lambda x: x[:1], blocks)  # stands in where no block is run

    def first(ends, micro):
      model = transformer.apply(graphdef, {**gather(ends), 'blocks': one})
      return model.embedded(micro['tokens'], micro['positions'], dropout_of(config, key, micro))

    def chunk(own, place, x_BlD, micro):
      model = transformer.apply(graphdef, {**ends, 'blocks': own})
      layers_n = jnp.asarray(order_Pn)[place]
      dropout = dropout_of(config, key, micro)
      if dropout is not None:
        dropout = dropout._replace(layer_keys_N=dropout.layer_keys_N[layers_n])
      x_BlD, aux, _ = model.through_blocks(
          x_BlD, micro['positions'], model.own_row(micro['segment_ids']),
          segment_ids_BL=micro['segment_ids'], dropout=dropout,
          run_layers=own_run(make_run_chunk(model_config, layers_n, full=full)))
      return x_BlD, *router_loss(config, aux, n_micro)

    def last(ends, x_BlD, micro):
      model = transformer.apply(graphdef, {**gather(ends), 'blocks': one})
      return token_loss(config, model, model.final_norm(x_BlD), micro, n_tokens)

    (loss, sums), (d_chunks, d_ends), ran = pipeline.run(
        pipeline.Parts(first, chunk, last), schedule, chunks, ends,
        split_microbatches(batch, n_micro))
    d_blocks = jax.tree.map(lambda g: g.reshape(C * n, *g.shape[2:]), d_chunks)
    return Totals(loss, sums, {'blocks': d_blocks, **d_ends}), ran
  return pipelined
