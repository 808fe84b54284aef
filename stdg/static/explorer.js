// The view of stdg.explore: a picture with boxes, a graph and tables, linked. The protocol is explained in nbs/explore/08_widget.ipynb.
// Text reaches the page as text nodes and attributes only; nothing is fetched.

const SVG = 'http://www.w3.org/2000/svg', HEIGHT = 24;
const [PREDICTION, TRUTH, BOTH] = [0, 1, 2];
const STATE = ['show', 'least_object', 'least_triplet', 'count', 'overlay', 'object_class', 'predicate', 'head'];
const VERDICTS = { hit: ['✓', 'hit'], miss: ['○', 'missed'], wrong: ['✕', 'wrong'], unannotated: ['+', 'holds, not annotated'] };
const FRAMES = ['subject', 'object', 'union', 'line'];  // of the places where a head of pairs looks
const SUREST = [5, 10], TRUE = { true: ['✓', 'true'], false: ['✕', 'not true'] };  // by the dense truth
const KEYS = 'Tab goes from picture to boxes, nodes, edges and rows, arrows move within; Enter pins, Escape clears.';

// Elements

function make(tag, attributes = {}, ...children) {
  const svg = ['svg', 'g', 'rect', 'text', 'title', 'path', 'image', 'line', 'circle', 'clipPath', 'defs', 'marker', 'desc'].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const bytes = view => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const numbers = (Kind, view) => new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const share = score => score.toFixed(score > 0 && score < .0995 ? 3 : 2);

// What the sliders leave: objects and triplets to show, each with a key, and a verdict where truth and prediction are compared

function choose(graph, names, state) {
  const wanted = triplet => state.predicate < 0 || triplet.p === state.predicate;
  const best = graph.triplets.map((t, i) => ({ ...t, i })).filter(t => t.score >= state.least_triplet && wanted(t)).slice(0, state.count);
  const ends = new Set(best.flatMap(t => [t.s, t.o]));
  const seen = new Set([...graph.objects.keys()].filter(i => ends.has(i) || graph.objects[i].score >= state.least_object));
  const truth = graph.truth, mode = truth ? state.show : PREDICTION, both = mode === BOTH;
  const objects = [], triplets = [], truths = [];
  const object = (key, o, verdict) => objects.push({ key, verdict, ...o });
  if (mode !== TRUTH) {
    for (const i of seen) object(`o${i}`, graph.objects[i], both ? (graph.objects[i].match.length ? 'hit' : 'wrong') : null);
    for (const t of best) triplets.push({ ...t, key: `t${t.i}`, s: `o${t.s}`, o: `o${t.o}`, verdict: both ? (t.match.length ? 'hit' : t.holds ? 'unannotated' : 'wrong') : null });
  }
  if (mode !== PREDICTION) {
    const stands = truth.objects.map((o, i) => {
      const found = both ? [o.same, ...o.match].find(j => seen.has(j)) : undefined;
      if (found === undefined) object(`O${i}`, o, both ? 'miss' : null);
      else if (graph.objects[found].node < 0) objects.find(other => other.key === `o${found}`).node = o.node;
      return found === undefined ? `O${i}` : `o${found}`;
    });
    truth.triplets.forEach((t, i) => {
      if (!wanted(t)) return;
      const hit = both && best.find(b => b.match.includes(i));
      const row = { ...t, key: `T${i}`, s: stands[t.s], o: stands[t.o], verdict: both ? (hit ? 'hit' : 'miss') : null, twin: hit ? `t${hit.i}` : undefined };
      truths.push(row);
      if (!hit) triplets.push(row);
    });
  }
  return { mode, objects, triplets, rows: { prediction: mode === TRUTH ? null : triplets.filter(t => t.key[0] === 't'), truth: mode === PREDICTION ? null : truths } };
}

// Fields, votes and sampling points: cells become pixels as stdg.explore.scene.Frame says

class Reading {
  constructor(record) {
    Object.assign(this, record);
    [this.rows, this.columns] = record.cells;
    this.heat = bytes(record.heat);
    this.confidence = bytes(record.confidence);
    this.votes = numbers(Float32Array, record.votes);
    this.offsets = Object.fromEntries(Object.entries(record.offsets).map(([name, view]) => [name, numbers(Int16Array, view)]));
    this.drawn = new Map();
  }
  pixels(x, y) { return [(this.stride * x - this.corner[0]) / this.scale[0], (this.stride * y - this.corner[1]) / this.scale[1]]; }
  place(x, y) { return [(x * this.scale[0] + this.corner[0]) / this.stride, (y * this.scale[1] + this.corner[1]) / this.stride]; }
  cell(x, y) {
    const place = this.place(x, y);
    return [Math.floor(place[1]), Math.floor(place[0])];
  }
  line(subject, object) {
    // The cells, row * columns + column, painted from the one box to the other: those of stdg.reading.line_cells.
    const [a, b] = [subject, object].map(box => this.place((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)), step = [b[0] - a[0], b[1] - a[1]];
    const length = Math.hypot(...step), n = Math.max(2, Math.ceil(length)), margin = Math.min(Math.max(2 / length, .25), .4), cells = new Set();
    for (let i = 0; i < 9 * n; i++) {
      const t = margin + Math.floor(i / 9) * (1 - 2 * margin) / (n - 1), [column, row] = [0, 1].map(k => Math.round(a[k] + t * step[k] - 1) + (k ? Math.floor(i % 9 / 3) : i % 3));
      if (row >= 0 && column >= 0 && row < this.rows && column < this.columns) cells.add(row * this.columns + column);
    }
    return cells;
  }
  field(kind, index, palette) {
    // A PNG of one field, or of the strongest of all (index -1); each is drawn once.
    const name = `${kind} ${index}`;
    if (this.drawn.has(name)) return this.drawn.get(name);
    const all = this[kind], n = this.rows * this.columns, canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [this.columns, this.rows];
    const context = canvas.getContext('2d'), image = context.createImageData(this.columns, this.rows);
    for (let i = 0; i < n; i++) {
      let value = 0;
      if (index >= 0) value = all[index * n + i];
      else for (let k = i; k < all.length; k += n) value = Math.max(value, all[k]);
      image.data.set([...palette.subarray(3 * value, 3 * value + 3), Math.min(255, 2 * value + 24)], 4 * i);
    }
    context.putImageData(image, 0, 0);
    this.drawn.set(name, canvas.toDataURL());
    return this.drawn.get(name);
  }
  looks(who, head) { return who in this.offsets && this.offsets[who].length >= (head + 1) * 36 * this.rows * this.columns; }
  sampled(who, head, block, row, column) {
    // The nine places (x, y) where the kernel of this cell looks, in pixels; `who` may be 'regular'.
    const n = this.rows * this.columns, offsets = this.offsets[who], first = ((2 * head + 2 - block) * 18) * n + row * this.columns + column;
    return [...Array(9).keys()].map(k => {
      const [dy, dx] = offsets ? [offsets[first + 2 * k * n] / this.unit, offsets[first + (2 * k + 1) * n] / this.unit] : [0, 0];
      return this.pixels(column + k % 3 - 1 + dx + .5, row + Math.floor(k / 3) - 1 + dy + .5);
    });
  }
}

// Where a head of pairs looks: for each triplet of the prediction, then of the truth, places in pixels and their attention

class Looks {
  constructor(graph) {
    this.first = { t: 0, T: graph.triplets.length };
    this.count = graph.triplets.length + (graph.truth ? graph.truth.triplets.length : 0);
    this.sets = Object.entries(graph.sampling || {}).filter(([, view]) => view.byteLength).sort().reverse().map(([who, view]) => [who, numbers(Int16Array, view)]);
  }
  of(key) {
    // [network, [{ x, y, attention, frame }]] of each network that is asked about the pair, the teacher first.
    const row = this.first[key[0]] + Number(key.slice(1));
    return this.sets.map(([who, all]) => {
      const n = all.length / this.count, mine = all.subarray(row * n, (row + 1) * n), points = [];
      for (let i = 0; i < n; i += 3) points.push({ x: mine[i] / 10, y: mine[i + 1] / 10, attention: mine[i + 2] / 1e4, frame: FRAMES[Math.floor(4 * i / n)] });
      return [who, points.filter(point => point.attention >= 0)];
    });
  }
}

// Geometry of edges

const bezier = ([a, m, b], t) => [0, 1].map(k => (1 - t) ** 2 * a[k] + 2 * t * (1 - t) * m[k] + t ** 2 * b[k]);

function curve(from, to, bend) {
  if (from === to) return [from, [from[0] + 90, from[1] - 70], to];
  const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
  return [from, [(from[0] + to[0]) / 2 - bend * dy, (from[1] + to[1]) / 2 + bend * dx], to];
}

function trimmed(points, start, end) {
  // The part of a curve outside of the boxes (half width, half height) round its ends, as path data.
  const inside = (p, centre, half) => Math.abs(p[0] - centre[0]) < half[0] && Math.abs(p[1] - centre[1]) < half[1];
  let [low, high] = [0, 1];
  while (low < .5 && inside(bezier(points, low), points[0], start)) low += .01;
  while (high > .5 && inside(bezier(points, high), points[2], end)) high -= .01;
  const [a, b] = [bezier(points, low), bezier(points, high)];
  const u = (1 - low) * (1 - high), v = low * (1 - high) + high * (1 - low), w = low * high;
  const m = [0, 1].map(k => u * points[0][k] + v * points[1][k] + w * points[2][k]);
  return `M${a.map(x => x.toFixed(1))}Q${m.map(x => x.toFixed(1))} ${b.map(x => x.toFixed(1))}`;
}

const overlap = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));

// The view

class View {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.pinned = new Set(model.get('pinned'));
    this.hover = null;
    this.cursor = null;
    [this.side, this.panel] = [480, [620, 480]];
    this.build();
    this.resized = new ResizeObserver(() => this.resize());
    this.resized.observe(this.root);
    this.listeners = [['change:base', () => this.later('base')], ['change:reading', () => this.later('reading')], ['change:graph', () => this.later('graph')],
      ['change:message', () => this.say()], ['change:busy', () => this.root.classList.toggle('stdg-busy', model.get('busy'))], ['change:pinned', () => { this.pinned = new Set(model.get('pinned')); this.light(); }],
      ...STATE.map(name => [`change:${name}`, () => this.later('state')])];
    for (const [event, callback] of this.listeners) model.on(event, callback);
    this.say();
    this.paint(new Set(['base', 'reading', 'graph']));
  }
  stop() {
    for (const [event, callback] of this.listeners) this.model.off(event, callback);
    cancelAnimationFrame(this.waiting);
    this.resized.disconnect();
  }
  later(what) {
    // Collect what changed until the next frame.
    if (!this.changed) {
      this.changed = new Set();
      this.waiting = requestAnimationFrame(() => { const changed = this.changed; this.changed = null; this.paint(changed); });
    }
    this.changed.add(what);
  }
  state() {
    // Pickers of class and predicate begin with 'any', which is -1 here.
    const state = Object.fromEntries(STATE.map(name => [name, this.model.get(name)]));
    return { ...state, object_class: state.object_class - 1, predicate: state.predicate - 1 };
  }

  build() {
    const id = this.id = `stdg-${Math.random().toString(36).slice(2)}`;
    const arrow = kind => make('marker', { id: `${id}-${kind}`, class: `stdg-arrow stdg-${kind}`, viewBox: '0 0 8 8', refX: 7, refY: 4, markerWidth: 10, markerHeight: 10, markerUnits: 'userSpaceOnUse', orient: 'auto' }, make('path', { d: 'M0 0.6L8 4L0 7.4Z' }));
    this.clip = make('rect');
    this.picture = make('image', { class: 'stdg-picture', preserveAspectRatio: 'none' });
    this.field = make('image', { class: 'stdg-field', preserveAspectRatio: 'none', 'clip-path': `url(#${id}-clip)` });
    this.boxes = make('g', { role: 'group', 'aria-label': 'boxes' });
    this.tags = make('g', { class: 'stdg-tags' });
    this.marks = make('g', { class: 'stdg-marks', 'clip-path': `url(#${id}-clip)` });
    this.imageTitle = make('title');
    this.image = make('svg', { class: 'stdg-image', tabindex: 0, role: 'group' }, this.imageTitle, make('defs', {}, make('clipPath', { id: `${id}-clip` }, this.clip)), this.picture, this.field, this.boxes, this.tags, this.marks);
    this.edges = make('g', { role: 'group', 'aria-label': 'edges' });
    this.nodes = make('g', { role: 'group', 'aria-label': 'nodes' });
    this.graphTitle = make('title');
    this.drawing = make('svg', { class: 'stdg-graph', role: 'group' }, this.graphTitle, make('defs', {}, ...['plain', ...Object.keys(VERDICTS)].map(arrow)), this.edges, this.nodes);
    this.readout = make('figcaption', { class: 'stdg-readout' });
    this.legend = make('figcaption', { class: 'stdg-legend' });
    this.tables = make('div', { class: 'stdg-tables' });
    this.message = make('p', { class: 'stdg-message', role: 'status' });
    this.root.classList.add('stdg-explorer');
    this.root.append(this.message, make('div', { class: 'stdg-panels' }, make('figure', {}, this.image, this.readout), make('figure', {}, this.drawing, this.legend)),
      this.tables, make('p', { class: 'stdg-help' }, KEYS));
    this.image.addEventListener('pointermove', event => this.point(event));
    this.image.addEventListener('pointerleave', () => { this.cursor = null; this.overlay(); });
    this.image.addEventListener('keydown', event => this.walk(event));
    this.root.addEventListener('keydown', event => { if (event.key === 'Escape') { this.pinned.clear(); this.hover = null; this.cursor = null; this.pin(); } });
  }
  resize() {
    // Both drawings are in pixels of the page, so that letters keep their size.
    const [side, width] = [this.image, this.drawing].map(svg => Math.round(svg.getBoundingClientRect().width));
    if (!side || !width || side === this.side && width === this.panel[0]) return;
    [this.side, this.panel, this.frame] = [side, [width, Math.round(width * 480 / 620)], null];
    this.later('base');
  }
  say() {
    this.message.textContent = this.model.get('message');
    this.message.hidden = !this.message.textContent;
  }

  paint(changed) {
    const model = this.model;
    if (changed.has('base')) this.base();
    if (changed.has('reading')) this.reading = new Reading(model.get('reading'));
    if (changed.has('reading')) this.palette = bytes(model.get('palette'));
    if (this.graph !== model.get('graph')) this.looks = new Looks(model.get('graph'));
    this.graph = model.get('graph');
    const focused = this.root.contains(document.activeElement) ? document.activeElement : null;
    const [key, part] = [focused?.dataset?.key, focused?.dataset?.part];
    this.chosen = choose(this.graph, this.reading, this.state());
    this.byKey = new Map([...this.chosen.objects, ...this.chosen.triplets, ...(this.chosen.rows.truth || [])].map(item => [item.key, item]));
    this.drawBoxes();
    this.drawGraph();
    this.drawTables();
    this.describe();
    if (key) [...this.root.querySelectorAll('[data-key]')].find(e => e.dataset.key === key && e.dataset.part === part)?.focus();
    this.light();
    this.root.dataset.painted = 1 + Number(this.root.dataset.painted || 0);
  }
  base() {
    const base = this.size = this.model.get('base'), unit = this.unit = this.side / Math.max(base.width, base.height);
    const [w, h] = [base.width * unit, base.height * unit];
    this.image.setAttribute('viewBox', `0 0 ${w} ${h}`);
    for (const part of [this.clip, this.picture]) { part.setAttribute('width', w); part.setAttribute('height', h); }
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(new Blob([bytes(base.png)], { type: 'image/png' }));
    this.picture.setAttribute('href', this.url);
    this.values = base.values ? numbers(Uint16Array, base.values) : null;
  }

  // One element of an object or a triplet: hovering lights it, clicking pins it, and the keyboard reaches it
  item(element, part, key, label, first) {
    Object.assign(element.dataset, { key, part });
    for (const [name, value] of Object.entries({ tabindex: first ? 0 : -1, role: 'button', 'aria-label': label })) element.setAttribute(name, value);
    element.addEventListener('pointerenter', () => { this.hover = key; this.light(); });
    element.addEventListener('pointerleave', () => { this.hover = null; this.light(); });
    element.addEventListener('focus', () => { this.hover = key; this.light(); });
    element.addEventListener('blur', () => { this.hover = null; this.light(); });
    element.addEventListener('click', () => this.pin(key));
    element.addEventListener('keydown', event => this.key(event, part, key));
    return element;
  }
  name(o) { return o.title + (o.score === undefined ? '' : ` ${share(o.score)}`) + (o.verdict ? `, ${VERDICTS[o.verdict][1]}` : ''); }
  sentence(t) {
    const [s, o] = [t.s, t.o].map(key => this.byKey.get(key).title);
    return `${s} ${this.reading.predicates[t.p]} ${o}` + (t.score === undefined ? '' : ` ${share(t.score)}`) + (t.verdict ? `, ${VERDICTS[t.verdict][1]}` : '');
  }
  kind(item) { return `stdg-${item.verdict || 'plain'}`; }

  drawBoxes() {
    // Small boxes are named first, since they have the least choice, and lie on top.
    const taken = [], area = b => (b[2] - b[0]) * (b[3] - b[1]), u = this.unit, [width, height] = [this.size.width * u, this.size.height * u];
    const order = [...this.chosen.objects].sort((a, b) => area(a.box) - area(b.box)), boxes = [], tags = [];
    for (const o of order) {
      const [x1, y1, x2, y2] = o.box.map(v => v * u), w = 6.4 * (o.title.length + (o.verdict ? 2 : 0)) + 10;
      const places = [[x1, y1 - 15], [x1, y1], [x2 - w, y1], [x1, y2 - 15], [x1, y2], [x2 - w, y2 - 15]].map(([x, y]) => [Math.min(Math.max(x, 0), width - w), Math.min(Math.max(y, 0), height - 15)]);
      const costs = places.map(([x, y]) => taken.reduce((sum, other) => sum + overlap([x, y, x + w, y + 15], other), 0));
      const least = Math.min(...costs), [x, y] = places[costs.indexOf(least)], crowded = least > 3 * w;
      if (!crowded) taken.push([x, y, x + w, y + 15]);
      const rect = kind => make('rect', { class: kind, x: x1, y: y1, width: Math.max(x2 - x1, 1), height: Math.max(y2 - y1, 1) });
      const look = { class: this.kind(o), style: `--class:${o.colour}` };
      boxes.push([o, make('g', { ...look, class: `stdg-box ${look.class}` }, make('title', {}, o.full + (o.score === undefined ? '' : ` ${share(o.score)}`)), rect('stdg-halo'), rect('stdg-line'))]);
      tags.push(make('g', { ...look, class: `stdg-tag ${look.class}` + (crowded ? ' stdg-crowded' : ''), 'aria-hidden': true, 'data-key': o.key },
        make('rect', { x, y, width: w, height: 15, rx: 2 }), make('text', { x: x + w / 2, y: y + 11, 'text-anchor': 'middle' }, (o.verdict ? VERDICTS[o.verdict][0] + ' ' : '') + o.title)));
    }
    this.boxes.replaceChildren(...boxes.reverse().map(([o, group], i) => this.item(group, 'box', o.key, this.name(o), !i)));
    this.tags.replaceChildren(...tags.reverse());
  }
  drawGraph() {
    const g = this.graph, used = new Set(this.chosen.triplets.flatMap(t => [t.s, t.o])), nodes = this.chosen.objects.filter(o => used.has(o.key));
    const half = o => [g.widths[o.node] / 2, HEIGHT / 2];
    this.frameGraph(nodes.map(o => [g.places[o.node], half(o)]));
    this.edges.replaceChildren(...this.chosen.triplets.map((t, i) => this.edge(t, half, !i)));
    this.nodes.replaceChildren(...nodes.map((o, i) => this.node(o, half(o), !i)));
    this.drawing.setAttribute('aria-label', `graph of ${nodes.length} objects and ${this.chosen.triplets.length} relations`);
    this.graphTitle.textContent = '';
  }
  frameGraph(places) {
    // The part of the drawing that is seen: what it was, as long as all nodes are in it.
    const edges = [0, 1].map(k => [Math.min(...places.map(([p, half]) => p[k] - half[k])) - 14, Math.max(...places.map(([p, half]) => p[k] + half[k])) + 14]);
    const inside = this.frame && this.framed === this.graph && edges.every(([low, high], k) => low >= this.frame[k] && high <= this.frame[k] + this.frame[k + 2]);
    if (!places.length || inside) { if (!this.frame) this.frame = [-this.panel[0] / 2, -this.panel[1] / 2, ...this.panel]; } else {
      const zoom = Math.max(1, ...edges.map(([low, high], k) => (high - low) / this.panel[k])), size = this.panel.map(v => v * zoom);
      this.frame = [...edges.map(([low, high], k) => (low + high - size[k]) / 2), ...size];
    }
    this.framed = this.graph;
    this.drawing.setAttribute('viewBox', this.frame.join(' '));
  }
  node(o, [a, b], first) {
    const [x, y] = this.graph.places[o.node], text = make('text', { x, y: y + 4, 'text-anchor': 'middle' }, (o.verdict ? VERDICTS[o.verdict][0] + ' ' : '') + o.title);
    if (o.title.length * 11 > 2 * a) { text.setAttribute('textLength', Math.min(2 * a - 12, o.title.length * 7 + (o.verdict ? 13 : 0))); text.setAttribute('lengthAdjust', 'spacingAndGlyphs'); }
    const group = make('g', { class: `stdg-node ${this.kind(o)}`, style: `--class:${o.colour}` }, make('title', {}, o.full), make('rect', { x: x - a, y: y - b, width: 2 * a, height: 2 * b, rx: 5 }), text);
    return this.item(group, 'node', o.key, this.name(o), first);
  }
  edge(t, half, first) {
    const [s, o] = [this.byKey.get(t.s), this.byKey.get(t.o)], [from, to] = [this.graph.places[s.node], this.graph.places[o.node]];
    const points = curve(from, to, t.bend), path = trimmed(points, half(s), half(o)), [x, y] = bezier(points, t.at), name = this.reading.predicates[t.p], w = 6.1 * name.length + 8;
    const group = make('g', { class: `stdg-edge ${this.kind(t)}` }, make('title', {}, this.sentence(t)), make('path', { class: 'stdg-wide', d: path }),
      make('path', { class: 'stdg-line', d: path, 'marker-end': `url(#${this.id}-${t.verdict || 'plain'})` }),
      make('rect', { x: x - w / 2, y: y - 8, width: w, height: 16, rx: 3 }), make('text', { x, y: y + 4, 'text-anchor': 'middle' }, name));
    return this.item(group, 'edge', t.key, this.sentence(t), first);
  }
  drawTables() {
    const head = { prediction: 'Prediction', truth: 'Truth' };
    this.tables.replaceChildren(...Object.entries(this.chosen.rows).filter(([, rows]) => rows).map(([who, rows]) => {
      const body = make('tbody', {}, ...rows.map((t, i) => this.row(t, who, i)));
      const shares = who === 'prediction' ? this.precision() : '';
      const caption = make('caption', {}, `${head[who]}: ${rows.length} ${rows.length === 1 ? 'triplet' : 'triplets'}`, ...(shares ? [make('span', { class: 'stdg-precision', title: 'of the surest triplets of this picture, how many are true' }, shares)] : []));
      return make('div', { class: 'stdg-table' }, make('table', {}, caption, body));
    }));
  }
  precision() { return (this.graph.precision || []).map((part, i) => `P@${SUREST[i]} ${(100 * part).toFixed(0)} %`).join(', '); }
  row(t, who, i) {
    const [s, o] = [t.s, t.o].map(key => this.byKey.get(key).title), cell = (kind, ...content) => make('td', { class: kind }, ...content);
    const row = make('tr', { class: this.kind(t) }, cell('stdg-rank', String(i + 1)), cell('', s), cell('stdg-predicate', this.reading.predicates[t.p]), cell('', o));
    if (who === 'prediction') row.append(cell('stdg-score', make('span', { class: 'stdg-bar', style: `width:${(40 * t.score).toFixed(1)}px` }), share(t.score)));
    if (!t.verdict && who === 'prediction' && this.graph.dense) row.append(cell(`stdg-judged stdg-${t.holds}`, TRUE[t.holds].join(' ')));
    if (t.verdict) row.append(cell('stdg-verdict', `${VERDICTS[t.verdict][0]} ${VERDICTS[t.verdict][1]}`));
    return this.item(row, `row ${who}`, t.key, this.sentence(t), !i);
  }
  describe() {
    const { objects, triplets } = this.chosen, base = this.size, what = ['predicted', 'true', 'true and predicted'][this.chosen.mode];
    const list = (items, text) => items.slice(0, 12).map(text).join('; ') + (items.length > 12 ? '; and more' : '');
    this.imageTitle.textContent = `${base.layer} of ${base.name}`;
    this.image.setAttribute('aria-label', `${base.layer} of ${base.name} with ${objects.length} ${what} boxes: ${list(objects, o => this.name(o))}. ${triplets.length} relations: ${list(triplets, t => this.sentence(t))}`);
    const kinds = this.chosen.mode === BOTH ? Object.keys(VERDICTS).filter(kind => kind !== 'unannotated' || this.graph.dense) : [];
    this.legend.replaceChildren(...kinds.map(kind => make('span', { class: `stdg-key stdg-${kind}` }, make('svg', { viewBox: '0 0 30 8', 'aria-hidden': true }, make('line', { x1: 0, y1: 4, x2: 30, y2: 4 })), `${VERDICTS[kind][0]} ${VERDICTS[kind][1]}`)));
  }

  // Hovering and pinning

  pin(key) {
    if (key) this.pinned.has(key) ? this.pinned.delete(key) : this.pinned.add(key);
    this.model.set('pinned', [...this.pinned]);
    this.model.save_changes();
    this.light();
  }
  around(key) {
    // The keys that belong to `key`, itself among them.
    const item = this.byKey.get(key), all = [...this.chosen.triplets, ...(this.chosen.rows.truth || [])];
    if (!item) return [];
    if ('p' in item) return [key, item.s, item.o, item.twin, ...all.filter(t => t.twin === key).map(t => t.key)];
    return [key, ...all.filter(t => t.s === key || t.o === key).map(t => t.key)];
  }
  light() {
    const pins = [...this.pinned].filter(key => this.byKey.has(key)), centre = this.hover && this.byKey.has(this.hover) ? [this.hover] : pins;
    const lit = new Set(centre.flatMap(key => this.around(key))), near = new Set([...lit].flatMap(key => { const t = this.byKey.get(key); return t && 'p' in t ? [t.s, t.o] : []; }));
    for (const element of this.root.querySelectorAll('[data-key]')) {
      const key = element.dataset.key;
      element.classList.toggle('stdg-lit', lit.has(key));
      element.classList.toggle('stdg-dim', lit.size > 0 && !lit.has(key) && !near.has(key));
      element.classList.toggle('stdg-pinned', this.pinned.has(key));
      if (element.dataset.part) element.setAttribute('aria-pressed', this.pinned.has(key));
    }
    this.focus = centre.length ? this.byKey.get(centre[centre.length - 1]) : null;
    this.overlay();
  }

  // What lies over the picture: the field of what is lit or chosen, votes, sampling points

  overlay() {
    const state = this.state(), reading = this.reading, item = this.focus, marks = [];
    let field = null;
    const pair = item && 'p' in item && reading.pairs;
    if (pair) marks.push(...this.pairMarks(item));
    else if (item && 'p' in item) { field = ['confidence', item.p]; marks.push(...this.voteMarks(this.graph.lines ? this.onLine(item) : v => this.belongs(v, item))); }
    else if (item) field = ['heat', item.c];
    else if (state.overlay === 1) field = ['heat', state.object_class];
    else if (state.overlay === 3 && !reading.pairs) field = ['confidence', state.predicate];
    else if (state.overlay === 4) marks.push(...this.voteMarks(v => state.predicate < 0 || v[0] === state.predicate));
    if (state.overlay === 2 && !pair) marks.push(...this.pointMarks(reading.pairs ? state.head % 2 : state.head));
    this.image.classList.toggle('stdg-sampling', state.overlay === 2);
    this.field.style.display = field ? '' : 'none';
    this.picture.classList.toggle('stdg-faded', !!field);
    this.picture.classList.toggle('stdg-paled', !!pair);
    if (field) {
      const [x, y] = reading.pixels(0, 0), [x2, y2] = reading.pixels(reading.columns, reading.rows), u = this.unit;
      for (const [name, value] of Object.entries({ x: x * u, y: y * u, width: (x2 - x) * u, height: (y2 - y) * u, href: reading.field(...field, this.palette) })) this.field.setAttribute(name, value);
    }
    this.marks.replaceChildren(...marks);
    this.tell(field, pair);
  }
  belongs(vote, t) {
    const inside = (x, y, b) => x >= b[0] && x <= b[2] && y >= b[1] && y <= b[3];
    return vote[0] === t.p && inside(vote[4], vote[5], this.byKey.get(t.s).box) && inside(vote[6], vote[7], this.byKey.get(t.o).box);
  }
  onLine(t) {
    // Whether a confident cell lies where a reading by lines looks for the triplet.
    const r = this.reading, line = r.line(...[t.s, t.o].map(key => this.byKey.get(key).box));
    return vote => { const [row, column] = r.cell(vote[2], vote[3]); return vote[0] === t.p && line.has(row * r.columns + column); };
  }
  voteMarks(wanted) {
    const marks = [], all = this.reading.votes, u = this.unit;
    for (let i = 0; i < all.length && marks.length < 150; i += 8) {
      const vote = all.subarray(i, i + 8);
      if (!wanted(vote)) continue;
      const [cx, cy, sx, sy, ox, oy] = [...vote.subarray(2)].map(v => v * u);
      marks.push(make('g', { class: 'stdg-vote', opacity: .25 + .75 * vote[1] }, make('line', { class: 'stdg-subject', x1: cx, y1: cy, x2: sx, y2: sy }), make('line', { class: 'stdg-object', x1: cx, y1: cy, x2: ox, y2: oy }),
        make('circle', { class: 'stdg-subject', cx: sx, cy: sy, r: 3.4 }), make('rect', { class: 'stdg-object', x: ox - 3, y: oy - 3, width: 6, height: 6 }), make('circle', { class: 'stdg-cell', cx, cy, r: 1.6 })));
    }
    return marks;
  }
  pointMarks(head) {
    const r = this.reading, u = this.unit, [row, column] = this.cursor ? r.cell(...this.cursor) : [r.rows, r.columns].map(n => n >> 1), args = [head >> 1, 1 + head % 2];
    if (row < 0 || column < 0 || row >= r.rows || column >= r.columns) return [];
    const place = who => r.sampled(who, ...args, row, column).map(([x, y]) => [x * u, y * u]), regular = place('regular');
    const [ax, ay] = r.pixels(column, row).map(v => v * u), size = [0, 1].map(k => r.stride / r.scale[k] * u), marks = [make('rect', { class: 'stdg-at', x: ax, y: ay, width: size[0], height: size[1] })];
    marks.push(...regular.map(([cx, cy]) => make('circle', { class: 'stdg-regular', cx, cy, r: 2 })));
    const sets = ['teacher', 'student'].filter(who => r.looks(who, args[0])).map(who => [who, place(who)]);
    if (sets.length === 2) sets[0][1].forEach(([x1, y1], k) => marks.push(make('line', { class: 'stdg-apart', x1, y1, x2: sets[1][1][k][0], y2: sets[1][1][k][1] })));
    for (const [who, points] of sets) for (const [x, y] of points)
      marks.push(who === 'teacher' ? make('path', { class: 'stdg-teacher', d: `M${x} ${y - 5}l5 5l-5 5l-5 -5Z` }) : make('circle', { class: 'stdg-student', cx: x, cy: y, r: 3.6 }));
    this.apart = sets.length === 2 ? sets[0][1].reduce((sum, p, k) => sum + Math.hypot((p[0] - sets[1][1][k][0]) / size[0], (p[1] - sets[1][1][k][1]) / size[1]), 0) / 9 : null;
    return marks;
  }
  pairMarks(t) {
    // Where student and teacher look for a pair: the colour is the frame, the area the attention.
    const u = this.unit, r = this.reading, sets = this.looks.of(t.key);
    const marks = [t.s, t.o].map((key, i) => { const [x, y, x2, y2] = this.byKey.get(key).box.map(v => v * u); return make('rect', { class: `stdg-asked stdg-of-${FRAMES[i]}`, x, y, width: Math.max(x2 - x, 1), height: Math.max(y2 - y, 1) }); });
    const pairs = sets.length === 2 ? sets[0][1].map((point, i) => [point, sets[1][1][i]]) : [];
    marks.push(...pairs.map(([a, b]) => make('line', { class: 'stdg-apart', x1: a.x * u, y1: a.y * u, x2: b.x * u, y2: b.y * u, opacity: .1 + .7 * a.attention })));
    for (const [who, points] of sets) for (const { x, y, attention, frame } of points) {
      const [cx, cy, size] = [x * u, y * u, Math.max(1.8, 8 * Math.sqrt(attention))], more = { class: `stdg-look stdg-${who} stdg-of-${frame}`, 'data-attention': attention };
      marks.push(who === 'teacher' ? make('path', { ...more, d: `M${cx} ${cy - size}l${size} ${size}l${-size} ${size}l${-size} ${-size}Z` }) : make('circle', { ...more, cx, cy, r: .85 * size }));
    }
    const far = ([a, b]) => Math.hypot((a.x - b.x) * r.scale[0], (a.y - b.y) * r.scale[1]) / r.stride, weight = pairs.reduce((sum, [a]) => sum + a.attention, 0);
    this.apart = weight ? pairs.reduce((sum, pair) => sum + pair[0].attention * far(pair), 0) / weight : null;
    return marks;
  }
  tell(field, pair) {
    // The line below the picture.
    const base = this.size, r = this.reading, said = [], state = this.state(), [row, column] = this.cursor ? r.cell(...this.cursor) : [-1, -1];
    if (this.cursor) {
      const [x, y] = this.cursor.map(Math.floor), raw = this.values?.[y * base.width + x];
      const value = raw === 65535 || raw === undefined ? 'unknown' : `${(base.low + base.step * raw).toFixed(base.digits)} ${base.unit}`;
      said.push(`x ${x}, y ${y}` + (this.values ? `: ${base.layer} ${value}` : ''));
    }
    if (field) {
      const [kind, index] = field, names = kind === 'heat' ? r.objects : r.predicates, here = row >= 0 && column >= 0 && row < r.rows && column < r.columns;
      const name = index >= 0 ? names[index] : kind === 'heat' ? 'all classes' : 'all predicates';
      said.push(`${kind === 'heat' ? 'heat-map' : 'confidence'} of ${name}` + (here && index >= 0 ? `: ${share(r[kind][(index * r.rows + row) * r.columns + column] / 255)}` : ''));
    } else if (state.overlay === 4 && !r.pairs) said.push('each confident cell points at its subject (round) and its object (square)');
    if (state.overlay === 2 || pair) {
      const there = pair ? this.looks.sets.map(([who]) => who) : Object.keys(r.offsets);
      const looking = [['student', '●'], ['teacher', '◆']].filter(([who]) => there.includes(who)).map(([who, mark]) => `${mark} ${who}`).join(', ');
      said.push(looking + (this.apart == null ? '' : `: ${this.apart.toFixed(2)} cells apart`));
    }
    this.readout.textContent = said.length ? said.join(' · ') : `${base.layer} of ${base.name}`;
    if (pair) this.readout.append(' · looks at ', ...FRAMES.map(frame => make('span', { class: `stdg-frame stdg-of-${frame}` }, frame)));
  }
  point(event) {
    const box = this.image.getBoundingClientRect(), base = this.size, k = Math.max(base.width / box.width, base.height / box.height);
    const x = (event.clientX - box.left - (box.width - base.width / k) / 2) * k, y = (event.clientY - box.top - (box.height - base.height / k) / 2) * k;
    this.cursor = x >= 0 && y >= 0 && x < base.width && y < base.height ? [x, y] : null;
    this.overlay();
  }

  // Keyboard

  walk(event) {
    // Arrows on the picture move the place that is pointed at, by a cell.
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.target !== this.image || !step) return;
    event.preventDefault();
    const base = this.size, [x, y] = this.cursor || [base.width / 2, base.height / 2], pace = [0, 1].map(k => this.reading.stride / this.reading.scale[k]);
    this.cursor = [Math.min(Math.max(x + step[0] * pace[0], 0), base.width - 1), Math.min(Math.max(y + step[1] * pace[1], 0), base.height - 1)];
    this.overlay();
  }
  key(event, part, key) {
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); event.stopPropagation(); this.pin(key); return; }
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault(); event.stopPropagation();
    const all = [...this.root.querySelectorAll('[data-key]')].filter(e => e.dataset.part === part), here = all.findIndex(e => e.dataset.key === key);
    const next = part === 'node' ? this.towards(all, here, step) : all[Math.min(Math.max(here + step[0] + step[1], 0), all.length - 1)];
    for (const element of all) element.setAttribute('tabindex', element === next ? 0 : -1);
    next.focus();
  }
  towards(all, here, step) {
    // The node nearest in the direction of an arrow.
    const places = all.map(e => this.graph.places[this.byKey.get(e.dataset.key).node]), costs = places.map(p => {
      const d = [p[0] - places[here][0], p[1] - places[here][1]], along = d[0] * step[0] + d[1] * step[1], aside = Math.abs(d[0] * step[1]) + Math.abs(d[1] * step[0]);
      return along > 1 ? along + 2 * aside : Infinity;
    });
    const least = Math.min(...costs);
    return least < Infinity ? all[costs.indexOf(least)] : all[here];
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.stop();
  },
};
