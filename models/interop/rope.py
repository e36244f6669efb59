"""Rotary embeddings as config.json states them, today's way and the older ones, both ways.

Today: `rope_parameters`, flat or one per kind of attention, with theta in it. Older:
`rope_theta`, `rope_scaling` and a share of the head beside each other.
"""

import math
from typing import Any, Mapping, Optional

from models.config import ModelConfig, RopeConfig

SCALINGS = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3', 'yarn': 'yarn'}
KINDS = {'full_attention': 'full', 'sliding_attention': 'sliding'}
# config.json -> our field, by our scaling; those without a value here have to be given.
FIELDS: dict[str, dict[str, tuple[str, Optional[float]]]] = {
  'none': {},
  'linear': {'factor': ('factor', None)},
  'llama3': {
    'factor': ('factor', None), 'low_freq_factor': ('low_freq_factor', None),
    'high_freq_factor': ('high_freq_factor', None),
  },
  'yarn': {
    'factor': ('factor', None), 'beta_fast': ('beta_fast', 32.0),
    'beta_slow': ('beta_slow', 1.0),
  },
}
STRETCHED = ('llama3', 'yarn')  # those that know the context before stretching
COMPUTED = {'truncate': (None, True), 'mrope_section': (None,)}  # the values that we compute


def _attention_factor(given: Mapping[str, Any], factor: float) -> Optional[float]:
  """Returns yarn's factor on cos and sin where it is not the usual one, else None."""
  if given.get('attention_factor') is not None:
    return float(given['attention_factor'])
  scales = given.get('mscale'), given.get('mscale_all_dim')
  if not all(scales) or factor <= 1:
    return None
  over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
  return over / under


def _scaled(
  given: Mapping[str, Any], where: str, theta: float, fraction: float, context: int
) -> RopeConfig:
  """Returns the rotary embedding of one dict; raises ValueError for what we do not compute."""
  kind = given.get('rope_type') or given.get('type') or 'default'
  if kind not in SCALINGS:
    raise ValueError(
      f'{where}.rope_type={kind!r} is not supported; {", ".join(SCALINGS)} are'
    )
  for key, values in COMPUTED.items():
    if given.get(key) not in values:
      raise ValueError(f'{where}.{key}={given[key]!r} is not supported')
  scaling, fields = SCALINGS[kind], {}
  original = given.get('original_max_position_embeddings') or context
  if kind == 'yarn' and given.get('factor') is None:
    given = {**given, 'factor': context / original}
  for key, (field, otherwise) in FIELDS[scaling].items():
    value = given.get(key) if given.get(key) is not None else otherwise
    if value is None:
      raise ValueError(f'{where} has no {key}, which rope_type={kind!r} needs')
    if not isinstance(value, (int, float)):
      raise ValueError(f'{where}.{key}={value!r} is no number')
    fields[field] = float(value)
  if scaling in STRETCHED:
    fields['original_context'] = int(original)
  if scaling == 'yarn':
    fields['attention_factor'] = _attention_factor(given, fields['factor'])
  theta = given.get('rope_theta') or theta
  return RopeConfig(theta=float(theta), fraction=fraction, scaling=scaling, **fields)


def _fraction(
  hf: Mapping[str, Any], given: Mapping[str, Any], where: str, partial: float
) -> float:
  """Returns the rotated share of a head; `partial` is the family's own, 1 when it has none."""
  name = 'partial_rotary_factor'
  stated = given.get(name), hf.get(name), hf.get('rotary_pct')
  value = next((float(v) for v in stated if v is not None), partial)
  if partial == 1 and value != 1:
    raise ValueError(f'{where}: partial_rotary_factor={value} is not supported in this family')
  return value


def _is_plain(hf: Mapping[str, Any]) -> bool:
  """Returns whether an older file (transformers before 5) says that there is no scaling."""
  version = str(hf.get('transformers_version') or 4)
  return 'rope_scaling' in hf and version.partition('.')[0] < '5'


def rope_of(
  hf: Mapping[str, Any], *, theta: float, partial: float = 1.0, per_kind: bool = False,
  required: bool = False,
) -> dict[str, Optional[RopeConfig]]:
  """Returns the fields `rope` and `sliding_rope` of a ModelConfig.

  Args:
    hf: config.json.
    theta: base of the wavelengths where the file has none.
    partial: rotated share of a head where the file has none; 1 for families that rotate all.
    per_kind: whether sliding layers have their own; a `rope_scaling` is then of full ones only.
    required: whether a file that says nothing of scaling is refused.

  Raises:
    ValueError: a setting is missing or not supported; names it.
  """
  theta = hf.get('rope_theta') or hf.get('rotary_emb_base') or theta
  if required and not (hf.get('rope_scaling') or hf.get('rope_parameters') or _is_plain(hf)):
    raise ValueError('config.json has neither rope_parameters nor rope_scaling')
  ropes = {}
  for kind, (path, given) in _dict_of_each_kind(hf, per_kind).items():
    fraction = _fraction(hf, given, path, partial)
    ropes[kind] = _scaled(given, path, theta, fraction, hf['max_position_embeddings'])
  sliding = None if ropes['sliding'] == ropes['full'] else ropes['sliding']
  return {'rope': ropes['full'], 'sliding_rope': sliding}


def _dict_of_each_kind(
  hf: Mapping[str, Any], per_kind: bool
) -> dict[str, tuple[str, Mapping[str, Any]]]:
  """Returns where the settings of full and of sliding layers stand, and them.

  Raises ValueError when they are per kind of attention in a family that has one for all, or
  the other way round.
  """
  if scaling := hf.get('rope_scaling'):
    return {'full': ('rope_scaling', scaling),
            'sliding': ('rope_scaling', {} if per_kind else scaling)}
  given = hf.get('rope_parameters') or {}
  nested = any(kind in given for kind in KINDS)
  if given and nested != per_kind:
    raise ValueError(
      f'rope_parameters is {"" if nested else "not "}given per kind of attention '
      f'({", ".join(KINDS)}), which this family {"does not know" if nested else "needs"}'
    )
  dicts = {}
  for theirs, ours in KINDS.items():
    path = f'rope_parameters.{theirs}' if nested else 'rope_parameters'
    values = given.get(theirs, {}) if nested else given
    if not isinstance(values, dict):
      raise ValueError(f'{path}={values!r} is not supported; a dict is needed')
    dicts[ours] = path, values
  return dicts


def _as_parameters(rope: RopeConfig, partial: bool) -> dict[str, Any]:
  """Returns one dict of today's `rope_parameters`."""
  names = {ours: theirs for theirs, ours in SCALINGS.items()}
  given: dict[str, Any] = {'rope_type': names[rope.scaling], 'rope_theta': rope.theta}
  given |= {key: getattr(rope, field) for key, (field, _) in FIELDS[rope.scaling].items()}
  if rope.scaling in STRETCHED:
    given['original_max_position_embeddings'] = rope.original_context
  if rope.scaling == 'yarn' and rope.attention_factor is not None:
    given['attention_factor'] = rope.attention_factor
  if partial:
    given['partial_rotary_factor'] = rope.fraction
  return given


def rope_parameters(
  config: ModelConfig, *, partial: float = 1.0, per_kind: bool = False
) -> dict[str, Any]:
  """Returns today's `rope_parameters` of a model."""
  if not per_kind:
    return _as_parameters(config.rope, partial != 1)
  return {theirs: _as_parameters(config.kind_rope(ours), False)
          for theirs, ours in KINDS.items()}
