"""Eight fake CPU devices for every test, and where optional real data lies."""

import fnmatch
import os
import pathlib

# Before JAX is imported: plugins of accelerators that are not there stay out. Programs started by
# tests inherit it and run on one device unless they say otherwise.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture
def shared_data() -> pathlib.Path:
  """The folder of optional real data; tests that need it are skipped where it is absent."""
  if not SHARED_DATA.exists():
    pytest.skip('real data is not beside the checkout (../shared/data)')
  return SHARED_DATA


@pytest.fixture(scope='module')
def quick_compilation():
  """Compiles without optimization, for files that run many programs once on tiny shapes."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


_skipped: list[str] = []


def _allowed_skips() -> list[str]:
  lines = (pathlib.Path(__file__).parent / 'allowed_skips.txt').read_text(encoding='utf-8')
  return [line.partition(' #')[0].strip() for line in lines.splitlines()
          if line.strip() and not line.startswith('#')]


def pytest_runtest_logreport(report):
  """Remembers skipped tests."""
  if report.skipped and not hasattr(report, 'wasxfail'):
    _skipped.append(report.nodeid)


def pytest_sessionfinish(session):
  """Fails the suite in CI when a test was skipped that is not on the list."""
  allowed = _allowed_skips()
  unexpected = [test for test in _skipped
                if not any(fnmatch.fnmatch(test, pattern) for pattern in allowed)]
  if os.environ.get('CI') and unexpected:
    print('\nskipped but not in tests/allowed_skips.txt: ' + ', '.join(unexpected))
    session.exitstatus = 1
