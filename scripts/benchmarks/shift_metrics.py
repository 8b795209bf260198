"""What a layout change costs, computed from the moments at which clients got their tokens. Pure.

All times are seconds since the trace began, so that runs of the same trace can be laid side by side. A *window* is
``[trigger, commit + 1 s]``; the run without a change is judged in the same window, request by request. Intervals come
from a bootstrap over seeds: a seed's runs are drawn or left out together, since the requests of one run are not
independent of each other.

What is never true: that a failed request enters a figure (it is counted as an error, and a run that has one says so),
or that a gap counts during which nobody waited for a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

AFTER_COMMIT_S = 1.0
NUM_RESAMPLES = 2000
T = TypeVar("T")


@dataclass
class Stream:
    """One request: when it was due and when each of its tokens came."""

    index: int
    due_s: float
    times_s: list[float] = field(default_factory=list)
    num_output: int = 0
    num_retries: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / (self.num_output - 1)


@dataclass(frozen=True)
class Window:
    """Half-open in spirit, closed in practice: times are continuous."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def good(streams: Sequence[Stream]) -> list[Stream]:
    return [stream for stream in streams if stream.error is None and len(stream.times_s) > 1]


# -- D2: nobody gets a token ---------------------------------------------------------------------------------


def service_gap_s(streams: Sequence[Stream], window: Window) -> float:
    """The longest interval inside `window` in which no stream got a token though one was decoding; 0.0 if none."""
    begin_s, end_s = service_gap(streams, window)
    return end_s - begin_s


def service_gap(streams: Sequence[Stream], window: Window) -> tuple[float, float]:
    """Where that interval begins and ends; ``(0.0, 0.0)`` if there is none."""
    chosen = good(streams)
    if not chosen:
        return 0.0, 0.0
    times = np.unique(np.concatenate([stream.times_s for stream in chosen]))
    firsts = np.array([stream.times_s[0] for stream in chosen])
    lasts = np.array([stream.times_s[-1] for stream in chosen])
    begins, ends = times[:-1], times[1:]
    inner_begins, inner_ends = np.maximum(begins, window.start_s), np.minimum(ends, window.end_s)
    lengths = inner_ends - inner_begins
    for at in np.argsort(-lengths):
        if lengths[at] <= 0.0:
            break
        if np.any((firsts <= begins[at]) & (lasts >= ends[at])):
            return float(inner_begins[at]), float(inner_ends[at])
    return 0.0, 0.0


def silence_s(streams: Sequence[Stream], window: Window) -> float:
    """The longest interval inside `window` without a token though a request was open, be it waiting or decoding.

    `service_gap_s` is blind to a strategy that lets every stream end before it stops: nobody is decoding then.
    """
    chosen = [stream for stream in streams if stream.error is None and stream.times_s]
    if not chosen:
        return 0.0
    times = np.unique(np.concatenate([stream.times_s for stream in chosen]))
    dues = np.array([stream.due_s for stream in chosen])
    lasts = np.array([stream.times_s[-1] for stream in chosen])
    longest = 0.0
    for begin, end in zip([-np.inf, *times[:-1]], times, strict=True):
        if end <= window.start_s or begin >= window.end_s or end - begin <= longest:
            continue
        open_since = max(begin, float(dues[lasts >= end].min()))
        longest = max(longest, min(end, window.end_s) - max(open_since, window.start_s))
    return float(longest)


def usual_gaps_s(streams: Sequence[Stream], length_s: float, within: Window, *, stride_s: float = 0.1) -> list[float]:
    """`service_gap_s` of all windows of `length_s` inside `within`, which is where load was steady."""
    starts = np.arange(within.start_s, max(within.end_s - length_s, within.start_s) + 1e-9, stride_s)
    return [service_gap_s(streams, Window(start, start + length_s)) for start in starts]


# -- D3: one stream stalls -----------------------------------------------------------------------------------


def stalls_s(streams: Sequence[Stream], window: Window) -> list[float]:
    """For each stream with a gap that touches `window`: the longest of these less the median of all of its gaps."""
    found = []
    for stream in good(streams):
        times = np.array(stream.times_s)
        gaps = np.diff(times)
        touching = gaps[(times[1:] >= window.start_s) & (times[:-1] <= window.end_s)]
        if len(touching) and len(gaps) >= 3:
            found.append(float(touching.max() - np.median(gaps)))
    return found


def median_gap_s(streams: Sequence[Stream], window: Window) -> float:
    """The usual time between two tokens of a stream in `window`: one decode step. 0.0 when there is none."""
    gaps = gaps_s(streams, window)
    return float(np.median(gaps)) if gaps else 0.0


def gaps_s(streams: Sequence[Stream], window: Window) -> list[float]:
    """The times between two tokens of a stream of which the second came in `window`."""
    return [
        float(gap)
        for stream in good(streams)
        for time, gap in zip(stream.times_s[1:], np.diff(stream.times_s), strict=True)
        if window.start_s <= time <= window.end_s
    ]


PHASES = {"before": (), "weights": ("reserve", "prepare", "shadow"), "copy": ("copy",), "flip": ("flip", "retire")}
"""Stretches of a change, each of the report's phases; the second before the trigger is the control."""


def went_over_s(trigger_s: float, commit_s: float, phases_s: Mapping[str, float]) -> float:
    """When streams went over to the other layout: as the flip began, which lasts until all of the cache is copied; where nothing is known of
    phases, at the commit."""
    return stretches(trigger_s, commit_s, phases_s)["flip"].start_s if "flip" in phases_s else commit_s


def stretches(trigger_s: float, commit_s: float, phases_s: Mapping[str, float]) -> dict[str, Window]:
    """When the stretches of a change were, and the second ``"after"`` it."""
    found, at_s = {"before": Window(trigger_s - AFTER_COMMIT_S, trigger_s)}, trigger_s
    for name, phases in list(PHASES.items())[1:]:
        length_s = sum(phases_s.get(phase, 0.0) for phase in phases)
        found[name] = Window(at_s, at_s + length_s)
        at_s += length_s
    return {**found, "after": Window(commit_s, commit_s + AFTER_COMMIT_S)}


# -- D4 and overhead: which requests -------------------------------------------------------------------------


def arriving(streams: Sequence[Stream], window: Window) -> set[int]:
    """The requests that were due inside `window`."""
    return {stream.index for stream in streams if window.start_s <= stream.due_s <= window.end_s}


def overlapping(streams: Sequence[Stream], window: Window) -> set[int]:
    """The requests whose life, from due to the last token, touches `window`."""
    return {s.index for s in good(streams) if s.due_s <= window.end_s and s.times_s[-1] >= window.start_s}


def latencies(streams: Sequence[Stream], chosen: set[int]) -> tuple[list[float], list[float]]:
    """TTFT and TPOT, in seconds, of the requests `chosen`, in the order of their indices."""
    picked = sorted((s for s in good(streams) if s.index in chosen), key=lambda stream: stream.index)
    return [s.ttft_s for s in picked], [s.tpot_s for s in picked if s.num_output > 1]


def shares_before(streams: Sequence[Stream], chosen: set[int], at_s: float) -> tuple[list[float], list[float]]:
    """How much of the time that `latencies` gives for the same requests, and in the same order, had passed at `at_s`; in [0, 1]."""
    picked = sorted((s for s in good(streams) if s.index in chosen), key=lambda stream: stream.index)

    def share(begin_s: float, end_s: float) -> float:
        return (
            float(np.clip((at_s - begin_s) / (end_s - begin_s), 0.0, 1.0)) if end_s > begin_s else float(end_s <= at_s)
        )

    to_first = [share(s.due_s, s.times_s[0]) for s in picked]
    return to_first, [share(s.times_s[0], s.times_s[-1]) for s in picked if s.num_output > 1]


# -- intervals -----------------------------------------------------------------------------------------------


def interval(samples: Sequence[T], statistic: Callable[[list[T]], float | None], *, seed: int = 0) -> dict | None:
    """``{"value", "low", "high", "num_seeds"}``: `statistic` of all samples and its 95 % bootstrap interval.

    A sample is all that one seed has to say. None when the statistic has no value for the whole.
    """
    value = statistic(list(samples))
    if value is None:
        return None
    draw = np.random.default_rng(seed)
    drawn = []
    for chosen in draw.integers(len(samples), size=(NUM_RESAMPLES, len(samples))):
        resampled = statistic([samples[at] for at in chosen])
        if resampled is not None:
            drawn.append(resampled)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high), "num_seeds": len(samples)}


def mean_of(samples: Sequence[Sequence[float]]) -> float | None:
    """The mean over everything in the samples."""
    pooled = _pooled(samples)
    return float(pooled.mean()) if len(pooled) else None


def percentile_of(percent: float) -> Callable[[Sequence[Sequence[float]]], float | None]:
    def statistic(samples: Sequence[Sequence[float]]) -> float | None:
        pooled = _pooled(samples)
        return float(np.percentile(pooled, percent)) if len(pooled) else None

    return statistic


def ratio_less_one(
    statistic: Callable[[Sequence[Sequence[float]]], float | None],
) -> Callable[[Sequence[tuple[Sequence[float], Sequence[float]]]], float | None]:
    """``statistic(with the change) / statistic(without) - 1`` for samples that are pairs of (with, without)."""

    def compared(samples: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
        changed, plain = (statistic([sample[side] for sample in samples]) for side in (0, 1))
        return changed / plain - 1.0 if changed is not None and plain else None

    return compared


def difference(
    statistic: Callable[[Sequence[Sequence[float]]], float | None],
) -> Callable[[Sequence[tuple[Sequence[float], Sequence[float]]]], float | None]:
    """``statistic(with the change) - statistic(without)`` for samples that are pairs of (with, without)."""

    def compared(samples: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
        changed, plain = (statistic([sample[side] for sample in samples]) for side in (0, 1))
        return changed - plain if changed is not None and plain is not None else None

    return compared


def _pooled(samples: Sequence[Sequence[float]]) -> np.ndarray:
    return np.concatenate([np.asarray(sample, dtype=float) for sample in samples]) if samples else np.empty(0)
