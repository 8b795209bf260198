"""A recovery goes on until something serves: a worker that cannot load its part is passed over, not the end of every stream."""

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from scheduler.batching import BatchingConfig
from tests.sim.cluster import NUM_LAYERS, SimCluster, end_long, serving_at_the_end, submit_long


def serve(seed: int, *, num_spares: int) -> SimCluster:
    """Two stages and spares, the first of which has no memory for KV."""
    cluster = SimCluster(seed, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=num_spares)
    cluster.at(0.5, lambda: setattr(cluster.workers["w2"], "has_no_memory", True))
    submit_long(cluster, 3, max_tokens=120)
    return cluster


@pytest.mark.parametrize("seed", range(10))
def test_another_spare_takes_the_place(seed: int) -> None:
    cluster = serve(seed, num_spares=2)
    cluster.at(0.55, lambda: cluster.crash("w0"))
    serving = serving_at_the_end(cluster, 3)
    assert len(serving) == 2
    assert "w2" not in serving


@pytest.mark.parametrize("seed", range(10))
def test_who_is_left_serves(seed: int) -> None:
    """With the worker that was lost, if it starts again in time."""
    cluster = serve(seed, num_spares=1)
    cluster.at(0.55, lambda: cluster.crash("w0"))
    serving = serving_at_the_end(cluster, 3)
    assert len(serving) == 1 + cluster.restarts
    assert "w2" not in serving


def test_streams_wait_for_a_worker_when_nobody_can() -> None:
    cluster = serve(0, num_spares=1)
    head = cluster.head

    def harm() -> None:
        cluster.workers["w1"].has_no_memory = True
        cluster._end(cluster.workers["w0"], restarts=False)

    cluster.at(0.55, harm)
    cluster.at(20.0, lambda: cluster.start_worker("w5", ""))
    seen: list[tuple[str, str]] = []
    cluster.at(19.9, lambda: seen.append((head.status, head.detail)))
    assert serving_at_the_end(cluster, 3) == ["w5"]
    ((status, detail),) = seen
    assert status == "recovering"
    assert "could not load: MemoryError: no page fits. Add a worker" in detail


def test_a_drained_worker_serves_before_one_that_cannot() -> None:
    cluster = SimCluster(1, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=2)
    submit_long(cluster, 3, max_tokens=120)

    def harm() -> None:
        cluster.head.members.drain("w3")
        for name in ("w1", "w2"):
            cluster.workers[name].has_no_memory = True
        cluster._end(cluster.workers["w0"], restarts=False)

    cluster.at(0.55, harm)
    assert serving_at_the_end(cluster, 3) == ["w3"]


def test_what_could_not_load_is_tried_again_when_nobody_else_is_left() -> None:
    """Memory that somebody else had for a while, a disk that was away."""
    cluster = SimCluster(1, num_stages=2, batching=BatchingConfig(), num_blocks=64)
    submit_long(cluster, 3, max_tokens=120)

    def harm() -> None:
        cluster.workers["w1"].has_no_memory = True
        cluster._end(cluster.workers["w0"], restarts=False)

    cluster.at(0.55, harm)
    cluster.at(12.0, lambda: setattr(cluster.workers["w1"], "has_no_memory", False))
    assert serving_at_the_end(cluster, 3) == ["w1"]


@pytest.mark.parametrize("seed", range(5))
def test_the_report_of_a_change_that_a_crash_ends_says_how_far_it_was(seed: int) -> None:
    """Some sequences have gone over when the target dies: that is said, and that no layout was reached, for the recovery finds its own."""
    cluster = SimCluster(seed, num_stages=2, batching=BatchingConfig(max_step_tokens=8), num_blocks=64, num_spares=1)
    submit_long(cluster, 6, max_tokens=120)
    target = Layout(0, NUM_LAYERS, (Segment("w0", LayerRange(0, 1)), Segment("w2", LayerRange(1, NUM_LAYERS))))
    cluster.at(0.7, lambda: cluster.change(target))
    gone_over: list[int] = []

    def look() -> None:
        view = cluster.head.reconfiguration.view()
        if view is None or view["phase"] != "flip" or not view["sequences_flipped"] or gone_over:
            return
        gone_over.append(int(str(view["sequences_flipped"])))
        cluster.crash("w2")

    for index in range(20_000):
        cluster.at(0.7 + 0.0001 * index, look)
    end_long(cluster, 6)
    report = cluster.head.reconfiguration.reports[1]
    assert report.outcome == "aborted"
    assert "worker w2 was lost" in report.why
    assert report.sequences_flipped >= gone_over[0] > 0
    assert report.phases_s["flip"] > 0.0
    assert report.reached == []
