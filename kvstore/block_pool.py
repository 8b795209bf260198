"""The head's pool of global block ids: references, prefix hashes and least-recently-used eviction.

A block is in exactly one of three states. *Free*: nobody refers to it and its content means nothing. *Used*: one
or more sequences refer to it. *Cached*: nobody refers to it, but its content can still be found by its digest, so
it waits in an LRU queue until a lookup revives it or an allocation evicts it. Free blocks are handed out first,
then the oldest cached ones.

The pool owns a *universe* of exactly `num_blocks` ids. A worker that has been told the universe therefore never needs
more pages per layer than `num_blocks`, even if it never gives a page back by itself. The capacity is a count: after
a shrink the ids that remain are those that were in use, plus the lowest others, and they need not be dense. Growing
takes back the ids that were retired last before it makes new ones: ids stay small and tables indexed by them short, and a shrink
that is called off leaves the universe as it was, so that workers that were not told of it need not be.

Never true: a block with a digest that the index does not map back to it; a digest on a free block; an
unreferenced block while a shrink is still owed blocks; an id used outside the universe.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.ids import BlockId

_RETIRED = -1


class BlockPool:
    """Hands out `num_blocks` block ids of `block_size` token positions each. Every operation is O(1) per block.

    Raises:
        ValueError: when `num_blocks` is negative or `block_size` is not positive.
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 0:
            raise ValueError(f"a block pool cannot hold {num_blocks} blocks; the least is 0")
        if block_size < 1:
            raise ValueError(f"a block cannot hold {block_size} positions; the least is 1")
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._target = num_blocks
        self._references: list[int] = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, BlockId] = {}
        self._free: list[BlockId] = list(range(num_blocks - 1, -1, -1))
        self._lru: OrderedDict[BlockId, None] = OrderedDict()
        self._retired: list[BlockId] = []

    @property
    def num_blocks(self) -> int:
        """How many blocks may be used and cached at once; above `target` while a shrink waits for references."""
        return self._num_blocks

    @property
    def target(self) -> int:
        """The capacity last asked for; `num_blocks` comes down to it as blocks are released."""
        return self._target

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated now, the unreferenced cached ones included."""
        return len(self._free) + len(self._lru)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks that a lookup can still find."""
        return len(self._lru)

    @property
    def num_used(self) -> int:
        return self._num_blocks - self.num_free

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free) + len(self._lru)

    def allocate(self, count: int) -> list[BlockId]:
        """`count` blocks with one reference each; ask `can_allocate` first. Evicts the oldest cached blocks if it must."""
        assert count >= 0, f"asked for {count} blocks"
        assert self.can_allocate(count), f"asked for {count} blocks, {self.num_free} are free"
        free = self._free
        while len(free) < count:
            self._evict_oldest()
        blocks = [free.pop() for _ in range(count)]
        references = self._references
        for block in blocks:
            references[block] = 1
        return blocks

    def lookup(self, digests: Sequence[bytes]) -> list[BlockId]:
        """The blocks of the longest known prefix of `digests`. Takes no reference: acquire before anything else."""
        found = []
        index = self._index
        for digest in digests:
            block = index.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_after_acquire(self, blocks: Sequence[BlockId]) -> int:
        """How many blocks could still be allocated once these (distinct) blocks were acquired."""
        references = self._references
        return self.num_free - sum(1 for block in blocks if references[block] == 0)

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        """One more reference to each block, which must be used or cached."""
        references, lru = self._references, self._lru
        for block in blocks:
            if references[block] == 0:
                assert block in lru, f"block {block} is free and cannot be acquired"
                del lru[block]
            assert references[block] >= 0, f"block {block} is retired and cannot be acquired"
            references[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One reference less to each of a sequence's blocks, given in the sequence's order.

        The last block is put aside first, so that the tail of a sequence is evicted before its head: a prefix can
        only be found from its start.
        """
        references, digests = self._references, self._digests
        for block in reversed(blocks):
            count = references[block]
            assert count > 0, f"block {block} is released but nobody refers to it"
            references[block] = count - 1
            if count > 1:
                continue
            if self._num_blocks > self._target:
                self._retire(block)
            elif digests[block] is not None:
                self._lru[block] = None
            else:
                self._free.append(block)

    def publish(self, block: BlockId, digest: bytes) -> None:
        """From now on `lookup` finds the content of this (used, full) block under `digest`.

        When another block is already known by the digest, that one stays and this one remains private.
        """
        assert self._references[block] > 0, f"block {block} is published but nobody refers to it"
        known = self._digests[block]
        assert known is None or known == digest, f"block {block} is published under a second digest"
        if digest not in self._index:
            self._index[digest] = block
            self._digests[block] = digest

    def resize(self, num_blocks: int) -> bool:
        """Grow, or shrink by giving up free blocks, then the oldest cached ones; used blocks are never touched.

        Returns True when the capacity is `num_blocks` now. Otherwise nothing can be allocated until releases have
        paid what is missing: each block released to zero references retires at once, and `num_blocks` follows.

        Raises:
            ValueError: when `num_blocks` is negative.
        """
        if num_blocks < 0:
            raise ValueError(f"a block pool cannot hold {num_blocks} blocks; the least is 0")
        self._target = num_blocks
        if num_blocks < self._num_blocks:
            self._free.sort(reverse=True)
            excess = min(self._num_blocks - num_blocks, self.num_free)
            while len(self._free) < excess:
                self._evict_oldest()
            doomed, self._free = self._free[:excess], self._free[excess:]
            for block in doomed:
                self._retire(block)
        while self._num_blocks < num_blocks:
            self._enlist()
        return self._num_blocks == num_blocks

    def forget_cached(self) -> None:
        """Drop every digest: the contents can no longer be trusted (after a crash). Used blocks stay used."""
        for block in self._index.values():
            self._digests[block] = None
        self._index.clear()
        self._free.extend(self._lru)
        self._lru.clear()

    def digest_of(self, block: BlockId) -> bytes | None:
        """The digest by which the block can be found, if any."""
        return self._digests[block]

    def references_of(self, block: BlockId) -> int:
        return max(0, self._references[block])

    def cached_blocks(self) -> list[BlockId]:
        """The unreferenced blocks with a known content, oldest first: they travel with a transition."""
        return list(self._lru)

    def used_blocks(self) -> list[BlockId]:
        """The referenced blocks, ascending. O(num ids)."""
        return [block for block, count in enumerate(self._references) if count > 0]

    def retired(self) -> list[BlockId]:
        """Ids that a shrink took away, ascending: nobody may read or write them, their pages can go."""
        return sorted(self._retired)

    def universe(self) -> list[BlockId]:
        """Every id that the pool may hand out, ascending: what a worker has to keep pages for. O(num ids)."""
        return [block for block, count in enumerate(self._references) if count != _RETIRED]

    def check_integrity(self) -> None:
        """Audit everything. O(num ids).

        Raises:
            AssertionError: with the story of what is wrong.
        """
        free, retired = set(self._free), set(self._retired)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert len(retired) == len(self._retired), "a block is retired twice"
        for block, count in enumerate(self._references):
            digest = self._digests[block]
            assert count >= _RETIRED, f"block {block} has {count} references"
            assert (count == _RETIRED) == (block in retired), f"block {block} is retired in one book only"
            assert not (block in free and block in self._lru), f"block {block} is both free and cached"
            assert (count == 0) == (block in free or block in self._lru), (
                f"block {block} has {count} references and is {'on' if block in free else 'not on'} the free list, "
                f"{'in' if block in self._lru else 'not in'} the LRU"
            )
            if block in self._lru:
                assert digest is not None, f"block {block} is cached without a digest"
            if digest is not None:
                assert count >= 0, f"block {block} is retired but has a digest"
                assert block not in free, f"block {block} is free but has a digest"
                assert self._index.get(digest) == block, f"the index maps the digest of block {block} elsewhere"
        num_digests = sum(1 for digest in self._digests if digest is not None)
        assert num_digests == len(self._index), (
            f"{num_digests} blocks have a digest, the index knows {len(self._index)}"
        )
        num_live = len(self._references) - len(retired)
        assert num_live == self._num_blocks, f"the universe has {num_live} ids, the capacity is {self._num_blocks}"
        if self._num_blocks != self._target:
            assert self._num_blocks > self._target, "the pool is smaller than it was asked to be"
            assert self.num_free == 0, f"a shrink is owed blocks while {self.num_free} are unreferenced"

    def _evict_oldest(self) -> None:
        block, _ = self._lru.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None
        del self._index[digest]
        self._digests[block] = None
        self._free.append(block)

    def _retire(self, block: BlockId) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._index[digest]
            self._digests[block] = None
        self._references[block] = _RETIRED
        self._retired.append(block)
        self._num_blocks -= 1

    def _enlist(self) -> None:
        if self._retired:
            block = self._retired.pop()
            self._references[block] = 0
        else:
            block = len(self._references)
            self._references.append(0)
            self._digests.append(None)
        self._free.append(block)
        self._num_blocks += 1
