"""The autopilot in a world of simulated loads: it acts when it pays, never flaps, and learns what predictions are worth."""

import math
from itertools import pairwise

import pytest

from runtime.layout import layout_from_counts
from scheduler.planning.forecast import Device
from tests.unit.load_harness import Phase, World, device, make

MIXED = [device("a", "a100"), device("l", "l40s")]
PREFILL = Phase(60, 448, 16, clients=32)
DECODE = Phase(60, 128, 448, clients=32)


def world_of(seed: int, mode: str = "on", true: list[Device] | None = None, **settings: object) -> World:
    start = layout_from_counts(1, ["a", "l"], [16, 16])
    return World(make(mode, **settings), true or MIXED, MIXED, start, seed)


def kinds(world: World) -> list[str]:
    return [entry.kind for entry in world.autopilot.log]


@pytest.mark.parametrize("seed", range(8))
def test_a_steady_load_gets_its_layout_once(seed: int) -> None:
    world = world_of(seed)
    world.run(Phase(900, 256, 256, clients=32))
    assert len(world.changes) == 1, "a bad layout is left, and the good one never"
    assert world.changes[0][0] < 30
    assert world.autopilot.trust > 0.8


@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_never_moves_a_good_layout(seed: int) -> None:
    """Lengths that vary by a factor of e, arrivals at random, and a layout that is nearly right."""
    world = world_of(seed)
    world.spread = 1.0
    world.present = layout_from_counts(1, ["a"], [32])
    world.run(Phase(900, 256, 256, clients=32))
    assert world.changes == []
    world.run(Phase(600, 256, 128, rate=3.0))
    assert len(world.changes) <= 1


def test_it_follows_a_load_that_shifts_for_good() -> None:
    world = world_of(1)
    world.run(PREFILL, DECODE)
    served = world.tokens
    assert world.changes
    assert world.changes[-1][0] < 60 + 30
    never = world_of(1, "off")
    never.run(PREFILL, DECODE)
    assert served > 1.2 * never.tokens


def test_what_a_load_has_cost_since_it_began_counts() -> None:
    """Enough is seen of the load only when it has gone on for a while; what it has cost by then is not forgotten."""
    world = world_of(1, min_age_s=5.0)
    world.run(Phase(60, 448, 16, clients=32, limit=1.0), Phase(60, 128, 448, clients=32, limit=1.0))
    (change,) = [entry for entry in world.autopilot.log if entry.kind == "change" and entry.at_s > 60]
    enough_s = max(5.0, change.numbers["cost_s"] / change.numbers["gain"])
    assert change.at_s <= 60 + enough_s + 2.5 * world.autopilot.settings.interval_s


def test_a_load_that_has_changed_is_looked_at_when_enough_is_known_of_it() -> None:
    """Not when the next look would be due, half a minute later."""
    world = world_of(1, interval_s=30.0, change_s=0.0, layer_s=0.0, overhead=0.0)
    world.run(Phase(50, 448, 16, clients=32, limit=1.0), Phase(15, 128, 448, clients=32, limit=1.0))
    (change,) = [entry for entry in world.autopilot.log if entry.kind == "change" and entry.at_s > 50]
    assert change.at_s <= 50 + world.autopilot.settings.min_age_s + 1.0


@pytest.mark.parametrize("period_s", [2, 4, 8, 15])
def test_an_oscillating_load_is_not_chased(period_s: int) -> None:
    """Ten minutes of two loads that want opposite layouts: few changes, and more served than by standing still."""
    phases = [
        Phase(period_s, 448, 16, clients=32),
        Phase(period_s, 128, 448, clients=32),
    ] * (300 // period_s)
    world, never = world_of(2), world_of(2, "off")
    world.run(*phases)
    never.run(*phases)
    assert len(world.changes) <= 6
    late = [at_s for at_s, _ in world.changes if at_s > 360]
    assert len(late) <= 1, "it has settled"
    assert world.tokens > never.tokens


def test_changes_are_never_closer_than_the_minimum_stay() -> None:
    world = world_of(5, min_stay_s=40.0)
    world.run(*[PREFILL, DECODE] * 5)
    times = [at_s for at_s, _ in world.changes]
    assert len(times) >= 2
    assert all(b - a >= 40.0 for a, b in pairwise(times))


def test_advice_is_given_once_and_nothing_is_done() -> None:
    world = world_of(1, "advise")
    world.run(Phase(300, 256, 256, clients=32))
    assert world.changes == []
    assert kinds(world).count("advice") == 1
    off = world_of(1, "off")
    off.run(Phase(300, 256, 256, clients=32))
    assert off.autopilot.plan is None


def test_it_learns_from_predictions_that_do_not_come_true() -> None:
    """The fast device is not fast: what was promised does not come, and the next promise counts for less."""
    world = world_of(1, true=[device("a", "a100", slower=2.4), device("l", "l40s")])
    world.run(Phase(120, 128, 256, clients=32))
    assert len(world.changes) == 1
    assert "result" in kinds(world)
    assert world.autopilot.trust <= 0.7
    found = world.autopilot.plan
    assert found is not None
    assert world.autopilot.worth(found) <= 0.7 * found.gain


def test_a_refused_layout_is_left_alone_for_longer_each_time() -> None:
    world = world_of(1)
    world.refuse = "no room"
    world.run(Phase(600, 256, 256, clients=32))
    times = [at_s for at_s, _ in world.changes]
    assert 2 <= len(times) <= 5
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps[0] >= 60
    assert gaps == sorted(gaps)


def test_a_layout_is_left_alone_for_an_hour_at_most() -> None:
    pilot, layout = make(), layout_from_counts(1, ["a", "l"], [20, 12])
    for _ in range(20):
        pilot.failed(1000.0, layout, "no")
    assert pilot._blocked[layout.segments][0] == 1000.0 + 3600.0
    for first in range(1, 32):
        for order in (["a", "l"], ["l", "a"], ["a", "m"], ["m", "a"]):
            pilot.failed(1000.0, layout_from_counts(1, order, [first, 32 - first]), "no")
    assert len(pilot._blocked) <= 64
    pilot.failed(1000.0, layout, "no")
    pilot.committed(2000.0, layout)
    assert layout.segments not in pilot._blocked, "it could be got to after all"


def test_a_load_far_below_capacity_is_no_reason_to_move() -> None:
    world = world_of(1)
    world.run(Phase(300, 128, 32, rate=0.5))
    assert world.changes == []


def test_elastic_gives_workers_back_and_takes_them_again() -> None:
    devices = [device(f"l{i}", "l40s") for i in range(4)]
    start = layout_from_counts(1, [d.worker for d in devices], [8, 8, 8, 8])
    world = World(make("on", elastic=True), devices, devices, start, 1)
    world.run(Phase(300, 256, 128, rate=2.0))
    assert len(world.present.workers) == 1
    workers = world.autopilot.workers
    assert workers is not None
    assert workers.wanted == 1
    assert len(workers.spare) == 3
    world.run(Phase(120, 256, 128, rate=60.0))
    assert len(world.present.workers) == 4
    assert len(world.changes) <= 4


def test_elastic_grows_by_as_many_as_the_load_needs() -> None:
    """Not only when it takes all that the best layout of all would use."""
    devices = [device(f"l{i}", "l40s") for i in range(4)]
    world = World(make("on", elastic=True), devices, devices, layout_from_counts(1, ["l0"], [32]), 1)
    world.run(Phase(120, 256, 128, rate=2.0))
    assert len(world.present.workers) == 1
    world.run(Phase(120, 256, 128, rate=22.0))
    assert len(world.present.workers) in (2, 3)
    assert len(world.changes) <= 2


def test_elastic_does_not_follow_a_load_that_goes_up_and_down() -> None:
    """By a quarter in three minutes, around what one worker carries."""
    devices = [device(f"l{i}", "l40s") for i in range(4)]
    world = World(make("on", elastic=True), devices, devices, layout_from_counts(1, ["l0"], [32]), 4)
    world.run(*[Phase(20, 256, 128, rate=18.0 * (1 + math.sin(k * math.tau / 9) / 4)) for k in range(45)])
    assert len(world.changes) <= 4
    assert len(world.present.workers) == 2


@pytest.mark.parametrize("phase", [Phase(240, 256, 16, rate=60.0), Phase(240, 256, 16, clients=64)])
@pytest.mark.parametrize("every_s", [30, 900])
def test_elastic_gives_workers_back_when_hardly_anything_is_asked(phase: Phase, every_s: int) -> None:
    """A request now and then, or none: each pause ends a load, and none of those lasts long enough to be planned for."""
    devices = [device(f"l{i}", "l40s") for i in range(4)]
    start = layout_from_counts(1, [d.worker for d in devices], [8, 8, 8, 8])
    world = World(make("on", elastic=True), devices, devices, start, 1)
    world.run(phase)
    assert len(world.present.workers) > 1
    for _ in range(900 // every_s):
        world.run(Phase(0.5, 256, 16, rate=2.0), Phase(every_s, 256, 16))
    assert len(world.present.workers) == 1
    assert world.autopilot.workers is not None
    assert world.autopilot.workers.wanted == 1


def test_a_short_pause_gives_no_worker_back() -> None:
    devices = [device(f"l{i}", "l40s") for i in range(4)]
    start = layout_from_counts(1, [d.worker for d in devices], [8, 8, 8, 8])
    world = World(make("on", elastic=True), devices, devices, start, 1)
    for _ in range(5):
        world.run(Phase(60, 256, 16, clients=64), Phase(40, 256, 16))
        assert len(world.present.workers) == 4


def test_more_workers_are_wanted_when_those_there_are_cannot_carry_the_load() -> None:
    devices = [device("l0", "l40s")]
    world = World(make("advise"), devices, devices, layout_from_counts(1, ["l0"], [32]), 1)
    world.run(Phase(30, 256, 128, rate=35.0))
    workers = world.autopilot.workers
    assert workers is not None
    assert (workers.present, workers.used) == (1, 1)
    assert workers.wanted > 1
