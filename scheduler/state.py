"""The head's mind: ``step(event) -> effects``. Pure: no clock, no sockets, no torch; the driver brings and does those.

Its life: wait for workers -> load the layout -> serve; when a worker of the layout is lost, recover: wait a while for
the lost one to be restarted, then load a layout over whoever is there, under a larger epoch, and go on. Requests are
accepted from the first served layout on and outlive every recovery: the head has their tokens, so they are prefilled
again and their streams continue where they stopped.

    waiting_for_workers --enough joined--> loading --all loaded--> serving
             ^                               |  ^                     |
             |                        a worker is lost          a worker is lost
             +-------- recovering <----------+  +---- recovering <----+

While it serves, a `Reconfiguration` may take it from one layout to the next without leaving "serving".

What is never true: a result of an epoch that is neither the present one nor, in a transition, the next changes anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import WorkerName
from runtime.layout import Layout, Segment, layout_from_counts
from runtime.messages import (
    Audited,
    Copied,
    Heartbeat,
    HopTiming,
    Join,
    Leave,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Mirroring,
    Prepared,
    Retired,
    ShadowProgress,
    ShadowReady,
    StepFailed,
    StepResult,
    ToWorker,
    Traced,
    TransitionFailed,
    Unreachable,
)
from runtime.model.spec import ModelSpec
from scheduler.batching import Batcher, BatchingConfig
from scheduler.course import Change
from scheduler.events import (
    AbortChange,
    Cancel,
    ChangeLayout,
    Drain,
    Effect,
    Emit,
    Event,
    EvictWorker,
    FromWorker,
    Look,
    Looked,
    NotComing,
    PeerDown,
    Report,
    Resume,
    Send,
    SendStep,
    SetAutopilot,
    Submit,
    Tick,
    Wake,
)
from scheduler.lineup import Lineup
from scheduler.membership import Membership, weights_of
from scheduler.pilot import Pilot
from scheduler.planning.autopilot import Decision, Mode, Settings
from scheduler.planning.cost import Facts
from scheduler.planning.emulation import speed_of_worker
from scheduler.planning.forecast import Device
from scheduler.planning.planner import default_counts
from scheduler.planning.traffic import Serving
from scheduler.reconfiguration import Reconfiguration
from scheduler.request import AdmissionError, StageStats
from scheduler.transition import Refused
from scheduler.wishes import LayoutError, Wish, resolve

MOST_BETWEEN_TICKS_S = 3.0
"""Longer only when the head itself stood still: stopped, suspended, or starved of its core."""
PILOT_DEADLINE_S = 300.0
"""After which a change that the autopilot asked for is aborted, if nothing has flipped by then."""

# -- state ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What the operator asked for. `layers` fixes the split; `kv_bytes` 0 sizes the pools by the memory that is free."""

    spec: ModelSpec
    num_stages: int
    layers: tuple[int, ...] | None = None
    kv_bytes: int = 0
    memory_fraction: float = 0.5
    implementation: str = "auto"
    heartbeat_timeout_s: float = 15.0
    rejoin_timeout_s: float = 45.0
    autopilot: Mode = "off"
    piloting: Settings = field(default_factory=Settings)


Status: TypeAlias = Literal["waiting_for_workers", "loading", "serving", "recovering", "failed"]


@dataclass(slots=True)
class HopSums:
    steps: int = 0
    idle_us: int = 0
    queued_us: int = 0
    compute_us: int = 0
    sample_us: int = 0


@dataclass(slots=True)
class SchedulerState:
    """Everything the head knows. `step` is its only mutator."""

    cluster: ClusterConfig
    batching: BatchingConfig
    members: Membership = field(default_factory=Membership)
    status: Status = "waiting_for_workers"
    detail: str = ""
    draining: bool = False
    layout: Layout | None = None
    epoch: int = 0
    served_once: bool = False
    num_blocks: int = 0
    now_s: float = 0.0
    """Of the last event that had a time."""
    layouts: dict[int, Layout] = field(default_factory=dict)
    """By epoch: the one that serves and, while sequences flip, the next."""
    next_change: int = 1
    """The id of the next change of layout, the operator's or the autopilot's."""
    hop_sums: dict[int, list[HopSums]] = field(default_factory=dict)
    batcher: Batcher = field(init=False)
    pool: BlockPool = field(init=False)
    directory: Directory = field(init=False)
    reconfiguration: Reconfiguration = field(init=False)
    pilot: Pilot = field(init=False)
    lineup: Lineup = field(default_factory=Lineup)
    _last_epoch: int = 0
    _recovering_since_s: float = 0.0
    _not_coming_s: float = -math.inf
    """When it was said, while a layout served, that a worker will not come again."""
    _served: Layout | None = None
    """The last layout that served, or the one that it had begun to flip to, once a worker is lost: another over as many workers is to be
    like it."""
    _is_like_served: bool = False
    """Whether the layout that comes up is that one, with others in the place of the lost."""
    _ticked_s: float = math.inf
    _effects: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(0, self.batching.block_size)
        self.directory = Directory()
        self.batcher = Batcher(self.batching, self.pool, self.directory)
        self.reconfiguration = Reconfiguration(self)
        cluster = self.cluster
        self.pilot = Pilot(
            cluster.spec,
            self.batching,
            cluster.piloting,
            cluster.autopilot,
            cluster.kv_bytes,
            cluster.memory_fraction,
        )

    def step(self, event: Event) -> list[Effect]:
        """Apply one event; the effects are to be carried out in their order, steps first: the pipeline waits for them.

        Raises:
            AdmissionError: on `Submit`, when the request cannot be taken. Nothing has changed then.
            Refused: on `ChangeLayout`, when the change cannot be made. Nothing has changed then.
        """
        effects = self._effects = []
        if not isinstance(event, (Cancel, Drain)):
            self.now_s = event.now_s
        match event:
            case FromWorker():
                self._from_worker(event, effects)
            case Submit():
                self._submit(event)
            case Cancel():
                self.batcher.abort(event.sequence, event.reason)
                self.pilot.cancelled(event.sequence, is_end=event.reason == "stop", now_s=self.now_s)
            case PeerDown():
                self._lose(event.worker, event.reason, event.now_s, effects)
            case NotComing():
                if self.status == "serving":
                    self._not_coming_s = event.now_s  # its loss has yet to be noticed
                self._recovering_since_s = -math.inf
                self._try_load(event.now_s, effects)
            case Tick():
                self._tick(event.now_s, effects)
            case Wake():
                pass
            case Drain():
                self.draining = True
            case ChangeLayout():
                self._change_layout(event)
            case AbortChange():
                self.reconfiguration.cancel(event.change, "the operator aborted it")
            case Looked():
                self._looked(event, effects)
            case Resume():
                if event.worker in self.members.workers:
                    self.members.resume([event.worker])
                    effects.append(Report("info", f"worker {event.worker} may have layers again"))
            case SetAutopilot():
                self.pilot.autopilot.set_mode(event.now_s, event.mode)
            case _:
                assert_never(event)
        if self.status == "serving":
            self.reconfiguration.advance()
        return [*self._next_steps(), *effects]

    def check_integrity(self) -> None:
        self.batcher.check_integrity()
        if self.status == "serving":
            assert self.layout is not None, "serving without a layout"
            assert self.members.all_ready(self.layout.workers, self.epoch), "serving without all workers ready"

    def stage_stats(self) -> list[StageStats]:
        if self.layout is None:
            return []
        sums_of = self.hop_sums[self.layout.epoch]
        return [
            StageStats(
                segment.worker,
                hop,
                sums.steps,
                sums.idle_us / 1e6,
                sums.queued_us / 1e6,
                sums.compute_us / 1e6,
                sums.sample_us / 1e6,
            )
            for hop, (segment, sums) in enumerate(zip(self.layout.segments, sums_of, strict=True))
        ]

    # -- requests -----------------------------------------------------------------------------------------

    def _submit(self, event: Submit) -> None:
        if self.draining:
            raise AdmissionError("the server is shutting down", status=503, code="shutting_down")
        if not self.served_once:
            raise AdmissionError(f"the server is {self.status.replace('_', ' ')}", status=503, code="not_ready")
        if self.status == "failed":
            raise AdmissionError(f"the server has failed: {self.detail}", status=503, code="failed")
        try:
            self.batcher.submit(event.sequence, event.request, event.now_s)
        except AdmissionError as error:
            if error.status == 429:
                self.pilot.refused()
            raise
        self.pilot.submitted(event.sequence, len(event.request.prompt), event.request.max_tokens, event.now_s)

    # -- workers ------------------------------------------------------------------------------------------

    def _from_worker(self, event: FromWorker, effects: list[Effect]) -> None:
        message, now_s = event.message, event.now_s
        if isinstance(message, StepResult):
            self._step_result(message, now_s, effects)
            return
        if isinstance(message, Join):
            if message.replaces and message.replaces in self.members.workers:
                self._lose(message.replaces, "its restarted self joined", now_s, effects)
            self.members.join(message, now_s)
            self.pilot.joined(message)
            effects.append(Report("info", f"worker {message.name} joined: {message.device_name} on {message.host}"))
            self._try_load(now_s, effects)
            return
        worker = self.members.seen(message.worker, now_s)
        if worker is None:
            return  # it was lost and does not know yet
        match message:
            case Heartbeat():
                worker.rss, worker.pages_used = message.rss, message.pages_used
                worker.num_sequences = message.num_sequences
                if message.is_hung:
                    reason = f"it hangs, busy with one {message.busy_with} for {message.busy_s:.0f} s"
                    self._lose(message.worker, reason, now_s, effects)
            case LoadProgress():
                if message.epoch == worker.epoch:
                    worker.units_loaded, worker.units_total = message.units_loaded, message.units_total
                    worker.phase = message.phase
            case Loaded():
                if message.epoch == worker.epoch and worker.status == "loading":
                    worker.weight_bytes, worker.num_pages = message.weight_bytes, message.num_pages
                    worker.page_bytes, worker.room_bytes = message.page_bytes, message.room_bytes
                    worker.implementation = message.implementation
                    self.pilot.loaded(message.worker, message.profile)
                    worker.units_loaded = worker.units_total
                    worker.advance("loaded")
                    self._try_serve(now_s, effects)
            case LoadFailed():
                if message.epoch == worker.epoch and worker.status == "loading":
                    self._could_not_load(message.worker, message.error, now_s, effects)
            case StepFailed():
                self._lose(message.worker, f"step {message.ordinal} failed: {message.error}", now_s, effects)
            case Leave():
                self._lose(message.worker, f"it leaves: {message.reason}", now_s, effects)
            case Prepared() | ShadowProgress() | ShadowReady() | Mirroring() | Copied() | Retired():
                self.reconfiguration.said(message)
            case TransitionFailed():
                if not self.reconfiguration.failed(message.worker, message.transition, message.error):
                    self._lose(message.worker, f"its part of a transition failed: {message.error}", now_s, effects)
            case Unreachable():
                self._cut_off(message, now_s, effects)
            case Audited() | Traced():
                pass  # a reply, which the driver has taken
            case _:
                assert_never(message)

    def _cut_off(self, message: Unreachable, now_s: float, effects: list[Effect]) -> None:
        """One worker cannot reach another, for good, and both live: a worker that joins anew gets new connections.

        A transition that can be aborted is: the present layout may have no need of this connection. Then it is the end that does not
        serve that starts anew; if both do, neither.
        """
        worker, peer, layout = message.worker, message.peer, self.layout
        if peer not in self.members.workers:
            return
        error = f"{peer} cannot be reached: {message.error}"
        is_over = message.transition >= 0 and self.reconfiguration.failed(worker, message.transition, error)
        serving = layout.workers if is_over and layout is not None else ()
        if peer not in serving:
            self._lose(peer, f"{worker} cannot reach it: {message.error}", now_s, effects)
        elif worker not in serving:
            self._lose(worker, f"it cannot reach {peer}: {message.error}", now_s, effects)

    def _lose(self, name: WorkerName, reason: str, now_s: float, effects: list[Effect]) -> None:
        if self.members.lose(name) is None:
            effects.append(EvictWorker(name, reason))  # it may have been at the door
            return
        self.pilot.lost(name)
        effects.append(EvictWorker(name, reason))
        effects.append(Report("warning", f"worker {name} is lost: {reason}"))
        if self.status == "serving" and self.reconfiguration.lost(name):
            return
        if self.layout is None or self.status == "failed":
            return
        if self.status != "serving" and name not in self.layout.workers:
            return
        if self.status == "serving":
            self._served, self._is_like_served = self.reconfiguration.way_forward() or self.layout, True
            self.batcher.close_epoch()
            for epoch in self.directory.epochs:
                self.directory.close_epoch(epoch)
            self.layout = None
            self.reconfiguration.broken(f"worker {name} was lost ({reason})")
        self.status = "recovering"
        self.detail = f"worker {name} is lost ({reason})"
        is_coming = now_s - self._not_coming_s > self.cluster.heartbeat_timeout_s
        self._recovering_since_s, self._not_coming_s = now_s if is_coming else -math.inf, -math.inf
        self._load_another(now_s, effects)

    def _could_not_load(self, name: WorkerName, error: str, now_s: float, effects: list[Effect]) -> None:
        """At the start that is the end: the operator is there to see it. Later others are tried, as streams wait."""
        detail = f"worker {name} could not load: {error}"
        if not self.served_once:
            self.status, self.detail = "failed", detail
            effects.append(Report("error", detail))
            return
        assert self.layout is not None, "it loads one"
        effects.append(Report("warning", detail))
        if self._is_like_served:
            self._is_like_served = False  # they may have room for another split
        else:
            self.lineup.could_not_load(self.layout.workers, name, now_s)
        again = f"tries everything again every {self.cluster.rejoin_timeout_s:g} s"
        self.status, self.detail = "recovering", f"{detail}. Add a worker, or start it again with more memory; {again}"
        self._load_another(now_s, effects)

    def _load_another(self, now_s: float, effects: list[Effect]) -> None:
        """The layout is given up; the next one may be over other workers."""
        self.layout = None
        self.layouts.clear()
        self.hop_sums.clear()
        for worker in self.members.workers.values():
            worker.advance("free")
        self._try_load(now_s, effects)

    def _tick(self, now_s: float, effects: list[Effect]) -> None:
        stood_s = now_s - self._ticked_s - MOST_BETWEEN_TICKS_S
        if stood_s > 0.0:
            # The head itself stood still, and has yet to read most of what came meanwhile.
            self.members.seen_later(stood_s, now_s)
        self._ticked_s = now_s
        for name in self.members.silent(now_s, self.cluster.heartbeat_timeout_s):
            reason = f"no heartbeat for {self.cluster.heartbeat_timeout_s:g} s"
            self._lose(name, reason, now_s, effects)
        if self.status == "recovering" and self.layout is None:
            self._try_load(now_s, effects)
        self._ask_pilot(effects)
        if self.status == "serving" and (prices := self.pilot.prices(self)) is not None:
            self.batcher.prices = prices

    def _ask_pilot(self, effects: list[Effect]) -> None:
        """Let the autopilot look, and pass on what it says."""
        question = self.pilot.tick(self, is_serving=self.status == "serving" and not self.draining)
        if question is not None:
            effects.append(Look(question))
        self._pass_on(effects)

    def _looked(self, event: Looked, effects: list[Effect]) -> None:
        """Begin what the autopilot decides."""
        decision = self.pilot.heard(self, event.question, event.answer)
        if decision is not None:
            self._decided(decision)
        self._pass_on(effects)

    def _decided(self, decision: Decision) -> None:
        autopilot = self.pilot.autopilot
        serving = self.layout.workers if self.layout is not None else ()
        # one that serves though it was drained is needed
        drained = self.members.drained().intersection(decision.layout.workers).difference(serving)
        if drained:
            autopilot.failed(self.now_s, decision.layout, f"{min(drained)} was drained meanwhile")
        elif self.status == "serving" and not self.draining:
            rate = autopilot.settings.snapshot_bytes_per_s
            change = Change(self.next_change, decision.layout, "live", PILOT_DEADLINE_S, rate)
            try:
                self._change_layout(ChangeLayout(change, False, self.now_s))
                self.pilot.asked(change.id, decision.layout)
            except Refused as error:
                autopilot.failed(self.now_s, decision.layout, str(error))
        else:
            autopilot.failed(self.now_s, decision.layout, "the server no longer serves")

    def _pass_on(self, effects: list[Effect]) -> None:
        pilot = self.pilot
        said = pilot.autopilot.news()
        if pilot.autopilot.mode != "off":
            effects.extend(Report("info", f"autopilot: {entry.text}") for entry in said)

    # -- layouts ------------------------------------------------------------------------------------------

    def _try_load(self, now_s: float, effects: list[Effect]) -> None:
        """Pick a layout and have it loaded, when none is chosen yet and enough workers are there."""
        if self.layout is not None or self.status == "failed":
            return
        wanted, served = self.num_wanted, self._served.workers if self._served is not None else ()
        names, is_whole = self.lineup.choose(self.members, wanted, served)
        if not names and self.members.workers and now_s - self.lineup.failed_s > self.cluster.rejoin_timeout_s:
            self.lineup.forget()
            names, is_whole = self.lineup.choose(self.members, wanted, served)
        if not is_whole:
            waited_s = now_s - self._recovering_since_s
            if self.status != "recovering" or not names or waited_s < self.cluster.rejoin_timeout_s:
                return
        self.epoch = self.new_epoch()
        layout = self._layout_over(names)
        if not self.served_once and self.kv_bytes:
            shortage = self.members.shortage(self.kv_bytes, weights_of(layout, self.spec))
            if shortage:
                self.status, self.detail = "failed", shortage
                effects.append(Report("error", shortage))
                return
        self.layout = layout
        self.open_layout(layout)
        self.members.forget_rooms()
        if self.status == "waiting_for_workers":
            self.status = "loading"
        effects.append(Report("info", f"loading layout {self.layout.brief()} (epoch {self.epoch})"))
        for name in self.members.in_order():
            worker = self.members.workers[name]
            if name not in self.layout.workers:
                if self.status == "recovering":
                    self.send(name, self.load_message(self.layout, name))  # to drop what it may still hold
                continue
            worker.advance("load")
            worker.epoch = self.epoch
            worker.units_loaded, worker.units_total = 0, self._num_units(name)
            effects.append(Send(name, self.load_message(self.layout, name)))

    @property
    def num_wanted(self) -> int:
        """Workers of the layout that serves, or that is to come up."""
        layout = self.layout if self.layout is not None else self._served
        return len(layout.workers) if layout is not None else self.cluster.num_stages

    def _layout_over(self, names: Sequence[WorkerName]) -> Layout:
        """Like the one that served, if it had as many workers: who is still there has what it had, and who is new what a lost one had,
        its former self before others."""
        served = self._served
        if served is None or len(served.workers) != len(names) or not self._is_like_served:
            self._is_like_served = False
            return layout_from_counts(self.epoch, names, self._counts(names))
        first_self, new = self.members.first_self, [name for name in names if name not in served.workers]
        heirs = {name: name for name in served.workers if name in names}
        lost = [name for name in served.workers if name not in names]
        for is_own_self in (True, False):
            for name in [name for name in lost if name not in heirs]:
                fit = [heir for heir in new if first_self(heir) == first_self(name) or not is_own_self]
                if fit:
                    heirs[name] = fit[0]
                    new.remove(fit[0])
        segments = tuple(Segment(heirs[segment.worker], segment.layers) for segment in served.segments)
        return Layout(self.epoch, served.num_layers, segments)

    def _counts(self, names: Sequence[WorkerName]) -> tuple[int, ...]:
        if self.cluster.layers is not None and len(self.cluster.layers) == len(names):
            return self.cluster.layers
        return self.balanced(names)

    def balanced(self, names: Sequence[WorkerName]) -> tuple[int, ...]:
        """Layers per stage that keep these workers, in this order, equally busy under the usual traffic."""
        devices = []
        for name in names:
            info = self.members.workers[name].info
            devices.append(Device(name, speed_of_worker(self.cluster.spec, info)))
        serving = Serving(
            self.batching.max_step_tokens, self.batching.max_running, self.batching.num_microbatches or len(names)
        )
        return default_counts(Facts(self.cluster.spec), devices, serving)

    def _num_units(self, name: WorkerName) -> int:
        assert self.layout is not None
        ends = (self.layout.embedding_worker == name) + (self.layout.lm_head_worker == name)
        return len(self.layout.layers_of(name)) + ends

    def load_message(self, layout: Layout, worker: WorkerName) -> Load:
        cluster, spec = self.cluster, self.cluster.spec
        return Load(
            layout=layout,
            model=spec.folder,
            load_format=spec.load_format,
            dtype=spec.dtype,
            block_size=self.batching.block_size,
            kv_bytes=cluster.kv_bytes,
            memory_bytes=self.members.memory_for_pages(worker, weights_of(layout, spec), cluster.memory_fraction),
            max_context=spec.max_context,
            implementation=cluster.implementation,
            quantize=spec.quantize,
            room_bytes=self.members.workers[worker].room_bytes,
        )

    def _try_serve(self, now_s: float, effects: list[Effect]) -> None:
        layout = self.layout
        if layout is None or self.status not in ("loading", "recovering"):
            return
        if not self.members.all_ready(layout.workers, self.epoch):
            return
        self.num_blocks = min(self._blocks_of(name, layout) for name in layout.workers)
        if self.num_blocks < 1:
            smallest = min(layout.workers, key=lambda name: self._blocks_of(name, layout))
            error = f"its KV memory holds not even one block; {'raise' if self.cluster.kv_bytes else 'set'} --kv-memory"
            self._could_not_load(smallest, error, now_s, effects)
            return
        self.status, self.detail, self.served_once = "serving", "", True
        self.lineup.forget()
        self.directory.open_epoch(self.epoch, tuple((s.worker, s.layers) for s in layout.segments))
        outputs = self.batcher.open_epoch(self.epoch, self.num_blocks, self.cluster.spec.max_context)
        effects.extend(Emit(sequence, output) for sequence, output in outputs)
        self.pilot.outputs(outputs, self.now_s)
        tokens = self.num_blocks * self.batching.block_size
        effects.append(Report("info", f"serving layout {layout.brief()}, room for {tokens:,} KV tokens"))

    def _blocks_of(self, name: WorkerName, layout: Layout) -> int:
        """Blocks that fit into a worker's pages. One that holds no layer (only an end unit) limits nothing."""
        num_layers = len(layout.layers_of(name))
        return self.members.workers[name].num_pages // num_layers if num_layers else 1 << 40

    # -- changing it (what `Reconfiguration` calls) -------------------------------------------------------

    def _change_layout(self, event: ChangeLayout) -> None:
        change = event.change
        if self.status != "serving" or self.draining:
            raise Refused(
                f"the server is {'draining' if self.draining else self.status}; a layout changes while it serves"
            )
        if change.layout.num_layers != self.cluster.spec.num_layers:
            raise Refused(f"the layout has {change.layout.num_layers} layers, the model {self.cluster.spec.num_layers}")
        for name in change.layout.workers:
            if name not in self.members.workers:
                raise Refused(f"there is no worker {name}; there are {self.members.listed()}")
        self.reconfiguration.request(change, queue=event.queue)
        self.next_change = max(self.next_change, change.id + 1)

    def preview(self, wish: Wish) -> Layout:
        """What `wish` will mean if the changes that were asked for before are all committed.

        Raises:
            LayoutError: there are too few workers for it.
        """
        present = self.reconfiguration.last_wanted or self.layout
        assert present is not None, "a wish is looked at while a layout serves"
        return self._resolve(wish, present)

    def resolve(self, wish: Wish) -> Layout:
        """What `wish` means now that its turn has come. Raises `Refused` when there are too few workers for it."""
        assert self.layout is not None, "changes begin while a layout serves"
        try:
            return self._resolve(wish, self.layout)
        except LayoutError as error:
            raise Refused(str(error)) from None

    def _resolve(self, wish: Wish, present: Layout) -> Layout:
        return resolve(wish, present, self.members.in_order(), self.members.drained(), self.balanced)

    @property
    def spec(self) -> ModelSpec:
        return self.cluster.spec

    @property
    def kv_bytes(self) -> int:
        """What an operator said that each worker has for KV; 0: nothing."""
        return self.cluster.kv_bytes

    def new_epoch(self) -> int:
        self._last_epoch += 1
        return self._last_epoch

    def send(self, worker: WorkerName, message: ToWorker) -> None:
        self._effects.append(Send(worker, message))

    def note(self, text: str) -> None:
        self._effects.append(Report("info", text))

    def open_layout(self, layout: Layout) -> None:
        """Steps of this layout's epoch may be formed."""
        self.layouts[layout.epoch] = layout
        self.hop_sums[layout.epoch] = [HopSums() for _ in layout.segments]
        self._count_stages()
        if self.status == "serving":
            self.directory.open_epoch(layout.epoch, tuple((s.worker, s.layers) for s in layout.segments))

    def _count_stages(self) -> None:
        self.batcher.num_stages = max(len(layout.workers) for layout in self.layouts.values())

    def adopt_layout(self, layout: Layout) -> None:
        """Nothing runs in the present layout any more; this one takes its place."""
        assert self.layout is not None
        old = self.layout
        self.directory.close_epoch(old.epoch)
        del self.layouts[old.epoch], self.hop_sums[old.epoch]
        self._count_stages()
        self.layout, self.epoch = layout, layout.epoch
        for name in layout.workers:
            worker = self.members.workers[name]
            worker.advance("adopt")
            worker.epoch = layout.epoch
            worker.units_loaded = worker.units_total = self._num_units(name)
        for name in old.workers:
            if name not in layout.workers and name in self.members.workers:
                self.members.workers[name].advance("free")

    def set_capacity(self, num_blocks: int) -> None:
        self.pool.resize(num_blocks)
        self.num_blocks = num_blocks

    def set_limit(self, num_blocks: int, *, spares_running: bool = False) -> int:
        """How many requests have ended because they may need more."""
        outputs = self.batcher.set_limit(num_blocks, self.cluster.spec.max_context, spares_running=spares_running)
        self._effects.extend(Emit(sequence, output) for sequence, output in outputs)
        self.pilot.outputs(outputs, self.now_s)
        return len(outputs)

    def max_context_tokens(self) -> int:
        """Tokens that the largest accepted request may reach."""
        return self.batcher.longest_request()

    # -- steps --------------------------------------------------------------------------------------------

    def _next_steps(self) -> list[SendStep]:
        sends: list[SendStep] = []
        if self.status == "serving":
            while (plan := self.batcher.next_step(self.now_s)) is not None:
                sends.append(SendStep(self.layouts[plan.epoch].embedding_worker, plan))
                self.pilot.sent(plan, self.now_s)
        return sends

    def _step_result(self, result: StepResult, now_s: float, effects: list[Effect]) -> None:
        outputs = self.batcher.complete(result, now_s)
        effects += [Emit(sequence, output) for sequence, output in outputs]
        self.pilot.outputs(outputs, now_s)
        layout = self.layouts.get(result.epoch)
        if layout is not None:
            self.pilot.result(result, layout, self.reconfiguration.is_active)
        sums_of = self.hop_sums.get(result.epoch)
        if sums_of is not None and result.timings:
            for sums, timing in zip(sums_of, result.timings, strict=True):
                self._add_timing(sums, timing)
                self.members.seen(timing.worker, now_s)

    def _add_timing(self, sums: HopSums, timing: HopTiming) -> None:
        sums.steps += 1
        sums.idle_us += timing.idle_us
        sums.queued_us += timing.queued_us
        sums.compute_us += timing.compute_us
        sums.sample_us += timing.sample_us
