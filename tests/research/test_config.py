"""The config tree: every setting declared once with kind and meaning, overrides, identity."""

import dataclasses
import json

import pytest

from models.config import ModelConfig, RopeConfig
from research import config as config_lib
from research import overrides
from research.config import ExperimentConfig
from research.data.config import DataConfig, TextConfig
from research.errors import UserError


def test_every_setting_says_what_it_means_and_of_which_kind_it_is():
  rows = config_lib.settings(ExperimentConfig())
  assert len(rows) > 80
  for row in rows:
    assert row.doc, f'{row.path} has no description'
    assert row.kind in ('identity', 'placement'), row
  kinds = {row.path: row.kind for row in rows}
  assert kinds['optimizer.peak_lr'] == kinds['data.batch_size'] == kinds['seed'] == 'identity'
  assert kinds['mesh.data'] == kinds['checkpoints.snapshot_every'] == 'placement'
  assert kinds['model.remat'] == 'placement' and kinds['model.n_layers'] == 'identity'


@pytest.mark.parametrize('path, text, value', [
    ('model.n_layers', '7', 7), ('optimizer.peak_lr', '3e-4', 3e-4), ('model.qkv_bias', 'true', True),
    ('model.layer_pattern', 'sliding,full', ('sliding', 'full')),
    ('model.rope.attention_factor', '1.5', 1.5), ('model.rope.attention_factor', 'none', None),
    ('model.moe.n_experts', '8', 8), ('data.text.weights', '(1,2)', (1.0, 2.0)),
    ('data.text.schedule', '((0,1,2),)', ((0.0, 1.0, 2.0),)), ('data.text.paths', 'a.txt', ('a.txt',)),
])
def test_override_reads_the_fields_type(path, text, value):
  over = [(path, text)]
  if path.startswith('data.text') and not path.endswith('paths'):
    over.append(('data.text.paths', 'a.txt,b.txt'))
  config = overrides.apply(ExperimentConfig(), over)
  got = config
  for key in path.split('.'):
    got = getattr(got, key)
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize('path, text, words', [
    ('model.n_layer', '4', 'the nearest is --config.model.n_layers'),
    ('optimizer.lr', '1', 'the nearest is --config.optimizer.'),
    ('model.n_layers', 'four', 'expected int'),
    ('model.qkv_bias', 'maybe', 'expected bool'),
    ('mesh.data', '1.5', 'expected int'),
])
def test_bad_override_is_one_sentence(path, text, words):
  with pytest.raises(UserError, match=words.replace('.', r'\.')) as error:
    overrides.apply(ExperimentConfig(), [(path, text)])
  assert '\n' not in str(error.value)


def test_cross_field_checks_see_the_final_values_only():
  # 6 heads alone contradict 4 kv heads; together with 3 kv heads they are fine.
  with pytest.raises(ValueError, match='n_kv_heads'):
    overrides.apply(ExperimentConfig(), [('model.n_heads', '6')])
  both = [('model.n_heads', '6'), ('model.n_kv_heads', '3')]
  assert overrides.apply(ExperimentConfig(), both).model.n_heads == 6


def test_sequence_longer_than_the_context_is_refused():
  with pytest.raises(ValueError, match='data.sequence_length=512 is longer than model.context_le'):
    overrides.apply(ExperimentConfig(), [('data.sequence_length', '512')])


def test_differences_name_changed_settings():
  saved = json.loads(config_lib.as_json(ExperimentConfig()))
  assert config_lib.differences(saved, ExperimentConfig()) == []
  changed = dataclasses.replace(ExperimentConfig(), seed=5)
  (row, old), = config_lib.differences(saved, changed)
  assert (row.path, row.value, old, row.kind) == ('seed', 5, 0, 'identity')


def test_flat_text_has_one_line_per_setting():
  text = config_lib.as_text(ExperimentConfig())
  assert len(text.splitlines()) == len(config_lib.settings(ExperimentConfig()))
  assert "optimizer.name = 'adamw'" in text.splitlines()


def test_json_round_trip_with_nested_optionals_and_tuples():
  rope = RopeConfig(theta=1e6, scaling='yarn', factor=8.0)
  config = ExperimentConfig(
      model=ModelConfig(sliding_rope=rope, layer_pattern=('sliding', 'full')),
      data=DataConfig(kind='text', text=TextConfig(paths=('a', 'b'), schedule=((0., 1., 2.),))))
  assert config_lib.from_json(config_lib.as_json(config)) == config
