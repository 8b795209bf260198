"""`scripts/bench autopilot`: the autopilot against every static layout and an oracle, on real processes with emulated devices.

Two workers, one like an A100 and one like an L40S, serve a small model (`autopilot_setting`). Every *arm* is a server of its own
that plays the same trace: a static layout, the autopilot, or the oracle, which changes at the very moment of each
shift to the layout that was best in that phase. Arms run beside each other, `--at-once` many, since their processors
wait nearly all the time; how much of it they used is in the report. What an arm did is kept in `--folder`, one file each,
and not played again, so a run can go on in several commands:

    scripts/bench autopilot --pattern pipelive             every static layout, then the oracle, the autopilot, the best static ones again
    scripts/bench autopilot --pattern steady               every static layout, and the autopilot three times
    scripts/bench autopilot --pattern azure                code, then conversation; needs ../shared/data
    scripts/bench autopilot --report --out FILE            tables and pictures of what is there

What is never true: that a figure of an emulation is not labelled as one.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from arms import machine_now, note
from autopilot_report import report
from autopilot_score import Figures, composite, figures, oracle
from autopilot_setting import (
    CODE,
    LOAD,
    MAX_RUNNING,
    NUM_LAYERS,
    SLO,
    STEP_TOKENS,
    VOCAB,
    Oracle,
    Phase,
    all_splits,
    laws,
    patterns,
    write_model,
)
from shift_client import Arrival, play
from shift_fleet import Fleet, LayoutSpec, parse_layout

SEED = 0
AGAIN = " again"
_NEAR_BEST = 0.9
"""Static layouts that score so much of the best one's composite are played again beside the autopilot."""
_POLL_S = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench autopilot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pattern", choices=("pipelive", "steady", "azure"), default="pipelive")
    parser.add_argument("--phase-s", type=float, default=100.0, help="how long each phase lasts")
    parser.add_argument("--load", type=float, default=LOAD, help="share of what the best layout of each phase sustains")
    parser.add_argument("--at-once", type=int, default=7, help="arms that run beside each other")
    parser.add_argument(
        "--arms", default="", help="comma-separated names; default: all that are missing, statics first"
    )
    parser.add_argument("--waves", type=int, default=100, help="end after so many waves of arms; run again to go on")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/midflight-bench-autopilot"))
    parser.add_argument("--report", action="store_true", help="play nothing")
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    parser.add_argument("--out", type=Path, help="write the report's JSON here instead of to stdout")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        setting = Oracle(write_model(args.folder / "paced-llama"))
        known = patterns(setting, args.phase_s, args.load, SEED)
        if args.pattern not in known:
            note(f"skipped: the Azure traces are not there ({CODE.parent})")
            return 0
        _play_missing(args, known[args.pattern])
    document = report(args.folder, machine_now(), args.plots)
    text = json.dumps(document, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    elif args.report:
        print(text)
    return 0


def _play_missing(args: argparse.Namespace, phases: list[Phase]) -> None:
    for _ in range(args.waves):
        wave = args.arms.split(",") if args.arms else _next_wave(args.folder, args.pattern, args.at_once)
        if not wave:
            return
        note(f"{args.pattern}: {', '.join(wave)}")
        asyncio.run(_play_wave(args, wave, phases))
        if args.arms:
            return


def _next_wave(folder: Path, pattern: str, at_once: int) -> list[str]:
    """The static layouts first: the oracle and the best of them need to be known."""
    statics = [f"{a}-{b}" for a, b in all_splits()]
    missing = [name for name in statics if not _path(folder, pattern, name).exists()]
    if not missing:
        more = ["autopilot", "autopilot-2", "autopilot-3"] + (["oracle"] if pattern != "steady" else [])
        known = _statics(folder, pattern)
        scores = {name: composite(known[name], list(known.values())) for name in known}
        more += [name + AGAIN for name in scores if scores[name] >= _NEAR_BEST * max(scores.values())]
        missing = [name for name in more if not _path(folder, pattern, name).exists()]
    return missing[:at_once]


def _statics(folder: Path, pattern: str) -> dict[str, list[Figures]]:
    names = [f"{a}-{b}" for a, b in all_splits()]
    return {n: figures(json.loads(_path(folder, pattern, n).read_text()), SLO.ttft_s, SLO.tpot_s) for n in names}


def _path(folder: Path, pattern: str, arm: str) -> Path:
    return folder / f"{pattern}.{arm}.json"


async def _play_wave(args: argparse.Namespace, wave: Sequence[str], phases: list[Phase]) -> None:
    """Start a server for each arm, play the trace on all of them at once, write down what each did."""
    folder, pattern = args.folder, args.pattern
    fleets = {arm: _fleet(folder, arm) for arm in wave}
    first = {arm: _layouts_of(folder, pattern, arm, phases) for arm in wave}
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda arm: fleets[arm].start(_started_on(first[arm][0])), wave))
        for arm in wave:
            await fleets[arm].ensure(first[arm][0])
        await asyncio.sleep(3.0)
        tasks = [_play_arm(fleets[arm], arm, phases, first[arm]) for arm in wave]
        for arm, run in zip(wave, await asyncio.gather(*tasks), strict=True):
            run |= {"pattern": pattern, "arm": arm, "beside": len(wave) - 1, "load": args.load}
            _path(folder, pattern, arm).write_text(json.dumps(run))
    finally:
        for fleet in fleets.values():
            with contextlib.suppress(Exception):
                fleet.stop()


def _fleet(folder: Path, arm: str) -> Fleet:
    arguments = [
        "--load-format", "dummy", "--dtype", "float32", "--threads", "1", "--no-prefix-cache", "--kv-memory", "64M",
        "--max-running", str(MAX_RUNNING), "--step-tokens", str(STEP_TOKENS),
    ]  # fmt: skip
    for law in laws().values():
        arguments += ["--pace", f"read={law.read_s!r},token={law.token_s!r},name={law.name}"]
    return Fleet(str(folder / "paced-llama"), 2, arguments, folder / "logs" / arm)


def _layouts_of(folder: Path, pattern: str, arm: str, phases: list[Phase]) -> list[LayoutSpec]:
    """The layout of each phase; of the autopilot only the first is known: an even one, as nobody knows the load yet."""
    if arm.startswith("autopilot"):
        return [parse_layout(f"{NUM_LAYERS // 2},{NUM_LAYERS - NUM_LAYERS // 2}")]
    if arm == "oracle":
        return [_spec(name) for name in oracle(_statics(folder, pattern))]
    return [_spec(arm.removesuffix(AGAIN))] * len(phases)


def _started_on(layout: LayoutSpec) -> LayoutSpec:
    """What to start a server with that shall have `layout`: one of a single stage would take whichever worker joins first."""
    return layout if len(layout.stages) > 1 else parse_layout(f"{NUM_LAYERS - 1},1")


def _spec(text: str) -> LayoutSpec:
    a, b = (int(part) for part in text.split("-"))
    return parse_layout(f"{a},{b}" if a and b else f"{a}@0" if a else f"{b}@1")


async def _play_arm(fleet: Fleet, arm: str, phases: list[Phase], layouts: list[LayoutSpec]) -> dict[str, Any]:
    if arm.startswith("autopilot"):
        await _post(fleet.url, "/admin/autopilot", {"mode": "on"})
    text = list(range(2, VOCAB))
    trace = [arrival for phase in phases for arrival in phase.arrivals]
    warm = await play(lambda: fleet.url, fleet.model, text, [Arrival(0.0, 32, 4)] * 2, seed=-1)
    assert not warm.errors, warm.errors
    processes = fleet.server.processes()
    cpu_s, began_s = _cpu_s(processes), time.perf_counter()
    seen: list[tuple[float, str]] = []
    watching = asyncio.create_task(_watch(fleet.url, began_s, seen))
    changing = asyncio.create_task(_follow(fleet, phases, layouts, began_s)) if arm == "oracle" else None
    run = await play(lambda: fleet.url, fleet.model, text, trace, seed=SEED)
    watching.cancel()
    if changing is not None:
        await changing
    view = await _get(fleet.url, "/admin/plan")
    now_s = time.perf_counter() - began_s
    note(f"  {arm}: {len(run.errors)} errors, over after {run.duration_s:.0f} s")
    if run.errors:
        raise RuntimeError(f"{arm}: {run.errors[0]}\n{fleet.server.log_tail()}")
    return {
        "phases": [{"name": p.name, "start_s": p.start_s, "stop_s": p.stop_s, "rate": p.rate} for p in phases],
        "requests": [
            {
                "due_s": s.due_s, "ttft_s": s.ttft_s, "tpot_s": s.tpot_s if s.num_output > 1 else 0.0,
                "last_s": s.times_s[-1], "num_output": s.num_output,
            }
            for s in run.streams
        ],
        "layouts": seen,
        "log": [{**entry, "at_s": now_s - entry["age_s"]} for entry in view["log"]],
        "errors": view["errors"],
        "cpu_share": (_cpu_s(processes) - cpu_s) / run.duration_s,
        "client_cpu_share": run.client_cpu_s / run.duration_s,
        "transitions": (await _get(fleet.url, "/admin/transitions"))["transitions"],
        "emulated": [asdict_law(law) for law in laws().values()],
    }  # fmt: skip


def asdict_law(law: Any) -> dict[str, Any]:
    return {"name": law.name, "read_s": law.read_s, "token_s": law.token_s}


async def _follow(fleet: Fleet, phases: list[Phase], layouts: list[LayoutSpec], began_s: float) -> None:
    """Change at the beginning of each phase."""
    for phase, layout in zip(phases[1:], layouts[1:], strict=True):
        await asyncio.sleep(max(0.0, began_s + phase.start_s - time.perf_counter()))
        await fleet.ensure(layout)


async def _watch(url: str, began_s: float, seen: list[tuple[float, str]]) -> None:
    """When which layout served."""
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{url}/admin/layout") as response:
                    stages = (await response.json())["stages"]
                text = ",".join(f"{s['layers'][1] - s['layers'][0]}@{s['worker'][1:]}" for s in stages)
                if not seen or seen[-1][1] != text:
                    seen.append((time.perf_counter() - began_s, text))
            await asyncio.sleep(_POLL_S)


async def _get(url: str, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url + path) as response:
        return await response.json()


async def _post(url: str, path: str, body: Any) -> Any:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        response.raise_for_status()
        return await response.json()


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Processor seconds so far."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


if __name__ == "__main__":
    sys.exit(main())
