"""The status page's script: what `api.page` runs in the browser.

It holds no state that the server does not: every second it asks for the figures, and between them events tell how a change
of layout goes on. Without events (an old proxy) it asks for everything. Text from the server only ever becomes text nodes.
"""

SCRIPT = r"""
"use strict";
const at = id => document.getElementById(id);
const make = (tag, text, name) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (name) e.className = name;
  return e;
};
const number = (x, digits = 0) => x.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
const size = bytes => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (bytes >= 1000 && i < units.length - 1) { bytes /= 1000; i += 1; }
  return number(bytes, i && bytes < 100 ? 1 : 0) + " " + units[i];
};
const range = ([start, stop]) => stop > start + 1 ? `${start}–${stop - 1}` : stop > start ? `${start}` : "none";
const chain = stages => stages.map(s => `${s.worker} ${range(s.layers)}`).join("  |  ");
const PHASES = ["reserve", "prepare", "shadow", "copy", "flip", "retire"];
const KEPT_SAMPLES = 120, KEPT_NOTES = 6, SHOWN_CHANGES = 10, LINGER_MS = 5000;
const COLOURS = 6;
const LEAST_S = 0.5;  // of a rate: an event may ask again some milliseconds after the clock did, and tokens come in bursts

let before = null, lastRate = null, layout = null, change = null, reports = [], numLayers = 0;
let lingerUntil = 0, isListening = false;
const samples = [], notes = [], colours = new Map();

async function ask(path, options) {
  const answer = await fetch(path, {cache: "no-store", ...options});
  const value = await answer.json();
  if (!answer.ok && path !== "/health") throw new Error((value.error || {}).message || String(answer.status));
  return value;
}
function colour(worker) {
  if (!colours.has(worker)) colours.set(worker, colours.size % COLOURS);
  return "w" + colours.get(worker);
}

/* -- the layout -- */
function fillStrip(strip, stages, busy) {
  while (strip.children.length > stages.length) strip.lastChild.remove();
  stages.forEach((stage, hop) => {
    const [start, stop] = stage.layers;
    let box = strip.children[hop];
    if (!box) {
      box = make("div");
      box.append(make("b"), make("span", "", "layers"), make("span", "", "quiet"), make("div", undefined, "bar"));
      box.lastChild.append(make("i"));
      strip.append(box);
    }
    box.className = "stage " + colour(stage.worker);
    box.style.flexGrow = Math.max(stop - start, 1);
    const [name, layers, extra, bar] = box.children;
    name.textContent = stage.worker;
    layers.textContent = stop > start ? `layers ${range(stage.layers)}` : "no layer";
    const ends = [hop === 0 ? "embedding" : "", hop === stages.length - 1 ? "LM head" : ""].filter(Boolean).join(", ");
    const load = busy && busy[hop] !== null && busy[hop] !== undefined ? busy[hop] : null;
    extra.textContent = [`${stop - start}`, ends, load === null ? "" : `busy ${number(100 * load)} %`].filter(Boolean).join(" · ");
    bar.hidden = busy === undefined;
    bar.firstChild.style.width = `${100 * Math.min(1, load || 0)}%`;
  });
}
function showLayout(rate) {
  if (!layout) return;
  numLayers = layout.num_layers;
  at("model").textContent = layout.model || "";
  at("epoch").textContent = `epoch ${layout.epoch} · ${layout.num_layers} layers · ${layout.stages.length} stage${layout.stages.length === 1 ? "" : "s"}`;
  for (const stage of [...layout.stages].sort((a, b) => a.worker < b.worker ? -1 : 1)) colour(stage.worker);
  fillStrip(at("stages"), layout.stages, rate ? rate.stages : null);
  const simple = new Set(layout.stages.map(s => s.worker)).size === layout.stages.length;
  at("wish").placeholder = layout.stages.map(s => simple ? s.layers[1] - s.layers[0] : `${s.worker}:${s.layers[0]}-${s.layers[1]}`).join(",");
}

/* -- the change under way -- */
function showChange() {
  const box = at("change");
  if (!change) {
    if (Date.now() > lingerUntil) box.hidden = true;
    return;
  }
  box.hidden = false;
  lingerUntil = 0;
  box.className = "change";
  at("change-title").textContent = `Change ${change.id}` + (change.num_hops > 1 ? `, hop ${change.hop} of ${change.num_hops}` : "") +
    (change.strategy === "live" ? "" : ` (${change.strategy})`);
  at("elapsed").textContent = `${number(change.elapsed_s, 1)} s`;
  fillStrip(at("target"), change.target);
  const now = PHASES.indexOf(change.phase);
  at("phases").replaceChildren(...PHASES.map((name, i) => make("li", name, i < now ? "past" : i === now ? "now" : "")));
  const arriving = key => change.weights.reduce((sum, weights) => sum + weights[key], 0);
  const units = change.weights.length ? `${arriving("units_loaded")} of ${arriving("units_total")} units, ` : "";
  const loading = change.loading.length ? `${units}loading on ${change.loading.join(", ")}` : now >= 2 ? "ready" : "–";
  const left = change.sequences_left === null ? null : change.sequences_left;
  showProgress("weights", loading, now > 2 || (now === 2 && !change.loading.length) ? 1 : arriving("bytes_loaded") / Math.max(1, arriving("bytes_total")));
  showProgress("snapshot", change.snapshot_blocks ? `${change.snapshot_blocks_arrived} of ${change.snapshot_blocks} blocks` : now > 2 ? "nothing to copy" : "–",
    change.snapshot_blocks ? change.snapshot_blocks_arrived / change.snapshot_blocks : now > 2 ? 1 : 0);
  showProgress("flipped", left === null ? `${change.sequences_flipped} sequences` : `${change.sequences_flipped} sequences, ${left} left`,
    left === null ? (now > 3 ? 1 : 0) : change.sequences_flipped + left ? change.sequences_flipped / (change.sequences_flipped + left) : 1);
  at("abort").hidden = now < 0 || now > 2 || change.hop > 1;
}
function showProgress(name, text, share) {
  at(name).textContent = text;
  at(name + "-bar").style.width = `${100 * share}%`;
}
// Of a flip: what stop-copy, drain and recompute make sequences wait for is something else.
function pauseOf(report) { return report.strategy === "live" ? report.engine_pause_ms : {}; }
function showEnd(report) {
  change = null;
  lingerUntil = Date.now() + LINGER_MS;
  const box = at("change"), pause = pauseOf(report);
  box.hidden = false;
  box.className = "change ended " + report.outcome;
  at("change-title").textContent = `Change ${report.id} ${report.outcome}` + (report.why ? `: ${report.why}` : "");
  at("elapsed").textContent = `${number(report.total_s, 2)} s` + (pause.max === undefined ? "" : ` · engine pause ${number(pause.p50, 1)} ms`);
  at("abort").hidden = true;
  setTimeout(showChange, LINGER_MS + 100);
}
function showReports() {
  const over = reports.filter(r => r.outcome !== "running" && r.outcome !== "queued").slice(0, SHOWN_CHANGES);
  const queued = reports.filter(r => r.outcome === "queued").length;
  at("queued").textContent = queued ? `${queued} queued` : "";
  at("no-changes").hidden = over.length > 0;
  at("changes").hidden = over.length === 0;
  at("changes").tBodies[0].replaceChildren(...over.map(r => {
    const row = make("tr"), pause = pauseOf(r);
    const to = make("td"), strategy = r.strategy === "live" ? "" : ` (${r.strategy})`;
    to.append(make("div", chain(r.target)), make("div", r.source.length ? `from ${chain(r.source)}${strategy}` : "never begun", "quiet small"));
    if (r.why) to.append(make("div", r.why, "small why"));
    const outcome = make("td");
    outcome.append(make("span", r.outcome, "pill " + r.outcome));
    row.append(make("td", String(r.id)), outcome, to, make("td", `${number(r.total_s, 2)} s`, "right"),
      make("td", pause.max === undefined ? "–" : `${number(pause.p50, 1)} / ${number(pause.max, 1)} ms`, "right"),
      make("td", `${size(r.weight_bytes)}`, "right"), make("td", `${size(r.snapshot_bytes)} + ${size(r.mirror_bytes)}`, "right"),
      make("td", String(r.sequences_flipped), "right"));
    return row;
  }));
}

/* -- figures -- */
function rates(stats) {
  const now = performance.now() / 1000, then = before;
  if (then && now - then.now < LEAST_S) return lastRate;
  before = {now, stats};
  lastRate = null;
  if (!then || then.stats.generated_tokens > stats.generated_tokens) return null;
  const seconds = now - then.now;
  const stages = stats.stages.map(s => {
    const old = then.stats.stages.find(o => o.hop === s.hop && o.worker === s.worker);
    const spent = old ? s.compute_s + s.sample_s - old.compute_s - old.sample_s : -1;
    return spent < 0 ? null : spent / seconds;
  });
  const rate = {out: (stats.generated_tokens - then.stats.generated_tokens) / seconds,
                prompt: Math.max(0, stats.prompt_tokens - then.stats.prompt_tokens) / seconds, stages};
  samples.push({out: rate.out, changing: change !== null || Date.now() < lingerUntil - LINGER_MS + 1000});
  if (samples.length > KEPT_SAMPLES) samples.shift();
  return lastRate = rate;
}
function showFigures(stats, rate) {
  const share = stats.kv_blocks_total ? stats.kv_blocks_used / stats.kv_blocks_total : 0;
  const figures = {
    "out": rate ? number(rate.out, 1) : "–", "in": rate ? number(rate.prompt, 1) : "–", "running": number(stats.running), "waiting": number(stats.waiting),
    "kv": `${number(100 * share, 1)} %`, "kv-text": `${number(stats.kv_blocks_used)} of ${number(stats.kv_blocks_total)} blocks, ${number(stats.kv_blocks_cached)} cached`,
    "hits": stats.prefix_queries_tokens ? `${number(100 * stats.prefix_hit_tokens / stats.prefix_queries_tokens, 1)} %` : "–",
    "preemptions": number(stats.preemptions), "tokens": number(stats.generated_tokens),
  };
  for (const [id, text] of Object.entries(figures)) at(id).textContent = text;
  at("kv-bar").style.width = `${100 * share}%`;
  showCurve();
}
function showCurve() {
  const width = 600, height = 60, step = width / (KEPT_SAMPLES - 1), first = KEPT_SAMPLES - samples.length;
  const most = Math.max(1, ...samples.map(s => s.out)), y = s => height - 3 - (height - 8) * s.out / most;
  const x = i => (first + i) * step;
  at("line").setAttribute("points", samples.map((s, i) => `${x(i).toFixed(1)},${y(s).toFixed(1)}`).join(" "));
  const spans = [];
  samples.forEach((s, i) => {
    if (!s.changing) return;
    if (spans.length && spans.at(-1).end === i - 1) spans.at(-1).end = i; else spans.push({begin: i, end: i});
  });
  at("windows").replaceChildren(...spans.map(span => {
    const box = document.createElementNS(at("windows").namespaceURI, "rect");
    for (const [key, value] of [["x", x(span.begin - 1)], ["y", 0], ["width", (span.end - span.begin + 1) * step], ["height", height]]) box.setAttribute(key, value);
    return box;
  }));
  at("most").textContent = most > 1 ? `${number(most, 0)} tokens/s at most` : "";
}
function showHealth(health) {
  at("state").textContent = health.status.replaceAll("_", " ");
  at("state").className = "pill " + (health.status === "serving" ? "committed" : health.status === "failed" ? "aborted" : "");
  const loading = health.units_total && health.units_loaded < health.units_total;
  at("detail").textContent = [loading ? `${health.units_loaded} of ${health.units_total} units loaded` : "",
    health.workers_joined < health.workers_wanted ? `${health.workers_joined} of ${health.workers_wanted} workers here` : "", health.detail].filter(Boolean).join(" · ");
}
function ranges(layers) {
  const found = [];
  for (const layer of layers || []) {
    if (found.length && found.at(-1)[1] === layer) found.at(-1)[1] = layer + 1; else found.push([layer, layer + 1]);
  }
  return found.map(range).join(", ");
}
function showWorkers(workers) {
  workers.forEach(w => colour(w.name));
  const serving = workers.filter(w => (w.layers || []).length).length;
  at("workers").tBodies[0].replaceChildren(...workers.map(w => {
    const row = make("tr"), name = make("td"), last = make("td", undefined, "right");
    name.append(make("i", undefined, "dot " + colour(w.name)), make("b", w.name));
    const action = (w.layers || []).length && workers.length > 1 ? "drain" : w.drained ? "resume" : "";
    if (action) {
      const button = make("button", action, "plain");
      button.title = action === "drain" ? `Move everything off ${w.name}` : `Let ${w.name} have layers again`;
      button.addEventListener("click", () => wishFor(`/admin/workers/${encodeURIComponent(w.name)}/${action}`, {}));
      last.append(button);
    }
    row.append(name, make("td", (w.status || "") + (w.drained ? ", drained" : "")), make("td", ranges(w.layers) || "idle"), make("td", [w.device, w.device_name].filter(Boolean).join(" · ")),
      make("td", `${w.host || ""}${w.pid ? ", " + w.pid : ""}`), make("td", w.rss ? size(w.rss) : "", "right"),
      make("td", w.num_sequences === undefined ? "" : String(w.num_sequences), "right"), last);
    return row;
  }));
  at("no-workers").hidden = workers.length > 0;
  at("workers").hidden = workers.length === 0;
}
function addNote(text, level) {
  notes.unshift({text, level, time: new Date().toLocaleTimeString("en-GB")});
  notes.length = Math.min(notes.length, KEPT_NOTES);
  at("notes").replaceChildren(...notes.map(n => {
    const line = make("li", undefined, n.level);
    line.append(make("time", n.time), make("span", n.text));
    return line;
  }));
  at("notes-title").hidden = false;
}

/* -- wishes -- */
function parseWish(text) {
  const parts = text.split(",").map(part => part.trim());
  if (parts.every(part => /^\d+$/.test(part))) return {layers: parts.map(Number)};
  const stages = parts.map(part => part.match(/^(\S+):(\d+)-(\d+)$/));
  if (stages.some(match => !match)) throw new Error("a layout looks like 11,19 or w1:0-12,w0:12-30 (the end is not included)");
  return {stages: stages.map(match => ({worker: match[1], layers: [Number(match[2]), Number(match[3])]}))};
}
async function wishFor(path, body) {
  const said = at("said");
  try {
    const {id} = await ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    const text = id ? `change ${id} accepted` : "done";
    said.textContent = text;
    said.className = "quiet";
    setTimeout(() => { if (said.textContent === text) said.textContent = ""; }, LINGER_MS);
    if (!isListening) refresh();
  } catch (error) {
    said.textContent = error.message;
    said.className = "why";
  }
}
at("form").addEventListener("submit", event => {
  event.preventDefault();
  try {
    wishFor("/admin/layout", {...parseWish(at("wish").value || at("wish").placeholder), strategy: at("strategy").value, queue: at("queue").checked});
  } catch (error) {
    at("said").textContent = error.message;
    at("said").className = "why";
  }
});
at("abort").addEventListener("click", async () => {
  if (!change) return;
  try { await ask(`/admin/transitions/${change.id}`, {method: "DELETE"}); } catch (error) { at("said").textContent = error.message; at("said").className = "why"; }
});

/* -- going on -- */
async function refresh() {
  try {
    const [health, view, workers, stats] = await Promise.all(["/health", "/admin/layout", "/admin/workers", "/admin/stats"].map(path => ask(path)));
    layout = view;
    const ended = change && !view.transition ? change.id : 0;
    if (!isListening || view.transition) change = view.transition;
    if (ended && !isListening) { await refreshReports(); const report = reports.find(r => r.id === ended); if (report) showEnd(report); }
    const rate = rates(stats);
    showHealth(health); showLayout(rate); showChange(); showFigures(stats, rate); showWorkers(workers.workers || []);
    at("lost").hidden = true;
  } catch (error) {
    at("state").textContent = "unreachable"; at("state").className = "pill aborted"; at("detail").textContent = String(error.message || error);
    at("lost").hidden = false;
  }
}
async function refreshReports() {
  reports = (await ask("/admin/transitions")).transitions;
  showReports();
}
async function turn() {
  await refresh();
  setTimeout(turn, document.hidden ? 5000 : 1000);
}
function listen() {
  const source = new EventSource("/admin/events");
  const stopped = () => { isListening = false; at("live").textContent = "polling"; };
  source.onopen = () => { isListening = true; at("live").textContent = "live"; refreshReports().catch(() => {}); };
  source.onerror = () => {
    stopped();
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
  source.onmessage = message => {
    const event = JSON.parse(message.data);
    if (event.type === "layout") { layout = event.layout; change = layout.transition; showLayout(null); showChange(); }
    if (event.type === "transition") { change = event.transition; if (change) showChange(); }
    if (event.type === "report") { showEnd(event.report); refresh(); refreshReports().catch(() => {}); }
    if (event.type === "missed") { change = null; refreshReports().catch(() => {}); }
    if (event.type === "note") addNote(event.text, event.level);
  };
}
turn();
refreshReports().catch(() => {});
listen();
"""
