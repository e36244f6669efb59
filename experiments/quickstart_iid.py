"""Do generalizing answers hop when the data is i.i.d. and nothing drifts?

Command:  python -m launchers.pretrain --experiment=quickstart_iid
Hardware: two CPU cores. Time: under 4 minutes of training and monitoring.
Model:    as quickstart. Data: as quickstart with constant shares.
Expected: open; NOTEBOOK.md has what five seeds show.
"""

import dataclasses

from experiments import quickstart
from research.config import ExperimentConfig


def get_config() -> ExperimentConfig:
  """Returns quickstart without drift."""
  config = quickstart.get_config()
  microworld = dataclasses.replace(config.data.microworld, drift_sd=0.0)
  return dataclasses.replace(config, name='quickstart_iid',
                             data=dataclasses.replace(config.data, microworld=microworld))
