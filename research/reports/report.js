'use strict';
/* Draws the charts of a report from the numbers in #payload and keeps their step axes together. */
(() => {
  const data = JSON.parse(document.getElementById('payload').textContent);
  const root = document.documentElement;
  const charts = [];  // {element, build, reading, x}
  const view = {theme: '', tokens: false, contexts: true, range: null, syncing: false};

  const color = (name, alpha) => {
    const hex = getComputedStyle(root).getPropertyValue('--' + name).trim();
    if (alpha === undefined) return hex;
    const [r, g, b] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };
  const percent = v => v === null || v === undefined ? '–' : (100 * v).toFixed(1) + '%';
  const compact = v => {
    if (v === null || v === undefined) return '–';
    if (Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3)) {
      return Intl.NumberFormat('en', {notation: Math.abs(v) < 1 ? 'scientific' : 'compact',
                                      maximumSignificantDigits: 3}).format(v);
    }
    return String(Number(v.toPrecision(4)));
  };

  /* Steps and tokens: both grow together, so one is interpolated from the other. */
  function interpolate(from, to, value) {
    let high = from.findIndex(v => v >= value);
    if (high < 0) return to[to.length - 1];
    if (high === 0) return to[0];
    const share = (value - from[high - 1]) / ((from[high] - from[high - 1]) || 1);
    return to[high - 1] + share * (to[high] - to[high - 1]);
  }
  const place = step => view.tokens ? interpolate(data.tokenSteps, data.tokens, step) : step;
  const places = steps => view.tokens ? steps.map(place) : steps;
  const stepAt = x => view.tokens ? interpolate(data.tokens, data.tokenSteps, x) : x;
  const fullRange = () => [place(0), place(data.lastStep)];
  const currentRange = () => (view.range || [0, data.lastStep]).map(place);
  const nearest = (steps, step) => {
    let best = 0;
    steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
    return best;
  };
  const stepLabel = step => {
    const tokens = data.tokens
      ? ', ' + compact(interpolate(data.tokenSteps, data.tokens, step)) + ' tokens' : '';
    return 'step ' + Math.round(step).toLocaleString('en') + tokens;
  };

  function baseLayout(height, extra) {
    const axis = {gridcolor: color('grid'), zeroline: false, linecolor: color('line'),
                  tickfont: {color: color('soft'), size: 11}, fixedrange: true};
    const layout = {
      height, margin: {l: 42, r: 18, t: 8, b: 30}, paper_bgcolor: 'rgba(0,0,0,0)',
      plot_bgcolor: 'rgba(0,0,0,0)', showlegend: false, hovermode: 'x', dragmode: 'zoom',
      modebar: {bgcolor: 'rgba(0,0,0,0)', color: color('faint'), activecolor: color('ink')},
      font: {family: getComputedStyle(document.body).fontFamily, color: color('ink'), size: 12},
      hoverlabel: {bgcolor: color('panel'), bordercolor: color('faint'), align: 'left',
                   font: {color: color('ink'), size: 12,
                          family: getComputedStyle(document.body).fontFamily}},
      xaxis: {...axis, fixedrange: false, range: currentRange(), showgrid: true, nticks: 7,
              ticklabeloverflow: 'allow',
              tickformat: view.tokens ? '.3~s' : ',d'},
      yaxis: {...axis}, shapes: [], annotations: []};
    for (const [key, value] of Object.entries(extra || {})) {
      layout[key] = key.endsWith('axis2') || key === 'yaxis' || key === 'xaxis'
        ? {...axis, ...layout[key], ...value} : value;
    }
    if (!data.isFinished && data.recordedStep < data.lastStep) {
      layout.shapes = layout.shapes.concat([{
        type: 'rect', xref: 'x', yref: 'paper', x0: place(data.recordedStep),
        x1: place(data.lastStep), y0: 0, y1: 1, line: {width: 0}, layer: 'below',
        fillcolor: color('faint', .1)}]);
    }
    return layout;
  }
  const line = (steps, values, more) => ({
    type: 'scatter', mode: steps.length < 3 && more.line.color ? 'markers+lines' : 'lines',
    x: places(steps), y: values, hoverinfo: 'skip',
    marker: {size: 4, color: more.line.color}, ...more});
  function bandTraces(steps, band, fill, axes) {
    if (!band.low || band.low.every(v => v === null)) return [];
    const edge = {line: {width: 0}, ...axes};
    return [line(steps, band.low, edge),
            line(steps, band.high, {...edge, fill: 'tonexty', fillcolor: fill})];
  }

  const markOf = hop => `triangle-${hop.direction}` + (hop.isConfirmed ? '' : '-open');
  const middle = hop => place((hop.before + hop.after) / 2);

  /* The overview: one ribbon per dataset, colored by its states, or by accuracy without them. */
  function overview() {
    const rows = data.datasets.map(d => ({...d, mean: d.accuracy.mean}));
    if (data.controls) {
      rows.push(...data.controls.datasets.map(d => ({...d, mean: d.accuracy, hops: []})));
    }
    rows.reverse();
    const many = rows.length > 24, size = many ? 11 : 13;
    const longest = Math.max(...rows.map(r => r.title.length));
    const traces = [{
      type: 'heatmap', x: places(data.snapshots), y: rows.map(r => r.title),
      z: rows.map(r => r.ribbon), zmin: -1, zmax: 1, ygap: many ? 3 : 7, showscale: false,
      colorscale: [[0, color('shortcut')], [.5, color('middle')], [1, color('generalizing')]],
      customdata: rows.map(r => r.mean),
      hovertemplate: '%{y}: %{customdata:.1%}<extra></extra>'}];
    for (const direction of ['up', 'down']) {
      const marks = rows.flatMap(r => r.hops.filter(h => h.direction === direction)
        .map(h => ({x: middle(h), y: r.title, hop: h})));
      traces.push({
        type: 'scatter', mode: 'markers', x: marks.map(m => m.x), y: marks.map(m => m.y),
        hoverinfo: 'skip', marker: {
          symbol: marks.map(m => markOf(m.hop)), size: 8,
          color: marks.map(m => m.hop.isConfirmed ? '#fff' : '#16191f'),
          line: {width: 1, color: '#16191f'}}});
    }
    const layout = baseLayout(46 + (many ? 18 : 34) * rows.length, {
      margin: {l: Math.max(152, 14 + .58 * size * longest), r: 18, t: 2, b: 30}});
    layout.hovermode = 'closest';
    layout.xaxis.showgrid = false;
    layout.yaxis = {...layout.yaxis, type: 'category', showgrid: false, ticks: '',
                    tickfont: {color: color('ink'), size}, dtick: 1, range: [-.5, rows.length - .5]};
    return [traces, layout];
  }

  /* One dataset: accuracy above, margin below, states between, hops marked where they happen. */
  function dataset(f) {
    const steps = data.snapshots, low = {yaxis: 'y2'}, traces = [];
    if (view.contexts) {
      for (const c of f.contexts) {
        const thin = {line: {width: 1, color: color('faint', .45)}};
        traces.push(line(steps, c.accuracy, thin), line(steps, c.margin, {...thin, ...low}));
      }
    }
    traces.push(...bandTraces(steps, f.accuracy, color('ink', .15), {}));
    traces.push(...bandTraces(steps, f.margin, color('training', .2), low));
    traces.push(line(steps, f.margin.mean, {line: {width: 1.6, color: color('training')}, ...low}));
    const bound = (low, high) => low === null ? '' : ` (${percent(low)} to ${percent(high)})`;
    traces.push(line(steps, f.accuracy.mean, {
      line: {width: 2.2, color: color('ink')}, hoverinfo: 'text', text: steps.map((s, i) => {
        const now = f.contexts.map(c => c.accuracy[i]);
        const interval = bound(f.accuracy.low[i], f.accuracy.high[i]);
        return `<b>${percent(f.accuracy.mean[i])}</b>${interval}` +
          `<br>${f.contexts.length} contexts: ${percent(Math.min(...now))} to ` +
          `${percent(Math.max(...now))}<br>margin ${compact(f.margin.mean[i])}<br>${stepLabel(s)}`;
      })}));
    for (const h of f.hops) {
      const name = h.direction === 'up' ? 'generalizing' : 'shortcut';
      traces.push({
        type: 'scatter', mode: 'markers', x: [middle(h)],
        y: [h.direction === 'up' ? 1.06 : -.06], cliponaxis: false, hoverinfo: 'skip',
        marker: {symbol: markOf(h), size: 9, color: color(name),
                 line: {width: 1, color: color(name)}}});
    }
    traces.push({
      type: 'heatmap', x: places(steps), y: [''], z: [f.ribbon], zmin: -1, zmax: 1, yaxis: 'y3',
      colorscale: [[0, color('shortcut')], [.5, color('middle')], [1, color('generalizing')]],
      showscale: false, hoverinfo: 'skip'});
    const layout = baseLayout(300, {
      yaxis3: {domain: [.3, .33], anchor: 'x', showticklabels: false, ticks: '', showgrid: false,
               fixedrange: true},
      yaxis: {domain: [.36, 1], range: [-.11, 1.11], tickvals: [0, .5, 1], tickformat: '.0%'},
      yaxis2: {domain: [0, .27], anchor: 'x', range: [-1.05, 1.05], tickvals: [-1, 0, 1],
               zeroline: true, zerolinecolor: color('line')}});
    layout.xaxis.anchor = 'y2';
    const small = {xref: 'paper', x: 0, xanchor: 'left', showarrow: false, yanchor: 'top',
                   font: {size: 10.5, color: color('faint')}};
    layout.annotations = [{...small, yref: 'paper', y: .28, text: 'margin'}];
    return [traces, layout];
  }

  function controls() {
    const c = data.controls, steps = data.snapshots, traces = [];
    for (const d of c.datasets) {
      traces.push(line(steps, d.accuracy, {
        line: {width: 1.2, color: color('control', .5)}, hoverinfo: 'text',
        text: d.accuracy.map(v => `${d.label}: ${percent(v)}`)}));
    }
    traces.push(line(steps, c.mean, {
      line: {width: 2.4, color: color('control')}, hoverinfo: 'text',
      text: c.mean.map((v, i) => `<b>all controls ${percent(v)}</b>, ${stepLabel(steps[i])}`)}));
    const settled = c.settled === null ? data.lastStep : c.settled;
    const layout = baseLayout(250, {
      shapes: [{type: 'rect', xref: 'x', yref: 'y', x0: place(settled), x1: place(data.lastStep),
                y0: c.level - c.tolerance, y1: c.level + c.tolerance, line: {width: 0},
                layer: 'below', fillcolor: color('control', .2)}],
      yaxis: {range: [-.03, 1.05], tickvals: [0, .25, .5, .75, 1], tickformat: '.0%'}});
    return [traces, layout];
  }

  function recorded(panel) {
    const names = ['training', 'second', 'control'], traces = [];
    panel.series.forEach((s, i) => {
      traces.push(...bandTraces(s.steps, s, color(names[i], .15), {}));
      traces.push(line(s.steps, s.values, {
        mode: i || s.steps.length < 30 ? 'lines+markers' : 'lines',
        marker: {size: 5, color: color(names[i])}, line: {width: 1.6, color: color(names[i])},
        hoverinfo: 'text', text: s.values.map(
          (v, j) => `${s.label} <b>${compact(v)}</b><br>${stepLabel(s.steps[j])}`)}));
    });
    const layout = baseLayout(196, {yaxis: {
      type: panel.axis === 'log' ? 'log' : 'linear', nticks: 5,
      rangemode: panel.axis === 'zero' ? 'tozero' : 'normal'}});
    layout.margin.l = 50;
    return [traces, layout];
  }

  /* What the heading of a panel says for a step: the last value, or the one under the cursor. */
  const say = (value, label) => `${label ? label + ' ' : ''}<b>${value}</b>`;
  function readingOf(kind, item) {
    const at = (steps, values, step) =>
      step === null ? values.filter(v => v !== null).pop() : values[nearest(steps, step)];
    if (kind === 'dataset' || kind === 'controls') {
      const mean = kind === 'dataset' ? item.accuracy.mean : item.mean;
      return step => say(percent(at(data.snapshots, mean, step)));
    }
    if (kind === 'overview') return step => step === null ? '' : stepLabel(
      data.snapshots[nearest(data.snapshots, step)]);
    return step => item.series.map(s => say(
      compact(at(s.steps, s.values, step)), item.series.length > 1 ? s.label : '')).join(' &nbsp;');
  }

  function showCursor(step) {
    for (const chart of charts) {
      const axis = chart.element._fullLayout && chart.element._fullLayout.xaxis;
      if (!axis) continue;
      const x = step === null ? -1 : axis.l2p(place(step));
      const inside = x >= 0 && x <= axis._length;
      chart.cursor.style.display = inside ? 'block' : 'none';
      if (inside) chart.cursor.style.left = axis._offset + x + 'px';
      chart.readout.innerHTML = chart.reading(step);
    }
  }

  function setRange(range) {  // in steps; null shows everything
    view.range = range;
    view.syncing = true;
    Promise.all(charts.filter(c => c.drawn).map(c =>
      Plotly.relayout(c.element, {'xaxis.range': currentRange(), 'xaxis.autorange': false})))
      .then(() => { view.syncing = false; });
  }

  function draw(chart) {
    const [traces, layout] = chart.build();
    Plotly.react(chart.element, traces, layout, {
      responsive: true, displaylogo: false, displayModeBar: 'hover', doubleClick: false,
      modeBarButtons: [['toImage', 'resetScale2d']],
      toImageButtonOptions: {format: 'svg', filename: chart.name}});
    if (chart.drawn) return;
    chart.drawn = true;
    chart.element.append(chart.cursor);
    chart.element.on('plotly_relayout', change => {
      if (view.syncing) return;
      if (change['xaxis.range[0]'] !== undefined) {
        setRange([change['xaxis.range[0]'], change['xaxis.range[1]']].map(stepAt));
      } else if (change['xaxis.autorange'] || change['xaxis.range']) {
        setRange(null);
      }
    });
    chart.element.on('plotly_doubleclick', () => setRange(null));
    chart.element.on('plotly_hover', event => showCursor(stepAt(event.points[0].x)));
    chart.element.on('plotly_unhover', () => showCursor(null));
  }
  const redraw = () => { charts.filter(c => c.drawn).forEach(draw); showCursor(null); };

  function add(element, kind, item, build) {
    const panel = element.closest('.panel');
    const cursor = document.createElement('div');
    cursor.className = 'cursor';
    charts.push({element, build, cursor, drawn: false, reading: readingOf(kind, item),
                 name: (panel.querySelector('h3') || {textContent: kind}).textContent,
                 readout: panel.querySelector('.reading')});
  }

  function setTheme(theme) { root.dataset.theme = theme; view.theme = theme; }

  document.querySelectorAll('.chart').forEach(element => {
    const [kind, index] = element.dataset.chart.split(':');
    if (kind === 'overview') add(element, kind, null, overview);
    if (kind === 'controls') add(element, kind, data.controls, controls);
    if (kind === 'dataset') {
      const item = data.datasets[index];
      add(element, kind, item, () => dataset(item));
    }
    if (kind === 'training' || kind === 'others') {
      const item = data[kind][index];
      add(element, kind, item, () => recorded(item));
    }
  });
  setTheme(matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  /* One chart at a time, so that the page can be read while a hundred of them are drawn. */
  const waiting = charts.filter(c => !c.element.closest('details:not([open])'));
  const drawNext = () => {
    const chart = waiting.shift();
    if (chart && !chart.drawn) draw(chart);
    showCursor(null);
    if (waiting.length) setTimeout(drawNext); else document.body.dataset.ready = 'yes';
  };
  drawNext();
  document.querySelectorAll('details.charts').forEach(fold => {
    fold.addEventListener('toggle', () => {
      if (!fold.open) return;
      charts.filter(c => !c.drawn && fold.contains(c.element)).forEach(draw);
      showCursor(null);
    });
  });

  document.getElementById('theme-switch').addEventListener('click', () => {
    setTheme(view.theme === 'dark' ? 'light' : 'dark');
    redraw();
  });
  const contexts = document.getElementById('context-switch');
  contexts.hidden = !data.datasets.length;
  contexts.addEventListener('click', () => {
    view.contexts = !view.contexts;
    contexts.textContent = 'Contexts: ' + (view.contexts ? 'shown' : 'hidden');
    redraw();
  });
  const axis = document.getElementById('axis-switch');
  axis.hidden = !data.tokens;
  axis.addEventListener('click', () => {
    view.tokens = !view.tokens;
    axis.textContent = 'Axis: ' + (view.tokens ? 'tokens' : 'steps');
    redraw();
  });
  document.querySelectorAll('tr[data-from]').forEach(row => {
    const go = () => {
      const [from, to] = [Number(row.dataset.from), Number(row.dataset.to)];
      const room = Math.max(4 * (to - from), data.lastStep / 20);
      setRange([Math.max(0, from - room), Math.min(data.lastStep, to + room)]);
      document.getElementById(row.dataset.panel).scrollIntoView(
        {behavior: 'smooth', block: 'center'});
    };
    row.addEventListener('click', go);
    row.addEventListener('keydown', event => { if (event.key === 'Enter') go(); });
  });
})();
