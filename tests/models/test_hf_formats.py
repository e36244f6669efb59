"""Configs of today and older ones, layouts by slices, exact round trips, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.config import ModelConfig, RopeConfig
from models.interop.checkpoint import HfCheckpoint, exported
from models.interop.configs import hf_config, model_config
from models.interop.files import WeightFiles, write_folder
from tests.models import hf_cases

FAMILIES = list(hf_cases.OWN)


def case(family: str, scaling: str = 'default', tying: str = 'untied') -> dict:
  return hf_cases.config_json(f'{family}-{scaling}-{tying}')


@pytest.mark.parametrize('name', hf_cases.NAMES)
def test_a_config_comes_back_as_it_was_read(name):
  config = model_config(hf_cases.config_json(name))
  family, hf = hf_config(config, 'float32')
  assert model_config(hf) == config
  assert family.model_type == name.split('-')[0]


OLDER = {
  'llama': ({'rope_theta': 5e5, 'torch_dtype': 'bfloat16', 'rope_scaling': {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64}},
    {'rope': RopeConfig(5e5, scaling='llama3', factor=8.0, original_context=64),
     'compute_dtype': 'bfloat16'}),
  'qwen3': ({'rope_theta': 1e6, 'rope_scaling': {'type': 'linear', 'factor': 2.0}},
            {'rope': RopeConfig(1e6, scaling='linear', factor=2.0)}),
  'olmo3': ({'rope_theta': 5e5, 'rope_scaling': {
    'rope_type': 'yarn', 'factor': 8.0, 'original_max_position_embeddings': 16,
    'attention_factor': 1.2}},
    {'rope': RopeConfig(5e5, scaling='yarn', factor=8.0, original_context=16,
                        attention_factor=1.2),
     'sliding_rope': RopeConfig(5e5)}),
  'gpt_neox': ({'rotary_pct': 0.5, 'rotary_emb_base': 1e4, 'torch_dtype': 'float16'},
               {'rope': RopeConfig(1e4, 0.5), 'compute_dtype': 'float32'}),
  'mixtral': ({'rope_theta': 1e6}, {'rope': RopeConfig(1e6), 'sliding_rope': None}),
}


@pytest.mark.parametrize('family', OLDER)
def test_older_configs_say_the_same(family):
  older, expected = OLDER[family]
  hf = {k: v for k, v in case(family).items() if k not in ('rope_parameters', 'dtype')} | older
  config = model_config(hf)
  for field, value in expected.items():
    assert getattr(config, field) == value, field


def test_a_scaling_of_null_is_none_in_older_files():
  hf = {k: v for k, v in case('apertus').items() if k not in ('rope_parameters', 'dtype')}
  older = hf | {'rope_theta': 5e5, 'rope_scaling': None, 'transformers_version': '4.56.0'}
  assert model_config(older).rope == RopeConfig(5e5)
  for refused in (hf, older | {'transformers_version': '5.2.0'}):
    with pytest.raises(ValueError, match='neither rope_parameters nor rope_scaling'):
      model_config(refused)


def test_layers_slide_where_the_config_says():
  assert model_config(case('olmo3')).layer_kinds == ('sliding',) * 3 + ('full', 'sliding')
  assert model_config(case('qwen3', tying='tied')).layer_kinds == ('full', 'sliding')
  types = ['full_attention', 'sliding_attention']
  hf = case('qwen3', tying='tied') | {'layer_types': types[::-1]}
  assert model_config(hf).layer_pattern == ('sliding', 'full')
  assert model_config(case('mixtral', tying='tied')).layer_pattern == ('sliding',)
  hf = {k: v for k, v in case('qwen3', tying='tied').items()
        if k not in ('layer_types', 'max_window_layers')}  # of transformers' Qwen3Config: 28
  assert model_config(hf).layer_pattern == ('full',)
  kinds = model_config(hf | {'num_hidden_layers': 30}).layer_kinds
  assert kinds == ('full',) * 28 + ('sliding',) * 2


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_checkpoint_exported_again_has_the_same_bits(tmp_path, family, dtype):
  for tying in ('untied', 'tied'):
    hf = case(family, tying=tying) | {'dtype': dtype}
    checkpoint = HfCheckpoint(hf_cases.write(tmp_path / tying, hf, dtype))
    assert checkpoint.dtypes == {dtype}
    leaves = {leaf: checkpoint.read(leaf) for leaf in checkpoint.rows}
    config, tensors = exported(checkpoint.config, lambda leaf, at: leaves[leaf][at], np.dtype(dtype))
    write_folder(tmp_path / f'{tying}+', config, tensors, shard_bytes=20_000)
    files = WeightFiles(tmp_path / f'{tying}+')
    assert len(list((tmp_path / f'{tying}+').glob('model-*.safetensors'))) > 1
    before = load_file(tmp_path / tying / 'model.safetensors')
    assert files.names == before.keys()
    for name, values in before.items():
      assert files.read(name).tobytes() == values.tobytes(), name
    again = HfCheckpoint(tmp_path / f'{tying}+')
    assert again.shapes == checkpoint.shapes
    assert all(again.read(leaf).tobytes() == leaves[leaf].tobytes() for leaf in leaves)


def test_of_one_file_and_an_index_the_file_counts_as_in_transformers(tmp_path):
  checkpoint = HfCheckpoint(hf_cases.write(tmp_path, case('llama')))
  (tmp_path / 'model.safetensors.index.json').write_text(
    '{"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}')
  save_file({'model.norm.weight': np.zeros(64, np.float32)},
            tmp_path / 'model-00001-of-00001.safetensors')
  np.testing.assert_array_equal(
    HfCheckpoint(tmp_path).read('final_norm.scale'), checkpoint.read('final_norm.scale'))


@pytest.mark.parametrize('family', FAMILIES)
def test_any_box_of_a_parameter_is_that_part_of_the_whole(tmp_path, family):
  checkpoint = HfCheckpoint(hf_cases.write(tmp_path, case(family, tying='tied')))
  rng = np.random.default_rng(0)
  for leaf, shape in checkpoint.shapes.items():
    whole = checkpoint.read(leaf)
    assert whole.shape == shape
    for _ in range(4):
      box = tuple(tuple(sorted(rng.choice(size + 1, 2, replace=False))) for size in shape)
      part = checkpoint.read(leaf, box)
      np.testing.assert_array_equal(part, whole[tuple(slice(*r) for r in box)], err_msg=leaf)


def test_fused_parts_and_experts_stand_where_transformers_puts_them(tmp_path):
  """Written out: heads of GPT-NeoX hold q, k, v in turn; gate before up in Mixtral's fused experts."""
  neox = HfCheckpoint(hf_cases.write(tmp_path / 'neox', case('gpt_neox')))
  name = 'gpt_neox.layers.1.attention.query_key_value.weight'
  fused_QD, E = neox.files.read(name), neox.config.d_head
  for part, leaf in enumerate('qkv'):
    for head in range(neox.config.n_heads):
      first = (3 * head + part) * E
      np.testing.assert_array_equal(
        neox.read(f'blocks.attention.{leaf}')[1, :, head], fused_QD[first : first + E].T)
  mixtral = HfCheckpoint(hf_cases.write(tmp_path / 'mixtral', case('mixtral')))
  tensors = {}
  for key, values in load_file(tmp_path / 'mixtral' / 'model.safetensors').items():
    if '.experts.' not in key:
      tensors[key.replace('block_sparse_moe', 'mlp')] = values
  for i in range(2):
    down, gate, up = (np.stack([mixtral.files.read(
      f'model.layers.{i}.block_sparse_moe.experts.{x}.{w}.weight') for x in range(4)])
      for w in ('w2', 'w1', 'w3'))
    tensors[f'model.layers.{i}.mlp.experts.gate_up_proj'] = np.concatenate([gate, up], axis=1)
    tensors[f'model.layers.{i}.mlp.experts.down_proj'] = down
  (tmp_path / 'fused').mkdir()
  save_file(tensors, tmp_path / 'fused' / 'model.safetensors')
  (tmp_path / 'fused' / 'config.json').write_text(json.dumps(case('mixtral')))
  fused = HfCheckpoint(tmp_path / 'fused')
  for leaf in mixtral.rows:
    np.testing.assert_array_equal(fused.read(leaf), mixtral.read(leaf), err_msg=leaf)


BAD_CONFIGS = [
  ('llama', {'model_type': 'lama'}, "model_type='lama' is not supported; the nearest"),
  ('llama', {'model_type': None}, 'has no model_type'),
  ('llama', {'architectures': ['LlamaForTokenClassification']}, 'LlamaForTokenClassification'),
  ('llama', {'hidden_size': None}, "config.json of model_type='llama' has no hidden_size"),
  ('qwen3', {'head_dim': None}, 'has no head_dim'),
  ('mixtral', {'num_local_experts': None}, 'has no num_local_experts'),
  ('llama', {'hidden_act': 'relu'}, "hidden_act='relu' is not supported"),
  ('llama', {'quantization_config': {'bits': 4}}, "quantization_config={'bits': 4}"),
  ('llama', {'dtype': 'float8'}, "dtype='float8' is not supported"),
  ('llama', {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}},
   "rope_parameters.rope_type='dynamic' is not supported; default, linear, llama3, yarn are"),
  ('llama', {'rope_parameters': None, 'rope_scaling': {'type': 'longrope'}},
   "rope_scaling.rope_type='longrope' is not supported"),
  ('llama', {'rope_parameters': {'rope_type': 'linear'}}, 'has no factor'),
  ('llama', {'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0, 'truncate': False}},
   'truncate=False'),
  ('llama', {'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
  ('llama', {'rope_parameters': {'full_attention': {}}}, 'this family does not know'),
  ('olmo3', {'rope_parameters': {'rope_type': 'default'}}, 'this family needs'),
  ('olmo3', {'layer_types': ['chunked_attention'] * 5}, "'chunked_attention' is not supported"),
  ('olmo3', {'layer_types': ['full_attention']}, '1 entries for num_hidden_layers=5'),
  ('olmo3', {'sliding_window': None}, 'sliding_window=None'),
  ('olmo2', {'clip_qkv': 8.0}, 'clip_qkv=8.0'),
  ('apertus', {'post_norm': True}, 'post_norm=True'),
  ('apertus', {'rope_parameters': None}, 'neither rope_parameters nor rope_scaling'),
  ('llama', {'hidden_size': '64'}, "hidden_size='64' of config.json is a str; int is needed"),
  ('llama', {'architectures': 'LlamaForCausalLM'}, 'is a str; list is needed'),
  ('llama', {'rope_parameters': ['default']}, "rope_parameters=['default'] of config.json is"),
  ('llama', {'rope_parameters': {'rope_type': 'linear', 'factor': [2]}},
   'rope_parameters.factor=[2] is no number'),
  ('olmo3', {'rope_parameters': {'full_attention': 3}}, 'rope_parameters.full_attention=3'),
  ('llama', {'head_dim': None, 'num_attention_heads': 5}, 'not a multiple of num_attention_heads=5'),
]


@pytest.mark.parametrize('family, change, words', BAD_CONFIGS)
def test_a_bad_config_is_one_sentence(family, change, words):
  hf = {k: v for k, v in (case(family) | change).items() if v is not None or k == 'rope_parameters'}
  if family == 'olmo3' and 'sliding_window' in change:
    hf['sliding_window'] = None
  with pytest.raises(ValueError) as error:
    model_config(hf)
  assert words in str(error.value) and '\n' not in str(error.value)


def rewritten(folder: pathlib.Path, change) -> None:
  path = folder / 'model.safetensors'
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


Q = 'model.layers.1.self_attn.q_proj.weight'
BAD_FILES = {
  'lacks tensor ' + Q: lambda folder: rewritten(folder, lambda t: t.pop(Q)),
  'has tensor surplus': lambda folder: rewritten(folder, lambda t: t.update(surplus=t[Q])),
  f'tensor {Q} has shape (16, 64), config.json says (32, 32)': lambda folder: rewritten(
    folder, lambda t: t.update({Q: t[Q].reshape(16, 64)})),
  f'tensor {Q} has dtype I32': lambda folder: rewritten(
    folder, lambda t: t.update({Q: t[Q].astype(np.int32)})),
  'is not a whole safetensors file': lambda folder: (folder / 'model.safetensors').write_bytes(
    (folder / 'model.safetensors').read_bytes()[:-8]),
  'has no config.json': lambda folder: (folder / 'config.json').unlink(),
  'config.json is not valid JSON': lambda folder: (folder / 'config.json').write_text('{'),
  'only pytorch_model.bin, which may run code when read; convert it to safetensors': lambda folder: (folder / 'model.safetensors').rename(
    folder / 'pytorch_model.bin'),
  'lacks absent.safetensors, a shard': lambda folder: (
    (folder / 'model.safetensors').unlink(), (folder / 'model.safetensors.index.json').write_text(
      '{"weight_map": {"x": "absent.safetensors"}}')),
}


@pytest.mark.parametrize('words', BAD_FILES)
def test_bad_files_are_one_sentence(tmp_path, words):
  folder = hf_cases.write(tmp_path / 'm', case('llama'))
  HfCheckpoint(folder)
  BAD_FILES[words](folder)
  with pytest.raises(ValueError) as error:
    HfCheckpoint(folder)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_a_stored_head_of_a_tied_model_has_to_be_its_embedding(tmp_path):
  folder = hf_cases.write(tmp_path, case('llama', tying='tied'))
  rewritten(folder, lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'].copy()}))
  assert 'embedding.output' not in HfCheckpoint(folder).shapes
  rewritten(folder, lambda t: t.update({'lm_head.weight': t['lm_head.weight'] + 1}))
  with pytest.raises(ValueError, match='lm_head.weight differs'):
    HfCheckpoint(folder)


def test_buffers_of_older_files_are_passed_over_and_other_constants_refused(tmp_path):
  folder = hf_cases.write(tmp_path / 'neox', case('gpt_neox'))
  rewritten(folder, lambda t: t.update({
    'gpt_neox.layers.0.attention.bias': np.ones((1, 1, 4, 4), np.float32),
    'gpt_neox.layers.0.attention.masked_bias': np.array(-1e9, np.float32),
    'gpt_neox.layers.0.attention.rotary_emb.inv_freq': np.ones(4, np.float32)}))
  HfCheckpoint(folder)
  folder = hf_cases.write(tmp_path / 'apertus', case('apertus'))
  rewritten(folder, lambda t: t.update({
    'model.layers.0.mlp.act_fn.beta': np.asarray(0.7, np.float32)}))
  with pytest.raises(ValueError, match='beta is 0.69.* only 0.5 is supported'):
    HfCheckpoint(folder)


@pytest.mark.parametrize('change, words', [
  ({'mlp': 'geglu'}, "mlp='geglu'"),
  ({'positions': 'alibi'}, "positions='alibi'"),
  ({'final_softcap': 30.0}, 'final_softcap=30.0'),
  ({'qkv_bias': True}, 'model.out_bias=False'),  # of llama's biases the other half
  ({'rope': RopeConfig(fraction=0.5)}, 'lacks model.rope.fraction=0.5'),
])
def test_a_model_that_no_family_computes_is_refused(change, words):
  with pytest.raises(ValueError) as error:
    hf_config(ModelConfig(**change), 'float32')
  assert str(error.value).startswith('no family of llama, qwen3') and words in str(error.value)


def test_a_folder_with_content_is_not_written_over(tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(ValueError, match='is not empty'):
    write_folder(tmp_path, {}, [])
