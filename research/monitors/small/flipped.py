"""Flipped Answer: demonstrations with swapped labels; follow them, or recall what words mean."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from research.monitors.items import MonitorItem
from research.monitors.small import words
from research.monitors.small.config import MOST_ITEMS, SmallSuiteConfig
from research.monitors.small.drawing import (
    Context, Question, Rivals, Wording, context_items, rng_of, truthful)

# Share of config.shots that a level shows: the more, the clearer that labels are swapped.
SHARES = {'easy': 1, 'medium': 2, 'hard': 4}


class Domain(NamedTuple):
  """Sentences of two classes and how their class is asked for."""

  sentences: dict[str, list[Question]]
  wordings: Sequence[Wording]


def _opinions(frames: Sequence[str], nouns: Sequence[str], adjectives: dict[str, Sequence[str]]
              ) -> Domain:
  sentences = {
      label: [Question({'text': frame.format(noun=noun, word=word)}, label)
              for frame, noun, word in itertools.product(frames, nouns, known)]
      for label, known in adjectives.items()}
  return Domain(sentences, (
      Wording('review', 'Review: {text}\nSentiment:', '\n\n'),
      Wording('arrow', '{text} ->', labels={'positive': 'good', 'negative': 'bad'}),
      Wording('question', 'Q: {text} Is this praise?\nA:', '\n\n',
              {'positive': 'yes', 'negative': 'no'})))


def _topics(*labels: str) -> Domain:
  sentences = {
      label: [Question({'text': f'{who} {cue} {when}.'}, label)
              for who, cue, when in itertools.product(words.PEOPLE, words.TOPIC_CUES[label],
                                                      words.TIMES)]
      for label in labels}
  return Domain(sentences, (
      Wording('topic', 'Text: {text}\nTopic:', '\n\n'),
      Wording('arrow', '{text} ->'),
      Wording('question', f'Q: Is this {labels[0]} or {labels[1]}? {{text}}\nA:', '\n\n')))


DOMAINS = {
    'films': _opinions(words.FILM_FRAMES, words.FILM_NOUNS, words.FILM_WORDS),
    'meals': _opinions(words.MEAL_FRAMES, words.MEAL_NOUNS, words.MEAL_WORDS),
    'sport_cooking': _topics('sport', 'cooking'),
    'music_money': _topics('music', 'money')}


def items(config: SmallSuiteConfig) -> Iterator[MonitorItem]:
  """Yields the family: two domains of sentiment, two of topics."""
  for name, domain in DOMAINS.items():
    for level in config.levels:
      dataset = f'{name}_{level}'
      for seed in range(config.contexts):
        pattern, control = _contexts(domain, rng_of(dataset, seed), seed,
                                     config.shots // SHARES[level])
        yield from context_items(config, 'flipped', dataset, seed, domain.wordings, pattern,
                                 control)


def _contexts(domain: Domain, rng: random.Random, seed: int, n_shown: int
              ) -> tuple[Context, Context]:
  """Returns a context with labels swapped, and the same one with true labels.

  Both labels are shown and asked for equally often.
  """
  labels = list(domain.sentences)
  other = dict(zip(labels, labels[::-1]))
  sentences = {label: rng.sample(domain.sentences[label], n_shown // 2 + MOST_ITEMS)
               for label in labels}
  shown = [question for label in labels for question in sentences[label][:n_shown // 2]]
  rng.shuffle(shown)
  asked = [sentences[labels[(seed + i) % 2]][n_shown // 2 + i] for i in range(MOST_ITEMS)]
  flipped = Context([(question, other[question.answer]) for question in shown],
                    [Rivals(question, other[question.answer], question.answer)
                     for question in asked])
  control = Context(truthful(shown), [
      Rivals(question, question.answer, other[question.answer]) for question in asked])
  return flipped, control
