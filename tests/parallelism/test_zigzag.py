"""The order of tokens in a ring and what its devices compute, against masks written out."""

import itertools

import numpy as np
import pytest

from parallelism import zigzag


def _steps(n_devices, chunk, window):
  """Yields (step, [Work with leaves [C]]) of a whole ring."""
  yield 0, zigzag.work_at(np.zeros((), int), n_devices, chunk, window)
  for arm in zigzag.arms(n_devices, chunk, window):
    for i in range(arm.n_steps):
      yield ((i + 1) * arm.direction % n_devices,
             [zigzag.Work(*(numbers[i] for numbers in work)) for work in arm.work])


def _seen(n_devices, chunk, window):
  """Returns how often each query sees each key [L, L], and pairs of tokens by (step, device)."""
  length = 2 * n_devices * chunk
  positions = zigzag.zigzag_order(length, n_devices).reshape(n_devices, 2, chunk)
  seen, counts = np.zeros((length, length), int), {}
  for step, works in _steps(n_devices, chunk, window):
    for device in range(n_devices):
      counts[step, device] = 0
      for work in works:
        if work.offset[device] == zigzag.DEAD:
          continue
        queries = positions[device, work.q_half[device]]
        keys = positions[(device - step) % n_devices, work.k_half[device]]
        assert queries[0] - keys[0] == work.distance[device] * chunk
        # What the attention is told: indices within chunks and the offset.
        apart = np.arange(chunk)[:, None] + work.offset[device] * chunk - np.arange(chunk)
        visible = (apart >= 0) & ((apart < window) | (window == 0))
        assert visible.any(), 'a pair of chunks that is computed for nothing'
        seen[np.ix_(queries, keys)] += visible
        counts[step, device] += visible.sum()
  return seen, counts


@pytest.mark.parametrize('n_devices, chunk', [(1, 2), (2, 1), (2, 3), (3, 2), (4, 2), (8, 1)])
def test_every_visible_pair_is_computed_once_and_every_send_is_of_use(n_devices, chunk):
  index = np.arange(2 * n_devices * chunk)
  apart = index[:, None] - index
  for window in range(len(index) + 3):
    seen, counts = _seen(n_devices, chunk, window)
    np.testing.assert_array_equal(seen, (apart >= 0) & ((apart < window) | (window == 0)))
    for step in {step for step, _ in counts}:
      assert any(counts[step, device] for device in range(n_devices)), (window, step)


@pytest.mark.parametrize('n_devices', [2, 4, 8])
def test_devices_work_equally_at_every_step_of_a_causal_ring(n_devices):
  chunk = 3
  _, counts = _seen(n_devices, chunk, 0)
  for step, device in itertools.product(range(n_devices), range(n_devices)):
    assert counts[step, device] == 2 * chunk**2 + (chunk if step == 0 else 0)


def test_under_a_window_only_devices_with_the_start_of_the_row_work_less():
  n_devices, chunk = 8, 4
  for window in range(1, n_devices * chunk):
    _, counts = _seen(n_devices, chunk, window)
    for device in range(n_devices):
      work = sum(count for (_, d), count in counts.items() if d == device)
      starts_late = device * chunk >= window - 1
      assert (work == 2 * chunk * window) == starts_late and work <= 2 * chunk * window, window


def test_a_short_window_sends_keys_to_the_neighbors_only():
  assert zigzag.arms(8, 16, 1) == ()
  assert [(arm.direction, arm.n_steps) for arm in zigzag.arms(8, 16, 17)] == [(1, 1), (-1, 1)]
  assert [(arm.direction, arm.n_steps) for arm in zigzag.arms(8, 16, 18)] == [(1, 2), (-1, 2)]
  assert [(arm.direction, arm.n_steps) for arm in zigzag.arms(8, 16, 0)] == [(1, 7)]


def test_the_order_is_that_of_chunks_from_both_ends():
  order = zigzag.zigzag_order(16, 4)
  assert order.tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  tokens = np.arange(100, 116)
  np.testing.assert_array_equal(tokens[order][np.argsort(order)], tokens)


@pytest.mark.parametrize('length, n_devices, message', [
    (20, 4, 'rows of 20 tokens do not divide into the 8 chunks of 4 context devices; '
            'rows of 16 or 24 do'),
    (6, 4, 'rows of 6 tokens .* rows of 8 do')])
def test_rows_that_do_not_divide_are_refused(length, n_devices, message):
  with pytest.raises(ValueError, match=message):
    zigzag.zigzag_order(length, n_devices)
