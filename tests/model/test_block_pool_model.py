"""The block pool against a dumb model: lists, scans and no cleverness."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.block_pool import BlockPool

CHAINS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


def digests_of(chain: list[str]) -> list[bytes]:
    """Digests as a prefix hash would give them: equal when all that comes before is equal."""
    return ["".join(chain[: end + 1]).encode() for end in range(len(chain))]


class BlockPoolMachine(RuleBasedStateMachine):
    """Sequences come (sharing the prefixes they find), publish, fork and go; the pool is resized under them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 16)
        self.capacity = self.target = 6
        self.sequences: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.cached: list[int] = []

    # -- the model ------------------------------------------------------------------------------------------

    def references(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.sequences)

    def used(self) -> set[int]:
        return {block for blocks in self.sequences for block in blocks}

    def num_free(self) -> int:
        return self.capacity - len(self.used())

    def evict(self, count: int) -> None:
        for block in self.cached[:count]:
            del self.content[block]
        del self.cached[:count]

    def holder(self, digest: bytes) -> int | None:
        return next((block for block, content in self.content.items() if content == digest), None)

    # -- the rules ------------------------------------------------------------------------------------------

    @rule(chain=CHAINS)
    def start_a_sequence(self, chain: list[str]) -> None:
        digests = digests_of(chain)
        expected = []
        for digest in digests:
            if (block := self.holder(digest)) is None:
                break
            expected.append(block)
        found = self.pool.lookup(digests)
        assert found == expected
        num_new = len(chain) - len(found)
        revived = [block for block in found if block in self.cached]
        assert self.pool.num_free_after_acquire(found) == self.num_free() - len(revived)
        if num_new > self.pool.num_free_after_acquire(found):
            return
        self.pool.acquire(found)
        for block in revived:
            self.cached.remove(block)
        self.sequences.append(list(found))
        fresh = self.allocate(num_new)
        self.sequences[-1] += fresh
        for block, digest in zip(fresh, digests[len(found) :], strict=True):
            self.pool.publish(block, digest)
            self.content.setdefault(block, digest)

    @rule(count=st.integers(0, 8))
    def start_without_names(self, count: int) -> None:
        assert self.pool.can_allocate(count) == (count <= self.num_free())
        if self.pool.can_allocate(count):
            self.sequences.append(self.allocate(count))

    def allocate(self, count: int) -> list[int]:
        universe, used_before = set(self.pool.universe()), self.used()
        num_empty = self.capacity - len(used_before) - len(self.cached)
        self.evict(max(0, count - num_empty))
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= universe - used_before - set(self.cached)
        return blocks

    @precondition(lambda self: any(self.sequences))
    @rule(data=st.data())
    def publish_a_known_name(self, data: st.DataObject) -> None:
        unnamed = sorted(block for block in self.used() if block not in self.content)
        if unnamed and self.content:
            block = data.draw(st.sampled_from(unnamed))
            digest = data.draw(st.sampled_from(sorted(self.content.values())))
            self.pool.publish(block, digest)
            assert self.pool.lookup([digest]) == [self.holder(digest)]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.sequences))
        self.pool.acquire(blocks)
        self.sequences.append(list(blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(blocks)
        for block in reversed(blocks):
            if self.references(block):
                continue
            if self.capacity > self.target:
                self.capacity -= 1
                self.content.pop(block, None)
            elif block in self.content:
                self.cached.append(block)

    @rule(num_blocks=st.integers(0, 12))
    def resize(self, num_blocks: int) -> None:
        self.target = num_blocks
        num_used = len(self.used())
        self.capacity = max(num_blocks, num_used)
        self.evict(max(0, num_used + len(self.cached) - self.capacity))
        assert self.pool.resize(num_blocks) == (self.capacity == num_blocks)

    @rule()
    def forget(self) -> None:
        self.pool.forget_cached()
        self.content.clear()
        self.cached.clear()

    # -- what must always hold --------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        pool = self.pool
        pool.check_integrity()
        assert (pool.num_blocks, pool.target) == (self.capacity, self.target)
        assert pool.cached_blocks() == self.cached
        assert pool.used_blocks() == sorted(self.used())
        assert (pool.num_free, pool.num_used) == (self.num_free(), len(self.used()))
        universe = pool.universe()
        assert len(universe) == self.capacity
        assert self.used() | set(self.cached) <= set(universe)
        for block in universe:
            assert pool.references_of(block) == self.references(block)
            assert pool.digest_of(block) == self.content.get(block)

    def teardown(self) -> None:
        for blocks in self.sequences:
            self.pool.release(blocks)
        self.pool.check_integrity()
        assert self.pool.num_used == 0, "a block leaked"
        assert self.pool.num_blocks == self.target


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
