"""The totals of a batch as every device computes its share: one after another, or through stages.

A build is `research.build.Build`: the experiment, the mesh, how parameters are stored, the model.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax

from parallelism import schedules
from parallelism.storage import STAGE, Storage, keeps_all_but_parameters
from research.training import pipelined
from research.training import step as step_lib


def gather_ends(storage: Storage, names: Any, params: Any, without: tuple[str, ...] = ()) -> Any:
  """Returns the parameters with those outside the blocks made whole."""
  ends = {name: storage.gathered(params[name], names[name], without) for name in step_lib.ENDS}
  return {**params, **ends}


def gather_first(config, storage: Storage, names: Any) -> Callable:
  """Returns what makes parameters whole before a model is applied: all, or all but the blocks."""
  if config.compute.gather == 'step':
    return lambda params: storage.gathered(params, names)
  return functools.partial(gather_ends, storage, names)


def gathering(storage: Storage, block_names: Any, without: tuple[str, ...], run) -> Callable:
  """Returns a `RunLayers` in which the parameters of a layer are made whole where it runs.

  Backward gathers them again, whatever else is kept for it.
  """
  def run_whole(body, carry, inputs, config):
    def whole_body(kind, carry, inputs):
      params, rest = inputs
      return body(kind, carry, (storage.gathered(params, block_names, without), rest))

    def forgetful(kind, carry, inputs):
      whole = functools.partial(whole_body, kind)
      return jax.checkpoint(whole, policy=keeps_all_but_parameters)(carry, inputs)
    return run(forgetful if config.remat == 'none' else whole_body, carry, inputs, config)
  return run_whole


def of_one_layer(names: Any) -> Any:
  """Returns the logical names of blocks without the axis that stacks them."""
  return jax.tree.map(lambda leaf: leaf[1:], names, is_leaf=lambda leaf: isinstance(leaf, tuple))


def accumulated(built: Any) -> Callable:
  """Returns what `Build.total_up` runs on a device: its micro-batches one after another."""
  config, storage, names = built.config, built.storage, built.names
  if config.compute.gather == 'layer':
    gather = functools.partial(gather_ends, storage, names)
    loss = step_lib.make_loss(config, built.device_graphdef, gather)
    totals_of = step_lib.make_accumulate(loss, built.n_micro)
  else:
    loss = step_lib.make_loss(config, built.device_graphdef)
    accumulate = step_lib.make_accumulate(loss, built.n_micro)

    def totals_of(params, batch, key, n_tokens):
      totals = accumulate(storage.gathered(params, names), batch, key, n_tokens)
      return totals._replace(gradients=storage.scattered(totals.gradients, names))

  def on_device(params, batch, key_data, n_tokens):
    totals = totals_of(params, batch, jax.random.wrap_key_data(key_data), n_tokens)
    gradients = storage.summed(totals.gradients, names)
    return step_lib.Totals(*storage.total(totals[:2]), gradients), ()
  return on_device


def through_stages(built: Any) -> Callable:
  """Returns what `Build.total_up` runs on a device: its stage's part of all micro-batches."""
  config, storage, names = built.config, built.storage, built.names
  n_stages, compute = built.mesh.shape[STAGE], config.compute
  order_Pn = pipelined.layer_order(config.model.n_layers, n_stages, compute.pipeline_chunks)
  order_SN = pipelined.by_stage(order_Pn, n_stages)
  planned = schedules.schedule(compute.pipeline, n_stages, built.n_micro, compute.pipeline_chunks)
  end_names = {name: names[name] for name in step_lib.ENDS}
  by_layer = compute.gather == 'layer'
  whole = functools.partial(storage.gathered, without=(STAGE,))
  gather = (lambda ends: whole(ends, end_names)) if by_layer else lambda ends: ends
  own_run = functools.partial(gathering, storage, of_one_layer(names['blocks']), (STAGE,))
  run = pipelined.make_pipelined(config, built.device_graphdef, planned, order_Pn, gather,
                                 own_run if by_layer else lambda run: run)

  def on_device(params, batch, key_data, n_tokens):
    blocks = storage.to_stages(params['blocks'], names['blocks'], order_SN)
    ends = storage.to_ends({name: params[name] for name in step_lib.ENDS}, end_names)
    if not by_layer:
      blocks, ends = whole(blocks, names['blocks']), whole(ends, end_names)
    totals, ran = run(blocks, ends, batch, jax.random.wrap_key_data(key_data), n_tokens)
    d_blocks = totals.gradients.pop('blocks')
    d_ends = totals.gradients
    if not by_layer:
      scattered = functools.partial(storage.scattered, without=(STAGE,))
      d_blocks, d_ends = scattered(d_blocks, names['blocks']), scattered(d_ends, end_names)
    gradients = {**storage.from_ends(d_ends, end_names),
                 'blocks': storage.from_stages(d_blocks, names['blocks'], order_SN)}
    gradients = storage.summed(gradients, names)
    return step_lib.Totals(*storage.total(totals[:2]), gradients), ran[:, None]
  return on_device
