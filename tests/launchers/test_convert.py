"""Checkpoints in and out from the command line: import, texts, training on, export."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from models import transformer
from models.interop.checkpoint import HfCheckpoint
from research import config as config_lib
from research.data import tokenizers
from research.data.microworld import WORDS
from research.data.tokenizers import word_tokenizer
from research.dynamics import conversion
from research.dynamics.audit_location import audit_location
from research.dynamics.conversion import export_run, find_source, import_run
from research.errors import UserError
from research.monitors import table
from research.run_dir import RunDir
from research.training.snapshots import SnapshotReader
from research.training.start import find_parent
from research.training.stored import INVENTORY, DamagedError
from tests.launchers.test_launchers import launch
from tests.models import hf_cases
from tests.models.hf_running import (
    PYTHON, as_tree, layer_by_layer, run_witness, transformers_python)

REVISION = 'stage1-step300-tokens2B'
TRAIN = {'n_steps': 3, 'checkpoints.every': 3, 'checkpoints.snapshot_every': 3,
         'monitors.suite': 'none', 'evals.every': 0, 'logging.tensorboard': 'false'}


@pytest.fixture(scope='module')
def series(tmp_path_factory) -> pathlib.Path:
  """A folder of one revision of a tiny Llama that speaks the micro-world's words."""
  folder = tmp_path_factory.mktemp('convert') / 'series'
  hf = hf_cases.config_json('llama-llama3-tied') | {'vocab_size': 2048}
  hf_cases.write(folder / REVISION, hf)
  word_tokenizer(WORDS).save(folder / REVISION / 'tokenizer.json')
  return folder


@pytest.fixture(scope='module')
def run_dir(series) -> RunDir:
  """The revision imported from the command line."""
  path = series.parent / 'imported'
  result = launch('convert', f'--source={series}', f'--revision={REVISION}', f'--run_dir={path}')
  assert result.returncode == 0, result.stderr
  assert 'step 300' in result.stdout
  return RunDir(path)


def test_an_imported_run_has_the_parameters_and_their_origin(series, run_dir):
  checkpoint = HfCheckpoint(series / REVISION)
  reader = SnapshotReader(run_dir.snapshots)
  assert reader.steps == [300]
  for leaf in checkpoint.rows:
    np.testing.assert_array_equal(reader.leaf(300, leaf).read().result(), checkpoint.read(leaf))
  assert audit_location(str(run_dir.path))[0] == []
  manifest = json.loads(run_dir.manifest_json.read_text())
  assert manifest['imported']['source'] == f'{series}@{REVISION}'
  assert config_lib.from_json(run_dir.config_json.read_text()).model == checkpoint.config


def test_an_import_again_says_so_and_another_source_is_refused(series, run_dir, tmp_path, capsys):
  import_run(find_source(str(series), REVISION), run_dir)
  assert 'imported already' in capsys.readouterr().out
  shutil.copytree(series / REVISION, tmp_path / 'other')
  with pytest.raises(UserError, match='holds another run'):
    import_run(find_source(str(tmp_path / 'other')), run_dir)


def test_an_import_again_scores_new_items_and_lists_files(series, run_dir, tmp_path, capsys):
  copy = RunDir(shutil.copytree(run_dir.path, tmp_path / 'copy'))
  row = {'item_id': 'i', 'family': 'flipped', 'dataset': 'd', 'seed': 0, 'variant': '',
         'prompt': f'{WORDS[5]} {WORDS[6]}', 'generalizing': f' {WORDS[7]}',
         'shortcut': f' {WORDS[8]}', 'is_control': False}
  (tmp_path / 'items.jsonl').write_text(json.dumps(row) + '\n')
  suite = [('monitors.suite', str(tmp_path / 'items.jsonl'))]
  source = find_source(str(series), REVISION)
  import_run(source, copy, suite)
  assert 'scored now' in capsys.readouterr().out
  assert table.score_steps(copy.monitor_scores) == [300]
  import_run(source, copy, suite)
  assert capsys.readouterr().out.startswith('imported already: ')
  with pytest.raises(UserError, match='was made with checkpoints.snapshot_dtype='):
    import_run(source, copy, [('checkpoints.snapshot_dtype', 'bfloat16')])
  inventory = copy.checkpoints / '300' / INVENTORY
  before = inventory.read_bytes()
  inventory.unlink()  # As where it was killed after saving.
  copy.done.unlink()
  import_run(source, copy, suite)
  assert inventory.read_bytes() == before


def test_an_export_compares_hashes_and_can_be_repeated(run_dir, tmp_path, monkeypatch):
  copy = RunDir(shutil.copytree(run_dir.path, tmp_path / 'copy'))
  whole = conversion.write_folder
  monkeypatch.setattr(conversion, 'write_folder', lambda folder, hf, tensors: whole(
      folder, hf, (pair for i, pair in enumerate(tensors) if i < 3 or 1 // 0), shard_bytes=1))
  with pytest.raises(ZeroDivisionError):
    export_run(copy, tmp_path / 'out')
  assert not (tmp_path / 'out').exists() and len(list(tmp_path.rglob('part-*'))) > 1
  monkeypatch.undo()
  (tmp_path / 'out').mkdir()
  assert export_run(copy, tmp_path / 'out') == 300
  assert sorted(path.name for path in tmp_path.iterdir()) == ['copy', 'out']
  assert HfCheckpoint(tmp_path / 'out').dtypes == {'float32'}
  with pytest.raises(UserError, match='is not empty'):
    export_run(copy, tmp_path / 'out')
  chunk = SnapshotReader(copy.snapshots).file_of(300, 'blocks.mlp.up')
  content = bytearray(chunk.read_bytes())
  content[len(content) // 2] ^= 1
  chunk.write_bytes(content)
  with pytest.raises(DamagedError, match='blocks.mlp.up'):
    export_run(copy, tmp_path / 'damaged')
  assert not (tmp_path / 'damaged').exists()


@pytest.mark.slow
def test_texts_are_written_with_an_imported_model(run_dir):
  result = launch('sample', f'--run_dir={run_dir.path}', '--prompt=the soup was', '--json',
                  '--max_tokens=4', '--temperature=0')
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)['step'] == 300


@pytest.fixture(scope='module')
def trained(series, run_dir) -> RunDir:
  """A run that starts from the imported parameters."""
  path = series.parent / 'trained'
  model = config_lib.from_json(run_dir.config_json.read_text()).model
  shape = {f'model.{row.path}': row.value for row in config_lib.settings(model)
           if row.kind == 'identity' and row.value is not None}
  arguments = {**TRAIN, **shape, 'start.run_dir': run_dir.path}
  result = launch('pretrain', '--experiment=quickstart', f'--run_dir={path}', *[
      f'--config.{name}={",".join(value) if isinstance(value, tuple) else value}'
      for name, value in arguments.items()])
  assert result.returncode == 0, result.stderr
  return RunDir(path)


@pytest.mark.slow
def test_training_goes_on_from_an_imported_run_and_its_export_has_those_bits(
    run_dir, trained, tmp_path):
  first, last = (SnapshotReader(trained.snapshots).leaf(step, 'blocks.mlp.up').read().result()
                 for step in (0, 3))
  np.testing.assert_array_equal(
      first, SnapshotReader(run_dir.snapshots).leaf(300, 'blocks.mlp.up').read().result())
  assert np.abs(last - first).max() > 1e-5
  result = launch('convert', f'--run_dir={trained.path}', '--to=huggingface',
                  f'--out={tmp_path / "out"}')
  assert result.returncode == 0, result.stderr
  exported = HfCheckpoint(tmp_path / 'out')
  np.testing.assert_array_equal(exported.read('blocks.mlp.up'), last)
  assert exported.family.model_type == 'llama'
  shutil.rmtree(trained.snapshots)  # Without snapshots the full checkpoint is exported.
  assert export_run(trained, tmp_path / 'again') == 3
  ours, again = (load_file(tmp_path / n / 'model.safetensors') for n in ('out', 'again'))
  assert all(ours[name].tobytes() == again[name].tobytes() for name in ours)
  tokenizer = tokenizers.load(tmp_path / 'out' / 'tokenizer.json')
  assert tokenizer.hash == tokenizers.load(trained.tokenizer_json).hash


LOAD = '''
import sys, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer('the soup was').input_ids)
'''


@pytest.mark.slow
@pytest.mark.skipif(transformers_python() is None,
                    reason=f'{PYTHON} names no interpreter with transformers')
def test_transformers_loads_a_trained_run_and_gives_its_logits(trained, tmp_path):
  export_run(trained, tmp_path / 'runs' / 'trained')
  run_witness(tmp_path / 'runs', transformers_python())
  checkpoint = HfCheckpoint(tmp_path / 'runs' / 'trained')
  params = as_tree(checkpoint.config, checkpoint.read)
  logits_BLV, _ = layer_by_layer(
      transformer.build(checkpoint.config), params, hf_cases.tokens_BL())
  theirs = np.load(tmp_path / 'runs' / 'trained' / 'witness.npz')['logits']
  error = np.abs(logits_BLV - theirs).max()
  print('logits after training:', error)
  assert error < 1e-4
  result = subprocess.run(
      [transformers_python(), '-c', LOAD, str(tmp_path / 'runs' / 'trained')], text=True,
      capture_output=True, check=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
  assert json.loads(result.stdout) == tokenizers.load(trained.tokenizer_json).encode('the soup was')


def test_bad_input_is_one_sentence_on_the_command_line(series, tmp_path):
  result = launch('convert', f'--run_dir={tmp_path}/run', f'--source={series}')
  assert result.returncode == 2, result.stdout + result.stderr
  assert result.stderr == f"error: --revision='': {series} has {REVISION}\n"
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('call, words', [
    (lambda series, run: export_run(run, run.path / 'out'), 'is not a run directory'),
    (lambda series, run: find_source(str(run.path / 'absent')), 'is neither a folder that exists'),
    (lambda series, run: find_source(str(series / REVISION), 'step1'), 'is one checkpoint'),
    (lambda series, run: import_run(find_source(str(series / REVISION)), run,
                                    [('model.d_ff', '64')]), 'parameter blocks.mlp.down is'),
    (lambda series, run: import_run(find_source(str(series / REVISION)), run,
                                    [('model.dropout', '2')]), 'dropout'),
    (lambda series, run: import_run(find_source(str(series / REVISION)), run,
                                    [('mesh.data', '99')]), 'needs 99 devices'),
    (lambda series, run: import_run(find_source(str(series / REVISION)), run,
                                    [('monitors.suite', 'none.jsonl')]), 'none.jsonl'),
])
def test_bad_input_is_one_sentence_before_anything_is_written(series, tmp_path, call, words):
  with pytest.raises(UserError) as error:
    call(series, RunDir(tmp_path / 'run'))
  assert words in str(error.value) and '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_an_export_names_the_steps_there_are(run_dir, tmp_path):
  with pytest.raises(UserError, match=r'--step=7: .* snapshots of steps \[300\]'):
    export_run(run_dir, tmp_path / 'out', 7)


def test_an_imported_run_has_no_optimizer_state_to_start_from(run_dir):
  config = config_lib.from_json(run_dir.config_json.read_text())
  start = dataclasses.replace(config.start, run_dir=str(run_dir.path), optimizer=True)
  config = dataclasses.replace(config, start=start)
  with pytest.raises(UserError, match='which has no optimizer state'):
    find_parent(config, tokenizers.load(run_dir.tokenizer_json))
