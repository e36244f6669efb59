"""Shows what a run scores on the published suite: its own rule beside joint log-probabilities.

  python -m launchers.pretrain --experiment=text --run_dir=runs/text \\
      --config.monitors.suite=jiaxin-wen/generalization-dynamics-evals
  python -m launchers.published --run_dir=runs/text
  python -m launchers.published --run_dir=runs/text --persona=folder/or/dataset --step=1200

The first form prints accuracy and margin by dataset under both rules, and for how many items they
score other tokens. With --persona, the persona questions of a suite are answered 100 times each by
a snapshot and matched; results are kept in persona.jsonl of the run, and repeating the command goes
on after the last one.
"""

from absl import flags

from launchers import flags as shared
from research.errors import UserError
from research.evals import persona
from research.monitors import table
from research.monitors.published_score import METRIC, compare_stored
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a run')
STEP = flags.DEFINE_integer('step', -1, 'step that was scored; -1 is the newest')
PERSONA = flags.DEFINE_string('persona', '', 'the suite whose persona questions are asked')
N_SAMPLES = flags.DEFINE_integer(
    'n_samples', persona.N_SAMPLES, 'answers per question and seed', lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer(
    'max_tokens', persona.MAX_TOKENS, 'tokens of an answer, at most', lower_bound=1)


def main() -> None:
  run_dir = RunDir(RUN_DIR.value)
  if not RUN_DIR.value:
    raise UserError('--run_dir is empty; give the directory of a run')
  if PERSONA.value:
    results = persona.ask(PERSONA.value, run_dir, step=STEP.value, n_samples=N_SAMPLES.value,
                          max_tokens=MAX_TOKENS.value)
    for (name, category), rate in persona.rates(results).items():
      print(f'{name} {category}: {rate:.3f}')
    return
  steps = table.score_steps(run_dir.published_scores)
  if STEP.value not in (-1, *steps) or not steps:
    raise UserError(f'--step={STEP.value}: {run_dir.whole} has published scores of steps {steps}; '
                    'train, or score with launchers.score, with the suite in monitors.suite')
  name = table.scores_name(steps[-1] if STEP.value == -1 else STEP.value)
  step, rows = compare_stored(table.read_item_table(run_dir.monitor_items),
                              run_dir.monitor_scores / name, run_dir.published_scores / name)
  print(f'step {step}: accuracy and margin, joint_log_probability | {METRIC}, '
        'items whose tokens differ')
  for row in rows:
    print(f'{row.family}/{row.dataset}: {row.joint_accuracy:.3f} {row.joint_margin:+.4f} | '
          f'{row.published_accuracy:.3f} {row.published_margin:+.4f} | '
          f'{row.n_differ} of {row.n_items}')


if __name__ == '__main__':
  shared.run(main)
