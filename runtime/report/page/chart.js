// A line chart of several runs: hover tells values, dragging zooms all charts, a double click goes back.

const MARGIN = { left: 52, right: 12, top: 8, bottom: 22 };
const HEIGHT = 220;
const AXES = [
  { name: "step", text: (v) => "step " + exact(Math.round(v)) },
  { name: "tokens", text: (v) => amount(v, 4) + " tokens" },
  { name: "hours", text: (v) => duration(v) },
];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

function smoothed(values, weight) {
  let mean = 0;
  let norm = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

class LineChart {
  // spec: id, title, unit, log, note, series: [{run, label, color, dash, columns}], references: [{value, label}]
  constructor(spec, state, changed) {
    Object.assign(this, { spec, state, changed, log: Boolean(spec.log) });
    this.toggle = element("button", { type: "button", title: "logarithmic scale", onclick: () => this.switchLog() }, "log");
    const caption = element("figcaption", {}, element("h3", {}, spec.title), element("span", { class: "muted" }, spec.note || ""), this.legend(), this.toggle);
    this.tip = element("div", { class: "tip" });
    this.svg = shape("svg", { class: "plot", height: HEIGHT, role: "img", "aria-label": spec.title });
    this.figure = element("figure", { "data-chart": spec.id }, caption, this.svg, this.tip);
    this.svg.addEventListener("mousemove", (event) => this.hover(event));
    this.svg.addEventListener("mouseleave", () => this.leave());
    this.svg.addEventListener("mousedown", (event) => this.begin(event));
    this.svg.addEventListener("dblclick", () => this.changed({ range: null }));
  }

  // Colours are the runs'; where a run has several lines, their dashes are told here.
  legend() {
    const names = new Map(this.spec.series.filter((s) => s.part).map((s) => [s.part, s.dash]));
    if (names.size < 2) return null;
    return element("span", { class: "legend" }, ...[...names].map(([name, dash]) => {
      const sample = shape("svg", { viewBox: "0 0 22 8" });
      sample.append(shape("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 1.6, "stroke-dasharray": DASHES[dash % DASHES.length] }));
      return element("span", {}, sample, " " + name);
    }));
  }

  switchLog() {
    this.log = !this.log;
    this.draw();
  }

  visible() {
    return this.spec.series.filter((s) => !this.state.hidden.has(s.run) && s.columns[0].length);
  }

  // The points of a series inside the zoom, with a neighbour on both sides.
  points(series) {
    const xs = series.columns[this.state.axis];
    const ys = series.columns[3];
    const range = this.state.range;
    let from = 0;
    let to = xs.length;
    if (range) {
      while (from < xs.length && xs[from] < range[0]) from++;
      while (to > from && xs[to - 1] > range[1]) to--;
    }
    return { xs, ys, from: Math.max(from - (range ? 1 : 0), 0), to: Math.min(to + (range ? 1 : 0), xs.length), inner: [from, to] };
  }

  domains(parts) {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { xs, ys, inner } of parts) {
      for (let i = inner[0]; i < inner[1]; i++) {
        x0 = Math.min(x0, xs[i]);
        x1 = Math.max(x1, xs[i]);
        if (this.log && ys[i] <= 0) continue;
        y0 = Math.min(y0, ys[i]);
        y1 = Math.max(y1, ys[i]);
      }
    }
    for (const { value } of this.spec.references || []) {
      // A reference far away would squeeze the curves.
      if (value <= y1 + (y1 - y0) && value >= y0 - (y1 - y0)) [y0, y1] = [Math.min(y0, value), Math.max(y1, value)];
    }
    if (this.state.range) [x0, x1] = this.state.range;
    if (this.spec.zero && !this.log) y0 = Math.min(y0, 0);
    if (!isFinite(y0)) [y0, y1] = this.log ? [0.1, 1] : [0, 1];
    const pad = this.log ? 0 : (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    const factor = this.log ? Math.max((y1 / y0) ** 0.05, 1.02) : 1;
    const floor = this.spec.zero && y0 === 0 ? 0 : pad;
    return { x: [x0, x1], y: this.log ? [y0 / factor, y1 * factor] : [y0 - floor, y1 + pad] };
  }

  draw() {
    this.toggle.setAttribute("aria-pressed", this.log);
    const width = Math.max(this.figure.clientWidth - 24, 200);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren();
    this.series = this.visible().map((s) => Object.assign({ source: s }, this.points(s)));
    const count = this.series.reduce((sum, s) => sum + s.inner[1] - s.inner[0], 0);
    this.figure.dataset.points = count;
    if (!count) {
      this.svg.append(shape("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no points"));
      this.x = null;
      return;
    }
    const domains = this.domains(this.series);
    this.box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
    this.x = scale(domains.x, [this.box.left, this.box.right], false);
    this.y = scale(domains.y, [this.box.bottom, this.box.top], this.log);
    this.drawAxes(domains);
    const clip = "clip-" + this.spec.id;
    const area = shape("clipPath", { id: clip });
    area.append(shape("rect", { x: this.box.left - 4, y: 0, width: this.box.right - this.box.left + 8, height: this.box.bottom + 2 }));
    const group = shape("g", { "clip-path": `url(#${clip})` });
    this.svg.append(area, group);
    for (const part of this.series) this.drawLine(group, part);
    this.cross = shape("line", { class: "cross", y1: this.box.top, y2: this.box.bottom, visibility: "hidden" });
    this.band = shape("rect", { class: "select", y: this.box.top, height: this.box.bottom - this.box.top, visibility: "hidden" });
    this.dots = shape("g", {});
    this.svg.append(this.band, this.cross, this.dots);
  }

  drawAxes(domains) {
    const { left, right, top, bottom } = this.box;
    for (const value of this.log ? logTicks(...domains.y) : ticks(...domains.y, 5)) {
      const y = this.y(value);
      if (y < top - 1 || y > bottom + 1) continue;
      this.svg.append(shape("line", { class: "grid-line", x1: left, x2: right, y1: y, y2: y }));
      const text = this.spec.unit === "%" ? trimmed((100 * value).toPrecision(3)) + "%" : amount(value);
      this.svg.append(shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, text));
    }
    const label = this.state.axis === 2 ? (v) => trimmed(v.toPrecision(3)) + " h" : (v) => amount(v);
    for (const value of ticks(...domains.x, Math.max(2, Math.floor((right - left) / 90)))) {
      const x = this.x(value);
      if (this.state.axis === 0 && value % 1) continue;
      this.svg.append(shape("line", { class: "axis-line", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      this.svg.append(shape("text", { x, y: bottom + 16, "text-anchor": "middle" }, label(value)));
    }
    this.svg.append(shape("line", { class: "axis-line", x1: left, x2: right, y1: bottom, y2: bottom }));
    for (const { value, label: text } of this.spec.references || []) {
      const y = this.y(value);
      if (!(y >= top && y <= bottom)) continue;
      this.svg.append(shape("line", { class: "reference", x1: left, x2: right, y1: y, y2: y }));
      this.svg.append(shape("text", { x: right, y: y - 4, "text-anchor": "end" }, text));
    }
  }

  path(part, ys) {
    let text = "";
    let pen = "M";
    for (let i = part.from; i < part.to; i++) {
      if (this.log && ys[i] <= 0) {
        pen = "M";
        continue;
      }
      text += pen + this.x(part.xs[i]).toFixed(1) + " " + this.y(ys[i]).toFixed(1);
      pen = "L";
    }
    return text;
  }

  drawLine(group, part) {
    const { color, dash } = part.source;
    const style = { stroke: `var(--run-${color})`, "stroke-dasharray": DASHES[dash % DASHES.length] };
    const smooth = this.state.smooth > 0 && part.ys.length > 3;
    const raw = shape("path", { class: smooth ? "line raw" : "line", d: this.path(part, part.ys), ...style });
    group.append(raw);
    if (smooth) group.append(shape("path", { class: "line", d: this.path(part, smoothed(part.ys, this.state.smooth)), ...style }));
    if (part.inner[1] - part.inner[0] > 40) return;
    for (let i = part.inner[0]; i < part.inner[1]; i++) {
      if (this.log && part.ys[i] <= 0) continue;
      group.append(shape("circle", { cx: this.x(part.xs[i]), cy: this.y(part.ys[i]), r: 2.4, fill: `var(--run-${color})` }));
    }
  }

  place(event) {
    const box = this.svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  hover(event) {
    if (!this.x) return;
    const [px, py] = this.place(event);
    if (this.start !== undefined) {
      const [a, b] = [Math.min(this.start, px), Math.max(this.start, px)];
      this.band.setAttribute("x", a);
      this.band.setAttribute("width", b - a);
      this.band.setAttribute("visibility", "visible");
    }
    const wanted = this.x.back(px);
    const rows = this.series
      .filter((s) => s.inner[1] > s.inner[0])
      .map((s) => [s, s.inner[0] + nearest(s.xs.slice(...s.inner), wanted)]);
    const [first, place] = rows.reduce((best, row) =>
      Math.abs(row[0].xs[row[1]] - wanted) < Math.abs(best[0].xs[best[1]] - wanted) ? row : best);
    const x = this.x(first.xs[place]);
    for (const side of ["x1", "x2"]) this.cross.setAttribute(side, x);
    this.cross.setAttribute("visibility", "visible");
    this.dots.replaceChildren(
      ...rows.filter(([s, i]) => !(this.log && s.ys[i] <= 0)).map(([s, i]) =>
        shape("circle", { cx: this.x(s.xs[i]), cy: this.y(s.ys[i]), r: 3.5, fill: `var(--run-${s.source.color})` })));
    this.showTip(first, place, rows, x, py);
  }

  showTip(first, place, rows, x, y) {
    const columns = first.source.columns;
    const heads = AXES.map((axis, i) => axis.text(columns[i][place])).join(" · ");
    const lines = rows.map(([s, i]) => {
      const away = s.source === first.source || s.xs[i] === first.xs[place] ? "" : ` (${AXES[0].text(s.source.columns[0][i])})`;
      return element("div", {}, element("span", { class: "swatch", style: `background: var(--run-${s.source.color})` }), " ",
        element("b", {}, exact(s.ys[i], this.spec.unit)), " " + s.source.label + away);
    });
    this.tip.replaceChildren(element("div", { class: "muted" }, heads), ...lines);
    placeTip(this.tip, this.figure, x + 12, y + 30);
  }

  leave() {
    this.tip.style.visibility = "hidden";
    if (!this.x) return;
    this.cross.setAttribute("visibility", "hidden");
    this.dots.replaceChildren();
  }

  begin(event) {
    if (event.button === 0 && this.x) this.start = this.place(event)[0];
  }

  end(event) {
    if (this.start === undefined) return;
    const [from, to] = [this.start, this.place(event)[0]].sort((a, b) => a - b);
    this.start = undefined;
    this.band.setAttribute("visibility", "hidden");
    if (to - from < 6) return;
    const inside = (p) => Math.min(Math.max(p, this.box.left), this.box.right);
    this.changed({ range: [this.x.back(inside(from)), this.x.back(inside(to))] });
  }
}
