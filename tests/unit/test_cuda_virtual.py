"""The range of device memory that pages lie in: against a driver that keeps the books, and, where there is one, the real one."""

import ctypes
from typing import Any

import pytest
import torch

from kvstore.page_pool import PagePool
from runtime.cuda.virtual import GRANULES_PER_RANGE, Access, DeviceMemory, Driver, DriverError, Properties, Range

GRANULE = 2 << 20
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY = 0, 1, 2


class _Function:
    """A C function as ctypes shows it: arguments are converted to what `argtypes` says before it is called."""

    def __init__(self, body: Any) -> None:
        self.argtypes: tuple[Any, ...] = ()
        self._body = body

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes), f"{self._body.__name__} takes {len(self.argtypes)} arguments"
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *self.argtypes)
        return prototype(self._body)(*arguments)


class FakeLibrary:
    """What the manual says of the driver: ranges hold whole mappings, memory lives while it is mapped or has a handle."""

    def __init__(self, num_free: int = 100, *, supports: bool = True) -> None:
        self.num_free = num_free
        self.ranges: dict[int, int] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.accessible: set[int] = set()
        self.handles: dict[int, int] = {}
        self.num_calls = 0
        self.fails = ""
        self._supports = supports
        for name in dir(self):
            if name.startswith("_cu"):
                setattr(self, name[1:], _Function(self._guarded(name)))

    def _guarded(self, name: str) -> Any:
        def body(*arguments: Any) -> int:
            self.num_calls += 1
            return INVALID_VALUE if name[1:] == self.fails else getattr(self, name)(*arguments)

        body.__name__ = name[1:]
        return body

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device[0] = ordinal + 10
        return SUCCESS

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value[0] = int(self._supports and (attribute, device) == (102, 13))
        return SUCCESS

    def _cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: int) -> int:
        size[0] = GRANULE
        return SUCCESS if self._is_right(properties[0]) and option == 0 else INVALID_VALUE

    def _cuMemAddressReserve(self, address: Any, size: int, alignment: int, wish: int, flags: int) -> int:
        if size % GRANULE or alignment or wish or flags:
            return INVALID_VALUE
        address[0] = 1 << 40
        self.ranges[1 << 40] = size
        return SUCCESS

    def _cuMemAddressFree(self, address: int, size: int) -> int:
        if self.ranges.get(address) != size or self.mapped:
            return INVALID_VALUE
        del self.ranges[address]
        return SUCCESS

    def _cuMemCreate(self, handle: Any, size: int, properties: Any, flags: int) -> int:
        if size % GRANULE or not self._is_right(properties[0]) or flags:
            return INVALID_VALUE
        if size // GRANULE > self.num_free:
            return OUT_OF_MEMORY
        self.num_free -= size // GRANULE
        handle[0] = self.num_calls + (1 << 50)
        self.handles[handle[0]] = size
        return SUCCESS

    def _cuMemRelease(self, handle: int) -> int:
        size = self.handles.pop(handle, None)
        if size is None:
            return INVALID_VALUE
        if all(mapped != handle for _, mapped in self.mapped.values()):
            self.num_free += size // GRANULE
        return SUCCESS

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        (start, length), *_ = self.ranges.items()
        is_inside = start <= address and address + size <= start + length
        if not is_inside or offset or flags or self.handles.get(handle) != size or address in self.mapped:
            return INVALID_VALUE
        self.mapped[address] = (size, handle)
        return SUCCESS

    def _cuMemSetAccess(self, address: int, size: int, access: Any, count: int) -> int:
        location = access[0].location
        if self.mapped.get(address, (0, 0))[0] != size or count != 1 or (location.type, location.id) != (1, 13):
            return INVALID_VALUE
        if access[0].flags == 3:
            self.accessible.add(address)
        return SUCCESS

    def _cuMemUnmap(self, address: int, size: int) -> int:
        if self.mapped.get(address, (0, 0))[0] != size:
            return INVALID_VALUE
        _, handle = self.mapped.pop(address)
        self.accessible.discard(address)
        if handle not in self.handles:
            self.num_free += size // GRANULE
        return SUCCESS

    def _is_right(self, properties: Properties) -> bool:
        location = properties.location
        plain = (properties.handle_types, properties.win32_metadata, bytes(properties.flags)) == (0, None, bytes(8))
        return plain and (properties.type, location.type, location.id) == (1, 1, 13)


def test_structures_are_as_large_as_the_drivers() -> None:
    assert ctypes.sizeof(Properties) == 32
    assert (Properties.location.offset, Properties.win32_metadata.offset, Properties.flags.offset) == (8, 16, 24)
    assert (ctypes.sizeof(Access), Access.flags.offset) == (12, 8)


def test_a_range_maps_what_is_wanted_and_gives_all_of_it_back() -> None:
    library = FakeLibrary()
    found = Range(Driver(3, library), 50 * GRANULE - 5)
    assert found.__cuda_array_interface__["data"] == (1 << 40, False)
    assert (found.size, found.piece_bytes, library.num_free) == (50 * GRANULE, GRANULE, 100)
    for wanted, pieces in (
        (1, 1),
        (7 * GRANULE, 7),
        (7 * GRANULE + 1, 8),
        (3 * GRANULE, 3),
        (50 * GRANULE, 50),
        (0, 0),
    ):
        assert found.map(wanted) == pieces * GRANULE
        assert sorted(library.mapped) == [(1 << 40) + index * GRANULE for index in range(pieces)]
        assert library.accessible == set(library.mapped)
        assert not library.handles, "a handle outlives its mapping and holds the memory"
        assert library.num_free == 100 - pieces
    found.map(5 * GRANULE)
    del found
    assert (library.ranges, library.mapped, library.num_free) == ({}, {}, 100)


def test_large_ranges_have_large_pieces() -> None:
    library = FakeLibrary(num_free=1 << 30)
    found = Range(Driver(3, library), 80 << 30)
    assert found.piece_bytes % GRANULE == 0
    before = library.num_calls
    assert found.map(80 << 30) >= 80 << 30
    assert library.num_calls - before <= 4 * GRANULES_PER_RANGE


def test_without_more_memory_there_is_less() -> None:
    library = FakeLibrary(num_free=6)
    found = Range(Driver(3, library), 20 * GRANULE)
    assert found.map(4 * GRANULE) == 4 * GRANULE
    assert found.map(20 * GRANULE) == 6 * GRANULE
    library.num_free += 2
    assert found.map(20 * GRANULE) == 8 * GRANULE


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
def test_a_failed_call_leaves_no_half_piece(call: str) -> None:
    library = FakeLibrary()
    found = Range(Driver(3, library), 20 * GRANULE)
    found.map(2 * GRANULE)
    library.fails = call
    with pytest.raises(DriverError, match=call):
        found.map(5 * GRANULE)
    library.fails = ""
    assert (len(library.mapped), library.num_free, library.handles) == (2, 98, {})
    assert found.map(5 * GRANULE) == 5 * GRANULE


def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(DriverError, match="device 3 has no virtual memory management"):
        Driver(3, FakeLibrary(supports=False))
    with pytest.raises(DriverError, match="cannot be used"):
        Driver(3, object())
    library = FakeLibrary()
    library.fails = "cuMemAddressReserve"
    with pytest.raises(DriverError, match="cuMemAddressReserve failed with error 1"):
        Range(Driver(3, library), GRANULE)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_pool_gives_memory_back_and_keeps_what_stays(dtype: torch.dtype) -> None:
    device, capacity = torch.device("cuda", 0), 1 << 30
    torch.zeros(1, device=device)
    free, _ = torch.cuda.mem_get_info(device)
    pool = PagePool(4096, 16, 8, 64, dtype, device, DeviceMemory(device, capacity))
    pointer, page_bytes = pool.data.data_ptr(), pool.page_bytes
    taken = free - torch.cuda.mem_get_info(device)[0]
    assert 4096 * page_bytes <= taken < 4096 * page_bytes + (64 << 20)
    pool.hold([0])
    pool.ensure(range(3000))
    pool.release_blocks(range(2000))
    for block in range(2000, 3000):
        pool.read_page(0, block).fill_(block % 100)
    assert pool.resize(1024) == 1024
    assert free - torch.cuda.mem_get_info(device)[0] < 1024 * page_bytes + (64 << 20)
    assert all(bool((pool.read_page(0, block) == block % 100).all()) for block in range(2000, 3000))
    assert pool.resize(capacity // page_bytes) == capacity // page_bytes
    pool.data[-1].fill_(1)
    assert all(bool((pool.read_page(0, block) == block % 100).all()) for block in range(2000, 3000))
    assert pool.data.data_ptr() == pointer
    pool.check_integrity()
    del pool
    assert free - torch.cuda.mem_get_info(device)[0] < 64 << 20
