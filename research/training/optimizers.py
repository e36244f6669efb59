"""Optax optimizers with decay masks, and learning-rate schedules, chosen by name."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.training.config import OptimizerConfig

_STREAM = {'embed', 'expert_embed'}  # logical names of the residual stream's axis


def schedule(config: OptimizerConfig, n_steps: int) -> optax.Schedule:
  """Returns step (number of updates done) -> learning rate, float32 scalar.

  Warm-up is linear from peak/warmup_steps to the peak, so the first update is not lost.
  """
  peak, end = config.peak_lr, config.peak_lr * config.final_lr_fraction
  warmup = config.warmup_steps
  rest = max(1, n_steps - warmup)
  decay_steps = max(1, round(n_steps * config.decay_fraction))
  after = {
      'constant': lambda: optax.constant_schedule(peak),
      'cosine': lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_fraction),
      'linear': lambda: optax.linear_schedule(peak, end, rest),
      'wsd': lambda: optax.linear_schedule(peak, end, decay_steps, max(0, rest - decay_steps)),
      'inverse_sqrt': lambda: lambda step: peak * jnp.sqrt(
          max(1, warmup) / jnp.maximum(step + warmup, max(1, warmup))),
  }[config.schedule]()

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    ramp = peak * (step + 1) / max(1, warmup)
    return jnp.where(step < warmup, ramp, after(step - warmup)).astype(jnp.float32)

  return rate


def _is_names(leaf: Any) -> bool:
  return isinstance(leaf, tuple)


def _own_axes(names: tuple) -> list[int]:
  """Returns the indices of a leaf's axes without the leading ones that only stack leaves."""
  n_stacked = 0
  while n_stacked < len(names) and names[n_stacked] in ('layers', 'experts'):
    n_stacked += 1
  return list(range(n_stacked, len(names)))


def decay_mask(logical_axes: Any, decay_embeddings: bool) -> Any:
  """Returns a tree of bool: True for matrices, False for norms, biases and per-layer scalars.

  Matrices are leaves with two axes or more besides the stacking ones; embedding tables follow
  `decay_embeddings`. Biases of attention ([N, H, E]) are told apart by having no input axis.
  """
  def decide(path, names):
    axes = [names[i] for i in _own_axes(names)]
    if 'vocab' in axes or 'positions' in axes:
      return decay_embeddings and len(axes) > 1
    return len(axes) > 1 and not _is_bias(path, axes)
  return jax.tree.map_with_path(decide, logical_axes, is_leaf=_is_names)


def _is_bias(path: tuple, axes: list) -> bool:
  name = str(getattr(path[-1], 'key', path[-1]))
  return not set(axes) & _STREAM or 'bias' in name


def _muon_dimensions(logical_axes: Any, mask: Any) -> Any:
  """Returns Muon's dimension numbers for hidden matrices and None (Adam) for all else.

  The residual stream's axis is the input of projections that read the stream and the output of
  those that write it; it stands first in the former and last in the latter.
  """
  def dimensions(names, is_matrix):
    if not is_matrix or 'vocab' in names or 'positions' in names:
      return None
    axes = _own_axes(names)
    reads = names[axes[0]] in _STREAM
    inputs, outputs = (axes[:1], axes[1:]) if reads else (axes[:-1], axes[-1:])
    return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))
  return jax.tree.map(dimensions, logical_axes, mask, is_leaf=_is_names)


def _adamw(config, mask, unused_axes):
  return optax.adamw(1.0, b1=config.b1, b2=config.b2, eps=config.eps, mask=mask,
                     weight_decay=config.weight_decay, mu_dtype=config.moment_dtype)


def _muon(config, mask, logical_axes):
  dimensions = _muon_dimensions(logical_axes, decay_mask(logical_axes, decay_embeddings=False))
  muon = optax.contrib.muon(
      1.0, beta=config.b1, eps=config.eps, mu_dtype=config.moment_dtype, adam_b1=config.b1,
      adam_b2=config.b2, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
  # Decay comes after, for Optax gives no mask to the part that Adam updates; updates are negated.
  return optax.chain(muon, optax.add_decayed_weights(-config.weight_decay, mask))


def _adafactor(config, mask, unused_axes):
  return optax.adafactor(1.0, decay_rate=0.8, momentum=config.b1 or None,
                         dtype_momentum=config.moment_dtype,
                         weight_decay_rate=config.weight_decay or None, weight_decay_mask=mask)


def _lion(config, mask, unused_axes):
  return optax.lion(1.0, b1=config.b1, b2=config.b2, mask=mask, mu_dtype=config.moment_dtype,
                    weight_decay=config.weight_decay)


def _sgd(config, mask, unused_axes):
  return optax.chain(optax.add_decayed_weights(config.weight_decay, mask),
                     optax.sgd(1.0, momentum=config.b1 or None,
                               accumulator_dtype=config.moment_dtype))


_BY_NAME = {'adamw': _adamw, 'muon': _muon, 'adafactor': _adafactor, 'lion': _lion, 'sgd': _sgd}


def make_optimizer(config: OptimizerConfig, logical_axes: Any) -> optax.GradientTransformation:
  """Returns the optimizer at learning rate 1: parameters move by `lr(step) * update`.

  The step multiplies by the schedule itself, so that a skipped step does not shift it.

  Args:
    config: the optimizer's settings.
    logical_axes: the parameters' tree with tuples of logical axis names as leaves; decay masks
      and Muon's matrix dimensions follow from the names.
  """
  mask = decay_mask(logical_axes, config.decay_embeddings)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, _BY_NAME[config.name](config, mask, logical_axes))
