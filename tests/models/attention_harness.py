"""Holds attention implementations to the oracle in float64: outputs and all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels import oracle
from models.kernels.interface import HIDDEN, Mask
from models.positions import alibi_slopes

TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
  """A problem: sizes and features."""

  L: int = 37
  M: int = 37
  H: int = 4
  K: int = 2
  E: int = 16
  mask: Mask = Mask()
  segments: bool = False
  softcap: float = 0.0
  alibi: bool = False
  scale: float = 0.3
  B: int = 2

  def operands(self, seed: int = 0) -> list[np.ndarray]:
    """Returns queries, keys, values and the cotangents of both results, unit scale, float64."""
    rng = np.random.default_rng(seed)
    B, L, M, H, K, E = self.B, self.L, self.M, self.H, self.K, self.E
    shapes = ((B, L, H, E), (B, M, K, E), (B, M, K, E), (B, L, H, E), (B, H, L))
    return [rng.normal(size=shape) for shape in shapes]

  def options(self) -> dict:
    """Returns the keyword arguments; segments start with padding in row 0 and end with it."""
    options = dict(scale=self.scale, mask=self.mask, softcap=self.softcap)
    if self.alibi:
      options['alibi_slopes_H'] = alibi_slopes(self.H)
    if self.segments:
      rng = np.random.default_rng(1)
      options['segment_ids_BL'] = np.sort(rng.integers(0, 3, (self.B, self.L))).astype(np.int32)
      if self.M != self.L:
        keys_BM = np.sort(rng.integers(0, 3, (self.B, self.M)))
        options['key_segment_ids_BM'] = keys_BM.astype(np.int32)
    return options


def value_and_gradients(attend, operands, **options):
  """Returns output, log-sum-exp and the gradients of queries, keys and values, jitted."""
  q, k, v, *cotangents = operands

  @jax.jit
  def both(q, k, v, cotangents):
    results, vjp = jax.vjp(lambda *qkv: tuple(attend(*qkv, **options)), q, k, v)
    return *results, *vjp(tuple(cotangents))
  return both(q, k, v, cotangents)


def relative(got, want: np.ndarray) -> float:
  """Returns ||got - want|| / ||want||, or ||got|| where the wanted is zero."""
  norm = np.linalg.norm(want)
  return float(np.linalg.norm(np.asarray(got, np.float64) - want) / (norm if norm else 1))


def errors(attend, case: Case, dtype: str = 'float32') -> dict[str, float]:
  """Returns the relative errors of both results and the three gradients, NaN where NaN.

  The oracle takes the operands as the implementation sees them, rounded to `dtype`. A query
  that sees nothing has to give exactly 0 and HIDDEN, or its error is infinite.
  """
  rounded = [jnp.asarray(x, dtype) for x in case.operands()[:4]]
  g_lse = jnp.asarray(case.operands()[4], jnp.float32)
  got = value_and_gradients(attend, [*rounded, g_lse], **case.options())
  with jax.enable_x64():
    exact = [np.asarray(x).astype(np.float64) for x in (*rounded, g_lse)]
    want = value_and_gradients(oracle.attention, exact, **case.options())
    want = [np.asarray(x) for x in want]
  out, lse = np.asarray(got[0], np.float64), np.asarray(got[1], np.float64)
  blind_BHL = want[1] == HIDDEN
  if (out[blind_BHL.swapaxes(1, 2)] != 0).any() or (lse[blind_BHL] != np.float32(HIDDEN)).any():
    return {'blind queries': np.inf}
  names = ('out', 'lse', 'd_q', 'd_k', 'd_v')
  results = [out, np.where(blind_BHL, 0, lse), *got[2:]]
  wanted = [want[0], np.where(blind_BHL, 0, want[1]), *want[2:]]
  return {name: relative(g, w) for name, g, w in zip(names, results, wanted, strict=True)}


def rejected(measured: dict[str, float], dtype: str = 'float32') -> list[str]:
  """Returns the names of the results that are off by more than the tolerance, or NaN."""
  return [name for name, error in measured.items() if not error <= TOLERANCE[dtype]]
