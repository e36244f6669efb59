"""What the harness's own Hugging Face backend answers: tests/golden/harness_answers.json.

To make it again, in two environments, the second with `pip install 'lm_eval[hf]==0.4.13'`:

  python -m tests.research.harness_witness write folder
  python tests/research/harness_witness.py answer folder > tests/golden/harness_answers.json
"""

import json
import pathlib
import sys
from typing import Any

TEXT = 'the good soup was good and the other soup was better than the good bread. ' * 3
CONTEXT = 24  # tokens
PAIRS = [
    ('the soup was', ' good'), ('the soup was ', 'good'), ('the soup was', ' better than bread'),
    ('the so', 'up was better than the good bread'), ('', 'the other'), ('the bread was', ' good'),
    ('zzyx ' * 8, 'was good'), (TEXT[:120], ' soup')]
TEXTS = ['the soup', ' was\n\ngood ', TEXT, 'zzyx ' * 12]
PROMPTS = ['the soup was', 'good and', TEXT[:120]]
GENERATION = {'until': ['e'], 'max_gen_toks': 9}


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes a tiny checkpoint with its tokenizer; returns the folder."""
  from research.data import tokenizers
  from tests.models import hf_cases
  tokenizer = tokenizers.train_bpe([TEXT], 300)
  hf_cases.write(folder, hf_cases.config_json('llama-default-untied') | {
      'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': CONTEXT})
  tokenizer.save(folder / 'tokenizer.json')
  (folder / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': tokenizers.BOS,
      'eos_token': tokenizers.EOS}))
  return folder


def answers(model: Any) -> dict[str, Any]:
  """Returns what a model of the harness answers to all requests."""
  from lm_eval.api.instance import Instance

  def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, ('task', 0, 1))
  return {
      'pairs': [list(pair) for pair in model.loglikelihood(
          [request('loglikelihood', *pair) for pair in PAIRS])],
      'texts': model.loglikelihood_rolling(
          [request('loglikelihood_rolling', text) for text in TEXTS]),
      'prompts': model.generate_until(
          [request('generate_until', prompt, dict(GENERATION)) for prompt in PROMPTS])}


if __name__ == '__main__':
  if sys.argv[1] == 'write':
    write(pathlib.Path(sys.argv[2]))
  else:
    from lm_eval.models.huggingface import HFLM
    witness = HFLM(pretrained=sys.argv[2], device='cpu', dtype='float32', batch_size=3)
    print(json.dumps(answers(witness), indent=1))
