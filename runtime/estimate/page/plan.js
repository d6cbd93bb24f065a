"use strict";
// The page of a plan: stacked bars of memory and time, the timeline of a step on a canvas, tables.

const data = JSON.parse(document.getElementById("data").textContent);
const GB = 1e9;
const EXTRA = ["--muted", "--text", "--warn"];
const color = (place) => getComputedStyle(document.documentElement).getPropertyValue(place < 8 ? `--run-${place}` : EXTRA[place % 3]).trim();
const $ = (id) => document.getElementById(id);
const NAMES = { F: "forward", B: "backward", I: "gradients of inputs", W: "gradients of weights", reduce: "sum of gradients", update: "update", gather: "weights to all" };

function tile(name, value, bad) {
  return element("div", { class: bad ? "tile bad" : "tile" }, element("b", {}, value), element("span", {}, name));
}

function legend(node, names) {
  names.forEach((name, place) => {
    node.append(element("span", {}, element("i", { class: "swatch", style: `background:${color(place)}` }), name));
  });
}

// Rows of stacked bars: [{label, values: {name: number}, shown}], all on one scale.
function stacks(node, rows, names, most, format, limit) {
  for (const row of rows) {
    const track = element("div", { class: "track" });
    let at = 0;
    names.forEach((name, place) => {
      const value = row.values[name] || 0;
      if (value <= 0) return;
      const style = `left:${(100 * at) / most}%;width:${(100 * value) / most}%;background:${color(place)}`;
      track.append(element("div", { class: "piece", style, title: `${name}: ${format(value)}`, "data-kind": name }));
      at += value;
    });
    if (limit) track.append(element("div", { class: "limit", style: `left:${(100 * limit) / most}%`, title: `usable: ${format(limit)}` }));
    node.append(element("div", { class: "stack" }, element("div", { class: "label" }, row.label), track, element("div", { class: "value" }, format(at))));
  }
}

function table(node, heads, rows) {
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell, i) => element("td", i ? { class: "number" } : {}, String(cell))))));
  node.append(element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head, i) => element("th", i ? { class: "number" } : {}, head)))), body));
}

function head() {
  $("title").textContent = `Plan: ${data.model} on ${data.gpus} x ${data.gpu}`;
  $("layout").textContent = `${data.layout} | ${data.sequences} sequences of ${data.seq_length} tokens a step, ${data.micro_batches} micro-batches of ${data.micro_batch_size} | recomputed: ${data.recompute}`;
  const { memory, step } = data;
  $("tiles").append(
    tile(memory.fits ? "peak: fits" : "peak: DOES NOT FIT", `${(memory.peak / GB).toFixed(1)} GB`, !memory.fits),
    ...(memory.host ? [tile("in a machine's own memory", `${(memory.host / GB).toFixed(0)} GB`, !memory.fits_host)] : []),
    tile("a step", `${Math.round(step.seconds * 1e3).toLocaleString("en-US")} ms`),
    tile("tokens/s", amount(step.tokens_per_second)),
    tile("TFLOP/s a GPU", step.tflops_per_gpu.toFixed(0)),
    tile("of the GPU's peak", step.utilization === null ? "–" : `${(100 * step.utilization).toFixed(1)} %`),
    tile("waiting for other stages", `${(100 * step.bubble).toFixed(1)} %`),
    tile("communication not hidden", `${((100 * step.exposed_communication) / step.seconds).toFixed(1)} %`),
    tile("a checkpoint", `${(data.checkpoint.bytes / GB).toFixed(0)} GB`),
  );
}

function memoryBars() {
  const names = ["weights", "gradients", "masters", "moments", "activations", "working", "buffers"];
  const { stages, usable, peak } = data.memory;
  const each = data.ranks_of_stage;
  const rows = stages.map((stage, n) => ({ label: stages.length > 1 ? `stage ${n} (${each} ranks)` : `each of ${each} ranks`, values: stage }));
  legend($("memory-legend"), names);
  stacks($("memory"), rows, names, 1.04 * Math.max(peak, usable), (v) => `${(v / GB).toFixed(1)} GB`, usable);
}

function partBars() {
  const names = [...new Set(data.parts.flatMap((p) => Object.keys(p.parts)))].concat("communication");
  const rows = [];
  for (const p of data.parts) {  // stages that are alike become one row
    const key = JSON.stringify([p.parts, p.communication]);
    const before = rows[rows.length - 1];
    if (before && before.key === key) before.last = p.stage;
    else rows.push({ key, first: p.stage, last: p.stage, values: { ...p.parts, communication: p.communication } });
  }
  for (const row of rows) row.label = data.parts.length === 1 ? "all layers" : row.first === row.last ? `stage ${row.first}` : `stages ${row.first} to ${row.last}`;
  const most = Math.max(...rows.map((row) => Object.values(row.values).reduce((a, b) => a + b, 0)));
  legend($("parts-legend"), names);
  stacks($("parts"), rows, names, most * 1.02, (v) => `${(v * 1e3).toFixed(1)} ms`);
}

const view = { low: 0, high: data.timeline.end, from: null };
const ROW = 26, TOP = 18;

function timeline() {
  const canvas = $("timeline"), rows = data.timeline.rows, ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = TOP + rows.length * ROW + 4;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d"), left = 64, style = getComputedStyle(document.documentElement);
  const kinds = Object.keys(NAMES);
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  const x = (ms) => left + ((ms - view.low) / (view.high - view.low)) * (width - left - 2);
  pen.fillStyle = style.getPropertyValue("--muted");
  for (const tick of ticks(view.low, view.high, Math.max(3, width / 130))) {
    pen.fillText(`${amount(tick, 6)} ms`, x(tick) + 3, 11);
    pen.fillRect(x(tick), 2, 1, height);
  }
  rows.forEach((row, n) => {
    const y = TOP + n * ROW;
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.fillText(rows.length > 1 ? `stage ${n}` : "rank", 4, y + 15);
    pen.fillStyle = style.getPropertyValue("--grid");
    pen.fillRect(left, y, width - left, ROW - 4);
    for (const [kind, begin, took, , number] of row) {
      if (begin + took < view.low || begin > view.high) continue;
      const a = Math.max(left, x(begin)), b = Math.min(width, x(begin + took));
      pen.fillStyle = color(kinds.indexOf(kind));
      pen.globalAlpha = number === null ? 1 : number % 2 ? 0.78 : 1;
      pen.fillRect(a, y, Math.max(0.6, b - a - (b - a > 3 ? 1 : 0)), ROW - 4);
      pen.globalAlpha = 1;
      if (b - a > 22 && number !== null) {
        pen.fillStyle = "#fff";
        pen.fillText(String(number), a + 4, y + 15);
      }
    }
  });
  canvas.dataset.events = rows.reduce((sum, row) => sum + row.length, 0);
  canvas.dataset.low = view.low;
  canvas.dataset.high = view.high;
  $("reset").disabled = view.low === 0 && view.high === data.timeline.end;
}

function place(event) {
  const box = $("timeline").getBoundingClientRect();
  const share = Math.min(1, Math.max(0, (event.clientX - box.left - 64) / (box.width - 66)));
  return { ms: view.low + share * (view.high - view.low), row: Math.floor((event.clientY - box.top - TOP) / ROW), x: event.clientX - box.left, y: event.clientY - box.top };
}

function listen() {
  const canvas = $("timeline"), tip = $("tip");
  canvas.addEventListener("mousedown", (event) => { view.from = place(event).ms; });
  window.addEventListener("mouseup", (event) => {
    if (view.from === null) return;
    const to = place(event).ms, low = Math.min(view.from, to), high = Math.max(view.from, to);
    view.from = null;
    if (high - low > (view.high - view.low) / 200) [view.low, view.high] = [low, high];
    timeline();
  });
  canvas.addEventListener("mousemove", (event) => {
    const at = place(event);
    const hit = (data.timeline.rows[at.row] || []).find(([, begin, took]) => begin <= at.ms && at.ms <= begin + took);
    tip.style.visibility = hit ? "visible" : "hidden";
    if (!hit) return;
    const [kind, begin, took, stage, number] = hit;
    const what = number === null ? NAMES[kind] : `${NAMES[kind]} of micro-batch ${number}, virtual stage ${stage}`;
    tip.textContent = `${what}: ${took.toFixed(2)} ms from ${begin.toFixed(1)} ms on`;
    tip.style.left = `${Math.min(at.x + 14, canvas.clientWidth - 320)}px`;
    tip.style.top = `${at.y + 44}px`;
  });
  canvas.addEventListener("mouseleave", () => { tip.style.visibility = "hidden"; });
  $("reset").addEventListener("click", () => { [view.low, view.high] = [0, data.timeline.end]; timeline(); });
  window.addEventListener("resize", timeline);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", timeline);
}

function others() {
  const used = new Set(data.timeline.rows.flat().map(([kind]) => kind));
  Object.entries(NAMES).forEach(([kind, name], n) => {
    if (used.has(kind)) $("timeline-legend").append(element("span", {}, element("i", { class: "swatch", style: `background:${color(n)}` }), name));
  });
  const cut = data.timeline.cut ? "; of so many passes, the first and last of each rank are drawn" : "";
  $("timeline-note").textContent = `Drag to look closer; numbers are micro-batches${cut}.`;
  table($("traffic"), ["axis", "link", "GB"], data.step.bytes_sent.map((row) => [row.axis, row.link, (row.bytes / GB).toFixed(2)]));
  const { weak, strong } = data.scaling;
  const point = (found) => (found ? `${amount(found.tokens_per_second)} (${(100 * found.share).toFixed(0)} %)` : "–");
  table($("scaling"), ["GPUs", "tokens/s, sequences of a GPU stay", "sequences of a step stay"], weak.map((row, n) => [row.gpus, point(row), point(strong[n])]));
  $("flags").textContent = data.flags.join(" ");
  $("notes").append(...data.notes.map((note) => element("li", {}, note)));
}

head();
memoryBars();
partBars();
others();
listen();
timeline();
