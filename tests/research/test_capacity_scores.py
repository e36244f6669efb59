"""Experts of limited capacity drop no token where a score is read: it would depend on other rows.

Witness: one text at a time, in full, by experts that drop nothing.
"""

import dataclasses

import jax
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig, MoEConfig
from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.monitors.items import MonitorItem
from research.monitors.scoring import Scorer
from research.monitors.watch import make_scorer, score_snapshot
from tests.research.conftest import short_config
from tests.research.test_monitors_reference import reference

pytestmark = pytest.mark.usefixtures('quick_compilation')
BYTES = tokenizers.byte_tokenizer()
# An expert takes as many choices as an eighth of the tokens: three in four are dropped.
MODEL = ModelConfig(
    vocab_size=264, context_length=64, n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, d_head=8,
    d_ff=32, moe=MoEConfig(n_experts=4, top_k=2, d_expert=16, capacity_factor=0.25))
DROPLESS = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, capacity_factor=0.0))


def items() -> list[MonitorItem]:
  """Returns items of which some share their demonstrations."""
  shown = 'one two; three four; '
  asked = [(shown + 'five', ' six', ' ten'), (shown + 'seven', ' eight', ' two'),
           (shown + 'nine', ' ten', ' 0'), ('why', ' not', ' me'), ('x', 'y', 'z')]
  return [MonitorItem(str(i), 'f', 'd', 0, 'v', *texts) for i, texts in enumerate(asked)]


def test_a_score_is_the_same_alone_and_beside_others():
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.25, leaf.shape).astype(np.float32),
                        jax.device_get(transformer.init(MODEL, 0)))
  config = dataclasses.replace(short_config(), model=MODEL, mesh=MeshConfig(data=1))
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))

  def scores(chosen):
    scorer = make_scorer(config, BYTES, BYTES.bos_id, built, chosen)
    return np.stack(score_snapshot(scorer, built, built.place_params(params)), 1)

  together, alone = scores(items()), scores(items()[:1])
  expected = reference(DROPLESS, params, items(), BYTES, BYTES.bos_id)
  assert np.std(expected) > 0.5
  bound = 1e-5 * np.maximum(1, np.abs(expected))
  np.testing.assert_array_less(np.abs(together - expected), bound)
  np.testing.assert_array_less(np.abs(alone - expected[:1]), bound[:1])

  def with_slots(chosen):
    scorer = Scorer(chosen, BYTES, transformer.build(MODEL), context_length=64,
                    start_id=BYTES.bos_id)
    return np.stack(scorer.score(params), 1)

  # As training computes them they are others beside others, so the above could have failed.
  assert np.abs(with_slots(items())[:1] - with_slots(items()[:1])).max() > 0.01
