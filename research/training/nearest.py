"""The nearest setting of mesh and micro-batches that fits, for a step that does not."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from models import transformer
from parallelism.compiler_options import usable_bytes
from parallelism.hardware import find_chip
from parallelism.mesh import AXES, MeshConfig, factorizations
from research.config import ExperimentConfig, settings
from research.training import divisions
from research.training.memory import argument_bytes
from research.training.preflight import Preflight, preflight
from research.training.preflight_text import as_text

LIMIT = 10  # steps that are compiled, at most


def nearest_fitting(config: ExperimentConfig, first: Preflight, limit: int = LIMIT
                    ) -> tuple[ExperimentConfig, Preflight] | None:
  """Returns the config with the least changed that fits, and its preflight; None if none is found.

  Fewer rows per micro-batch come first, then remat of whole layers, then other meshes of as many
  devices, nearest first (least sum of absolute log ratios of axes), each with as many rows per
  micro-batch as fit.

  Args:
    config: one that does not fit.
    first: its preflight.
    limit: how many steps to compile, at most.
  """
  tried = 0
  for variant in _variants(config, first):
    sizes = {name: getattr(variant.mesh, name) for name in AXES}
    rows = variant.data.batch_size // divisions.replicas(sizes)
    counts = _doubling(divisions.microbatch_counts(variant, sizes))
    if variant == _on(config, first.mesh):
      counts = [n for n in counts if n > first.n_micro]
    leanest = None
    for n in [*counts[-1:], *counts[:-1]]:
      if tried == limit:
        return leanest
      tokens = rows // n * variant.data.sequence_length // sizes['context']
      lean = dataclasses.replace(
          variant, compute=dataclasses.replace(variant.compute, microbatch_tokens=tokens))
      found, tried = preflight(lean, first.topology, first.n_slices), tried + 1
      if found.fits and leanest:
        return lean, found
      if not found.fits and not leanest:
        break  # not even with the least rows
      leanest = leanest or (lean, found)
    if leanest:
      return leanest
  return None


def _doubling(counts: list[int]) -> list[int]:
  """Returns numbers of which each is at least twice the one before, the last of all among them."""
  kept = counts[-1:]
  for n in reversed(counts):
    if 2 * n <= kept[0]:
      kept.insert(0, n)
  return kept


def _on(config: ExperimentConfig, sizes: Mapping[str, int]) -> ExperimentConfig:
  """Returns the config with a mesh of these sizes."""
  return dataclasses.replace(config, mesh=MeshConfig(**sizes))


def _variants(config: ExperimentConfig, first: Preflight) -> Iterator[ExperimentConfig]:
  """Yields the config on its mesh, with full remat, and on other meshes whose state fits."""
  yield _on(config, first.mesh)
  if config.model.remat != 'full':
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat='full'))
    yield _on(config, first.mesh)
  shapes, names = (function(config.model) for function in (
      transformer.abstract_params, transformer.logical_axes))
  kind = find_chip(first.topology).device_kinds[0]

  def distance(sizes: dict[str, int]) -> float:
    return round(sum(abs(math.log(sizes[name] / first.mesh[name])) for name in AXES), 9)
  for sizes in sorted(factorizations(first.n_devices, AXES), key=distance):
    idle = sizes['expert'] > 1 and not config.model.moe.n_experts
    if (sizes == first.mesh or idle or sizes['data'] * sizes['stage'] % first.n_slices
        or any(divisions.problems(config, sizes, shapes, names))):
      continue
    if argument_bytes(config, sizes) < usable_bytes(kind):
      yield _on(config, sizes)


def changes(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
  """Returns the settings in which a config differs from another, as launchers take them."""
  return [f'--config.{row.path}={row.value}'
          for row, was in zip(settings(new), settings(old), strict=True) if row.value != was.value]


def as_nearest(config: ExperimentConfig, near: tuple[ExperimentConfig, Preflight] | None) -> str:
  """Returns what `nearest_fitting` found for a config, as text."""
  if near is None:
    return f'Of the nearest {LIMIT} settings none fits; more devices or a smaller model would.'
  return (f'The nearest that fits: {" ".join(changes(config, near[0]))}\n\n'
          f'{as_text(near[1]).rstrip()}')
