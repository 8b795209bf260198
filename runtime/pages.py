"""Tensors on pages of their own, which other processes of this host can map: a weight that several workers hold lies in memory once.

A large CPU tensor made by `empty` lies in an anonymous file (``memfd_create``). Whoever holds it can `lend` it: the loan says which
descriptor of which process it is. Another process of the same user `borrow`s it: it opens that descriptor through ``/proc`` and maps the
same pages, read-only. Nothing is copied, neither end waits for the other, and the pages live until the last process has let go
of them, however the first one ends. A borrowed tensor can be lent on.

Never true: a lent tensor is written to after it was made. A loan that has gone stale (its process ended, its descriptor is
another file by now) maps nothing that was not meant: the file's random name is part of the loan.

Memory of another NUMA node is slower for ever, so processes that run on other nodes are of another `place` and do not lend to each other.

What is read in every step should lie on huge pages (`kvstore.hugepages`): a large tensor does from the start, and `together` puts those of a
unit that are smaller than a few of them into one file.

Where there is no ``memfd_create`` or ``/proc``, or no descriptor is left, tensors are as large and as good, and not to be lent.
"""

import contextlib
import errno
import functools
import math
import os
import resource
import secrets
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvstore.hugepages import HUGE_PAGE_BYTES, MappedFile, Range
from runtime.messages import Loan

if TYPE_CHECKING:
    import torch

OWN_PAGES_BYTES = 256 << 10
"""What is smaller is in the heap."""
LARGE_BYTES = 8 * HUGE_PAGE_BYTES
"""What is smaller shares huge pages with others, if with any: alone it would leave a good part of its last one empty."""
ALIGNMENT = 64
"""Of tensors that share a file: a cache line."""
RESERVED_FILES = 256
"""Descriptors that weights leave free."""


class LoanError(Exception):
    """What was lent cannot be had; the message says why."""


class LoanGone(LoanError):
    """It was there, and was dropped before it was taken."""


class _File(NamedTuple):
    descriptor: int
    name: str


class _Place(NamedTuple):
    """Where a tensor lies."""

    file: _File
    offset: int
    num_bytes: int
    is_borrowed: bool


warnings.filterwarnings("ignore", "The given buffer is not writable")  # what is borrowed is not, and nobody tries

_OPEN = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""Whatever the descriptor has become meanwhile, nothing waits for it."""
_places: dict[int, _Place] = {}
"""Of the tensors that may be lent, by their addresses."""
_mapped: "weakref.WeakValueDictionary[str, _Mapping]" = weakref.WeakValueDictionary()
"""What was borrowed, by the names of the files: each is mapped once, however many tensors are in it."""


def empty(shape: tuple[int, ...], dtype: "torch.dtype", rest: Callable[[], None] = lambda: None) -> "torch.Tensor":
    """An empty CPU tensor. A large one has pages of its own, which go back to the system the moment it dies; the heap
    would keep them, in pieces, and a worker that loads layer after layer would grow by what it has already dropped.

    `rest` is called between pieces of the work, where there are any."""
    import torch

    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < OWN_PAGES_BYTES:
        return torch.empty(shape, dtype=dtype)
    mapping = _make_file(num_bytes)
    if mapping is None:
        pages = Range.of(num_bytes, on_huge_pages=True)
        return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=pages.begin).view(shape)
    if num_bytes >= LARGE_BYTES:
        mapping.take_huge_pages(rest)
    return mapping.tensor(0, shape, dtype)


def together(
    parts: Mapping[str, "torch.Tensor"], rest: Callable[[], None] = lambda: None
) -> Mapping[str, "torch.Tensor"]:
    """The same CPU tensors, those of a middle size as copies in one file, on huge pages as far as there are any. What is borrowed stays, and what
    shares a file already.

    `rest` is called between pieces of the work, each of some milliseconds at most.
    """
    import torch

    middle = {name: part for name, part in parts.items() if OWN_PAGES_BYTES <= part.nbytes < LARGE_BYTES}
    found = {name: _places.get(part.data_ptr()) for name, part in middle.items()}
    moving = [name for name, place in found.items() if place is None or not place.is_borrowed]
    files = {place.file if place is not None else None for place in map(found.get, moving)}
    if len(moving) < 2 or (None not in files and len(files) == 1):
        return parts
    offsets, num_bytes = [], 0
    for name in moving:
        offsets.append(num_bytes)
        num_bytes += -(-parts[name].nbytes // ALIGNMENT) * ALIGNMENT
    left = -num_bytes % HUGE_PAGE_BYTES
    if left < HUGE_PAGE_BYTES // 2:
        num_bytes += left  # rather a little memory than half a huge page in small ones
    mapping = _make_file(num_bytes)
    if mapping is None:
        return parts
    mapping.take_huge_pages(rest)
    copies = dict(parts)
    for name, offset in zip(moving, offsets, strict=True):
        part = parts[name].contiguous()
        copies[name] = mapping.tensor(offset, tuple(part.shape), part.dtype)
        copies[name].view(-1).view(torch.uint8).copy_(part.view(-1).view(torch.uint8))
        rest()
    return copies


def lend(tensor: "torch.Tensor") -> Loan | None:
    """How another process gets at the memory of `tensor`; None when it can't."""
    place = _places.get(tensor.data_ptr())
    if place is None or place.num_bytes != tensor.nbytes or not tensor.is_contiguous():
        return None
    return Loan(os.getpid(), place.file.descriptor, place.file.name, place.offset)


def borrow(loan: Loan, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    """The tensor that was lent, on the same pages. It must not be written to: that ends the process.

    Raises:
        LoanError: it is gone, or this process may not have it.
    """
    mapping = _mapped.get(loan.file) or _map_loan(loan)
    num_bytes = math.prod(shape) * dtype.itemsize
    if loan.offset < 0 or loan.offset % ALIGNMENT or loan.offset + num_bytes > mapping.num_bytes:
        raise LoanError(f"{num_bytes:,} bytes from {loan.offset:,} on are not in its file of {mapping.num_bytes:,}")
    return mapping.tensor(loan.offset, shape, dtype)


def _map_loan(loan: Loan) -> "_Mapping":
    try:
        descriptor = os.open(f"/proc/{loan.pid}/fd/{loan.descriptor}", _OPEN)
    except OSError as error:
        is_gone = error.errno in (errno.ENOENT, errno.ENXIO)
        raise (LoanGone if is_gone else LoanError)(f"process {loan.pid} does not give it: {error.strerror}") from None
    try:
        if _is_short(descriptor):
            raise LoanError("no descriptor is left")
        found = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("/memfd:").partition(" ")[0]
        if found != loan.file:
            raise LoanGone(f"process {loan.pid} has let go of it")
        mapping = _Mapping.take(_File(descriptor, loan.file), os.fstat(descriptor).st_size, is_writable=False)
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise LoanError(f"it cannot be mapped: {error}") from None
    except BaseException:
        os.close(descriptor)
        raise
    _mapped[loan.file] = mapping
    return mapping


@functools.cache
def place() -> str:
    """Processes with the same one can lend to each other: the same kernel, process ids and user, and memory equally near. Empty
    where nothing can be lent."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return f"{boot} {processes} {os.getuid()} {_nodes()}"


def _nodes() -> str:
    """The NUMA nodes that this process may run on."""
    mine = os.sched_getaffinity(0)
    nodes = []
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        with contextlib.suppress(OSError, ValueError):
            if mine & _numbers((node / "cpulist").read_text()):
                nodes.append(node.name)
    return ",".join(nodes)


def _numbers(text: str) -> set[int]:
    """Of the kernel's ``0-3,8``."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


class _Mapping(MappedFile):
    """A file in the memory of this process, for as long as a tensor is in it."""

    file: _File
    addresses: set[int]
    """Of the tensors."""
    is_borrowed: bool

    @classmethod
    def take(cls, file: _File, num_bytes: int, *, is_writable: bool) -> "_Mapping":
        """Map it; from then on its descriptor is closed with the mapping. Raises as `MappedFile.of`."""
        mapping = cls.of(file.descriptor, num_bytes, is_writable=is_writable)
        mapping.file, mapping.addresses, mapping.is_borrowed = file, set(), not is_writable
        weakref.finalize(mapping, _forget, mapping.addresses, file).atexit = False
        return mapping

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
        """The tensor that begins at this place of the file."""
        import torch

        tensor = torch.frombuffer(self, dtype=dtype, count=math.prod(shape), offset=self.begin + offset).view(shape)
        _places[tensor.data_ptr()] = _Place(self.file, offset, tensor.nbytes, self.is_borrowed)
        self.addresses.add(tensor.data_ptr())
        return tensor


def _make_file(num_bytes: int) -> _Mapping | None:
    """None where there is no such thing, or descriptors are short."""
    name = f"midflight-{secrets.token_hex(8)}"
    try:
        descriptor = os.memfd_create(name)
    except (AttributeError, OSError):
        return None
    try:
        if not _is_short(descriptor):
            os.ftruncate(descriptor, num_bytes)
            return _Mapping.take(_File(descriptor, name), num_bytes, is_writable=True)
    except (OSError, ValueError):
        pass
    os.close(descriptor)
    return None


def _is_short(descriptor: int) -> bool:
    """Whether descriptors, of which this is the newest, are nearly used up: sockets and shards need some, too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - RESERVED_FILES


def _forget(addresses: set[int], file: _File) -> None:
    for address in addresses:
        if address in _places and _places[address].file == file:
            del _places[address]
    os.close(file.descriptor)
