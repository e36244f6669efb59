"""A run that is replayed, read only: its settings, rows and data, the full states to start from."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from typing import Any

import jax

from research import config as config_lib
from research import overrides as overrides_lib
from research.config import ExperimentConfig
from research.data.batches import Source, make_source
from research.data.edits import edited, parse_edit
from research.errors import UserError
from research.run_dir import CACHE, RunDir
from research.training import manifest as manifest_lib
from research.training import stored
from research.training.checkpoints import Checkpoints
from research.training.logs import read_rows
from research.training.snapshots import SnapshotReader

_NUMERICS = ('mesh', 'compute', 'model')  # settings that may change bits where they may change


@dataclasses.dataclass(frozen=True)
class Original:
  """A run directory that nothing here writes to; `open_original` checks it."""

  run_dir: RunDir
  config: ExperimentConfig
  manifest: dict[str, Any]

  @property
  def name(self) -> str:
    """Its path as given, for messages."""
    return str(self.run_dir.whole)

  @property
  def path(self) -> pathlib.Path:
    """Its whole path."""
    return self.run_dir.whole.resolve()

  @functools.cached_property
  def metrics(self) -> dict[int, dict[str, Any]]:
    """Rows of metrics by step."""
    return {row['step']: row for row in read_rows(self.run_dir.metrics_jsonl)}

  @functools.cached_property
  def evals(self) -> dict[int, dict[str, Any]]:
    """Rows of held-out loss by step."""
    return {row['step']: row for row in read_rows(self.run_dir.evals_jsonl)}

  @functools.cached_property
  def snapshots(self) -> SnapshotReader:
    """Its snapshots."""
    return SnapshotReader(self.run_dir.snapshots)

  @property
  def first(self) -> int:
    """The step with whose state it begins: 0 unless it is a replay itself."""
    return self.manifest['parent']['step'] if self.manifest.get('replay') else 0

  @property
  def last(self) -> int:
    """The last step that has a row."""
    return max(self.metrics, default=self.first)

  @property
  def edits(self) -> tuple[str, ...]:
    """Changes of its data, where it is a counterfactual replay itself."""
    return tuple(self.manifest.get('replay', {}).get('edits', ()))

  @functools.cached_property
  def checkpoint_steps(self) -> list[int]:
    """Steps with a full checkpoint, ascending."""
    if not self.run_dir.checkpoints.exists():
      return []
    checkpoints = Checkpoints(self.run_dir.checkpoints)
    steps = checkpoints.steps
    checkpoints.close()
    return steps

  @property
  def states(self) -> list[int]:
    """Steps whose full state is at hand: checkpoints, and initialization where it began with it."""
    return ([] if self.manifest.get('replay') else [0]) + self.checkpoint_steps

  def nearest_state(self, step: int) -> int:
    """Returns the last step up to `step` whose full state is at hand and sound; says which is not.

    Raises:
      UserError: there is none, as in a replay whose first checkpoint comes later.
    """
    for at in reversed([at for at in self.states if at <= step]):
      path = self.run_dir.checkpoints / str(at)
      damage = next(stored.damage(path, at), None) if at in self.checkpoint_steps else None
      if damage is None:
        return at
      print(f'note: the checkpoint of step {at} is damaged, an earlier state is used: {damage}',
            flush=True)
    raise UserError(f'{self.name} has no sound full state up to step {step}; it has those of steps '
                    f'{self.states}')

  def configured(self, overrides: list[tuple[str, str]]) -> tuple[ExperimentConfig, dict[str, Any]]:
    """Returns its config with overrides, and the settings that they change: path -> [old, new].

    Raises:
      UserError: an unknown setting, or one that is part of the run's identity.
    """
    config, changed = overrides_lib.apply(self.config, overrides), {}
    saved = json.loads(config_lib.as_json(self.config))
    for setting, old in config_lib.differences(saved, config):
      if setting.kind == 'identity':
        raise UserError(f'--config.{setting.path}={setting.value!r}: a replay keeps what the run '
                        f'is ({setting.path}={old!r}); mesh, checkpoints.every, snapshot_every, '
                        'monitors, evals and logging may differ')
      changed[setting.path] = [old, setting.value]
    return config, changed

  def machine_differences(self, first: int, last: int) -> list[str]:
    """Returns how this machine differs from those that made steps first + 1 to last."""
    starts, said = self.manifest['starts'], []
    for i, start in enumerate(starts):
      until = min([later['from_step'] for later in starts[i + 1:]], default=math.inf)
      if max(start['from_step'], first) < min(until, last):
        said += manifest_lib.machine_changes({'starts': [start]})
        said += [f'{path}: {old} -> {new}' for later in starts[i + 1:]
                 for path, (old, new) in later['changes'].items() if changes_bits(path)]
    return sorted(set(said))

  def differences(self, changed: dict[str, Any], mesh: jax.sharding.Mesh, first: int, last: int
                  ) -> list[str]:
    """Returns all on which bits may depend that is not as it was for steps first + 1 to last."""
    said = [f'{path}: {old} -> {new}' for path, (old, new) in changed.items()
            if changes_bits(path)]
    if self.manifest['mesh'] != dict(mesh.shape):
      said.append(f'mesh: {self.manifest["mesh"]} -> {dict(mesh.shape)}')
    return said + self.machine_differences(first, last)

  def own_differences(self) -> list[str]:
    """Returns, of a replay, all on which bits may depend that was not as in its own original.

    That is what its first start found and what has changed between its starts since.
    """
    harmless = {setting.path for setting in config_lib.settings(self.config)
                if not changes_bits(setting.path)}
    said = [text for text in self.manifest['differs'] if text.partition(': ')[0] not in harmless]
    for before, start in itertools.pairwise(self.manifest['starts']):
      said += manifest_lib.differing_facts(before['machine'], start['machine'])
      said += [f'{path}: {old} -> {new}' for path, (old, new) in start['changes'].items()
               if changes_bits(path)]
    return said

  def code_difference(self) -> str:
    """Returns what to say of the code where it is not the one of the run's last start, or ''."""
    then, now = self.manifest['starts'][-1], manifest_lib.code_version()
    if then['commit'] == now and not then['diff']:
      return ''
    return (f'; the code was commit {then["commit"][:12]}{" with changes" if then["diff"] else ""} '
            f'and is {now[:25]}')


def changes_bits(path: str) -> bool:
  """Returns whether a setting that may differ can change the bits of a run."""
  return path.split('.')[0] in _NUMERICS


def open_original(path: str) -> Original:
  """Returns the run in a directory; raises UserError where there is none."""
  run_dir = RunDir(path)
  for file in (run_dir.manifest_json, run_dir.config_json, run_dir.metrics_jsonl):
    if not path or not file.exists():
      raise UserError(f'--run_dir={path!s}: not a run directory, it has no {file.name}')
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  return Original(run_dir, config, json.loads(run_dir.manifest_json.read_text(encoding='utf-8')))


def check_range(original: Original, first: int, last: int, what: str) -> None:
  """Raises UserError, naming `what` and the steps that there are, for others."""
  if not original.first <= first < last <= original.last:
    raise UserError(f'{what}={first}:{last}: {original.name} holds steps '
                    f'{original.first}:{original.last}')


def trained_on(original: Original) -> Source:
  """Returns the source of a run's batches, edits of a replay included.

  Raises:
    UserError: its data is gone or has changed since.
  """
  config = original.config
  source = make_source(config.data, config.n_steps, CACHE)
  check_data(original, source)
  return edited(source, config.data.batch_size, [parse_edit(text) for text in original.edits])


def check_data(original: Original, source: Source) -> None:
  """Raises UserError where a source or its tokenizer is not the one that the run was made with."""
  for name, now in (('data', source.hash), ('tokenizer', source.tokenizer.hash)):
    if original.manifest['hashes'][name] != now:
      then = original.manifest['hashes'][name]
      raise UserError(f'{original.name} was made with {name} {then[:12]}, now its hash is '
                      f'{now[:12]}; the {name} has changed since')
