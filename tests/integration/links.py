"""Breaking a link between two processes that live, as a switch or a firewall does: both ends see their connections end."""

import ctypes
import errno
import os
import socket

import psutil
import pytest

_PIDFD_GETFD = 438


def break_link(one: int, other: int) -> int:
    """End every TCP connection between two processes of ours, given by their ids; how many there were.

    The connections are ended through descriptors borrowed from the first one (``pidfd_getfd``, Linux 5.6): it takes no privilege over
    one's own children, and neither process is stopped.
    """
    theirs = {(their.laddr, their.raddr) for their in psutil.Process(other).net_connections("tcp") if their.raddr}
    shared = [
        ours.fd
        for ours in psutil.Process(one).net_connections("tcp")
        if ours.raddr and (ours.raddr, ours.laddr) in theirs
    ]
    process = os.pidfd_open(one)
    try:
        borrowed = [_borrow(process, number) for number in shared]
    finally:
        os.close(process)
    for connection in borrowed:
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    return len(borrowed)


def _borrow(process: int, number: int) -> socket.socket:
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
    if descriptor < 0:
        error = ctypes.get_errno()
        if error in (errno.EPERM, errno.ENOSYS):
            pytest.skip(f"no descriptor can be borrowed here: {os.strerror(error)}")
        raise OSError(error, os.strerror(error))
    return socket.socket(fileno=descriptor)
