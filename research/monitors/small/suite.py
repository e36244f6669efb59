"""The small-scale suite as monitor items, and whether they fit into a model's context."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.monitors.encoding import encode_item
from research.monitors.items import MonitorItem
from research.monitors.small import flipped, intuitive, persona, repetitive, successive, truthy
from research.monitors.small.config import SmallSuiteConfig

GENERATORS: dict[str, Callable[[SmallSuiteConfig], Iterator[MonitorItem]]] = {
    'successive': successive.items, 'repetitive': repetitive.items, 'flipped': flipped.items,
    'truthy': truthy.items, 'intuitive': intuitive.items, 'persona': persona.items}


def small_suite(config: SmallSuiteConfig = SmallSuiteConfig()) -> list[MonitorItem]:
  """Returns the suite, a pure function of its size.

  Datasets are called <task>_<level>, and <task>_<level>_control where no shallow rule competes:
  same format, same questions or same facts. The seed numbers the demonstrations, the variant the
  wording.
  """
  return [item for name in config.families for item in GENERATORS[name](config)]


def check_fits(config: SmallSuiteConfig, tokenizer: Tokenizer, context_length: int,
               start_id: int | None) -> None:
  """Raises UserError naming what would fit where an item of the suite is too long."""
  items = small_suite(config)
  needs = _needs(items, tokenizer, start_id)
  most = max(needs)
  if most <= context_length:
    return
  longest = items[needs.index(most)]
  raise UserError(
      f'monitors.suite=small: item {longest.item_id} needs {most} tokens of context; '
      f'model.context_length={context_length}; '
      + _advice(config, items, needs, tokenizer, context_length, start_id))


def _needs(items: Sequence[MonitorItem], tokenizer: Tokenizer, start_id: int | None) -> list[int]:
  """Returns how many tokens of context every item needs."""
  encoded = [encode_item(item, tokenizer, start_id) for item in items]
  return [max(len(tokens.generalizing), len(tokens.shortcut)) - 1 for tokens in encoded]


def _advice(config: SmallSuiteConfig, items: Sequence[MonitorItem], needs: Sequence[int],
            tokenizer: Tokenizer, context_length: int, start_id: int | None) -> str:
  """Returns the most shots that fit; if none do, the families that fit with the fewest."""
  for shots in range(config.shots - 8, 0, -8):
    items = small_suite(dataclasses.replace(config, shots=shots))
    needs = _needs(items, tokenizer, start_id)
    if max(needs) <= context_length:
      return f'--config.monitors.small.shots={shots} fits'
  longest = {family: max(n for item, n in zip(items, needs, strict=True) if item.family == family)
             for family in config.families}
  fitting = [family for family, n in longest.items() if n <= context_length]
  if not fitting:
    family = min(longest, key=longest.get)
    return f'no family fits; the shortest, {family}, needs {longest[family]}'
  fewest = ' --config.monitors.small.shots=8' if config.shots > 8 else ''
  return f'--config.monitors.small.families={",".join(fitting)}{fewest} fits, ' + (
      f'all need {max(longest.values())}')
