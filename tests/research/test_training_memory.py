"""Predicted memory of a training step against layouts and programs of the TPU compiler."""

import dataclasses
import re

import jax
import pytest

from experiments.benchmarks.memory_cases import case, compiled_bytes, predicted
from parallelism import sharding
from parallelism.mesh import AXES
from research.build import state_facts
from research.training import divisions, memory
from research.training.layout import laid_out_bytes

# From the buffer assignment of libtpu 0.0.52 for v5e: bytes of parameters of these shapes.
LAYOUTS = """f32[4,8,64,2048,12] 201326592
f32[128256,24] 12312576
f32[4,512,16,64] 8388608
bf16[4,512,8,128] 4194304
f32[4,512,3,128] 3145728
bf16[4,512,2,128] 1048576
f32[9,300,1,64] 884736
bf16[5,300,130] 522240
f32[20,256,20] 491520
bf16[9,300,1,64] 442368
f32[4,512,8,4] 262144
s32[6,4096] 131072
s32[3,4096] 65536
f32[16,3,128] 24576
f32[256,20] 24576
s32[1,4096] 16384
f32[2050] 12288
f32[4,3,5,2] 12288
f32[5,64,3] 10240
f32[1025] 8192
f32[1000,2] 8192
s32[12,100] 8192
bf16[3000] 6144
f32[1000] 4096
bf16[4,512] 4096
f32[256,4] 4096
f32[512] 2048
f32[7,3] 2048
bf16[1000] 2048
f32[3,2,2] 2048
f32[130,1] 1024
s32[2,100] 1024
bf16[512] 1024
f32[2,128] 1024
u32[2] 512
f32[4,1] 512
f32[1,128] 512
f32[] 512"""
SIZES = dict.fromkeys(AXES, 1)


@pytest.mark.parametrize('line', LAYOUTS.splitlines())
def test_arrays_take_what_the_compiler_gave_them(line):
  dtype, dims, size = re.fullmatch(r'(\w+)\[([\d,]*)\] (\d+)', line).groups()
  shape = tuple(map(int, filter(None, dims.split(','))))
  assert laid_out_bytes(shape, 2 if dtype == 'bf16' else 4) == int(size)


# Bytes per device of arguments and of all, by the same compiler for whole production steps.
PROGRAMS = [
    (case('8b', 'v5e:16x16', rows=256, length=8192, fsdp=256), 376624640, 6926972416),
    (case('olmo7b', 'v5p:4x4x4', rows=128, length=8192, remat='dots', fsdp=64), 1371969024,
     62458583840),
    (case('olmo7b', 'v5p:4x4x4', rows=512, length=8192, fsdp=64), 1372952064, 47313771296),
    (case('70b', 'v5p:8x8x8', rows=512, length=8192, fsdp=512), 1653790208, 22152559360),
    (case('8b', 'v5p:2x2x2', rows=16, length=8192, layers=8, fsdp=2, context=4), 4193691648,
     14308905216),
    (case('tied', 'v5e:2x4', rows=8, remat='dots', tensor=8), 427704320, 3765232640),
]


@pytest.mark.parametrize('program, arguments, total', PROGRAMS, ids=lambda x: getattr(x, 'name', ''))
def test_known_programs_are_predicted(program, arguments, total):
  sizes = dataclasses.asdict(program.config.mesh)
  prediction = memory.predict(program.config, sizes, program.topology)
  assert prediction.arguments == arguments
  assert abs(prediction.peak / total - 1) < 0.15
  assert prediction.fits and prediction.peak == prediction.arguments + prediction.heap


def test_what_the_compiler_refuses_does_not_fit():
  # 18.0, 18.7 and 31.5 GB of the 16.9 GB of a v5e.
  for refused in (case('small', 'v5e:2x4', rows=24, remat='none', fsdp=8),
                  case('8b', 'v5e:4x4', rows=32, length=8192, layers=8, remat='dots', fsdp=8,
                       tensor=2),
                  case('8b', 'v5e:16x16', rows=256, length=8192, remat='dots', fsdp=64, tensor=4)):
    sizes = dataclasses.asdict(refused.config.mesh)
    assert not memory.predict(refused.config, sizes, refused.topology).fits


def test_the_state_has_the_parameters_thrice_counters_and_the_guard():
  config = case('small', 'v5e:2x4', rows=8, fsdp=8).config
  facts = state_facts(config.model, config.optimizer)
  named = [names for _, _, _, names in facts if names]
  assert len(named) == 3 * len(jax.tree.leaves(
      [path for path, *_ in facts if path.startswith('params.')]))
  assert sorted(shape for _, shape, _, names in facts if not names) == [
      (), (), (), (), (), (2,), (2, config.guards.window)]


def test_more_of_anything_takes_more_memory():
  base = case('small', 'v5e:2x4', rows=16, fsdp=8)
  sizes = dataclasses.asdict(base.config.mesh)
  peaks = []
  for remat, rows in (('full', 16), ('dots', 16), ('none', 16), ('none', 32)):
    config = case('small', 'v5e:2x4', rows=rows, remat=remat, fsdp=8).config
    peaks.append(memory.predict(config, sizes, 'v5e').peak)
  assert peaks == sorted(set(peaks))


@pytest.mark.parametrize('axes, rows, words', [
    ({'fsdp': 8}, 12, 'data.batch_size=12 is not divided by mesh.fsdp=8; 16 is'),
    ({'tensor': 16}, 16, "'heads' axis of 16|'kv_heads' axis of 8 is not divided by mesh.tensor=16"),
    ({'stage': 32}, 64, 'mesh.stage=32 makes 32 places for model.n_layers=16'),
    ({'stage': 2, 'context': 2}, 16, "compute.context='all_to_all' works there")])
def test_problems_are_sentences_and_none_is_raised(axes, rows, words):
  config = case('small', 'v5e:2x4', rows=rows, **axes).config
  facts = state_facts(config.model, config.optimizer)
  shapes = {path: jax.ShapeDtypeStruct(shape, 'float32') for path, shape, _, names in facts
            if path.startswith('params.')}
  names = {path: names for path, _, _, names in facts if path.startswith('params.')}
  found = list(divisions.problems(config, SIZES | axes, shapes, names))
  assert re.search(words, ' '.join(found)), found
  assert list(divisions.problems(config, SIZES, shapes, names)) == []


def test_mirrored_takes_the_value_of_the_parameter_of_the_same_path_and_shape():
  leaf = jax.ShapeDtypeStruct
  params = {'a': {'w': leaf((2, 3), 'float32')}, 'w': leaf((2, 3), 'float32')}
  tree = {'mu': params, 'count': leaf((), 'int32'), 'v': {'a': {'w': leaf((2,), 'float32')}}}
  got = sharding.mirrored(tree, params, [7, 8], 0)
  assert got == {'mu': {'a': {'w': 7}, 'w': 8}, 'count': 0, 'v': {'a': {'w': 0}}}


@pytest.mark.slow
@pytest.mark.parametrize('rows, remat, axes', [
    (8, 'full', {'fsdp': 2, 'tensor': 2}), (8, 'dots', {'data': 2, 'fsdp': 2}),
    (16, 'full', {'stage': 2, 'fsdp': 2})])
def test_compiled_steps_take_what_is_predicted(rows, remat, axes):
  pytest.importorskip('libtpu')
  small = case('small', 'v5e:2x2', rows=rows, length=2048, remat=remat, **axes)
  measured, prediction = compiled_bytes(small), predicted(small)
  assert prediction.arguments == measured['arguments']
  assert abs(prediction.peak / measured['total'] - 1) < 0.15
  assert not (prediction.fits and measured['refused'])


@pytest.mark.slow
@pytest.mark.parametrize('model, optimizer', [
    ({'positions': 'alibi'}, {'name': 'adafactor', 'ema_decay': 0.99}),
    ({'positions': 'learned', 'qkv_bias': True, 'out_bias': True, 'mlp_bias': True,
      'norm': 'layernorm', 'mlp': 'gelu'}, {'name': 'muon'}),
    ({'mlp': 'xielu', 'd_ff': 1000, 'vocab_size': 31_998, 'qk_norm': 'projection',
      'norm_placement': 'sandwich'}, {'name': 'lion', 'moment_dtype': 'bfloat16'})])
def test_arguments_are_exact_whatever_the_model_and_optimizer(model, optimizer):
  pytest.importorskip('libtpu')
  small = case('small', 'v5e:2x2', rows=8, length=1024, layers=2, fsdp=2, tensor=2)
  small = dataclasses.replace(small, config=dataclasses.replace(
      small.config, model=dataclasses.replace(small.config.model, **model),
      optimizer=dataclasses.replace(small.config.optimizer, **optimizer)))
  assert predicted(small).arguments == compiled_bytes(small)['arguments']
