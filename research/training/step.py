"""The compiled training step: micro-batches, gradients, guard, update; and the held-out loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import transformer
from models.loss import cross_entropy, token_log_probs

Batch = dict[str, jax.Array]


class State(NamedTuple):
  """All that an update reads and writes; every leaf is an array.

  `ema` is an empty dict when no average is kept. `step` counts batches consumed, int32.
  """

  step: jax.Array
  params: Any
  optimizer: Any
  ema: Any
  rng: jax.Array


def split_microbatches(batch: Batch, n_micro: int) -> Batch:
  """Returns arrays [n_micro, B / n_micro, ...]; rows stay on the device that holds them.

  Micro-batch i takes rows i, i + n_micro, ...: with the batch split contiguously over devices
  every device contributes equally to each micro-batch, and nothing moves.
  """
  def split(x):
    return jnp.moveaxis(x.reshape(-1, n_micro, *x.shape[1:]), 1, 0)
  return jax.tree.map(split, batch)


def make_loss(config, graphdef) -> Callable:
  """Returns f(params, micro-batch, key, n_tokens, n_micro) -> (loss share, metric sums).

  The shares of all micro-batches add up to the loss of the whole batch: the cross-entropy's
  sum over tokens divided by the batch's n_tokens, the router losses averaged.
  """
  def loss_fn(params, micro, key, n_tokens, n_micro):
    model = transformer.apply(graphdef, params)
    hidden_BLD, aux = model(micro['tokens'], micro['segment_ids'], micro['positions'],
                            dropout_key=key)
    result = cross_entropy(
        hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), model.unembedding_VD(),
        micro['targets'].reshape(-1), micro['loss_mask'].reshape(-1),
        z_weight=config.optimizer.z_weight, softcap=config.model.final_softcap,
        chunk=config.compute.loss_chunk)
    router = (config.model.moe.balance_weight * aux.balance
              + config.model.moe.router_z_weight * aux.router_z)
    loss = result.loss_sum / n_tokens + router / n_micro
    sums = {'nll': result.loss_sum - result.z_sum, 'z_loss': result.z_sum, 'correct': result.correct_sum,
            'router': router / n_micro}
    return loss, sums
  return loss_fn


def make_train_step(config, graphdef, optimizer: optax.GradientTransformation,
                    learning_rate: optax.Schedule, n_micro: int) -> Callable:
  """Returns step(state, batch) -> (state, metrics); jit it with the state donated.

  Metrics are float32 scalars. A non-finite loss or gradient leaves parameters, moments and
  average as they were and sets `skipped`; the step and the key move on.
  """
  grad_fn = jax.value_and_grad(make_loss(config, graphdef), has_aux=True)
  ema_decay = config.optimizer.ema_decay

  def accumulated(params, batch, keys, n_tokens):
    def add(carry, micro_and_key):
      micro, key = micro_and_key
      (loss, sums), grads = grad_fn(params, micro, key, n_tokens, n_micro)
      return jax.tree.map(jnp.add, carry, (loss, sums, grads)), None

    micros = split_microbatches(batch, n_micro)
    if n_micro == 1:
      first = jax.tree.map(lambda x: x[0], (micros, keys))
      (loss, sums), grads = grad_fn(params, *first, n_tokens, n_micro)
      return loss, sums, grads
    zeros = jax.tree.map(jnp.zeros_like, params)
    sums = dict.fromkeys(('nll', 'z_loss', 'correct', 'router'), jnp.float32(0))
    return jax.lax.scan(add, (jnp.float32(0), sums, zeros), (micros, keys))[0]

  def train_step(state: State, batch: Batch):
    carry, key = jax.random.split(jax.random.wrap_key_data(state.rng))
    n_tokens = jnp.maximum(batch['loss_mask'].sum(), 1.0)
    loss, sums, grads = accumulated(state.params, batch, jax.random.split(key, n_micro), n_tokens)
    grad_norm = optax.tree.norm(grads)
    lr = learning_rate(state.step)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(lr)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + lr * u.astype(p.dtype), state.params, updates)
    ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema,
                       params if state.ema else {})
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    new = State(state.step + 1, keep(params, state.params), keep(moments, state.optimizer),
                keep(ema, state.ema), jax.random.key_data(carry))
    metrics = {
        'loss': loss, 'cross_entropy': sums['nll'] / n_tokens,
        'z_loss': sums['z_loss'] / n_tokens, 'router_loss': sums['router'],
        'accuracy': sums['correct'] / n_tokens, 'grad_norm': grad_norm,
        'param_norm': optax.tree.norm(new.params), 'learning_rate': lr,
        'batch_tokens': batch['loss_mask'].sum(), 'skipped': 1.0 - finite.astype(jnp.float32)}
    return new, metrics

  return train_step


def make_eval_step(config, graphdef) -> Callable:
  """Returns f(params, batch) -> nats per token, float32 [B, L], zero where loss_mask is zero."""
  def eval_step(params, batch: Batch):
    model = transformer.apply(graphdef, params)
    hidden_BLD, _ = model(batch['tokens'], batch['segment_ids'], batch['positions'])
    log_probs_T = token_log_probs(
        hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), model.unembedding_VD(),
        batch['targets'].reshape(-1), softcap=config.model.final_softcap,
        chunk=config.compute.loss_chunk)
    mask_BL = batch['loss_mask']
    return jnp.where(mask_BL > 0, -log_probs_T.reshape(mask_BL.shape) * mask_BL, 0.0)
  return eval_step
