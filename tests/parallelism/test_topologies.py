"""Compile-only TPU topologies: devices, names, the missing library, silence."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_devices, compile_only_gpu, compile_only_mesh

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = {'v4:2x2x1': ('TPU v4', 4), 'v4:2x2x2': ('TPU v4', 8), 'v5e:2x4': ('TPU v5 lite', 8),
         'v5p:2x2x2': ('TPU v5', 8), 'v6e:2x4': ('TPU v6 lite', 8)}


@pytest.mark.parametrize('name', KINDS)
def test_devices_of_a_topology(name):
  devices = compile_only_devices(name)
  assert ({device.device_kind for device in devices}, len(devices)) == (
      {KINDS[name][0]}, KINDS[name][1])
  mesh = compile_only_mesh(name, MeshConfig(fsdp=2, tensor=2))
  assert {axis: n for axis, n in mesh.shape.items() if n > 1} == (
      {'data': len(devices) // 4, 'fsdp': 2, 'tensor': 2} if len(devices) > 4 else
      {'fsdp': 2, 'tensor': 2})
  assert {device.platform for device in mesh.devices.flat} == {'tpu'}


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e', 'hop'])
def test_an_unknown_topology_is_refused_with_names_that_exist(name):
  with pytest.raises(ValueError, match=f"'{name}' is not a TPU topology; such are .*v5e:2x4"):
    compile_only_devices(name)


def test_missing_libtpu_names_the_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"v5e:2x4 takes libtpu.*pip install -e '.\[tpu\]'"):
    compile_only_devices('v5e:2x4')


def test_missing_cuda_plugin_names_the_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"an H100 takes JAX's CUDA plugin.*install -e '.\[cuda\]'"):
    compile_only_gpu()


def test_a_program_compiles_for_an_h100_that_is_not_there():
  device = compile_only_gpu()
  assert (device.platform, device.device_kind) == ('gpu', 'NVIDIA H100 80GB HBM3')
  sharding = jax.sharding.SingleDeviceSharding(device)
  x_BD = jax.ShapeDtypeStruct((256, 512), jax.numpy.bfloat16, sharding=sharding)
  compiled = jax.jit(lambda x_BD: jax.numpy.tanh(x_BD @ x_BD.T)).lower(x_BD).compile()
  assert compiled.memory_analysis().output_size_in_bytes == 2 * 256 * 256


@pytest.mark.parametrize('program', [
    'from parallelism.topologies import quiet_plugins; quiet_plugins(); import jax; jax.devices()',
    'from parallelism.topologies import compile_only_devices as f; f("v5e:2x4")'])
def test_plugins_are_silent_where_no_accelerator_is(program):
  quieting = ('JAX_PLATFORMS', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK', 'TPU_SKIP_MDS_QUERY',
              'TPU_WORKER_HOSTNAMES', 'TPU_HOST_BOUNDS')
  env = {name: value for name, value in os.environ.items() if name not in quieting}
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=env, text=True,
                        capture_output=True)
  assert done.returncode == 0
  assert 'TPU' not in done.stderr and 'libtpu' not in done.stderr, done.stderr
