"""The engine pause: what a worker notes at a flip, and what the report makes of it."""

import numpy as np
import pytest

from runtime.handover import Handover
from runtime.layout import layout_from_counts
from runtime.messages import Row, Sampling, SequenceStart, StepPlan
from runtime.stage_state import PlannedBatch
from scheduler.transition import Report

OLD, NEW = 4, 5


def run(handover: Handover, epoch: int, sequence: int, begun_s: float, ended_s: float, *, flips: bool = False) -> None:
    begin = SequenceStart(1, Sampling(), [], []) if flips else None
    plan = StepPlan(epoch, 0, 0, [Row(sequence, 0, [1], [], True, begin)], [])
    none = np.empty(0, dtype=np.int64)
    planned = PlannedBatch(plan, none, none, none, none, none, none, [])
    handover.ran(plan, planned, 0, begun_s, ended_s, lambda *_: pytest.fail("nothing is mirrored"))


def test_a_pause_is_the_gap_at_the_flip_and_its_excess_that_over_the_mean_gap() -> None:
    handover = Handover(NEW, OLD, layout_from_counts(NEW, ["a"], [4]))
    run(handover, OLD, 1, 0.0, 1.0)
    run(handover, OLD, 1, 1.5, 2.0)
    run(handover, OLD, 1, 3.5, 4.0)
    run(handover, NEW, 1, 7.0, 7.5, flips=True)
    run(handover, NEW, 1, 9.0, 9.5)
    assert handover.pauses_s == [pytest.approx(3.0)]
    assert handover.excesses_s == [pytest.approx(3.0 - (0.5 + 1.5) / 2)]
    assert handover.ordinary_s == [pytest.approx(1.5 - 0.5)], "the first gap has none before it, the flip's is a pause"


def test_what_ran_once_has_no_mean_gap_and_what_is_new_no_pause() -> None:
    handover = Handover(NEW, OLD, layout_from_counts(NEW, ["a"], [4]))
    run(handover, OLD, 1, 0.0, 1.0)
    run(handover, NEW, 1, 1.25, 2.0, flips=True)
    run(handover, NEW, 2, 2.0, 3.0, flips=True)
    assert handover.pauses_s == [pytest.approx(0.25)]
    assert handover.excesses_s == []


def test_the_report_keeps_maximum_median_and_percentile_of_both() -> None:
    report = Report(1, "live", [], [], OLD, NEW)
    report.add_pauses(list(range(1000, 201_000, 1000)), [-500, 1500], [250])
    assert report.engine_pause_ms == {
        "max": 200.0,
        "p50": 101.0,
        "p99": 199.0,
        "count": 200.0,
        "excess_max": 1.5,
        "excess_p50": 1.5,
        "excess_p99": 1.5,
        "excess_count": 2.0,
        "ordinary_max": 0.25,
        "ordinary_p50": 0.25,
        "ordinary_p99": 0.25,
        "ordinary_count": 1.0,
    }
    untouched = Report(2, "live", [], [], OLD, NEW)
    untouched.add_pauses([], [], [250])
    assert untouched.engine_pause_ms == {}, "a report shares nothing with another one, and gaps alone are no pause"
