"""The default split against brute force."""

import itertools
import random

import pytest

from scheduler.balance import CPU_CORE, UnitCosts, balanced_counts, unit_costs
from tests.sim.cluster import make_spec


def largest(costs: UnitCosts, counts: tuple[int, ...]) -> float:
    start, stages = 0, []
    for count in counts:
        stages.append(sum(costs.layers[start : start + count]))
        start += count
    stages[0] += costs.embedding
    stages[-1] += costs.lm_head
    return max(stages)


@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_better(seed: int) -> None:
    rng = random.Random(seed)
    num_layers, num_stages = rng.randint(1, 9), rng.randint(1, 4)
    num_stages = min(num_stages, num_layers)
    costs = UnitCosts(rng.random(), tuple(rng.random() for _ in range(num_layers)), 3 * rng.random())
    counts = balanced_counts(costs, num_stages)
    assert sum(counts) == num_layers
    assert min(counts) >= 1
    best = min(
        largest(costs, split)
        for split in itertools.product(range(1, num_layers + 1), repeat=num_stages)
        if sum(split) == num_layers
    )
    assert largest(costs, counts) == pytest.approx(best)


def test_the_lm_head_counts() -> None:
    costs = UnitCosts(0.0, (1.0,) * 10, 4.0)
    assert balanced_counts(costs, 2) == (7, 3)


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="5 stages for 3 layers"):
        balanced_counts(UnitCosts(0.0, (1.0,) * 3, 1.0), 5)


def test_costs_follow_the_roofline() -> None:
    costs = unit_costs(make_spec(4), CPU_CORE)
    assert len(set(costs.layers)) == 1
    assert costs.lm_head > costs.layers[0]
    assert costs.embedding == 0.0
