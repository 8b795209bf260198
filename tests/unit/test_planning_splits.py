"""The search for splits against brute force over all orders, subsets and cuts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.planning import compiled, search
from scheduler.planning.search import Solver, search_orders
from scheduler.planning.splits import Problem, fits, make_split, split_near, split_order, stage_times
from scheduler.planning.uniform import Uniform
from tests.planning_harness import brute_force, random_problem


def alike(n: int, num_layers: int, *, layer: float = 1.0, last: float = 0.0, in_flight: float = 99.0) -> Problem:
    return Problem(
        stage=np.zeros(n),
        layers=np.full((n, num_layers), layer),
        last=np.full(n, last),
        room=np.full(n, np.inf),
        layer_bytes=np.ones(num_layers),
        first_bytes=0.0,
        last_bytes=0.0,
        in_flight=in_flight,
    )


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_no_split_is_better(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), max_devices=4, max_layers=5)
    for k in range(1, min(problem.num_devices, problem.num_layers + 2) + 1):
        found, best = Solver(problem, k).best(), brute_force(problem, k)
        if found is None:
            assert best == np.inf
            continue
        assert len(set(found.order)) == k
        assert sum(found.counts) == problem.num_layers
        assert fits(problem, found.order, found.counts)
        assert found.cycle_s(problem) == pytest.approx(best, rel=1e-8)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_equal_layers_are_no_special_case(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), max_devices=5, max_layers=8)
    problem = replace(
        problem,
        layers=np.repeat(problem.layers[:, :1], problem.num_layers, axis=1),
        layer_bytes=np.full(problem.num_layers, problem.layer_bytes[0]),
    )
    ks = list(range(1, min(problem.num_devices, problem.num_layers + 2) + 1))
    stage, layer, last = (
        np.repeat(part[None], len(ks), axis=0) for part in (problem.stage, problem.layers[:, 0], problem.last)
    )
    relaxed = compiled.bottlenecks.relaxed_bottlenecks(stage, layer, last, problem.num_layers, np.array(ks))
    for k, bound in zip(ks, relaxed, strict=True):
        split, found = Uniform(problem, k).choose(), search_orders(problem, k)
        assert (found is None) == (split is None)
        if found is not None and split is not None:
            assert split.largest == pytest.approx(found.largest, rel=1e-8)
            assert fits(problem, split.order, split.counts)
            assert bound <= split.largest * (1 + 1e-9)


def test_the_lm_head_counts() -> None:
    split = Solver(alike(2, 10, last=4.0), 2).best()
    assert split is not None
    assert split.counts == (7, 3)


def test_a_head_that_weighs_more_than_a_stage_stands_alone() -> None:
    split = Solver(alike(2, 4, last=10.0), 2).best()
    assert split is not None
    assert split.counts == (4, 0)
    kept = split_order(alike(2, 4, last=10.0), [0, 1], empty_ends=False)
    assert kept is not None
    assert kept.counts == (3, 1)


def test_with_one_step_in_flight_the_sum_counts() -> None:
    slow_and_fast = replace(alike(2, 10, in_flight=1.0), layers=np.array([[2.0] * 10, [1.0] * 10]))
    split = Solver(slow_and_fast, 2).best()
    assert split is not None
    assert (split.order[0], split.counts, split.total) == (0, (0, 10), 10.0) or split.total == 10.0
    busy = Solver(replace(slow_and_fast, in_flight=2.0), 2).best()
    assert busy is not None
    assert busy.largest == 7.0


def test_memory_forces_layers_onto_the_slow_device() -> None:
    problem = replace(alike(2, 10), layers=np.array([[1.0] * 10, [3.0] * 10]), room=np.array([4.0, 100.0]))
    split = Solver(problem, 2).best()
    assert split is not None
    assert dict(zip(split.order, split.counts, strict=True)) == {0: 4, 1: 6}
    assert Solver(replace(problem, room=np.array([4.0, 5.0])), 2).best() is None


def test_among_equal_splits_the_present_one_is_kept() -> None:
    problem = alike(3, 10)  # 4, 3, 3 in any order is best
    split = Solver(problem, 3).best(wanted=[2, 0, 1], cuts=[3, 7])
    assert split is not None
    assert (split.order, split.counts) == ((2, 0, 1), (3, 4, 3))
    spare = Solver(problem, 2).best(wanted=[1, 2], cuts=[5])
    assert spare is not None
    assert set(spare.order) == {1, 2}


def test_boundaries_stay_near_what_is_wanted() -> None:
    problem = alike(3, 12)
    split = split_near(problem, [0, 1, 2], bound=5.0, wanted=[2, 8])
    assert split is not None
    assert split.counts == (2, 5, 5)
    assert split_near(problem, [0, 1, 2], bound=3.0, wanted=[4, 8]) is None


def test_many_unlike_devices_and_layers_are_still_split_well() -> None:
    rng = np.random.default_rng(3)
    n, num_layers = 12, 24
    problem = replace(alike(n, num_layers), layers=rng.random((n, 1)) + 0.5 + 0.2 * rng.random((n, num_layers)))
    assert 2**n > search.MAX_SETS
    split = Solver(problem, 6).best()
    assert split is not None
    by_index = split_order(problem, range(6))
    assert by_index is not None
    assert split.largest <= by_index.largest
    fastest = split_order(problem, list(np.argsort(problem.layers.mean(axis=1))[:6]))
    assert fastest is not None
    assert split.largest <= fastest.largest * 1.1


def test_stage_times_add_up() -> None:
    problem = replace(alike(3, 6, last=2.0), stage=np.array([0.5, 0.25, 0.125]))
    assert stage_times(problem, [2, 0], [4, 2]) == [4.125, 4.5]
    assert make_split(problem, [2, 0], [4, 2]).cycle_s(replace(problem, in_flight=1.0)) == 8.625


@pytest.mark.parametrize("seed", range(60))
def test_what_devices_can_hold_is_the_best_of_all_assignments(seed: int) -> None:
    """Of every choice of k devices and of their two ends."""
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 6))
    caps = draw.integers(0, 9, (4, n)).astype(float)  # small numbers make ties
    caps[draw.random(caps.shape) < 0.1] = -1e9
    inner, first, last, only = caps
    for k in range(1, n + 1):
        orders = itertools.permutations(range(n), k)
        held = [only[d[0]] if k == 1 else first[d[0]] + last[d[-1]] + inner[list(d[1:-1])].sum() for d in orders]
        for num_layers in range(1, 40):
            assert compiled.bottlenecks.can_hold(caps, k, num_layers) == (max(held) >= num_layers)


@pytest.mark.parametrize("seed", range(30))
def test_among_equal_splits_the_one_near_the_present_is_chosen(seed: int) -> None:
    """A layout with the least bottleneck, anywhere among others, is given back when it is the present one; so are its devices."""
    draw = np.random.default_rng(seed)
    problem = replace(alike(6, 17, last=2.0), stage=draw.integers(0, 3, 6) / 4.0)
    k = int(draw.integers(1, 7))
    least = Uniform(problem, k).choose()
    assert least is not None
    equal = []
    for order in itertools.islice(itertools.permutations(range(6), k), int(draw.integers(0, 30)), None, 7):
        found = split_order(problem, order)
        if found is not None and found.largest <= least.largest * (1 + 1e-9):
            equal.append(found)
    for split in equal[:5]:
        cuts = list(itertools.accumulate(split.counts))[:-1]
        again = Uniform(problem, k).choose(split.order, cuts)
        assert again is not None
        assert again.order == split.order
        assert again.counts == split.counts


def test_memory_that_is_short_by_far() -> None:
    """The bottleneck lies many layers above what layers cut anywhere would give."""
    problem = replace(alike(12, 60), room=np.array([60.0] + [1.0] * 11))
    splits = [Uniform(problem, k).choose() for k in (2, 12)]
    assert [split and split.largest for split in splits] == [59.0, 49.0]
