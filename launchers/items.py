r"""Writes monitor items to a file: the small-scale suite, or those of a run that tell most.

  python -m launchers.items --write=items.parquet
  python -m launchers.items --write=items.jsonl --config.monitors.small.levels=easy \
      --config.monitors.small.items=4
  python -m launchers.items --statistics_of=runs/text --table=statistics.csv
  python -m launchers.items --statistics_of=runs/text,runs/wider --choose=500 --write=chosen.parquet

The first two write what --config.monitors.suite=small scores. The third prints for every dataset
its accuracy at the first and the last checkpoint with 95% intervals over demonstration contexts,
the share of generalizing answers over all checkpoints, and how difficult and discriminating items
are, the middle 80% of them (two-parameter logistic model; runs of the same items are fitted
together); --table has a row per item. --choose leaves out the tasks that the last four checkpoints
do by chance (dataset and control alike), and of the others takes items that are neither always
right nor always wrong, in equal shares of controls, families, datasets and wordings. A file of
items is a suite: where a run's command is repeated with --config.monitors.suite=chosen.parquet, its
stored snapshots are scored with it, and the earlier scores are kept beside.
"""

from absl import flags

from launchers import flags as shared
from research.errors import UserError
from research.monitors import item_statistics, items as item_files
from research.monitors.items import MonitorItem
from research.monitors.microworld_items import microworld_items
from research.monitors.small.suite import small_suite
from research.run_dir import RunDir

SUITES = {
    'small': lambda config: small_suite(config.monitors.small),
    'microworld': lambda config: microworld_items(config.data.microworld,
                                                  config.data.sequence_length)}
SUITE = flags.DEFINE_enum('suite', 'small', list(SUITES), 'the suite that is written')
WRITE = flags.DEFINE_string('write', '', 'item file (.jsonl or .parquet) that is written')
STATISTICS_OF = flags.DEFINE_list('statistics_of', [], 'monitored runs, in place of a suite')
TABLE = flags.DEFINE_string('table', '', 'statistics of every item are written here (.csv)')
CHOOSE = flags.DEFINE_integer('choose', None, 'how many items of the runs to take', lower_bound=1)


def main() -> None:
  if bool(WRITE.value) != bool(CHOOSE.value or not STATISTICS_OF.value):
    raise UserError('--write takes the item file of a suite, or of --statistics_of with --choose')
  if WRITE.value:
    item_files.check_path(WRITE.value)
  if STATISTICS_OF.value:
    items = _of_runs()
  elif CHOOSE.value or TABLE.value:
    raise UserError('--choose and --table need the scores of runs: --statistics_of=runs/text')
  else:
    items = SUITES[SUITE.value](shared.config_from_flags('quickstart'))
  if WRITE.value:
    item_files.write_items(items, WRITE.value)
    print(f'{len(items)} items: {WRITE.value}')


def _of_runs() -> list[MonitorItem]:
  """Prints the statistics of runs; returns the items that were chosen, or all."""
  items, right = item_statistics.responses([RunDir(path) for path in STATISTICS_OF.value])
  found = item_statistics.item_statistics(items, right)
  print(*item_statistics.described(items, right, found), sep='\n')
  if TABLE.value:
    item_statistics.write_statistics(items, found, TABLE.value)
  return item_statistics.choose(items, found, CHOOSE.value) if CHOOSE.value else items


if __name__ == '__main__':
  shared.run(main)
