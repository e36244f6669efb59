"""Texts that the model of a run writes after prompts."""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from models.decode import Prompts, check_room, generate, make_prompts
from models.sampling import Sampling
from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research import config as config_lib
from research.data import tokenizers
from research.data.errors import DataError
from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.monitors.items import LeftOut
from research.run_dir import RunDir
from research.training.snapshots import SnapshotReader, cast
from research.training.divisions import replicas

BATCH_ROWS = 64  # rows generated at a time, at most


@dataclasses.dataclass(frozen=True)
class Sample:
  """One text.

  Attributes:
    step: of the snapshot that wrote it.
    prompt: the text before it.
    number: which sample of this prompt.
    text: what was written.
    n_tokens: its length.
    stopped: whether a stop token ended it, rather than the limit.
  """

  step: int
  prompt: str
  number: int
  text: str
  n_tokens: int
  stopped: bool


class Asked(Protocol):
  """A question: its text and which it is."""

  @property
  def prompt(self) -> str: ...
  @property
  def item_id(self) -> str: ...


Question = TypeVar('Question', bound=Asked)


def fitting(questions: Iterable[Question], run_dir: RunDir, max_tokens: int
            ) -> tuple[list[Question], list[LeftOut]]:
  """Returns the questions whose prompt and answer fit into the model's context, and the others."""
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  start_id = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))['start_id']
  tokenizer = tokenizers.load(run_dir.tokenizer_json)
  kept, left_out = [], []
  for question in questions:
    try:
      n_prompt = len(tokenizer.encode(question.prompt))
    except DataError as error:
      left_out.append(LeftOut(question.item_id, str(error)))
      continue
    n_tokens = (start_id is not None) + n_prompt + max_tokens
    if n_tokens > config.model.context_length:
      left_out.append(LeftOut(
          question.item_id, f'its prompt and answer take {n_tokens} tokens; model.context_length='
          f'{config.model.context_length}'))
    else:
      kept.append(question)
  return kept, left_out


def sample_run(
    run_dir: RunDir, prompts: Sequence[str], *, step: int = -1, n_samples: int = 1,
    max_tokens: int = 64, sampling: Sampling = Sampling(), stop: Sequence[str] = (),
    seed: int = 0) -> Iterator[Sample]:
  """Yields n_samples texts after every prompt; a text depends on its prompt, seed and number only.

  The devices at hand may be others than those of training: attention and the form of the stack
  are chosen for them, and the run's mesh is kept where it fits them. Where it does not, as many
  devices as divide the width split the parameters (mesh.fsdp), over replicas of that (mesh.data).
  Logits then differ in their last bits, so rarely a text may too.

  Args:
    run_dir: of a run with snapshots.
    prompts: texts to go on from; '' where documents of the run begin with a token.
    step: of the snapshot, -1 for the newest.
    n_samples: texts per prompt.
    max_tokens: length of a text in tokens, at most.
    sampling: how tokens are drawn.
    stop: texts of single tokens that end a text, beside the tokenizer's end of document.
    seed: of all draws, 0 to 2^31 - 1.

  Raises:
    UserError: there is no such run or snapshot, a prompt or stop cannot be used, or a prompt
      leaves no room for its text; before anything is loaded.
  """
  if not run_dir.manifest_json.exists():
    raise UserError(f'--run_dir={run_dir.whole} is not the directory of a run: it has no '
                    'manifest.json')
  step = chosen_step(run_dir, step)
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  tokenizer = tokenizers.load(run_dir.tokenizer_json)
  encoded = [_encoded(prompt, tokenizer, manifest['start_id']) for prompt in prompts]
  stop_ids = _stop_ids(stop, tokenizer)
  sampling = dataclasses.replace(sampling, n_tokens=tokenizer.vocab_size)
  try:
    check_room(config.model, max(map(len, encoded), default=0), max_tokens)
    built = build_here(config)
    params = built.place_params(SnapshotReader(run_dir.snapshots).params(step, built.params))
    params, write = cast(params, 'float32'), built.in_mesh(generate)
    for rows, batch in _batches(encoded, n_samples, replicas(built.mesh.shape)):
      generated = write(built.graphdef, params, batch, max_tokens=max_tokens, sampling=sampling,
                        stop=stop_ids, seed=seed)
      for (p, i), tokens_T, n, stopped in zip(rows, *map(np.asarray, generated)):
        yield Sample(step, prompts[p], i, tokenizer.decode(tokens_T[:n]), int(n), bool(stopped))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error


def _mesh(config: config_lib.ExperimentConfig) -> Mesh:
  """Returns the run's mesh, or one of all devices where that does not fit them."""
  try:
    return make_mesh(config.mesh)
  except ValueError:  # that of other devices; texts need no particular one
    return make_mesh(MeshConfig(fsdp=math.gcd(len(jax.devices()), config.model.d_model)))


def build_here(config: config_lib.ExperimentConfig) -> build_lib.Build:
  """Returns the model of a run for the devices at hand, whatever it was trained on."""
  mesh = _mesh(config)
  return build_lib.build(dataclasses.replace(
      config, model=dataclasses.replace(config.model, attention='auto', scan_layers='auto'),
      # Rows are batched here; those of training, and how its step cuts them, need not suit this mesh.
      data=dataclasses.replace(config.data, batch_size=replicas(mesh.shape)),
      compute=dataclasses.replace(config.compute, microbatch_tokens=0, pipeline='1f1b',
                                  pipeline_chunks=1)), mesh, {})


def _batches(
    encoded: list[list[int]], n_samples: int,
    n_replicas: int) -> Iterator[tuple[list[tuple[int, int]], Prompts]]:
  """Yields (prompt, sample number) of rows and the rows, filled up to what the mesh divides."""
  wanted = [(p, i) for p in range(len(encoded)) for i in range(n_samples)]
  size = max(BATCH_ROWS // n_replicas, 1) * n_replicas
  for start in range(0, len(wanted), size):
    rows = wanted[start:start + size]
    whole = rows + [rows[-1]] * (-len(rows) % n_replicas)
    # The same number draws differently after different prompts.
    numbers = [(zlib.crc32(np.int32(encoded[p]).tobytes()) + i) % 2**31 for p, i in whole]
    yield rows, make_prompts([encoded[p] for p, _ in whole], numbers)


def chosen_step(run_dir: RunDir, step: int) -> int:
  """Returns the step, of the newest snapshot for -1; raises UserError where there is none."""
  steps = SnapshotReader(run_dir.snapshots).steps
  if not steps:
    raise UserError(f'{run_dir.snapshots} has no snapshot; train with '
                    '--config.checkpoints.snapshot_every above 0')
  if step not in (-1, *steps):
    raise UserError(f'--step={step}: no such snapshot in {run_dir.snapshots}; it has {steps}')
  return steps[-1] if step == -1 else step


def _encoded(prompt: str, tokenizer: Tokenizer, start_id: int | None) -> list[int]:
  try:
    ids = ([] if start_id is None else [start_id]) + tokenizer.encode(prompt)
  except DataError as error:
    raise UserError(f'--prompt={prompt!r}: this run knows a closed list of words, those of its '
                    'tokenizer.json, and one of these is not among them') from error
  if not ids:
    raise UserError(f'--prompt={prompt!r} has no tokens; documents of this run begin without a '
                    'start token, so give at least a word')
  return ids


def _stop_ids(stop: Sequence[str], tokenizer: Tokenizer) -> list[int]:
  ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  for text in stop:
    try:
      encoded = tokenizer.encode(text)
    except DataError as error:
      raise UserError(f'--stop={text!r} is not among the words that this run knows, those of its '
                      'tokenizer.json; a text never has it') from error
    if len(encoded) != 1:
      raise UserError(f'--stop={text!r} is {len(encoded)} tokens of this tokenizer; give the text '
                      'of a single token')
    ids += encoded
  return ids
