"""The status page: one self-contained HTML document that polls the server it came from, and shows only what it says."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Midflight</title>
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --accent: #2a7de1; --bad: #c33; --good: #2a8c4a; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; }
.state { padding: .1rem .6rem; border-radius: 1rem; background: var(--soft); }
.state.good { background: var(--good); color: #fff; } .state.bad { background: var(--bad); color: #fff; }
.quiet { opacity: .7; }
.stages { display: flex; gap: .4rem; align-items: stretch; flex-wrap: wrap; }
.stage { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; background: var(--soft); }
.stage b { display: block; } .stage .layers { font-size: 1.1rem; color: var(--accent); }
.bar { height: .45rem; border-radius: .3rem; background: var(--line); overflow: hidden; margin: .3rem 0; }
.bar i { display: block; height: 100%; background: var(--accent); width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .4rem; }
.figure { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; }
.figure b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
</style>
</head>
<body>
<header><h1>Midflight</h1><span id="state" class="state">connecting</span><span id="detail" class="quiet"></span></header>
<h2>Layout <span id="epoch" class="quiet"></span></h2><div id="stages" class="stages"></div>
<h2>Now</h2><div id="figures" class="figures"></div>
<h2>Workers</h2><div id="workers"></div>
<script>
"use strict";
const at = id => document.getElementById(id);
const make = (tag, text, name) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (name) e.className = name;
  return e;
};
const number = (x, digits = 0) => x.toLocaleString(undefined, {maximumFractionDigits: digits});
let before = null;
async function fetchJson(path) {
  const answer = await fetch(path, {cache: "no-store"});
  const value = await answer.json();
  if (!answer.ok && path !== "/health") throw new Error((value.error || {}).message || answer.status);
  return value;
}
function showHealth(health) {
  at("state").textContent = health.status.replaceAll("_", " ");
  at("state").className = "state " + (health.status === "serving" ? "good" : health.status === "failed" ? "bad" : "");
  const loading = health.units_total && health.units_loaded < health.units_total;
  at("detail").textContent = (loading ? `${health.units_loaded} of ${health.units_total} units loaded. ` : "") + (health.detail || "");
}
function rates(stats) {
  const now = performance.now() / 1000, then = before;
  before = {now, stats};
  if (!then || then.stats.generated_tokens > stats.generated_tokens) return null;
  const seconds = now - then.now;
  const stages = stats.stages.map(s => {
    const old = then.stats.stages.find(o => o.hop === s.hop && o.worker === s.worker);
    return old ? (s.compute_s + s.sample_s - old.compute_s - old.sample_s) / seconds : null;
  });
  return {out: (stats.generated_tokens - then.stats.generated_tokens) / seconds,
          prompt: (stats.prompt_tokens - then.stats.prompt_tokens) / seconds, stages};
}
function showLayout(layout, stats, rate) {
  at("epoch").textContent = layout.epoch === undefined || layout.epoch === null ? "" : `epoch ${layout.epoch}, ${layout.num_layers} layers, ${layout.model || ""}`;
  at("stages").replaceChildren(...(layout.stages || []).map((stage, hop) => {
    const box = make("div", undefined, "stage");
    const [start, stop] = stage.layers;
    box.append(make("b", stage.worker), make("span", `layers ${start} to ${stop - 1} (${stop - start})`, "layers"));
    if (stage.device) box.append(make("div", stage.device, "quiet"));
    const index = stats ? stats.stages.findIndex(s => s.hop === hop) : -1;
    const busy = rate && index >= 0 ? rate.stages[index] : null;
    if (busy !== null && busy !== undefined) {
      const bar = make("div", undefined, "bar"), fill = make("i");
      fill.style.width = Math.min(100, 100 * busy) + "%";
      bar.append(fill);
      box.append(bar, make("div", `busy ${number(100 * busy)} %`, "quiet"));
    }
    return box;
  }));
}
function showFigures(stats, rate) {
  const figures = [
    ["output tokens/s", rate ? number(rate.out, 1) : "-"], ["prompt tokens/s", rate ? number(rate.prompt, 1) : "-"],
    ["running", number(stats.running)], ["waiting", number(stats.waiting)],
    ["KV blocks used", `${number(stats.kv_blocks_used)} / ${number(stats.kv_blocks_total)}`],
    ["KV blocks cached", number(stats.kv_blocks_cached)],
    ["prefix cache hits", stats.prefix_queries_tokens ? number(100 * stats.prefix_hit_tokens / stats.prefix_queries_tokens, 1) + " %" : "-"],
    ["preemptions", number(stats.preemptions)], ["tokens so far", number(stats.generated_tokens)],
  ];
  at("figures").replaceChildren(...figures.map(([name, value]) => {
    const box = make("div", undefined, "figure");
    box.append(make("b", value), make("span", name, "quiet"));
    return box;
  }));
}
function showWorkers(workers) {
  if (!workers.length) { at("workers").replaceChildren(make("div", "none yet", "quiet")); return; }
  const simple = v => v === null || ["string", "number", "boolean"].includes(typeof v);
  const columns = [...new Set(workers.flatMap(w => Object.keys(w).filter(k => simple(w[k]))))];
  const table = make("table"), head = make("tr");
  head.append(...columns.map(c => make("th", c.replaceAll("_", " "))));
  table.append(head, ...workers.map(w => {
    const row = make("tr");
    row.append(...columns.map(c => make("td", simple(w[c]) && w[c] !== null && w[c] !== undefined ? String(w[c]) : "")));
    return row;
  }));
  at("workers").replaceChildren(table);
}
async function refresh() {
  try {
    const [health, layout, workers, stats] = await Promise.all(["/health", "/admin/layout", "/admin/workers", "/admin/stats"].map(fetchJson));
    showHealth(health);
    const rate = rates(stats);
    showLayout(layout, stats, rate); showFigures(stats, rate); showWorkers(workers.workers || []);
  } catch (error) {
    at("state").textContent = "unreachable"; at("state").className = "state bad"; at("detail").textContent = String(error.message || error);
  }
  setTimeout(refresh, document.hidden ? 5000 : 1000);
}
refresh();
</script>
</body>
</html>
"""
