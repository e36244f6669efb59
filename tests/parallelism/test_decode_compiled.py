"""The decoding kernels through the real compilers of TPUs and GPUs, with neither at hand."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from models.kernels import decode_gpu, decode_tpu
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.topologies import EXAMPLES, compile_only_devices, compile_only_gpu
from tests.models.decoding_harness import programs

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only, as JAX's CUDA plugin

TPU_PROGRAMS = programs(decode_tpu.attention)


def compiled(device, call, arguments):
  """Returns a call compiled for one device that need not exist."""
  mesh = make_mesh(MeshConfig(data=1), [device])
  whole = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
  mapped = jax.shard_map(call, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                         check_vma=False)
  return jax.jit(mapped).lower(*arguments).compile()


def check_tpu(device, name: str) -> None:
  """Compiles a program; heads of whole lanes have to be read where the cache lies.

  XLA may lay out narrower arguments of a program compactly, which takes a copy at its start.
  """
  call, arguments = TPU_PROGRAMS[name]
  keys = arguments[1][0]
  temporary = compiled(device, call, arguments).memory_analysis().temp_size_in_bytes
  if keys.shape[-1] % 128 == 0:
    assert temporary < keys.size * keys.dtype.itemsize / 10


@pytest.mark.parametrize('name', ['every feature', 'every feature, in pages'])
def test_a_kernel_compiles_for_a_tpu_and_copies_no_cache(name):
  check_tpu(compile_only_devices('v5e:2x4')[0], name)


@pytest.mark.slow
@pytest.mark.parametrize('chip', EXAMPLES)
@pytest.mark.parametrize('name', TPU_PROGRAMS)
def test_every_kernel_compiles_for_every_tpu(name, chip):
  check_tpu(compile_only_devices(chip)[0], name)


GPU_PROGRAMS = programs(decode_gpu.attention)


def check_gpu(name: str) -> None:
  """Compiles a program for an H100."""
  call, arguments = GPU_PROGRAMS[name]
  assert 'decode_gpu' in compiled(compile_only_gpu(), call, arguments).as_text()


@pytest.mark.parametrize('name', ['every feature', 'every feature, in pages'])
def test_the_kernel_compiles_for_an_h100(name):
  check_gpu(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', GPU_PROGRAMS)
def test_the_kernel_compiles_for_an_h100_at_every_size(name):
  check_gpu(name)
