"""The text of a compiled XLA program (HLO), read into computations and instructions.

The text comes from the optimized, scheduled module of the TPU compiler: the order of instructions
in a computation is the order in which they run.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

# Layouts name the memory of an array as S(n); without S(n) it is HBM.
HBM, VMEM, HOST = 0, 1, 5
BITS = {'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 'f4e2m1fn': 4, 's8': 8, 'u8': 8, 's16': 16,
        'u16': 16, 'f16': 16, 'bf16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64,
        'f64': 64, 'c64': 64, 'c128': 128, 'token': 0, 'opaque': 0}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
               'collective-permute', 'collective-broadcast')
_CALLED = ('calls', 'to_apply', 'body', 'condition', 'true_computation', 'false_computation',
           'branch_computations', 'called_computations')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) (\(.*\) -> .*)?\{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_LEAF = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class Shape(NamedTuple):
  """One array: element type, dimensions and the memory space that holds it."""

  dtype: str
  dims: tuple[int, ...]
  space: int = HBM

  @property
  def bytes(self) -> int:
    """Bytes of the elements, without the padding of tiles."""
    bits = 8 if self.dtype.startswith('f8') else BITS[self.dtype]
    return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  shapes are the arrays of the result, those of a tuple flattened; literal is what stands in the
  parentheses of the opcode, attributes what follows them.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  @functools.cached_property
  def _plain(self) -> str:
    return _QUOTED.sub('""', self.attributes)

  def attribute(self, name: str) -> str | None:
    """Returns the text of an attribute, with its braces if it has any, None where absent."""
    match = re.search(rf'(?:^|[ ,]){name}=', self._plain)
    if not match:
      return None
    text = self._plain[match.end():]
    return text[:_closing(text)] if text[:1] in '{[' else re.split(r'[, ]', text, maxsplit=1)[0]

  def called(self, *names: str) -> tuple[str, ...]:
    """Returns the computations that it calls, by any attribute or by the named ones."""
    found = (self.attribute(name) for name in names or _CALLED)
    return tuple(name for text in found if text for name in re.findall(r'[\w.\-]+', text))

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """What the compiler's backend adds to the instruction; empty where there is none."""
    _, marker, text = self.attributes.partition('backend_config=')
    return json.JSONDecoder().raw_decode(text)[0] if marker and text.startswith('{') else {}

  @property
  def target(self) -> str:
    """The target of a custom call, otherwise an empty string."""
    return self._quoted(r'custom_call_target="([^"]*)"')

  @property
  def source(self) -> str:
    """The path of the JAX operation that it stems from, '' where the compiler gives none."""
    return self._quoted(r'op_name="((?:[^"\\]|\\.)*)"')

  def _quoted(self, pattern: str) -> str:
    match = re.search(pattern, self.attributes)
    return match[1] if match else ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions in scheduled order; the root gives the result."""

  name: str
  instructions: tuple[Instruction, ...]
  root: Instruction

  @functools.cached_property
  def by_name(self) -> Mapping[str, Instruction]:
    """The instructions by their names."""
    return {instruction.name: instruction for instruction in self.instructions}

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """Which instructions take the result of an instruction."""
    users: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
    for instruction in self.instructions:
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return {name: tuple(found) for name, found in users.items()}

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """The parameters in order."""
    return tuple(sorted((i for i in self.instructions if i.opcode == 'parameter'),
                        key=lambda i: int(i.literal)))

  def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
    """Returns the instructions that an instruction takes."""
    return tuple(self.by_name[name] for name in instruction.operands)


@dataclasses.dataclass(frozen=True)
class Module:
  """All computations of a program."""

  computations: Mapping[str, Computation]
  entry: Computation

  def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """Yields every instruction of the computations that one calls, however deep."""
    for name in instruction.called('calls', 'called_computations', 'to_apply'):
      for inner in self.computations[name].instructions:
        yield self.computations[name], inner
        yield from self.inside(inner)


def _closing(text: str) -> int:
  """Returns the end of the bracketed group with which a text begins, with what is attached.

  Attached are further groups and arrows, as in `[4,2]<=[2,4]T(1,0)`.
  """
  depth = 0
  for i, char in enumerate(text):
    depth += (char in '{[(') - (char in '}])')
    if depth < 0:
      return i
    if depth == 0 and char in ', ':
      return i
  return len(text)


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Returns the arrays of a shape, those of a tuple flattened.

  Raises:
    ValueError: an element type is unknown.
  """
  shapes = []
  for dtype, dims, layout in _LEAF.findall(text):
    if dtype not in BITS and not dtype.startswith('f8'):
      raise ValueError(f'HLO element type {dtype!r} in {text[:80]!r} is unknown')
    space = re.search(r'S\((\d+)\)', layout)
    sizes = tuple(int(size.lstrip('<=')) for size in dims.split(',') if size)
    shapes.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
  return tuple(shapes)


def _group_end(text: str) -> int:
  """Returns where the parenthesis with which a text begins has closed."""
  depth = 0
  for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
    depth += {'(': 1, ')': -1}.get(match[0], 0)
    if depth == 0 and match[0] == ')':
      return match.end()
  raise ValueError(f'HLO text ends inside a parenthesis: {text[:80]!r}')


def _instruction(line: str, match: re.Match) -> Instruction:
  """Returns the instruction of a line of which the name has been matched."""
  rest = line[match.end():]
  end = _group_end(rest) if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  rest = rest[len(opcode):]
  end = _group_end(rest)
  literal = rest[1:end - 1]
  operands = () if opcode in ('constant', 'parameter') else re.findall(
      r'%([\w.\-]+)', re.sub(r'/\*.*?\*/', '', literal))
  return Instruction(match[2], opcode, parse_shapes(shape), tuple(operands), literal,
                     rest[end:].lstrip(', '))


def parse(text: str) -> Module:
  """Returns the module of an optimized HLO text.

  Raises:
    ValueError: the text has no entry computation, is not scheduled, or cannot be read.
  """
  if 'is_scheduled=true' not in text.partition('\n')[0]:
    raise ValueError('the HLO text is not that of a scheduled module (is_scheduled=true is not in '
                     'its first line); it has to be the optimized one')
  computations, entry, name, lines = {}, None, '', []
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif line.startswith('}') and name:
      instructions = [(_instruction(line, match), match[1]) for line, match in lines]
      roots = [instruction for instruction, is_root in instructions if is_root]
      computations[name] = Computation(name, tuple(i for i, _ in instructions), roots[0])
      name = ''
    elif name and (match := _NAME.match(line)):
      lines.append((line, match))
  if entry is None:
    raise ValueError('the HLO text has no ENTRY computation')
  return Module(computations, computations[entry])


def compile_to_text(lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
                    ) -> tuple[jax.stages.Compiled, str]:
  """Compiles a lowered program and returns the executable and its optimized HLO text.

  The text is the dump that the compiler writes on request of this one compilation (XLA_FLAGS
  would have to be set before the process starts), because `Compiled.as_text()` fails on programs
  whose collectives run on sparse cores (TPU7x, large v5p programs).

  Args:
    lowered: the result of `jax.jit(f).lower(...)`.
    options: further compiler options.

  Raises:
    ValueError: the compiler wrote no such dump or several.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile(compiler_options={
        **(options or {}), 'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    paths = sorted(pathlib.Path(folder).glob('*after_optimizations.txt'))
    if len(paths) != 1:
      raise ValueError(f'the compiler wrote {len(paths)} dumps *after_optimizations.txt of the '
                       'program, not one (xla_dump_to, xla_dump_hlo_as_text)')
    return compiled, paths[0].read_text(encoding='utf-8')
