r"""Imports a public checkpoint as a run directory, or exports a run for transformers.

  python -m launchers.convert --source=allenai/OLMo-2-0425-1B \
      --revision=stage1-step10000-tokens21B --run_dir=runs/olmo2
  python -m launchers.convert --source=folder/with/config.json --run_dir=runs/theirs \
      --config.mesh.fsdp=8 --config.monitors.suite=items.jsonl
  python -m launchers.convert --run_dir=runs/quickstart --to=huggingface --out=exported

Families: llama, qwen3, olmo2, olmo3, apertus, gpt_neox, mixtral. An imported run has one
checkpoint, which other runs start from (--config.start.run_dir), one snapshot, which
launchers.sample writes with, and with monitors.suite its scores, which launchers.score checks.
A repository's files stay in the cache of huggingface_hub; repeating the command goes on fetching.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.dynamics.conversion import export_run, find_source, import_run
from research.errors import UserError
from research.run_dir import RunDir

SOURCE = flags.DEFINE_string(
    'source', '', 'a checkpoint\'s folder, a folder of revisions, or owner/repository')
REVISION = flags.DEFINE_string('revision', '', 'sub-folder, branch or tag; main of a repository')
RUN_DIR = flags.DEFINE_string('run_dir', '', 'the run that is written, or with --to the one read')
TO = flags.DEFINE_enum('to', '', ['', 'huggingface'], 'what a run is exported as')
OUT = flags.DEFINE_string('out', '', 'the new folder of an export')
STEP = flags.DEFINE_integer('step', -1, 'snapshot or checkpoint that is exported; -1 is the newest')
DTYPE = flags.DEFINE_enum(
    'dtype', '', ['', 'float32', 'bfloat16'], 'of exported tensors; default that of the snapshot')


def main() -> None:
  if not RUN_DIR.value:
    raise UserError('--run_dir is empty; name the run directory to write, or to read with --to')
  if bool(SOURCE.value) == bool(TO.value):
    raise UserError('give either --source, to import, or --to=huggingface, to export')
  run_dir = RunDir(RUN_DIR.value)
  if SOURCE.value:
    import_run(find_source(SOURCE.value, REVISION.value), run_dir, shared.overrides())
    return
  if not OUT.value:
    raise UserError('--out is empty; name the folder to export to')
  step = export_run(run_dir, pathlib.Path(OUT.value), STEP.value, DTYPE.value)
  print(f'step {step} of {run_dir.whole} is in {pathlib.Path(OUT.value).resolve()}')


if __name__ == '__main__':
  shared.run(main)
