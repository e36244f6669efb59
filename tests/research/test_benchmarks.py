"""The benchmarks: rivals compute modehop's decoder, intervals are exact, the commands work.

Witnesses: Flax NNX's own layers and attention with Optax's cross-entropy (an independent decoder)
for the loss and its gradient; closed forms of the binomial for intervals; hand-made timing rows.
The PyTorch rivals are compared by the benchmark itself at its start.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    ablation,
    contenders,
    flax_step,
    modehop_step,
    rounds,
    run_cost,
    scoring_contenders,
    shapes,
    timing_rows,
)
from experiments.benchmarks.estimates import estimate
from research.errors import UserError
from research.training.step import make_loss

SHAPE = dataclasses.replace(shapes.SHAPES['tiny'], n_heads=4, d_head=8)
N_ROWS = 3


@pytest.fixture(scope='module')
def model():
  """Build, weights and batch of a small decoder."""
  built = modehop_step.build(SHAPE, N_ROWS, 'float32')
  return built, modehop_step.fresh_weights(built), shapes.batches(SHAPE, N_ROWS, 1)[0]


@nnx.jit
def flax_value_and_grad(decoder, tokens_BL, targets_BL):
  return nnx.value_and_grad(flax_step.loss_fn)(decoder, tokens_BL, targets_BL)


@pytest.fixture(scope='module')
def both(model):
  """Loss and gradient, by modehop's names, of modehop and of the Flax decoder."""
  built, weights, batch = model
  micro = {name: jnp.asarray(x) for name, x in modehop_step.full_batch(batch).items()}
  value_and_grad = jax.jit(
      jax.value_and_grad(make_loss(built.config, built.graphdef), has_aux=True))
  with jax.default_matmul_precision('highest'):
    (loss, _), grads = value_and_grad(
        modehop_step.unflatten(built, weights), micro, jax.random.key(0),
        jnp.float32(N_ROWS * SHAPE.length), 1)
    theirs, their_grads = flax_value_and_grad(
        flax_step.decoder(SHAPE, weights), batch['tokens'], batch['targets'])
  return (float(loss), modehop_step.flatten(grads)), (float(theirs), by_our_names(their_grads))


def by_our_names(grads) -> shapes.Weights:
  grads = nnx.to_pure_dict(grads)
  layers = [grads['layers'][i] for i in range(SHAPE.n_layers)]
  stack = lambda name, key, shape: np.stack(
      [np.asarray(layer[name][key]).reshape(shape) for layer in layers])
  heads, D, F = (SHAPE.n_heads, SHAPE.d_head), SHAPE.d_model, SHAPE.d_ff
  return {
      'embedding.tokens': np.asarray(grads['embedding']['embedding']),
      'final_norm.scale': np.asarray(grads['final_norm']['scale']),
      **{f'blocks.{n}.scale': stack(n, 'scale', (D,)) for n in ('attention_norm', 'mlp_norm')},
      **{f'blocks.attention.{n}': stack(n, 'kernel', (D, *heads)) for n in 'qkv'},
      'blocks.attention.o': stack('o', 'kernel', (*heads, D)),
      'blocks.mlp.gate': stack('gate', 'kernel', (D, F)),
      'blocks.mlp.up': stack('up', 'kernel', (D, F)),
      'blocks.mlp.down': stack('down', 'kernel', (F, D))}


def test_flax_decoder_has_the_loss_of_modehop(both):
  (ours, _), (theirs, _) = both
  assert abs(ours - theirs) <= 1e-5 * max(1, abs(theirs))
  assert abs(ours - np.log(SHAPE.vocab_size)) > 0.1  # not a model that says nothing


def test_flax_decoder_has_the_gradient_of_modehop(both):
  (_, ours), (_, theirs) = both
  assert ours.keys() == theirs.keys()
  for name, theirs_leaf in theirs.items():
    norm = np.linalg.norm(theirs_leaf)
    assert norm > 0, name
    assert np.linalg.norm(ours[name] - theirs_leaf) <= 1e-5 * norm, name


def test_a_wrong_weight_is_seen(model, both):
  _, weights, batch = model
  swapped = {**weights, 'blocks.attention.q': weights['blocks.attention.q'][:, :, ::-1]}
  with jax.default_matmul_precision('highest'):
    wrong, _ = flax_value_and_grad(
        flax_step.decoder(SHAPE, swapped), batch['tokens'], batch['targets'])
  assert abs(float(wrong) - both[1][0]) > 1e-4


@pytest.mark.parametrize('n, low, high, coverage', [
    (1, 0, 0, 0.0), (2, 0, 1, 1 / 2), (5, 0, 4, 15 / 16), (6, 0, 5, 31 / 32),
    (9, 1, 7, 1 - 2 * (1 + 9) / 2**9)])
def test_interval_is_that_of_order_statistics(n, low, high, coverage):
  values = [10.0 * i for i in range(n)]
  result = estimate(values[::-1])
  assert (result.low, result.high) == (values[low], values[high])
  assert result.coverage == pytest.approx(coverage, abs=1e-12)
  assert result.median == pytest.approx(np.median(values))


def test_window_is_the_wall_time_between_two_rows():
  rows = [
      {'step': 1, 'seconds': 50.0, 'data_seconds': 1.0},
      {'step': 2, 'seconds': 2.0, 'data_seconds': 0.5, 'mfu': 7.0, 'tokens_per_second': 9.0,
       'batch_hash_seconds': 0.125},
      {'step': 3, 'seconds': 3.0, 'save_seconds': 0.25, 'monitor_seconds': 0.5}]
  assert run_cost.window(rows, skip=1) == 5.75
  assert run_cost.window(rows, skip=1, phase='monitor_seconds') == 0.5


def test_steps_beside_snapshots_are_held_against_the_others_of_their_run():
  # Of five steps of 1 s the snapshot's own is shorter by 0.1 and the next one longer by 0.5 + 0.25.
  own = {0: {'seconds': 0.9}, 1: {'seconds': 1.5, 'save_seconds': 0.25, 'data_seconds': 0.4}}
  rows = [{'step': step, **own.get(step % 5, {'seconds': 1.0})} for step in range(1, 51)]
  rows[0]['seconds'] = 99.0  # Compilation, skipped.
  rows[7]['seconds'] = 30.0  # A pause of the machine.
  assert timing_rows.beside_snapshots(rows, every=5, skip=5) == pytest.approx(0.65 / 5)


def test_cost_is_relative_to_the_run_without():
  rounds = [{run_cost.WITH: {'window': 11.5}, run_cost.SAVING: {'window': 10.0},
             run_cost.NEITHER: {'window': 8.0}}]
  assert run_cost.relative_costs(rounds, 'monitoring', 'window') == pytest.approx([0.15])
  assert run_cost.relative_costs(rounds, 'saving', 'window') == pytest.approx([0.25])


def bench(module: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', f'experiments.benchmarks.{module}', *arguments],
                        capture_output=True, text=True, check=False)


def test_train_step_measures_side_by_side(tmp_path):
  path = tmp_path / 'result.json'
  ended = bench('train_step', '--sizes=tiny', '--tokens=64', '--rounds=1', '--seconds=0',
                '--contenders=modehop,flax', f'--json={path}')
  assert ended.returncode == 0, ended.stderr
  assert 'flax: same loss: yes' in ended.stdout
  assert '| flax |' in ended.stdout
  result = json.loads(path.read_text(encoding='utf-8'))['sizes'][0]
  assert result['contenders'].keys() == {'modehop', 'flax'}
  for measured in result['contenders'].values():
    assert measured['rounds'][0]['seconds'] > 0


def test_attention_measures_side_by_side():
  ended = bench('attention', '--lengths=64', '--heads=2', '--key_heads=1', '--widths=8',
                '--rounds=1', '--seconds=0', '--contenders=unrolled,blockwise,jax')
  assert ended.returncode == 0, ended.stderr
  for name in ('unrolled', 'blockwise', 'jax'):
    assert f'| {name} |' in ended.stdout


def test_decode_measures_side_by_side():
  # Contenders whose tokens differ are refused, so a table means that they agree.
  ended = bench('decode', '--size=tiny', '--rows=2', '--prompt=5', '--tokens=9', '--rounds=1',
                '--seconds=0', '--contenders=modehop,recompute')
  assert ended.returncode == 0, ended.stderr
  for name in ('modehop', 'recompute'):
    assert f'| {name} |' in ended.stdout


def test_grouped_matmul_measures_side_by_side():
  # Contenders whose results or gradients differ are refused, so a table means that they agree.
  ended = bench('grouped_matmul', '--rows=60', '--experts=4', '--width=8', '--hidden=12',
                '--rounds=1', '--seconds=0', '--contenders=blocks,ragged_dot,dense')
  assert ended.returncode == 0, ended.stderr
  for name in ('blocks', 'ragged_dot', 'dense'):
    assert f'| {name} |' in ended.stdout


def _turn(name: str, skill: str):
  """Starts a contender of two steps of known length, or one that lacks the skill."""
  if skill == 'none':
    return rounds.Lacks(f'{name} cannot')
  queue = []
  naps = {'short': 0.02, 'long': 0.1}
  return rounds.Started({
      step: rounds.Step(functools.partial(queue.append, nap), lambda _: _sleep_for_all(queue))
      for step, nap in naps.items()}, facts=name.upper())


def _sleep_for_all(queue: list[float]) -> None:
  time.sleep(sum(queue))
  queue.clear()


def test_turns_time_every_step_of_those_that_can():
  checked = []
  facts, seconds = rounds.interleaved(
      _turn, {'a': ('a', 'all'), 'b': ('b', 'none'), 'c': ('c', 'all')}, checked.append,
      n_rounds=2, seconds=0.2, n_before=2)
  assert checked == [{'a': 'A', 'c': 'C'}]
  assert facts == {'a': 'A', 'b': rounds.Lacks('b cannot'), 'c': 'C'}
  assert list(seconds) == ['a', 'c']
  for measured in seconds.values():
    assert {step: len(values) for step, values in measured.items()} == {'short': 2, 'long': 2}
    assert min(measured['short']) >= 0.02 and min(measured['long']) >= 0.1
    assert min(measured['short']) < 0.1  # a step has its own time


@pytest.mark.parametrize('module, arguments, says', [
    ('train_step', ['--sizes=7M'], '--sizes=7M is not one of tiny, 1M, 3M, 10M'),
    ('train_step', ['--tokens=100'], 'not a multiple of the 256'),
    ('run_cost', ['--skip=9', '--steps=5'], '--skip=9 leaves none'),
    ('capture_cost', ['--skip=9', '--steps=5'], '--skip=9 leaves none'),
    ('kill_storm', ['--kills=0'], 'kills'),
    ('attention', ['--contenders=cudnn'], '--contenders=cudnn is not one of unrolled, blockwise'),
    ('attention', ['--lengths=0'], '--lengths=0 is not a positive whole number'),
    ('attention', ['--heads=4', '--key_heads=3'], '--heads=4 is not a multiple of --key_heads=3'),
    ('decode', ['--contenders=vllm'], '--contenders=vllm is not one of modehop, recompute, torch'),
    ('decode', ['--contenders='], '--contenders is empty; name at least one of modehop'),
    ('decode', ['--tokens=0'], 'tokens'),
    ('scoring', ['--contenders=vllm'], '--contenders=vllm is not one of modehop, one, lm_eval'),
    ('grouped_matmul', ['--contenders=triton'], '--contenders=triton is not one of blocks'),
    ('compile_attention_gpu', ['--contenders=cudnn'], '--contenders=cudnn is not one of flash_gpu'),
    ('compile_attention_gpu', ['--features=window+mask'], '--features=mask is not one of window')])
def test_bad_flags_are_refused_in_a_sentence(module, arguments, says):
  ended = bench(module, *arguments)
  assert ended.returncode == 2
  assert says in ended.stderr
  assert 'Traceback' not in ended.stderr


@pytest.mark.parametrize('module, flag', [
    ('train_step', '--rounds'), ('run_cost', '--rounds'), ('attention', '--rounds'),
    ('decode', '--rounds'), ('scoring', '--batch_rows'), ('compile_attention_gpu', '--features'),
    ('compile_attention', '--cases'), ('tune_attention', '--blocks'),
    ('step_schedules', '--precision'), ('grouped_matmul', '--experts'), ('kill_storm', '--kills')])
def test_help_teaches(module, flag):
  ended = bench(module, '--help')
  assert ended.returncode == 0
  assert f'python -m experiments.benchmarks.{module}' in ended.stdout
  assert flag in ended.stdout


def test_items_are_scored_alike_and_a_harness_that_nobody_named_is_lacked(monkeypatch):
  shape = dataclasses.replace(SHAPE, length=scoring_contenders.LENGTH, vocab_size=1024)
  task = scoring_contenders.Task(shape, n_items=8, n_answer=2, batch_rows=16, batch=1, folder='')
  prompts = [len(prompt) for prompt, _ in scoring_contenders.texts_of(task, is_shared=False)]
  assert min(prompts) >= 128 and max(prompts) <= 512 and len(set(prompts)) > 4
  ours, alone = scoring_contenders._modehop(task), scoring_contenders._one(task)
  assert list(ours) == list(alone) == ['shared', 'own']
  facts = {name: {suite: run() for suite, run in runs.items()}
           for name, runs in (('modehop', ours), ('one', alone))}
  assert facts['one']['own'].shape == (8, 2) and facts['one']['own'].std() > 0.1
  scoring_contenders.check(facts)
  facts['one']['own'] += 0.01
  with pytest.raises(UserError, match='own: one is .* from modehop'):
    scoring_contenders.check(facts)
  monkeypatch.delenv(scoring_contenders.PYTHON, raising=False)
  assert scoring_contenders.PYTHON in scoring_contenders.start('lm_eval', task).reason


# What stands for torch, transformers and the harness: it scores by the tokens that it is handed.
STAND_INS = {
    'torch.py': 'float32 = "float32"',
    'accelerate.py': '',
    'transformers.py': '''
import json
class AutoModelForCausalLM:
  @classmethod
  def from_pretrained(cls, folder, dtype):
    cls.vocab_size = json.loads((folder / 'config.json').read_text())['vocab_size']
    assert (folder / 'model.safetensors').is_file() and dtype == 'float32'
    return cls()
  def eval(self):
    return self
class PreTrainedTokenizerFast:
  def __init__(self, tokenizer_file, eos_token, pad_token):
    vocab = json.load(open(tokenizer_file))['model']['vocab']
    assert eos_token in vocab and pad_token in vocab
''',
    'lm_eval/__init__.py': '', 'lm_eval/models/__init__.py': '',
    'lm_eval/models/huggingface.py': '''
class HFLM:
  def __init__(self, pretrained, tokenizer, backend, batch_size, device):
    assert pretrained.vocab_size == 1024 and (backend, batch_size, device) == ('causal', 3, 'cpu')
  def _loglikelihood_tokens(self, requests, disable_tqdm):
    assert len({text for text, _, _ in requests}) == len(requests)  # none is taken for another
    value = lambda ids: sum((i + 1) * token for i, token in enumerate(ids))
    return [(float(value(prompt) * 1000 + value(answer)), True) for _, prompt, answer in requests]
'''}


def interpreter(folder: pathlib.Path, setup: str, options: str = '') -> str:
  """Writes a program that runs this Python after a line of the shell; returns its path."""
  path = folder / 'python'
  path.write_text(f'#!/bin/sh\n{setup}\nexec {sys.executable} {options} "$@"\n')
  path.chmod(0o755)
  return str(path)


@pytest.fixture
def harness_task(tmp_path):
  shape = dataclasses.replace(SHAPE, length=scoring_contenders.LENGTH, vocab_size=1024)
  return scoring_contenders.Task(shape, 4, n_answer=2, batch_rows=16, batch=3, folder=str(tmp_path))


def with_stand_ins(folder: pathlib.Path, **others: str) -> str:
  """Returns an interpreter that has the stand-ins, or others by name."""
  for name, content in (STAND_INS | others).items():
    (folder / 'stand_ins' / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / 'stand_ins' / name).write_text(content)
  return interpreter(folder, f'export PYTHONPATH={folder / "stand_ins"}')


def test_the_harness_is_handed_the_same_prompts_and_answers(harness_task, tmp_path, monkeypatch):
  monkeypatch.setenv(scoring_contenders.PYTHON, with_stand_ins(tmp_path))
  started = scoring_contenders.start('lm_eval', harness_task)
  ids = {f'w{i}': i + 2 for i in range(scoring_contenders.N_WORDS)}  # after padding and end
  value = lambda text: sum((i + 1) * ids[word] for i, word in enumerate(text.split()))
  for suite, is_shared in (('shared', True), ('own', False)):
    expected = [[value(item.prompt) * 1000 + value(answer) for answer in
                 (item.generalizing, item.shortcut)] for item in harness_task.items(is_shared)]
    np.testing.assert_array_equal(started.facts[suite], expected)
    np.testing.assert_array_equal(started.steps[suite].run(), expected)  # asked again


def test_a_harness_that_ends_is_one_sentence(harness_task, tmp_path, monkeypatch):
  monkeypatch.setenv(scoring_contenders.PYTHON, with_stand_ins(
      tmp_path, **{'lm_eval/models/huggingface.py': 'raise SystemExit("too old")'}))
  with pytest.raises(UserError, match='harness_scoring.py ended; its message stands above'):
    scoring_contenders.start('lm_eval', harness_task)


@pytest.mark.parametrize('setup, options, words', [
    ('', '-I -S', 'python has no lm_eval, torch, transformers, accelerate; pip install'),
    ('exit 7', '', 'python is no Python that works: it ended with code 7'),
    (None, '', 'python cannot be run: No such file or directory')])
def test_a_wrong_interpreter_is_one_sentence(harness_task, tmp_path, monkeypatch, setup, options,
                                             words):
  path = str(tmp_path / 'python') if setup is None else interpreter(tmp_path, setup, options)
  monkeypatch.setenv(scoring_contenders.PYTHON, path)
  with pytest.raises(UserError, match=f'^{scoring_contenders.PYTHON}=.*{words}'):
    scoring_contenders.start('lm_eval', harness_task)
  assert not (tmp_path / 'model').exists()  # before anything is built


def test_only_an_absent_pytorch_is_a_reason_to_skip():
  reason = contenders.reason_to_skip('torch')
  assert reason == contenders.reason_without_torch()
  if importlib.util.find_spec('torch'):
    assert reason == ''
  else:
    assert "pip install -e '.[bench]'" in reason
  assert contenders.reason_to_skip('flax') == ''


def test_without_pytorch_the_others_are_measured(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert contenders.measurable(['a', 'torch', 'b'], of_torch='torch') == ['a', 'b']
  assert capsys.readouterr().out.startswith('torch: skipped. PyTorch is not installed')
  assert contenders.measurable(['a'], of_torch='torch') == ['a']
  with pytest.raises(UserError, match='names nobody who can be measured'):
    contenders.measurable(['torch'], of_torch='torch')


def test_every_ablation_changes_the_program(model):
  built, weights, batch = model
  batch = built.place_batch(modehop_step.full_batch(batch))

  def text(variant) -> str:
    return variant.in_mesh(variant.jitted_step().lower)(built.abstract_state, batch).as_text()

  variants = ablation._variants(built)
  assert variants.keys() == ablation.VARIANTS.keys()
  texts = {name: text(variant) for name, variant in variants.items() if name != 'in one micro-batch'}
  assert len({text(built), *texts.values()}) == 1 + len(texts)
