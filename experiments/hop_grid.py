"""Are there i.i.d. settings (share, size, learning rate) in which hops recur?

Command:  python -m launchers.sweep --experiment=hop_grid
Hardware: two CPU cores. Time: 1 to 4 minutes a run, 8 runs.
Data:     quickstart_iid with the share of each pattern family at 0.02 or 0.06, width 64 with two
          layers or width 96 with three, learning rate 1e-3 or 4e-3; seed 11.
Expected: open; the grid was fixed before any of it was run.
"""

import dataclasses
import itertools

from experiments import hop_seeds, quickstart_iid
from research.config import ExperimentConfig

SHARES = (0.02, 0.06)
SIZES = {'d64': dict(n_layers=2, d_model=64, d_head=16, d_ff=256),
         'd96': dict(n_layers=3, d_model=96, d_head=24, d_ff=384)}
LEARNING_RATES = (1e-3, 4e-3)


def get_configs() -> dict[str, ExperimentConfig]:
  """Returns the runs by name."""
  configs = {}
  for share, size, peak_lr in itertools.product(SHARES, SIZES, LEARNING_RATES):
    config = hop_seeds.seeded(quickstart_iid.get_config(), seed=11)
    microworld = dataclasses.replace(config.data.microworld, successive=share, repetitive=share)
    name = f'iid-share{share}-{size}-lr{peak_lr}'
    configs[name] = dataclasses.replace(
        config, name=name, model=dataclasses.replace(config.model, **SIZES[size]),
        data=dataclasses.replace(config.data, microworld=microworld),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=peak_lr))
  return configs
