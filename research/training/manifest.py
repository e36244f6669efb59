"""The manifest: what a run was made from, and every start and change since."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from research import config as config_lib
from research.errors import UserError
from research.run_dir import RunDir, write_whole

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorstore', 'numpy',
            'tokenizers', 'pyarrow')
_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> str:
  result = subprocess.run(['git', '-C', str(_ROOT), *arguments], capture_output=True, text=True,
                          check=False)
  return result.stdout.strip() if result.returncode == 0 else ''


def code_version() -> str:
  """Returns the commit, with a hash of what is not committed if anything; '' without git.

  That is every change of a file that git knows, and modules that it does not know.
  """
  diff = _git('diff', 'HEAD')
  for name in _git('ls-files', '--others', '--exclude-standard', '--', '*.py').splitlines():
    diff += f'{name}\n{(_ROOT / name).read_text(encoding="utf-8", errors="replace")}'
  changed = f'+{hashlib.sha256(diff.encode()).hexdigest()[:12]}' if diff else ''
  return _git('rev-parse', 'HEAD') + changed


def _cpu_model() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text(encoding='utf-8').splitlines() if info.exists() else []
  names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor()


def machine_facts() -> dict[str, Any]:
  """Returns all on which bit-identity depends besides config and data."""
  return {
      'python': platform.python_version(),
      'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
      'platform': jax.default_backend(),
      'device_kind': jax.devices()[0].device_kind,
      'n_devices': jax.device_count(),
      'n_processes': jax.process_count(),
      'cpu': _cpu_model(),
      'threads': len(os.sched_getaffinity(0)),
      'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }


def start_facts(step: int, changes: dict[str, Any]) -> dict[str, Any]:
  """Returns the record of one start of the process: when, from where, by which code."""
  return {'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'from_step': step,
          'command': sys.argv, 'commit': _git('rev-parse', 'HEAD'),
          'diff': _git('diff', 'HEAD'),
          'untracked': _git('ls-files', '--others', '--exclude-standard').splitlines(),
          'machine': machine_facts(), 'changes': changes}


def read(run_dir: RunDir) -> dict[str, Any] | None:
  """Returns the manifest, or None for a directory without one."""
  if not run_dir.manifest_json.exists():
    return None
  return json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))


def write(run_dir: RunDir, manifest: dict[str, Any]) -> None:
  """Writes the manifest in one piece."""
  write_whole(run_dir.manifest_json, json.dumps(manifest, indent=2) + '\n')


def check_resumable(run_dir: RunDir, config: Any, data_hash: str, tokenizer_hash: str,
                    replay: dict[str, Any]) -> dict[str, Any]:
  """Returns the placement settings that changed since the run was written: path -> [old, new].

  Raises:
    UserError: an identity setting, the data, the tokenizer or what is replayed (`replay`, {} for
      a run of its own) differs; the message names it.
  """
  manifest = read(run_dir)
  saved = json.loads(run_dir.config_json.read_text(encoding='utf-8'))
  if manifest.get('replay', {}) != replay:
    raise UserError(f'{run_dir.path} holds {said(manifest.get("replay", {}))}, not {said(replay)}; '
                    'choose another directory')
  changes = {}
  for setting, old in config_lib.differences(saved, config):
    if setting.kind == 'identity':
      raise UserError(f'{run_dir.path} was made with {setting.path}={old!r}, now it is '
                      f'{setting.value!r}; choose another --run_dir or set it back')
    changes[setting.path] = [old, setting.value]
  for name, now in (('data', data_hash), ('tokenizer', tokenizer_hash)):
    if manifest['hashes'][name] != now:
      raise UserError(f'{run_dir.path} was made with {name} {manifest["hashes"][name][:12]}, now '
                      f'its hash is {now[:12]}; the {name} has changed since')
  return changes


def said(replay: dict[str, Any]) -> str:
  """Returns in words what a manifest's record of a replay says."""
  if not replay:
    return 'a run of its own'
  edits = f' with {"; ".join(replay["edits"])}' if replay['edits'] else ''
  return f'a replay of steps {replay["steps"][0]} to {replay["steps"][1]} of {replay["of"]}{edits}'


def machine_changes(manifest: dict[str, Any]) -> list[str]:
  """Returns what differs between this machine and that of the last start, as short phrases."""
  return differing_facts(manifest['starts'][-1]['machine'], machine_facts())


def differing_facts(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns what differs between two machines, as short phrases."""
  return [f'{name}: {then.get(name)} -> {now[name]}' for name in now if then.get(name) != now[name]]
