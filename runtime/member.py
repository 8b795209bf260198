"""What a worker does with each message: the layouts it serves, the order of its steps, its part in a transition.

A `Member` has no threads, no clock and no sockets: `runtime.worker` feeds it and carries its messages, and so does the
simulator. Usually it serves one epoch; during a transition two, over the same units and the same page pool.

Steps of an epoch run in the order of their ordinals at each hop. A step of an epoch that is not here is stale: counted and
dropped. A step of the next epoch waits while its fence is not met; steps of the old epoch go on meanwhile. At the first hop a step that was formed
ahead of its tokens waits for them.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, assert_never

import numpy as np
import torch

from kvstore.ids import Epoch, WorkerName
from kvstore.page_pool import PagePool, PoolExhausted
from kvstore.transfers import TransferError
from runtime.batch import NOT_TIMED
from runtime.cuda.copies import Copies
from runtime.exchange import Export
from runtime.handover import Handover
from runtime.kernels.clock import ATTENTION, LM_HEAD, NUM_PARTS, PRODUCTS
from runtime.layout import Layout
from runtime.limiter import Limiter
from runtime.messages import (
    Audit,
    Audited,
    Cancel,
    Copied,
    Copy,
    Fetch,
    HopTiming,
    Lent,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Mirror,
    Mirroring,
    Open,
    Pages,
    Prepare,
    Prepared,
    ProfilePoint,
    Retire,
    Retired,
    ShadowReady,
    StartMirror,
    Step,
    StepPlan,
    StepResult,
    Taken,
    ToHead,
    Tokens,
    TransitionFailed,
    Unreachable,
    Weights,
    decode_plan,
)
from runtime.pace import Pacer
from runtime.stage import Stage, Units
from runtime.stage_state import StepOrder
from runtime.trace import Tracer

log = logging.getLogger("midflight.worker")

UnitKey: TypeAlias = int | str
"""A layer's index, "embedding" or "lm_head"."""
Tensors: TypeAlias = Sequence[torch.Tensor]
MAX_EARLY_MESSAGES = 10_000
COPIES_POLL_S = 0.001
"""How long to leave copies that are on their way alone when there are too many."""
COMPUTE = "compute"
"""The track of what is traced here."""


class UnitStore(Protocol):
    """Where units come from. One per worker; it outlives layouts and heads."""

    units: Units
    weight_bytes: int
    room_bytes: int
    """What weights and pages share; 0 when the number of pages is fixed. Of the last pool that was made."""
    implementation: str
    profile: list[ProfilePoint]
    """What was measured when units were first loaded; the member sends it on and empties it."""

    def load(
        self, load: Load, keys: Sequence[UnitKey], num_layers: int, progress: Callable[[int, str], None]
    ) -> PagePool:
        """Hold exactly `keys`, now, and make an empty pool for `num_layers` layers."""
        ...

    def make_pool(self, load: Load, num_layers: int) -> PagePool:
        """An empty pool for `num_layers` layers beside all units that the layout gives to this worker."""
        ...

    def fit_pool(self, pool: PagePool, keys: Iterable[UnitKey], *, in_pieces: bool = False) -> bool:
        """Give `pool` the pages that the units `keys` leave, if their number is not fixed; whether that is done.

        Only `in_pieces` it may not be done: then call it again.

        Raises:
            PoolExhausted: more are in use.
        """
        ...

    def shadow(self, load: Load, keys: Sequence[UnitKey], transition: int, pace: "Pace") -> None:
        """Load those of `keys` that are missing, in the background; `Member.shadow_built` is called in the end."""
        ...

    def parts(self, key: UnitKey, form: str) -> Mapping[str, torch.Tensor] | None:
        """The tensors of a unit, for a peer that wants them in this form; None when that is not to be had."""
        ...

    def cancel_shadow(self) -> None: ...

    def retain(self, keys: Iterable[UnitKey]) -> None:
        """Drop all other units."""
        ...

    def give_back(self, is_idle: Callable[[], bool]) -> None:
        """Return to the system what dropped units left, soon, when `is_idle` says so; it is asked from another thread."""
        ...

    def rss(self) -> int: ...


class Outbox(Protocol):
    """Where messages go, and steps come from. No call waits for anybody."""

    def to_head(self, message: ToHead) -> None: ...

    def to_peer(
        self, worker: WorkerName, message: Step | Tokens | Mirror | Pages | Taken | Fetch | Weights, tensors: Tensors
    ) -> None: ...

    def next_step(self) -> tuple[Step, Tensors, float] | None:
        """A step that has arrived, and when, if nothing else has; `take_step` then takes it. Asked for beside devices whose work is queued."""
        ...

    def take_step(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """What a shadow's loading must know: the `share` of the time that it may compute, and that it may load (both asked again
    and again, from any thread), whether this worker serves nothing yet, and which peers hold the arriving units."""

    share: Callable[[], float]
    loading_share: Callable[[], float]
    is_idle: bool
    holders: Mapping[UnitKey, WorkerName]


_Due: TypeAlias = tuple[Step, StepPlan, Tensors, float]


class Member:
    """One worker's state. Every method runs on one thread; `clock` gives seconds."""

    def __init__(
        self,
        name: WorkerName,
        device: torch.device,
        store: UnitStore,
        outbox: Outbox,
        clock: Callable[[], float],
        tracer: Tracer | None = None,
        pacer: Pacer | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._name = name
        self._device = device
        self._store = store
        self._outbox = outbox
        self._clock = clock
        self._tracer = tracer or Tracer()
        self._newest_run: Epoch = -1
        self._pacer = pacer
        self._copies = copies
        self._unsent: StepResult | None = None
        self._running = (0, 0)
        """Epoch and hop of the step that ran last, or runs."""
        self.pool: PagePool | None = None
        self._stages: dict[Epoch, Stage] = {}
        self._order: dict[tuple[Epoch, int], StepOrder[_Due]] = {}
        self._handover: Handover | None = None
        self._early: list[tuple[Mirror | Pages, Tensors]] = []
        self._newest_told: Epoch = 0
        """By `Load` or `Prepare`: one that is older comes too late."""
        self._called_off = 0
        """A transition whose `Cancel` came before its `Prepare`."""
        self._retire_due: Retire | None = None
        self._room_due: tuple[list[UnitKey], Callable[[], None]] | None = None
        """Units for which the pool has yet to make room, and what is to be done then."""
        self._blocked_since_s: float | None = None
        self._idle_since_s = clock()
        self._limiter = Limiter(copies.measure() if copies is not None else None)
        self._exports: deque[Export] = deque()
        self._pieces: deque[tuple[Pages, Tensors]] = deque()
        """Of a snapshot, what has arrived and is not in place."""
        self._background_due_s = 0.0
        self.num_stale = 0

    def serves(self) -> list[Epoch]:
        """The epochs whose steps run here."""
        return sorted(self._stages)

    @property
    def has_time(self) -> bool:
        """Whether what this worker does can wait for others: it takes part in a transition, and runs no steps before it opens, or none in the
        next layout and no more in this one."""
        handover = self._handover
        if handover is None:
            return False
        if handover.is_open:
            return handover.layout.epoch not in self._stages and self._limiter.is_idle(self._clock())
        return handover.source_epoch not in self._stages

    @property
    def num_sequences(self) -> int:
        return sum(stage.state.num_sequences for stage in self._stages.values())

    @property
    def pages_used(self) -> int:
        return self.pool.num_used if self.pool is not None else 0

    # -- one layout from scratch ----------------------------------------------------------------------------

    def load(self, load: Load) -> None:
        """Drop what the new layout does not need, load what it does, start with empty KV. Blocks until it is done.

        A worker that is not in the layout only drops what it has, and does not answer.
        """
        layout = load.layout
        if layout.epoch <= max((self._newest_told, *self._stages)):
            self.num_stale += 1
            return
        self._newest_told = layout.epoch
        self._drop()
        if self._name not in layout.workers:
            self._store.retain(())
            self._give_back()
            return
        keys = unit_keys(layout, self._name)

        def progress(units_loaded: int, phase: str) -> None:
            self._outbox.to_head(LoadProgress(self._name, layout.epoch, units_loaded, len(keys), phase))

        started_s = self._clock()
        try:
            self.pool = pool = self._store.load(load, keys, len(layout.layers_of(self._name)), progress)
            pool.hold(layout.layers_of(self._name))
        except Exception as error:
            log.exception("loading failed")
            self._store.retain(())
            self._outbox.to_head(LoadFailed(self._name, layout.epoch, f"{type(error).__name__}: {error}"))
            return
        self._stages[layout.epoch] = Stage(layout, self._name, self._store.units, pool, self._device)
        self._idle_since_s = self._clock()
        profile, self._store.profile = self._store.profile, []
        self._outbox.to_head(
            Loaded(
                worker=self._name,
                epoch=layout.epoch,
                weight_bytes=self._store.weight_bytes,
                num_pages=pool.num_pages,
                page_bytes=pool.page_bytes,
                seconds=self._clock() - started_s,
                implementation=self._store.implementation,
                profile=profile,
                room_bytes=self._store.room_bytes,
            )
        )

    def release(self) -> None:
        """This life is over, the process may have another: hold nothing, and be held by nothing in the store. The units stay."""
        self._drop()
        self._store.give_back(lambda: True)

    def _drop(self) -> None:
        self._store.cancel_shadow()
        self._stages.clear()
        self._order.clear()
        self._handover, self._retire_due, self._room_due, self.pool, self._unsent = None, None, None, None, None
        self._early.clear()
        self._exports.clear()
        self._pieces.clear()

    # -- steps ----------------------------------------------------------------------------------------------

    def step(self, step: Step, tensors: Tensors, arrived_s: float) -> None:
        """Take a step that arrived and run what is due.

        Raises:
            StepError: a step could not be run; this process should end.
        """
        begun_s = self._clock()
        plan = decode_plan(step.plan)
        if self._tracer.is_on:
            amounts = {"bytes": len(step.plan)}
            self._tracer.span(COMPUTE, "decode", begun_s, self._clock(), (plan.epoch, plan.ordinal, step.hop), amounts)
        if plan.epoch not in self._stages:
            self.num_stale += 1
            return
        order = self._order.setdefault((plan.epoch, step.hop), StepOrder())
        if not order.push(plan.ordinal, (step, plan, tensors, arrived_s)):
            self.num_stale += 1
            return
        self._run_due(plan.epoch, step.hop)

    def sampled(self, tokens: Tokens, arrived_s: float) -> None:
        """What the last hop found, here at the first: a step may wait for it. What belongs to an epoch that is over is dropped."""
        stage = self._stages.get(tokens.epoch)
        if stage is not None:
            stage.state.sampled(tokens, arrived_s)
            self._run_due(tokens.epoch, 0)

    def _run_due(self, epoch: Epoch, hop: int) -> None:
        order = self._order[epoch, hop]
        while (due := order.peek()) is not None:
            step, plan, tensors, arrived_s = due
            handover = self._handover
            if handover is not None and epoch > handover.source_epoch and not handover.is_complete_through(plan.fence):
                if self._blocked_since_s is None:
                    self._blocked_since_s = self._clock()
                return
            fed_s = -math.inf if hop else self._stages[epoch].state.fed_s(plan)
            if fed_s is None:
                return
            order.pop()
            try:
                self._run(step, plan, tensors, max(arrived_s, fed_s))
            except Exception as error:
                raise StepError(epoch, plan.ordinal, error) from error

    def _unblock(self) -> None:
        """Something arrived that steps of the next epoch, or the transition's end, may have waited for."""
        handover = self._handover
        if handover is None or not handover.is_open:
            return
        for epoch, hop in list(self._order):
            if epoch > handover.source_epoch:
                self._run_due(epoch, hop)
        if self._retire_due is not None and handover.is_complete_through(self._retire_due.through):
            self._end_transition(handover, committed=True)

    def _run(self, step: Step, plan: StepPlan, tensors: Tensors, ready_s: float) -> None:
        stage, hop = self._stages[plan.epoch], step.hop
        begun_s = self._clock()
        if (
            self._blocked_since_s is not None
            and self._handover is not None
            and plan.epoch > self._handover.source_epoch
        ):
            self._handover.fence_waits += 1
            self._handover.fence_wait_s += begun_s - self._blocked_since_s
            self._blocked_since_s = None
        self._limiter.begins()
        self._running = plan.epoch, hop
        stage.meanwhile, stage.before_eager = self._meanwhile, self.send_result
        stage.spent = np.zeros(NUM_PARTS, np.int64) if self._tracer.is_on else NOT_TIMED
        cpu_ns = self._tracer.cpu_ns()
        with torch.inference_mode():
            hidden = stage.run(plan, hop, tensors[0] if len(tensors) else None)
            if self._pacer is not None:
                num_layers = len(stage.layout.segments[hop].layers)
                self._pacer.hold_step((len(row.tokens) for row in plan.rows), num_layers, begun_s)
            computed_s = self._clock()
            sampled = stage.sample(hidden) if hop == stage.layout.num_hops - 1 else None
            if self._pacer is not None and sampled is not None:
                self._pacer.hold_sampling(computed_s)
        ended_s = computed_s if sampled is None else self._clock()
        if sampled is not None:
            computed_s = min(stage.computed_s(begun_s, computed_s), ended_s)
        cpu_ns = self._tracer.cpu_ns() - cpu_ns
        self._limiter.ran(begun_s, ended_s)
        timing = HopTiming(
            worker=self._name,
            idle_us=max(0, int(1e6 * (ready_s - self._idle_since_s))),
            queued_us=max(0, int(1e6 * (begun_s - ready_s))),
            compute_us=int(1e6 * (computed_s - begun_s)),
            sample_us=int(1e6 * (ended_s - computed_s)),
        )
        timings = [*step.timings, timing]
        if sampled is None:
            following = stage.layout.segments[hop + 1].worker
            self._outbox.to_peer(following, Step(hop + 1, step.plan, timings), (hidden,))
        else:
            if plan.is_followed:
                sequences = [row.sequence for row in plan.rows if row.sample]
                tokens = Tokens(plan.epoch, plan.ordinal, sequences, sampled.tokens)
                self._outbox.to_peer(stage.layout.embedding_worker, tokens, ())
            self.send_result()
            self._unsent = StepResult(
                epoch=plan.epoch,
                ordinal=plan.ordinal,
                microbatch=plan.microbatch,
                tokens=sampled.tokens,
                logprobs=sampled.logprobs,
                prompt_logprobs=sampled.prompt_logprobs,
                timings=timings,
                failed=sampled.failed,
            )
            # A device whose work is queued should have its next step before anything else is done.
            if self._copies is None or self._handover is not None:
                self.send_result()
        sent_s = self._clock()
        if self._handover is not None:
            assert stage.planned is not None
            self._handover.ran(plan, stage.planned, hop, begun_s, ended_s, self._outbox.to_peer)
        self._idle_since_s = self._clock()
        if self._tracer.is_on and len(stage.spent):
            self._trace_step(plan, hop, stage.spent, cpu_ns, (begun_s, computed_s, ended_s, sent_s, self._idle_since_s))

    def send_result(self) -> None:
        """Send what the last step found, if that was put off. To be called before anything waits, or is told to anybody."""
        result, self._unsent = self._unsent, None
        if result is not None:
            self._outbox.to_head(result)

    def _meanwhile(self) -> None:
        """The device works on a step, and this thread is about to wait for it: do what would else keep the next one waiting."""
        self.send_result()
        epoch, hop = self._running
        stage, order, found = self._stages.get(epoch), self._order.get((epoch, hop)), self._outbox.next_step()
        if self._handover is not None or stage is None or order is None or found is None:
            return
        step, tensors, arrived_s = found
        plan = decode_plan(step.plan)
        if (step.hop, plan.epoch) != (hop, epoch):
            return
        self._outbox.take_step()
        if not order.push(plan.ordinal, (step, plan, tensors, arrived_s)):
            self.num_stale += 1
        elif (due := order.peek()) is not None:
            stage.plan_ahead(due[1], hop)

    def _trace_step(self, plan: StepPlan, hop: int, spent: np.ndarray, cpu_ns: int, times_s: tuple[float, ...]) -> None:
        """The spans of a step that has run: its parts, sending on, and what it did for a transition."""
        span, step = self._tracer.span, (plan.epoch, plan.ordinal, hop)
        begun_s, computed_s, ended_s, sent_s, mirrored_s = times_s
        amounts = {
            "microbatch": plan.microbatch,
            "rows": len(plan.rows),
            "tokens": sum(len(row.tokens) for row in plan.rows),
            "begun_rows": sum(row.begin is not None for row in plan.rows),
            "attention_ns": int(spent[ATTENTION]),
            "products_ns": int(spent[PRODUCTS]),
            "lm_head_ns": int(spent[LM_HEAD]),
            "cpu_ns": cpu_ns,
        }
        span(COMPUTE, "step", begun_s, ended_s, step, amounts)
        if ended_s > computed_s:
            span(COMPUTE, "sample", computed_s, ended_s, step)
        span(COMPUTE, "send", ended_s, sent_s, step)
        handover = self._handover
        if handover is None:
            return
        is_old = plan.epoch == handover.source_epoch
        span(COMPUTE, "mirror" if is_old and handover.sources else "handover", sent_s, mirrored_s, step)
        if not is_old and plan.epoch > self._newest_run:
            self._newest_run = plan.epoch
            span(COMPUTE, "flip", begun_s, begun_s, step)

    # -- a transition ---------------------------------------------------------------------------------------

    def prepare(self, prepare: Prepare) -> None:
        """Begin a transition: room for the arriving layers, and the shadow's loading."""
        if prepare.transition <= self._newest_told:
            return
        self._newest_told = prepare.transition
        if prepare.transition == self._called_off:
            if self.pool is not None:
                self.pool.release_blocks(prepare.retired_blocks)
            self._outbox.to_head(Retired(self._name, prepare.transition, 0, 0, 0, 0, []))
            return
        layout, load = prepare.load.layout, prepare.load
        old = self._stages.get(prepare.source_epoch)
        mine = layout.layers_of(self._name)
        self._handover = handover = Handover(prepare.transition, prepare.source_epoch, layout, self._copies)
        try:
            if self.pool is None:
                self.pool = self._store.make_pool(load, max(1, len(mine)))
            if prepare.retired_blocks:
                self.pool.release_blocks(prepare.retired_blocks)
            keys = [*self._served_keys(), *unit_keys(layout, self._name)]
            has_room = self._store.fit_pool(self.pool, keys, in_pieces=True)
            self.pool.hold(mine)
        except Exception as error:
            log.exception("preparing transition %d failed", prepare.transition)
            self._outbox.to_head(TransitionFailed(self._name, prepare.transition, f"{type(error).__name__}: {error}"))
            return
        handover.begin(prepare, self._name, self.pool)
        if self._name in layout.workers:
            self._stages[layout.epoch] = Stage(layout, self._name, self._store.units, self.pool, self._device)
        self._outbox.to_head(
            Prepared(
                worker=self._name,
                transition=prepare.transition,
                num_pages=self.pool.num_pages,
                page_bytes=self.pool.page_bytes,
                room_bytes=self._store.room_bytes,
            )
        )
        early, self._early = self._early, []
        for message, tensors in early:
            self.arrive(message, tensors)
        holders: dict[UnitKey, WorkerName] = {"embedding": prepare.ends[0], "lm_head": prepare.ends[1]}
        holders |= {layer: move.source for move in prepare.moves for layer in move.layers}
        limiter, clock = self._limiter, self._clock
        shares = (lambda: limiter.working_share(clock()), lambda: limiter.loading_share(clock()))
        pace = Pace(*shares, is_idle=old is None, holders=holders)

        def begin() -> None:
            self._store.shadow(load, unit_keys(layout, self._name), prepare.transition, pace)

        if has_room:
            begin()
        else:
            self._room_due = keys, begin

    def shadow_built(self, transition: int, seconds: float, peer_bytes: int, error: Exception | None) -> None:
        """The store has loaded the shadow of `transition`, or failed to."""
        if self._handover is None or self._handover.transition != transition:
            return
        if error is not None:
            self._outbox.to_head(TransitionFailed(self._name, transition, f"{type(error).__name__}: {error}"))
        else:
            store = self._store
            ready = ShadowReady(self._name, transition, store.weight_bytes, seconds, peer_bytes, store.implementation)
            self._outbox.to_head(ready)

    def fetch(self, fetch: Fetch) -> None:
        """A peer asks for a unit that is here; it is sent in the background."""
        self._exports.append(Export(fetch, self._store.parts(fetch.unit, fetch.form)))

    def start_mirror(self, message: StartMirror) -> None:
        """From the next step on, mirror the rows of the layers that leave."""
        handover = self._handover
        if handover is None or handover.transition != message.transition:
            return
        stage = self._stages[handover.source_epoch]
        assert self.pool is not None, "a source of KV has a pool"
        starts: dict[int, int] = {}
        for hop, segment in enumerate(stage.layout.segments):
            if segment.worker == self._name:
                order = self._order.get((handover.source_epoch, hop))
                starts[hop] = order.next_ordinal if order is not None else 0
        begun = handover.start_mirror(self.pool, stage.layout, starts)
        self._outbox.to_head(Mirroring(self._name, message.transition, begun))

    def copy(self, copy: Copy) -> None:
        if self._handover is not None and self._handover.transition == copy.transition:
            self._handover.copy(copy, self._clock(), self._outbox.to_peer)

    def open(self, message: Open) -> None:
        if self._handover is not None and self._handover.transition == message.transition:
            self._handover.open(message.starts, self._outbox.to_peer)
            self._unblock()

    def arrive(self, message: Mirror | Pages, tensors: Tensors) -> None:
        """KV from a peer: rows are put in place at once, pieces of a snapshot in the background. What comes before its `Prepare` is kept
        until then; what comes too late is dropped."""
        handover = self._handover
        if message.transition > max(self._newest_told, self._called_off):
            assert len(self._early) < MAX_EARLY_MESSAGES, "peers send KV for a transition that the head never prepared"
            self._early.append((message, tensors))
            return
        if handover is None or handover.transition != message.transition or message.move not in handover.incoming:
            self.num_stale += 1
            return
        if isinstance(message, Pages):
            self._pieces.append((message, tensors))
            return
        begun_s = self._clock()
        try:
            handover.mirror(message, list(tensors))
        except (TransferError, PoolExhausted) as error:
            self._outbox.to_head(TransitionFailed(self._name, message.transition, str(error)))
            return
        self._trace_kv("rows applied", begun_s, _num_bytes(tensors))
        self._unblock()

    def taken(self, message: Taken) -> None:
        """A target has put in place what was sent to it."""
        if self._handover is not None and self._handover.transition == message.transition:
            self._handover.taken(message)

    def retire(self, message: Retire | Cancel) -> None:
        """The transition has ended: keep what its outcome needs, and report; committed, once all rows are here."""
        handover = self._handover
        if message.transition > self._newest_told:
            # It overtook its `Prepare`, which has yet to say what pages must go.
            assert isinstance(message, Cancel), "a transition is retired that was never prepared here"
            self._called_off = message.transition
            return
        if handover is None or handover.transition != message.transition:
            return
        if isinstance(message, Retire):
            self._retire_due = message
            self._unblock()
        else:
            self._end_transition(handover, committed=False)

    def _end_transition(self, handover: Handover, *, committed: bool) -> None:
        gone = handover.source_epoch if committed else handover.layout.epoch
        self._handover, self._blocked_since_s, self._retire_due, self._room_due = None, None, None, None
        self._store.cancel_shadow()
        self._pieces.clear()
        self._exports.clear()  # nobody waits for them any more, and they hold weights that may leave now
        self._stages.pop(gone, None)
        for key in [key for key in self._order if key[0] == gone]:
            del self._order[key]
        keys = self._served_keys()
        if self.pool is not None:
            self.pool.drop([layer for layer in self.pool.layers if layer not in keys])
        self._store.retain(keys)
        row_bytes, page_bytes = handover.totals()
        if not self._stages:
            self.pool = None
        if self.pool is not None:
            self._store.fit_pool(self.pool, keys)
        self._give_back()
        self._outbox.to_head(
            Retired(
                worker=self._name,
                transition=handover.transition,
                row_bytes=row_bytes,
                page_bytes=page_bytes,
                fence_waits=handover.fence_waits,
                fence_wait_us=int(1e6 * handover.fence_wait_s),
                pauses_us=[int(1e6 * pause) for pause in handover.pauses_s],
                excesses_us=[int(1e6 * excess) for excess in handover.excesses_s],
                weight_bytes=self._store.weight_bytes,
                copy_us=int(1e6 * handover.copy_s),
                num_pages=self.pool.num_pages if self.pool is not None else 0,
                room_bytes=self._store.room_bytes if self.pool is not None else 0,
                ordinary_us=[int(1e6 * excess) for excess in handover.ordinary_s],
            )
        )

    def _give_back(self) -> None:
        """What has left leaves memory behind; it goes when no step waits for that."""
        self._store.give_back(lambda: not self._stages or self._limiter.is_idle(self._clock()))

    def _served_keys(self) -> list[UnitKey]:
        """The units that the layouts served here give to this worker."""
        return [key for stage in self._stages.values() for key in unit_keys(stage.layout, self._name)]

    # -- what did not arrive --------------------------------------------------------------------------------

    def unreachable(self, peer: WorkerName, transition: int, error: str) -> None:
        """A message to `peer` was lost, and somebody waits for it (`transition_of`). The head decides what becomes of it."""
        self._outbox.to_head(Unreachable(self._name, peer, transition, error))

    # -- in the background ----------------------------------------------------------------------------------

    def background_wait_s(self) -> float | None:
        """Seconds until `background` has something to do, negative when it is overdue; None when it has nothing."""
        due_s, handover = self._background_due_s, self._handover
        if self._exports or self._pieces or self._room_due is not None:
            return due_s - self._clock()
        if handover is not None and handover.has_slices:
            return max(due_s, handover.slice_due_s) - self._clock()
        return None

    def background(self) -> None:
        """Do one slice of what can be done between steps: room for units, weights that a peer asked for, what came of a snapshot, then what
        goes."""
        began_s, bytes_per_s, handover = self._clock(), math.inf, self._handover
        if began_s < self._background_due_s:
            return
        if self._copies is not None and self._copies.is_full:
            self._background_due_s = began_s + COPIES_POLL_S
            return
        if self._room_due is not None:
            what, num_bytes = "room made", self._make_room(*self._room_due)
        elif self._exports:
            what, num_bytes = "weights sent", self._send_weights()
        elif self._pieces:
            what, num_bytes = "pages applied", self._apply_pages(*self._pieces.popleft())
        elif handover is not None and handover.has_slices and began_s >= handover.slice_due_s:
            what, num_bytes = "snapshot slice", handover.send_slice(began_s, self._outbox.to_peer)
            bytes_per_s = handover.bytes_per_s if not handover.is_bound else math.inf
        else:
            return
        now_s = self._clock()
        due_s, worked_s = self._background_due_s, now_s - began_s
        self._background_due_s = self._limiter.due_s(now_s, due_s, worked_s, num_bytes, bytes_per_s)
        self._trace_kv(what, began_s, num_bytes)

    def _make_room(self, keys: list[UnitKey], then: Callable[[], None]) -> int:
        """Bytes that pages have given up in this slice; when there is room, `then` is called."""
        assert self.pool is not None, "a pool makes room"
        before = self.pool.num_pages
        if self._store.fit_pool(self.pool, keys, in_pieces=True):
            self._room_due = None
            then()
        return (before - self.pool.num_pages) * self.pool.page_bytes

    def _send_weights(self) -> int:
        """A slice for each who asked in turn: who hears nothing for as long as another's unit takes gives this peer up."""
        export = self._exports.popleft()
        message, tensors = export.take()
        if not export.is_done:
            self._exports.append(export)
        self._outbox.to_peer(export.target, message, tensors)
        return _num_bytes(tensors)

    def _apply_pages(self, message: Pages, tensors: Tensors) -> int:
        """Put a piece of a snapshot in place, and say so to the head and to its source; its bytes."""
        handover, num_bytes = self._handover, _num_bytes(tensors)
        assert handover is not None, "pieces are of the transition that goes on"
        try:
            count = handover.pages(message, list(tensors))
        except (TransferError, PoolExhausted) as error:
            self._outbox.to_head(TransitionFailed(self._name, message.transition, str(error)))
            return num_bytes
        _, received = handover.totals()
        self._outbox.to_head(Copied(self._name, message.transition, message.move, count, received))
        self._outbox.to_peer(handover.source_of[message.move], Taken(message.transition, message.move, count), ())
        return num_bytes

    def _trace_kv(self, name: str, begun_s: float, num_bytes: int) -> None:
        if self._tracer.is_on:
            self._tracer.span(COMPUTE, name, begun_s, self._clock(), amounts={"bytes": num_bytes})

    def audit(self, audit: Audit) -> Audited:
        problems: list[str] = []
        for stage in self._stages.values():
            stage.state.retain_only(audit.live_sequences, audit.newest)
            try:
                stage.check_integrity()
            except AssertionError as error:
                problems.append(str(error))
        if self._handover is None and self.pool is not None:
            held = {layer for stage in self._stages.values() for layer in stage.layout.layers_of(self._name)}
            if set(self.pool.layers) != held:
                problems.append(f"pages are held for layers {self.pool.layers}, the layout gives {sorted(held)}")
        return Audited(
            worker=self._name,
            num_sequences=self.num_sequences,
            pages_used=self.pages_used,
            rss=self._store.rss(),
            problems=problems,
        )


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class StepError(Exception):
    """A step could not be run. The worker tells the head and ends; there is no state worth saving."""

    def __init__(self, epoch: Epoch, ordinal: int, cause: Exception) -> None:
        super().__init__(f"step {ordinal} of epoch {epoch}: {type(cause).__name__}: {cause}")
        self.epoch = epoch
        self.ordinal = ordinal


def transition_of(message: Step | Tokens | Mirror | Pages | Taken | Fetch | Weights | Lent) -> int | None:
    """What waits for a message to a peer: a transition, by its number, or the pipeline (-1). None when nothing does: who asks a
    peer for weights gives up and reads the checkpoint."""
    match message:
        case Step() | Tokens():
            return -1
        case Mirror() | Pages() | Taken():
            return message.transition
        case Fetch() | Weights() | Lent():
            return None
        case _:
            assert_never(message)


def unit_keys(layout: Layout, worker: WorkerName) -> list[UnitKey]:
    """The units that `layout` gives to `worker`, in the order of the model."""
    keys: list[UnitKey] = list(layout.layers_of(worker))
    if worker in layout.workers:
        if layout.embedding_worker == worker:
            keys.insert(0, "embedding")
        if layout.lm_head_worker == worker:
            keys.append("lm_head")
    return keys
