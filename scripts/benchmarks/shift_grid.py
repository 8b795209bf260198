"""The grid of `scripts/bench shift`: loads, contexts, changes, strategies, seeds, on one running server.

Within a seed the same trace is played on one layout, on the other, and through changes there and back and there again, one
after the other, by each strategy. Every other seed plays them in the opposite order, so that drift of the machine
favours neither.

What is never true: that a play follows a change without a warm-up in between, or that plays overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arms import note
from loadgen import Workload, run_workload
from shift_client import Acting, Arrival, Run, play, poisson
from shift_fleet import Fleet, LayoutSpec, parse_layout
from shift_summary import Case, Sample

RETRY_FOR_S = 300.0
FIRST_CHANGE_S = 2.0
"""After the trace's beginning, when the load has built up."""


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
    context.name: context for context in (Context("short", 128, 64, 20.0, 32), Context("long", 1024, 64, 30.0, 16))
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
    """Both layouts alone, and changes between them by every strategy; odd turns play it all the other way round."""
    trace = poisson(rate, context.duration_s, context.prompt_tokens, context.output_tokens, seed)
    plain: dict[LayoutSpec, Run] = {}
    plain_cpu_s: list[float] = []
    changed: list[tuple[str, LayoutSpec, Run, dict[str, float]]] = []

    async def stay(layout: LayoutSpec) -> None:
        await fleet.ensure(layout)
        await warm_up(fleet)
        with fleet.usage() as usage:
            plain[layout] = await play(
                lambda: fleet.url, fleet.model, fleet.text, trace, seed=seed, first_token=fleet.first_token()
            )
        plain_cpu_s.append(usage["cpu_s"])

    async def change(strategy: str) -> None:
        assert fleet.layout is not None
        source = fleet.layout if fleet.layout in (pair.first, pair.second) else pair.first
        await fleet.ensure(source)
        await warm_up(fleet)
        changed.append((strategy, source, *await _play_changes(fleet, trace, seed, context, pair, strategy, plan)))
        _say(f"{pair.there}, {strategy}, {load:.0%}, {context.name}, seed {seed}", changed[-1][2])

    plays: list[Callable] = [lambda: stay(pair.first)]
    plays += [lambda strategy=strategy: change(strategy) for strategy in plan.strategies]
    plays += [lambda: stay(pair.second)]
    for each in plays[:: -1 if turn % 2 else 1]:
        await each()
    for run in plain.values():
        if run.errors:
            note(f"  without changes: errors {run.errors[:2]}")

    samples = []
    for strategy, source, run, usage in changed:
        if usage and run.changes:
            usage["cpu_more_s"] = (usage["cpu_s"] - sum(plain_cpu_s) / len(plain_cpu_s)) / len(run.changes)
        other = pair.second if source == pair.first else pair.first
        for at, each in enumerate(run.changes):
            ends = (source, other) if at % 2 == 0 else (other, source)
            if strategy == "none":
                ends = (source, source)
            case = Case(pair.there if ends[0] == pair.first else pair.back, strategy, load, context.name, rate)
            names, runs = (str(ends[0]), str(ends[1])), (run, plain[ends[0]], plain[ends[1]])
            samples.append(Sample(case, seed, *names, each, *runs, usage, context.duration_s))
    return samples


async def _play_changes(
    fleet: Fleet, trace: Sequence[Arrival], seed: int, context: Context, pair: Pair, strategy: str, plan: Plan
) -> tuple[Run, dict[str, float]]:
    """The trace through changes to the other layout of the pair, and back, as often as there is time for."""

    async def to_the_other() -> dict[str, Any]:
        target = pair.second if fleet.layout == pair.first else pair.first
        return await fleet.change(target, strategy, plan.options)

    with fleet.usage() as usage:
        run = await play(
            lambda: fleet.url,
            fleet.model,
            fleet.text,
            trace,
            seed=seed,
            first_token=fleet.first_token(),
            acting=Acting(to_the_other, FIRST_CHANGE_S, context.duration_s - 2.0),
            retry_for_s=RETRY_FOR_S if strategy == "restart" else 0.0,
        )
    return run, {} if strategy == "restart" else usage


def _say(what: str, run: Run) -> None:
    took = [round(change.commit_s - change.window.start_s, 2) for change in run.changes]
    pauses = [f"{change.report.get('engine_pause_ms', {}).get('p50', float('nan')):.0f}" for change in run.changes]
    errors = f", errors: {run.errors[:2]}" if run.errors else ""
    note(f"  {what}: {took} s to commit, pauses p50 {' '.join(pauses)} ms, {len(run.streams)} requests{errors}")
