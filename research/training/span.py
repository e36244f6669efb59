"""Which steps of a run a directory holds, where they begin and what is checked as they are made."""

from typing import Any, ClassVar

import jax

from research import build as build_lib
from research.build import Build
from research.config import ExperimentConfig
from research.data.batches import Source
from research.data.tokenizers import Tokenizer
from research.run_dir import RunDir
from research.training.start import find_parent, first_state
from research.training.step import State


class Span:
  """All steps of a run; a replay (`research.dynamics.replay`) overrides what differs.

  Attributes:
    first: the step of the state with which the directory begins.
    last: the step at which it ends.
    observed_from: the step of the first snapshot.
    replay: what is replayed, {} for a run of its own; a directory holds one replay.
    differs: settings and facts of machine and mesh in which a replay differs, as short phrases.
  """

  replay: ClassVar[dict[str, Any]] = {}
  differs: ClassVar[tuple[str, ...]] = ()

  def __init__(self, config: ExperimentConfig):
    self.first, self.observed_from, self.last = 0, 0, config.n_steps

  def numerics(self, config: ExperimentConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the choices that change bits but not meaning."""
    return build_lib.resolve_numerics(config, mesh)

  def parent(self, config: ExperimentConfig, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Returns the run directory and step that the first state comes from; None: initialization."""
    return find_parent(config, tokenizer)

  def data(self, source: Source) -> Source:
    """Returns the source of the batches that are trained on; raises UserError for other data."""
    return source

  def begin(self, built: Build, config: ExperimentConfig, parent: dict[str, Any] | None
            ) -> tuple[State, dict[str, int]]:
    """Returns the state at step `first`, and the data position."""
    return first_state(built, config, parent), {'step': 0, 'tokens': 0}

  def due(self, step: int, every: int, since: int = 0) -> bool:
    """Returns whether what happens every so many steps (0: never) does now.

    It does at both ends too, and not before step `since`.
    """
    ends = self.observed_from, self.last
    return bool(every) and step >= since and (step % every == 0 or step in ends)

  def observers(self, run_dir: RunDir, kept: int) -> 'Observers':
    """Returns what looks at everything that is written; `kept`: the last step that stays."""
    del run_dir, kept
    return Observers()


class Observers:
  """What a replay looks at as it is made; a run of its own has nothing to be compared with."""

  def row(self, log: str, row: dict[str, Any]) -> None:
    """Looks at a row of 'metrics' or 'evals'."""

  def snapshot(self, step: int, stored: Any) -> None:
    """Looks at the values of a snapshot, a tree of arrays on the mesh."""

  def scores(self, step: int) -> None:
    """Looks at the scores of a snapshot, once they are on the disk."""

  def checkpoint(self, step: int, state: State) -> None:
    """Looks at a state that is saved."""

  def close(self) -> None:
    """Ends the record of what was seen."""

