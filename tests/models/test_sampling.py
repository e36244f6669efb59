"""Sampling. Witness: sets of kept tokens by loops over sorted probabilities, chi-square tests."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sampling import Sampling, kept_logits, row_keys, sample

N_DRAWS = 20_000


def kept_by_loops(logits_V, sampling):
  """Returns the probabilities of tokens after every cut, by loops, float64 [V]."""
  p_V = np.exp(np.asarray(logits_V, np.float64) / sampling.temperature)
  order = sorted(range(len(p_V)), key=lambda v: (-p_V[v], v))
  if sampling.top_k:
    order = order[: sampling.top_k]
  p_V = np.array([p if v in order else 0 for v, p in enumerate(p_V)])
  p_V /= p_V.sum()
  kept, reached = [], 0.0
  for v in order:
    kept.append(v)
    reached += p_V[v]
    if reached >= sampling.top_p:
      break
  p_V = np.array([p if v in kept else 0 for v, p in enumerate(p_V)])
  return p_V / p_V.sum()


@functools.partial(jax.jit, static_argnums=(1, 2))
def draws(logits_V, sampling, n_draws=N_DRAWS, seed=0):
  """Returns many draws from one row of logits, each at a position of its own."""
  positions = jnp.arange(n_draws)
  keys = row_keys(seed, jnp.zeros(n_draws, jnp.int32), positions)
  return sample(jnp.broadcast_to(logits_V, (n_draws, len(logits_V))), keys, sampling)


LOGITS = np.log(np.array([0.02, 0.3, 0.08, 0.05, 0.25, 0.1, 0.05, 0.15], np.float32))


@pytest.mark.parametrize('sampling', [
  Sampling(), Sampling(temperature=2.5), Sampling(temperature=0.4), Sampling(top_k=3),
  Sampling(top_p=0.8), Sampling(top_k=5, top_p=0.9, temperature=1.5), Sampling(top_p=1e-6),
  Sampling(top_k=1), Sampling(top_k=100),
])
def test_draws_follow_the_kept_probabilities(sampling):
  p_V = kept_by_loops(LOGITS, sampling)
  counts_V = np.bincount(draws(LOGITS, sampling), minlength=len(p_V))
  assert (counts_V[p_V == 0] == 0).all()
  live = p_V > 0
  chi_square = ((counts_V - N_DRAWS * p_V)[live] ** 2 / (N_DRAWS * p_V[live])).sum()
  # At seven degrees of freedom 29.9 is exceeded once in 10,000; fewer degrees exceed it less.
  assert chi_square < 29.9, counts_V


def test_the_chi_square_sees_a_wrong_temperature():
  p_V = kept_by_loops(LOGITS, Sampling(temperature=1.1))
  counts_V = np.bincount(draws(LOGITS, Sampling()), minlength=len(p_V))
  assert ((counts_V - N_DRAWS * p_V) ** 2 / (N_DRAWS * p_V)).sum() > 29.9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  logits=st.lists(st.integers(-12, 12), min_size=9, max_size=9), top_k=st.integers(0, 9),
  top_p=st.floats(0.01, 1.0), temperature=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_kept_tokens_are_those_of_loops(logits, top_k, top_p, temperature):
  logits_V = np.array(logits) / 2 + np.arange(9) * 0.013  # no ties
  sampling = Sampling(temperature, top_k, top_p)
  p_V = kept_by_loops(logits_V, sampling)
  # A set whose probability is p to the last bit may round either way.
  nearest = np.abs(np.cumsum(np.sort(kept_by_loops(logits_V, Sampling(temperature, top_k)))[::-1])
                   - top_p).min()
  kept_BR, tokens_BR = kept_logits(jnp.asarray(logits_V, jnp.float32)[None], sampling)
  got_R = np.asarray(jax.nn.softmax(kept_BR[0]))
  got_V = np.zeros(9)
  got_V[np.asarray(tokens_BR[0])] = got_R
  if nearest > 1e-5:
    np.testing.assert_allclose(got_V, p_V, rtol=2e-5, atol=1e-7)


def test_ties_at_the_cut_keep_exactly_top_k():
  kept_BR, tokens_BR = kept_logits(jnp.zeros((1, 6)), Sampling(top_k=2))
  np.testing.assert_array_equal(tokens_BR, [[0, 1]])
  assert np.isfinite(kept_BR).all()
  _, tokens_BR = kept_logits(jnp.zeros((1, 4)), Sampling(top_p=0.5))
  kept_BR, _ = kept_logits(jnp.zeros((1, 4)), Sampling(top_p=0.5))
  np.testing.assert_array_equal(np.asarray(tokens_BR)[np.isfinite(kept_BR)], [0, 1])


def test_greedy_takes_the_likeliest_of_each_row():
  logits_BV = jnp.array([[0.0, 2.0, 1.0], [3.0, -1.0, 2.0]])
  keys = row_keys(0, jnp.arange(2), jnp.arange(2))
  np.testing.assert_array_equal(sample(logits_BV, keys, Sampling(temperature=0.0)), [1, 0])


def test_hidden_logits_are_never_drawn():
  logits_V = np.where(np.arange(8) == 3, -np.inf, 0).astype(np.float32)
  assert 3 not in np.asarray(draws(logits_V, Sampling(top_p=0.99), 2000))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_tokens_beyond_the_vocabulary_are_never_drawn(temperature):
  sampling = Sampling(temperature, n_tokens=5)
  assert np.asarray(draws(np.arange(8.0, dtype=np.float32), sampling, 2000)).max() == 4


def test_a_draw_depends_on_seed_row_and_position_alone():
  logits_BV = jnp.zeros((3, 10_000))

  def drawn(seed, rows, positions):
    keys = row_keys(seed, jnp.array(rows), jnp.array(positions))
    return list(map(int, sample(logits_BV[: len(rows)], keys, Sampling())))

  first = drawn(0, [0, 1, 2], [5, 6, 7])
  assert first == drawn(0, [0, 1, 2], [5, 6, 7])
  assert first[::-1] == drawn(0, [2, 1, 0], [7, 6, 5])
  assert first[1:2] == drawn(0, [1], [6])
  others = [drawn(1, [1], [6]), drawn(0, [2], [6]), drawn(0, [1], [7]), drawn(0, [6], [1])]
  assert all(other != first[1:2] for other in others)


@pytest.mark.parametrize('fields, says', [
  (dict(temperature=-1.0), 'temperature=-1.0 must be 0'),
  (dict(temperature=float('nan')), 'temperature=nan'),
  (dict(top_k=-1), 'top_k=-1 must be 0'),
  (dict(n_tokens=-1), 'n_tokens=-1 must be 0'),
  (dict(top_p=0.0), 'top_p=0.0 must be above 0'),
  (dict(top_p=1.1), 'top_p=1.1 must be above 0 and at most 1'),
])
def test_bad_settings_are_refused_in_a_sentence(fields, says):
  with pytest.raises(ValueError, match=says):
    Sampling(**fields)
