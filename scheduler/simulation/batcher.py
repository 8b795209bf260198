"""The batcher of a simulated head: sequences that decode in the same step, again and again, are advanced together. Pure.

Every decision is `Batcher`'s. But in a simulation tokens are all alike, and of a decoding row nothing is decided except whether it still
has a place in its microbatch, room in its blocks, and a token to come after this one. So rows that go out again, ahead of what they
read, form a *cohort*: it is asked once whether all of it goes on, by the sum of what its rows cost, and its sequences are as they
were when they joined it, plus a number of steps. A sequence leaves its cohort, and is brought up to date, when it ends or its row is one too
many for the microbatch; all do when the cohort is not sent out ahead again, and when anything is to happen that is not plain
decoding: a change of layout, a preemption, a change of the limit, an audit.

Tokens of a cohort are handed out when their sequence leaves it, and when `catch_up` is called: as one output of so many tokens.

Never true: a sequence in two cohorts; a cohort while a change is guarded; a step with two cohorts.
"""

from collections.abc import Sequence as ListOf

from msgspec.structs import replace

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import SequenceId
from runtime.messages import Row, StepPlan, StepResult
from scheduler.batching import Batcher, Output
from scheduler.lanes import BatchingConfig, Flight, StepBuilder
from scheduler.planning.cost import Work, work_of_rows
from scheduler.request import FinishReason, Request, TokenOutput
from scheduler.sequence import Sequence
from scheduler.simulation.cohort import Cohort, Member, Unlisted

MIN_MEMBERS = 3
"""Fewer rows are decided faster one by one."""
_TOKEN = 0


class CohortBatcher(Batcher):
    """A batcher of requests whose tokens mean nothing: all 0, none of them ends a request, no log-probabilities, no prefix cache."""

    def __init__(self, config: BatchingConfig, pool: BlockPool, directory: Directory) -> None:
        super().__init__(config, pool, directory)
        self._aboard: dict[int, Cohort] = {}
        """By the ordinal of a step in flight."""
        self._unlisted: dict[int, Unlisted] = {}
        self._works: dict[int, Work] = {}
        self.lists_rows = True
        """Whether anybody reads the rows of the next step. Those of a cohort are listed then, and when it is dissolved."""
        self._held: list[Output] = []
        self._taken: Cohort | None = None
        """In the step that is being formed."""

    def catch_up(self) -> list[tuple[float, list[Output]]]:
        """The tokens that have come and were not handed out yet, and when the last of them did, in the head's seconds."""
        groups = [(self._rhythm.last_s, self._take_held())]
        for cohort in dict.fromkeys(self._aboard.values()):
            for member in cohort.members:
                self._hand_out(cohort, member)
            groups.append((cohort.back_s, self._take_held()))
        return groups

    def take_work(self, plan: StepPlan) -> Work:
        """The work of a step that was just formed; to be asked once."""
        work = self._works.pop(plan.ordinal, None)
        if work is not None:
            return work
        return work_of_rows((row.start, len(row.tokens), row.sample) for row in plan.rows)

    def submit(self, sequence_id: SequenceId, request: Request, now_s: float) -> None:
        assert not request.use_prefix_cache, "what a cohort writes is not published"
        assert not request.stop_token_ids, "a cohort samples nothing that ends a request"
        assert request.prompt_logprobs < 0, "a cohort knows no log-probabilities"
        super().submit(sequence_id, request, now_s)

    # -- what is not plain decoding -------------------------------------------------------------------------

    def guard(self, change: int) -> None:
        self._dissolve_all()
        super().guard(change)

    def close_epoch(self) -> None:
        self._dissolve_all()
        super().close_epoch()

    def set_limit(self, num_blocks: int, max_context: int, *, spares_running: bool = False) -> list[Output]:
        self._dissolve_all()
        ended = super().set_limit(num_blocks, max_context, spares_running=spares_running)
        if not ended or not self._held:
            return ended
        held = dict(self._held)  # of a sequence that was in a cohort, all at once
        self._held = [entry for entry in self._held if entry[0] not in dict(ended)]
        return [(i, replace(o, tokens=held[i].tokens + o.tokens) if i in held else o) for i, o in ended]

    def preempt_all(self) -> None:
        self._dissolve_all()
        super().preempt_all()

    def abort(self, sequence_id: SequenceId, reason: FinishReason) -> None:
        self._dissolve_all()
        super().abort(sequence_id, reason)

    def live_sequences(self) -> list[SequenceId]:
        self._dissolve_all()
        return super().live_sequences()

    def check_integrity(self) -> None:
        self._dissolve_all()
        super().check_integrity()

    def _reserve(self, sequence: Sequence, step: StepBuilder) -> bool:
        if not self._blocks.can_grow():
            self._dissolve_all()  # somebody is preempted
        return super()._reserve(sequence, step)

    # -- forming a step -------------------------------------------------------------------------------------

    def _about_to_be_ready(self) -> ListOf[Sequence]:
        found = super()._about_to_be_ready()
        if not self._aboard:
            return found
        lane = self._lanes[self._epoch]
        cohort = self._aboard.get(lane.oldest)
        if cohort is None or cohort.ordinal != lane.oldest or not lane.in_flight[lane.oldest].is_followed:
            return found
        return [cohort, *found]

    def _take_ahead(self, step: StepBuilder, ahead: ListOf[Sequence], share: float, cost: float) -> float:
        cohort = ahead[0] if ahead else None
        if not isinstance(cohort, Cohort):
            return super()._take_ahead(step, ahead, share, cost)
        others = ahead[1:]
        if not self._pool.can_allocate(len(cohort.growing())):
            self._dissolve_all()
        if cohort.is_dissolved:
            going = (m.sequence for m in cohort.members)
            ahead = [*(s for s in going if s.running and not s.num_remaining and s.goes_on), *others]
            return super()._take_ahead(step, ahead, share, cost)
        cost, is_whole = self._take_cohort(step, cohort, share, cost)
        return super()._take_ahead(step, others, share, cost) if is_whole else cost

    def _take_cohort(self, step: StepBuilder, cohort: Cohort, share: float, cost: float) -> tuple[float, bool]:
        """What is taken costs then, and whether all who go on were taken."""
        ending = cohort.ending()
        count = len(cohort.members) - len(ending)
        if not count:
            return cost, True
        context = cohort.context() - sum(member.base + cohort.back for member in ending)
        prices, going = self.prices, cohort.members
        if ending:
            going = [member for member in going if member not in ending]
        last = going[-1].base + cohort.back
        before, row_s = cost + prices.decode_s(count - 1, context - last), prices.decode_s(1, last)
        is_whole = count <= step.budget and before < share and not (before and before + row_s / 2 > share)
        if not is_whole:
            count, context = self._num_with_a_place(step, cohort, going, share, cost)
            if not count:
                return cost, False
        self._leave(cohort, [*going[count:], *ending] if ending else going[count:])
        for member in cohort.growing():
            self._blocks.grow(member.sequence)
        step.add(cohort, count, cohort.epoch)
        step.is_ahead, self._taken = True, cohort
        return cost + prices.decode_s(count, context), is_whole

    def _num_with_a_place(
        self, step: StepBuilder, cohort: Cohort, going: ListOf[Member], share: float, cost: float
    ) -> tuple[int, int]:
        """How many of these rows are taken before one is too many, and their context: what `Batcher._take_ahead` asks of each."""
        count = context = 0
        prices = self.prices
        for member in going:
            tokens, before = member.base + cohort.back, cost + prices.decode_s(count, context)
            if before >= share or (before and before + prices.decode_s(1, tokens) / 2 > share) or count >= step.budget:
                break
            count, context = count + 1, context + tokens
        return count, context

    def _rows(self, step: StepBuilder, ordinal: int, flight: Flight) -> list[Row]:
        cohort, self._taken = self._taken, None
        num_first = 0
        if cohort is not None:
            num_first = next(place for place, sequence in enumerate(step.rows) if sequence is cohort)
            flight.num_samples += step.rows.pop(cohort)
        elif self._opening is not None or self._blocks.is_guarded or not self._looks_ahead:
            return super()._rows(step, ordinal, flight)
        decoding = [sequence for sequence in step.rows if not sequence.prefilling]
        if cohort is None:
            if len(decoding) < MIN_MEMBERS:
                return super()._rows(step, ordinal, flight)
            cohort = Cohort(decoding[0].epoch, decoding[0], self._config.block_size)
        rows = super()._rows(step, ordinal, flight) if step.rows else []
        cohort.sent, cohort.ordinal, cohort.num_joined = cohort.sent + 1, ordinal, len(decoding)
        if decoding:
            del flight.members[: len(decoding)], rows[: len(decoding)]
            cohort.add(decoding[:num_first], decoding[num_first:])
        self._aboard[ordinal] = cohort
        self._works[ordinal] = cohort.work(rows)
        unlisted = Unlisted(rows, cohort.members, cohort.sent)
        if self.lists_rows:
            unlisted.list_all()
        else:
            self._unlisted[ordinal] = unlisted
        return rows

    # -- results --------------------------------------------------------------------------------------------

    def _apply(self, result: StepResult, flight: Flight, outputs: list[Output]) -> None:
        cohort = self._aboard.pop(result.ordinal, None)
        self._unlisted.pop(result.ordinal, None)
        if cohort is not None and cohort.ordinal == result.ordinal:
            flight.members[:0] = self._dissolve(cohort, result.ordinal)
        elif cohort is not None:
            count = len(cohort.members) - cohort.num_joined
            cohort.back, cohort.back_s = cohort.back + 1, self._rhythm.last_s
            self._decoding_context += count
            self.counters.generated_tokens += count
            flight.num_samples -= count
            del result.tokens[:count]
        if self._held:
            outputs += self._take_held()
        super()._apply(result, flight, outputs)

    def _hand_out(self, cohort: Cohort, member: Member) -> None:
        """Bring its tokens up to date."""
        if cohort.back < member.joined:
            return
        sequence = member.sequence
        count = member.base + cohort.back - len(sequence.tokens)
        if count > 0:
            tokens = [_TOKEN] * count
            sequence.tokens += tokens
            self._held.append((sequence.id, TokenOutput(tokens)))

    def _take_held(self) -> list[Output]:
        held, self._held = self._held, []
        return held

    # -- leaving --------------------------------------------------------------------------------------------

    def _leave(self, cohort: Cohort, members: ListOf[Member]) -> None:
        """These are not in the next step, though in the one sent last."""
        if not members:
            return
        flight = self._lanes[cohort.epoch].in_flight[cohort.ordinal]
        for member in members:
            self._bring_up(cohort, member)
        flight.members[:0] = [(m.sequence, m.sequence.attempt, "token") for m in members]
        cohort.drop(members)

    def _bring_up(self, cohort: Cohort, member: Member) -> None:
        """The sequence is as if it had gone alone."""
        self._hand_out(cohort, member)
        sequence = member.sequence
        sequence.num_scheduled = member.base + cohort.sent - 1
        sequence.num_in_flight += cohort.sent - member.joined - max(0, cohort.back - member.joined + 1)
        sequence.last_ordinal = cohort.ordinal
        full = min(sequence.num_scheduled, len(sequence.tokens)) // self._config.block_size
        sequence.num_published = max(sequence.num_published, full)

    def _dissolve(self, cohort: Cohort, ordinal: int) -> list[tuple[Sequence, int, str]]:
        """Let all go alone; those that are in the step `ordinal`, as it has its members."""
        for member in () if cohort.is_dissolved else cohort.members:
            self._bring_up(cohort, member)
        cohort.is_dissolved = True
        number = cohort.sent if ordinal == cohort.ordinal else cohort.sent - 1
        return [(m.sequence, m.sequence.attempt, "token") for m in cohort.members if m.joined <= number]

    def _dissolve_all(self) -> None:
        for ordinal, cohort in self._aboard.items():
            flight = self._lanes[cohort.epoch].in_flight[ordinal]
            flight.members[:0] = self._dissolve(cohort, ordinal)
        self._aboard.clear()
        for unlisted in self._unlisted.values():
            unlisted.list_all()
        self._unlisted.clear()
