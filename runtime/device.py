"""The device that a worker computes on: choosing it, and describing it to the head."""

import os
import platform
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import torch


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A chosen device."""

    device: torch.device
    num_threads: int

    def memory(self) -> tuple[int, int]:
        """Bytes in all and bytes free right now."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total, free
        memory = psutil.virtual_memory()
        return memory.total, memory.available

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
        }

    def _name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return _cpu_name()


def choose_device(wanted: str, num_threads: int) -> DeviceInfo:
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
    return DeviceInfo(device, num_threads)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
