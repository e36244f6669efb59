"""Dense snapshots: arrays that grow, and what a kill in between leaves."""

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from research.training import hashes
from research.training.snapshots import SnapshotReader, SnapshotWriter, leaf_names


def tree(step: int):
  return {'a': {'w_DF': jnp.full((3, 2), step, jnp.float32)}, 'b_D': jnp.arange(4.0) + step}


def write(path, first: int, last: int) -> None:
  """Writes snapshots of steps [first, last) after what is committed already."""
  writer = SnapshotWriter(path, tree(0), 'float32', first - 1)
  for step in range(first, last):
    writer.write(step, tree(step), hashes.digests(tree(step)))
  writer.close()


@pytest.mark.parametrize('grown', ['a.w_DF', 'b_D'])
def test_a_kill_that_left_some_arrays_grown_loses_nothing(tmp_path, grown):
  """Nine rows need arrays of sixteen; the one was made so before the kill, the other was not."""
  write(tmp_path, 0, 8)
  array = ts.open({'driver': 'zarr3', 'kvstore': {
      'driver': 'file', 'path': f'{tmp_path / grown}/'}}, open=True).result()
  assert array.shape[0] == 8
  array.resize(exclusive_max=(16, *array.shape[1:])).result()
  write(tmp_path, 8, 12)
  reader = SnapshotReader(tmp_path)
  assert reader.steps == list(range(12)) and leaf_names(tree(0)) == ['a.w_DF', 'b_D']
  for name, pick in (('a.w_DF', lambda step: tree(step)['a']['w_DF']),
                     ('b_D', lambda step: tree(step)['b_D'])):
    np.testing.assert_array_equal(reader.read(reader.steps, name),
                                  np.stack([pick(step) for step in reader.steps]))


def test_snapshots_after_the_last_step_that_stays_are_made_again(tmp_path):
  write(tmp_path, 0, 5)
  write(tmp_path, 3, 4)
  assert SnapshotReader(tmp_path).steps == [0, 1, 2, 3]
