"""Where models and parallelism meet: a config and a mesh become a laid-out model and its step.

A training step and the held-out loss run by `over_devices`: every device on its own part, with
collectives written out. What observes a model (monitors, samples) leaves its layout to the compiler.
"""

import ctypes
import dataclasses
import functools
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
from models.dispatch import (
    ExpertDispatch,
    capacity_dispatch,
    check_product,
    choose_product,
    configured_product,
    ragged_dispatch,
    ragged_experts,
)
from models.kernels.decoding import Decoded
from models.kernels.interface import Attended
from models.spread import Spread
from models.stack import run_layers, scans_layers
from parallelism import context, experts, sharding
from parallelism.attention import decode_over_mesh, over_mesh, with_own_slopes
from parallelism.compiler_options import compiler_options
from parallelism.mesh import slice_levels
from parallelism.spread import OverTensor
from parallelism.storage import STAGE, Storage, over_devices, specs
from parallelism.zigzag import zigzag_order
from research.config import ExperimentConfig
from research.training import divisions, guards, totals
from research.training import step as step_lib
from research.training.config import OptimizerConfig
from research.training.optimizers import make_optimizer, schedule

BATCH_NAMES = ('batch', 'row')


@dataclasses.dataclass(frozen=True)
class Build:
  """A model bound to a mesh.

  Attributes:
    config: the experiment, numerics resolved.
    mesh: the device mesh.
    graphdef: static structure of the Flax model; `transformer.apply(graphdef, params)` runs it
      under jit, laid out by the compiler.
    device_graphdef: the same for `over_devices`, on a device's part of the parameters.
    names: logical axis names of the parameters.
    optimizer: the Optax transformation at learning rate 1.
    n_micro: micro-batches per step.
    abstract_state: State of ShapeDtypeStruct with shardings.
  """

  config: ExperimentConfig
  mesh: Mesh
  graphdef: Any
  device_graphdef: Any
  names: Any
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
      return jax.jit(lambda: fresh_state(self.config, self.optimizer),
                     out_shardings=shardings)()

  @property
  def storage(self) -> Storage:
    """How parameters are gathered and their gradients summed."""
    return _storage(self.config, self.mesh)

  def jitted_step(self):
    """Returns the jitted step(state, batch) -> (state, metrics), to be used by `in_mesh`."""
    config = self.config
    step = step_lib.make_train_step(
        config, self.total_up(), self.optimizer, schedule(config.optimizer, config.n_steps))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    return jax.jit(step, donate_argnums=0,
                   out_shardings=(shardings, sharding.replicated(self.mesh)),
                   compiler_options=compiler_options(self.mesh.devices.flat[0]))

  def train_step(self):
    """Returns the step(state, batch) -> (state, metrics) of a run; the state is donated."""
    return _trimmed(self.in_mesh(self.jitted_step()))

  def total_up(self):
    """Returns f(params, batch, key data, n_tokens) -> Totals of the whole batch."""
    if self.mesh.shape[STAGE] == 1:
      totals_and_nothing = self._over_devices(totals.accumulated(self), ())
      return lambda *arguments: totals_and_nothing(*arguments)[0]
    pipelined_totals = self.pipelined_totals()
    return lambda *arguments: pipelined_totals(*arguments)[0]

  def pipelined_totals(self):
    """Returns f(params, batch, key data, n_tokens) -> Totals, and what ran on each stage.

    What ran are the forwards and backwards of each tick, int32 [ticks, stages, 2].
    """
    return self._over_devices(totals.through_stages(self), sharding.PartitionSpec(None, STAGE))

  def _over_devices(self, on_device, more):
    """Returns on_device(params, batch, key data, n_tokens) -> (Totals, more) over all devices."""
    parameters, rows = specs(self.names), sharding.partition_spec(BATCH_NAMES)
    whole = sharding.partition_spec(())
    total_up = over_devices(self.mesh, on_device, (parameters, rows, whole, whole),
                            (step_lib.Totals(whole, whole, parameters), more))
    if not self.config.model.dropout:
      return total_up
    return lambda params, batch, *rest: total_up(
        params, {**batch, 'token_ids': self._token_ids()}, *rest)

  def _token_ids(self) -> jax.Array:
    """Returns a number per token of a batch, int32 [B, L], whatever the mesh."""
    n_rows, length = self.config.data.batch_size, self.config.data.sequence_length
    return jnp.arange(n_rows, dtype=jnp.int32)[:, None] * length + self.columns

  def eval_step(self):
    """Returns the jitted f(params, batch) -> nats [B, L]."""
    gather = totals.gather_first(self.config, self.storage, self.names)
    rows = sharding.partition_spec(BATCH_NAMES)
    on_devices = over_devices(
        self.mesh, step_lib.make_eval_step(self.config, self.device_graphdef, gather),
        (specs(self.names), rows), rows)
    in_order = np.argsort(self.columns)

    def evaluate(params, batch):
      nats_BL = on_devices(params, batch)
      return nats_BL if self.mesh.shape['context'] == 1 else nats_BL[:, in_order]
    return self.in_mesh(jax.jit(evaluate, out_shardings=sharding.replicated(self.mesh)))

  @property
  def columns(self) -> np.ndarray:
    """The order in which tokens of a row lie over the devices, int [L]."""
    length, n_context = self.config.data.sequence_length, self.mesh.shape['context']
    if n_context > 1 and self.config.compute.context == 'ring':
      return zigzag_order(length, n_context)
    return np.arange(length)

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

  def owned_rows(self) -> list[int]:
    """Returns the rows of a batch that this process feeds and no process before it, ascending."""
    n_rows = self.config.data.batch_size
    indices = self.batch_sharding.devices_indices_map((n_rows, self.config.data.sequence_length))
    owners: dict[int, int] = {}
    for device, index in indices.items():
      for row in range(n_rows)[index[0]]:
        owners[row] = min(owners.get(row, device.process_index), device.process_index)
    return sorted(row for row, owner in owners.items() if owner == jax.process_index())

  def place_batch(self, local: dict[str, np.ndarray]) -> step_lib.Batch:
    """Returns the global batch from the rows of `local_rows()`, laid out over the mesh.

    Tokens of a row are in the order of `columns`.
    """
    rows = {row: i for i, row in enumerate(self.local_rows())}
    n_rows = self.config.data.batch_size

    def place(x_RL):
      def shard(index):
        wanted = [rows[row] for row in range(n_rows)[index[0]]]
        return x_RL[wanted][(slice(None), *index[1:])]
      return jax.make_array_from_callback((n_rows, *x_RL.shape[1:]), self.batch_sharding, shard)
    return {name: place(x_RL[:, self.columns]) for name, x_RL in local.items()}


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


def fresh_state(config: ExperimentConfig, optimizer) -> step_lib.State:
  """Returns the state at step 0."""
  params = transformer.init(config.model, config.seed)
  ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {}
  return step_lib.State(step=jnp.int32(0), params=params, optimizer=optimizer.init(params),
                        ema=ema, rng=jax.random.key_data(jax.random.key(config.seed)),
                        guard=guards.fresh(config.guards))


def state_facts(model: ModelConfig, optimizer: OptimizerConfig
                ) -> list[tuple[str, tuple[int, ...], int, tuple[str | None, ...]]]:
  """Returns path, shape, bytes per element and logical names (none: ()) of a state's arrays."""
  config = ExperimentConfig(model=model, optimizer=optimizer, data=dataclasses.replace(
      ExperimentConfig().data, sequence_length=model.context_length))
  axes = transformer.logical_axes(model)
  shapes = jax.eval_shape(lambda: fresh_state(config, make_optimizer(optimizer, axes)))
  names = [*jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)), ()]
  which = sharding.mirrored(shapes, shapes.params, list(range(len(names) - 1)), -1)
  return [(sharding.path_name(path), leaf.shape, leaf.dtype.itemsize, names[index])
          for (path, leaf), index in zip(
              jax.tree.leaves_with_path(shapes), jax.tree.leaves(which), strict=True)]


def _storage(config: ExperimentConfig, mesh: Mesh) -> Storage:
  return Storage(dict(mesh.shape), config.model.compute_dtype, config.compute.reduce_dtype,
                 slice_levels(mesh))


def resolve_numerics(config: ExperimentConfig, mesh: Mesh) -> dict[str, Any]:
  """Returns the choices that change bits but not meaning, for the manifest and for reuse."""
  device = mesh.devices.flat[0]
  attention, _ = choose_attention(config.model, hardware(device), config.data.sequence_length)
  product, _ = choose_product(config.model.moe, hardware(device))
  return {'n_micro': divisions.count_microbatches(config, mesh.shape, device.platform),
          'attention': attention, 'expert_product': product,
          'scan_layers': 'scan' if scans_layers(config.model, device.platform) else 'unroll'}


def _observing_seams(model: ModelConfig, mesh: Mesh) -> transformer.Seams:
  """Returns the seams of a model that the compiler lays out."""
  # The compiler lays out XLA's own product of experts, but no kernel. No token is dropped here: a
  # score would depend on the rows beside it.
  needs_ragged = mesh.size > 1 or model.moe.capacity_factor
  return transformer.Seams(constrain=sharding.constrain(mesh), attend=_kernel(model, mesh),
                           expert_dispatch=ragged_dispatch if needs_ragged else None,
                           attend_cached=_decode_kernel(model, mesh))


def _device_seams(config: ExperimentConfig, mesh: Mesh, names: Any) -> transformer.Seams:
  """Returns the seams of a model of which every device runs its part."""
  attend, n_tensor = configured_attention(config.model), mesh.shape['tensor']
  if mesh.shape['context'] > 1:
    over_context = {'ring': context.ring, 'all_to_all': context.all_to_all}
    attend = over_context[config.compute.context](attend, mesh.shape['context'])
  if n_tensor > 1:
    attend = with_own_slopes(attend, 'tensor')
  run, storage = run_layers, _storage(config, mesh)
  if config.compute.gather == 'layer' and storage.splits(names):
    run = totals.gathering(storage, totals.of_one_layer(names['blocks']), (), run)
  return transformer.Seams(
      attend=attend, run_layers=run, expert_dispatch=_expert_dispatch(config, mesh),
      token_sum=storage.token_total,
      spread=OverTensor(n_tensor, config.compute.sequence) if n_tensor > 1 else Spread())


def _expert_dispatch(config: ExperimentConfig, mesh: Mesh) -> ExpertDispatch | None:
  """Returns how tokens reach experts on several devices, None where each has all experts."""
  axes = tuple(divisions.expert_group(config, mesh.shape))
  if not axes:
    return None
  moe = config.model.moe
  if moe.capacity_factor:
    return capacity_dispatch(moe, *experts.slot_exchange(axes))
  run = functools.partial(ragged_experts, product=configured_product(moe))
  return experts.dropless(run, axes, moe.exchange_factor)


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
    ValueError: the mesh does not divide the batch or a parameter axis, or a kernel that the
      config names is for other devices.
  """
  numerics = {**resolve_numerics(config, mesh), **numerics}
  moe = dataclasses.replace(config.model.moe, product=numerics['expert_product'])
  model = dataclasses.replace(config.model, scan_layers=numerics['scan_layers'],
                              attention=numerics['attention'], moe=moe)
  check_attention(model, hardware(mesh.devices.flat[0]))
  check_product(moe, hardware(mesh.devices.flat[0]))
  config = dataclasses.replace(config, model=model)
  axes = transformer.logical_axes(model)
  for problem in divisions.problems(
      config, mesh.shape, transformer.abstract_params(model), axes):
    raise ValueError(problem)
  optimizer = make_optimizer(config.optimizer, axes)
  shapes = jax.eval_shape(lambda: fresh_state(config, optimizer))
  params = sharding.parameter_shardings(mesh, axes)
  whole = sharding.replicated(mesh)
  shardings = step_lib.State(
      step=whole, params=params, rng=whole, ema=params if shapes.ema else {},
      guard=jax.tree.map(lambda _: whole, shapes.guard),
      optimizer=sharding.like_parameters(mesh, shapes.optimizer, shapes.params, params))
  abstract = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      shapes, shardings)
  return Build(
      config, mesh, transformer.build(model, _observing_seams(model, mesh)),
      transformer.build(model, _device_seams(config, mesh, axes)), axes, optimizer,
      numerics['n_micro'], abstract)
