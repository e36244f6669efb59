"""The preflight's command line, on a small experiment and eight TPUs that are not there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

ROOT = pathlib.Path(__file__).resolve().parents[2]
# 4,194,304 weights in layers, 2 x 524,288 in embeddings; shards of 128 lanes.
SMALL = ('--config.model.d_model=512', '--config.model.d_ff=1024', '--config.model.n_heads=4',
         '--config.model.n_kv_heads=2', '--config.model.d_head=128',
         '--config.model.vocab_size=1024', '--config.model.tie_embeddings=false',
         '--config.model.compute_dtype=bfloat16', '--config.model.remat=full',
         '--config.mesh.fsdp=4', '--config.mesh.tensor=2')


def launch(*arguments: str) -> subprocess.CompletedProcess:
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_PLATFORMS'}
  return subprocess.run([sys.executable, '-m', 'launchers.preflight', '--topology=v5e:2x4',
                         *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
                        env=environment)


def test_what_fits_is_told_and_written(tmp_path):
  path = tmp_path / 'preflight.json'
  result = launch(*SMALL, f'--json={path}')
  assert result.returncode == 0, result.stderr
  for words in ('mesh fsdp 4 x tensor 2', 'Memory of a device: fits', 'optimizer moments',
                'all-gather', 'waiting for network axis', 'MFU', 'tokens per day'):
    assert words in result.stdout, words
  found = json.loads(path.read_text())
  assert found['fits'] and found['mesh']['fsdp'] == 4 and found['host_transfers'] == 0
  memory = found['memory']
  # Per layer 2 x 512 x 128 x (4 + 2) of attention and 3 x 512 x 1024, two norms; of 8 devices
  # those norms, and the last, are split by fsdp alone. Two moments and the count of steps.
  matrices = 2 * (2 * 512 * 128 * 6 + 3 * 512 * 1024) + 2 * 1024 * 512
  assert memory['parameters'] == 4 * (matrices // 8 + 5 * 512 // 4)
  assert memory['moments'] == 2 * memory['parameters'] + 4
  assert memory['total'] == sum(memory[name] for name in (
      'parameters', 'moments', 'average', 'batch', 'padding', 'temporaries'))
  assert memory['left'] == memory['usable'] - memory['total'] > 0
  speed = found['speed']
  assert 0 < speed['mfu'] <= speed['mfu_ceiling'] <= 1
  assert 0 < speed['perfect_seconds'] <= speed['seconds']
  assert {row['kind'] for row in found['collectives']} >= {'all-gather', 'reduce-scatter'}


@pytest.mark.slow
def test_what_does_not_fit_ends_with_one_and_what_would():
  wide = ('--config.mesh.data=8', '--config.model.d_model=4096', '--config.model.d_ff=16384',
          '--config.model.n_layers=8', '--config.model.remat=full',
          '--config.model.scan_layers=scan', '--config.model.compute_dtype=bfloat16')
  result = launch(*wide)
  assert result.returncode == 1, result.stderr
  assert 'DOES NOT FIT' in result.stdout and 'RESOURCE_EXHAUSTED' in result.stdout
  nearest = next(line for line in result.stdout.splitlines() if line.startswith('The nearest'))
  changed = nearest.partition(': ')[2].split()
  again = launch(*wide, *changed)
  assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.parametrize('arguments, words', [
    (['--topology=v9:2x2'], "'v9:2x2' is not a TPU topology; such are"),
    (['--config.mesh.fsdp=3'], 'mesh.fsdp=3 does not divide the 8 devices at hand; the nearest '
     'that fits is mesh.fsdp=4'),
    (['--config.mesh.stage=8'], 'makes 8 places for model.n_layers=2; at most mesh.stage=2'),
    (['--config.data.batch_size=12'], 'data.batch_size=12 is not divided by mesh.data=8; 16 is'),
    (['--config.mesh.expert=8', '--config.model.moe.n_experts=12'],
     'model.moe.n_experts=12 does not split over mesh.expert=8'),
    (['--config.mesh.tensor=8'], 'is not divided by mesh.tensor=8; the nearest number of devices '
     'that divides it is 4'),
    (['--slices=3', '--config.mesh.data=2', '--config.mesh.fsdp=12'],
     'is not a multiple of the 3 slices'),
])
def test_bad_input_is_one_sentence(arguments, words):
  result = launch(*arguments)
  assert result.returncode == 2, result.stdout + result.stderr
  lines = result.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ') and words in lines[0], lines


@pytest.mark.slow
def test_a_step_of_decoding(tmp_path):
  path = tmp_path / 'decode.json'
  result = launch('--decode', f'--json={path}', *SMALL)
  assert result.returncode == 0, result.stderr
  found = json.loads(path.read_text())
  # Two layers of keys and values of 48 rows, 64 tokens, 2 heads of 128, 2 bytes, 8 devices.
  assert found['cache'] == 2 * 2 * 48 * 64 * 2 * 128 * 2 // 8 + 48 // 4 * 4
  assert found['fits'] and found['ceiling'] == pytest.approx(48 / found['seconds'])


@pytest.mark.slow
def test_meshes_are_ranked(tmp_path):
  path = tmp_path / 'search.json'
  result = launch('--search=3', f'--json={path}', *SMALL)
  assert result.returncode == 0, result.stderr
  assert len(result.stdout.splitlines()) == 4  # a header and three placements
  seconds = [candidate['seconds'] for candidate in json.loads(path.read_text())]
  assert seconds == sorted(seconds) and len(seconds) == 3


@pytest.mark.slow
def test_two_slices_have_bytes_but_no_time(tmp_path):
  path = tmp_path / 'slices.json'
  result = launch('--slices=2', '--full', f'--json={path}', *SMALL, '--config.mesh.data=2')
  assert result.returncode == 0, result.stderr
  found = json.loads(path.read_text())
  assert found['n_devices'] == 16 and found['code'] and found['speed'] is None
  assert 'Roofline' not in result.stdout
  assert any(row['axes'] == ['data'] and row['kind'] == 'all-reduce'
             for row in found['collectives'])
