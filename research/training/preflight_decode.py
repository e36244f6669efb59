"""What a step of decoding will take on TPUs that need not be there."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from models import decode
from models.kernels.decoding import ContiguousCache
from models.stack import scans_layers
from parallelism import hlo_program, sharding
from parallelism.compile_only import compile_apart
from parallelism.compiler_options import usable_bytes
from parallelism.hardware import find_chip
from parallelism.network import Network
from parallelism.roofline import estimate
from parallelism.topologies import compile_only_mesh
from research import build as build_lib
from research.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class DecodePreflight:
  """What is known of a step that decodes one token per row.

  Bytes, FLOPs and seconds are those of one device; the cache has room for the model's context.
  ceiling is the most tokens per second of all rows, by the roofline of HBM, FLOPs and links.
  """

  experiment: str
  topology: str
  mesh: dict[str, int]
  rows: int
  capacity: int
  fits: bool
  refusal: str
  parameters: int
  cache: int
  temporaries: int
  total: int
  usable: int
  left: int
  hbm_bytes: float
  flops: float
  sent: float
  seconds: float
  bound: str
  ceiling: float


def lowered_decode(config: ExperimentConfig, topology: str) -> jax.stages.Lowered:
  """Returns `models.decode.step` for rows of a batch, lowered for a TPU topology.

  Parameters are in the compute dtype, as texts are written with.

  Raises:
    ValueError: config, mesh and topology do not go together.
  """
  built, arguments = _arguments(config, topology)
  return built.in_mesh(decode.step.lower)(built.graphdef, *arguments)


def _arguments(config: ExperimentConfig, topology: str):
  """Returns the build, and the abstract parameters, tokens and cache of its step."""
  mesh = compile_only_mesh(topology, config.mesh)
  built = build_lib.build(config, mesh, {})
  model, rows = built.config.model, config.data.batch_size
  params = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.compute_dtype, sharding=leaf.sharding),
      built.params)

  def abstract(shape, dtype, names):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named_sharding(mesh, names))
  n_stacked = model.n_layers if scans_layers(model, 'tpu') else 1
  shape = n_stacked, rows, model.n_kv_heads, model.context_length, model.d_head
  layers = abstract(shape, jnp.dtype(model.compute_dtype), decode.CACHE_AXES)
  arrays = layers if n_stacked == model.n_layers else (layers,) * model.n_layers
  numbers = abstract((rows,), jnp.int32, ('batch',))
  return built, (params, numbers, ContiguousCache(arrays, arrays, numbers))


def preflight_decode(config: ExperimentConfig, topology: str) -> DecodePreflight:
  """Returns what a step of decoding takes with a full cache for each row of a batch.

  Raises:
    ValueError: config, mesh and topology do not go together.
    RuntimeError: the compiler fails for a reason other than memory.
  """
  built, (params, _, cache) = _arguments(config, topology)
  compiled = compile_apart(lowered_decode, config, topology)
  kind = built.mesh.devices.flat[0].device_kind
  chip, usable = find_chip(kind), usable_bytes(kind)
  if compiled.refusal and compiled.refusal.available:
    usable = compiled.refusal.available
  parameters, cached = _device_bytes(params), _device_bytes(cache)
  program = hlo_program.read_program(compiled.text, built.mesh.shape, unknown_trips=1)
  best = estimate(program, chip, Network(built.mesh))
  return DecodePreflight(
      config.name, topology, dict(built.mesh.shape), config.data.batch_size,
      config.model.context_length, compiled.refusal is None and compiled.total <= usable,
      compiled.refusal.message.splitlines()[0] if compiled.refusal else '', parameters, cached,
      compiled.total - parameters - cached, compiled.total, usable, usable - compiled.total,
      best.hbm_bytes, best.flops, sum(hlo_program.sent_bytes(program).values()), best.seconds,
      best.bound, config.data.batch_size / best.seconds)


def _device_bytes(tree) -> int:
  """Returns the bytes of one device's parts of abstract arrays."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))
