"""The small files of a run directory that say what the large ones are; damage to them is told."""

from collections.abc import Callable
import json
import pathlib
from typing import Any, TypeVar

from research import config as config_lib
from research.config import ExperimentConfig
from research.dynamics.audit_content import Finding
from research.errors import UserError
from research.run_dir import RunDir
from research.training.logs import read_rows

T = TypeVar('T')
_ODD = (OSError, ValueError, KeyError, TypeError, AttributeError, UserError)


class Index:
  """Configuration, manifest and rows of a run; what cannot be read is None, and a finding.

  Attributes:
    findings: a file each that cannot be read.
    config, manifest: of the run; None where they cannot be read.
    commits: lines of the snapshots; None where they cannot be read, [] where there are none.
    skipped: steps that updated nothing.
    end: step at which the run was done; None if it is not, or DONE cannot be read.
  """

  def __init__(self, run_dir: RunDir):
    self.findings: list[Finding] = []
    self.config: ExperimentConfig | None = self._read(run_dir.config_json, _config)
    self.manifest: dict[str, Any] | None = self._read(run_dir.manifest_json, _manifest)
    self.commits = self._read(run_dir.snapshots / 'commits.jsonl', _commits)
    rows = self._read(run_dir.metrics_jsonl, _metrics) or []
    self.skipped = {row['step'] for row in rows if row.get('skipped')}
    self.end = self._read(run_dir.done, _done) if run_dir.done.exists() else None

  def _read(self, path: pathlib.Path, read: Callable[[pathlib.Path], T]) -> T | None:
    try:
      return read(path)
    except _ODD as error:
      problem = 'is missing' if isinstance(error, FileNotFoundError) else (
          f'cannot be read ({type(error).__name__}: {error})'.replace(f'{path}:', 'line '))
      self.findings.append(Finding('damaged', 0, str(path), '', problem))
      return None


def _config(path: pathlib.Path) -> ExperimentConfig:
  return config_lib.from_json(path.read_text(encoding='utf-8'))


def _manifest(path: pathlib.Path) -> dict[str, Any]:
  manifest = json.loads(path.read_text(encoding='utf-8'))
  dict.items(manifest['hashes'])
  return manifest


def _done(path: pathlib.Path) -> int:
  return int(json.loads(path.read_text(encoding='utf-8'))['step'])


def _metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  return _checked(path, {'step': int})


def _commits(path: pathlib.Path) -> list[dict[str, Any]]:
  rows = _checked(path, {'step': int, 'row': int})
  for number, row in enumerate(rows, 1):
    if ('hash' in row or 'tensors' in row) and not isinstance(row.get('tensors'), dict):
      raise ValueError(f'{path}:{number} has no hashes of tensors')
  return rows


def _checked(path: pathlib.Path, fields: dict[str, type]) -> list[dict[str, Any]]:
  """Returns the rows of a file of lines; raises ValueError where one lacks a field."""
  rows = read_rows(path)
  for number, row in enumerate(rows, 1):
    for name, kind in fields.items():
      if not isinstance(row, dict) or type(row.get(name)) is not kind:
        raise ValueError(f'{path}:{number} has no whole number {name!r}')
  return rows
