"""From files to a source of rows: text tokenized once into the cache, and pre-tokenized shards."""

import pathlib
from collections.abc import Iterator, Sequence

from research.data import shards, text_files, tokenizers
from research.data.config import DataConfig, TextConfig, TokensConfig
from research.data.corpus import Component, CorpusSource, Order
from research.data.errors import DataError
from research.data.mixture import WeightSchedule
from research.data.text_files import TextFile
from research.data.token_store import (
  Document, TokenShard, cached_folder, content_key, encode_document, open_stream, write_stream)
from research.data.tokenizers import Tokenizer

Files = list[list[pathlib.Path]]  # of every entry of `paths`


def open_text(config: DataConfig, cache_dir: pathlib.Path) -> CorpusSource:
  """Source over text files, which are read and tokenized only when the cache lacks them."""
  text = config.text
  files = [text_files.list_files(p, text_files.text_suffixes(), f'data.text.paths[{i}]')
           for i, p in enumerate(text.paths)]
  hashes = [[text_files.file_sha256(f) + text_files.format_of(f) for f in group] for group in files]
  cut = {'heldout_fraction': text.heldout_fraction, 'text_field': text.text_field}
  tokenizer = _text_tokenizer(text, files, content_key(hashes=hashes, **cut), cache_dir)
  components = []
  for name, group, group_hashes in zip(text.paths, files, hashes, strict=True):
    key = content_key(hashes=group_hashes, tokenizer=tokenizer.hash, **cut)
    folder = cached_folder(cache_dir / f'tokens-{key[:24]}', _TextWriter(text, group, tokenizer))
    components.append(_cached_component(name, folder, tokenizer, group, group_hashes))
  content = content_key(hashes=hashes, tokenizer=tokenizer.hash, **cut)
  return _source(config, text, components, tokenizer, content)


def open_tokens(config: DataConfig, cache_dir: pathlib.Path) -> CorpusSource:
  """Source over pre-tokenized shards; .npy and .bin are mapped where they lie."""
  settings = config.tokens
  tokenizer = _tokenizer(settings.tokenizer)
  _require_eos(tokenizer, 'data.tokens.tokenizer', settings.tokenizer)
  components, hashes = [], []
  for i, name in enumerate(settings.paths):
    files = text_files.list_files(name, shards.SUFFIXES, f'data.tokens.paths[{i}]')
    hashes.append([text_files.file_sha256(f) for f in files])
    parts = [_open_shard(f, h, tokenizer, settings.heldout_fraction, cache_dir)
             for f, h in zip(files, hashes[-1], strict=True)]
    facts = {'files': [{'path': str(f), 'sha256': h} for f, h in zip(files, hashes[-1])]}
    components.append(Component(
      name, tuple(train for train, _ in parts), tuple(held for _, held in parts if len(held)),
      facts))
  content = content_key(
    hashes=hashes, tokenizer=tokenizer.hash, heldout_fraction=settings.heldout_fraction)
  return _source(config, settings, components, tokenizer, content)


def read_texts(text: TextConfig) -> Iterator[tuple[str, list[TextFile]]]:
  """Every entry of `paths` with its files, read and cut: what trains and what is held out."""
  for i, name in enumerate(text.paths):
    files = text_files.list_files(name, text_files.text_suffixes(), f'data.text.paths[{i}]')
    yield name, [_read(f, text) for f in files]


def _source(config: DataConfig, settings: TextConfig | TokensConfig, components: list[Component],
            tokenizer: Tokenizer, content_hash: str) -> CorpusSource:
  schedule = None
  if settings.schedule:
    schedule = WeightSchedule([(int(start), tuple(w)) for start, *w in settings.schedule])
  elif settings.weights:
    schedule = WeightSchedule([(0, settings.weights)])
  order = Order(config.sequence_length, config.batch_size, config.seed, schedule)
  return CorpusSource(components, tokenizer, order, content_hash=content_hash,
                      facts={'kind': config.kind}, field=f'data.{config.kind}')


def _read(path: pathlib.Path, text: TextConfig) -> TextFile:
  return text_files.read_text_file(path, text.heldout_fraction, text.text_field)


def _tokenizer(name: str) -> Tokenizer:
  return tokenizers.byte_tokenizer() if name == 'bytes' else tokenizers.load(name)


def _require_eos(tokenizer: Tokenizer, field: str, name: str) -> None:
  if tokenizer.eos_id is None:
    raise DataError(f'{field}={name} has no end-of-text token, which stands between documents; '
                    'name it as eos_token in a tokenizer_config.json beside it')


def _text_tokenizer(text: TextConfig, files: Files, key: str, cache_dir: pathlib.Path) -> Tokenizer:
  """The tokenizer of the text; BPE is trained on the training part, once per content."""
  if text.tokenizer != 'bpe':
    tokenizer = _tokenizer(text.tokenizer)
    _require_eos(tokenizer, 'data.text.tokenizer', text.tokenizer)
    return tokenizer

  def train(folder: pathlib.Path) -> None:
    texts = (document for group in files for f in group for document in _read(f, text).train)
    tokenizers.train_bpe(texts, text.bpe_vocab_size).save(folder / 'tokenizer.json')

  name = f'bpe-{text.bpe_vocab_size}-{key[:24]}'
  return tokenizers.load(cached_folder(cache_dir / name, train) / 'tokenizer.json')


class _TextWriter:
  """Tokenizes the files of one entry into a cache folder."""

  def __init__(self, text: TextConfig, files: Sequence[pathlib.Path], tokenizer: Tokenizer):
    self._text, self._files, self._tokenizer = text, files, tokenizer

  def __call__(self, folder: pathlib.Path) -> None:
    for part in ('train', 'heldout'):
      write_stream(folder, part, self._documents(part), self._tokenizer)

  def _documents(self, part: str) -> Iterator[Document]:
    for f, path in enumerate(self._files):
      file = _read(path, self._text)
      # Numbers count over the whole file, so that a document keeps its number whatever the cut.
      first = len(file.train) if part == 'heldout' and file.cut.startswith('document') else 0
      for number, document in enumerate(getattr(file, part), first):
        ids = encode_document(self._tokenizer, document)
        restored = part == 'train' or self._tokenizer.decode(ids) == document
        yield Document(ids, f, number, len(document.encode()) if restored else -1)


def _cached_component(name: str, folder: pathlib.Path, tokenizer: Tokenizer,
                      files: Sequence[pathlib.Path], hashes: Sequence[str]) -> Component:
  paths = [str(f) for f in files]
  parts = {part: open_stream(folder, part, tokenizer.eos_id, paths)
           for part in ('train', 'heldout')}
  facts = {'files': [
    {'path': path, 'sha256': sha256[:64], 'bytes': files[f].stat().st_size,
     **{f'{part}_bytes': _text_bytes(shard, f) for part, shard in parts.items()}}
    for f, (path, sha256) in enumerate(zip(paths, hashes, strict=True))]}
  heldout = (parts['heldout'],) if len(parts['heldout'].documents) else ()
  return Component(name, (parts['train'],), heldout, facts)


def _text_bytes(shard: TokenShard, file: int) -> int:
  """Bytes of text in the documents of one file; -1 where its tokenizer does not restore them."""
  n_bytes = shard.documents[shard.documents[:, 0] == file, 2]
  return -1 if (n_bytes < 0).any() else int(n_bytes.sum())


def _open_shard(path: pathlib.Path, sha256: str, tokenizer: Tokenizer, heldout_fraction: float,
                cache_dir: pathlib.Path) -> tuple[TokenShard, TokenShard]:
  """Training and held-out stream of one shard: cut between records, or at a token."""
  files = [str(path)]
  if path.suffix != '.arrayrecord':
    tokens = shards.open_stream_file(path, tokenizer)
    at = len(tokens) - round(len(tokens) * heldout_fraction)
    return tuple(TokenShard(part, tokenizer.eos_id, files) for part in (tokens[:at], tokens[at:]))

  shards.checked_dtype(path, tokenizer)

  def convert(folder: pathlib.Path) -> None:
    documents = shards.array_record_documents(path, 0, tokenizer)
    at = len(documents) - round(len(documents) * heldout_fraction)
    write_stream(folder, 'train', documents[:at], tokenizer)
    write_stream(folder, 'heldout', documents[at:], tokenizer)

  key = content_key(
    hashes=[sha256], tokenizer=tokenizer.hash, heldout_fraction=heldout_fraction)
  folder = cached_folder(cache_dir / f'tokens-{key[:24]}', convert)
  return tuple(open_stream(folder, p, tokenizer.eos_id, files) for p in ('train', 'heldout'))
