"""Where the head is: reading, checking and reaching "HOST:PORT".

Never true: a wildcard address gets through, or one that is not on loopback without somebody's explicit word.
"""

import ipaddress
import socket
import time

import psutil


class Unreachable(Exception):
    """An address cannot be resolved, listened on, reached in time, or is not this machine's; the message says which."""


def parse_address(text: str, *, allow_public: bool = False) -> tuple[str, int]:
    """ "HOST:PORT" as an IP address and a port.

    Raises:
        ValueError: not of that form, a wildcard, or not loopback without `allow_public`.
        Unreachable: its host has no address at present.
    """
    host, colon, port_text = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise ValueError(f"{text!r} is no address; write HOST:PORT with a port of 0 to 65535")
    try:
        found = socket.getaddrinfo(host, None, socket.AF_UNSPEC, socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"cannot resolve the host of {text!r}: {error}") from None
    ip = sorted((str(entry[4][0]) for entry in found), key=lambda ip: ":" in ip)[0]  # IPv4 first
    parsed = ipaddress.ip_address(ip.partition("%")[0])
    if parsed.is_unspecified:
        raise ValueError(f"{text!r} means every interface; give the address of the one that the workers use")
    if not parsed.is_loopback and not allow_public:
        raise ValueError(
            f"{text!r} is not on loopback, and TensorPipe neither authenticates nor encrypts: whoever reaches the "
            "port can read and steer everything. On a network you trust, allow it explicitly (--allow-public-rpc)"
        )
    return ip, int(port_text)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on that one address; the TCP store by itself would listen on all of them."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise Unreachable(f"the head cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def await_port(host: str, port: int, deadline: float, timeout_s: float) -> str:
    """Wait until something listens at the head's address; returns our own address on the way there."""
    while True:
        try:
            left_s = min(2.0, max(0.05, deadline - time.monotonic()))
            with socket.create_connection((host, port), timeout=left_s) as probe:
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Unreachable(f"no head at {host}:{port} within {timeout_s:g} s: {error}") from None
            time.sleep(0.05)


def interface_of(ip: str) -> str:
    for interface, addresses in psutil.net_if_addrs().items():
        if any(str(entry.address).partition("%")[0] == ip for entry in addresses):
            return interface
    if ipaddress.ip_address(ip).is_loopback:
        return "lo"
    raise Unreachable(f"no network interface of this machine has the address {ip}")


def is_same_interface(url: str, ip: str) -> bool:
    """Whether TensorPipe's address (``uv://IP:PORT``) is on `ip`; all loopback addresses are one."""
    host = url.partition("://")[2].rpartition(":")[0].removeprefix("[").removesuffix("]")
    if ipaddress.ip_address(ip).is_loopback:
        return ipaddress.ip_address(host).is_loopback
    return host == ip
