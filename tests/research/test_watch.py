"""Monitors of a run whose items change, and change again: no score is lost."""

import dataclasses

import numpy as np
import pytest

from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.data.microworld.words import WORDS
from research.monitors import table
from research.monitors.items import LeftOut, MonitorItem
from research.monitors.scoring import Scores
from research.monitors.suite import Suite
from research.monitors.watch import Watch
from research.run_dir import RunDir
from tests.research.conftest import short_config

WORD = tokenizers.word_tokenizer(WORDS)


def suite(answer: str) -> Suite:
  """Returns one item that is scored and one that is not."""
  item = MonitorItem(f'item{answer}', 'f', 'd', 0, 'v', '3 + 4 =', ' 7', answer)
  return Suite([item], [LeftOut(f'out{answer}', 'prompt is empty')], [])


def test_items_that_change_twice_at_one_step_leave_two_folders(tmp_path, capsys):
  config = dataclasses.replace(short_config(), mesh=MeshConfig(data=1))
  mesh = make_mesh(config.mesh)
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))
  run_dir, answers = RunDir(tmp_path), (' 1', ' 2', ' 3')
  for number, answer in enumerate(answers):
    Watch(config, suite(answer), WORD, None, built, run_dir, kept=5)
    scores = Scores(np.float32([number]), np.float32([-number]))
    table.write_scores(run_dir.monitor_scores, 5, scores)
    for path in (run_dir.hops_json, run_dir.states_parquet, run_dir.captures_json):
      path.write_text(f'said of {answer}')
  kept = ['monitors-until-00000005', 'monitors-until-00000005-2']
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ['monitors', *kept]
  said = capsys.readouterr().out
  assert all(f'earlier scores are kept in {tmp_path / name}\n' in said for name in kept)
  for number, (name, answer) in enumerate(zip([*kept, 'monitors'], answers)):
    folder = tmp_path / name
    item, = table.read_item_table(folder / 'items.parquet')
    assert item.shortcut == answer
    assert f'"out{answer}"' in (folder / 'left_out.jsonl').read_text()
    step, scores = table.read_scores(folder / 'scores' / table.scores_name(5))
    assert (step, scores.logp_generalizing) == (5, pytest.approx([number]))
    beside = folder if name in kept else tmp_path
    for file in ('hops.json', 'states.parquet', 'captures.json'):
      assert (beside / file).read_text() == f'said of {answer}'

  Watch(config, suite(' 3'), WORD, None, built, run_dir, kept=5)  # The same items: nothing moves.
  assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3
  assert table.score_steps(run_dir.monitor_scores) == [5]
