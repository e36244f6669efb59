"""Position encodings against the formulas and numbers of their papers."""

import math

import numpy as np
import pytest

from models.config import RopeConfig
from models.positions import alibi_slopes, rope_frequencies, rope_magnitude, rope_tables, rotate
from tests.models import witness

ROPES = {
  'plain': RopeConfig(theta=5e5),
  'partial': RopeConfig(fraction=0.25),
  'linear': RopeConfig(scaling='linear', factor=8.0),
  'llama3': RopeConfig(theta=5e5, scaling='llama3', factor=8.0, original_context=8192),
  'yarn': RopeConfig(scaling='yarn', factor=4.0, original_context=4096),
}


@pytest.mark.parametrize('name', ROPES)
def test_frequencies_equal_the_papers_formulas(name):
  rope, d_head = ROPES[name], 64
  n = int(d_head * rope.fraction)
  expected = [witness.rope_angle(rope, i, n, 1) for i in range(n // 2)]
  np.testing.assert_allclose(rope_frequencies(rope, d_head), expected, rtol=1e-6)


def test_llama3_keeps_short_waves_and_divides_long_ones():
  rope, plain = ROPES['llama3'], ROPES['plain']
  ratio = rope_frequencies(rope, 128) / rope_frequencies(plain, 128)
  wavelength = 2 * np.pi / rope_frequencies(plain, 128)
  np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-6)
  assert (np.diff(ratio) <= 0).all()


def test_yarn_temperature():
  assert math.isclose(rope_magnitude(ROPES['yarn']), 0.1 * math.log(4) + 1)
  assert rope_magnitude(RopeConfig(scaling='yarn', factor=4.0, attention_factor=1.5)) == 1.5
  assert rope_magnitude(ROPES['plain']) == 1


@pytest.mark.parametrize('name', ROPES)
def test_rotation_equals_plane_rotations(name):
  rope = ROPES[name]
  x_BLHE = np.random.default_rng(0).normal(size=(2, 3, 2, 16)).astype(np.float32)
  positions_BL = np.array([[0, 5, 90], [7, 1, 2]])
  got = rotate(x_BLHE, *rope_tables(rope, 16, positions_BL, 91))
  for b in range(2):
    for i in range(3):
      for h in range(2):
        expected = witness.rotated(rope, x_BLHE[b, i, h], positions_BL[b, i])
        np.testing.assert_allclose(got[b, i, h], expected, rtol=1e-4, atol=1e-5)


def test_rotated_products_depend_on_distance_only():
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 32)).astype(np.float32)

  def product(i, j):
    a = rotate(q, *rope_tables(ROPES['plain'], 32, np.array([i]), 104))
    b = rotate(k, *rope_tables(ROPES['plain'], 32, np.array([j]), 104))
    return float((a * b).sum())

  assert math.isclose(product(3, 1), product(103, 101), rel_tol=1e-4)
  assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_alibi_slopes():
  np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
  # Press et al. 2021, section 3: sixteen heads start at 2^-0.5 with that same ratio.
  np.testing.assert_allclose(alibi_slopes(16), [2 ** (-0.5 * i) for i in range(1, 17)])
  # Twelve heads: those of eight, then every other one of sixteen.
  twelve = [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
  np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)
