"""A public series of 40 revisions, with faults, audited and monitored by one command each."""

import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
import tokenizers

from models import transformer
from models.interop.checkpoint import HfCheckpoint, leaf_shapes
from research.dynamics import monitoring
from research.dynamics import pieces
from research.dynamics.audit_location import audit_location
from research.dynamics.public import UnusableError
from research.dynamics.public_trajectory import PublicTrajectory, counted_through
from research.dynamics.revisions import parse
from research.dynamics.trajectory import open_trajectory
from research.errors import UserError
from research.run_dir import RunDir
from tests.models import hf_cases

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPIES = {'step1300': 'step300', 'step2700': 'step2000'}  # under the name -> what lies there
TORN, SHARDS = 'step1900', ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')


def write_revision(folder: pathlib.Path, hf: dict, tensors: dict[str, np.ndarray]) -> None:
  folder.mkdir()
  names = sorted(tensors)
  weight_map = {name: SHARDS[i % 2] for i, name in enumerate(names)}
  for shard in SHARDS:
    save_file({name: tensors[name] for name in names if weight_map[name] == shard},
              folder / shard, metadata={'format': 'pt'})
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  (folder / 'config.json').write_text(json.dumps(hf))
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f'w{i}': i for i in range(60)}))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  words.save(str(folder / 'tokenizer.json'))


def write_items(path: pathlib.Path) -> None:
  rng = np.random.default_rng(5)
  rows = []
  for number in range(24):
    prompt = ' '.join(f'w{i}' for i in rng.integers(0, 60, 6))
    good, short = rng.choice(60, 2, replace=False)
    rows.append({'item_id': f'i{number}', 'family': 'flipped', 'dataset': f'd{number % 3}',
                 'seed': number % 4, 'variant': '', 'prompt': prompt, 'generalizing': f' w{good}',
                 'shortcut': f' w{short}', 'is_control': number % 3 == 0})
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='module')
def series(tmp_path_factory) -> pathlib.Path:
  """A random walk of 40 revisions, step100 to step4000."""
  folder = tmp_path_factory.mktemp('series') / 'theirs'
  folder.mkdir()
  hf, rng = hf_cases.config_json('llama-default-untied'), np.random.default_rng(0)
  tensors = hf_cases.tensors(hf)
  for step in range(100, 4100, 100):
    tensors = {name: x + 0.05 * rng.standard_normal(x.shape, np.float32)
               for name, x in tensors.items()}
    if f'step{step}' not in COPIES:
      write_revision(folder / f'step{step}', hf, tensors)
  for name, original in COPIES.items():
    shutil.copytree(folder / original, folder / name)
  (folder / TORN / SHARDS[1]).unlink()
  write_items(folder.parent / 'items.jsonl')
  return folder


def launch(launcher: str, *arguments) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', f'launchers.{launcher}', *map(str, arguments)],
                        cwd=ROOT, capture_output=True, text=True, check=False)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in folder.rglob('*') if path.is_file()}


def killed_after(n_rows: int, command: tuple[str, ...], run_dir: pathlib.Path) -> dict[str, bytes]:
  """Kills a command once so many revisions are done; returns the scores of those that are."""
  rows = run_dir / 'metrics.jsonl'
  with subprocess.Popen([sys.executable, '-m', f'launchers.{command[0]}', *map(str, command[1:])],
                        cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if line.startswith(f'[{n_rows}/'):
        process.kill()
  steps = [json.loads(row)['step'] for row in rows.read_text().splitlines()]
  assert n_rows <= len(steps) < 37
  names = [f'monitors/scores/step-{step:08d}.parquet' for step in steps]
  return {name: (run_dir / name).read_bytes() for name in names}


def test_audit_names_copies_and_the_missing_shard(series):
  findings, histories = audit_location(str(series))
  assert [(f.kind, f.step, f.file) for f in findings if f.kind in ('duplicate', 'damaged')] == [
      ('duplicate', 1300, str(series / 'step1300')),
      ('damaged', 1900, str(series / TORN / SHARDS[1])),
      ('duplicate', 2700, str(series / 'step2700'))]
  assert [finding.problem for finding in findings if finding.kind == 'duplicate'] == [
      'has all the tensors of step 300', 'has all the tensors of step 2000']
  assert {len(followed.steps) for followed in histories.values()} == {39}


def test_most_revisions_may_be_copies_and_are_left_out_with_all_that_is_no_model(series, tmp_path):
  """Nine of sixteen are the same, as where names of revisions lead to one; one is not a number."""
  folder = tmp_path / 'few'
  for step in range(100, 1700, 100):
    source = 500 if 700 <= step < 1500 else step
    shutil.copytree(series / f'step{source}', folder / f'step{step}')
  shard = folder / 'step200' / SHARDS[0]
  tensors = load_file(shard)
  name = sorted(tensors)[0]
  tensors[name] = tensors[name].copy()
  tensors[name].reshape(-1)[0] = np.nan
  save_file(tensors, shard, metadata={'format': 'pt'})
  said = []
  plan = monitoring._audited(open_trajectory(folder), said.append)
  assert plan.left_out.keys() == {'step200', *(f'step{step}' for step in range(700, 1500, 100))}
  assert plan.left_out['step200'].startswith('nonfinite')
  assert plan.left_out['step900'].startswith('duplicate: is one of 9 checkpoints')


def test_series_opens_as_a_trajectory(series):
  trajectory = open_trajectory(series)
  assert trajectory.steps == list(range(100, 4100, 100))
  hf = hf_cases.config_json('llama-default-untied')
  stored = trajectory.leaf(100, 'final_norm.scale')
  assert stored.shape == (hf['hidden_size'],) and stored.dtype == np.float32
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = trajectory.params(100, jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
      transformer.abstract_params(trajectory.config.model)))
  shards = [load_file(series / 'step100' / shard) for shard in SHARDS]
  theirs, = (shard['model.norm.weight'] for shard in shards if 'model.norm.weight' in shard)
  for ours in (stored, trajectory.params(100)['final_norm.scale'], placed['final_norm']['scale']):
    assert np.array_equal(ours, theirs)
  through_TD = trajectory.leaf_through_time('final_norm.scale', [100, 300, 1300])
  assert np.array_equal(through_TD[0], stored) and np.array_equal(through_TD[1], through_TD[2])
  with pytest.raises(UnusableError, match=SHARDS[1]):
    trajectory.leaf(1900, 'final_norm.scale')
  fewer = open_trajectory(f'{series}@step1?00')
  assert fewer.steps == list(range(1000, 2000, 100)) and not fewer.scores().num_columns


def test_truncated_files_and_other_models_are_findings(series, tmp_path):
  folder = tmp_path / 'few'
  for step in range(100, 600, 100):
    shutil.copytree(series / f'step{step}', folder / f'step{step}')
  shard = folder / 'step200' / SHARDS[0]
  shard.write_bytes(shard.read_bytes()[:-1])
  path = folder / 'step400' / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'rms_norm_eps': 1e-3}))
  findings, histories = audit_location(str(folder))
  assert [(f.kind, f.step, f.file) for f in findings] == [
      ('damaged', 200, str(shard)), ('config', 400, str(path))]
  assert 'norm_eps=0.001; most revisions have 1e-' in findings[1].problem
  assert {tuple(followed.steps) for followed in histories.values()} == {(100, 300, 500)}


def test_the_dtype_of_computation_makes_no_other_model(series, tmp_path):
  for step in (100, 200, 300, 400):
    shutil.copytree(series / f'step{step}', tmp_path / f'step{step}')
  for step, more in ((200, {'dtype': 'bfloat16'}), (300, {'max_position_embeddings': 256})):
    path = tmp_path / f'step{step}' / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
  findings, histories = audit_location(str(tmp_path))
  assert [(f.kind, f.step) for f in findings if f.kind == 'config'] == [('config', 300)]
  problem = findings[0].problem
  assert 'context_length=256; most revisions have ' in problem and "such as 'stage2-*'" in problem
  assert {tuple(followed.steps) for followed in histories.values()} == {(100, 200, 400)}
  trajectory = open_trajectory(str(tmp_path))
  assert trajectory.config.model.compute_dtype == 'float32'
  assert monitoring._audited(trajectory, print).left_out.keys() == {'step300'}


def test_steps_are_counted_through_stages():
  names = ['stage1-step10-tokens1B', 'stage1-step20-tokens2B', 'stage2-step0-tokens0B',
           'stage2-step5-tokens1B', 'stage3-step5-tokens1B']
  assert counted_through([parse(name) for name in names]) == [
      (10, 10**9), (20, 2 * 10**9), (21, 2 * 10**9), (26, 3 * 10**9), (31, 4 * 10**9)]
  assert counted_through([parse('step7'), parse('stage2-step3')]) == [(7, None), (10, None)]


def test_an_audit_reads_pieces_and_sees_layers_that_changed_places(
    series, tmp_path, monkeypatch):
  folder = copied(series, tmp_path / 'few')
  names = [f'model.layers.{i}.self_attn.o_proj.weight' for i in (0, 1)]
  held = {path: load_file(path) for path in (folder / 'step800' / shard for shard in SHARDS)}
  first, second = (next(path for path in held if name in held[path]) for name in names)
  a, b = held[first][names[0]], held[second][names[1]]
  held[first][names[0]], held[second][names[1]] = b, a
  for path, tensors in held.items():
    save_file(tensors, path, metadata={'format': 'pt'})
  monkeypatch.setattr(pieces, 'PIECE_ELEMENTS', 1000)
  sizes, read = [], HfCheckpoint.read
  monkeypatch.setattr(HfCheckpoint, 'read', lambda self, leaf, box=None: (
      sizes.append(math.prod(stop - start for start, stop in box)) or read(self, leaf, box)))
  findings, histories = audit_location(str(folder))
  assert max(sizes) <= 1000
  swapped = [finding for finding in findings if finding.kind == 'swapped']
  assert {(f.step, f.file, f.tensor.partition('[')[0]) for f in swapped} == {
      (800, str(first), 'blocks.attention.o')}
  assert all(f.tensor.startswith('blocks.attention.o[0') and
             f'holds blocks.attention.o[1{f.tensor.partition("[0")[2]}, and {second}' in f.problem
             for f in swapped)
  elements = sum(math.prod(shape) for shape in leaf_shapes(open_trajectory(folder).model).values())
  assert sum(sizes[:5 * len(histories)]) == 5 * elements  # Every element once per revision.


def copied(series: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder with the first five revisions of the series."""
  for step in range(600, 1100, 100):
    shutil.copytree(series / f'step{step}', folder / f'step{step}')
  return folder


def test_repeating_the_command_loses_no_scores_and_sees_what_changed(series, tmp_path, capsys):
  folder, run_dir = copied(series, tmp_path / 'few'), RunDir(tmp_path / 'run')
  suite = [('monitors.suite', str(series.parent / 'items.jsonl'))]
  commits = {}

  def monitored() -> str:
    trajectory = PublicTrajectory(str(folder))
    trajectory.commits = lambda: dict(commits)  # as a repository has them
    monitoring.monitor_series(trajectory, run_dir, suite)
    return capsys.readouterr().out
  assert '[5/5] step1000' in monitored() and 'monitored already' in monitored()

  (folder / 'step700').rename(tmp_path / 'step700')
  before = files_of(run_dir.path)
  with pytest.raises(UserError, match='no longer shows revision step700, of which'):
    monitored()
  assert {**files_of(run_dir.path), '.lock': b''} == {**before, '.lock': b''}
  (tmp_path / 'step700').rename(folder / 'step700')

  commits |= {f'step{step}': 'first' for step in range(600, 1100, 100)}
  monitored()
  commits['step900'] = 'uploaded again'
  said = monitored()
  assert '[1/2] step900' in said and '[2/2] step1000' in said and 'step800:' not in said

  # Killed before the last revision, which is then damaged: its size is as it was.
  run_dir.done.unlink()
  rows = run_dir.metrics_jsonl.read_text().splitlines(keepends=True)
  run_dir.metrics_jsonl.write_text(''.join(rows[:-1]))
  shard = folder / 'step1000' / SHARDS[0]
  shard.write_bytes(b'\xff' * shard.stat().st_size)
  with pytest.raises(UserError, match='repeat the command, which audits again'):
    monitored()
  assert 'left out: step1000, damaged' in monitored()
  assert open_trajectory(run_dir.path).scores()['step'].to_pylist()[-1] == 900


def test_items_that_cannot_be_scored_are_listed_before_weights_are_read(series, tmp_path):
  rows = [json.loads(line) for line in (series.parent / 'items.jsonl').read_text().splitlines()]
  rows[3]['prompt'], rows[7]['shortcut'] = '', rows[7]['generalizing']
  (tmp_path / 'items.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(UserError) as refused:
    monitoring.monitor_series(PublicTrajectory(str(series)), RunDir(tmp_path / 'run'),
                              [('monitors.suite', str(tmp_path / 'items.jsonl'))])
  lines = str(refused.value).splitlines()
  assert lines[0] == '2 of 24 monitor items cannot be scored:'
  assert lines[1] == '  prompt is empty: i3' and lines[2].endswith('must differ: i7')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_one_command_monitors_the_series(series, tmp_path):
  suite = f'--config.monitors.suite={series.parent / "items.jsonl"}'
  command = ('monitor', f'--source={series}', f'--run_dir={tmp_path / "theirs"}', suite)
  kept = killed_after(5, command, tmp_path / 'theirs')
  first = launch(*command)
  assert first.returncode == 0, first.stderr
  assert 'audited' not in first.stdout and kept.items() <= files_of(tmp_path / 'theirs').items()
  assert f'/{37 - len(kept)}] ' in first.stdout
  trajectory = open_trajectory(tmp_path / 'theirs')
  table = trajectory.scores()
  scored = sorted(set(table['step'].to_pylist()))
  assert scored == [s for s in range(100, 4100, 100) if s not in (1300, 1900, 2700)]
  assert len(scored) == 37 and table.num_rows == 37 * 24
  manifest = json.loads((tmp_path / 'theirs' / 'manifest.json').read_text())['series']
  assert sorted(manifest['left_out']) == ['step1300', TORN, 'step2700']
  assert SHARDS[1] in manifest['left_out'][TORN]
  assert '37 of 40' in (tmp_path / 'theirs' / 'report.html').read_text()
  assert not (tmp_path / 'theirs' / 'snapshots').exists()

  alone = launch('convert', f'--source={series}', '--revision=step2000',
                 f'--run_dir={tmp_path / "alone"}', suite)
  assert alone.returncode == 0, alone.stderr
  name = 'monitors/scores/step-00002000.parquet'
  assert pq.read_table(tmp_path / 'alone' / name).equals(pq.read_table(tmp_path / 'theirs' / name))

  before = files_of(tmp_path / 'theirs')
  again = launch(*command)
  assert again.returncode == 0 and 'monitored already' in again.stdout, again.stderr
  assert {k: v for k, v in files_of(tmp_path / 'theirs').items() if k != '.lock'} == {
      k: v for k, v in before.items() if k != '.lock'}
