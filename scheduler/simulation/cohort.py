"""Sequences that decode in the same step, again and again: who they are, and what they have come to. Pure.

The steps of a cohort are numbered from 1. Of `sent` steps `back` have come back, and ``sent - back`` is 1, or 2 while one of them was
formed ahead. A member that joined in step j has, once those before j are back, ``base + back`` tokens.
"""

from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

from kvstore.ids import Epoch
from runtime.messages import AHEAD, Row
from scheduler.planning.cost import Work, work_of_rows
from scheduler.sequence import Sequence


@dataclass(slots=True, eq=False)
class Member:
    """A sequence in a cohort. `joined` is its first step there, `last` the one that samples its last token."""

    sequence: Sequence
    base: int
    joined: int
    last: int


class Cohort(Sequence):
    """Decoding rows that go out together; in a step that is being formed it stands for all of them."""

    __slots__ = (
        "_by_last",
        "_by_phase",
        "back",
        "back_s",
        "is_dissolved",
        "members",
        "num_joined",
        "ordinal",
        "sent",
        "sum_base",
    )

    def __init__(self, epoch: Epoch, like: Sequence, block_size: int) -> None:
        super().__init__(-1, like.request, [], epoch=epoch)
        self.members: list[Member] = []
        """In the order of their rows."""
        self.sent = self.back = 0
        self.back_s = 0.0
        """When the last of them came back."""
        self.ordinal = -1
        """Of the step sent last."""
        self.num_joined = 0
        """Those members that joined in it."""
        self.sum_base = 0
        self.is_dissolved = False
        self._by_last: dict[int, list[Member]] = {}
        self._by_phase: list[list[Member]] = [[] for _ in range(block_size)]

    def context(self) -> int:
        """Tokens of all members together."""
        return self.sum_base + self.back * len(self.members)

    def add(self, first: ListOf[Sequence], last: ListOf[Sequence]) -> None:
        """Let sequences in whose rows are in the step that was just sent, before those of the members and after them."""
        self.members = [*self._made(first), *self.members, *self._made(last)]

    def _made(self, sequences: ListOf[Sequence]) -> list[Member]:
        made = []
        for sequence in sequences:
            start = len(sequence.tokens) + sequence.num_in_flight - 1  # tokens when the steps before this one are back
            base = start - self.sent + 1
            member = Member(sequence, base, self.sent, self.sent + sequence.most_tokens - start - 1)
            self.sum_base += base
            self._by_last.setdefault(member.last, []).append(member)
            self._by_phase[(2 - base) % len(self._by_phase)].append(member)
            made.append(member)
        return made

    def work(self, others: ListOf[Row]) -> Work:
        """Of the step that was just sent: the members' rows and these."""
        count = len(self.members)
        context = self.sum_base + count * (self.sent - 1)
        if not others:
            return Work(count, context / count, 0, 0.0, count)
        rest = work_of_rows((row.start, len(row.tokens), row.sample) for row in others)
        context += round(rest.decode_rows * rest.decode_context)
        count_all = count + rest.decode_rows
        return Work(count_all, context / count_all, rest.prefill_tokens, rest.prefill_context, count + rest.samples)

    def ending(self) -> list[Member]:
        """Members that have no row in the next step: the one sent last samples their last token."""
        return self._by_last.get(self.sent, [])

    def growing(self) -> list[Member]:
        """Members that need a block for their row in the next step."""
        return self._by_phase[(self.sent + 1) % len(self._by_phase)]

    def drop(self, members: Iterable[Member]) -> None:
        gone = set(members)
        self.members = [member for member in self.members if member not in gone]
        for member in gone:
            self.sum_base -= member.base
            self._by_last[member.last].remove(member)
            if not self._by_last[member.last]:
                del self._by_last[member.last]
            self._by_phase[(2 - member.base) % len(self._by_phase)].remove(member)


@dataclass(frozen=True, slots=True)
class Unlisted:
    """A step in flight whose rows are not all listed: those of `members` are not, of which it is the step `number`."""

    rows: list[Row]
    members: list[Member]
    number: int

    def list_all(self) -> None:
        self.rows[:0] = [Row(m.sequence.id, m.base + self.number - 2, [AHEAD], [], True) for m in self.members]
