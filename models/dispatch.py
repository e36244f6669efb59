"""Owns how tokens reach their experts: dropless in ragged blocks, or in slots of fixed number.

An expert id equal to the number of experts means no expert: such a choice (of padding) costs
nothing, takes no slot and adds nothing to the token's sum.
"""

import fractions
import functools
import math
from typing import Callable, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from models.attention import hardware
from models.config import MoEConfig
from models.kernels.grouped import PRODUCTS, Product, ragged_dot


class Experts(NamedTuple):
  """Weights of the experts in the compute dtype."""

  gate_XDF: jax.Array
  up_XDF: jax.Array
  down_XFD: jax.Array


class Dispatched(NamedTuple):
  """What a dispatch returns: the tokens' weighted sums and what it took.

  n_dropped: choices of the tokens at hand that no expert took, float32; n_rounds: exchanges
  with other devices, float32, 0 on one device.
  """

  out_TD: jax.Array
  n_dropped: jax.Array
  n_rounds: jax.Array


class ExpertDispatch(Protocol):
  """Sends tokens [T, D] to their experts [T, R] and returns their sums with weights [T, R]."""

  def __call__(
    self, x_TD: jax.Array, expert_TR: jax.Array, weight_TR: jax.Array, experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
  ) -> Dispatched: ...


@jax.custom_vjp
def gathered(x_SD: jax.Array, source_N: jax.Array, used_SK: jax.Array) -> jax.Array:
  """Returns the rows x[source], zero where `source` is beyond the last.

  `used_SK` lists the up to K rows of the result that each row of x became, or an index
  beyond the last; with it backward gathers too, where autodiff would scatter.
  """
  del used_SK
  return x_SD.at[source_N].get(mode='fill', fill_value=0)


def _gathered_forward(x_SD, source_N, used_SK):
  """Returns the rows, and where they were used."""
  return gathered(x_SD, source_N, used_SK), used_SK


def _gathered_backward(used_SK, g_ND: jax.Array):
  """Returns each row's sum of cotangents."""
  columns = (g_ND.at[used_S].get(mode='fill', fill_value=0) for used_S in used_SK.T)
  return sum(columns), None, None


gathered.defvjp(_gathered_forward, _gathered_backward)


def _rows(x_SD: jax.Array, index: jax.Array) -> jax.Array:
  """Returns rows that are known to exist: a gather with nothing to fill in after it."""
  return jnp.asarray(x_SD).at[index].get(mode='promise_in_bounds')


def _summed_choices(x_AD: jax.Array, rank_TR: jax.Array, taken_TR: jax.Array) -> jax.Array:
  """Returns each token's sum of its choices' rows, of which those not taken hold anything."""
  rows_TRD = _rows(x_AD, rank_TR)
  return jnp.sum(jnp.where(taken_TR[..., None], rows_TRD, 0), axis=1)


@jax.custom_vjp
def copied(x_TD: jax.Array, order_A: jax.Array, rank_TR: jax.Array, taken_TR: jax.Array):
  """Returns a copy of a token's row for each of its choices, [T * R, D], in their order.

  `order_A` lists choices t * R + r, each of which comes at place `rank_TR`. Cotangents of
  choices that are not taken are left out. Backward gathers, where autodiff would scatter;
  `merged` is its transpose.
  """
  return _rows(x_TD, order_A // rank_TR.shape[1])


@jax.custom_vjp
def merged(x_AD: jax.Array, order_A: jax.Array, rank_TR: jax.Array, taken_TR: jax.Array):
  """Returns each token's sum [T, D] over its choices that are taken; the transpose of `copied`.

  Cotangents of other choices are left open: nothing reads them.
  """
  return _summed_choices(x_AD, rank_TR, taken_TR)


copied.defvjp(
  lambda x_TD, *where: (copied(x_TD, *where), where),
  lambda where, g_AD: (_summed_choices(g_AD, *where[1:]), None, None, None),
)
merged.defvjp(
  lambda x_AD, *where: (merged(x_AD, *where), where),
  lambda where, g_TD: (_rows(g_TD, where[0] // where[1].shape[1]), None, None, None),
)


def inverse(order_N: jax.Array) -> jax.Array:
  """Returns the inverse of a permutation."""
  return jnp.argsort(order_N, stable=False)


def counts(index_N: jax.Array, length: int) -> jax.Array:
  """Returns how often each index below `length` occurs, int32; TPUs are slow at scattering."""
  return jnp.sum(index_N[:, None] == jnp.arange(length), axis=0, dtype=jnp.int32)


@jax.custom_vjp
def permuted(x_N: jax.Array, order_N: jax.Array, rank_N: jax.Array) -> jax.Array:
  """Returns numbers in another order, with `rank_N` its inverse; backward gathers too."""
  return _rows(x_N, order_N)


permuted.defvjp(
  lambda x_N, order_N, rank_N: (permuted(x_N, order_N, rank_N), rank_N),
  lambda rank_N, g_N: (_rows(g_N, rank_N), None, None),
)


def ragged_experts(
  rows_ND: jax.Array, weight_N: jax.Array, sizes_X: jax.Array, experts: Experts, activation,
  product: Product = ragged_dot,
) -> jax.Array:
  """Returns weighted outputs [N, D] of rows sorted by expert, `sizes_X` rows each.

  Rows beyond the blocks may hold anything, in the result and in its gradient. The weight
  multiplies the hidden units: its gradient then needs no output kept or recomputed.
  """
  weight_N = jnp.where(jnp.arange(weight_N.shape[0]) < jnp.sum(sizes_X), weight_N, 0)
  gate_NF = product(rows_ND, experts.gate_XDF, sizes_X)
  up_NF = product(rows_ND, experts.up_XDF, sizes_X)
  hidden_NF = (activation(gate_NF) * up_NF * weight_N[:, None]).astype(rows_ND.dtype)
  return product(hidden_NF, experts.down_XFD, sizes_X)


def ragged_dispatch(
  x_TD: jax.Array, expert_TR: jax.Array, weight_TR: jax.Array, experts: Experts, activation,
  product: Product = ragged_dot,
) -> Dispatched:
  """Returns the weighted sum of each token's experts [T, D]; no token is ever dropped.

  Token copies are sorted by expert, so that each expert's rows are one ragged block.
  """
  n_experts = experts.gate_XDF.shape[0]
  expert_A = expert_TR.reshape(-1)
  order_A = jnp.argsort(expert_A, stable=True)
  rank_A, sizes_X = inverse(order_A), counts(expert_A, n_experts)
  where = (order_A, rank_A.reshape(expert_TR.shape), expert_TR < n_experts)
  weight_A = permuted(weight_TR.reshape(-1), order_A, rank_A)
  out_AD = ragged_experts(copied(x_TD, *where), weight_A, sizes_X, experts, activation, product)
  return Dispatched(merged(out_AD, *where), jnp.float32(0), jnp.float32(0))


def capacity(config: MoEConfig, n_tokens: int) -> int:
  """Returns how many choices of `n_tokens` tokens each expert takes (GShard, section 3.1).

  ceil(capacity_factor * n_tokens * top_k / n_experts), exact in the decimal factor, and no
  more than there are tokens.
  """
  factor = fractions.Fraction(str(config.capacity_factor))
  return min(n_tokens, math.ceil(factor * n_tokens * config.top_k / config.n_experts))


def own_slots(rows_XCD: jax.Array) -> jax.Array:
  """Returns the slots as they are: one device owns all experts."""
  return rows_XCD


def capacity_dispatch(
  config: MoEConfig, to_owners: Callable[[jax.Array], jax.Array] = own_slots,
  to_sources: Callable[[jax.Array], jax.Array] = own_slots,
) -> ExpertDispatch:
  """Returns a dispatch in which each expert takes at most `capacity` choices.

  The tokens of one call, those of one device, are a group with slots of its own (GShard's
  groups), so what is dropped depends on how a batch is cut. First choices come before second
  ones, earlier tokens before later ones; what finds no slot adds nothing (Fedus et al. 2021,
  section 2.2). `to_owners` brings slots [X, C, D] to the devices that own the experts
  [X / P, P * C, D], `to_sources` brings them back.
  """

  def dispatch(x_TD, expert_TR, weight_TR, experts, activation):
    (T, R), X, C = expert_TR.shape, config.n_experts, capacity(config, expert_TR.shape[0])
    expert_A = expert_TR.T.reshape(-1)  # choice number a = r * T + t, in order of priority
    order_A = jnp.argsort(expert_A, stable=True)
    sizes_X = counts(expert_A, X)
    starts_X = jnp.cumsum(sizes_X) - sizes_X
    place_A = inverse(order_A) - starts_X[expert_A]
    taken_A = (expert_A < X) & (place_A < C)
    slot_A = jnp.where(taken_A, expert_A * C + place_A, X * C)
    filled_XC = jnp.arange(C) < sizes_X[:, None]
    choice_XC = jnp.where(filled_XC, order_A[starts_X[:, None] + jnp.arange(C)], T * R)
    choice_S = choice_XC.reshape(-1)
    token_S = jnp.where(choice_S < T * R, choice_S % T, T)
    slots_SD = gathered(x_TD, token_S, slot_A.reshape(R, T).T)
    rows_XND = to_owners(slots_SD.reshape(X, C, -1))
    gate_XNF = jnp.einsum('xnd,xdf->xnf', rows_XND, experts.gate_XDF)
    up_XNF = jnp.einsum('xnd,xdf->xnf', rows_XND, experts.up_XDF)
    out_XND = jnp.einsum('xnf,xfd->xnd', activation(gate_XNF) * up_XNF, experts.down_XFD)
    back_SD = to_sources(out_XND).reshape(X * C, -1)
    out_RTD = gathered(back_SD, slot_A, choice_S[:, None]).reshape(R, T, -1)
    out_TD = jnp.einsum('rtd,tr->td', out_RTD, weight_TR.astype(out_RTD.dtype))
    n_dropped = jnp.sum((expert_A < X) & ~taken_A, dtype=jnp.float32)
    return Dispatched(out_TD, n_dropped, jnp.float32(0))

  return dispatch


def check_product(config: MoEConfig, hardware: str) -> None:
  """Raises ValueError where the product that `config.product` names is for other devices."""
  if config.product == 'megablox' and hardware != 'tpu':
    raise ValueError(f'model.moe.product=megablox is for tpu devices, these are {hardware}; '
                     "'auto' or 'ragged_dot' works")


def choose_product(config: MoEConfig, hardware: str) -> tuple[str, str]:
  """Returns the name of the product of dropless experts on a kind of hardware, and why.

  The name is that of `config.product` unless it is 'auto'.
  """
  if config.product != 'auto':
    return config.product, 'model.moe.product names it'
  if hardware == 'tpu':
    return 'megablox', "the devices are TPUs; XLA's product is dense over all experts on some"
  if hardware == 'cpu':
    return 'blocks', "plain XLA; XLA's own product is dense over all experts on CPU"
  return 'ragged_dot', "XLA's own"


def configured_product(config: MoEConfig) -> Product:
  """Returns the product that a configuration names, 'auto' for the first device."""
  return PRODUCTS[choose_product(config, hardware(jax.devices()[0]))[0]]


def configured_dispatch(config: MoEConfig) -> ExpertDispatch:
  """Returns the dispatch that a configuration names, for experts all on one device."""
  if config.capacity_factor:
    return capacity_dispatch(config)
  return functools.partial(ragged_dispatch, product=configured_product(config))
