"""TPUs that exist for the compiler alone: programs are compiled for them on any machine."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from parallelism.mesh import MeshConfig, make_mesh

# Names that libtpu knows, each with eight devices (a v4:2x2x1 has four).
EXAMPLES = ('v4:2x2x2', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4')
# Where no TPU is attached these keep libtpu from looking for one and let several processes compile.
ENVIRONMENT = {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_HOST_BOUNDS': '1,1,1',
               'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


def quiet_libtpu() -> None:
  """Keeps an installed libtpu silent on a machine without TPUs; elsewhere it does nothing."""
  if os.environ.get('TPU_SKIP_MDS_QUERY'):  # JAX sets it on import where it finds no TPU chip
    for name, value in ENVIRONMENT.items():
      os.environ.setdefault(name, value)


def compile_only_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a topology such as 'v5e:2x4', to build a mesh and compile for.

  A v4 or v5p chip is one device, as on the real machines.

  Raises:
    ValueError: libtpu is absent or does not know the name.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(f"compiling for {name} takes libtpu, which is not installed: "
                     "pip install -e '.[tpu]'")
  quiet_libtpu()
  # A v4 chip is one device of two cores only if asked for ("megacore").
  options = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
  try:
    return topologies.get_topology_desc(name, 'tpu', **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'{name!r} is not a TPU topology; such are {", ".join(EXAMPLES)} '
                     f'({str(error).splitlines()[0]})') from error


def compile_only_mesh(name: str, config: MeshConfig) -> jax.sharding.Mesh:
  """Returns the mesh over the devices of a topology; see `compile_only_devices`, `make_mesh`."""
  return make_mesh(config, compile_only_devices(name))
