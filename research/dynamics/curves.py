"""Monitor scores of a run as accuracy and margin curves, by demonstration context and variant."""

import dataclasses
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet as pq

from research.errors import UserError

_ITEM_COLUMNS = ('item', 'family', 'dataset', 'seed', 'variant', 'is_control')
_SCORE_COLUMNS = ('step', 'item', 'logp_generalizing', 'logp_shortcut')


class ScoresError(UserError):
  """A monitor file that cannot be used, with its name and what would be right."""


@dataclasses.dataclass(frozen=True, order=True)
class Context:
  """One demonstration context: the items of one dataset that share a seed.

  `variant` names the prompt variant where the context's items of one are meant alone.
  """

  family: str
  is_control: bool
  dataset: str
  seed: int
  n_items: int
  variant: str = ''


@dataclasses.dataclass(frozen=True)
class Curves:
  """Accuracy and margin of every context at every snapshot.

  accuracy_TC is the share of items whose generalizing answer has the higher log-probability;
  margin_TC the mean probability of the generalizing answer minus that of the shortcut.
  """

  steps: np.ndarray
  contexts: tuple[Context, ...]
  accuracy_TC: np.ndarray
  margin_TC: np.ndarray

  def at(self, kept: list[int]) -> 'Curves':
    """Returns the contexts of these indices."""
    return Curves(self.steps, tuple(self.contexts[i] for i in kept), self.accuracy_TC[:, kept],
                  self.margin_TC[:, kept])


def read_curves(items_path: pathlib.Path, scores_dir: pathlib.Path) -> Curves:
  """Returns the curves of a run, prompt variants pooled; see `read_variants`."""
  return pooled(read_variants(items_path, scores_dir))


def pooled(curves: Curves) -> Curves:
  """Returns the curves of contexts over all items of their prompt variants."""
  key = lambda context: (context.family, context.is_control, context.dataset, context.seed)
  n_items = {}
  for context in curves.contexts:
    n_items[key(context)] = n_items.get(key(context), 0) + context.n_items
  index = {name: i for i, name in enumerate(n_items)}
  shares_CP = np.zeros((len(curves.contexts), len(n_items)))
  for c, context in enumerate(curves.contexts):
    shares_CP[c, index[key(context)]] = context.n_items / n_items[key(context)]
  return Curves(curves.steps, tuple(Context(*name, n) for name, n in n_items.items()),
                curves.accuracy_TC @ shares_CP, curves.margin_TC @ shares_CP)


def variants_of(curves: Curves) -> dict[str, list[str]]:
  """Returns the names of every dataset's prompt variants in order."""
  names: dict[str, set[str]] = {}
  for context in curves.contexts:
    names.setdefault(context.dataset, set()).add(context.variant)
  return {dataset: sorted(variants) for dataset, variants in names.items()}


def of_variant(curves: Curves, number: int) -> Curves:
  """Returns the curves of the prompt variant of this number of every dataset that has as many."""
  names = variants_of(curves)
  return curves.at([i for i, context in enumerate(curves.contexts)
                    if context.variant in names[context.dataset][number:number + 1]])


def read_variants(items_path: pathlib.Path, scores_dir: pathlib.Path) -> Curves:
  """Returns the curves of every context and variant; none where nothing was scored.

  Files are read one at a time, so memory stays at one snapshot whatever the run's length.

  Raises:
    ScoresError: a column is missing, a snapshot does not score every item exactly once, a
      score is NaN, or a step occurs in two files.
  """
  paths = sorted(scores_dir.glob('*.parquet')) if scores_dir.is_dir() else []
  if not paths:
    return Curves(np.zeros(0, np.int64), (), np.zeros((0, 0)), np.zeros((0, 0)))
  if not items_path.is_file():
    raise ScoresError(f'{scores_dir} holds scores but {items_path} does not exist')
  item_ids, context_of, contexts = _contexts(items_path)
  rows = {}
  for path in paths:
    for step, values in _snapshots(path, item_ids):
      if step in rows:
        raise ScoresError(f'{path}: step {step} was already scored in another file')
      rows[step] = _by_context(*values, context_of, contexts)
  steps = np.array(sorted(rows), np.int64)
  return Curves(
      steps, contexts,
      accuracy_TC=np.stack([rows[step][0] for step in steps]),
      margin_TC=np.stack([rows[step][1] for step in steps]))


def _contexts(path):
  """Returns (sorted item numbers, context index of each, contexts)."""
  table = _read(path, _ITEM_COLUMNS)
  if not table.num_rows:
    raise ScoresError(f'{path}: no items')
  table = table.sort_by('item')
  item_ids = table['item'].to_numpy()
  if np.any(np.diff(item_ids) == 0):
    raise ScoresError(f'{path}: item {item_ids[1:][np.diff(item_ids) == 0][0]} occurs twice')
  keys = list(zip(
      table['family'].to_pylist(), table['is_control'].to_pylist(),
      table['dataset'].to_pylist(), table['seed'].to_pylist(), table['variant'].to_pylist()))
  names = sorted(set(keys))
  index = {name: i for i, name in enumerate(names)}
  context_of = np.array([index[key] for key in keys])
  counts = np.bincount(context_of)
  contexts = tuple(Context(*name[:4], int(n), name[4]) for name, n in zip(names, counts))
  return item_ids, context_of, contexts


def _snapshots(path, item_ids):
  """Yields (step, (logp_generalizing, logp_shortcut)) with scores in the order of item_ids."""
  table = _read(path, _SCORE_COLUMNS)
  step, item, good, short = (table[name].to_numpy() for name in _SCORE_COLUMNS)
  for at in np.unique(step):
    here = np.flatnonzero(step == at)
    here = here[np.argsort(item[here], kind='stable')]
    if not np.array_equal(item[here], item_ids):
      raise ScoresError(
          f'{path}: step {at} must score each of the {len(item_ids)} items exactly once, it has '
          f'{len(here)} rows for {len(np.unique(item[here]))} items')
    wrong = np.isnan(good[here]) | np.isnan(short[here])
    if wrong.any():
      raise ScoresError(f'{path}: step {at} item {item[here][wrong][0]} has a NaN score')
    yield int(at), (good[here].astype(np.float64), short[here].astype(np.float64))


def _by_context(good, short, context_of, contexts):
  """Returns (accuracy, margin) by context."""
  n_items = np.array([context.n_items for context in contexts])
  n = len(contexts)
  accuracy = np.bincount(context_of, good > short, n) / n_items
  margin = np.bincount(context_of, np.exp(good) - np.exp(short), n) / n_items
  return accuracy, margin


def _read(path, columns):
  try:
    schema = pq.read_schema(path)
  except pyarrow.ArrowInvalid as error:
    raise ScoresError(f'{path} is not a whole Parquet file: {error}') from error
  missing = [name for name in columns if name not in schema.names]
  if missing:
    raise ScoresError(f'{path}: column {missing[0]} is missing, it has {schema.names}')
  return pq.read_table(path, columns=list(columns))
