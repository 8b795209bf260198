"""Thousands of seeds of the real thing over a network that delays, reorders and duplicates, with workers that die."""

import random
from collections import Counter

from scheduler.batching import BatchingConfig
from scheduler.transition import STRATEGIES
from tests.sim import SEEDS_PER_BLOCK, of_seeds
from tests.sim.cluster import SimCluster, make_request, random_layout, reference


def scenario(seed: int, *, crashes: bool = False, changes: bool = False, lossy: bool = False) -> SimCluster:
    rng = random.Random(f"scenario {seed}")
    num_stages = rng.randint(1, 4)
    block_size = rng.choice((2, 4, 8))
    batching = BatchingConfig(
        num_microbatches=rng.randint(0, num_stages + 1),
        max_step_tokens=rng.choice((3, 8, 64)),
        max_running=rng.choice((2, 6, 64)),
        max_queue=rng.choice((3, 100)),
        block_size=block_size,
        prefix_cache=rng.random() < 0.8,
        look_ahead=rng.choice(("never", "idle", "always", "always")),
    )
    tight = rng.random() < 0.5
    num_blocks = -(-60 // block_size) + (0 if tight else 60)
    cluster = SimCluster(
        seed,
        num_stages=num_stages,
        batching=batching,
        num_blocks=num_blocks,
        num_spares=rng.randint(0, 2) if changes else 0,
        shadow_failures=rng.choice((0.0, 0.1)) if changes else 0.0,
        spares_without_memory=changes and not crashes and not lossy and rng.random() < 0.1,
        is_elastic=changes and rng.random() < 0.5,
        heartbeat_timeout_s=2.0 if lossy else 15.0,
    )
    prompts: list[list[int]] = []
    at = 0.6
    for sequence in range(1, rng.randint(3, 25)):
        at += rng.choice((0.0, 0.002, rng.expovariate(50.0)))
        request = make_request(rng, prompts, max_prompt=30, max_output=30)
        cluster.at(at, lambda s=sequence, r=request: cluster.submit(s, r))
        if rng.random() < 0.15:
            cluster.at(at + rng.uniform(0.0, 0.1), lambda s=sequence: cluster.cancel(s))
    if changes:
        for _ in range(rng.randint(1, 6)):
            cluster.at(rng.uniform(0.5, at + 1.0), lambda: change(cluster))
    if crashes:
        for _ in range(rng.randint(1, 3)):
            cluster.at(
                rng.uniform(0.4, at + 0.3), lambda: cluster.crash(cluster.random.choice(sorted(cluster.workers)))
            )
    for _ in range(rng.randint(0, 4)):
        cluster.at(rng.uniform(0.6, at + 0.3), cluster.audit_at_work)
    for index in range(1, 120):
        cluster.at(0.5 * index, cluster.tick)
    return cluster


def change(cluster: SimCluster) -> None:
    """Ask for some layout over the workers that the head knows."""
    rng, names = cluster.random, cluster.head.members.in_order()
    if not names:
        return
    strategy = "live" if rng.random() < 0.7 else rng.choice(STRATEGIES)
    deadline_s = 0.05 if rng.random() < 0.1 else 1e9
    cluster.change(random_layout(rng, names), strategy, queue=rng.random() < 0.5, deadline_s=deadline_s)
    if rng.random() < 0.15:
        latest = cluster.changes
        cluster.at(rng.uniform(0.0, 0.3), lambda: cluster.abort_change(latest))


def check(cluster: SimCluster, *, until: float = 25.0) -> None:
    cluster.run(until)
    alive = [w for w in cluster.workers.values() if w.alive]
    for error in cluster.rejected:
        assert error.status in (429, 400, 503), error
    for sequence, stream in cluster.streams.items():
        expected = reference(stream.request)
        if stream.cancelled:
            assert expected[: len(stream.tokens)] == stream.tokens, f"sequence {sequence} said something else"
        elif alive:
            assert stream.finish_reason in ("stop", "length", "error"), f"sequence {sequence} never ended"
            if stream.finish_reason != "error":
                assert stream.tokens == expected, f"sequence {sequence} differs from the reference"
    if alive:
        assert cluster.head.batcher.num_unfinished == 0
        assert cluster.head.pool.num_used == 0
        assert not cluster.head.reconfiguration.is_active
    cluster.audit()


def seeds_of(family: int, block: int) -> range:
    first = family * 1_000_000 + block * SEEDS_PER_BLOCK
    return range(first, first + SEEDS_PER_BLOCK)


def plain(seed: int) -> Counter[str]:
    cluster = scenario(seed)
    check(cluster)
    counters = cluster.head.batcher.counters
    return Counter(ahead=counters.steps_ahead, discarded=counters.discarded_tokens)


def with_crashes(seed: int) -> Counter[str]:
    check(scenario(seed, crashes=True))
    return Counter()


def with_changes(seed: int) -> Counter[str]:
    cluster = scenario(seed, changes=True)
    check(cluster)
    for report in cluster.head.reconfiguration.reports.values():
        assert report.outcome in ("committed", "aborted", "refused"), report
        assert report.dropped_requests == 0
        assert "KV pages are needed" not in report.why, "more blocks were handed out than fit beside the weights"
    assert all(stream.finish_reason != "error" for stream in cluster.streams.values())
    return Counter(fetched=cluster.num_fetched, resized=cluster.num_resized)


def with_changes_and_crashes(seed: int) -> Counter[str]:
    check(scenario(seed, changes=True, crashes=True))
    return Counter()


def test_every_stream_equals_the_reference(block: int) -> None:
    counts = of_seeds(plain, seeds_of(0, block))
    assert counts["ahead"], "no step was formed ahead of what it reads"
    assert counts["discarded"], "no sequence ever ended on a token that was not foreseen"


def test_streams_outlive_crashes(block: int) -> None:
    of_seeds(with_crashes, seeds_of(1, block))


def test_layout_changes_change_nothing_else(block: int) -> None:
    counts = of_seeds(with_changes, seeds_of(2, block))
    assert counts["fetched"], "no unit ever came from a peer"
    assert counts["resized"], "no pool ever changed its size"


def test_layout_changes_and_crashes(block: int) -> None:
    of_seeds(with_changes_and_crashes, seeds_of(3, block))
