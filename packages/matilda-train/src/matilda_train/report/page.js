"use strict";
// Draws the plots of a report from the runs in the page's own data; nothing is ever fetched.

const runs = JSON.parse(document.getElementById("data").textContent);
const shown = runs.map(() => true);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const AXES = { step: "step", tokens: "tokens", seconds: "time since the first start" };
const LINES = { kill: "dash", stop: "dot", skip: "dot", spike: "dot", rollback: "solid", diverged: "solid" };
const MEANINGS = { kill: "✕ killed, resumed", stop: "■ stopped, resumed", skip: "▼ step refused", spike: "▲ spike", rollback: "◀ rolled back", diverged: "★ diverged" };
const SYMBOLS = { kill: "x", stop: "square", skip: "triangle-down", spike: "triangle-up", rollback: "triangle-left", diverged: "star" };
const MOST_MARKERS = 60;
let axis = "step";
let smoothing = 0.4;

// One curve is [field, name, dash]; a chart draws it for every run that has the field.
const groups = [...new Set(runs.flatMap(run => Object.keys(run.steps)))]
  .filter(name => name.startsWith("update_rms_")).map(name => name.slice("update_rms_".length)).sort();
const CHARTS = [
  { id: "loss", title: "Training loss", about: "nats per token", wide: true, smooth: true, events: true, focus: true,
    curves: [["loss_nats", ""]] },
  { id: "bpb", title: "Held-out bits per byte", about: "lower is better", source: "evaluations", points: true, focus: true,
    curves: [["val_bits_per_byte", ""]] },
  { id: "lr", title: "Learning rate", curves: [["lr_muon", "Muon"], ["lr_adamw", "AdamW"], ["lr_embedding", "embedding"], ["lr", "all"]] },
  { id: "grad", title: "Gradient norm", about: "before clipping", smooth: true, log: true, curves: [["grad_norm", ""]] },
  { id: "z", title: "Distance from the usual", about: "z-scores", smooth: true,
    curves: [["loss_z", "loss"], ["grad_norm_z", "gradient norm"]] },
  { id: "speed", title: "Throughput", about: "tokens per second", smooth: true, zero: true, curves: [["tokens_per_second", ""]], large: true },
  { id: "mfu", title: "Model FLOPs utilisation", zero: true, percent: true, smooth: true,
    curves: [["mfu_causal", "causal"], ["mfu_palm", "PaLM"]] },
  { id: "step", title: "Step time", about: "milliseconds", zero: true,
    curves: [["step_ms", "since the last row"], ["step_ms_median", "median of 50"]] },
  { id: "wait", title: "Waiting for data", about: "share of a step", zero: true, percent: true, smooth: true,
    curves: [["data_wait_ms", ""]], over: "step_ms" },
  { id: "update", title: "Relative update", about: "RMS of a step over RMS of the weights", log: true, points: true,
    curves: groups.map(name => ["update_rms_" + name, name]), over: name => name.replace("update_rms_", "param_rms_") },
  { id: "goodput", title: "Goodput", about: "productive share of the time so far", zero: true, percent: true, curves: [["goodput", ""]] },
  { id: "memory", title: "Peak GPU memory", about: "GiB", zero: true, curves: [["peak_memory_gib", ""]] },
  { id: "power", title: "GPU power", about: "watts", zero: true, smooth: true, curves: [["gpu_power_watts", ""]] },
  { id: "temperature", title: "GPU temperature", about: "°C", smooth: true, curves: [["gpu_temperature_celsius", ""]] },
  { id: "clock", title: "GPU clock", about: "MHz", smooth: true, curves: [["gpu_sm_clock_mhz", ""]] },
  { id: "batch", title: "Batch", about: "tokens per step", zero: true, curves: [["batch_tokens", ""]], large: true, varying: true },
];

// Whatever else evaluations tell of, such as `task_scores/TASK/METRIC`: a chart for each
// metric, with a curve for each task.
const TOLD = ["step", "tokens", "seconds", "restarts", "uptime_seconds", "eval_seconds", "val_tokens", "val_loss_nats", "val_bits_per_byte"];
const BY_SOURCE = "val_bits_per_byte_by_source";
const further = new Map();
for (const field of [...new Set(runs.flatMap(run => Object.keys(run.evaluations)))].sort()) {
  if (TOLD.includes(field) || /_stderr$|\/items$/.test(field)) continue;
  // Names of sources may have slashes of their own.
  const parts = field.startsWith(BY_SOURCE + "/") ? [BY_SOURCE, field.slice(BY_SOURCE.length + 1)] : field.split("/");
  const metric = parts.length > 2 ? parts.at(-1) : parts[0];
  const curve = parts.length > 2 ? parts.slice(1, -1) : parts.slice(1);
  if (!further.has(metric)) further.set(metric, []);
  further.get(metric).push([field, curve.join(" ").replaceAll("_", " ")]);
}
// One source is the whole.
const charted = [...further].filter(([metric, curves]) => metric !== BY_SOURCE || curves.length > 1)
  .sort(([a], [b]) => (b === BY_SOURCE) - (a === BY_SOURCE));
CHARTS.splice(2, 0, ...charted.map(([metric, curves], i) => ({
  id: "eval-" + i, title: titleOf(metric, curves), about: curves.length === 1 ? curves[0][1] : "", source: "evaluations", points: true,
  percent: curves.every(([field]) => /acc/.test(field)), curves,
})));

function titleOf(metric, curves) {
  const words = metric.replaceAll("_", " ").replace(/^acc norm$/, "accuracy, by length").replace(/\bacc\b/, "accuracy");
  if (metric === BY_SOURCE) return "Held-out bits per byte by source";
  if (!curves[0][1]) return words.charAt(0).toUpperCase() + words.slice(1);
  return "Tasks: " + words;
}
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = index => css("--run-" + index % 8);
const known = value => value !== null && value !== undefined;
// For what stands between tags: plotly knows no `&quot;` and would show it.
const escapeHtml = text => text.replace(/[&<>]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

// Seconds are shown in the unit that suits the longest run.
const longest = runs.flatMap(run => run.steps.seconds || []).reduce((a, b) => Math.max(a, b ?? 0), 0);
const unit = longest > 7200 ? ["hours", 3600] : longest > 240 ? ["minutes", 60] : ["seconds", 1];
const abscissa = table => axis === "seconds" ? table.seconds.map(x => known(x) ? x / unit[1] : null) : table[axis];

function ordinate(chart, field, table) {
  const values = table[field];
  if (!chart.over) return values;
  const divisor = table[typeof chart.over === "string" ? chart.over : chart.over(field)];
  return divisor ? values.map((v, i) => known(v) && divisor[i] ? v / divisor[i] : null) : null;
}

// Mean of both neighbourhoods, weights falling off over a share of all points: no lag, no zoom
// level at which the slider means something else. Gaps stay gaps. Digits beyond the ninth are noise of
// the sums, which the axis of a constant would be scaled to.
function smoothed(values) {
  const decay = 1 - 1 / (1 + smoothing * smoothing * values.length / 15);
  const sums = values.map(() => 0), weights = values.map(() => 0);
  for (const order of [values.keys(), [...values.keys()].reverse()]) {
    let sum = 0, weight = 0;
    for (const i of order) {
      sum *= decay;
      weight *= decay;
      if (known(values[i])) { sum += values[i]; weight += 1; }
      sums[i] += sum;
      weights[i] += weight;
    }
  }
  return values.map((value, i) => known(value) ? Number((sums[i] / weights[i]).toPrecision(9)) : null);
}

function curvesOf(chart) {
  return (chart.curves || []).filter(([field]) => runs.some(run => {
    const table = run[chart.source || "steps"];
    const values = table[field] && ordinate(chart, field, table);
    return values && values.some(known) && !(chart.varying && new Set(values.filter(known)).size < 2);
  }));
}

function tracesOf(chart) {
  const curves = curvesOf(chart), traces = [];
  runs.forEach((run, r) => {
    if (!shown[r]) return;
    const table = run[chart.source || "steps"];
    curves.forEach(([field, name], c) => {
      const values = table[field] && ordinate(chart, field, table);
      if (!values || !values.some(known)) return;
      // One run: a colour for each curve. Several: a colour for each run, a dash for each curve.
      const ink = runs.length > 1 ? colour(r) : colour(c);
      const dash = DASHES[c % DASHES.length];
      const plain = [runs.length > 1 ? run.name : "", name].filter(Boolean).join(", ") || chart.title;
      const label = escapeHtml(plain);
      const x = abscissa(table);
      const line = { color: ink, width: 1.8, dash };
      const sparse = values.filter(known).length < 2;
      const mode = chart.points && values.length <= MOST_MARKERS ? "lines+markers" : sparse ? "markers" : "lines";
      if (chart.smooth && smoothing > 0 && !sparse) {
        traces.push({ x, y: values, mode: "lines", hoverinfo: "skip", line: { color: ink, width: 1 }, opacity: 0.38, connectgaps: true });
        traces.push({ x, y: smoothed(values), mode, name: label, meta: plain, line, connectgaps: true });
      } else {
        traces.push({ x, y: values, mode, name: label, meta: plain, line, marker: { size: 5, color: ink }, connectgaps: true });
      }
    });
  });
  return traces;
}

// The first steps, from chance, would press all the rest of a curve flat: a long one begins at the
// upper edge, until a double click.
function focusOf(chart, traces) {
  if (!chart.focus) return undefined;
  const curves = traces.filter(trace => trace.yaxis !== "y2").map(trace => trace.y.filter(known));
  const counts = curves.map(y => y.length);
  const skipped = Math.max(0, ...counts) >= 200 ? 0.04 : Math.max(0, ...counts) >= 10 ? 0.1 : 0;
  const rest = curves.flatMap(y => y.slice(Math.ceil(skipped * y.length)));
  if (!skipped || !rest.length) return undefined;
  let [low, high] = rest.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, -Infinity]);
  if (chart.log && low > 0) [low, high] = [Math.log10(low), Math.log10(high)];
  const room = 0.06 * (high - low) || 0.1;
  return [low - room, high + room];
}

function marksOf(chart, traces) {
  const shapes = [], points = [];
  runs.forEach((run, r) => {
    if (!shown[r]) return;
    const ink = runs.length > 1 ? colour(r) : css("--quiet");
    run.marks.slice(-200).forEach(mark => {
      const x = axis === "seconds" ? (known(mark.seconds) ? mark.seconds / unit[1] : null) : mark[axis];
      if (!known(x)) return;
      shapes.push({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, layer: "below",
        line: { color: ink, width: 1, dash: LINES[mark.kind] }, opacity: chart.events ? 0.8 : 0.45 });
      points.push([x, ink, SYMBOLS[mark.kind], (runs.length > 1 ? escapeHtml(run.name) + ": " : "") + escapeHtml(mark.text)]);
    });
  });
  if (chart.events && points.length) {
    traces.push({ x: points.map(p => p[0]), y: points.map(() => 1), yaxis: "y2", mode: "markers", name: "",
      marker: { color: points.map(p => p[1]), symbol: points.map(p => p[2]), size: 8 },
      text: points.map(p => p[3]), hovertemplate: "%{text}<extra></extra>", cliponaxis: false });
  }
  return shapes;
}

function layoutOf(chart, shapes) {
  const ink = css("--quiet"), grid = css("--line");
  const common = { gridcolor: grid, linecolor: grid, zeroline: false, tickfont: { color: ink, size: 11.5 }, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, shapes,
    font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink"), size: 12 },
    margin: { l: 46, r: 12, t: 12, b: 40 }, hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: grid, font: { color: css("--ink"), size: 12 } },
    xaxis: { ...common, title: { text: axis === "seconds" ? unit[0] + " since the first start" : AXES[axis], font: { color: ink, size: 11.5 }, standoff: 6 }, exponentformat: "B", hoverformat: axis === "step" ? "d" : ".4s" },
    yaxis: { ...common, type: chart.log ? "log" : "linear", rangemode: chart.zero && !chart.log ? "tozero" : "normal",
      tickformat: chart.percent ? ".2~%" : "", hoverformat: chart.percent ? ".2%" : ".4g",
      nticks: chart.log ? 5 : 6, exponentformat: chart.large ? "B" : "power" },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
  };
}

const CONFIG = { displayModeBar: false, responsive: true };
const drawn = [];

function keyOf(chart) {
  const curves = curvesOf(chart);
  const kinds = new Set(chart.events ? runs.flatMap(run => run.marks.map(mark => mark.kind)) : []);
  const meanings = [...kinds].map(kind => `<span class="meaning">${MEANINGS[kind]}</span>`).join("");
  if (curves.length < 2) return meanings;
  const strokes = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "9 4", longdashdot: "9 3 2 3" };
  return curves.map(([, name], c) => `<span class="curve"><svg width="22" height="3" aria-hidden="true"><line x2="22" y1="1.5" y2="1.5" ` +
    `stroke="${runs.length > 1 ? "currentColor" : `var(--run-${c % 8})`}" stroke-width="2.2" stroke-dasharray="${strokes[DASHES[c % 6]]}"/></svg>${escapeHtml(name)}</span>`).join(" ");
}

function addCard(parent, chart) {
  const card = document.createElement("article");
  card.className = "card" + (chart.wide ? " wide" : "");
  card.innerHTML = `<div class="head"><h3>${escapeHtml(chart.title)}</h3><span class="about">${escapeHtml(chart.about || "")} ${keyOf(chart)}</span></div>` +
    `<div class="plot" id="plot-${chart.id}" data-chart="${chart.id}" role="img"></div>`;
  parent.append(card);
  if (chart.curves) {
    const button = document.createElement("button");
    button.textContent = "log";
    button.setAttribute("aria-pressed", String(!!chart.log));
    button.setAttribute("aria-label", `${chart.title}: logarithmic scale`);
    button.onclick = () => { chart.log = !chart.log; button.setAttribute("aria-pressed", String(chart.log)); draw(chart); };
    card.querySelector(".head").append(button);
  }
  return card.querySelector(".plot");
}

function draw(chart) {
  const traces = tracesOf(chart);
  const shapes = marksOf(chart, traces);
  const layout = layoutOf(chart, shapes), range = focusOf(chart, traces);
  if (range) layout.yaxis.range = range;
  chart.node.setAttribute("aria-label", inWords(chart, traces));
  Plotly.react(chart.node, traces, layout, CONFIG);
}

// What a screen reader says of a plot: where each curve begins and ends.
function inWords(chart, traces) {
  const figure = value => value.toLocaleString("en", { maximumSignificantDigits: 4, style: chart.percent ? "percent" : "decimal" });
  const curves = traces.filter(trace => trace.meta).map(trace => {
    const y = trace.y.filter(known);
    return y.length > 1 ? `${trace.meta} from ${figure(y[0])} to ${figure(y.at(-1))}` : `${trace.meta} ${figure(y[0])}`;
  });
  return `${[chart.title, chart.about].filter(Boolean).join(", ")}, by ${AXES[axis]}: ${curves.join("; ")}`;
}

// Zooming into one chart zooms all; a double click shows everything again.
let linking = false;
function link(chart) {
  chart.node.on("plotly_relayout", change => {
    if (linking) return;
    const range = change["xaxis.range[0]"] !== undefined ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : null;
    if (!range && !change["xaxis.autorange"]) return;
    linking = true;
    const others = drawn.filter(other => other !== chart);
    Promise.all(others.map(other => Plotly.relayout(other.node, range ? { "xaxis.range": range } : { "xaxis.autorange": true })))
      .finally(() => { linking = false; });
  });
}

function drawAccount() {
  const buckets = [...new Set(runs.flatMap(run => Object.keys(run.account.seconds)))];
  if (!buckets.length) return;
  const order = [...document.querySelectorAll(".account tbody tr td:first-child")].map(cell => cell.textContent);
  const classes = [...document.querySelectorAll(".account .key[class*=bucket]")].map(key => key.className.match(/bucket-\d+/)[0]);
  const node = drawAccount.node || (drawAccount.node = addCard(document.getElementById("account"), { id: "account", title: "Share of the wall-clock time" }));
  node.style.height = 64 + 34 * runs.length + "px";
  const traces = order.map((bucket, i) => ({
    type: "bar", orientation: "h", name: bucket, y: runs.map(run => escapeHtml(run.name)), x: runs.map(run => run.account.wall ? (run.account.seconds[bucket] || 0) / run.account.wall : 0),
    marker: { color: css("--" + classes[i]), line: { color: css("--card"), width: 1 } },
    hovertemplate: "%{x:.1%}<extra>" + escapeHtml(bucket) + "</extra>",
  }));
  const layout = layoutOf({}, []);
  node.setAttribute("aria-label", "Share of the wall-clock time; the table below has its numbers");
  Plotly.react(node, traces, { ...layout, barmode: "stack", bargap: 0.35, hovermode: "closest",
    margin: { l: runs.length > 1 ? 46 : 12, r: 24, t: 8, b: 28 },
    xaxis: { ...layout.xaxis, title: { text: "" }, tickformat: ".0%", range: [0, 1] },
    yaxis: { ...layout.yaxis, type: "category", autorange: "reversed", showticklabels: runs.length > 1, ticklabelstandoff: 6, showgrid: false, fixedrange: true } }, CONFIG);
}

function drawAll() { drawn.forEach(draw); drawAccount(); }

const absent = [];
for (const chart of CHARTS) {
  if (!curvesOf(chart).length) { if (!chart.varying) absent.push(chart.title.replace(/^(?!GPU)./, c => c.toLowerCase())); continue; }
  chart.node = addCard(document.getElementById("charts"), chart);
  drawn.push(chart);
}
if (absent.length) document.getElementById("absent").textContent = `Not in the data: ${absent.join(", ")}.`;
drawAll();
drawn.forEach(link);

runs.forEach((run, r) => {
  const button = document.createElement("button");
  button.innerHTML = `<i class="key run-${r % 8}"></i>${escapeHtml(run.name)}`;
  button.setAttribute("aria-pressed", "true");
  button.onclick = () => { if (runs.length === 1) return; shown[r] = !shown[r]; button.setAttribute("aria-pressed", String(shown[r])); drawAll(); };
  document.getElementById("runs").append(button);
});
document.querySelectorAll("#axis button").forEach(button => button.onclick = () => {
  axis = button.dataset.axis;
  document.querySelectorAll("#axis button").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  drawAll();
});
document.getElementById("smooth").oninput = event => { smoothing = Number(event.target.value); drawAll(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
document.documentElement.dataset.ready = "true";
