"""Where models and parallelism meet: a config and a mesh become a laid-out model and its step."""

import ctypes
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from models import transformer
from models.attention import (
    check_attention,
    choose_attention,
    choose_decode_attention,
    configured_attention,
    configured_decode_attention,
    hardware,
)
from models.config import ModelConfig
from models.kernels.decoding import Decoded
from models.kernels.interface import Attended
from models.stack import scans_layers
from parallelism import sharding
from parallelism.attention import decode_over_mesh, over_mesh
from research.config import ExperimentConfig
from research.training import step as step_lib
from research.training.optimizers import make_optimizer, schedule

BATCH_NAMES = ('batch', 'length')


@dataclasses.dataclass(frozen=True)
class Build:
  """A model bound to a mesh.

  Attributes:
    config: the experiment, numerics resolved.
    mesh: the device mesh.
    graphdef: static structure of the Flax model; `transformer.apply(graphdef, params)` runs it.
    optimizer: the Optax transformation at learning rate 1.
    n_micro: micro-batches per step.
    abstract_state: State of ShapeDtypeStruct with shardings.
  """

  config: ExperimentConfig
  mesh: Mesh
  graphdef: Any
  optimizer: optax.GradientTransformation
  n_micro: int
  abstract_state: step_lib.State

  @property
  def batch_sharding(self):
    """Sharding of every [B, L] array of a batch."""
    return sharding.named_sharding(self.mesh, BATCH_NAMES)

  @property
  def params(self) -> Any:
    """Abstract parameters: ShapeDtypeStruct with shardings."""
    return self.abstract_state.params

  def constrain(self, x, names):
    """Pins an array inside a jit to the table's sharding."""
    return sharding.constrain(self.mesh)(x, names)

  def init_state(self) -> step_lib.State:
    """Returns the state at step 0, created in place on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    with jax.set_mesh(self.mesh):
      return jax.jit(lambda: _fresh_state(self.config, self.optimizer),
                     out_shardings=shardings)()

  def jitted_step(self):
    """Returns the jitted step(state, batch) -> (state, metrics), to be used by `in_mesh`."""
    config = self.config
    step = step_lib.make_train_step(
        config, self.graphdef, self.optimizer, schedule(config.optimizer, config.n_steps),
        self.n_micro)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    return jax.jit(step, donate_argnums=0,
                   out_shardings=(shardings, sharding.replicated(self.mesh)))

  def train_step(self):
    """Returns the step(state, batch) -> (state, metrics) of a run; the state is donated."""
    return _trimmed(self.in_mesh(self.jitted_step()))

  def eval_step(self):
    """Returns the jitted f(params, batch) -> nats [B, L]."""
    return self.in_mesh(jax.jit(step_lib.make_eval_step(self.config, self.graphdef),
                                 out_shardings=sharding.replicated(self.mesh)))

  def in_mesh(self, function):
    """Returns the function run under this mesh and the configured matmul precision."""
    def call(*arguments, **options):
      with jax.set_mesh(self.mesh), jax.default_matmul_precision(
          self.config.compute.matmul_precision):
        return function(*arguments, **options)
    return call

  def place_params(self, values: Any) -> Any:
    """Returns host arrays laid out like the parameters, in their own dtype."""
    def place(value, leaf):
      return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])
    return jax.tree.map(place, values, self.params)

  def local_rows(self) -> list[int]:
    """Returns the rows of a batch that this process feeds, ascending."""
    n_rows = self.config.data.batch_size
    indices = self.batch_sharding.addressable_devices_indices_map(
        (n_rows, self.config.data.sequence_length))
    return sorted({row for index in indices.values() for row in range(n_rows)[index[0]]})

  def place_batch(self, local: dict[str, np.ndarray]) -> step_lib.Batch:
    """Returns the global batch from the rows of `local_rows()`, laid out over the mesh."""
    rows = {row: i for i, row in enumerate(self.local_rows())}
    n_rows = self.config.data.batch_size

    def place(x_RL):
      def shard(index):
        wanted = [rows[row] for row in range(n_rows)[index[0]]]
        return x_RL[wanted][(slice(None), *index[1:])]
      return jax.make_array_from_callback((n_rows, *x_RL.shape[1:]), self.batch_sharding, shard)
    return {name: place(x) for name, x in local.items()}


def _trimmed(step):
  """Returns the step; after its first call, what compiling it freed goes back to the system.

  The C library would keep a quarter of a gigabyte resident for the rest of the run.
  """
  compiled = False

  def call(*arguments):
    nonlocal compiled
    result = step(*arguments)
    if not compiled:
      compiled = True
      libc = ctypes.CDLL(None)
      if hasattr(libc, 'malloc_trim'):  # glibc has it, musl and macOS do not
        libc.malloc_trim(0)
    return result
  return call


def _fresh_state(config: ExperimentConfig, optimizer) -> step_lib.State:
  params = transformer.init(config.model, config.seed)
  ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {}
  return step_lib.State(step=jnp.int32(0), params=params, optimizer=optimizer.init(params),
                        ema=ema, rng=jax.random.key_data(jax.random.key(config.seed)))


def count_microbatches(config: ExperimentConfig, mesh: Mesh) -> int:
  """Returns into how many micro-batches a step is cut.

  The fewest that keep a replica's micro-batch within compute.microbatch_tokens. Its default on
  CPU (1,024 tokens, 2,048 from width 320) keeps activations near the cache; accelerators take
  the batch whole.

  Raises:
    ValueError: the batch is not divided by the mesh.
  """
  replicas = mesh.shape['data'] * mesh.shape['fsdp']
  if config.data.batch_size % replicas:
    raise ValueError(f'data.batch_size={config.data.batch_size} is not divided by mesh.data='
                     f'{mesh.shape["data"]} x mesh.fsdp={mesh.shape["fsdp"]}')
  rows = config.data.batch_size // replicas
  target = config.compute.microbatch_tokens
  if not target:
    if mesh.devices.flat[0].platform != 'cpu':
      return 1
    target = 1024 if config.model.d_model < 320 else 2048
  fitting = [n for n in range(1, rows + 1)
             if rows % n == 0 and rows // n * config.data.sequence_length <= target]
  return fitting[0] if fitting else rows


def resolve_numerics(config: ExperimentConfig, mesh: Mesh) -> dict[str, Any]:
  """Returns the choices that change bits but not meaning, for the manifest and for reuse."""
  device = mesh.devices.flat[0]
  attention, _ = choose_attention(config.model, hardware(device), config.data.sequence_length)
  return {'n_micro': count_microbatches(config, mesh), 'attention': attention,
          'scan_layers': 'scan' if scans_layers(config.model, device.platform) else 'unroll'}


def _kernel(model: ModelConfig, mesh: Mesh):
  """Returns the model's attention kernel run by shard_map, None for plain XLA attention."""
  if not model.attention.startswith('flash_') or mesh.size == 1:
    return None
  attend = over_mesh(mesh, configured_attention(model))
  return lambda *arrays, **options: Attended(*attend(*arrays, **options))


def _decode_kernel(model: ModelConfig, mesh: Mesh):
  """Returns the attention of single tokens on the mesh's devices, kernels run by shard_map."""
  platform = mesh.devices.flat[0].platform
  attend = configured_decode_attention(model, platform)
  if choose_decode_attention(model, platform)[0] == 'decode_xla' or mesh.size == 1:
    return attend
  attend = decode_over_mesh(mesh, attend)
  return lambda *arrays, **options: Decoded(*attend(*arrays, **options))


def build(config: ExperimentConfig, mesh: Mesh, numerics: dict[str, Any]) -> Build:
  """Returns the model of `config` laid out on `mesh`.

  A choice that `numerics` lacks, as those of an older run may, is made anew.

  Raises:
    ValueError: the mesh does not divide the batch or a parameter axis, or the attention that the
      config names is for other devices.
  """
  numerics = {**resolve_numerics(config, mesh), **numerics}
  model = dataclasses.replace(config.model, scan_layers=numerics['scan_layers'],
                              attention=numerics['attention'])
  check_attention(model, hardware(mesh.devices.flat[0]))
  config = dataclasses.replace(config, model=model)
  seams = transformer.Seams(constrain=sharding.constrain(mesh), attend=_kernel(model, mesh),
                            attend_cached=_decode_kernel(model, mesh))
  axes = transformer.logical_axes(model)
  sharding.check_divisible(mesh, transformer.abstract_params(model), axes)
  optimizer = make_optimizer(config.optimizer, axes)
  shapes = jax.eval_shape(lambda: _fresh_state(config, optimizer))
  params = sharding.parameter_shardings(mesh, axes)
  whole = sharding.replicated(mesh)
  shardings = step_lib.State(
      step=whole, params=params, rng=whole, ema=params if shapes.ema else {},
      optimizer=sharding.like_parameters(mesh, shapes.optimizer, shapes.params, params))
  abstract = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      shapes, shardings)
  return Build(config, mesh, transformer.build(model, seams), optimizer, numerics['n_micro'],
               abstract)
