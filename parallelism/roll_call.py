"""The roll call of a run's processes, and the lines on which they hear of one another's end.

Process 0 listens at the coordinator's address until every other process has called; then, or when
the time is up, it tells all of them who is there. The lines stay open: a process that dies closes
its line at once, so the others can end within seconds and say which one it was. A host that falls
silent without closing anything is left to the heartbeats of `jax.distributed`.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

EXIT_CODE = os.EX_TEMPFAIL  # of a process that ends because another did: try again
_SETTLE = 1.0  # seconds in which a process that went without a word may still show
_HELLO = 5.0  # seconds that a caller has to say who it is
_LINGER = 3.0  # seconds for the others to read the verdict


class Place(NamedTuple):
  """Who this process is: its rank, the number of processes and host:port of process 0."""

  process: int
  n_processes: int
  address: str


class Line:
  """One end of a connection that carries JSON objects, one per line of text."""

  def __init__(self, connection: socket.socket):
    self.socket = connection
    self._buffer = b''
    connection.settimeout(None)
    if connection.family != socket.AF_UNIX:
      # Firewalls forget connections that say nothing for ten minutes.
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
      if hasattr(socket, 'TCP_KEEPIDLE'):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)

  @property
  def more(self) -> bool:
    """Whether an object has come that was not asked for yet."""
    return b'\n' in self._buffer

  def send(self, **message: Any) -> None:
    """Sends one object; a line whose other end is gone takes it nowhere."""
    try:
      self.socket.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
      pass  # Reading from it says so too, and it is the reader who acts on it.

  def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
    """Returns the next object, None when the other end has closed the line.

    Raises:
      TimeoutError: nothing came within `seconds` (None: no limit).
      OSError: the network between the two failed.
      ValueError: what came is no JSON object.
    """
    self.socket.settimeout(seconds)
    while not self.more:
      try:
        data = self.socket.recv(65536)
      except ConnectionResetError:
        data = b''
      if not data:
        return None
      self._buffer += data
    text, self._buffer = self._buffer.split(b'\n', 1)
    message = json.loads(text)
    if not isinstance(message, dict):
      raise ValueError(f'not an object: {message!r}')
    return message


class Roll:
  """The processes of a run as one of them sees them, from the roll call to the end."""

  def __init__(self, place: Place, hosts: list[str], lines: dict[int, Line]):
    """Starts to listen to the lines.

    Args:
      place: this process.
      hosts: name of the host of every process.
      lines: by process; those of process 0 lead to all others, those of others to process 0.
    """
    self._place, self._hosts, self._lines = place, hosts, dict(lines)
    if place.process == 0:
      inner, outer = socket.socketpair()
      self._lines[0], self._out = Line(inner), Line(outer)
    else:
      self._out = lines[0]
    self._done: set[int] = set()
    self._failures: dict[int, str] = {}
    self._deaths: list[int] = []
    self._excused = threading.Event()
    threading.Thread(target=self._watch, name='roll', daemon=True).start()

  def part(self) -> None:
    """Tells the others that this process has done its work and may go."""
    self._out.send(done=True)
    if self._place.process == 0:
      for process in range(1, self._place.n_processes):
        self._lines[process].send(done=True)

  def tell(self, sentence: str) -> None:
    """Has process 0 print a sentence of another process, so that all stand in one place."""
    if self._place.process:
      self._out.send(says=sentence)

  def fail(self, sentence: str) -> None:
    """Tells the others why this process ends; returns if its own failure is the cause.

    Where the cause is another process, whose end made this one fail, the watching thread says so
    and ends this one.
    """
    self._out.send(failed=sentence)
    self._excused.wait(_SETTLE + _LINGER)

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      for process, line in self._lines.items():
        selector.register(line.socket, selectors.EVENT_READ, process)
      deadline = None
      while selector.get_map():
        for key, _ in selector.select(deadline and max(0.0, deadline - time.monotonic())):
          useful = self._hear(key.data)
          while useful and self._lines[key.data].more:
            useful = self._hear(key.data)
          if not useful:
            selector.unregister(key.fileobj)
        if deadline is None and (self._deaths or self._failures):
          # A death makes others fail, and their word may come first.
          deadline = time.monotonic() + (_SETTLE if self._place.process == 0 else 0)
        if deadline is not None and time.monotonic() >= deadline:
          self._conclude()
          return

  def _hear(self, process: int) -> bool:
    """Takes in one message of a process; returns whether its line is still of use."""
    try:
      message = self._lines[process].receive()
    except (OSError, ValueError):
      return False  # The network is at fault, or the line is; heartbeats judge the process.
    if message is None:
      if process not in self._done and process not in self._failures:
        self._deaths.append(process)
      return False
    if 'excused' in message:
      self._excused.set()
      return False
    if 'end' in message:
      self._end(message['end'])
    elif 'says' in message:
      print(message['says'], file=sys.stderr, flush=True)
    elif 'failed' in message:
      self._failures[process] = message['failed']
    else:
      self._done.add(process)
    return True

  def _cause(self) -> str:
    """Returns one sentence on what ended the run: deaths before failures, which may follow them."""
    again = 'start all processes again with the same command to resume from the last checkpoint'
    if self._deaths:
      return (f'{self._name(self._deaths)} ended without a word (killed, out of memory or crashed: '
              f'see its own output); {again}')
    process, sentence = next(iter(self._failures.items()))
    return f'{self._name([process])} failed: {sentence}; {again}'

  def _name(self, processes: list[int]) -> str:
    who = ', '.join(f'{process} ({self._hosts[process]})' for process in processes)
    return f'process{"es" if len(processes) > 1 else ""} {who} of {self._place.n_processes}'

  def _conclude(self) -> None:
    """Tells every process how the run ended, then ends this one unless it failed by itself."""
    cause = self._cause()
    at_fault = () if self._deaths else self._failures
    if self._place.process == 0:
      others = [process for process in self._lines if process]
      for process in others:
        self._lines[process].send(**({'excused': True} if process in at_fault else {'end': cause}))
      _linger([self._lines[process] for process in others])
    if self._place.process in at_fault:
      self._excused.set()
    else:
      self._end(cause)

  def _end(self, cause: str) -> None:
    """Ends this process, whatever its main thread is waiting for."""
    print(f'error: {cause}', file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def _linger(lines: list[Line]) -> None:
  """Waits until the other ends are closed: what is unread is lost when this process ends."""
  deadline = time.monotonic() + _LINGER
  for line in lines:
    try:
      while line.receive(max(0.01, deadline - time.monotonic())) is not None:
        pass
    except (OSError, ValueError):
      continue


def call(place: Place, seconds: float) -> Roll:
  """Returns the roll once every process is there.

  Args:
    place: this process.
    seconds: how long to wait for the others.

  Raises:
    ValueError: some did not come; the message names them and says what to do.
  """
  host, _, port = place.address.rpartition(':')
  if not host or not port.isdigit():
    raise ValueError(f'the coordinator {place.address!r} is not host:port of process 0')
  if place.process == 0:
    return _gather(place, int(port), seconds)
  return _report(place, (host.strip('[]'), int(port)), seconds)


def _gather(place: Place, port: int, seconds: float) -> Roll:
  """Process 0: waits for the others and tells them what came of it."""
  lines, hosts, callers = {}, {0: socket.gethostname()}, []
  deadline = time.monotonic() + seconds
  error = ''
  with _listen(port) as listener:
    while not error and not _all_here(place, hosts, lines):
      try:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        line = Line(listener.accept()[0])
        hello = line.receive(_HELLO)
      except TimeoutError:
        if time.monotonic() >= deadline and not _all_here(place, hosts, lines):
          error = _missing(place, hosts, seconds)
        continue
      except (OSError, ValueError):
        continue  # A stranger, or a process that will call again.
      if hello and hello.keys() == {'process', 'n_processes', 'host'}:
        callers.append(line)
        _drop_closed(hosts, lines)
        error = _contradiction(place, hosts, hello)
        hosts[hello['process']], lines[hello['process']] = hello['host'], line
  if error:
    for line in callers:
      line.send(error=error)
    _linger(callers)
    raise ValueError(error)
  names = [hosts[process] for process in range(place.n_processes)]
  for line in lines.values():
    line.send(hosts=names)
  return Roll(place, names, lines)


def _listen(port: int) -> socket.socket:
  """Returns a socket that accepts calls on every address of this host."""
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(('', port), family=socket.AF_INET6 if both else socket.AF_INET,
                                dualstack_ipv6=both, backlog=1024)
  except OSError as error:
    raise ValueError(f'process 0 cannot listen at port {port}: {error.strerror}; end what uses it '
                     'or choose another port for --coordinator') from error


def _missing(place: Place, hosts: dict[int, str], seconds: float) -> str:
  absent = [str(process) for process in range(place.n_processes) if process not in hosts]
  present = ', '.join(f'{process} ({hosts[process]})' for process in sorted(hosts))
  return (f'process{"es" if len(absent) > 1 else ""} {", ".join(absent)} of {place.n_processes} '
          f'did not call within {seconds:g} s (hosts.startup_seconds), here are {present}; start the '
          f'missing with the same command, see that they reach {place.address}, and start these '
          'again')


def _contradiction(place: Place, hosts: dict[int, str], hello: dict[str, Any]) -> str:
  """Returns what is wrong with a caller, '' if nothing."""
  process, n_processes = hello['process'], hello['n_processes']
  if n_processes != place.n_processes:
    return (f'process {process} ({hello["host"]}) was started for {n_processes} processes, process '
            f'0 ({hosts[0]}) for {place.n_processes}; give all the same number')
  if process in hosts:
    return (f'two processes call themselves {process}, on {hosts[process]} and {hello["host"]}; '
            'give each its own number')
  return ''


def _all_here(place: Place, hosts: dict[int, str], lines: dict[int, Line]) -> bool:
  _drop_closed(hosts, lines)
  return len(hosts) == place.n_processes


def _drop_closed(hosts: dict[int, str], lines: dict[int, Line]) -> None:
  """Forgets processes that have ended while they waited; they may be started again."""
  for process in [process for process, line in lines.items() if _closed(line)]:
    del hosts[process], lines[process]


def _closed(line: Line) -> bool:
  """Returns whether the other end has closed the line."""
  line.socket.settimeout(0)
  try:
    return not line.socket.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    line.socket.settimeout(None)


def _report(place: Place, address: tuple[str, int], seconds: float) -> Roll:
  """Another process: calls process 0 until it answers, then waits for its verdict."""
  deadline, reason = time.monotonic() + seconds, 'no answer'
  while (left := deadline - time.monotonic()) > 0:
    try:
      line = Line(socket.create_connection(address, timeout=left))
      line.send(process=place.process, n_processes=place.n_processes, host=socket.gethostname())
      verdict = line.receive(seconds + _HELLO)  # Process 0 may have begun to wait just now.
    except (OSError, ValueError) as error:
      reason, verdict = getattr(error, 'strerror', None) or str(error), None
    if verdict is None:
      time.sleep(min(0.5, max(0.0, left)))
    elif 'error' in verdict:
      raise ValueError(verdict['error'])
    else:
      return Roll(place, verdict['hosts'], {0: line})
  raise ValueError(
      f'process 0 of {place.n_processes} did not answer process {place.process} '
      f'({socket.gethostname()}) at {place.address} within {seconds:g} s (hosts.startup_seconds): '
      f'{reason}; start it there with the same command, or see that this host reaches it')
