"""The status page: one self-contained HTML document that watches the server it came from, and asks it for other layouts.

Nothing is fetched from elsewhere. The content security policy admits exactly this style and this script, by their hashes:
`HEADERS` belong to `PAGE`.
"""

import base64
import hashlib

from api.page_script import SCRIPT

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --quiet: #667085; --back: #f6f7f9; --card: #fff; --line: #dfe3ea; --soft: #eef1f5;
  --accent: #2563c9; --bad: #b4322b; --good: #1f7a45; --c0: #2563c9; --c1: #b3581d; --c2: #1f7a45; --c3: #7a3fb0; --c4: #0e7490; --c5: #a32b62; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ee; --quiet: #98a2b3; --back: #14181e; --card: #1c222b; --line: #323b48; --soft: #262e39;
  --accent: #6aa1f5; --bad: #f0857d; --good: #5fc48a; --c0: #6aa1f5; --c1: #eb9a62; --c2: #5fc48a; --c3: #bb90e8; --c4: #4fbfd6; --c5: #ea80ac; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--text); background: var(--back); margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
[hidden] { display: none !important; }
h1 { font-size: 1.25rem; margin: 0; } h2 { font-size: .95rem; font-weight: 600; margin: 0; }
header, .title { display: flex; gap: .3rem .9rem; align-items: baseline; flex-wrap: wrap; }
.title { margin: 0 0 .7rem; } .push { margin-left: auto; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; margin-top: 1rem; }
.quiet { color: var(--quiet); } .small { font-size: .85rem; } .why { color: var(--bad); }
.pill { padding: .05rem .6rem; border-radius: 1rem; background: var(--soft); font-size: .85rem; white-space: nowrap; }
.pill.committed { color: var(--good); background: color-mix(in srgb, var(--good) 14%, transparent); }
.pill.aborted, .pill.refused { color: var(--bad); background: color-mix(in srgb, var(--bad) 14%, transparent); }
.w0 { --own: var(--c0); } .w1 { --own: var(--c1); } .w2 { --own: var(--c2); } .w3 { --own: var(--c3); } .w4 { --own: var(--c4); } .w5 { --own: var(--c5); }
.strip { display: flex; gap: .35rem; }
.stage { flex: 1 1 0; min-width: 7.5rem; padding: .55rem .75rem .6rem; border-radius: .45rem; overflow: hidden; border-left: .3rem solid var(--own);
  background: color-mix(in srgb, var(--own) 11%, transparent); transition: flex-grow .6s ease; }
.stage b { display: block; } .stage span { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.stage .layers { font-size: 1.1rem; color: var(--own); } .stage .quiet { font-size: .85rem; }
.small-strip .stage { padding: .3rem .75rem; background: transparent; border: 1px dashed var(--own); border-left: .3rem solid var(--own); }
.small-strip .layers { font-size: .95rem; }
.bar { height: .35rem; border-radius: .2rem; background: color-mix(in srgb, var(--quiet) 22%, transparent); overflow: hidden; margin-top: .4rem; }
.bar i { display: block; height: 100%; width: 0; background: var(--own, var(--accent)); transition: width .3s linear; }
.change { border: 1px solid color-mix(in srgb, var(--accent) 45%, transparent); border-radius: .5rem; padding: .8rem .9rem; margin-top: .8rem; }
.change.ended { border-color: var(--line); } .change.ended.committed #change-title { color: var(--good); } .change.ended.aborted #change-title { color: var(--bad); }
.change.ended .live-only { display: none; } .change.ended .title { margin: 0; }
.phases { display: flex; flex-wrap: wrap; gap: .3rem; list-style: none; margin: .7rem 0 0; padding: 0; font-size: .85rem; }
.phases li { padding: .05rem .7rem; border-radius: 1rem; background: var(--soft); color: var(--quiet); }
.phases li.past { color: var(--good); } .phases li.now { background: var(--accent); color: var(--card); }
.progress { display: grid; grid-template-columns: repeat(3, 1fr); gap: .9rem; margin-top: .7rem; font-size: .85rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem .7rem; align-items: center; margin-top: .9rem; }
input[type=text], select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .6rem; }
input[type=text] { flex: 0 1 18rem; min-width: 10rem; }
button { cursor: pointer; background: var(--soft); } button.main { background: var(--accent); border-color: var(--accent); color: var(--card); }
button.plain { background: none; padding: 0 .5rem; color: var(--quiet); font-size: .85rem; } button:hover { filter: brightness(1.08); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .9rem 1.2rem; }
.figures b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.25; }
.foot { margin: 0; } .wide { grid-column: span 2; }
svg { display: block; width: 100%; height: 60px; margin: .9rem 0 .3rem; border-bottom: 1px solid var(--line); } polyline { fill: none; stroke: var(--accent); stroke-width: 1.8; vector-effect: non-scaling-stroke; }
rect { fill: var(--c1); opacity: .16; }
.scroll { overflow-x: auto; white-space: nowrap; } .scroll .why { white-space: normal; max-width: 24rem; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; font-size: .85rem; color: var(--quiet); white-space: nowrap; } td, th { padding: .35rem .9rem .35rem 0; vertical-align: top; }
tbody tr { border-top: 1px solid var(--line); } .right { text-align: right; white-space: nowrap; } td:last-child, th:last-child { padding-right: 0; }
.dot { display: inline-block; width: .65rem; height: .65rem; border-radius: .2rem; background: var(--own); margin-right: .5rem; }
#notes { list-style: none; margin: .6rem 0 0; padding: 0; font-size: .85rem; color: var(--quiet); } #notes time { margin-right: .8rem; font-variant-numeric: tabular-nums; }
#notes .warning, #notes .error { color: var(--bad); }
@media (max-width: 40rem) { .strip { flex-direction: column; } .stage { flex: none; } .progress { grid-template-columns: 1fr; } .wide { grid-column: auto; } }
"""

_BODY = """
<main>
<header><h1>Midflight</h1><span id="state" class="pill">connecting</span><span id="model"></span><span id="detail" class="quiet small"></span>
<span id="live" class="quiet small push">polling</span></header>
<p id="lost" class="why small" hidden>The server does not answer. What is shown is what it last said.</p>

<section>
<div class="title"><h2>Layout</h2><span id="epoch" class="quiet small"></span></div>
<div id="stages" class="strip"></div>
<div id="change" class="change" hidden>
  <div class="title"><h2 id="change-title"></h2><span id="elapsed" class="quiet small"></span><button id="abort" class="push" type="button">Abort</button></div>
  <div class="live-only">
    <div id="target" class="strip small-strip"></div>
    <ol id="phases" class="phases"></ol>
    <div class="progress">
      <div>Weights <span id="weights" class="quiet"></span><div class="bar"><i id="weights-bar"></i></div></div>
      <div>Snapshot <span id="snapshot" class="quiet"></span><div class="bar"><i id="snapshot-bar"></i></div></div>
      <div>Taken over <span id="flipped" class="quiet"></span><div class="bar"><i id="flipped-bar"></i></div></div>
    </div>
  </div>
</div>
<form id="form">
  <label for="wish">Change to</label>
  <input id="wish" type="text" autocomplete="off" spellcheck="false" title="Layers per stage, as 11,19, or worker and layers, as w1:0-12,w0:12-30">
  <select id="strategy" title="How to change">
    <option value="live">live</option><option value="stop-copy">stop-copy</option><option value="drain">drain</option><option value="recompute">recompute</option>
  </select>
  <label><input id="queue" type="checkbox"> queue</label>
  <button class="main">Change</button><span id="said" class="quiet small" role="status"></span>
</form>
</section>

<section>
<div class="figures">
  <div><b id="out">–</b><span class="quiet small">output tokens/s</span></div>
  <div><b id="in">–</b><span class="quiet small">prompt tokens/s</span></div>
  <div><b id="running">–</b><span class="quiet small">running</span></div>
  <div><b id="waiting">–</b><span class="quiet small">waiting</span></div>
  <div class="wide"><b id="kv">–</b><span class="quiet small">KV in use: <span id="kv-text"></span></span><div class="bar"><i id="kv-bar"></i></div></div>
  <div><b id="hits">–</b><span class="quiet small">prefix cache hits</span></div>
  <div><b id="preemptions">–</b><span class="quiet small">preemptions</span></div>
  <div><b id="tokens">–</b><span class="quiet small">tokens so far</span></div>
</div>
<svg viewBox="0 0 600 60" preserveAspectRatio="none" role="img" aria-label="Output tokens per second over the last two minutes"><g id="windows"></g><polyline id="line"></polyline></svg>
<div class="title small quiet foot"><span>output over the last two minutes; changes of layout are shaded</span><span id="most" class="push"></span></div>
</section>

<section>
<div class="title"><h2>Last changes</h2><span id="queued" class="quiet small"></span></div>
<div id="no-changes" class="quiet">none yet</div>
<div class="scroll"><table id="changes" hidden><thead><tr><th>id<th>outcome<th>layout<th class="right">took<th class="right">pause p50 / max<th class="right">weights<th class="right">KV snapshot + mirror<th class="right">taken over</tr></thead><tbody></tbody></table></div>
</section>

<section>
<div class="title"><h2>Workers</h2></div>
<div id="no-workers" class="quiet">none yet</div>
<div class="scroll"><table id="workers" hidden><thead><tr><th>name<th>status<th>layers<th>device<th>host, pid<th class="right">memory<th class="right">sequences<th></tr></thead><tbody></tbody></table></div>
<div id="notes-title" hidden><ol id="notes"></ol></div>
</section>
</main>
"""

PAGE = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Midflight</title>\n<link rel="icon" href="data:,">\n'
    f"<style>{_STYLE}</style>\n</head>\n<body>{_BODY}<script>{SCRIPT}</script>\n</body>\n</html>\n"
)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
