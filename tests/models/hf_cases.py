"""Tiny checkpoints of every family, scaling and tying: config.json and weights from a seed."""

import itertools
import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file

from models.interop import checkpoint, configs, families, layout

V, L, PROMPT, GENERATED = 64, 48, 16, 64
COMMON = {
  'vocab_size': V, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
  'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5, 'dtype': 'float32', 'bos_token_id': None, 'eos_token_id': None,
  'pad_token_id': None,
}
OWN = {
  'llama': {'head_dim': 8},
  'qwen3': {'head_dim': 16},
  'olmo2': {},
  'olmo3': {'num_hidden_layers': 5, 'sliding_window': 8},
  'apertus': {'hidden_act': 'xielu'},
  'gpt_neox': {'num_attention_heads': 2, 'layer_norm_eps': 1e-5, 'hidden_act': 'gelu'},
  'mixtral': {'num_local_experts': 4, 'num_experts_per_tok': 2, 'head_dim': 8},
}
# The tied case of a family has its other settings too.
TIED = {
  'llama': {'attention_bias': True, 'mlp_bias': True},
  'qwen3': {'attention_bias': True, 'use_sliding_window': True, 'sliding_window': 8,
            'max_window_layers': 1},
  'olmo2': {'attention_bias': True},
  'olmo3': {'attention_bias': True},
  'apertus': {'attention_bias': True},
  'gpt_neox': {'attention_bias': False, 'use_parallel_residual': False, 'hidden_act': 'gelu_new'},
  'mixtral': {'sliding_window': 8, 'head_dim': 16},
}
SCALINGS = {
  'default': {},
  'linear': {'factor': 4.0},
  'llama3': {'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
             'original_max_position_embeddings': 32},
  'yarn': {'factor': 4.0, 'original_max_position_embeddings': 32},
}
NAMES = ['-'.join(parts) for parts in itertools.product(OWN, SCALINGS, ('untied', 'tied'))]


def config_json(name: str) -> dict:
  """Returns config.json of a case such as 'llama-yarn-tied', as transformers 5 writes it."""
  family, scaling, tying = name.split('-')
  rope = {'rope_type': scaling, 'rope_theta': 10_000.0, **SCALINGS[scaling]}
  if family == 'gpt_neox':
    rope['partial_rotary_factor'] = 0.5
  if family == 'qwen3' and scaling == 'yarn':
    rope |= {'attention_factor': 1.3, 'beta_fast': 4.0, 'beta_slow': 0.5}
  if family == 'olmo3':
    rope = {'full_attention': rope,
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0}}
  hf = {**COMMON, **OWN[family], 'rope_parameters': rope, 'model_type': family,
        'architectures': [families.FAMILIES[family].architecture],
        'tie_word_embeddings': tying == 'tied', **(TIED[family] if tying == 'tied' else {})}
  for key in {'gpt_neox': ('num_key_value_heads', 'rms_norm_eps')}.get(family, ()):
    del hf[key]
  return hf


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the values of a tensor from its name, float32: matrices keep scale, norms are near 1."""
  drawn = np.random.default_rng([7, zlib.crc32(name.encode())]).standard_normal(shape)
  if len(shape) == 2:
    return (drawn * (2.0 / shape[1]) ** 0.5).astype(np.float32)
  if 'norm' in name and name.endswith('weight'):
    return (1 + 0.2 * drawn).astype(np.float32)
  return (0.3 * drawn).astype(np.float32)


def tensors(hf: dict) -> dict[str, np.ndarray]:
  """Returns every tensor of a config.json, by the names that our tables give."""
  config, family = configs.model_config(hf), configs.family_of(hf)
  rows = checkpoint.chosen_rows(family, checkpoint.leaf_shapes(config))
  sizes = layout.sizes_of(config)
  made = {name: values(name, layout.tensor_shape(row, sizes))
          for row in rows.values() for name, _, _ in checkpoint.tensors_of(row, config)}
  return made | {name: np.asarray(value, np.float32)
                 for name, value in checkpoint.constants_of(family, config)}


def write(folder: pathlib.Path, hf: dict, dtype: str = 'float32') -> pathlib.Path:
  """Writes a checkpoint of one file; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file({name: x.astype(dtype) for name, x in tensors(hf).items()}, folder / 'model.safetensors',
            metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(hf), encoding='utf-8')
  return folder


def tokens_BL() -> np.ndarray:
  """Returns the rows that cases are run on, int32 [2, L]."""
  return np.random.default_rng(3).integers(0, V, (2, L)).astype(np.int32)
