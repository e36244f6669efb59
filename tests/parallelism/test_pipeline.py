"""The pipeline's executor on a small model: gradients, what runs when, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from parallelism import pipeline
from parallelism.schedules import IDLE, schedule

D, B, L, V = 16, 4, 3, 11


def first(shared, micro):
  return shared['embedding'][micro['tokens']]


def chunk(params, place, x_BLD, micro):
  hidden_BLD = jnp.tanh(x_BLD @ params['in'] + 0.1 * place) * micro['scale']
  loss = 1e-2 * jnp.sum(hidden_BLD ** 2)
  return x_BLD + hidden_BLD @ params['out'], loss, {'penalty': loss, 'nll': 0.0 * loss}


def last(shared, x_BLD, micro):
  log_probs_BLV = jax.nn.log_softmax(x_BLD @ shared['embedding'].T)
  nll = -jnp.take_along_axis(log_probs_BLV, micro['targets'][..., None], -1).sum()
  return nll, {'penalty': 0.0 * nll, 'nll': nll}


PARTS = pipeline.Parts(first, chunk, last)


def problem(S: int, M: int, C: int):
  """Returns parameters of the chunks [S, C, ...], of the ends, and microbatches [M, ...]."""
  rng = np.random.default_rng(0)
  chunks = {k: jnp.asarray(rng.normal(size=(S, C, D, D)) * 0.2, jnp.float32)
            for k in ('in', 'out')}
  shared = {'embedding': jnp.asarray(rng.normal(size=(V, D)), jnp.float32)}
  micros = {'tokens': rng.integers(0, V, (M, B, L)), 'targets': rng.integers(0, V, (M, B, L)),
            'scale': rng.uniform(0.5, 1.5, M).astype(np.float32)}
  return chunks, shared, jax.tree.map(jnp.asarray, micros)


def one_after_the_other(chunks, shared, micros):
  """Returns the objective and the sums without a pipeline."""
  S, C = chunks['in'].shape[:2]
  total, sums = 0.0, {'penalty': 0.0, 'nll': 0.0}
  for m in range(len(micros['scale'])):
    micro = jax.tree.map(lambda x: x[m], micros)
    x = first(shared, micro)
    for place in range(S * C):
      params = jax.tree.map(lambda x: x[place % S, place // S], chunks)
      x, loss, more = chunk(params, place, x, micro)
      total, sums = total + loss, jax.tree.map(jnp.add, sums, more)
    loss, more = last(shared, x, micro)
    total, sums = total + loss, jax.tree.map(jnp.add, sums, more)
  return total, sums


def value_and_grad(made):
  """Returns f(chunks, shared, micros) -> what `pipeline.run` gives, of all stages together."""
  mesh = jax.make_mesh((made.n_stages,), ('stage',), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:made.n_stages])

  def run(chunks, shared, micros):
    own = jax.tree.map(lambda x: x[0], chunks)
    scalars, (d_chunks, d_shared), ran = pipeline.run(PARTS, made, own, shared, micros)
    scalars, d_shared = jax.lax.psum((scalars, d_shared), 'stage')
    return scalars, (jax.tree.map(lambda x: x[None], d_chunks), d_shared), ran[:, None]

  by_stage, whole = PartitionSpec('stage'), PartitionSpec()
  return jax.shard_map(
      run, mesh=mesh, in_specs=(by_stage, whole, whole), check_vma=False,
      out_specs=(whole, (by_stage, whole), PartitionSpec(None, 'stage')))


def relative(got, want) -> float:
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize('name, S, M, C', [
    ('gpipe', 4, 5, 1), ('1f1b', 4, 6, 1), ('1f1b', 2, 3, 1), ('1f1b', 8, 8, 1), ('1f1b', 3, 2, 1),
    ('interleaved', 4, 8, 2), ('interleaved', 2, 4, 3)])
def test_loss_sums_and_gradients_are_those_without_a_pipeline(name, S, M, C):
  made, (chunks, shared, micros) = schedule(name, S, M, C), problem(S, M, C)
  (loss, sums), (d_chunks, d_shared), ran = jax.jit(value_and_grad(made))(chunks, shared, micros)
  want = jax.value_and_grad(one_after_the_other, (0, 1), has_aux=True)(chunks, shared, micros)
  (want_loss, want_sums), wanted = want
  assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
  for name, value in want_sums.items():
    assert float(sums[name]) == pytest.approx(float(value), rel=1e-6)
  for got, right in zip(jax.tree.leaves((d_chunks, d_shared)), jax.tree.leaves(wanted),
                        strict=True):
    assert relative(got, right) < 1e-6 and jnp.linalg.norm(right) > 0
  # Counted in the branches themselves: what ran is what the table says, idle halves ran nothing.
  halves = np.stack([made.forward, made.backward], axis=2)[..., 0] != IDLE
  np.testing.assert_array_equal(np.asarray(ran), halves)


def test_a_wrong_table_gives_wrong_gradients():
  S, M = 4, 6
  made = schedule('1f1b', S, M)
  made.backward[[5, 6], 0] = made.backward[[6, 5], 0]  # the first stage mixes up two microbatches
  made.backward[[6, 7], 0] = made.backward[[7, 6], 0]
  chunks, shared, micros = problem(S, M, 1)
  _, (d_chunks, _), _ = jax.jit(value_and_grad(made))(chunks, shared, micros)
  want, _ = jax.grad(one_after_the_other, has_aux=True)(chunks, shared, micros)
  assert relative(d_chunks['in'][0], want['in'][0]) > 1e-3
  assert relative(d_chunks['in'][1], want['in'][1]) < 1e-6


@pytest.mark.parametrize('M, C, says', [
    (3, 1, r"micros\['scale'\] of shape \(3,\) does not begin with 4, as 1f1b of 4"),
    (4, 2, r"chunks\['in'\] of shape \(2, 16, 16\) does not begin with 1, as 1f1b of 4")])
def test_what_does_not_fit_the_schedule_is_refused(M, C, says):
  with pytest.raises(ValueError, match=says):
    jax.eval_shape(value_and_grad(schedule('1f1b', 4, 4)), *problem(4, M, C))


def _temporary_bytes(name: str, S: int, M: int, width: int = 512) -> int:
  """Returns the compiler's temporary bytes per device of a step over long rows."""
  def of(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)
  chunks = {k: of((S, 1, D, D)) for k in ('in', 'out')}
  micros = {'tokens': of((M, B, width), jnp.int32), 'targets': of((M, B, width), jnp.int32),
            'scale': of((M,))}
  run = jax.jit(value_and_grad(schedule(name, S, M)))
  compiled = run.lower(chunks, {'embedding': of((V, D))}, micros).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_temporary_memory_of_1f1b_does_not_grow_with_microbatches_but_gpipes_does():
  S = 4
  memory = {name: [_temporary_bytes(name, S, n * S) for n in (2, 8)]
            for name in ('1f1b', 'gpipe')}
  assert memory['1f1b'][1] < 1.05 * memory['1f1b'][0]
  stage_input = 4 * B * 512 * D
  assert memory['gpipe'][1] - memory['gpipe'][0] > 0.95 * 6 * S * stage_input


