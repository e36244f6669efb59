"""A finished run whose command is repeated with other monitor items."""

import json

import numpy as np

from research import config as config_lib
from research.monitors import table
from research.monitors.items import write_items
from research.monitors.microworld_items import microworld_items
from research.training.loop import train
from tests.research.conftest import short_config


def test_stored_snapshots_are_scored_with_other_items(short_run, tmp_path, capsys):
  config = config_lib.from_json(short_run.config_json.read_text())
  both = [item for item in microworld_items(config.data.microworld, 64)
          if item.dataset in ('successive', 'flipped') and item.seed == 0]
  flipped = [item for item in both if item.dataset == 'flipped']
  for name, items in (('both', both), ('flipped', flipped)):
    write_items(items, tmp_path / f'{name}.jsonl')
  rows = short_run.metrics_jsonl.read_bytes()
  trained = json.loads(short_run.manifest_json.read_text())

  def again(name: str) -> str:
    train(short_config(**{'monitors.suite': str(tmp_path / f'{name}.jsonl')}), short_run)
    return capsys.readouterr().out

  said = again('both')
  assert '[31/31] of the stored snapshots' in said and 'finished already' in said
  assert short_run.metrics_jsonl.read_bytes() == rows  # No step is made again.
  assert table.read_item_table(short_run.monitor_items) == both
  assert table.score_steps(short_run.monitor_scores) == list(range(31))
  manifest = json.loads(short_run.manifest_json.read_text())
  (event,) = manifest.pop('monitored_again')
  assert event['changes']['monitors.suite'] == ['none', str(tmp_path / 'both.jsonl')]
  assert manifest == trained  # Replays go by what it says of training.
  saved = config_lib.from_json(short_run.config_json.read_text())
  assert saved.monitors.suite == str(tmp_path / 'both.jsonl')
  assert 'Flipped' in short_run.report_html.read_text(encoding='utf-8')

  path = short_run.monitor_scores / table.scores_name(7)
  whole = path.read_bytes()
  path.unlink()  # as if it had been interrupted
  assert '[1/1] of the stored snapshots' in again('both') and path.read_bytes() == whole
  assert 'stored snapshots' not in again('both')

  assert 'earlier scores are kept in' in again('flipped')
  (aside,) = short_run.path.glob('monitors-until-*')
  assert (aside / 'scores' / table.scores_name(7)).read_bytes() == whole
  for step in (0, 30):
    old = table.read_scores(aside / 'scores' / table.scores_name(step))[1]
    new = table.read_scores(short_run.monitor_scores / table.scores_name(step))[1]
    kept = [i for i, item in enumerate(both) if item in flipped]
    # Other shapes are padded otherwise; float32 sums of some tokens differ by rounding.
    for a, b in zip(new, old, strict=True):
      np.testing.assert_allclose(a, b[kept], atol=1e-5)
