"""Requests as large as may be asked for, while the room goes up and down: what is accepted is answered, whatever the layout becomes.

Workers have pools of different sizes. What may be asked for is what both ends of a change hold; a hop between them may hold less, so
a request may have to wait for the end of the change, but nobody behind it has to.
"""

import random
from collections import Counter

import pytest

from runtime.messages import Sampling
from scheduler.batching import BatchingConfig
from scheduler.request import Request
from scheduler.transition import STRATEGIES, Strategy
from tests.sim import of_seeds
from tests.sim.cluster import VOCAB, SimCluster, layout_of, random_layout
from tests.sim.test_cluster import check, seeds_of

BLOCK_SIZE = 4


def large(seed: int) -> SimCluster:
    """Some requests need all that there is, some little; layouts of any kind, and sometimes a worker dies."""
    rng = random.Random(f"large {seed}")
    num_stages = rng.choice((1, 2, 2, 3))
    batching = BatchingConfig(
        num_microbatches=rng.randint(0, num_stages + 1),
        max_step_tokens=rng.choice((8, 64)),
        max_running=rng.choice((2, 4, 8)),
        block_size=BLOCK_SIZE,
        prefix_cache=rng.random() < 0.5,
    )
    cluster = SimCluster(
        seed,
        num_stages=num_stages,
        batching=batching,
        num_blocks=rng.randint(8, 16),
        num_spares=rng.randint(0, 2),
        is_elastic=rng.random() < 0.5,
    )
    cluster.page_shares = (1.0, 1.0, 1.5, 2.5)
    at = 0.6
    for sequence in range(1, rng.randint(4, 12)):
        at += rng.expovariate(15.0)
        share, num_tokens = rng.choice((0.1, 0.5, 0.9, 1.0)), rng.choice((1, 4, 20, 40))
        cluster.at(at, lambda s=sequence, f=share, n=num_tokens: submit(cluster, s, f, n))
    for _ in range(rng.randint(1, 5)):
        cluster.at(rng.uniform(0.5, at + 0.2), lambda: ask(cluster))
    if rng.random() < 0.2:
        cluster.at(rng.uniform(0.6, at), lambda: cluster.crash(cluster.random.choice(sorted(cluster.workers))))
    for index in range(1, 120):
        cluster.at(0.5 * index, cluster.tick)
    return cluster


def submit(cluster: SimCluster, sequence: int, share: float, num_tokens: int) -> None:
    """A request that needs this share of what may be asked for just now."""
    needed = max(2, int(share * cluster.head.batcher.max_context))
    num_tokens = min(num_tokens, needed - 1)
    prompt = [cluster.random.randrange(VOCAB) for _ in range(needed - num_tokens)]
    cluster.submit(sequence, Request(f"{sequence}", prompt, Sampling(temperature=0.0), max_tokens=num_tokens))


def ask(cluster: SimCluster) -> None:
    rng, names = cluster.random, cluster.head.members.in_order()
    if names:
        strategy = "live" if rng.random() < 0.5 else rng.choice(STRATEGIES)
        cluster.change(random_layout(rng, names), strategy, queue=rng.random() < 0.5, deadline_s=rng.choice((0.3, 1e9)))
        if rng.random() < 0.2:
            latest = cluster.changes
            cluster.at(rng.uniform(0.0, 0.5), lambda: cluster.abort_change(latest))


def with_large_requests(seed: int) -> Counter[str]:
    cluster = large(seed)
    check(cluster, until=60.0)
    head = cluster.head
    reports = head.reconfiguration.reports.values()
    assert all(report.outcome in ("committed", "aborted", "refused") for report in reports)
    counts = Counter({report.outcome: 1 for report in reports}, hops=sum(report.num_hops > 1 for report in reports))
    if not head.members.num_lost:
        assert not [error for error in cluster.rejected if error.status == 400], "it was no more than may be asked for"
        if (
            not cluster.is_elastic
        ):  # such a pool may get back less than it gave, and what no longer fits ends with an error
            assert all(stream.finish_reason != "error" for stream in cluster.streams.values())
    return counts


def test_what_is_accepted_is_answered(block: int) -> None:
    counts = of_seeds(with_large_requests, seeds_of(6, block))
    assert counts["committed"]
    assert counts["hops"], "there was always room"
    assert counts["refused"] or counts["aborted"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_request_that_comes_during_a_change_to_a_smaller_layout_fits_it(strategy: Strategy) -> None:
    """Two stages hold twice what one does. In the middle somebody asks for what only two hold: that is refused, not accepted and
    never answered; and those behind it do not wait."""
    batching = BatchingConfig(prefix_cache=False, block_size=BLOCK_SIZE)
    cluster = SimCluster(1, num_stages=2, batching=batching, num_blocks=28)
    cluster.at(0.6, lambda: submit(cluster, 0, 0.3, 60))
    cluster.at(0.7, lambda: cluster.change(layout_of(("w0", 0, 5)), strategy))
    too_large = Request("large", [5] * 20, Sampling(temperature=0.0), max_tokens=130)
    cluster.at(0.701, lambda: cluster.submit(1, too_large))
    cluster.at(0.702, lambda: submit(cluster, 2, 1.0, 5))
    cluster.at(0.703, lambda: submit(cluster, 3, 0.1, 5))
    for index in range(1, 60):
        cluster.at(0.5 * index, cluster.tick)
    check(cluster, until=30.0)
    assert not cluster.refused
    assert [error.status for error in cluster.rejected] == [400]
    assert "at most 112 are possible here" in str(cluster.rejected[0])
    assert sorted(cluster.streams) == [0, 2, 3]
    assert cluster.head.reconfiguration.reports[1].outcome == "committed"


@pytest.mark.parametrize("num_large", [1, 2, 4])
def test_a_drain_lets_requests_end_that_the_new_layout_cannot_hold(num_large: int) -> None:
    """Two stages hold twice what one does. What runs needs all of that, and ends whole, also those that are preempted meanwhile; what waits
    goes on in the new layout; what comes during the drain and would not fit there is refused. Another strategy is refused itself."""
    batching = BatchingConfig(prefix_cache=False, block_size=BLOCK_SIZE, max_running=num_large)
    cluster = SimCluster(1, num_stages=2, batching=batching, num_blocks=28)
    for sequence in range(num_large):
        large = Request("large", [5 + sequence] * 20, Sampling(temperature=0.0), max_tokens=130)
        cluster.at(0.6, lambda s=sequence, r=large: cluster.submit(s, r))
    small = Request("small", [9] * 8, Sampling(temperature=0.0), max_tokens=8)
    cluster.at(0.65, lambda: cluster.submit(10, small))
    alone = layout_of(("w0", 0, 5))
    cluster.at(0.7, lambda: cluster.change(alone))
    cluster.at(0.701, lambda: cluster.change(alone, "drain"))
    late = Request("late", [5] * 20, Sampling(temperature=0.0), max_tokens=130)
    cluster.at(0.75, lambda: cluster.submit(11, late))
    cluster.at(0.75, lambda: cluster.submit(12, small))
    for index in range(1, 100):
        cluster.at(0.5 * index, cluster.tick)
    check(cluster, until=60.0)
    (refused,) = cluster.refused
    assert "may need 150" in str(refused)
    assert "With --strategy drain it ends first" in str(refused)
    (rejected,) = cluster.rejected
    assert (rejected.status, "at most 112 are possible here" in str(rejected)) == (400, True)
    report = cluster.head.reconfiguration.reports[2]
    assert (report.outcome, report.dropped_requests) == ("committed", 0)
    assert sorted(cluster.streams) == [*range(num_large), 10, 12]
    assert all(stream.finish_reason in ("stop", "length") for stream in cluster.streams.values())
    counters = cluster.head.batcher.counters
    assert bool(counters.preemptions) == (num_large > 1)


def swap(strategy: Strategy, *, deadline_s: float = 1e9) -> SimCluster:
    """Workers change places, with more in use than both hold at once; at the first hop more requests come, one as large as may be."""
    batching = BatchingConfig(prefix_cache=False, block_size=BLOCK_SIZE)
    cluster = SimCluster(1, num_stages=3, batching=batching, num_blocks=28, num_spares=1)
    cluster.at(0.005, lambda: setattr(cluster.workers["w0"], "num_pages", 60))
    cluster.at(0.6, lambda: cluster.change(layout_of(("w0", 0, 1), ("w1", 1, 3), ("w2", 3, 5))))
    for sequence in range(3):
        request = Request("a", [1 + sequence] * 20, Sampling(temperature=0.0), max_tokens=60)
        cluster.at(1.2, lambda s=sequence, r=request: cluster.submit(s, r))
    asked: list[str] = []

    def look() -> None:
        view = cluster.head.reconfiguration.view()
        needed = cluster.head.pool.num_used + cluster.head.batcher.num_running + 2
        if not asked and view is None and 36 < needed <= 44:
            asked.append("change")
            cluster.change(layout_of(("w3", 0, 1), ("w2", 1, 4), ("w0", 4, 5)), strategy, deadline_s=deadline_s)
        elif len(asked) == 1 and view and view["hop"] == 1 and view["phase"] in ("shadow", "copy"):
            asked.append("requests")
            assert (int(str(view["num_hops"])) > 1) == (strategy != "drain")  # who runs ends first
            submit(cluster, 7, 1.0, 30)
            for sequence in range(20, 28):
                submit(cluster, sequence, 0.15, 12)

    for index in range(2000):
        cluster.at(1.2 + 0.002 * index, look)
    for index in range(1, 100):
        cluster.at(0.5 * index, cluster.tick)
    check(cluster, until=60.0)
    assert asked == ["change", "requests"]
    assert len(cluster.streams) == 12
    return cluster


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_hops_end_with_all_that_waits(strategy: Strategy) -> None:
    assert swap(strategy).head.reconfiguration.reports[2].outcome == "committed"


@pytest.mark.parametrize("how", ["DELETE", "the deadline of a later hop"])
def test_who_runs_is_not_stranded_on_the_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers exchange their layers one by one. After the first of them the larger one holds three, and less KV than a running
    request may need: whoever gives the change up then finds it where it began."""
    monkeypatch.setattr("scheduler.reconfiguration.LATER_HOP_S", 1.0)
    batching = BatchingConfig(prefix_cache=False, block_size=BLOCK_SIZE)
    cluster = SimCluster(1, num_stages=3, batching=batching, num_blocks=12)

    def shrink() -> None:
        if "w1" in cluster.workers:
            cluster.workers["w1"].num_pages = 48

    for index in range(100):
        cluster.at(0.001 * index, shrink)
    cluster.at(0.6, lambda: cluster.change(layout_of(("w0", 0, 2), ("w1", 2, 4), ("w2", 4, 5))))
    given_up: list[int] = []
    deleted: list[bool] = []

    def look() -> None:
        view, now = cluster.head.reconfiguration.view(), cluster.head.reconfiguration._now
        if now is not None and now.course.turned_back and not deleted:
            deleted.append(cluster.head.reconfiguration.is_aborting(2))
            cluster.abort_change(2)
        if given_up or not view or view["id"] != 2:
            return
        if how == "DELETE" and (view["hop"], view["phase"]) == (1, "flip"):
            given_up.append(1)
            cluster.abort_change(2)
        elif how != "DELETE" and (view["hop"], view["phase"]) == (2, "prepare"):
            given_up.append(2)
            for worker in cluster.workers.values():
                store, shadow = worker.store, worker.store.shadow
                store.cancel_shadow()
                store.shadow = lambda *_: None  # type: ignore[method-assign]
                cluster.at(0.9, lambda s=store, f=shadow: setattr(s, "shadow", f))

    for index in range(3000):
        cluster.at(1.2 + 0.001 * index, look)
    for sequence in range(2):
        long = Request("a", [1 + sequence] * 14, Sampling(temperature=0.0), max_tokens=80)
        cluster.at(1.2, lambda s=sequence, r=long: cluster.submit(s, r))
    target = layout_of(("w1", 0, 2), ("w0", 2, 4), ("w2", 4, 5))
    cluster.at(1.201, lambda: cluster.change(target, deadline_s=1.0))
    for index in range(1, 100):
        cluster.at(0.5 * index, cluster.tick)
    check(cluster, until=60.0)
    assert given_up
    assert deleted == [True], "whoever asks again hears that it goes back"
    report = cluster.head.reconfiguration.reports[2]
    assert report.outcome == "aborted"
    assert "a running request may need 94. It is back at" in report.why
    assert report.reached == report.source
    assert report.dropped_requests == 0
    assert [stream.finish_reason for stream in cluster.streams.values()] == ["length"] * 2
