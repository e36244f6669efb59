"""Accelerators that exist for the compiler alone: programs are compiled for them on any machine."""

import glob
import importlib.util
import os
import pkgutil

import jax
from jax.experimental import topologies

from parallelism.mesh import MeshConfig, make_mesh

# Names that libtpu knows, each with eight devices (a v4:2x2x1 has four).
EXAMPLES = ('v4:2x2x2', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4')
# Where no TPU is attached these keep libtpu from looking for one and let several processes compile.
ENVIRONMENT = {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_HOST_BOUNDS': '1,1,1',
               'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
# What XLA has to know of the GPU that it compiles for: NVIDIA's data sheet and its CUDA
# Programming Guide, compute capability 9.0; cuDNN is any recent one.
H100 = """
device_description_str: "NVIDIA H100 80GB HBM3"
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  device_memory_size: 85899345920 memory_bandwidth: 3350000000000
}
"""


def quiet_plugins() -> None:
  """Keeps installed plugins of TPUs and GPUs silent where there are none.

  To be called before JAX looks for devices; it changes nothing where there are some.
  """
  if not glob.glob('/dev/nvidia*') + glob.glob('/dev/dxg'):
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  if os.environ.get('TPU_SKIP_MDS_QUERY'):  # JAX sets it on import where it finds no TPU chip
    for name, value in ENVIRONMENT.items():
      os.environ.setdefault(name, value)


def compile_only_devices(name: str, n_slices: int = 1) -> list[jax.Device]:
  """Returns the devices of a topology such as 'v5e:2x4', to build a mesh and compile for.

  A v4 or v5p chip is one device, as on the real machines. With several slices there are as many
  copies of the topology, joined by the data-center network.

  Raises:
    ValueError: libtpu is absent or does not know the name.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(f"compiling for {name} takes libtpu, which is not installed: "
                     "pip install -e '.[tpu]'")
  quiet_plugins()
  # A v4 chip is one device of two cores only if asked for ("megacore").
  options = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
  if n_slices > 1:
    options['num_slices'] = n_slices
  try:
    return topologies.get_topology_desc(name, 'tpu', **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'{name!r} is not a TPU topology; such are {", ".join(EXAMPLES)} '
                     f'({str(error).splitlines()[0]})') from error


def compile_only_mesh(name: str, config: MeshConfig, n_slices: int = 1) -> jax.sharding.Mesh:
  """Returns the mesh over the devices of a topology; see `compile_only_devices`, `make_mesh`."""
  return make_mesh(config, compile_only_devices(name, n_slices))


def compile_only_gpu() -> jax.Device:
  """Returns an H100, to build a mesh of one and compile for.

  Raises:
    ValueError: JAX's CUDA plugin is absent.
  """
  plugins = importlib.util.find_spec('jax_plugins')
  paths = plugins.submodule_search_locations if plugins else []
  if not any(module.name.startswith('xla_cuda') for module in pkgutil.iter_modules(paths)):
    raise ValueError("compiling for an H100 takes JAX's CUDA plugin, which is not installed: "
                     "pip install -e '.[cuda]'")
  quiet_plugins()
  (device,) = topologies.get_topology_desc('', 'cuda', topology='1x1x1', target_config=H100).devices
  return device
