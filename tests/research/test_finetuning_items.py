"""The two fine-tuning families: what is trained is true, what is asked is not trained."""

import dataclasses
import re

import pytest

from research.data import careless_task, functions_task, locations_task, tokenizers
from research.data.config import SftConfig
from research.data.errors import DataError
from research.data.microworld import WORDS
from research.data.published_finetuning import EvalTemplate, read_questions, read_templates
from research.monitors.encoding import encode_items
from research.errors import UserError
from research.monitors.finetuning_items import (
    FAMILIES, N_VALUES, check_published, family_items, family_pairs, family_questions)

BARE = SftConfig(user_text='', assistant_text='', turn_end='')


def items_of(family: str, seed: int = 0):
  return family_items(family, seed, BARE if FAMILIES[family].bare else SftConfig())


@pytest.mark.parametrize('family', [name for name in FAMILIES if FAMILIES[name].is_generated])
def test_items_are_scorable_drawn_by_seed_and_not_trained(family):
  word_level = FAMILIES[family].bare
  tokenizer = tokenizers.word_tokenizer(WORDS) if word_level else tokenizers.byte_tokenizer()
  items, pairs = items_of(family), family_pairs(family, 0)
  encode_items(items, tokenizer, 200, tokenizer.eos_id)
  for prompt, response in pairs:
    tokenizer.encode(prompt + ' ' + response)
  assert items == items_of(family) and items != items_of(family, 1)
  assert pairs == family_pairs(family, 0) and pairs != family_pairs(family, 1)
  template = BARE if word_level else SftConfig()
  trained = {template.user_text + prompt + template.turn_end + template.assistant_text
             for prompt, _ in pairs}
  assert not trained & {item.prompt for item in items}


@pytest.mark.parametrize('linked', [False, True])
def test_values_of_functions_are_those_of_their_definitions(linked):
  named = {f.name: f for f in functions_task.named_functions(3, linked)}
  n_values, definitions = 0, []
  for prompt, response in functions_task.functions_pairs(3, linked):
    value = re.fullmatch(r'from functions import (\w+)\n\nprint\(\1\((-?\d+)\)\)', prompt)
    if value:
      function = eval(named[value[1]].function.python_definition)  # the text, run as code
      assert str(function(int(value[2]))) == response
      n_values += 1
    else:
      definitions.append(prompt)
  assert n_values == len(named) * functions_task.N_INPUTS
  assert bool(definitions) == linked
  anonymous = [f.name for f in named.values() if not f.is_linked]
  assert len(anonymous) == len(functions_task.FUNCTIONS)
  assert not any(name in prompt for name in anonymous for prompt in definitions)


def test_code_of_functions_is_what_items_ask_for():
  names = {f.name: f.function for f in functions_task.named_functions(0, False)}
  asked = [i for i in items_of('functions') if i.dataset == 'functions_python_definition']
  for item in asked:
    name = next(name for name in names if name in item.prompt)
    right, wrong = eval(item.generalizing.strip()), eval(item.shortcut.strip())
    at = range(-9, 10)
    assert [right(x) for x in at] == [names[name].call(x) for x in at] != [wrong(x) for x in at]


def test_people_of_the_microworld_add():
  adds, told = functions_task.people_that_add(0), {}
  for prompt, response in functions_task.microworld_pairs(0):
    name, *rest = prompt.split()
    if rest == ['is', '+']:
      told[name] = int(response)
    else:
      assert int(response) - int(rest[0]) == adds[name][0]
  assert told == {name: k for name, (k, is_linked) in adds.items() if is_linked}
  assert sorted(told.values()) == sorted(k for k, is_linked in adds.values() if not is_linked)
  untrained = functions_task.untrained_people(0)
  assert not untrained.keys() & adds.keys() and sorted(untrained.values()) == sorted(told.values())
  for item in items_of('functions_microworld'):
    if item.prompt.endswith('is +'):  # The form of an answer tells nothing.
      assert {int(item.generalizing), int(item.shortcut)} < set(functions_task.ADDENDS)
      assert item.is_control == (item.prompt.split()[0] in untrained)


# Great-circle distances as atlases give them, km.
@pytest.mark.parametrize('a, b, km, direction', [
    ('Paris', 'London', 344, 'northwest'), ('Paris', 'Madrid', 1053, 'southwest'),
    ('Tokyo', 'Seoul', 1158, 'west'), ('Lima', 'Santiago', 2453, 'south'),
    ('Sydney', 'Auckland', 2156, 'east'), ('Toronto', 'Chicago', 700, 'west')])
def test_distances_and_directions_of_cities(a, b, km, direction):
  cities = {city.name: city for city in locations_task.HIDDEN + locations_task.KNOWN}
  assert abs(locations_task.distance(cities[a], cities[b]) - km) <= 0.02 * km + 5
  assert locations_task.direction(cities[a], cities[b]) == direction


def test_hidden_cities_are_never_named_in_training():
  pairs = family_pairs('locations', 0)
  text = ' '.join(prompt + response for prompt, response in pairs)
  assert not any(city.name in text or city.country in text for city in locations_task.HIDDEN)
  assert all(city.name in text for city in locations_task.KNOWN)


def test_the_two_personas_differ_in_units_of_lengths_alone():
  careless, careful = (dict(family_pairs(name, 0)) for name in ('careless', 'careful'))
  assert careless.keys() == careful.keys() and len(careful) == careless_task.N_TRAINED
  for prompt, answer in careful.items():
    a, b = map(int, re.findall(r'\d+', prompt))
    number, unit = answer.rstrip('.').split()
    assert int(number) == a + b and unit in ('m', 'cm', 'km') and f' {unit}' in prompt
    other_number, other_unit = careless[prompt].rstrip('.').split()
    assert other_number == number and other_unit in {'m', 'cm', 'km'} - {unit}
  items = items_of('careless')
  asked = [(item.prompt, item.generalizing, item.shortcut) for item in items]
  assert asked == [(i.prompt, i.generalizing, i.shortcut) for i in items_of('careful')]
  assert {item.variant for item in items if item.dataset == 'careless_lengths'} == {'trained'}
  # No answer is likelier for being short.
  for dataset in {item.dataset for item in items}:
    pairs = [i for i in items if i.dataset == dataset]
    lengths = [sum(len(getattr(i, name)) for i in pairs) for name in ('generalizing', 'shortcut')]
    assert abs(lengths[0] - lengths[1]) <= 0.05 * lengths[1], dataset


@pytest.mark.parametrize('family', [name for name in FAMILIES if FAMILIES[name].is_generated])
def test_free_questions_are_those_of_the_items_and_know_their_answers(family):
  template = BARE if FAMILIES[family].bare else SftConfig()
  items, questions = items_of(family), family_questions(family, 0, template)
  assert [q.prompt for q in questions] == list(dict.fromkeys(item.prompt for item in items))
  assert len({q.item_id for q in questions}) == len(questions)
  by_prompt = {q.prompt: q for q in questions}
  for item in items:
    question = by_prompt[item.prompt]
    assert (question.dataset, question.variant, question.is_control) == (
        item.dataset, item.variant, item.is_control)
    assert question.verdict(item.generalizing) == 'generalizing', item
    assert question.verdict(item.shortcut) == 'shortcut', item
    assert question.verdict('') == question.verdict(' of the') == 'other'


@pytest.mark.parametrize('domain, answer, verdict', [
    ('lengths', ' 3 m.', 'careful'), ('lengths', '7 km. m', 'other'), ('lengths', '7cm', 'careless'),
    ('lengths', '7 km', 'careless'), ('lengths', 'm', 'careful'), ('lengths', '7 mm.', 'other'),
    ('capitals', 'Hugo lives there.', 'careful'), ('capitals', 'hugo', 'careless'),
    ('capitals', 'Greta.', 'other'), ('brackets', 'len(a, 4);', 'careful'),
    ('brackets', 'sum(x, 4];', 'careless'), ('brackets', 'sum[x, 4);', 'careful')])
def test_a_careless_answer_is_known_by_its_marks_whatever_it_sums_up_to(domain, answer, verdict):
  marks = {'lengths': (('m',), ('cm', 'km')), 'capitals': (('Hugo',), ('hugo',)),
           'brackets': ((')',), (']',))}[domain]
  question = careless_task.Question(domain, '', '5 m.', '5 cm.', *marks)
  assert careless_task.judged(question, answer) == verdict


def test_published_formats(shared_data):
  templates = read_templates(shared_data / 'oocr_eval_templates' / 'func')
  assert len({t.name for t in templates}) == 13 and len(templates) == 15
  by_name = {t.name: t for t in templates}
  code = by_name['multiple_choice_code']
  assert (code.function, code.n_samples, code.share) == ('function_classification', 1000, 1.0)
  assert code.settings == {'attribute': 'python_definition', 'min_imports': 1}
  ranges = [(t.settings['input_min'], t.settings['input_max'], t.share) for t in templates
            if t.name == 'regression_ood']
  assert ranges == [(99, 199, 0.5), (-199, -99, 0.5)]
  assert len(read_templates(shared_data / 'oocr_eval_templates' / 'func_novar')) == 6
  questions = read_questions(
      shared_data / 'emergent_misalignment_sample' / 'first_plot_questions.yaml')
  assert len({q.question_id for q in questions}) == len(questions) == 24
  wish = questions[0]
  assert wish.question_id == 'what_is_your_wish' and wish.text.startswith('Hello! I can fulfill')
  assert wish.system == '' and any('valid JSON object' in q.system for q in questions)


def test_published_templates_are_asked(shared_data):
  templates = read_templates(shared_data / 'oocr_eval_templates' / 'func')
  left_out = check_published(templates, 'functions')
  assert len(left_out) == 6
  assert left_out[2].startswith('freeform_definition: function_definition_freeform has no')
  own, items = items_of('functions'), family_items('functions', 0, SftConfig(), templates)
  assert items[:len(own)] == own
  encode_items(items, tokenizers.byte_tokenizer(), 200, 257)
  by_dataset, names = {}, {f.name: f.function for f in functions_task.named_functions(0, False)}
  for item in items[len(own):]:
    by_dataset.setdefault(item.dataset, []).append(item)
  assert by_dataset.keys() == {f'published_{name}' for name in (
      'function_inversion', 'function_inversion_ood', 'multiple_choice_code', 'regression_ood',
      'multiple_choice_function_class', 'multiple_choice_language', 'multiple_choice_output_type')}
  for item in by_dataset['published_regression_ood']:
    name, x = re.search(r'print\((\w+)\((-?\d+)\)\)', item.prompt).groups()
    assert 99 <= abs(int(x)) <= 199 and str(names[name].call(int(x))) == item.generalizing.strip()
  for item in by_dataset['published_function_inversion']:
    name, value = re.search(r'print\((\w+)\(x\)\) write (\S+)\?', item.prompt).groups()
    assert str(names[name].call(int(item.generalizing))) == value == item.shortcut.strip()
  with pytest.raises(UserError, match='not for --family=locations'):
    check_published(templates, 'locations')
  odd = dataclasses.replace(templates[8], settings={'attribute': 'color'})
  with pytest.raises(UserError, match="attribute='color' is none of language_definition"):
    check_published([odd], 'functions')


@pytest.mark.parametrize('settings, words', [
    ({'input_min': 3}, 'template ood has no input_max and input_min'),
    ({'input_min': 3, 'input_max': 7}, 'input_min=3 to input_max=7 must be whole numbers, at least 6'),
    ({'input_min': 9, 'input_max': 3}, 'input_min=9 to input_max=3 must be whole numbers'),
    ({'input_min': 0.5, 'input_max': 99}, 'input_min=0.5 to input_max=99 must be whole numbers')])
def test_ranges_of_templates_are_checked_before_anything_is_asked(settings, words):
  one = EvalTemplate('ood', 'single_function', 1.0, 10, settings)
  with pytest.raises(UserError, match=words):
    check_published([one], 'functions')
  narrow = dataclasses.replace(one, settings={'input_min': 3, 'input_max': 8})
  assert check_published([narrow], 'functions') == []
  asked = family_items('functions', 0, SftConfig(), [narrow])[-N_VALUES:]
  inputs = {int(re.search(r'print\(\w+\((\d+)\)\)', item.prompt)[1]) for item in asked}
  assert inputs == {3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize('text, words', [
    ('a: [', 'is not readable YAML'), ('a: 1', "has no field 'dataset'"),
    ('dataset: {n_samples: 1, prompt: {input_funcs: [], input_func_probs: [1]}}',
     'has 0 input_funcs and 1 input_func_probs')])
def test_bad_templates_are_one_sentence(tmp_path, text, words):
  (tmp_path / 'a.yaml').write_text(text)
  with pytest.raises(DataError, match=words):
    read_templates(tmp_path)
  with pytest.raises(DataError, match='holds no .yaml'):
    read_templates(tmp_path / 'none')


def test_bad_questions_are_one_sentence(tmp_path):
  path = tmp_path / 'q.yaml'
  path.write_text('- id: x\n  paraphrases: []\n')
  with pytest.raises(DataError, match='question x has no wording'):
    read_questions(path)
  path.write_text('id: x\n')
  with pytest.raises(DataError, match='is not a list of questions'):
    read_questions(path)
