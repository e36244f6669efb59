"""Owns how a stack of layers is run: scanned or unrolled, and what backward recomputes."""

from typing import Any, Callable, Protocol

import jax
import jax.numpy as jnp

from models.config import ModelConfig

UNROLL_LIMIT = 12  # on CPU a scan is 10-24% slower; deeper stacks compile for too long

Body = Callable[[str, Any, Any], tuple[Any, Any]]  # (layer kind, carry, inputs)

REMATS: dict[str, Callable[[Callable], Callable]] = {
  'none': lambda f: f,
  'full': jax.checkpoint,
  'dots': lambda f: jax.checkpoint(
    f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}


class RunLayers(Protocol):
  """Runs body(kind, carry, inputs[i]) -> (carry, output) over the layers in order.

  `inputs` is a tree whose leaves lead with the layer axis [N, ...]; returns the last
  carry and the outputs stacked the same way.
  """

  def __call__(
    self, body: Body, carry: Any, inputs: Any, config: ModelConfig
  ) -> tuple[Any, Any]: ...


def scans_layers(config: ModelConfig, platform: str) -> bool:
  """Returns whether the stack is a scan in the program for a platform, or unrolled."""
  if config.scan_layers != 'auto':
    return config.scan_layers == 'scan'
  return platform != 'cpu' or config.n_layers > UNROLL_LIMIT


@jax.custom_vjp
def _rows(x: jax.Array) -> list[jax.Array]:
  """Returns x[0], x[1], ...; the gradient is one stack of the rows' gradients.

  That of plain indexing would add N arrays of the whole shape, mostly zeros.
  """
  return [x[i] for i in range(x.shape[0])]


_rows.defvjp(lambda x: (_rows(x), None), lambda _, gradients: (jnp.stack(gradients),))


def _unstacked(tree: Any) -> list[Any]:
  """Returns one tree per index of the leading axis."""
  leaves, treedef = jax.tree.flatten(tree)
  differentiable = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
  columns = [_rows(leaf) if d else list(leaf) for leaf, d in zip(leaves, differentiable)]
  return [treedef.unflatten(rows) for rows in zip(*columns)]


def _unrolled(steps: list[Callable], carry: Any, inputs: Any) -> tuple[Any, Any]:
  """Returns the last carry and stacked outputs of one step per layer."""
  outputs = []
  for step, layer_inputs in zip(steps, _unstacked(inputs), strict=True):
    carry, output = step(carry, layer_inputs)
    outputs.append(output)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def run_layers(body: Body, carry: Any, inputs: Any, config: ModelConfig) -> tuple[Any, Any]:
  """Returns the last carry and the stacked outputs; the default of `RunLayers`.

  A scan goes over groups of `layer_pattern`, so that kinds are static; layers beyond the
  last whole group are unrolled after it.
  """
  remat = REMATS[config.remat]
  steps = [
    remat(lambda carry, inputs, kind=kind: body(kind, carry, inputs))
    for kind in config.layer_kinds
  ]
  period = len(config.layer_pattern)
  n_groups = config.n_layers // period
  if not scans_layers(config, jax.default_backend()) or n_groups < 2:
    return _unrolled(steps, carry, inputs)
  n_grouped = n_groups * period
  grouped = jax.tree.map(
    lambda x: x[:n_grouped].reshape(n_groups, period, *x.shape[1:]), inputs
  )

  def group(carry: Any, group_inputs: Any) -> tuple[Any, Any]:
    return _unrolled(steps[:period], carry, group_inputs)

  carry, outputs = jax.lax.scan(group, carry, grouped)
  outputs = jax.tree.map(lambda x: x.reshape(n_grouped, *x.shape[2:]), outputs)
  if n_grouped == config.n_layers:
    return carry, outputs
  rest = jax.tree.map(lambda x: x[n_grouped:], inputs)
  carry, rest_outputs = _unrolled(steps[n_grouped:], carry, rest)
  return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs), outputs, rest_outputs)
