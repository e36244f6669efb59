r"""Asks checkpoints the tasks of lm-evaluation-harness: any public benchmark serves as a control.

  python -m launchers.evaluate --run_dir=runs/text --tasks=arc_easy,hellaswag --limit=500
  python -m launchers.evaluate --run_dir=runs/text --tasks=mine --include_path=my_tasks --steps=all
  python -m launchers.evaluate --source=folder/of/revisions --run_dir=runs/theirs --steps=all \
      --tasks=lambada_openai

Needs the extra evals: pip install -e '.[evals]'. A task is a name of the harness, or a YAML file in
--include_path. Its data come from Hugging Face datasets, or from local files that the YAML names:

  dataset_path: json
  dataset_kwargs: {data_files: {test: /where/it/lies.jsonl}}

--source is a folder as transformers writes it, or a public series (see launchers.monitor); its
results go to --run_dir, and --config.mesh.fsdp=8, say, splits it over devices. Without --source the
checkpoints are those of --run_dir. Results: one file per task and checkpoint,
evals/<task>/step-<step>.json, and all metrics with their standard errors in one long table,
evals/results.csv. Repeating the command asks only what is missing; other demonstrations or another
limit go to folders of their own. Prompts longer than the model's context are cut from the left, and
counted. A run with a closed list of words, such as quickstart, takes tasks in these words only.
"""

from absl import flags

from launchers import flags as shared
from research.errors import UserError
from research.evals import harness_tasks
from research.evals.results import described
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a run; results are written there')
SOURCE = flags.DEFINE_string(
    'source', '', 'a public checkpoint or series: a folder, or owner/repository')
TASKS = flags.DEFINE_list('tasks', [], 'names of tasks, groups or tags, with commas between')
INCLUDE_PATH = flags.DEFINE_string('include_path', '', 'folder with tasks of your own, YAML files')
STEPS = flags.DEFINE_string(
    'steps', '', 'all, or steps of checkpoints with commas between; default the newest')
LIMIT = flags.DEFINE_integer(
    'limit', None, 'documents of a task, the first ones; default all', lower_bound=1)
NUM_FEWSHOT = flags.DEFINE_integer(
    'num_fewshot', None, 'demonstrations, for tasks that do not fix it at 0', lower_bound=0)


def main() -> None:
  if not RUN_DIR.value:
    raise UserError('--run_dir is empty; give the directory of a run, say runs/quickstart')
  if not TASKS.value:
    raise UserError('--tasks is empty; name tasks of lm-evaluation-harness, say --tasks=arc_easy')
  harness_tasks.require_harness()
  from research.dynamics import benchmarks  # It imports the harness.
  run_dir = RunDir(RUN_DIR.value)
  subject = benchmarks.open_subject(run_dir, SOURCE.value, shared.overrides())
  steps = benchmarks.chosen_steps(subject, STEPS.value)
  loaded = harness_tasks.load(TASKS.value, INCLUDE_PATH.value, NUM_FEWSHOT.value)
  run_dir.lock()
  rows = benchmarks.evaluate_trajectory(subject, run_dir, loaded, steps, limit=LIMIT.value,
                                        num_fewshot=NUM_FEWSHOT.value)
  print('\n'.join(described(rows)))
  print(f'results: {run_dir.evals_csv}')


if __name__ == '__main__':
  shared.run(main)
