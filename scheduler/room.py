"""The KV that layouts have room for, and the hops from one to another that what runs can be kept through. Pure.

What workers hold is known by their pools (`scheduler.membership`) and by what weights leave; `scheduler.hops` finds the order.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from kvstore.block_pool import BlockPool
from kvstore.ids import WorkerName
from runtime.layout import Layout, Move, moves_between
from runtime.model.spec import ModelSpec
from scheduler.batching import Batcher
from scheduler.blocks import GROWTH_BLOCKS
from scheduler.hops import NO_LIMIT, capacity, find_course, roomiest, split_evenly, split_into_hops
from scheduler.membership import Membership, weights_of
from scheduler.transition import Refused

MAX_HOPS_FOR_CACHE = 4
"""A change goes in more hops than it must, up to so many, when cached blocks would be lost otherwise: each hop is a flip for every stream."""
MAX_STATES_FOR_CACHE = 200
"""How far an order is looked for that keeps more."""


class Head(Protocol):
    """What counts."""

    members: Membership
    batcher: Batcher
    pool: BlockPool

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def kv_bytes(self) -> int: ...

    def max_context_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Share:
    """What a worker would have to hold of the model."""

    worker: WorkerName
    layers: tuple[int, ...]
    embedding: bool
    lm_head: bool


class KvRoom:
    """Of the workers that `head` has, at the moment of the question."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def capacity(self, a: Layout, b: Layout) -> int:
        """Blocks that every worker's pages hold when it has the layers of both layouts."""
        return capacity(self._blocks_of, a, b)

    def least(self, layouts: Sequence[Layout]) -> int:
        """Blocks that every worker's pages hold on the whole way from the first of `layouts` to the last."""
        return min(self.capacity(a, b) for a, b in pairwise(layouts))

    def blocks_needed(self) -> int:
        """What runs must go on without preemption: its blocks, one more for each sequence, and a little air. No more than there are: where all are
        in use sequences wait for each other's end as it is, and a layout with more room is what they need."""
        pool, batcher = self._head.pool, self._head.batcher
        return min(pool.num_used + batcher.num_running + 2, max(pool.num_used, pool.target))

    def plan(
        self, old: Layout, new: Layout, needed: int, *, keeps_cache: bool, ends_first: bool = False
    ) -> list[Layout]:
        """The hops from `old` to `new` with `needed` blocks in use, and as much room to grow as there is; with `keeps_cache` there are more, if that
        keeps much of what is cached. With `ends_first` what runs need not fit. Raises `Refused` when there is no way."""
        head = self._head
        for name in new.workers:
            if name not in head.members.workers:
                raise Refused(f"there is no worker {name}; there are {head.members.listed()}")
        kv_bytes = head.kv_bytes
        if kv_bytes and (shortage := head.members.shortage(kv_bytes, weights_of(new, head.spec), old.workers)):
            raise Refused(shortage)
        moves = moves_between(old, new)
        tokens, block_size = self._most_tokens(ends_first=ends_first), head.pool.block_size
        if self.capacity(new, new) * block_size < tokens:
            raise Refused(self._too_small(old, new, needed, tokens))
        if not self.capacity(new, new):
            raise Refused(self._no_room(old, new, moves, max(1, needed), tokens))  # also when nothing runs there yet
        wanted = needed if ends_first else needed + head.batcher.growth(GROWTH_BLOCKS)
        if keeps_cache and (hops := self._with_cache(old, new, moves, wanted)):
            return hops
        if self.capacity(old, new) < wanted:
            wanted = min(wanted, roomiest(old, new, moves, self._blocks_of))
        if wanted < needed or not (hops := split_into_hops(old, new, moves, self._blocks_of, wanted)):
            raise Refused(self._no_room(old, new, moves, needed, tokens))
        return hops

    def _most_tokens(self, *, ends_first: bool) -> int:
        """What a request may need that goes on in the new layout."""
        return self._head.batcher.longest_waiting() if ends_first else self._head.max_context_tokens()

    def _with_cache(self, old: Layout, new: Layout, moves: tuple[Move, ...], wanted: int) -> list[Layout]:
        """The fewest hops, few altogether, through which what is cached lasts beside `wanted` blocks; else those that keep more of it, if
        it is a twentieth for each more. Empty when even `wanted` needs more hops."""
        everything = wanted + self._head.pool.num_cached
        if self.capacity(old, new) >= everything:
            return [new]
        if min(self.capacity(old, old), self.capacity(new, new)) < wanted:
            return []
        orders = {
            course.layers
            for blocks in {everything, (wanted + everything) // 2, wanted}  # what has room for more goes another way
            if (course := find_course(old, new, moves, self._blocks_of, blocks, MAX_STATES_FOR_CACHE)).blocked is None
        }
        worth = max(1, everything // 20)
        best: tuple[int, list[Layout]] = (wanted - worth, [])
        for count in range(1, MAX_HOPS_FOR_CACHE + 1):
            for order in sorted(orders):
                hops = split_evenly(old, new, order, min(count, len(order)))
                holds = min(self.least([old, *hops]), everything)
                if holds >= wanted and holds >= best[0] + worth:
                    best = holds, hops
        return best[1]

    def _too_small(self, old: Layout, new: Layout, needed: int, tokens: int) -> str:
        """Why a request of so many `tokens` cannot go on in `new`: where it lacks how much, and what would fit."""
        size = self._head.pool.block_size
        num_blocks = -(-tokens // size)
        shares = [self._share(name, new.layers_of(name), new) for name in new.workers if new.layers_of(name)]
        tightest = min(shares, key=self._blocks_beside)
        text = (
            f"the new layout holds {self.capacity(new, new) * size} KV tokens, and a request that was accepted may need {tokens} "
            f"(without max_tokens it may need all there are); {self._lack(tightest, num_blocks)}"
        )
        if self._most_tokens(ends_first=True) <= self.capacity(new, new) * size:
            text += ". With --strategy drain it ends first"
        return text + self._way_out(old, new, max(needed, num_blocks), tokens, tightest.worker)

    def _no_room(self, old: Layout, new: Layout, moves: tuple[Move, ...], needed: int, tokens: int) -> str:
        """What is missing, where, and what would fit."""
        size = self._head.pool.block_size
        most = roomiest(old, new, moves, self._blocks_of)
        text = (
            f"no room: {needed} KV blocks ({needed * size} tokens) are in use or about to be, and this change can be made with "
            f"{most} at most ({most * size} tokens), even one layer at a time"
        )
        course = find_course(old, new, moves, self._blocks_of, needed)
        if course.blocked is not None:
            here, there = course.reached.owners(), new.owners()
            arriving = next(i for i, name in enumerate(there) if name == course.blocked != here[i])
            held = tuple(sorted((*course.reached.layers_of(course.blocked), arriving)))
            shares = [self._share(course.blocked, held, course.reached)]
            if layers := new.layers_of(course.blocked):
                shares.append(self._share(course.blocked, layers, new))
            text += f"; {self._lack(max(shares, key=lambda share: self._missing_bytes(share, needed)), needed)}"
        return text + self._way_out(old, new, needed, tokens, course.blocked)

    def _share(self, worker: WorkerName, layers: Collection[int], layout: Layout) -> _Share:
        """These layers, with the ends that are there in `layout` or come with a layer that is not."""
        held, gained = tuple(layers), set(layers) - set(layout.layers_of(worker))
        embedding = worker == layout.embedding_worker or 0 in gained
        return _Share(worker, held, embedding, worker == layout.lm_head_worker or layout.num_layers - 1 in gained)

    def _lack(self, share: _Share, needed: int) -> str:
        worker, missing = self._head.members.workers[share.worker], self._missing_bytes(share, needed)
        beside = " beside their weights" * bool(worker.room_bytes)
        memory = " of --kv-memory" * bool(self._head.kv_bytes)
        text = f"{share.worker} has pages for {self._blocks_beside(share)} blocks of {len(share.layers)} layers{beside}"
        return f"{text}, {math.ceil(missing / 2**20 * 10) / 10:.1f} MiB{memory} too few"

    def _missing_bytes(self, share: _Share, needed: int) -> int:
        """What `needed` blocks of this share take beyond what its worker has."""
        worker = self._head.members.workers[share.worker]
        pages = needed * len(share.layers) * worker.page_bytes
        if not worker.room_bytes:
            return pages - worker.num_pages * worker.page_bytes
        return pages + self._weights(share) - worker.room_bytes

    def _way_out(self, old: Layout, new: Layout, needed: int, tokens: int, tight: WorkerName | None) -> str:
        """What would fit of the change, and what else an operator can do."""
        part = self._part(old, new, needed, tokens)
        text = f". This much of it fits: {_as_asked(part)}. Or wait" if part is not None else ". Wait"
        memory = "raise --kv-memory" if self._head.kv_bytes else "give it more memory"
        return (
            f"{text} for requests to end, give fewer layers to {tight or 'a worker'}, take in more workers, or {memory}"
        )

    def _part(self, old: Layout, new: Layout, needed: int, tokens: int) -> Layout | None:
        """As far as single layers can go on the way to `new` with `needed` blocks in use, where a request of `tokens` goes on."""
        num_blocks = -(-tokens // self._head.pool.block_size)
        for wanted in dict.fromkeys((needed, max(needed, num_blocks))):
            part = find_course(old, new, moves_between(old, new), self._blocks_of, wanted).reached
            if part.segments in (old.segments, new.segments) or self.capacity(part, part) < num_blocks:
                continue
            if split_into_hops(old, part, moves_between(old, part), self._blocks_of, needed):
                return part
        return None

    def _blocks_beside(self, share: _Share) -> int:
        return self._blocks_of(share.worker, share.layers, embedding=share.embedding, lm_head=share.lm_head)

    def _weights(self, share: _Share) -> int:
        return self._head.spec.weight_bytes(share.layers, embedding=share.embedding, lm_head=share.lm_head)

    def _blocks_of(self, worker: WorkerName, layers: Collection[int], *, embedding: bool, lm_head: bool) -> int:
        """As `scheduler.hops.Room`. A pool of unknown size limits nothing."""
        pool = self._head.members.workers.get(worker)
        if pool is None or not pool.num_pages:
            return NO_LIMIT
        num_pages = pool.num_pages
        if pool.room_bytes:  # they are what the weights leave
            weights = self._head.spec.weight_bytes(layers, embedding=embedding, lm_head=lm_head)
            num_pages = max(0, pool.room_bytes - weights) // pool.page_bytes
        return num_pages // len(layers)


def _as_asked(layout: Layout) -> str:
    """A layout as `midflight layout` takes it."""
    return ",".join(f"{s.worker}:{s.layers.start}-{s.layers.stop}" for s in layout.segments)
