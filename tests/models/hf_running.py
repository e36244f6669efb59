"""Our model on imported checkpoints, layer by layer, and the interpreter that runs transformers."""

import os
import pathlib
import subprocess

import jax
import numpy as np

from models import transformer
from models.interop.checkpoint import HfCheckpoint, leaf_shapes
from tests.models import hf_cases

PYTHON = 'MODEHOP_TRANSFORMERS_PYTHON'
WITNESS = pathlib.Path(__file__).with_name('hf_witness.py')


def as_tree(config, read) -> dict:
  """Returns read(leaf name) as float32 in the tree of a model's parameters."""
  names = iter(leaf_shapes(config))
  return jax.tree.map(lambda _: np.asarray(read(next(names)), np.float32),
                      transformer.abstract_params(config))


def imported(checkpoint: HfCheckpoint) -> tuple:
  """Returns the static half of a checkpoint's model and its parameters."""
  return transformer.build(checkpoint.config), as_tree(checkpoint.config, checkpoint.read)


def layer_by_layer(graphdef, params, tokens_BL: np.ndarray) -> tuple[np.ndarray, list]:
  """Returns logits [B, L, V], and what enters each layer and leaves the final norm, [B, L, D].

  Without jit: cases of the same shapes then share their compiled operations.
  """
  model, entered = transformer.apply(graphdef, params), []

  def run_layers(body, carry, inputs, config):
    for i, kind in enumerate(config.layer_kinds):
      entered.append(np.asarray(carry[0]))
      carry, _ = body(kind, carry, jax.tree.map(lambda x: x[i], inputs))
    return carry, None

  positions = np.arange(tokens_BL.shape[1])
  with jax.default_matmul_precision('highest'):
    x_BLD = model.embedded(tokens_BL, positions)
    x_BLD, _, _ = model.through_blocks(
      x_BLD, positions, model.own_row(None), run_layers=run_layers)
    last_BLD = model.final_norm(x_BLD)
    return np.asarray(model.logits(last_BLD)), [*entered, np.asarray(last_BLD)]


def transformers_python() -> str | None:
  """Returns the interpreter that has transformers, None where nobody named one."""
  return os.environ.get(PYTHON)


def run_witness(folder: pathlib.Path, python: str) -> None:
  """Writes witness.npz beside every checkpoint of a folder."""
  np.save(folder / 'tokens.npy', hf_cases.tokens_BL())
  result = subprocess.run(
    [python, str(WITNESS), str(folder), str(folder / 'tokens.npy'), str(hf_cases.PROMPT),
     str(hf_cases.GENERATED)], text=True, capture_output=True, check=False)
  assert result.returncode == 0, result.stderr[-3000:]
