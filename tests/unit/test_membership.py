"""Memory of a host among its workers: nothing is promised twice, and what was given is kept."""

import random

import pytest

from runtime.messages import Join
from scheduler.membership import Membership

FREE = 1_000_000


def join(members: Membership, name: str, host: str = "here", free: int = FREE) -> None:
    members.join(Join(name, host, 1, "cpu", "", FREE, free, 1, {}), 0.0)


def give(members: Membership, name: str, share: float) -> None:
    """As a worker does with its share, and says."""
    worker = members.workers[name]
    worker.room_bytes = int(FREE * share)
    worker.num_pages, worker.page_bytes, worker.weight_bytes = worker.room_bytes // 20, 10, worker.room_bytes // 2


def test_workers_that_start_together_have_equal_shares_whoever_else_is_there() -> None:
    members = Membership()
    for name in ("w0", "w1", "w2"):
        join(members, name)
    join(members, "far", host="there")
    assert [members.memory_share(name, ("w0", "w1", "far")) for name in ("w0", "w1", "far")] == [0.5, 0.5, 1.0]


def test_one_that_comes_later_has_its_share_of_what_is_left() -> None:
    members = Membership()
    join(members, "w0")
    join(members, "w1")
    for name in ("w0", "w1"):
        give(members, name, 0.25)
    join(members, "w2", free=600_000)
    assert members.memory_share("w2", ("w1", "w2")) == 0.5
    join(members, "w3", free=600_000)
    assert members.memory_share("w2", ("w1", "w2", "w3")) == 0.25


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_no_memory_is_promised_twice(seed: int, fraction: float) -> None:
    draw, members, num_joined = random.Random(seed), Membership(), 0
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
            shares = {name: fraction * members.memory_share(name, serving) for name in serving}
            for name, share in shares.items():
                give(members, name, share)
        else:  # a layout after another
            serving = draw.sample(names, draw.randint(1, len(names)))
            new = [name for name in serving if not members.workers[name].room_bytes]
            shares = {name: fraction * members.memory_share(name, serving) for name in new}
            for name, share in shares.items():
                give(members, name, share)
        assert sum(worker.claimed_bytes for worker in members.workers.values()) <= FREE


def test_a_pool_of_a_fixed_size_counts_too() -> None:
    members = Membership()
    join(members, "w0")
    join(members, "w1")
    worker = members.workers["w0"]
    worker.num_pages, worker.page_bytes, worker.weight_bytes = 30_000, 10, 100_000
    assert members.memory_share("w1", ("w0", "w1")) == pytest.approx(0.6)
