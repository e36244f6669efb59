"""What the detector says of a run, as text, as JSON and as a table of states."""

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from research.dynamics import detector
from research.dynamics.analysis import Analysis, Dataset
from research.dynamics.change_points import change_points
from research.dynamics.hops import CalledHop
from research.dynamics.parity import Parity
from research.dynamics.states import State
from research.run_dir import RunDir, write_whole
from research.training.logs import read_rows

STRIP = 96  # characters of a strip of states, at most
TOLD_CHANGE = 0.2  # of a level of the margin; smaller ones are in hops.json alone
MOST_SILENT = 6  # datasets of which nothing is to be told and that have lines of their own
MARKS = {State.GENERALIZING: '+', State.UNCERTAIN: '.', State.PATTERN: '-'}
_TOWARDS = {1: 'generalizing', -1: 'pattern'}


def tokens_by_step(run_dir: RunDir) -> dict[int, int]:
  """Returns the tokens seen by the steps whose rows say it, and 0 at step 0."""
  rows = read_rows(run_dir.metrics_jsonl)
  seen = {row['step']: row['tokens'] for row in rows if 'tokens' in row}
  return {0: 0, **seen} if seen else {}


def findings(analysis: Analysis, tokens: Mapping[int, int], metric: str, parity: Parity | None
             ) -> dict[str, Any]:
  """Returns all that `hops.json` holds.

  Args:
    analysis: of a run, with hops.
    tokens: seen by step.
    metric: that the detector looked at.
    parity: of two ways of scoring, None where it was not measured.
  """
  steps = [int(step) for step in analysis.steps]
  datasets = [*analysis.datasets, *analysis.control_datasets]
  told = [_dataset(dataset, steps, tokens) for dataset in datasets if dataset.judged]
  coherence = analysis.hops.coherence_KK
  return {
      'metric': metric,
      'detector': {'dwell_checkpoints': detector.DWELL, 'allowance': detector.ALLOWANCE,
                   'false_discoveries': detector.FALSE_DISCOVERIES,
                   'flank_confidence': detector.CONFIDENCE},
      'steps': {'first': steps[0], 'last': steps[-1], 'n': len(steps)},
      'parity': None if parity is None else {
          'steps': list(parity.steps), 'sign_changes': parity.share, 'mean_shift': parity.shift},
      'controls': _controls(analysis),
      'hop_rate': _rate(analysis, steps, tokens),
      'datasets': told,
      'left_out': list(analysis.hops.left_out),
      'coherence': {'datasets': [row.name for row in analysis.hops.datasets],
                    'correlations': [[round(float(r), 4) if np.isfinite(r) else None for r in row]
                                     for row in coherence]}}


def states_table(analysis: Analysis, tokens: Mapping[int, int]) -> pa.Table:
  """Returns a row per dataset and checkpoint: step, tokens, state, mean and its 95% interval."""
  columns: dict[str, list] = {name: [] for name in (
      'dataset', 'is_control', 'step', 'tokens', 'state', 'mean', 'low', 'high')}
  for row in analysis.hops.datasets:
    low, high = row.levels.interval()
    for t, step in enumerate(analysis.steps):
      values = (row.name, row.is_control, int(step), tokens.get(int(step)),
                State(int(row.states[t])).name, float(row.levels.mean[t]), float(low[t]),
                float(high[t]))
      for name, value in zip(columns, values, strict=True):
        columns[name].append(value)
  return pa.table({name: pa.array(values, pa.int64()) if name in ('step', 'tokens') else values
                   for name, values in columns.items()})


def write_findings(run_dir: RunDir, analysis: Analysis, found: Mapping[str, Any]) -> None:
  """Writes hops.json and states.parquet into the run directory."""
  write_whole(run_dir.hops_json, json.dumps(found, indent=1, allow_nan=False) + '\n')
  pq.write_table(states_table(analysis, tokens_by_step(run_dir)), run_dir.states_parquet)


def told(analysis: Analysis, found: Mapping[str, Any]) -> str:
  """Returns the findings as lines to read."""
  rows = {row.name: row for row in analysis.hops.datasets}
  lines = [f'{found["steps"]["n"]} checkpoints, steps {found["steps"]["first"]:,} to '
           f'{found["steps"]["last"]:,}; a hop is held for {detector.DWELL} on either side. '
           f'{MARKS[State.GENERALIZING]} generalizing, {MARKS[State.PATTERN]} pattern, '
           f'{MARKS[State.UNCERTAIN]} uncertain']
  silent = [dataset for dataset in found['datasets'] if _is_silent(dataset)]
  silent = silent if len(silent) > MOST_SILENT else []
  for dataset in found['datasets']:
    if dataset not in silent:
      lines += ['', *_told_dataset(dataset, strip(rows[dataset['name']].states), found['metric'])]
  if silent:
    least = [dataset['least_detectable'] for dataset in silent]
    lines += ['', f'{len(silent)} datasets are uncertain at every checkpoint; least detectable hop '
              f'{min(least):.2f} to {max(least):.2f} in {found["metric"]}:',
              f'  {", ".join(dataset["name"] for dataset in silent)}']
  lines += ['', *_told_run(found)]
  return '\n'.join(lines)


def strip(states: np.ndarray) -> str:
  """Returns a character per checkpoint; of long series the commonest state of equal pieces."""
  pieces = np.array_split(np.asarray(states), min(STRIP, len(states)))
  values = list(State)
  commonest = (values[int(np.argmax([np.sum(piece == value) for value in values]))]
               for piece in pieces)
  return ''.join(MARKS[state] for state in commonest)


def hop_facts(called: CalledHop, steps: list[int], tokens: Mapping[int, int]) -> dict[str, Any]:
  """Returns one hop as JSON has it."""
  hop = called.hop
  between = [steps[hop.before], steps[hop.after]]
  return {
      'towards': _TOWARDS[hop.direction], 'between_steps': between,
      'between_tokens': [tokens.get(step) for step in between], 'change': round(hop.change, 4),
      'change_low': round(called.interval[0], 4), 'change_high': round(called.interval[1], 4),
      'adjusted_p': hop.adjusted_p, 'controls_calm': hop.is_calm, 'confirmed': hop.is_confirmed,
      'found_in_variants': called.n_agreeing, 'variants': called.n_variants}


def _dataset(dataset: Dataset, steps: list[int], tokens: Mapping[int, int]) -> dict[str, Any]:
  judged = dataset.judged
  changes = None
  if importlib.util.find_spec('ruptures'):
    changes = _changes(dataset.margin.mean, steps)
  return {
      'name': dataset.name, 'family': dataset.family, 'is_control': dataset.is_control,
      'n_items': dataset.n_items, 'n_contexts': len(dataset.contexts),
      'variants': list(dataset.variants), 'least_detectable': round(judged.least_detectable, 4),
      'is_blind': judged.is_blind,
      'tolerance': judged.tolerance,
      'occupancy': {state.name: round(share, 4) for state, share in judged.occupancy.items()},
      'dwell_steps': {state.name: times for state, times in judged.dwell_times.items()},
      'hops': [hop_facts(called, steps, tokens) for called in judged.hops],
      'margin_changes': changes}


def _changes(margin_T: np.ndarray, steps: list[int]) -> list[dict[str, Any]]:
  """Where a mean margin changed its level, and by how much."""
  at = [0, *change_points(margin_T), len(steps)]
  levels = [float(np.mean(margin_T[a:b])) for a, b in zip(at, at[1:])]
  return [{'step': steps[t], 'change': round(after - before, 4)}
          for t, before, after in zip(at[1:], levels, levels[1:])]


def _controls(analysis: Analysis) -> dict[str, Any] | None:
  controls = analysis.controls
  if controls is None:
    return None
  return {'n_items': controls.n_items, 'level': round(controls.level, 4),
          'tolerance': round(controls.tolerance, 4), 'settled_step': controls.settled_step,
          'calm': controls.calm, 'outside_steps': controls.outside_steps}


def _rate(analysis: Analysis, steps: list[int], tokens: Mapping[int, int]) -> dict[str, Any] | None:
  """Confirmed hops per dataset and billion tokens; None where tokens were not counted.

  Exposed are the datasets in which a hop could be seen, where a state can be held on either side.
  """
  judged = [dataset.judged for dataset in analysis.datasets
            if dataset.judged and (dataset.judged.hops or not dataset.judged.is_blind)]
  first, last = tokens.get(steps[detector.DWELL - 1]), tokens.get(steps[-detector.DWELL])
  if not judged or first is None or last is None or last <= first:
    return None
  hops = [called.hop for row in judged for called in row.hops]
  rate, low, high = detector.hop_rate(hops, len(judged), last - first)
  return {'confirmed': sum(hop.is_confirmed for hop in hops), 'n_datasets': len(judged),
          'tokens': last - first, 'per_billion_tokens': round(rate, 3), 'low': round(low, 3),
          'high': round(high, 3)}


def _is_silent(row: Mapping[str, Any]) -> bool:
  """Returns whether there is nothing to tell: no state, no hop, and that not for blindness."""
  changes = [change for change in row['margin_changes'] or ()
             if abs(change['change']) >= TOLD_CHANGE]
  return row['occupancy'][State.UNCERTAIN.name] == 1 and not (
      row['hops'] or changes or row['is_blind'])


def _told_dataset(row: Mapping[str, Any], states: str, metric: str) -> list[str]:
  control = ', control' if row['is_control'] else ''
  occupancy = ', '.join(f'{name.lower()} {share:.0%}' for name, share in row['occupancy'].items())
  lines = [f'{row["name"]} ({row["n_items"]} items, {row["n_contexts"]} contexts, '
           f'{len(row["variants"])} variants{control})', f'  {states}',
           f'  {occupancy}; least detectable hop {row["least_detectable"]:.2f} in {metric}'
           + (': it scatters too much for any to be seen' if row['is_blind'] else '')]
  visits = '; '.join(f'{name.lower()} {" ".join(f"{time:,.0f}" for time in times)}'
                     for name, times in row['dwell_steps'].items() if times)
  lines += [f'  steps of each visit: {visits}'] if visits else []
  lines += [f'  {_told_hop(hop)}' for hop in row['hops']]
  large = [f'{change["step"]:,} ({change["change"]:+.2f})' for change in row['margin_changes'] or ()
           if abs(change['change']) >= TOLD_CHANGE]
  lines += [f'  margin changes its level at steps {", ".join(large)}'] if large else []
  return lines


def _told_hop(hop: Mapping[str, Any]) -> str:
  a, b = hop['between_steps']
  seen = '' if None in hop['between_tokens'] else (
      ' ({:,} and {:,} tokens)'.format(*hop['between_tokens']))
  calm = {None: 'gated by no controls', True: 'controls calm',
          False: 'controls restless: NOT CONFIRMED'}
  return (f'hop to {hop["towards"]} between steps {a:,} and {b:,}{seen}: {hop["change"]:+.2f} '
          f'[{hop["change_low"]:+.2f}, {hop["change_high"]:+.2f}], '
          f'adjusted p {hop["adjusted_p"]:.2g}, {calm[hop["controls_calm"]]}, in '
          f'{hop["found_in_variants"]} of {hop["variants"]} prompt variants')


def _told_run(found: Mapping[str, Any]) -> list[str]:
  lines, rate, parity = [], found['hop_rate'], found['parity']
  confirmed = sum(hop['confirmed'] for row in found['datasets'] for hop in row['hops']
                  if not row['is_control'])
  of_controls = sum(hop['confirmed'] for row in found['datasets'] for hop in row['hops']
                    if row['is_control'])
  lines.append(f'confirmed hops: {confirmed}; of controls: {of_controls}')
  if rate:
    lines.append(f'hops per dataset and billion tokens: {rate["per_billion_tokens"]:,.3g} '
                 f'[{rate["low"]:,.3g}, {rate["high"]:,.3g}] over {rate["tokens"]:,} tokens and '
                 f'{rate["n_datasets"]} datasets')
  names, values = found['coherence']['datasets'], found['coherence']['correlations']
  pairs = sorted(((values[i][j], names[i], names[j]) for i in range(len(names)) for j in range(i)
                  if values[i][j] is not None), key=lambda pair: -abs(pair[0]))
  if pairs:
    strongest = ', '.join(f'{a} and {b} {r:+.2f}' for r, b, a in pairs[:3])
    lines.append(f'coherence, the strongest correlations: {strongest}')
  if parity:
    worst = max(parity['sign_changes'], key=parity['sign_changes'].get)
    lines.append(f'parity of float32 and bfloat16 at steps {_numbers(parity["steps"])}: margins of '
                 f'at most {parity["sign_changes"][worst]:.1%} of a dataset\'s items change sign '
                 f'({worst})')
  else:
    lines.append('parity of float32 and bfloat16 was not measured: the run has no snapshots')
  if any(row['margin_changes'] is None for row in found['datasets']):
    lines.append("changes of margins were not looked for: pip install -e '.[changes]'")
  if found['left_out']:
    lines.append(f'fewer than {detector.LEAST_CONTEXTS} contexts, not looked at: '
                 f'{", ".join(found["left_out"])}')
  return lines


def _numbers(values) -> str:
  return ', '.join(f'{value:,}' for value in values)
