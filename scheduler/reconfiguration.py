"""From one layout to another while it serves: the protocol's head side. Pure.

On the wire a transition is known by the epoch it leads to; towards the operator, by the id of the change, which may take
several of them.

`Reconfiguration` owns at most one change at a time and a short queue of later ones. A change is one transition, or, when
its KV does not fit beside what stays, several in a row (hops). It is told what the workers answer, and after every
event it is asked to `advance`: each phase looks whether what it waits for is there (`scheduler.transition`).

The strategies share all of it and differ in three places: what happens before `prepare` (`stop-copy` holds all steps,
`drain` waits for running requests to end), whether KV is copied at all (`live` and `stop-copy`), and what happens to
sequences at the flip (`recompute` preempts them).
"""

import math
from collections import deque
from dataclasses import replace
from typing import Protocol

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import Epoch, WorkerName
from runtime.layout import Layout, moves_between
from runtime.messages import (
    Cancel,
    Copy,
    Load,
    Open,
    Prepare,
    Retire,
    StartMirror,
    ToWorker,
)
from runtime.model.spec import ModelSpec
from scheduler.batching import Batcher
from scheduler.course import Change, Course, ToTransition, Transition
from scheduler.lanes import Opening
from scheduler.membership import Membership
from scheduler.room import KvRoom
from scheduler.transition import ABORTABLE, Refused, Report, Snapshot, describe
from scheduler.wishes import Drained, Wish

MAX_QUEUED = 16
MAX_REPORTS = 64
LATER_HOP_S = 600.0
"""The least that a hop may take that is not the first: a deadline is for what has flipped nothing yet, but nothing may hang for ever."""
MAX_RETRIES = 2
"""How often the rest of a change is planned anew after something of it has flipped and a hop then failed."""
ASK_AGAIN = "a layout over the workers that are left comes up; ask again when the server serves"


class Head(Protocol):
    """What a transition needs of the rest of the head."""

    members: Membership
    batcher: Batcher
    pool: BlockPool
    directory: Directory
    layout: Layout | None
    now_s: float

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def kv_bytes(self) -> int: ...

    def new_epoch(self) -> Epoch: ...

    def resolve(self, wish: Wish) -> Layout: ...

    def load_message(self, layout: Layout, worker: WorkerName) -> Load: ...

    def send(self, worker: WorkerName, message: ToWorker) -> None: ...

    def note(self, text: str) -> None: ...

    def open_layout(self, layout: Layout) -> None: ...

    def adopt_layout(self, layout: Layout) -> None: ...

    def set_capacity(self, num_blocks: int) -> None: ...

    def set_limit(self, num_blocks: int, *, spares_running: bool = False) -> int: ...

    def max_context_tokens(self) -> int: ...


class Reconfiguration:
    """The changes of layout: the one under way, those that wait, and the reports of the last ones."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._room = KvRoom(head)
        self._now: Transition | None = None
        self._queue: deque[Change] = deque()
        self.reports: dict[int, Report] = {}
        self.num_outcomes: dict[str, int] = {}
        self.num_aborts_asked = 0
        """Aborts by an operator that came in time."""

    @property
    def is_active(self) -> bool:
        """Whether a change is under way, or about to begin."""
        return self._now is not None or bool(self._queue)

    @property
    def target(self) -> Layout | None:
        return self._now.new if self._now is not None else None

    def is_aborting(self, change: int) -> bool:
        """Whether this change is on its way back."""
        now = self._now
        return now is not None and now.change.id == change and (now.phase == "abort" or bool(now.course.turned_back))

    @property
    def last_wanted(self) -> Layout | None:
        """Where the changes that were asked for lead, if all are committed; None when there is none."""
        if self._queue:
            return self._queue[-1].layout
        return self._now.change.layout if self._now is not None else None

    def view(self) -> dict[str, object] | None:
        """The transition under way, for ``GET /admin/layout``."""
        now = self._now
        if now is None:
            return None
        is_flipping = now.phase == "flip"
        num_left = len(self._head.directory.sequences_in(now.old.epoch)) if is_flipping else None
        return now.view(self._head.now_s, num_left)

    # -- asking ---------------------------------------------------------------------------------------------

    def request(self, change: Change, *, queue: bool) -> None:
        """Begin a change, or queue it behind the one under way.

        Raises:
            Refused: another is under way and `queue` is false, the queue is full, or it has no room.
        """
        if self.is_active:
            if not queue:
                raise Refused(
                    f'{self._what_is_on()} or let this one wait behind it: --queue, or "queue": true in the body'
                )
            if len(self._queue) >= MAX_QUEUED:
                raise Refused(f"{MAX_QUEUED} changes are queued already, the most that are kept")
            self._queue.append(change)
            self._keep(Report(change.id, change.strategy, [], describe(change.layout), -1, -1, outcome="queued"))
            return
        self._begin(change)

    def _what_is_on(self) -> str:
        now = self._now
        if now is None:
            return f"transition {self._queue[0].id} is about to begin; wait for it,"
        abort = f" abort it with DELETE /admin/transitions/{now.change.id}," * now.can_be_aborted
        return f"transition {now.change.id} is under way ({now.phase}); wait for it,{abort}"

    def cancel(self, transition: int, why: str) -> bool:
        """Abort a change, or take it out of the queue; False when it is too late: what flips now is the last of it.

        Nothing happens to one that is being aborted already, but that it is not begun anew, or goes back. One of several hops stays where the hops
        that were made have led; one that flips, where the present hop leads.
        """
        for change in self._queue:
            if change.id == transition:
                self._queue.remove(change)
                self._end_report(self.reports[transition], "aborted", why)
                self.num_aborts_asked += 1
                return True
        now = self._now
        if now is None or now.change.id != transition:
            return False
        if now.course.turned_back:
            return True
        if now.phase == "abort" and now.course.hop == 1:
            if now.again:
                now.again, now.why = False, why
                self.num_aborts_asked += 1
            return True
        if now.phase != "abort" and not now.can_be_aborted:
            return False
        now.course.given_up = now.course.given_up or why
        if now.phase in ABORTABLE:
            self._abort(now, why)
        self.num_aborts_asked += 1
        return True

    # -- what the workers say -------------------------------------------------------------------------------

    def said(self, message: ToTransition) -> None:
        """What a worker says of the transition under way; nothing, when it is of another."""
        now = self._current(message.transition)
        if now is not None:
            now.said(message, self._head.members.workers.get(message.worker))

    def failed(self, worker: WorkerName, transition: int, error: str) -> bool:
        """A worker could not do its part: abort, if nothing has flipped. False when it is too late for that."""
        now = self._current(transition)
        if now is not None and now.phase in ABORTABLE:
            self._abort(now, f"{worker}: {error}")
        return now is None or now.phase not in ("flip", "retire")

    def lost(self, name: WorkerName) -> bool:
        """A worker is gone. True when the old layout goes on without it; False when the pipeline is broken."""
        now = self._now
        if now is None:
            return self._head.layout is None or name not in self._head.layout.workers
        course = now.course
        if any(name in layout.workers for layout in course.later):
            course.stopped = f"worker {name} was lost"
        if name not in now.workers:
            if course.stopped and now.can_leave_no_trace:
                self._abort(now, f"worker {name}, which it would need later, was lost before anything had flipped")
            return True
        serves = name in now.old.workers or now.phase == "flip"
        if now.phase == "retire":
            serves = name in now.new.workers
        if serves:
            return False
        now.awaiting.discard(name)
        now.workers = tuple(worker for worker in now.workers if worker != name)
        if now.phase in ABORTABLE:
            self._abort(now, f"worker {name} was lost" + " before anything had flipped" * (course.hop == 1))
        return True

    def way_forward(self) -> Layout | None:
        """Once something has flipped, where the change leads, if all workers that it takes are there: nobody need wait for a lost one that it
        leaves."""
        now = self._now
        if now is None or (now.course.hop == 1 and now.phase != "flip"):
            return None
        target = now.course.target
        return target if all(name in self._head.members.workers for name in target.workers) else None

    def broken(self, why: str) -> None:
        """The pipeline is being rebuilt from nothing, and no layout serves; whatever was under way is over."""
        now, self._now = self._now, None
        if now is not None:
            for worker in now.workers:
                if worker in self._head.members.workers:
                    self._head.send(worker, Cancel(now.new.epoch))
            now.leave(self._head.now_s)
            now.report.sequences_flipped += now.opening.num_flipped if now.phase == "flip" and now.opening else 0
            self._sum_up(now.course)
            self._end_report(now.report, "aborted", f"{why}; {ASK_AGAIN}")
        while self._queue:
            queued = self.reports[self._queue.popleft().id]
            self._end_report(queued, "aborted", f"{why} before its turn had come; {ASK_AGAIN}")

    # -- going on -------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Go as far as what has happened allows."""
        self._begin_queued()
        while self._now is not None:
            while self._now is not None and self._advance_once(self._now):
                pass
            if self._now is not None or self._head.batcher.num_waiting:
                return  # who waited for the end of a change goes before the next one
            self._begin_queued()

    def _begin_queued(self) -> None:
        while self._now is None and self._queue:
            change = self._queue.popleft()
            try:
                self._begin(change)
            except Refused as error:
                self._end_report(self.reports[change.id], "refused", str(error))

    def _advance_once(self, now: Transition) -> bool:
        """One phase further? Each branch is the condition under which its phase ends."""
        head = self._head
        limit_s = now.change.deadline_s if now.course.hop == 1 else max(now.change.deadline_s, LATER_HOP_S)
        if now.phase in ABORTABLE and head.now_s - now.began_s > limit_s:
            now.course.given_up = f"its deadline of {limit_s:g} s has passed in phase {now.phase}"
            self._abort(now, now.course.given_up)
            return True
        match now.phase:
            case "reserve":
                if self._must_wait(now):
                    return False
                self._prepare(now)
            case "prepare":
                if now.awaiting:
                    return False
                if self._has_room(now):
                    now.enter("shadow", head.now_s)
            case "shadow":
                if now.not_warm:
                    return False
                self._start_mirror(now)
            case "copy":
                if now.awaiting:
                    return False
                snapshot = now.snapshot or self._copy(now)
                if snapshot.num_arrived < now.num_needed:
                    head.batcher.flip_due_s = head.now_s + now.flips_within_s(head.now_s)
                    return False
                if self._has_unguarded_steps(now):
                    return False
                self._flip(now)
            case "flip":
                assert now.snapshot is not None
                if not (head.batcher.is_vacated() and now.snapshot.is_complete):
                    return False  # cached blocks that nobody uses right now are copied to the last one too
                self._retire(now)
            case "retire":
                if now.awaiting:
                    return False
                self._finish_hop(now)
            case "abort":
                if now.awaiting:
                    return False
                self._finish_abort(now)
            case "done":
                return False
        return True

    def _begin(self, change: Change, before: Course | None = None) -> None:
        """`before` is a first try, which found less room than was thought."""
        head = self._head
        old = head.layout
        assert old is not None, "the state asks only while it serves"
        if change.wish is not None:
            change = replace(change, layout=head.resolve(change.wish))
        if change.layout.segments == old.segments:
            self._end_at_once(change, old)
            return
        hops = self._plan(change, old, change.layout, self._room.blocks_needed())
        report = Report(
            id=change.id,
            strategy=change.strategy,
            source=describe(old),
            target=describe(change.layout),
            source_epoch=old.epoch,
            target_epoch=-1,
            num_hops=len(hops),
            layers_moved=sum(len(move.layers) for move in moves_between(old, change.layout)),
            sequences_at_start=head.batcher.num_running,
        )
        if before is not None:
            report.phases_s, report.cached_blocks_dropped = before.report.phases_s, before.report.cached_blocks_dropped
        self._keep(report)
        head.batcher.guard(change.id)
        course = Course(change, report, head.now_s if before is None else before.began_s, old, deque(hops))
        report.dropped_requests += head.set_limit(self._limit(course), spares_running=change.strategy == "drain")
        self._start_hop(course, old)
        head.note(f"transition {change.id} begins: {old.brief()} -> {change.layout.brief()} ({change.strategy})")

    def _plan(
        self, change: Change, old: Layout, new: Layout, num_used: int, *, keeps_cache: bool = True
    ) -> list[Layout]:
        """The hops from `old` to `new` with so many blocks in use. With `drain` what runs ends before: only what waits goes on there."""
        keeps_cache = keeps_cache and change.strategy == "live"
        ends_first = change.strategy == "drain"
        return self._room.plan(old, new, 0 if ends_first else num_used, keeps_cache=keeps_cache, ends_first=ends_first)

    def _end_at_once(self, change: Change, present: Layout) -> None:
        """It is as it was to be: committed, with no epoch of its own."""
        shown, epoch = describe(present), present.epoch
        running = self._head.batcher.num_running
        self._keep(Report(change.id, change.strategy, shown, shown, epoch, epoch, sequences_at_start=running))
        self._end_report(self.reports[change.id], "committed", "the layout was this one already")
        self._mark(change)
        self._head.note(f"transition {change.id} committed: the layout is {present.brief()} already")

    def _mark(self, change: Change) -> None:
        """What an operator drained stays so, until a layout that was asked for names it."""
        match change.wish:
            case Drained(worker):
                self._head.members.drain(worker)
            case Layout():
                self._head.members.resume(change.wish.workers)

    def _start_hop(self, course: Course, old: Layout) -> None:
        head, change = self._head, course.change
        layout = course.later.popleft()
        course.hop += 1
        new = Layout(head.new_epoch(), layout.num_layers, layout.segments)
        course.report.target_epoch = new.epoch
        workers = tuple(dict.fromkeys((*old.workers, *new.workers)))
        self._now = now = Transition(
            course=course,
            old=old,
            new=new,
            moves=moves_between(old, new),
            phase="reserve",
            entered_s=head.now_s,
            workers=workers,
            began_s=course.began_s if course.hop == 1 else head.now_s,
        )
        for name in workers:
            now.weights_before[name] = head.members.workers[name].weight_bytes
        if change.strategy == "drain":
            head.batcher.admits = False
        else:
            self._shrink(now)
        now.fly_through = head.batcher.last_ordinal(old.epoch)

    def _go_on(self, course: Course, why: str) -> None:
        """Plan the rest of a change anew from where it is; when there is no way any more, it is over."""
        head, report = self._head, course.report
        assert head.layout is not None, "it has been reached"
        try:
            if course.num_retries >= MAX_RETRIES:
                raise Refused(f"tried again {MAX_RETRIES} times")
            hops = self._plan(course.change, head.layout, course.target, head.pool.num_used)
        except Refused as error:
            self._stay(course, f"{why}; {error}")
            return
        course.later, course.stopped = deque(hops), ""
        course.num_retries += 1
        report.num_hops = course.hop + len(course.later)
        head.note(f"transition {report.id} goes on from {head.layout.brief()}: {why}")
        self._start_hop(course, head.layout)

    def _stay(self, course: Course, why: str) -> None:
        """It ends where the hops that were made have led; back where it began, if what runs may need more than there is here."""
        head, layout = self._head, self._head.layout
        assert layout is not None, "it has been reached"
        holds, needs = self._room.capacity(layout, layout) * head.pool.block_size, head.max_context_tokens()
        if holds < needs and not course.turned_back:
            try:
                hops = self._plan(course.change, layout, course.first, head.pool.num_used, keeps_cache=False)
            except Refused:
                pass  # there is no way to keep that request
            else:
                course.turned_back = (
                    f"{why}. {layout.brief()} holds {holds} KV tokens and a running request may need {needs}"
                )
                course.given_up = course.stopped = ""
                course.later = deque(hops)
                course.report.num_hops = course.hop + len(hops)
                head.note(f"transition {course.report.id} goes back: {course.turned_back}")
                self._start_hop(course, layout)
                return
        self._end_course(course, "aborted", f"{why}. It stays as {layout.brief()}, part of the way")

    def _end_course(self, course: Course, outcome: str, why: str) -> None:
        """The change is over, and this is its report."""
        head, report = self._head, course.report
        assert head.layout is not None, "there is always one, but for a pipeline that is broken"
        self._sum_up(course)
        self._let_go(head.layout, report)
        self._end_report(report, outcome, why)
        if outcome == "committed":
            self._mark(course.change)
        after = f" after {report.total_s:.3f} s" if outcome == "committed" else ""
        what = head.layout.brief() if outcome == "committed" else why
        head.note(f"transition {report.id} {outcome}{after}: {what}")

    def _sum_up(self, course: Course) -> None:
        """What the report says of all hops together, however it ends."""
        head, report, pauses = self._head, course.report, course.pauses
        report.recomputed_tokens = head.batcher.recomputed_for_change()
        report.add_pauses(pauses.pauses_us, pauses.excesses_us, pauses.ordinary_us)
        report.total_s = head.now_s - course.began_s

    def _let_go(self, layout: Layout, report: Report) -> None:
        """No change is under way any more: pool and limits are what `layout` holds."""
        head, num_blocks = self._head, self._room.capacity(layout, layout)
        self._now = None
        head.set_capacity(num_blocks)
        self._set_limit(num_blocks, report)
        head.batcher.is_squeezed = False
        head.batcher.unguard()

    def _set_limit(self, num_blocks: int, report: Report) -> None:
        report.dropped_requests += self._head.set_limit(num_blocks)

    def _limit(self, course: Course) -> int:
        """Blocks that one request may need while the change is under way: those that the old layout and the new one hold, whichever it
        will be, though the pool may be smaller on the way."""
        old, new = course.first, course.change.layout
        return min(self._room.capacity(old, old), self._room.capacity(new, new))

    def _shrink(self, now: Transition) -> None:
        """The pool as large as fits on all of the way that is left, so that no later hop has to wait for room; ids that retire are free,
        and given back by `prepare`."""
        head, course = self._head, now.course
        num_blocks, before = self._room.least([now.old, now.new, *course.later]), head.pool.num_cached
        head.set_capacity(num_blocks)
        course.report.cached_blocks_dropped += max(0, before - head.pool.num_cached)
        head.batcher.is_squeezed = num_blocks < self._room.capacity(course.first, course.first)

    def _forget_cached(self, now: Transition) -> None:
        now.report.cached_blocks_dropped += self._head.pool.num_cached
        self._head.pool.forget_cached()

    def _must_wait(self, now: Transition) -> bool:
        """Whether the room is not there yet, or what holds it is not settled."""
        batcher, pool = self._head.batcher, self._head.pool
        if now.change.strategy == "drain":
            return not batcher.is_drained()
        if pool.num_blocks > pool.target:
            return True
        if now.change.strategy == "stop-copy" and not batcher.is_held:
            batcher.is_held, now.fly_through = True, batcher.last_ordinal(now.old.epoch)
        return bool(pool.retired() or batcher.is_held) and self._has_unguarded_steps(now)

    def _has_unguarded_steps(self, now: Transition) -> bool:
        """Whether steps are in flight that were formed before blocks went to limbo: they may still write to blocks that are
        anybody's by now, or retired."""
        return self._head.batcher.completed(now.old.epoch) < now.fly_through

    def _prepare(self, now: Transition) -> None:
        head = self._head
        if now.change.strategy == "drain":
            self._forget_cached(now)
            self._shrink(now)
        now.enter("prepare", head.now_s)
        now.awaiting, now.not_warm = set(now.workers), set(now.workers)
        retired = head.pool.retired()
        ends = (now.old.embedding_worker, now.old.lm_head_worker)
        for name in now.workers:
            load = head.load_message(now.new, name)
            prepare = Prepare(now.new.epoch, now.old.epoch, load, now.moves, retired, now.copies, ends)
            head.send(name, prepare)

    def _has_room(self, now: Transition) -> bool:
        """Now that the size of every pool is known: is there room? If not, begin again, knowing it."""
        head = self._head
        for message in now.prepared:
            worker = head.members.workers[message.worker]
            worker.num_pages, worker.page_bytes = message.num_pages, message.page_bytes
            worker.room_bytes = message.room_bytes
        limit = self._limit(now.course)
        accepted = head.max_context_tokens() <= limit * head.pool.block_size
        if accepted and head.pool.num_blocks <= self._room.capacity(now.old, now.new):
            self._set_limit(limit, now.report)
            return True
        now.again = True
        self._abort(now, "the pool of a worker that joins is smaller than was thought")
        return False

    def _start_mirror(self, now: Transition) -> None:
        now.enter("copy", self._head.now_s)
        now.awaiting = {move.source for move in now.moves} if now.copies else set()
        for name in sorted(now.awaiting):
            self._head.send(name, StartMirror(now.new.epoch))

    def _copy(self, now: Transition) -> Snapshot:
        """All mirrors are on. What is live now, and was written before, is copied: running sequences first."""
        head = self._head
        blocks, num_running = head.batcher.live_blocks() if now.copies else ([], 0)
        now.num_needed = len(blocks) if now.change.strategy == "stop-copy" else num_running
        now.snapshot = Snapshot(blocks, len(now.moves) if now.copies else 0)
        now.report.blocks_copied += len(blocks) if now.moves else 0
        head.batcher.copied_by(now.snapshot)
        if blocks:
            for name, rate in now.rates():
                head.send(name, Copy(now.new.epoch, blocks, rate, now.num_needed, now.change.is_bound))
        return now.snapshot

    def _flip(self, now: Transition) -> None:
        head, batcher = self._head, self._head.batcher
        now.enter("flip", head.now_s)
        assert now.snapshot is not None
        now.opening = Opening(now.new.epoch, now.snapshot, len(now.new.workers))
        starts = [now.starts.get(index, 0) for index in range(len(now.moves))]
        for name in now.workers:
            head.send(name, Open(now.new.epoch, starts))
        head.open_layout(now.new)
        if now.change.strategy == "recompute":
            batcher.is_squeezed = True
            batcher.preempt_all()
            self._forget_cached(now)
        batcher.open_next(now.opening)
        batcher.is_held, batcher.admits = False, True

    def _retire(self, now: Transition) -> None:
        head = self._head
        now.enter("retire", head.now_s)
        assert now.opening is not None
        now.report.sequences_flipped += now.opening.num_flipped
        now.opening = None
        through = head.batcher.last_ordinal(now.old.epoch)
        head.batcher.retire_old()
        head.adopt_layout(now.new)
        now.awaiting = set(now.workers)
        for name in now.workers:
            head.send(name, Retire(now.new.epoch, through))

    def _finish_hop(self, now: Transition) -> None:
        head, course = self._head, now.course
        course.report.paced_s += now.load_s + now.copy_s
        if not course.later:
            now.enter("done", head.now_s)
            if course.turned_back:
                self._end_course(course, "aborted", f"{course.turned_back}. It is back at {now.new.brief()}")
            else:
                self._end_course(course, "committed", "")
        elif course.given_up:
            now.enter("done", head.now_s)
            self._stay(course, course.given_up)
        elif course.stopped:
            now.enter("done", head.now_s)
            self._go_on(course, course.stopped)
        else:
            now.enter("reserve", head.now_s)
            self._start_hop(course, now.new)

    def _abort(self, now: Transition, why: str) -> None:
        head = self._head
        before = now.phase
        now.enter("abort", head.now_s)
        now.why = why
        head.batcher.is_held, head.batcher.admits, head.batcher.flip_due_s = False, True, math.inf
        now.awaiting = set(now.workers) if before != "reserve" else set()
        for name in sorted(now.awaiting):
            head.send(name, Cancel(now.new.epoch))

    def _finish_abort(self, now: Transition) -> None:
        head, course = self._head, now.course
        now.enter("done", head.now_s)
        if course.hop > 1:
            course.hop -= 1  # those that were made
            if course.given_up:
                self._stay(course, course.given_up)
            else:
                self._go_on(course, now.why)
        elif now.again:
            self._sum_up(course)
            self._let_go(now.old, now.report)
            try:
                self._begin(now.change, course)
            except Refused as error:
                self._end_report(now.report, "refused", str(error))
        else:
            self._end_course(course, "aborted", now.why)

    # -- reports --------------------------------------------------------------------------------------------

    def _current(self, transition: int) -> Transition | None:
        now = self._now
        return now if now is not None and now.new.epoch == transition else None

    def _keep(self, report: Report) -> None:
        self.reports[report.id] = report
        ended = [change for change, kept in self.reports.items() if kept.outcome not in ("running", "queued")]
        for change in ended[: max(0, len(self.reports) - MAX_REPORTS)]:
            del self.reports[change]

    def _end_report(self, report: Report, outcome: str, why: str) -> None:
        layout = self._head.layout
        report.outcome, report.why, report.reached = outcome, why, describe(layout) if layout is not None else []
        self.num_outcomes[outcome] = self.num_outcomes.get(outcome, 0) + 1
