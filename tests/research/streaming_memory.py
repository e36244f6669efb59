"""Run as a program: peak host memory of an import beyond the parameters, as JSON.

  python -m tests.research.streaming_memory <folder of a checkpoint> <devices>

The import runs twice, so that what compiling keeps is there before the one that is measured.
"""

import ctypes
import gc
import json
import pathlib
import sys
import threading
import time

import jax
import numpy as np

from models import transformer
from models.interop.checkpoint import HfCheckpoint
from parallelism import sharding
from parallelism.mesh import MeshConfig, make_mesh
from research.training.streaming import place_streamed


def anonymous_bytes() -> int:
  """Returns what this process holds in memory, mapped files left out."""
  lines = pathlib.Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('RssAnon'))


class Peak:
  """The most memory held while it is entered."""

  def __enter__(self):
    self.bytes, self._done = anonymous_bytes(), threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.is_set():
      self.bytes = max(self.bytes, anonymous_bytes())
      time.sleep(0.001)

  def __exit__(self, *_):
    self._done.set()
    self._thread.join()


def main(folder: str, n_devices: str) -> None:
  jax.config.update('jax_num_cpu_devices', int(n_devices))
  checkpoint = HfCheckpoint(folder)
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2) if n_devices == '8' else MeshConfig())
  abstract = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      transformer.abstract_params(checkpoint.config),
      sharding.parameter_shardings(mesh, transformer.logical_axes(checkpoint.config)))
  n_placed = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract))
  params = place_streamed(checkpoint.read, abstract)
  del params
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  before = anonymous_bytes()
  with Peak() as peak:
    params = place_streamed(checkpoint.read, abstract)
  equal = all(np.array_equal(np.asarray(leaf), checkpoint.read(sharding.path_name(path)))
              for path, leaf in jax.tree.leaves_with_path(params))
  print(json.dumps({'beyond': peak.bytes - before - n_placed, 'placed': n_placed,
                    'largest': checkpoint.tensor_bytes(), 'equal': equal}))


if __name__ == '__main__':
  main(*sys.argv[1:])
