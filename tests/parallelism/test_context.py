"""Attention over rows that are split over devices, against the oracle on whole rows in float64."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from models.kernels import blockwise, interface, oracle, unrolled
from models.kernels.interface import HIDDEN, Mask
from models.positions import alibi_slopes
from parallelism import context, zigzag
from parallelism.mesh import MeshConfig, make_mesh
from tests.models.attention_harness import Case, rejected, relative, value_and_gradients
from tests.models.programs import equations

pytestmark = pytest.mark.usefixtures('quick_compilation')

L = 64
TINY = Case(L=L, M=L)
ROWS, STATISTICS = P(None, 'context'), P(None, None, 'context')
# Every feature with every number of devices at least once; chunks have 64 / 2C tokens.
RING = {
    'one device': (1, TINY),
    'causal, 2 devices': (2, TINY),
    'causal, 8 devices, segments': (8, dataclasses.replace(TINY, segments=True)),
    'window in a chunk, 2 devices': (2, dataclasses.replace(TINY, mask=Mask(window=5), alibi=True)),
    'window of a token, 8 devices': (8, dataclasses.replace(TINY, mask=Mask(window=1))),
    'window over chunks, 4 devices, everything': (4, dataclasses.replace(
        TINY, mask=Mask(window=21), segments=True, alibi=True, softcap=2.0)),
    'window over chunks, 8 devices': (8, dataclasses.replace(
        TINY, mask=Mask(window=13), segments=True, K=4)),
    'soft-cap and slopes, 4 devices, one key head': (4, dataclasses.replace(
        TINY, softcap=1.5, alibi=True, K=1)),
}
ALL_TO_ALL = {
    'key heads for all': (2, dataclasses.replace(TINY, segments=True, alibi=True)),
    'repeated key heads': (4, dataclasses.replace(TINY, mask=Mask(window=13), alibi=True, K=1)),
    'key heads repeated to a common multiple': (4, dataclasses.replace(TINY, H=12, K=6, E=8)),
    'any mask, 8 devices': (8, dataclasses.replace(
        TINY, H=8, mask=Mask(causal=False, chunk=24), segments=True, softcap=1.5)),
}


def _order(make, n_devices):
  """Returns the order of tokens that a kind of attention takes."""
  return zigzag.zigzag_order(L, n_devices) if make is context.ring else np.arange(L)


def _results(make, n_devices, case, attend=oracle.attention, dtype='float32', order=None):
  """Returns both results and the three gradients in the row's order, from n devices."""
  mesh = make_mesh(MeshConfig(data=1, context=n_devices), jax.devices())
  order = _order(make, n_devices) if order is None else order
  q, k, v, g, g_lse = case.operands()
  rows = [jnp.asarray(x[:, order], dtype) for x in (q, k, v, g)]
  options = case.options()
  segments = options.pop('segment_ids_BL', None)
  split = make(attend, n_devices)

  def local(rows, g_lse, segments):
    *qkv, g = rows
    (out, lse), vjp = jax.vjp(
        lambda *qkv: tuple(split(*qkv, segment_ids_BL=segments, **options)), *qkv)
    return (lse, [out, *vjp((g, g_lse))])

  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(ROWS, STATISTICS, ROWS),
                              out_specs=(STATISTICS, ROWS), check_vma=False))
  lse, (out, *gradients) = run(
      rows, g_lse[:, :, order].astype(np.float32), None if segments is None else segments[:, order])
  back = np.argsort(order)
  return [out[:, back], lse[:, :, back], *(x[:, back] for x in gradients)]


def _errors(make, n_devices, case, **how):
  """Returns relative errors as `attention_harness.errors` does."""
  got = _results(make, n_devices, case, **how)
  assert got[0].dtype == got[2].dtype == got[4].dtype == how.get('dtype', 'float32')
  operands = [np.asarray(jnp.asarray(x, how.get('dtype', 'float32')).astype(jnp.float32))
              for x in case.operands()[:4]]
  operands.append(case.operands()[4].astype(np.float32))
  with jax.enable_x64():
    want = value_and_gradients(
        oracle.attention, [x.astype(np.float64) for x in operands], **case.options())
    want = [np.asarray(x) for x in want]
  blind_BHL = want[1] == HIDDEN
  assert (np.asarray(got[0], np.float64)[blind_BHL.swapaxes(1, 2)] == 0).all()
  assert (np.asarray(got[1])[blind_BHL] == np.float32(HIDDEN)).all()
  got[1], want[1] = (np.where(blind_BHL, 0, x) for x in (got[1], want[1]))
  names = ('out', 'lse', 'd_q', 'd_k', 'd_v')
  return {name: relative(g, w) for name, g, w in zip(names, got, want, strict=True)}


@pytest.mark.parametrize('name', RING)
def test_a_ring_gives_the_attention_of_the_whole_row(name):
  n_devices, case = RING[name]
  attend = blockwise.attention if n_devices == 4 else oracle.attention
  with jax.default_matmul_precision('highest'):
    measured = _errors(context.ring, n_devices, case, attend=attend)
  assert not rejected(measured), measured


@pytest.mark.parametrize('name', ALL_TO_ALL)
def test_all_to_all_gives_the_attention_of_the_whole_row(name):
  n_devices, case = ALL_TO_ALL[name]
  with jax.default_matmul_precision('highest'):
    measured = _errors(context.all_to_all, n_devices, case)
  assert not rejected(measured), measured


@pytest.mark.parametrize('make', [context.ring, context.all_to_all])
def test_bfloat16_and_unrolled_attention(make):
  case = dataclasses.replace(TINY, segments=True, alibi=True)
  measured = _errors(make, 2, case, dtype='bfloat16', attend=unrolled.attention)
  assert not rejected(measured, 'bfloat16'), measured


def _shifted(q, k, v, *, mask, **options):
  """Attention whose queries after their keys believe to be a token further."""
  offset = mask.q_offset + (mask.q_offset > 0)
  return oracle.attention(q, k, v, mask=dataclasses.replace(mask, q_offset=offset), **options)


def _keep_segments(self, tree, places):
  """Ring.sent that forgets the segments of keys."""
  sent = SENT(self, tree, places)
  if isinstance(tree, context.Keys):
    sent = sent._replace(segment_ids_BM=tree.segment_ids_BM)
  return sent


def _without_own_inner(x_BLHE, y_BLHE):
  """context._inner that leaves the log-sum-exps' gradients out."""
  return jnp.zeros(x_BLHE.swapaxes(1, 2).shape[:-1], jnp.float32)


def _near(distance, chunk, window):
  """zigzag._offset that takes all chunks for neighbors."""
  return np.minimum(distance, 1)


SENT, ALL = context.Ring.sent, {'out', 'lse', 'd_q', 'd_k', 'd_v'}
# What is replaced, how the ring is called, which results are wrong then.
BROKEN = {
    'queries a token off': ((), dict(attend=_shifted), ALL),
    'segments stay': ((context.Ring, 'sent', _keep_segments), {}, ALL),
    'weights are constants': ((context, '_inner', _without_own_inner), {}, {'d_q', 'd_k'}),
    'tokens in their own order': ((), dict(order=np.arange(L)), ALL),
    'no distance between chunks': ((zigzag, '_offset', _near), {}, ALL),
}


@pytest.mark.parametrize('name', BROKEN)
def test_the_comparison_rejects_broken_rings(name, monkeypatch):
  replaced, how, wrong = BROKEN[name]
  if replaced:
    monkeypatch.setattr(*replaced)
  case = dataclasses.replace(TINY, mask=Mask(window=21), segments=True)
  assert set(rejected(_errors(context.ring, 2, case, **how))) == wrong


@pytest.mark.parametrize('make', [context.ring, context.all_to_all])
def test_heads_over_another_axis_in_scanned_layers_that_are_recomputed(make):
  case = dataclasses.replace(TINY, H=8, K=4, alibi=True, mask=Mask(window=21))
  mesh = make_mesh(MeshConfig(context=2, tensor=2), jax.devices())
  q, k, v, g, _ = (x.astype(np.float32) for x in case.operands())
  order, spec = _order(make, 2), P('data', 'context', 'tensor')
  slopes_H = alibi_slopes(case.H)

  def layers(attend, slopes_H):
    @jax.checkpoint
    def layer(x, kv):
      out, lse = attend(x, *kv, scale=0.3, mask=case.mask, alibi_slopes_H=slopes_H)
      return x + out * jnp.tanh(lse).swapaxes(1, 2)[..., None], None

    def run(q, k, v, g):
      def loss(q, k, v):
        return jnp.sum(g * jax.lax.scan(layer, q, (k, v))[0])
      return jax.grad(loss, (0, 1, 2))(q, k, v)
    return run

  def local(q, k, v, g):
    heads = case.H // 2
    own_H = jax.lax.dynamic_slice_in_dim(
        jnp.asarray(slopes_H), jax.lax.axis_index('tensor') * heads, heads)
    return layers(make(blockwise.attention, 2), own_H)(q, k, v, g)

  k, v = (np.stack([x, x[::-1]]) for x in (k, v))
  stacked = P(None, *spec)
  split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, stacked, stacked, spec),
                                out_specs=(spec, stacked, stacked), check_vma=False))
  d_q, d_k, d_v = split(q[:, order], k[:, :, order], v[:, :, order], g[:, order])
  want = jax.jit(layers(blockwise.attention, slopes_H))(q, k, v, g)
  back = np.argsort(order)
  for got, expected in zip((d_q[:, back], d_k[:, :, back], d_v[:, :, back]), want, strict=True):
    assert relative(got, np.asarray(expected, np.float64)) < 1e-5


@pytest.mark.parametrize('window', [0, 5, 21])
def test_devices_attend_for_visible_pairs_of_chunks_only(window):
  n_devices, chunk = 4, L // 8
  calls = collections.Counter()

  def counted(q, k, v, *, mask, **options):
    jax.debug.callback(lambda device: calls.update([int(device)]), jax.lax.axis_index('context'))
    assert q.shape[1] == k.shape[1] == chunk
    return oracle.attention(q, k, v, mask=mask, **options)

  _results(context.ring, n_devices, dataclasses.replace(TINY, mask=Mask(window=window)), counted)
  jax.effects_barrier()
  chunks = np.arange(2 * n_devices)
  apart = chunks[:, None] - chunks
  live = (apart >= 0) & ((window == 0) | ((apart - 1) * chunk + 1 < window))
  pairs = live.sum(1)  # by chunk of queries; backward runs each pair's forward once more
  assert calls == {c: 2 * (pairs[c] + pairs[-1 - c]) for c in range(n_devices)}
  assert window or set(calls.values()) == {2 * (2 * n_devices + 1)}


def _traced(window, n_devices):
  """Returns the equations of forward and backward of a ring in bfloat16, those of a scan once."""
  mesh = make_mesh(MeshConfig(data=1, context=n_devices), jax.devices())
  split = context.ring(oracle.attention, n_devices)

  def local(q, k, v):
    (out, lse), vjp = jax.vjp(
        lambda *qkv: tuple(split(*qkv, scale=0.3, mask=Mask(window=window))), q, k, v)
    return vjp((out, lse))

  q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in TINY.operands()[:3])
  traced = jax.make_jaxpr(jax.shard_map(local, mesh=mesh, in_specs=ROWS, out_specs=ROWS,
                                        check_vma=False))(q, k, v)
  return list(equations(traced.jaxpr))


def _named(name, traced):
  return [equation for equation in traced if equation.primitive.name == name]


def test_the_wire_has_the_dtype_of_keys_and_float32_for_their_gradients():
  sends = _named('ppermute', _traced(0, 2))
  dtypes = collections.Counter(send.invars[0].aval.dtype.name for send in sends)
  # Keys and values once in forward and once in backward; two gradients on and home.
  assert dtypes == {'bfloat16': 4, 'float32': 4}


@pytest.mark.parametrize('window, n_sends', [(1, 0), (9, 2 * (2 + 2 + 4))])
def test_nothing_is_sent_farther_than_the_window_reaches(window, n_sends):
  # To both neighbors: keys and values in forward, again in backward, two gradients on and home.
  assert len(_named('ppermute', _traced(window, 4))) == n_sends


def test_only_windows_leave_devices_a_choice():
  assert not _named('cond', _traced(0, 4))
  assert _named('cond', _traced(13, 4))


def test_what_attention_says_of_blind_queries_is_what_the_merge_expects():
  assert context.HIDDEN == interface.HIDDEN
  assert context.Attended._fields == interface.Attended._fields


def _call(make, n_devices, case, n_bound=2):
  mesh = make_mesh(MeshConfig(data=1, context=n_bound), jax.devices())
  q, k, v = (x.astype(np.float32) for x in case.operands()[:3])
  call = functools.partial(make(blockwise.attention, n_devices), **case.options())
  jax.eval_shape(jax.shard_map(lambda *x: tuple(call(*x)), mesh=mesh, in_specs=ROWS,
                               out_specs=(ROWS, STATISTICS), check_vma=False), q, k, v)


@pytest.mark.parametrize('make, n_devices, case, message', [
    (context.ring, 2, dataclasses.replace(TINY, mask=Mask(causal=False)),
     'the ring takes causal masks .* not causal=False, chunk=0, .*all_to_all takes any mask'),
    (context.ring, 2, dataclasses.replace(TINY, mask=Mask(chunk=8)), 'not causal=True, chunk=8'),
    (context.ring, 2, dataclasses.replace(TINY, L=66, M=66),
     '33 queries and 33 keys on each of 2 context devices .* rows of a multiple of 4 tokens are'),
    (context.ring, 4, TINY, "axis 'context' has 2 devices, the attention over it was made for 4"),
    (context.all_to_all, 2, dataclasses.replace(TINY, H=9, K=3),
     '9 query heads do not divide over 2 context devices; 1 or 3 would do'),
])
def test_what_does_not_fit_is_refused_in_a_sentence(make, n_devices, case, message):
  with pytest.raises(ValueError, match=message):
    _call(make, n_devices, case)
