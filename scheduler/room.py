"""The KV that layouts have room for, and the hops from one to another that what runs can be kept through. Pure.

What workers hold is known by their pools (`scheduler.membership`) and by what weights leave; `scheduler.hops` finds the order.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Protocol

from kvstore.block_pool import BlockPool
from kvstore.ids import WorkerName
from runtime.layout import Layout, Move, moves_between
from runtime.model.spec import ModelSpec
from scheduler.batching import Batcher
from scheduler.blocks import GROWTH_BLOCKS
from scheduler.hops import NO_LIMIT, capacity, find_course, roomiest, split_evenly, split_into_hops
from scheduler.membership import Membership
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

    def max_context_tokens(self) -> int: ...


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
        """What runs must go on without preemption: its blocks, one more for each sequence, and a little air."""
        pool, batcher = self._head.pool, self._head.batcher
        return pool.num_used + batcher.num_running + 2

    def plan(self, old: Layout, new: Layout, needed: int, *, keeps_cache: bool) -> list[Layout]:
        """The hops from `old` to `new` with `needed` blocks in use, and as much room to grow as there is; with `keeps_cache` there are more, if that
        keeps much of what is cached. Raises `Refused` when there is no way."""
        head = self._head
        for name in new.workers:
            if name not in head.members.workers:
                raise Refused(f"there is no worker {name}; there are {', '.join(head.members.in_order())}")
        moves = moves_between(old, new)
        tokens, block_size = head.max_context_tokens(), head.pool.block_size
        if (holds := self.capacity(new, new)) * block_size < tokens:
            raise Refused(
                f"the new layout holds {holds * block_size} KV tokens, and a request that was accepted may need {tokens} (without "
                f"max_tokens it may need all there are); wait for it to end, give the layers to more workers, or raise --kv-memory"
            )
        wanted = needed + head.batcher.growth(GROWTH_BLOCKS)
        if keeps_cache and (hops := self._with_cache(old, new, moves, wanted)):
            return hops
        if self.capacity(old, new) < wanted:
            wanted = min(wanted, roomiest(old, new, moves, self._blocks_of))
        if wanted < needed or not (hops := split_into_hops(old, new, moves, self._blocks_of, wanted)):
            raise Refused(self._no_room(old, new, moves, needed))
        return hops

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

    def _no_room(self, old: Layout, new: Layout, moves: tuple[Move, ...], needed: int) -> str:
        """What is missing, where, and what would fit."""
        size = self._head.pool.block_size
        most = roomiest(old, new, moves, self._blocks_of)
        text = (
            f"no room: {needed} KV blocks ({needed * size} tokens) are in use or about to be, and this change can be made with "
            f"{most} at most ({most * size} tokens), even one layer at a time"
        )
        course = find_course(old, new, moves, self._blocks_of, needed)
        if course.blocked is not None:
            worker = self._head.members.workers[course.blocked]
            num_layers = max(len(course.reached.layers_of(course.blocked)) + 1, len(new.layers_of(course.blocked)))
            missing = (needed * num_layers - worker.num_pages) * worker.page_bytes
            text += f"; {course.blocked} has pages for {worker.num_pages // num_layers} blocks of {num_layers} layers"
            if not worker.room_bytes:
                text += f", {missing / 2**20:.1f} MiB of --kv-memory too few"
        if course.layers:
            text += f". This much of it fits: {_as_asked(course.reached)}"
        return f"{text}. Or wait for requests to end, or give fewer layers to a worker that has little memory"

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
