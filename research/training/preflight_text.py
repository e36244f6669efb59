"""A preflight as text: aligned lines, numbers with units."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

from research.training.preflight import Memory, Preflight, Speed
from research.training.preflight_decode import DecodePreflight


def gib(n: float) -> str:
  """Returns bytes as GiB, small ones as MiB."""
  return f'{n / 2**30:.2f} GiB' if abs(n) >= 2**27 else f'{n / 2**20:.2f} MiB'


def scaled(n: float, unit: str) -> str:
  """Returns a number of a unit with the decimal prefix that fits it."""
  for prefix, size in (('E', 1e18), ('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if abs(n) >= size:
      return f'{n / size:.3g} {prefix}{unit}'
  return f'{n:.3g} {unit}'


def aligned(rows: Iterable[Sequence[str]], indent: str = '  ') -> list[str]:
  """Returns rows of cells as lines, the first column to the left and the others to the right."""
  rows = [list(row) for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [(indent + row[0].ljust(widths[0]) + ''.join(
      '  ' + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))).rstrip()
          for row in rows]


def as_text(found: Preflight) -> str:
  """Returns all that a preflight found."""
  axes = ' x '.join(f'{name} {size}' for name, size in found.mesh.items() if size > 1)
  slices = f'{found.n_slices} slices of ' if found.n_slices > 1 else ''
  lines = [
      f'{found.experiment} on {slices}{found.topology}: {found.n_devices} devices, '
      f'mesh {axes or "of one device"}',
      f'batch of {found.batch_size:,} rows of {found.sequence_length:,} tokens '
      f'({found.batch_size * found.sequence_length:,} tokens), {found.n_micro} micro-batch'
      f'{"es" if found.n_micro > 1 else ""}; compiled in {found.compile_seconds:.0f} s'
      f'{"" if found.code else ", no code generated"}', '']
  lines += memory_lines(found.memory, found.fits)
  if found.refusal:
    lines += ['  ' + found.refusal]
  if found.collectives:
    lines += ['', 'Sent per device and step, and the least that has to be', *_sent_lines(found)]
  if found.host_transfers:
    lines += [f'  and {found.host_transfers} transfers between device and host']
  if found.speed:
    lines += ['', 'Roofline estimate of a step (at best)', *_speed_lines(found.speed)]
  return '\n'.join(lines) + '\n'


def memory_lines(memory: Memory, fits: bool) -> list[str]:
  """Returns where the memory of a device goes."""
  left = f'{gib(memory.left)} left' if memory.left >= 0 else f'{gib(-memory.left)} too much'
  names = {'parameters': 'parameters', 'moments': 'optimizer moments', 'average': 'average',
           'batch': 'batch', 'padding': 'padding of these', 'temporaries': 'temporaries',
           'total': 'peak', 'usable': 'usable', 'chip': 'chip'}
  rows = [(text, gib(getattr(memory, name))) for name, text in names.items()
          if getattr(memory, name)]
  return [f'Memory of a device: {"fits" if fits else "DOES NOT FIT"}, {left}', *aligned(rows)]


def _sent_lines(found: Preflight) -> list[str]:
  """Returns the table of collectives; what is below a thousandth of all is left out."""
  total = sum(row.sent for row in found.collectives)
  least = sum(row.least for row in found.collectives)
  rows = [('kind', 'axes', 'sent', 'least', 'ratio')]
  rows += [(row.kind, '+'.join(row.axes), scaled(row.sent, 'B'), scaled(row.least, 'B'),
            f'{row.ratio:.3f}' if row.ratio is not None and row.least >= least / 1000 else '')
           for row in found.collectives if max(row.sent, row.least) >= total / 1000]
  rows += [('all', '', scaled(total, 'B'), scaled(least, 'B'),
            f'{total / least:.3f}' if least else '')]
  return aligned(rows)


def _speed_lines(speed: Speed) -> list[str]:
  """Returns the estimate of time."""
  rows = [('step', f'{speed.seconds:.4g} s'),
          ('with perfect overlap', f'{speed.perfect_seconds:.4g} s, bound by {speed.bound}')]
  rows += [(f'  {name} busy', f'{seconds:.4g} s') for name, seconds in speed.busy.items()]
  rows += [(f'waiting for network axis {axis}', f'{seconds:.4g} s')
           for axis, seconds in speed.exposed.items() if seconds >= 1e-6]
  if speed.bubble:
    rows += [('bubble of the pipeline', f'{speed.bubble:.1%}')]
  rows += [('FLOPs per device, compiled', scaled(speed.flops, 'FLOP')),
           ('FLOPs per device, of the model', scaled(speed.model_flops, 'FLOP')),
           ('HBM traffic per device', scaled(speed.hbm_bytes, 'B')),
           ('MFU', f'{speed.mfu:.3f}, at most {speed.mfu_ceiling:.3f} with this remat'),
           ('tokens per day', scaled(speed.tokens_per_day, 'tokens'))]
  width = max(len(name) for name, _ in rows)
  return [f'  {name.ljust(width)}  {text}' for name, text in rows]


def as_json(found: object) -> str:
  """Returns a record, or a list of them, as indented JSON; numbers without prefixes."""
  plain = ([dataclasses.asdict(part) for part in found] if isinstance(found, list)
           else dataclasses.asdict(found))
  return json.dumps(plain, indent=2) + '\n'


def decode_text(found: DecodePreflight) -> str:
  """Returns what a preflight of decoding found."""
  axes = ' x '.join(f'{name} {size}' for name, size in found.mesh.items() if size > 1)
  left = f'{gib(found.left)} left' if found.left >= 0 else f'{gib(-found.left)} too much'
  memory = [('parameters', gib(found.parameters)), ('cache', gib(found.cache)),
            ('temporaries', gib(found.temporaries)), ('peak', gib(found.total)),
            ('usable', gib(found.usable))]
  speed = [('HBM traffic', scaled(found.hbm_bytes, 'B')), ('FLOPs', scaled(found.flops, 'FLOP')),
           ('sent', scaled(found.sent, 'B')), ('step', scaled(found.seconds, 's')),
           ('bound by', found.bound), ('tokens per second, at most', f'{found.ceiling:,.0f}')]
  return '\n'.join([
      f'{found.experiment}, one step of decoding on {found.topology}, '
      f'mesh {axes or "of one device"}: {found.rows:,} rows, '
      f'a cache of {found.capacity:,} tokens each', '',
      f'Memory of a device: {"fits" if found.fits else "DOES NOT FIT"}, {left}', *aligned(memory),
      *([f'  {found.refusal}'] if found.refusal else []), '',
      'Roofline estimate of a step, per device (at best)', *aligned(speed)]) + '\n'
