"""Step times from schedules, against sums by hand; links under meshes; facts of chips."""

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from parallelism.collectives import Collective
from parallelism.hardware import BF16_PEAKS, CHIPS, find_chip
from parallelism.hlo_program import Block, Branch, Copy, Done, Loop, Start, Work
from parallelism.mesh import AXES, MeshConfig
from parallelism.network import Network, Route
from parallelism.roofline import estimate
from parallelism.topologies import compile_only_devices, compile_only_mesh
from tests.parallelism.hlo_programs import compiled, fsdp_step

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

V5E = CHIPS['v5e']


@pytest.fixture(scope='module')
def network():
  """Links on which a device sends a gigabyte per second, half of it in an exchange."""
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(data=2, fsdp=4))
  route = Route(1e9, 1e9, 0.5e9)
  return Network(mesh, {('data',): route, ('fsdp',): route, ('data', 'fsdp'): route})


def work(compute: float, memory: float = 0.0) -> Work:
  """An operation of some seconds of both kinds."""
  return Work('work', '', compute * V5E.bf16_flops, memory * V5E.hbm_bytes_per_second)


def send(name: str, seconds: float, *axes: str, kind: str = 'all-gather') -> Start:
  """The start of a collective of some seconds."""
  return Start(Collective(name, kind, seconds * 1e9, 4, axes or ('fsdp',), ''), 0.0)


def copy(name: str, seconds: float) -> Start:
  """The start of a copy that takes all of the memory's bandwidth for some seconds."""
  n_bytes = seconds * V5E.hbm_bytes_per_second
  return Start(Copy(name), n_bytes)


def block(*nodes) -> Block:
  return Block('', nodes)


CASES = {
    'the longer of compute and memory': (block(work(3, 1), work(1, 2)), 5, {}),
    'a synchronous collective waits': (
        block(work(3), send('a', 2), Done('a'), work(1)), 6, {'fsdp': 2}),
    'work hides a collective': (block(send('a', 2), work(3), Done('a')), 3, {}),
    'work hides a part': (block(send('a', 4), work(3), Done('a')), 4, {'fsdp': 1}),
    'one axis carries one after the other': (
        block(send('a', 2), send('b', 2), work(3), Done('b'), Done('a')), 4, {'fsdp': 1}),
    'two axes carry at once': (
        block(send('a', 2), send('b', 2, 'data'), Done('a'), Done('b')), 2, {'fsdp': 2}),
    'who holds another back is to blame': (
        block(send('a', 3, 'data'), send('b', 1, 'data', 'fsdp'), Done('b'), Done('a')), 4,
        {'data': 3, 'data+fsdp': 1}),
    'an exchange is slower': (
        block(send('a', 2, kind='all-to-all'), Done('a')), 4, {'fsdp': 4}),
    'a copy runs in what the memory has left': (
        block(copy('c', 2), work(3, 2), Done('c')), 4, {}),
    'a copy does not wait for links': (
        block(send('a', 2), copy('c', 2), Done('c'), Done('a')), 2, {}),
    'a loop repeats': (
        block(Loop('', '', 5, block(send('a', 3), work(1), Done('a')))), 15, {'fsdp': 10}),
    'what a trip leaves under way slows the next': (
        block(Loop('', '', 4, block(send('a', 2), work(1), Done('a'), send('b', 3)))), 20 - 3 + 3,
        {'fsdp': 13}),
    'what is under way at the end is waited for': (block(send('a', 2), work(1)), 2, {}),
    'nested loops multiply': (
        block(Loop('', '', 3, block(work(1), Loop('', '', 4, block(work(2)))))), 27, {}),
    'no trip costs nothing': (block(Loop('', '', 0, block(work(2)))), 0, {}),
    'the slowest branch': (
        block(Branch('', '', (block(work(1)), block(send('a', 4), work(2), Done('a'))))), 4,
        {'fsdp': 2}),
}


@pytest.mark.parametrize('name', CASES)
def test_seconds_of_a_schedule(name, network):
  program, seconds, exposed = CASES[name]
  result = estimate(program, V5E, network)
  assert result.seconds == pytest.approx(seconds)
  assert {axes: s for axes, s in result.exposed.items() if s} == pytest.approx(exposed)


def test_branches_run_as_often_as_asked(network):
  program = block(Branch('b', 'cond', (block(work(1)), block(work(6)), block())))
  result = estimate(program, V5E, network, lambda branch: (0.5, 0.25, 0.25))
  assert result.seconds == pytest.approx(2)
  assert result.flops == pytest.approx(2 * V5E.bf16_flops)
  with pytest.raises(ValueError, match='branch_runs gives 2 numbers for the 3 blocks of the .* b'):
    estimate(program, V5E, network, lambda branch: (1, 0))


@pytest.mark.parametrize('program, bound, perfect', [
    (block(work(3, 2), send('a', 2), Done('a')), 'compute', 3),
    (block(work(1, 2), work(1, 2), copy('c', 1), Done('c')), 'memory', 5),
    (block(work(3), send('a', 2, 'data'), Done('a'), send('b', 2, 'data', 'fsdp'), Done('b')),
     'network axis data', 4)])
def test_the_bound_is_the_busiest_resource(program, bound, perfect, network):
  result = estimate(program, V5E, network)
  assert (result.bound, result.perfect_seconds) == (bound, pytest.approx(perfect))
  assert result.busy[bound] == result.perfect_seconds


def test_seconds_lie_between_perfect_overlap_and_none(network):
  rng = np.random.default_rng(0)
  for _ in range(50):
    nodes, open_names = [], []
    for i in range(30):
      match rng.integers(4):
        case 0:
          nodes.append(work(*rng.uniform(size=2)))
        case 1:
          axes = [('data',), ('fsdp',), ('data', 'fsdp')][rng.integers(3)]
          nodes.append(send(str(i), rng.uniform(), *axes))
          open_names.append(str(i))
        case 2:
          nodes.append(copy(str(i), rng.uniform()))
          open_names.append(str(i))
        case 3 if open_names:
          nodes.append(Done(open_names.pop(rng.integers(len(open_names)))))
    result = estimate(block(Loop('', '', 2, block(*nodes))), V5E, network)
    assert result.perfect_seconds <= result.seconds * (1 + 1e-9)
    assert result.seconds <= sum(result.busy.values()) * (1 + 1e-9)


def test_two_devices_share_a_chip(network):
  one = estimate(block(Work('', '', 1e15, 1e9)), CHIPS['tpu7x'], network)
  assert one.seconds == pytest.approx(2 * 1e15 / 2307e12)
  assert BF16_PEAKS['TPU7x'] == 2307e12 / 2


# Rates in links, per device: how many directions its dimensions give a ring, how many messages
# share a link when all send to the next, and what crosses the middle in an exchange.
@pytest.mark.parametrize('topology, sizes, axes, ring, shift, exchange', [
    ('v5e:2x4', {'fsdp': 8}, ('fsdp',), 2, 1, 7 / 8 * 4 / 4),  # a box of two lines' dimensions
    ('v5e:2x4', {'data': 2, 'fsdp': 4}, ('fsdp',), 2, 1, 3 / 4 * 4 / 2),
    # Four pairs lie across the middle, which has two links.
    ('v5e:2x4', {'data': 2, 'fsdp': 4}, ('data',), 1 / 2, 1 / 2, None),
    ('v5e:16x16', {'fsdp': 16, 'tensor': 16}, ('fsdp',), 2, 1, 15 / 16 * 4 * 2 / 16),
    ('v5e:16x16', {'fsdp': 16, 'tensor': 16}, ('fsdp', 'tensor'), 4, 1, None),
    ('v5p:2x2x2', {'fsdp': 8}, ('fsdp',), 3, 1, 7 / 8 * 4 / 2),
    ('v5p:4x4x4', {'fsdp': 16, 'tensor': 4}, ('tensor',), 2, 1, 3 / 4 * 4 * 2 / 4),
    ('v5p:4x4x4', {'fsdp': 16, 'tensor': 4}, ('fsdp',), 4, 1, None),
    # What both devices of a chip need comes to the chip once.
    ('tpu7x:2x2x1', {'fsdp': 8}, ('fsdp',), 2 * (7 / 8) / (3 / 4), 1 / 2, None),
])
def test_routes_over_whole_dimensions(topology, sizes, axes, ring, shift, exchange):
  mesh = compile_only_mesh(topology, MeshConfig(**{'data': 1, **sizes}))
  link = find_chip(topology).link_bytes_per_second
  route = Network(mesh).route(axes)
  assert (route.ring / link, route.shift / link) == pytest.approx((ring, shift))
  assert exchange is None or route.exchange / link == pytest.approx(exchange)


def test_axes_that_split_a_dimension_share_its_links():
  devices = compile_only_devices('v5p:8x8x8')
  sizes = (4, 2, 8, 1, 2, 4)  # data x context and stage x tensor split a dimension each
  mesh = jax.sharding.Mesh(mesh_utils.create_device_mesh(
      sizes, devices=devices, allow_split_physical_axes=True), AXES)
  network = Network(mesh)
  links = {name: network.route((name,)).ring / CHIPS['v5p'].link_bytes_per_second
           for name in ('data', 'stage', 'fsdp', 'context', 'tensor')}
  coordinates = np.array([device.coords for device in mesh.devices.flat]).reshape(*sizes, 3)
  for i, name in enumerate(AXES):
    if name not in links or name == 'fsdp':
      continue
    line = np.moveaxis(coordinates, i, 0)[:, 0, 0, 0, 0, 0]
    stride = np.abs(line[1] - line[0]).max()
    expected = (2 if len(line) * stride == 8 else 1) / stride  # of a ring of eight
    assert links[name] == pytest.approx(expected), name
  assert links['fsdp'] == 2


def test_chips_are_found_by_name_topology_and_device():
  for topology in ('v4:2x2x2', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4', 'tpu7x:2x2x1'):
    device = compile_only_devices(topology)[0]
    chip = find_chip(topology)
    assert find_chip(device.device_kind) is chip is find_chip(chip.name)
    assert len(device.coords) == 3 and chip.torus_dims <= 3
  with pytest.raises(ValueError, match="'v99' is no TPU .* v4, v5e, v5p, v6e, tpu7x"):
    find_chip('v99')


def test_a_compiled_step_is_between_its_bounds():
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(data=1, fsdp=8))
  result = estimate(compiled(fsdp_step(mesh), mesh), V5E, Network(mesh))
  assert result.perfect_seconds < result.seconds < sum(result.busy.values())
  assert result.bound == 'network axis fsdp'  # 512 tokens of a device do not hide its gathers
  assert 0 < result.exposed['fsdp'] < result.busy['network axis fsdp']
