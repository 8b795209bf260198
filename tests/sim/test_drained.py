"""A drained worker gets no layers by itself: neither by a recovery nor by the autopilot. But rather it serves than nobody."""

import pytest

from scheduler.batching import BatchingConfig
from scheduler.events import Resume
from tests.sim.cluster import SimCluster, serving_at_the_end, submit_long


def serve(seed: int, *, num_stages: int) -> SimCluster:
    """So many stages and a spare, which an operator has drained."""
    cluster = SimCluster(seed, num_stages=num_stages, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    cluster.at(0.52, lambda: cluster.head.members.drain(f"w{num_stages}"))
    submit_long(cluster, 3, max_tokens=120)
    return cluster


@pytest.mark.parametrize("seed", range(10))
def test_a_recovery_leaves_it_out(seed: int) -> None:
    """Whether the worker that was lost starts again or not."""
    cluster = serve(seed, num_stages=2)
    cluster.at(0.55, lambda: cluster.crash("w0"))
    serving = serving_at_the_end(cluster, 3)
    assert len(serving) == 1 + cluster.restarts
    assert "w2" not in serving
    assert "w2" not in [device.worker for device in cluster.head.pilot.devices(cluster.head)]
    cluster.handle(Resume("w2", cluster.now))
    assert "w2" in [device.worker for device in cluster.head.pilot.devices(cluster.head)]


@pytest.mark.parametrize("seed", range(10))
def test_it_serves_when_nobody_else_is_left(seed: int) -> None:
    cluster = serve(seed, num_stages=1)
    cluster.at(0.55, lambda: cluster.crash("w0"))
    assert serving_at_the_end(cluster, 3) == (["w0-r1"] if cluster.restarts else ["w1"])
    assert cluster.head.members.drained() == {"w1"}
