"""A model trains to the same loss curve through every implementation of attention."""

import functools

import jax
import numpy as np
import optax
import pytest

from models import transformer
from models.kernels import blockwise, flash_tpu, oracle, unrolled
from models.loss import cross_entropy
from tests.models.variants import tiny

STEPS, B, L = 50, 4, 40
CONFIG = tiny(
  d_head=32, d_model=32, layer_pattern=('sliding', 'full'), window=16, attention_softcap=20.0,
  context_length=L,
)
IMPLEMENTATIONS = {
  'unrolled': functools.partial(unrolled.attention, block=16),
  'blockwise': functools.partial(blockwise.attention, block=16),
  'flash_tpu': functools.partial(flash_tpu.attention, interpret=True),
}


def batches() -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens [STEPS, B, L + 1], each the one before plus a step of its row, and segments."""
  rng = np.random.default_rng(0)
  starts, strides = rng.integers(0, CONFIG.vocab_size, (2, STEPS, B, 1))
  tokens = (starts + strides % 3 * np.arange(L + 1)) % CONFIG.vocab_size
  segments_BL = np.repeat([[1] * 22 + [2] * 15 + [0] * 3], B, axis=0)
  return tokens.astype(np.int32), segments_BL.astype(np.int32)


def loss_curve(attend) -> np.ndarray:
  """Returns the losses of all steps of AdamW from one start on the same batches."""
  graphdef = transformer.build(CONFIG, transformer.Seams(attend=attend))
  optimizer = optax.adamw(3e-3)
  tokens, segments_BL = batches()
  weights_T = (segments_BL != 0).ravel().astype(np.float32)

  def loss_fn(params, tokens_BL):
    model = transformer.apply(graphdef, params)
    hidden_BLD, _ = model(tokens_BL[:, :-1], segments_BL)
    hidden_TD = hidden_BLD.reshape(-1, CONFIG.d_model)
    total = cross_entropy(hidden_TD, model.unembedding_VD(), tokens_BL[:, 1:].ravel(), weights_T)
    return total.loss_sum / weights_T.sum()

  @jax.jit
  def train(params):
    def step(carry, tokens_BL):
      params, moments = carry
      loss, gradients = jax.value_and_grad(loss_fn)(params, tokens_BL)
      updates, moments = optimizer.update(gradients, moments, params)
      return (optax.apply_updates(params, updates), moments), loss
    return jax.lax.scan(step, (params, optimizer.init(params)), tokens)[1]

  return np.asarray(train(transformer.init(CONFIG, 0)))


@pytest.fixture(scope='module')
def reference() -> np.ndarray:
  """Returns the curve through the oracle; it learns."""
  losses = loss_curve(oracle.attention)
  assert losses[-5:].mean() < 0.9 * losses[:5].mean()
  return losses


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_same_loss_curve(name, reference):
  np.testing.assert_allclose(loss_curve(IMPLEMENTATIONS[name]), reference, rtol=1e-4)
