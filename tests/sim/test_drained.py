"""A drained worker gets no layers by itself: neither by a recovery nor by the autopilot. But rather it serves than nobody."""

import pytest

from runtime.layout import layout_from_counts
from scheduler.batching import BatchingConfig
from scheduler.events import Looked, Resume
from scheduler.planning.autopilot import Decision
from scheduler.planning.cost import MigrationCost
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


@pytest.mark.parametrize("is_idle", [False, True])
def test_the_autopilot_moves_layers_of_one_that_serves_all_the_same(is_idle: bool) -> None:
    """A recovery took it, as there was nobody else: no decision can do without it. An idle one gets none."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    cluster.run(until=0.5)
    head = cluster.head
    assert head.layout is not None
    names = ["w0", "w2" if is_idle else "w1"]
    head.members.drain(names[1])
    layout = layout_from_counts(0, names, [1, head.layout.num_layers - 1])
    head.pilot.heard = lambda *_: Decision(layout, 0.5, MigrationCost(1, 1, 1, 1.0), "")  # type: ignore[method-assign]
    cluster.handle(Looked(None, None, cluster.now))  # type: ignore[arg-type]
    assert head.reconfiguration.is_active is not is_idle
    assert ("drained meanwhile" in str(head.pilot.autopilot.log)) is is_idle
