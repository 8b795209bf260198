"""The monitor: what it makes of a load, what it takes for a change of it, and how fast it forgets."""

import random

import pytest

from runtime.layout import layout_from_counts
from scheduler.planning.monitor import Monitor, Running
from tests.unit.load_harness import Phase, World, device, make

DEVICES = [device("a", "a100"), device("l", "l40s")]


def watched(seed: int, *phases: Phase) -> World:
    """A world that nobody changes, after these phases."""
    world = World(make("off"), DEVICES, DEVICES, layout_from_counts(1, ["a", "l"], [16, 16]), seed)
    world.run(*phases)
    return world


@pytest.mark.parametrize("seed", range(5))
def test_a_closed_loop_is_seen_as_it_is(seed: int) -> None:
    load = watched(seed, Phase(90, 256, 128, clients=24)).autopilot.monitor.load()
    assert load is not None
    assert load.is_closed
    assert load.traffic.requests_per_s == 0.0
    assert load.traffic.concurrency == pytest.approx(24, rel=0.02)
    assert load.traffic.prompt_tokens == pytest.approx(256, rel=0.1)
    assert load.traffic.output_tokens == pytest.approx(128, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_an_open_loop_is_seen_as_it_is(seed: int) -> None:
    load = watched(seed, Phase(120, 256, 64, rate=4.0)).autopilot.monitor.load()
    assert load is not None
    assert not load.is_closed
    assert load.traffic.requests_per_s == pytest.approx(4.0, rel=0.25)
    assert load.traffic.arrival_cv == pytest.approx(1.0, abs=0.25)
    assert load.traffic.output_tokens == pytest.approx(64, rel=0.15)


@pytest.mark.parametrize("seed", range(8))
def test_an_open_loop_that_fills_the_server_is_not_taken_for_clients(seed: int) -> None:
    """Slow requests pile up until as many end as come: for some seconds at a time their number hardly varies."""
    monitor, draw, running, tokens = Monitor(), random.Random(seed), list[tuple[float, float]](), 0
    next_s = 0.0
    for tick in range(1, 241):
        now_s = tick * 0.5
        while next_s < now_s:
            monitor.arrived(next_s, 64)
            running.append((next_s, next_s + draw.uniform(4.0, 8.0)))
            next_s += draw.expovariate(3.5)
        for arrived_s, ends_s in [request for request in running if request[1] <= now_s]:
            monitor.ended(ends_s, arrived_s, 64, 24, 0, ttft_s=0.5, decode_s=ends_s - arrived_s - 0.5)
            running.remove((arrived_s, ends_s))
        tokens += 2 * len(running)
        monitor.sample(now_s, [Running(arrived_s, 8) for arrived_s, _ in running], 0, tokens)
        load = monitor.load()
        assert load is None or not load.is_closed, now_s
    assert "clients" not in {shift.what for shift in monitor.shifts}


def test_no_load_is_none() -> None:
    monitor = Monitor()
    for tick in range(100):
        assert monitor.sample(tick * 0.5, [], 0, 0) is None
    assert monitor.load() is None


def test_a_steady_load_hardly_ever_seems_to_change() -> None:
    """Twelve times five minutes, closed and open: chance must not look like a shift more than once in half an hour."""
    worlds = [watched(seed, Phase(300, 256, 128, clients=16)) for seed in range(6)]
    worlds += [watched(seed, Phase(300, 256, 128, rate=3.0)) for seed in range(6)]
    assert sum(len(world.autopilot.monitor.shifts) for world in worlds) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_is_noticed_and_the_old_load_forgotten(seed: int) -> None:
    world = watched(seed, Phase(120, 448, 16, clients=32))
    assert not world.autopilot.monitor.shifts
    world.run(Phase(10, 128, 448, clients=32))
    (first, *_) = world.autopilot.monitor.shifts
    assert first.what == "prompt tokens"
    assert 110 < first.began_s < 122
    world.run(Phase(30, 128, 448, clients=32))
    load = world.autopilot.monitor.load()
    assert load is not None
    assert load.traffic.prompt_tokens < 180
    assert load.traffic.output_tokens > 300


@pytest.mark.parametrize("share", [1.0, 2.5])
def test_where_outputs_keep_to_their_limits_longer_ones_are_known_when_they_arrive(share: float) -> None:
    """All of it, or two fifths: prompts stay as they are, and after six seconds hardly any of the longer ones has ended."""
    world = watched(2, Phase(60, 256, 16, rate=4.0, limit=share), Phase(6, 256, 448, rate=4.0, limit=share))
    assert world.autopilot.monitor.shifts[0].what == "expected output tokens"
    load = world.autopilot.monitor.load()
    assert load is not None
    assert load.traffic.output_tokens == pytest.approx(448, rel=0.25)


@pytest.mark.parametrize("until_s", [60.5, 61.0])
def test_long_requests_of_the_second_of_the_shift_are_no_part_of_the_load_after_it(until_s: float) -> None:
    """A part of the old load is in the first bucket of the new one. Its requests want thirty times as much."""
    world = watched(2, Phase(until_s, 256, 480, rate=10.0, limit=1.0), Phase(4, 256, 16, rate=10.0, limit=1.0))
    assert world.autopilot.monitor.shifts[-1].what == "expected output tokens"
    load = world.autopilot.monitor.load()
    assert load is not None
    assert load.traffic.output_tokens == pytest.approx(16, rel=0.2)


def test_limits_that_nobody_keeps_to_say_nothing() -> None:
    """Outputs are as they are under one limit for all; then clients ask for a tenth, and get what they got before."""
    world = watched(2, Phase(60, 256, 32, rate=4.0), Phase(60, 256, 32, rate=4.0, limit=3.0))
    assert not world.autopilot.monitor.shifts
    load = world.autopilot.monitor.load()
    assert load is not None
    assert load.traffic.output_tokens == pytest.approx(32, rel=0.25)


def test_a_few_outputs_that_end_early_are_enough_to_doubt_limits() -> None:
    """Clients that got all they asked for give way to others that ask for thirty times as much, and do not get it."""
    world = watched(2, Phase(60, 256, 16, rate=4.0, limit=1.0), Phase(20, 256, 16, rate=4.0, limit=30.0))
    load = world.autopilot.monitor.load()
    assert load is not None
    assert load.traffic.output_tokens < 40


def test_another_rate_is_a_shift_and_so_are_more_clients() -> None:
    world = watched(1, Phase(60, 256, 32, rate=2.0), Phase(30, 256, 32, rate=12.0))
    assert "requests/s" in {shift.what for shift in world.autopilot.monitor.shifts}
    world = watched(1, Phase(60, 256, 32, clients=4), Phase(30, 256, 32, clients=32))
    assert "clients" in {shift.what for shift in world.autopilot.monitor.shifts}


def test_loads_that_take_turns_are_expected_to_go_on_doing_so() -> None:
    world = watched(3, *[Phase(20, 448, 16, clients=32), Phase(20, 128, 448, clients=32)] * 5)
    load, mixed = world.autopilot.monitor.load(), world.autopilot.monitor.load(mixed=True)
    assert load is not None
    assert mixed is not None
    assert load.remaining_s < 60
    assert 128 < mixed.traffic.prompt_tokens < 448
    assert watched(3, Phase(100, 448, 16, clients=32)).autopilot.monitor._remaining_s() == float("inf")


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_full_queue_is_no_closed_loop(is_refused: bool) -> None:
    """As many come as are served, and the number of those that wait is what the queue holds: clients that wait for answers, or an overload."""
    monitor, draw = Monitor(), random.Random(1)
    for tick in range(240):
        now_s = tick * 0.5
        for _ in range(draw.choice([2, 3])):
            monitor.arrived(now_s, 100)
            monitor.ended(now_s, now_s - 10, 100, 50, 0, ttft_s=8.0, decode_s=2.0)
            if is_refused:
                monitor.refused()
        monitor.sample(now_s, [Running(now_s - 2, 20)] * 32, 64 - draw.choice([0, 1, 2]), tick * 125)
    load = monitor.load()
    assert load is not None
    assert load.is_closed is not is_refused
    assert load.traffic.requests_per_s == pytest.approx(5.0 if is_refused else 0.0, rel=0.1)


def test_a_pause_ends_a_load() -> None:
    monitor, draw = Monitor(), random.Random(1)
    tokens = 0
    for start_s, prompt in ((0.0, 500), (60.0, 50)):
        for tick in range(40):
            now_s = start_s + tick * 0.5
            monitor.arrived(now_s, prompt + draw.randrange(10))
            tokens += 10
            monitor.sample(now_s, [Running(now_s, 5)], 0, tokens)
        for tick in range(40):
            monitor.sample(start_s + 20 + tick * 0.5, [], 0, tokens)
    load = monitor.load()
    assert load is not None
    assert load.traffic.prompt_tokens < 100
    assert not monitor.shifts


def test_a_head_that_stood_still_under_load_goes_on() -> None:
    """Its container was paused for longer than the window, with requests in service."""
    monitor = Monitor()
    for tick in range(20):
        monitor.arrived(tick * 0.5, 100)
        monitor.sample(tick * 0.5, [Running(0.0, 5)], 0, tick * 10)
    for tick in range(20):
        monitor.arrived(220.0 + tick * 0.5, 100)
        monitor.sample(220.0 + tick * 0.5, [Running(0.0, 5)], 0, 400 + tick * 10)
    assert monitor.load() is not None
    assert monitor.load(mixed=True) is not None


def test_a_pause_is_no_gap_between_arrivals() -> None:
    """After an idle night arrivals are as even as they were."""
    monitor, tokens = Monitor(), 0
    for tick in range(2000):
        now_s, is_busy = tick * 0.5, tick < 120 or tick >= 1880
        if is_busy and tick % 2 == 0:
            monitor.arrived(now_s, 100)
        tokens += 10 * is_busy
        monitor.sample(now_s, [Running(now_s, 5)] * is_busy, 0, tokens)
    load = monitor.load()
    assert load is not None
    assert load.traffic.arrival_cv < 0.5
