"""Tensors on pages of their own, which other processes of this host can map: a weight that several workers hold lies in memory once.

A large CPU tensor made by `empty` lies in an anonymous file (``memfd_create``). Whoever holds it can `lend` it: the loan says which
descriptor of which process it is. Another process of the same user `borrow`s it: it opens that descriptor through ``/proc`` and maps the
same pages, read-only. Nothing is copied, neither end waits for the other, and the pages live until the last process has let go
of them, however the first one ends. A borrowed tensor can be lent on.

Never true: a lent tensor is written to after it was made. A loan that has gone stale (its process ended, its descriptor is
another file by now) maps nothing that was not meant: the file's random name is part of the loan.

Memory of another NUMA node is slower for ever, so processes that run on other nodes are of another `place` and do not lend to each other.

Where there is no ``memfd_create`` or ``/proc``, or no descriptor is left, tensors are as large and as good, and not to be lent.
"""

import contextlib
import errno
import functools
import math
import mmap
import os
import resource
import secrets
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime.messages import Loan

if TYPE_CHECKING:
    import torch

OWN_PAGES_BYTES = 256 << 10
"""What is smaller is in the heap."""
RESERVED_FILES = 256
"""Descriptors that weights leave free."""


class LoanError(Exception):
    """What was lent cannot be had; the message says why."""


class LoanGone(LoanError):
    """It was there, and was dropped before it was taken."""


class _File(NamedTuple):
    descriptor: int
    name: str
    num_bytes: int


warnings.filterwarnings("ignore", "The given buffer is not writable")  # what is borrowed is not, and nobody tries

_OPEN = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""Whatever the descriptor has become meanwhile, nothing waits for it."""
_files: dict[int, _File] = {}
"""By the address at which it is mapped."""


def empty(shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    """An empty CPU tensor. A large one has pages of its own, which go back to the system the moment it dies; the heap
    would keep them, in pieces, and a worker that loads layer after layer would grow by what it has already dropped."""
    import torch

    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < OWN_PAGES_BYTES:
        return torch.empty(shape, dtype=dtype)
    made = _make_file(num_bytes)
    if made is None:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    return _tensor(*made, shape, dtype)


def lend(tensor: "torch.Tensor") -> Loan | None:
    """How another process gets at the memory of `tensor`; None when it can't."""
    file = _files.get(tensor.data_ptr())
    if file is None or file.num_bytes != tensor.nbytes or not tensor.is_contiguous():
        return None
    return Loan(os.getpid(), file.descriptor, file.name)


def borrow(loan: Loan, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    """The tensor that was lent, on the same pages. It must not be written to: that ends the process.

    Raises:
        LoanError: it is gone, or this process may not have it.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        descriptor = os.open(f"/proc/{loan.pid}/fd/{loan.descriptor}", _OPEN)
    except OSError as error:
        is_gone = error.errno in (errno.ENOENT, errno.ENXIO)
        raise (LoanGone if is_gone else LoanError)(f"process {loan.pid} does not give it: {error.strerror}") from None
    try:
        if _is_short(descriptor):
            raise LoanError("no descriptor is left")
        found = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("/memfd:").partition(" ")[0]
        if found != loan.file or os.fstat(descriptor).st_size != num_bytes:
            raise LoanGone(f"process {loan.pid} has let go of it")
        pages = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        os.close(descriptor)
        raise LoanError(f"it cannot be mapped: {error.strerror}") from None
    except BaseException:
        os.close(descriptor)
        raise
    return _tensor(pages, _File(descriptor, loan.file, num_bytes), shape, dtype)


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


def _make_file(num_bytes: int) -> tuple[mmap.mmap, _File] | None:
    """None where there is no such thing, or descriptors are short."""
    name = f"midflight-{secrets.token_hex(8)}"
    try:
        descriptor = os.memfd_create(name)
    except (AttributeError, OSError):
        return None
    try:
        if not _is_short(descriptor):
            os.ftruncate(descriptor, num_bytes)
            return mmap.mmap(descriptor, num_bytes), _File(descriptor, name, num_bytes)
    except OSError:
        pass
    os.close(descriptor)
    return None


def _is_short(descriptor: int) -> bool:
    """Whether descriptors, of which this is the newest, are nearly used up: sockets and shards need some, too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - RESERVED_FILES


def _tensor(pages: mmap.mmap, file: _File, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    address = tensor.data_ptr()
    _files[address] = file
    weakref.finalize(pages, _forget, address, file).atexit = False
    return tensor


def _forget(address: int, file: _File) -> None:
    if _files.get(address) == file:
        del _files[address]
    os.close(file.descriptor)
