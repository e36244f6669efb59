"""The contender under test: modehop's production step, built as a run builds it."""

from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmarks import shapes
from models.config import ModelConfig
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.sharding import path_name
from research import build as build_lib
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.training.config import OptimizerConfig


def experiment(shape: shapes.Shape, n_rows: int, dtype: str) -> ExperimentConfig:
  """Returns the experiment whose step is measured; all that is not named is the default."""
  return ExperimentConfig(
      name='benchmark',
      model=ModelConfig(
          vocab_size=shape.vocab_size, context_length=shape.length, n_layers=shape.n_layers,
          d_model=shape.d_model, n_heads=shape.n_heads, n_kv_heads=shape.n_heads,
          d_head=shape.d_head, d_ff=shape.d_ff, norm_eps=shapes.NORM_EPS, compute_dtype=dtype,
          init_std=0.0),
      data=DataConfig(sequence_length=shape.length, batch_size=n_rows),
      optimizer=OptimizerConfig(
          name='adamw', peak_lr=shapes.LEARNING_RATE, schedule='constant', warmup_steps=0,
          b1=shapes.B1, b2=shapes.B2, eps=shapes.EPS, weight_decay=shapes.WEIGHT_DECAY,
          clip_norm=shapes.CLIP_NORM))


def build(shape: shapes.Shape, n_rows: int, dtype: str) -> build_lib.Build:
  """Returns the model on a mesh of one device, numerics resolved as a run resolves them."""
  config = experiment(shape, n_rows, dtype)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  return build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))


def full_batch(batch: shapes.Batch) -> dict[str, np.ndarray]:
  """Returns what the data pipeline would feed: one document per row, nothing masked."""
  n_rows, length = batch['tokens'].shape
  positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), (n_rows, length))
  return {**batch, 'segment_ids': np.ones((n_rows, length), np.int32),
          'positions': np.ascontiguousarray(positions_BL),
          'loss_mask': np.ones((n_rows, length), np.float32)}


def flatten(params) -> shapes.Weights:
  """Returns a parameter tree as host arrays by dotted name."""
  return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


def unflatten(built: build_lib.Build, weights: shapes.Weights):
  """Returns the parameter tree on the mesh from arrays by dotted name."""
  return built.place_params(
      jax.tree.map_with_path(lambda path, _: weights[path_name(path)], built.params))


def fresh_weights(built: build_lib.Build) -> shapes.Weights:
  """Returns the weights of seed 0, norm scales moved off 1 so that a wrong use of them shows."""
  rng = np.random.default_rng(0)
  weights = flatten(built.init_state().params)
  return {name: rng.uniform(0.8, 1.2, x.shape).astype(x.dtype) if name.endswith('scale') else x
          for name, x in weights.items()}


def start(shape: shapes.Shape, n_rows: int, weights: shapes.Weights, dtype: str) -> Callable:
  """Returns step(batch) -> read; the step runs the update, read() waits and returns its loss."""
  built = build(shape, n_rows, dtype)
  return stepper(built, weights)


def stepper(built: build_lib.Build, weights: shapes.Weights) -> Callable:
  """Returns step(batch) -> read for a build, starting from these weights."""
  state = built.init_state()._replace(params=unflatten(built, weights))
  train_step = built.train_step()

  def step(batch: shapes.Batch) -> Callable[[], float]:
    nonlocal state
    state, metrics = train_step(state, built.place_batch(full_batch(batch)))
    return lambda: float(metrics['loss'])
  return step
