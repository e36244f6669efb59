"""Steps that must change nothing, found inside the compiled step.

The estimate of what is usual is a part of the training state, so it is resumed with it and is the
same on every device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.training.config import GuardConfig

GAUSSIAN = 1.4826  # standard deviation per median absolute deviation, Rousseeuw & Croux (1993)
# Scales below which no estimate falls: nats of loss, and of the logarithm of a norm. Where the
# recent past is nearly constant, its deviation says nothing about what may come.
FLOORS = {'loss': 0.01, 'log_norm': 0.1}
# Metrics that say what a step was judged by; they stand in the record of skipped steps only.
JUDGED_BY = ('usual_loss', 'scale_of_loss', 'usual_log_norm', 'scale_of_log_norm', 'usual_known',
             'skipped_in_a_row')


class GuardState(NamedTuple):
  """What is usual: the last `window` accepted steps, in no particular order; and counts.

  Attributes:
    loss_R: losses, float32; a ring, written at `accepted` modulo its length.
    log_norm_R: logarithms of gradient norms, float32.
    accepted: steps that updated the parameters, int32.
    skipped: steps that did not, int32.
    in_a_row: those of them since the last accepted one, int32.
  """

  loss_R: jax.Array
  log_norm_R: jax.Array
  accepted: jax.Array
  skipped: jax.Array
  in_a_row: jax.Array


def fresh(config: GuardConfig) -> GuardState:
  """Returns the state before the first step."""
  zeros_R = jnp.zeros(config.window, jnp.float32)
  return GuardState(zeros_R, zeros_R, jnp.int32(0), jnp.int32(0), jnp.int32(0))


def usual(values_R: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
  """Returns the median and the robust scale, at least `floor`, of values."""
  median = jnp.median(values_R)
  return median, jnp.maximum(GAUSSIAN * jnp.median(jnp.abs(values_R - median)), floor)


def judge(config: GuardConfig, state: GuardState, loss: jax.Array, grad_norm: jax.Array,
          finite: jax.Array) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
  """Returns whether a step counts, the state after it and the metrics `JUDGED_BY`.

  Args:
    config: threshold and window.
    state: before the step.
    loss: of the whole batch.
    grad_norm: of the whole batch's gradients.
    finite: whether all numbers of the step are.
  """
  log_norm = jnp.log(jnp.maximum(grad_norm, jnp.finfo(jnp.float32).tiny))
  judged_by, spike = {}, jnp.bool_(False)
  for name, value, values_R in (('loss', loss, state.loss_R),
                                ('log_norm', log_norm, state.log_norm_R)):
    median, scale = usual(values_R, FLOORS[name])
    judged_by |= {f'usual_{name}': median, f'scale_of_{name}': scale}
    spike |= value > median + config.spike_threshold * scale
  known = state.accepted >= config.window
  spike &= known & (config.spike_threshold > 0)
  accept = finite & ~spike
  one = accept.astype(jnp.int32)
  at = state.accepted % config.window
  write = lambda values_R, value: jnp.where(accept, values_R.at[at].set(value), values_R)
  after = GuardState(
      write(state.loss_R, loss), write(state.log_norm_R, log_norm), state.accepted + one,
      state.skipped + 1 - one, (state.in_a_row + 1) * (1 - one))
  judged_by |= {'usual_known': known, 'skipped_in_a_row': after.in_a_row}
  return accept, after, {name: x.astype(jnp.float32) for name, x in judged_by.items()}
