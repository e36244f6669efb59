"""Suspected changes of side: their order, and the full checkpoints that stay for their captures."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.monitors.suspects import Suspects
from research.training.checkpoints import Checkpoints
from research.training.config import CheckpointConfig
from research.training.step import State


def fed(**margins: list[float]) -> Suspects:
  """Returns suspects that have seen a snapshot of every tenth step."""
  suspects = Suspects()
  for i, row in enumerate(zip(*margins.values(), strict=True)):
    suspects.add(10 * i, dict(zip(margins, row, strict=True)))
  return suspects


def test_what_may_be_a_hop_comes_before_greater_swings():
  suspects = fed(held=[-.2] * 8 + [.2] * 8, swung=[-.9] * 8 + [.9] * 3 + [-.8] * 5)
  assert [(one.dataset, one.before, one.after) for one in suspects.ranked()] == [
      ('held', 70, 80), ('swung', 70, 80), ('swung', 100, 110)]
  assert [one.change for one in suspects.ranked()] == pytest.approx([.4, 1.8, -1.7])
  assert [suspects.needed(n) for n in range(4)] == [{150}, {150, 70}, {150, 70}, {150, 70, 100}]


def test_what_is_still_between_the_sides_is_needed_with_its_least_change():
  assert fed(a=[-.5] * 7).needed(2) == {60}  # Whatever comes begins at the newest snapshot.
  assert fed(a=[-.5] * 7 + [-.05]).needed(2) == {70}
  crossed = [-.5] * 7 + [.05]
  assert fed(a=crossed).needed(2) == {60, 70} and fed(a=crossed).ranked() == []
  # Its change would be at least .5 + .1, so it comes after one of .7 and before one of .5.
  greater, less = ([-.3] * 6 + [end - .3] * 2 for end in (.7, .5))
  assert fed(a=crossed, b=greater).needed(1) == {50, 70}
  assert fed(a=crossed, b=less).needed(1) == {60, 70}
  assert fed(a=crossed + [-.2]).needed(2) == {80}  # It came back.


@pytest.mark.parametrize('snapshot_every', [5, 6, 15])
@pytest.mark.parametrize('seed', range(3))
def test_every_suspect_has_its_checkpoint_while_the_budget_lasts(seed, snapshot_every):
  """Checkpoints of every tenth step, of which the last stays and those that are needed."""
  draw, margins, n_found = np.random.default_rng(seed), np.zeros(4), 0
  ample, small, kept, few = Suspects(), Suspects(), set(), set()

  def pruned(checkpoints, step, needed):
    checkpoints |= {step}
    return {step} | {max(near) for near in (
        [at for at in checkpoints if at <= one] for one in needed) if near}

  for step in range(1801):
    if step % snapshot_every == 0:
      margins = np.clip(margins + draw.normal(0, .25, 4), -1, 1)
      named = dict(zip('abcd', margins.tolist(), strict=True))
      n_found += len(ample.add(step, named))
      small.add(step, named)
    if step and step % 10 == 0:
      kept, few = pruned(kept, step, ample.needed(999)), pruned(few, step, small.needed(2))
      assert len(few) <= 1 + 2 + 1
      assert len(small.needed(2)) <= 2 + 1
  assert len(ample.ranked()) == n_found > 4
  for one in ample.ranked():
    assert one.after == one.before + snapshot_every
    assert one.before < 10 or one.before // 10 * 10 in kept


def test_needed_checkpoints_stay_beside_the_latest_and_across_restarts(tmp_path):
  ones = {'w': jnp.ones(4)}
  state = State(step=jnp.int32(0), params=ones, optimizer=ones, ema={},
                rng=jnp.zeros(2, jnp.uint32), guard=ones)

  def saved(checkpoints, step, needed):
    checkpoints.save(step, state, {'step': step, 'tokens': 0}, {}, needed)
    checkpoints.wait()
    return sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())

  checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
  assert [saved(checkpoints, *row) for row in [(10, ()), (20, {17}), (30, {17, 26})]] == [
      [10], [10, 20], [10, 20, 30]]
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
  assert checkpoints.steps == [10, 20, 30]
  assert [saved(checkpoints, *row) for row in [(40, {17}), (50, {3}), (60, {50, 60})]] == [
      [10, 40], [50], [50, 60]]
  checkpoints.close()
