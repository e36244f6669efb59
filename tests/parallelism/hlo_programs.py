"""Small manual programs for compile-only TPUs; their bytes and FLOPs have closed forms."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallelism import hlo
from parallelism.hlo_program import Block, read_program
from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_mesh

ROWS, WIDTH = 1024, 1024
LAYERS, D, F, TOKENS = 8, 512, 1024, 512


def manual(mesh, function, specs, out_specs, arrays):
  """Returns a function of arrays, given as (shape, dtype), inside shard_map, lowered."""
  mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
  return jax.jit(mapped).lower(*(
      jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
      for (shape, dtype), spec in zip(arrays, specs, strict=True)))


def compiled(lowered, mesh) -> Block:
  """Returns the tree of a lowered program."""
  return read_program(hlo.compile_to_text(lowered)[1], mesh.shape)


def on_rows(topology: str, function, out_specs=P('fsdp'), **sizes: int) -> Block:
  """Returns the tree of a function of bf16 [ROWS, WIDTH] per device; the axis fsdp splits rows.

  sizes are those of the mesh, all devices on fsdp by default.
  """
  mesh = compile_only_mesh(topology, MeshConfig(**sizes or {'data': 1, 'fsdp': 8}))
  shape = (ROWS * mesh.shape['fsdp'], WIDTH)
  return compiled(manual(mesh, function, (P('fsdp'),), out_specs, [(shape, jnp.bfloat16)]), mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weights_DF, dtype):
  """Gathers the rows of a layer's weights in some type; gradients are scattered in f32."""
  return jax.lax.all_gather(weights_DF.astype(dtype), 'fsdp', axis=0, tiled=True)


def _scatter(dtype, _, gradients_DF):
  return (jax.lax.psum_scatter(gradients_DF.astype(jnp.float32), 'fsdp', scatter_dimension=0,
                               tiled=True),)


gathered.defvjp(lambda weights_DF, dtype: (gathered(weights_DF, dtype), None), _scatter)


def fsdp_step(mesh, redundant: bool = False):
  """Returns a step of LAYERS scanned layers with rematerialization, lowered.

  Attention-like: four [D, D] products and two of [D, F] per layer, of TOKENS rows per device.

  Args:
    mesh: its axis fsdp splits parameters and rows, data the rows.
    redundant: gathers the last weights of each layer once more than needed.
  """
  @jax.checkpoint
  def layer(x_BD, weights):
    full = {name: gathered(weight, jnp.bfloat16) for name, weight in weights.items()}
    mixed_BD = x_BD
    for name in ('q', 'k', 'v', 'o'):
      mixed_BD = jnp.tanh(mixed_BD @ full[name])
    x_BD = x_BD + mixed_BD
    down_FD = full['down']
    if redundant:
      shifted_FD = gathered(weights['down'] * x_BD[0, 0].astype(jnp.float32), jnp.bfloat16)
      down_FD = down_FD + jax.lax.stop_gradient(shifted_FD)
    return x_BD + jax.nn.relu(x_BD @ full['up']) @ down_FD, None

  def loss(weights, x_BD):
    return jnp.sum(jax.lax.scan(layer, x_BD, weights)[0].astype(jnp.float32) ** 2)

  def step(weights, x_BD):
    value, gradients = jax.value_and_grad(loss)(weights, x_BD)
    gradients = jax.tree.map(lambda g: jax.lax.psum(g, 'data'), gradients)
    return jax.lax.psum(value, ('data', 'fsdp')), jax.tree.map(
        lambda w, g: w - 0.1 * g, weights, gradients)

  shapes = {**{name: (D, D) for name in 'qkvo'}, 'up': (D, F), 'down': (F, D)}
  stored = P(None, 'fsdp')
  weights = {name: jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32,
                                        sharding=NamedSharding(mesh, stored))
             for name, shape in shapes.items()}
  rows = P(('data', 'fsdp'))
  x_BD = jax.ShapeDtypeStruct((TOKENS * mesh.shape['data'] * mesh.shape['fsdp'], D), jnp.bfloat16,
                              sharding=NamedSharding(mesh, rows))
  specs = dict.fromkeys(shapes, stored)
  return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, rows), out_specs=(P(), specs),
                               check_vma=False), donate_argnums=0).lower(weights, x_BD)
