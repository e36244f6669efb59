"""Attention as the real TPU compiler sees it: one case in, what the compiler says out.

A case is forward and backward of one contender in one program, inside shard_map over all devices
of a compile-only topology: per device one row of `length` tokens and HEADS / 2 heads.
"""

import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.kernels import flash_tpu
from models.kernels.interface import Mask
from parallelism.attention import KEY_AXES, QUERY_AXES, over_mesh
from parallelism.mesh import MeshConfig
from parallelism.sharding import named_sharding
from parallelism.topologies import EXAMPLES, compile_only_mesh

LENGTHS = (1024, 4096, 32768)
WIDTHS = (64, 128, 256)
DTYPES = ('bfloat16', 'float32')
WINDOW = 1000  # of the cases with a window; it ends inside a block
HEADS, KEY_HEADS = 8, 4  # over the mesh; its tensor axis has two devices
BLOCK = 512  # of jax's own kernels, whose default of 128 is a placeholder
# XLA keeps small temporaries in the fast memories, where memory_analysis does not count them, so
# these put all of them into HBM: the growth in length becomes visible.
IN_HBM = {f'xla_{space}_memory_space_assignment': 'false'
          for space in ('vf_vmem', 'gf_vmem', 'tpu_cmem')}


@dataclasses.dataclass(frozen=True)
class Case:
  """One program."""

  topology: str
  contender: str
  length: int
  width: int
  dtype: str
  window: int

  @property
  def name(self) -> str:
    """One line that identifies the case."""
    return (f'{self.contender} {self.topology} L={self.length} E={self.width} {self.dtype}'
            f'{f" window={self.window}" if self.window else ""}')


def covering_cases() -> list[Case]:
  """Returns 24 cases of ours in which every two values of different choices meet."""
  cases = []
  for i, topology in enumerate(EXAMPLES):
    for j in range(6):
      name = 'v4:2x2x1' if topology == 'v4:2x2x2' and j % 2 else topology
      cases.append(Case(name, 'flash_tpu', LENGTHS[j % 3], WIDTHS[(i + j + j // 3) % 3],
                        DTYPES[(i + j) % 2], WINDOW * ((i // 2 + j // 2 + j) % 2)))
  return cases


def all_cases(contenders: list[str], topologies: list[str]) -> list[Case]:
  """Returns the whole table, ours first, cheap ones first."""
  return [Case(*values) for values in itertools.product(
      topologies, contenders, LENGTHS, WIDTHS, DTYPES, (0, WINDOW))]


def _without_lse(attend: Callable) -> Callable:
  """Returns a contender that gives no log-sum-exp as an `Attention` that gives zeros."""
  def wrapped(q_BLHE, k_BMKE, v_BMKE, *, scale: float, mask: Mask):
    B, L, H, _ = q_BLHE.shape
    out_BLHE = attend(q_BLHE, k_BMKE, v_BMKE, scale, mask.window)
    return out_BLHE, jnp.zeros((B, H, L), jnp.float32)
  return wrapped


def _dense(q_BLHE, k_BMKE, v_BMKE, scale: float, window: int):
  """jax.nn.dot_product_attention in plain XLA."""
  return jax.nn.dot_product_attention(
      q_BLHE, k_BMKE, v_BMKE, scale=scale, is_causal=True,
      local_window_size=(window - 1, 0) if window else None, implementation='xla')


def _flash(q_BLHE, k_BMKE, v_BMKE, scale: float, window: int):
  """JAX's own flash attention; it has neither windows nor grouped heads."""
  from jax.experimental.pallas.ops.tpu import flash_attention as library
  if window:
    raise NotImplementedError('no windows')
  block = min(BLOCK, q_BLHE.shape[1])
  fields = [field.name for field in dataclasses.fields(library.BlockSizes)]
  sizes = library.BlockSizes(**{name: 1 if name == 'block_b' else block for name in fields})
  groups = q_BLHE.shape[2] // k_BMKE.shape[2]
  q, k, v = (x.swapaxes(1, 2) for x in (
      q_BLHE, jnp.repeat(k_BMKE, groups, axis=2), jnp.repeat(v_BMKE, groups, axis=2)))
  out = library.flash_attention(q, k, v, causal=True, sm_scale=scale, block_sizes=sizes)
  return out.swapaxes(1, 2)


def _splash(q_BLHE, k_BMKE, v_BMKE, scale: float, window: int):
  """JAX's splash attention, one multi-query kernel per key head."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  (B, L, H, E), K = q_BLHE.shape, k_BMKE.shape[2]
  block = min(BLOCK, L)
  names = [name for name in library.BlockSizes.__dataclass_fields__ if name.startswith('block_')]
  sizes = library.BlockSizes(**{name: block for name in names})
  head = masks.LocalMask((L, L), (window - 1, 0), 0) if window else masks.CausalMask((L, L))
  kernel = library.make_splash_mqa(masks.MultiHeadMask([head] * (H // K)), head_shards=1,
                                   q_seq_shards=1, block_sizes=sizes)
  q_BKGLE = (q_BLHE * scale).transpose(0, 2, 1, 3).reshape(B, K, H // K, L, E)
  k_BKME, v_BKME = k_BMKE.swapaxes(1, 2), v_BMKE.swapaxes(1, 2)
  out_BKGLE = jax.vmap(jax.vmap(kernel))(q_BKGLE, k_BKME, v_BKME)
  return out_BKGLE.reshape(B, H, L, E).swapaxes(1, 2)


CONTENDERS: dict[str, Callable] = {
    'flash_tpu': flash_tpu.attention,
    'jax.nn': _without_lse(_dense),
    'jax flash': _without_lse(_flash),
    'jax splash': _without_lse(_splash),
}


def lowered(case: Case, attend: Callable) -> jax.stages.Lowered:
  """Returns forward and backward of `attend` for the mesh of the case, lowered."""
  mesh = compile_only_mesh(case.topology, MeshConfig(fsdp=2, tensor=2))
  B = mesh.shape['data'] * mesh.shape['fsdp']
  q, k = (jax.ShapeDtypeStruct((B, case.length, heads, case.width), case.dtype,
                               sharding=named_sharding(mesh, axes))
          for heads, axes in ((HEADS, QUERY_AXES), (KEY_HEADS, KEY_AXES)))
  attend = functools.partial(over_mesh(mesh, attend), scale=case.width ** -0.5,
                             mask=Mask(window=case.window))

  def both(q, k, v, g):
    out, vjp, _ = jax.vjp(lambda *qkv: attend(*qkv), q, k, v, has_aux=True)
    return out, vjp(g)
  return jax.jit(both).lower(q, k, k, q)


def compiled_case(case: Case, options: dict[str, str] | None = None, **attend_options: Any
                  ) -> dict[str, Any]:
  """Returns the record of a case: what the compiler says, or why there is no program.

  Bytes are per device; `optimal_seconds`, `flops` and `bytes_accessed` are the compiler's estimate
  of one call. It sees into a Pallas kernel only as far as the kernel's CostEstimate goes.

  Args:
    case: what to compile.
    options: options of the compiler.
    attend_options: further options of the contender, such as block sizes.
  """
  began = time.perf_counter()
  record = {**dataclasses.asdict(case), 'heads': HEADS, 'key_heads': KEY_HEADS}
  try:
    attend = functools.partial(CONTENDERS[case.contender], **attend_options)
    compiled = lowered(case, attend).compile(options)
  except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
    return {**record, 'error': reason(error), 'seconds': time.perf_counter() - began}
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  calls = re.findall(r'%(\w+)\S* = .*custom_call_target="tpu_custom_call"', compiled.as_text())
  return {
      **record, 'temporary_bytes': memory.temp_size_in_bytes,
      'argument_bytes': memory.argument_size_in_bytes,
      'output_bytes': memory.output_size_in_bytes, 'flops': cost['flops'],
      'bytes_accessed': cost['bytes accessed'], 'optimal_seconds': cost['optimal_seconds'],
      'kernels': sorted(calls), 'seconds': time.perf_counter() - began}


def reason(error: Exception) -> str:
  """Returns the refusal of a program in a few words."""
  text = ' '.join(str(error).split())
  hbm = re.search(r'HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)', text)
  return f'out of memory: {hbm[1]} of {hbm[2]}' if hbm else text[:200]
