"""Predicts, without a compiler, what a training step occupies in the memory of a TPU.

Bytes of one device. Arguments (state and batch) are exact. All else is one heap, whose size is that
of the fullest of four moments: the loss, the scaling of its gradients, the backward pass of a
layer, and the sums of gradients at the end. Each term below is a formula of shapes; how many arrays
of a shape there are was counted in the buffers that live at a time in compiled programs
(`experiments.benchmarks.memory_prediction`). The heap is larger than what lives at any moment where
buffers of different moments do not pack well: by 2% in the median there, by 22% at most; MARGIN
covers that. Of programs of a few hundred MiB much lies in the chip's vector memory instead, which
is left out: they take less than predicted.

Letters: T tokens of a device's micro-batch, l those it has between branches, D, F, V, H, K, E as
everywhere, F, V, H, K of one tensor device; U = V * D, the embedding of one tensor device.
"""

from collections.abc import Mapping
import dataclasses
import functools

from models.layers import GATED
from parallelism.compiler_options import usable_bytes
from parallelism.hardware import find_chip
from research.config import ExperimentConfig
from research.training import divisions
from research.training.layout import laid_out_bytes
from research.training.leaves import Leaf, state_leaves
from research.training.step_counts import F32, Step, block_bytes, lanes, step_counts

MARGIN = 1.2  # what fits is predicted to stay below the usable memory divided by this
BATCH = ('tokens', 'targets', 'segment_ids', 'loss_mask')  # 4 bytes per token
READ_POSITIONS = ('rope', 'learned')  # embeddings that read the batch's positions


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Bytes of a device.

  arguments: of state and batch; moments: the heap at each moment, term by term; usable: what a
  program may take on the chip.
  """

  arguments: int
  moments: dict[str, dict[str, int]]
  usable: int

  @property
  def moment(self) -> str:
    """The fullest moment."""
    return max(self.moments, key=lambda name: sum(self.moments[name].values()))

  @property
  def heap(self) -> int:
    """Bytes of all but the arguments."""
    return sum(self.moments[self.moment].values())

  @property
  def peak(self) -> int:
    """Bytes of all."""
    return self.arguments + self.heap

  @property
  def fits(self) -> bool:
    """Whether it fits with the margin; what does not may still fit, which a compiler can say."""
    return self.peak * MARGIN <= self.usable


@functools.lru_cache(maxsize=4096)
def _state_bytes(leaves: tuple[Leaf, ...], sizes: tuple[tuple[str, int], ...]) -> int:
  """Returns the bytes of a device's part of the state."""
  return sum(laid_out_bytes(leaf.shard(dict(sizes)), leaf.itemsize) for leaf in leaves)


def argument_bytes(config: ExperimentConfig, sizes: Mapping[str, int]) -> int:
  """Returns the bytes of the state and the batch, exact with the padding of their tiles."""
  state = _state_bytes(state_leaves(config.model, config.optimizer), tuple(sizes.items()))
  rows = config.data.batch_size // divisions.replicas(sizes)
  tokens = config.data.sequence_length // sizes['context']
  n_arrays = len(BATCH) + (config.model.positions in READ_POSITIONS)
  return state + n_arrays * laid_out_bytes((rows, tokens), F32)


def saved_bytes(step: Step) -> int:
  """Returns what one layer keeps for its backward pass.

  full: its input, l D. dots: also the results of matrix products that backward reads: queries, keys
  and values, the attention's output before it is summed over tensor (T D), the hidden units (T F,
  twice if gated), what a norm after the feed-forward reads (T D). none: also what lies between:
  norms in float32, rotated and transposed heads, activations.
  The minor dimension is padded to 128.
  """
  model, a, T = step.config.model, step.itemsize, step.tokens
  D, F = model.d_model, lanes(step.d_ff)
  q, kv = (lanes(n * model.d_head) for n in (step.heads, step.kv_heads))
  gated = model.mlp in GATED
  saved = step.stream()
  if model.remat == 'full':
    return saved
  if model.remat == 'dots':
    hidden = step.own * model.moe.n_experts * F32 if step.n_choices else T * F * (1 + gated) * a
    normed = T * D * a if model.norm_placement != 'pre' and not step.n_choices else 0
    return saved + T * (q + 2 * kv + D) * a + hidden + normed
  heads = T * (2 * step.heads + 2 * step.kv_heads) * lanes(model.d_head) * a
  hidden = T * F * (3 + 3 * gated) * a
  if step.n_choices:
    hidden = step.n_choices * (5 * model.moe.d_expert + 2 * D) * a
  return 4 * step.stream(F32) + 3 * T * D * a + heads + hidden


def _work_bytes(step: Step) -> dict[str, int]:
  """Returns what the backward pass of one layer takes beside what all layers keep.

  Hidden units, both forms of the gate and their gradients (remat none: what was kept, sliced); half
  of them are gone when the float32 gradients of two of three matrices wait to be scattered;
  attention (`_attention_bytes`); the residual stream, split and whole (over tensor the tokens of
  both branches and their gradients are gathered); the gathered matrices under way (two of three of
  a feed-forward). For experts see `_expert_bytes`.

  Of layers that are one round of a loop sparse cores let more than one be under way: of what was
  kept the slices of all are taken at once; what is recomputed is that of two, of all where
  parameters are waited for.
  """
  model, a, T, D = step.config.model, step.itemsize, step.tokens, step.config.model.d_model
  layer, gated = block_bytes(step).layer, model.mlp in GATED
  hidden = T * lanes(step.d_ff) * a * (2 + 2 * gated)
  weights = {'gathered weights': layer * 2 // 3,
             'weight gradients': max(0, layer * F32 // a * 2 // 3 - hidden // 2)}
  if step.n_choices:
    hidden, weights = _expert_bytes(step, layer)
  work = {'hidden units': hidden, 'attention': _attention_bytes(step, hidden),
          'residual stream': 3 * step.stream() + (4 if step.own < T else 2) * T * D * a}
  if step.offloads and model.remat == 'full':
    n_at_once = step.n_body if step.waits else min(2, step.n_body)
    work = {name: n_at_once * size for name, size in work.items()}
  elif step.offloads and step.n_body > 1:
    work['slices of layers'] = step.n_body * saved_bytes(step)
  return work | weights


def _expert_bytes(step: Step, layer: int) -> tuple[int, dict[str, int]]:
  """Returns what experts have instead of hidden units, and of weights, in the backward pass.

  Rows before and after, one more on their way where they are exchanged, hidden units, both forms of
  the gate and their gradients; sparse cores let rows and their gradients wait together. Gradients
  of matrices come in the compute dtype, two of three at a time, and wait for sparse cores in
  float32. Rounds of an exchange hold all matrices and add their gradients up in float32.
  """
  a, D, F = step.itemsize, step.config.model.d_model, step.config.model.moe.d_expert
  width = 4 * D + 4 * F if step.offloads else 2 * D + 4 * F
  if step.exchanges:
    width = max(width, 3 * D + 2 * F)
    weights = {'gathered weights': layer, 'weight gradients': layer * F32 // a}
  else:
    weights = {'gathered weights': layer * 2 // 3,
               'weight gradients': layer * (F32 // a if step.offloads else 1) * 2 // 3}
  return step.n_choices * width * a + 2 * step.stream(F32), weights


def _attention_bytes(step: Step, hidden: int) -> int:
  """Returns what the backward pass of attention takes: queries, keys, values, output, gradients.

  A ring has its operands by halves and by heads, each padded; at the end of a layer's backward also
  float32 gradients of queries and, as they come and as they go, of keys and values, when the
  hidden units are gone; on sparse cores' chips they are not.
  """
  model, a, T = step.config.model, step.itemsize, step.tokens
  if step.sizes['context'] > 1 and step.config.compute.context == 'ring':
    q, kv = (n * lanes(model.d_head) for n in (step.heads, step.kv_heads))
    most = T * (17 * q + 32 * kv) * a // 2
    return most if step.offloads else max(T * (7 * q + 4 * kv) * a, most - hidden)
  q, kv = (lanes(n * model.d_head) for n in (step.heads, step.kv_heads))
  return T * (3 * q + 4 * kv) * a


def _kept(step: Step) -> dict[str, int]:
  """Returns what stays from a micro-batch's forward pass or from one micro-batch to the next.

  What layers save, the cast shards that are gathered from (hoisted out of the loops), gradients
  summed so far. gather='step': all blocks whole. A pipeline: the stage's own placed shards, its
  stored inputs and three in flight, one chunk's saved inputs, cast parts of the ends and the sums
  of their gradients, which no stage splits.
  """
  blocks, compute = block_bytes(step), step.config.compute
  ends = step.n_embeddings * step.embedding
  kept = {'saved by layers': step.n_chunk * saved_bytes(step), 'cast shards': blocks.cast}
  if compute.gather == 'step':
    kept['gathered blocks'] = step.n_own * blocks.layer
  if step.n_micro > 1:
    kept['gradient sums'] = blocks.shards
  if step.stages > 1:
    parts = ends * step.stages // step.parts
    kept |= {'stored inputs': (step.n_stored + 3) * step.stream(), 'placed shards': blocks.shards,
             'parts of the ends': parts * step.itemsize, 'gradients of the ends': parts * F32}
  elif step.n_micro > 1:
    kept['gradients of the ends'] = ends * F32 // step.parts
  return kept


def _loss(step: Step) -> dict[str, int]:
  """Returns what the loss takes: the unembedding, its float32 gradient and one chunk's logits."""
  model, a, U = step.config.model, step.itemsize, step.embedding
  chunk = min(step.tokens, step.config.compute.loss_chunk)
  return {'unembedding': U * a, 'unembedding gradient': U * F32,
          'logits': chunk * model.vocab_size // step.sizes['tensor'] * (F32 + a),
          'hidden states': 3 * step.tokens * model.d_model * a}


def _scaling(step: Step) -> dict[str, int]:
  """Returns what the scaling of the loss's gradients takes: that of the unembedding twice.

  The unembedding itself is gone by then.
  """
  return {'unembedding gradient': 2 * step.embedding * F32,
          'hidden states': step.tokens * step.config.model.d_model * step.itemsize}


def _sums(step: Step) -> dict[str, int]:
  """Returns what the sums of gradients over devices take once backward is through.

  The stacked shards, twice where replicas have to agree; the embeddings' gradients in float32, one
  of them summed and unsummed, the lookup's scattered in the compute dtype; on sparse cores the
  lookup's in float32 too and what was scattered first. gather='step': all blocks' gradients, in
  the compute dtype and in float32.
  """
  blocks, U = block_bytes(step), step.embedding
  sums = {
      'gradient shards': blocks.shards * (1 + (step.sizes['data'] > 1)),
      'embedding gradients': U * F32 * (
          3 if step.offloads and step.n_embeddings > 1 else 2),
      'embedding scatter': 0 if step.offloads else U * step.itemsize}
  if step.offloads and step.parts > 1:
    sums['sums on the way'] = U * F32 // step.first_parts
  if step.config.compute.gather == 'step':
    whole = step.n_own * blocks.layer
    sums['gradients of blocks'] = whole + whole * F32 // step.itemsize
  return sums


def predict(config: ExperimentConfig, sizes: Mapping[str, int], topology: str) -> Prediction:
  """Returns the memory of a training step on a mesh of TPU chips.

  Args:
    config: the experiment; its `mesh` is not read.
    sizes: devices of each mesh axis.
    topology: such as 'v5e:2x4'; of 'v5e' alone no collective is known to go in two levels.

  Raises:
    ValueError: the chip is unknown or the batch is not divided by the mesh.
  """
  step = step_counts(config, sizes, topology)
  kept, blocks = _kept(step), block_bytes(step)
  still = {name: kept[name] for name in ('gradient sums', 'gradients of the ends')
           if name in kept and step.stages == 1}
  backward = {'gradient shards': blocks.shards, **_work_bytes(step)}
  if step.stages == 1:
    backward['unembedding gradient'] = step.embedding * F32
  if config.compute.gather == 'step':
    backward['gradients of blocks'] = step.n_own * blocks.layer
  moments = {'loss': kept | _loss(step), 'scaling': kept | _scaling(step),
             'backward': kept | backward, 'sums': still | _sums(step)}
  return Prediction(argument_bytes(config, sizes), moments,
                    usable_bytes(find_chip(topology).device_kinds[0]))
