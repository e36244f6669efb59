r"""Monitors a whole public series: audits its revisions, then scores every sound one.

  python -m launchers.monitor --source=folder/of/revisions --run_dir=runs/theirs \
      --config.monitors.suite=items.jsonl
  python -m launchers.monitor --source=allenai/OLMo-2-0425-1B --revisions='stage1-step?0000-*' \
      --run_dir=runs/olmo2 --config.monitors.suite=items.jsonl --config.mesh.fsdp=8

The weights are read from their files onto the mesh, one revision at a time, and not stored. The run
directory has the scores, a manifest that says which revisions were left out and why, and
report.html. Left out is what the audit finds damaged, of another shape, a duplicate of another
revision, not finite, spliced from two revisions, or with two tensors swapped. Jumps, outliers and
other dtypes are said, and monitored all the same. Steps are counted through all stages of the
series. Repeating the command goes on where it stopped. The audit compares all revisions, so a
repository's files must all fit into the cache of huggingface_hub. launchers.trajectory audit shows
its findings alone.
"""

from absl import flags

from launchers import flags as shared
from research.dynamics.monitoring import monitor_series
from research.dynamics.public_trajectory import PATTERN, PublicTrajectory
from research.errors import UserError
from research.run_dir import RunDir

SOURCE = flags.DEFINE_string('source', '', 'a folder of revisions, or owner/repository')
REVISIONS = flags.DEFINE_string(
    'revisions', PATTERN, 'pattern of the shell that names of revisions match')
RUN_DIR = flags.DEFINE_string('run_dir', '', 'the run directory that is written')


def main() -> None:
  if not SOURCE.value:
    raise UserError('--source is empty; name a folder of revisions or owner/repository')
  if not RUN_DIR.value:
    raise UserError('--run_dir is empty; name the run directory to write')
  monitor_series(PublicTrajectory(SOURCE.value, REVISIONS.value), RunDir(RUN_DIR.value),
                 shared.overrides())


if __name__ == '__main__':
  shared.run(main)
