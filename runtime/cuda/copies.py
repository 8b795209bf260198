"""Tensors between the device and the host beside the steps: on a stream of low priority, in pinned memory.

How it works: there is a stream for each way. `to_host` lets its stream wait for what the calling thread has queued so far, copies there, and hands the
tensor to a thread that waits for the copy and then goes on with it (checksum, sending). `to_device` copies on the
other and lets the caller's stream wait for that. Neither waits on the host. What reads and writes pages stays on the
caller's stream: a gather into a tensor of its own before `to_host`, a scatter after `to_device`.

What is never true: two tensors are handed on in another order than they came in; more than about `LIMIT_BYTES` are on
their way to the host when the caller asks `is_full` first.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from runtime.limiter import Accelerator

LIMIT_BYTES = 64 << 20
_PROBE_BYTES = 64 << 20


class Copies:
    """One per worker; called by the thread that computes. Needs CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)
        self._queue: queue.SimpleQueue[tuple[torch.Tensor, Any, Callable[[torch.Tensor], None]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending_bytes = 0
        self._error: Exception | None = None
        threading.Thread(target=self._hand_on, name="copies", daemon=True).start()

    @property
    def is_full(self) -> bool:
        """Whether what is on its way to the host should get there before more is."""
        return self._pending_bytes > LIMIT_BYTES

    def to_host(self, tensor: torch.Tensor, then: Callable[[torch.Tensor], None]) -> None:
        """Call ``then(copy)``, in a thread of our own, when a copy of `tensor` is on the host.

        Raises:
            RuntimeError: an earlier `then` or copy failed.
        """
        if self._error is not None:
            raise RuntimeError(f"a copy to the host failed: {self._error}") from self._error
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            done.record(self._out)
        tensor.record_stream(self._out)
        with self._lock:
            self._pending_bytes += tensor.nbytes
        self._queue.put((host, done, then))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor, to be used on the current stream."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            there = tensor.pin_memory().to(self._device, non_blocking=True)
        current.wait_stream(self._in)
        there.record_stream(current)
        return there

    def measure(self) -> Accelerator:
        """What the device's memory and the way there from the host can do, by copies of some milliseconds."""
        host = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=self._device)
        within = 2.0 * _PROBE_BYTES / self._seconds(lambda: there.copy_(there.clone()), copies=2)
        brought = _PROBE_BYTES / self._seconds(lambda: there.copy_(host, non_blocking=True))
        return Accelerator(memory_bytes_per_s=within, link_bytes_per_s=brought)

    def _seconds(self, copy: Callable[[], object], copies: int = 1) -> float:
        """The shortest of some runs of `copy`, over the copies that it makes."""
        taken = []
        for _ in range(4):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(self._in):
                begun.record(self._in)
                copy()
                ended.record(self._in)
            ended.synchronize()
            taken.append(1e-3 * begun.elapsed_time(ended))
        return max(min(taken), 1e-9) / copies

    def _hand_on(self) -> None:
        while True:
            host, done, then = self._queue.get()
            try:
                done.synchronize()
                then(host)
            except Exception as error:  # told to the next caller, which ends the worker
                self._error = error
            with self._lock:
                self._pending_bytes -= host.nbytes
