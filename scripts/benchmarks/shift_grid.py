"""The grid of `scripts/bench shift`: loads, contexts, changes, strategies, seeds, on one running server.

Within a seed the same trace is played on one layout, through a change to the other, there, and through the change back;
each further strategy goes there and back too. Every other seed begins at the other end, so that drift of the machine
favours neither.

What is never true: that a play follows a change without a warm-up in between, or that plays overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arms import note
from loadgen import Workload, run_workload
from shift_client import Arrival, Run, play, poisson
from shift_fleet import Fleet, LayoutSpec, parse_layout
from shift_summary import Case, Sample

RETRY_FOR_S = 300.0
TRIGGER_AT = 0.35


@dataclass(frozen=True)
class Context:
    """The requests of a trace, and how long its arrivals last."""

    name: str
    prompt_tokens: int
    output_tokens: int
    duration_s: float
    num_saturating: int
    """Requests of the closed loop that measures what is sustained."""


@dataclass(frozen=True)
class Pair:
    """Two layouts and what going there and coming back is called."""

    there: str
    back: str
    first: LayoutSpec
    second: LayoutSpec


CONTEXTS = {
    context.name: context for context in (Context("short", 128, 64, 12.0, 32), Context("long", 1024, 64, 24.0, 16))
}
PAIRS = {
    "1": Pair("1 layer", "1 layer", parse_layout("19,11"), parse_layout("18,12")),
    "4": Pair("4 layers", "4 layers", parse_layout("20,10"), parse_layout("16,14")),
    "15": Pair(
        "15 layers, another worker", "15 layers, another worker", parse_layout("15,15"), parse_layout("15@0,15@2")
    ),
    "stages": Pair("2 to 3 stages", "3 to 2 stages", parse_layout("19,11"), parse_layout("13,10,7")),
}


@dataclass(frozen=True)
class Plan:
    """What is measured; see `--help` for the fields."""

    loads: tuple[float, ...]
    contexts: tuple[Context, ...]
    pairs: tuple[Pair, ...]
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    concurrency: int
    options: dict[str, Any]


async def measure(fleet: Fleet, plan: Plan, samples: list[Sample]) -> None:
    """Add all samples of the grid to `samples`, seed by seed, so that what was measured outlives an interruption."""
    for pair in plan.pairs:
        for context in plan.contexts:
            per_s = min(
                [await saturation(fleet, layout, context, plan.concurrency) for layout in (pair.first, pair.second)]
            )
            for load in plan.loads:
                for turn, seed in enumerate(plan.seeds):
                    samples += await _one_seed(fleet, plan, pair, context, load, per_s * load, seed, turn)


async def saturation(fleet: Fleet, layout: LayoutSpec, context: Context, concurrency: int) -> float:
    """Requests per second that a closed loop of `concurrency` clients gets out of `layout`."""
    await fleet.ensure(layout)
    await warm_up(fleet)
    workload = Workload("saturation", concurrency, context.num_saturating, context.prompt_tokens, context.output_tokens)
    summary, _ = await run_workload(fleet.url, fleet.model, workload, seed=0)
    if summary["errors"]:
        raise RuntimeError(f"the closed loop on {layout} failed: {summary['error_examples']}")
    per_s = summary["requests"] / summary["wall_s"]
    note(
        f"{layout}, {context.name}: {per_s:.2f} requests/s, {summary['output_tokens_per_s']:.0f} tokens/s at saturation"
    )
    return per_s


async def warm_up(fleet: Fleet) -> None:
    """A few short requests; every play is preceded by them, so that none is the first after a change."""
    run = await play(lambda: fleet.url, fleet.model, fleet.text, [Arrival(0.0, 64, 8)] * 4, seed=-1)
    if run.errors:
        raise RuntimeError(f"a warm-up request failed: {run.errors[0]}")


async def _one_seed(
    fleet: Fleet, plan: Plan, pair: Pair, context: Context, load: float, rate: float, seed: int, turn: int
) -> list[Sample]:
    """There and back by every strategy, with each layout's own play between the first two; odd turns begin at the other end."""
    trace = poisson(rate, context.duration_s, context.prompt_tokens, context.output_tokens, seed)
    ends = [(pair.first, pair.there), (pair.second, pair.back)]
    if turn % 2:
        ends.reverse()
    plain: dict[LayoutSpec, Run] = {}
    changed: list[tuple[str, str, LayoutSpec, LayoutSpec, Run, dict[str, float]]] = []
    for round_, strategy in enumerate(plan.strategies):
        for at, (source, name) in enumerate(ends):
            target = ends[1 - at][0]
            await fleet.ensure(source)
            if round_ == 0:
                plain[source] = await _play(fleet, trace, seed)
            run, rss = await _play_change(fleet, trace, seed, context, target, strategy, plan.options)
            changed.append((name, strategy, source, target, run, rss))
            _say(f"{name}, {strategy}, {load:.0%}, {context.name}, seed {seed}", run, plain[source])
    return [
        Sample(
            Case(name, strategy, load, context.name, rate),
            seed,
            str(source),
            str(target),
            run,
            plain[source],
            plain[target],
            rss,
            context.duration_s,
        )
        for name, strategy, source, target, run, rss in changed
    ]


async def _play(fleet: Fleet, trace: Sequence[Arrival], seed: int) -> Run:
    await warm_up(fleet)
    return await play(lambda: fleet.url, fleet.model, fleet.text, trace, seed=seed)


async def _play_change(
    fleet: Fleet,
    trace: Sequence[Arrival],
    seed: int,
    context: Context,
    target: LayoutSpec,
    strategy: str,
    options: dict[str, Any],
) -> tuple[Run, dict[str, float]]:
    await warm_up(fleet)
    with fleet.peak_rss() as rss:
        run = await play(
            lambda: fleet.url,
            fleet.model,
            fleet.text,
            trace,
            seed=seed,
            act=lambda: fleet.change(target, strategy, options),
            act_at_s=TRIGGER_AT * context.duration_s,
            retry_for_s=RETRY_FOR_S if strategy == "restart" else 0.0,
        )
    return run, {} if strategy == "restart" else rss


def _say(what: str, run: Run, plain: Run) -> None:
    assert run.window is not None
    took = run.commit_s - run.window.start_s
    errors = f", errors: {run.errors[:2]}" if run.errors else ""
    note(
        f"  {what}: {took:.2f} s to commit, {len(run.streams)} requests, pause {run.report.get('engine_pause_ms')}{errors}"
    )
    if plain.errors:
        note(f"  without the change: errors {plain.errors[:2]}")
