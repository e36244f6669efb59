"""The search over meshes against compiled steps: its first is the best of all that there are."""

import dataclasses
import math

import pytest

from models.counting import flops_per_token
from experiments.benchmarks.memory_cases import SMALL, case
from parallelism.hardware import find_chip
from parallelism.mesh import AXES, factorizations
from research.config import ExperimentConfig
from research.training import divisions
from research.training.mesh_search import Work, executed_flops, search, table

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

TOPOLOGY = 'v5e:2x4'
WIDE = dataclasses.replace(SMALL, n_layers=8, d_model=2048, d_head=128, d_ff=8192)


def config(**model) -> ExperimentConfig:
  base = case('small', TOPOLOGY, rows=16, fsdp=8).config
  return dataclasses.replace(base, model=dataclasses.replace(WIDE, **model))


@pytest.fixture(scope='module')
def found():
  return search(config(), TOPOLOGY)


def test_every_candidate_uses_all_chips_fits_and_they_are_in_order(found):
  seconds = [candidate.seconds for candidate in found]
  assert seconds == sorted(seconds) and len(found) > 50
  for candidate in found:
    sizes = dataclasses.asdict(candidate.mesh)
    assert math.prod(sizes.values()) == 8 and candidate.memory.fits
    # The config that comes back makes the number of micro-batches that was searched.
    assert divisions.count_microbatches(candidate.config, sizes, 'tpu') == candidate.n_micro
    assert 0 < candidate.mfu < 1
  assert {candidate.config.model.remat for candidate in found} == {'none', 'dots', 'full'}


def test_the_first_keeps_what_it_can_and_gathers_beside_compute(found):
  # Everything fits without recomputation of products, so nothing is recomputed for nothing.
  assert found[0].mesh.fsdp == 8 and found[0].config.model.remat != 'full'


def test_what_does_not_divide_or_breaks_a_rule_is_no_candidate(found):
  meshes = {tuple(dataclasses.asdict(candidate.mesh).values()) for candidate in found}
  possible = {tuple(sizes.values()) for sizes in factorizations(8, AXES)}
  assert meshes < possible
  assert not any(dict(zip(AXES, mesh))['expert'] > 1 for mesh in meshes)
  assert not any(mesh[AXES.index('stage')] > 1 and mesh[AXES.index('context')] > 1
                 for mesh in meshes)  # a ring does not go with a pipeline


def test_nothing_fits_where_the_state_alone_is_too_much():
  huge = config(n_layers=96, d_model=8192, n_heads=64, d_ff=32_768)
  assert search(huge, TOPOLOGY, remats=('full',)) == []


def test_executed_flops_are_those_of_the_model_and_of_what_runs_again():
  one, alone = config(remat='none'), dict.fromkeys(AXES, 1)
  tokens = one.data.batch_size * one.data.sequence_length
  model_flops = tokens * flops_per_token(one.model, one.data.sequence_length)
  products, attention = executed_flops(one, alone)
  # Attention runs 4.5 times a forward instead of three, over masked keys of its diagonal, too.
  visible = (one.data.sequence_length + 1) / 2
  plain = tokens * one.model.n_layers * 3 * 4 * one.model.n_heads * one.model.d_head * visible
  assert products == pytest.approx(model_flops - plain)
  assert attention == pytest.approx(plain * 1.5 * (1 + 512 / visible))
  again, _ = executed_flops(config(remat='full'), alone)
  # A forward of all matrices of the layers but for the feed-forward's last.
  D, F, H, K, E = 2048, 8192, 16, 8, 128
  layer = D * E * (2 * H + 2 * K) + 2 * D * F
  assert again - products == pytest.approx(2 * tokens * one.model.n_layers * layer)


def test_seconds_add_up_and_the_bound_is_the_longest():
  work = Work(compute=2.0, memory=0.5, network={'fsdp': 3.0, 'tensor': 0.1}, waits=0.5, bubble=0.25)
  assert work.seconds == 4.0 and work.bound == 'network axis fsdp'


def test_a_line_of_the_table_has_what_a_launcher_shows(found):
  header, first, *rest = table(found[:3]).splitlines()
  assert header.split() == ['mesh', 'micro-batches', 'remat', 'GiB', 'of', 'seconds', 'MFU', 'bound']
  assert first.split()[0] == 'fsdp=8' and '15.75' in first and len(rest) == 2


@pytest.mark.slow
def test_the_first_is_the_best_of_all_meshes_compiled():
  from research.training.preflight import preflight
  base = config(remat='full')
  ranked = search(base, TOPOLOGY, remats=('full',), microbatches=False)
  assert len(ranked) == len({candidate.mesh for candidate in ranked}) > 25
  compiled = [preflight(candidate.config, TOPOLOGY).speed.seconds for candidate in ranked]
  assert compiled[0] <= 1.03 * min(compiled)
  for candidate, seconds in zip(ranked, compiled, strict=True):
    assert abs(candidate.seconds / seconds - 1) < 0.15, candidate.mesh
  # Useless ones are known as such: the estimate's order of all pairs that differ by 15% holds.
  assert all(compiled[i] < compiled[j] for i in range(len(ranked)) for j in range(len(ranked))
             if ranked[i].seconds * 1.15 < ranked[j].seconds)


def test_peaks_are_those_of_the_chip(found):
  best, chip = found[0], find_chip(TOPOLOGY)
  tokens = best.config.data.batch_size * best.config.data.sequence_length
  flops = tokens * flops_per_token(best.config.model, best.config.data.sequence_length)
  assert best.mfu == pytest.approx(flops / best.seconds / (8 * chip.bf16_flops))
  assert best.tokens_per_second == pytest.approx(tokens / best.seconds)
