"""Whether a mesh divides an experiment, and into how many micro-batches a step is cut.

Every check is a function of the config and the sizes of the mesh axes alone and returns a sentence,
'' where nothing is wrong: `research.build` raises it, a search over meshes passes the mesh by.
"""

from collections.abc import Iterator, Mapping
import math
from typing import Any

from parallelism import context, experts, sharding
from research.config import ExperimentConfig
from research.training import pipelined

Sizes = Mapping[str, int]  # devices of each mesh axis
MICROBATCHES_PER_STAGE = 4  # of a pipeline whose micro-batches are not configured


def replicas(sizes: Sizes) -> int:
  """Returns how many parts the mesh splits the rows of a batch into."""
  return math.prod(sizes[axis] for axis in sharding.ACTIVATIONS['batch'])


def _split_by(sizes: Sizes, axes: tuple[str, ...]) -> str:
  """Returns the axes that have several devices, and their sizes, in words."""
  return ' x '.join(f'mesh.{axis}={sizes[axis]}' for axis in axes if sizes[axis] > 1)


def microbatch_counts(config: ExperimentConfig, sizes: Sizes) -> list[int]:
  """Returns the numbers of micro-batches that a replica's rows can be cut into, ascending."""
  rows, grouped = config.data.batch_size // replicas(sizes), 1
  if sizes['stage'] > 1 and config.compute.pipeline == 'interleaved':
    grouped = sizes['stage']
  return [n for n in range(1, rows + 1) if rows % n == 0 and n % grouped == 0]


def batch_problem(config: ExperimentConfig, sizes: Sizes) -> str:
  """Returns why the rows of a batch do not divide over the mesh, or into micro-batches."""
  n_replicas, n_stages, n_rows = replicas(sizes), sizes['stage'], config.data.batch_size
  if n_rows % n_replicas:
    near = max(1, round(n_rows / n_replicas)) * n_replicas
    return (f'data.batch_size={n_rows} is not divided by '
            f'{_split_by(sizes, sharding.ACTIVATIONS["batch"])}; {near} is')
  rows = n_rows // n_replicas
  if not microbatch_counts(config, sizes):
    return (f'interleaved 1F1B takes micro-batches in groups of mesh.stage={n_stages}, which do '
            f'not divide the {rows} rows of a replica; '
            f'data.batch_size={-(-rows // n_stages) * n_stages * n_replicas} fits')
  return ''


def count_microbatches(config: ExperimentConfig, sizes: Sizes, platform: str) -> int:
  """Returns into how many micro-batches a step is cut.

  The fewest that keep a replica's micro-batch within compute.microbatch_tokens. Its default on
  CPU (1,024 tokens, 2,048 from width 320) keeps activations near the cache; accelerators take
  the batch whole. A pipeline has MICROBATCHES_PER_STAGE by default, or as many as its rows allow.

  Raises:
    ValueError: the batch is not divided by the mesh.
  """
  if problem := batch_problem(config, sizes):
    raise ValueError(problem)
  counts, n_stages = microbatch_counts(config, sizes), sizes['stage']
  target = config.compute.microbatch_tokens
  if not target and n_stages > 1:
    return max([n for n in counts if n <= MICROBATCHES_PER_STAGE * n_stages] or counts[:1])
  if not target:
    if platform != 'cpu':
      return 1
    target = 1024 if config.model.d_model < 320 else 2048
  rows, tokens = counts[-1], config.data.sequence_length // sizes['context']
  fitting = [n for n in counts if rows // n * tokens <= target]
  return fitting[0] if fitting else counts[-1]


def row_problem(config: ExperimentConfig, sizes: Sizes) -> str:
  """Returns why the mesh does not divide the tokens of a row, or its heads."""
  compute = config.compute
  chunks = 2 if sizes['context'] > 1 and compute.context == 'ring' else 1
  tensor = sizes['tensor'] if compute.sequence else 1
  length, parts = config.data.sequence_length, chunks * sizes['context'] * tensor
  if length % parts:
    axes = ('context', 'tensor') if tensor > 1 else ('context',)
    ring = ' in two chunks per device of the ring' if chunks > 1 else ''
    return (f'data.sequence_length={length} is not divided by {_split_by(sizes, axes)}{ring}; '
            f'{max(1, round(length / parts)) * parts} is')
  if sizes['context'] > 1 and compute.context == 'all_to_all':
    problem = context.uneven_heads(config.model.n_heads // sizes['tensor'], sizes['context'])
    if problem:
      return problem
  if sizes['context'] > 1 and sizes['stage'] > 1 and compute.context == 'ring':
    return (
        f"compute.context='ring' sends by collective permutes, in which all devices take part at "
        f'once; the mesh.stage={sizes["stage"]} stages of a pipeline do not: '
        "compute.context='all_to_all' works there")
  if config.model.moe.n_experts and sizes['tensor'] > 1 and not compute.sequence:
    return (f'compute.sequence=False leaves every one of mesh.tensor={sizes["tensor"]} '
            'devices with the same tokens; experts need compute.sequence=True there')
  return ''


def expert_group(config: ExperimentConfig, sizes: Sizes) -> dict[str, int]:
  """Returns the mesh axes of several devices that split the experts; empty without experts."""
  axes = sharding.STORAGE['experts'] if config.model.moe.n_experts else ()
  return {axis: sizes[axis] for axis in axes if sizes[axis] > 1}


def problems(config: ExperimentConfig, sizes: Sizes, shapes: Any, names: Any) -> Iterator[str]:
  """Yields all that is wrong with training `config` on a mesh.

  Args:
    config: the experiment.
    sizes: of the mesh.
    shapes: tree of the parameters' shapes.
    names: the same tree of their logical axis names.
  """
  group, compute = expert_group(config, sizes), config.compute
  found = [
      batch_problem(config, sizes), row_problem(config, sizes),
      experts.uneven_experts(config.model.moe.n_experts, group) if group else '',
      sharding.indivisible(sizes, shapes, names),
      pipelined.too_many_places(config.model.n_layers, sizes['stage'],
                                compute.pipeline_chunks if sizes['stage'] > 1 else 1)]
  yield from filter(None, found)
