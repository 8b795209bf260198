"""A change in several hops, and what fails after the first of them: it goes forward, or says where it stays."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from runtime.messages import Prepare, Sampling, ToWorker
from scheduler import reconfiguration
from scheduler.batching import BatchingConfig
from scheduler.events import PeerDown
from scheduler.request import Request
from scheduler.transition import STRATEGIES, Report, Strategy, describe
from tests.sim.cluster import NUM_LAYERS, VOCAB, SimCluster, SimWorker, layout_of, reference

NUM_BLOCKS = 28


START = layout_of(("w0", 0, 1), ("w1", 1, 3), ("w2", 3, 5))
TARGET = layout_of(("w0", 0, 2), ("w1", 2, 4), ("w3", 4, 5))

Act = Callable[[SimCluster], None]


def changed(
    seed: int, at: tuple[int, str], act: Act, *, deadline_s: float = 1e9
) -> tuple[SimCluster, Report, list[str]]:
    """Streams run so that w1 cannot hold three layers; the change to `TARGET` is asked for then, and `act` happens at hop and phase `at`.

    The cluster once all is over, the change's report, and the layouts that served on the way.
    """
    batching = BatchingConfig(prefix_cache=False, block_size=4)
    cluster = SimCluster(seed, num_stages=3, batching=batching, num_blocks=NUM_BLOCKS, num_spares=2)
    rng = random.Random(seed)
    for sequence in range(6):
        prompt = [rng.randrange(VOCAB) for _ in range(30)]
        request = Request("sim", prompt, Sampling(temperature=0.0), max_tokens=120)
        cluster.at(1.0, lambda s=sequence, r=request: cluster.submit(s, r))
    cluster.at(0.45, lambda: cluster.change(START))
    served: list[str] = []
    is_asked = has_acted = False

    def look() -> None:
        nonlocal is_asked, has_acted
        head = cluster.head
        if head.layout is not None and head.status == "serving" and served[-1:] != [head.layout.brief()]:
            served.append(head.layout.brief())
        needed = head.pool.num_used + head.batcher.num_running + 2
        is_full = NUM_BLOCKS * NUM_LAYERS // 3 < needed <= NUM_BLOCKS * NUM_LAYERS // 2 - 6
        if not is_asked and served[-1:] == [START.brief()] and is_full:
            is_asked = True
            cluster.change(TARGET, deadline_s=deadline_s)
        view = head.reconfiguration.view()
        if is_asked and not has_acted and view is not None and (view["hop"], view["phase"]) == at:
            assert view["num_hops"] == 2
            has_acted = True
            act(cluster)

    for index in range(1, 16_000):
        cluster.at(0.5 + 0.00025 * index, look)
    for index in range(1, 190):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=20.0)
    assert has_acted, f"hop {at[0]} was never in phase {at[1]}"
    assert not cluster.head.reconfiguration.is_active
    assert len(cluster.streams) == 6
    for stream in cluster.streams.values():
        assert stream.tokens == reference(stream.request)
    cluster.audit()
    return cluster, cluster.head.reconfiguration.reports[2], served


def fail_once(cluster: SimCluster) -> None:
    cluster.shadow_failures = 1.0

    def mend() -> None:
        view = cluster.head.reconfiguration.view()
        if view is None or view["phase"] == "abort":
            cluster.shadow_failures = 0.0
        else:
            cluster.at(0.001, mend)

    mend()


def hang(cluster: SimCluster) -> None:
    """A disk that says nothing any more: no shadow is ever built."""
    for worker in cluster.workers.values():
        worker.store.cancel_shadow()
        worker.store.shadow = lambda *_: None  # type: ignore[method-assign]


def delete(cluster: SimCluster) -> None:
    cluster.abort_change(2)


def fail_always(cluster: SimCluster) -> None:
    cluster.shadow_failures = 1.0


def kill(worker: str) -> Act:
    def act(cluster: SimCluster) -> None:
        cluster.workers[worker].alive = False
        cluster.at(0.0, lambda: cluster.handle(PeerDown(worker, "killed", cluster.now)))

    return act


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", ["none", "a load fails", "its deadline passes"])
def test_after_the_first_hop_a_change_goes_forward(fault: str, seed: int) -> None:
    second_s: list[Any] = []

    def note_time(cluster: SimCluster) -> None:
        view = cluster.head.reconfiguration.view()
        assert view is not None
        second_s.append(view["elapsed_s"])

    cluster, report, served = changed(seed, (2, "prepare"), fail_once if fault == "a load fails" else note_time)
    if fault == "its deadline passes":
        assert report.total_s > second_s[0] + 0.01
        cluster, report, served = changed(seed, (2, "prepare"), note_time, deadline_s=second_s[0] + 0.005)
    assert (report.phases_s.get("abort", 0.0) > 0.0) == (fault == "a load fails")
    assert report.outcome == "committed", report.why
    assert report.reached == report.target == describe(TARGET)
    assert report.num_hops == len(served) - served.index(START.brief()) - 1 == 2
    assert report.recomputed_tokens == 0
    assert cluster.head.layout is not None
    assert cluster.head.layout.segments == TARGET.segments


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("at", "act", "said"),
    [
        ((2, "prepare"), fail_always, "RuntimeError: no memory; tried again 2 times. It stays as"),
        ((2, "shadow"), kill("w3"), "worker w3 was lost; there is no worker w3"),
        ((1, "flip"), kill("w3"), "worker w3 was lost; there is no worker w3"),
        ((2, "prepare"), hang, "its deadline of 3 s has passed in phase shadow. It stays as"),
        ((1, "flip"), delete, "the operator aborted it. It stays as"),
        ((1, "retire"), delete, "the operator aborted it. It stays as"),
        ((2, "shadow"), delete, "the operator aborted it. It stays as"),
    ],
    ids=[
        "loads fail",
        "the target is lost",
        "a later target is lost",
        "a load hangs",
        "DELETE while the first flips",
        "DELETE at its end",
        "DELETE in the second",
    ],
)
def test_where_it_cannot_go_on_it_says_where_it_stays(
    at: tuple[int, str], act: Act, said: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconfiguration, "LATER_HOP_S", 3.0)
    cluster, report, served = changed(seed, at, act, deadline_s=2.0)
    assert report.outcome == "aborted"
    assert said in report.why
    assert cluster.head.layout is not None
    assert cluster.head.layout.brief() in report.why
    assert report.reached == describe(cluster.head.layout)
    assert report.reached not in (report.source, report.target)
    assert report.sequences_flipped > 0
    assert served[-1] == cluster.head.layout.brief()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("phase", ["prepare", "shadow", "copy"])
def test_a_worker_that_a_later_hop_needs_is_lost_before_anything_flips(phase: str, seed: int) -> None:
    cluster, report, served = changed(seed, (1, phase), kill("w3"))
    assert report.outcome == "aborted"
    assert report.why == "worker w3, which it would need later, was lost before anything had flipped"
    assert report.reached == report.source == describe(START)
    assert served[-1] == START.brief()
    assert cluster.head.layout is not None
    assert cluster.head.layout.segments == START.segments


def test_a_prepare_from_before_the_pipeline_was_rebuilt_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have the worker give back pages of blocks that are in use again by then."""
    batching = BatchingConfig(prefix_cache=False, block_size=4)
    cluster = SimCluster(3, num_stages=2, batching=batching, num_blocks=NUM_BLOCKS, num_spares=1)
    late: list[tuple[SimWorker, Prepare]] = []
    receive = SimWorker.receive

    def hold_the_first(worker: SimWorker, message: ToWorker, tensors: list[Any]) -> None:
        if isinstance(message, Prepare) and worker.name == "w0" and not late:
            late.append((worker, message))
        else:
            receive(worker, message, tensors)

    monkeypatch.setattr(SimWorker, "receive", hold_the_first)
    for sequence in range(2):
        request = Request("sim", [sequence + 1] * 30, Sampling(temperature=0.0), max_tokens=70)
        cluster.at(0.6, lambda s=sequence, r=request: cluster.submit(s, r))
    cluster.at(0.66, lambda: cluster.change(layout_of(("w0", 0, 5))))
    cluster.at(0.71, lambda: kill("w1")(cluster))
    told: list[int] = []

    def look() -> None:
        head = cluster.head
        if head.status == "serving" and head.epoch > 2 and not told:
            worker, message = late[0]
            told.extend(set(message.retired_blocks) & set(head.pool.used_blocks()))
            if told:
                receive(worker, message, [])

    for index in range(2000):
        cluster.at(0.75 + 0.001 * index, look)
    for index in range(1, 100):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=20.0)
    assert told, "blocks that had been retired before are in use"
    assert [stream.tokens for stream in cluster.streams.values()] == [
        reference(stream.request) for stream in cluster.streams.values()
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_hops_than_it_takes_keep_what_is_cached(strategy: Strategy) -> None:
    """Two workers change places, with 40 of 46 blocks cached. At once they would hold five layers each, with room for 28; in two hops
    there is room for 35. Only `live` goes so far: the others have streams wait in each hop, and two of them forget the cache anyhow."""
    batching = BatchingConfig(block_size=4)
    cluster = SimCluster(5, num_stages=2, batching=batching, num_blocks=NUM_BLOCKS)
    cluster.at(0.45, lambda: cluster.change(layout_of(("w0", 0, 2), ("w1", 2, 5))))
    requests = [Request("sim", [sequence + 1] * 33, Sampling(temperature=0.0), max_tokens=3) for sequence in range(5)]
    for sequence, request in enumerate(requests):
        cluster.at(1.0 + 0.2 * sequence, lambda s=sequence, r=request: cluster.submit(s, r))
    cluster.at(3.0, lambda: cluster.change(layout_of(("w1", 0, 2), ("w0", 2, 5)), strategy))
    for sequence, request in enumerate(requests):
        cluster.at(6.0 + 0.2 * sequence, lambda s=5 + sequence, r=request: cluster.submit(s, r))
    for index in range(1, 90):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=20.0)
    head = cluster.head
    report = head.reconfiguration.reports[2]
    dropped = {"live": 5, "stop-copy": 12}.get(strategy, 40)
    assert (report.outcome, report.cached_blocks_dropped) == ("committed", dropped)
    assert report.num_hops == (2 if strategy == "live" else 1)
    if strategy == "live":
        assert head.batcher.counters.prefix_hit_tokens >= (40 - 5 - 4) * 4, "what was kept is a hit after it"
    assert [stream.tokens for stream in cluster.streams.values()] == [reference(r) for r in requests * 2]
