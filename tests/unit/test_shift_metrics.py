"""The metrics of `scripts/bench shift` on streams whose answers are known by hand."""

import itertools
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from shift_client import excerpt, poisson
from shift_fleet import LayoutSpec, parse_layout
from shift_metrics import (
    Stream,
    Window,
    arriving,
    difference,
    gaps_s,
    interval,
    latencies,
    mean_of,
    median_gap_s,
    overlapping,
    percentile_of,
    ratio_less_one,
    service_gap_s,
    shares_before,
    silence_s,
    stalls_s,
    stretches,
    usual_gaps_s,
    went_over_s,
)


def stream(index: int, due_s: float, *times_s: float, error: str | None = None) -> Stream:
    return Stream(index, due_s, list(times_s), num_output=len(times_s), error=error)


def every(step_s: float, start_s: float, stop_s: float) -> list[float]:
    return [start_s + step_s * n for n in range(round((stop_s - start_s) / step_s) + 1)]


# -- D2 --------------------------------------------------------------------------------------------------------


def test_a_token_to_anybody_ends_the_service_gap() -> None:
    a, b = stream(0, 0.0, 1.0, 2.0, 5.0, 6.0), stream(1, 0.0, 1.5, 3.0, 4.0, 6.5)
    assert service_gap_s([a], Window(0.0, 10.0)) == pytest.approx(3.0)
    assert service_gap_s([a, b], Window(0.0, 10.0)) == pytest.approx(1.0)


def test_the_service_gap_is_cut_to_the_window() -> None:
    streams = [stream(0, 0.0, 1.0, 5.0, 5.1)]
    assert service_gap_s(streams, Window(2.0, 4.5)) == pytest.approx(2.5)
    assert service_gap_s(streams, Window(4.0, 9.0)) == pytest.approx(1.0)
    assert service_gap_s(streams, Window(6.0, 9.0)) == 0.0


def test_no_gap_while_nobody_decodes_though_somebody_waits() -> None:
    streams = [stream(0, 0.0, 1.0, 1.1, 1.2), stream(1, 1.2, 9.0, 9.1, 9.2)]
    assert service_gap_s(streams, Window(0.0, 10.0)) == pytest.approx(0.1)
    assert silence_s(streams, Window(0.0, 10.0)) == pytest.approx(7.8)


def test_a_stream_that_starts_in_the_gap_does_not_make_it_one() -> None:
    """Between the last token of one stream and the second of the next only the first token of the latter counts."""
    streams = [stream(0, 0.0, 1.0, 2.0), stream(1, 0.0, 4.0, 4.5)]
    assert service_gap_s(streams, Window(0.0, 10.0)) == pytest.approx(1.0)


def test_silence_begins_when_somebody_comes() -> None:
    streams = [stream(0, 0.0, 0.5, 0.6), stream(1, 3.0, 4.0, 4.1)]
    assert silence_s(streams, Window(0.0, 10.0)) == pytest.approx(1.0)
    assert silence_s(streams, Window(3.5, 10.0)) == pytest.approx(0.5)


def test_failed_streams_have_no_say() -> None:
    streams = [stream(0, 0.0, 1.0, 9.0, 9.1, error="lost"), stream(1, 0.0, 1.0, 1.2, 1.3)]
    assert service_gap_s(streams, Window(0.0, 10.0)) == pytest.approx(0.2)
    assert stalls_s(streams[:1], Window(0.0, 10.0)) == []
    assert service_gap_s([], Window(0.0, 1.0)) == silence_s([], Window(0.0, 1.0)) == 0.0


def test_service_gap_against_a_dumb_model() -> None:
    """Random streams: the figure equals one found by trying every pair of neighbouring events."""
    draw = random.Random(7)
    for _ in range(200):
        streams = []
        for index in range(draw.randrange(1, 5)):
            times = sorted(draw.sample(range(100), draw.randrange(2, 8)))
            streams.append(stream(index, 0.0, *map(float, times)))
        start = draw.uniform(0, 80)
        window = Window(start, start + draw.uniform(1, 40))
        events = sorted({time for each in streams for time in each.times_s})
        longest = 0.0
        for begin, end in itertools.pairwise(events):
            if any(each.times_s[0] <= begin and each.times_s[-1] >= end for each in streams):
                longest = max(longest, min(end, window.end_s) - max(begin, window.start_s))
        assert service_gap_s(streams, window) == pytest.approx(longest)


def test_the_usual_gap_of_an_even_stream_is_its_step() -> None:
    streams = [stream(0, 0.0, *every(0.25, 1.0, 9.0))]
    assert usual_gaps_s(streams, 2.0, Window(2.0, 8.0)) == pytest.approx([0.25] * 41)
    assert usual_gaps_s(streams, 20.0, Window(2.0, 8.0)) == pytest.approx([0.25]), "longer than the trace: one window"


# -- D3, D4 ----------------------------------------------------------------------------------------------------


def test_a_stall_is_the_longest_gap_less_the_median() -> None:
    times = [*every(0.1, 0.0, 1.0), *every(0.1, 1.6, 3.0)]
    assert stalls_s([stream(0, 0.0, *times)], Window(0.5, 2.0)) == [pytest.approx(0.5)]
    assert stalls_s([stream(0, 0.0, *times)], Window(2.0, 3.0)) == [pytest.approx(0.0, abs=1e-9)]
    assert stalls_s([stream(0, 0.0, *times)], Window(1.2, 1.4)) == [pytest.approx(0.5)], "a gap that spans the window"
    assert stalls_s([stream(0, 0.0, *times)], Window(8.0, 9.0)) == []


def test_median_gap_counts_gaps_that_end_in_the_window() -> None:
    streams = [stream(0, 0.0, 1.0, 1.1, 1.2, 5.0, 5.3), stream(1, 0.0, 1.0, 1.2)]
    assert median_gap_s(streams, Window(0.0, 2.0)) == pytest.approx(0.1)
    assert median_gap_s(streams, Window(8.0, 9.0)) == 0.0


def test_which_requests_a_window_concerns() -> None:
    streams = [stream(0, 0.0, 1.0, 2.0), stream(1, 1.5, 3.5, 4.0), stream(2, 3.0, 5.0, 7.0), stream(3, 8.0, 8.5, 9.0)]
    window = Window(1.8, 6.0)
    assert arriving(streams, window) == {2}
    assert overlapping(streams, window) == {0, 1, 2}


def test_latencies_are_in_the_order_of_the_requests() -> None:
    streams = [stream(5, 2.0, 2.5, 3.0, 4.5), stream(1, 0.0, 1.0, 2.0, 3.0), stream(2, 0.0, 9.0, 9.1)]
    ttft, tpot = latencies(streams, {1, 5})
    assert ttft == [pytest.approx(1.0), pytest.approx(0.5)]
    assert tpot == [pytest.approx(1.0), pytest.approx(1.0)]


def test_how_much_of_a_request_lies_before_a_moment() -> None:
    streams = [
        stream(5, 2.0, 2.5, 3.0, 4.5),
        stream(1, 0.0, 1.0, 2.0, 3.0),
        stream(2, 0.0, 9.0, 9.1),
        stream(3, 5.0, 6.0),
    ]
    to_first, to_last = shares_before(streams, {1, 2, 3, 5}, 2.25)
    assert to_first == [1.0, pytest.approx(0.25), pytest.approx(0.5)], "in order of the requests; one token has no gaps"
    assert to_last == [pytest.approx(0.625), 0.0, 0.0]


# -- intervals -------------------------------------------------------------------------------------------------


def test_an_interval_holds_its_value_and_shrinks_to_it_without_spread() -> None:
    found = interval([[1.0, 2.0], [3.0], [5.0, 7.0, 9.0]], mean_of)
    assert found is not None
    assert found["value"] == pytest.approx(4.5)
    assert found["low"] < 4.5 < found["high"]
    assert found["num_seeds"] == 3
    same = interval([[2.0], [2.0]], mean_of)
    assert same is not None
    assert (same["low"], same["high"]) == (2.0, 2.0)


def test_an_interval_is_the_same_twice_and_none_of_nothing() -> None:
    samples = [[float(n)] for n in range(6)]
    assert interval(samples, percentile_of(50)) == interval(samples, percentile_of(50))
    assert interval([[], []], mean_of) is None
    assert interval([], mean_of) is None


def test_a_seed_without_values_does_not_spoil_the_others() -> None:
    found = interval([[], [4.0], [4.0]], mean_of)
    assert found is not None
    assert found["value"] == found["low"] == found["high"] == 4.0


def test_pairs_are_resampled_together() -> None:
    """Each seed is slower than the one before, on both sides alike: the ratio has no spread."""
    pairs = [([1.1 * base], [base]) for base in (1.0, 10.0, 100.0)]
    ratio = interval(pairs, ratio_less_one(mean_of))
    assert ratio is not None
    assert ratio["low"] == pytest.approx(0.1)
    assert ratio["high"] == pytest.approx(0.1)
    more = interval([([3.0, 5.0], [1.0])], difference(percentile_of(100)))
    assert more is not None
    assert more["value"] == pytest.approx(4.0)


# -- traces and layouts ----------------------------------------------------------------------------------------


def test_traces_are_the_same_for_the_same_seed_and_end_in_time() -> None:
    trace = poisson(5.0, 60.0, 128, 64, seed=3)
    assert trace == poisson(5.0, 60.0, 128, 64, seed=3)
    assert trace != poisson(5.0, 60.0, 128, 64, seed=4)
    assert 200 < len(trace) < 400
    assert all(0.0 < arrival.at_s < 60.0 for arrival in trace)


def test_excerpts_go_round_the_text() -> None:
    text = list(range(10))
    taken = excerpt(text, 25, seed=1, index=2)
    assert taken == excerpt(text, 25, seed=1, index=2)
    assert [(token - taken[0]) % 10 for token in taken] == [offset % 10 for offset in range(25)]
    assert len({tuple(excerpt(text, 25, seed=1, index=index)) for index in range(40)}) > 5


def test_layouts_are_read_written_and_asked_for() -> None:
    assert parse_layout("19,11") == LayoutSpec(((0, 19), (1, 11)))
    assert str(parse_layout("15@0,15@2")) == "15@0,15@2"
    assert str(parse_layout("13,10,7")) == "13,10,7"
    assert parse_layout("15@0,15@2").num_workers == 3
    assert parse_layout("15@0,15@2").wish() == {
        "stages": [{"worker": "w0", "layers": [0, 15]}, {"worker": "w2", "layers": [15, 30]}]
    }
    for wrong in ("", "19,", "a,b", "3@", "-1,2"):
        with pytest.raises(ValueError, match="in the layout"):
            parse_layout(wrong)


def test_gaps_belong_to_the_stretch_in_which_they_end() -> None:
    found = stretches(
        10.0, 11.5, {"reserve": 0.1, "prepare": 0.1, "shadow": 0.4, "copy": 0.3, "flip": 0.4, "retire": 0.1}
    )
    assert list(found) == ["before", "weights", "copy", "flip", "after"]
    lengths = [window.length_s for window in found.values()]
    assert lengths == pytest.approx([1.0, 0.6, 0.3, 0.5, 1.0])
    assert (found["weights"].start_s, found["flip"].start_s) == (10.0, pytest.approx(10.9))
    assert went_over_s(10.0, 11.5, {"shadow": 0.6, "copy": 0.3, "flip": 0.5}) == pytest.approx(10.9)
    assert went_over_s(10.0, 11.5, {}) == 11.5
    assert found["after"].start_s == 11.5
    streams = [stream(0, 0.0, 9.4, 9.5, 10.55, 10.7, 12.0), stream(1, 0.0, 10.0, 10.55, error="lost")]
    by_stretch = {name: gaps_s(streams, window) for name, window in found.items()}
    assert by_stretch["before"] == pytest.approx([0.1])
    assert by_stretch["weights"] == pytest.approx([1.05])
    assert by_stretch["copy"] == pytest.approx([0.15])
    assert by_stretch["flip"] == []
    assert by_stretch["after"] == pytest.approx([1.3])
