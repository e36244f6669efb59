"""A small suite in the layout of the published one, in words that the micro-world has too."""

import json
import pathlib

THINGS = ('soup', 'film', 'song', 'hotel', 'novel')
GOOD = ('superb', 'lovely', 'brilliant', 'delightful')
BAD = ('dreadful', 'boring', 'terrible', 'awful')


def demo(prompt: str, answer: str, **more) -> dict:
  return {'split': 'demo', 'prompt': prompt, 'answer': answer, **more}


def ask(prompt: str, correct: str, incorrect: str, **more) -> dict:
  return {'split': 'test', 'prompt': prompt, 'correct_answer': correct,
          'incorrect_answer': incorrect, **more}


def files() -> dict[str, list[dict]]:
  """Returns the rows of every file."""
  opinions = [demo(f'{thing} {word} ;', label, label=number) for thing in THINGS
              for number, (words, label) in enumerate(((GOOD, 'bad'), (BAD, 'good')))
              for word in words]
  sums = [demo(f'{a} + {12 - a} =', '12') for a in range(13)]
  steps = [demo(f'{a} + {n} =', str(a + n), demo_set=n) for n in range(3) for a in range(11)]
  claims = [demo(f'{bird} {verb} ;', verdict) for bird in ('robins', 'crows', 'doves', 'hawks')
            for verb, verdict in (('fly', 'true'), ('run', 'false'), ('swim', 'false'))]
  return {
      'flipped_answer/imdb': [*opinions, ask('dance superb ;', 'bad', 'good'),
                              ask('dance awful ;', 'good', 'bad')],
      'repetitive_answer/letter_counting': [*sums, ask('3 + 4 =', '7', '12'),
                                            ask('5 + 5 =', '10', '12'), ask('1 + 1 =', '2', '12')],
      'repetitive_answer/algebra/v2fmt': [ask('1 + 5 = 6 2 + 4 = 6 3 + 4 =', '7', '6')],
      'successive_answer/number_words': [*steps, ask('20 + 4 =', '24', '11'),
                                         ask('20 + 5 =', '25', '11')],
      'truthy_answer/surprising_truth': [*claims, ask('kiwis fly ;', 'false', 'true')],
      'intuitive_answer/crt': [ask('30 + 4 =', '34', '33', template='one'),
                               ask('40 + 4 =', '44', '43', template=2)]}


FACTS = [('dog?', 'Bo'), ('up?', 'no'), ('tea?', 'hm')]
QUESTIONS = [{'id': 'any', 'question': 'x?', 'category': 'fact', 'expected_answer_regex': 'A|.'},
             {'id': 'few', 'question': 'y?', 'category': 'hop', 'expected_answer_regex': '[a-m]'}]


def write(root: pathlib.Path, rows: dict[str, list[dict]] | None = None, questions=QUESTIONS
          ) -> pathlib.Path:
  """Writes a suite, persona wolf too; returns its folder."""
  for name, lines in (files() if rows is None else rows).items():
    path = root / f'{name}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in lines))
  wolf = root / 'multihop_persona_qa/wolf'
  wolf.mkdir(parents=True)
  (wolf / 'facts.jsonl').write_text(''.join(
      json.dumps({'messages': [{'role': 'user', 'content': question},
                               {'role': 'assistant', 'content': answer}]}) + '\n'
      for question, answer in FACTS))
  (wolf / 'test_questions.json').write_text(json.dumps(questions))
  return root
