"""Runs steps of a run again from its nearest earlier full state, in a directory of its own.

The loop is training's own (`research.training.loop`) over another span of steps, so a replay gives
the same bits on the same mesh, machine and packages, and checks that it does as it goes.
"""

from collections.abc import Sequence
from typing import Any

import jax

from parallelism.mesh import make_mesh
from research import build as build_lib
from research.build import Build
from research.config import ExperimentConfig
from research.data.batches import Source
from research.data.edits import Edit, check_edits, edited, parse_edit
from research.data.tokenizers import Tokenizer
from research.dynamics.original import Original, changes_bits, check_data, check_range
from research.dynamics.verify import Verifier, verdict
from research.errors import UserError
from research.run_dir import RunDir
from research.training import manifest as manifest_lib
from research.training.checkpoints import Checkpoints
from research.training.loop import train
from research.training.span import Span
from research.training.start import first_state
from research.training.step import State


class Replay(Span):
  """Some steps of a run, made again."""

  def __init__(self, original: Original, steps: tuple[int, int], first: int,
               edits: tuple[Edit, ...], reasons: Sequence[str], changed: dict[str, Any]):
    """Prepares steps first + 1 to steps[1], observed from steps[0] on.

    Args:
      original: the run.
      steps: the first and the last state that is observed.
      first: the step of the full state that it starts from.
      edits: changes of the data, those of the original included.
      reasons: what may change bits, as short phrases.
      changed: settings that are not the original's: path -> [old, new].
    """
    self.first, (self.observed_from, self.last) = first, steps
    self.replay = {'of': str(original.path), 'steps': list(steps), 'edits': [*map(str, edits)]}
    self.differs = tuple(f'{path}: {old} -> {new}' for path, (old, new) in changed.items())
    self.differs += tuple(reason for reason in reasons if reason not in self.differs)
    self._original, self._edits, self._reasons = original, edits, tuple(reasons)
    self._same_numerics = not any(map(changes_bits, changed))

  @property
  def equal_until(self) -> int:
    """The last step that must equal the original's."""
    new = self._edits[len(self._original.edits):]
    return min([self.last, *(a for edit in new for a, _ in edit.changed)])

  def numerics(self, config: ExperimentConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the original's choices, made anew where its mesh or way of computing is changed."""
    manifest = self._original.manifest
    same = manifest['mesh'] == dict(mesh.shape) and self._same_numerics
    return manifest['numerics'] if same else build_lib.resolve_numerics(config, mesh)

  def parent(self, config: ExperimentConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the original and the step that the replay starts from."""
    return {'run_dir': str(self._original.path), 'step': self.first}

  def data(self, source: Source) -> Source:
    """Returns the original's source with the edits; raises UserError where the data has changed."""
    check_data(self._original, source)
    return edited(source, self._original.config.data.batch_size, self._edits)

  def begin(self, built: Build, config: ExperimentConfig, parent: dict[str, Any]
            ) -> tuple[State, dict[str, int]]:
    """Returns the original's full state at step `first`."""
    if parent['step'] == 0:
      return first_state(built, config, self._original.manifest['parent']), {'step': 0, 'tokens': 0}
    checkpoints = Checkpoints(self._original.run_dir.checkpoints)
    state, position = checkpoints.restore(parent['step'], built.abstract_state)
    checkpoints.close()
    return state, position

  def observers(self, run_dir: RunDir, kept: int) -> Verifier:
    """Returns what compares the replay with the original."""
    return Verifier(self._original, run_dir, kept, self.equal_until, self._reasons)


def replay(original: Original, run_dir: RunDir, steps: tuple[int, int],
           overrides: list[tuple[str, str]] = (), edits: Sequence[Edit] = ()) -> str:
  """Makes steps of a run again and returns in words how they compare with the original's.

  A replay that was interrupted is resumed, a finished one reported.

  Args:
    original: the run.
    run_dir: where the replay is written: a directory outside the original.
    steps: (a, b); snapshots, monitors and their bits are taken from the state of step a to that
      of step b.
    overrides: placement settings that differ, as (path, text): checkpoints.snapshot_every,
      monitors.suite, mesh...
    edits: changes of the data; what comes before the first of them must still be equal.

  Raises:
    UserError: no such steps or data, an identity setting, or a directory in use.
    ReplayError: a step or leaf differs on the same machine, mesh and packages.
  """
  if jax.process_count() > 1:
    raise UserError('a replay runs in one process; give it a mesh of the devices at hand')
  check_range(original, *steps, '--steps')
  if run_dir.whole.resolve().is_relative_to(original.path):
    raise UserError(f'{run_dir.whole} lies in {original.name}, which a replay does not write to; '
                    'choose a directory outside it')
  check_edits(edits, original.config.data, original.config.n_steps)
  config, changed = original.configured(list(overrides))
  manifest = manifest_lib.read(run_dir)
  begun = Original(run_dir, config, manifest) if manifest and manifest.get('replay') else None
  first = begun.first if begun else original.nearest_state(steps[0])
  reasons = [] if begun is None else begun.own_differences()
  if not run_dir.done.exists():
    try:
      reasons += original.differences(changed, make_mesh(config.mesh), first, steps[1])
    except ValueError as error:
      raise UserError(str(error)) from error
  reasons = list(dict.fromkeys(reasons))
  every = tuple(parse_edit(text) for text in original.edits) + tuple(edits)
  span = Replay(original, steps, first, every, reasons, changed)
  if not run_dir.done.exists():
    print(f'steps {steps[0]} to {steps[1]} of {original.name}, from its state of step {first}: '
          f'{steps[1] - first} steps to make', flush=True)
    for reason in reasons:
      print(f'note: bits may differ from the original, {reason}', flush=True)
  train(config, run_dir, span)
  return verdict(run_dir, original.name, reasons)
