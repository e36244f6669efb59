"""Pipeline schedules: tables written out by hand, dependencies, stored inputs, bubbles."""

import itertools

import numpy as np
import pytest

from parallelism.schedules import IDLE, NAMES, Work, bubble, duration, schedule, slots

CASES = [(name, S, M, C) for name, S, M, C in itertools.product(
    NAMES, (1, 2, 3, 4), (1, 3, 4, 8, 12), (1, 2, 3))
         if (C == 1 if name != 'interleaved' else M % S == 0)]


def drawn(table) -> list[str]:
  """Returns a line per stage: F or B and the microbatch, lower case for the second chunk."""
  lines = []
  for stage in zip(*table, strict=True):
    cells = []
    for forward, backward in stage:
      text = ''
      for letters, work in (('Ff', forward), ('Bb', backward)):
        text += '' if work is None else f'{letters[work.chunk]}{work.microbatch}'
      cells.append(f'{text or ".":4}')
    lines.append(' '.join(cells).rstrip())
  return lines


# Narayanan et al. 2021, figures 3 and 4, a steady forward and backward paired in one tick.
def test_gpipe_of_two_stages():
  assert drawn(schedule('gpipe', 2, 3).table()) == [
      'F0   F1   F2   .    .    B0   B1   B2',
      '.    F0   F1   F2   B0   B1   B2   .']


def test_1f1b_of_three_stages():
  assert drawn(schedule('1f1b', 3, 4).table()) == [
      'F0   F1   F2   F3   B0   B1   B2   B3',
      '.    F0   F1   F2B0 F3B1 B2   B3   .',
      '.    .    F0B0 F1B1 F2B2 F3B3 .    .']


def test_interleaved_1f1b_of_two_stages_with_two_chunks():
  # Two microbatches pass all four places, then the next two.
  assert drawn(schedule('interleaved', 2, 4, 2).table()) == [
      'F0   F1   f0   f1   F2b0 F3b1 f2B0 f3B1 b2   b3   B2   B3',
      '.    F0   F1   f0b0 f1b1 F2B0 F3B1 f2b2 f3b3 B2   B3   .']


@pytest.mark.parametrize('name, S, M, C', CASES)
def test_everything_runs_once_and_after_what_it_needs(name, S, M, C):
  made = schedule(name, S, M, C)
  when = {}
  for half, table in (('forward', made.forward), ('backward', made.backward)):
    for t, s in np.argwhere(table[..., 0] != IDLE):
      microbatch, chunk = table[t, s]
      place = chunk * S + s
      assert (half, microbatch, place) not in when
      when[half, microbatch, place] = t
  assert len(when) == 2 * M * S * C
  last = S * C - 1
  for m in range(M):
    for place in range(last):
      assert when['forward', m, place] < when['forward', m, place + 1]
      assert when['backward', m, place + 1] < when['backward', m, place]
    assert when['forward', m, last] <= when['backward', m, last]


@pytest.mark.parametrize('name, S, M, C', CASES)
def test_what_a_stage_puts_out_is_used_by_its_neighbor_at_the_next_tick(name, S, M, C):
  made = schedule(name, S, M, C)
  for t, s in np.argwhere(made.forward[..., 0] != IDLE):
    m, chunk = made.forward[t, s]
    if chunk * S + s < S * C - 1:
      after = (m, chunk) if s < S - 1 else (m, chunk + 1)
      assert tuple(made.forward[t + 1, (s + 1) % S]) == after
  for t, s in np.argwhere(made.backward[..., 0] != IDLE):
    m, chunk = made.backward[t, s]
    if chunk * S + s > 0:
      after = (m, chunk) if s > 0 else (m, chunk - 1)
      assert tuple(made.backward[t + 1, (s - 1) % S]) == after


@pytest.mark.parametrize('name, S, M, C', CASES)
def test_no_stored_input_is_overwritten_before_it_is_read(name, S, M, C):
  made, kept = schedule(name, S, M, C), slots(schedule(name, S, M, C))
  for s in range(S):
    memory = [None] * kept.n_slots
    for t in range(made.n_ticks):
      if made.forward[t, s, 0] != IDLE:
        assert memory[kept.forward[t, s]] is None
        memory[kept.forward[t, s]] = Work(*made.forward[t, s])
      if made.backward[t, s, 0] != IDLE:
        assert memory[kept.backward[t, s]] == Work(*made.backward[t, s])
        memory[kept.backward[t, s]] = None
    assert memory == [None] * kept.n_slots


@pytest.mark.parametrize('S', [1, 2, 4, 8])
def test_stored_inputs_grow_with_the_stages_in_1f1b_and_with_microbatches_in_gpipe(S):
  for M in (2 * S, 4 * S, 8 * S):
    assert slots(schedule('1f1b', S, M)).n_slots == 2 * S - 1
    assert slots(schedule('gpipe', S, M)).n_slots == M


@pytest.mark.parametrize('name, S, M, C', [case for case in CASES if case[2] >= case[1]])
def test_the_bubble_is_the_published_one(name, S, M, C):
  # (S - 1) / (M + S - 1); interleaved, the S - 1 idle times are of a chunk (2021, section 2.2).
  idle = (S - 1) / C
  for forward, backward in ((1, 2), (1, 3)):
    assert bubble(schedule(name, S, M, C), forward, backward) == pytest.approx(
        idle / (M + idle), abs=1e-12)


def test_a_step_of_one_stage_is_its_work():
  assert duration(schedule('1f1b', 1, 5), 1.0, 2.0) == 15.0


@pytest.mark.parametrize('arguments, says', [
    (('zb', 2, 4), "'zb' is not one of gpipe, 1f1b, interleaved"),
    (('1f1b', 0, 4), 'a pipeline of 0 stages does not exist'),
    (('1f1b', 2, 4, 2), "one chunk of layers per stage, not 2; the schedule 'interleaved'"),
    (('interleaved', 4, 6, 2), 'groups of its 4 stages; 6 is not a multiple, 8 is')])
def test_what_does_not_exist_is_refused(arguments, says):
  with pytest.raises(ValueError, match=says):
    schedule(*arguments)
