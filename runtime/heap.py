"""Memory that was freed, given back to the system.

What large tensors leave stays with glibc's allocator, which keeps it for the next of the kind: after some changes of layout that
is more than the process itself. `give_back` makes it return all of it. Allocations of other threads may wait for that, some
milliseconds for a hundred megabytes, so it is not for a moment at which a step may run.
"""

import ctypes


def give_back() -> None:
    """Does nothing where the allocator is another."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)
