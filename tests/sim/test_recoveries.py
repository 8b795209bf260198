"""A recovery goes on until something serves: a worker that cannot load its part is passed over, not the end of every stream."""

import math

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from scheduler.batching import BatchingConfig
from scheduler.events import EvictWorker, NotComing, PeerDown, Tick
from tests.sim.cluster import NUM_LAYERS, SimCluster, end_long, layout_of, serving_at_the_end, submit_long


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


@pytest.mark.parametrize("seed", range(3))
def test_the_report_of_a_change_that_a_crash_ends_says_what_was_lost_to_it_before(seed: int) -> None:
    """All that ran had been put back, and computed again in part, when the target dies; what the loss itself costs is not the change's."""
    cluster = SimCluster(seed, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    submit_long(cluster, 6, max_tokens=120)
    cluster.at(0.7, lambda: cluster.change(layout_of(("w0", 0, 1), ("w2", 1, NUM_LAYERS)), "recompute"))
    lost: list[int] = []

    def look() -> None:
        view, batcher = cluster.head.reconfiguration.view(), cluster.head.batcher
        if not lost and view is not None and view["phase"] == "flip" and batcher.counters.recomputed_tokens:
            lost.append(batcher.recomputed_for_change())
            cluster._end(cluster.workers["w2"], restarts=False)
            cluster.handle(PeerDown("w2", "killed", cluster.now))

    for index in range(20_000):
        cluster.at(0.7 + 0.0001 * index, look)
    end_long(cluster, 6)
    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "aborted"
    assert [report.recomputed_tokens] == lost
    assert report.recomputed_tokens > 0


@pytest.mark.parametrize("seed", range(6))
def test_after_a_loss_the_layout_is_the_one_that_was_asked_for(seed: int) -> None:
    """Over three workers, one in two places, though the server was started with two stages: the lost one's place is its restarted self's."""
    cluster = SimCluster(seed, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    submit_long(cluster, 3, max_tokens=120)
    cluster.at(0.55, lambda: cluster.change(layout_of(("w2", 0, 1), ("w1", 1, 3), ("w2", 3, 4), ("w0", 4, 5))))
    lost: list[str] = []

    def lose() -> None:
        if not lost and cluster.head.reconfiguration.reports[1].outcome == "committed":
            lost.append("w1")
            cluster._end(cluster.workers["w1"], restarts=True)

    for index in range(2000):
        cluster.at(0.6 + 0.001 * index, lose)
    end_long(cluster, 3)
    assert lost
    layout = cluster.head.layout
    assert layout is not None
    assert layout.segments == layout_of(("w2", 0, 1), ("w1-r1", 1, 3), ("w2", 3, 4), ("w0", 4, 5)).segments


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_once_something_has_flipped_nobody_waits_for_a_worker_that_the_change_leaves(seed: int) -> None:
    """The target's workers hold all that it takes."""
    batching = BatchingConfig(max_step_tokens=8, block_size=4)
    cluster = SimCluster(seed, num_stages=2, batching=batching, num_blocks=128)
    submit_long(cluster, 6, max_tokens=120)
    alone = layout_of(("w0", 0, NUM_LAYERS))
    cluster.at(0.7, lambda: cluster.change(alone))
    lost: list[float] = []

    def look() -> None:
        view = cluster.head.reconfiguration.view()
        if not lost and view is not None and view["phase"] == "flip" and view["sequences_flipped"]:
            lost.append(cluster.now)
            cluster._end(cluster.workers["w1"], restarts=False)
            cluster.handle(PeerDown("w1", "killed", cluster.now))
            cluster.at(1.5, lambda: lost.append(cluster.head.status == "serving"))

    for index in range(20_000):
        cluster.at(0.7 + 0.0001 * index, look)
    end_long(cluster, 6)
    assert lost[1:] == [True], "long before a lost worker is given up"
    layout, (report,) = cluster.head.layout, cluster.head.reconfiguration.reports.values()
    assert layout is not None
    assert layout.segments == alone.segments
    assert report.outcome == "aborted"


def test_an_idle_worker_takes_the_place_of_a_lost_one_at_once() -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=2)
    submit_long(cluster, 3, max_tokens=120)
    cluster.at(0.55, lambda: cluster.change(layout_of(("w3", 0, 1), ("w1", 1, 5))))
    cluster.at(1.5, lambda: cluster._end(cluster.workers["w1"], restarts=True))
    end_long(cluster, 3)
    layout = cluster.head.layout
    assert layout is not None
    assert layout.segments == layout_of(("w3", 0, 1), ("w0", 1, 5)).segments


@pytest.mark.parametrize("known_s", [math.inf, 1.3, 0.7])
def test_nobody_waits_for_a_worker_that_is_known_not_to_come(known_s: float) -> None:
    """Whether that is known after its loss has been noticed, or before."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64)
    submit_long(cluster, 3, max_tokens=120)
    cluster.at(0.7, lambda: cluster._end(cluster.workers["w1"], restarts=False))
    cluster.at(known_s, lambda: cluster.handle(NotComing(cluster.now)))
    seen: list[str] = []
    cluster.at(2.5, lambda: seen.append(cluster.head.status))
    assert serving_at_the_end(cluster, 3) == ["w0"]
    assert seen == ["recovering" if known_s == math.inf else "serving"]


def test_a_head_that_stood_still_does_not_take_its_workers_for_dead() -> None:
    """Stopped for longer than the heartbeats' time; what they said meanwhile lies in its queue when it looks at the clock."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, heartbeat_timeout_s=4.0)
    cluster.run(until=0.6)
    head, stood_s = cluster.head, 20.0
    for _ in range(3):
        cluster.now += 0.5
        cluster.tick()
    cluster.now += stood_s
    cluster.handle(Tick(cluster.now))
    assert sorted(head.members.workers) == ["w0", "w1"]
    for _ in range(3):
        cluster.now += 2.0
        cluster.handle(Tick(cluster.now))
    assert not head.members.workers, "who goes on saying nothing is lost"


def test_what_a_head_that_stood_still_hears_before_it_looks_at_the_clock_is_of_now() -> None:
    """Or a worker that dies next would be taken for alive for as long as the head stood still."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, heartbeat_timeout_s=4.0)
    cluster.run(until=0.6)
    cluster.tick()
    cluster.now += 60.0
    cluster.tick()
    assert {worker.last_seen_s for worker in cluster.head.members.workers.values()} == {cluster.now}
    for _ in range(3):
        cluster.now += 2.0
        cluster.handle(Tick(cluster.now))
    assert not cluster.head.members.workers


def test_who_is_lost_before_it_has_joined_frees_its_name() -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64)
    cluster.run(until=0.6)
    effects = cluster.head.step(PeerDown("w7", "its connection ended", 1.0))
    assert effects == [EvictWorker("w7", "its connection ended")]
