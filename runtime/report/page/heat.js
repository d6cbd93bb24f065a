// Heat maps: layer x step, and layer x expert.

const STOPS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];

function mixed(stops, t) {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((v, k) => Math.round(v + (stops[i + 1][k] - v) * (at - i)));
}

function cssColor(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// Below its part an expert is blue, above it red; a value of 1 is the colour of the ground.
function diverging() {
  return [[33, 102, 172], [103, 169, 207], cssColor("--neutral"), [239, 138, 98], [178, 24, 43]];
}

class HeatMap {
  // spec: id, title, rows (labels), columns, value(r, c), color(v), stops, ends, tip(r, c), left, ticks: [[column, label]]
  constructor(spec, tools) {
    this.spec = spec;
    this.canvas = element("canvas", { role: "img", "aria-label": spec.title });
    this.tip = element("div", { class: "tip" });
    this.scaleBar = element("div", { class: "scale" });
    this.figure = element("figure", { "data-heat": spec.id },
      element("figcaption", {}, element("h3", {}, spec.title), element("span", { class: "muted" }, spec.note || ""), tools), this.canvas, this.scaleBar, this.tip);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => (this.tip.style.visibility = "hidden"));
  }

  draw() {
    const { rows, columns } = this.spec;
    const width = Math.max(this.figure.clientWidth - 24, 200);
    const cell = Math.min(Math.max(Math.floor(360 / rows.length), 5), 26);
    this.box = { left: 40, top: 2, width: width - 44, height: rows.length * cell, cell };
    const height = this.box.height + 22;
    const ratio = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    this.canvas.style.height = height + "px";
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.drawImage(this.image(), this.box.left, this.box.top, this.box.width, this.box.height);
    this.labels(pen, width, cell);
    const colors = [0, 0.25, 0.5, 0.75, 1].map((t) => `rgb(${mixed(this.spec.stops, t)})`);
    this.scaleBar.replaceChildren(this.spec.ends[0], element("i", { style: `background: linear-gradient(90deg, ${colors})` }), this.spec.ends[1]);
    this.figure.dataset.cells = this.count;
    this.figure.dataset.rows = rows.length;
    this.figure.dataset.columns = columns;
  }

  // One pixel a cell: the browser enlarges it.
  image() {
    const { rows, columns, value, color } = this.spec;
    const small = element("canvas", {});
    Object.assign(small, { width: columns, height: rows.length });
    const pen = small.getContext("2d");
    const pixels = pen.createImageData(columns, rows.length);
    this.count = 0;
    for (let r = 0; r < rows.length; r++) {
      for (let c = 0; c < columns; c++) {
        const v = value(r, c);
        if (v === null || v === undefined) continue;
        this.count++;
        pixels.data.set([...color(v), 255], 4 * (r * columns + c));
      }
    }
    pen.putImageData(pixels, 0, 0);
    this.canvas.getContext("2d").imageSmoothingEnabled = false;
    return small;
  }

  labels(pen, width, cell) {
    pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--muted");
    pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    pen.textAlign = "right";
    const every = Math.ceil(12 / cell);
    this.spec.rows.forEach((label, r) => {
      if (r % every === 0) pen.fillText(label, this.box.left - 5, this.box.top + (r + 0.5) * cell + 4);
    });
    pen.textAlign = "center";
    let last = -Infinity;
    for (const [column, label] of this.spec.ticks) {
      const x = this.box.left + ((column + 0.5) / this.spec.columns) * this.box.width;
      const half = pen.measureText(label).width / 2 + 6;
      if (x - half < last) continue;
      last = x + half;
      pen.fillText(label, Math.min(x, width - half), this.box.top + this.box.height + 15);
    }
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const c = Math.floor(((x - this.box.left) / this.box.width) * this.spec.columns);
    const r = Math.floor((y - this.box.top) / this.box.cell);
    if (c < 0 || c >= this.spec.columns || r < 0 || r >= this.spec.rows.length) {
      this.tip.style.visibility = "hidden";
      return;
    }
    this.tip.replaceChildren(...this.spec.tip(r, c).map((line) => element("div", {}, line)));
    placeTip(this.tip, this.figure, x + 12, y + 30);
  }
}

const QUANTITIES = {
  load_max_over_mean: { text: "load, max / mean", low: () => 1, high: (m) => Math.max(m, 1.5), log: true, part: "worst of these steps" },
  router_entropy: { text: "router entropy (nats)", low: () => 0, high: (m, e) => (e ? Math.log(e) : m), part: "mean of these steps" },
  dropped_share: { text: "dropped share", low: () => 0, high: (m) => Math.max(m, 0.01), part: "mean of these steps", unit: "%" },
};

function layerMap(run, index, quantity, tools) {
  const heat = run.heat;
  const q = QUANTITIES[quantity];
  const table = heat[quantity];
  const most = table.reduce((m, row) => row.reduce((a, v) => (v === null ? a : Math.max(a, v)), m), -Infinity);
  const [low, high] = [q.low(), q.high(most, run.summary.experts)];
  const f = q.log ? Math.log : (v) => v;
  const steps = heat.from.map((from, c) => (from === heat.to[c] ? "step " + exact(from) : `steps ${exact(from)} to ${exact(heat.to[c])}`));
  return new HeatMap({
    id: `layers-${index}`, title: run.name + ": layer × step", note: q.text, rows: heat.layers, columns: heat.from.length,
    value: (r, c) => table[r][c], color: (v) => mixed(STOPS, (f(v) - f(low)) / (f(high) - f(low) || 1)), stops: STOPS,
    ends: [exact(low, q.unit), exact(Number(high.toPrecision(4)), q.unit)],
    tip: (r, c) => [steps[c], `layer ${heat.layers[r]}: ${exact(table[r][c], q.unit)}`, q.part],
    ticks: ticks(heat.from[0], heat.to.at(-1), 8).filter((v) => v % 1 === 0).map((v) => [nearest(heat.to, v), amount(v)]),
  }, tools);
}

function expertMap(run, index) {
  const { layers, share, iteration } = run.experts;
  const dead = new Set(run.dead.map(([layer, expert]) => layer + ":" + expert));
  const stops = diverging();
  const number = share[0].length;
  // log2 of the share: half of its part is as far from 1 as twice its part.
  const color = (v) => mixed(stops, v > 0 ? 0.5 + Math.log2(v) / 6 : 0);
  const every = Math.max(1, Math.ceil(number / 16));
  return new HeatMap({
    id: `experts-${index}`, title: "layer × expert", note: `share of each expert, step ${exact(iteration)}`, rows: layers, columns: number,
    value: (r, c) => share[r][c], color, stops, ends: ["1/8 or less", "8 times its part"],
    tip: (r, c) => [`layer ${layers[r]}, expert ${c}`, `${exact(share[r][c])} of its part`, ...(dead.has(layers[r] + ":" + c) ? ["dead: no token for long"] : [])],
    ticks: [...Array(number).keys()].filter((e) => e % every === 0).map((e) => [e, String(e)]),
  });
}
