"""The least that a training step sends between devices, by arithmetic on config and mesh.

Least for the step as it is declared (`compute.gather`, `compute.reduce_dtype`, `model.remat`, the
wire types of `parallelism.storage`), by collectives that are bandwidth-optimal
(`parallelism.collectives.wire_bytes`). Assumed:

- Parameters are gathered in the compute dtype (vectors and routers: float32), with gather='layer'
  in every run of a layer's forward and once more in its backward; the ends (embeddings) once a
  micro-batch. Gradients of layers are scattered once a micro-batch, those of the ends once a step,
  as the compiler sums micro-batches first where it can (not in a pipeline). With gather='step' all
  is done once. What stays of gradients is summed over replicas once a step.
- With remat a layer's backward recomputes its forward but for what only its output needs. Nothing
  that is sent is kept.
- A pipeline's backward runs a chunk's forward again, on top of remat (not where a chunk is one
  layer, whose output backward does not need); its last place runs no other.
  Idle stages send the neighbors' arrays all the same. Stages differ: what counts is their mean.
- Router losses, dropless experts in one round of exchange, balanced loads.
- Updates of the optimizer are local (adamw, lion, sgd).

Left out: numbers per batch or layer (losses, norms of gradients, loads of experts), numbers per
token of a QK-norm of all heads together.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from models.dispatch import capacity
from parallelism import experts, schedules
from parallelism.collectives import wire_bytes
from parallelism.mesh import AXES
from parallelism.sharding import ACTIVATIONS, GATHERED, STORAGE
from parallelism.storage import CAST, STAGE
from parallelism.zigzag import arms
from research.config import ExperimentConfig
from research.training.leaves import state_leaves
from research.training.pipelined import layer_order
from research.training.step import ENDS

Bytes = dict[tuple[str, tuple[str, ...]], float]
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The numbers from which the sums follow, of one device and step.

  Attributes:
    config: the experiment.
    sizes: devices of every mesh axis.
    n_micro: micro-batches of a step.
    sent: bytes by kind of collective and mesh axes, so far.
  """

  config: ExperimentConfig
  sizes: Mapping[str, int]
  n_micro: int
  sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the axes that have several devices, in the mesh's order."""
    return tuple(axis for axis in AXES if axis in axes and self.sizes[axis] > 1)

  def devices(self, axes: tuple[str, ...]) -> int:
    """Returns how many devices some axes have together."""
    return math.prod(self.sizes[axis] for axis in axes)

  def add(self, kind: str, axes: tuple[str, ...], whole: float, times: float = 1.0) -> None:
    """Counts a collective by the bytes of its larger side: all parts of a gather or a scatter."""
    axes = self.present(axes)
    n = self.devices(axes)
    operand = whole / n if kind == 'all-gather' else whole
    if n > 1 and whole * times:
      self.sent[kind, axes] += times * wire_bytes(kind, operand, n)

  @property
  def itemsize(self) -> int:
    """Bytes of a number in the compute dtype."""
    return jax.numpy.dtype(self.config.model.compute_dtype).itemsize

  @property
  def reduced(self) -> int:
    """Bytes of a number in the dtype of gradient sums."""
    return jax.numpy.dtype(self.config.compute.reduce_dtype).itemsize

  @property
  def n_tokens(self) -> float:
    """Tokens of a micro-batch on a device, the same on all devices of the axis tensor."""
    data = self.config.data
    return (data.batch_size / self.devices(ACTIVATIONS['batch']) / self.n_micro
            * data.sequence_length / self.sizes['context'])

  @property
  def n_places(self) -> int:
    """Places of the pipeline."""
    return self.sizes[STAGE] * self.config.compute.pipeline_chunks

  @property
  def forwards(self) -> float:
    """How often a layer's forward runs for a micro-batch, apart from remat."""
    single = self.config.model.n_layers <= self.n_places  # whose output no other layer needs
    if self.sizes[STAGE] == 1 or (single and self.again):
      return 1.0
    return 2.0 - 1.0 / self.n_places

  @property
  def again(self) -> int:
    """How often remat runs it once more."""
    return int(self.config.model.remat != 'none')

  @property
  def layers(self) -> float:
    """Runs of a layer on a device, each of one micro-batch; a mean over stages."""
    return self.config.model.n_layers / self.sizes[STAGE] * self.n_micro

  @property
  def ends(self) -> float:
    """Runs of an end of the model on a device; a mean over stages."""
    return self.n_micro / self.sizes[STAGE]


def least_bytes(config: ExperimentConfig, sizes: Mapping[str, int], n_micro: int) -> Bytes:
  """Returns the bytes that a device sends in a step, by kind of collective and mesh axes.

  Args:
    config: an experiment that the mesh divides (`research.build.build`).
    sizes: devices of every mesh axis.
    n_micro: micro-batches of a step (`research.training.divisions.count_microbatches`).
  """
  plan = _Plan(config, sizes, n_micro)
  _parameters(plan)
  _tensor(plan)
  _context(plan)
  if config.model.moe.n_experts:
    _experts(plan)
  if sizes[STAGE] > 1:
    _pipeline(plan)
  return dict(plan.sent)


def _parameters(plan: _Plan) -> None:
  """Adds gathers, scatters and sums of all parameters and gradients."""
  for leaf in state_leaves(plan.config.model, plan.config.optimizer):
    tree, *path = leaf.path.split('.')
    if tree == 'params':
      _parameter(plan, path[0] in ENDS, path[-1], math.prod(leaf.shape), leaf.names)


def _parameter(plan: _Plan, is_end: bool, name: str, n: int, names: tuple[Any, ...]) -> None:
  """Adds what goes to and fro of a parameter of n numbers."""
  split = {axis for name in names for axis in STORAGE[name]}
  gathered = tuple(axis for name in names if name in GATHERED for axis in STORAGE[name])
  in_use = n / plan.devices(tuple(split - set(gathered)))
  wire = plan.itemsize if CAST & set(names) else FLOAT32
  over = tuple(axis for axis in gathered if axis != STAGE)
  if STAGE in gathered and plan.sizes[STAGE] > 1:
    padding = 1.0 if is_end else _padding(plan)
    part = in_use * padding / plan.devices(over)  # whole with respect to the stages
    kinds = ('all-gather', 'reduce-scatter') if is_end else ('all-to-all', 'all-to-all')
    stages = 1 if is_end else plan.sizes[STAGE]  # a stage receives its own layers only
    plan.add(kinds[0], (STAGE,), part / stages * wire)
    plan.add(kinds[1], (STAGE,), part / stages * plan.reduced)
    in_use *= 1.0 if is_end else padding / plan.sizes[STAGE]
  if plan.config.compute.gather == 'step':
    gathers = scatters = 1.0
  elif is_end:
    gathers, scatters = _end_runs(plan, name)
  else:
    gathers, scatters = plan.n_micro * (plan.forwards + 1), plan.n_micro
  plan.add('all-gather', over, in_use * wire, gathers)
  plan.add('reduce-scatter', over, in_use * plan.reduced, scatters)
  plan.add('all-reduce', tuple(set(AXES) - split), n / plan.devices(tuple(split)) * plan.reduced)


def _padding(plan: _Plan) -> float:
  """Returns the layers that the stages' arrays have room for over those of the model."""
  model = plan.config.model
  order = layer_order(model.n_layers, plan.sizes[STAGE], plan.config.compute.pipeline_chunks)
  return order.size / model.n_layers


def _end_runs(plan: _Plan, name: str) -> tuple[float, float]:
  """Returns how often an end's parameter is gathered and its gradient scattered."""
  if plan.sizes[STAGE] == 1:
    return plan.n_micro, 1.0
  uses = 2 if name == 'tokens' and plan.config.model.tie_embeddings else 1
  return uses * plan.ends, uses * plan.ends


def _tensor(plan: _Plan) -> None:
  """Adds what the devices that share a token's heads and features send of activations.

  A branch gathers its tokens and scatters its sums; in backward the other way around. Remat
  repeats the gathers, and of the sums that of attention if what follows needs it.
  """
  model, axes = plan.config.model, ('tensor',)
  residual = plan.n_tokens * model.d_model * plan.itemsize
  branches = 1 if model.moe.n_experts else 2  # experts take the device's own tokens
  normed = model.norm_placement != 'pre'  # the norm after a branch needs the branch's sum
  repeated = branches if normed else int(not model.parallel_residual)
  wholes = branches * (plan.forwards + plan.again)
  sums = branches * plan.forwards + repeated * plan.again
  kinds = ('all-gather', 'reduce-scatter') if plan.config.compute.sequence else ('all-reduce',) * 2
  if plan.config.compute.sequence:
    plan.add(kinds[0], axes, residual, plan.layers * (wholes + branches))
    plan.add(kinds[1], axes, residual, plan.layers * (sums + branches))
    plan.add(kinds[0], axes, residual, plan.ends)  # the loss's tokens
    plan.add(kinds[1], axes, residual, plan.ends)
  else:
    plan.add(kinds[0], axes, residual, plan.layers * (sums + branches))
  for kind in kinds:  # embedded tokens, and their gradients
    plan.add(kind, axes, residual, plan.ends)
  chunk = plan.config.compute.loss_chunk
  tokens = plan.n_tokens if plan.n_tokens <= chunk else -(-plan.n_tokens // chunk) * chunk
  # Greatest logit, sum of exponentials and target's logit of each token.
  plan.add('all-reduce', axes, 3 * FLOAT32 * tokens, plan.ends)


def _context(plan: _Plan) -> None:
  """Adds what attention sends between the devices that share a row."""
  model, n_context, n_tensor = plan.config.model, plan.sizes['context'], plan.sizes['tensor']
  if n_context == 1:
    return
  heads = model.n_heads // n_tensor, model.n_kv_heads // n_tensor
  runs = plan.forwards + plan.again
  if plan.config.compute.context == 'ring':
    keys = plan.n_tokens * heads[1] * model.d_head
    length = plan.config.data.sequence_length // n_context
    for kind in model.layer_kinds:
      steps = [arm.n_steps for arm in arms(n_context, length // 2, model.kind_window(kind))]
      # Remat's forward and backward share the first of an arm's sends.
      there = sum(steps) * (runs + 1) - len(steps) * plan.again
      back = 2 * keys * sum(n * FLOAT32 + plan.itemsize for n in steps)
      sent = there * (2 * keys * plan.itemsize + 4 * plan.n_tokens) + back  # with segment ids
      plan.sent['collective-permute', ('context',)] += plan.layers / model.n_layers * sent
    return
  copies = math.lcm(heads[1], n_context)
  exchanged = plan.n_tokens * (2 * heads[0] + 2 * copies) * model.d_head * plan.itemsize
  plan.add('all-to-all', ('context',), exchanged, plan.layers * (runs + 1))
  plan.add('all-gather', ('context',), n_context * plan.n_tokens * 4, plan.layers * runs)


def _experts(plan: _Plan) -> None:
  """Adds what goes to experts and back."""
  model = plan.config.model
  moe, axes = model.moe, plan.present(STORAGE['experts'])
  n_tokens, n_devices = int(plan.n_tokens) // plan.sizes['tensor'], plan.devices(axes)
  if n_devices == 1:
    return
  if moe.capacity_factor:
    slots = moe.n_experts * capacity(moe, n_tokens) * model.d_model * plan.itemsize
    plan.add('all-to-all', axes, slots, plan.layers * 2 * (plan.forwards + plan.again + 1))
    return
  sent = experts.traffic(n_tokens * moe.top_k, n_devices, moe.exchange_factor,
                         n_experts=moe.n_experts, d_model=model.d_model, itemsize=plan.itemsize)
  again = plan.again * (model.norm_placement != 'pre')
  plan.sent['all-to-all', axes] += plan.layers * (
      sent.counts * (plan.forwards + plan.again) + sent.forward * (plan.forwards + again)
      + sent.backward)


def _pipeline(plan: _Plan) -> None:
  """Adds what neighboring stages hand each other at every tick."""
  compute, n_stages = plan.config.compute, plan.sizes[STAGE]
  ticks = schedules.schedule(
      compute.pipeline, n_stages, plan.n_micro, compute.pipeline_chunks).n_ticks
  own = plan.n_tokens / (plan.sizes['tensor'] if compute.sequence else 1)
  sent = own * plan.config.model.d_model * plan.itemsize
  plan.sent['collective-permute', (STAGE,)] += 2 * ticks * sent
