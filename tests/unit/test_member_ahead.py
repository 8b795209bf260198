"""A member whose device is queued: what it has found is sent when the next step is on its way, or when there is none."""

from types import SimpleNamespace
from typing import Any

import torch

from runtime.limiter import Accelerator
from runtime.member import Member
from runtime.messages import Sampling, StepResult
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
