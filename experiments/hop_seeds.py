"""How often do datasets hop over five fresh training seeds?

Command:  python -m launchers.sweep --experiment=hop_seeds
Hardware: two CPU cores. Time: 25 minutes with --jobs=2 (11 runs).
Data:     quickstart (drifting shares), quickstart_iid (constant shares), five seeds each, and one
          of quickstart_plain (no pattern documents). A seed sets initialization, documents and
          drift; seeds 0 to 2 were used while building and are left out.
Expected: open; quickstart_plain: no hop. NOTEBOOK.md has what an earlier rule, alternating extremes
          of accuracy held for two snapshots, said of the same runs.
"""

import dataclasses

from experiments import quickstart, quickstart_iid, quickstart_plain
from research.config import ExperimentConfig

SEEDS = (11, 12, 13, 14, 15)


def seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
  """Returns the config with its own initialization, documents and drift."""
  return dataclasses.replace(config, name=f'{config.name}-seed{seed}', seed=seed,
                             data=dataclasses.replace(config.data, seed=seed))


def get_configs() -> dict[str, ExperimentConfig]:
  """Returns the runs by name."""
  runs = [(quickstart, SEEDS), (quickstart_iid, SEEDS), (quickstart_plain, SEEDS[:1])]
  configs = [seeded(module.get_config(), seed) for module, seeds in runs for seed in seeds]
  return {config.name: config for config in configs}
