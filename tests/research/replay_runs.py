"""Tiny runs that replays are tested on: text whose source switches at known steps."""

import hashlib
import pathlib

from models.config import ModelConfig
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig, MonitorConfig
from research.data.config import DataConfig, TextConfig
from research.monitors.items import MonitorItem, write_items
from research.training.config import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    OptimizerConfig,
)

N_STEPS = 72
SWITCHES = (30, 50)  # from these batches on, text is drawn from the other file
LETTERS = 'abcdefgh'


def write_texts(folder: pathlib.Path) -> tuple[str, str]:
  """Writes two files that disagree: a letter equals itself in one, 'z' in the other."""
  paths = folder / 'same.txt', folder / 'zed.txt'
  letters = [LETTERS[(7 * i + i // 3) % len(LETTERS)] for i in range(4000)]
  paths[0].write_text(''.join(f'{letter}={letter};' for letter in letters))
  paths[1].write_text(''.join(f'{letter}=z;' for letter in letters))
  return str(paths[0]), str(paths[1])


def monitor() -> list[MonitorItem]:
  """Returns items that ask which of the two files the model follows, in four contexts."""
  return [
      MonitorItem(item_id=letter, family='copying', dataset='letters', seed=i % 4, variant='plain',
                  prompt=f'{letter}=', generalizing=letter, shortcut='z')
      for i, letter in enumerate(LETTERS)]


def switching_run(folder: pathlib.Path) -> ExperimentConfig:
  """Returns a run whose text switches at SWITCHES; files and items are written to the folder."""
  texts = write_texts(folder)
  write_items(monitor(), folder / 'items.jsonl')
  first, second = map(float, SWITCHES)
  return ExperimentConfig(
      name='switching', n_steps=N_STEPS, mesh=MeshConfig(data=1),
      model=ModelConfig(vocab_size=259, context_length=32, n_layers=1, d_model=32, n_heads=2,
                        n_kv_heads=2, d_head=16, d_ff=64, dropout=0.1),
      data=DataConfig(
          kind='text', sequence_length=32, batch_size=8, cache_dir=str(folder / 'cache'),
          text=TextConfig(paths=texts, schedule=((0., 1., 0.), (first, 0., 1.), (second, 1., 0.)))),
      optimizer=OptimizerConfig(peak_lr=3e-2, schedule='cosine', warmup_steps=4,
                                final_lr_fraction=0.5, ema_decay=0.9),
      checkpoints=CheckpointConfig(every=10, keep=0, snapshot_every=6),
      monitors=MonitorConfig(suite=str(folder / 'items.jsonl')),
      evals=EvalConfig(every=8, n_batches=1), logging=LoggingConfig(tensorboard=False))


def content(folder: pathlib.Path) -> dict[str, str]:
  """Returns the hash of every file below a folder."""
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(folder.rglob('*')) if path.is_file()}
