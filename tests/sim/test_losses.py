"""Links that break or stall while all members live: what was on its way is lost, the sender is told, and no stream hangs or differs."""

import math
import random
from collections import Counter

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from scheduler.batching import BatchingConfig
from tests.sim import of_seeds
from tests.sim.cluster import NUM_LAYERS, SimCluster, end_long, submit_long
from tests.sim.network import HEAD
from tests.sim.test_cluster import check, scenario, seeds_of

TARGET = Layout(0, NUM_LAYERS, (Segment("w0", LayerRange(0, 2)), Segment("w2", LayerRange(2, NUM_LAYERS))))


def lossy(seed: int) -> SimCluster:
    """Changes of layout, sometimes crashes, and one to three links that break or stall."""
    rng = random.Random(f"losses {seed}")
    cluster = scenario(seed, changes=rng.random() < 0.9, crashes=rng.random() < 0.2, lossy=True)
    for _ in range(rng.randint(1, 3)):
        seconds = rng.choice((-1.0, 0.3, 3.0, 8.0, math.inf))  # -1: it breaks
        among_workers = rng.random() < 0.7
        cluster.at(rng.uniform(0.5, 1.5), lambda s=seconds, w=among_workers: harm(cluster, s, among_workers=w))
    return cluster


def harm(cluster: SimCluster, seconds: float, *, among_workers: bool) -> None:
    """Break some link, or stall it for so long."""
    names = [worker.name for worker in cluster.workers.values() if worker.alive]
    if not among_workers or len(names) < 2:
        names.append(HEAD)
    if len(names) < 2:
        return
    sender, to = cluster.random.sample(names, 2)
    if not among_workers and HEAD not in (sender, to):
        to = HEAD
    if seconds < 0.0:
        cluster.break_off(sender, to)
    else:
        cluster.network.stall(sender, to, seconds)


def with_losses(seed: int) -> Counter[str]:
    cluster = lossy(seed)
    check(cluster, until=60.0)
    return Counter(lost=cluster.network.num_lost, evicted=cluster.head.members.num_lost)


def test_losses_change_nothing_but_the_time_it_takes(block: int) -> None:
    counts = of_seeds(with_losses, seeds_of(4, block))
    assert counts["lost"], "nothing was ever lost"
    assert counts["evicted"], "nobody was ever given up"


def serve(seed: int) -> SimCluster:
    """Two stages, a spare, and streams that are long enough for whatever happens."""
    cluster = SimCluster(seed, num_stages=2, batching=BatchingConfig(prefix_cache=False), num_blocks=64, num_spares=1)
    submit_long(cluster, 4, max_tokens=160)
    return cluster


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seconds", [-1.0, math.inf], ids=["breaks", "stalls"])
def test_a_pipeline_whose_link_is_gone_is_made_anew(seconds: float, seed: int) -> None:
    """Both workers live, and neither can help it: the one that cannot be reached joins again, with new connections."""
    cluster = serve(seed)
    cluster.at(
        0.55, lambda: cluster.break_off("w0", "w1") if seconds < 0 else cluster.network.stall("w0", "w1", seconds)
    )
    end_long(cluster, 4)
    assert cluster.head.members.num_lost == 1
    assert "w1" not in cluster.head.members.workers
    assert cluster.head.status == "serving"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("phase", ["copy", "flip", "retire"])
def test_a_link_that_only_a_change_needs(phase: str, seed: int) -> None:
    """Before the first flip it costs the change, and the present layout never stops serving; later only a recovery helps."""
    cluster = serve(seed)
    epochs: list[int] = []
    has_broken = False

    def look() -> None:
        nonlocal has_broken
        view = cluster.head.reconfiguration.view()
        epochs.append(cluster.head.epoch if cluster.head.status == "serving" else -1)
        if not has_broken and view is not None and view["phase"] == phase:
            has_broken = True
            cluster.break_off("w1", "w2")

    cluster.at(0.52, lambda: cluster.change(TARGET))
    for index in range(500, 4000):
        cluster.at(0.001 * index, look)
    end_long(cluster, 4)
    assert has_broken, f"there was no phase {phase}"
    report = cluster.head.reconfiguration.reports[1]
    assert len(cluster.head.members.workers) == 3
    if phase == "copy":
        assert report.outcome == "aborted"
        assert "w2 cannot be reached: EOF" in report.why
        assert set(epochs) == {1}, "the old layout served all the time"
        assert cluster.head.batcher.counters.recomputed_tokens == 0
        assert "w2" not in cluster.head.members.workers, "it has joined again, with new connections"
    else:
        assert report.outcome in ("committed", "aborted")
