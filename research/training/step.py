"""The compiled training step: micro-batches, gradients, guard, update; and the held-out loss.

Gradients and the held-out loss are computed by every device on its part of the batch (see
`parallelism.storage`); on one device the part is the whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import transformer
from models.loss import cross_entropy, token_log_probs
from research.training import guards

Batch = dict[str, jax.Array]
ENDS = ('embedding', 'final_norm')  # parameters outside the blocks
LOADS = ('max_load', 'dropped', 'rounds')  # of experts, see `models.moe.AuxLosses`
METRIC_SUMS = ('nll', 'z_loss', 'correct', 'router', *LOADS)


class State(NamedTuple):
  """All that an update reads and writes; every leaf is an array.

  `ema` is an empty dict when no average is kept. `step` counts batches consumed, int32. `guard`
  is what the guards know of earlier steps.
  """

  step: jax.Array
  params: Any
  optimizer: Any
  ema: Any
  rng: jax.Array
  guard: guards.GuardState


class Totals(NamedTuple):
  """What a batch gives: the loss, sums for metrics and the gradients of all parameters."""

  loss: jax.Array
  sums: dict[str, jax.Array]
  gradients: Any


def split_microbatches(batch: Batch, n_micro: int) -> Batch:
  """Returns arrays [n_micro, B / n_micro, ...]; micro-batch i takes rows i, i + n_micro, ..."""
  def split(x):
    return jnp.moveaxis(x.reshape(-1, n_micro, *x.shape[1:]), 1, 0)
  return jax.tree.map(split, batch)


def dropout_of(config, key: jax.Array, micro: Batch) -> transformer.Dropout | None:
  """Returns a micro-batch's randomness, None for a model without dropout."""
  if not config.model.dropout:
    return None
  return transformer.dropout_of(config.model, key, micro['token_ids'])


def token_loss(config, model, hidden_BlD: jax.Array, micro: Batch, n_tokens: jax.Array):
  """Returns the cross-entropy's share of the loss and the sums that metrics are made of."""
  spread = model.seams.spread
  hidden_BLD = spread.whole(hidden_BlD)
  result = cross_entropy(
      hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), model.unembedding_VD(),
      micro['targets'].reshape(-1), micro['loss_mask'].reshape(-1),
      z_weight=config.optimizer.z_weight, softcap=config.model.final_softcap,
      chunk=config.compute.loss_chunk, spread=spread)
  sums = {'nll': result.loss_sum - result.z_sum, 'z_loss': result.z_sum,
          'correct': result.correct_sum}
  return result.loss_sum / n_tokens, metric_sums(**sums)


def metric_sums(**sums: jax.Array) -> dict[str, jax.Array]:
  """Returns the sums that metrics are made of, zero where none is given."""
  return {name: sums.get(name, jnp.float32(0)) for name in METRIC_SUMS}


def router_loss(config, aux, n_micro: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns a micro-batch's share of the router losses, and the sums of its experts' metrics.

  Losses are sums over layers, loads means.
  """
  weights = config.model.moe
  loss = weights.balance_weight * aux.balance + weights.router_z_weight * aux.router_z
  loads = {name: getattr(aux, name) / (config.model.n_layers * n_micro) for name in LOADS}
  return loss / n_micro, metric_sums(router=loss / n_micro, **loads)


def make_loss(config, graphdef, gather: Callable = lambda params: params) -> Callable:
  """Returns f(params, micro-batch, key, n_tokens, n_micro) -> (loss share, metric sums).

  The shares of all devices and micro-batches add up to the loss of the whole batch: the
  cross-entropy's sum over tokens divided by the batch's n_tokens, the router losses averaged.
  `gather` makes parameters outside the blocks whole; blocks are gathered where they run.
  """
  def loss_fn(params, micro, key, n_tokens, n_micro):
    model = transformer.apply(graphdef, gather(params))
    hidden_BlD, aux = model(micro['tokens'], micro['segment_ids'], micro['positions'],
                            dropout=dropout_of(config, key, micro))
    loss, sums = token_loss(config, model, hidden_BlD, micro, n_tokens)
    router, router_sums = router_loss(config, aux, n_micro)
    return loss + router, jax.tree.map(jnp.add, sums, router_sums)
  return loss_fn


def make_accumulate(loss_fn: Callable, n_micro: int) -> Callable:
  """Returns f(params, batch, key, n_tokens) -> Totals of a batch, one micro-batch at a time."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def accumulate(params, batch: Batch, key, n_tokens) -> Totals:
    def add(totals, micro):
      (loss, sums), gradients = grad_fn(params, micro, key, n_tokens, n_micro)
      return jax.tree.map(jnp.add, totals, Totals(loss, sums, gradients)), None

    micros = split_microbatches(batch, n_micro)
    if n_micro == 1:
      first = jax.tree.map(lambda x: x[0], micros)
      (loss, sums), gradients = grad_fn(params, first, key, n_tokens, n_micro)
      return Totals(loss, sums, gradients)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    start = Totals(jnp.float32(0), dict.fromkeys(METRIC_SUMS, jnp.float32(0)), zeros)
    return jax.lax.scan(add, start, micros)[0]
  return accumulate


def make_train_step(config, total_up: Callable, optimizer: optax.GradientTransformation,
                    learning_rate: optax.Schedule) -> Callable:
  """Returns step(state, batch) -> (state, metrics); jit it with the state donated.

  Metrics are float32 scalars. A non-finite loss or gradient, or a spike of either, leaves
  parameters, moments and average as they were and sets `skipped`; the step, with it the learning rate's
  schedule and the place in the data, and the key move on. So the steps after it see the same
  batches, learning rates and keys as if it had been taken.

  Args:
    config: the experiment.
    total_up: (params, batch, key data, n_tokens) -> Totals over the whole batch.
    optimizer: the Optax transformation at learning rate 1.
    learning_rate: step -> learning rate.
  """
  ema_decay = config.optimizer.ema_decay

  def train_step(state: State, batch: Batch):
    carry, key = jax.random.split(jax.random.wrap_key_data(state.rng))
    n_with_loss = batch['loss_mask'].sum()
    n_tokens = jnp.maximum(n_with_loss, 1.0)
    loss, sums, grads = total_up(state.params, batch, jax.random.key_data(key), n_tokens)
    grad_norm = optax.tree.norm(grads)
    lr = learning_rate(state.step)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(lr)
    accept, guard, judged_by = guards.judge(
        config.guards, state.guard, loss, grad_norm, finite, n_with_loss > 0)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + lr * u.astype(p.dtype), state.params, updates)
    ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema,
                       params if state.ema else {})
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
    new = State(state.step + 1, keep(params, state.params), keep(moments, state.optimizer),
                keep(ema, state.ema), jax.random.key_data(carry), guard)
    metrics = {
        'loss': loss, 'cross_entropy': sums['nll'] / n_tokens,
        'z_loss': sums['z_loss'] / n_tokens, 'router_loss': sums['router'],
        'accuracy': sums['correct'] / n_tokens, 'grad_norm': grad_norm,
        'param_norm': optax.tree.norm(new.params), 'learning_rate': lr,
        'batch_tokens': n_with_loss, 'skipped': 1.0 - accept.astype(jnp.float32),
        'skipped_total': guard.skipped.astype(jnp.float32), **judged_by}
    if config.model.moe.n_experts:
      metrics |= {f'expert_{name}': sums[name] for name in LOADS}
    return new, metrics

  return train_step


def make_eval_step(config, graphdef, gather: Callable) -> Callable:
  """Returns f(params, batch) -> nats per token, float32 [B, L], zero where loss_mask is zero."""
  def eval_step(params, batch: Batch):
    model = transformer.apply(graphdef, gather(params))
    hidden_BlD, _ = model(batch['tokens'], batch['segment_ids'], batch['positions'])
    hidden_BLD = model.seams.spread.whole(hidden_BlD)
    log_probs_T = token_log_probs(
        hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), model.unembedding_VD(),
        batch['targets'].reshape(-1), softcap=config.model.final_softcap,
        chunk=config.compute.loss_chunk, spread=model.seams.spread)
    mask_BL = batch['loss_mask']
    return jnp.where(mask_BL > 0, -log_probs_T.reshape(mask_BL.shape) * mask_BL, 0.0)
  return eval_step
