"""Owns the independent witness: a decoder written out in NumPy float64, loop by loop.

It shares with the code under test only the configuration and the names of parameters.
"""

import math

import numpy as np


def randomized(shapes, seed=0, scale=0.3):
  """Returns parameters of these shapes, every leaf random, norms and biases included."""
  rng = np.random.default_rng(seed)

  def leaf(x):
    return (rng.normal(size=x.shape) * scale).astype(np.float32)

  if isinstance(shapes, dict):
    return {name: randomized(child, 7 * seed + i + 1, scale) for i, (name, child) in
            enumerate(sorted(shapes.items()))}
  return leaf(shapes)


def norm(config, p, x):
  """Returns a norm over the last axis, or over all axes of the scale."""
  if config.norm == 'layernorm' and 'bias' in p:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p['scale'] + p['bias']
  return x / np.sqrt((x**2).mean() + config.norm_eps) * p['scale']


def norm_rows(config, p, x_LD):
  """Returns `norm` of each row."""
  return np.stack([norm(config, p, row) for row in x_LD])


def rope_angle(rope, i, n_rotated, position):
  """Returns the angle of pair i at a position, one scaling after the other by its paper."""
  frequency = rope.theta ** (-2 * i / n_rotated)
  wavelength = 2 * math.pi / frequency
  if rope.scaling == 'linear':
    frequency /= rope.factor
  elif rope.scaling == 'llama3':
    if wavelength > rope.original_context / rope.low_freq_factor:
      frequency /= rope.factor
    elif wavelength > rope.original_context / rope.high_freq_factor:
      smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
      )
      frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
  elif rope.scaling == 'yarn':
    def boundary(rotations):
      return n_rotated * math.log(rope.original_context / (rotations * 2 * math.pi)) / (
        2 * math.log(rope.theta)
      )
    low = max(math.floor(boundary(rope.beta_fast)), 0)
    high = min(math.ceil(boundary(rope.beta_slow)), n_rotated - 1)
    gamma = 1 - min(1, max(0, (i - low) / max(high - low, 0.001)))
    frequency = (1 - gamma) * frequency / rope.factor + gamma * frequency
  return position * frequency


def rope_temperature(rope):
  """Returns the factor on rotated vectors."""
  if rope.scaling != 'yarn':
    return 1.0
  default = 0.1 * math.log(rope.factor) + 1
  return default if rope.attention_factor is None else rope.attention_factor


def rotated(rope, x_E, position):
  """Returns one head vector rotated in the planes (i, i + n/2)."""
  n = int(len(x_E) * rope.fraction)
  out = np.array(x_E)
  for i in range(n // 2):
    angle = rope_angle(rope, i, n, position)
    a, b = x_E[i], x_E[i + n // 2]
    out[i] = (a * math.cos(angle) - b * math.sin(angle)) * rope_temperature(rope)
    out[i + n // 2] = (b * math.cos(angle) + a * math.sin(angle)) * rope_temperature(rope)
  return out


def softmax(x):
  """Returns the softmax of a vector."""
  e = np.exp(x - x.max())
  return e / e.sum()


def cap(x, limit):
  """Returns the soft-capped x; a limit of 0 is none."""
  return limit * np.tanh(x / limit) if limit else x


def slope(h, n_heads):
  """Returns ALiBi's slope of head h for a power-of-two number of heads."""
  return 2.0 ** (-8.0 * (h + 1) / n_heads)


def attention(config, p, x_LD, kind, segments_L, positions_L):
  """Returns the attention branch of one sequence, query by query."""
  L, H, G = len(x_LD), config.n_heads, config.n_heads // config.n_kv_heads
  q = np.einsum('ld,dhe->lhe', x_LD, p['q']) + p.get('q_bias', 0)
  k = np.einsum('ld,dhe->lhe', x_LD, p['k']) + p.get('k_bias', 0)
  v = np.einsum('ld,dhe->lhe', x_LD, p['v']) + p.get('v_bias', 0)
  if config.qk_norm == 'head':
    q = np.stack([norm_rows(config, p['q_norm'], row) for row in q])
    k = np.stack([norm_rows(config, p['k_norm'], row) for row in k])
  elif config.qk_norm == 'projection':
    q, k = norm_rows(config, p['q_norm'], q), norm_rows(config, p['k_norm'], k)
  if config.positions == 'rope':
    sliding = kind == 'sliding' and config.sliding_rope is not None
    rope = config.sliding_rope if sliding else config.rope
    q = np.array([[rotated(rope, h, t) for h in row] for row, t in zip(q, positions_L)])
    k = np.array([[rotated(rope, h, t) for h in row] for row, t in zip(k, positions_L)])
  scale = config.attention_scale if config.attention_scale else 1 / math.sqrt(config.d_head)
  out = np.zeros((L, config.d_model))
  for i in range(L):
    keys = [j for j in range(i + 1) if segments_L[j] == segments_L[i] != 0]
    if kind == 'sliding':
      keys = [j for j in keys if i - j < config.window]
    for h in range(H):
      if keys:
        logits = np.array([cap(q[i, h] @ k[j, h // G] * scale, config.attention_softcap)
                           for j in keys])
        if config.positions == 'alibi':
          logits -= slope(h, H) * np.array([i - j for j in keys])
        mixed = softmax(logits) @ np.array([v[j, h // G] for j in keys])
        out[i] += mixed @ p['o'][h]
  return out + p.get('o_bias', 0)


def activation(config, p, x):
  """Returns the configured nonlinearity."""
  tanh_gelu = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  if config.mlp == 'swiglu':
    return x / (1 + np.exp(-x))
  if config.mlp in ('geglu', 'gelu_tanh'):
    return tanh_gelu
  if config.mlp == 'gelu':
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  a_p = math.log1p(math.exp(p['xielu']['alpha_p'][0]))
  a_n = 0.5 + math.log1p(math.exp(p['xielu']['alpha_n'][0]))
  return np.where(x > 0, a_p * x**2 + 0.5 * x, a_n * np.expm1(np.minimum(x, -1e-6)) - a_n * x
                  + 0.5 * x)


def feed_forward(config, p, x_LD):
  """Returns the dense feed-forward branch."""
  up = x_LD @ p['up'] + p.get('up_bias', 0)
  if 'gate' in p:
    hidden = activation(config, p, x_LD @ p['gate'] + p.get('gate_bias', 0)) * up
  else:
    hidden = activation(config, p, up)
  return hidden @ p['down'] + p.get('down_bias', 0)


def experts(config, p, x_LD, segments_L):
  """Returns the mixture-of-experts branch, token by token, expert by expert; 0 for padding."""
  out = np.zeros_like(x_LD)
  for t, x in enumerate(x_LD):
    if segments_L[t] == 0:
      continue
    probabilities = softmax(x @ p['router'])
    chosen = np.argsort(-probabilities, kind='stable')[: config.moe.top_k]
    weights = probabilities[chosen]
    if config.moe.normalize_top_k:
      weights = weights / weights.sum()
    for weight, e in zip(weights, chosen):
      hidden = activation(config, p, x @ p['gate'][e]) * (x @ p['up'][e])
      out[t] += weight * (hidden @ p['down'][e])
  return out


def block(config, p, x, kind, segments_L, positions_L):
  """Returns the output of one block."""
  def branch(f, before, after, x):
    y = f(norm_rows(config, p[before], x) if before in p else x)
    return norm_rows(config, p[after], y) if after in p else y

  def mlp(config, p, y):
    return experts(config, p, y, segments_L) if config.moe.n_experts else feed_forward(config, p, y)

  attended = branch(
    lambda y: attention(config, p['attention'], y, kind, segments_L, positions_L),
    'attention_norm', 'attention_out_norm', x,
  )
  between = x if config.parallel_residual else x + attended
  fed = branch(lambda y: mlp(config, p['mlp'], y), 'mlp_norm', 'mlp_out_norm', between)
  return x + attended + fed


def layer(tree, i):
  """Returns the parameters of layer i of a stacked tree, float64."""
  if isinstance(tree, dict):
    return {name: layer(child, i) for name, child in tree.items()}
  return np.asarray(tree, np.float64)[i]


def logits(config, params, tokens_L, segments_L=None, positions_L=None):
  """Returns float64 logits [L, V] of one sequence."""
  L = len(tokens_L)
  segments_L = np.ones(L, int) if segments_L is None else segments_L
  positions_L = np.arange(L) if positions_L is None else positions_L
  embedding = {k: np.asarray(v, np.float64) for k, v in params['embedding'].items()}
  x = embedding['tokens'][tokens_L]
  if config.scale_embeddings:
    x = x * math.sqrt(config.d_model)
  if config.positions == 'learned':
    x = x + embedding['positions'][positions_L]
  pattern = config.layer_pattern
  for i in range(config.n_layers):
    kind = pattern[i % len(pattern)]
    x = block(config, layer(params['blocks'], i), x, kind, segments_L, positions_L)
  final = {k: np.asarray(v, np.float64) for k, v in params['final_norm'].items()}
  x = norm_rows(config, final, x)
  output = embedding['tokens'] if config.tie_embeddings else embedding['output']
  return cap(x @ output.T, config.final_softcap)
