"""The shortest round of few devices against every order, choice and cut, by the same law as the forecast."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.planning.convoy import weighted
from scheduler.planning.exact import FewDevices
from scheduler.planning.rounds import Rounds, StepTimes
from scheduler.planning.splits import Problem, fits, make_split
from scheduler.planning.uniform import memory_of
from tests.planning_harness import every_split


def random_cluster(rng: np.random.Generator, max_devices: int, max_layers: int) -> tuple[Rounds, StepTimes, float, int]:
    """Devices alike or not, memory short or not, the LM head large or not, any share of steps with a prompt; and k."""
    n, num_layers = int(rng.integers(1, max_devices + 1)), int(rng.integers(1, max_layers + 1))
    k, share = int(rng.integers(1, min(n, num_layers + 2) + 1)), float(rng.choice([0.0, 0.05, 0.4, 0.9, 1.0]))
    fast = rng.choice([0.25, 0.5, 1.0], n) if rng.random() < 0.4 else rng.random(n) + 0.05
    times = StepTimes(
        np.outer([1.0, 1.5], rng.random(n) * 0.3),
        np.stack([fast, fast * (1.0 + 4.0 * rng.random(n))])[:, :, None],
        np.outer([1.0, 2.0], rng.random(n) * rng.choice([0.2, 3.0])),
    )
    mean = StepTimes(*(weighted(share, *part) for part in (times.stage, times.layers, times.last)))
    problem = Problem(
        stage=mean.stage,
        layers=np.repeat(mean.layers, num_layers, axis=1),
        last=mean.last,
        room=np.where(rng.random(n) < 0.5, np.inf, 1.0 + 1.5 * num_layers * rng.random(n)),
        layer_bytes=np.ones(num_layers),
        first_bytes=float(rng.random()),
        last_bytes=float(3 * rng.random()),
        in_flight=float(k + rng.choice([0.0, 0.5, 3.0])),
    )
    return Rounds(problem, times, np.zeros(num_layers, dtype=np.intp), share), times, share, k


@pytest.mark.parametrize(("max_devices", "max_layers"), [(4, 5), (3, 16)])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=120, deadline=None)
def test_no_split_has_a_shorter_round(max_devices: int, max_layers: int, seed: int) -> None:
    rounds, times, share, k = random_cluster(np.random.default_rng(seed), max_devices, max_layers)
    problem = rounds.problem
    few = FewDevices(times, share, problem.in_flight, k, problem.num_layers, memory_of(problem))
    best = min(
        (
            rounds.of(make_split(problem, order, counts))
            for order, counts in every_split(problem.num_devices, problem.num_layers, k)
            if fits(problem, order, counts)
        ),
        default=np.inf,
    )
    found = few.best()
    assert few.has_room == (best < np.inf)
    if found is None:
        assert best == np.inf
        return
    split = make_split(problem, found.order, found.counts)
    assert len(set(found.order)) == k
    assert sum(found.counts) == problem.num_layers
    assert fits(problem, found.order, found.counts)
    assert found.seconds == pytest.approx(rounds.of(split), rel=1e-9)
    assert found.seconds == pytest.approx(best, rel=1e-8)
    assert few.best(best * (1 - 1e-6)) is None
    assert few.best(best * (1 + 1e-6)) is not None


def test_it_is_not_the_split_with_the_least_busiest_stage() -> None:
    """Two devices alike in mean; one is faster with steps that only decode, which wait for the slower stage of the other."""
    times = StepTimes(np.zeros((2, 2)), np.array([[0.8, 1.2], [2.4, 1.2]])[:, :, None], np.zeros((2, 2)))
    found = FewDevices(times, 0.25, 2.0, 2, 12, np.full((4, 2), 12.0)).best()
    assert found is not None
    assert dict(zip(found.order, found.counts, strict=True)) == {0: 7, 1: 5}


def test_with_fewer_steps_in_flight_than_stages_it_is_not_asked() -> None:
    times = StepTimes(np.zeros((2, 2)), np.ones((2, 2, 1)), np.zeros((2, 2)))
    with pytest.raises(AssertionError, match="constant"):
        FewDevices(times, 0.5, 1.0, 2, 4, np.full((4, 2), 4.0))
