"""Memory of a host among its workers: nothing is promised twice, and what was given is kept. And who hangs is given up."""

import random

import pytest

from runtime.messages import MAX_BUSY_S, MAX_READING_S, MIN_FREE_BYTES, UNIT_OF_LOAD, Heartbeat, Join
from scheduler.batching import BatchingConfig
from scheduler.events import EvictWorker, FromWorker
from scheduler.membership import Membership
from scheduler.state import ClusterConfig, SchedulerState
from tests.unit.load_harness import llama_8b

FREE = 1_000_000


def join(members: Membership, name: str, host: str = "here", free: int = FREE) -> None:
    members.join(Join(name, host, 1, "cpu", "", FREE, free + MIN_FREE_BYTES, 1, {}), 0.0)


def give(members: Membership, name: str, pages: int, weights: int) -> None:
    """As a worker does with its share, and says."""
    worker = members.workers[name]
    worker.room_bytes, worker.weight_bytes = pages + weights, weights
    worker.num_pages, worker.page_bytes = pages // 10, 10


def test_workers_that_start_together_have_equal_shares_whoever_else_is_there() -> None:
    members = Membership()
    for name in ("w0", "w1", "w2"):
        join(members, name)
    join(members, "far", host="there")
    weights = {"w0": 100, "w1": 300, "far": 500}
    given = [members.memory_for_pages(name, weights, 0.5) for name in weights]
    assert given == [(FREE - 400) // 4, (FREE - 400) // 4, (FREE - 500) // 2]


def test_one_that_comes_later_has_its_share_of_what_is_left() -> None:
    """Of what was free at first, not of what is free now: of that those that were first have touched some already."""
    members = Membership()
    join(members, "w0")
    join(members, "w1")
    for name in ("w0", "w1"):
        give(members, name, FREE // 4 - 100, 100)
    join(members, "w2", free=600_000)
    assert members.memory_for_pages("w2", {"w1": 50, "w2": 100}, 0.5) == (FREE // 2 - 100) // 2
    join(members, "w3", free=600_000)
    assert members.memory_for_pages("w2", {"w1": 50, "w2": 100, "w3": 100}, 0.5) == (FREE // 2 - 200) // 4


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_no_memory_is_promised_twice(seed: int, fraction: float) -> None:
    draw, members, num_joined = random.Random(seed), Membership(), 0

    def give_to(names: list[str], serving: list[str]) -> None:
        weights = {name: draw.randrange(FREE // 50) for name in serving}
        pages = {name: members.memory_for_pages(name, weights, fraction) for name in names}
        for name in names:
            give(members, name, pages[name], weights[name])

    for _ in range(60):
        names = list(members.workers)
        action = draw.random()
        if action < 0.3 or not names:
            join(members, f"w{num_joined}", free=FREE if not names else draw.randint(FREE // 2, FREE))
            num_joined += 1
        elif action < 0.4 and len(names) > 1:
            members.lose(draw.choice(names[1:]))
        elif action < 0.5:  # a layout from nothing
            members.forget_rooms()
            serving = draw.sample(names, draw.randint(1, len(names)))
            give_to(serving, serving)
        else:  # a layout after another
            serving = draw.sample(names, draw.randint(1, len(names)))
            give_to([name for name in serving if not members.workers[name].room_bytes], serving)
        claimed = [worker.claimed_bytes for worker in members.workers.values()]
        assert sum(claimed) <= FREE or min(w.num_pages for w in members.workers.values() if w.room_bytes) == 0


def test_a_pool_of_a_fixed_size_counts_too() -> None:
    members = Membership()
    join(members, "w0")
    join(members, "w1")
    worker = members.workers["w0"]
    worker.num_pages, worker.page_bytes, worker.weight_bytes = 30_000, 10, 100_000
    assert members.memory_for_pages("w1", {"w0": 0, "w1": 0}, 1.0) == FREE - 400_000


@pytest.mark.parametrize(
    ("busy_with", "busy_s", "is_lost"),
    [
        ("", 0.0, False),
        ("Step", MAX_BUSY_S, False),
        ("Step", MAX_BUSY_S + 1.0, True),
        ("background slice", MAX_BUSY_S + 1.0, True),
        ("Load", 100 * MAX_BUSY_S, False),
        (UNIT_OF_LOAD, MAX_READING_S, False),
        (UNIT_OF_LOAD, MAX_READING_S + 1.0, True),
    ],
)
def test_a_worker_that_beats_but_does_not_get_on_is_lost(busy_with: str, busy_s: float, is_lost: bool) -> None:
    head = SchedulerState(ClusterConfig(llama_8b(), 2), BatchingConfig())
    for name in ("w0", "w1"):
        head.step(FromWorker(Join(name, "host", 1, "cpu", "", FREE, FREE, 1, {}), 0.0))
    effects = head.step(FromWorker(Heartbeat("w0", 0, 0, 0, 0, busy_with, busy_s), 1.0))
    reason = f"it hangs, busy with one {busy_with} for {busy_s:.0f} s"
    assert [effect for effect in effects if isinstance(effect, EvictWorker)] == [EvictWorker("w0", reason)] * is_lost
    assert ("w0" in head.members.workers) is not is_lost


def test_what_is_asked_for_must_be_there_for_all_workers_of_a_host_together() -> None:
    members, weights = Membership(), {"w0": 100, "w1": 200}
    for name in ("w0", "w1", "w2"):
        join(members, name, free=0)
        members.free_bytes["here", "cpu"] = 20_000 << 20
    free = (20_000 << 20) - MIN_FREE_BYTES
    assert not members.shortage((free - 300) // 2, weights)
    said = members.shortage((free - 300) // 2 + 1, weights)
    assert said.startswith(
        "--kv-memory 9,744 MiB does not fit on here (cpu), where 19,488 MiB can be had: w0, w1 would have so much each"
    )
    assert "9,744 MiB each would fit. Start again with a smaller --kv-memory or without it" in said
    join(members, "far", host="there")
    assert not members.shortage((free - 100) // 1, {"w0": 100}), "a host has its own"
    assert "on there (cpu)" in members.shortage(free // 2, {"w0": 100, "far": 200})


def test_a_worker_that_comes_in_has_its_pool_while_the_others_have_theirs() -> None:
    members = Membership()
    free = 1 << 40
    for name in ("w0", "w1", "w2"):
        join(members, name, free=free)
    assert not members.shortage(free // 3, {"w2": 0}, ("w0", "w1"))
    assert members.shortage(free // 3 + 1, {"w2": 0}, ("w0", "w1"))
    assert not members.shortage(free, {"w0": 0}, ("w0", "w1")), "these have theirs"


def test_small_machines_may_be_content_with_tiny_pools() -> None:
    members = Membership()
    members.join(Join("w0", "here", 1, "cpu", "", FREE, MIN_FREE_BYTES // 2, 1, {}), 0.0)
    assert not members.shortage(1 << 20, {"w0": 0})
    assert members.shortage(MIN_FREE_BYTES // 4 + 1, {"w0": 0})


def test_what_was_free_at_first_is_remembered_as_long_as_somebody_is_there() -> None:
    """Who comes again finds less: the others have touched their pages."""
    members = Membership()
    join(members, "w0")
    join(members, "w1")
    for name in ("w0", "w1"):
        members.lose(name)
        join(members, f"{name}-r", free=FREE // 2)
    assert members.memory_for_pages("w0-r", {"w0-r": 0, "w1-r": 0}, 1.0) == FREE // 2
    for name in ("w0-r", "w1-r"):
        members.lose(name)
    join(members, "w2", free=FREE // 2)
    assert members.memory_for_pages("w2", {"w2": 0}, 1.0) == FREE // 2, "the host itself may be another"


def test_workers_are_listed_for_people() -> None:
    members = Membership()
    assert members.listed() == "none"
    for name in ("w10", "w2"):
        join(members, name)
    assert members.listed() == "w2, w10"
