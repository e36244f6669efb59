"""How often the loops of a compiled program run."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from parallelism.hlo import Computation, Instruction, Module

_COPIES = ('copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done')
# A comparison whose sides were exchanged.
_MIRRORED = {'LT': 'GT', 'LE': 'GE', 'GT': 'LT', 'GE': 'LE', 'NE': 'NE'}


class Linear(NamedTuple):
  """A number: an offset, plus the loop's carried value of an index unless that is None."""

  index: int | None
  offset: int


class Loops:
  """The loops of a module."""

  def __init__(self, module: Module):
    """Notes which loop runs a computation."""
    self.module = module
    self._callers: dict[str, tuple[Computation, Instruction]] = {
        name: (computation, instruction) for computation in module.computations.values()
        for instruction in computation.instructions if instruction.opcode == 'while'
        for name in instruction.called('body', 'condition')}

  def trips(self, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a `while` of a computation runs, None if that depends on data.

    Either the compiler says it, or the condition compares a carried value, which starts at a
    constant and grows by a constant, with a constant.
    """
    known = loop.config.get('known_trip_count')
    if known:
      return int(known['n'])
    body, condition = (self.module.computations[loop.called(name)[0]]
                       for name in ('body', 'condition'))
    compared = self._comparison(condition)
    if compared is None:
      return None
    direction, counter, bound = compared
    if counter.index is None:
      direction, counter, bound = _MIRRORED.get(direction, ''), bound, counter
    step, start, limit = (self._step(body, counter.index),
                          self._initial(computation, loop, counter.index),
                          self._constant(computation, loop, body, bound))
    if None in (step, start, limit):
      return None
    return _count(direction, start + counter.offset, limit, step)

  def _comparison(self, condition: Computation) -> tuple[str, Linear, Linear] | None:
    """Returns direction and sides of the comparison that a condition is."""
    root, inputs, where = condition.root, None, condition
    if root.opcode == 'fusion':
      inputs = self._inputs(condition, root, None)
      where = self.module.computations[root.called('calls')[0]]
      root = where.root
    if root.opcode != 'compare':
      return None
    sides = [self._linear(where, operand, inputs) for operand in where.operands(root)]
    return None if None in sides else (root.attribute('direction'), *sides)

  def _inputs(self, computation: Computation, fusion: Instruction,
              inputs: Mapping[int, Linear | None] | None) -> dict[int, Linear | None]:
    """Returns what the parameters of a fused computation are."""
    return {i: self._linear(computation, operand, inputs)
            for i, operand in enumerate(computation.operands(fusion))}

  def _linear(self, computation: Computation, value: Instruction,
              inputs: Mapping[int, Linear | None] | None) -> Linear | None:
    """Returns a value in terms of what the loop carries, None where it is something else.

    Args:
      computation: that of the value: body or condition of a loop, or fused inside.
      value: an instruction.
      inputs: what the parameters of a fused computation are; None in body and condition, whose
        one parameter is the tuple that the loop carries.
    """
    operands = computation.operands(value)
    if value.opcode == 'constant' and re.fullmatch(r'-?\d+', value.literal):
      return Linear(None, int(value.literal))
    if value.opcode == 'parameter' and inputs is not None:
      return inputs[int(value.literal)]
    if value.opcode == 'get-tuple-element' and operands[0].opcode == 'parameter':
      return Linear(int(value.attribute('index')), 0)
    if value.opcode in _COPIES:
      return self._linear(computation, operands[0], inputs)
    if value.opcode == 'fusion':
      fused = self.module.computations[value.called('calls')[0]]
      return self._linear(fused, fused.root, self._inputs(computation, value, inputs))
    if value.opcode in ('add', 'subtract'):
      sides = [self._linear(computation, operand, inputs) for operand in operands]
      return _combined(value.opcode, *sides)
    return None

  def _step(self, body: Computation, index: int | None) -> int | None:
    """Returns by how much a carried value grows in a trip."""
    if index is None or body.root.opcode != 'tuple':
      return None
    after = self._linear(body, body.operands(body.root)[index], None)
    return after.offset if after and after.index == index else None

  def _initial(self, computation: Computation, loop: Instruction, index: int | None) -> int | None:
    """Returns the constant with which a carried value starts."""
    (start,) = computation.operands(loop)
    if index is None or start.opcode != 'tuple':
      return None
    value = self._linear(computation, computation.operands(start)[index], None)
    if value is None or value.index is None:
      return value and value.offset
    if computation.name not in self._callers:
      return None
    outer, outer_loop = self._callers[computation.name]
    return self._constant(outer, outer_loop, computation, value)

  def _constant(self, computation: Computation, loop: Instruction, body: Computation,
                value: Linear) -> int | None:
    """Returns a value that no trip of a loop changes."""
    if value.index is None:
      return value.offset
    if self._step(body, value.index) != 0:
      return None
    start = self._initial(computation, loop, value.index)
    return None if start is None else start + value.offset


def _combined(opcode: str, left: Linear | None, right: Linear | None) -> Linear | None:
  """Returns sum or difference of two values of which at most one depends on the loop."""
  if left is None or right is None or (right.index is not None and (
      left.index is not None or opcode == 'subtract')):
    return None
  sign = 1 if opcode == 'add' else -1
  return Linear(left.index if right.index is None else right.index,
                left.offset + sign * right.offset)


def _count(direction: str, start: int, limit: int, step: int) -> int | None:
  """Returns how often a counter passes the comparison with a limit, None if for ever."""
  if direction in ('LE', 'GE'):
    limit += 1 if direction == 'LE' else -1
  distance = limit - start
  if direction == 'NE':
    return distance // step if step and distance % step == 0 and distance * step >= 0 else None
  rising = direction in ('LT', 'LE')
  if (distance <= 0) if rising else (distance >= 0):
    return 0
  return -(-distance // step) if step and (step > 0) == rising else None
