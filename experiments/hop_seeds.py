"""How often do Successive and Repetitive swing over five fresh training seeds?

Command:  python -m launchers.sweep --experiment=hop_seeds
Hardware: two CPU cores. Time: 25 minutes with --jobs=2 (11 runs).
Data:     quickstart (drifting shares), quickstart_iid (constant shares), five seeds each, and one
          of quickstart_plain (no pattern documents). A seed sets initialization, documents and
          drift; seeds 0 to 2 were used while building and are left out.
Expected: quickstart: at least three swings after the first rise, in both families, on at least
          four seeds. quickstart_iid: open. quickstart_plain: none.
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
