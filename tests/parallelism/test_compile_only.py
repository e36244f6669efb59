"""Compiling in a process of its own: what it finds against the compiler's own figures."""

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import pytest

from parallelism import compile_only, compiler_options
from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_mesh

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

GIB = 2**30


def lowered(n_rows: int, donated: bool = False) -> jax.stages.Lowered:
  """Returns a program that sorts rows of 8,192 float32, lowered for eight v5e."""
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(data=1, fsdp=8))
  x = jax.ShapeDtypeStruct((n_rows, 8192), jnp.float32, sharding=NamedSharding(mesh, P('fsdp')))
  sorting = jax.jit(lambda x: jnp.sort(x + 1.0, axis=1), donate_argnums=(0,) if donated else ())
  return sorting.lower(x)


def invalid() -> None:
  raise ValueError('seven rows do not divide over eight devices')


def broken() -> None:
  raise KeyError('lost')


def killed() -> None:
  import os
  os.kill(os.getpid(), 9)


def test_memory_is_that_of_the_whole_compilation():
  early = compile_only.compile_apart(lowered, 8 * 512)
  analysis = lowered(8 * 512).compile().memory_analysis()
  assert early.refusal is None and not early.code
  assert early.arguments == analysis.argument_size_in_bytes == 512 * 8192 * 4
  assert early.results == analysis.output_size_in_bytes == early.arguments
  assert abs(early.temporaries - analysis.temp_size_in_bytes) <= 2**20
  late = compile_only.compile_apart(lowered, 8 * 512, code=True)
  assert late.code and late.text == early.text
  assert (late.arguments, late.results, late.temporaries) == (
      early.arguments, early.results, early.temporaries)


def test_donated_arguments_hold_the_results():
  assert compile_only.compile_apart(lowered, 8 * 512, True).results == 0


def test_what_does_not_fit_is_a_result():
  found = compile_only.compile_apart(lowered, 8 * 9 * GIB // (8192 * 4))  # 9 GiB in and out
  assert found.refusal is not None
  assert found.refusal.available == compiler_options.USABLE['v5e']
  assert found.refusal.needed == pytest.approx(found.total, rel=0.01)
  assert found.total > 18 * GIB and 'sort' in found.text


@pytest.mark.parametrize('function, error, words', [
    (invalid, ValueError, 'seven rows'), (broken, RuntimeError, "KeyError: 'lost'"),
    (killed, RuntimeError, 'SIGKILL')])
def test_errors_come_back(function, error, words):
  with pytest.raises(error, match=words):
    compile_only.compile_apart(function)


def test_only_errors_about_hbm_are_refusals():
  assert compile_only.refusal('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.') is None
  assert compile_only.refusal('INTERNAL: HBM') is None
  said = compile_only.refusal(
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.')
  assert said.needed == int(20.5 * GIB) and said.available == int(15.75 * GIB)


def test_only_tpus_have_options():
  assert compiler_options.compiler_options(jax.devices()[0]) == {}
  v5p, v5e = (compile_only_mesh(name, MeshConfig()).devices.flat[0]
              for name in ('v5p:2x2x1', 'v5e:2x4'))
  assert len(compiler_options.compiler_options(v5p)) == 3
  assert compiler_options.compiler_options(v5e) == {}
