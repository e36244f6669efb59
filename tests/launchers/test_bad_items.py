"""Items that cannot be scored, from the command line: all listed by id, the scored set stated."""

import json

import pytest

from research.monitors import table
from research.run_dir import RunDir
from tests.launchers.test_launchers import launch
from tests.research.conftest import SHORT
from tests.research.test_bad_items import reasons, write_bad_items

SETTINGS = SHORT | {'n_steps': '2', 'checkpoints.every': '2', 'checkpoints.snapshot_every': '2'}


def pretrained(run_dir: RunDir, **more: str):
  """Trains two steps with the items as monitors."""
  items = write_bad_items(run_dir.path.with_name('items.jsonl'))
  settings = SETTINGS | {'monitors.suite': str(items), **more}
  return launch('pretrain', f'--run_dir={run_dir.path}', *[
      f'--config.{name}={value}' for name, value in settings.items()])


def listed(lines: list[str]) -> dict[str, str]:
  """Returns the reason of every item id in lines of 'reason: ids'."""
  found = {}
  for line in lines:
    reason, _, ids = line.rpartition(': ')
    found |= dict.fromkeys(ids.split(', '), reason)
  return found


def same(found: dict[str, str]) -> bool:
  """Returns whether these are all bad items with their reasons."""
  return found.keys() == reasons().keys() and all(
      found[item_id].startswith(reason) for item_id, reason in reasons().items())


def test_they_are_refused_before_anything_is_written(tmp_path):
  result = pretrained(RunDir(tmp_path / 'run'))
  assert result.returncode == 2, result.stderr
  first, *lines, last = result.stderr.strip().splitlines()
  assert first == 'error: 9 of 11 monitor items cannot be scored:'
  assert same(listed([line.removeprefix('  ') for line in lines]))
  assert last == ('correct them, or score the others with '
                  '--config.monitors.bad_items=leave_out')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_they_are_left_out_by_choice_and_the_run_says_what_it_scores(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  run_dir = RunDir(tmp_path / 'run')
  result = pretrained(run_dir, **{'monitors.bad_items': 'leave_out'})
  assert result.returncode == 0, result.stderr
  said = [line for line in result.stdout.splitlines() if line.startswith('monitors: ')]
  assert said[0] == 'monitors: 2 of 11 items are scored: f/d 2'
  left_out = 'monitors: left out, '
  assert same(listed([line.removeprefix(left_out) for line in said if line.startswith(left_out)]))
  rows = [json.loads(line) for line in run_dir.monitors_left_out.read_text().splitlines()]
  assert same({row['item_id']: row['reason'] for row in rows}) and len(rows) == 9
  assert any(line.endswith(str(run_dir.monitors_left_out)) for line in said)
  assert [item.item_id for item in table.read_item_table(run_dir.monitor_items)] == ['good', 'too']
  for step in (0, 2):
    _, scores = table.read_scores(run_dir.monitor_scores / table.scores_name(step))
    assert scores.logp_generalizing.shape == (2,)
