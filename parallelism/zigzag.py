"""Which tokens of a row each device of a ring holds, and what it computes at each step.

A row is cut into 2C chunks; device c of C holds chunk c, its early half, and chunk 2C-1-c, its
late half. At step r a device has the keys of the device r places before it. Under a causal mask
exactly two of the four pairs of chunks that meet then are visible: late queries see early keys,
and either early queries early keys (the keys' device is a lower number) or late queries late keys
(a higher one). So all devices work equally at every step; contiguous shares would leave the first
device with one C-th of what the last one has.
"""

from typing import NamedTuple

import numpy as np

EARLY, LATE = 0, 1
DEAD = -1  # stands for the offset of a pair of chunks in which no query sees a key


class Work(NamedTuple):
  """One pair of chunks for every device, int32 [..., C] each.

  Queries and keys are halves of what is at hand, `distance` chunks apart. `offset` is a distance,
  too: one at which the same keys are visible, so that few of them stand for all; or DEAD.
  """

  q_half: np.ndarray
  k_half: np.ndarray
  distance: np.ndarray
  offset: np.ndarray


class Arm(NamedTuple):
  """Steps in one direction: keys move on by `direction` devices before each of them."""

  direction: int
  work: tuple[Work, ...]  # leaves [n_steps, C]
  n_steps: int


def zigzag_order(length: int, n_devices: int) -> np.ndarray:
  """Returns where in its row each column stands that the devices hold one after another, [length].

  tokens_BL[:, order] is to be split over devices, `order` are its positions, and
  x_BL[:, np.argsort(order)] is in the order of the row again.

  Raises:
    ValueError: the row does not divide into two chunks per device.
  """
  chunk, rest = divmod(length, 2 * n_devices)
  if rest or not chunk:
    nearest = [n * 2 * n_devices for n in (chunk, chunk + 1) if n]
    raise ValueError(
        f'rows of {length} tokens do not divide into the {2 * n_devices} chunks of '
        f'{n_devices} context devices; rows of {" or ".join(map(str, nearest))} do')
  chunks = np.arange(length, dtype=np.int32).reshape(2 * n_devices, chunk)
  return np.stack([chunks[:n_devices], chunks[:n_devices - 1:-1]], axis=1).reshape(-1)


def _offset(distance: np.ndarray, chunk: int, window: int) -> np.ndarray:
  """Returns the offset that stands for each distance between chunks.

  All whose keys are visible as a whole have that of neighbors.
  """
  if not window:
    return np.minimum(distance, 1)
  whole = (distance > 0) & ((distance + 1) * chunk <= window)
  dead = (distance - 1) * chunk + 1 >= window
  return np.where(dead, DEAD, np.where(whole, 1, distance))


def work_at(steps: np.ndarray, n_devices: int, chunk: int, window: int) -> tuple[Work, ...]:
  """Returns the pairs of chunks that may be visible at steps [...] of a causal ring.

  Chunks have `chunk` tokens; a window is in tokens, 0 for none. Pairs that are dead on all
  devices at all of the steps are left out.
  """
  queries = np.arange(n_devices)
  keys = (queries - np.asarray(steps)[..., None]) % n_devices
  higher = (keys > queries).astype(np.int32)
  pairs = [(higher, higher, np.abs(queries - keys)),
           (LATE, EARLY, 2 * n_devices - 1 - queries - keys)]
  if not np.any(steps):
    pairs.append((LATE, LATE, 0))
  works = []
  for pair in pairs:
    q_half, k_half, distance = (np.broadcast_to(x, keys.shape).astype(np.int32) for x in pair)
    offset = _offset(distance, chunk, window).astype(np.int32)
    if np.any(offset != DEAD):
      works.append(Work(q_half, k_half, distance, offset))
  return tuple(works)


def arms(n_devices: int, chunk: int, window: int) -> tuple[Arm, ...]:
  """Returns the steps after the first, at which every device has its own keys.

  Where the window is so short that no device sees the keys of some steps, keys go to the
  neighbors on both sides instead of once around.
  """
  reach = n_devices - 1
  if window:
    reach = min(reach, (window + chunk - 2) // chunk)  # the farthest chunk that is not dead
  if not reach:
    return ()
  numbers = [np.arange(1, reach + 1), np.arange(n_devices - 1, n_devices - 1 - reach, -1)]
  if 2 * reach >= n_devices - 1:
    numbers = [np.arange(1, n_devices)]
  return tuple(Arm(direction, work_at(steps, n_devices, chunk, window), len(steps))
               for direction, steps in zip((1, -1), numbers))
