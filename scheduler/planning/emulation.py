"""How fast a worker is by what it announces, emulation included. Pure.

An emulated device (`runtime.pace`) stretches the host's own time: by one factor where rows decode, by another where a prompt
is read. The cost model has no such split, but terms that are bound by memory and terms that are bound by arithmetic, and
what decoding and reading prompts are bound by are just these. So the factors become coefficients, where learning begins.

Never true: an emulated worker is taken for the device in the data sheet; it is its host, slowed.
"""

from runtime.messages import Join
from scheduler.planning.cost import TERMS, Speed
from scheduler.planning.devices import kind_of_worker

_ARITHMETIC = ("products", "scores")


def speed_of_worker(info: Join, num_threads: int = 1) -> Speed:
    """The speed to expect of a worker before any of its steps was seen."""
    return speed_of_make(info.device, info.device_name, num_threads, info.pace)


def speed_of_make(device: str, device_name: str, num_threads: int, pace: tuple[float, float] | None) -> Speed:
    """The same from the fields of `Join`."""
    speed = Speed(kind_of_worker(device, device_name, num_threads))
    return speed if pace is None else emulated(speed, *pace)


def emulated(speed: Speed, prefill: float, decode: float) -> Speed:
    """`speed` slowed by these factors."""
    factors = (prefill if term in _ARITHMETIC else decode for term in TERMS)
    return Speed(speed.kind, tuple(a * b for a, b in zip(speed.scale, factors, strict=True)))
