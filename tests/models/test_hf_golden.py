"""Logits of tiny checkpoints of seven families equal those of transformers 5.23.

tests/golden/transformers_logits.npz holds what transformers makes of each case of `hf_cases`: its
config.json, the logits of row 0 at the last four positions [4, V], and the 64 tokens that follow
the prompt greedily. Made anew, by an interpreter that has torch and transformers, with

  MODEHOP_TRANSFORMERS_PYTHON=<its python> python -m tests.models.test_hf_golden
"""

import json
import pathlib
import tempfile

import numpy as np
import pytest

from models.interop.checkpoint import HfCheckpoint
from tests.models import hf_cases
from tests.models.hf_running import imported, layer_by_layer, run_witness, transformers_python

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'transformers_logits.npz'
TOLERANCE = 1e-4  # of logits of unit scale, float32 on both sides
N_KEPT = 4


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
  """The stored arrays by name."""
  with np.load(GOLDEN) as stored:
    return dict(stored)


def test_every_case_is_stored_with_its_config(golden):
  configs = json.loads(str(golden['configs']))
  assert configs == {name: hf_cases.config_json(name) for name in hf_cases.NAMES}
  assert len(hf_cases.NAMES) == 7 * 4 * 2


@pytest.mark.parametrize('family', hf_cases.OWN)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    golden, tmp_path, family, quick_compilation):
  for name in (name for name in hf_cases.NAMES if name.startswith(family + '-')):
    folder = hf_cases.write(tmp_path / name, json.loads(str(golden['configs']))[name])
    graphdef, params = imported(HfCheckpoint(folder))
    row_L, greedy = hf_cases.tokens_BL()[0], golden[f'{name}/greedy'].astype(np.int32)
    n_prompt, n_all = hf_cases.PROMPT, hf_cases.PROMPT + hf_cases.GENERATED
    rows_BL = np.zeros((2, n_all), np.int32)  # What follows the end of row 0 it does not see.
    rows_BL[0, :hf_cases.L], rows_BL[1] = row_L, np.concatenate([row_L[:n_prompt], greedy])
    logits_BLV, _ = layer_by_layer(graphdef, params, rows_BL)
    kept_LV = logits_BLV[0, hf_cases.L - N_KEPT : hf_cases.L]
    error = np.abs(kept_LV - golden[f'{name}/logits']).max()
    assert error < TOLERANCE, (name, error)
    chosen_L = logits_BLV[1, n_prompt - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(chosen_L, greedy, err_msg=name)


def test_every_scaling_and_setting_tells_in_the_logits(golden):
  """Else a scaling that is ignored would pass."""
  for family in hf_cases.OWN:
    logits = {name: golden[f'{name}/logits'] for name in hf_cases.NAMES
              if name.startswith(family + '-')}
    for a in logits:
      for b in logits:
        assert a == b or np.abs(logits[a] - logits[b]).max() > 10 * TOLERANCE, (a, b)


def _regenerate() -> None:
  arrays = {}
  configs = {name: hf_cases.config_json(name) for name in hf_cases.NAMES}
  with tempfile.TemporaryDirectory() as folder:
    for name, hf in configs.items():
      hf_cases.write(pathlib.Path(folder) / name, hf)
    run_witness(pathlib.Path(folder), transformers_python())
    for name in configs:
      with np.load(pathlib.Path(folder) / name / 'witness.npz') as witness:
        arrays[f'{name}/logits'] = witness['logits'][0, -N_KEPT:]
        arrays[f'{name}/greedy'] = witness['greedy'].astype(np.uint8)
  np.savez_compressed(GOLDEN, configs=json.dumps(configs), **arrays)


if __name__ == '__main__':
  _regenerate()
