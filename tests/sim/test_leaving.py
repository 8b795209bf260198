"""What a worker lets go of when its part in a change of layout is over."""

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from runtime.messages import Cancel, Fetch, Prepare, Retire, Sampling, ToHead, Weights
from scheduler.batching import BatchingConfig
from scheduler.request import Request
from tests.sim.cluster import NUM_LAYERS, SimCluster

TARGET = (Segment("w0", LayerRange(0, 2)), Segment("w2", LayerRange(2, NUM_LAYERS)))


@pytest.mark.parametrize("end", [Cancel(9), Retire(9, -1)], ids=["aborted", "committed"])
def test_weights_that_nobody_waits_for_are_not_sent(end: Cancel | Retire) -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    cluster.run(until=0.6)
    worker = cluster.workers["w1"]
    said: list[ToHead] = []
    sent: list[object] = []
    worker.to_head = said.append  # type: ignore[method-assign]
    worker.to_peer = lambda name, message, tensors: sent.append(message)  # type: ignore[method-assign]
    load = cluster.head.load_message(Layout(9, NUM_LAYERS, TARGET), "w1")
    worker.member.prepare(Prepare(9, 1, load, (), [], False, ("w0", "w1")))
    worker.member.fetch(Fetch("w2", 1, NUM_LAYERS - 1, "sim"))
    while not sent:
        cluster.now += 0.01
        worker.member.background()
    assert [type(message) for message in sent] == [Weights], "the first of two slices"
    if isinstance(end, Retire):
        assert worker.member._handover is not None
        worker.member._handover.is_open = True
    worker.member.retire(end)
    assert not worker.member._exports
    assert worker.member.background_wait_s() is None
    cluster.now += 10.0
    worker.member.background()
    assert len(sent) == 1


def test_memory_that_layers_leave_is_given_back() -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    cluster.at(0.5, lambda: cluster.submit(0, Request("sim", [1, 2], Sampling(temperature=0.0), max_tokens=30)))
    cluster.at(0.6, lambda: cluster.change(Layout(0, NUM_LAYERS, TARGET)))
    for index in range(1, 60):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=0.59)
    assert not any(worker.store.may_give_back for worker in cluster.workers.values())
    cluster.run(until=20.0)
    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "committed"
    may_give_back = cluster.workers["w1"].store.may_give_back
    assert may_give_back is not None
    assert may_give_back(), "no step runs where no layer is"


def test_a_worker_that_comes_back_is_given_the_room_that_it_had() -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1, is_elastic=True)
    cluster.at(0.6, lambda: cluster.change(Layout(0, NUM_LAYERS, TARGET)))
    for index in range(1, 60):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=0.59)
    head = cluster.head
    assert head.layout is not None
    at_first = head.layout
    room = head.members.workers["w1"].room_bytes
    assert head.load_message(Layout(9, NUM_LAYERS, TARGET), "w2").room_bytes == 0 < room
    cluster.run(until=20.0)
    assert head.load_message(at_first, "w1").room_bytes == room
