"""What do the pattern monitors show when no document ever rewards a pattern?

Command:  python -m launchers.pretrain --experiment=quickstart_plain
Hardware: two CPU cores. Time: under 4 minutes of training and monitoring.
Model:    as quickstart. Data: as quickstart without Successive and Repetitive documents.
Expected: both monitors follow arithmetic to the top and stay there; nothing hops.
"""

import dataclasses

from experiments import quickstart
from research.config import ExperimentConfig


def get_config() -> ExperimentConfig:
  """Returns quickstart without pattern documents."""
  config = quickstart.get_config()
  microworld = dataclasses.replace(config.data.microworld, successive=0.0, repetitive=0.0,
                                   drift_sd=0.0)
  return dataclasses.replace(config, name='quickstart_plain',
                             data=dataclasses.replace(config.data, microworld=microworld))
