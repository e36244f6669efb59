"""Owns the mixture of experts: the router, its auxiliary losses and its load."""

from typing import Any, Callable, NamedTuple, Optional

from flax import nnx
import jax
import jax.numpy as jnp

from models import axes
from models.config import ModelConfig
from models.dispatch import Dispatched, ExpertDispatch, Experts, configured_dispatch
from models.layers import GATED, normal, parameter


Total = Callable[[Any], Any]


class AuxLosses(NamedTuple):
  """A router's losses, unweighted, and its load; float32 scalars summed over layers.

  balance, router_z: see `auxiliary_losses`; max_load: the most chosen expert's share of all
  choices times their number, 1 when balanced; dropped: share of choices that no expert took;
  rounds: exchanges between devices. All 0 without experts. With tokens spread over devices
  every field is this device's share: the sum over devices is the value.
  """

  balance: jax.Array
  router_z: jax.Array
  max_load: jax.Array
  dropped: jax.Array
  rounds: jax.Array


def own_tokens(tree: Any) -> Any:
  """Returns the tree as it is; the default total, where one device holds all tokens."""
  return tree


def route(logits_TX: jax.Array, top_k: int, normalize: bool) -> tuple[jax.Array, ...]:
  """Returns probabilities [T, X], the chosen experts [T, R] and their weights [T, R].

  Weights are read by comparison, of which the gradient is no scatter as that of top-k is.
  """
  p_TX = jax.nn.softmax(logits_TX, axis=-1)
  _, expert_TR = jax.lax.top_k(jax.lax.stop_gradient(p_TX), top_k)
  chosen_TRX = expert_TR[..., None] == jnp.arange(p_TX.shape[1])
  weight_TR = jnp.sum(jnp.where(chosen_TRX, p_TX[:, None], 0), axis=-1)
  if normalize:
    weight_TR = weight_TR / jnp.sum(weight_TR, axis=-1, keepdims=True)
  return p_TX, expert_TR, weight_TR


def auxiliary_losses(
  logits_TX: jax.Array, p_TX: jax.Array, expert_TR: jax.Array, real_T: Optional[jax.Array],
  dispatched: Dispatched, total: Total = own_tokens,
) -> AuxLosses:
  """Returns the losses and loads of one router over the real tokens (all when None).

  Balance is X * sum_x f_x P_x with f the share of choices and P the mean probability
  (Fedus et al. 2021, eq. 4-6; 1 when uniform); router z is the mean squared
  log-normalizer (Zoph et al. 2022, eq. 5). `total` sums a tree over all devices that hold
  tokens of their own; only counts go through it, so that no gradient does.
  """
  (T, X), R = logits_TX.shape, expert_TR.shape[1]
  real_T = jnp.ones((T,), jnp.float32) if real_T is None else real_T.astype(jnp.float32)
  chosen_TX = jnp.mean(jax.nn.one_hot(expert_TR, X, dtype=jnp.float32), axis=1)
  n_own = jnp.sum(real_T)
  n_real, load_X = total((n_own, real_T @ chosen_TX))
  n_real = jnp.maximum(n_real, 1.0)
  load_X, share_T, share = load_X / n_real, real_T / n_real, n_own / n_real
  return AuxLosses(
    balance=X * jnp.sum(load_X * (share_T @ p_TX)),
    router_z=jnp.sum(share_T * jax.nn.logsumexp(logits_TX, axis=-1) ** 2),
    max_load=X * jnp.max(load_X) * share,
    dropped=dispatched.n_dropped / (R * n_real),
    rounds=dispatched.n_rounds * share,
  )


class MoE(nnx.Module):
  """Top-k softmax router in float32 over gated experts."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, X, F = config.d_model, config.moe.n_experts, config.moe.d_expert
    router_DX = normal(rngs, (D, X), D, config, False)
    self.router = parameter(router_DX, (axes.EMBED, None))
    up_names = (axes.EXPERTS, axes.EXPERT_EMBED, axes.EXPERT_MLP)
    self.gate = parameter(normal(rngs, (X, D, F), D, config, False), up_names)
    self.up = parameter(normal(rngs, (X, D, F), D, config, False), up_names)
    down_XFD = normal(rngs, (X, F, D), F, config, True)
    self.down = parameter(down_XFD, (axes.EXPERTS, axes.EXPERT_MLP, axes.EXPERT_EMBED))
    self.config = config.moe
    self.activation = GATED[config.mlp]

  def __call__(
    self, x_BLD: jax.Array, real_BL: Optional[jax.Array],
    dispatch: Optional[ExpertDispatch] = None, total: Total = own_tokens,
  ) -> tuple[jax.Array, AuxLosses]:
    """Returns the output [B, L, D], zero for padding, and the router's losses and load.

    Only tokens that are real are sent and counted. `dispatch` None means the one that the
    config names, with all experts here; `total`: see `auxiliary_losses`.
    """
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    logits_TX = jnp.einsum('td,dx->tx', x_TD.astype(jnp.float32), self.router[...])
    p_TX, expert_TR, weight_TR = route(
      logits_TX, self.config.top_k, self.config.normalize_top_k
    )
    real_T = None if real_BL is None else real_BL.reshape(-1)
    if real_T is not None:
      expert_TR = jnp.where(real_T[:, None], expert_TR, self.config.n_experts)
    experts = Experts(*(w[...].astype(x_TD.dtype) for w in (self.gate, self.up, self.down)))
    dispatch = dispatch or configured_dispatch(self.config)
    dispatched = Dispatched(*dispatch(x_TD, expert_TR, weight_TR, experts, self.activation))
    losses = auxiliary_losses(logits_TX, p_TX, expert_TR, real_T, dispatched, total)
    return dispatched.out_TD.reshape(x_BLD.shape), losses
