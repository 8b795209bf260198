"""A simulated worker: it answers the head's messages as `runtime.member` does, with times from the cost model. Pure.

It has no tensors and no KV, but all that the head can see: which epochs it serves, the order of its steps, its memory, its
page pool, mirrors, fences, the pace of what it does in the background (the real `Limiter`). Its one resource is the time
of its compute thread: `free_at_s` is when the work that it has taken on will be done. Sending takes of that time too
(`cost.hop_seconds`), as does every slice of a snapshot, by as much as `Limiter.taken_s` says; loading of a shadow does not, it rests
as the real one does.

While nothing but steps is going on, they meet no decision on their way, and go through all of the pipeline at once: the times of
every hop follow from when its worker is free and when the step arrives there. So `free_at_s` may lie a pass ahead of the
clock. A pipeline of different workers does that in one loop (`passage`), and its workers' times are there until one of them gets another
message than a step. A worker in a transition takes its steps one by one, as they arrive.

Simplified: weights come from the worker's own disk, never from a peer; a message is never lost, doubled or overtaken.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, assert_never

from kvstore.ids import Epoch, WorkerName
from runtime.layout import Layout
from runtime.limiter import Accelerator, Limiter
from runtime.messages import (
    MIN_FREE_BYTES,
    Cancel,
    Copied,
    Copy,
    HopTiming,
    Join,
    Load,
    Loaded,
    LoadFailed,
    Mirroring,
    Open,
    Prepare,
    Prepared,
    Retire,
    Retired,
    ShadowReady,
    StartMirror,
    StepPlan,
    StepResult,
    ToHead,
    ToWorker,
    TransitionFailed,
)
from scheduler.planning.cost import Facts, Work, hop_seconds
from scheduler.simulation.handover import CopyJob, Incoming, SimHandover, Source
from scheduler.simulation.passage import Passage
from scheduler.simulation.stage_cost import StageCost
from scheduler.simulation.world import SimDevice, World

SLICE_S = 0.001
"""What a slice of a snapshot takes of the link's time, at most (on a CPU that is the worker's)."""
QUEUE_S = 200e-6
"""What an accelerator's host needs to queue a slice, or the rows of a step for one target. Assumed."""

Unit: TypeAlias = int | str


@dataclass(slots=True)
class Flight:
    """A step on its way through the pipeline. `layer_s` is `StageCost`'s memory of what it knows of this step.

    `timings` is None where nobody learns from them.
    """

    plan: StepPlan
    work: Work
    timings: list[HopTiming] | None
    layer_s: dict[int, list[float]]


class Network(Protocol):
    """Where a worker's messages go; `sent_s` is when they have left it."""

    def to_head(self, sent_s: float, message: ToHead) -> None: ...

    def peer(self, name: WorkerName) -> "SimWorker": ...


class SimWorker:
    """One worker. `noise` gives the factor on the next stage time, if there is any."""

    def __init__(
        self, device: SimDevice, facts: Facts, world: World, network: Network, noise: Callable[[], float] | None
    ) -> None:
        self.name = device.worker
        self.device = device
        self.free_at_s = 0.0
        self.busy_s = 0.0
        self._facts, self._world, self._network, self._noise = facts, world, network, noise
        self._kind = device.speed.kind
        self._units: set[Unit] = set()
        self._pool_bytes = self._num_pages = self._page_bytes = self._room_bytes = 0
        self._block_size = 1
        self._stages: dict[Epoch, Layout] = {}
        self._costs: dict[tuple[Epoch, int], StageCost] = {}
        self._next: dict[tuple[Epoch, int], int] = {}
        self._blocked: dict[tuple[Epoch, int], deque[tuple[Flight, float]]] = {}
        self._sampled_s: dict[Epoch, dict[int, float]] = {}
        """When the tokens of a step are here, at the first hop, for the one that was formed ahead of them."""
        self._unfed: dict[Epoch, deque[Flight]] = {}
        """Steps at the first hop that wait for tokens, and those behind them."""
        self._handover: SimHandover | None = None
        self._retire_due: Retire | None = None
        self._last_transition = 0
        self._idle_since_s = 0.0
        self._wire_free_s = 0.0
        there = Accelerator(self._kind.bandwidth, world.rates.load_bytes_per_s) if self._kind.is_accelerator else None
        self._limiter = Limiter(there)
        self._passage: Passage | None = None
        self._passing: tuple[Epoch, list[SimWorker]] = -1, []
        """Of the open passage: its epoch, and its workers by hop."""

    def join(self) -> Join:
        kind = self._kind.name
        return Join(self.name, self.name, 0, f"sim:{kind}", kind, self.device.memory_bytes, self._memory_left(), 1, {})

    def holds(self) -> set[Unit]:
        return set(self._units)

    def serves(self) -> list[Epoch]:
        return sorted(self._stages)

    def receive(self, message: ToWorker) -> None:
        """Any message but a step."""
        self.end_passage()
        match message:
            case Load():
                self._load(message)
            case Prepare():
                self._prepare(message)
            case StartMirror():
                if (handover := self._under_way(message.transition)) is not None:
                    self._start_mirror(handover)
            case Copy():
                self._copy(message)
            case Open():
                if (handover := self._under_way(message.transition)) is not None:
                    handover.open(message.starts)
                    self._unblock()
            case Retire() | Cancel():
                self._retire(message)
            case _:
                raise AssertionError(f"a simulated worker got {message}")

    # -- memory ---------------------------------------------------------------------------------------------

    @property
    def _weight_bytes(self) -> int:
        return self._bytes_of(self._units)

    def _bytes_of(self, units: Iterable[Unit]) -> int:
        return sum(self._unit_bytes(unit) for unit in units)

    def _unit_bytes(self, unit: Unit) -> int:
        spec = self._facts.spec
        if isinstance(unit, int):
            return spec.layer_bytes[unit]
        return spec.embedding_bytes if unit == "embedding" else spec.lm_head_bytes

    def _memory_left(self) -> int:
        return self.device.memory_bytes - self._weight_bytes - self._pool_bytes

    def _make_pool(self, load: Load, num_layers: int) -> str:
        """Allocate the page pool as a worker does; what is wrong, if it has no room. Without `kv_bytes` its size will follow the weights."""
        self._block_size = load.block_size
        self._page_bytes = load.block_size * self._facts.spec.kv_bytes_per_token_layer()
        free, weights = self._memory_left(), self._bytes_of(_units_of(load.layout, self.name))
        allowed = load.room_bytes - weights if load.room_bytes else load.memory_bytes
        budget = load.kv_bytes or min(free - MIN_FREE_BYTES, allowed)
        self._num_pages = max(0, budget // self._page_bytes)
        if self._num_pages < max(1, num_layers) or self._num_pages * self._page_bytes > free:
            self._num_pages = self._pool_bytes = 0
            return f"no room for KV pages: {free / 1e9:.1f} GB are free beside the weights"
        self._pool_bytes = self._num_pages * self._page_bytes
        self._room_bytes = 0 if load.kv_bytes else self._pool_bytes + weights
        return ""

    def _fit_pool(self, units: Iterable[Unit]) -> None:
        """As many pages as fit beside these units, where their number follows the weights."""
        if self._room_bytes:
            self._num_pages = max(0, self._room_bytes - self._bytes_of(units)) // self._page_bytes
            self._pool_bytes = self._num_pages * self._page_bytes

    # -- one layout from scratch ----------------------------------------------------------------------------

    def _load(self, load: Load) -> None:
        layout, now_s = load.layout, self._world.now_s
        self._units = set(_units_of(layout, self.name))
        self._pool_bytes = self._room_bytes = 0
        self._stages.clear()
        self._unfed.clear()
        self._sampled_s.clear()
        if not self._units:
            return
        seconds = self._weight_bytes / self._world.rates.load_bytes_per_s
        error = ""
        if self._memory_left() < MIN_FREE_BYTES:
            error = (
                f"{self._weight_bytes / 1e9:.1f} GB of weights do not fit into {self.device.memory_bytes / 1e9:.1f} GB"
            )
        error = error or self._make_pool(load, len(layout.layers_of(self.name)))
        if error:
            self._network.to_head(now_s, LoadFailed(self.name, layout.epoch, f"{self.device.label}: {error}"))
            return
        self._open_stage(layout)
        loaded = Loaded(
            self.name, layout.epoch, self._weight_bytes, self._num_pages, self._page_bytes, seconds, "simulated",
            room_bytes=self._room_bytes,
        )  # fmt: skip
        self._network.to_head(now_s + seconds, loaded)

    def _open_stage(self, layout: Layout) -> None:
        self._stages[layout.epoch] = layout
        for hop, segment in enumerate(layout.segments):
            if segment.worker == self.name:
                is_last = hop == layout.num_hops - 1
                cost = StageCost(self._facts, self.device.speed, segment.layers, is_last=is_last)
                cost.num_hops, cost.is_only = layout.num_hops, len(layout.workers) == layout.num_hops
                self._costs[layout.epoch, hop] = cost

    # -- steps ----------------------------------------------------------------------------------------------

    def step(self, flight: Flight, hop: int) -> None:
        """A step has arrived at a hop of this worker."""
        plan, now_s = flight.plan, self._world.now_s
        if plan.epoch not in self._stages:
            return
        if hop:
            self._take(flight, hop, now_s)
        else:
            self._unfed.setdefault(plan.epoch, deque()).append(flight)
            self._feed(plan.epoch)

    def _feed(self, epoch: Epoch) -> None:
        """Take the steps at the first hop whose tokens are known, or will be before anything else can come."""
        unfed, sampled_s, now_s = self._unfed.get(epoch), self._sampled_s.get(epoch, {}), self._world.now_s
        while unfed:
            plan = unfed[0].plan
            fed_s = sampled_s.get(plan.oldest, math.inf) if plan.is_ahead else now_s
            if fed_s > now_s and (fed_s == math.inf or self._handover is not None):
                if fed_s < math.inf:
                    self._world.at(fed_s, self._feed, epoch)
                return
            while sampled_s and (known := next(iter(sampled_s))) < plan.oldest:
                del sampled_s[known]
            self._take(unfed.popleft(), 0, max(now_s, fed_s))

    def _take(self, flight: Flight, hop: int, arrived_s: float) -> None:
        plan = flight.plan
        key = plan.epoch, hop
        assert plan.ordinal == self._next.get(key, 0), "a step was overtaken"
        handover = self._handover
        if handover is not None and plan.epoch > handover.source_epoch:
            self._next[key] = plan.ordinal + 1
            self._blocked.setdefault(key, deque()).append((flight, arrived_s))
            self._run_due(handover, key)
            return
        worker: SimWorker | None = self
        if not hop and (self._passage is not None or self._open_passage(plan)):
            assert self._passage is not None
            assert self._passing[0] == plan.epoch, "a step of another epoch comes while a passage is open"
            self._next[key] = plan.ordinal + 1
            self._deliver(self._passage.run(flight.work, arrived_s, flight.timings), flight)
            return
        while worker is not None:
            worker._next[plan.epoch, hop] = plan.ordinal + 1
            worker, arrived_s = worker._run(flight, hop, arrived_s)
            hop += 1

    def _open_passage(self, plan: StepPlan) -> bool:
        """Whether this step and all that follow may be run ahead of time on all of the pipeline."""
        layout = self._stages[plan.epoch]
        workers = [self._network.peer(segment.worker) for segment in layout.segments]
        if not all(worker._is_next(plan, hop) for hop, worker in enumerate(workers)):
            return False
        passage = Passage(
            self._facts,
            layout.workers,
            [worker._costs[plan.epoch, hop] for hop, worker in enumerate(workers)],
            self._world.rates.flight_s,
            self._noise,
            [worker.free_at_s for worker in workers],
            [worker._idle_since_s for worker in workers],
        )
        for worker in workers:
            worker._passage, worker._passing = passage, (plan.epoch, workers)
        return True

    def end_passage(self) -> None:
        """Have the times of the pipeline, if they are elsewhere, back at its workers."""
        passage, (epoch, workers) = self._passage, self._passing
        if passage is None:
            return
        busy_s = passage.busy_s
        for hop, worker in enumerate(workers):
            worker.free_at_s = passage.free_s[hop]
            worker._idle_since_s = passage.idle_since_s[hop]
            worker.busy_s += busy_s[hop]
            worker._next[epoch, hop] = workers[0]._next[epoch, 0]
            passage.remind(worker._limiter, hop)
            worker._passage = None

    def _is_next(self, plan: StepPlan, hop: int) -> bool:
        """Whether a step that is to arrive may be run ahead of time: nothing can come before it, and nothing changes."""
        layout = self._stages.get(plan.epoch)
        return (
            self._handover is None
            and layout is not None
            and plan.ordinal == self._next.get((plan.epoch, hop), 0)
            and self._costs[plan.epoch, hop].is_only
        )

    def _run_due(self, handover: SimHandover, key: tuple[Epoch, int]) -> None:
        """Run the steps of the next epoch whose fence is met, in their order."""
        blocked = self._blocked[key]
        while blocked:
            flight, arrived_s = blocked[0]
            if not handover.is_complete_through(flight.plan.fence):
                if handover.blocked_since_s is None:
                    handover.blocked_since_s = self._world.now_s
                return
            handover.unblocked(self._world.now_s)
            blocked.popleft()
            worker, _ = self._run(flight, key[1], arrived_s)
            assert worker is None, "a step of a transition ran ahead"

    def _run(self, flight: Flight, hop: int, arrived_s: float) -> "tuple[SimWorker | None, float]":
        """The next worker, and when the step arrives there, if it takes the step at once; else it will be brought there."""
        plan, work, layout = flight.plan, flight.work, self._stages[flight.plan.epoch]
        cost = self._costs[plan.epoch, hop]
        begun_s = max(self._world.now_s, arrived_s, self.free_at_s)
        factor = 1.0 if self._noise is None else self._noise()
        compute_s = cost.compute_s(work, flight.layer_s) * factor
        sample_s = cost.sample_s(work) * factor if cost.is_last else 0.0
        ended_s = begun_s + compute_s + sample_s
        self._limiter.ran(begun_s, ended_s)
        if flight.timings is not None:
            idle_s = max(0.0, arrived_s - self._idle_since_s)
            spent_us = [int(1e6 * seconds) for seconds in (idle_s, begun_s - arrived_s, compute_s, sample_s)]
            flight.timings.append(HopTiming(self.name, *spent_us))
        is_last, following, due_s = hop == cost.num_hops - 1, None, 0.0
        sending_s = self._kind.link_latency_s if is_last else hop_seconds(self._facts, self._kind, work.num_tokens)
        self._occupy(begun_s, compute_s + sample_s + sending_s)
        if is_last:
            self._deliver(self.free_at_s, flight)
        else:
            following = self._network.peer(layout.segments[hop + 1].worker)
            due_s = self.free_at_s + self._world.rates.flight_s
            if self._handover is not None or not following._is_next(plan, hop + 1):
                self._world.at(due_s, following.step, flight, hop + 1)
                following = None
        if self._handover is not None:
            self._handover.ran(plan, begun_s, ended_s)
            if plan.epoch == self._handover.source_epoch:
                self._mirror(self._handover, flight, hop)
        self._idle_since_s = self.free_at_s
        return following, due_s

    def _deliver(self, sent_s: float, flight: Flight) -> None:
        plan, tokens = flight.plan, [0] * int(flight.work.samples)
        result = StepResult(plan.epoch, plan.ordinal, plan.microbatch, tokens, [], [], flight.timings or [])
        self._network.to_head(sent_s, result)
        if plan.is_followed:
            first = self._network.peer(self._stages[plan.epoch].embedding_worker)
            at_s = sent_s + self._world.rates.flight_s
            first._sampled_s.setdefault(plan.epoch, {})[plan.ordinal] = at_s
            if first._unfed.get(plan.epoch):
                self._world.at(at_s, first._feed, plan.epoch)

    def _occupy(self, begun_s: float, seconds: float) -> None:
        self.free_at_s = begun_s + seconds
        self.busy_s += seconds

    # -- a transition: the source ---------------------------------------------------------------------------

    def _mirror(self, handover: SimHandover, flight: Flight, hop: int) -> None:
        """Send the rows that the step wrote in the layers that leave."""
        for source in handover.sources:
            if source.hop != hop or flight.plan.ordinal < source.start:
                continue
            num_bytes = round(flight.work.num_tokens * len(source.move.layers) * self._facts.kv_bytes)
            sent_s, _ = self._send(self.free_at_s, num_bytes)
            target = self._network.peer(source.move.target)
            arguments = (handover.transition, source.index, source.start, flight.plan.ordinal, num_bytes)
            self._world.at(sent_s + self._world.rates.flight_s, target.mirrored, *arguments)

    def _copy(self, copy: Copy) -> None:
        handover = self._under_way(copy.transition)
        if handover is not None:
            handover.bytes_per_s, handover.is_bound = float(copy.bytes_per_s), copy.is_bound
            handover.copy_began_s = self._world.now_s
            handover.due_s = self._world.now_s
            handover.jobs.extend(CopyJob(source, len(copy.blocks)) for source in handover.sources)
            self._slice(handover)

    def _slice(self, handover: SimHandover) -> None:
        """Send the next slice of the snapshot, then rest as the limiter says."""
        if handover is not self._handover or not handover.jobs:
            return
        job, world = handover.jobs[0], self._world
        block_bytes = self._page_bytes * len(job.source.move.layers)
        link = math.inf if world.rates.free_changes else self._kind.link_bytes_per_s
        per_slice = job.num_blocks if link == math.inf else max(1, int(SLICE_S * link / block_bytes))
        count = min(per_slice, job.num_blocks - job.sent)
        job.sent += count
        num_bytes = count * block_bytes
        sent_s, worked_s = self._send(max(world.now_s, self.free_at_s), num_bytes)
        target = self._network.peer(job.source.move.target)
        arguments = (handover.transition, job.source.index, job.sent, num_bytes)
        world.at(sent_s + world.rates.flight_s, target.copied, *arguments)
        if job.sent >= job.num_blocks:
            handover.jobs.popleft()
        handover.copy_s = sent_s - handover.copy_began_s
        rate = math.inf if world.rates.free_changes else handover.bytes_per_s
        limiter, due_s = self._limiter, handover.due_s
        handover.due_s = max(
            limiter.due_s(self.free_at_s, due_s, worked_s, num_bytes, rate),
            target._limiter.due_s(max(world.now_s, target.free_at_s), due_s, worked_s, num_bytes),
        )
        following_s = sent_s if limiter.is_idle(world.now_s) else world.now_s
        if handover.is_bound:
            following_s = max(following_s, world.now_s + num_bytes / rate)
        world.at(max(handover.due_s, following_s), self._slice, handover)

    def _send(self, begun_s: float, num_bytes: int) -> tuple[float, float]:
        """Send KV from `begun_s` on: when the last byte has left, and for how long this thread was kept.

        A CPU is kept by all of it. On an accelerator steps lose what queueing takes and the bandwidth, and the link is busy meanwhile:
        for one thing after the other.
        """
        if self._world.rates.free_changes:
            return max(begun_s, self.free_at_s), 0.0
        wire_s = num_bytes / self._kind.link_bytes_per_s
        if not self._kind.is_accelerator:
            self._occupy(begun_s, wire_s)
            return self.free_at_s, wire_s
        self._occupy(begun_s, self._limiter.taken_s(QUEUE_S, num_bytes))
        self._wire_free_s = max(self._wire_free_s, self.free_at_s) + wire_s
        return self._wire_free_s, QUEUE_S

    # -- a transition: the target ---------------------------------------------------------------------------

    def mirrored(self, transition: int, move: int, start: int, ordinal: int, num_bytes: int) -> None:
        """Rows of a step have arrived, in the order of their steps."""
        handover = self._under_way(transition)
        if handover is None:
            return
        incoming = handover.incoming[move]
        incoming.begin(start)
        assert incoming.through is not None
        incoming.through = max(incoming.through, ordinal)
        incoming.row_bytes += num_bytes
        self._unblock()

    def copied(self, transition: int, move: int, count: int, num_bytes: int) -> None:
        """The first `count` blocks of a move's snapshot have arrived."""
        handover = self._under_way(transition)
        if handover is not None:
            handover.incoming[move].page_bytes += num_bytes
            self._reply(Copied(self.name, transition, move, count, num_bytes))

    def _prepare(self, prepare: Prepare) -> None:
        assert prepare.transition > self._last_transition, "a transition begins twice"
        self._last_transition = prepare.transition
        layout, mine = prepare.load.layout, prepare.load.layout.layers_of(self.name)
        if not self._pool_bytes and (error := self._make_pool(prepare.load, max(1, len(mine)))):
            self._reply(TransitionFailed(self.name, prepare.transition, error))
            return
        self._handover = handover = SimHandover(prepare.transition, prepare.source_epoch, layout)
        for index, move in enumerate(prepare.moves if prepare.copies else ()):
            if move.target == self.name:
                handover.incoming[index] = Incoming()
            if move.source == self.name:
                handover.leaving.append((index, move))
        if self.name in layout.workers:
            self._open_stage(layout)
        self._fit_pool(self._units.union(_units_of(layout, self.name)))
        pool = self._num_pages, self._page_bytes
        self._reply(Prepared(self.name, prepare.transition, *pool, room_bytes=self._room_bytes))
        missing = [unit for unit in _units_of(layout, self.name) if unit not in self._units]
        needed = sum(self._unit_bytes(unit) for unit in missing)
        if needed + MIN_FREE_BYTES > self._memory_left() and missing:
            free = max(0, self._memory_left() - MIN_FREE_BYTES)
            error = f"{len(missing)} arriving units need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            self._reply(TransitionFailed(self.name, prepare.transition, error))
            return
        self._shadow(handover, missing, self._world.now_s)

    def _start_mirror(self, handover: SimHandover) -> None:
        old = self._stages[handover.source_epoch]
        for index, move in handover.leaving:
            hop = next(h for h, s in enumerate(old.segments) if move.layers.start in s.layers)
            handover.sources.append(Source(index, move, hop, self._next.get((handover.source_epoch, hop), 0)))
        starts = [(source.index, source.start) for source in handover.sources]
        self._reply(Mirroring(self.name, handover.transition, starts))

    def _shadow(self, handover: SimHandover, missing: Sequence[Unit], began_s: float) -> None:
        """Load the next unit, then rest as long as a worker that serves must."""
        if handover is not self._handover:
            return
        now_s = self._world.now_s
        if not missing:
            ready = ShadowReady(self.name, handover.transition, self._weight_bytes, now_s - began_s)
            self._reply(ready)
            return
        unit, *rest = missing
        self._units.add(unit)
        seconds = 0.0 if self._world.rates.free_changes else self._unit_bytes(unit) / self._world.rates.load_bytes_per_s
        if handover.source_epoch in self._stages:
            seconds /= self._limiter.loading_share(now_s)
        self._world.at(now_s + seconds, self._shadow, handover, rest, began_s)

    # -- a transition: the end ------------------------------------------------------------------------------

    def _unblock(self) -> None:
        handover = self._handover
        if handover is None or not handover.is_open:
            return
        for key in list(self._blocked):
            self._run_due(handover, key)
        if self._retire_due is not None and handover.is_complete_through(self._retire_due.through):
            self._end_transition(handover, gone=handover.source_epoch)

    def _retire(self, message: Retire | Cancel) -> None:
        handover = self._under_way(message.transition)
        if handover is None:
            if isinstance(message, Cancel):
                self._reply(Retired(self.name, message.transition, 0, 0, 0, 0, []))
            return
        match message:
            case Retire():
                self._retire_due = message
                self._unblock()
            case Cancel():
                self._end_transition(handover, gone=handover.layout.epoch)
            case _:
                assert_never(message)

    def _end_transition(self, handover: SimHandover, *, gone: Epoch) -> None:
        self._handover, self._retire_due = None, None
        self._stages.pop(gone, None)
        self._costs = {key: cost for key, cost in self._costs.items() if key[0] != gone}
        self._next = {key: ordinal for key, ordinal in self._next.items() if key[0] != gone}
        assert not any(self._blocked.values()), "a transition ends and steps still wait for its mirror"
        assert not self._unfed.get(gone), "an epoch ends and steps still wait for its tokens"
        self._blocked.clear()
        self._unfed.pop(gone, None)
        self._sampled_s.pop(gone, None)
        self._units &= {unit for layout in self._stages.values() for unit in _units_of(layout, self.name)}
        self._fit_pool(self._units)
        if not self._stages:
            self._pool_bytes = self._room_bytes = 0
        self._reply(
            Retired(
                worker=self.name,
                transition=handover.transition,
                row_bytes=sum(incoming.row_bytes for incoming in handover.incoming.values()),
                page_bytes=sum(incoming.page_bytes for incoming in handover.incoming.values()),
                fence_waits=handover.fence_waits,
                fence_wait_us=int(1e6 * handover.fence_wait_s),
                pauses_us=[int(1e6 * pause) for pause in handover.pauses_s],
                weight_bytes=self._weight_bytes,
                copy_us=int(1e6 * handover.copy_s),
            )
        )

    def _under_way(self, transition: int) -> SimHandover | None:
        handover = self._handover
        return handover if handover is not None and handover.transition == transition else None

    def _reply(self, message: ToHead) -> None:
        """Answer once what was taken on before is done: the real one has one thread for all of it."""
        self._network.to_head(max(self._world.now_s, self.free_at_s), message)


def _units_of(layout: Layout, worker: WorkerName) -> list[Unit]:
    """As `runtime.member.unit_keys`."""
    units: list[Unit] = list(layout.layers_of(worker))
    if worker in layout.workers:
        if layout.embedding_worker == worker:
            units.insert(0, "embedding")
        if layout.lm_head_worker == worker:
            units.append("lm_head")
    return units
