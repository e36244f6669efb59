"""Run by an interpreter that has torch and transformers: what transformers makes of checkpoints.

  python hf_witness.py <folder of checkpoints> <tokens.npy> <tokens of prompt> <tokens to generate>

Writes witness.npz into each: logits [B, L, V], hidden_<i> (what enters layer i, the last one what
the final norm gives) and, of the first row, what follows its prompt greedily.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers


def main(folder: str, tokens: str, n_prompt: str, n_generated: str) -> None:
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(1)
  tokens_BL = torch.from_numpy(np.load(tokens)).long()
  for config in sorted(pathlib.Path(folder).glob('*/config.json')):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      config.parent, output_loading_info=True, attn_implementation='eager', dtype='float32')
    problems = {key: value for key, value in info.items() if value and key != 'mismatched_keys'}
    assert not problems and not info['mismatched_keys'], (config.parent.name, info)
    model.eval()
    with torch.no_grad():
      out = model(tokens_BL, output_hidden_states=True, use_cache=False)
      greedy = model.generate(
        tokens_BL[:1, : int(n_prompt)], do_sample=False, min_new_tokens=int(n_generated),
        max_new_tokens=int(n_generated), attention_mask=torch.ones(1, int(n_prompt)).long())
    np.savez(
      config.parent / 'witness.npz', logits=out.logits.float().numpy(),
      greedy=greedy[0, int(n_prompt):].numpy(),
      **{f'hidden_{i}': h.float().numpy() for i, h in enumerate(out.hidden_states)})
    print(config.parent.name, flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
