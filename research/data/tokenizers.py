"""Tokenizers: a thin face over Hugging Face `tokenizers`, with hash, offsets and special ids."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers as hf

from research.data.errors import DataError

BOS, EOS, PAD = '<|bos|>', '<|eos|>', '<|pad|>'
SPECIALS = (BOS, EOS, PAD)

# Names under which published tokenizer.json files carry these roles, likeliest first.
_KNOWN_NAMES = {
  'bos': (BOS, '<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>'),
  'eos': (EOS, '</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>', '<|im_end|>'),
  'pad': (PAD, '<pad>', '<|padding|>', '[PAD]', '<|finetune_right_pad_id|>'),
}
_PIECE = 1 << 20  # characters: longest text handed over at once while training


class Tokenizer:
  """Text to token ids and back.

  Byte-level tokenizers never read special tokens out of text: '<|eos|>' inside a document is
  plain characters.

  Attributes:
    vocab_size: ids are below it.
    bos_id, eos_id, pad_id: special ids, None where the tokenizer has none.
    hash: sha256 (hex) of the canonical JSON of the tokenizer.
  """

  def __init__(self, backend: hf.Tokenizer, names: dict[str, str] | None = None):
    """Wraps `backend`; `names` says which token is 'bos', 'eos', 'pad' (else the usual names)."""
    self.backend, self._names = backend, names or {}
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
    vocab = backend.get_vocab(with_added_tokens=True)
    if vocab and max(vocab.values()) >= self.vocab_size:
      self.vocab_size = max(vocab.values()) + 1  # published files may leave holes in the ids
    self._roles = {role: self._find(role, vocab, names or {}) for role in _KNOWN_NAMES}
    self.bos_id, self.eos_id, self.pad_id = (
      None if self._roles[r] is None else vocab[self._roles[r]] for r in ('bos', 'eos', 'pad'))

  @staticmethod
  def _find(role: str, vocab: dict[str, int], names: dict[str, str]) -> str | None:
    if role in names:
      if names[role] not in vocab:
        raise DataError(f'the tokenizer has no token {names[role]!r}, which should be its {role}')
      return names[role]
    return next((name for name in _KNOWN_NAMES[role] if name in vocab), None)

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, without special tokens; raises DataError on words it cannot write."""
    return self._encode(text).ids

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text` and the [start, end) of each in characters.

    Tokens that are pieces of one character all carry that character's offsets.
    """
    encoding = self._encode(text)
    return encoding.ids, encoding.offsets

  def _encode(self, text: str) -> hf.Encoding:
    try:
      return self.backend.encode(text, add_special_tokens=False)
    except Exception as error:  # the bindings raise bare Exception for an unknown word
      raise DataError(f'text {text[:60]!r} cannot be tokenized: {error}') from error

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special tokens appear by name."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

  @functools.cached_property
  def hash(self) -> str:
    canonical = json.dumps(
      json.loads(self.backend.to_str()), sort_keys=True, separators=(',', ':'), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a tokenizer.json that `load` and other Hugging Face tools read.

    Where special tokens were named, a tokenizer_config.json beside it names them.
    """
    path = pathlib.Path(path)
    path.write_text(self.backend.to_str(pretty=True) + '\n', encoding='utf-8')
    if self._names:
      named = {f'{role}_token': name for role, name in self._names.items()}
      path.with_name('tokenizer_config.json').write_text(
        json.dumps(named, indent=2) + '\n', encoding='utf-8')


def load(path: str | pathlib.Path) -> Tokenizer:
  """Tokenizer of a tokenizer.json; a tokenizer_config.json beside it names the special tokens."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"tokenizer {path} is not a file; give 'bytes', 'bpe' or a tokenizer.json")
  try:
    backend = hf.Tokenizer.from_str(path.read_text(encoding='utf-8'))
  except Exception as error:  # the bindings raise bare Exception
    raise DataError(f'tokenizer {path} is not a readable tokenizer.json: {error}') from error
  return Tokenizer(backend, _configured_names(path.with_name('tokenizer_config.json')))


def _configured_names(path: pathlib.Path) -> dict[str, str]:
  if not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise DataError(f'{path} is not valid JSON: {error}') from error
  names = {role: config.get(f'{role}_token') for role in _KNOWN_NAMES}
  names = {role: n['content'] if isinstance(n, dict) else n for role, n in names.items()}
  return {role: name for role, name in names.items() if name}


def byte_characters() -> list[str]:
  """The 256 characters that byte-level tokenizers write bytes 0..255 with (GPT-2's alphabet)."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  unused = iter(range(256, 512))
  return [chr(b if b in printable else next(unused)) for b in range(256)]


def _byte_level(model: hf.models.Model, *, split_words: bool) -> hf.Tokenizer:
  backend = hf.Tokenizer(model)
  backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=split_words)
  backend.decoder = hf.decoders.ByteLevel()
  return backend


def byte_tokenizer() -> Tokenizer:
  """Tokenizer whose id is the byte value, then BOS 256, EOS 257, PAD 258."""
  vocab = {character: byte for byte, character in enumerate(byte_characters())}
  backend = _byte_level(hf.models.BPE(vocab=vocab, merges=[]), split_words=False)
  backend.add_special_tokens(list(SPECIALS))
  return Tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Lossless byte-level BPE of at most `vocab_size` ids: 3 specials, 256 bytes, merges by count."""
  backend = _byte_level(hf.models.BPE(), split_words=True)
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
  pieces = (piece for text in texts for piece in pieces_of(text, _PIECE))
  backend.train_from_iterator(pieces, trainer)
  return Tokenizer(backend)


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
  """Tokenizer of a closed list of words separated by white space: PAD 0, EOS 1, then the words.

  A word outside the list raises DataError; decoding puts one space between words.
  """
  vocab = {word: i for i, word in enumerate((PAD, EOS, *words))}
  if len(vocab) != len(words) + 2:
    raise DataError('the word list of a tokenizer names a word twice')
  backend = hf.Tokenizer(hf.models.WordLevel(vocab=vocab, unk_token=''))
  backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens([PAD, EOS])
  return Tokenizer(backend)


def pieces_of(text: str, size: int) -> Iterable[str]:
  """`text` in order, in pieces of at most `size` characters that end at a line end if they can."""
  start = 0
  while start < len(text):
    stop = min(start + size, len(text))
    if stop < len(text):
      stop = text.rfind('\n', start, stop) + 1 or stop
    yield text[start:stop]
    start = stop
