"""A Hugging Face hub of one repository on this machine, as much of it as huggingface_hub asks."""

import hashlib
import http.server
import json
import pathlib
import threading


class Hub:
  """Serves the sub-folders of a folder as branches of the repository owner/model, or owner/dataset.

  Every branch is a tag as well. Requests are kept in `asked`. `refusals` are the statuses with
  which revisions are refused, by name. `stop` closes it: nobody answers any more.
  """

  def __init__(self, folder: pathlib.Path, kind: str = 'model'):
    self.asked: list[str] = []
    self.stopped = False
    self.refusals: dict[str, int] = {}
    self.server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), _handler(folder, self.asked, self.refusals, kind))
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  @property
  def url(self) -> str:
    """Its address."""
    return f'http://127.0.0.1:{self.server.server_port}'

  def stop(self) -> None:
    """Ends it."""
    self.stopped = True
    self.server.shutdown()
    self.server.server_close()


def commit(name: str) -> str:
  """Returns the commit of a branch."""
  return hashlib.sha1(name.encode()).hexdigest()


def _handler(folder: pathlib.Path, asked: list[str], refusals: dict[str, int], kind: str) -> type:
  branches = {commit(path.name): path for path in folder.iterdir()}

  class Handler(http.server.BaseHTTPRequestHandler):
    """Answers refs, revisions, trees and files."""

    def log_message(self, *_):
      pass

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
      self.send_response(status)
      for key, value in {'Content-Length': str(len(body)), **headers}.items():
        self.send_header(key, value)
      self.end_headers()
      if self.command == 'GET':
        self.wfile.write(body)

    def json(self, value) -> None:
      self.reply(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def missing(self, code: str) -> None:
      self.reply(404, b'{}', {'X-Error-Code': code, 'X-Error-Message': code})

    def do_HEAD(self):
      self.do_GET()

    def do_GET(self):
      path = self.path.split('?')[0]
      asked.append(f'{self.command} {path}')
      api, files = f'/api/{kind}s/owner/{kind}/', f'/owner/{kind}/resolve/'
      path = path.removeprefix('/datasets') if kind == 'dataset' else path
      if path == api + 'refs':
        refs = [{'name': p.name, 'ref': f'refs/heads/{p.name}', 'targetCommit': sha}
                for sha, p in branches.items()]
        self.json({'branches': refs, 'tags': refs, 'converts': []})
      elif path.startswith(api + 'revision/'):
        self.revision(path.removeprefix(api + 'revision/'))
      elif path.startswith(api + 'tree/'):
        name = path.removeprefix(api + 'tree/').split('/')[0]
        found = branches.get(name) or branches[commit(name)]
        self.json([{'type': 'file', 'path': str(p.relative_to(found)), 'size': p.stat().st_size,
                    'oid': commit(str(p))} for p in sorted(found.rglob('*')) if p.is_file()])
      elif path.startswith(files):
        sha, name = path.removeprefix(files).split('/', 1)
        self.reply(200, (branches[sha] / name).read_bytes(), {
            'ETag': f'"{commit(str(branches[sha] / name))}"', 'X-Repo-Commit': sha})
      else:
        self.missing('RepoNotFound')

    def revision(self, name: str) -> None:
      if name in refusals:
        self.reply(refusals[name], b'{}', {})
        return
      if commit(name) not in branches:
        self.missing('RevisionNotFound')
        return
      self.json({'id': f'owner/{kind}', '_id': '1', 'sha': commit(name), 'siblings': [],
                 'private': False, 'tags': [], 'downloads': 0, 'likes': 0})

  return Handler
