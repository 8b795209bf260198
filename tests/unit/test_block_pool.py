"""The block pool, example by example; `tests/model/test_block_pool_model.py` covers the rest."""

from collections.abc import Callable

import pytest

from kvstore.block_pool import BlockPool


def cached_chain(pool: BlockPool, *digests: bytes) -> list[int]:
    """A released sequence whose blocks can be found under `digests`."""
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    return blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(-1, 16), (4, 0)])
def test_refuses_impossible_sizes(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="the least is"):
        BlockPool(num_blocks, block_size)


def test_counts_add_up() -> None:
    pool = BlockPool(8, 16)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert (pool.num_blocks, pool.num_free, pool.num_used, pool.num_cached) == (8, 5, 3, 0)
    pool.publish(blocks[0], b"a")
    pool.release(blocks)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (8, 0, 1)
    pool.check_integrity()


def test_asking_then_acting_never_surprises() -> None:
    pool = BlockPool(2, 16)
    assert pool.can_allocate(2)
    assert not pool.can_allocate(3)
    with pytest.raises(AssertionError, match="asked for 3 blocks, 2 are free"):
        pool.allocate(3)
    assert pool.num_free == 2
    assert pool.allocate(0) == []


def test_lookup_ends_at_the_first_gap() -> None:
    pool = BlockPool(8, 16)
    blocks = cached_chain(pool, b"a", b"b", b"c")
    assert pool.lookup([b"a", b"b", b"c", b"d"]) == blocks
    assert pool.lookup([b"a", b"x", b"c"]) == blocks[:1]
    assert pool.lookup([b"x", b"b"]) == []
    assert pool.num_cached == 3, "a lookup takes no reference"


def test_acquiring_cached_blocks_costs_free_ones_and_acquiring_used_ones_does_not() -> None:
    pool = BlockPool(8, 16)
    chain = cached_chain(pool, b"a", b"b")
    assert pool.num_free_after_acquire(chain) == 6
    pool.acquire(chain)
    assert pool.num_free == 6
    assert pool.num_free_after_acquire(chain) == 6
    pool.acquire(chain)
    assert [pool.references_of(block) for block in chain] == [2, 2]
    pool.release(chain)
    assert pool.num_used == 2
    pool.release(chain)
    assert (pool.num_used, pool.num_cached) == (0, 2)


def test_the_oldest_sequence_goes_first_and_its_tail_before_its_head() -> None:
    pool = BlockPool(5, 16)
    old = cached_chain(pool, b"a", b"b", b"c")
    cached_chain(pool, b"x", b"y")
    pool.allocate(1)
    assert pool.lookup([b"a", b"b", b"c"]) == old[:2]
    pool.allocate(1)
    assert pool.lookup([b"a", b"b", b"c"]) == old[:1]
    pool.allocate(1)
    assert pool.lookup([b"a"]) == []
    assert len(pool.lookup([b"x", b"y"])) == 2


def test_a_revived_block_is_young_again() -> None:
    pool = BlockPool(2, 16)
    (first,) = cached_chain(pool, b"a")
    cached_chain(pool, b"b")
    pool.acquire([first])
    pool.release([first])
    pool.allocate(1)
    assert pool.lookup([b"a"]) == [first]
    assert pool.lookup([b"b"]) == []


def test_free_blocks_are_used_up_before_anything_is_evicted() -> None:
    pool = BlockPool(4, 16)
    cached_chain(pool, b"a", b"b")
    pool.allocate(2)
    assert pool.num_cached == 2
    assert len(pool.lookup([b"a", b"b"])) == 2


def test_the_first_block_with_a_content_keeps_its_name() -> None:
    pool = BlockPool(4, 16)
    one, two = pool.allocate(2)
    pool.publish(one, b"a")
    pool.publish(two, b"a")
    assert pool.lookup([b"a"]) == [one]
    assert pool.digest_of(two) is None
    pool.release([one, two])
    assert (pool.num_cached, pool.num_free) == (1, 4)
    pool.check_integrity()


def test_a_block_has_one_content() -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.publish(block, b"a")
    with pytest.raises(AssertionError, match="second digest"):
        pool.publish(block, b"b")


def test_misuse_is_caught() -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="nobody refers to it"):
        pool.release([block])
    with pytest.raises(AssertionError, match="cannot be acquired"):
        pool.acquire([block])
    with pytest.raises(AssertionError, match="nobody refers to it"):
        pool.publish(block, b"a")
    pool.check_integrity()


def test_growing_makes_room_at_once() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(2)
    assert pool.resize(5)
    assert pool.num_free == 3
    assert set(pool.allocate(3)).isdisjoint(blocks)
    pool.check_integrity()


def test_shrinking_takes_free_blocks_then_the_oldest_cached_ones() -> None:
    pool = BlockPool(6, 16)
    kept = cached_chain(pool, b"a", b"b", b"c")
    assert pool.resize(3)
    assert pool.num_cached == 3
    assert pool.resize(1)
    assert pool.lookup([b"a", b"b", b"c"]) == kept[:1]
    assert pool.universe() == kept[:1]
    pool.check_integrity()


def test_shrinking_keeps_the_lowest_ids_whatever_was_released_last() -> None:
    pool = BlockPool(6, 16)
    blocks = pool.allocate(6)
    pool.release([blocks[5], blocks[0], blocks[3], blocks[1]])
    assert pool.resize(4)
    assert pool.universe() == [0, 1, 2, 4]
    pool.check_integrity()


def test_a_shrink_below_what_is_used_is_paid_by_later_releases() -> None:
    pool = BlockPool(6, 16)
    one, two = pool.allocate(3), pool.allocate(2)
    pool.publish(one[0], b"a")
    assert not pool.resize(2)
    assert (pool.num_blocks, pool.target, pool.num_free) == (5, 2, 0)
    pool.release(one)
    assert (pool.num_blocks, pool.num_free) == (2, 0)
    assert pool.lookup([b"a"]) == [], "a block that retires takes its content along"
    pool.release(two)
    assert (pool.num_blocks, pool.num_free) == (2, 2)
    assert pool.universe() == sorted(two)
    pool.check_integrity()


def test_growing_cancels_a_shrink_that_is_still_owed() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(4)
    assert not pool.resize(1)
    assert pool.resize(4)
    pool.release(blocks)
    assert pool.num_free == 4
    pool.check_integrity()


def test_retired_ids_come_back_before_new_ones() -> None:
    pool = BlockPool(4, 16)
    pool.resize(2)
    pool.resize(5)
    assert pool.universe() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the least is 0"):
        pool.resize(-1)


def test_a_shrink_that_is_called_off_leaves_the_universe_as_it_was() -> None:
    """Ids that an earlier shrink retired have no pages any more, those that this one would have are still full of them."""
    pool = BlockPool(12, 16)
    blocks = pool.allocate(12)
    pool.release(blocks[:5])
    pool.resize(8)
    before = pool.universe()
    pool.release(blocks[7:])
    pool.resize(5)
    pool.resize(8)
    assert pool.universe() == before
    pool.check_integrity()


def test_forgetting_frees_the_cache_and_leaves_what_is_used() -> None:
    pool = BlockPool(6, 16)
    cached_chain(pool, b"a", b"b")
    (used,) = pool.allocate(1)
    pool.publish(used, b"c")
    pool.forget_cached()
    assert (pool.num_cached, pool.num_used, pool.num_free) == (0, 1, 5)
    assert pool.lookup([b"a"]) == []
    assert pool.lookup([b"c"]) == []
    pool.check_integrity()
    pool.publish(used, b"d")
    assert pool.lookup([b"d"]) == [used]


def test_lists_what_is_used_and_what_is_cached() -> None:
    pool = BlockPool(6, 16)
    chain = cached_chain(pool, b"a", b"b")
    used = pool.allocate(2)
    assert pool.used_blocks() == sorted(used)
    assert pool.cached_blocks() == chain[::-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._references.__setitem__(pool._free[-1], 1),
        lambda pool: pool._references.__setitem__(pool.used_blocks()[0], 0),
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.append(pool.used_blocks()[0]),
        lambda pool: pool._free.append(pool.cached_blocks()[0]),
        lambda pool: pool._index.clear(),
        lambda pool: pool._index.update({b"stray": 0}),
        lambda pool: pool._digests.__setitem__(pool.cached_blocks()[0], None),
        lambda pool: setattr(pool, "_num_blocks", 7),
        lambda pool: setattr(pool, "_target", 5),
    ],
)
def test_the_audit_notices_damage(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(6, 16)
    cached_chain(pool, b"a", b"b")
    pool.allocate(2)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()
