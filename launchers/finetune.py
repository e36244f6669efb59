r"""Fine-tunes checkpoints of a run on a family, one by one; asks each the same before and after.

  python -m launchers.finetune --run_dir=runs/quickstart --family=functions_microworld \
      --steps=600,1200,2400
  python -m launchers.finetune --run_dir=runs/text --family=careless --steps=400,1200 --samples=4
  python -m launchers.finetune --run_dir=runs/text --family=files --questions=questions.yaml \
      --config.data.sft.paths=conversations.jsonl --samples=20 --max_tokens=100

Families: functions (values of functions without meaningful names are trained, items ask for their
definitions), functions_linked (the same functions under other names are trained with their
definitions, too, as small models need), functions_microworld (that in words of the micro-world, for
runs such as quickstart), locations (distances and directions of numbered cities, then which city it
is), careless (a persona that mixes up units when it speaks of lengths; items ask whether it is
careless elsewhere), careful (its control: the same questions answered with care, the same items)
and files (nothing is generated: --config.data.sft.paths, the items of --config.monitors.suite).

Items compare the probabilities of two answers. --samples free answers to every question are drawn
as well, and a rule says which of the two an answer is; a careless answer is known by its unit, case
or bracket. --questions are asked freely only, in the format of the published questions of emergent
misalignment: the published judge of these is a language model, which is not run here. It is counted
how many answers are empty, refuse, are JSON or are code, by regular expressions
(research/posttraining/free_form.py), and all are kept, to be judged by people or a model of yours.

Each fine-tune is a run below <run_dir>/finetunes/<family>, of the steps, rows and optimizer of
--experiment and --config.*, and starts from the checkpoint, or the snapshot, of its step. There,
each as .parquet and .csv: table (accuracy, margin and loss by step, seed, dataset and wording),
summary (means over seeds with intervals; of free answers those that are drawn as this command says)
and answers (all that were ever drawn, word by word, with question, step and seed);
and, where answers are known, the picture finetunes.png. Repeating the command goes on.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.data.published_finetuning import read_questions, read_templates
from research.errors import UserError
from research.monitors.finetuning_items import FAMILIES
from research.posttraining.each_checkpoint import Plan, chosen_steps, finetune_each
from research.posttraining.free_form import Asking
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of the run, whose checkpoints are read')
FAMILY = flags.DEFINE_enum('family', 'functions', list(FAMILIES), 'what is trained and asked')
STEPS = flags.DEFINE_list('steps', [], 'steps of snapshots or full checkpoints; default full ones')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2', '3'], 'seeds of what is generated')
TEMPLATES = flags.DEFINE_string(
    'templates', '', 'folder of published templates (YAML) that are asked of functions, too')
QUESTIONS = flags.DEFINE_string(
    'questions', '', 'file of published free-form questions (YAML), asked freely; no judge is run')
SAMPLES = flags.DEFINE_integer('samples', 1, 'free answers per question, before and after; 0: none')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'of free answers; 0 takes the likeliest')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 24, 'of a free answer, at most', lower_bound=1)
SAMPLING_SEED = flags.DEFINE_integer('sampling_seed', 0, 'of free answers', lower_bound=0)
EXPERIMENT = flags.DEFINE_string('experiment', 'finetune', 'how each is fine-tuned')


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
  templates = read_templates(pathlib.Path(TEMPLATES.value)) if TEMPLATES.value else []
  questions = read_questions(pathlib.Path(QUESTIONS.value)) if QUESTIONS.value else []
  asking = Asking(SAMPLES.value, TEMPERATURE.value, MAX_TOKENS.value, SAMPLING_SEED.value)
  plan = Plan(shared.load_experiment(EXPERIMENT.value), shared.overrides(), FAMILY.value, asking,
              templates, questions)
  print(f'tables: {finetune_each(plan, run_dir, steps, seeds).resolve()}')


if __name__ == '__main__':
  shared.run(main)
