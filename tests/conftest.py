"""Eight fake CPU devices for every test, and where optional real data lies."""

import os
import pathlib

import jax
import pytest

# Programs started by tests run on one device unless they say otherwise.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture
def shared_data() -> pathlib.Path:
  """The folder of optional real data; tests that need it are skipped where it is absent."""
  if not SHARED_DATA.exists():
    pytest.skip('real data is not beside the checkout (../shared/data)')
  return SHARED_DATA
