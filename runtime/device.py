"""The device that a worker computes on: choosing it, and describing it to the head."""

import os
import platform
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from runtime.cgroup import allowance
from runtime.pace import Law, Pacer


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A chosen device, and the slower one that it emulates, if any."""

    device: torch.device
    num_threads: int
    emulation: Law | None = None

    def pacer(self, clock: Callable[[], float]) -> Pacer | None:
        """What slows steps down to the emulated device; None when nothing is emulated. `clock` gives seconds."""
        if self.emulation is None:
            return None
        if self.device.type == "cuda":
            return Pacer(self.emulation, clock, time.sleep, lambda: torch.cuda.synchronize(self.device))
        return Pacer(self.emulation, clock, time.sleep)

    def memory(self) -> tuple[int, int]:
        """Bytes in all and bytes free right now, of the host or of the control group that is a container's limit."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return total, free + cached
        memory = psutil.virtual_memory()
        limit = allowance()
        if limit is None:
            return memory.total, memory.available
        return min(memory.total, limit.total), min(memory.available, limit.free)

    def describe(self) -> dict[str, Any]:
        """The fields of `Join` that concern this process."""
        total, available = self.memory()
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": str(self.device),
            "device_name": self._name(),
            "memory_total": total,
            "memory_available": available,
            "num_threads": self.num_threads,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            **(self.emulation.announced() if self.emulation is not None else {}),
        }

    def _name(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        return self.emulation.label(name) if self.emulation is not None else name


def choose_device(wanted: str, num_threads: int, emulation: Law | None = None) -> DeviceInfo:
    """The device named `wanted` ("auto", "cpu", "cuda", "cuda:1"); "auto" is CUDA where there is one.

    Raises:
        ValueError: when it is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"unknown device {wanted!r}; possible are auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {wanted!r} is not supported; possible are auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {wanted!r} is not there: this host has {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    torch.set_num_threads(num_threads)
    return DeviceInfo(device, num_threads, emulation)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
