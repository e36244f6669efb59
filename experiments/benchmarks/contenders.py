"""Who is measured: contenders by name, how to start each, why one may have to be skipped."""

import dataclasses
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.shapes import Shape, Weights
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Contender:
  """A training step.

  Attributes:
    module: of this package; its start(shape, n_rows, weights, **options) gives the step.
    options: of start.
    tolerances: largest |difference| to modehop's float32 loss before the first update and
      after two, in nats.
    doc: what it is.
  """

  module: str
  options: dict[str, Any]
  tolerances: tuple[float, float]
  doc: str


EXACT, ROUNDED = (1e-5, 1e-3), (2e-2, 5e-2)
CONTENDERS = {
    'modehop': Contender('modehop_step', {'dtype': 'float32'}, EXACT, 'the production step'),
    'modehop_bf16': Contender('modehop_step', {'dtype': 'bfloat16'}, ROUNDED,
                              'the same with model.compute_dtype=bfloat16'),
    'flax': Contender('flax_step', {}, EXACT, 'an ordinary Flax NNX step'),
    'torch': Contender('torch_step', {'compiled': False, 'dtype': 'float32'}, EXACT,
                       'PyTorch eager'),
    'torch_compile': Contender('torch_step', {'compiled': True, 'dtype': 'float32'}, EXACT,
                               'torch.compile'),
    'torch_compile_bf16': Contender('torch_step', {'compiled': True, 'dtype': 'bfloat16'}, ROUNDED,
                                    'torch.compile under bf16 autocast'),
}


def reason_without_torch() -> str:
  """Returns why nothing of PyTorch runs on this machine, '' where it is installed."""
  if importlib.util.find_spec('torch') is None:
    return "PyTorch is not installed; it is an extra: pip install -e '.[bench]'"
  return ''


def measurable(names: list[str], of_torch: str) -> list[str]:
  """Returns the names without the contender of PyTorch where that is absent, which is printed.

  Raises:
    UserError: nobody is left.
  """
  reason = reason_without_torch()
  if not reason or of_torch not in names:
    return names
  print(f'{of_torch}: skipped. {reason}', flush=True)
  left = [name for name in names if name != of_torch]
  if not left:
    raise UserError('--contenders names nobody who can be measured')
  return left


def reason_to_skip(name: str) -> str:
  """Returns why this machine cannot run a contender, '' where it can."""
  contender = CONTENDERS[name]
  if contender.module != 'torch_step':
    return ''
  if reason := reason_without_torch():
    return reason
  if contender.options['compiled'] and not shutil.which(os.environ.get('CXX', 'g++')):
    return 'torch.compile needs a C++ compiler (g++, or the one that CXX names)'
  return ''


def start(name: str, shape: Shape, n_rows: int, weights: Weights) -> Callable:
  """Returns step(batch) -> read of a contender; importing its framework happens here."""
  contender = CONTENDERS[name]
  module = importlib.import_module(f'experiments.benchmarks.{contender.module}')
  return module.start(shape, n_rows, weights, **contender.options)
