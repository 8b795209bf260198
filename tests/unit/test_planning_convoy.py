"""The convoy's law against simulated pipelines, and the planner's rounds against the forecast and against every split."""

import numpy as np
import pytest

from runtime.layout import layout_from_counts
from scheduler.planning import compiled
from scheduler.planning.convoy import round_seconds, slow_weight, weighted
from scheduler.planning.cost import TERMS, Facts, Speed, unit_times
from scheduler.planning.devices import lookup
from scheduler.planning.forecast import Cluster, Device, Pipeline
from scheduler.planning.rounds import Rounds, StepTimes
from scheduler.planning.splits import Problem, make_split
from scheduler.planning.traffic import Serving, Traffic, mean_steps
from tests.planning_harness import every_split, make_spec


def simulated_step_s(stages: np.ndarray, in_flight: int, share: float, slow: float, num_steps: int = 6000) -> float:
    """Mean seconds per step when each is slow, in all of `stages`, with probability `share`: the queues themselves."""
    rng = np.random.default_rng(0)
    factors = np.where(rng.random(num_steps) < share, slow, 1.0)
    free, ended = np.zeros(len(stages)), np.zeros(num_steps)
    for step, factor in enumerate(factors):
        at = ended[step - in_flight] if step >= in_flight else 0.0
        for stage, seconds in enumerate(stages):
            at = free[stage] = max(at, free[stage]) + factor * seconds
        ended[step] = at
    start = num_steps // 4
    return float(ended[-1] - ended[start - 1]) / (num_steps - start)


def law(stages: np.ndarray, in_flight: int, share: float, slow: float) -> float:
    mean = 1.0 - share + share * slow
    total, busiest = float(stages.sum()), float(stages.max())
    seconds = round_seconds(
        share, float(in_flight), mean_sum=mean * total, mean_busiest=mean * busiest,
        slow_sum=slow * total, fast_sum=total, fast_busiest=busiest,
    )  # fmt: skip
    return float(seconds) / in_flight


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
@pytest.mark.parametrize(
    ("num_stages", "in_flight"), [(2, 2), (4, 4), (8, 8), (16, 16), (4, 8), (8, 4), (8, 7), (3, 1)]
)
def test_the_law_meets_pipelines_of_even_stages(num_stages: int, in_flight: int, share: float) -> None:
    stages = np.ones(num_stages)
    seen = simulated_step_s(stages, in_flight, share, 3.0)
    assert law(stages, in_flight, share, 3.0) == pytest.approx(seen, rel=0.07)


def test_mean_times_alone_are_far_off() -> None:
    """What the law is for: sixteen stages, a prompt in every eighth step."""
    stages, share, slow = np.ones(16), 0.125, 3.0
    seen = simulated_step_s(stages, 16, share, slow)
    assert seen > 1.7 * (1 + share * (slow - 1))
    assert slow_weight(share, 16.0) == pytest.approx((seen - 1) / (slow - 1), abs=0.05)


@pytest.mark.parametrize(
    "stages", [np.linspace(0.3, 1.0, 8), np.array([0.5] * 7 + [1.0]), np.array([1.0, 1.0, 0.7, 0.7])]
)
def test_the_law_meets_uneven_pipelines(stages: np.ndarray) -> None:
    seen = simulated_step_s(stages, len(stages), 0.125, 3.0)
    assert law(stages, len(stages), 0.125, 3.0) == pytest.approx(seen, rel=0.1)


def test_steps_that_are_all_alike_form_no_convoy() -> None:
    for share in (0.0, 1.0):
        seconds = round_seconds(
            share, 4.0, mean_sum=3.0, mean_busiest=1.0, slow_sum=3.0, fast_sum=3.0, fast_busiest=1.0
        )
        assert seconds == pytest.approx(4.0)


def rounds_of(
    facts: Facts, devices: list[Device], traffic: Traffic, k: int, room: float = np.inf
) -> tuple[Rounds, float, float]:
    """The rounds of k stages, what no round is shorter than, and requests in a round."""
    cluster, num_layers = Cluster(facts, devices), facts.num_layers
    steps = mean_steps(traffic, Serving(), cluster.pieces, k, k, traffic.concurrency)
    units = unit_times(facts, cluster.speeds, steps.works)
    times = StepTimes(units.fixed + cluster.hops(steps.works), units.layers, units.last)
    share = steps.prefill_share
    # of a fast, a slow and a mean step
    stage, layer, last = (
        np.stack([*part, weighted(share[0], *part)])[:, None]
        for part in (times.stage, times.layers[..., 0], times.last)
    )
    problem = Problem(
        stage[2, 0],
        np.repeat(layer[2, 0][:, None], num_layers, axis=1),
        last[2, 0],
        np.full(len(devices), room),
        np.ones(num_layers),
        0.0,
        0.0,
        float(k),
    )
    ks = np.array([k])
    busiest, fastest = (
        compiled.bottlenecks.relaxed_bottlenecks(stage[kind], layer[kind], last[kind], num_layers, ks)
        for kind in (2, 0)
    )
    bound_s = compiled.bottlenecks.round_bounds(
        stage, layer, last, busiest, fastest, share, steps.in_flight, ks, num_layers, np.array([np.inf])
    )
    rounds = Rounds(problem, times, facts.kind_of_layer, float(share[0]))
    return rounds, float(bound_s[0]), float(steps.requests[0] * steps.in_flight[0])


@pytest.mark.parametrize("counts", [[3, 2, 3], [1, 6, 1], [0, 4, 4]])
def test_the_planners_round_is_the_forecasts(counts: list[int]) -> None:
    facts = Facts(make_spec(num_layers=8))
    devices = [Device(f"w{i}", Speed(lookup("cpu"), (1.0 + i / 4,) * len(TERMS))) for i in range(3)]
    traffic = Traffic(prompt_tokens=200, output_tokens=40, concurrency=24)
    rounds, _, requests = rounds_of(facts, devices, traffic, 3)
    layout = layout_from_counts(0, ["w2", "w0", "w1"], counts)
    forecast = Pipeline(facts, devices, layout, traffic, Serving(head_s=0.0)).forecast()
    seconds = rounds.of(make_split(rounds.problem, (2, 0, 1), counts))
    assert requests / seconds == pytest.approx(forecast.requests_per_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_improving_ends_at_the_best_of_few_devices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    facts = Facts(make_spec(num_layers=6, vocab=8192))
    devices = [Device(f"w{i}", Speed(lookup("cpu"), tuple(rng.uniform(0.7, 3.0, len(TERMS))))) for i in range(3)]
    traffic = Traffic(prompt_tokens=float(rng.integers(16, 400)), output_tokens=24, concurrency=30)
    rounds, bound_s, _ = rounds_of(facts, devices, traffic, 2)
    splits = [make_split(rounds.problem, order, counts) for order, counts in every_split(3, 6, 2)]
    best = min(map(rounds.of, splits))
    assert bound_s <= best * (1 + 1e-9)
    found, seconds = rounds.improve(splits[int(rng.integers(len(splits)))])
    assert seconds == pytest.approx(rounds.of(found))
    assert seconds <= best * 1.02
    tight, _, _ = rounds_of(facts, devices, traffic, 2, room=3.0)
    held, _ = tight.improve(make_split(tight.problem, (0, 1), (3, 3)))
    assert held.counts == (3, 3), "no device has room for a fourth layer"
