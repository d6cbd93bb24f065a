// The page: what is shown where, and its controls.

const state = { axis: 0, range: null, hidden: new Set(), smooth: 0, quantity: "load_max_over_mean", onlyDifferent: null, search: "" };
let data = JSON.parse(document.getElementById("data").textContent);
let charts = [];
let maps = [];

const CHARTS = [
  { section: "loss", key: "lm_loss", title: "Training loss", note: "cross entropy, nats a token" },
  { section: "loss", evals: "eval_lm_loss", key: "eval_lm_loss", title: "Evaluation loss", note: "nats a token" },
  { section: "loss", key: "learning_rate", title: "Learning rate", zero: true },
  { section: "loss", key: "grad_norm", title: "Gradient norm", note: "before clipping", log: true },
  { section: "loss", key: "loss", title: "Minimised loss", note: "with the routers' losses" },
  { section: "loss", key: "skipped_steps", title: "Skipped steps", zero: true, optional: true },
  { section: "experts", key: "load_max_over_mean", title: "Expert load", note: "largest over mean, worst layer", references: [{ value: 1, label: "balanced" }] },
  { section: "experts", key: "rank_load", title: "Load of ranks", note: "fullest over mean, mean over layers", references: [{ value: 1, label: "balanced" }], optional: true },
  { section: "experts", key: "aux_loss", title: "Balancing loss", note: "without its coefficient", references: [{ value: 1, label: "balanced" }] },
  { section: "experts", key: "router_entropy", title: "Router entropy", note: "nats", entropy: true },
  { section: "experts", key: "dropped_share", title: "Dropped choices", unit: "%", zero: true },
  { section: "experts", key: "dead_experts", title: "Dead experts", zero: true },
  { section: "experts", key: "z_loss", title: "Router z-loss", note: "without its coefficient", optional: true },
  { section: "experts", key: "nonfinite_logits", title: "Non-finite router logits", note: "tokens", zero: true, optional: true },
  { section: "speed", key: "tokens_per_second", title: "Throughput", note: "tokens a second", zero: true },
  { section: "speed", key: "tflops_per_gpu", title: "Arithmetic", note: "TFLOP/s a GPU", zero: true },
  { section: "speed", key: "mfu", title: "MFU", unit: "%", zero: true },
  { section: "speed", key: "step_seconds", title: "Time of a step", unit: "s", zero: true },
  { section: "speed", key: "data_wait", title: "Waiting for data", note: "share of the time", unit: "%", zero: true },
  { section: "speed", key: "memory_gb", title: "Peak memory", note: "GB, fullest rank", zero: true },
];

function seriesOf(spec) {
  const found = [];
  data.runs.forEach((run, index) => {
    const common = { run: index, color: index % 8 };
    if (spec.evals) {
      Object.entries(run.evals).forEach(([split, curves], dash) => {
        if (curves[spec.evals]) found.push({ ...common, dash, part: split, label: `${run.name}: ${split}`, columns: curves[spec.evals] });
      });
    } else if (run.curves[spec.key]) {
      found.push({ ...common, dash: Math.floor(index / 8), label: run.name, columns: run.curves[spec.key] });
    }
  });
  return found;
}

function referencesOf(spec) {
  if (!spec.entropy) return spec.references;
  const numbers = [...new Set(data.runs.map((run) => run.summary.experts).filter((n) => n > 1))];
  return numbers.map((n) => ({ value: Math.log(n), label: `ln ${n}: no preference` }));
}

function buildCharts() {
  const logs = new Map(charts.map((chart) => [chart.spec.id, chart.log]));
  charts = [];
  for (const grid of document.querySelectorAll("[data-section]")) grid.replaceChildren();
  for (const spec of CHARTS) {
    const series = seriesOf(spec);
    const idle = spec.optional && series.every((s) => s.columns[3].every((v) => !v));
    if (!series.length || idle) continue;
    const chart = new LineChart({ ...spec, id: spec.key, series, references: referencesOf(spec) }, state, change);
    if (logs.has(spec.key)) chart.log = logs.get(spec.key);
    document.querySelector(`[data-section="${spec.section}"]`).append(chart.figure);
    charts.push(chart);
  }
}

function deadText(pairs) {
  const layers = new Map();
  for (const [layer, expert] of pairs) layers.set(layer, [...(layers.get(layer) || []), expert]);
  return [...layers].map(([layer, experts]) => `layer ${layer}: ${experts.join(" ")}`).join("; ");
}

function buildMaps() {
  maps = [];
  const rows = [];
  data.runs.forEach((run, index) => {
    if (!run.heat || state.hidden.has(index)) return;
    const tools = element("select", { "aria-label": "quantity", onchange: (event) => change({ quantity: event.target.value }, true) },
      ...Object.entries(QUANTITIES).map(([name, q]) => element("option", { value: name }, q.text)));
    tools.value = state.quantity;
    const pair = [layerMap(run, index, state.quantity, tools), ...(run.experts ? [expertMap(run, index)] : [])];
    maps.push(...pair);
    rows.push(element("div", { class: "heat-pair" }, ...pair.map((map) => map.figure)));
    if (run.dead.length) rows.push(element("p", { class: "warn", "data-dead": run.dead.length }, `${run.name}: dead experts now: ${deadText(run.dead)}`));
  });
  document.getElementById("heat").replaceChildren(...rows);
  document.getElementById("experts").hidden = !data.runs.some((run) => run.heat);
}

function buildSummary() {
  const columns = [
    ["run", (run, i) => element("span", {}, element("span", { class: "swatch", style: `background: var(--run-${i % 8})` }), " " + run.name)],
    ["state", (run) => run.summary.state + (run.summary.starts > 1 ? `, started ${run.summary.starts} times` : "")],
    ["model", (run) => [run.summary.model, run.summary.parameters && amount(run.summary.parameters)].filter(Boolean).join(", ") || "–"],
    ["ranks", (run) => (run.summary.world_size ? `${run.summary.world_size} × ${run.summary.device}` : "–")],
    ["step", (run) => `${exact(run.summary.iteration)} of ${exact(run.summary.train_iters)}`],
    ["tokens", (run) => amount(run.summary.tokens)],
    ["loss", (run) => exact(run.summary.lm_loss)],
    ["best evaluation", (run) => Object.entries(run.summary.best_eval).map(([split, value]) => `${split} ${exact(value)}`).join(", ") || "–"],
    ["tokens/s", (run) => amount(run.summary.tokens_per_second)],
    ["MFU", (run) => exact(run.summary.mfu, "%")],
    ["memory", (run) => (run.summary.memory_gb === null ? "–" : amount(run.summary.memory_gb) + " GB")],
    ["time", (run) => duration(run.summary.hours)],
    ...[["skipped steps", "skipped_steps"], ["dead experts", "dead_experts"]]
      .filter(([, key]) => data.runs.some((run) => run.summary[key]))
      .map(([title, key]) => [title, (run) => exact(run.summary[key])]),
  ];
  const head = element("tr", {}, ...columns.map(([name]) => element("th", {}, name)));
  const body = data.runs.map((run, i) => element("tr", {}, ...columns.map(([, cell]) => element("td", {}, cell(run, i)))));
  document.getElementById("summary").replaceChildren(element("table", {}, head, ...body));
}

function buildNotes() {
  const rows = data.runs.flatMap((run, index) => run.notes.map(([time, iteration, text]) => ({ run, index, time, iteration, text })));
  rows.sort((a, b) => a.time - b.time);
  const lines = rows.map(({ run, index, time, iteration, text }) => element("tr", {},
    element("td", { class: "muted" }, new Date(time * 1000).toISOString().slice(0, 19).replace("T", " ")),
    element("td", {}, element("span", { class: "swatch", style: `background: var(--run-${index % 8})` }), " " + run.name),
    element("td", { class: "number" }, iteration ? exact(iteration) : "start"),
    element("td", { class: /FAILED|lost|can't|NON-FINITE|without a token/.test(text) ? "warn" : "" }, text)));
  for (const run of data.runs) {
    if (run.bad_lines) lines.push(element("tr", {}, element("td", { colspan: 4, class: "warn" }, `${run.path}: ${run.bad_lines} lines are damaged and left out`)));
    if (run.notes_left_out) lines.push(element("tr", {}, element("td", { colspan: 4, class: "muted" }, `${run.name}: ${run.notes_left_out} older notes are left out`)));
  }
  const head = element("tr", {}, ...["time (UTC)", "run", "after step", "note"].map((name) => element("th", {}, name)));
  document.getElementById("notes").replaceChildren(lines.length
    ? element("div", { class: "notes" }, element("table", {}, head, ...lines)) : element("p", { class: "muted" }, "none"));
}

function shown(value) {
  return value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
}

function buildConfig() {
  const many = data.runs.length > 1;
  if (state.onlyDifferent === null) state.onlyDifferent = many;
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))];
  const rows = names.map((name) => ({ name, values: data.runs.map((run) => shown(run.settings[name])) }));
  for (const row of rows) row.differs = many && new Set(row.values).size > 1;
  const only = element("input", { type: "checkbox", onchange: (event) => change({ onlyDifferent: event.target.checked }, true) });
  only.checked = state.onlyDifferent;
  const search = element("input", { type: "search", placeholder: "find a setting", oninput: (event) => { state.search = event.target.value; fill(); } });
  search.value = state.search;
  const body = element("div", { class: "scroll", "data-differences": rows.filter((row) => row.differs).length, "data-settings": rows.length });
  function fill() {
    const chosen = rows.filter((row) => (!state.onlyDifferent || row.differs) && row.name.includes(state.search));
    const head = element("tr", {}, element("th", {}, "setting"), ...data.runs.map((run) => element("th", {}, run.name)));
    const lines = chosen.map((row) => element("tr", { class: row.differs ? "differs" : "" },
      element("td", { class: "value" }, row.name), ...row.values.map((value) => element("td", { class: "value" }, value))));
    body.replaceChildren(chosen.length ? element("table", {}, head, ...lines)
      : element("p", { class: "muted" }, state.onlyDifferent && !state.search ? "the runs have the same settings" : "no such setting"));
  }
  fill();
  const tools = element("div", { class: "tools" }, many ? element("label", {}, only, " only what differs") : null, search);
  document.getElementById("config").replaceChildren(tools, body);
}

function buildControls() {
  document.getElementById("runs").replaceChildren(...data.runs.map((run, index) => element("button", {
    type: "button", class: "chip", title: run.path, "aria-pressed": !state.hidden.has(index),
    onclick: () => { state.hidden.has(index) ? state.hidden.delete(index) : state.hidden.add(index); change({}, true); },
  }, element("span", { class: "swatch", style: `background: var(--run-${index % 8})` }), run.name)));
  document.getElementById("axis").replaceChildren(...AXES.map((axis, index) => element("button", {
    type: "button", "aria-pressed": state.axis === index, onclick: () => change({ axis: index, range: null }, true),
  }, axis.name)));
  document.getElementById("footer").textContent = "made " + new Date(data.made * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC";
}

function draw() {
  document.getElementById("reset").disabled = state.range === null;
  for (const part of [...charts, ...maps]) part.draw();
}

// Take over a change of the state; `rebuild` where more than the curves depends on it.
function change(values, rebuild = false) {
  Object.assign(state, values);
  if (rebuild) {
    buildControls();
    buildMaps();
    buildConfig();
  }
  draw();
}

function build() {
  buildControls();
  buildSummary();
  buildCharts();
  buildMaps();
  buildNotes();
  buildConfig();
  draw();
}

async function follow() {
  const sign = document.getElementById("live");
  try {
    const answer = await fetch("data");
    if (!answer.ok) throw new Error(answer.statusText);
    data = await answer.json();
    sign.textContent = "live";
    if (document.activeElement.type !== "search") build();
  } catch {
    sign.textContent = "the report's server is gone";
  }
  setTimeout(follow, 5000);
}

document.getElementById("smooth").addEventListener("input", (event) => change({ smooth: Number(event.target.value) }));
window.addEventListener("mouseup", (event) => charts.forEach((chart) => chart.end(event)));
document.getElementById("reset").addEventListener("click", () => change({ range: null }));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => change({}, true));
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; draw(); } });
build();
if (data.live) setTimeout(follow, 5000);
