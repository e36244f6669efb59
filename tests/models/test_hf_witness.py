"""The same checkpoints run by transformers now, layer by layer, and what we export loaded there.

Needs an interpreter with the `interop` extra (torch, transformers), which the environment variable
MODEHOP_TRANSFORMERS_PYTHON names; tests/golden keeps its answers for everybody else.
"""

import pathlib

import jax
import numpy as np
import pytest

from models.decode import generate, make_prompts
from models.interop.checkpoint import HfCheckpoint, exported
from models.interop.files import write_folder
from models.sampling import Sampling
from tests.models import hf_cases
from tests.models.hf_running import (
  PYTHON, imported, layer_by_layer, run_witness, transformers_python,
)

TOLERANCE = 1e-4  # float32 on both sides, values of unit scale

pytestmark = pytest.mark.skipif(
  transformers_python() is None, reason=f'{PYTHON} names no interpreter with transformers')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """Every case as it is, and as `<case>+` imported by us and exported again."""
  folder = tmp_path_factory.mktemp('witness')
  for name in hf_cases.NAMES:
    checkpoint = HfCheckpoint(hf_cases.write(folder / name, hf_cases.config_json(name)))
    write_folder(folder / f'{name}+', *exported(
      checkpoint.config, lambda leaf, at: checkpoint.read(leaf)[at], np.dtype(np.float32)))
  run_witness(folder, transformers_python())
  return folder


@pytest.mark.parametrize('family', hf_cases.OWN)
def test_logits_and_every_layer_equal_transformers(folder, family, capsys):
  worst = {'logits': 0.0, 'layers': 0.0}
  for name in (name for name in hf_cases.NAMES if name.startswith(family + '-')):
    witness = np.load(folder / name / 'witness.npz')
    logits_BLV, hidden = layer_by_layer(*imported(HfCheckpoint(folder / name)), hf_cases.tokens_BL())
    worst['logits'] = max(worst['logits'], np.abs(logits_BLV - witness['logits']).max())
    assert f'hidden_{len(hidden)}' not in witness
    for i, x_BLD in enumerate(hidden):
      worst['layers'] = max(worst['layers'], np.abs(x_BLD - witness[f'hidden_{i}']).max())
  with capsys.disabled():
    print(f'\n{family}: worst of 8 cases {worst}')
  assert max(worst.values()) < TOLERANCE


@pytest.mark.parametrize('family', hf_cases.OWN)
def test_what_we_export_computes_the_same_in_transformers(folder, family):
  for name in (name for name in hf_cases.NAMES if name.startswith(family + '-')):
    ours, theirs = (np.load(folder / n / 'witness.npz') for n in (f'{name}+', name))
    for key in theirs:
      np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f'{name} {key}')


@pytest.mark.parametrize('family', hf_cases.OWN)
def test_cached_greedy_generation_writes_the_same_tokens(folder, family, quick_compilation):
  for name in (name for name in hf_cases.NAMES if name.startswith(family + '-')):
    graphdef, params = imported(HfCheckpoint(folder / name))
    prompt = make_prompts([hf_cases.tokens_BL()[0, :hf_cases.PROMPT]])
    with jax.default_matmul_precision('highest'):
      written = generate(graphdef, params, prompt, max_tokens=hf_cases.GENERATED,
                         sampling=Sampling(temperature=0.0))
    np.testing.assert_array_equal(
      written.tokens_BT[0], np.load(folder / name / 'witness.npz')['greedy'], err_msg=name)
