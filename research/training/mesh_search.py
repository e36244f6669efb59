"""Ranks the meshes on which an experiment can train on a TPU slice, without compiling.

Every way to write the number of chips as a product over the mesh axes is asked for, with every
remat and number of micro-batches. What does not divide the model (`divisions`) or is predicted not
to fit (`memory`) is left out, what remains is ranked by the seconds of a step: an estimate for
choosing, by formulas; `research.training.preflight` compiles the few that matter.

Not searched, by rule: fewer than two micro-batches per stage (where there are rows for them) or
more than MOST_PER_STAGE, rows split over devices below LEAST_TOKENS tokens each, axes of experts
without experts. For a mesh without stages the fewest micro-batches that fit are taken: more of
them gather parameters more often and save memory alone.
Experts are taken to cost what their chosen tokens cost, as a grouped product does.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math

from models import transformer
from models.config import ModelConfig
from models.counting import flops_per_token, mean_visible_keys
from models.stack import REMATS
from parallelism import schedules
from parallelism.collectives import Collective
from parallelism.hardware import Chip, find_chip
from parallelism.mesh import AXES, MeshConfig, factorizations, make_mesh
from parallelism.network import Network
from parallelism.topologies import compile_only_devices
from research.config import ExperimentConfig
from research.training import divisions, memory
from research.training.leaves import state_leaves
from research.training.traffic import least_bytes

LEAST_TOKENS = 512  # of a row on a device of mesh.context or, between branches, of mesh.tensor
MOST_PER_STAGE = 16  # micro-batches: a bubble of 6%
F32 = 4
# The rest was counted in roofline estimates of compiled steps of a model of width 2,048 on v5e:2x4.
# Times that a layer's activations pass through the memory outside of matrix products, forward and
# backward: of width D, and of the hidden width F; float32 outputs per further step of a ring.
STREAM_PASSES, HIDDEN_PASSES, RING_PASSES = 12, 4, 16
# Passes over float32 state and gradients in an update: norm, moments and parameters read, written.
UPDATE_PASSES = 8
# Keys that attention's kernels compute beyond those a query sees: the blocks on the diagonal.
MASKED_KEYS = 512
# Shares of the network's time that a device waits for: gathers and scatters of parameters, the
# tensor axis's of activations, what stages hand on, what a ring's sends take beyond its attention.
PARAMETERS, TENSOR, STAGES, RING = 0.65, 0.8, 0.85, 0.6


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A placement and what it is predicted to take.

  config: the experiment with it; seconds: of a step; mfu: model FLOPs over the chips' peak; bound:
  what takes longest, 'compute', 'memory' or 'network axis X'; bubble: share of the step that a
  stage idles.
  """

  config: ExperimentConfig
  n_micro: int
  memory: memory.Prediction
  seconds: float
  mfu: float
  bound: str
  bubble: float

  @property
  def mesh(self) -> MeshConfig:
    """The mesh."""
    return self.config.mesh

  @property
  def tokens_per_second(self) -> float:
    """Tokens of the batch over the step's seconds."""
    return self.config.data.batch_size * self.config.data.sequence_length / self.seconds


@dataclasses.dataclass(frozen=True)
class Work:
  """Seconds of one device and step.

  compute; memory: passes outside of matrix products; network: by mesh axis, for which it is busy;
  waits: for the network; bubble: the share of the step that a stage idles.
  """

  compute: float
  memory: float
  network: Mapping[str, float]
  waits: float
  bubble: float

  @property
  def seconds(self) -> float:
    """Those of the step."""
    return (self.compute + self.memory + self.waits) / (1 - self.bubble)

  @property
  def bound(self) -> str:
    """What takes longest."""
    takes = {'compute': self.compute, 'memory': self.memory,
             **{f'network axis {axis}': seconds for axis, seconds in self.network.items()}}
    return max(takes, key=takes.get)


def search(config: ExperimentConfig, topology: str, *, remats: Sequence[str] = tuple(REMATS),
           microbatches: bool = True) -> list[Candidate]:
  """Returns the placements that are predicted to fit, the fastest first.

  Args:
    config: the experiment; its mesh, remat and micro-batches are replaced.
    topology: such as 'v5e:4x4'.
    remats: of those of `ModelConfig.remat`.
    microbatches: whether their number is searched, else it is the config's.

  Raises:
    ValueError: libtpu does not know the topology.
  """
  devices = compile_only_devices(topology)
  chip = find_chip(topology)
  fitting = [placed for sizes in _meshes(config, len(devices))
             for placed in _fitting(config, sizes, topology, remats, microbatches)]
  networks: dict[MeshConfig, Network] = {}
  candidates = []
  for placed, n_micro, prediction in fitting:
    if placed.mesh not in networks:
      networks[placed.mesh] = Network(make_mesh(placed.mesh, devices))
    candidates.append(_timed(placed, n_micro, prediction, chip, networks[placed.mesh]))
  return sorted(candidates, key=lambda candidate: candidate.seconds)


def _meshes(config: ExperimentConfig, n_devices: int) -> Iterator[dict[str, int]]:
  """Yields the sizes of the meshes that divide the experiment and break no rule."""
  shapes = transformer.abstract_params(config.model)
  names = transformer.logical_axes(config.model)
  for sizes in factorizations(n_devices, AXES):
    own = config.data.sequence_length // (sizes['context'] * sizes['tensor'])
    if sizes['expert'] > 1 and not config.model.moe.n_experts:
      continue
    if sizes['context'] * sizes['tensor'] > 1 and own < LEAST_TOKENS:
      continue
    if not any(divisions.problems(config, sizes, shapes, names)):
      yield sizes


def _fitting(config: ExperimentConfig, sizes: dict[str, int], chip: str, remats: Sequence[str],
             microbatches: bool
             ) -> Iterator[tuple[ExperimentConfig, int, memory.Prediction]]:
  """Yields what fits of a mesh with each remat: config, micro-batches and memory."""
  rows = config.data.batch_size // divisions.replicas(sizes)
  tokens = config.data.sequence_length // sizes['context']
  placed = dataclasses.replace(config, mesh=MeshConfig(**sizes))
  counts = divisions.microbatch_counts(config, sizes)
  if not microbatches:
    counts = [divisions.count_microbatches(config, sizes, 'tpu')]
  for remat in remats:
    model = dataclasses.replace(config.model, remat=remat)
    for n_micro in counts:
      if microbatches and sizes['stage'] > 1 and not (
          min(2 * sizes['stage'], rows) <= n_micro <= MOST_PER_STAGE * sizes['stage']):
        continue
      compute = config.compute
      if microbatches:
        compute = dataclasses.replace(compute, microbatch_tokens=rows // n_micro * tokens)
      candidate = dataclasses.replace(placed, model=model, compute=compute)
      prediction = memory.predict(candidate, sizes, chip)
      if prediction.fits:
        yield candidate, n_micro, prediction
        if sizes['stage'] == 1:
          break


def _timed(config: ExperimentConfig, n_micro: int, prediction: memory.Prediction, chip: Chip,
           network: Network) -> Candidate:
  """Returns the candidate with its seconds."""
  sizes = dataclasses.asdict(config.mesh)
  work = step_work(config, sizes, n_micro, chip, network)
  n_tokens = config.data.batch_size * config.data.sequence_length
  flops = n_tokens * flops_per_token(config.model, config.data.sequence_length)
  peak = math.prod(sizes.values()) * chip.bf16_flops / chip.devices
  return Candidate(config, n_micro, prediction, work.seconds, flops / work.seconds / peak,
                   work.bound, work.bubble)


def step_work(config: ExperimentConfig, sizes: Mapping[str, int], n_micro: int, chip: Chip,
              network: Network) -> Work:
  """Returns what a step takes of each resource of a device."""
  bubble = 0.0
  if sizes['stage'] > 1:
    bubble = _bubble(config.compute.pipeline, sizes['stage'], n_micro,
                     config.compute.pipeline_chunks, 4 + (config.model.remat == 'full') * 2)
  rate = chip.bf16_flops / chip.devices
  products, attention = (flops / rate for flops in executed_flops(config, sizes))
  sent = {key: network.seconds(Collective('', key[0], n_bytes, 0, key[1], ''))
          for key, n_bytes in least_bytes(config, sizes, n_micro).items()}
  busy: dict[str, float] = {}
  for (_, axes), seconds in sent.items():
    for axis in axes:
      busy[axis] = busy.get(axis, 0.0) + seconds
  return Work(products + attention,
              memory_bytes(config, sizes) * chip.devices / chip.hbm_bytes_per_second, busy,
              _waits(sent, products + attention, attention), bubble)


@functools.lru_cache(maxsize=4096)
def _bubble(name: str, n_stages: int, n_micro: int, n_chunks: int, backward: int) -> float:
  """Returns the idle share of a schedule whose backward takes `backward` when forward takes 2."""
  return schedules.bubble(schedules.schedule(name, n_stages, n_micro, n_chunks), 2, backward)


def _waits(sent: Mapping[tuple[str, tuple[str, ...]], float], compute: float, attention: float
           ) -> float:
  """Returns the seconds that a device waits for collectives, of their seconds by kind and axes.

  Sums over replicas come when nothing is left to compute, exchanges when all wait for them. What
  parameters take beyond all compute cannot hide.
  """
  waits, parameters = 0.0, 0.0
  for (kind, axes), seconds in sent.items():
    if axes == ('tensor',):
      waits += TENSOR * seconds
    elif kind == 'collective-permute' and axes == ('context',):
      waits += RING * max(0.0, seconds - attention)
    elif kind == 'collective-permute':
      waits += STAGES * seconds
    elif kind in ('all-gather', 'reduce-scatter'):
      parameters += seconds
    else:
      waits += seconds
  return waits + max(PARAMETERS * parameters, parameters - compute)


def executed_flops(config: ExperimentConfig, sizes: Mapping[str, int]) -> tuple[float, float]:
  """Returns the FLOPs of a device in a step, of matrix products and of attention, all that run.

  Backward has two products per product of forward; attention's kernels have seven for two (scores
  are computed anew for queries and for keys). The logits' gradients come with the logits. remat
  'full' runs a layer's forward again but for its last product, 'dots' its attention. A pipeline
  runs a chunk's forward once more, but for the last place, which has the logits: the busier of
  the last stage and the others counts.
  """
  model, length = config.model, config.data.sequence_length
  n_tokens = config.data.batch_size * length / math.prod(sizes.values())
  whole = flops_per_token(model, length, backward=False)
  visible = sum(mean_visible_keys(length, model.kind_window(kind)) for kind in model.layer_kinds)
  attention = 4 * model.n_heads * model.d_head * visible
  logits = 2 * model.d_model * model.vocab_size
  products = whole - logits - attention
  down = 2 * model.d_model * _hidden_width(model) * model.n_layers
  kernels = attention * (1 + MASKED_KEYS * model.n_layers / visible)
  recomputed, attended = {'none': (0.0, 4.5), 'dots': (0.0, 5.5),
                          'full': (products - down, 5.5)}[model.remat]

  def on_stage(again: float, n_logits: float) -> tuple[float, float]:
    return (n_tokens * (3 * n_logits * logits + (3 + again) * products + recomputed),
            n_tokens * (attended + again) * kernels)

  n_stages = sizes['stage']
  if n_stages == 1:
    return on_stage(0.0, 1.0)
  last = on_stage(1 - 1 / config.compute.pipeline_chunks, n_stages)
  return max(on_stage(1.0, 0.0), last, key=sum)


def _hidden_width(model: ModelConfig) -> int:
  """Returns the hidden units that a token has in a feed-forward."""
  return model.moe.top_k * model.moe.d_expert if model.moe.n_experts else model.d_ff


def memory_bytes(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
  """Returns the bytes that a device's memory moves in a step outside of matrix products.

  Norms, rotations and activations of the layers, once more where they are recomputed; logits in
  float32, written and read for their normalizer and their gradient; the update.
  """
  model, tensor = config.model, sizes['tensor']
  itemsize = 2 if model.compute_dtype == 'bfloat16' else F32
  parts = math.prod(sizes.values()) // tensor
  n_tokens = config.data.batch_size * config.data.sequence_length / parts
  runs = 1 + (model.remat == 'full') / 3
  own = n_tokens / (tensor if config.compute.sequence else 1)
  layer = (STREAM_PASSES * own * model.d_model + HIDDEN_PASSES * n_tokens
           * _hidden_width(model) / tensor) * itemsize
  if sizes['context'] > 1 and config.compute.context == 'ring':
    layer += (RING_PASSES * (sizes['context'] - 1) * n_tokens * model.n_heads * model.d_head
              / tensor * F32 / runs)
  logits = n_tokens / sizes['stage'] * model.vocab_size / tensor * 4 * F32
  state = sum(math.prod(leaf.shard(sizes)) * F32
              for leaf in state_leaves(model, config.optimizer) if leaf.path.startswith('params.'))
  return runs * layer * model.n_layers + logits + UPDATE_PASSES * state


def table(candidates: Sequence[Candidate]) -> str:
  """Returns a text table of candidates, one per line, the fastest first."""
  header = ('mesh', 'micro-batches', 'remat', 'GiB', 'of', 'seconds', 'MFU', 'bound')
  rows = [header]
  for candidate in candidates:
    mesh = ' '.join(f'{axis}={size}' for axis, size in dataclasses.asdict(candidate.mesh).items()
                    if size > 1) or 'data=1'
    rows.append((mesh, str(candidate.n_micro), candidate.config.model.remat,
                 f'{candidate.memory.peak / 2**30:.2f}', f'{candidate.memory.usable / 2**30:.2f}',
                 f'{candidate.seconds:.3f}', f'{candidate.mfu:.3f}', candidate.bound))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join('  '.join(
      cell.ljust(width) if i in (0, 2, 7) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)
