"""`scripts/bench shift --pattern pipelive`: long prompts give way to long answers, and the layout follows.

The pattern is that of PipeLive (arXiv:2604.12171): 200 requests, the first half of 512 prompt and 16 output tokens, the
second of 128 and 512, at 1 to 5 requests a second. It is scaled to the machine twice. All lengths are divided by
`LENGTH_DIVISOR`. And 5 requests a second stand for `TOP_LOAD` of what this machine sustains of the second half on the
layout meant for it, 1 for a fifth of that, and so on.

The layout meant for prompts cuts the layers evenly, since the LM head runs only for rows that are sampled; the one meant
for answers gives the last stage fewer, because for those it always runs. The change is asked for when the first request
of the second half is due. Beside it: each of the two layouts all the way.
"""

import random
from typing import Any

import numpy as np
from arms import note
from shift_client import Acting, Arrival, Run, play
from shift_fleet import Fleet, parse_layout
from shift_grid import Context, saturation, warm_up
from shift_metrics import good
from shift_summary import Case, Sample

LENGTH_DIVISOR = 4
TOP_RATE = 5.0
TOP_LOAD = 0.9
FIRST = (512 // LENGTH_DIVISOR, 16 // LENGTH_DIVISOR)
SECOND = (128 // LENGTH_DIVISOR, 512 // LENGTH_DIVISOR)
FOR_PROMPTS, FOR_ANSWERS = parse_layout("15,15"), parse_layout("19,11")
_SATURATING = Context("pipelive", *SECOND, duration_s=0.0, num_saturating=32)


def pipelive_trace(rate: float, num_requests: int, seed: int) -> list[Arrival]:
    """Poisson arrivals, half of them of each kind, in this order."""
    draw, at_s, arrivals = random.Random(f"pipelive/{seed}"), 0.0, []
    for index in range(num_requests):
        at_s += draw.expovariate(rate)
        arrivals.append(Arrival(at_s, *(FIRST if index < num_requests // 2 else SECOND)))
    return arrivals


async def measure_pipelive(
    fleet: Fleet,
    rates: list[float],
    seeds: tuple[int, ...],
    num_requests: int,
    options: dict[str, Any],
    concurrency: int,
    samples: list[Sample],
    halves: list[dict[str, Any]],
) -> None:
    """Adds to `samples` as the grid does, and to `halves` each play's latencies in either half."""
    per_s = await saturation(fleet, FOR_ANSWERS, _SATURATING, concurrency)
    for nominal in rates:
        load = TOP_LOAD * nominal / TOP_RATE
        for seed in seeds:
            trace = pipelive_trace(load * per_s, num_requests, seed)
            shift_at_s = trace[num_requests // 2].at_s
            plays: dict[str, Run] = {}
            for name, layout in (("for prompts", FOR_PROMPTS), ("for answers", FOR_ANSWERS), ("live", FOR_PROMPTS)):
                await fleet.ensure(layout)
                await warm_up(fleet)
                plays[name] = await play(
                    lambda: fleet.url,
                    fleet.model,
                    fleet.text,
                    trace,
                    seed=seed,
                    acting=Acting(lambda: fleet.change(FOR_ANSWERS, "live", options), shift_at_s)
                    if name == "live"
                    else None,
                )
                halves.append({"layout": name, "rate": nominal, "seed": seed, **_halves(plays[name], num_requests)})
                note(f"  rate {nominal:g} (scaled {load * per_s:.2f}/s), seed {seed}, {name}: {halves[-1]}")
            case = Case("pipelive", "live", load, f"rate {nominal:g}", load * per_s)
            layouts = (str(FOR_PROMPTS), str(FOR_ANSWERS))
            runs = (plays["live"], plays["for prompts"], plays["for answers"])
            samples.append(Sample(case, seed, *layouts, plays["live"].changes[0], *runs, trace_s=trace[-1].at_s))


def _halves(run: Run, num_requests: int) -> dict[str, Any]:
    """Mean latencies in seconds of either half, and the time from the trace's begin to the last token."""
    found: dict[str, Any] = {"errors": len(run.errors)}
    for name, low, high in (("first", 0, num_requests // 2), ("second", num_requests // 2, num_requests)):
        streams = [stream for stream in good(run.streams) if low <= stream.index < high]
        if streams:
            found[f"{name}_ttft_s"] = round(float(np.mean([stream.ttft_s for stream in streams])), 4)
            found[f"{name}_tpot_s"] = round(float(np.mean([stream.tpot_s for stream in streams])), 4)
    found["finished_s"] = round(max((stream.times_s[-1] for stream in good(run.streams)), default=0.0), 3)
    return found
