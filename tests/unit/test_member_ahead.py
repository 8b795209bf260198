"""A member whose device is queued: what it has found is sent when the next step is on its way, or when there is none, and the one after is planned."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.limiter import Accelerator
from runtime.member import Member
from runtime.messages import Sampling, Step, StepPlan, StepResult, encode
from runtime.stage_state import StepOrder
from scheduler.batching import BatchingConfig
from scheduler.request import Request
from tests.sim.cluster import SimCluster

COPIES = SimpleNamespace(measure=lambda: Accelerator(2e12, 2e10), is_full=False)


def test_a_result_waits_for_the_next_step_or_for_nothing_to_do() -> None:
    cluster = SimCluster(1, num_stages=1, batching=BatchingConfig(block_size=4), num_blocks=60)
    cluster.run(until=0.0)
    worker: Any = cluster.workers["w0"]
    worker.member = Member("w0", torch.device("cpu"), worker.store, worker, lambda: cluster.now, copies=COPIES)
    results: list[StepResult] = []
    deliver = worker.to_head

    def to_head(message: Any) -> None:
        if isinstance(message, StepResult):
            results.append(message)
        deliver(message)

    worker.to_head = to_head
    cluster.at(1.0, lambda: cluster.submit(1, Request("r", [1, 2, 3], Sampling(temperature=0.0), 3)))
    cluster.run(until=5.0)
    assert [result.ordinal for result in results] == [0, 1], (
        "all three steps were formed ahead, and nothing followed the last"
    )
    worker.member.send_result()
    worker.member.send_result()
    assert [result.ordinal for result in results] == [0, 1, 2]
    cluster.run(until=10.0)
    assert cluster.streams[1].finish_reason == "length"


class Waiting:
    """An outbox with steps that have arrived."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.said: list[Any] = []
        self.to_head = self.said.append

    def next_step(self) -> Any:
        return (self.steps[0], (), 1.0) if self.steps else None

    def take_step(self) -> None:
        del self.steps[0]


def step(ordinal: int, *, epoch: int = 1, hop: int = 0) -> Step:
    return Step(hop, encode(StepPlan(epoch, ordinal, 0, [], [])), [])


def waiting_member(*steps: Step) -> tuple[Any, Waiting, list[int]]:
    """A member that runs step 0 of epoch 1 at hop 0, and the ordinals of what it has planned ahead."""
    outbox, planned = Waiting(*steps), []
    store: Any = SimpleNamespace()
    member: Any = Member("w0", torch.device("cpu"), store, cast("Any", outbox), lambda: 0.0, copies=COPIES)
    stage = SimpleNamespace(plan_ahead=lambda plan, hop: planned.append(plan.ordinal))
    order: StepOrder[Any] = StepOrder()
    order.push(0, ())
    order.pop()
    member._stages, member._order, member._running = {1: stage}, {(1, 0): order}, (1, 0)
    return member, outbox, planned


def test_the_next_step_is_planned_while_the_device_works() -> None:
    member, outbox, planned = waiting_member(step(1), step(2))
    member._unsent = "what step 0 found"
    member._meanwhile()
    assert outbox.said == ["what step 0 found"]
    assert planned == [1]
    assert outbox.steps == [step(2)]
    assert member._order[1, 0].peek()[1].ordinal == 1, "it runs when its turn comes"


@pytest.mark.parametrize("other", [step(1, epoch=2), step(1, hop=2)], ids=["epoch", "hop"])
def test_a_step_of_another_epoch_or_hop_stays_where_it_is(other: Step) -> None:
    member, outbox, planned = waiting_member(other)
    member._meanwhile()
    assert outbox.steps == [other]
    assert not planned


def test_nothing_is_planned_ahead_during_a_change_of_layout() -> None:
    member, outbox, planned = waiting_member(step(1))
    member._handover = SimpleNamespace()
    member._meanwhile()
    assert outbox.steps
    assert not planned


def test_a_step_that_comes_before_its_turn_is_kept_for_it() -> None:
    member, _, planned = waiting_member(step(2))
    member._meanwhile()
    assert not planned
    assert member._order[1, 0].push(1, ("due",))
    assert member._order[1, 0].pop() == ("due",)
    assert member._order[1, 0].pop()[1].ordinal == 2
