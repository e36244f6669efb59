"""The mesh: sizes, the words of its errors, and where the axes lie on slices, tori and hosts."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from parallelism.mesh import AXES, MeshConfig, axis_sizes, make_mesh, slice_levels
from parallelism.topologies import compile_only_mesh

SLOW = ('data', 'stage')  # the axes that may lie between slices


def lines(mesh, axis):
  """Returns the devices [groups, size] that lie along one axis of the mesh."""
  return np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])


def coordinates(devices):
  return np.array([device.coords for device in devices])


def test_data_takes_what_is_left():
  assert axis_sizes(MeshConfig(fsdp=2, tensor=2), 16) == {
      'data': 4, 'stage': 1, 'fsdp': 2, 'expert': 1, 'context': 1, 'tensor': 2}


@pytest.mark.parametrize('asked, n_devices, n_slices, words', [
    # The closest of the meshes of eight: 4/3 is a smaller step than 3/2.
    (dict(fsdp=3, tensor=2), 8, 1, 'mesh.fsdp=3 x mesh.tensor=2 does not divide the 8 devices at '
     'hand; the nearest that fits is mesh.fsdp=4 x mesh.tensor=2'),
    (dict(fsdp=16), 8, 1, 'mesh.fsdp=16 does not divide the 8 devices at hand; the nearest that '
     'fits is mesh.fsdp=8'),
    (dict(data=4, tensor=4), 8, 1, 'mesh mesh.data=4 x mesh.tensor=4 needs 16 devices, 8 are at '
     'hand; the nearest that fits is mesh.data=4 x mesh.tensor=2'),
    (dict(data=3, context=5), 1, 1, 'mesh mesh.data=3 x mesh.context=5 needs 15 devices, 1 are at '
     'hand; the nearest that fits is mesh.data=1'),
    (dict(fsdp=8), 8, 2, 'mesh.data=1 x mesh.stage=1 is not a multiple of the 2 slices, between '
     'which no other axis may lie; the nearest that fits is mesh.fsdp=4'),
    (dict(data=2, fsdp=8), 16, 4, 'mesh.data=2 x mesh.stage=1 is not a multiple of the 4 slices, '
     'between which no other axis may lie; the nearest that fits is mesh.data=4 x mesh.fsdp=4'),
])
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_does(
    asked, n_devices, n_slices, words):
  with pytest.raises(ValueError) as error:
    axis_sizes(MeshConfig(**asked), n_devices, n_slices)
  assert str(error.value) == words


def test_the_nearest_mesh_is_the_nearest_of_all():
  """Against a search over all sizes from 1 to 24 per axis."""
  asked = {'fsdp': 5, 'context': 3, 'tensor': 2}
  with pytest.raises(ValueError, match='mesh.fsdp=4 x mesh.context=3 x mesh.tensor=2$'):
    axis_sizes(MeshConfig(**asked), 24)
  distances = {}
  for sizes in np.ndindex(24, 24, 24):
    sizes = tuple(size + 1 for size in sizes)
    if 24 % math.prod(sizes) == 0:
      distances[sizes] = sum(abs(math.log(a / b)) for a, b in
                             zip(sizes, asked.values(), strict=True))
  assert min(distances, key=distances.get) == (4, 3, 2)


@pytest.mark.parametrize('name, n_slices, sizes', [
    ('v5e:2x4', 2, dict(data=2, fsdp=8)),
    ('v5e:2x4', 2, dict(data=4, fsdp=2, tensor=2)),
    ('v5e:2x4', 2, dict(data=1, stage=2, fsdp=4, tensor=2)),
    ('v5p:2x2x2', 4, dict(data=2, stage=2, fsdp=4, context=2)),
    ('v4:2x2x2', 4, dict(data=4, stage=2, expert=2, tensor=2)),
    ('v5p:4x4x4', 2, dict(fsdp=64)),
    ('v6e:2x4', 3, dict(data=3, fsdp=4, tensor=2)),
])
def test_only_data_and_stage_lie_between_slices(name, n_slices, sizes):
  pytest.importorskip('libtpu')
  mesh = compile_only_mesh(name, MeshConfig(**sizes), n_slices)
  assert len(set(mesh.devices.flat)) == mesh.size  # every device once
  slices = {device.slice_index for device in mesh.devices.flat}
  assert len(slices) == n_slices
  for axis in AXES:
    spread = {len({device.slice_index for device in line}) for line in lines(mesh, axis)}
    assert axis in SLOW or spread == {1}, axis
  # Along data there are as many slices as it can be divided by.
  between = {len({device.slice_index for device in line}) for line in lines(mesh, 'data')}
  assert between == {math.gcd(mesh.shape['data'], n_slices)}


def test_the_compiler_sends_data_over_the_slow_network_and_the_rest_inside_a_slice():
  pytest.importorskip('libtpu')
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(fsdp=8), 2)

  def local(x_BD):
    return jax.lax.psum(x_BD, 'data'), jax.lax.all_gather(x_BD, 'fsdp', tiled=True)

  step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(('data', 'fsdp')),
                               out_specs=(PartitionSpec('fsdp'), PartitionSpec('data')),
                               check_vma=False))
  where = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  x_BD = jax.ShapeDtypeStruct((1024, 128), np.float32, sharding=where)
  program = step.lower(x_BD).compile().as_text().splitlines()
  (sent,) = [line for line in program if ' send(' in line]
  assert 'xla_megascale_runtime' in sent and 'psum' in sent
  (gathered,) = [line for line in program if ' all-gather(' in line]
  assert 'replica_groups={{0,1,2,3,4,5,6,7}}' in gathered  # the eight chips of either slice
  assert not any(' all-reduce(' in line for line in program)


def test_slices_that_other_axes_would_leave_are_refused():
  pytest.importorskip('libtpu')
  with pytest.raises(ValueError, match='the nearest that fits is mesh.fsdp=8$'):
    compile_only_mesh('v5e:2x4', MeshConfig(fsdp=16), 2)
  with pytest.raises(ValueError, match='uses 8 of 16 devices.*nearest that fits is mesh.data=4'):
    compile_only_mesh('v5e:2x4', MeshConfig(data=2, fsdp=4), 2)


@pytest.mark.parametrize('name, sizes, whole', [
    ('v5p:4x4x4', dict(fsdp=64), 0),
    ('v5p:4x4x4', dict(fsdp=16, tensor=4), 1),
    ('v5p:4x4x4', dict(fsdp=4, context=16), 2),
    ('v5p:4x4x4', dict(stage=4, fsdp=4, tensor=4), 1),
    ('v5p:8x8x8', dict(fsdp=64, tensor=8), 1),
    ('v4:4x4x4', dict(fsdp=16, tensor=4), 1),
    ('v5e:16x16', dict(fsdp=16, tensor=16), 1),
])
def test_axes_that_fill_dimensions_of_the_torus_get_whole_ones(name, sizes, whole):
  """The innermost axis runs along `whole` dimensions of the torus (0: all of them)."""
  pytest.importorskip('libtpu')
  mesh = compile_only_mesh(name, MeshConfig(**sizes))
  axis = 'fsdp' if not whole else 'context' if 'context' in sizes else 'tensor'
  for line in lines(mesh, axis):
    varying = [len(set(values)) > 1 for values in coordinates(line).T]
    assert sum(varying) == (whole or 3)


@pytest.mark.parametrize('name, sizes', [
    ('v5p:4x4x4', dict(fsdp=32, tensor=2)),
    ('v5p:4x4x4', dict(fsdp=8, tensor=8)),
    ('v5p:4x4x4', dict(data=2, stage=2, fsdp=2, expert=2, context=2, tensor=2)),
    ('v5p:8x8x8', dict(fsdp=128, tensor=4)),
    ('v5p:8x8x8', dict(stage=8, fsdp=16, tensor=4)),
    ('v5e:16x16', dict(fsdp=64, tensor=4)),
    ('v6e:16x16', dict(fsdp=32, tensor=8)),
])
def test_axes_that_fill_no_dimension_get_neighbors(name, sizes):
  """Tensor groups are boxes of neighboring chips, without gaps in any dimension."""
  pytest.importorskip('libtpu')
  mesh = compile_only_mesh(name, MeshConfig(**sizes))
  assert len(set(mesh.devices.flat)) == mesh.size
  for line in lines(mesh, 'tensor'):
    extents = [len(set(values)) for values in coordinates(line).T]
    spans = [max(values) - min(values) + 1 for values in coordinates(line).T]
    assert extents == spans and math.prod(extents) == mesh.shape['tensor']


def test_chips_that_are_no_cuboid_keep_their_order():
  pytest.importorskip('libtpu')
  mesh = compile_only_mesh('v5p:2x2x2', MeshConfig(data=3, tensor=2))
  assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3, 4, 5]


def test_processors_keep_their_order_and_data_is_what_crosses_hosts():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
  assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize('topology, n_slices, axes, levels', [
    ('v5e:4x4', 1, {'fsdp': 16}, 4), ('v5e:16x16', 1, {'fsdp': 256}, 16),
    ('v5p:4x4x4', 1, {'fsdp': 64}, 4), ('v5p:4x4x4', 2, {'data': 2, 'fsdp': 64}, 4)])
def test_levels_of_a_slice_are_a_line_and_what_lies_across_it(topology, n_slices, axes, levels):
  """Devices of the inner level share the coordinate that those of the outer one differ in."""
  pytest.importorskip('libtpu')
  mesh = compile_only_mesh(topology, MeshConfig(**{'data': 1, **axes}), n_slices)
  outer, inner = slice_levels(mesh)
  places = coordinates(list(mesh.devices.flat))[:outer * inner].reshape(outer, inner, -1)
  shared = [i for i in range(places.shape[-1]) if (places[:, :, i] == places[:, :1, i]).all()
            and len(set(places[:, 0, i])) == outer]
  assert outer == levels and len(shared) == 1


def test_devices_without_a_torus_have_one_level():
  assert slice_levels(make_mesh(MeshConfig(data=1, fsdp=8))) == (8,)
