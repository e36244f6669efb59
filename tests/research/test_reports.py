"""Reports of synthetic runs: read back as HTML, JSON, CSV and PNG, never by eye alone."""

import html.parser
import json
import re

import numpy as np
import pandas as pd
import plotly.offline
import pytest

from research.errors import UserError
from research.reports import seeds, words
from research.reports.payload import thinned
from research.reports.records import Series, read_records
from research.reports.report import build_report
from research.run_dir import RunDir
from tests.research import synthetic_runs

PLOTLY = plotly.offline.get_plotlyjs()


class Page(html.parser.HTMLParser):
  """The tags, ids, visible text and payload of a report without its copy of Plotly."""

  def __init__(self, path):
    super().__init__()
    whole = path.read_text(encoding='utf-8')
    self.n_plotly = whole.count(PLOTLY)
    self.source = whole.replace(PLOTLY, '')
    self.tags, self.ids, self.charts, self.texts, self._inside = [], [], [], [], None
    self.payload = None
    self.feed(self.source)
    self.text = ' '.join(' '.join(self.texts).split())

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    self._inside = attrs.get('id', tag) if tag in ('script', 'style') else None
    self.ids += [attrs['id']] if 'id' in attrs else []
    self.charts += [attrs['data-chart']] if 'data-chart' in attrs else []

  def handle_endtag(self, tag):
    self._inside = None

  def handle_data(self, data):
    if self._inside == 'payload':
      self.payload = json.loads(data)
    elif self._inside is None:
      self.texts.append(data)


@pytest.fixture(name='hopping', scope='module')
def _hopping(tmp_path_factory):
  run_dir = synthetic_runs.hopping_run(tmp_path_factory.mktemp('runs') / 'hopping')
  return run_dir, Page(build_report(run_dir))


def test_headline_says_what_was_written(hopping):
  _, page = hopping
  assert 'Successive words hopped: 3 hops while the controls were calm.' in page.text
  assert 'Prompt variants in which each hop is found alone: 1 of 1, 1 of 1 and 1 of 1.' in page.text
  assert 'Flipped words ended with the general rule, without a hop.' in page.text
  assert 'Truthy words ended with the pattern, without a hop.' in page.text
  assert 'Controls calm: 1,200 items within 3.0 points of 99.0%' in page.text


def test_page_is_one_file_that_asks_the_network_for_nothing(hopping):
  _, page = hopping
  assert page.n_plotly == 1
  (policy,) = [a['content'] for _, a in page.tags if 'http-equiv' in a]
  assert "default-src 'none'" in policy and 'http' not in policy
  for tag, attrs in page.tags:
    assert tag not in ('link', 'iframe', 'img', 'object'), tag
    for name in ('src', 'href'):
      assert attrs.get(name, '#').startswith('#'), attrs
  assert not re.search(r'https?://|url\(|@import', page.source)


def test_every_chart_has_its_numbers(hopping):
  run_dir, page = hopping
  kinds = {chart.split(':')[0] for chart in page.charts}
  assert kinds == {'overview', 'dataset', 'controls', 'training', 'others'}
  for kind, numbers in (('dataset', page.payload['datasets']), ('others', page.payload['others']),
                        ('training', page.payload['training'])):
    assert [f'{kind}:{i}' for i in range(len(numbers))] == [
        chart for chart in page.charts if chart.startswith(kind)]
  scripted = set(re.findall(r"getElementById\('([\w-]+)'\)", page.source))
  assert scripted and scripted <= set(page.ids)
  assert len(page.ids) == len(set(page.ids))
  wanted = pd.read_parquet(run_dir.monitor_items).dataset.nunique()
  assert len(page.payload['datasets']) + len(page.payload['controls']['datasets']) == wanted


def test_payload_holds_the_curves_in_closed_form(hopping):
  _, page = hopping
  successive = page.payload['datasets'][0]
  steps = np.array(page.payload['snapshots'])
  spread_C = np.array([-.06, -.02, .02, .06])
  curve = synthetic_runs.plateaus(steps, synthetic_runs.HOPPING)
  wanted = np.clip(curve[:, None] + spread_C, 0, 1).round(2).mean(1)
  np.testing.assert_allclose(successive['accuracy']['mean'], wanted, atol=0.01)
  np.testing.assert_allclose(successive['margin']['mean'],
                             1.6 * np.array(successive['accuracy']['mean']) - 0.8, atol=1e-3)
  low, high = (np.array(successive['accuracy'][end]) for end in ('low', 'high'))
  assert np.all(low <= successive['accuracy']['mean']) and np.all(low >= 0)
  assert np.all(high >= successive['accuracy']['mean']) and np.all(high <= 1)
  assert len(successive['contexts']) == 4
  # The margin is 1.6 * accuracy - 0.8, its sign that of the state wherever that is confident.
  states = np.array(successive['ribbon'])
  assert set(states) == {-1, 1}
  np.testing.assert_array_equal(states, np.sign(curve - 0.5))
  assert page.payload['tokens'][-1] == 2000 * 3072


def test_hop_table_names_every_hop(hopping):
  _, page = hopping
  rows = [attrs for tag, attrs in page.tags if tag == 'tr' and 'data-from' in attrs]
  assert [(row['data-from'], row['data-to']) for row in rows] == [
      ('680', '700'), ('1080', '1100'), ('1480', '1500')]
  assert all(attrs['data-panel'] in page.ids for attrs in rows)
  assert page.text.count('▼ pattern') == 1


def test_run_facts_and_examples_are_escaped(hopping):
  _, page = hopping
  for text in ('182K', '0123456789ab', '6.14M', 'adamw', '38K (median)', 'data 1, fsdp 1',
               'Uncommitted changes yes', '2 lines, in manifest.json', '(10.0% of training)'):
    assert text in page.text, text
  assert 'question 0 <b>&</b> ? answer' in page.text
  assert '<b>&</b>' not in page.source


def test_tables_and_figures_lie_beside_the_page(hopping):
  run_dir, _ = hopping
  datasets = pd.read_csv(run_dir.figures / 'datasets.csv').set_index('dataset')
  assert datasets.loc['successive_words', 'n_hops_confirmed'] == 3
  assert datasets.loc['successive_words', 'n_items'] == 400
  assert datasets.loc['flipped_words', 'n_hops'] == 0
  # Of 100 snapshots 34 lie below 700, and 20 from 1,100 to 1,480.
  assert datasets.loc['successive_words', 'pattern'] == 0.54
  hops = pd.read_csv(run_dir.figures / 'hops.csv')
  assert list(hops.direction) == ['up', 'down', 'up']
  np.testing.assert_allclose(hops.change.abs(), 1.6 * 0.8, atol=0.02)
  assert (hops.change_low <= hops.change).all() and (hops.change <= hops.change_high).all()
  for name in ('datasets', 'controls', 'loss'):
    png = (run_dir.figures / f'{name}.png').read_bytes()
    assert png[:8] == b'\x89PNG\r\n\x1a\n' and len(png) > 5000


def test_a_rebuilt_report_is_the_same(hopping):
  run_dir, _ = hopping
  before = {p: p.read_bytes() for p in [run_dir.report_html, *run_dir.figures.iterdir()]}
  build_report(run_dir)
  assert before == {p: p.read_bytes() for p in [run_dir.report_html, *run_dir.figures.iterdir()]}


def test_run_in_progress(tmp_path):
  run_dir = synthetic_runs.hopping_run(tmp_path / 'run', last_step=800)
  with open(run_dir.metrics_jsonl, 'a', encoding='utf-8') as file:
    file.write('{"step": 801, "lo')  # a row that is being written
  page = Page(build_report(run_dir))
  assert 'The run is in progress: step 800 of 2,000.' in page.text
  assert 'Successive words hopped: 1 hop while the controls were calm.' in page.text
  assert page.payload['isFinished'] is False


def test_two_snapshots_are_too_few(tmp_path):
  page = Page(build_report(synthetic_runs.hopping_run(tmp_path / 'run', last_step=40)))
  assert '2 snapshots so far: too few to tell a hop' in page.text
  assert 'too little to say' in page.text and 'too little for states' in page.text


def test_text_run_without_monitors(tmp_path):
  run_dir = RunDir(tmp_path / 'text')
  synthetic_runs.write_records(run_dir, 300, 300, name='<text> & "more"')
  page = Page(build_report(run_dir))
  assert 'No monitor scored this run' in page.text
  assert {chart.split(':')[0] for chart in page.charts} == {'training', 'others'}
  assert '<text> & "more"' in page.text
  assert not (run_dir.figures / 'datasets.png').exists()


def test_loads_of_experts(tmp_path):
  run_dir = RunDir(tmp_path)
  synthetic_runs.write_records(run_dir, 100, 100)
  rows = [{'step': step, 'expert_max_load': 1 + 200 / step, 'expert_dropped': 0.25 * (step > 50),
           'expert_rounds': 1.0} for step in range(1, 101)]
  run_dir.metrics_jsonl.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  page = Page(build_report(run_dir))
  (panel,) = [panel for panel in page.payload['training'] if panel['title'] == 'Expert load']
  assert panel['series'][0]['values'][:3] == [201, 101, float(f'{1 + 200 / 3:.5g}')]
  last = 1 + np.mean([200 / step for step in range(91, 101)])  # 3.10
  assert f'Fullest expert {last:.2f} times the mean load' in page.text
  assert 'Dropped choices 25.00%' in page.text and 'Exchanges per layer 1.00' in page.text


def test_run_that_has_only_a_config(tmp_path):
  run_dir = RunDir(tmp_path / 'new')
  run_dir.path.mkdir()
  run_dir.config_json.write_text('{"name": "new", "n_steps": 10}')
  page = Page(build_report(run_dir))
  assert 'step 0 of 10' in page.text and page.charts == []


def test_no_controls_cannot_speak_against_a_hop(tmp_path):
  page = Page(build_report(synthetic_runs.hopping_run(tmp_path / 'run', controls=False)))
  assert 'There are no controls that could speak against a hop.' in page.text
  assert page.payload['controls'] is None
  assert 'calm.' not in page.text.split('How to read')[0]


def test_controls_only_and_few_items(tmp_path):
  run_dir = RunDir(tmp_path / 'run')
  steps = np.arange(100, 1100, 100)
  synthetic_runs.write_records(run_dir, 1000, 1000)
  synthetic_runs.write_items(run_dir, {'sums': True, 'pairs': False}, 20, n_seeds=1)
  square = np.where(steps % 400 < 200, 0., 1.)
  synthetic_runs.write_scores(run_dir, steps, {'sums': np.ones(10), 'pairs': square}, 20, n_seeds=1)
  page = Page(build_report(run_dir))
  assert '10 snapshots so far: too few' in page.text
  assert 'They are only 20 items; a gate needs 1,000.' in page.text
  assert page.payload['datasets'][0]['accuracy']['low'] == [None] * 10


@pytest.mark.parametrize('text, message', [
    ('{"step": 1}\n{"step": 2,\n', r'metrics.jsonl line 2 is not a JSON object'),
    ('{"step": 1}\n[3]\n', r'metrics.jsonl line 2 is not a JSON object'),
    ('{"loss": 1.0}\n', r'line 1: every row needs a whole number "step"')])
def test_broken_rows_are_named(tmp_path, text, message):
  run_dir = RunDir(tmp_path)
  run_dir.metrics_jsonl.write_text(text)
  with pytest.raises(UserError, match=message):
    read_records(run_dir)


def test_refuses_what_is_no_run_directory(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    build_report(RunDir(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match='no config.json'):
    build_report(RunDir(tmp_path))
  assert list(tmp_path.iterdir()) == []


def test_records_tolerate_unknown_keys_and_nested_ones(tmp_path):
  run_dir = RunDir(tmp_path)
  run_dir.timings_jsonl.write_text(
      '{"step": 2, "save_seconds": 1.5, "note": "x"}\n'
      '{"step": 4, "save_seconds": 2.5, "a": {"b": 1}}\n')
  run_dir.metrics_jsonl.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n')
  records = read_records(run_dir)
  np.testing.assert_array_equal(records.timings['save_seconds'].values, [1.5, 2.5])
  assert records.timings['a.b'].values == [1.]
  assert 'note' not in records.timings
  page = Page(build_report(run_dir))
  assert page.payload['training'][0]['series'][0]['values'] == [None, 3.0]
  assert '4 s' in page.text


def test_long_series_keep_their_means_and_extremes():
  values = np.arange(10_000.) % 7
  drawn = thinned(Series(np.arange(1, 10_001), values), 1000)
  assert len(drawn['steps']) == 500
  np.testing.assert_allclose(drawn['values'], values.reshape(500, 20).mean(1), rtol=1e-4)
  np.testing.assert_array_equal(drawn['low'], values.reshape(500, 20).min(1))
  np.testing.assert_array_equal(drawn['high'], values.reshape(500, 20).max(1))


def test_seeds_side_by_side(tmp_path):
  run_dirs = [synthetic_runs.hopping_run(tmp_path / f'run{seed}', seed=seed, every=40)
              for seed in (3, 4)]
  runs = seeds.read_seed_runs(run_dirs)
  assert [run.label for run in runs] == ['run3', 'run4']
  table = seeds.seeds_table(runs).splitlines()
  assert table[0] == '| run | Flipped words | Successive words | Truthy words | controls | loss |'
  assert len(table) == 4 and all(line.count('|') == 7 for line in table)
  assert '3 hops (in 1 of 1, 1 of 1, 1 of 1 variants); generalizing 46%, pattern 54%' in table[2]
  assert 'calm: at most 0.000 off 0.990' in table[2]
  sentences = seeds.hop_sentences(runs)
  assert '- Successive words: hops on 2 of 2 runs (3, 3)' in sentences
  assert '- 2 datasets without a hop on any run' in sentences


def test_seeds_need_scores(tmp_path):
  with pytest.raises(UserError, match='no monitor scores'):
    seeds.read_seed_runs([RunDir(tmp_path)])


def test_words_for_lists_and_sizes():
  assert words.listing(['a']) == 'a' and words.listing(['a', 'b', 'c']) == 'a, b and c'
  assert words.short(1_234_567) == '1.23M' and words.duration(3725) == '1 h 02 min'
