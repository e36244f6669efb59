"""config.json of Hugging Face to ModelConfig and back, by the tables of `families`."""

import dataclasses
import difflib
from typing import Any, Mapping, Optional

from models.config import ModelConfig, MoEConfig, RopeConfig
from models.interop.families import FAMILIES, FALSE, REQUIRED, Family
from models.interop.rope import KINDS, rope_of, rope_parameters

DTYPES = {'float32': 'float32', 'bfloat16': 'bfloat16', 'float16': 'float32'}
# Settings that change what any model computes, and the values that ours computes.
COMPUTED = {
  'quantization_config': (None,), 'add_cross_attention': FALSE, 'is_encoder_decoder': FALSE,
}
KIND_NAMES = {ours: theirs for theirs, ours in KINDS.items()}


# Kinds of values; None is none.
INTEGERS = (*REQUIRED, 'num_key_value_heads', 'head_dim', 'sliding_window', 'max_window_layers',
            'num_local_experts', 'num_experts_per_tok')
KINDS_OF_VALUES = {
  **dict.fromkeys(INTEGERS, (int,)), 'architectures': (list,), 'layer_types': (list,),
  'rope_parameters': (dict,), 'rope_scaling': (dict,), 'model_type': (str,),
  'hidden_act': (str,),
  **dict.fromkeys(('rope_theta', 'rotary_emb_base', 'rotary_pct', 'partial_rotary_factor',
                   'rms_norm_eps', 'layer_norm_eps'), (int, float)),
}


def _check_kinds(hf: Mapping[str, Any]) -> None:
  """Raises ValueError for a value of config.json of another kind than its key has."""
  for key, kinds in KINDS_OF_VALUES.items():
    value = hf.get(key)
    if value is not None and type(value) not in kinds:
      raise ValueError(f'{key}={value!r} of config.json is a {type(value).__name__}; '
                       f'{" or ".join(kind.__name__ for kind in kinds)} is needed')


def family_of(hf: Mapping[str, Any]) -> Family:
  """Returns the family of a config.json; raises ValueError naming the nearest we know."""
  name, known = hf.get('model_type'), ', '.join(FAMILIES)
  if name is None:
    raise ValueError(f'config.json has no model_type; the known ones are {known}')
  if name not in FAMILIES:
    near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.0)[0]
    raise ValueError(f'model_type={name!r} is not supported; the nearest of {known} is {near}')
  family = FAMILIES[name]
  architectures = hf.get('architectures') or [family.architecture]
  if family.architecture not in architectures:
    raise ValueError(
      f'architectures={list(architectures)} of model_type={name!r} is not supported; '
      f'{family.architecture} is'
    )
  return family


def _required(hf: Mapping[str, Any], family: Family) -> None:
  """Raises ValueError for missing keys and for settings that our model does not compute."""
  needed = [*REQUIRED, family.eps]
  needed += ['num_key_value_heads'] * (family.own_kv_heads == 'must')
  needed += ['head_dim'] * (family.own_head_dim == 'must')
  if family.model_type == 'mixtral':
    needed += ['num_local_experts', 'num_experts_per_tok']
  missing = [key for key in needed if hf.get(key) is None]
  if missing:
    raise ValueError(
      f'config.json of model_type={family.model_type!r} has no {", ".join(missing)}'
    )
  for key, values in {**COMPUTED, **family.computed}.items():
    if hf.get(key) not in values:
      raise ValueError(
        f'{key}={hf[key]!r} is not supported in model_type={family.model_type!r}')


def _activation(hf: Mapping[str, Any], family: Family) -> str:
  """Returns our name of the feed-forward's kind."""
  name = hf.get('hidden_act') or next(iter(family.activations))
  if name not in family.activations:
    raise ValueError(
      f'hidden_act={name!r} is not supported in model_type={family.model_type!r}; '
      f'{", ".join(family.activations)} are'
    )
  return family.activations[name]


def _given_types(
  hf: Mapping[str, Any], family: Family, window: Optional[int]
) -> Optional[list[str]]:
  """Returns the kind of each layer, given or by the family's rule; None where all are full."""
  n_layers, types = hf['num_hidden_layers'], hf.get('layer_types')
  if family.windows == 'all':
    return ['sliding_attention'] * n_layers if window else None
  if types is not None:
    return types
  full = ['full_attention'] * n_layers
  if family.windows == 'layer_types':
    return [full[i] if (i + 1) % 4 == 0 else 'sliding_attention' for i in range(n_layers)]
  if family.windows == 'max_window_layers' and window:
    first = hf.get('max_window_layers')
    first = 28 if first is None else first  # as in transformers
    return full[:first] + ['sliding_attention'] * (n_layers - first)
  return None


def _check_types(
  types: list[str], family: Family, n_layers: int, window: Optional[int]
) -> None:
  """Raises ValueError for kinds of layers that do not fit the model."""
  if not family.windows and set(types) != {'full_attention'}:
    raise ValueError(
      f'layer_types={types} is not supported in model_type={family.model_type!r}')
  if unknown := sorted(set(types) - KINDS.keys()):
    raise ValueError(
      f'layer_types entry {unknown[0]!r} is not supported; {", ".join(KINDS)} are')
  if len(types) != n_layers:
    raise ValueError(f'layer_types has {len(types)} entries for num_hidden_layers={n_layers}')
  if 'sliding_attention' in types and not window:
    raise ValueError(f'layer_types has sliding layers but sliding_window={window!r}')


def _pattern(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """Returns the fields `layer_pattern` (its shortest period) and `window`."""
  window = hf.get('sliding_window')
  if family.windows == 'max_window_layers' and not hf.get('use_sliding_window'):
    window = None
  types = _given_types(hf, family, window)
  if types is None:
    return {}
  _check_types(types, family, hf['num_hidden_layers'], window)
  kinds = [KINDS[name] for name in types]
  period = next(
    n for n in range(1, len(kinds) + 1)
    if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
  )
  fields = {'window': window} if 'sliding' in kinds else {}
  return {'layer_pattern': tuple(kinds[:period]), **fields}


def _sizes(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """Returns the fields of sizes and of experts."""
  fields = {ours: hf[theirs] for theirs, ours in REQUIRED.items()}
  heads, width = fields['n_heads'], fields['d_model']
  kv_heads = hf.get('num_key_value_heads') if family.own_kv_heads else None
  fields['n_kv_heads'] = kv_heads or heads
  if not hf.get('head_dim') and width % heads:
    raise ValueError(f'hidden_size={width} is not a multiple of num_attention_heads={heads}')
  fields['d_head'] = hf.get('head_dim') or width // heads
  if not family.own_head_dim and fields['d_head'] * heads != width:
    raise ValueError(
      f'head_dim={fields["d_head"]} times num_attention_heads={heads} is not hidden_size='
      f'{width}, as model_type={family.model_type!r} needs'
    )
  if family.model_type == 'mixtral':
    fields['moe'] = MoEConfig(
      n_experts=hf['num_local_experts'], top_k=hf['num_experts_per_tok'],
      d_expert=fields['d_ff'])
  return fields


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
  """Returns the model that a config.json describes; training settings keep our defaults.

  It computes in the file's `dtype` (older: `torch_dtype`), a float16 model in float32.

  Raises:
    ValueError: unknown architecture, missing key or unsupported setting, in one sentence.
  """
  _check_kinds(hf)
  family = family_of(hf)
  _required(hf, family)
  dtype = str(hf.get('dtype') or hf.get('torch_dtype') or 'float32').removeprefix('torch.')
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r} is not supported; {", ".join(DTYPES)} are')
  fields = {
    **family.fixed, **_sizes(hf, family), **_pattern(hf, family),
    **rope_of(hf, theta=family.theta, partial=family.partial, per_kind=family.per_kind,
              required=family.rope_required),
    'mlp': _activation(hf, family), 'norm_eps': float(hf[family.eps]),
    'tie_embeddings': bool(hf.get('tie_word_embeddings') or False),
    'compute_dtype': DTYPES[dtype],
  }
  if family.attention_bias is not None:
    bias = hf.get('attention_bias')
    bias = family.attention_bias if bias is None else bias
    fields |= {'qkv_bias': bias, 'out_bias': bias}
  if family.mlp_bias:
    fields['mlp_bias'] = bool(hf.get('mlp_bias') or False)
  if family.model_type == 'gpt_neox':
    parallel = hf.get('use_parallel_residual')
    fields['parallel_residual'] = True if parallel is None else parallel
  return ModelConfig(**fields)


def _window_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys of config.json that say which layers slide."""
  slides = 'sliding' in config.layer_kinds
  if not family.windows:
    return {}
  keys: dict[str, Any] = {'sliding_window': config.window if slides else None}
  if family.windows == 'max_window_layers':
    keys['use_sliding_window'] = slides
  if family.windows != 'all':
    keys['layer_types'] = [KIND_NAMES[kind] for kind in config.layer_kinds]
  return keys


def _described(config: ModelConfig, family: Family, dtype: str) -> dict[str, Any]:
  """Returns what config.json of a family can say of a model, be it all there is or not."""
  hf: dict[str, Any] = {
    'architectures': [family.architecture], 'model_type': family.model_type, 'dtype': dtype}
  hf |= {theirs: getattr(config, ours) for theirs, ours in REQUIRED.items()}
  hf |= {
    family.eps: config.norm_eps, 'tie_word_embeddings': config.tie_embeddings,
    'hidden_act': next(k for k, v in family.activations.items() if v == config.mlp),
    'rope_parameters': rope_parameters(
      config, partial=family.partial, per_kind=family.per_kind),
    'initializer_range': config.init_std, **_window_keys(config, family),
  }
  if family.own_kv_heads:
    hf['num_key_value_heads'] = config.n_kv_heads
  if family.own_head_dim:
    hf['head_dim'] = config.d_head
  if family.attention_bias is not None:
    hf['attention_bias'] = config.qkv_bias
  if family.mlp_bias:
    hf['mlp_bias'] = config.mlp_bias
  if family.model_type == 'gpt_neox':
    hf['use_parallel_residual'] = config.parallel_residual
  if family.model_type == 'mixtral':
    moe = config.moe
    hf |= {'num_local_experts': moe.n_experts, 'num_experts_per_tok': moe.top_k,
           'intermediate_size': moe.d_expert, 'router_aux_loss_coef': moe.balance_weight}
  return hf


def _computed(config: ModelConfig) -> ModelConfig:
  """Returns the config with everything at its default that the logits do not depend on."""
  default, moe = ModelConfig(), config.moe
  kept = {
    'n_experts': moe.n_experts, 'top_k': moe.top_k, 'd_expert': moe.d_expert,
    'normalize_top_k': moe.normalize_top_k, 'capacity_factor': moe.capacity_factor,
  }
  same = ('compute_dtype', 'dropout', 'init_std', 'remat', 'scan_layers', 'attention',
          'attention_block')
  fields = {name: getattr(default, name) for name in same}
  fields['moe'] = MoEConfig(**kept) if moe.n_experts else default.moe
  if moe.n_experts:
    fields['d_ff'] = moe.d_expert
  kinds = set(config.layer_kinds)
  if 'sliding' not in kinds:
    fields['window'] = default.window
  if config.positions != 'rope' or 'sliding' not in kinds:
    fields['sliding_rope'] = None
  fields['layer_pattern'] = config.layer_kinds
  fields['attention_scale'] = 0.0 if config.scale == config.d_head**-0.5 else config.scale
  fields['rope'] = _known_rope(config.rope)
  if config.sliding_rope is not None and fields.get('sliding_rope', True) is not None:
    sliding = _known_rope(config.sliding_rope)
    fields['sliding_rope'] = None if sliding == fields['rope'] else sliding
  return dataclasses.replace(config, **fields)


def _known_rope(rope: RopeConfig) -> RopeConfig:
  """Returns the rotary embedding with the settings of other scalings at their defaults."""
  used = {'none': (), 'linear': ('factor',),
          'llama3': ('factor', 'original_context', 'low_freq_factor', 'high_freq_factor'),
          'yarn': ('factor', 'original_context', 'beta_fast', 'beta_slow', 'attention_factor')}
  kept = ('theta', 'fraction', 'scaling', *used[rope.scaling])
  return RopeConfig(**{name: getattr(rope, name) for name in kept})


def _differences(config: ModelConfig, family: Family) -> list[str]:
  """Returns the settings, as model.name=value, that the family's config.json cannot say."""
  if config.mlp not in family.activations.values():
    return [f'model.mlp={config.mlp!r}']
  try:
    back = model_config(_described(config, family, 'float32'))
  except ValueError as error:
    return [str(error)]
  return _unequal(_computed(config), _computed(back), 'model')


def _unequal(ours: Any, theirs: Any, path: str) -> list[str]:
  """Returns path.name=value of ours for every field in which two configs differ."""
  found = []
  for name in (field.name for field in dataclasses.fields(ours)):
    a, b = getattr(ours, name), getattr(theirs, name)
    if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
      found += _unequal(a, b, f'{path}.{name}')
    elif a != b:
      found.append(f'{path}.{name}={a!r}')
  return found


def hf_config(config: ModelConfig, dtype: str) -> tuple[Family, dict[str, Any]]:
  """Returns the family that computes what a model computes, and its config.json.

  Of several it is the first of `families.FAMILIES`. `dtype` is that of the tensors.

  Raises:
    ValueError: no family does; names what the nearest one lacks.
  """
  lacking = {name: _differences(config, family) for name, family in FAMILIES.items()}
  name = min(lacking, key=lambda name: len(lacking[name]))
  if lacking[name]:
    raise ValueError(
      f'no family of {", ".join(FAMILIES)} computes this model; the nearest, {name}, lacks '
      f'{", ".join(lacking[name])}'
    )
  return FAMILIES[name], _described(config, FAMILIES[name], dtype)
