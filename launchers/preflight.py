"""Says before it runs what a training step takes on TPUs: memory, traffic, time. Needs no TPU.

  python -m launchers.preflight --experiment=llama3_8b --topology=v5p:4x4x4
  python -m launchers.preflight --experiment=llama3_8b --topology=v5e:16x16 --config.mesh.fsdp=256
  python -m launchers.preflight --experiment=llama3_8b --topology=v5p:4x4x4 --search=10
  python -m launchers.preflight --experiment=llama3_8b --topology=v5e:4x4 --decode --json=out.json

Compiles the step of launchers.pretrain with the TPU's own compiler (extra `tpu`). Ends with code 0
where it fits, 1 where it does not (naming the nearest setting that does), 2 for input that cannot
be. Times are those of a roofline: no measurement, and at best.
"""

import pathlib
import sys

from absl import flags

from launchers import flags as shared
from research.errors import UserError
from research.training import mesh_search
from research.training.nearest import as_nearest, nearest_fitting
from research.training.preflight import preflight
from research.training.preflight_decode import preflight_decode
from research.training.preflight_text import as_json, as_text, decode_text

EXPERIMENT = flags.DEFINE_string('experiment', 'quickstart', 'a module of experiments/')
TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', "TPUs of one slice, such as 'v5p:4x4x4'")
SLICES = flags.DEFINE_integer('slices', 1, 'slices, joined by the data-center network', 1)
FULL = flags.DEFINE_bool('full', False, 'let the compiler generate code, too: ten times as long')
DECODE = flags.DEFINE_bool('decode', False, 'a step of decoding instead, with a full cache')
SEARCH = flags.DEFINE_integer('search', 0, 'rank so many meshes instead, without compiling')
JSON = flags.DEFINE_string('json', '', 'write what was found to this file, too')


def main() -> None:
  config, topology = shared.config_from_flags(EXPERIMENT.value), TOPOLOGY.value
  try:
    if SEARCH.value:
      found = mesh_search.search(config, topology)[:SEARCH.value]
      text, fits = mesh_search.table(found), bool(found)
    elif DECODE.value:
      found = preflight_decode(config, topology)
      text, fits = decode_text(found), found.fits
    else:
      found = preflight(config, topology, SLICES.value, code=FULL.value)
      text, fits = as_text(found), found.fits
  except ValueError as error:
    raise UserError(str(error)) from error
  print(text.rstrip(), flush=True)
  if JSON.value:
    pathlib.Path(JSON.value).write_text(as_json(found), encoding='utf-8')
  if not (fits or SEARCH.value or DECODE.value):
    print(f'\n{as_nearest(config, nearest_fitting(config, found))}')
  sys.exit(0 if fits else 1)


if __name__ == '__main__':
  shared.run(main)
