"""An ordinary Flax NNX training step, as its documentation teaches to write one.

A list of layers, dense causal attention, the loss on all logits, nnx.Optimizer inside nnx.jit.
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import shapes
from experiments.benchmarks.shapes import Shape, Weights


def rotate(x_BLHE: jax.Array, cos_LE: jax.Array, sin_LE: jax.Array) -> jax.Array:
  """Returns heads rotated by position, pairs (i, i + E / 2)."""
  cos_LHE, sin_LHE = cos_LE[:, None], sin_LE[:, None]
  x1, x2 = jnp.split(x_BLHE, 2, axis=-1)
  return jnp.concatenate([x1 * cos_LHE - x2 * sin_LHE, x2 * cos_LHE + x1 * sin_LHE], axis=-1)


class Block(nnx.Module):
  """Attention and feed-forward, each after its norm."""

  def __init__(self, shape: Shape, rngs: nnx.Rngs):
    D, F, HE = shape.d_model, shape.d_ff, shape.n_heads * shape.d_head
    self.heads = (shape.n_heads, shape.d_head)
    self.attention_norm = nnx.RMSNorm(D, epsilon=shapes.NORM_EPS, rngs=rngs)
    self.mlp_norm = nnx.RMSNorm(D, epsilon=shapes.NORM_EPS, rngs=rngs)
    self.q = nnx.Linear(D, HE, use_bias=False, rngs=rngs)
    self.k = nnx.Linear(D, HE, use_bias=False, rngs=rngs)
    self.v = nnx.Linear(D, HE, use_bias=False, rngs=rngs)
    self.o = nnx.Linear(HE, D, use_bias=False, rngs=rngs)
    self.gate = nnx.Linear(D, F, use_bias=False, rngs=rngs)
    self.up = nnx.Linear(D, F, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

  def __call__(self, x_BLD: jax.Array, cos_LE: jax.Array, sin_LE: jax.Array) -> jax.Array:
    B, L, _ = x_BLD.shape
    y_BLD = self.attention_norm(x_BLD)
    q_BLHE, k_BLHE, v_BLHE = (p(y_BLD).reshape(B, L, *self.heads) for p in (self.q, self.k, self.v))
    q_BLHE, k_BLHE = rotate(q_BLHE, cos_LE, sin_LE), rotate(k_BLHE, cos_LE, sin_LE)
    out_BLHE = jax.nn.dot_product_attention(q_BLHE, k_BLHE, v_BLHE, is_causal=True)
    x_BLD = x_BLD + self.o(out_BLHE.reshape(B, L, -1))
    y_BLD = self.mlp_norm(x_BLD)
    return x_BLD + self.down(jax.nn.silu(self.gate(y_BLD)) * self.up(y_BLD))


class Decoder(nnx.Module):
  """Tokens to logits, embeddings tied."""

  def __init__(self, shape: Shape, rngs: nnx.Rngs):
    self.embedding = nnx.Embed(shape.vocab_size, shape.d_model, rngs=rngs)
    self.layers = nnx.List([Block(shape, rngs) for _ in range(shape.n_layers)])
    self.final_norm = nnx.RMSNorm(shape.d_model, epsilon=shapes.NORM_EPS, rngs=rngs)
    self.shape = shape

  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    cos_LE, sin_LE = shapes.rope_tables(self.shape)
    x_BLD = self.embedding(tokens_BL)
    for layer in self.layers:
      x_BLD = layer(x_BLD, cos_LE, sin_LE)
    return self.embedding.attend(self.final_norm(x_BLD))


def _place(weights: Weights, n_layers: int) -> dict[str, jax.Array]:
  """Returns arrays by this decoder's own dotted names."""
  D = weights['final_norm.scale'].shape[0]
  placed = {'embedding.embedding': weights['embedding.tokens'],
            'final_norm.scale': weights['final_norm.scale']}
  for i in range(n_layers):
    block = {name.removeprefix('blocks.'): x[i] for name, x in weights.items()
             if name.startswith('blocks.')}
    for name in ('attention_norm', 'mlp_norm'):
      placed[f'layers.{i}.{name}.scale'] = block[f'{name}.scale']
    for name in 'qkv':
      placed[f'layers.{i}.{name}.kernel'] = block[f'attention.{name}'].reshape(D, -1)
    placed[f'layers.{i}.o.kernel'] = block['attention.o'].reshape(-1, D)
    for name in ('gate', 'up', 'down'):
      placed[f'layers.{i}.{name}.kernel'] = block[f'mlp.{name}']
  return {name: jnp.asarray(x) for name, x in placed.items()}


def decoder(shape: Shape, weights: Weights) -> Decoder:
  """Returns the decoder with modehop's weights."""
  model = Decoder(shape, nnx.Rngs(0))
  placed = _place(weights, shape.n_layers)
  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, jax.tree.map_with_path(
      lambda path, _: placed[jax.tree_util.keystr(path, simple=True, separator='.')],
      nnx.to_pure_dict(state)))
  nnx.update(model, state)
  return model


def loss_fn(model: Decoder, tokens_BL: jax.Array, targets_BL: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy in nats."""
  logits_BLV = model(tokens_BL)
  return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL).mean()


def _decays(params) -> nnx.State:
  """Returns True for kernels, False for norm scales and the embedding."""
  return jax.tree.map_with_path(lambda path, _: 'kernel' in jax.tree_util.keystr(path), params)


def start(shape: Shape, n_rows: int, weights: Weights) -> Callable:
  """Returns step(batch) -> read; the step runs the update, read() waits and returns its loss."""
  del n_rows
  model = decoder(shape, weights)
  optimizer = nnx.Optimizer(model, optax.chain(
      optax.clip_by_global_norm(shapes.CLIP_NORM),
      optax.adamw(shapes.LEARNING_RATE, shapes.B1, shapes.B2, shapes.EPS,
                  weight_decay=shapes.WEIGHT_DECAY, mask=_decays)), wrt=nnx.Param)

  @nnx.jit(donate_argnums=(0, 1))
  def train_step(model, optimizer, tokens_BL, targets_BL):
    loss, grads = nnx.value_and_grad(loss_fn)(model, tokens_BL, targets_BL)
    optimizer.update(model, grads)
    return loss

  def step(batch: shapes.Batch) -> Callable[[], float]:
    loss = train_step(model, optimizer, jnp.asarray(batch['tokens']), jnp.asarray(batch['targets']))
    return lambda: float(loss)
  return step
