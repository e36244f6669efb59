"""Scores texts by lm-evaluation-harness's backend for transformers, whenever a line asks for it.

Runs in an interpreter that need not have modehop:

  python harness_scoring.py FOLDER BATCH_SIZE

FOLDER holds a checkpoint in model/ and texts of a suite in NAME.json. For each line NAME of the
standard input it writes NAME.npy, log-probabilities [items, 2], and answers with NAME.
"""

import json
import pathlib
import sys


def write_texts(path: pathlib.Path, texts: list[tuple[list[int], list[int]]]) -> None:
  """Writes (prompt, answer)s in tokens."""
  path.write_text(json.dumps(texts), encoding='utf-8')


def main(folder: pathlib.Path, batch_size: int) -> None:
  import numpy as np
  import torch
  from lm_eval.models.huggingface import HFLM
  from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

  model = AutoModelForCausalLM.from_pretrained(folder / 'model', dtype=torch.float32).eval()
  tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / 'model' / 'tokenizer.json'),
                                      eos_token='w0', pad_token='w0')  # it writes and adds nothing
  harness = HFLM(pretrained=model, tokenizer=tokenizer, backend='causal', batch_size=batch_size,
                 device='cpu')
  for line in sys.stdin:
    name = line.strip()
    texts = json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))
    # Requests are told apart by their texts, which are not given here: numbers stand for them.
    requests = [((str(i), ''), prompt, answer) for i, (prompt, answer) in enumerate(texts)]
    scored = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    np.save(folder / f'{name}.npy', np.reshape([logp for logp, _ in scored], (-1, 2)))
    print(name, flush=True)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
