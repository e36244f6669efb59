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
FLOORS = (0.01, 0.1)
# Metrics that say what a step was judged by; they stand in the record of skipped steps only.
JUDGED_BY = ('usual_loss', 'scale_of_loss', 'usual_log_norm', 'scale_of_log_norm', 'usual_known',
             'skipped_in_a_row')


class GuardState(NamedTuple):
  """What is usual, and counts.

  Attributes:
    recent_2R: loss and logarithm of the gradient norm of the last `window` steps that `remembered`
      counts, float32; a ring, written at `remembered` modulo its length.
    remembered: finite steps that had tokens with a loss, spikes too, int32: a few do not move a
      median, and a level that lasts becomes the usual one after half a window.
    skipped: steps that did not update them, int32.
    in_a_row: those of them since the last update, int32.
  """

  recent_2R: jax.Array
  remembered: jax.Array
  skipped: jax.Array
  in_a_row: jax.Array


def fresh(config: GuardConfig) -> GuardState:
  """Returns the state before the first step."""
  return GuardState(jnp.zeros((2, config.window)), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def _medians(values_2R: jax.Array) -> jax.Array:
  """Returns the median of each row, float32 [2]; `jnp.median` makes ten times the program."""
  ordered_2R = jnp.sort(values_2R, axis=1)
  n = values_2R.shape[1]
  return 0.5 * (ordered_2R[:, (n - 1) // 2] + ordered_2R[:, n // 2])


def judge(config: GuardConfig, state: GuardState, loss: jax.Array, grad_norm: jax.Array,
          finite: jax.Array, fed: jax.Array) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
  """Returns whether a step counts, the state after it and the metrics `JUDGED_BY`.

  Args:
    config: threshold and window.
    state: before the step.
    loss: of the whole batch.
    grad_norm: of the whole batch's gradients.
    finite: whether all numbers of the step are.
    fed: whether any token of the batch has a loss; a batch without one, all of it masked, says
      nothing of what is usual.
  """
  now = jnp.stack([loss, jnp.log(jnp.maximum(grad_norm, jnp.finfo(jnp.float32).tiny))])
  usual = _medians(state.recent_2R)
  deviations_2R = jnp.abs(state.recent_2R - usual[:, None])
  scale = jnp.maximum(GAUSSIAN * _medians(deviations_2R), jnp.array(FLOORS))
  known = state.remembered >= config.window
  spike = known & jnp.any(now > usual + config.spike_threshold * scale)
  accept = finite & ~spike if config.spike_threshold else finite
  one, counts = accept.astype(jnp.int32), finite & fed
  written_2R = state.recent_2R.at[:, state.remembered % config.window].set(now)
  after = GuardState(
      jnp.where(counts, written_2R, state.recent_2R), state.remembered + counts.astype(jnp.int32),
      state.skipped + 1 - one, (state.in_a_row + 1) * (1 - one))
  judged_by = (usual[0], scale[0], usual[1], scale[1], known, after.in_a_row)
  return accept, after, {name: jnp.float32(value)
                         for name, value in zip(JUDGED_BY, judged_by, strict=True)}
