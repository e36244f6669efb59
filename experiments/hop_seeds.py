"""How often do Successive and Repetitive swing over five fresh training seeds?

Command:  python -m launchers.sweep --experiment=hop_seeds
Hardware: two CPU cores. Time: about 2 minutes a run, 12 runs.
Data:     quickstart (drifting shares), quickstart_iid (constant shares), five seeds each, and two
          seeds of quickstart_plain (no pattern documents). A seed sets initialization, documents
          and drift; seed 0 was used while building and is left out.
Expected: quickstart: at least three swings after the first rise, in both families, on at least
          four seeds. quickstart_iid: open. quickstart_plain: none.
"""

import dataclasses

from experiments import quickstart, quickstart_iid, quickstart_plain
from research.config import ExperimentConfig

SEEDS = (1, 2, 3, 4, 5)


def seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
  """Returns the config with its own initialization, documents and drift."""
  return dataclasses.replace(config, name=f'{config.name}-seed{seed}', seed=seed,
                             data=dataclasses.replace(config.data, seed=seed))


def get_configs() -> dict[str, ExperimentConfig]:
  """Returns the runs by name."""
  runs = [(quickstart, SEEDS), (quickstart_iid, SEEDS), (quickstart_plain, SEEDS[:2])]
  configs = [seeded(module.get_config(), seed) for module, seeds in runs for seed in seeds]
  return {config.name: config for config in configs}
