"""Owns the mixture of experts: router, auxiliary losses and the dispatch to experts."""

from typing import NamedTuple, Optional, Protocol

from flax import nnx
import jax
import jax.numpy as jnp

from models import axes
from models.config import ModelConfig
from models.layers import GATED, normal, parameter


class AuxLosses(NamedTuple):
  """Unweighted auxiliary losses summed over layers, float32 scalars; 0 without experts."""

  balance: jax.Array
  router_z: jax.Array


class Experts(NamedTuple):
  """Weights of the experts in the compute dtype."""

  gate_XDF: jax.Array
  up_XDF: jax.Array
  down_XFD: jax.Array


class ExpertDispatch(Protocol):
  """Sends tokens [T, D] to their experts [T, R] and returns the weighted sum [T, D]."""

  def __call__(
    self, x_TD: jax.Array, expert_TR: jax.Array, weight_TR: jax.Array, experts: Experts,
    activation,
  ) -> jax.Array: ...


def ragged_dispatch(
  x_TD: jax.Array, expert_TR: jax.Array, weight_TR: jax.Array, experts: Experts, activation
) -> jax.Array:
  """Returns the weighted sum of each token's experts [T, D]; no token is ever dropped.

  Token copies are sorted by expert, so that each expert's rows are one ragged block.
  """
  T, R = expert_TR.shape
  order = jnp.argsort(expert_TR.reshape(-1), stable=True)
  sizes_X = jnp.bincount(expert_TR.reshape(-1), length=experts.gate_XDF.shape[0])
  rows_TD = x_TD[order // R]
  gate_TF = jax.lax.ragged_dot(rows_TD, experts.gate_XDF, sizes_X)
  up_TF = jax.lax.ragged_dot(rows_TD, experts.up_XDF, sizes_X)
  out_TD = jax.lax.ragged_dot(activation(gate_TF) * up_TF, experts.down_XFD, sizes_X)
  out_TRD = out_TD[jnp.argsort(order)].reshape(T, R, -1)
  return jnp.einsum('trd,tr->td', out_TRD, weight_TR.astype(out_TRD.dtype))


def route(logits_TX: jax.Array, top_k: int, normalize: bool) -> tuple[jax.Array, ...]:
  """Returns probabilities [T, X], the chosen experts [T, R] and their weights [T, R]."""
  p_TX = jax.nn.softmax(logits_TX, axis=-1)
  weight_TR, expert_TR = jax.lax.top_k(p_TX, top_k)
  if normalize:
    weight_TR = weight_TR / jnp.sum(weight_TR, axis=-1, keepdims=True)
  return p_TX, expert_TR, weight_TR


def auxiliary_losses(
  logits_TX: jax.Array, p_TX: jax.Array, expert_TR: jax.Array, real_T: Optional[jax.Array]
) -> AuxLosses:
  """Returns the losses of one router over the real tokens (all when `real_T` is None).

  Balance is X * sum_x f_x P_x with f the share of assignments and P the mean probability
  (Fedus et al. 2021, eq. 4-6; 1 when uniform); router z is the mean squared
  log-normalizer (Zoph et al. 2022, eq. 5).
  """
  T, X = logits_TX.shape
  real_T = jnp.ones((T,), jnp.float32) if real_T is None else real_T.astype(jnp.float32)
  share_T = real_T / jnp.maximum(jnp.sum(real_T), 1.0)
  chosen_TX = jnp.mean(jax.nn.one_hot(expert_TR, X, dtype=jnp.float32), axis=1)
  balance = X * jnp.sum((share_T @ chosen_TX) * (share_T @ p_TX))
  router_z = jnp.sum(share_T * jax.nn.logsumexp(logits_TX, axis=-1) ** 2)
  return AuxLosses(balance, router_z)


class MoE(nnx.Module):
  """Top-k softmax router in float32 over gated experts."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, X, F = config.d_model, config.moe.n_experts, config.moe.d_expert
    router_DX = normal(rngs, (D, X), D, config, False)
    self.router = parameter(router_DX, (axes.EMBED, axes.EXPERTS))
    up_names = (axes.EXPERTS, axes.EMBED, axes.MLP)
    self.gate = parameter(normal(rngs, (X, D, F), D, config, False), up_names)
    self.up = parameter(normal(rngs, (X, D, F), D, config, False), up_names)
    down_XFD = normal(rngs, (X, F, D), F, config, True)
    self.down = parameter(down_XFD, (axes.EXPERTS, axes.MLP, axes.EMBED))
    self.config = config.moe
    self.activation = GATED[config.mlp]

  def __call__(
    self, x_BLD: jax.Array, real_BL: Optional[jax.Array], dispatch: ExpertDispatch
  ) -> tuple[jax.Array, AuxLosses]:
    """Returns the output [B, L, D] and the router's losses over the real tokens."""
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    logits_TX = jnp.einsum('td,dx->tx', x_TD.astype(jnp.float32), self.router[...])
    p_TX, expert_TR, weight_TR = route(
      logits_TX, self.config.top_k, self.config.normalize_top_k
    )
    experts = Experts(*(w[...].astype(x_TD.dtype) for w in (self.gate, self.up, self.down)))
    out_TD = dispatch(x_TD, expert_TR, weight_TR, experts, self.activation)
    real_T = None if real_BL is None else real_BL.reshape(-1)
    losses = auxiliary_losses(logits_TX, p_TX, expert_TR, real_T)
    return out_TD.reshape(x_BLD.shape), losses
