"""The rate that an operator gives is for the change, whatever its sources do; without one an idle worker copies as it can. Whatever the
rate, a source is little ahead of its target."""

import random

import pytest
import torch

from runtime import handover
from runtime.messages import Copied, Copy, Pages, Sampling, ToWorker, decode_to_head
from scheduler.batching import BatchingConfig
from scheduler.request import Request
from tests.sim.cluster import NUM_LAYERS, VOCAB, SimCluster, layout_of

RATE = 2000
TARGET = layout_of(("w1", 0, 1), ("w2", 1, 3), ("w0", 3, NUM_LAYERS))
"""Every worker is a source, of one layer or of two."""


def submit_five(cluster: SimCluster, max_tokens: int) -> None:
    """Requests of 40 tokens at 0.5 s, and time that goes on for 20."""
    draw = random.Random(1)
    for sequence in range(5):
        prompt = [draw.randrange(VOCAB) for _ in range(40)]
        request = Request("sim", prompt, Sampling(temperature=0.0), max_tokens=max_tokens)
        cluster.at(0.5, lambda s=sequence, r=request: cluster.submit(s, r))
    for index in range(1, 100):
        cluster.at(0.2 * index, cluster.tick)


def copied(rate: int | None, max_tokens: int, strategy: str = "live") -> list[tuple[float, str, int]]:
    """When, in seconds from the first `Copy`, each source sent how many bytes of the snapshot."""
    cluster = SimCluster(1, num_stages=3, batching=BatchingConfig(block_size=4), num_blocks=300)
    sent: list[tuple[float, str, int]] = []
    began_s: list[float] = []
    transmit = cluster.transmit

    def watch(sender: str, to: str, message: ToWorker, tensors: list[torch.Tensor], *rest: object) -> None:
        if isinstance(message, Copy):
            began_s.append(cluster.now)
        if isinstance(message, Pages):
            sent.append((cluster.now - began_s[0], sender, sum(tensor.nbytes for tensor in tensors)))
        transmit(sender, to, message, tensors, *rest)  # type: ignore[arg-type]

    cluster.transmit = watch  # type: ignore[method-assign]
    submit_five(cluster, max_tokens)
    cluster.at(1.5 if max_tokens == 2 else 0.7, lambda: cluster.change(TARGET, strategy, rate=rate))  # type: ignore[arg-type]
    cluster.run(until=30.0)
    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "committed", report.why
    assert (report.sequences_at_start > 0) == (max_tokens > 2)
    cluster.audit()
    return sent


@pytest.mark.parametrize("max_tokens", [2, 150], ids=["idle", "serving"])
@pytest.mark.parametrize("strategy", ["live", "stop-copy"])
def test_a_given_rate_is_a_bound_over_all_sources(max_tokens: int, strategy: str) -> None:
    sent = copied(RATE, max_tokens, strategy)
    assert {sender for _, sender, _ in sent} == {"w0", "w1", "w2"}
    num_bytes = 0
    for at_s, _, more in sent:
        num_bytes += more
        assert num_bytes <= RATE * at_s, "at no time"
    if max_tokens == 2:
        assert num_bytes >= 0.8 * RATE * sent[-1][0], "and an idle server uses it"


def test_without_one_an_idle_worker_copies_as_it_can() -> None:
    sent = copied(None, 2)
    assert sent[-1][0] < 0.5


def test_little_waits_at_a_target_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SLICE_BYTES", 1)
    cluster = SimCluster(1, num_stages=2, batching=BatchingConfig(block_size=4), num_blocks=300)
    waiting, most = set[tuple[int, int]](), 0
    transmit, to_head = cluster.transmit, cluster.transmit_to_head

    def watch(sender: str, to: str, message: ToWorker, tensors: list[torch.Tensor], *rest: object) -> None:
        nonlocal most
        if isinstance(message, Pages):
            waiting.add((message.move, message.first))
            most = max(most, len(waiting))
        transmit(sender, to, message, tensors, *rest)  # type: ignore[arg-type]

    def told(worker: object, raw: bytes, **rest: float) -> None:
        message = decode_to_head(raw)
        if isinstance(message, Copied):
            waiting.difference_update([piece for piece in waiting if piece[1] < message.count])
        to_head(worker, raw, **rest)  # type: ignore[arg-type]

    cluster.transmit, cluster.transmit_to_head = watch, told  # type: ignore[method-assign]
    submit_five(cluster, 150)
    cluster.at(0.7, lambda: cluster.change(layout_of(("w0", 0, 1), ("w1", 1, NUM_LAYERS)), "live"))

    def wake() -> None:
        monkeypatch.undo()
        cluster.workers["w1"].work()

    cluster.at(0.69, lambda: monkeypatch.setattr(cluster.workers["w1"], "work", lambda: None))
    cluster.at(2.0, wake)
    cluster.run(until=30.0)
    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "committed", report.why
    assert most == handover.MOST_UNTAKEN
    cluster.audit()


def test_who_runs_no_steps_has_time() -> None:
    """The target until the flip, and the source that gave all its layers away once nothing runs there; nobody who serves, at no time."""
    cluster = SimCluster(1, num_stages=2, batching=BatchingConfig(block_size=4), num_blocks=300, num_spares=1)
    draw, seen = random.Random(1), dict[str, list[tuple[str, bool]]]()
    for sequence in range(6):
        prompt = [draw.randrange(VOCAB) for _ in range(80)]
        request = Request("sim", prompt, Sampling(temperature=0.0), max_tokens=400 if sequence == 5 else 2)
        cluster.at(0.1 * sequence, lambda s=sequence, r=request: cluster.submit(s, r))

    def look() -> None:
        now = cluster.head.reconfiguration.view()
        for name, worker in cluster.workers.items():
            seen.setdefault(name, []).append((str(now["phase"]) if now else "", worker.member.has_time))

    for index in range(1, 1000):
        cluster.at(0.01 * index, look)
        if index % 20 == 0:
            cluster.at(0.01 * index, cluster.tick)
    cluster.at(0.8, lambda: cluster.change(layout_of(("w0", 0, 2), ("w2", 2, NUM_LAYERS)), "live", rate=RATE))
    cluster.run(until=30.0)
    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "committed", report.why
    cluster.audit()
    assert not any(has_time for _, has_time in seen["w0"])
    assert ("shadow", True) in seen["w2"]
    assert not any(has_time for phase, has_time in seen["w2"] if phase not in ("shadow", "copy", "flip"))
    assert [has_time for phase, has_time in seen["w2"] if phase == "flip"].count(True) <= 2, "until it hears of it"
    assert not any(has_time for phase, has_time in seen["w1"] if phase not in ("flip", "retire"))
    in_flip = [has_time for phase, has_time in seen["w1"] if phase == "flip"]
    assert not in_flip[0]
    assert in_flip[-1]
