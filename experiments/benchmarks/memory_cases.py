"""The meshes on which predicted and compiled memory are compared: some calibrate, some judge."""

import dataclasses
from typing import Any

from experiments import llama3_70b, llama3_8b, olmo3_32b, olmo3_7b, qwen3_30b_a3b
from models.config import ModelConfig
from parallelism.compile_only import compile_apart
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig
from research.training import memory
from research.training.preflight import lowered_step

SMALL = ModelConfig(
    vocab_size=32_000, context_length=8192, n_layers=16, d_model=1024, n_heads=16, n_kv_heads=8,
    d_head=64, d_ff=4096, tie_embeddings=False, compute_dtype='bfloat16')
TIED = dataclasses.replace(SMALL, tie_embeddings=True)


@dataclasses.dataclass(frozen=True)
class Case:
  """A topology and an experiment on it."""

  name: str
  topology: str
  config: ExperimentConfig


def case(model: str, topology: str, *, rows: int, length: int = 4096, remat: str = 'full',
         layers: int = 0, compute: dict[str, Any] = {}, **axes: int) -> Case:
  """Returns a case of a published or a small model.

  Args:
    model: a name of the function's first table, 'small' or 'tied'.
    topology: the chips.
    rows: of the batch.
    length: tokens per row.
    remat: see `ModelConfig.remat`.
    layers: 0 keeps the model's number.
    compute: settings of the step that differ from their defaults.
    **axes: sizes of the mesh, 1 where not given.
  """
  bases = {'8b': llama3_8b, '70b': llama3_70b, 'olmo7b': olmo3_7b,
           'olmo32b': olmo3_32b, 'moe30b': qwen3_30b_a3b}
  base = bases.get(model, llama3_8b).get_config()
  shape = {'small': SMALL, 'tied': TIED}.get(model, base.model)
  shape = dataclasses.replace(shape, remat=remat, scan_layers='auto',
                              n_layers=layers or shape.n_layers)
  config = dataclasses.replace(
      base, model=shape, mesh=MeshConfig(**{'data': 1, **axes}),
      data=dataclasses.replace(base.data, batch_size=rows, sequence_length=length),
      compute=dataclasses.replace(base.compute, **compute))
  words = [model + (f'/{layers}' if layers else ''), topology,
           *(f'{axis}={size}' for axis, size in axes.items()), f'{rows}x{length}', remat,
           *(f'{field}={value}' for field, value in compute.items())]
  return Case(' '.join(words), topology, config)


def calibration() -> list[Case]:
  """Returns the cases that the formulas were fitted to."""
  v5p, v5e, v6e = 'v5p:2x2x2', 'v5e:2x4', 'v6e:2x4'
  return [
      case('8b', 'v5e:16x16', rows=256, length=8192, fsdp=256),
      case('8b', 'v5p:4x4x4', rows=128, length=8192, remat='dots', fsdp=64),
      case('8b', v6e, rows=16, layers=8, fsdp=8),
      case('8b', v5p, rows=8, layers=4, remat='none', fsdp=8),
      case('8b', 'v6e:4x4', rows=16, layers=16, fsdp=4, tensor=4),
      case('8b', v5p, rows=16, layers=8, remat='dots', data=2, fsdp=2, tensor=2),
      case('8b', v5p, rows=8, length=8192, layers=8, fsdp=4, context=2),
      case('8b', v5p, rows=32, layers=8, stage=2, fsdp=4),
      case('8b', v5p, rows=32, layers=8, compute={'pipeline': 'gpipe'}, stage=4, fsdp=2),
      case('moe30b', v5p, rows=16, layers=4, expert=8),
      case('moe30b', 'v5p:4x4x4', rows=128, fsdp=8, expert=8),
      case('8b', v6e, rows=32, layers=4, compute={'microbatch_tokens': 4096}, fsdp=8),
      case('small', v5e, rows=32, remat='none', fsdp=8),
      case('tied', v5e, rows=16, data=8),
      case('tied', v5e, rows=8, remat='dots', tensor=8),
      case('8b', v5p, rows=8, layers=8, compute={'gather': 'step'}, fsdp=8),
      case('moe30b', v5p, rows=8, layers=4, remat='none', data=4, fsdp=2),
  ]


def judging() -> list[Case]:
  """Returns the cases that were compiled after the formulas had been committed."""
  v5p, v5e, v6e = 'v5p:2x2x2', 'v5e:2x4', 'v6e:2x4'
  return [
      case('8b', 'v5e:16x16', rows=256, length=8192, remat='dots', fsdp=64, tensor=4),
      case('olmo7b', 'v5p:4x4x4', rows=128, length=8192, remat='dots', fsdp=64),
      case('8b', 'v5e:16x16', rows=128, length=8192, fsdp=128, context=2),
      case('70b', 'v5p:8x8x8', rows=512, length=8192, fsdp=512),
      case('small', v5e, rows=16, remat='dots', data=2, fsdp=4),
      case('moe30b', 'v6e:16x16', rows=256, fsdp=32, expert=8),
      case('small', v5e, rows=32, remat='none', fsdp=4, tensor=2),
      case('8b', v6e, rows=8, layers=4, remat='dots', fsdp=4, tensor=2),
      case('small', v5e, rows=64, stage=4, fsdp=2),
      case('small', v5e, rows=32, compute={'pipeline': 'gpipe'}, stage=2, fsdp=2, data=2),
      case('tied', v5e, rows=4, length=8192, remat='none', context=4, data=2),
      case('small', v5e, rows=16, length=8192, compute={'context': 'all_to_all'}, fsdp=4,
           context=2),
      case('small', v5e, rows=64, remat='dots', compute={'microbatch_tokens': 8192}, fsdp=8),
      case('8b', v5p, rows=32, layers=8, remat='none', stage=2, tensor=2, fsdp=2),
      case('moe30b', v5e, rows=8, layers=2, expert=4, tensor=2),
      case('8b', v5e, rows=16, layers=2, remat='none', fsdp=8),
  ]


def later() -> list[Case]:
  """Returns cases of what got a term after a judging.

  Norms after branches, wide tensor axes; loops over several layers at a time and rings.
  """
  v5p = 'v5p:2x2x2'
  return [
      case('olmo7b', 'v5e:16x16', rows=256, remat='dots', fsdp=256),
      case('olmo7b', 'v5e:2x4', rows=8, layers=4, remat='dots', fsdp=4, tensor=2),
      case('olmo7b', 'v5e:2x4', rows=16, layers=4, remat='none', fsdp=8),
      case('small', 'v5e:2x4', rows=32, fsdp=2, tensor=4),
      case('8b', 'v5e:2x4', rows=8, layers=4, remat='dots', tensor=8),
      case('8b', 'v6e:2x4', rows=16, layers=4, fsdp=2, tensor=4),
      case('olmo7b', 'v5p:4x4x4', rows=512, length=8192, fsdp=64),
      case('olmo7b', v5p, rows=16, layers=8, fsdp=8),
      case('olmo7b', 'v5e:2x4', rows=16, layers=8, fsdp=8),
      case('olmo7b', v5p, rows=16, layers=8, fsdp=4, tensor=2),
      case('8b', v5p, rows=16, length=8192, layers=8, fsdp=2, context=4),
  ]


def unseen() -> list[Case]:
  """Returns cases that judged the formulas before the last of `later` had terms."""
  v5p, v5e, v6e = 'v5p:2x2x2', 'v5e:2x4', 'v6e:2x4'
  return [
      case('8b', 'v6e:16x16', rows=512, length=8192, fsdp=256),
      case('8b', 'v5p:4x4x4', rows=512, length=8192, data=4, fsdp=16),
      case('70b', 'v5p:8x8x8', rows=1024, length=8192, fsdp=512),
      case('70b', 'v5p:8x8x8', rows=512, length=8192, fsdp=128, tensor=4),
      case('moe30b', 'v5p:4x4x4', rows=512, length=8192, fsdp=64),
      case('8b', 'v5p:4x4x4', rows=32, length=8192, fsdp=16, context=4),
      case('8b', 'v5e:16x16', rows=256, length=8192, remat='dots', fsdp=256),
      case('olmo7b', 'v6e:4x4', rows=16, layers=16, fsdp=16),
      case('8b', 'v5e:4x4', rows=16, layers=8, remat='dots', fsdp=16),
      case('8b', 'v5p:2x2x4', rows=64, layers=16, stage=4, fsdp=4),
      case('moe30b', 'v6e:4x4', rows=32, layers=8, fsdp=2, expert=8),
      case('olmo7b', v5p, rows=16, layers=8, remat='dots', data=2, tensor=4),
      case('small', 'v5e:4x4', rows=64, remat='none', data=4, fsdp=4),
      case('small', v6e, rows=32, compute={'pipeline': 'interleaved', 'pipeline_chunks': 2},
           stage=2, fsdp=4),
      case('tied', v5e, rows=32, compute={'reduce_dtype': 'bfloat16'}, fsdp=8),
      case('small', v5e, rows=16, length=8192, context=8),
      case('8b', v6e, rows=32, layers=8, fsdp=8),
      case('8b', v6e, rows=8, layers=12, remat='dots', fsdp=8),
  ]


def fresh() -> list[Case]:
  """Returns cases that were compiled after all of that had terms, several near a chip's memory."""
  v5e, v6e = 'v5e:2x4', 'v6e:2x4'
  return [
      case('8b', v5e, rows=16, length=8192, layers=8, fsdp=2, context=4),
      case('tied', v5e, rows=32, remat='dots', data=2, fsdp=4),
      case('8b', v5e, rows=32, layers=6, fsdp=4, tensor=2),
      case('8b', v5e, rows=32, layers=8, stage=2, fsdp=4),
      case('8b', 'v5e:16x16', rows=768, length=8192, fsdp=256),
      case('8b', 'v5e:4x4', rows=48, length=8192, layers=16, fsdp=16),
      case('moe30b', 'v5e:4x4', rows=32, layers=8, fsdp=16),
      case('moe30b', v5e, rows=16, length=8192, layers=4, fsdp=2, expert=4),
      case('olmo32b', 'v5e:4x4', rows=16, layers=16, fsdp=8, tensor=2),
      case('olmo7b', v6e, rows=16, layers=12, remat='dots', fsdp=4, tensor=2),
      case('tied', v6e, rows=32, remat='none', fsdp=8),
      case('small', v6e, rows=16, length=8192, remat='dots', fsdp=2, context=4),
      case('8b', v6e, rows=16, length=8192, layers=8, remat='dots',
           compute={'context': 'all_to_all'}, fsdp=4, context=2),
      case('8b', v6e, rows=32, layers=8, stage=4, tensor=2),
      case('70b', 'v5p:4x4x4', rows=256, length=8192, fsdp=64),
      case('olmo7b', 'v5p:2x2x2', rows=32, length=8192, layers=16, remat='dots', fsdp=8),
  ]


def newest() -> list[Case]:
  """Returns cases that were compiled after the terms of experts had changed once more."""
  v5e, v6e = 'v5e:2x4', 'v6e:2x4'
  return [
      case('moe30b', 'v5e:4x4', rows=32, layers=8, remat='dots', fsdp=4, expert=4),
      case('moe30b', v5e, rows=24, layers=4, fsdp=8),
      case('8b', v5e, rows=32, layers=8, remat='dots', stage=2, fsdp=4),
      case('8b', 'v5e:4x4', rows=64, length=8192, layers=16, fsdp=16),
      case('small', v5e, rows=24, remat='none', fsdp=8),
      case('8b', 'v5e:4x4', rows=32, length=8192, layers=8, remat='dots', fsdp=8, tensor=2),
      case('moe30b', v6e, rows=16, layers=6, remat='dots', fsdp=2, expert=4),
      case('olmo32b', v6e, rows=8, layers=12, remat='dots', fsdp=8),
      case('moe30b', 'v6e:4x4', rows=64, layers=12, fsdp=16),
      case('70b', 'v6e:16x16', rows=256, length=8192, fsdp=256),
      case('8b', 'v5p:2x2x2', rows=32, length=8192, layers=16, remat='dots', fsdp=2, context=4),
  ]


def pipelines() -> list[Case]:
  """Returns cases that were compiled after the loss of a pipeline had changed."""
  v5e = 'v5e:2x4'
  return [
      case('8b', v5e, rows=32, layers=8, compute={'pipeline': 'gpipe'}, stage=2, fsdp=2, tensor=2),
      case('small', v5e, rows=64, remat='dots',
           compute={'pipeline': 'interleaved', 'pipeline_chunks': 2}, stage=2, fsdp=4),
      case('olmo7b', v5e, rows=32, layers=8, stage=4, fsdp=2),
      case('8b', 'v5e:4x4', rows=64, layers=16, remat='none', stage=4, fsdp=4),
      case('8b', 'v6e:2x4', rows=32, layers=12, remat='dots', stage=2, fsdp=4),
  ]


def compiled_bytes(case: Case) -> dict[str, Any]:
  """Returns what the compiler says: bytes of arguments and of all, and whether it refuses them."""
  compiled = compile_apart(lowered_step, case.config, case.topology)
  return {'arguments': compiled.arguments, 'total': compiled.total,
          'refused': compiled.refusal is not None, 'seconds': round(compiled.seconds, 1)}


def predicted(case: Case) -> memory.Prediction:
  """Returns the prediction for a case."""
  return memory.predict(case.config, dataclasses.asdict(case.config.mesh), case.topology)
