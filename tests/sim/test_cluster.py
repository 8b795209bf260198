"""Thousands of seeds of the real scheduler over a network that delays, reorders and duplicates, with workers that die."""

import random

import pytest

from scheduler.batching import BatchingConfig
from tests.sim.cluster import SimCluster, make_request, reference


def scenario(seed: int, *, crashes: bool) -> SimCluster:
    rng = random.Random(f"scenario {seed}")
    num_stages = rng.randint(1, 4)
    block_size = rng.choice((2, 4, 8))
    batching = BatchingConfig(
        num_microbatches=rng.randint(1, num_stages + 1),
        max_step_tokens=rng.choice((3, 8, 64)),
        max_running=rng.choice((2, 6, 64)),
        max_queue=rng.choice((3, 100)),
        block_size=block_size,
        prefix_cache=rng.random() < 0.8,
    )
    tight = rng.random() < 0.5
    num_blocks = -(-60 // block_size) + (0 if tight else 60)
    cluster = SimCluster(seed, num_stages=num_stages, batching=batching, num_blocks=num_blocks)
    prompts: list[list[int]] = []
    at = 0.6
    for sequence in range(1, rng.randint(3, 25)):
        at += rng.choice((0.0, 0.002, rng.expovariate(50.0)))
        request = make_request(rng, prompts, max_prompt=30, max_output=30)
        cluster.at(at, lambda s=sequence, r=request: cluster.submit(s, r))
        if rng.random() < 0.15:
            cluster.at(at + rng.uniform(0.0, 0.1), lambda s=sequence: cluster.cancel(s))
    if crashes:
        for _ in range(rng.randint(1, 3)):
            cluster.at(
                rng.uniform(0.4, at + 0.3), lambda: cluster.crash(cluster.random.choice(sorted(cluster.workers)))
            )
    for index in range(1, 60):
        cluster.at(0.5 * index, cluster.tick)
    return cluster


def check(cluster: SimCluster) -> None:
    cluster.run(until=25.0)
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
    cluster.head.check_integrity()


@pytest.mark.parametrize("block", range(10))
def test_every_stream_equals_the_reference(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        check(scenario(seed, crashes=False))


@pytest.mark.parametrize("block", range(10))
def test_streams_outlive_crashes(block: int) -> None:
    for seed in range(10_000 + block * 40, 10_000 + block * 40 + 40):
        check(scenario(seed, crashes=True))
