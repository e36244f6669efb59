"""The experiment config: every setting of a run, one frozen tree, and its flat text forms."""

import dataclasses
import json
import types
from typing import Annotated as A
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from models.config import ModelConfig
from parallelism.distributed import HostsConfig
from parallelism.mesh import MeshConfig
from research.data.config import DataConfig
from research.monitors.small.config import SmallSuiteConfig
from research.training.config import (
    CheckpointConfig,
    ComputeConfig,
    EvalConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    StartConfig,
    WatchdogConfig,
)


BAD_ITEMS = ('refuse', 'leave_out')


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
  """Which items are scored at every snapshot."""

  KIND: ClassVar[str] = 'placement'

  suite: A[str, "'microworld', 'small' (any text model), 'none', the path of an item file (.jsonl "
           'or .parquet), or the published suite: a folder or owner/dataset of the hub'] = 'none'
  batch_rows: A[int, 'rows scored at a time, at most'] = 256
  bad_items: A[str, "items that cannot be scored: 'refuse' them all by name before anything runs, "
               "or 'leave_out', which lists them in monitors/left_out.jsonl"] = 'refuse'
  small: SmallSuiteConfig = SmallSuiteConfig()
  captures: A[int, 'suspected hops that are bracketed to one step by replay when the run ends, '
              'confirmed ones first; the full checkpoints that this takes stay, at most captures + 1 '
              'beside checkpoints.keep'] = 0

  def __post_init__(self):
    if self.bad_items not in BAD_ITEMS:
      raise ValueError(f'monitors.bad_items={self.bad_items!r} is not one of '
                       f'{", ".join(BAD_ITEMS)}')
    if self.captures < 0:
      raise ValueError(f'monitors.captures={self.captures} must not be negative')


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One run. Identity fields may not change when it is resumed, placement fields may."""

  KIND: ClassVar[str] = 'identity'

  name: A[str, 'name of the experiment, for people', 'placement'] = 'unnamed'
  seed: A[int, 'seed of initialization and dropout; data has its own'] = 0
  n_steps: A[int, 'optimizer steps of the whole run'] = 1000
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  guards: GuardConfig = GuardConfig()
  start: StartConfig = StartConfig()
  compute: ComputeConfig = ComputeConfig()
  mesh: MeshConfig = MeshConfig()
  hosts: HostsConfig = HostsConfig()
  checkpoints: CheckpointConfig = CheckpointConfig()
  monitors: MonitorConfig = MonitorConfig()
  evals: EvalConfig = EvalConfig()
  logging: LoggingConfig = LoggingConfig()
  watchdog: WatchdogConfig = WatchdogConfig()

  def __post_init__(self):
    if self.n_steps < 1:
      raise ValueError(f'n_steps={self.n_steps} must be at least 1')
    if self.data.sequence_length > self.model.context_length:
      raise ValueError(f'data.sequence_length={self.data.sequence_length} is longer than '
                       f'model.context_length={self.model.context_length}')


@dataclasses.dataclass(frozen=True)
class Setting:
  """One leaf of a config tree: dotted path, value, type, kind and what it means."""

  path: str
  value: Any
  type: Any
  kind: str
  doc: str


def settings(config: Any, prefix: str = '') -> list[Setting]:
  """Returns every leaf setting of a config tree in declaration order."""
  rows = []
  hints = get_type_hints(type(config), include_extras=True)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    path = prefix + field.name
    hint, doc, kind = hints[field.name], '', config.KIND
    if get_origin(hint) is A:
      hint, *notes = get_args(hint)
      doc, kind = notes[0], (notes[1] if len(notes) > 1 else config.KIND)
    if dataclasses.is_dataclass(value):
      rows.extend(settings(value, path + '.'))
    else:
      rows.append(Setting(path, value, hint, kind, doc))
  return rows


def as_json(config: Any) -> str:
  """Returns the nested config as indented JSON."""
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> ExperimentConfig:
  """Returns the config that `as_json` wrote."""
  return _from_nested(ExperimentConfig, json.loads(text))


def _from_nested(hint: Any, value: Any) -> Any:
  if get_origin(hint) is A:
    hint = get_args(hint)[0]
  if get_origin(hint) in (types.UnionType, Union):
    kind = next(option for option in get_args(hint) if option is not type(None))
    return None if value is None else _from_nested(kind, value)
  if get_origin(hint) is tuple:
    return tuple(_from_nested(get_args(hint)[0], part) for part in value)
  if dataclasses.is_dataclass(hint):
    hints = get_type_hints(hint, include_extras=True)
    return hint(**{name: _from_nested(hints[name], part) for name, part in value.items()})
  return value


def as_text(config: Any) -> str:
  """Returns one `path = value` line per setting, for reading and for diffs."""
  return ''.join(f'{row.path} = {row.value!r}\n' for row in settings(config))


def differences(old: dict[str, Any], config: Any) -> list[tuple[Setting, Any]]:
  """Returns the settings whose value differs from the saved nested dict, with the saved value."""
  changed = []
  for row in settings(config):
    saved = old
    for key in row.path.split('.'):
      saved = saved.get(key) if isinstance(saved, dict) else None
    if json.loads(json.dumps(row.value)) != saved:
      changed.append((row, saved))
  return changed
