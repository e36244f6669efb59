"""The arrows between rooms: who may import whom."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    'launchers': {'experiments', 'research', 'models', 'parallelism'},
    'experiments': {'research', 'models', 'parallelism'},
    'research': {'models', 'parallelism'},
    'models': set(),
    'parallelism': set(),
}


def imported_rooms(text: str) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      names |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.add(node.module.split('.')[0])
  return names & MAY_IMPORT.keys()


@pytest.mark.parametrize('room', MAY_IMPORT)
def test_room_imports_only_rooms_to_its_right(room):
  paths = sorted((ROOT / room).rglob('*.py'))
  assert paths
  for path in paths:
    if path.is_relative_to(ROOT / 'experiments' / 'benchmarks'):
      continue  # Benchmarks are code and start launchers as subprocesses.
    wrong = imported_rooms(path.read_text(encoding='utf-8')) - MAY_IMPORT[room] - {room}
    assert not wrong, f'{path.relative_to(ROOT)} imports {sorted(wrong)}'


def test_only_build_binds_models_to_parallelism():
  """The sharding table and the model meet in research/build.py alone."""
  for path in sorted((ROOT / 'research').rglob('*.py')):
    if path.name == 'build.py':
      continue
    text = path.read_text(encoding='utf-8')
    binds = 'parallelism import sharding' in text and 'transformer' in text
    assert not binds, path


def test_a_wrong_arrow_is_seen():
  assert imported_rooms('from research.build import build') == {'research'}
