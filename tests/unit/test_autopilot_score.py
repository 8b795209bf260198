"""The figures of `scripts/bench autopilot` and `policies`, by hand-made runs."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/benchmarks"))

from autopilot_score import Figures, composite, figures, oracle, shift_times

PHASES = [{"name": "a", "start_s": 0.0, "stop_s": 100.0}, {"name": "b", "start_s": 100.0, "stop_s": 200.0}]


def run(*ttft_tpot: tuple[float, float], every_s: float = 10.0) -> dict[str, Any]:
    """Ten requests in each phase, of 11 tokens."""
    requests = []
    for index, (ttft_s, tpot_s) in enumerate(ttft_tpot):
        for number in range(10):
            due_s = 100.0 * index + every_s * number
            requests.append(
                {"due_s": due_s, "ttft_s": ttft_s, "tpot_s": tpot_s, "num_output": 11, "last_s": due_s + ttft_s + 10 * tpot_s}
            )  # fmt: skip
    return {"phases": PHASES, "requests": requests, "layouts": [], "log": []}


def test_figures_of_a_phase() -> None:
    first, second = figures(run((1.0, 0.1), (3.0, 0.2)), 2.0, 0.5)
    assert (first.ttft_s, first.tpot_s) == (pytest.approx(1.0), pytest.approx(0.1))
    assert first.tokens_per_s == pytest.approx(110 / 100.0)
    assert first.goodput == pytest.approx(10 / 100.0)
    assert first.settled_goodput == pytest.approx(6 / 60.0), "due 40 s after the beginning or later"
    assert second.goodput == 0.0, "too late to the first token"
    (late, _) = figures(run((100.0, 0.1), (1.0, 0.1)), 2.0, 0.5)
    assert late.tokens_per_s == pytest.approx(110 / 191.0), "until its last token"


def test_the_composite_is_relative_to_the_best_of_each_phase() -> None:
    a = [Figures(1.0, 0.1, 10.0, 1, 2, 1, 1), Figures(4.0, 0.4, 5.0, 1, 1, 4, 1)]
    b = [Figures(2.0, 0.2, 5.0, 1, 1, 1, 1), Figures(2.0, 0.2, 10.0, 1, 1, 2, 1)]
    assert composite(a, [a, b]) == pytest.approx((1.0 + 0.5) / 2)
    assert composite([a[0], b[1]], [a, b]) == pytest.approx(1.0), "an oracle"
    assert oracle({"a": a, "b": b}) == ["a", "b"]


def test_the_time_from_a_shift_to_the_new_layout() -> None:
    made = run((1.0, 0.1), (1.0, 0.1)) | {
        "layouts": [(0.1, "5@0,5@1"), (112.0, "7@0,3@1")],
        "log": [{"at_s": 20.0, "kind": "change", "text": ""}, {"at_s": 104.0, "kind": "shift", "text": ""},
                {"at_s": 109.0, "kind": "change", "text": ""}],
    }  # fmt: skip
    (row,) = shift_times(made)
    assert (row["noticed_s"], row["decided_s"], row["first_layout_s"]) == (4.0, 9.0, 12.0)
    assert row["layouts"] == ["7@0,3@1"]
