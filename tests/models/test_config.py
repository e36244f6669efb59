"""Model configuration: every bad combination is one sentence that names the field."""

import dataclasses
import typing

import pytest

from models.config import ModelConfig, MoEConfig, RopeConfig

BAD = [
  (dict(n_heads=6, n_kv_heads=4), 'model.n_heads=6 is not a multiple of model.n_kv_heads=4'),
  (dict(d_model=0), 'model.d_model=0 must be above 0'),
  (dict(window=-1), 'model.window=-1 must be above 0'),
  (dict(mlp='relu'), "model.mlp='relu' is not one of swiglu, geglu, gelu, gelu_tanh, xielu"),
  (dict(norm_placement='peri'), "model.norm_placement='peri' is not one of pre, post, sandwich"),
  (dict(layer_pattern=()), 'model.layer_pattern is empty'),
  (dict(layer_pattern=('full', 'half')), "model.layer_pattern entry='half' is not one of"),
  (dict(dropout=1.0), r'model.dropout=1.0 must be in \[0, 1\)'),
  (dict(final_softcap=-1.0), 'model.final_softcap=-1.0 is negative'),
  (dict(d_head=5), 'rotates 5 of model.d_head=5 dimensions; it must be an even number'),
  (dict(positions='alibi', sliding_rope=RopeConfig()), 'model.sliding_rope is set but'),
  (dict(mlp='gelu', moe=MoEConfig(n_experts=2)), "model.mlp='gelu' has no gate"),
  (dict(mlp_bias=True, moe=MoEConfig(n_experts=2)), 'experts have no biases'),
]
BAD_PARTS = [
  (RopeConfig, dict(scaling='ntk'), "model.rope.scaling='ntk' is not one of"),
  (RopeConfig, dict(factor=2.0), "model.rope.factor=2.0 needs model.rope.scaling other than"),
  (RopeConfig, dict(fraction=0.0), 'model.rope.fraction=0.0 must be above 0'),
  (RopeConfig, dict(high_freq_factor=1.0), 'model.rope.high_freq_factor=1.0 must be above'),
  (MoEConfig, dict(n_experts=2, top_k=3), 'model.moe.top_k=3 must be from 1 to'),
  (MoEConfig, dict(capacity_factor=-1.0), 'model.moe.capacity_factor=-1.0 must be 0'),
  (MoEConfig, dict(exchange_factor=0.0), 'model.moe.exchange_factor=0.0 must be above 0'),
]


@pytest.mark.parametrize('fields, message', BAD)
def test_bad_model_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig(**fields)


@pytest.mark.parametrize('kind, fields, message', BAD_PARTS)
def test_bad_nested_fields_are_named(kind, fields, message):
  with pytest.raises(ValueError, match=message):
    kind(**fields)


def test_checks_run_when_a_field_is_replaced():
  with pytest.raises(ValueError, match='model.n_heads=3 is not a multiple'):
    dataclasses.replace(ModelConfig(), n_heads=3)


@pytest.mark.parametrize('kind', [ModelConfig, RopeConfig, MoEConfig])
def test_every_field_declares_what_it_means(kind):
  hints = typing.get_type_hints(kind, include_extras=True)
  for field in dataclasses.fields(kind):
    notes = hints[field.name].__metadata__
    assert isinstance(notes[0], str) and notes[0]
    assert notes[1:] in ((), ('placement',))


def test_layer_kinds_repeat_the_pattern():
  rope, sliding = RopeConfig(theta=1e6), RopeConfig(theta=1e4)
  config = ModelConfig(
    n_layers=5, layer_pattern=('sliding', 'full'), window=7, rope=rope, sliding_rope=sliding
  )
  assert config.layer_kinds == ('sliding', 'full', 'sliding', 'full', 'sliding')
  assert config.kind_window('sliding') == 7 and config.kind_window('full') == 0
  assert config.kind_rope('sliding') == sliding and config.kind_rope('full') == rope
  assert dataclasses.replace(config, sliding_rope=None).kind_rope('sliding') == rope
