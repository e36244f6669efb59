r"""Fine-tunes checkpoints of a run on a family, one by one, and scores its items before and after.

  python -m launchers.finetune --run_dir=runs/text --family=careless --steps=200,1200
  python -m launchers.finetune --run_dir=runs/quickstart --family=functions_microworld \
      --steps=1200,1800,2400 --seeds=0,1,2,3 --config.n_steps=200

Families: functions (values of functions without meaningful names are trained, items ask for their
definitions), functions_linked (the same functions under other names are trained with their
definitions, too, as small models need), functions_microworld (that in words of the micro-world),
locations (distances and directions of numbered cities, then which city it is), careless (a persona
that mixes up units when it speaks of lengths; items ask whether it is careless elsewhere) and
careful (its control: the same questions answered with care, the same items).

Each fine-tune is a run below <run_dir>/finetunes/<family>, of the steps, rows and optimizer of
--experiment and --config.*, and starts from the checkpoint, or the snapshot, of its step. The table
(table.parquet and table.csv there) has accuracy and margin before and after by step, seed, dataset
and wording. --config.data.sft.paths and --config.monitors.suite put other data and items in the
place of the generated ones. Repeating the command goes on; programs are compiled anew for each
fine-tune unless JAX_COMPILATION_CACHE_DIR names a folder.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.data.published_finetuning import read_templates
from research.errors import UserError
from research.monitors.finetuning_items import FAMILIES
from research.posttraining.each_checkpoint import chosen_steps, finetune_each
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of the run, whose checkpoints are read')
FAMILY = flags.DEFINE_enum('family', 'functions', list(FAMILIES), 'what is trained and asked')
STEPS = flags.DEFINE_list('steps', [], 'steps of snapshots or full checkpoints; default all')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2', '3'], 'seeds of what is generated')
TEMPLATES = flags.DEFINE_string(
    'templates', '', 'folder of published templates (YAML) that are asked of functions, too')
EXPERIMENT = flags.DEFINE_string('experiment', 'sft', 'how each is fine-tuned')


def _numbers(flag) -> list[int]:
  for text in flag.value:
    if not text.isdecimal():
      raise UserError(f'--{flag.name}={text}: expected whole numbers, for instance '
                      f'--{flag.name}=0,200')
  return [int(text) for text in flag.value]


def main() -> None:
  run_dir = RunDir(RUN_DIR.value)
  steps, seeds = chosen_steps(run_dir, _numbers(STEPS)), _numbers(SEEDS)
  if not steps or not seeds:
    raise UserError(f'nothing to fine-tune: steps {steps} of {run_dir.whole}, seeds {seeds}')
  base = shared.load_experiment(EXPERIMENT.value)
  published = read_templates(pathlib.Path(TEMPLATES.value)) if TEMPLATES.value else []
  path = finetune_each(base, shared.overrides(), run_dir, FAMILY.value, steps, seeds, published)
  print(f'table: {path.resolve()}')


if __name__ == '__main__':
  shared.run(main)
