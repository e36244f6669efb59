"""Change points of a continuous margin, without states or thresholds: where its level moved.

A description beside the detector, not a test: it has no error rate. The search is that of the
library ruptures (extra `changes`): exact, penalized, compiled.
"""

import numpy as np

from research.dynamics import contrasts
from research.errors import UserError

PENALTY = 3.0  # of a change, in log(n_checkpoints) * variance; two is the Schwarz criterion's


def change_points(values: np.ndarray, dwell: int = 4) -> list[int]:
  """Returns the first checkpoint of every new level, ascending.

  Least squares with a penalty per change (Killick, Fearnhead and Eckley 2012, PELT). The variance
  is that of blocks of half a dwell, so that autocorrelated checkpoints do not count as changes.

  Args:
    values: (T,) finite means.
    dwell: least checkpoints of a level.

  Raises:
    UserError: ruptures is not installed.
    ValueError: values are not finite or fewer than two levels take.
  """
  try:
    import ruptures  # Optional: only this description needs it.
  except ImportError as error:
    raise UserError("change points take the library ruptures: pip install -e '.[changes]'"
                    ) from error
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or len(values) < 2 * dwell or not np.all(np.isfinite(values)):
    raise ValueError(f'change points take {2 * dwell} or more finite values in a row, got shape '
                     f'{values.shape}')
  block = contrasts.block_length(dwell)
  size = np.abs(contrasts.second_differences(values, block))
  variance = np.median(size)**2 * 1.4826**2 * block / 1.5
  found = ruptures.KernelCPD(kernel='linear', min_size=dwell).fit(values[:, None])
  # A penalty of zero would cut a series without noise everywhere.
  penalty = max(PENALTY * np.log(len(values)) * variance, 1e-9)
  return [int(t) for t in found.predict(pen=penalty)[:-1]]
