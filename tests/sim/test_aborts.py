"""Whatever goes wrong before the first flip: the old layout has never stopped serving, the target is clean, the report says why."""

import random
import re
from collections.abc import Callable

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from runtime.messages import Cancel, Prepare, Retired, Sampling, ToHead
from scheduler.batching import BatchingConfig
from scheduler.events import Event
from scheduler.request import Request
from tests.sim.cluster import NUM_LAYERS, VOCAB, SimCluster, end_long, reference, submit_long

TARGET = Layout(0, NUM_LAYERS, (Segment("w0", LayerRange(0, 2)), Segment("w2", LayerRange(2, NUM_LAYERS))))


def damage(cluster: SimCluster) -> None:
    cluster.num_to_damage = 1


def take_memory(cluster: SimCluster) -> None:
    cluster.workers["w2"].has_no_memory = True


def fail_shadows(cluster: SimCluster) -> None:
    cluster.shadow_failures = 1.0


def kill_target(cluster: SimCluster) -> None:
    cluster.at(0.05, lambda: cluster.crash("w2"))


def delete(cluster: SimCluster) -> None:
    cluster.at(0.05, lambda: cluster.abort_change(1))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("cause", "deadline_s", "said"),
    [
        (damage, 1e9, "w2: pages of .* arrived damaged: checksum"),
        (take_memory, 1e9, "w2: MemoryError: no page fits"),
        (fail_shadows, 1e9, "RuntimeError: no memory"),
        (kill_target, 1e9, "worker w2 was lost before anything had flipped"),
        (delete, 1e9, "the operator aborted it"),
        (lambda cluster: None, 0.01, "its deadline of 0.01 s has passed in phase"),
    ],
    ids=["checksum", "allocation", "load", "dead target", "DELETE", "deadline"],
)
def test_an_abort_leaves_no_trace(cause: Callable[[SimCluster], None], deadline_s: float, said: str, seed: int) -> None:
    batching = BatchingConfig(prefix_cache=False)  # blocks that nobody uses may arrive after the first flip
    cluster = SimCluster(seed, num_stages=2, batching=batching, num_blocks=64, num_spares=1)
    rng = random.Random(seed)
    for sequence in range(6):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
        request = Request("sim", prompt, Sampling(temperature=0.0), max_tokens=160)
        cluster.at(0.5 + 0.02 * sequence, lambda s=sequence, r=request: cluster.submit(s, r))
    cluster.at(0.6, lambda: cause(cluster))
    cluster.at(0.65, lambda: cluster.change(TARGET, deadline_s=deadline_s))
    for index in range(1, 60):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=20.0)

    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "aborted"
    assert re.search(said, report.why), report.why
    assert report.recomputed_tokens == 0
    assert report.dropped_requests == 0
    assert len(cluster.streams) == 6
    for stream in cluster.streams.values():
        assert stream.tokens == reference(stream.request)
    layout = cluster.head.layout
    assert layout is not None
    assert layout.workers == ("w0", "w1"), "the old layout serves"
    assert cluster.head.epoch == report.source_epoch
    cluster.audit()


@pytest.mark.parametrize("seed", range(4))
def test_a_dead_stage_takes_along_what_waits(seed: int) -> None:
    cluster = SimCluster(seed, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    request = Request("sim", [1, 2, 3], Sampling(temperature=0.0), max_tokens=160)
    cluster.at(0.5, lambda: cluster.submit(0, request))
    cluster.at(0.6, lambda: cluster.change(TARGET, "drain"))
    cluster.at(0.61, lambda: cluster.change(TARGET, queue=True))
    cluster.at(0.62, lambda: cluster.crash("w1"))
    for index in range(1, 60):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=20.0)

    begun, queued = cluster.head.reconfiguration.reports.values()
    assert (begun.outcome, queued.outcome) == ("aborted", "aborted")
    for report in (begun, queued):
        assert report.why.startswith("worker w1 was lost (")
        assert "ask again when the server serves" in report.why
    assert "before its turn had come" in queued.why
    assert cluster.streams[0].tokens == reference(request)
    cluster.audit()


def test_an_abort_is_an_abort_however_often_it_is_asked_for() -> None:
    """One that has begun to go back is not too late; it has been aborted once, and goes nowhere else."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    request = Request("sim", [1, 2, 3], Sampling(temperature=0.0), max_tokens=160)
    cluster.at(0.5, lambda: cluster.submit(0, request))
    cluster.at(0.6, lambda: cluster.change(TARGET))
    seen: list[tuple[bool, int]] = []

    def ask() -> None:
        cluster.abort_change(1)
        reconfiguration = cluster.head.reconfiguration
        seen.append((reconfiguration.is_aborting(1), reconfiguration.num_aborts_asked))

    cluster.at(0.601, ask)
    cluster.at(0.602, ask)
    cluster.run(until=20.0)
    assert seen == [(True, 1), (True, 1)]
    (report,) = cluster.head.reconfiguration.reports.values()
    assert (report.outcome, report.why) == ("aborted", "the operator aborted it")
    assert not cluster.head.reconfiguration.is_aborting(1)
    assert cluster.streams[0].tokens == reference(request)
    cluster.audit()


def test_a_cancel_that_overtakes_its_prepare_waits_for_what_that_says() -> None:
    """The head counts on the pages of the blocks that it has retired, whatever came of the change."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(block_size=4), num_blocks=64, num_spares=1)
    cluster.at(0.5, lambda: cluster.submit(0, Request("sim", [1] * 30, Sampling(temperature=0.0), max_tokens=100)))
    cluster.run(until=0.6)
    member, pool = cluster.workers["w0"].member, cluster.workers["w0"].member.pool
    assert pool is not None
    blocks = [int(block) for block in (pool.page_of(0) >= 0).nonzero()[0]]
    load = cluster.head.load_message(Layout(9, NUM_LAYERS, TARGET.segments), "w0")
    said: list[ToHead] = []
    cluster.workers["w0"].to_head = said.append  # type: ignore[method-assign]
    member.retire(Cancel(9))
    assert not said, "it cannot say yet that it is done"
    used_before = pool.num_used
    member.prepare(Prepare(9, 1, load, (), blocks[-1:], True, ("w0", "w1")))
    assert pool.num_used == used_before - len(pool.layers)
    assert [(type(message), message.transition) for message in said if isinstance(message, Retired)] == [(Retired, 9)]
    assert len(said) == 1, "nothing else comes of it"
    member.prepare(Prepare(9, 1, load, (), blocks, True, ("w0", "w1")))
    assert len(said) == 1, "nor when it comes again"


def test_a_refusal_names_what_would_help() -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    cluster.at(0.6, lambda: cluster.change(TARGET))
    cluster.at(0.601, lambda: cluster.change(TARGET))
    cluster.run(until=0.602)
    (refused,) = cluster.refused
    for way in ("DELETE /admin/transitions/1", "--queue", '"queue": true'):
        assert way in str(refused)


def test_nobody_overtakes_a_change_that_waits_its_turn() -> None:
    """Between two changes requests that have waited go first; a change that is asked for just then is the last of the queue."""
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(max_running=2), num_blocks=64, num_spares=1)
    submit_long(cluster, 8, 60)
    first, second, third = (
        Layout(0, NUM_LAYERS, (Segment("w0", LayerRange(0, cut)), Segment("w1", LayerRange(cut, NUM_LAYERS))))
        for cut in (1, 3, 4)
    )
    cluster.at(0.55, lambda: cluster.change(first))
    cluster.at(0.55, lambda: cluster.change(second, queue=True))
    handle, asked = cluster.handle, []

    def handle_and_ask(event: Event) -> None:
        handle(event)
        reports = cluster.head.reconfiguration.reports
        if not asked and 2 in reports and (reports[1].outcome, reports[2].outcome) == ("committed", "queued"):
            asked.append(cluster.now)
            cluster.change(third)
            assert "transition 2 is about to begin" in str(cluster.refused[-1])
            cluster.change(third, queue=True)

    cluster.handle = handle_and_ask  # type: ignore[method-assign]
    end_long(cluster, 8)
    assert asked
    assert list(cluster.head.layouts.values())[-1].segments == third.segments
    assert [report.source_epoch for report in cluster.head.reconfiguration.reports.values()] == [1, 2, 3]
