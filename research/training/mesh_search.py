"""Ranks the meshes on which an experiment can train on a TPU slice, in seconds and without compiling.

Every way to write the number of chips as a product over the mesh axes is asked for, with every
remat and number of micro-batches. What does not divide the model (`divisions`) or is predicted not
to fit (`memory`) is left out, what remains is ranked by the seconds of a step: an estimate for
choosing, by formulas; `research.training.preflight` compiles the few that matter.

Not searched, by rule: stages of fewer than two micro-batches each, rows split over devices below
LEAST_TOKENS tokens each, axes of experts without experts. For a mesh without stages the fewest
micro-batches that fit are taken: more of them gather parameters more often and save memory alone.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
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
F32 = 4
# Times that a layer's activations pass through the memory outside of matrix products, forward and
# backward: of width D, and of the hidden width F.
STREAM_PASSES, HIDDEN_PASSES = 12, 4
# Passes over float32 state and gradients in an update: norm, moments and parameters read, written.
UPDATE_PASSES = 8
# Axes whose collectives compute waits for; the others' run beside it.
WAITED_FOR = ('tensor', 'expert', 'stage')


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
  """Seconds of one device and step: compute, memory, by mesh axis, and a pipeline's bubble."""

  compute: float
  memory: float
  network: Mapping[str, float]
  bubble: float

  @property
  def seconds(self) -> float:
    """Those of the step.

    Compute and memory come one after the other, as do what is waited for; transfers along other
    axes run beside them, and what they take longer is waited for at the end.
    """
    waited = sum(self.network.get(axis, 0.0) for axis in WAITED_FOR)
    beside = max((s for axis, s in self.network.items() if axis not in WAITED_FOR), default=0.0)
    return max(self.compute + self.memory, beside) / (1 - self.bubble) + waited

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
      if microbatches and sizes['stage'] > 1 and n_micro < min(2 * sizes['stage'], rows):
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
    bubble = schedules.bubble(
        schedules.schedule(config.compute.pipeline, sizes['stage'], n_micro,
                           config.compute.pipeline_chunks), 2, 4 + (config.model.remat != 'none'))
  return Work(
      executed_flops(config, sizes) * chip.devices / chip.bf16_flops,
      memory_bytes(config, sizes) * chip.devices / chip.hbm_bytes_per_second,
      network_seconds(config, sizes, n_micro, network), bubble)


def executed_flops(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
  """Returns the FLOPs of a device in a step, recomputation counted.

  Backward has two products per product of forward; attention's kernels have seven for two (scores
  are computed anew for queries and for keys). The logits' gradients come with the logits. remat
  'full' runs a layer's forward again but for its last product, 'dots' its attention. A pipeline
  runs a chunk's forward once more, but for the last place.
  """
  model, length = config.model, config.data.sequence_length
  n_tokens = config.data.batch_size * length / math.prod(sizes.values())
  whole = flops_per_token(model, length, backward=False)
  visible = sum(mean_visible_keys(length, model.kind_window(kind)) for kind in model.layer_kinds)
  attention = 4 * model.n_heads * model.d_head * visible
  logits = 2 * model.d_model * model.vocab_size
  products = whole - logits - attention
  down = 2 * model.d_model * _hidden_width(model) * model.n_layers
  places = sizes['stage'] * config.compute.pipeline_chunks
  again = 0.0 if sizes['stage'] == 1 else 1 - 1 / places
  recomputed = {'none': 0.0, 'dots': attention, 'full': products - down + attention}[model.remat]
  return n_tokens * (3 * logits + (3 + again) * products + (4.5 + again) * attention + recomputed)


def _hidden_width(model: ModelConfig) -> int:
  """Returns the hidden units that a token has in a feed-forward."""
  return model.moe.top_k * model.moe.d_expert if model.moe.n_experts else model.d_ff


def memory_bytes(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
  """Returns the bytes that a device's memory moves in a step outside of matrix products.

  Norms, rotations and activations of the layers, once more where they are recomputed; logits in
  float32, written and read for their normalizer and their gradient; the update.
  """
  model, tensor = config.model, sizes['tensor']
  step = memory.step_counts(config, sizes, 'v5e')
  parts = math.prod(sizes.values()) // tensor
  n_tokens = config.data.batch_size * config.data.sequence_length / parts
  runs = 1 + (model.remat == 'full') / 3
  own = n_tokens / (tensor if config.compute.sequence else 1)
  layer = (STREAM_PASSES * own * model.d_model + HIDDEN_PASSES * n_tokens
           * _hidden_width(model) / tensor) * step.itemsize
  logits = n_tokens / sizes['stage'] * model.vocab_size / tensor * 4 * F32
  state = sum(math.prod(leaf.shard(sizes)) * F32
              for leaf in state_leaves(model, config.optimizer) if leaf.path.startswith('params.'))
  return runs * layer * model.n_layers + logits + UPDATE_PASSES * state


def network_seconds(config: ExperimentConfig, sizes: Mapping[str, int], n_micro: int,
                    network: Network) -> dict[str, float]:
  """Returns how long each mesh axis is busy with the least bytes that a step has to send."""
  busy: dict[str, float] = {}
  for (kind, axes), sent in least_bytes(config, sizes, n_micro).items():
    seconds = network.seconds(Collective('', kind, sent, 0, axes, ''))
    for axis in axes:
      busy[axis] = busy.get(axis, 0.0) + seconds
  return busy


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
