"""Experts over devices against all tokens and experts on one device; bytes, memory, errors."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from models import transformer
from models.config import ModelConfig, MoEConfig
from models.dispatch import (
    Dispatched,
    Experts,
    capacity_dispatch,
    ragged_dispatch,
    ragged_experts,
)
from models.kernels.grouped import megablox
from models.moe import auxiliary_losses, route
from parallelism import experts as experts_lib
from parallelism.experts import dropless, round_rows, slot_exchange, traffic, uneven_experts
from parallelism.hlo import compile_to_text
from parallelism.hlo_program import read_program, total_flops
from parallelism.mesh import AXES, MeshConfig, make_mesh
from parallelism.topologies import compile_only_mesh

X, D, F, T, R = 16, 12, 20, 24, 2  # T tokens on each of the eight devices
TOKENS = P(('data', 'expert', 'tensor'))  # all eight, in the order of the mesh
GROUPS = {
    'expert 2': (MeshConfig(data=4, expert=2), ('expert',)),
    'expert 4': (MeshConfig(data=2, expert=4), ('expert',)),
    'expert 8': (MeshConfig(data=1, expert=8), ('expert',)),
    'expert 2 x tensor 2': (MeshConfig(data=2, expert=2, tensor=2), ('expert', 'tensor')),
    'expert 2 x tensor 4': (MeshConfig(data=1, expert=2, tensor=4), ('expert', 'tensor')),
}
FACTOR = 0.6
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures('quick_compilation')


def problem(seed=0):
  """Returns tokens, choices, weights, experts and a cotangent of the outputs."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  matrices = Experts(normal(X, D, F), normal(X, D, F), normal(X, F, D))
  expert_TR = np.stack([rng.permutation(X)[:R] for _ in range(8 * T)]).astype(np.int32)
  weight_TR = rng.uniform(0.1, 1, (8 * T, R)).astype(np.float32)
  return normal(8 * T, D), expert_TR, weight_TR, matrices, normal(8 * T, D)


def balanced(expert_TR):
  """Returns choices by which every device sends every expert equally many rows."""
  choice_A = np.arange(expert_TR.size, dtype=np.int32) % X
  return choice_A.reshape(expert_TR.shape)


def to_one(expert_TR):
  """Returns choices of which all first ones are of one expert."""
  return np.where(np.arange(R) == 0, 5, (expert_TR - 6) % (X - 1) + 6).astype(np.int32) % X


def padded(expert_TR):
  """Returns choices of which the first half's and every third token's are no expert."""
  token_T1 = np.arange(len(expert_TR))[:, None]
  return np.where((token_T1 < 4 * T) | (token_T1 % 3 == 0), X, expert_TR).astype(np.int32)


ROUTINGS = {'random': lambda expert_TR: expert_TR, 'balanced': balanced, 'one expert': to_one,
            'all to one': lambda expert_TR: np.full_like(expert_TR, 5), 'padded': padded}


def over_devices(mesh, axes, dispatch, activation=jax.nn.silu):
  """Returns f(x, choices, weights, experts, g) -> (out, gradients), (dropped, rounds) [8]."""
  replicas = tuple(name for name in ('data', 'expert', 'tensor') if name not in axes)
  owned = P(tuple(name for name in ('expert', 'tensor') if name in axes))

  def local(x_TD, expert_TR, weight_TR, matrices, g_TD):
    def outputs(x_TD, weight_TR, matrices):
      out_TD, *figures = dispatch(x_TD, expert_TR, weight_TR, matrices, activation)
      return out_TD, figures

    out_TD, vjp, figures = jax.vjp(outputs, x_TD, weight_TR, matrices, has_aux=True)
    d_x, d_weight, d_matrices = vjp(g_TD)
    d_matrices = jax.lax.psum(d_matrices, replicas)
    return (out_TD, d_x, d_weight, d_matrices), [figure[None] for figure in figures]

  return jax.jit(jax.shard_map(
      local, mesh=mesh, in_specs=(TOKENS, TOKENS, TOKENS, owned, TOKENS), check_vma=False,
      out_specs=((TOKENS, TOKENS, TOKENS, owned), TOKENS)))


@functools.cache
def compiled(group: str):
  """Returns the dropless dispatch of a group over eight devices."""
  config, axes = GROUPS[group]
  return over_devices(make_mesh(config), axes, dropless(ragged_experts, axes, FACTOR))


@functools.cache
def expected(routing: str):
  """Returns outputs and gradients of all tokens on one device."""
  x_TD, expert_TR, weight_TR, matrices, g_TD = problem()
  expert_TR = ROUTINGS[routing](expert_TR)
  with jax.default_matmul_precision('highest'):
    out_TD, vjp = jax.vjp(
        lambda *moving: ragged_dispatch(moving[0], expert_TR, *moving[1:], jax.nn.silu).out_TD,
        jnp.asarray(x_TD), weight_TR, matrices)
    return jax.tree.map(np.asarray, (out_TD, *vjp(jnp.asarray(g_TD))))


def run(function, routing: str):
  """Returns what the function gives for the problem with a routing."""
  x_TD, expert_TR, *rest = problem()
  with jax.default_matmul_precision('highest'):
    return function(x_TD, ROUTINGS[routing](expert_TR), *rest)


def errors(got, want) -> list[float]:
  """Returns ||a - b|| / ||b|| of every leaf."""
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


def wanted_rounds(group: str, routing: str) -> list[int]:
  """Returns the rounds of every device, counted from the choices."""
  config, axes = GROUPS[group]
  n_devices = math.prod(getattr(config, axis) for axis in axes)
  expert_TR = ROUTINGS[routing](problem()[1])
  owner_GSA = expert_TR.reshape(8 // n_devices, n_devices, -1) // (X // n_devices)
  fullest_G = [max(np.sum(owner_A == owner) for owner_A in owner_SA for owner in range(n_devices))
               for owner_SA in owner_GSA]
  rows = min(T * R, math.ceil(math.ceil(FACTOR * T * R / n_devices) / 16) * 16)
  return np.repeat(np.ceil(np.array(fullest_G) / rows), n_devices).tolist()


@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('group', GROUPS)
def test_outputs_and_all_gradients_are_those_of_one_device(group, routing):
  got, (dropped, rounds) = run(compiled(group), routing)
  want = expected(routing)
  assert min(np.linalg.norm(leaf) for leaf in jax.tree.leaves(want)) > 0
  assert max(errors(got, want)) <= TOLERANCE
  assert not np.any(dropped)
  assert rounds.tolist() == wanted_rounds(group, routing)


def test_the_problem_has_groups_that_take_other_numbers_of_rounds():
  assert set(wanted_rounds('expert 2 x tensor 2', 'random')) == {1, 2}
  assert set(wanted_rounds('expert 4', 'padded')) == {0, 1}
  assert set(wanted_rounds('expert 8', 'all to one')) == {3}


def test_without_the_last_round_or_with_other_owners_results_are_wrong(monkeypatch):
  config, axes = GROUPS['expert 2 x tensor 2']
  mesh, want = make_mesh(config), expected('all to one')
  got, _ = run(over_devices(mesh, axes[::-1], dropless(ragged_experts, axes[::-1], FACTOR)),
               'random')
  assert max(errors(got, expected('random'))) > 0.1
  whole = experts_lib._make_plan
  monkeypatch.setattr(experts_lib, '_make_plan', lambda *arguments: whole(
      *arguments)._replace(n_rounds=whole(*arguments).n_rounds - 1))
  got, _ = run(over_devices(mesh, axes, dropless(ragged_experts, axes, FACTOR)), 'all to one')
  assert max(errors(got, want)) > 0.1


@pytest.mark.parametrize('group', ['expert 4', 'expert 2 x tensor 4'])
@pytest.mark.parametrize('routing', ['random', 'all to one', 'padded'])
def test_slots_over_devices_are_those_of_each_device_by_itself(group, routing):
  config, axes = GROUPS[group]
  moe = MoEConfig(n_experts=X, top_k=R, capacity_factor=0.75)
  got, (dropped, _) = run(over_devices(
      make_mesh(config), axes, capacity_dispatch(moe, *slot_exchange(axes))), routing)
  x_TD, expert_TR, weight_TR, matrices, g_TD = problem()
  expert_TR = ROUTINGS[routing](expert_TR)

  @jax.jit
  def one_device(x_TD, expert_TR, weight_TR, g_TD):
    out, vjp, n_dropped = jax.vjp(
        lambda *moving: capacity_dispatch(moe)(moving[0], expert_TR, *moving[1:], jax.nn.silu)[:2],
        x_TD, weight_TR, matrices, has_aux=True)
    return (out, *vjp(g_TD)), n_dropped

  parts = [np.split(array, 8) for array in (x_TD, expert_TR, weight_TR, g_TD)]
  with jax.default_matmul_precision('highest'):
    alone = [one_device(*arrays) for arrays in zip(*parts, strict=True)]
  together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[part[:3] for part, _ in alone])
  d_matrices = jax.tree.map(lambda *leaves: sum(leaves), *[part[3] for part, _ in alone])
  assert max(errors(got, (*together, d_matrices))) <= TOLERANCE
  assert dropped.tolist() == [n_dropped for _, n_dropped in alone]
  assert sum(dropped) > 0


def test_shares_of_the_router_losses_add_up_and_so_do_their_gradients():
  rng = np.random.default_rng(0)
  logits_TX = rng.normal(size=(8 * T, X)).astype(np.float32)
  real_T = np.arange(8 * T) % 5 > np.arange(8 * T) // (2 * T)  # more padding on later devices
  mesh = make_mesh(GROUPS['expert 2 x tensor 2'][0])
  sums = functools.partial(jax.lax.psum, axis_name=TOKENS[0])

  def losses(logits_TX, real_T, total):
    p_TX, expert_TR, _ = route(logits_TX, R, True)
    return auxiliary_losses(logits_TX, p_TX, expert_TR, real_T, Dispatched(None, 1.0, 2.0),
                            total)

  def weighted(logits_TX, real_T, total):
    aux = losses(logits_TX, real_T, total)
    return aux.balance + 0.1 * aux.router_z

  def local(logits_TX, real_T):
    gradient_TX = jax.grad(weighted)(logits_TX, real_T, sums)
    return sums(losses(logits_TX, real_T, sums)), gradient_TX

  got, gradient_TX = jax.jit(jax.shard_map(
      local, mesh=mesh, in_specs=(TOKENS, TOKENS), out_specs=(P(), TOKENS), check_vma=False))(
          logits_TX, real_T)
  want = losses(logits_TX, real_T, lambda tree: tree)._replace(
      dropped=8 / (R * real_T.sum()))  # one of each device
  np.testing.assert_allclose(got, want, rtol=1e-6)
  want_TX = jax.grad(weighted)(logits_TX, real_T, lambda tree: tree)
  assert errors(gradient_TX, want_TX)[0] <= TOLERANCE


@pytest.mark.parametrize('capacity_factor', [0.0, 100.0], ids=['dropless', 'slots'])
def test_a_whole_model_over_devices_has_the_gradients_of_one(capacity_factor):
  """Scanned layers under full rematerialization, padding, router losses; batch rows over all."""
  config, axes = GROUPS['expert 2 x tensor 2']
  mesh, everywhere = make_mesh(config), TOKENS[0]
  moe = MoEConfig(n_experts=4, d_expert=8, capacity_factor=capacity_factor)
  model = ModelConfig(vocab_size=32, context_length=12, n_layers=2, d_model=16, n_heads=2,
                      n_kv_heads=2, d_head=8, moe=moe, remat='full', scan_layers='scan',
                      attention='oracle')
  dispatch = (capacity_dispatch(moe, *slot_exchange(axes)) if capacity_factor
              else dropless(ragged_experts, axes, FACTOR))
  total = functools.partial(jax.lax.psum, axis_name=everywhere)
  tokens_BL = np.random.default_rng(0).integers(0, 32, (16, 12))
  segments_BL = (np.arange(12) < 12 - np.arange(16)[:, None] // 2).astype(np.int32)
  params = transformer.init(model, 0)

  def loss(params, tokens_BL, segments_BL, seams):
    hidden_BLD, aux = transformer.apply(transformer.build(model, seams), params)(
        tokens_BL, segments_BL)
    weight_BL = jnp.sin(tokens_BL) * (segments_BL != 0)
    return (jnp.sum(weight_BL * jnp.sum(jnp.cos(hidden_BLD), axis=-1))
            + 10 * (aux.balance + aux.router_z)), aux

  specs = jax.tree.map(lambda names: P(None, axes) if 'experts' in names else P(),
                       transformer.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))

  seams = transformer.Seams(token_sum=total, expert_dispatch=dispatch)

  def local(params, *batch):
    gradients, aux = jax.grad(loss, has_aux=True)(params, *batch, seams)
    return jax.tree.map(lambda g, spec: jax.lax.psum(g, 'data' if spec else everywhere),
                        gradients, specs), total(aux)

  with jax.default_matmul_precision('highest'):
    got, aux = jax.jit(jax.shard_map(
        local, mesh=mesh, in_specs=(specs, TOKENS, TOKENS), out_specs=(specs, P()),
        check_vma=False))(params, tokens_BL, segments_BL)
    want, want_aux = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3)(
        params, tokens_BL, segments_BL, transformer.Seams())
  assert max(errors(got, want)) <= TOLERANCE
  assert min(np.linalg.norm(leaf) for leaf in jax.tree.leaves(want)) > 0
  np.testing.assert_allclose(aux[:4], want_aux[:4], rtol=1e-5)
  assert (aux.rounds >= 2) == (not capacity_factor)  # one round at least in both layers


def sent_bytes(hlo: str, n_devices: int) -> int:
  """Returns what the all-to-alls of a program send to other devices, each once."""
  total = 0
  for shapes in re.findall(r' = (.*?) all-to-all\(', hlo):
    for dtype, size in re.findall(r'(\w+)\[([\d,]+)\]', shapes):
      itemsize = int(re.sub(r'\D', '', dtype)) // 8
      total += itemsize * math.prod(map(int, size.split(',')))
  return total * (n_devices - 1) // n_devices


@pytest.mark.parametrize('group', ['expert 4', 'expert 8'])
def test_balanced_loads_send_the_stated_bytes_in_one_round(group):
  n_devices = int(group[-1])
  _, (_, rounds) = run(compiled(group), 'balanced')
  assert rounds.tolist() == [1] * 8
  hlo = compiled(group).lower(*problem()).compile().as_text()
  stated = traffic(T * R, n_devices, FACTOR, n_experts=X, d_model=D, itemsize=4)
  assert sent_bytes(hlo, n_devices) == sum(stated)
  # Written out: 16 rows, which 0.6 * 48 / P comes to in tiles; counts for all experts elsewhere.
  assert stated == (4 * (X - X // n_devices), (n_devices - 1) * 16 * (2 * 12 * 4 + 4),
                    (n_devices - 1) * 16 * (3 * 12 * 4 + 8))


@pytest.mark.parametrize('n_choices, n_devices, factor, rows', [
    (8192, 8, 1.25, 1280), (8192, 8, 1.0, 1024), (8192, 8, 8.0, 8192), (8192, 8, 100.0, 8192),
    (100, 3, 1.0, 48), (4, 2, 1.0, 4)])
def test_rows_of_a_round(n_choices, n_devices, factor, rows):
  assert round_rows(n_choices, n_devices, factor) == rows


@pytest.mark.parametrize('n_experts, group, message', [
    (6, {'expert': 2, 'tensor': 2}, 'model.moe.n_experts=6 does not split over mesh.expert=2 x '
     'mesh.tensor=2, which is 4 devices; the nearest that does is 4 or 8'),
    (3, {'expert': 8}, 'n_experts=3 does not split over mesh.expert=8, which is 8 devices; the '
     'nearest that does is 8$')])
def test_experts_that_do_not_split_are_refused(n_experts, group, message):
  assert re.search(message, uneven_experts(n_experts, group))
  assert uneven_experts(8, group) == ''


def lowered(topology: str, factor: float, capacity_factor: float = 0.0, n_tokens=1024):
  """Returns forward and backward with the TPU's products for a topology, width 1024, bfloat16."""
  axes, width = ('expert', 'tensor'), 1024
  mesh = compile_only_mesh(topology, MeshConfig(data=1, expert=4, tensor=2))
  moe = MoEConfig(n_experts=X, top_k=R, capacity_factor=capacity_factor)
  dispatch = (capacity_dispatch(moe, *slot_exchange(axes)) if capacity_factor
              else dropless(functools.partial(ragged_experts, product=megablox), axes, factor))

  def of(shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  tokens_TD, matrix_XDD = of((8 * n_tokens, width), TOKENS), of((X, width, width), P(axes))
  return over_devices(mesh, axes, dispatch).lower(
      tokens_TD, of((8 * n_tokens, R), TOKENS, jnp.int32),
      of((8 * n_tokens, R), TOKENS, jnp.float32), Experts(*[matrix_XDD] * 3), tokens_TD)


def program(*arguments, **options):
  """Returns what `lowered` returns, compiled."""
  return lowered(*arguments, **options).compile()


@pytest.mark.parametrize('topology', [
    'v5e:2x4', pytest.param('v5p:2x2x2', marks=pytest.mark.slow),
    pytest.param('v6e:2x4', marks=pytest.mark.slow)])
def test_each_row_of_a_round_is_multiplied_for_one_expert(topology):
  pytest.importorskip('libtpu')
  _, text = compile_to_text(lowered(topology, 1.25))
  axis_sizes = {**dict.fromkeys(AXES, 1), 'expert': 4, 'tensor': 2}
  counted = total_flops(read_program(text, axis_sizes, unknown_trips=1))
  # Forward three products, backward two of them again and two for each.
  product = 2 * (8 * round_rows(1024 * R, 8, 1.25)) * 1024 * 1024
  assert counted == pytest.approx((3 + 2 + 6) * product, rel=0.01)


def test_the_tpu_compiler_keeps_the_stated_exchanges():
  pytest.importorskip('libtpu')
  stated = traffic(1024 * R, 8, 1.25, n_experts=X, d_model=1024, itemsize=2)
  assert sent_bytes(program('v5e:2x4', 1.25).as_text(), 8) == sum(stated)
  slots = 7 * X // 8 * 160 * 1024 * 2  # 1.25 * 1024 tokens * 2 / 16 slots of bfloat16 rows
  assert sent_bytes(program('v5e:2x4', 1.0, 1.25).as_text(), 8) == 4 * slots


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2'])
def test_memory_of_a_round_follows_the_factor_and_not_the_worst_case(topology):
  pytest.importorskip('libtpu')
  small, large = (program(topology, factor, n_tokens=4096).memory_analysis().temp_size_in_bytes
                  for factor in (1.0, 8.0))
  rows = 4096 * R * 1024 * 2  # bytes of as many rows of width 1024 as a device has choices
  assert small < 16 * rows
  assert large - small > 7 * 5 * rows  # at least rows, cotangents, two hidden and an output
