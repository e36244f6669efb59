"""The small-scale suite as monitor items, and whether they fit into a model's context."""

import dataclasses
from collections.abc import Callable, Iterator

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


def fitting_suite(config: SmallSuiteConfig, tokenizer: Tokenizer, context_length: int,
                  start_id: int | None) -> list[MonitorItem]:
  """Returns the suite; raises UserError naming the shots that fit where an item is too long."""
  items = small_suite(config)
  longest, n_tokens = _longest(items, tokenizer, start_id)
  if n_tokens <= context_length:
    return items
  for shots in range(config.shots - 8, 0, -8):
    fewer = small_suite(dataclasses.replace(config, shots=shots))
    if _longest(fewer, tokenizer, start_id)[1] <= context_length:
      advice = f'--config.monitors.small.shots={shots} fits'
      break
  else:
    advice = 'leave families or levels out (--config.monitors.small.families, .levels)'
  raise UserError(f'monitors.suite=small: item {longest.item_id} needs {n_tokens} tokens of '
                  f'context; model.context_length={context_length}; {advice}')


def _longest(items: list[MonitorItem], tokenizer: Tokenizer, start_id: int | None
             ) -> tuple[MonitorItem, int]:
  """Returns the item that needs most context, and how many tokens it needs."""
  encoded = [encode_item(item, tokenizer, start_id) for item in items]
  needs = [max(len(tokens.generalizing), len(tokens.shortcut)) - 1 for tokens in encoded]
  most = max(range(len(items)), key=needs.__getitem__)
  return items[most], needs[most]
