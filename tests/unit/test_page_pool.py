"""The page pool: any page for any (layer, block), nothing lost, nothing shared, nothing read before it is zeroed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import page_pool
from kvstore.page_memory import HostMemory
from kvstore.page_pool import NO_PAGE, PagePool, PoolExhausted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_pool(num_pages: int = 24, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PagePool:
    pool = PagePool(num_pages, block_size=4, num_kv_heads=2, head_dim=8, dtype=dtype, device=device)
    pool.data.fill_(torch.nan)  # memory as bad as it can be
    return pool


PAGE_BYTES = 2 * 4 * 2 * 8 * 4


def make_elastic(num_pages: int = 24, capacity: int = 60) -> PagePool:
    memory = HostMemory(capacity * PAGE_BYTES)
    pool = PagePool(num_pages, 4, 2, 8, torch.float32, "cpu", memory)
    pool.data.fill_(torch.nan)
    return pool


def mark(pool: PagePool) -> None:
    """Write into each page which (layer, block) it is of."""
    for layer, block in mapping(pool):
        pool.read_page(layer, block).fill_(100 * layer + block)


def check_marks(pool: PagePool) -> None:
    for layer, block in mapping(pool):
        assert (pool.read_page(layer, block) == 100 * layer + block).all(), f"page of {(layer, block)} changed"


def mapping(pool: PagePool) -> dict[tuple[int, int], int]:
    return {
        (layer, block): int(page)
        for layer in pool.layers
        for block, page in enumerate(pool.page_of(layer))
        if page != NO_PAGE
    }


def test_every_held_layer_gets_a_page_of_its_own() -> None:
    pool = make_pool()
    pool.hold([3, 1])
    assert pool.ensure([0, 5]) == 4
    pages = mapping(pool)
    assert set(pages) == {(layer, block) for layer in (1, 3) for block in (0, 5)}
    assert len(set(pages.values())) == 4
    assert (pool.num_used, pool.num_free) == (4, 20)
    assert pool.layers == (1, 3)
    assert pool.page_of(1).dtype == np.int32
    assert pool.ensure([5, 0]) == 0, "what is there stays"
    assert mapping(pool) == pages
    pool.check_integrity()


def test_repeated_blocks_get_one_page() -> None:
    pool = make_pool()
    pool.hold([0])
    assert pool.ensure([2, 2, 7, 2]) == 2
    assert pool.ensure(np.array([7, 8, 8])) == 1
    pool.check_integrity()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_zero_when_they_are_taken_and_each_time_again(dtype: torch.dtype) -> None:
    pool = make_pool(num_pages=2, dtype=dtype)
    pool.hold([0])
    pool.ensure([0, 1])
    assert not pool.data.any()
    pool.data.fill_(torch.nan)
    pool.release_blocks([1])
    pool.ensure([9])
    assert not pool.read_page(0, 9).any()
    assert pool.read_page(0, 0).isnan().all(), "only what is taken is cleared"


def test_the_memory_never_moves() -> None:
    pool = make_pool()
    pointer = pool.data.data_ptr()
    pool.hold([0, 1])
    pool.ensure(range(8))
    pool.drop([0])
    pool.hold([2], num_blocks_hint=1000)
    pool.ensure([999])
    assert pool.data.data_ptr() == pointer
    assert pool.data.shape == (24, 2, 4, 2, 8)
    assert pool.page_bytes == 2 * 4 * 2 * 8 * 4


def test_tables_grow_with_the_block_ids_and_keep_what_they_hold() -> None:
    pool = make_pool()
    pool.hold([0, 1], num_blocks_hint=10)
    assert len(pool.page_of(0)) >= 10
    pool.ensure([9])
    before = mapping(pool)
    pool.ensure([5000])
    assert len(pool.page_of(1)) > 5000
    assert before.items() <= mapping(pool).items()
    pool.check_integrity()


def test_within_the_hint_a_table_stays_where_it_is() -> None:
    pool = make_pool()
    pool.hold([0], num_blocks_hint=100)
    table = pool.page_of(0)
    pool.ensure([99])
    assert table[99] != NO_PAGE


def test_layers_come_and_go_with_their_pages() -> None:
    pool = make_pool()
    pool.hold([0, 1, 2])
    pool.ensure([0, 1])
    kept = {pair: page for pair, page in mapping(pool).items() if pair[0] != 1}
    pool.drop([1])
    assert pool.layers == (0, 2)
    assert mapping(pool) == kept
    assert pool.num_used == 4
    with pytest.raises(KeyError):
        pool.page_of(1)
    pool.hold([7, 0])
    assert mapping(pool) == kept, "an arriving layer starts empty and one that is held stays as it is"
    assert pool.ensure([0, 1]) == 2
    pool.check_integrity()


def test_pages_of_a_departed_layer_serve_the_others() -> None:
    pool = make_pool(num_pages=4)
    pool.hold([0, 1])
    pool.ensure([0, 1])
    pool.drop([0])
    assert pool.ensure([2, 3]) == 2
    pool.check_integrity()


def test_a_shadow_layer_can_be_filled_by_itself() -> None:
    pool = make_pool()
    pool.hold([0, 1])
    assert pool.ensure([4], layers=[1]) == 1
    assert set(mapping(pool)) == {(1, 4)}
    assert pool.ensure([4]) == 1


def test_exhaustion_names_the_numbers_and_takes_nothing() -> None:
    pool = make_pool(num_pages=5)
    pool.hold([0, 1])
    pool.ensure([0])
    with pytest.raises(PoolExhausted, match=r"4 KV pages are needed but only 3 of 5 are free with 2 layers") as caught:
        pool.ensure([1, 2])
    assert (caught.value.num_needed, caught.value.num_free, caught.value.num_pages) == (4, 3, 5)
    assert pool.num_free == 3
    pool.check_integrity()
    assert pool.ensure([1]) == 2


def test_released_blocks_lose_their_pages_in_every_layer() -> None:
    pool = make_pool()
    pool.hold([0, 1])
    pool.ensure([0, 1, 2])
    assert pool.release_blocks([1, 1, 77]) == 2
    assert {block for _, block in mapping(pool)} == {0, 2}
    assert pool.release_blocks([1]) == 0
    pool.check_integrity()


def test_retaining_gives_back_everything_else() -> None:
    pool = make_pool()
    pool.hold([0, 1])
    pool.ensure(range(6))
    assert pool.retain_only([4, 1, 900]) == 8
    assert {block for _, block in mapping(pool)} == {1, 4}
    assert pool.retain_only([]) == 4
    assert pool.num_used == 0
    pool.check_integrity()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_travel_bit_for_bit(dtype: torch.dtype) -> None:
    source, target = make_pool(dtype=dtype), make_pool(dtype=dtype)
    for pool in (source, target):
        pool.hold([2, 5])
    source.ensure([3, 8, 9])
    target.ensure([9, 3])
    generator = torch.Generator().manual_seed(1)
    for block in (3, 8, 9):
        source.write_page(5, block, torch.randn(2, 4, 2, 8, generator=generator).to(dtype))
    target.write_page(5, 3, source.read_page(5, 3))
    assert torch.equal(target.read_page(5, 3), source.read_page(5, 3))
    assert target.checksum(5, 3) == source.checksum(5, 3)
    assert not target.read_page(2, 3).any(), "the same block of another layer is another page"
    target.write_pages(5, [9, 3], source.read_pages(5, [9, 8]))
    assert [target.checksum(5, block) for block in (9, 3)] == [source.checksum(5, block) for block in (9, 8)]
    expected = xxhash.xxh3_64_intdigest(source.read_page(5, 8).view(torch.uint8).numpy().tobytes())
    assert source.checksum(5, 8) == expected


def test_a_checksum_sees_a_single_bit() -> None:
    pool = make_pool()
    pool.hold([0])
    pool.ensure([0])
    before = pool.checksum(0, 0)
    pool.read_page(0, 0).view(torch.int32)[1, 3, 1, 7] ^= 1
    assert pool.checksum(0, 0) != before


def test_misuse_is_caught() -> None:
    pool = make_pool()
    pool.hold([0])
    pool.ensure([0])
    for wrong in (1, -1, 10**6):
        with pytest.raises(AssertionError, match="has no page in layer 0"):
            pool.read_page(0, wrong)
    with pytest.raises(AssertionError, match="does not fit"):
        pool.write_page(0, 0, torch.zeros(2, 4, 2, 7))
    with pytest.raises(AssertionError, match="does not fit"):
        pool.write_page(0, 0, torch.zeros(2, 4, 2, 8, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="no page in layer"):
        pool.read_pages(0, [0, 1])
    with pytest.raises(AssertionError, match="is no block"):
        pool.ensure([-1])
    with pytest.raises(KeyError):
        pool.drop([4])
    with pytest.raises(ValueError, match="every size must be positive"):
        PagePool(0, 4, 2, 8, torch.float32, "cpu")


def test_without_layers_there_is_nothing_to_give() -> None:
    pool = make_pool()
    assert pool.ensure([1, 2]) == 0
    assert pool.release_blocks([1]) == 0
    assert pool.retain_only([1]) == 0
    pool.hold([0])
    assert pool.ensure([]) == 0
    pool.check_integrity()


def test_a_fixed_pool_stays_as_it_is() -> None:
    pool = make_pool()
    assert pool.resize(5) == 24
    assert pool.resize(50) == 24
    pool.check_integrity()


def test_a_pool_grows_where_it_is() -> None:
    pool = make_elastic(num_pages=4)
    pointer = pool.data.data_ptr()
    pool.hold([0, 1])
    pool.ensure([0, 1])
    mark(pool)
    with pytest.raises(PoolExhausted):
        pool.ensure([2])
    assert pool.resize(6) == 6
    assert (pool.num_pages, pool.num_free, pool.num_used) == (6, 2, 4)
    assert pool.ensure([2]) == 2
    assert not pool.read_page(1, 2).any(), "a new page is zeroed too"
    pool.read_page(0, 2).fill_(2)
    pool.read_page(1, 2).fill_(102)
    check_marks(pool)
    assert pool.resize(1000) == 60, "the range was reserved for so many"
    assert pool.data.data_ptr() == pointer
    pool.check_integrity()


def test_pages_beyond_the_new_end_move_before_it() -> None:
    pool = make_elastic(num_pages=12)
    pool.hold([0, 1, 2])
    pool.ensure([0, 1, 2, 3])
    pool.drop([0])
    mark(pool)
    before = mapping(pool)
    assert max(before.values()) >= 9
    assert pool.resize(9) == 9
    after = mapping(pool)
    assert max(after.values()) < 9
    assert all(after[pair] == page for pair, page in before.items() if page < 9), "what could stay has moved"
    check_marks(pool)
    pool.check_integrity()
    pool.data[9:].fill_(torch.nan)
    check_marks(pool)
    assert pool.ensure([7], layers=[1]) == 1
    with pytest.raises(PoolExhausted):
        pool.ensure([8], layers=[1])


def test_a_pool_cannot_become_smaller_than_what_is_used() -> None:
    pool = make_elastic(num_pages=10)
    pool.hold([0])
    pool.ensure(range(7))
    before = mapping(pool)
    with pytest.raises(PoolExhausted, match=r"7 KV pages are needed but only 6 of 6"):
        pool.resize(6)
    assert (pool.num_pages, mapping(pool)) == (10, before)
    assert pool.resize(7) == 7
    pool.check_integrity()
    with pytest.raises(MemoryError):
        PagePool(3, 4, 2, 8, torch.float32, "cpu", HostMemory(PAGE_BYTES - 1))


def test_a_pool_shrinks_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page_pool._MOVED_BYTES, "cpu", 3 * PAGE_BYTES)
    monkeypatch.setattr(page_pool, "GIVEN_BACK", 6)
    pool = make_elastic(num_pages=60)
    pool.hold([0])
    pool.ensure(range(50))
    pool.release_blocks([block for block in range(50) if block % 5])
    mark(pool)
    sizes = [pool.num_pages]
    while pool.num_pages > 12:
        before = mapping(pool)
        sizes.append(pool.resize(12, in_pieces=True))
        moved = [pair for pair, page in mapping(pool).items() if before[pair] != page]
        assert len(moved) <= 3
        assert 0 < sizes[-2] - sizes[-1] <= 18
        check_marks(pool)
        pool.check_integrity()
    assert len(sizes) > 3
    with pytest.raises(PoolExhausted):
        pool.resize(9, in_pieces=True)


def test_a_system_without_more_memory_gives_fewer_pages() -> None:
    class Short(HostMemory):
        def resize(self, num_bytes: int) -> int:
            return super().resize(min(num_bytes, 13 * PAGE_BYTES + 5))

    pool = PagePool(8, 4, 2, 8, torch.float32, "cpu", Short(60 * PAGE_BYTES))
    assert pool.resize(20) == 13
    assert (pool.num_pages, pool.num_free) == (13, 13)
    pool.check_integrity()


OPERATIONS = st.one_of(
    st.tuples(st.just("hold"), st.lists(st.integers(0, 5), max_size=3)),
    st.tuples(st.just("drop"), st.lists(st.integers(0, 5), max_size=3, unique=True)),
    st.tuples(st.sampled_from(["ensure", "release_blocks", "retain_only"]), st.lists(st.integers(0, 90), max_size=6)),
    st.tuples(st.just("resize"), st.lists(st.integers(1, 70), min_size=1, max_size=1)),
)


@settings(deadline=None, max_examples=300)
@given(is_elastic=st.booleans(), operations=st.lists(OPERATIONS, max_size=25))
def test_any_history_agrees_with_a_set_of_pairs(is_elastic: bool, operations: list[tuple[str, list[int]]]) -> None:
    pool = make_elastic() if is_elastic else make_pool()
    held: set[int] = set()
    pairs: set[tuple[int, int]] = set()
    for name, ids in operations:
        before = mapping(pool)
        if name == "hold":
            pool.hold(ids)
            held |= set(ids)
        elif name == "drop":
            present = [layer for layer in ids if layer in held]
            pool.drop(present)
            held -= set(present)
            pairs = {pair for pair in pairs if pair[0] in held}
        elif name == "resize":
            size = min(ids[0], 60) if is_elastic else 24
            if size < len(pairs):
                with pytest.raises(PoolExhausted):
                    pool.resize(ids[0])
                size = pool.num_pages
            else:
                assert pool.resize(ids[0]) == size
                pool.data[size:].fill_(torch.nan)
            assert pool.num_pages == size
        elif name == "ensure":
            wanted = pairs | {(layer, block) for layer in held for block in ids}
            if len(wanted) > pool.num_pages:
                with pytest.raises(PoolExhausted):
                    pool.ensure(ids)
            else:
                assert pool.ensure(ids) == len(wanted - pairs)
                for layer, block in wanted - pairs:
                    assert not pool.read_page(layer, block).any()
                pairs = wanted
        else:
            keep = set(ids) if name == "retain_only" else set(range(91)) - set(ids)
            left = {pair for pair in pairs if pair[1] in keep}
            assert getattr(pool, name)(ids) == len(pairs - left)
            pairs = left
        pool.check_integrity()
        after = mapping(pool)
        assert set(after) == pairs
        if name != "ensure":
            check_marks(pool)
        if name != "resize":
            assert all(after[pair] == before[pair] for pair in before.keys() & after.keys()), "a page moved"
        mark(pool)
        assert pool.layers == tuple(sorted(held))


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool.page_of(0).__setitem__(0, pool.page_of(0)[1]),
        lambda pool: pool.page_of(0).__setitem__(0, NO_PAGE),
        lambda pool: pool.page_of(0).__setitem__(5, pool._free[0]),
        lambda pool: pool.page_of(0).__setitem__(0, 1000),
        lambda pool: pool._row_of.pop(1),
        lambda pool: pool._row_of.__setitem__(9, pool._row_of[0]),
        lambda pool: setattr(pool, "_num_free", pool._num_free - 1),
        lambda pool: pool._free.__setitem__(0, pool._free[1]),
        lambda pool: setattr(pool, "num_pages", pool.num_pages - 1),
    ],
)
def test_the_audit_notices_damage(damage: Callable[[PagePool], None]) -> None:
    pool = make_pool()
    pool.hold([0, 1], num_blocks_hint=10)
    pool.ensure([0, 1])
    pool.check_integrity()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_pool_clears_reads_and_writes_alike(dtype: torch.dtype) -> None:
    pool, host = make_pool(dtype=dtype, device="cuda"), make_pool(dtype=dtype)
    for each in (pool, host):
        each.hold([0, 1])
        each.ensure([0, 3])
    page = torch.randn(2, 4, 2, 8).to(dtype)
    pool.write_page(1, 3, page)
    host.write_page(1, 3, page)
    assert not pool.read_page(0, 3).any()
    assert pool.checksum(1, 3) == host.checksum(1, 3)
    host.write_pages(0, [0, 3], pool.read_pages(1, [3, 0]).cpu())
    pool.write_pages(0, [0, 3], pool.read_pages(1, [3, 0]))
    assert torch.equal(pool.read_pages(0, [0, 3]).cpu(), host.read_pages(0, [0, 3]))
    pool.check_integrity()
