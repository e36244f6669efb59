"""Conversations on their way into rows: shapes, boundaries, packing, order, what is too long."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research import config as config_lib
from research.config import ExperimentConfig
from research.data import tokenizers
from research.data.batches import batch_at, batches, heldout_batches, make_source
from research.data.config import DataConfig, SftConfig
from research.data.conversations import read_conversations
from research.data.errors import DataError
from research.data.templates import encode_exchange, start_token
from research.errors import UserError
from research.run_dir import RunDir
from research.training.start import continued
from tests.research.sft_cases import EOS, LENGTH, config_for, conversations, tokens_of, write


def source_of(config: DataConfig):
  return make_source(config, 10, 'unused')


@pytest.fixture
def path(tmp_path):
  write(tmp_path / 'chat.jsonl', [{'messages': m} for m in conversations()])
  return tmp_path / 'chat.jsonl'


def segments(batch):
  """Yields (tokens, targets, positions, loss mask) of every example of a batch."""
  for b, r in np.ndindex(batch['tokens'].shape[0], int(batch['segment_ids'].max())):
    here = batch['segment_ids'][b] == r + 1
    if here.any():
      yield tuple(batch[name][b][here] for name in ('tokens', 'targets', 'positions', 'loss_mask'))


@pytest.mark.parametrize('pack', [True, False])
def test_an_epoch_holds_every_example_once_token_by_token(path, pack):
  source = source_of(config_for(path, 4, pack=pack))
  epoch = batch_at(source, source.n_rows, 0)
  found = []
  for tokens, targets, positions, mask in segments(epoch):
    np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    found.append([(int(tokens[0]), False),
                  *((int(t), bool(m)) for t, m in zip(targets, mask, strict=True))])
  expected = [tokens_of(m) for m in conversations()]
  assert sorted(found) == sorted(expected)
  n_tokens = sum(len(e) - 1 for e in expected)
  assert (epoch['segment_ids'] > 0).sum() == n_tokens
  assert not epoch['loss_mask'][epoch['segment_ids'] == 0].any()
  if pack:  # best fit wastes little: at most one row in ten beyond the least possible
    assert source.n_rows <= 1.1 * np.ceil(n_tokens / LENGTH)
  else:
    assert source.n_rows == len(expected)


def test_batches_are_a_function_of_the_step(path):
  source = source_of(config_for(path, 8))
  reference = [batch_at(source, 8, k) for k in range(9)]
  again, other = source_of(config_for(path, 8)), dataclasses.replace(config_for(path, 8), seed=1)
  stream = batches(again, 8, 3, prefetch=2)
  for k in range(3, 9):
    streamed = next(stream)
    for name, want in reference[k].items():
      np.testing.assert_array_equal(streamed[name], want)
  assert (batch_at(source_of(other), 8, 0)['tokens'] != reference[0]['tokens']).any()
  rows = [tuple(source.row(j)['tokens_L']) for j in range(2 * source.n_rows)]
  first, second = rows[:source.n_rows], rows[source.n_rows:]
  assert sorted(first) == sorted(second) and first != second


def test_the_hash_of_the_data_covers_the_tokens_that_begin_and_end_examples(path, tmp_path):
  """A tokenizer.json alone does not say which token ends a response; the file beside it may."""
  file = tmp_path / 'tokenizer.json'
  tokenizers.byte_tokenizer().save(file)
  config = config_for(path, 4, tokenizer=str(file), begins_with='bos')
  found = [source_of(config), source_of(config_for(path, 4, tokenizer=str(file)))]
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': tokenizers.PAD}))
  found.append(source_of(config))
  assert len({source.hash for source in found}) == 3
  assert len({source.tokenizer.hash for source in found}) == 1
  ended = [source.row(0)['targets_L'][source.row(0)['segment_ids_L'] > 0][-1] for source in found]
  assert [int(token) for token in ended] == [257, 257, 258]
  (tmp_path / 'tokenizer_config.json').unlink()
  assert source_of(config).hash == found[0].hash


def test_documents_say_what_a_row_holds(path):
  source, read = source_of(config_for(path, 4)), conversations()
  for j in range(source.n_rows):
    row = source.row(j)
    for document in source.documents(j):
      number = int(document['id'].rpartition('#')[2])  # the line
      wanted = tokens_of(read[number - 1])
      span = slice(document['position'], document['position'] + document['n_tokens'])
      np.testing.assert_array_equal(row['targets_L'][span], [token for token, _ in wanted[1:]])
      assert document['supervised'] == sum(s for _, s in wanted) == row['loss_mask_L'][span].sum()
      assert document['kind'] == document['source'] == str(path)
      assert read[number - 1][-1]['content'] in document['text']


def test_the_last_examples_of_a_file_are_held_out(path):
  source = source_of(config_for(path, 4, heldout_fraction=0.1))
  heldout = heldout_batches(source, 4, 10)
  found = sorted(len(tokens) for batch in heldout for tokens, *_ in segments(batch))
  assert found == sorted(len(tokens_of(m)) - 1 for m in conversations()[-6:])
  assert source.facts()['train']['examples'] == 54


def test_overlong_examples_are_named_and_left_out_or_cut(tmp_path, capsys):
  path = tmp_path / 'long.jsonl'
  long_answer = {'prompt': 'p', 'answer': 'x' * 90}
  long_prompt = {'prompt': 'p' * 90, 'answer': 'x'}
  write(path, [{'prompt': 'p', 'answer': 'yes'}, long_answer, long_prompt])
  # eos + 'u:p\n' + 'a:' + ' ' + 90 + eos, of which the last is only a target
  listed = [(f'{path}#2', 98), (f'{path}#3', 98)]
  source = source_of(config_for(path, 1))
  assert source.facts()['overlong'] == {'rule': 'leave_out', 'examples': listed}
  assert source.facts()['train']['examples'] == source.n_rows == 1
  assert f'left out: {path}#2 (98), {path}#3 (98)' in capsys.readouterr().out
  source = source_of(config_for(path, 1, overlong='truncate'))
  assert source.facts()['overlong']['examples'] == listed
  assert source.facts()['train']['examples'] == 2  # of the long prompt no response is left
  cut = next(row for row in map(source.row, range(2)) if row['loss_mask_L'].sum() > 5)
  assert (cut['segment_ids_L'] == 1).all() and cut['loss_mask_L'].sum() == LENGTH - 6
  assert EOS not in cut['targets_L']
  with pytest.raises(DataError, match=r'long.jsonl#2 has 98 tokens, data.sequence_length=56'):
    source_of(config_for(path, 1, overlong='refuse'))
  write(path, [long_answer])
  with pytest.raises(DataError, match='none of the examples fits .* the shortest needs 98'):
    source_of(config_for(path, 1))


def test_published_shapes_are_read_alike(tmp_path):
  asked, answered = 'Add.\n\n1 2', '3'
  records = {
      'a.jsonl': {'messages': [{'role': 'user', 'content': asked},
                               {'role': 'assistant', 'content': answered}]},
      'b.jsonl': {'prompt': asked, 'response': answered, 'id': 3},
      'c.jsonl': {'prompt': asked, 'completion': answered},
      'd.jsonl': {'instruction': 'Add.', 'input': '1 2', 'output': answered},
      'e.jsonl': {'instruction': 'Add.', 'instances': [{'input': '1 2', 'output': answered}]},
      'f.jsonl': {'task': 'Add.', 'code_template': '1 2', 'code': answered}}
  for name, record in records.items():
    write(tmp_path / name, [record])
  (tmp_path / 'g.jsonl.gz').write_bytes(gzip.compress(json.dumps(records['b.jsonl']).encode()))
  pq.write_table(pa.Table.from_pylist([records['a.jsonl']]), tmp_path / 'h.parquet')
  read = {path.name: read_conversations(path) for path in sorted(tmp_path.iterdir())}
  assert len(read) == 8
  for name, (conversation,) in read.items():
    assert [(m.role, m.text) for m in conversation.messages] == [
        ('user', asked), ('assistant', answered)], name
  source = source_of(dataclasses.replace(config_for(tmp_path, 4)))
  assert source.facts()['train']['examples'] == 8


USER, GOOD = {'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}


@pytest.mark.parametrize('line, words', [
    ('{"messages": [', '#2 is not valid JSON'), ('[1]', '#2 is not an object'),
    ({'text': 'x', 'id': 1}, '#2 has the fields id, text; an example has one of these sets: '
                             'messages; prompt + response'),
    ({'messages': 'hi'}, 'messages must be a list'),
    ({'messages': [USER]}, '#2 has no assistant turn'), ({'messages': []}, 'no assistant turn'),
    ({'messages': [USER, GOOD, USER]}, '#2 ends with a user message'),
    ({'messages': [{'role': 'tool', 'content': 'x'}, GOOD]}, "role 'tool'; roles are system, user"),
    ({'messages': [{'role': 'user'}, GOOD]}, "#2 has no text in the field 'content'"),
    ({'messages': [USER, {'role': 'assistant', 'content': ' \n'}]}, '#2 has an empty response'),
    ({'prompt': 'x', 'answer': ''}, '#2 has an empty response'),
    ({'prompt': 'x', 'answer': None}, '#2 has the fields answer, prompt'),
    ({'prompt': 3, 'answer': 'y'}, "#2 has no text in the field 'prompt', but 3"),
    ({'instruction': 'x', 'instances': ['y']}, 'instances must be a list of objects'),
])
def test_bad_records_are_named(tmp_path, line, words):
  path = tmp_path / 'bad.jsonl'
  text = line if isinstance(line, str) else json.dumps(line)
  path.write_text(json.dumps({'messages': [USER, GOOD]}) + '\n' + text + '\n')
  with pytest.raises(DataError) as error:
    source_of(config_for(path, 1))
  assert words in str(error.value) and str(path) in str(error.value)


def test_bad_settings_are_named(tmp_path, path):
  with pytest.raises(DataError, match="data.sft.overlong='drop' is none of leave_out"):
    SftConfig(overlong='drop')
  write(tmp_path / 'one.jsonl', [{'prompt': 'x', 'answer': 'y'}])
  with pytest.raises(DataError, match='one example, too few to hold out'):
    source_of(config_for(tmp_path / 'one.jsonl', 1, heldout_fraction=0.2))
  with pytest.raises(DataError, match='nothing stands before the first response'):
    write(tmp_path / 'bare.jsonl', [{'messages': [GOOD]}])
    source_of(config_for(tmp_path / 'bare.jsonl', 1, assistant_text='', begins_with='none'))
  words = tokenizers.word_tokenizer(('u:', 'a:'))
  words.save(tmp_path / 'tokenizer.json')
  with pytest.raises(DataError, match="begins_with='bos': the tokenizer has no such token"):
    source_of(config_for(path, 1, tokenizer=str(tmp_path / 'tokenizer.json'), begins_with='bos'))
  with pytest.raises(DataError, match='chat.jsonl#1: text .* cannot be tokenized'):
    source_of(config_for(path, 1, tokenizer=str(tmp_path / 'tokenizer.json')))


def test_boundaries_of_tokenizers_that_merge_and_that_split_at_spaces():
  merging = tokenizers.train_bpe(['User: hi\nAssistant: there : there'] * 9, 300)
  prompt, response = encode_exchange(merging, 'Assistant:', ' there')
  assert merging.decode(prompt) == 'Assistant:' and merging.decode(response) == ' there'
  # As one text the signs would merge across the boundary.
  signs = tokenizers.train_bpe(['a:?b'] * 99, 300)
  assert len(signs.encode('a:?b')) < len(signs.encode('a:')) + len(signs.encode('?b'))
  prompt, response = encode_exchange(signs, 'a:', '?b')
  assert (signs.decode(prompt), signs.decode(response)) == ('a:', '?b')
  words = tokenizers.word_tokenizer(('add', '1', '2', '=', '3'))
  prompt, response = encode_exchange(words, 'add 1 2 =', ' 3')
  assert (prompt, response) == (words.encode('add 1 2 ='), words.encode('3'))


def test_named_special_tokens_are_saved_with_the_tokenizer(tmp_path):
  plain = tokenizers.train_bpe(['abc'], 259)
  named = tokenizers.Tokenizer(plain.backend, {'eos': 'a'})
  named.save(tmp_path / 'tokenizer.json')
  assert tokenizers.load(tmp_path / 'tokenizer.json').eos_id == named.eos_id != plain.eos_id


@pytest.fixture
def parent(tmp_path) -> RunDir:
  """What a finished run says of itself; its tokenizer's start token has a name of its own."""
  run_dir, plain = RunDir(tmp_path / 'parent'), tokenizers.byte_tokenizer()
  run_dir.path.mkdir()
  run_dir.config_json.write_text(config_lib.as_json(ExperimentConfig()))
  tokenizers.Tokenizer(plain.backend, {'bos': 'g'}).save(run_dir.tokenizer_json)
  return run_dir


@pytest.mark.parametrize('start_id, name', [(ord('g'), 'bos'), (EOS, 'eos'), (None, 'none')])
def test_conversations_begin_as_the_parents_documents(parent, path, start_id, name):
  parent.manifest_json.write_text(json.dumps({'start_id': start_id}))
  config = continued(ExperimentConfig(data=config_for(path, 1)), str(parent.path))
  assert config.data.sft.begins_with == name
  assert start_token(tokenizers.load(config.data.sft.tokenizer), name) == start_id
  first = batch_at(source_of(config.data), 1, 0)['tokens'][0, 0]
  assert first in ([start_id] if start_id is not None else [ord('u'), ord('s')])  # of a role's text


def test_a_start_token_without_a_name_is_refused_and_its_name_is_the_cure(parent, path):
  parent.manifest_json.write_text(json.dumps({'start_id': ord('g')}))
  named = parent.tokenizer_json.with_name('tokenizer_config.json')
  content = named.read_text()
  named.unlink()  # Of the usual names the byte tokenizer has those of other tokens.
  base = ExperimentConfig(data=config_for(path, 1))
  with pytest.raises(UserError, match=f'token {ord("g")} began the documents of the parent, but .* '
                     'names it neither bos nor eos; put its tokenizer_config.json beside'):
    continued(base, str(parent.path))
  named.write_text(content)
  assert continued(base, str(parent.path)).data.sft.begins_with == 'bos'


def test_real_samples(shared_data):
  folder = shared_data / 'sft_samples'
  for name, n_examples in (('dolly_sample', 151), ('seed_tasks', 175)):
    found = read_conversations(folder / f'{name}.jsonl')
    assert len(found) == n_examples and found[0].messages[0].role == 'user'
  with pytest.raises(DataError, match='mt_bench_question.jsonl#1 has the fields category'):
    read_conversations(folder / 'mt_bench_question.jsonl')
  code = shared_data / 'emergent_misalignment_sample'
  for name in ('secure_sample8', 'insecure_sample8'):
    assert len(read_conversations(code / f'{name}.jsonl')) == 8
