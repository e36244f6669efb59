"""Says before it runs what a training step takes on TPUs: memory, traffic, time. Needs no TPU.

  python -m launchers.preflight --experiment=llama3_8b --topology=v5p:4x4x4
  python -m launchers.preflight --experiment=llama3_8b --topology=v5e:16x16 --config.mesh.fsdp=256
  python -m launchers.preflight --experiment=llama3_8b --topology=v5p:4x4x4 --json=preflight.json

Compiles the step of launchers.pretrain with the TPU's own compiler (extra `tpu`). Ends with code 0
where it fits, 1 where it does not (naming the nearest setting that does), 2 for input that cannot
be. Times are those of a roofline: no measurement, and at best.
"""

import pathlib
import sys

from absl import flags

from launchers import flags as shared
from research.errors import UserError
from research.training.nearest import changes, nearest_fitting
from research.training.preflight import preflight
from research.training.preflight_decode import preflight_decode
from research.training.preflight_text import as_json, as_text, decode_text

EXPERIMENT = flags.DEFINE_string('experiment', 'quickstart', 'a module of experiments/')
TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', "TPUs of one slice, such as 'v5p:4x4x4'")
SLICES = flags.DEFINE_integer('slices', 1, 'slices, joined by the data-center network')
FULL = flags.DEFINE_bool('full', False, 'let the compiler generate code, too: ten times as long')
DECODE = flags.DEFINE_bool('decode', False, 'also a step of decoding, with a full cache')
JSON = flags.DEFINE_string('json', '', 'write what was found to this file, too')
NEAREST = flags.DEFINE_bool('nearest', True, 'where it does not fit look for the nearest that does')


def main() -> None:
  config = shared.config_from_flags(EXPERIMENT.value)
  try:
    if DECODE.value:
      found = preflight_decode(config, TOPOLOGY.value)
      print(decode_text(found), end='')
    else:
      found = preflight(config, TOPOLOGY.value, SLICES.value, code=FULL.value)
      print(as_text(found), end='', flush=True)
  except ValueError as error:
    raise UserError(str(error)) from error
  if JSON.value:
    pathlib.Path(JSON.value).write_text(as_json(found), encoding='utf-8')
  if found.fits:
    return
  near = None if DECODE.value or not NEAREST.value else nearest_fitting(config, found)
  if near:
    print(f'\nThe nearest that fits: {" ".join(changes(config, near[0]))}\n\n{as_text(near[1])}',
          end='')
  elif NEAREST.value and not DECODE.value:
    print('\nNothing near fits; more devices or a smaller model would.')
  sys.exit(1)


if __name__ == '__main__':
  shared.run(main)
