"""Series of revisions: names, order, lazy reads, parameters on a mesh, a hub, and bad input."""

import json
import os
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from models import transformer
from parallelism import sharding
from parallelism.mesh import MeshConfig, make_mesh
from research.data import tokenizers
from research.dynamics.public import PublicSeries, open_tokenizer
from research.dynamics.public_trajectory import PublicTrajectory
from research.dynamics.revisions import Folder, chosen, parse
from research.errors import UserError
from research.training.streaming import PIECE_BYTES, pieces, place_streamed
from tests.models import hf_cases
from tests.research.hub_server import Hub

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ('stage1-step2000-tokens9B', 'stage1-step1000-tokens4.5B', 'stage2-step500-tokens1B',
         'main')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """Revisions of a tiny model, each with its own values."""
  folder = tmp_path_factory.mktemp('public') / 'series'
  for scale, name in enumerate(NAMES):
    hf = hf_cases.config_json('gpt_neox-default-untied') | {'vocab_size': 264}
    hf_cases.write(folder / name, hf | {'layer_norm_eps': 1e-5 * (scale + 1)})
    tokenizers.byte_tokenizer().save(folder / name / 'tokenizer.json')
  return folder


@pytest.mark.parametrize('name, expected', [
    ('step1000', (0, 1000, None)),
    ('stage1-step1000-tokens5B', (1, 1000, 5 * 10**9)),
    ('step143000-tokens2.5T', (0, 143000, 25 * 10**11)),
    ('stage2-ingredient3-step11931-tokens50B', (2, 11931, 50 * 10**9)),
    ('global_step50K', (0, 50000, None)),
    ('main', None), ('v1.0', None), ('footstep12', None)])
def test_steps_and_tokens_are_read_from_names(name, expected):
  revision = parse(name)
  assert (revision and (revision.stage, revision.step, revision.tokens)) == expected


def test_a_series_is_in_order_and_read_lazily(folder):
  series = PublicSeries(str(folder))
  assert series.names == [NAMES[1], NAMES[0], NAMES[2]]
  assert [(revision.step, revision.tokens) for revision in series.revisions] == [
      (1000, 4_500_000_000), (2000, 9_000_000_000), (500, 1_000_000_000)]
  assert PublicSeries(str(folder), 'stage1-*').names == [NAMES[1], NAMES[0]]
  assert series.config(NAMES[0]).norm_eps == pytest.approx(1e-5)
  assert open_tokenizer(series.folder(NAMES[0]), series.config(NAMES[0])).vocab_size == 259
  checkpoint = series.checkpoint(NAMES[0])
  k_NDHE = checkpoint.read('blocks.attention.k')
  box = ((1, 2), (3, 9), (0, 2), (4, 8))
  np.testing.assert_array_equal(
      checkpoint.read('blocks.attention.k', box), k_NDHE[1:2, 3:9, :, 4:8])
  with pytest.raises(UserError, match="no tensor 'blocks.attention.x'; it has"):
    PublicTrajectory(str(folder)).leaf(1000, 'blocks.attention.x')


def test_parameters_lie_on_eight_devices_as_the_table_says(folder):
  series = PublicSeries(str(folder))
  config = series.config(NAMES[2])
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  abstract = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      transformer.abstract_params(config),
      sharding.parameter_shardings(mesh, transformer.logical_axes(config)))
  seen = []
  checkpoint = series.checkpoint(NAMES[2])
  params = place_streamed(checkpoint.read, abstract, seen.append)
  for path, leaf in jax.tree.leaves_with_path(params):
    name = sharding.path_name(path)
    np.testing.assert_array_equal(leaf, checkpoint.read(name), err_msg=name)
    assert seen.pop(0) == name
  q = params['blocks']['attention']['q']
  assert q.sharding.shard_shape(q.shape) == (2, 16, 1, 16)


def test_pieces_make_up_their_box_within_the_limit():
  box = ((2, 5), (0, 7), (1, 11))
  covered = np.zeros((5, 7, 11), int)
  for piece in pieces(box, 4, 100):
    covered[tuple(slice(*r) for r in piece)] += 1
    assert 4 * np.prod([stop - start for start, stop in piece]) <= 100
  assert covered[2:5, :, 1:].min() == covered.max() == 1
  assert covered.sum() == 3 * 7 * 10


def test_only_pieces_are_read():
  sizes = []

  def read(name, box):
    shape = [stop - start for start, stop in box]
    sizes.append(4 * int(np.prod(shape)))
    return np.full(shape, 3, np.float32)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaf = jax.ShapeDtypeStruct((3, 1024, 2048), np.float32, sharding=where)
  assert (np.asarray(place_streamed(read, leaf)) == 3).all()
  assert max(sizes) <= PIECE_BYTES and sum(sizes) == 3 * 1024 * 2048 * 4


BIG = {'vocab_size': 32768, 'hidden_size': 512, 'intermediate_size': 2048, 'num_hidden_layers': 2,
       'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 64}
# What is freed goes back to the system, so that what is held is what is in use.
RETURNED_AT_ONCE = {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_THRESHOLD_': '65536',
                    'MALLOC_TRIM_THRESHOLD_': '65536'}


@pytest.mark.parametrize('n_devices, dtype', [
    (8, 'bfloat16'), pytest.param(8, 'float32', marks=pytest.mark.slow),
    pytest.param(1, 'bfloat16', marks=pytest.mark.slow),
    pytest.param(1, 'float32', marks=pytest.mark.slow)])
def test_an_import_holds_less_than_two_tensors_beyond_the_parameters(tmp_path, n_devices, dtype):
  hf_cases.write(tmp_path, hf_cases.config_json('llama-default-untied') | BIG, dtype)
  result = subprocess.run(
      [sys.executable, '-m', 'tests.research.streaming_memory', str(tmp_path), str(n_devices)],
      cwd=ROOT, env=os.environ | RETURNED_AT_ONCE, text=True, capture_output=True, check=False)
  assert result.returncode == 0, result.stderr[-2000:]
  measured = json.loads(result.stdout.splitlines()[-1])
  print(measured)
  assert measured['equal']
  assert measured['largest'] == 32768 * 512 * {'float32': 4, 'bfloat16': 2}[dtype]
  assert 0 < measured['beyond'] < 2 * measured['largest']


@pytest.mark.parametrize('pattern, words', [
    ('step3*', "no revision matches 'step3*'; of 4 the nearest are stage"),
    ('mai*', 'none names a step'),
])
def test_a_pattern_without_revisions_names_the_nearest(folder, pattern, words):
  with pytest.raises(UserError) as error:
    PublicSeries(str(folder), pattern)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_two_revisions_of_one_step_are_refused():
  with pytest.raises(UserError, match='step10 and step10-copy are both of step 10'):
    chosen(['step10', 'step10-copy'], '*', 'here')


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tmp_path):
  config = PublicSeries(str(folder)).config(NAMES[0])
  tokenizers.train_bpe(['the soup was superb ' * 40], 300).save(tmp_path / 'tokenizer.json')
  large = tokenizers.load(tmp_path / 'tokenizer.json').vocab_size
  assert large > config.vocab_size
  with pytest.raises(UserError, match=f'has {large} tokens, the model only vocab_size=264'):
    open_tokenizer(tmp_path, config)


READ = '''
import sys
from research.dynamics.public import PublicSeries
from research.errors import UserError
for location in sys.argv[1:]:
  try:
    series = PublicSeries(*location.split(':'))
    print(series.names, float(series.checkpoint(series.names[0]).read('final_norm.scale').sum()))
  except UserError as error:
    print('error:', error)
'''


def read_hub(hub: Hub, cache: pathlib.Path, *locations: str) -> list[str]:
  """Returns what a program of its own prints of each series, a line each.

  huggingface_hub reads its settings once per process.
  """
  result = subprocess.run(
      [sys.executable, '-c', READ, *locations], cwd=ROOT, text=True, capture_output=True,
      check=False, env={**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(cache),
                        'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_TOKEN': ''})
  assert result.returncode == 0, result.stderr[-3000:]
  assert ('1 revisions in the cache' in result.stderr) == hub.stopped
  return result.stdout.splitlines()


def test_a_repository_is_fetched_once_and_known_without_a_network(folder, tmp_path):
  hub = Hub(folder)
  expected = float(PublicSeries(str(folder)).checkpoint(NAMES[1]).read('final_norm.scale').sum())
  wanted = f'{[NAMES[1], NAMES[0], NAMES[2]]} {expected}'
  assert read_hub(hub, tmp_path, 'owner/model') == [wanted]
  fetched = [line for line in hub.asked if line.startswith('GET') and 'resolve' in line]
  assert len(fetched) == 3  # config.json, model.safetensors, tokenizer.json of one revision
  again, no_match, hidden = read_hub(
      hub, tmp_path, 'owner/model', 'owner/model:step7', 'owner/hidden')
  assert again == wanted
  assert fetched == [line for line in hub.asked if line.startswith('GET') and 'resolve' in line]
  assert no_match.startswith("error: owner/model: no revision matches 'step7'; of 4 the nearest")
  assert hidden.startswith('error: owner/hidden is no public repository')
  hub.stop()
  cached, unknown, no_name = read_hub(hub, tmp_path, 'owner/model', 'owner/other', 'no/such/name')
  assert cached == f'{[NAMES[1]]} {expected}'
  assert unknown == ('error: owner/other is not in the cache and huggingface.co cannot be reached; '
                     'go online once')
  assert no_name.startswith("error: 'no/such/name' is neither a folder that exists nor a name like")


def test_what_a_repository_refuses_or_has_only_pickled_is_said(folder, tmp_path):
  served = tmp_path / 'served'
  shutil.copytree(folder, served)
  (served / NAMES[0] / 'model.safetensors').rename(served / NAMES[0] / 'pytorch_model.bin')
  hub = Hub(served)
  hub.refusals[NAMES[1]] = 403
  refused, pickled = read_hub(
      hub, tmp_path / 'cache', f'owner/model:{NAMES[1]}', f'owner/model:{NAMES[0]}')
  hub.stop()
  assert refused.startswith(
      f'error: owner/model at revision {NAMES[1]} cannot be fetched: ') and '403' in refused
  assert pickled == (f'error: owner/model at revision {NAMES[0]} has only pytorch_model.bin, which '
                     'may run code when read; convert it to safetensors')


def test_a_revision_that_lost_its_config_is_still_one(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'series')
  (tmp_path / 'series' / NAMES[0] / 'config.json').unlink()
  (tmp_path / 'series' / 'main' / 'config.json').unlink()
  (tmp_path / 'series' / 'step5').mkdir()
  (tmp_path / 'series' / 'notes').mkdir()
  assert Folder(tmp_path / 'series').names() == sorted([*NAMES, 'step5'])
