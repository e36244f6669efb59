"""The benchmark that compiles attention for TPUs: what is compiled again, its tables."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments.benchmarks import tpu_programs
from research.training import manifest

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, '-m', 'experiments.benchmarks.compile_attention', *arguments], cwd=ROOT,
      text=True, capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})


def _finished(out: pathlib.Path, **made_by: str) -> list[dict]:
  """Writes made-up records of a whole table to `out`; returns them."""
  made_by = {'commit': manifest.code_version(), 'jax': jax.__version__,
             'libtpu': importlib.metadata.version('libtpu'), **made_by}
  records = []
  cases = tpu_programs.all_cases(['flash_tpu', 'jax.nn'], ['v5e:2x4'])
  for case in cases:
    record = {**dataclasses.asdict(case), 'seconds': 1.0, **made_by}
    if case.contender == 'jax.nn' and case.length == 32768:
      record['error'] = 'out of memory: 26.09G of 15.75G'
    else:
      record |= {'temporary_bytes': 1.5e6, 'optimal_seconds': 0.00025}
    records.append(record)
  out.write_text(''.join(f'{json.dumps(record)}\n' for record in records), encoding='utf-8')
  return records


def test_a_finished_table_is_printed_without_compiling(tmp_path):
  out = tmp_path / 'cases.jsonl'
  _finished(out)
  before = out.read_bytes()
  done = _run('--contenders=flash_tpu,jax.nn', '--topologies=v5e:2x4', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert f'72 of 72 cases are in {out}' in done.stdout
  assert ('| v5e:2x4 | flash_tpu MB | jax.nn MB | flash_tpu ms | jax.nn ms |\n') in done.stdout
  assert '| L 1,024, E 64, bfloat16, window 1,000 | 1.5 | 1.5 | 0.25 | 0.25 |\n' in done.stdout
  assert ('| L 32,768, E 256, float32 | 1.5 | out of memory: 26.09G of 15.75G | 0.25 |  |\n'
          in done.stdout)
  assert out.read_bytes() == before


@pytest.mark.parametrize('stale', [{'commit': '0' * 40}, {'jax': '0.4.1'}, {'libtpu': '0.0.1'}, {}])
def test_only_what_is_stale_or_half_written_is_compiled_again(tmp_path, stale):
  out = tmp_path / 'cases.jsonl'
  first, *others = _finished(out)
  lines = [json.dumps(record) for record in others]
  end = '\n' if stale else ''  # without one the line was half-written, here just before its end
  out.write_text('\n'.join([*lines, json.dumps({**first, **stale})]) + end, encoding='utf-8')
  done = _run('--contenders=flash_tpu,jax.nn', '--topologies=v5e:2x4', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert f'71 of 72 cases are in {out}\n' in done.stdout
  assert ('1 more are of another commit or version and are compiled again' in done.stdout) == bool(
      stale)
  assert (f'{out}: line 72 was half-written and is cut off' in done.stdout) == (not stale)
  written = [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
  assert written[:71] == others and len(written) == (73 if stale else 72)
  assert written[-1]['temporary_bytes'] != first['temporary_bytes']
  assert {name: written[-1][name] for name in ('commit', 'jax', 'libtpu')} == {
      name: first[name] for name in ('commit', 'jax', 'libtpu')}


def test_a_version_of_the_code_is_the_commit_and_what_changed_since(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, '_ROOT', tmp_path)
  git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@example.org']
  assert manifest.code_version() == ''
  for arguments in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'one']):
    subprocess.run([*git, *arguments], check=True)
  (tmp_path / 'kernel').write_text('1', encoding='utf-8')
  subprocess.run([*git, 'add', 'kernel'], check=True)
  commit = subprocess.check_output([*git, 'rev-parse', 'HEAD'], text=True).strip()
  first = manifest.code_version()
  (tmp_path / 'kernel').write_text('2', encoding='utf-8')
  second = manifest.code_version()
  assert first.startswith(commit + '+') and second.startswith(commit + '+') and first != second
  subprocess.run([*git, 'commit', '-qam', 'two'], check=True)
  assert manifest.code_version() == subprocess.check_output(
      [*git, 'rev-parse', 'HEAD'], text=True).strip() != commit


@pytest.mark.parametrize('text, line', [('a note\n', 1), ('{"topology": "x"}\n', 1), ('a no', 1)])
def test_a_file_of_something_else_is_left_alone(tmp_path, text, line):
  out = tmp_path / 'note'
  out.write_text(text, encoding='utf-8')
  done = _run('--contenders=flash_tpu', '--topologies=v5e:2x4', f'--out={out}')
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert f'{out}, line {line} is not a case of this benchmark' in done.stderr
  assert out.read_text(encoding='utf-8') == text


@pytest.mark.parametrize('arguments, says', [
    ('--contenders=', '--contenders is empty; name at least one of flash_tpu, jax.nn'),
    ('--cases=covering --contenders=jax.nn', '--contenders does not go with --cases=covering'),
    ('--cases=covering --topologies=v5e:2x4', '--topologies does not go with --cases=covering'),
    ('--contenders=torch', '--contenders=torch is not one of flash_tpu, jax.nn'),
    ('--topologies=v3:2x2', '--topologies=v3:2x2 is not one of v4:2x2x2')])
def test_bad_arguments_are_refused_in_a_sentence(arguments, says):
  done = _run(*arguments.split())
  assert done.returncode == 2 and says in done.stderr


def test_a_program_that_does_not_fit_is_a_record_that_says_so():
  case = tpu_programs.Case('v5e:2x4', 'jax.nn', 32768, 64, 'bfloat16', 0)
  record = tpu_programs.compiled_case(case, tpu_programs.IN_HBM)
  assert record['error'].startswith('out of memory: ') and record['error'].endswith(' of 15.75G')
  flash = tpu_programs.compiled_case(dataclasses.replace(case, contender='jax flash', window=9))
  assert flash['error'] == 'no windows'
