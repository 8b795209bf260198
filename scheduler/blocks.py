"""The blocks that sequences hold: taken from the pool, published to the prefix cache, given back. Pure.

Because the order of steps is the order of KV writes, a block may be published to the prefix cache when its tokens
are *scheduled*, and freed blocks may be handed on at once: whoever reads or overwrites them does so in a later step.

That holds within one epoch. While a change of layout is under way nothing orders the steps of its two epochs, and blocks are *guarded*:

- a cached block is a hit for the next epoch only when the step that wrote it has come back;
- blocks of a sequence that ends with a step in flight go to *limbo* until that step has come back.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListOf

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import BlockId, Epoch
from kvstore.prefix import PrefixHasher
from scheduler.lanes import Arrived, BatchingConfig, Lane
from scheduler.sequence import Sequence

GROWTH_BLOCKS = 8
"""Blocks by which each running sequence may grow during a change without being preempted: hops are made small enough for it, and
nobody is admitted to this room."""


class SequenceBlocks:
    """Who holds which blocks, between the pool that counts them and the directory that files them."""

    def __init__(
        self, config: BatchingConfig, pool: BlockPool, directory: Directory, lanes: Mapping[Epoch, Lane]
    ) -> None:
        self._config = config
        self._pool = pool
        self._directory = directory
        self._lanes = lanes
        self._hasher = PrefixHasher(config.block_size, config.cache_root)
        self._written_by: dict[BlockId, int] = {}
        self._limbo: list[tuple[Epoch, int, list[BlockId]]] = []
        self.is_guarded = False
        self.snapshot: Arrived | None = None
        """Of what was live at a moment of the change under way. Blocks that are handed out after it are no part of it: in a pool that is full
        of cached blocks they are the last ones that it would come to, and a sequence that has grown into one would wait for all of it."""

    # -- how many -----------------------------------------------------------------------------------------

    def num_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._config.block_size)

    def growth_of(self, sequence: Sequence, num_blocks: int, max_blocks: int) -> int:
        """Blocks beyond `num_blocks` that the sequence may still need, counting at most `max_blocks`."""
        end = self.num_for(sequence.most_tokens)
        return min(max(0, end - num_blocks), max_blocks)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the next token has room in the blocks that are there."""
        return sequence.num_scheduled < len(sequence.blocks) * self._config.block_size

    @property
    def has_limbo(self) -> bool:
        """Whether blocks wait for a step to come back."""
        return bool(self._limbo)

    def live(self, running: Iterable[Sequence]) -> tuple[list[BlockId], int]:
        """Blocks whose content matters: those of `running`, oldest sequence first, and how many these are; then
        the ones in limbo and the cached ones."""
        blocks = dict.fromkeys(block for sequence in sorted(running, key=lambda s: s.id) for block in sequence.blocks)
        num_running = len(blocks)
        for _, _, limbo in self._limbo:
            for block in limbo:
                blocks.setdefault(block)
        for block in reversed(self._pool.cached_blocks()):
            blocks.setdefault(block)
        return list(blocks), num_running

    # -- taken --------------------------------------------------------------------------------------------

    def cached(self, sequence: Sequence, arrived: Arrived | None = None, completed: int = -1) -> list[BlockId]:
        """The cached blocks that `sequence` may begin with. In the next epoch those that have `arrived` and that no step after
        `completed`, the last of the old epoch that is back, has written."""
        request = sequence.request
        if not (self._config.prefix_cache and request.use_prefix_cache) or request.prompt_logprobs >= 0:
            return []
        self._hasher.extend(sequence.digests, sequence.tokens)
        usable = (len(sequence.tokens) - 1) // self._config.block_size
        blocks = self._pool.lookup(sequence.digests[:usable])
        return blocks if arrived is None else blocks[: self._num_usable_next(blocks, arrived, completed)]

    def _num_usable_next(self, blocks: ListOf[BlockId], arrived: Arrived, completed: int) -> int:
        covered = arrived.num_covered(blocks)
        for index, block in enumerate(blocks[:covered]):
            if self._written_by.get(block, -1) > completed:
                return index
        return covered

    def num_left(self, hits: ListOf[BlockId], needed: int) -> int:
        """Blocks that would be free if `hits` were held again and `needed` more taken; negative when they cannot be had."""
        return self._pool.num_free_after_acquire(hits) - needed

    def take(self, sequence: Sequence, hits: ListOf[BlockId], needed: int, epoch: Epoch) -> None:
        """The sequence runs in `epoch` from now on, with the cached blocks `hits` and `needed` others."""
        self._pool.acquire(hits)
        sequence.blocks = [*hits, *self._allocate(needed)]
        sequence.num_published = len(hits)
        sequence.num_scheduled = len(hits) * self._config.block_size
        self._directory.add(sequence.id, epoch, sequence.blocks)

    def can_grow(self) -> bool:
        """Whether there is a block to be had."""
        return self._pool.can_allocate(1)

    def grow(self, sequence: Sequence) -> list[BlockId]:
        """One block more, which it returns."""
        blocks = self._allocate(1)
        self._directory.extend(sequence.id, blocks)
        return blocks

    def _allocate(self, count: int) -> list[BlockId]:
        blocks = self._pool.allocate(count)
        if self.snapshot is not None:
            self.snapshot.skip(blocks)
        return blocks

    def publish(self, sequence: Sequence, *, in_next: bool) -> None:
        """The blocks that are full now may be found by others. `in_next`: the step that filled them is of the next epoch."""
        full = min(sequence.num_scheduled, len(sequence.tokens)) // self._config.block_size
        if self._config.prefix_cache and sequence.request.use_prefix_cache:
            self._hasher.extend(sequence.digests, sequence.tokens)
            for index in range(sequence.num_published, full):
                self._pool.publish(sequence.blocks[index], sequence.digests[index])
        if self.is_guarded:
            for block in sequence.blocks[sequence.num_published : full]:
                if in_next:
                    self._written_by.pop(block, None)
                else:
                    self._written_by[block] = sequence.last_ordinal
        sequence.num_published = full

    # -- given back ---------------------------------------------------------------------------------------

    def give_back(self, sequence: Sequence) -> None:
        """It does not run any more."""
        if self.is_guarded and sequence.num_in_flight:
            self._limbo.append((sequence.epoch, sequence.last_ordinal, sequence.blocks))
        else:
            self._pool.release(sequence.blocks)
        self._directory.remove(sequence.id)
        sequence.blocks = []

    def empty_limbo(self) -> None:
        """Release the blocks whose last step has come back."""
        still = []
        for epoch, ordinal, blocks in self._limbo:
            lane = self._lanes.get(epoch)
            if lane is not None and lane.completed < ordinal:
                still.append((epoch, ordinal, blocks))
            else:
                self._pool.release(blocks)
        self._limbo = still

    def unguard(self) -> None:
        """No change is under way any more. What is in limbo stays there until its step is back."""
        self.is_guarded = False
        self.forget_writers()

    def forget_writers(self) -> None:
        """All steps of the old epoch are back; nothing is copied any more."""
        self._written_by.clear()
        self.snapshot = None

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Every block in use is used by someone."""
        held = {b for s in running for b in s.blocks} | {b for _, _, blocks in self._limbo for b in blocks}
        assert len(held) == self._pool.num_used, f"{self._pool.num_used} blocks in use, sequences hold {len(held)}"
        self._pool.check_integrity()
        self._directory.check_integrity()
