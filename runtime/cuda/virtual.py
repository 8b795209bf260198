"""Device memory for pages that grows and shrinks at its end while its address stays: CUDA's virtual memory management.

How it works: the driver reserves a range of addresses, and physical memory is created and mapped there piece by piece
(``cuMemAddressReserve``, ``cuMemCreate``, ``cuMemMap``, ``cuMemSetAccess``). Torch sees one tensor over the whole range, through
``__cuda_array_interface__``, so captured graphs stay valid whatever is mapped. A piece's handle is released as soon as it is
mapped: the driver then frees its memory when it is unmapped. Unmapping waits for the calling thread's stream, which is the
one on which pages are read and written. The driver's functions and structures are those of the CUDA Driver API, section Virtual
Memory Management.

What is never true: the range is unmapped or freed while a tensor of it lives; half a piece is mapped.
"""

import ctypes
from typing import Any

import torch

GRANULES_PER_RANGE = 1024
"""A range is mapped in about so many pieces, so that a large one takes no more calls than a small one."""
_OUT_OF_MEMORY = 2
_IS_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3


class DriverError(RuntimeError):
    """The driver refused a call."""


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Properties(ctypes.Structure):
    """``CUmemAllocationProp``; the last eight bytes are flags that stay 0."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


_POINTER, _SIZE, _FLAGS = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuMemGetAllocationGranularity": (ctypes.POINTER(_SIZE), ctypes.POINTER(Properties), ctypes.c_int),
    "cuMemAddressReserve": (ctypes.POINTER(_POINTER), _SIZE, _SIZE, _POINTER, _FLAGS),
    "cuMemAddressFree": (_POINTER, _SIZE),
    "cuMemCreate": (ctypes.POINTER(ctypes.c_uint64), _SIZE, ctypes.POINTER(Properties), _FLAGS),
    "cuMemRelease": (ctypes.c_uint64,),
    "cuMemMap": (_POINTER, _SIZE, _SIZE, ctypes.c_uint64, _FLAGS),
    "cuMemSetAccess": (_POINTER, _SIZE, ctypes.POINTER(Access), _SIZE),
    "cuMemUnmap": (_POINTER, _SIZE),
}


class Driver:
    """The driver's calls that this needs, for one device. `library` is libcuda, or what behaves like it.

    Raises:
        DriverError: there is no driver, or the device has no virtual memory management.
    """

    def __init__(self, ordinal: int, library: Any = None) -> None:
        try:
            self._library = library or ctypes.CDLL("libcuda.so.1")
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise DriverError(f"the driver's library cannot be used: {error}") from error
        device, value = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), _IS_SUPPORTED, device)
        if not value.value:
            raise DriverError(f"device {ordinal} has no virtual memory management")
        location = Location(_ON_DEVICE, device.value)
        self._properties = Properties(_PINNED, 0, location)
        self._access = Access(location, _READ_WRITE)
        size = _SIZE()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(self._properties), 0)
        self.granularity = size.value
        """Sizes are whole numbers of so many bytes."""

    def reserve(self, size: int) -> int:
        """The address of a range of `size` bytes with nothing in it."""
        address = _POINTER()
        self._call("cuMemAddressReserve", ctypes.byref(address), size, 0, 0, 0)
        return address.value

    def free(self, address: int, size: int) -> None:
        """Give back a whole range in which nothing is mapped."""
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int) -> bool:
        """Put new memory there; False when there is none."""
        handle = ctypes.c_uint64()
        found = self._library.cuMemCreate(ctypes.byref(handle), size, ctypes.byref(self._properties), 0)
        if found == _OUT_OF_MEMORY:
            return False
        self._check("cuMemCreate", found)
        try:
            self._call("cuMemMap", address, size, 0, handle, 0)
        finally:
            self._call("cuMemRelease", handle)
        try:
            self._call("cuMemSetAccess", address, size, ctypes.byref(self._access), 1)
        except DriverError:
            self.unmap(address, size)
            raise
        return True

    def unmap(self, address: int, size: int) -> None:
        """Take away what one `map` has put there."""
        self._call("cuMemUnmap", address, size)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, result: int) -> None:
        if result:
            raise DriverError(f"{name} failed with error {result}")


class Range:
    """A range of addresses of at least `capacity` bytes, of which pieces are mapped from the start on.

    Torch makes a tensor of it as soon as the first piece is there, and keeps it alive as long as that.
    """

    def __init__(self, driver: Driver, capacity: int) -> None:
        granule, self._driver = driver.granularity, driver
        self.piece_bytes = granule * max(1, -(-capacity // (granule * GRANULES_PER_RANGE)))
        self.size = -(-capacity // self.piece_bytes) * self.piece_bytes
        self.num_pieces = 0
        self.address = driver.reserve(self.size)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    def map(self, num_bytes: int) -> int:
        """Have memory for `num_bytes`, in whole pieces, or less if there is no more; how many bytes there are."""
        wanted = -(-num_bytes // self.piece_bytes)
        while self.num_pieces > wanted:
            self._driver.unmap(self.address + (self.num_pieces - 1) * self.piece_bytes, self.piece_bytes)
            self.num_pieces -= 1
        while self.num_pieces < wanted:
            if not self._driver.map(self.address + self.num_pieces * self.piece_bytes, self.piece_bytes):
                break
            self.num_pieces += 1
        return self.num_pieces * self.piece_bytes

    def __del__(self) -> None:
        if not getattr(self, "address", 0):
            return
        try:
            self.map(0)
            self._driver.free(self.address, self.size)
        except DriverError:  # the driver has gone before us
            pass


class DeviceMemory:
    """`kvstore.page_memory.PageMemory` on a CUDA device.

    Raises:
        DriverError: the device cannot do that, or has no memory for a single piece.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        torch.cuda.current_stream(device).synchronize()  # so that the device's context is this thread's
        self._device = device
        self._range = Range(Driver(device.index or 0), capacity)
        if not self._range.map(1):
            raise DriverError(f"there is no memory for {self._range.piece_bytes:,} bytes of pages")
        self.data = torch.as_tensor(self._range, device=device)[:capacity]
        self.num_bytes = 0

    def resize(self, num_bytes: int) -> int:
        assert 0 <= num_bytes <= len(self.data), f"{num_bytes} bytes of a range of {len(self.data)}"
        if num_bytes < self.num_bytes:
            torch.cuda.current_stream(self._device).synchronize()
        # The first piece stays: it is by that one that torch knows whose memory this is.
        self.num_bytes = min(num_bytes, self._range.map(max(1, num_bytes)))
        return self.num_bytes

    def reach(self, num_bytes: int) -> None:
        """Nothing: what is mapped is there."""
