r"""Writes texts with a trained model: what it goes on with after each prompt.

  python -m launchers.sample --run_dir=runs/quickstart --prompt='3 + 4 ='
  python -m launchers.sample --run_dir=runs/quickstart --prompt='the soup was' --prompt='3 + 4 =' \
      --n_samples=3 --temperature=0.7 --top_p=0.9 --stop=.
  python -m launchers.sample --run_dir=runs/quickstart --prompt='the soup was' --step=1200 --json

Temperature 0 always takes the likeliest token. A text depends on its prompt, the seed and its
number, not on the other prompts.
"""

import dataclasses
import json

from absl import flags

from launchers import flags as shared
from models.sampling import Sampling
from research.errors import UserError
from research.evals.samples import sample_run
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a run')
PROMPT = flags.DEFINE_multi_string('prompt', [], 'text to go on from; may be given several times')
STEP = flags.DEFINE_integer('step', -1, 'step of the snapshot; -1 is the newest')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 32, 'tokens of a text, at most', lower_bound=1)
N_SAMPLES = flags.DEFINE_integer('n_samples', 1, 'texts per prompt', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'divides logits; 0 takes the likeliest token')
TOP_K = flags.DEFINE_integer('top_k', 0, 'draws among this many likeliest tokens; 0 is all')
TOP_P = flags.DEFINE_float(
    'top_p', 1.0, 'draws among the fewest likeliest tokens whose probability reaches this')
SEED = flags.DEFINE_integer(
    'seed', 0, 'of all draws', lower_bound=0, upper_bound=2**31 - 1)
STOP = flags.DEFINE_multi_string(
    'stop', [], 'text of one token that ends a text, beside the end of a document; may be given '
    'several times')
JSON = flags.DEFINE_bool('json', False, 'print one JSON object per text')


def main() -> None:
  if not RUN_DIR.value:
    raise UserError('--run_dir is empty; give the directory of a run, say runs/quickstart')
  if not PROMPT.value:
    raise UserError("--prompt is missing; give a text to go on from: --prompt='...'")
  try:
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  except ValueError as error:
    raise UserError(f'--{error}') from error
  for sample in sample_run(
      RunDir(RUN_DIR.value), PROMPT.value, step=STEP.value, n_samples=N_SAMPLES.value,
      max_tokens=MAX_TOKENS.value, sampling=sampling, stop=STOP.value, seed=SEED.value):
    if JSON.value:
      print(json.dumps(dataclasses.asdict(sample), ensure_ascii=False), flush=True)
    else:
      end = 'stopped' if sample.stopped else 'reached --max_tokens'
      print(f'--- step {sample.step}, sample {sample.number}, {sample.n_tokens} tokens, {end}\n'
            f'{sample.prompt}|{sample.text}', flush=True)


if __name__ == '__main__':
  shared.run(main)
