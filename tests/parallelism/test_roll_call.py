"""Real processes that call one another: who is missing, who died, who failed, who is done."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from parallelism.roll_call import EXIT_CODE

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST = socket.gethostname()
# A process: rank, number, address, patience, then what it does after so many seconds.
PROGRAM = """
import os, signal, sys, time
from parallelism import roll_call
rank, number, address, patience, act, seconds = sys.argv[1:]
try:
  roll = roll_call.call(roll_call.Place(int(rank), int(number), address), float(patience))
except ValueError as error:
  sys.exit(f'refused: {error}')
print('all here', flush=True)
time.sleep(float(seconds))
if act == 'die':
  os.kill(os.getpid(), signal.SIGKILL)
if act == 'fail':
  roll.fail('out of luck')
  sys.exit(3)
if act == 'tell':
  roll.tell(f'{rank} stands still')
  time.sleep(1)
roll.part()
"""


def free_address() -> str:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{listener.getsockname()[1]}'


def start(address, rank, number, act='part', seconds=0.0, patience=20.0):
  return subprocess.Popen(
      [sys.executable, '-c', PROGRAM, *map(str, (rank, number, address, patience, act, seconds))],
      cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE)


def results(processes):
  """Returns (exit code, stdout, stderr) of each."""
  return [(process.wait(timeout=60), *process.communicate()) for process in processes]


def test_processes_that_finish_at_different_times_disturb_nobody():
  address = free_address()
  seconds = (0.6, 0.0, 1.2)
  ended = results([start(address, rank, 3, 'part', seconds[rank]) for rank in range(3)])
  assert ended == [(0, 'all here\n', '')] * 3


def test_process_0_prints_what_the_others_have_to_say():
  address = free_address()
  ended = results([start(address, rank, 3, 'tell') for rank in range(3)])
  assert [code for code, _, _ in ended] == [0, 0, 0]
  assert [sorted(errors.splitlines()) for _, _, errors in ended] == [
      ['1 stands still', '2 stands still'], [], []]


@pytest.mark.parametrize('victim', [0, 1, 2])
def test_the_process_that_died_is_named_by_all_others_within_seconds(victim):
  address = free_address()
  processes = [start(address, rank, 3, *(('die', 0.3) if rank == victim else ('part', 100.0)))
               for rank in range(3)]
  processes[victim].wait(timeout=60)
  died = time.monotonic()
  ended = results(processes)
  assert time.monotonic() - died < 10
  assert ended.pop(victim)[0] == -signal.SIGKILL
  for code, _, errors in ended:
    assert code == EXIT_CODE
    assert errors.startswith(f'error: process {victim} ({HOST}) of 3 ended without a word')
    assert errors.count('\n') == 1 and 'start all processes again' in errors


def test_a_failure_that_follows_a_death_is_not_taken_for_its_cause():
  address = free_address()
  acts = {0: ('fail', 0.5), 1: ('die', 0.6), 2: ('fail', 0.4)}
  ended = results([start(address, rank, 3, *acts[rank]) for rank in range(3)])
  assert [code for code, _, _ in ended] == [EXIT_CODE, -signal.SIGKILL, EXIT_CODE]
  for rank in (0, 2):
    assert ended[rank][2].startswith(f'error: process 1 ({HOST}) of 3 ended without a word')


@pytest.mark.parametrize('culprit', [0, 2])
def test_a_process_that_fails_keeps_its_own_error_and_the_others_say_it(culprit):
  address = free_address()
  ended = results([start(address, rank, 3, *(('fail', 0.3) if rank == culprit else ('part', 100.0)))
                   for rank in range(3)])
  assert ended.pop(culprit) == (3, 'all here\n', '')
  for code, _, errors in ended:
    assert code == EXIT_CODE
    assert errors.startswith(f'error: process {culprit} ({HOST}) of 3 failed: out of luck; start')


def test_missing_processes_are_named_by_all_that_came():
  address = free_address()
  began = time.monotonic()
  ended = results([start(address, rank, 4, patience=3) for rank in (0, 2)])
  assert time.monotonic() - began < 15
  for code, out, errors in ended:
    assert (code, out) == (1, '')
    assert errors.startswith('refused: processes 1, 3 of 4 did not call within 3 s '
                             f'(hosts.startup_seconds), here are 0 ({HOST}), 2 ({HOST}); start')


def test_a_missing_process_0_is_named_by_those_that_call_it():
  address = free_address()
  ((code, _, errors),) = results([start(address, 1, 2, patience=2)])
  assert code == 1 and errors.count('\n') == 1
  assert f'process 0 of 2 did not answer process 1 ({HOST}) at {address} within 2 s' in errors
  assert 'Connection refused' in errors


def test_processes_started_for_different_numbers_are_told_so():
  address = free_address()
  for code, _, errors in results([start(address, 0, 2), start(address, 1, 3)]):
    assert code == 1
    assert f'process 1 ({HOST}) was started for 3 processes, process 0 ({HOST}) for 2' in errors


def test_two_processes_of_one_rank_are_told_so():
  address = free_address()
  for code, _, errors in results([start(address, rank, 3) for rank in (0, 1, 1)]):
    assert code == 1
    assert f'two processes call themselves 1, on {HOST} and {HOST}' in errors


def test_a_port_in_use_is_named():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    ((code, _, errors),) = results([start(f'127.0.0.1:{port}', 0, 2)])
  assert code == 1 and f'cannot listen at port {port}: Address already in use' in errors


@pytest.mark.parametrize('address', ['localhost', 'localhost:port', ':80'])
def test_an_address_without_host_or_port_is_refused(address):
  ((code, _, errors),) = results([start(address, 0, 2)])
  assert code == 1 and f'{address!r} is not host:port' in errors


def test_strangers_and_a_caller_that_hung_up_do_not_take_a_place():
  address = free_address()
  host, port = address.split(':')
  first = start(address, 0, 2, 'part', 0.5)
  words = (b'GET / HTTP/1.1\r\n\r\n', b'[1]\n', b'', b'{"process": 1}\n',
           f'{{"process": 2, "n_processes": 3, "host": "{HOST}"}}'.encode())  # never finished
  for word in words:
    stranger = None
    while stranger is None:
      try:
        stranger = socket.create_connection((host, int(port)))
      except ConnectionRefusedError:
        time.sleep(0.02)  # process 0 does not listen yet
    stranger.sendall(word)
    stranger.close()
  assert results([first, start(address, 1, 2)]) == [(0, 'all here\n', '')] * 2


def test_a_process_that_was_started_again_takes_its_place_back():
  address = free_address()
  first, killed = start(address, 0, 3, patience=40), start(address, 1, 3)
  time.sleep(1.0)  # it has called and waits for process 2
  killed.kill()
  killed.communicate()
  ended = results([first, start(address, 1, 3), start(address, 2, 3)])
  assert ended == [(0, 'all here\n', '')] * 3
