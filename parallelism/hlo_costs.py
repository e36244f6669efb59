"""What one HLO instruction costs: floating-point operations and bytes of each memory space.

Products (dots, convolutions) and Pallas kernels that estimate themselves are the only operations
counted: everything else runs on the vector units beside them and is bound by memory.
"""

import collections
import math
import re
from collections.abc import Iterable

import numpy as np

from parallelism.hlo import COLLECTIVES, Computation, Instruction, Module

# They name, group or view arrays and move nothing; loops and branches pay inside.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional',
         'after-all', 'add-dependency', 'opt-barrier', 'partition-id', 'replica-id',
         'get-dimension-size', 'domain'}
_FREE_TARGETS = {'AllocateBuffer', 'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone'}
# They pass an array on element by element, inside a fusion.
_VIEWS = {'bitcast', 'copy', 'convert', 'reshape', 'transpose'}
# Their results name what they read as well as what they write.
_START_SHAPES = {'copy-start', 'collective-permute-start', 'all-gather-start'}

Traffic = collections.Counter  # bytes by memory space


def flops(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Returns the operations (a multiplication and an addition are two) of an instruction.

  A fusion has those of all that is fused; loops, conditionals and calls have none of their own.
  """
  if instruction.opcode == 'fusion':
    return sum(flops(module, module.computations[name], inner)
               for name in instruction.called('calls')
               for inner in module.computations[name].instructions)
  if instruction.opcode == 'dot':
    return _dot_flops(computation, instruction)
  if instruction.opcode == 'convolution':
    return _convolution_flops(computation, instruction)
  return float(_estimate(instruction).get('flops', 0))


def _estimate(instruction: Instruction) -> dict[str, str]:
  """Returns the cost estimate that a Pallas kernel carries, {} where it has none."""
  if instruction.target != 'tpu_custom_call':
    return {}
  return instruction.config.get('custom_call_config', {}).get('cost_estimate', {})


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
  """Returns twice the result's elements times the contracted dimensions' sizes."""
  left = computation.operands(instruction)[0].shapes[0]
  contracted = re.findall(r'\d+', instruction.attribute('lhs_contracting_dims') or '')
  return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(
      left.dims[int(i)] for i in contracted)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
  """Returns the operations of a convolution, padding and holes of dilation left out.

  Source: HandleConvolution of XLA's HloCostAnalysis. The TPU compiler writes products of matrices
  as convolutions without spatial dimensions, batched products with batches as spatial ones.
  """
  labels = re.split(r'_|->', instruction.attribute('dim_labels') or '')
  left, right = (operand.shapes[0] for operand in computation.operands(instruction))
  window = _window(instruction.attribute('window') or '{}')
  n_features, n_batch = left.dims[labels[0].index('f')], left.dims[labels[0].index('b')]
  groups, batch_groups = (int(instruction.attribute(f'{name}_group_count') or 1)
                          for name in ('feature', 'batch'))
  positions = math.prod(
      _valid_positions(left.dims[labels[0].index(str(i))], instruction.shapes[0].dims[
          labels[2].index(str(i))], right.dims[labels[1].index(str(i))], i, window)
      for i in range(len(labels[0]) - 2))
  return 2.0 * (n_features // groups) * right.dims[labels[1].index('o')] * (
      n_batch // batch_groups) * positions


def _window(text: str) -> dict[str, list[str]]:
  """Returns the fields of a window attribute, such as {'size': ['3', '3'], 'pad': ['1_1', ...]}."""
  return {key: value.split('x') for key, value in re.findall(r'(\w+)=(\S+)', text.strip('{}'))}


def _valid_positions(n_in: int, n_out: int, n_kernel: int, i: int, window: dict[str, list[str]]
                     ) -> int:
  """Returns how many pairs of output and kernel position meet an element, along dimension i."""
  def field(name: str) -> int:
    return int(window[name][i].partition('_')[0]) if name in window else 1
  low = field('pad') if 'pad' in window else 0
  where = (np.arange(n_out)[:, None] * field('stride') - low
           + np.arange(n_kernel)[None, :] * field('rhs_dilate'))
  hit = (where % field('lhs_dilate') == 0) & (where >= 0) & (where < n_in * field('lhs_dilate'))
  return int(hit.sum())


def traffic(module: Module, computation: Computation, instruction: Instruction) -> Traffic:
  """Returns the bytes that an instruction reads and writes, by memory space.

  A fusion counts its parameters and results; of arrays that it only slices or updates in place
  the slices, of arrays that it hands through nothing. A Pallas kernel has the bytes that it
  estimates, of which a share is in each space as of its operands and results. The start of an
  asynchronous operation has the bytes of all of it, updates and the end have none.
  """
  opcode = instruction.opcode
  if (opcode in _FREE or opcode.endswith(('-done', '-update'))
      or instruction.target in _FREE_TARGETS):
    return Traffic()
  called = instruction.called('calls', 'called_computations', 'to_apply')
  if called and opcode in ('call', 'custom-call', 'async-start'):
    return sum((traffic(module, module.computations[name], inner) for name in called
                for inner in module.computations[name].instructions), Traffic())
  if opcode in ('slice-start', 'dynamic-slice-start'):  # the source, the slice, a semaphore
    source, *_, piece, _ = instruction.shapes
    return Traffic({source.space: piece.bytes}) + Traffic({piece.space: piece.bytes})
  if opcode in _START_SHAPES:
    return _total((shape.space, shape.bytes) for shape in instruction.shapes)
  read = ((shape.space, _read(module, computation, instruction, i))
          for i, operand in enumerate(computation.operands(instruction))
          for shape in operand.shapes)
  whole = _total(read) + _total(_written(module, computation, instruction))
  estimate = float(_estimate(instruction).get('bytes_accessed', 0))
  if estimate and whole.total():
    return Traffic({space: n * estimate / whole.total() for space, n in whole.items()})
  return whole


def _total(parts: Iterable[tuple[int, float]]) -> Traffic:
  """Returns the sums of bytes by memory space."""
  total = Traffic()
  for space, n in parts:
    total[space] += n
  return total


def _read(module: Module, computation: Computation, instruction: Instruction, i: int) -> float:
  """Returns how many bytes an instruction reads of its operand i, a single array."""
  operand = computation.by_name[instruction.operands[i]]
  whole = sum(shape.bytes for shape in operand.shapes)
  if instruction.opcode == 'fusion':
    (name,) = instruction.called('calls')
    fused = module.computations[name]
    return min(whole, _read_by_users(module, fused, fused.parameters[i]))
  if i == 0 and instruction.opcode in ('slice', 'dynamic-slice', 'gather'):
    return instruction.shapes[0].bytes
  if i == 0 and instruction.opcode in ('dynamic-update-slice', 'scatter'):
    return _updated(computation, instruction) if instruction.opcode == 'scatter' else 0
  return whole


def _read_by_users(module: Module, fused: Computation, value: Instruction) -> float:
  """Returns how many bytes of an array inside a fusion its users read."""
  total = 0.0
  for user in fused.users[value.name]:
    if user.opcode in _VIEWS:
      total += _read_by_users(module, fused, user) if user is not fused.root else (
          user.opcode != 'bitcast') * value.shapes[0].bytes
    elif user.opcode not in _FREE and user.target not in _FREE_TARGETS and not (
        user.opcode in COLLECTIVES):
      total += sum(_read(module, fused, user, i) for i, name in enumerate(user.operands)
                   if name == value.name)
  return total


def _updated(computation: Computation, instruction: Instruction) -> float:
  """Returns the bytes of the update of a dynamic-update-slice or scatter."""
  place = 1 if instruction.opcode == 'dynamic-update-slice' else -1
  return computation.operands(instruction)[place].shapes[0].bytes


def _written(module: Module, computation: Computation, instruction: Instruction
             ) -> list[tuple[int, float]]:
  """Returns memory space and bytes of what is written of each array of a result."""
  if instruction.opcode in ('dynamic-update-slice', 'scatter'):
    return [(instruction.shapes[0].space, _updated(computation, instruction))]
  if instruction.opcode != 'fusion':
    return [(shape.space, shape.bytes) for shape in instruction.shapes]
  (name,) = instruction.called('calls')
  fused = module.computations[name]
  results = fused.operands(fused.root) if fused.root.opcode == 'tuple' else (fused.root,)
  if fused.root.target in _FREE_TARGETS:  # what it returns is the handle of a collective
    return []
  if len(results) != len(instruction.shapes):  # one operation with several results, as a sort
    return [(shape.space, shape.bytes) for shape in instruction.shapes]
  written = (_written_inside(module, fused, result) for result in results)
  return [(shape.space, n) for shape, n in zip(instruction.shapes, written, strict=True)]


def _written_inside(module: Module, fused: Computation, result: Instruction) -> float:
  """Returns the bytes that a fusion writes of one of its results."""
  while result.opcode == 'bitcast':
    (result,) = fused.operands(result)
  if result.opcode in ('parameter', 'get-tuple-element', *COLLECTIVES):
    return 0
  return sum(n for _, n in _written(module, fused, result))
