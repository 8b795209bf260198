"""Simulated time and what happens in it: an event queue, the devices, and the rates at which things move. Pure."""

import heapq
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvstore.ids import WorkerName
from scheduler.planning.cost import Speed
from scheduler.planning.devices import lookup


class SimDevice(msgspec.Struct, frozen=True):
    """A device of the simulated cluster. `label` is the name it goes by in the cluster's description."""

    worker: WorkerName
    label: str
    speed: Speed
    memory_bytes: int


class Rates(msgspec.Struct, frozen=True):
    """What is not the devices' own. Seconds and bytes/s.

    A message between two processes is `flight_s` on its way, beyond what sending takes of the sender's time (the link of
    its `DeviceKind`). The head plans a step in `head_s`, and is busy for `head_token_s` more with each token it hands out.
    A worker reads weights at `load_bytes_per_s`, of which all is time that it takes from the host. `free_changes`: a change of
    layout moves weights and KV in no time (what an oracle could do at best). `noise` is the standard deviation of the
    logarithm of each stage's time.
    """

    flight_s: float = 0.0
    head_s: float = 0.0005
    head_token_s: float = 0.0
    load_bytes_per_s: float = 2e9
    free_changes: bool = False
    noise: float = 0.0


class World:
    """The clock and what is due. Equal times happen in the order in which they were asked for."""

    def __init__(self, rates: Rates) -> None:
        self.now_s = 0.0
        self.rates = rates
        self.num_events = 0
        self._stopped = False
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        assert time_s >= self.now_s, f"{action} is due {self.now_s - time_s} s ago"
        self.num_events += 1
        heapq.heappush(self._due, (time_s, self.num_events, action, arguments))

    def run(self) -> None:
        """Let things happen until one of them calls `stop`, or nothing is due any more."""
        due, pop, self._stopped = self._due, heapq.heappop, False
        while due and not self._stopped:
            self.now_s, _, action, arguments = pop(due)
            action(*arguments)

    def stop(self) -> None:
        """End `run` after what happens now."""
        self._stopped = True


def parse_devices(text: str) -> list[tuple[str, Speed, int]]:
    """``a100:2,l40s:4`` as (label, speed, bytes of memory), one for each device.

    Raises:
        ValueError: a device that is not in the table, or no number of them.
    """
    devices: list[tuple[str, Speed, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^:\s]+)(?::([1-9]\d{0,3}))?\s*", part)
        if match is None:
            raise ValueError(f"cluster: {part!r} is no kind of device with a number; it looks like a100:2,l40s:4")
        kind = lookup(match[1])
        devices += [(match[1].lower(), Speed(kind), kind.memory_bytes)] * int(match[2] or 1)
    return devices


def name_devices(devices: Sequence[tuple[str, Speed, int]], first: Sequence[int]) -> list[SimDevice]:
    """Workers ``w0, w1, ...``: those with the indices `first` in that order, then the others.

    The head makes its first layout over workers in the order of their names.
    """
    order = [*first, *(index for index in range(len(devices)) if index not in first)]
    return [SimDevice(f"w{number}", *devices[index]) for number, index in enumerate(order)]
