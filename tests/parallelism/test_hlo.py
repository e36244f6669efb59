"""Optimized HLO as text: what is parsed, how often loops run, FLOPs and bytes of instructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallelism import hlo, hlo_costs
from parallelism.hlo import Shape
from parallelism.hlo_loops import Loops
from parallelism.hlo_program import Branch, read_program, total_flops, total_hbm_bytes
from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_mesh
from tests.parallelism.hlo_programs import ROWS, WIDTH, manual, on_rows

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

ARRAY = 'bf16[8,128]{1,0:T(8,128)(2,1)}'
MODULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={{()->f32[]}}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {{
  %p = (s32[]{{:T(128)}}, {array}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %next = s32[] {grow}(%i, %step)
  %x = {array} get-tuple-element(%p), index=1
  %y = {array} negate(%x)
  ROOT %t = (s32[], {array}) tuple(%next, %y)
}}

%bound (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %fused = pred[] compare(%a, %b), direction={direction}
}}

%condition (q: (s32[], bf16[8,128])) -> pred[] {{
  %limit = s32[] constant({limit})
  %q = (s32[], {array}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] {test}, metadata={{op_name="while/cond, calls=%nothing"}}
}}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {{
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %x0 = {array} parameter(0)
  %in = (s32[], {array}) tuple(%copied, %x0)
  %loop = (s32[], {array}) while(%in), condition=%condition, body=%body{known}
  ROOT %out = {array} get-tuple-element(%loop), index=1
}}
"""


def module(**changes) -> str:
  values = {'array': ARRAY, 'step': 1, 'grow': 'add', 'limit': 6, 'start': 0, 'direction': 'LT',
            'test': None, 'known': '', **changes}
  values['test'] = values['test'] or f'compare(%j, %limit), direction={values["direction"]}'
  return MODULE.format(**values)


def trips(text: str) -> int | None:
  parsed = hlo.parse(text)
  (loop,) = (i for i in parsed.entry.instructions if i.opcode == 'while')
  return Loops(parsed).trips(parsed.entry, loop)


def test_shapes_have_types_sizes_and_memories():
  text = ('((bf16[8,128]{1,0:T(8,128)(2,1)S(1)}), f32[]{:T(128)}, '
          '/*index=2*/s4[3]{0:T(8)E(4)S(5)}, f8e4m3fn[4,2]{1,0}, u32[]{:S(2)}, pred[7])')
  shapes = hlo.parse_shapes(text)
  assert shapes == (Shape('bf16', (8, 128), 1), Shape('f32', ()), Shape('s4', (3,), 5),
                    Shape('f8e4m3fn', (4, 2)), Shape('u32', (), 2), Shape('pred', (7,)))
  assert [shape.bytes for shape in shapes] == [2048, 4, 2, 8, 4, 7]


def test_an_instruction_has_operands_attributes_and_configuration():
  line = ('  ROOT %c.1 = (f32[2]{0}, u32[]{:S(2)}) custom-call(%a.0, /*index=1*/%b-2), '
          'custom_call_target="tpu_custom_call", window={size=3x3 pad=1_1x0_0}, '
          'replica_groups=[2,2]<=[2,2]T(1,0), called_computations={%f.1, %g}, '
          'metadata={op_name="jit(f)/a(b\\\'s), calls=%h"}, '
          'backend_config={"custom_call_config":{"cost_estimate":{"flops":"7"}},"x":"}"}')
  text = ('HloModule m, is_scheduled=true\nENTRY %m (a.0: f32[2]) -> f32[2] {\n'
          '  %a.0 = f32[2]{0} parameter(0)\n  %b-2 = f32[2]{0} constant({1, 2})\n' + line + '\n}\n')
  call = hlo.parse(text).entry.root
  assert (call.opcode, call.operands, call.target) == ('custom-call', ('a.0', 'b-2'),
                                                       'tpu_custom_call')
  assert call.attribute('replica_groups') == '[2,2]<=[2,2]T(1,0)'
  assert call.attribute('window') == '{size=3x3 pad=1_1x0_0}'
  assert call.called() == ('f.1', 'g')
  assert call.source.startswith('jit(f)/a(b')
  assert call.config['custom_call_config']['cost_estimate'] == {'flops': '7'}
  assert call.attribute('size') is None


@pytest.mark.parametrize('changes, expected', [
    ({}, 6), ({'start': 2}, 4), ({'step': 4}, 2), ({'direction': 'LE'}, 7), ({'limit': -1}, 0),
    ({'direction': 'NE', 'step': 3}, 2), ({'direction': 'GT', 'start': 9, 'step': -1}, 3),
    ({'direction': 'GT', 'start': 9, 'grow': 'subtract'}, 3),
    ({'test': 'compare(%limit, %j), direction=GT'}, 6),
    ({'test': 'fusion(%j, %limit), kind=kLoop, calls=%bound'}, 6),
    ({'known': ', backend_config={"known_trip_count":{"n":"11"}}'}, 11),
    ({'step': 0}, None), ({'grow': 'multiply'}, None),
])
def test_trips_follow_from_start_step_and_limit(changes, expected):
  assert trips(module(**changes)) == expected


def test_a_loop_whose_trips_are_unknown_is_named():
  text = module(grow='multiply')
  with pytest.raises(ValueError, match='how often the loop loop .* unknown_trips'):
    read_program(text, {'fsdp': 8})
  nbytes = 8 * 128 * 2
  assert total_hbm_bytes(read_program(text, {'fsdp': 8}, unknown_trips=5)) == (
      5 * (2 * nbytes + 3 * 4) + 2 * 4)  # negation and counter in the loop, a copy before it


@pytest.mark.parametrize('text, message', [
    ('HloModule m\n', 'is_scheduled=true'),
    ('HloModule m, is_scheduled=true\n', 'no ENTRY'),
    ('HloModule m, is_scheduled=true\nENTRY %m () -> q7[2] {\n  ROOT %a = q7[2]{0} constant({1, 2})'
     '\n}\n', "element type 'q7'")])
def test_other_texts_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    hlo.parse(text)


def test_the_text_is_there_where_the_executable_cannot_give_it():
  mesh = compile_only_mesh('tpu7x:2x2x1', MeshConfig(data=1, fsdp=8))
  lowered = manual(mesh, lambda x_BD: jax.lax.psum(x_BD * 2, 'fsdp'), (P('fsdp'),), P(),
                   [((8 * 1024, 1024), jnp.bfloat16)])
  compiled, text = hlo.compile_to_text(lowered)
  assert compiled.memory_analysis().argument_size_in_bytes == 1024 * 1024 * 2
  opcodes = [instruction.opcode for instruction in hlo.parse(text).entry.instructions]
  assert opcodes.count('all-reduce') + opcodes.count('async-start') == 1  # the sparse cores do it


def test_a_missing_dump_is_an_error():
  class Silent:
    def compile(self, compiler_options):
      assert compiler_options['xla_tpu_scoped_vmem_limit_kib'] == 1024
  with pytest.raises(ValueError, match='wrote 0 dumps'):
    hlo.compile_to_text(Silent(), {'xla_tpu_scoped_vmem_limit_kib': 1024})


def test_slices_and_updates_inside_a_fusion_count_by_their_size():
  text = """HloModule m, is_scheduled=true
%fused (big: f32[64,128], i: s32[], stack: f32[64,128], whole: f32[2,128]) -> (f32[64,128]) {
  %big = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %stack = f32[64,128]{1,0} parameter(2)
  %whole = f32[2,128]{1,0:S(1)} parameter(3)
  %z = s32[] constant(0)
  %slice = f32[2,128]{1,0} dynamic-slice(%big, %i, %z), dynamic_slice_sizes={2,128}
  %sum = f32[2,128]{1,0} add(%slice, %whole)
  %update = f32[64,128]{1,0} dynamic-update-slice(%stack, %sum, %i, %z)
  ROOT %both = (f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%update, %big)
}
ENTRY %m (a: f32[64,128], b: s32[], c: f32[64,128], d: f32[2,128]) -> (f32[64,128], f32[64,128]) {
  %a = f32[64,128]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[64,128]{1,0} parameter(2)
  %d = f32[2,128]{1,0:S(1)} parameter(3)
  ROOT %f = (f32[64,128]{1,0}, f32[64,128]{1,0}) fusion(%a, %b, %c, %d), kind=kLoop, calls=%fused
}
"""
  parsed = hlo.parse(text)
  piece, index = 2 * 128 * 4, 4  # the slice is read, the update is written, the index is read
  assert hlo_costs.traffic(parsed, parsed.entry, parsed.entry.root) == {
      hlo.HBM: 2 * piece + index, hlo.VMEM: piece}


def loop_free(kind: str):
  """Returns a lowered program without loops, its mesh and its FLOPs per device."""
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(data=1, fsdp=8))
  rows = P('fsdp')
  bf16 = jnp.bfloat16
  if kind == 'batched':
    flops = 2 * 512 * 256 * 4 * 128
    return manual(mesh, lambda q, k: jnp.einsum('blhe,bmhe->bhlm', q, k), (rows, rows), rows,
                  [((8, 512, 4, 128), bf16), ((8, 256, 4, 128), bf16)]), mesh, flops
  return manual(mesh, lambda x, w: jnp.tanh(x @ w) @ w.T, (rows, P()), rows,
                [((8 * 512, 1024), bf16), ((1024, 2048), bf16)]), mesh, 2 * 2 * 512 * 1024 * 2048


@pytest.mark.parametrize('kind', ['matmuls', 'batched'])
def test_flops_are_those_of_the_closed_form_and_of_the_compiler(kind):
  lowered, mesh, flops = loop_free(kind)
  compiled, text = hlo.compile_to_text(lowered)
  ours = total_flops(read_program(text, mesh.shape))
  assert ours == flops
  np.testing.assert_allclose(ours, compiled.cost_analysis()['flops'], rtol=0.03)


@pytest.mark.parametrize('stride, padding, dilation, kernel_dilation, groups', [
    ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1), ((2, 3), ((1, 2), (3, 0)), (1, 1), (1, 1), 1),
    ((1, 2), ((2, 2), (1, 1)), (2, 3), (1, 1), 1), ((1, 1), ((2, 0), (0, 2)), (1, 2), (2, 1), 2)])
def test_flops_of_a_convolution_leave_out_padding_and_holes(stride, padding, dilation,
                                                            kernel_dilation, groups):
  image, kernel = np.ones((3, 9, 8, 4), np.float32), np.ones((3, 2, 4 // groups, 6), np.float32)
  out = jax.lax.conv_general_dilated(image, kernel, stride, padding, dilation, kernel_dilation,
                                     ('NHWC', 'HWIO', 'NHWC'), groups)
  def by_x(values):
    return 'x'.join(map(str, values))
  window = (f'size=3x2 stride={by_x(stride)} pad={by_x(f"{low}_{high}" for low, high in padding)} '
            f'lhs_dilate={by_x(dilation)} rhs_dilate={by_x(kernel_dilation)}')
  text = ('HloModule m, is_scheduled=true\nENTRY %m (a: f32[3,9,8,4], b: f32[1]) -> f32[1] {\n'
          f'  %a = f32[{",".join(map(str, image.shape))}]{{3,2,1,0}} parameter(0)\n'
          f'  %b = f32[{",".join(map(str, kernel.shape))}]{{3,2,1,0}} parameter(1)\n'
          f'  ROOT %c = f32[{",".join(map(str, out.shape))}]{{3,2,1,0}} convolution(%a, %b), '
          f'window={{{window}}}, dim_labels=b01f_01io->b01f, feature_group_count={groups}\n}}\n')
  # Of ones, the result counts the products that were added up.
  assert total_flops(read_program(text, {'fsdp': 8})) == 2 * float(out.sum())


def test_loops_multiply_their_bodies():
  def function(x_BD):
    def inner(x_BD, _):
      return jnp.tanh(x_BD @ x_BD), None

    def outer(x_BD, _):
      return jax.lax.scan(inner, x_BD, None, length=3)[0] * 2, None
    return jax.lax.scan(outer, x_BD, None, length=5)[0]
  assert total_flops(on_rows('v5e:2x4', function)) == 3 * 5 * 2 * ROWS * WIDTH**2


def test_a_pallas_kernel_counts_as_it_estimates():
  def attributes(estimate):
    return ('custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
            f'{{"body":"TUzv","cost_estimate":{estimate}}}}}')

  def text(estimate):
    return ('HloModule m, is_scheduled=true\nENTRY %m (a: f32[8,128]) -> f32[8,128] {\n'
            '  %a = f32[8,128]{1,0} parameter(0)\n  %b = f32[8,128]{1,0:S(1)} parameter(1)\n'
            f'  ROOT %k = f32[8,128]{{1,0}} custom-call(%a, %b), {attributes(estimate)}\n}}\n')
  nbytes = 8 * 128 * 4
  known = read_program(text('{"flops":"1000","bytes_accessed":"30000"}'), {'fsdp': 8})
  assert (total_flops(known), total_hbm_bytes(known)) == (1000, 20000)  # a third is in VMEM
  unknown = read_program(text('{}'), {'fsdp': 8})
  assert (total_flops(unknown), total_hbm_bytes(unknown)) == (0, 2 * nbytes)


def test_branches_count_as_the_costliest_or_as_asked():
  def function(x_BD):
    def square(x_BD):
      return x_BD @ x_BD

    def cube(x_BD):
      return x_BD @ (x_BD @ x_BD)
    index = jnp.int32(x_BD[0, 0]) % 3
    return jax.lax.switch(index, [square, cube, jnp.tanh], x_BD)
  program = on_rows('v5e:2x4', function)
  product = 2 * ROWS * WIDTH**2
  assert total_flops(program) == 2 * product
  assert total_flops(program, lambda branch: (0.5, 0.25, 0.25)) == product
  (branch,) = (node for node in program.nodes if isinstance(node, Branch))
  assert [total_flops(block) for block in branch.blocks] == [product, 2 * product, 0]
  assert 'cond' in branch.source
  with pytest.raises(ValueError, match='branch_runs gives 2 numbers for the 3 blocks'):
    total_flops(program, lambda branch: (0.5, 0.5))


def test_a_scan_over_stacked_weights_reads_them_once():
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(data=1, fsdp=8))
  layers, width = 8, 2048

  def function(x_BD, w_NDD):
    return jax.lax.scan(lambda x_BD, w_DD: (jnp.tanh(x_BD @ w_DD), None), x_BD, w_NDD)[0]
  lowered = manual(mesh, function, (P('fsdp'), P()), P('fsdp'),
                   [((8 * 256, width), jnp.bfloat16), ((layers, width, width), jnp.bfloat16)])
  moved = total_hbm_bytes(read_program(hlo.compile_to_text(lowered)[1], mesh.shape))
  weights, rows = layers * width**2 * 2, 256 * width * 2
  assert weights <= moved <= weights + layers * 4 * rows  # what else moves are the rows
